"""The neural pass of an evaluation, kept for RESUME_EVAL=1 and bench/mixers.py.

A file holds columns (N,4) float64, golf.NeuralColumns; tokens (N+1,) and byte_counts (N,) int64;
seconds (), the time that the pass took. Its name tells what the pass depends on, so that a pass is
found again whatever the run is called, and none is taken for another's.
"""

import hashlib
import json
from pathlib import Path

import torch

import train_gpt as golf


def place(evaluation, artifact: str) -> str:
    """Path, without suffix, of the pass of an artifact (its SHA-256) over an evaluation's stream."""
    cfg, tokens = evaluation.cfg, evaluation.data.val.numpy()
    settings = [cfg.eval_seq_len, cfg.eval_stride, cfg.eval_batch_windows, cfg.ngram_enabled,
                cfg.mixer_max_order, evaluation.run.device.type]
    made_of = json.dumps([artifact, hashlib.sha256(tokens).hexdigest(), settings])
    return f"{cfg.logs_path}/neural-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def save(evaluation, artifact: str, columns, seconds: float) -> None:
    """Keep a pass, on rank 0, unless the very same is kept already."""
    data = evaluation.data
    if Path(place(evaluation, artifact) + ".safetensors").exists():
        return
    evaluation.run.save(".safetensors", dict(
        columns=columns, tokens=data.val, byte_counts=data.table.target_bytes(data.val),
        seconds=torch.tensor(seconds)), place(evaluation, artifact))


def load(evaluation, artifact: str) -> bool:
    """Take a saved pass if there is one; the time that it took counts as this evaluation's."""
    path = Path(place(evaluation, artifact) + ".safetensors")
    if not path.exists():
        evaluation.run.log(f"neural pass: no {path}, so it is made now")
        return False
    saved = golf.read_weights(path)
    if not saved.keys() >= {"columns", "seconds"} or saved["columns"].shape != (
            len(evaluation.data.val) - 1, len(golf.NeuralColumns._fields)):
        raise golf.RunError(f"{path}: not the neural pass that its name says; delete it")
    evaluation.columns = golf.NeuralColumns(*saved["columns"].unbind(1))
    evaluation.earlier_seconds = float(saved["seconds"])
    evaluation.run.log(f"neural pass: {path}, made in {evaluation.earlier_seconds:.1f} s")
    return True
