"""How often a run asks its accelerator for something, and how often it waits for the answer.

    export PYTHONPATH=tests/pretend
    python bench/launches.py            the table of docs/speed.md; about two minutes on one core
    python bench/launches.py --json     the same as JSON, for the tests

No accelerator is needed: tests/pretend has one that counts. The network has golf's blocks at full
size, 11 of them with loop, lanes and gates, in narrow: the number of operations does not depend on
the width. It is not compiled; compiled graphs launch a fraction of these operations.
"""

import argparse
import json
import math
import os
import sys
import tempfile

import torch

import pretend_device as device
from common import first_targets, golf

LAUNCH_SECONDS = 5e-6  # of one operation on the host, as is usual for PyTorch; not measured here
FULL_TARGETS = 62_021_632  # of the challenge's validation text
FULL_STRIDE, FULL_WINDOWS = 64, 128  # EVAL_STRIDE and EVAL_BATCH_WINDOWS
MICRO_BATCHES = {"one rank": 8, "eight ranks": 1}  # of a step of 786,432 tokens
SIZES = dict(
    DEVICE="pretend",
    SCALE="demo",
    COMPILE="0",
    PICTURE="0",
    NUM_LAYERS="11",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    ROPE_DIMS="4",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    VE_DIM="8",
    VOCAB_SIZE="512",
    TRAIN_SEQ_LEN="64",
    EVAL_SEQ_LEN="64",
    EVAL_STRIDE="16",
    EVAL_BATCH_WINDOWS="8",
    TRAIN_BATCH_TOKENS="128",
    MICRO_BATCH_TOKENS="128",
    MIXER_CHUNK_TOKENS="256",
    VAL_TOKENS="2048",
    VAL_LOSS_EVERY="0",
    TRAIN_LOG_EVERY="0",
    ITERATIONS="100",
    MAX_WALLCLOCK_SECONDS="0",
)


def counted(work) -> tuple[int, dict[str, int]]:
    """(operations, {kind: waits}) of work()."""
    with device.counted() as (operations, waits):
        work()
    return sum(operations.values()), dict(waits)


def per_unit(once, more, units: int) -> tuple[float, dict[str, float]]:
    """(operations, waits) of one unit: what `more`, of so many units more, has beyond `once`."""
    (few, few_waits), (many, many_waits) = counted(once), counted(more)
    kinds = few_waits.keys() | many_waits.keys()
    waits = {k: (many_waits.get(k, 0) - few_waits.get(k, 0)) / units for k in kinds}
    return (many - few) / units, {k: v for k, v in waits.items() if v}


def start(folder: str, **settings) -> tuple:
    """(cfg, run, data) of a run on the pretended accelerator."""
    names = {"PREPARED_PATH": f"{folder}/data", "LOGS_PATH": f"{folder}/logs"}
    env = dict(os.environ) | SIZES | golf_network() | names | settings
    cfg, _ = golf.load_config(env)
    run = golf.Run(cfg)
    run.speaks = False
    return cfg, run, golf.load_data(cfg, run)


def golf_network() -> dict[str, str]:
    """Variables that give the demo golf's network at full size."""
    return {name.upper(): golf.text_of(getattr(golf.Config, name)) for name in golf.SHARED}


def training_counts(cfg, run, data) -> dict[str, tuple]:
    """Of a step with one micro-batch and with two, once the loop is on."""
    found = {}
    for name, tokens in (("one", 128), ("two", 256)):
        own = golf.replace(cfg, train_batch_tokens=tokens, loop_from=0.0)
        trainer = golf.Trainer(golf.build_model(own, run), data, own, run)
        trainer.average = golf.WeightAverage(trainer.model, own)
        trainer.optimizer = golf.Optimizer(trainer.model, own, run)
        for _ in range(3):
            trainer.take_step()
        operations, waits = counted(lambda t=trainer: [t.take_step() for _ in range(4)])
        found[name] = operations / 4, {k: v / 4 for k, v in waits.items()}
        trainer.settle()
    two, one = found["two"][0], found["one"][0]
    return {
        "training step": found["one"],
        "of it a micro-batch": (two - one, {}),
    }


def evaluation_counts(cfg, run, data) -> dict[str, tuple]:
    """Of a batch of the neural pass, a chunk of mixing, a block of counting; then of the audit."""
    model = golf.build_model(golf.replace(cfg, mtp_num_heads=0), run)
    stored = golf.quantize({n: p.detach().cpu() for n, p in model.named_parameters()}, cfg)
    vocabulary = data.corpus["vocabulary_sha256"]
    blob = golf.pack(stored, cfg, vocabulary)
    cfg, model, network = golf.load_network(blob, data, cfg, run)
    evaluation = golf.Evaluation(model, data, cfg, run, network, blob=blob)
    evaluation.neural_pass()
    neural, found = evaluation.neural, {}

    def batches(count: int):
        whole, neural.grid.batches = neural.grid.batches, [range(1, 1 + count)]
        neural.columns()
        neural.grid.batches = whole

    found["batch of the neural pass"] = per_unit(lambda: batches(1), lambda: batches(4), 3)
    evaluation.score("calibrated", 0.0)
    inputs = evaluation.mix_inputs(len(neural.tokens) - 1)

    def mixed(chunks: int):
        golf.mix(*first_targets(256 * chunks, *inputs), 256)

    found["chunk of mixing"] = per_unit(lambda: mixed(2), lambda: mixed(6), 4)
    for scoring in evaluation.scorings[1:]:
        evaluation.score(scoring, 0.0)
    found["masses"] = counted(evaluation.masses)
    for name in ("causal", "normalized", "single_pass", "bytes", "decodable"):
        check = getattr(golf, f"audit_{name}")
        found[f"audit {name}"] = counted(lambda check=check: check(evaluation))
    return found


def counting_counts(run, data) -> dict[str, tuple]:
    """Of a block of each order's counts: the stream in one block, and in four."""
    tokens = data.val.to(run.device, torch.int32)

    def columns(block: int):
        whole, golf.BLOCK = golf.BLOCK, block
        for _ in golf.count_ngrams(tokens, 4, followers=False):
            pass
        golf.BLOCK = whole

    columns(4096)
    found = per_unit(lambda: columns(4096), lambda: columns(256), 28)
    return {"block of counting, an order": found}


def table(found: dict[str, tuple]) -> list[str]:
    """Lines of the table of docs/speed.md."""
    batches = math.ceil(FULL_TARGETS / FULL_STRIDE / FULL_WINDOWS)
    chunks = math.ceil(FULL_TARGETS / golf.Config.mixer_chunk_tokens)
    times = {"batch of the neural pass": batches, "chunk of mixing": chunks}
    lines = [
        "| stage | operations | waits | times at full size | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, (operations, waits) in found.items():
        told = ", ".join(f"{v:g} {k}" for k, v in sorted(waits.items())) or "none"
        count = times.get(name, 1)
        seconds = operations * count * LAUNCH_SECONDS
        lines.append(f"| {name} | {operations:,.0f} | {told} | {count:,} | {seconds:.3g} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = start(folder)
        found = (
            training_counts(*started) | counting_counts(*started[1:]) | evaluation_counts(*started)
        )
    print(json.dumps(found) if args.json else "\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
