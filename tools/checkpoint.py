"""Checkpoints of a training: CHECKPOINT_SECONDS saves them, RESUME=1 goes on from one.

A resumed training takes the same steps on the same data as an uninterrupted one, on any number of
ranks; without a wall-clock cap it ends with the same bits. Each rank reads the file, so that several
nodes need a folder in common.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import train_gpt as golf

# Settings of training that change no step.
STEPLESS = {"micro_batch_tokens", "warmup_steps", "val_loss_every", "val_batch_size",
            "train_log_every", "checkpoint_seconds", "resume"}


class Checkpoint:
    """The checkpoint of a golf.Trainer that is about to start; resumes it if RESUME=1."""

    def __init__(self, trainer):
        self.trainer, self.run, self.saved_at = trainer, trainer.run, 0.0
        cfg, optimizer = trainer.cfg, trainer.optimizer
        for p in optimizer.small:
            p.grad = torch.zeros_like(p)
        optimizer.adam.step()  # its state exists from here on; groups begin with lr 0
        for p in optimizer.small:
            p.grad = None
            optimizer.adam.state[p]["step"].zero_()
        # A resumed run takes a free name for its log but goes on with the checkpoint of RUN_ID.
        self.base = f"{cfg.logs_path}/{cfg.run_id}" if cfg.resume else ""
        if cfg.resume:
            self.run.agree(self.resume, everywhere=True)
            self.saved_at = trainer.elapsed

    def save_if_due(self) -> None:
        """Save after every CHECKPOINT_SECONDS of training time; ranks agree on that time."""
        every = self.trainer.cfg.checkpoint_seconds
        if 0 < every <= self.trainer.elapsed - self.saved_at:
            self.save()

    def tensors(self) -> dict[str, Tensor]:
        """What steps change, by name, in place; of momenta what the banks' `full` hold."""
        optimizer, average = self.trainer.optimizer, self.trainer.average
        parts = dict(weights=average.params, average=average.average,
                     momenta=[bank.full[:len(bank.bank)] for bank in optimizer.banks])
        for i, state in enumerate(optimizer.adam.state.values()):
            parts[f"adam.{i}"] = state.values()
        return {f"{kind}.{i}": t for kind, part in parts.items() for i, t in enumerate(part)}

    def made_of(self) -> Tensor:
        """Fingerprint of all that steps depend on, but the number of ranks."""
        cfg, data, names = self.trainer.cfg, self.trainer.data, list(golf.FIELDS)
        names = names[names.index("num_layers"):names.index("compressor") + 1]
        settings = [asdict(cfg)[n] for n in names if n not in STEPLESS] + [cfg.seed]
        text = json.dumps([settings, len(data.train), data.corpus["vocabulary_sha256"]])
        digest = hashlib.sha256(text.encode()).digest()
        return torch.frombuffer(bytearray(digest), dtype=torch.uint8)

    def save(self) -> None:
        """Write all that the next step depends on; all ranks take part, for momenta are divided."""
        trainer = self.trainer
        for bank in trainer.optimizer.banks:
            golf.all_gather(bank.full, bank.momentum)
        numbers = [trainer.steps, trainer.elapsed, trainer.now, trainer.last_loss,
                   trainer.loader.position, trainer.average.mass, trainer.average.samples]
        if self.run.is_main:
            self.run.save(".checkpoint", self.tensors() | dict(
                numbers=torch.tensor(numbers, dtype=torch.float64), made_of=self.made_of()),
                self.base)
        self.saved_at = trainer.elapsed

    def resume(self) -> None:
        """Load the checkpoint of RUN_ID; RunError if there is none that fits."""
        trainer, path = self.trainer, Path(f"{self.base}.checkpoint")
        if not path.exists():
            raise golf.RunError(
                f"RESUME=1: there is no {path}; RUN_ID names the run to go on with, "
                "CHECKPOINT_SECONDS saves checkpoints, LOAD_WEIGHTS takes a finished training")
        saved = golf.read_weights(path)
        if not torch.equal(saved.get("made_of", torch.empty(0)), self.made_of()):
            raise golf.RunError(f"{path}: of a run with other settings or another corpus")
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        for bank in trainer.optimizer.banks:
            bank.momentum.copy_(bank.full.chunk(self.run.world)[self.run.rank])
        steps, trainer.elapsed, trainer.now, trainer.last_loss, *more = saved["numbers"].tolist()
        position, trainer.average.mass, samples = more
        trainer.steps, trainer.loader.position = int(steps), int(position)
        trainer.average.samples = int(samples)
        self.run.log(f"resumed {path}: {trainer.steps} steps, {trainer.elapsed:.1f} s")
