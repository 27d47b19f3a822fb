"""Parameter Golf, whole: train a small GPT, ship it in 16,000,000 bytes, score it in bits per byte.

    text or shards -> train -> weights -> quantize + compress -> artifact -> evaluate -> val_bpb

    python train_gpt.py                                       a laptop, no data needed: minutes
    TEXT_FILES='notes/**/*.md' python train_gpt.py            the same on your own text
    torchrun --standalone --nproc_per_node=8 train_gpt.py     the challenge: 8 GPUs, FineWeb shards
    RECIPE=pr1094 python train_gpt.py                         one of the four public submissions
    LOAD_ARTIFACT=logs/x.int6.ptz python train_gpt.py         evaluation alone
    python train_gpt.py --help                                every variable and recipe

Everything is set by environment variables; the last line that a run prints is its `final` line.
The file is in the order in which a run executes it, and needs no other file of ours. Units are in
names (`_seconds`, `_bytes`, `_tokens`). Shapes use B windows, T tokens of a window, C model_dim,
H heads, D head_dim, L layers, V vocabulary, N targets, M items. A target is a token to be
predicted: of a stream of N + 1 tokens, target i is token i + 1.

Contents

     1  Configuration and recipes     every setting of a run; the four submissions as data
     2  Variables and help            from the environment to a configuration, and --help
     3  Runtime                       ranks, log, files, and what to say of a rank that died
     4  Data                          shards, tokenizer, batches, bytes of a token
     5  Text preparation              shards and tokenizer from plain text
     6  Model                         the GPT
     7  Optimizers                    Muon, sharded over ranks, and AdamW
     8  Training                      the loop under its wall-clock cap; checkpoints
     9  Quantization                  from weights to integer codes
    10  Artifact                      codes to bytes and back
    11  Windows and neural pass       the network's opinion of each target, once
    12  N-gram counts                 what followed the same context before
    13  Backoff mixing                the submissions' rules
    14  Calibrated mixing             ours: a probability distribution, learned online
    15  Evaluation                    one neural pass, scored in several ways
    16  Audit                         the run proves its own score
    17  Report                        log lines, table, picture, submission.json
    18  Main                          the run as a table of contents
"""

from __future__ import annotations

import collections
import contextlib
import copy
import difflib
import fnmatch
import functools
import glob
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # packages take seconds to load: a signal is one line then, too

    def end_early(*_: Any) -> None:
        """Signal handler until main() heeds signals."""
        os.write(2, b"error: interrupted during start; saved so far: nothing\n")
        os._exit(2)

    for early in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # no SIGHUP on Windows
        if signal.getsignal(getattr(signal, early)) != signal.SIG_IGN:
            signal.signal(getattr(signal, early), end_early)

import numpy as np
import safetensors.torch
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from tqdm import tqdm

try:
    import constriction
except ImportError:  # there is none for Linux on ARM: see check_packages
    constriction = None

# ==================================================================================================
# 1. Configuration and recipes
# ==================================================================================================
#
# A run is determined by one frozen Config. Its settings are declared here, once, with default,
# meaning and allowed values; the environment variable is the setting's name in capitals. A recipe
# is data: the values in which a submission differs from the defaults, which are `golf`, ours. The
# values win in this order: environment, sizes of SCALE, recipe, SHARED (at demo scale), default
# (section 2).


class RunError(Exception):
    """Bad input or a failed stage: one line for the user, a non-zero exit on every rank."""


# Ranges of numbers. Each has an end that no use comes near, so that a slip of the pen is told at
# once: what is larger ends after minutes in an overflow, or never.
NONNEGATIVE = (0, 10**12)
POSITIVE = (1, 10**12)
FRACTION = (0, 1)
BELOW_ONE = (0, 1 - 1e-9)
RATE = (0, 10**6)  # learning rates, decays, gains
SECONDS = (0, 10**8)  # three years
WHOLE_SECONDS = (1, 10**8)


class LaunchError(RunError):
    """A launcher's variables that make no rank: every process says so, for none is the first."""


def accelerator() -> str:
    """Type of the accelerator that PyTorch finds here ("cuda", say); "cpu" without one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


DEVICES = [*dict.fromkeys(["auto", "cpu", "cuda", accelerator()])]


def setting(default, meaning: str, allowed=None):
    """A setting: its default, and the line that --help prints of it, with its unit.

    allowed: of a number, the inclusive (low, high), by default NONNEGATIVE; of text, its choices,
    by default any. The type is the annotation: str, bool, int, float or a tuple of numbers.
    """
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass(frozen=True)
class RunSettings:
    """What runs, where, and under which name."""

    recipe: str = setting("golf", "ours (golf) or a submission's (pr889, pr806, pr890, pr1094)")
    scale: str = setting("auto", "the challenge's size or a laptop's", ["auto", "full", "demo"])
    smoke: bool = setting(False, "1: everything once in a minute, at a size that says nothing")
    run_id: str = setting("", "name of the run's files; empty: recipe-scale-seed")
    seed: int = setting(1337, "seed of the initialization", (0, 2**32 - 1))
    logs_path: str = setting("logs", "folder of logs, weights and artifacts")
    device: str = setting(
        "auto", "cpu or an accelerator; auto: CUDA where present, else the CPU", DEVICES
    )
    ranks: int = setting(
        0, "processes on a CPU, where torchrun starts none; 0: as fits it", (0, 64)
    )
    compile: str = setting(
        "auto", "torch.compile; auto: on CUDA, and a CPU's long trainings", ["auto", "0", "1"]
    )
    compute: str = setting(
        "auto",
        "the network's arithmetic; auto: bfloat16 on CUDA that has it, else float32",
        ["auto", "float32", "bfloat16"],
    )
    attention: str = setting(
        "auto", "attention back end", ["auto", "flash3", "cudnn", "flash2", "sdpa"]
    )
    dist_timeout_seconds: float = setting(
        1800.0, "a rank silent for so long ends the run", WHOLE_SECONDS
    )
    picture: bool = setting(True, "0: no picture of the run")
    author: str = setting("", "author, for submission.json")
    github_id: str = setting("", "author's GitHub name, for submission.json")
    debug: bool = setting(False, "1: tracebacks instead of one-line errors")


@dataclass(frozen=True)
class DataSettings:
    """Where tokens come from."""

    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of shards")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "their tokenizer")
    text_files: str = setting("", "folders or globs of text, separated by ':'; a file, a document")
    prepared_path: str = setting("data", "folder for tokenizers and shards made from text")
    vocab_size: int = setting(1024, "pieces of the tokenizer", (260, 65536))
    val_tokens: int = setting(0, "validation targets to score; 0: all")


@dataclass(frozen=True)
class ModelSettings:
    """The network (section 6)."""

    num_layers: int = setting(11, "blocks", (2, 256))
    model_dim: int = setting(512, "width", (8, 65536))
    num_heads: int = setting(8, "query heads", (1, 65536))
    num_kv_heads: int = setting(4, "key and value heads", (1, 65536))
    mlp_mult: float = setting(4.0, "hidden width of the MLP over model_dim", (0.1, 64))
    relu_slope: float = setting(0.5, "MLP activation: leaky_relu(x, slope) squared", FRACTION)
    tied_embed_init_std: float = setting(0.005, "std of the token embedding at the start", RATE)
    proj_init_gain: float = setting(1.0, "gain at the start of bigram_proj and value_proj", RATE)
    logit_softcap: float = setting(30.0, "logits are softcap*tanh(x/softcap)", (1e-3, 1e6))
    qk_gain_init: float = setting(5.0, "start of the queries' per-head gain", (0, 1e4))
    rope_base: float = setting(10000.0, "base of the rotary embedding (RoPE)", (1, 1e9))
    rope_dims: int = setting(16, "rotated dims of each head; even", (2, 65536))
    ln_scale: bool = setting(True, "scale normed inputs by 1/sqrt(layer+1)")
    bigram_vocab_size: int = setting(2048, "rows of the bigram-hash embedding; 0: none", (0, 2**24))
    bigram_dim: int = setting(128, "its width", (1, 65536))
    ve_enabled: bool = setting(True, "value embedding on ve_layers")
    ve_dim: int = setting(128, "its width", (1, 65536))
    ve_layers: tuple[int, ...] = setting((9, 10), "layers with a value embedding")
    xsa_last_n: int = setting(11, "last layers with exclusive self-attention (XSA)")
    value_residual: bool = setting(False, "mix every layer's values with the first layer's")
    loop_first: int = setting(3, "first of the blocks that are visited loop_passes times", POSITIVE)
    loop_last: int = setting(5, "last of them", POSITIVE)
    loop_passes: int = setting(3, "visits of each of them in a pass; 1: no loop", (1, 16))
    lanes_from: int = setting(8, "first layer with two residual lanes; 0: none")
    attn_gate: bool = setting(True, "a gate a head on attention's output, by its input")
    content_smear: bool = setting(True, "smear by a token's embedding, and not over BOS")
    mtp_num_heads: int = setting(0, "multi-token prediction heads; trained, not exported", (0, 16))
    mtp_loss_weight: float = setting(0.2, "weight of their mean loss", RATE)


@dataclass(frozen=True)
class TrainingSettings:
    """The training loop (section 8)."""

    iterations: int = setting(20000, "most training steps")
    max_wallclock_seconds: float = setting(600.0, "cap on training time; 0: none", SECONDS)
    train_batch_tokens: int = setting(786432, "tokens a step, over all ranks", POSITIVE)
    micro_batch_tokens: int = setting(0, "tokens of a rank's forward pass; 0: its share, <= 98,304")
    train_seq_len: int = setting(2048, "tokens of a training sequence", (2, 10**6))
    schedule_steps: int = setting(7000, "steps that the step counts below are parts of", POSITIVE)
    warmup_steps: int = setting(20, "steps before the clock; they leave no trace", (0, 10**4))
    warmdown_iters: int = setting(3500, "final steps in which the lr falls to 0")
    loop_from: float = setting(0.35, "part of the training after which blocks loop", FRACTION)
    val_loss_every: int = setting(4000, "steps between validations; 0: at the end only")
    val_batch_size: int = setting(524288, "tokens of a validation batch, over 8 ranks", POSITIVE)
    train_log_every: int = setting(200, "steps between training lines")
    checkpoint_seconds: float = setting(0.0, "training time between checkpoints; 0: none", SECONDS)
    resume: bool = setting(False, "1: go on from the checkpoint of RUN_ID")
    averaging: str = setting("ema", "weights to export", ["ema", "swa", "none"])
    ema_decay: float = setting(0.997, "per step of schedule_steps", FRACTION)
    swa_enabled: bool = setting(True, "0 turns AVERAGING=swa off")
    swa_every: int = setting(200, "steps between SWA samples, once the lr scale is < 0.5", POSITIVE)


@dataclass(frozen=True)
class OptimizerSettings:
    """Muon and AdamW (section 7)."""

    matrix_lr: float = setting(0.025, "Muon's lr", RATE)
    scalar_lr: float = setting(0.025, "AdamW's lr of vectors", RATE)
    tied_embed_lr: float = setting(0.035, "AdamW's lr of embeddings and tied head", RATE)
    head_lr: float = setting(0.008, "AdamW's lr of MTP heads", RATE)
    muon_momentum: float = setting(0.97, "Muon's momentum", FRACTION)
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum at the start", FRACTION)
    muon_momentum_warmup_steps: int = setting(1500, "steps until full momentum")
    muon_backend_steps: int = setting(5, "Newton-Schulz steps", (1, 20))
    muon_row_norm: bool = setting(True, "1: rows of Muon's updates are normalized (MuonEq-R)")
    muon_wd: float = setting(0.04, "Muon's decoupled weight decay", RATE)
    beta1: float = setting(0.9, "AdamW's beta 1", BELOW_ONE)
    beta2: float = setting(0.95, "AdamW's beta 2", BELOW_ONE)
    adam_eps: float = setting(1e-8, "AdamW's epsilon", FRACTION)
    adam_wd: float = setting(0.04, "AdamW's decoupled weight decay of vectors", RATE)
    embed_wd: float = setting(0.04, "AdamW's decoupled weight decay of embeddings and heads", RATE)
    grad_clip_norm: float = setting(0.3, "largest norm of the averaged gradient; 0: no clipping")


@dataclass(frozen=True)
class ArtifactSettings:
    """Quantization and the file that is shipped (sections 9 and 10)."""

    gptq_seconds: float = setting(10.0, "training time kept for calibration; 0: no GPTQ", SECONDS)
    matrix_bits: int = setting(6, "bits of a matrix code; with ans, on average", (2, 8))
    embed_bits: int = setting(8, "bits of an embedding code, likewise", (2, 8))
    compressor: str = setting(
        "ans", "ans: entropy coder of 8-bit codes; others: a byte per code", ["ans", "zstd", "lzma"]
    )
    artifact_bytes: int = setting(16_000_000, "budget for code + artifact", POSITIVE)
    load_weights: str = setting("", "quantize these weights (.safetensors); no training")
    load_artifact: str = setting("", "evaluate this artifact; no training")


@dataclass(frozen=True)
class EvaluationSettings:
    """Windows, headline and audit (sections 11, 15 and 16)."""

    eval_seq_len: int = setting(2048, "tokens of a window", (2, 10**6))
    eval_stride: int = setting(64, "targets a window scores", POSITIVE)
    eval_batch_windows: int = setting(128, "windows of a batch", (1, 2**16))
    max_eval_seconds: float = setting(600.0, "budget of the evaluation", WHOLE_SECONDS)
    save_pass: bool = setting(False, "1: keep the neural pass, for bench/mixers.py")
    scoring: str = setting("calibrated", "headline", ["neural", "backoff", "calibrated"])
    audit: str = setting("1", "check the score; strict: exit 3 if one fails", ["0", "1", "strict"])
    sample: str = setting("", "with LOAD_ARTIFACT: continue this text, score nothing")


@dataclass(frozen=True)
class MixingSettings:
    """N-grams beside the network (sections 12 to 14); "hashed": of the submissions' tables."""

    ngram_enabled: bool = setting(True, "mix with n-grams at all")
    mixer_max_order: int = setting(12, "longest n-gram of the calibrated mixer", (4, 64))
    mixer_chunk_tokens: int = setting(8192, "targets between updates of its tables", POSITIVE)
    ngram_table: str = setting("exact", "keys of the backoff headline", ["exact", "hashed"])
    ngram_min_order: int = setting(2, "shortest n-gram of the backoff", (2, 64))
    ngram_max_order: int = setting(7, "longest n-gram of the backoff", (2, 64))
    ngram_min_count: int = setting(2, "a context matches from this count on", POSITIVE)
    ngram_entropy: bool = setting(True, "alpha follows the entropy H; 0: it is ngram_alpha")
    ngram_alpha: float = setting(0.4, "fixed alpha", FRACTION)
    ngram_ent_base: float = setting(
        0.05, "alpha = base + range*sigmoid(scale*(H-center))", FRACTION
    )
    ngram_ent_range: float = setting(0.55, "see ngram_ent_base", FRACTION)
    ngram_ent_scale: float = setting(2.0, "see ngram_ent_base")
    ngram_ent_center: tuple[float, ...] = setting((4.0,), "nats; one, or one per order from 2")
    ngram_fallback: str = setting("network", "without a match", ["network", "unigram"])
    ngram_start_tokens: int = setting(0, "network alone until so many tokens are counted")
    ngram_buckets: int = setting(2**22, "hashed: buckets of an order's table", (1, 2**30))
    ngram_match: str = setting("context", "hashed: what counts as a match", ["context", "pair"])
    ngram_granularity: str = setting("window", "hashed: counts lag", ["token", "window", "batch"])
    ngram_batch_windows: int = setting(128, "hashed: windows of a batch of counts", (1, 10**6))
    ngram_history: str = setting("prefill", "hashed: a rank's start", ["prefill", "cold"])
    ngram_primes: tuple[int, ...] = setting(
        (36313, 27191, 51647, 81929, 131071, 174763, 233017), "hashed: multipliers of tokens"
    )


@dataclass(frozen=True)
class Config(
    RunSettings,
    DataSettings,
    ModelSettings,
    TrainingSettings,
    OptimizerSettings,
    ArtifactSettings,
    EvaluationSettings,
    MixingSettings,
):
    """Every setting of a run, flat: cfg.num_layers, cfg.eval_stride, ..."""


# Settings by section, in reading order, and all of them by name.
SECTIONS = {cls.__name__.removesuffix("Settings"): fields(cls) for cls in Config.__bases__}
FIELDS = {f.name: f for section in SECTIONS.values() for f in section}

# Settings that determine the network's function, which the artifact's header holds: equal weights
# give equal bytes, whatever the run was called. Those at a value of PLAIN are not named in it, so
# that artifacts from before a setting was added are read as what they are.
INITIAL_SETTINGS = {"tied_embed_init_std", "proj_init_gain", "qk_gain_init"}
TRAINING_ONLY_SETTINGS = INITIAL_SETTINGS | {"mtp_num_heads", "mtp_loss_weight"}
ARCHITECTURE = [f.name for f in fields(ModelSettings) if f.name not in TRAINING_ONLY_SETTINGS]
ARCHITECTURE += ["vocab_size", "matrix_bits", "embed_bits"]
PLAIN: dict[str, Any] = {
    "loop_first": 3,  # without a loop it does not matter which
    "loop_last": 5,
    "loop_passes": 1,
    "lanes_from": 0,
    "attn_gate": False,
    "content_smear": False,
}

# The four submissions, openai/parameter-golf pull requests 889, 806, 890 and 1094.
# schedule_steps: steps that their published runs took. proj_init_gain: three of them divide the
# start of every projection by sqrt(2 NUM_LAYERS), and other projections start at 0.
# SHARED: their network and momentum where golf's is what the field has found since (#1290, #1435,
# #1529, #1667, #1851). Golf has it at demo scale too, for what it has given up pays only in a
# network that sees many tokens a parameter (docs/network.md).
SHARED: dict[str, Any] = PLAIN | {
    "mlp_mult": 3.0,
    "qk_gain_init": 1.5,
    "muon_momentum": 0.99,
    "muon_row_norm": False,
}
SUBMITTED: dict[str, Any] = SHARED | {
    "gptq_seconds": 0.0,
    "scoring": "backoff",
    "ngram_table": "hashed",
}
RECIPES: dict[str, dict[str, Any]] = {
    "golf": {},
    "pr889": SUBMITTED
    | {
        "xsa_last_n": 4,
        "value_residual": True,
        "proj_init_gain": 22**-0.5,
        "schedule_steps": 6760,
        "compressor": "lzma",
        "ngram_history": "cold",
        "ngram_primes": (36313, 27191, 51647, 81929, 131071, 175447, 209591),
    },
    "pr806": SUBMITTED
    | {
        "relu_slope": 0.9,
        "ve_enabled": False,
        "xsa_last_n": 0,
        "rope_dims": 64,
        "ln_scale": False,
        "proj_init_gain": 22**-0.5,
        "schedule_steps": 7185,
        "warmdown_iters": 3000,
        "averaging": "swa",
        "compressor": "zstd",
    },
    "pr890": SUBMITTED
    | {
        "num_kv_heads": 8,
        "mlp_mult": 3.5,
        "bigram_vocab_size": 4096,
        "proj_init_gain": 22**-0.5,
        "schedule_steps": 5180,
        "matrix_bits": 5,
        "compressor": "zstd",
        "eval_stride": 32,
        "ngram_max_order": 9,
        "ngram_ent_center": (4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 2.8, 2.6),
        "ngram_match": "pair",
        "ngram_primes": (*Config.ngram_primes, 299993, 350377),
    },
    "pr1094": SUBMITTED
    | {
        "relu_slope": 0.75,
        "xsa_last_n": 4,
        "mtp_num_heads": 2,
        "mtp_loss_weight": 0.1,
        "schedule_steps": 7020,
        "warmdown_iters": 3700,
        "matrix_lr": 0.027,
        "compressor": "lzma",
        "ngram_max_order": 10,
        "ngram_min_count": 1,
        "ngram_ent_base": 0.2,
        "ngram_ent_center": (3.0,),
        "ngram_fallback": "unigram",
        "ngram_start_tokens": 5000,
        "ngram_granularity": "batch",
    },
}

# SCALE=demo, a laptop's sizes: 11 layers still, about two minutes of training on 2 cores.
DEMO: dict[str, Any] = {
    "model_dim": 128,
    "num_heads": 4,
    "bigram_vocab_size": 1024,
    "bigram_dim": 32,
    "ve_dim": 32,
    "train_batch_tokens": 4096,
    "train_seq_len": 256,
    "max_wallclock_seconds": 120.0,
    "warmup_steps": 2,
    "val_tokens": 131072,
    "val_batch_size": 32768,
    "eval_seq_len": 256,
    "eval_batch_windows": 16,
    "mixer_chunk_tokens": 1024,
}


# Suffixes of the files that a run writes. The longest name that file systems take has 255 bytes; a
# file that is being written has at most 24 more than its final name (write_atomic).
SUFFIXES = (".submission.json", ".checkpoint", ".safetensors", ".int6.ptz")
LONGEST_NAME = 255 - 24

# SMOKE=1, on top of DEMO: a first look, and a test of a machine.
SMOKE: dict[str, Any] = {
    "model_dim": 64,
    "train_seq_len": 128,
    "eval_seq_len": 128,
    "train_batch_tokens": 2048,
    "max_wallclock_seconds": 10.0,
    "val_tokens": 32768,
}


def model_contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
    """Yield (setting, what it must be) of the network's settings that contradict each other."""
    head_dim = cfg.model_dim // cfg.num_heads
    value_layers = set(cfg.ve_layers) & set(range(cfg.num_layers))
    if cfg.model_dim % cfg.num_heads:
        yield "model_dim", f"divisible by NUM_HEADS {cfg.num_heads}"
    if cfg.num_heads % cfg.num_kv_heads:
        yield "num_heads", f"divisible by NUM_KV_HEADS {cfg.num_kv_heads}"
    if cfg.rope_dims % 2 or cfg.rope_dims > head_dim:
        yield "rope_dims", f"even, at most {head_dim}"
    if cfg.xsa_last_n > cfg.num_layers:
        yield "xsa_last_n", f"at most NUM_LAYERS {cfg.num_layers}"
    if cfg.ve_enabled and len(value_layers) < len(cfg.ve_layers):
        yield "ve_layers", f"different layers from 0 to below NUM_LAYERS {cfg.num_layers}"
    if cfg.bigram_vocab_size == 1:
        yield "bigram_vocab_size", "0 or at least 2"
    if cfg.loop_passes > 1 and not cfg.loop_first <= cfg.loop_last < cfg.num_layers:
        yield "loop_last", f"from LOOP_FIRST {cfg.loop_first} to below NUM_LAYERS {cfg.num_layers}"
    if cfg.lanes_from >= cfg.num_layers:
        yield "lanes_from", f"0, or below NUM_LAYERS {cfg.num_layers}"
    if cfg.loop_passes > 1 and 0 < cfg.lanes_from <= cfg.loop_last:
        yield "lanes_from", f"0, or more than LOOP_LAST {cfg.loop_last}"


def is_plain_name(name: str) -> bool:
    """Whether a text can be the name of a file in a folder, and be read in a line of a log."""
    return name.isprintable() and not {"/", os.sep} & {*name} and not name.startswith(".")


def run_contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
    """Yield (setting, what it must be) of contradictions in training and evaluation."""
    trains = not (cfg.load_artifact or cfg.load_weights)
    if cfg.eval_stride > cfg.eval_seq_len:
        yield "eval_stride", "at most EVAL_SEQ_LEN"
    for name in ("train_batch_tokens", "micro_batch_tokens"):
        if getattr(cfg, name) % cfg.train_seq_len:
            yield name, f"divisible by TRAIN_SEQ_LEN {cfg.train_seq_len}"
    if trains and not cfg.max_wallclock_seconds and not cfg.iterations:
        yield "iterations", "above 0 where MAX_WALLCLOCK_SECONDS is 0"
    longest = max(map(len, SUFFIXES)) + 8  # of which 8 are for the number of a run of equal name
    if len(os.fsencode(cfg.run_id)) + longest > LONGEST_NAME or not is_plain_name(cfg.run_id):
        yield (
            "run_id",
            f"a file's name of printable characters, at most {LONGEST_NAME - longest} bytes",
        )
    if cfg.train_seq_len <= cfg.mtp_num_heads:
        yield "mtp_num_heads", f"below TRAIN_SEQ_LEN {cfg.train_seq_len}"
    if cfg.sample and not cfg.load_artifact:
        yield "sample", "empty without LOAD_ARTIFACT"


def mixing_contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
    """Yield (setting, what it must be) of contradictions in mixing."""
    orders = cfg.ngram_max_order - 1  # 2 to ngram_max_order
    if cfg.ngram_min_order > cfg.ngram_max_order:
        yield "ngram_min_order", "at most NGRAM_MAX_ORDER"
    if len(cfg.ngram_ent_center) not in (1, orders):
        yield "ngram_ent_center", f"one number or, for orders 2 to NGRAM_MAX_ORDER, {orders}"
    if cfg.ngram_ent_base + cfg.ngram_ent_range > 1:
        yield "ngram_ent_base", f"at most 1 - NGRAM_ENT_RANGE = {1 - cfg.ngram_ent_range:g}"
    if cfg.ngram_buckets & (cfg.ngram_buckets - 1):
        yield "ngram_buckets", "a power of 2"
    if not cfg.ngram_primes:
        yield "ngram_primes", "at least one number"


def check_packages(cfg: Config) -> None:
    """RunError if a package is not installed without which this run cannot end."""
    if constriction:
        return
    wanted = ["COMPRESSOR=lzma"] * (cfg.compressor == "ans" and not cfg.load_artifact)
    wanted += ["AUDIT=0"] * (cfg.audit != "0")
    if cfg.sample:
        raise RunError("SAMPLE needs the package constriction, which is not installed")
    if wanted:
        raise RunError(
            "the package constriction (entropy coding) is not installed; there is none for Linux "
            f"on ARM: {' '.join(wanted)} does without it, for a score that is not proved"
        )


def check_config(cfg: Config) -> None:
    """RunError, in one line, for all settings that contradict each other."""
    found = []
    for contradictions in (model_contradictions, run_contradictions, mixing_contradictions):
        for name, rule in contradictions(cfg):
            found.append(f"{name.upper()}={getattr(cfg, name)}: must be {rule}")
    if found:
        raise RunError("; ".join(found))


# ==================================================================================================
# 2. Variables and help
# ==================================================================================================
#
# Every variable that one of the four submissions' scripts reads is a setting, another name of one,
# or accepted and logged as without effect; none is ignored silently. A name that nearly is one of
# ours is an error, because a run with a default in place of what was asked for is worth nothing. A
# variable that other programs set as well never ends a run.

# Other names of settings in the submissions' scripts.
ALIASES = {
    "VRL_ENABLED": "value_residual",
    "NGRAM_ORDER": "ngram_max_order",
    "USE_NGRAM_MIXER": "ngram_enabled",
    "NGRAM_CACHE": "ngram_enabled",
    "ALPHA_BASE": "ngram_ent_base",
    "ALPHA_RANGE": "ngram_ent_range",
    "ALPHA_CENTER": "ngram_ent_center",
}
VARIABLES = {name.upper(): name for name in FIELDS} | ALIASES  # {variable: setting}

# Variables of the submissions' scripts that change nothing here ("*": all that begin so).
WITHOUT_EFFECT = {
    "MUON_BETA2": "read by the submissions, used by none",
    "DTG_ENABLED": "off in every submission",
    "GATED_ATTENTION": "off in every submission",
    "COMPLEMENT_ALPHA": "0 in #1094",
    "NGRAM_ENT_THRESH": "read by #890, used nowhere",
    "DISTILL_*": "dead code in #806",
    "KG_LOSS_WEIGHT": "its code is absent from #1094",
    "PAID_PREFIX_*": "dead code in #806",
    "CONTROL_TENSOR_NAME_PATTERNS": "tensors are classed by the lists of section 6",
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": "tensors are classed by the lists of section 6",
    "TIE_EMBEDDINGS": "always tied",
    "EMBED_LR": "always tied: TIED_EMBED_LR",
    "QAT_ENABLED": "no gain at equal bytes: GPTQ_SECONDS calibrates after training",
    "LATE_QAT_THRESHOLD": "no gain at equal bytes: GPTQ_SECONDS calibrates after training",
    "TTT_*": "training on validation text is no part of this system",
}
# What other programs call our settings: a line of the log says what they are called here.
FAMILIAR = {
    "LR": "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR",
    "LEARNING_RATE": "MATRIX_LR, SCALAR_LR and TIED_EMBED_LR",
    "WEIGHT_DECAY": "MUON_WD, ADAM_WD and EMBED_WD",
    "N_LAYER": "NUM_LAYERS",
    "N_LAYERS": "NUM_LAYERS",
    "N_EMBD": "MODEL_DIM",
    "D_MODEL": "MODEL_DIM",
    "HIDDEN_SIZE": "MODEL_DIM",
    "N_HEAD": "NUM_HEADS",
    "N_HEADS": "NUM_HEADS",
    "BATCH_SIZE": "TRAIN_BATCH_TOKENS, in tokens",
    "BLOCK_SIZE": "TRAIN_SEQ_LEN",
    "SEQ_LEN": "TRAIN_SEQ_LEN and EVAL_SEQ_LEN",
    "MAX_STEPS": "ITERATIONS",
    "MAX_ITERS": "ITERATIONS",
    "NUM_STEPS": "ITERATIONS",
    "EPOCHS": "ITERATIONS, in steps",
    "NUM_EPOCHS": "ITERATIONS, in steps",
}
# Names that other programs set: of theirs, those that look like ours; of ours, those they share.
FOREIGN_VARIABLES = ("LOG_PATH",)
SHARED_VARIABLES = ("DEBUG", "SEED", "SCALE", "DEVICE", "COMPILE")
# Values of shared variables that mean a device, ours or not: an error, for they were meant for us.
DEVICE_VALUE = re.compile(r"(cpu|cuda|gpu|mps|xpu|tpu|xla|hip|rocm|npu|hpu|meta)(:\d+)?", re.I)
PATHS = ("logs_path", "data_path", "tokenizer_path", "prepared_path", "load_weights")
PATHS += ("load_artifact",)  # of which "~" is the home folder

BOOLEANS = {"0": False, "1": True, "false": False, "true": True}
BOOLEANS |= {"no": False, "yes": True, "off": False, "on": True}


def parse_number(text: str, number: type, allowed: tuple[float, float]) -> tuple[Any, str]:
    """(the int or float in `text`, or None if it is none or not allowed; what is expected)."""
    low, high = allowed
    noun = "an integer" if number is int else "a number"
    expected = f"{noun} from {low:.10g} to {high:.10g}"
    try:
        value = number(text)
    except ValueError:
        return None, expected
    return (value if low <= value <= high else None), expected


def parse_numbers(text: str, number: type) -> tuple[tuple | None, str]:
    """(the numbers in `text`, or None; what is expected). 2^31 keeps products inside of int64."""
    expected = "numbers below 2^31, separated by ','"
    try:
        values = tuple(number(part) for part in text.split(",") if part.strip())
    except ValueError:
        return None, expected
    return (values if all(abs(v) < 2**31 for v in values) else None), expected


def parse_value(name: str, text: str):
    """The value of the setting `name`; RunError names the variable, its value, what is allowed."""
    kind, allowed = FIELDS[name].type, FIELDS[name].metadata["allowed"]
    number = float if "float" in kind else int
    if kind == "str":
        if allowed and {"0", "1"} <= {*allowed} and text.strip().lower() in BOOLEANS:
            text = str(int(BOOLEANS[text.strip().lower()]))
        text = os.path.expanduser(text) if name in PATHS else text
        value = text if not allowed or text in allowed else None
        expected = ", ".join(allowed or ())
    elif kind == "bool":
        value, expected = BOOLEANS.get(text.strip().lower()), "0 or 1"
    elif kind.startswith("tuple"):
        value, expected = parse_numbers(text, number)
    else:
        value, expected = parse_number(text, number, allowed or NONNEGATIVE)
    if value is None:
        raise RunError(f"{name.upper()}={text!r}: expected {expected}")
    return value


def is_foreign(variable: str, text: str) -> bool:
    """Whether another program has set a variable of SHARED_VARIABLES: no value of ours is near."""
    if variable not in SHARED_VARIABLES or (variable == "DEVICE" and DEVICE_VALUE.fullmatch(text)):
        return False
    shared = FIELDS[VARIABLES[variable]]
    if shared.type == "int":
        return parse_number(text, int, (-math.inf, math.inf))[0] is None
    choices = shared.metadata["allowed"] or ()
    return not difflib.get_close_matches(text.lower(), choices, 1, 0.5)


def check_name(variable: str) -> str:
    """A log line on a variable that is none of VARIABLES, or ""; RunError if it nearly is one.

    Near is one edit from 8 letters on, two from 12 on; shorter names are left alone.
    """
    for pattern, reason in WITHOUT_EFFECT.items():
        if fnmatch.fnmatchcase(variable, pattern):
            return f"variable {variable} has no effect: {reason}"
    if variable.upper() in FAMILIAR:
        return f"variable {variable} has no effect: here it is {FAMILIAR[variable.upper()]}"
    if variable.upper() in VARIABLES:
        return f"variable {variable} has no effect: names are in capitals, {variable.upper()}"
    if len(variable) < 8 or variable in FOREIGN_VARIABLES:
        return ""
    edits = 1 if len(variable) < 12 else 2
    similar = difflib.get_close_matches(variable, VARIABLES, 1, 1 - edits / len(variable))
    if similar and abs(len(similar[0]) - len(variable)) <= edits:
        raise RunError(f"unknown variable {variable}: did you mean {similar[0]}?")
    return ""


def read_environment(env: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """({setting: value} from the environment, log lines); RunError names all bad and mistyped."""
    values: dict[str, Any] = {}
    notes, wrong = [], []
    for variable in sorted(env.keys() & VARIABLES.keys()):
        name = VARIABLES[variable]
        try:
            value = parse_value(name, env[variable])
        except RunError as error:
            if is_foreign(variable, env[variable]):
                notes.append(f"variable {error}; ignored, as another program's")
            else:
                wrong.append(str(error))
            continue
        if values.setdefault(name, value) != value:
            wrong.append(f"{variable}={value}: {name.upper()} is set to another value")
        if variable in ALIASES:
            notes.append(f"variable {variable} sets {name.upper()}")
    for variable in sorted(env.keys() - VARIABLES.keys()):
        try:
            notes.append(check_name(variable))
        except RunError as error:
            wrong.append(str(error))
    if wrong:
        raise RunError("; ".join(wrong))
    return values, [*filter(None, notes)]


def text_of(value) -> str:
    """What a variable is set to for a setting's value."""
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def record_of_artifact(path: Path) -> dict[str, Any]:
    """{"config": settings of the run that made an artifact, "final": its score}, from the record
    beside it; of an artifact alone the size of its vocabulary; nothing of what cannot be read (the
    loaders tell later). RunError without a file."""
    if not path.is_file():
        reason = "not a regular file" if path.exists() else "there is no such file"
        raise RunError(f"LOAD_ARTIFACT={path}: {reason}")
    record = path.with_name(re.sub(r"\.int\d+\.ptz$", "", path.name) + ".json")
    try:
        if record.exists():
            made = json.loads(read_regular(record))
            score = float(made["final"][-1]["val_bpb"]) if made.get("final") else None
            return {"config": dict(made["config"]), "val_bpb": score}
        header = json.loads(open_artifact(read_regular(path))[0])
        return {"config": {"vocab_size": header["architecture"]["vocab_size"]}, "val_bpb": None}
    except UNREADABLE:
        return {"config": {}, "val_bpb": None}


def settings_of_artifact(path: Path, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({text, vocabulary, sizes and seed of the run that made an artifact, where not set: value},
    log lines).

    A record beside an artifact is somebody's words: it may say what text is to be read, and never
    where anything is written, or where anything is taken from that could be executed.
    """
    names = ["text_files", "data_path", "tokenizer_path", "vocab_size", "val_tokens"]
    names += ["scale", "seed", "eval_seq_len", "eval_stride"]
    made_by = record_of_artifact(path)["config"]
    found = {}
    for name in names:
        with contextlib.suppress(RunError):  # somebody's words need make no sense
            found |= {name: parse_value(name, text_of(made_by[name]))} if name in made_by else {}
    taken = {k: v for k, v in found.items() if k not in values and v != FIELDS[k].default}
    if not taken:
        return {}, []
    told = " ".join(f"{name.upper()}={text_of(value)}" for name, value in taken.items())
    return taken, [f"as the artifact's own run: {told}"]


def unlike_artifact(cfg: Config) -> list[str]:
    """A log line on what makes an artifact's score another one than its own run's."""
    record = record_of_artifact(Path(cfg.load_artifact))
    made_by = record["config"]
    names = ["recipe", "val_tokens", "eval_seq_len", "eval_stride", "scoring"]
    names += [f.name for f in SECTIONS["Mixing"]]
    others = [n for n in names if text_of(made_by.get(n)) != text_of(getattr(cfg, n))]
    if not others or record["val_bpb"] is None or not {*names} <= {*made_by}:
        return []
    told = " ".join(f"{name.upper()}={text_of(made_by[name])}" for name in others)
    return [f"unlike the artifact's own run, of val_bpb:{record['val_bpb']:.8f}, which had {told}"]


def layers_that_follow(cfg: Config, num_layers: int) -> dict[str, Any]:
    """The settings that name layers, for a network of num_layers blocks instead of cfg's: what
    counts from the end still does, the loop stays in its place of the whole."""
    share = num_layers / cfg.num_layers
    fewer = cfg.num_layers - num_layers
    layers = {"xsa_last_n": round(cfg.xsa_last_n * share)}
    layers["ve_layers"] = tuple(n - fewer for n in cfg.ve_layers if n >= fewer)
    if cfg.loop_passes > 1:
        first = max(1, round(cfg.loop_first * share))
        layers["loop_first"] = min(first, num_layers - 1)
        layers["loop_last"] = min(max(first, round(cfg.loop_last * share)), num_layers - 1)
    if cfg.lanes_from:
        lanes_from = max(1 + layers.get("loop_last", 0), cfg.lanes_from - fewer)
        layers["lanes_from"] = lanes_from if lanes_from < num_layers else 0
    return layers


def choose_scale(cfg: Config) -> tuple[str, str]:
    """("full" or "demo", why): full where CUDA, if it may be used, and shards are present."""
    if cfg.smoke:
        return "demo", "SMOKE is set: its score says nothing"
    if cfg.scale != "auto":
        return cfg.scale, "SCALE is set"
    if cfg.device == "cpu":
        return "demo", "DEVICE is cpu"
    kind = device_type(cfg)
    if kind != "cpu" and find_shards(cfg.data_path, "train"):
        return "full", f"{kind} and train shards at {cfg.data_path} are present"
    return "demo", f"a laptop's sizes, for want of CUDA with train shards at {cfg.data_path}"


def demo_sizes(recipe: Config, values: dict[str, Any]) -> dict[str, Any]:
    """DEMO, or SMOKE on top of it, with the recipe's ratio of query to value heads and its fraction
    of rotated dims."""
    demo = DEMO | (SMOKE if values.get("smoke") else {})
    sizes = demo | values
    heads, head_dim = sizes["num_heads"], recipe.model_dim // recipe.num_heads
    rotated = recipe.rope_dims * sizes["model_dim"] // heads // head_dim
    return demo | {
        "rope_dims": max(2, rotated // 2 * 2),
        "num_kv_heads": max(1, heads * recipe.num_kv_heads // recipe.num_heads),
    }


def load_config(env: Mapping[str, str]) -> tuple[Config, list[str]]:
    """(configuration, log lines): environment > sizes of SCALE > RECIPE > defaults, which at demo
    scale are SHARED first."""
    values, notes = read_environment(env)
    if values.get("load_artifact"):
        taken, told = settings_of_artifact(Path(values["load_artifact"]), values)
        values, notes = taken | values, notes + told
    name = values.get("recipe", Config.recipe)
    if name not in RECIPES:
        raise RunError(f"RECIPE={name!r}: allowed are {', '.join(RECIPES)}")
    if not values.keys() & {"data_path", "tokenizer_path"}:
        values |= find_public_data(values.get("vocab_size", Config.vocab_size))
    scale, reason = choose_scale(replace(Config(), **values))
    shared = SHARED if scale == "demo" else {}
    recipe = replace(Config(), **(shared | RECIPES[name]))
    sizes = demo_sizes(recipe, values) if scale == "demo" else {}
    if "num_layers" in values:
        sizes |= layers_that_follow(recipe, values["num_layers"])
    cfg = replace(recipe, **(sizes | values | {"scale": scale}))
    if not cfg.run_id:
        kind = "sample" if cfg.sample else "smoke" if cfg.smoke else scale
        cfg = replace(cfg, run_id=f"{name}-{kind}-{cfg.seed}")
    check_config(cfg)
    if cfg.load_artifact and not cfg.sample:
        notes += unlike_artifact(cfg)
    return cfg, [f"scale {scale}: {reason}", *notes]


def help_text() -> str:
    """Every variable with default and meaning, by section, the recipes, and idle variables."""
    lines = [__doc__.strip(), "", "Variables, with defaults"]
    for section, settings in SECTIONS.items():
        lines += ["", section]
        for f in settings:
            names = [f.name.upper(), *(a for a, name in ALIASES.items() if name == f.name)]
            demo = SHARED | DEMO
            demo = f"; demo: {demo[f.name]}" if f.name in demo else ""
            choices = ", ".join(f.metadata["allowed"] or ()) if f.type == "str" else ""
            meaning = f.metadata["meaning"] + (f" ({choices})" if choices else "")
            lines.append(f"  {' / '.join(names)}={str(f.default).strip('()')}{demo}")
            lines.append(f"      {meaning}")
    lines += ["", "Recipes: what differs from the defaults above"]
    for name, recipe in RECIPES.items():
        changes = (f"{key.upper()}={value}" for key, value in recipe.items())
        lines.append(" ".join([f"  RECIPE={name}:", *changes]))
    lines += ["", "Accepted without effect (logged)"]
    lines += [f"  {name}: {reason}" for name, reason in WITHOUT_EFFECT.items()]
    return "\n".join(lines)


# ==================================================================================================
# 3. Runtime
# ==================================================================================================
#
# A run is `world_size` processes, the ranks, each with a device; rank 0 is the one that speaks and
# writes. torchrun starts them, or on a CPU the run itself: a small network's operations are too
# short to be shared by threads, and two processes of one thread take nearly twice the steps of one
# process of two. One rank takes part in the same collectives as many. Whatever one rank finds wrong
# is raised on all (`on_main`, `on_all`), so that none waits for one that has left. Everything that
# is logged as `kind key:value ...` is kept in `record`, which becomes the run's JSON.

# How numbers of these keys are logged, others as Python prints them.
FORMATS = {
    "val_loss": ".8f",
    "val_bpb": ".8f",
    "train_loss": ".4f",
    "lr_scale": ".3f",
    "seconds": ".1f",
    "bpb": ".4f",
    "mass": ".7g",
    "max_mass": ".7g",
    "ngram_mass": ".7g",
    "bits_per_parameter": ".3f",
    "log2_step": ".4g",
    "mass_error": ".2g",
    "score_error": ".2g",
    "rescore_error": ".2g",
    "sum_error": ".2g",
    "share": ".2g",
    "train_seconds": ".3f",
    "finds_one_score": ".2g",
    "finds_one_percent": ".2g",
}
MOST_OWN_RANKS = 8  # of a challenge's machine; more were not tried
MOST_OWN_THREADS = (
    2  # per rank: a small network's operations are short (not measured on many cores)
)
RANK_BYTES = 2**31  # of memory for each of them; a default run's have 0.9e9
TARGET_BYTES = 140  # and for each target of the text: 7.97 GiB for 62 M (bench/ngram_counts.py)
START_SECONDS = 300.0  # for all ranks to meet: PyTorch's first import from a slow disk
WITHOUT_FLOAT64 = ("mps",)  # accelerators that cannot score
CORES_VARIABLE = "OWN_RANKS_CORES"  # tells own ranks how many cores the first one found
STORE_VARIABLE = "OWN_RANKS_STORE"  # tells them the file by which they meet
# A terminal's Ctrl-C and its end, and what other programs send; not all on Windows.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]

ROLL_CALL_SECONDS = 3.0  # to answer; torchrun leaves a rank 30 s when another has died
GLOO_ERRORS = ("gloo", "pair closure")  # words of its errors, which are no class of their own
LONGEST_LINE = 4000  # characters of a line that is logged or printed: enough for every setting
# What reading JSON of somebody else's can raise: of what it is, and of what it holds.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
UNREADABLE += (OverflowError, RecursionError, RunError)


def printable(text: str) -> str:
    """Text in one line, with control characters as Python spells them, since they could do anything
    to a terminal, and what is too long left out in the middle."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(line) <= LONGEST_LINE:
        return line
    half = LONGEST_LINE // 2
    return f"{line[:half]} ... {len(line) - 2 * half} characters ... {line[-half:]}"


def tell(line: str, stream: io.TextIOBase | None) -> str:
    """Print a line; why that failed, or "". A reader may have left, a terminal been closed: what
    was computed does not depend on it."""
    try:
        if stream is not None:
            print(printable(line), file=stream, flush=True)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        return getattr(error, "strerror", None) or str(error)
    return ""


def write_atomic(path: Path, content: bytes | dict[str, Tensor]) -> None:
    """Write bytes, or tensors by name, under a name of its own, then rename; RunError if that
    fails. What has the name is whole, after a crash of the machine, too, and of one writer."""
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        if isinstance(content, bytes):
            Path(temporary).write_bytes(content)
        else:
            safetensors.torch.save_file(content, temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', error)}") from None


def umask() -> int:
    """The rights that new files of this process do not get; asking sets it for a moment."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


UMASK = umask()


def open_regular(path: str | Path) -> io.BufferedReader:
    """A file, opened to be read; RunError unless it is a regular one: a pipe or a device might make
    a run wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise RunError(f"{path}: not a regular file")
    return open(path, "rb")


def read_regular(path: str | Path) -> bytes:
    """The content of a regular file, as long as its folder says: files of the kernel's, which
    are 0 bytes there, can be without end."""
    with open_regular(path) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a file of safetensors; RunError for any other file."""
    try:
        return safetensors.torch.load(read_regular(path))
    except (safetensors.SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: no file of tensors of ours: {error}") from None


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on so many CPU threads. One: small work is not worth sharing, and sums keep their
    order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cgroup_numbers(*names: str) -> list[float]:
    """The numbers in files of this container's limits; none without them, or without a limit."""
    words: list[str] = []
    for name in names:
        with contextlib.suppress(OSError):  # no Linux, or cgroups of another version
            words += Path("/sys/fs/cgroup", name).read_text().split()
    return [float(word) for word in words if word.isdigit()]


def memory_bytes() -> float:
    """Of this machine or container; infinite where nobody tells."""
    limits = cgroup_numbers("memory.max", "memory/memory.limit_in_bytes")
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=math.inf)


def count_cores() -> int:
    """Those that PyTorch would use, so that OMP_NUM_THREADS counts, within this container's share
    of time."""
    # Microseconds of each period; in the first version of cgroups in two files, -1 without a limit.
    quota = cgroup_numbers("cpu.max", "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
    share = quota[0] / quota[1] if len(quota) == 2 else math.inf
    return max(1, int(min(torch.get_num_threads(), share)))


def is_file_run() -> bool:
    """Whether this process's command is `python FILE`, which other processes can import: not a
    notebook, a debugger (-m), or a program from standard input."""
    file = getattr(importlib.import_module("__main__"), "__file__", None)
    arguments = sys.orig_argv[1:]
    return (
        bool(file)
        and "-m" not in arguments
        and os.path.abspath(file) in map(os.path.abspath, arguments)
    )


def own_ranks(cfg: Config, cores: int) -> int:
    """How many ranks a run that torchrun did not launch has: on a CPU as many as divide a step's
    sequences, have a core each and fit into memory. One where their number changes the score, at
    full size or of whole shards, whose memory nobody knows before, and where the program cannot be
    started again. RunError if RANKS does not divide a step."""
    if "RANK" in os.environ or device_type(cfg) != "cpu" or not is_file_run():
        return 1
    if sys.platform == "win32":  # PyTorch has no libuv store there
        return 1
    if cfg.ranks:
        if not cfg.load_artifact:
            fit_micro_batch(cfg, cfg.ranks)
        return cfg.ranks
    unknown = cfg.scale == "full" or not (cfg.val_tokens or is_of_text(cfg))
    if unknown or cfg.sample or cfg.ngram_history == "cold":
        return 1
    fit = memory_bytes() // (RANK_BYTES + TARGET_BYTES * (cfg.val_tokens or VAL_MOST_BYTES))
    most = int(min(MOST_OWN_RANKS, cores, max(1, fit)))
    sequences = cfg.train_batch_tokens // cfg.train_seq_len
    return max(n for n in range(1, most + 1) if sequences % n == 0)


def eta(started: float, part: float) -> int:
    """Seconds until the whole is done, if it goes on as it has since `started`."""
    return round((time.perf_counter() - started) * (1 / part - 1))


class Launcher:
    """The ranks of a run that nobody launched: this process is the first, the others are
    processes of multiprocessing's, which import this program anew.

    cores: of all ranks. count: of ranks. others: their processes. folder: of the file by which they
    meet; nobody else may look into it. joined: whether all have met, so that collectives notice who
    is missing.
    """

    def __init__(self, cfg: Config):
        told = os.environ.get(CORES_VARIABLE, "")
        self.cores = int(told) if told.isdecimal() else count_cores()
        self.count = own_ranks(cfg, self.cores)
        self.others: list[multiprocessing.context.SpawnProcess] = []
        self.folder = ""
        self.joined = False

    def start(self) -> None:
        """Take this rank's share of the cores, and start the others, if there are any; this process
        is rank 0 from here on."""
        if "RANK" in os.environ:
            return
        own_threads = max(1, self.cores // self.count)
        if self.count > 1:
            own_threads = min(own_threads, MOST_OWN_THREADS)
        if own_threads < torch.get_num_threads():
            torch.set_num_threads(own_threads)
        if self.count == 1:
            return
        self.folder = tempfile.mkdtemp(prefix="train_gpt.")  # mode 0700
        os.environ |= {
            "WORLD_SIZE": str(self.count),
            "OMP_NUM_THREADS": str(own_threads),
            CORES_VARIABLE: str(self.cores),
            STORE_VARIABLE: str(Path(self.folder, "store")),
        }
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        spawn = multiprocessing.get_context("spawn")
        with ignored_signals():  # Ctrl-C is the first rank's to pass on
            for rank in range(1, self.count):
                process = spawn.Process(target=be_rank, args=(rank,))
                process.start()
                self.others.append(process)
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """End the run if another rank has ended before all have met, or they do not meet."""
        sentinels = [process.sentinel for process in self.others]
        multiprocessing.connection.wait(sentinels, START_SECONDS)
        if not self.joined:
            tell("error: another rank did not start; RANKS=1 needs none", sys.stderr)
            self.end()
            os._exit(2)

    def end(self) -> None:
        """End the others: this rank has said all there is to say."""
        self.joined = True
        for process in self.others:
            process.kill()
            process.join()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def ignored_signals() -> Iterator[None]:
    """Processes that are started here ignore Ctrl-C and the end of the terminal."""
    numbers = [number for number in STOP_SIGNALS if number != signal.SIGTERM]
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def be_rank(rank: int) -> None:
    """A whole run as another rank than the first, with which it ends, however that does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    threading.Thread(target=end_with_the_first, daemon=True).start()
    os._exit(main())


def end_with_the_first() -> None:
    """Wait for the end of the process that started this one, and end."""
    multiprocessing.parent_process().join()
    os._exit(2)


LAST_WORD = threading.Lock()  # of whoever says why the run ends: one line, and not two at once


def interrupt(_number: int, _frame) -> None:
    """Signal handler: end what is being done with the line of an interruption."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def heed_signals() -> Iterator[None]:
    """The first signal that asks this process to stop interrupts what it does; the second ends it
    at once, whatever it is doing: while it waits for another rank, Python's own handlers do not
    run. What is ignored, as nohup has it, stays ignored."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    heard, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        count = 0
        while count < 2:
            received = heard.recv(1)
            if not received:
                return
            count += received[0] in STOP_SIGNALS
        if LAST_WORD.acquire(blocking=False):
            tell("error: a second signal: ended at once", sys.stderr)
        else:  # the main thread is saying it, and then ends
            time.sleep(1.0)
        os._exit(2)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        wakeup.close()


class Run:
    """This process's place in the run.

    rank, world_size, is_main: of this process; is_main: it is rank 0. device: where it computes.
    cores: of all ranks of a Launcher; else this rank's. stage: what is being done, for error
    messages. base: path of the run's files without suffix, "" until open_log; pending: lines that
    are not in the log's file yet. speaks: whether it logs. prints: whether the console is there.
    attention: name and function of the back end, once choose_attention has found it.
    saved: paths written; unsaved: what could not be written, and why. record: {kind: rows or
    facts}, everything that was logged as data.
    """

    def __init__(self, cfg: Config, cores: int = 0):
        """Join the process group. cores: 0: as many as PyTorch has threads."""
        self.cores = cores or torch.get_num_threads()
        self.rank, self.world_size = launched_rank(os.environ)
        self.is_main = self.rank == 0
        self.stage = "start"
        self.base, self.pending, self.speaks, self.prints = "", [], self.is_main, True
        self.attention: tuple[str, Callable] | None = None
        self.saved: list[str] = []
        self.unsaved: list[str] = []
        self.record: dict[str, Any] = collections.defaultdict(list, config={})
        self.device = take_device(cfg, int(os.environ.get("LOCAL_RANK", 0)))
        self.join(cfg)

    def open_log(self, cfg: Config) -> None:
        """Take a name, once all checks have passed, so that a run that fails leaves nothing; then
        write what was logged so far. Nothing if it has one."""
        if self.base:
            return
        self.base = self.on_main(lambda: self.take_name(cfg))
        name = Path(self.base).name
        self.record["config"]["run_id"] = name
        if name != cfg.run_id:
            self.log(f"writing as {name}: there are files of a run {cfg.run_id} already")

    def join(self, cfg: Config) -> None:
        """Join the process group that torchrun's variables or a Launcher's describe, or make one of
        one rank."""
        known: dict[str, Any] = {}
        if self.world_size == 1:
            known = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif STORE_VARIABLE in os.environ:
            store = dist.FileStore(os.environ[STORE_VARIABLE], self.world_size)
            known = {"store": store, "rank": self.rank, "world_size": self.world_size}
        back_end = "gloo"
        if self.device.type != "cpu" and self.world_size > 1:
            own = dist.get_default_backend_for_device(self.device)
            if own == "nccl" and not dist.is_nccl_available():
                raise RunError(
                    f"PyTorch {torch.__version__} has no NCCL, by which ranks on several GPUs "
                    "meet: run one process, or set DEVICE=cpu"
                )
            back_end = f"cpu:gloo,{self.device.type}:{own}"
        seconds = cfg.dist_timeout_seconds
        if CORES_VARIABLE in os.environ and seconds == Config.dist_timeout_seconds:
            # A rank of a Launcher that dies closes its connections; a slow one is no failure.
            seconds = 1e6
        try:
            dist.init_process_group(back_end, timeout=timedelta(seconds=seconds), **known)
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"{self.world_size} ranks cannot meet: {str(error).splitlines()[0]}"
            ) from None

    def take_name(self, cfg: Config) -> str:
        """The path without suffix of the first free run name, whose log exists from here on; of
        RUN_ID itself if it is resumed."""
        folder = Path(cfg.logs_path)
        folder.mkdir(parents=True, exist_ok=True)
        if cfg.resume:
            with contextlib.suppress(FileNotFoundError):
                open_regular(folder / f"{cfg.run_id}.txt").close()
            return str(folder / cfg.run_id)
        for number in itertools.count(1):
            name = cfg.run_id if number == 1 else f"{cfg.run_id}-{number}"
            if any(folder.glob(glob.escape(name) + ".*")):
                continue
            with contextlib.suppress(FileExistsError):  # another run was faster
                (folder / f"{name}.txt").touch(exist_ok=False)
                return str(folder / name)
        raise AssertionError("numbers have no end")

    def alone(self) -> Run:
        """This rank by itself and without a log, for work in which the others take no part."""
        other = copy.copy(self)
        other.rank, other.world_size, other.is_main = 0, 1, True
        other.speaks, other.record = False, collections.defaultdict(list)
        return other

    def save(self, suffix: str, content: bytes | dict[str, Tensor], base: str = "") -> None:
        """Write `base` (by default the run's own) + suffix; if that fails, go on and say so."""
        path = Path(f"{base or self.base}{suffix}")
        try:
            write_atomic(path, content)
        except RunError as error:
            self.unsaved.append(str(error))
            self.log(str(error))
            return
        self.saved.append(str(path))
        self.log(f"saved {path}")

    def log(self, line: str) -> None:
        """One line to console and log file, on rank 0. The console is a copy: its loss is noted
        once in the file."""
        if not self.speaks:
            return
        self.pending.append(printable(line))
        lost = tell(line, sys.stdout) if self.prints else ""
        if lost:
            self.prints = False
            self.pending.append(f"the console is gone ({lost}): the run goes on")
        if not self.base:
            return
        path = f"{self.base}.txt"
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in self.pending)
        except OSError as error:
            message = f"cannot write {path}: {error.strerror}"
            if message not in self.unsaved:
                self.unsaved.append(message)
        self.pending.clear()

    def row(self, kind: str, prefix: str | None = None, **values) -> None:
        """Log `kind key:value ...` (or another prefix) and keep the values in the record."""
        self.record[kind].append(values)
        words = [kind if prefix is None else prefix]
        for key, value in values.items():
            shown = format(value, FORMATS.get(key, "")) if isinstance(value, float) else value
            words.append(f"{key}:{shown}")
        self.log(" ".join(words))

    def on_all(self, work: Callable[[], Any]):
        """This rank's work(); an error on one rank is raised on all, once all have tried. Work that
        does so itself must not be nested: its exchanges would meet others'."""
        result, own, message = None, None, None
        try:
            result = work()
        except Exception as error:  # of any kind: the others wait for this rank's word
            own, message = error, str(error) or type(error).__name__
        messages = self.everyones(message)
        if own:
            raise own
        for found in filter(None, messages):
            raise RunError(found)
        return result

    def everyones(self, value: Any) -> list:
        """A small object of every rank."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Any]):
        """Rank 0's work(), sent to all; its error is raised on all."""
        result = [self.on_all(work if self.is_main else lambda: None)]
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        return result[0]

    def dismiss_others(self) -> None:
        """Let the other ranks end, once all are here: from now on rank 0 needs nobody."""
        self.of_ranks(0.0)
        dist.destroy_process_group()
        self.world_size = 1

    def of_ranks(self, *values: float) -> list[list[float]]:
        """These values of every rank, a list for each value (float64, through the CPU)."""
        numbers = torch.tensor(values, dtype=torch.float64)
        everyones = numbers.new_empty(self.world_size, len(values))
        dist.all_gather(list(everyones), numbers)
        return everyones.T.tolist()

    def all_reduce(self, tensor: Tensor, mean: bool = False) -> None:
        """Replace a tensor by its sum over ranks, or its mean. One rank needs no collective, and so
        no back end for its device."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.AVG if mean else dist.ReduceOp.SUM)

    def gather(self, part: Tensor, spans: list[tuple[int, int]]) -> Tensor | None:
        """Every rank's rows (span, ...) end to end, on rank 0's CPU; None on the others."""
        if self.world_size == 1:
            return part.cpu()
        longest = max(end - start for start, end in spans)
        padded = part.new_zeros(longest, *part.shape[1:], device="cpu")
        padded[: len(part)] = part
        if not self.is_main:
            dist.gather(padded, None, dst=0)
            return None
        parts = [torch.empty_like(padded) for _ in spans]
        dist.gather(padded, parts, dst=0)
        sizes = [end - start for start, end in spans]
        return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)])

    def sync(self) -> float:
        """Wait for the device; the time in seconds."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def peak_memory_bytes(self) -> int:
        """Most memory this rank has held: of the accelerator, else of the process; 0: unknown."""
        if self.device.type != "cpu":
            return torch.accelerator.memory_stats(self.device).get("reserved_bytes.all.peak", 0)
        try:
            resource = importlib.import_module("resource")
        except ImportError:  # not on Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def device_type(cfg: Config) -> str:
    """Type of the device that DEVICE asks for: "cpu", or an accelerator's. RunError if PyTorch
    finds no such accelerator here, or it cannot do what scoring needs."""
    found = accelerator()
    if cfg.device == "auto":
        return found if found == "cuda" else "cpu"
    if cfg.device not in ("cpu", found):
        present = "no accelerator" if found == "cpu" else found
        raise RunError(
            f"DEVICE={cfg.device}: PyTorch {torch.__version__} finds {present} here; set DEVICE=cpu"
        )
    if cfg.device in WITHOUT_FLOAT64:
        raise RunError(
            f"DEVICE={cfg.device}: it has no float64, which scoring needs; set DEVICE=cpu"
        )
    return cfg.device


def take_device(cfg: Config, local_rank: int) -> torch.device:
    """The device of a rank: an accelerator's by the number of the rank on its machine."""
    kind = device_type(cfg)
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise LaunchError(
            f"LOCAL_RANK={local_rank}: there are {count} {kind} devices here, a rank needs one: "
            f"torchrun --nproc_per_node={count}"
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(kind, local_rank)


def launched_rank(env: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world size) of torchrun's variables; (0, 1) without. RunError if some are missing or
    make no sense, or if another launcher started several processes that would not know it."""
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in env and "WORLD_SIZE" not in env:
        if tasks not in ("", "1"):
            raise LaunchError(
                f"srun started {tasks} tasks, each of which would be a run of its own: start one "
                "task per machine, `srun --ntasks-per-node=1 torchrun ... train_gpt.py`"
            )
        return 0, 1
    needed = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
    if env.get("WORLD_SIZE") != "1" and STORE_VARIABLE not in env:
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if name not in env]
    if missing:
        raise LaunchError(
            f"{', '.join(missing)} not set, though other variables of a launcher are: start ranks "
            "with torchrun, which sets all of them, or unset RANK and WORLD_SIZE"
        )
    numbers = [env[name] for name in needed if name != "MASTER_ADDR"]
    if not all(number.isdecimal() for number in numbers) or int(env["RANK"]) >= int(
        env["WORLD_SIZE"]
    ):
        told = " ".join(f"{name}={env[name]}" for name in needed)
        raise LaunchError(f"{told}: no rank of a launcher; start ranks with torchrun")
    return int(env["RANK"]), int(env["WORLD_SIZE"])


def dead_ranks(run: Run, error: Exception) -> tuple[str, bool] | None:
    """Who does not answer, after a collective has failed with `error`?

    Returns (a line that names the ranks, whether this rank is to print it), or None if the error
    is not a collective's.
    """
    is_gloo = isinstance(error, RuntimeError) and any(w in str(error) for w in GLOO_ERRORS)
    if not is_gloo and not isinstance(error, dist.DistError):
        return None
    alive = {run.rank}
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"failed/{run.rank}", "1")
        with contextlib.suppress(KeyboardInterrupt):  # torchrun's signal, once it has seen it too
            time.sleep(ROLL_CALL_SECONDS)
        alive |= {r for r in range(run.world_size) if store.check([f"failed/{r}"])}
    except RuntimeError:  # the store is gone with the first rank's launcher
        alive |= set(range(1, run.world_size))
    gone = ", ".join(str(r) for r in range(run.world_size) if r not in alive) or "unknown"
    line = f"rank {gone} of {run.world_size} died or does not answer (during {run.stage})"
    return line, run.rank == min(alive)


# ==================================================================================================
# 4. Data
# ==================================================================================================
#
# The challenge's shards: 256 little-endian int32 (magic, version, number of tokens), then uint16
# tokens, documents after a BOS each. Bits per byte need the bytes that each target adds to the
# text, which its piece and, for a leading space, the token before it tell:
#
#     bpb = sum over targets of -log2 p(target) / sum over targets of bytes(target)
#
# Training visits the whole corpus in blocks of a sequence, a stride apart that is coprime to their
# number: every block once an epoch, neighbours far from each other, no shuffle to store.

SHARD_MAGIC = 20240520  # of the challenge's shard format, as are the next two
SHARD_VERSION = 1
GPT2_END = 50256  # the largest token of GPT-2, which begins each document in llm.c's shards
LLAMA_SHARD_MAGIC = 20240801  # of llm.c's shards for Llama 3
HEADER_INTS = 256
BOS = 1  # begins a document
SPACE = "\u2581"  # SentencePiece writes a space as this character
GOLDEN_SECTION = 0.618  # of the blocks between two visits: spreads them evenly, at any moment
# Texts that no tokenizer made, by which one is tried. The first is what every normalization leaves
# as it is: it has to come back. Of the others the bytes have to be right, whatever becomes of them.
PROBES = (
    "Zebra 7 quick two spaces 2026 (x)",
    " leading, \n  two spaces\tand a tab, trailing ",
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \N{SNOWMAN} \N{CJK UNIFIED IDEOGRAPH-4E2D}",
)
FIRST_TOKENS = 2**15  # of the validation stream, whose documents are decoded before training
TEXTLESS_SHARE = 0.05  # of a shard's tokens that may stand for no text, beside BOS
BOS_SHARE = 0.5  # of a shard's tokens that may be BOS: documents have text
# Was the validation text held out? It is asked by runs of tokens. 64 are a paragraph: licences and
# quotations recur in any corpus, whole paragraphs where documents do.
RUN_TOKENS = 64
RUN_BLOCK = 2**18  # runs hashed at once
DIGEST_BLOCKS = 256  # of RUN_BLOCK tokens, by which the training text is known to a checkpoint
RUN_BASE = 0x9E3779B97F4A7C15  # odd, as a polynomial hash modulo 2^64 needs; its bits look random
RUN_FILTER_BITS = 22  # of a table that most runs of the training text do not pass
MOST_VAL_RUNS = 2**17  # of the validation text that are looked for: more make a share no surer
MOST_TRAIN_TOKENS = 2**28  # that one rank looks through before training: some seconds
# Where the public shards lie, under two roots: the challenge's layout, and what FETCH makes. Those
# of 4,096 and 8,192 pieces are Kevin Clark's (#1218), of the same text and in the same layout.
PUBLIC_ROOTS = ("./data", "./data/datasets")
PUBLIC_SHARDS = "datasets/fineweb10B_sp{pieces}"
PUBLIC_TOKENIZER = "tokenizers/fineweb_{pieces}_bpe.model"
PUBLIC_REPOSITORIES = {
    1024: "willdepueoai/parameter-golf",
    4096: "kevclark/parameter-golf",
    8192: "kevclark/parameter-golf",
}
FETCH = (
    "pip install huggingface_hub && hf download {repository} --repo-type dataset --local-dir data "
    "--include 'datasets/datasets/fineweb10B_sp{pieces}/*' 'datasets/tokenizers/*'"
)


def foreign_shard(start: bytes) -> str:
    """What a file that begins so, and is no shard, may be."""
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, whose file was not fetched: git lfs pull"
    if start[:4] == struct.pack("<i", LLAMA_SHARD_MAGIC):
        return "a shard of llm.c's for Llama 3, of 32-bit tokens: tokenize the text anew"
    if not start.strip(b"\0"):
        return "empty, or zeros: fetch it again"
    return (
        "no shard of the challenge's format, whose header begins with "
        f"{SHARD_MAGIC}, {SHARD_VERSION} (nanoGPT's .bin files have none)"
    )


class Shard:
    """The tokens of a file in the challenge's format: len(shard), shard[begin:end] uint16.

    They are read where they are wanted, not mapped into memory: a file that becomes shorter is an
    error then, and no end of the process.
    """

    def __init__(self, path: str, count: int):
        self.path, self.count = path, count
        self.file = io.FileIO(path)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(self.count)
        size = 2 * max(0, end - begin)
        self.file.seek(4 * HEADER_INTS + 2 * begin)
        content = self.file.read(size)
        if len(content) != size:
            raise RunError(f"{self.path}: became shorter while it was read")
        return np.frombuffer(content, "<u2")

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.uint16)


def open_shard(path: str) -> Shard:
    """The shard at a path. RunError if it is none, or its header or size lies."""
    with open_regular(path) as file:
        start = file.read(4 * HEADER_INTS)
    header = start.ljust(4 * HEADER_INTS, b"\0")
    magic, version, count = struct.unpack_from("<3i", header)
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise RunError(f"{path}: magic {magic} version {version}: {foreign_shard(start)}")
    size, expected = os.path.getsize(path), 4 * HEADER_INTS + 2 * count
    if size != expected or count <= 0:
        raise RunError(f"{path}: {count} tokens need {expected} bytes, the file has {size}")
    return Shard(path, count)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (n,) in the challenge's format."""
    header = struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, len(tokens))
    write_atomic(path, header.ljust(4 * HEADER_INTS, b"\0") + tokens.astype("<u2").tobytes())


def find_shards(folder: str, split: str) -> list[str]:
    """Sorted paths of *_<split>_*.bin in a folder."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), f"*_{split}_*.bin")))


def find_public_data(pieces: int) -> dict[str, str]:
    """The settings of the place where the public shards of a vocabulary of so many pieces are; {}
    if they are in none we know."""
    for root in PUBLIC_ROOTS:
        folder = f"{root}/{PUBLIC_SHARDS.format(pieces=pieces)}"
        if find_shards(folder, "val"):
            tokenizer = f"{root}/{PUBLIC_TOKENIZER.format(pieces=pieces)}"
            return {"data_path": folder, "tokenizer_path": tokenizer}
    return {}


def fetch_command(pieces: int) -> str:
    """The command that brings public shards: of so many pieces, of 1,024 if there are none."""
    pieces = pieces if pieces in PUBLIC_REPOSITORIES else Config.vocab_size
    return FETCH.format(repository=PUBLIC_REPOSITORIES[pieces], pieces=pieces)


def check_shard(
    path: str, shard: Shard, vocab_size: int, textless: np.ndarray | None = None
) -> None:
    """RunError for a shard (n,) with a token that is not below vocab_size, or of which too much
    stands for no text: a file of the right size whose content was lost."""
    counts = np.zeros(2**16, np.int64)
    for begin in range(0, len(shard), RUN_BLOCK):
        counts += np.bincount(shard[begin : begin + RUN_BLOCK], minlength=len(counts))
    top = int(counts.nonzero()[0][-1])
    if top >= vocab_size:
        place = shard[:].argmax()
        other = "; of GPT-2's tokenizer, it seems" if vocab_size < top <= GPT2_END else ""
        raise RunError(f"{path}: token {top} at {place}, not below {vocab_size}{other}")
    if textless is None:
        return
    documents = int(counts[BOS])
    idle = int(counts[:vocab_size][textless].sum()) - documents
    if idle > TEXTLESS_SHARE * len(shard) or documents > BOS_SHARE * len(shard):
        raise RunError(
            f"{path}: of {len(shard)} tokens {documents} begin documents and {idle} are control, "
            "unknown or unused pieces, which stand for no text: the shard is damaged, or of "
            "another tokenizer"
        )


class TokenStream:
    """The shards' tokens end to end, read cyclically.

    shards: the files. ends: where each ends in the stream. Each rank checks its
    share of the shards (check_shard).
    """

    def __init__(
        self,
        paths: list[str],
        vocab_size: int,
        rank: int = 0,
        world_size: int = 1,
        textless: np.ndarray | None = None,
    ):
        """textless: bool (V,), the pieces that stand for no text (ByteTable.boundary)."""
        self.shards = [open_shard(p) for p in paths]
        self.ends = np.cumsum([len(s) for s in self.shards])
        for k in range(rank, len(paths), world_size):
            check_shard(paths[k], self.shards[k], vocab_size, textless)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens (count,) int64 from the cyclic position `start`."""
        parts = []
        while count > 0:
            position = start % len(self)
            k = int(np.searchsorted(self.ends, position, side="right"))
            shard = self.shards[k]
            first = position - int(self.ends[k]) + len(shard)
            parts.append(shard[first : first + count].astype(np.int64))
            start += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts)

    def digest(self) -> str:
        """SHA-256, in hex, of the tokens: of all, or of as many blocks that lie evenly in them as
        make a large stream cheap to know."""
        digest = hashlib.sha256(str(len(self)).encode())
        starts = range(0, len(self), RUN_BLOCK)
        for start in starts[:: max(1, len(starts) // DIGEST_BLOCKS)]:
            digest.update(self.read(start, min(RUN_BLOCK, len(self) - start)).astype("<u2"))
        return digest.hexdigest()


class TrainLoader:
    """Batches that span the whole corpus; all its state is `position`, in sequences taken."""

    def __init__(self, stream: TokenStream, cfg: Config, run: Run):
        self.stream, self.run = stream, run
        self.position = 0
        self.ahead: tuple[int, tuple[Tensor, Tensor]] | None = None  # a position and its batch
        self.seq_len = cfg.train_seq_len
        self.batch = cfg.train_batch_tokens // cfg.train_seq_len  # sequences a step, all ranks
        self.blocks = (len(stream) - 1) // self.seq_len
        self.stride = max(1, round(self.blocks * GOLDEN_SECTION))
        while math.gcd(self.stride, self.blocks) != 1:
            self.stride += 1

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next step, each (sequences, seq_len) int64."""
        position, batch = self.ahead or (self.position, self.read())
        if position != self.position:  # it was moved since
            batch = self.read()
        self.ahead = None
        self.position += self.batch
        return batch

    def read_ahead(self) -> None:
        """Read and send the batch that next_batch gives next, while the device is computing."""
        self.ahead = self.position, self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """The batch at `position`."""
        share = self.batch // self.run.world_size
        first = self.position + self.run.rank * share
        sequences = []
        for i in range(first, first + share):
            block = i * self.stride % self.blocks
            sequences.append(self.stream.read(block * self.seq_len, self.seq_len + 1))
        tokens = torch.from_numpy(np.stack(sequences))
        if self.run.device.type != "cpu":  # from pinned memory the host need not wait for it
            tokens = tokens.pin_memory().to(self.run.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]


class ByteTable:
    """What each piece adds to the text, (V,) tensors.

    base: its UTF-8 bytes without a leading space sign, int64. space: it has one, which is worth a
    byte unless the token before is a boundary. boundary: it is no real piece, but control, unknown
    or unused, and worth nothing.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        base, space, boundary = [], [], []
        for i in range(tokenizer.get_piece_size()):
            real = not (
                tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
            )
            piece = tokenizer.id_to_piece(i) if real else ""
            text = piece.removeprefix(SPACE).replace(SPACE, " ")
            base.append(1 if tokenizer.is_byte(i) else len(text.encode()))
            space.append(piece.startswith(SPACE))
            boundary.append(not real)
        self.base = torch.tensor(base)
        self.space = torch.tensor(space)
        self.boundary = torch.tensor(boundary)

    def target_bytes(self, tokens: Tensor) -> Tensor:
        """Bytes (N,) int64 of the targets tokens[1:] of a stream (N+1,)."""
        before, target = tokens[:-1].long(), tokens[1:].long()
        return self.base[target] + (self.space[target] & ~self.boundary[before])


def split_at_bos(tokens: Tensor) -> list[Tensor]:
    """The documents of a stream (n,), each with its BOS; a stream's beginning may lack one."""
    starts = (tokens == BOS).nonzero().flatten()
    return [part for part in tokens.tensor_split(starts) if len(part)]


def whole_characters(tokens: Tensor, tokenizer) -> Tensor:
    """A stream (n,) without the byte pieces at its end, of which some may be missing."""
    while len(tokens) > 1 and tokenizer.is_byte(int(tokens[-1])):
        tokens = tokens[:-1]
    return tokens


def check_tokenizer(
    path: str, tokenizer: sentencepiece.SentencePieceProcessor, table: ByteTable, val: Tensor
) -> None:
    """RunError if `table` does not count the bytes of text by this tokenizer: of PROBES, and of the
    first documents of a validation stream (N+1,).

    A space is one byte. It is not in a vocabulary without a lone space sign, which spells it as
    the three bytes of U+2581, nor where the sign ends pieces instead of beginning them.
    """
    encoded = [torch.tensor([BOS, *tokenizer.encode(text)]) for text in PROBES]
    unknown = [bool((tokens == tokenizer.unk_id()).any()) for tokens in encoded]
    first = split_at_bos(whole_characters(val[:FIRST_TOKENS], tokenizer))
    tried = [(f"of {text!r}", encoded[i]) for i, text in enumerate(PROBES) if not unknown[i]]
    tried += [(f"of validation document {i}", tokens) for i, tokens in enumerate(first)]
    reason = ""
    for name, tokens in tried:
        text = tokenizer.decode(tokens[1:].tolist())
        counted, size = int(table.target_bytes(tokens).sum()), len(text.encode())
        if SPACE in text:
            reason = reason or f"{name} a space comes back as U+2581, for want of a piece for it"
        elif counted != size:
            reason = reason or f"{name} its pieces count {counted} bytes, the text has {size}"
    back = tokenizer.decode(encoded[0][1:].tolist())
    if not unknown[0] and back != PROBES[0]:
        reason = reason or f"{PROBES[0]!r} comes back as {back!r}"
    if reason:
        raise RunError(
            f"{path}: bits per byte cannot be told by this tokenizer: {reason}; use one with the "
            "options that the challenge's has, or TEXT_FILES, for which one is made"
        )


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    tokenizer: sentencepiece.SentencePieceProcessor | None
    table: ByteTable | None
    train: TokenStream | None  # None: evaluation alone
    val: Tensor  # (N+1,) int64, the validation stream
    corpus: dict  # facts for the log: source, sizes, hashes
    text: bytes | None = None  # that the validation stream was made of, if it is at hand

    @functools.cached_property
    def val_bytes(self) -> Tensor:
        """Bytes (N,) int64 of the validation targets."""
        return self.table.target_bytes(self.val)


class DataSource(NamedTuple):
    """Where a run's shards are."""

    folder: str
    tokenizer_path: str
    facts: dict  # for the log
    text_path: str = ""  # of the text that the validation shards were made of


def load_tokenizer(path: str, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece processor at `path`; RunError if missing, foreign or of another size."""
    try:
        proto = read_regular(path) or b"\0"  # no bytes would load as no model at all
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
        size = len([tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())])  # UTF-8
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"not a SentencePiece model ({error})"
        raise RunError(f"TOKENIZER_PATH={path}: {reason}") from None
    if size != vocab_size:
        raise RunError(f"{path}: the tokenizer has {size} pieces, VOCAB_SIZE is {vocab_size}")
    if tokenizer.bos_id() != BOS:
        raise RunError(
            f"{path}: its BOS is {tokenizer.bos_id()}, the challenge's shards have {BOS}"
        )
    return tokenizer


def is_of_text(cfg: Config) -> bool:
    """Whether a run's shards are made of text."""
    nothing_given = cfg.data_path == Config.data_path and not find_shards(cfg.data_path, "val")
    return bool(cfg.text_files) or (cfg.scale == "demo" and nothing_given)


def locate_data(cfg: Config, run: Run) -> DataSource:
    """The shards at DATA_PATH, or made of TEXT_FILES or, at demo scale, of Python's own text."""
    if is_of_text(cfg):
        folder = prepare_text(cfg, run)
        facts = json.loads((folder / "corpus.json").read_text("utf-8"))
        tokenizer, text = str(folder / "tokenizer.model"), str(folder / VAL_TEXT)
        return DataSource(str(folder), tokenizer, facts, text)
    return DataSource(cfg.data_path, cfg.tokenizer_path, {"source": cfg.data_path})


def require_shards(folder: str, split: str, pieces: int) -> list[str]:
    """Paths of a split's shards; RunError, with the way to get some, if there are none."""
    paths = find_shards(folder, split)
    if not paths:
        raise RunError(
            f"DATA_PATH={folder}: no *_{split}_*.bin shards there. Get the public ones: "
            f"{fetch_command(pieces)}; or set TEXT_FILES='your/text/*.txt'"
        )
    return paths


def open_train_stream(paths: list[str], textless: np.ndarray, cfg: Config, run: Run) -> TokenStream:
    """The training tokens; RunError if they are fewer than a step needs."""
    stream = TokenStream(paths, cfg.vocab_size, run.rank, run.world_size, textless)
    if len(stream) <= cfg.train_batch_tokens and not cfg.load_artifact:
        raise RunError(
            f"{os.path.dirname(paths[0])}: {len(stream)} training tokens, a step needs "
            f"{cfg.train_batch_tokens + 1}; lower TRAIN_BATCH_TOKENS or give more text"
        )
    return stream


def read_validation(paths: list[str], textless: np.ndarray, cfg: Config, run: Run) -> Tensor:
    """The validation stream (N+1,) int64, cut to VAL_TOKENS and, as the challenge does, to whole
    windows; RunError if that leaves nothing, or no document begins it."""
    stream = TokenStream(paths, cfg.vocab_size, run.rank, run.world_size, textless)
    if stream.read(0, 1)[0] != BOS:
        raise RunError(f"{paths[0]}: does not begin with BOS ({BOS}), which begins every document")
    num_targets = min(len(stream) - 1, cfg.val_tokens or len(stream))
    usable = num_targets // cfg.eval_seq_len * cfg.eval_seq_len
    if not usable:
        raise RunError(
            f"{os.path.dirname(paths[0])}: {num_targets} validation targets, a window needs "
            f"EVAL_SEQ_LEN={cfg.eval_seq_len}; give more text or lower EVAL_SEQ_LEN"
        )
    return torch.from_numpy(stream.read(0, usable + 1))


def read_data(source: DataSource, cfg: Config, run: Run) -> Data:
    """Open and check everything at `source`; RunError for the first thing that is amiss."""
    paths = {"train": find_shards(source.folder, "train")}
    for split in ("val",) if cfg.load_artifact else ("train", "val"):
        paths[split] = require_shards(source.folder, split, cfg.vocab_size)
    tokenizer = load_tokenizer(source.tokenizer_path, cfg.vocab_size)
    vocabulary = Path(source.tokenizer_path).read_bytes()
    table = ByteTable(tokenizer)
    textless = table.boundary.numpy()
    train = open_train_stream(paths["train"], textless, cfg, run) if paths["train"] else None
    val = read_validation(paths["val"], textless, cfg, run)
    unknown = int((val[1:] == tokenizer.unk_id()).sum())
    if unknown or not table.target_bytes(val).any():
        raise RunError(
            f"{paths['val'][0]}: of {len(val) - 1} validation targets {unknown} are unknown "
            "pieces, whose bytes nobody knows; a score needs text that its tokenizer can spell"
        )
    check_tokenizer(source.tokenizer_path, tokenizer, table, val)
    corpus = source.facts | {
        "tokenizer": source.tokenizer_path,
        "val_targets": len(val) - 1,
        "val_documents": int((val[1:-1] == BOS).sum()) + 1,
        "train_tokens": len(train) if train and not cfg.load_artifact else 0,
        "vocabulary_sha256": hashlib.sha256(vocabulary).hexdigest(),
        "val_sha256": hashlib.sha256(val.numpy()).hexdigest(),
    }
    text = Path(source.text_path).read_bytes() if source.text_path else None
    return Data(tokenizer, table, train, val, corpus, text)


def run_hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64 (n-RUN_TOKENS+1,), a hash of each run of RUN_TOKENS of n tokens: polynomials of twice
    the length from two of half of it."""
    hashes, power = tokens.astype(np.uint64) + np.uint64(1), RUN_BASE
    length = 1
    while length < RUN_TOKENS:
        hashes = hashes[:-length] * np.uint64(power) + hashes[length:]
        length, power = 2 * length, power * power % 2**64
    hashes ^= hashes >> np.uint64(32)  # low bits of a product depend on low bits alone
    hashes *= np.uint64(RUN_BASE)
    return hashes ^ (hashes >> np.uint64(32))


def blocks_of_runs(stream: TokenStream, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """run_hashes of a rank's share of a stream, in blocks that lie evenly in it; at most
    MOST_TRAIN_TOKENS of them."""
    starts = range(0, max(0, len(stream) - RUN_TOKENS + 1), RUN_BLOCK)
    every = -(-len(starts) * RUN_BLOCK // (world_size * MOST_TRAIN_TOKENS)) or 1
    for start in starts[:: max(1, every)][rank::world_size]:
        end = min(start + RUN_BLOCK + RUN_TOKENS - 1, len(stream))
        yield run_hashes(stream.read(start, end - start))


class RunCounts(NamedTuple):
    """How often runs of RUN_TOKENS tokens of a validation stream occur."""

    sampled: int  # runs
    distinct: int  # of them
    in_train: int  # of the sampled


def count_runs(val: Tensor, train: TokenStream | None, run: Run) -> RunCounts:
    """RunCounts of a stream (N+1,); all ranks take part. Of many runs those are looked for whose
    hashes are multiples of a power of two: as many of each text, whatever its length."""
    none = np.empty(0, np.uint64)
    hashes = run_hashes(val.numpy()) if len(val) >= RUN_TOKENS else none
    every = np.uint64(2 ** max(0, (len(hashes) // MOST_VAL_RUNS).bit_length()))
    wanted, counts = np.unique(hashes[hashes % every == 0], return_counts=True)
    mask = np.uint64(2**RUN_FILTER_BITS - 1)
    filled = np.zeros(2**RUN_FILTER_BITS, bool)
    filled[wanted & mask] = True
    found = np.zeros(len(wanted), bool)
    for block in blocks_of_runs(train, run.rank, run.world_size) if train else ():
        near = block[filled[block & mask]]
        place = np.searchsorted(wanted, near).clip(max=max(0, len(wanted) - 1))
        found[place[wanted[place] == near]] = True
    everyones = torch.from_numpy(found.astype(np.uint8))
    run.all_reduce(everyones)
    in_train = int(counts[everyones.numpy() > 0].sum())
    return RunCounts(int(counts.sum()), len(wanted), in_train)


def held_out_facts(val: Tensor, train: TokenStream | None, run: Run) -> dict[str, float]:
    """Facts on a validation stream (N+1,): val_in_train_share, of its runs of RUN_TOKENS tokens,
    that occur in the training text too (absent without one), and val_distinct_share, of different
    ones among them; all ranks take part."""
    found = count_runs(val, train, run)
    sampled = max(1, found.sampled)
    facts = {"val_distinct_share": found.distinct / sampled if found.sampled else 1.0}
    if train:
        facts["val_in_train_share"] = found.in_train / sampled
    return facts


def load_data(cfg: Config, run: Run) -> Data:
    """Find or make the corpus on rank 0, then open and check it on every rank."""
    source = run.on_main(lambda: locate_data(cfg, run))
    data = run.on_all(lambda: read_data(source, cfg, run))
    facts = held_out_facts(data.val, data.train, run)
    return replace(data, corpus=data.corpus | facts)


# ==================================================================================================
# 5. Text preparation
# ==================================================================================================
#
# In: plain text; with none given, the text that comes with Python. Out: tokenizer and shards in the
# challenge's formats and with its options: a BPE tokenizer with byte fallback, whose
# decode(encode(s)) == s for every s without U+2581. Documents are ordered by the hash of their
# text; the first tenth is for validation, and equal ones are on one side. Made once: the folder is
# named by a hash of the text. The validation text is kept beside its shards, for the audit.

TEXT_FORMAT = "v3: BPE, byte fallback, identity normalization, dummy prefix"  # part of the hash
VAL_TEXT = "text_val.txt"  # UTF-8, the validation documents end to end
TOKENIZER_TEXT_BYTES = 4_000_000  # more text changes the 1,024 pieces little and costs seconds
TOKENIZER_OPTIONS = {  # the challenge's, but for the normalization, which is the identity here
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "pad_id": 0,
    "bos_id": BOS,
    "eos_id": 2,
    "unk_id": 3,
    "character_coverage": 0.999,
    "split_digits": True,
    "max_sentence_length": 1 << 20,
    "required_chars": SPACE,  # in a text with few spaces, too: it begins every document
    "minloglevel": 2,
}
LONGEST_TRAINED_LINE = 1 << 17  # characters; longer ones are cut, for the trainer skips them
VAL_SHARE = 0.1  # of the text, in whole documents
VAL_MOST_BYTES = 8_000_000  # and no more than so much
LEAST_DOCUMENTS = 20  # fewer are cut: validation takes whole documents
# Parts of the standard library that are tests, tools or tables of characters.
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"),
    *("pydoc_data", "idle_test"),
}

Document = tuple[str, str]  # name, text


def python_documents() -> list[Document]:
    """The text that comes with Python: its documentation's topics and the library's sources."""
    documents: list[Document] = []
    with contextlib.suppress(ImportError):  # minimal installations leave pydoc out
        documents += sorted(importlib.import_module("pydoc_data.topics").topics.items())
    root, paths = sysconfig.get_paths()["stdlib"], []
    for folder, folders, names in os.walk(root):
        folders[:] = {*folders} - SKIPPED_FOLDERS  # not walked: site-packages can be large
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        documents.append((str(path.relative_to(root)), path.read_text("utf-8", errors="ignore")))
    return [(name, text) for name, text in documents if text and SPACE not in text]


def named_paths(names: str) -> list[str]:
    """The paths and globs in a text that separates them by os.pathsep; a path that exists, and has
    the separator in it, is one."""
    parts, found = names.split(os.pathsep), []
    while parts:
        ends = range(len(parts), 1, -1)
        joined = (os.path.expanduser(os.pathsep.join(parts[:end])) for end in ends)
        most = next((n for n, path in zip(ends, joined, strict=True) if os.path.exists(path)), 1)
        found.append(os.path.expanduser(os.pathsep.join(parts[:most])))
        parts = parts[most:]
    return [*filter(None, found)]


def is_prepared_text(folder: str | Path) -> bool:
    """Whether a folder is one that prepare_text made."""
    named = re.fullmatch(r"text_[0-9a-f]{16}", os.path.basename(folder))
    return bool(named) and os.path.exists(os.path.join(folder, "corpus.json"))


def run_names(logs: str) -> set[str]:
    """The names of runs that left files in a folder of logs."""
    found = {path.name for path in Path(logs).glob("*")} if logs else set()
    return {name.removesuffix(mark) for name in found for mark in SUFFIXES if name.endswith(mark)}


def is_output(path: str, logs: str, runs: set[str]) -> bool:
    """Whether a file is what a run left: in a folder of prepared text, or in the folder of logs
    under the name of one of `runs`."""
    real = Path(os.path.realpath(path))
    if any(is_prepared_text(folder) for folder in real.parents):
        return True
    return str(real.parent) == logs and any(real.name.startswith(f"{name}.") for name in runs)


def files_inside(folder: str, logs: str) -> Iterator[str]:
    """Files in a folder and its folders, but hidden ones and those that runs left."""
    for place, folders, names in os.walk(folder):
        paths = {name: os.path.join(place, name) for name in folders}
        folders[:] = [
            name
            for name, path in paths.items()
            if not (name.startswith(".") or is_prepared_text(path))
            and os.path.realpath(path) != logs
        ]
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def user_files(names: str, logs: str) -> tuple[list[str], list[str]]:
    """(files that are named, or that globs match; files inside of folders that are), each sorted.
    RunError for a name that is nothing. logs: real path of the folder of logs, whose files are no
    text unless they are named themselves."""
    files, inside, runs = set(), set(), run_names(logs)
    for name in named_paths(names):
        is_named = os.path.exists(name)
        matches = [name] if is_named else glob.glob(name, recursive=True)
        if not matches:
            raise RunError(
                f"TEXT_FILES: {name} matches no file or folder; give paths or globs separated by "
                f"'{os.pathsep}'"
            )
        for match in matches:
            if os.path.isdir(match):
                found = files_inside(match, logs)
                inside.update(path for path in found if not is_output(path, logs, runs))
            elif is_named or not is_output(match, logs, runs):
                files.add(match)
    return sorted(files), sorted(inside - files)


def read_text(path: str) -> tuple[str, str]:
    """(text of a file, why it cannot be taken, or "")."""
    try:
        text = read_regular(path).decode("utf-8")
    except RunError:
        return "", "not a regular file"
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], error.start
        return "", f"no UTF-8 text (byte 0x{byte:02x} at {place}): iconv makes it UTF-8"
    return text, "has U+2581, SentencePiece's own space: replace it" if SPACE in text else ""


def user_documents(names: str, logs: str = "") -> tuple[list[Document], dict[str, int]]:
    """(documents of the files and folders that are named, {what is to be known of them: how many});
    RunError if there are none or a file is unfit, unless its folder was named, not it.

    logs: folder of logs, whose files are left out.
    """
    files, inside = user_files(names, os.path.realpath(logs) if logs else "")
    documents, left_out = [], collections.Counter()
    example = ""
    for path, is_named in [*((p, True) for p in files), *((p, False) for p in inside)]:
        text, reason = read_text(path)
        if reason and is_named:
            raise RunError(f"{path}: {reason}")
        if reason:
            left_out[f"left out, {reason.split(' (')[0].split(',')[0]}"] += 1
            example = example or f"{path}: {reason}"
            continue
        documents.append((path, text))
    if not documents:
        told = f" ({example})" if example else ""
        raise RunError(f"TEXT_FILES={names}: no file of text in it{told}")
    facts = {
        "files": len(documents) + left_out.total(),
        **left_out,
        "left out, empty": sum(not text for _, text in documents),
        "with CRLF line ends, which stay": sum("\r\n" in text for _, text in documents),
    }
    return [(name, text) for name, text in documents if text], facts


def are_few(documents: list[Document]) -> bool:
    """Whether so few documents are different that a tenth of them is none."""
    return len({text for _, text in documents}) < LEAST_DOCUMENTS


def cut_documents(documents: list[Document]) -> list[Document]:
    """The documents as they are or, of fewer than LEAST_DOCUMENTS, about so many parts of them."""
    if not are_few(documents):
        return documents
    size = sum(map(len, {text for _, text in documents})) // LEAST_DOCUMENTS
    return [(name, part) for name, text in documents for part in cut_text(text, size)]


def cut_text(text: str, size: int) -> Iterator[str]:
    """Parts of a text, of at least `size` characters but the last: cut behind a line, in a text
    that has few lines behind a space, or between characters."""
    size, begin = max(1, size), 0
    while begin < len(text):
        near = begin + size
        ends = (text.find(mark, near, near + size) + 1 for mark in "\n ")
        end = next(filter(None, ends), near)
        if end == near and len(text) - near < size:
            end = len(text)
        yield text[begin:end]
        begin = end


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, validation) documents; the split depends on their texts and on nothing else, and
    equal documents are on one side of it."""
    parts = sorted(
        cut_documents(documents), key=lambda part: hashlib.sha256(part[1].encode()).digest()
    )
    equal = [list(group) for _, group in itertools.groupby(parts, key=lambda part: part[1])]
    ends = np.cumsum([len(text) for group in equal for _, text in group])
    wanted = min(VAL_SHARE * ends[-1], VAL_MOST_BYTES) if parts else 0
    group_ends = np.cumsum([len(group) for group in equal])
    count = int(np.searchsorted(group_ends, np.searchsorted(ends, wanted), side="right")) + 1
    count = min(count, len(equal) - 1)
    if count < 1:
        reason = "repeats one text" if len(parts) > 1 else "is too short"
        raise RunError(f"the text {reason if parts else 'is empty'}: nothing can be held out of it")
    return tuple([*itertools.chain(*side)] for side in (equal[count:], equal[:count]))


def train_tokenizer(documents: list[Document], vocab_size: int) -> bytes:
    """A serialized BPE model of vocab_size pieces; RunError if the text has too few."""
    every = max(1, sum(len(text) for _, text in documents) // TOKENIZER_TEXT_BYTES)
    lines = []
    for _, text in documents:
        for line in filter(str.strip, text.splitlines()):
            lines += cut_text(line, LONGEST_TRAINED_LINE)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[::every]),
            model_writer=model,
            vocab_size=vocab_size,
            **TOKENIZER_OPTIONS,
        )
    except RuntimeError as error:
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if least:
            raise RunError(
                f"VOCAB_SIZE={vocab_size}: the text's characters need {least[1]}, set a higher one"
            ) from None
        most = re.search(r"<= (\d+)\.", str(error))
        found = f"it has at most {most[1]}" if most else str(error).splitlines()[-1]
        raise RunError(
            f"VOCAB_SIZE={vocab_size}: the text is too small or too uniform for so many pieces "
            f"({found}); set a lower VOCAB_SIZE, or give more text"
        ) from None
    return model.getvalue()


def encode_documents(tokenizer, documents: list[Document], table: ByteTable) -> np.ndarray:
    """Tokens (n,) of the documents, each after a BOS; every document's bytes must balance."""
    encoded = []
    terminal = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
    for name, text in tqdm(documents, desc="tokenizing", unit="doc", disable=not terminal):
        encoded.append(np.array([BOS, *tokenizer.encode(text)]))
        counted = int(table.target_bytes(torch.from_numpy(encoded[-1])).sum())
        size = len(text.encode())
        if counted != size:
            raise RunError(f"{name}: its tokens stand for {counted} bytes, its text has {size}")
    return np.concatenate(encoded)


def shortened(names: list[str], most: int = 5) -> str:
    """Different names, of which there may be many, in a line."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_prepared(folder: Path) -> bool:
    """Whether a folder of prepared text is whole: what is in it can be opened."""
    try:
        sentencepiece.SentencePieceProcessor(model_proto=read_regular(folder / "tokenizer.model"))
        for split in ("train", "val"):
            open_shard(str(folder / f"text_{split}_000000.bin"))
        facts = json.loads(read_regular(folder / "corpus.json"))  # written last
        return bool(facts["documents"]) and (folder / VAL_TEXT).is_file()
    except (*UNREADABLE, RuntimeError):
        return False


def prepare_text(cfg: Config, run: Run) -> Path:
    """Tokenizer and shards of the text, made once; the folder, named by the text's hash."""
    started = time.perf_counter()
    if cfg.text_files:
        documents, facts = user_documents(cfg.text_files, cfg.logs_path)
    else:
        documents, facts = python_documents(), {}
    made_of = repr((TEXT_FORMAT, cfg.vocab_size, documents))
    digest = hashlib.sha256(made_of.encode()).hexdigest()
    folder = Path(cfg.prepared_path) / f"text_{digest[:16]}"
    train, val = split_documents(documents)
    if facts:
        told = ", ".join(f"{count} {what}" for what, count in facts.items() if count)
        parts = "parts of " * are_few(documents)
        names = shortened([name for name, _ in val])
        run.log(f"text: {told}; held out for validation: {parts}{names}")
    if is_prepared(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "tokenizer.model"
    write_atomic(model, train_tokenizer(train, cfg.vocab_size))
    tokenizer = load_tokenizer(str(model), cfg.vocab_size)
    table = ByteTable(tokenizer)
    for split, part in (("train", train), ("val", val)):
        tokens = encode_documents(tokenizer, part, table)
        write_shard(folder / f"text_{split}_000000.bin", tokens)
    write_atomic(folder / VAL_TEXT, "".join(text for _, text in val).encode())
    corpus = {
        "source": cfg.text_files or "python",
        "sha256": digest,
        "documents": len(documents),
        "text_bytes": sum(len(text.encode()) for _, text in documents),
    }
    write_atomic(folder / "corpus.json", json.dumps(corpus, indent=1).encode())
    seconds = time.perf_counter() - started
    run.log(f"prepared {len(documents)} documents in {folder} ({seconds:.1f} s)")
    return folder


# ==================================================================================================
# 6. Model
# ==================================================================================================
#
# The submissions' common trunk. With x0 the embedding (tokens, hashed bigrams, smeared) and s(l) =
# 1/sqrt(l + 1), block l = 0 ... L-1 is
#
#     x <- x + skip weights[s] * (output of the visit mirrored at the middle)            U-Net skips
#     x <- resid_mix[l,0] * x + resid_mix[l,1] * x0
#     x <- x + attn_scale[l] * W_out attention(s(l) norm(x))
#     x <- x + mlp_scale[l] * W_down leaky_relu(W_up s(l) norm(x))^2
#
# with per-channel skips, mixes and scales. Attention is grouped-query, causal, with normed queries
# and keys, partial RoPE and a gain a head; values get a value embedding on ve_layers and, with
# value_residual, a share of the first layer's; on the last xsa_last_n layers the output loses its
# part along the position's own value. Logits are softcapped and tied to the embedding.
#
# Where they are switched on: blocks loop_first ... loop_last are visited loop_passes times in a row
# (depth recurrence, #1290, #1394), heads' outputs get a gate by the block's input (#1667), smearing
# is gated by the token's embedding and stops at BOS (#1851), and from block lanes_from of the
# second half on the stream has two lanes (#1204, #1529). Attention reads lane a, with skips and
# mixes, the MLP lane b, and a learned routing writes both:
#
#     p = attn_scale[l] * W_out attention(s(l) norm(resid_mix[l,0] * a + resid_mix[l,1] * x0))
#     q = mlp_scale[l] * W_down leaky_relu(W_up s(l) norm(b))^2
#     a <- keep[0] a + route[0,0] p + route[1,0] q,   b <- keep[1] b + route[0,1] p + route[1,1] q
#
# and in the end the stream is the mean of both.
#
# Weight matrices live in banks (matrices, rows, columns), so that Muon works on them whole; every
# parameter in none of the lists below is AdamW's at SCALAR_LR and stored as float16. There is one
# walk over the blocks, and its visits are data; evaluation asks for the last positions only.

PROJECTIONS = ("bigram_proj", "value_proj")  # of embeddings that are narrower than the trunk
BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", *PROJECTIONS)
EMBEDDINGS = ("tok_emb", "bigram_emb", "value_emb")
TRAINING_ONLY = ("mtp_heads",)  # never exported
ROPE_UNSTRETCHED_LEN = 1024  # longest window that uses ROPE_BASE as it is (the submissions' rule)
BIGRAM_PRIMES = (36313, 27191)  # of the submissions' bigram hash
VALUE_EMB_STD = 0.01  # at the start, as are the next three (the submissions')
BIGRAM_SCALE = 0.05
VALUE_SCALE = 0.1
VALUE_GATE = -1.5  # logit of the share of the first layer's values
LANE_KEEP = 1.1  # share of a lane that a block keeps, at the start (#1529)
GATE_WIDTH = 12  # channels that the gates of attention (#1667) and smear (#1851) look at
# Inductor's: 6 ms per step slower with it, and silently wrong gradients (pytorch 179494, 193061)
COMPILE_OPTIONS = {"triton.mix_order_reduction": False}
COMPILED_DEVICES = ("cuda",)  # for which Inductor has Triton
# Of training on a CPU: a minute of compilation, once, makes its steps a third faster.
COMPILE_PAYS_SECONDS, COMPILE_PAYS_STEPS = 100.0, 100
# Attention back ends, best first: FlashAttention 3 and cuDNN have kernels made for Hopper (compute
# capability 9), where cuDNN's were up to twice as fast as FlashAttention 2's.
ATTENTION_ORDER = {
    "hopper": ("flash3", "cudnn", "flash2", "sdpa"),
    "cuda": ("flash2", "sdpa"),
}
FLASH_MODULES = {"flash3": "flash_attn_interface", "flash2": "flash_attn"}
# SDPA's kernels in the order in which "cudnn" has it choose: the first that takes the inputs.
CUDNN_FIRST = [
    nn.attention.SDPBackend.CUDNN_ATTENTION,
    nn.attention.SDPBackend.FLASH_ATTENTION,
    nn.attention.SDPBackend.EFFICIENT_ATTENTION,
    nn.attention.SDPBackend.MATH,
]
TRIAL_POSITIONS, TRIAL_LAST = 64, 16  # of the tiny input on which a back end is tried
TRIAL_WITHIN = 0.05  # of SDPA's result: bfloat16 keeps 8 bits of values of about 1


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """SDPA with FlashAttention's signature, always causal: q (B,Tq,H,D) at the last of T positions,
    k and v (B,T,Hkv,D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if q.size(2) != k.size(2):  # is_causal would align the first query with the first key
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
        mask = mask.tril(k.size(2) - q.size(2))
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def load_attention(name: str) -> Callable:
    """The function of a back end, with FlashAttention's signature; any exception without it."""
    if name in FLASH_MODULES:
        return importlib.import_module(FLASH_MODULES[name]).flash_attn_func
    return sdpa_attention


def prefer_cudnn() -> None:
    """From now on SDPA takes cuDNN's kernel wherever it can."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch._C._set_sdp_priority_order([int(kernel) for kernel in CUDNN_FIRST])


def try_attention(name: str, cfg: Config, run: Run) -> Callable:
    """The function of a back end that attends a tiny input as SDPA does, compiled where the run
    is, forward and backward; any exception if it does not."""
    attention, dtype = load_attention(name), compute_dtype(cfg, run.device)
    if name == "sdpa":  # what the others are compared with
        return attention
    D = cfg.model_dim // cfg.num_heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, TRIAL_POSITIONS, heads, D) for heads in (cfg.num_heads, *2 * [cfg.num_kv_heads])]
    q, k, v = (
        torch.randn(shape, generator=generator).to(run.device, dtype).requires_grad_()
        for shape in shapes
    )
    attend = compiled(attention, cfg, run)
    # Training's positions, where cuDNN must do it by itself; then evaluation's last block, whose
    # mask it may leave to the next kernel.
    for last in (TRIAL_POSITIONS, TRIAL_LAST):
        alone = name == "cudnn" and last == TRIAL_POSITIONS
        kernels = CUDNN_FIRST[:1] if alone else CUDNN_FIRST
        queries = q[:, -last:]
        with nn.attention.sdpa_kernel(kernels, set_priority=True):
            y = attend(queries, k, v, causal=True)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            expected = sdpa_attention(queries, k, v)
        if not isinstance(y, Tensor) or y.shape != expected.shape:
            raise TypeError("it does not return a tensor of the queries' shape")
        if not float((y - expected).detach().abs().max()) < TRIAL_WITHIN:
            raise ValueError("it differs from PyTorch's attention")
        y.float().sum().backward()
    return attention


def is_hopper(device: torch.device) -> bool:
    """Whether a device is NVIDIA's of compute capability 9, or 10, of which the same is expected.
    AMD's of that number are something else."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def choose_attention(cfg: Config, run: Run) -> tuple[str, Callable]:
    """(name, function) of the first back end in ATTENTION_ORDER, or the one that is set, that
    works on every rank; tried once a run. RunError if the one that is set does not work."""
    if run.attention:
        return run.attention
    kind = "hopper" if is_hopper(run.device) else run.device.type
    reason = f"not for {kind}"
    for name in ATTENTION_ORDER.get(kind, ("sdpa",)):
        if cfg.attention not in ("auto", name):
            continue
        function, reason = None, ""
        try:
            function = try_attention(name, cfg, run)
        except Exception as error:  # whatever an installed package does, `auto` goes on
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        (works,) = run.of_ranks(float(function is not None))
        if all(works):
            if name == "cudnn":
                prefer_cudnn()
            run.attention = name, function
            return run.attention
        run.log(f"attention {name}: not used here ({reason or 'it fails on another rank'})")
    raise RunError(f"ATTENTION={cfg.attention}: does not work here ({reason}); use auto")


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dim without weights."""
    return F.rms_norm(x, (x.size(-1),))


def rope_tables(length: int, base: float, dims: int, device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, 1, dims/2) float32. Long windows stretch the base (NTK scaling)."""
    if length > ROPE_UNSTRETCHED_LEN and dims > 2:
        base = base * (length / ROPE_UNSTRETCHED_LEN) ** (dims / (dims - 2))
    inverse = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial RoPE: rotate the first 2*cos.size(-1) dims of x (B,T,H,D), leave the rest."""
    half = cos.size(-1)
    real, imaginary, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    rotated = [real * cos + imaginary * sin, imaginary * cos - real * sin]
    return torch.cat([*rotated, rest], dim=-1)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention: y (B,T,H,D) less its projection on its position's v (B,T,Hkv,D)."""
    grouped = y.unflatten(2, (v.size(2), -1))  # (B,T,Hkv,H/Hkv,D)
    direction = F.normalize(v, dim=-1).unsqueeze(3)
    along = (grouped * direction).sum(-1, True)
    return grouped.addcmul(along, direction, value=-1).flatten(2, 3)


def matrices(w: Tensor) -> Tensor:
    """(M,rows,cols): a bank as it is, an embedding as a bank of one."""
    return w.view(-1, *w.shape[-2:])


def filled(*shape: int, value: float = 0.0) -> nn.Parameter:
    """A parameter of equal numbers, float32."""
    return nn.Parameter(torch.full(shape, value))


class Visit(NamedTuple):
    """A block on the trunk's walk."""

    layer: int  # whose weights
    waits: bool  # its output waits for a later visit's skip
    skip: int | None  # row of the skips' weights with which the latest output that waits comes in
    lanes: bool  # on two lanes


def block_visits(cfg: Config, looping: bool) -> list[Visit]:
    """The trunk's walk over its blocks, loop_first to loop_last loop_passes times in a row while
    looping. Outputs of its first half come in as skips in the second, the latest first.

    With a loop, a skip's row is the number of the visit that it comes from: so each connection
    keeps its row when the loop is switched on and moves the middle, and the rows after are new.
    Without one it is the number of the visit where it arrives, from the middle on, as in the
    submissions.
    """
    layers = list(range(cfg.num_layers))
    if looping and cfg.loop_passes > 1:
        loop = slice(cfg.loop_first, cfg.loop_last + 1)
        layers[loop] = cfg.loop_passes * layers[loop]
    half, visits = len(layers) // 2, []
    for place, layer in enumerate(layers):
        row = None
        if half <= place < 2 * half:
            row = place - half if cfg.loop_passes == 1 else 2 * half - 1 - place
        lanes = place >= half and 0 < cfg.lanes_from <= layer
        visits.append(Visit(layer, place < half, row, lanes))
    return visits


def skips_name(cfg: Config) -> str:
    """The skips' parameter. Its name tells how rows are numbered (block_visits): weights and
    artifacts of looped networks that numbered them by where a skip arrives do not fit."""
    return "skip_weights" if cfg.loop_passes == 1 else "skips_by_source"


class GPT(nn.Module):
    """The network. Parameters are float32; `weights` casts them to compute_dtype.

    attention: a function with FlashAttention's signature. grams: while calibrating (section 9),
    {(name, i): sum of x^T x of the inputs x of matrix i of a bank}, else None. loops: whether
    `logits` visits blocks repeatedly, as a trained network with a loop does.
    """

    def __init__(self, cfg: Config, attention: Callable | None, compute_dtype=torch.float32):
        super().__init__()
        self.cfg, self.attention, self.compute_dtype = cfg, attention, compute_dtype
        self.grams: dict[tuple[str, int], Tensor] | None = None
        self.loops = True
        L, C, V = cfg.num_layers, cfg.model_dim, cfg.vocab_size
        kv_dim, hidden = C // cfg.num_heads * cfg.num_kv_heads, round(cfg.mlp_mult * C)
        self.ln_scales = [(i + 1) ** -0.5 if cfg.ln_scale else 1.0 for i in range(L)]
        self.tok_emb = filled(V, C)
        if cfg.bigram_vocab_size:
            self.bigram_emb = filled(cfg.bigram_vocab_size, cfg.bigram_dim)
            self.bigram_proj = filled(1, C, cfg.bigram_dim)
            self.bigram_scale = filled(1, value=BIGRAM_SCALE)
        # {layer with a value embedding: its place in value_layer_scale}
        self.value_layers = {n: i for i, n in enumerate(cfg.ve_layers)} if cfg.ve_enabled else {}
        if self.value_layers:
            self.value_emb = filled(V, cfg.ve_dim)
            self.value_proj = filled(1, kv_dim, cfg.ve_dim)
            self.value_scale = filled(1, value=VALUE_SCALE)
            self.value_layer_scale = filled(len(self.value_layers), value=1.0)
        if cfg.value_residual:
            self.value_gate = filled(L - 1, value=VALUE_GATE)
        if cfg.content_smear:
            self.smear_scale = filled(1)
            self.smear_content = filled(min(GATE_WIDTH, C))
        else:
            self.smear_gate = filled(C)
        visits = len(block_visits(cfg, looping=True))
        setattr(self, skips_name(cfg), filled(visits // 2, C, value=1.0))
        self.attn_scale = filled(L, C, value=1.0)
        self.mlp_scale = filled(L, C, value=1.0)
        self.resid_mix = filled(L, 2, C)
        if cfg.lanes_from:  # layers from there on; LANE_KEEP a lane, [source, lane] of a branch
            self.lane_keep = filled(L - cfg.lanes_from, 2, value=LANE_KEEP)
            self.lane_route = filled(L - cfg.lanes_from, 2, 2, value=1.0)
        if cfg.attn_gate:
            self.attn_gate = filled(L, cfg.num_heads, min(GATE_WIDTH, C))
        self.q_gain = filled(L, cfg.num_heads, value=cfg.qk_gain_init)
        self.qo_bank = filled(2 * L, C, C)  # queries of layer i at i, output of layer i at L + i
        self.kv_bank = filled(2 * L, kv_dim, C)  # keys at i, values at L + i
        self.mlp_up_bank = filled(L, hidden, C)
        self.mlp_down_bank = filled(L, C, hidden)
        if cfg.mtp_num_heads:
            self.mtp_heads = filled(cfg.mtp_num_heads, V, C)

    @torch.no_grad()
    def initialize(self, seed: int) -> GPT:
        """Random embeddings and orthogonal banks; outputs, mlp_down and the bigram table stay 0."""
        generator = torch.Generator().manual_seed(seed)
        stds = {"tok_emb": self.cfg.tied_embed_init_std, "value_emb": VALUE_EMB_STD}
        for name, p in self.named_parameters():
            if name in stds:
                p.copy_(torch.empty(p.shape).normal_(0.0, stds[name], generator=generator))
            elif name in BANKS and name != "mlp_down_bank":
                count = self.cfg.num_layers if name == "qo_bank" else len(p)
                gain = self.cfg.proj_init_gain if name in PROJECTIONS else 1.0
                for i in range(count):
                    p[i] = nn.init.orthogonal_(torch.empty(p[i].shape), gain, generator=generator)
        self.resid_mix[:, 0] = 1.0
        return self

    @torch.no_grad()
    def hold_new_skips(self) -> None:
        """Before the loop is on: undo what decay does to the skips that only it has. They have no
        gradient yet, and are to start fresh."""
        used = len(block_visits(self.cfg, looping=False)) // 2
        getattr(self, skips_name(self.cfg))[used:] = 1.0

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name, as the forward pass uses them: in compute_dtype."""
        return {name: p.to(self.compute_dtype) for name, p in self.named_parameters()}

    def linear(self, x: Tensor, w: dict[str, Tensor], name: str, i: int = 0) -> Tensor:
        """x (...,cols) @ W.T (...,rows), W matrix i of a bank, or an embedding; while calibrating,
        adds x^T x to grams."""
        if self.grams is not None:
            seen = x.detach().flatten(0, -2).float()
            self.grams[name, i] = self.grams.get((name, i), 0.0) + seen.mT @ seen
        return F.linear(x, matrices(w[name])[i])

    def embed(self, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """x0 (B,T,C): token and bigram embedding, RMSNorm and smear gate; the content's comes
        before the norm."""
        x = F.embedding(tokens, w["tok_emb"])
        if "bigram_emb" in w:
            first, second = BIGRAM_PRIMES
            last_row = len(w["bigram_emb"]) - 1  # of the first position, which has no bigram
            index = (first * tokens[:, 1:] ^ second * tokens[:, :-1]) % last_row
            index = F.pad(index, (1, 0), value=last_row)
            bigram = self.linear(F.embedding(index, w["bigram_emb"]), w, "bigram_proj")
            x = x + w["bigram_scale"] * bigram
        if self.cfg.content_smear:
            gate = F.linear(x[..., :GATE_WIDTH], w["smear_content"][None]).sigmoid()
            gate = w["smear_scale"] * gate * (tokens != BOS)[..., None]
            return norm(torch.addcmul(x, gate, F.pad(x, (0, 0, 1, -1))))
        x = norm(x)
        before = F.pad(x, (0, 0, 1, -1))
        return torch.lerp(x, before, w["smear_gate"].sigmoid())

    def embed_values(self, w: dict[str, Tensor], tokens: Tensor) -> Tensor | None:
        """What the value embedding adds to the values (B,T,Hkv*D) of its layers; None without."""
        if not self.value_layers:
            return None
        values = self.linear(F.embedding(tokens, w["value_emb"]), w, "value_proj")
        return w["value_scale"] * values

    def trunk(
        self, w: dict[str, Tensor], tokens: Tensor, last: int, looping: bool = True
    ) -> Tensor:
        """Normed final states (B,last,C) of the last positions of tokens (B,T); at the last visit
        only keys and values see all T. looping: with the repeated visits."""
        cfg, T = self.cfg, tokens.size(1)
        x0 = self.embed(w, tokens)
        rope = rope_tables(T, cfg.rope_base, cfg.rope_dims, tokens.device)
        value_embedding = self.embed_values(w, tokens)
        visits = block_visits(cfg, looping)
        lanes, waiting, first_values = [x0], [], None
        for visit in visits:
            layer, queries = visit.layer, last if visit is visits[-1] else T
            if visit.lanes and len(lanes) == 1:
                lanes = [*lanes, *lanes]
            if visit.skip is not None:
                skip = w[skips_name(cfg)][visit.skip]
                lanes[0] = torch.addcmul(lanes[0], skip, waiting.pop())
            mixed = torch.addcmul(w["resid_mix"][layer, 0] * lanes[0], w["resid_mix"][layer, 1], x0)
            attended, values = self.attend(
                w, layer, mixed, rope, value_embedding, first_values, queries
            )
            first_values = values if first_values is None else first_values
            if visit.lanes:
                lanes = self.route(w, layer, [x[:, T - queries :] for x in lanes], attended)
            else:
                x = torch.addcmul(mixed[:, T - queries :], w["attn_scale"][layer], attended)
                lanes = [torch.addcmul(x, w["mlp_scale"][layer], self.mlp(w, layer, x))]
            if visit.waits:
                waiting.append(lanes[0])
        return norm(lanes[0] if len(lanes) == 1 else torch.lerp(*lanes, 0.5))

    def route(
        self, w: dict[str, Tensor], layer: int, lanes: list[Tensor], attended: Tensor
    ) -> list[Tensor]:
        """Both lanes (B,queries,C) after a block whose attention read the first lane and gave
        `attended` (B,queries,C), and whose MLP reads the second."""
        row = layer - self.cfg.lanes_from
        keep, share = w["lane_keep"][row], w["lane_route"][row]
        attended = w["attn_scale"][layer] * attended
        hidden = w["mlp_scale"][layer] * self.mlp(w, layer, lanes[1])
        return [
            keep[i] * lane + share[0, i] * attended + share[1, i] * hidden
            for i, lane in enumerate(lanes)
        ]

    def mlp(self, w: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
        """The MLP of a block on x (B,T,C): leaky_relu(x, slope)^2 between two matrices."""
        hidden = self.linear(norm(x) * self.ln_scales[layer], w, "mlp_up_bank", layer)
        hidden = F.leaky_relu(hidden, self.cfg.relu_slope).square()
        return self.linear(hidden, w, "mlp_down_bank", layer)

    def attend(
        self,
        w: dict[str, Tensor],
        layer: int,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        value_embedding: Tensor | None,
        first_values: Tensor | None,
        queries: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention of a block on x (B,T,C).

        queries: how many of the last positions ask. Returns (their output (B,queries,C), raw values
        (B,T,Hkv*D)); first_values are the first block's raw values, for the value residual.
        """
        cfg, L, (B, T, C) = self.cfg, self.cfg.num_layers, x.shape
        D = C // cfg.num_heads
        cos, sin = (table.to(x.dtype) for table in rope)
        h = norm(x) * self.ln_scales[layer]
        q = self.linear(h[:, T - queries :], w, "qo_bank", layer)
        q = q.view(B, queries, cfg.num_heads, D)
        k = self.linear(h, w, "kv_bank", layer).view(B, T, cfg.num_kv_heads, D)
        raw = v = self.linear(h, w, "kv_bank", L + layer)
        if layer in self.value_layers:
            scale = w["value_layer_scale"][self.value_layers[layer]]
            v = v + scale * value_embedding
        if cfg.value_residual and first_values is not None:
            v = torch.lerp(v, first_values, w["value_gate"][layer - 1].sigmoid())
        v = v.view(B, T, cfg.num_kv_heads, D)
        q = rotate(norm(q), cos[T - queries :], sin[T - queries :]) * w["q_gain"][layer][:, None]
        y = self.attention(q, rotate(norm(k), cos, sin), v, causal=True)
        if layer >= L - cfg.xsa_last_n:
            y = exclude_own_value(y, v[:, T - queries :])
        if cfg.attn_gate:
            gate = F.linear(h[:, T - queries :, :GATE_WIDTH], w["attn_gate"][layer])
            y = y * (2 * gate.sigmoid())[..., None]
        return self.linear(y.reshape(B, queries, C), w, "qo_bank", L + layer), raw

    def softcapped(
        self, x: Tensor, w: dict[str, Tensor], head: str = "tok_emb", i: int = 0
    ) -> Tensor:
        """float32 logits (...,V) of states x (...,C) by matrix i of a head, within +-softcap."""
        logits = self.linear(x, w, head, i).float()
        return self.cfg.logit_softcap * torch.tanh(logits / self.cfg.logit_softcap)

    @torch.no_grad()
    def logits(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Logits (B,last,V) float32 of the last positions (default: all) of tokens (B,T) int64."""
        w = self.weights()
        return self.softcapped(self.trunk(w, tokens, last or tokens.size(1), self.loops), w)

    def cross_entropy(
        self, x: Tensor, w: dict[str, Tensor], targets: Tensor, head: str = "tok_emb", i: int = 0
    ) -> Tensor:
        """Mean cross-entropy () in nats of states x (B,T,C) by a head at the targets (B,T)."""
        return F.cross_entropy(self.softcapped(x, w, head, i).flatten(0, 1), targets.flatten())

    def forward(
        self, tokens: Tensor, targets: Tensor, looping: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(loss to minimize (), cross-entropy () in nats per token), of tokens, targets (B,T)."""
        w = self.weights()
        x = self.trunk(w, tokens, tokens.size(1), looping)
        loss = main = self.cross_entropy(x, w, targets)
        if "mtp_heads" in w:  # head k predicts the token k + 2 places after its position
            extra = []
            for k in range(self.cfg.mtp_num_heads):
                states, ahead = x[:, : -k - 1], targets[:, k + 1 :]
                extra.append(self.cross_entropy(states, w, ahead, "mtp_heads", k))
            loss = loss + self.cfg.mtp_loss_weight * torch.stack(extra).mean()
        return loss, main.detach()


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic; parameters and logits are float32 in each."""
    if cfg.compute == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return getattr(torch, cfg.compute)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself. NVIDIA's before compute capability 8 do not:
    Inductor would leave their graphs uncompiled without a word."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compiles(cfg: Config, run: Run, pays: bool = False) -> bool:
    """Whether a function is compiled; on a CPU unasked only where it pays."""
    if cfg.compile == "auto":
        return run.device.type in COMPILED_DEVICES or pays
    return cfg.compile == "1"


def is_long_training(cfg: Config, run: Run) -> bool:
    """Whether compilation on a CPU pays, which precedes the clock and takes twice as long on one
    core as on two."""
    enough = cfg.max_wallclock_seconds >= COMPILE_PAYS_SECONDS
    enough = enough and cfg.iterations >= COMPILE_PAYS_STEPS
    return enough and cfg.warmup_steps > 0 and run.cores > 1


def kept_graphs() -> Path:
    """Folder of compiled graphs in the user's cache, for processors like this one, whose
    instructions they use, as far as PyTorch may (ATEN_CPU_CAPABILITY)."""
    name = platform.processor() + torch.backends.cpu.get_cpu_capability()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = f"compiled_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path(cache, "parameter-golf", folder).absolute()


def is_private(folder: Path) -> bool:
    """Whether a folder and the one around it are this user's, and nobody else can write into them.
    Graphs are programs, and are loaded as such."""
    if not hasattr(os, "getuid"):  # Windows' home folders are their users'
        return True
    for path in (folder, folder.parent):
        facts = path.stat()
        open_to_others = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if facts.st_uid != os.getuid() or open_to_others:
            return False
    return True


def use_kept_graphs(run: Run) -> None:
    """Let Inductor keep and look for graphs in kept_graphs, or where TORCHINDUCTOR_CACHE_DIR says;
    in a folder of this run's own, told in a line, if that one is not private."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder, reason = kept_graphs(), ""
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        if not is_private(folder):
            reason = "others can write there"
        elif shlex.split(str(folder)) != [str(folder)]:
            reason = "compilers' commands cannot name it"
    except (OSError, ValueError, RuntimeError) as error:  # no home; no closing quotation
        reason = str(error)
    if reason:
        run.log(f"compiled graphs are not kept: {folder}: {reason}")
        folder = tempfile.mkdtemp(prefix="train_gpt.")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def compiled(
    function: Callable,
    cfg: Config,
    run: Run,
    options: dict[str, Any] | None = None,
    pays: bool = False,
) -> Callable:
    """torch.compile where it is wanted: whole graphs of fixed shapes, with Inductor's options, kept
    for the next run."""
    if not compiles(cfg, run, pays):
        return function
    use_kept_graphs(run)
    known = torch._inductor.list_options()  # older PyTorch has fewer
    wanted = COMPILE_OPTIONS | (options or {})
    options = {name: value for name, value in wanted.items() if name in known}
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def try_compiler(cfg: Config, run: Run) -> Config:
    """cfg, once every rank has compiled a small function where all of the run is to be compiled;
    with COMPILE=0 if one cannot, at demo scale and unasked. RunError if it was asked for, or at
    full size, where an uncompiled training is not worth its time."""
    if not compiles(cfg, run):
        return cfg
    reason = ""
    try:
        x = torch.ones(8, device=run.device, requires_grad=True)
        compiled(lambda t: (2 * t).sin().sum(), cfg, run)(x).backward()
    except Exception as error:  # of any of the compiler's parts
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    reasons = [*filter(None, run.everyones(reason))]
    if not reasons:
        return cfg
    if cfg.compile == "1" or cfg.scale == "full":
        raise RunError(
            f"PyTorch cannot compile here ({reasons[0]}): install a C compiler (gcc), or set "
            "COMPILE=0, which is slower"
        )
    run.log(f"not compiled, for not every rank can: {reasons[0]}")
    return replace(cfg, compile="0")


def build_model(cfg: Config, run: Run, weights: dict[str, Tensor] | None = None) -> GPT:
    """The model on the run's device, initialized or with weights; RunError if they do not fit."""
    name, attention = choose_attention(cfg, run)
    dtype = compute_dtype(cfg, run.device)
    model = GPT(cfg, attention, dtype)
    if weights is not None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RunError(f"these weights do not fit: {reason}") from None
    else:
        model.initialize(cfg.seed)
    parameters = sum(p.numel() for p in model.parameters())
    compute = str(dtype).removeprefix("torch.")
    run.row("model", parameters=parameters, attention=name, compute=compute)
    model = model.to(run.device)
    if run.world_size > 1:
        for p in model.parameters():  # another CPU model may have rounded the start otherwise
            dist.broadcast(p.data, src=0)
    return model


# ==================================================================================================
# 7. Optimizers
# ==================================================================================================
#
# Muon (Keller Jordan, 2024) on the banks: with gradient g, momentum mu and O the orthogonal factor,
#
#     m <- mu m + g,   w <- (1 - lr wd) w - lr max(1, rows/columns)^1/2 O(g + mu m)
#
# O by Newton-Schulz iterations, of an update whose rows have norm 1 where MuonEq-R is wanted
# (#1217); AdamW on the rest. Data parallel without DDP: gradients of banks
# are reduce-scattered, each rank updates its shard, and a bank is all-gathered while the next one
# is orthogonalized. The gradient is clipped by the global norm of its average over the ranks.

ROW_NORM_FLOOR = 1e-7  # least norm by which a row is divided (#1217)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's quintic coefficients (Keller Jordan, 2024)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # 2.13's new names
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def newton_schulz(g: Tensor, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Roughly the orthogonal factor of each matrix of g (M,rows,cols): singular values near 1.
    dtype: of the iterations, for which bfloat16 is exact enough (Keller Jordan, 2024)."""
    a, b, c = NEWTON_SCHULZ
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):  # x <- a x + (b G + c G^2) x with G = x x^T
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


class BankShard:
    """The matrices of a bank that this rank updates: an equal run for each rank, zero-padded; of
    one rank all, in place and without collectives.

    bank: the parameter (M,rows,cols). full: buffer (size * world_size, rows, cols) of collectives.
    grad, momentum, shard: (size, rows, cols), of this rank's matrices. work: a started collective.
    dtype: of newton_schulz.
    """

    def __init__(self, bank: nn.Parameter, run: Run, dtype: torch.dtype):
        self.bank, self.run, self.dtype = bank, run, dtype
        self.work: dist.Work | None = None
        if run.world_size == 1:
            self.full = self.momentum = torch.zeros_like(bank.data)
            self.grad, self.shard = bank.grad, bank.data
            return
        size = -(-len(bank) // run.world_size)
        self.full = torch.zeros(size * run.world_size, *bank.shape[1:], device=bank.device)
        self.grad, self.momentum, self.shard = (self.full[:size].clone() for _ in range(3))

    def own(self) -> Tensor:
        """This rank's matrices (size, rows, cols) of `full`."""
        return self.full.chunk(self.run.world_size)[self.run.rank]

    def wait(self) -> None:
        """Until the collective that was started is done, if there is one."""
        if self.work:
            self.work.wait()

    def gather_momentum(self) -> Tensor:
        """Every rank's momentum, (M,rows,cols)."""
        if self.run.world_size > 1:
            all_gather(self.full, self.momentum)
        return self.full[: len(self.bank)]

    def reduce(self) -> None:
        """Start averaging the gradient over ranks into `grad` (reduce-scatter)."""
        if self.run.world_size == 1:
            self.grad = self.bank.grad
            return
        self.full[: len(self.bank)] = self.bank.grad
        self.work = reduce_scatter(self.grad, self.full, dist.ReduceOp.AVG, async_op=True)

    def update(self, cfg: Config, lr: float, momentum: float) -> None:
        """Muon on the shard, then start sending it to every rank (all-gather)."""
        self.momentum.mul_(momentum).add_(self.grad)
        nesterov = self.grad.add(self.momentum, alpha=momentum)
        if cfg.muon_row_norm:
            nesterov = F.normalize(nesterov, dim=-1, eps=ROW_NORM_FLOOR)
        direction = newton_schulz(nesterov, cfg.muon_backend_steps, self.dtype)
        if self.run.world_size > 1:
            self.full[: len(self.bank)] = self.bank.data
            self.shard.copy_(self.own())
        scale = max(1, direction.size(-2) / direction.size(-1)) ** 0.5
        self.shard.mul_(1 - lr * cfg.muon_wd).add_(direction, alpha=-lr * scale)
        if self.run.world_size > 1:
            self.work = all_gather(self.full, self.shard, async_op=True)

    def finish(self) -> None:
        """Wait for every rank's matrices and take them into the parameter."""
        if self.run.world_size > 1:
            self.wait()
            self.bank.data.copy_(self.full[: len(self.bank)])


def parameter_groups(model: GPT, cfg: Config) -> tuple[list[nn.Parameter], list[dict]]:
    """(banks for Muon, largest first; groups for AdamW); every parameter in one (asserted)."""
    rates = dict.fromkeys(EMBEDDINGS, (cfg.tied_embed_lr, cfg.embed_wd))
    rates["mtp_heads"] = cfg.head_lr, cfg.embed_wd
    banks, by_rate = [], collections.defaultdict(list)
    for name, p in model.named_parameters():
        if name in BANKS:
            banks.append(p)
        else:
            by_rate[rates.get(name, (cfg.scalar_lr, cfg.adam_wd))].append(p)
    groups = [
        {"params": params, "lr": 0.0, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), params in by_rate.items()
    ]
    owned = [*banks, *(p for g in groups for p in g["params"])]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    return sorted(banks, key=lambda p: -p.numel()), groups


class Optimizer:
    """Muon on banks, sharded over ranks, and AdamW on the rest (`small`)."""

    def __init__(self, model: GPT, cfg: Config, run: Run):
        self.cfg, self.run = cfg, run
        banks, groups = parameter_groups(model, cfg)
        self.banks = [BankShard(p, run, model.compute_dtype) for p in banks]
        self.small = [p for g in groups for p in g["params"]]
        self.adam = torch.optim.AdamW(
            groups,
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            fused=run.device.type != "cpu",
        )

    def reduce_gradients(self) -> Tensor:
        """Average all gradients over ranks; the global norm () of the averaged gradient."""
        for bank in self.banks:
            bank.reduce()
        grads = [p.grad for p in self.small]
        if self.run.world_size > 1:
            flat = torch._utils._flatten_dense_tensors(grads)  # one all-reduce for all small ones
            self.run.all_reduce(flat, mean=True)
            torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))
        for bank in self.banks:
            bank.wait()
        shards = [bank.grad for bank in self.banks]
        parts = shards + grads if self.run.is_main else shards  # each element counted once
        square = torch.stack(torch._foreach_norm(parts)).square().sum()
        self.run.all_reduce(square)
        return square.sqrt()

    def clip(self, total_norm: Tensor) -> None:
        """Shorten the averaged gradient of norm () to GRAD_CLIP_NORM, if it is longer."""
        if self.cfg.grad_clip_norm:
            factor = (self.cfg.grad_clip_norm / (total_norm + 1e-6)).clamp(max=1.0)
            grads = [bank.grad for bank in self.banks] + [p.grad for p in self.small]
            torch._foreach_mul_(grads, factor)

    def step(self, lr_scale: float, momentum: float) -> None:
        """One update from the gradients in .grad, which it clears."""
        self.clip(self.reduce_gradients())
        for bank in self.banks:  # a bank travels while the next one is orthogonalized
            bank.update(self.cfg, self.cfg.matrix_lr * lr_scale, momentum)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for bank in self.banks:
            bank.finish()
        for p in [bank.bank for bank in self.banks] + self.small:
            p.grad = None


# ==================================================================================================
# 8. Training
# ==================================================================================================
#
# In: an initialized model and shards; out: the averaged weights, in the model. `progress` in [0, 1]
# is the part of the run that is done, by the clock if there is a cap on it. All schedules follow
# it: step counts of the settings are parts of `schedule_steps`, so that a short run is a whole one
# in small. The clock runs from the first step to the last and stands still for validation and for
# checkpoints; compilation and warm-up come before it and leave no trace. A step starts only if it
# will end under the cap. While a step computes, ranks wait once for the step before and exchange a
# few numbers (`settle`). SIGTERM or Ctrl-C ends training after the step and the run goes on to
# export. A checkpoint holds all that the next step depends on; time that a resumed run lost counts.

MOST_MICRO_BATCH_TOKENS = 98304  # one of eight ranks' share of the challenge's step
# Logits of a forward pass in training, validation and scoring. Three or four tensors of so many
# float32, 0.5 GB each, exist at once. 1,024 pieces stay below this bound, 8,192 pieces reach it.
MOST_LOGITS = 2**27
RECENT_STEPS = 20  # whose longest tells how long the next one may take
STEP_MARGIN = 1.1  # and by how much longer
SWA_BELOW = 0.5  # SWA samples are taken once the lr scale is below (#806)
TORCHRUN_KILLS = (
    "; torchrun kills its ranks 30 s after the signal, before the score is there, unless it was "
    "started with --shutdown-timeout=600 (torch 2.12 and later)"
)
CLOCK_SECONDS = 1.0  # between two notes of the training time beside the checkpoint
# Settings of training that change no step: a checkpoint fits whatever they are.
STEPLESS = {
    "micro_batch_tokens",
    "warmup_steps",
    "val_loss_every",
    "val_batch_size",
    "train_log_every",
    "checkpoint_seconds",
    "resume",
}
CALIBRATION_PART = 40  # calibration takes at most one such part of the cap


def fit_micro_batch(cfg: Config, world_size: int) -> int:
    """Tokens of a rank's forward pass: the largest equal parts of its share within the limit."""
    sequences, rest = divmod(cfg.train_batch_tokens // cfg.train_seq_len, world_size)
    if rest or not sequences:
        raise RunError(
            f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: its sequences of {cfg.train_seq_len} "
            f"do not divide among {world_size} ranks"
        )
    limit = cfg.micro_batch_tokens or min(MOST_MICRO_BATCH_TOKENS, MOST_LOGITS // cfg.vocab_size)
    most = min(sequences, max(1, limit // cfg.train_seq_len))
    return cfg.train_seq_len * max(n for n in range(1, most + 1) if sequences % n == 0)


def calibration_seconds(cfg: Config) -> float:
    """Part of the cap on training time that is kept for calibration; 0 without a cap."""
    return min(cfg.gptq_seconds, cfg.max_wallclock_seconds / CALIBRATION_PART)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return importlib.import_module("torch._dynamo.utils").counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def stop_signals(handler: Callable) -> Iterator[None]:
    """Let SIGTERM, SIGHUP and Ctrl-C call handler(number, frame), unless they are ignored; as
    before afterwards."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    heeded = {number: own for number, own in before.items() if own != signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, own in heeded.items():
            signal.signal(number, own)


class WeightAverage:
    """The weights to export: a running mean with mass <- decay*mass + 1 and

        average <- average + (weights - average) / mass

    Decay 1 gives the mean of the samples (SWA), below 1 an EMA without the bias of its start.
    params, average: the model's parameters and their average, tensor by tensor.
    """

    def __init__(self, model: GPT, cfg: Config):
        self.cfg = cfg
        self.mass, self.samples = 0.0, 0
        self.params = [p.data for p in model.parameters()]
        self.average = [p.clone() for p in self.params]

    def sample_due(self, steps_before: float, steps: float, lr_scale: float) -> bool:
        """Whether the weights count, after so many of the schedule's steps."""
        if self.cfg.averaging == "ema":
            return True
        if self.cfg.averaging == "none" or not self.cfg.swa_enabled or lr_scale >= SWA_BELOW:
            return False
        every = self.cfg.swa_every
        return steps_before // every != steps // every or not self.samples

    def update(self, before: float, after: float, lr_scale: float) -> None:
        """Take the weights in, progress having gone from `before` to `after`, in [0, 1]."""
        steps_before, steps = (x * self.cfg.schedule_steps for x in (before, after))
        if not self.sample_due(steps_before, steps, lr_scale):
            return
        decay = 1.0
        if self.cfg.averaging == "ema":
            decay = self.cfg.ema_decay ** (steps - steps_before)
        self.mass = decay * self.mass + 1
        self.samples += 1
        torch._foreach_lerp_(self.average, self.params, 1 / self.mass)

    def apply(self) -> None:
        """Put the average in the model, if there is one."""
        if self.samples:
            torch._foreach_copy_(self.params, self.average)


class OnItsWay:
    """A number () of the device, sent to the host without waiting for it."""

    def __init__(self, value: Tensor):
        self.value, self.event = value.to("cpu", non_blocking=True), None
        if value.device.type != "cpu":
            self.event = torch.Event(value.device)
            self.event.record()
        self.arrived = time.perf_counter()  # on a CPU

    def wait(self) -> tuple[float, float]:
        """(the number, the time of perf_counter() at which it was known to be there)."""
        if self.event:
            self.event.synchronize()
            self.arrived = time.perf_counter()
        return float(self.value), self.arrived


class Step(NamedTuple):
    """A step that was launched: its number, from 1, progress before and at it, its loss."""

    number: int
    before: float
    now: float
    loss: OnItsWay


class Trainer:
    """Training under a cap on its time.

    steps: launched so far. unsettled: the last of them, until its loss and time are known.
    elapsed: time of the settled ones in seconds, on which ranks agree. clock_zero: this
    rank's time at which the clock would have shown 0. last_progress: at the last step. recent:
    times of the last steps, in seconds. micro_batch: sequences of a forward pass. cap: seconds of
    training, 0: none. recompiles: graphs compiled after warm-up. signalled: a signal came to this
    rank. stopping: to one of the ranks, and all know. saved: the checkpoint that is resumed.
    """

    def __init__(self, model: GPT, data: Data, cfg: Config, run: Run):
        self.model, self.data, self.cfg, self.run = model, data, cfg, run
        self.loader = TrainLoader(data.train, cfg, run)
        (pays,) = run.of_ranks(float(is_long_training(cfg, run)))
        self.forward = compiled(model, cfg, run, pays=all(pays))
        self.steps, self.elapsed, self.last_progress = 0, 0.0, 0.0
        self.unsettled: Step | None = None
        self.clock_zero = 0.0
        self.last_loss = math.nan
        self.recompiles = 0
        self.signalled = self.stopping = False
        self.recent: collections.deque[float] = collections.deque(maxlen=RECENT_STEPS)
        self.micro_batch = fit_micro_batch(cfg, run.world_size) // cfg.train_seq_len
        self.cap = cfg.max_wallclock_seconds - calibration_seconds(cfg)
        self.saved: dict[str, Tensor] = {}
        if cfg.resume:  # fails before warm-up
            self.saved = run.on_all(lambda: read_checkpoint(data, cfg, run))

    def lr_scale(self, progress: float) -> float:
        """1, then linear to 0 over the warmdown."""
        warmdown = min(1.0, self.cfg.warmdown_iters / self.cfg.schedule_steps)
        return min(1.0, (1 - progress) / warmdown) if warmdown else 1.0

    def momentum(self, progress: float) -> float:
        """Muon's momentum, warmed up linearly."""
        cfg = self.cfg
        steps = progress * cfg.schedule_steps
        part = min(1.0, steps / max(1, cfg.muon_momentum_warmup_steps))
        return (1 - part) * cfg.muon_momentum_warmup_start + part * cfg.muon_momentum

    def progress(self) -> float:
        """Part of the run that is done, by time if there is a cap, else by steps."""
        by_steps = self.steps / max(1, self.cfg.iterations)
        if not self.cap:
            return by_steps
        underway = self.recent[-1] if self.unsettled and self.recent else 0.0
        return max(by_steps, min(1.0, (self.elapsed + underway) / self.cap))

    def looping(self, progress: float) -> bool:
        """Whether blocks are visited repeatedly, after this part of the training."""
        return self.cfg.loop_passes == 1 or progress >= self.cfg.loop_from

    def trained_config(self) -> Config:
        """The settings of the network that was trained: without a loop that was never on."""
        return self.cfg if self.looping(self.last_progress) else replace(self.cfg, loop_passes=1)

    def leave_out_an_unused_loop(self) -> None:
        """After a training that ended before its loop was switched on, the network is the one
        without: its first rows of skips are the ones that were used."""
        cfg = self.trained_config()
        if cfg is self.cfg:
            return
        self.run.log(f"training ended before LOOP_FROM={cfg.loop_from}: a network of LOOP_PASSES=1")
        self.cfg = self.model.cfg = cfg
        rows = len(block_visits(cfg, looping=True)) // 2
        by_source = self.model.skips_by_source.detach()[:rows]
        del self.model.skips_by_source
        self.model.skip_weights = nn.Parameter(by_source.flip(0).contiguous())

    def gradients(self, looping: bool) -> Tensor:
        """Accumulate this rank's gradient of the next batch; its mean loss () in nats per token."""
        inputs, targets = (x.split(self.micro_batch) for x in self.loader.next_batch())
        total = torch.zeros((), device=self.run.device)
        for x, y in zip(inputs, targets, strict=True):
            loss, nats = self.forward(x, y, looping)
            (loss / len(inputs)).backward()
            total += nats / len(inputs)
        return total

    def first_gradients(self, looping: bool) -> None:
        """Gradients of a graph that is not compiled yet. On a CPU the first rank compiles with all
        cores, then the others take what it has kept; if one cannot, unasked, none does."""
        if self.run.device.type != "cpu" or self.forward is self.model:
            self.gradients(looping)
            return
        reason = ""
        for is_turn in (self.run.is_main, not self.run.is_main):
            try:
                if is_turn:
                    self.gradients(looping)
            except torch._dynamo.exc.TorchDynamoException as error:
                if self.cfg.compile == "1":
                    raise
                reason = str(error).strip().splitlines()[0]
            reasons = [*filter(None, self.run.everyones(reason))]
            if reasons:
                self.run.log(f"not compiled, for not every rank can: {reasons[0]}")
                self.forward = self.model
                self.model.zero_grad(set_to_none=True)
                self.gradients(looping)
                return

    def warm_up(self) -> None:
        """Compile and run steps of each graph that training will use, the largest first; nothing
        remains but a micro-batch that fits into memory."""
        started = self.run.sync()
        if self.forward is not self.model:
            self.run.log("compiling: a minute or more the first time, then the graphs are kept")
        saved = [p.detach().clone() for p in self.model.parameters()]
        optimizer, position = Optimizer(self.model, self.cfg, self.run), self.loader.position
        length = self.cfg.train_seq_len
        graphs = sorted({self.looping(0.0), self.looping(1.0)}, reverse=True)
        warm: set[bool] = set()
        steps = [looping for looping in graphs for _ in range(self.cfg.warmup_steps)]
        while steps:
            step_started = self.run.sync()
            try:
                gradients = self.gradients if steps[0] in warm else self.first_gradients
                gradients(steps[0])
            except torch.OutOfMemoryError:
                if self.micro_batch == 1 or self.cfg.micro_batch_tokens:
                    raise
                self.model.zero_grad(set_to_none=True)
                halved = replace(self.cfg, micro_batch_tokens=self.micro_batch // 2 * length)
                self.micro_batch = fit_micro_batch(halved, self.run.world_size) // length
                continue
            optimizer.step(1.0, self.cfg.muon_momentum)
            step_seconds = self.run.sync() - step_started
            warm.add(steps.pop(0))
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), saved)
        self.loader.position = position
        if self.cfg.warmup_steps:
            warm_calibration(self.model, self.data, self.cfg, self.run)
        self.run.row(
            "warmup",
            steps=self.cfg.warmup_steps,
            seconds=self.run.sync() - started,
            micro_batch_tokens=self.micro_batch * length,
        )
        if self.cfg.warmup_steps > 1:
            self.expect(step_seconds)

    def expect(self, step_seconds: float) -> None:
        """Log how long the stages may take, from the time of a step: a third of it is forward."""
        cfg, run = self.cfg, self.run
        grid = Grid(len(self.data.val) - 1, cfg, cfg.eval_stride, run.world_size)
        tokens_per_second = 3 * cfg.train_batch_tokens / run.world_size / step_seconds
        batch_seconds = grid.batch_windows * grid.seq_len / tokens_per_second
        checked = RESCORED_WINDOWS / grid.batch_windows + AUDIT_STEPS + 2 * AUDIT_BATCHES
        training = cfg.iterations * step_seconds
        run.row(
            "expected",
            training_seconds=round(min(training, self.cap or training)),
            evaluation_seconds=round(len(grid.batches[0]) * batch_seconds),
            audit_seconds=round(checked * batch_seconds) if cfg.audit != "0" else 0,
        )

    def request_stop(self, _number: int, _frame) -> None:
        """Signal handler: stop after this step."""
        self.signalled = True

    def may_continue(self) -> bool:
        """Whether another step starts, the same answer on every rank: it must end under the cap."""
        longest = STEP_MARGIN * max(self.recent, default=0.0)
        steps = 2 if self.unsettled else 1
        fits = not self.cap or self.elapsed + steps * longest <= self.cap
        return fits and self.steps < self.cfg.iterations and not self.stopping

    def train(self) -> None:
        """The loop; leaves the averaged weights in the model."""
        self.warm_up()
        with stop_signals(self.request_stop):
            self.average = WeightAverage(self.model, self.cfg)
            self.optimizer = Optimizer(self.model, self.cfg, self.run)
            checkpoint = Checkpoint(self)
            self.clock_zero = self.run.sync() - self.elapsed
            while self.may_continue():
                checkpoint.note_clock()
                if checkpoint.is_due():
                    self.settle()  # not in the time for which the clock is stopped
                    with self.clock_stopped():
                        checkpoint.save()
                self.take_step()
            self.settle()
            if self.stopping:
                checkpoint.save()
                ended = f"stop requested: training ends after {self.steps} steps; RESUME=1 goes on"
                again = "; a second signal ends the run at once"
                launched = dist.is_torchelastic_launched()
                self.run.record["interrupted"].append({"steps": self.steps})
                self.run.log(ended + (TORCHRUN_KILLS if launched else again))
        self.average.apply()
        self.leave_out_an_unused_loop()
        self.run.row(
            "trained",
            steps=self.steps,
            train_seconds=self.elapsed,
            tokens=self.steps * self.cfg.train_batch_tokens,
            averaged=self.cfg.averaging,
            averaged_samples=self.average.samples,
            averaged_steps=round(self.average.mass, 1),
            recompiles=self.recompiles,
            peak_memory_bytes=self.run.peak_memory_bytes(),
        )

    def forget_checkpoint(self) -> None:
        """Remove the checkpoint of a training that has ended by itself and whose weights are kept:
        whoever resumed it would replace them by worse ones. On rank 0."""
        if self.stopping or f"{self.run.base}.safetensors" not in self.run.saved:
            return
        for suffix in (".checkpoint", ".clock"):
            with contextlib.suppress(OSError):
                os.unlink(f"{self.run.base}{suffix}")

    def take_step(self) -> None:
        """One step at the progress that the clock tells; ranks have agreed on that clock.

        An accelerator is given a step's work before the host waits for the step before, so that it
        has always something to do. A CPU's step is over when it was given. The first step's time
        has to be known before the second.
        """
        before, now = self.last_progress, self.progress()
        self.last_progress = now
        graphs = compiled_graphs()
        loss = self.gradients(self.looping(now))
        self.optimizer.step(self.lr_scale(now), self.momentum(now))
        if not self.looping(now):
            self.model.hold_new_skips()
        self.average.update(before, now, self.lr_scale(now))
        self.steps += 1
        self.recompiles += compiled_graphs() - graphs
        taken = Step(self.steps, before, now, OnItsWay(loss))
        self.loader.read_ahead()
        self.settle()
        self.unsettled = taken
        validates = self.passed(before, now, self.cfg.val_loss_every)
        if validates or not self.recent or taken.loss.event is None:
            self.settle()
        if validates:
            with self.clock_stopped():
                self.validate()

    def settle(self) -> None:
        """Wait for the step that is not settled yet, if there is one, and agree with all ranks on
        clock, loss and stop; RunError if the loss is not finite."""
        if not self.unsettled:
            return
        step, self.unsettled = self.unsettled, None
        own_loss, finished = step.loss.wait()
        own_time = finished - self.clock_zero
        times, losses, signals = self.run.of_ranks(own_time, own_loss, self.signalled)
        mean_loss = float(np.mean(losses))
        if not math.isfinite(mean_loss):
            raise RunError(
                f"step {step.number}: the loss is not finite (last finite loss "
                f"{self.last_loss:.4f}); lower MATRIX_LR, SCALAR_LR or GRAD_CLIP_NORM"
            )
        self.recent.append(max(times) - self.elapsed)
        self.elapsed, self.last_loss, self.stopping = max(times), mean_loss, any(signals)
        self.report(step)

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """The clock stands still until every rank has done what is to be done."""
        stopped = time.perf_counter()
        yield
        self.run.of_ranks(self.run.sync())
        self.clock_zero += time.perf_counter() - stopped

    def report(self, step: Step) -> None:
        """Log a settled step where a line is due."""
        cfg = self.cfg
        if step.number != 1 and not self.passed(step.before, step.now, cfg.train_log_every):
            return
        step_seconds = self.elapsed / step.number
        self.log_step(
            "train",
            step.number,
            train_loss=self.last_loss,
            lr_scale=self.lr_scale(step.now),
            tokens_per_second=round(cfg.train_batch_tokens / step_seconds),
            eta_seconds=eta(self.clock_zero, self.progress()),
            step_avg=f"{1000 * step_seconds:.2f}ms",
        )

    def passed(self, before: float, now: float, every: int) -> bool:
        """Whether progress has passed a multiple of so many schedule steps; 0: none."""
        steps = self.cfg.schedule_steps
        return bool(every) and before * steps // every != now * steps // every

    def validate(self) -> None:
        """Validation loss of the present weights on windows that do not overlap."""
        self.model.loops = self.looping(self.last_progress)
        score = neural_score(self.model, self.data, self.model.cfg, self.run)
        self.log_step("validation", self.steps, **score)
        self.model.loops = True

    def log_step(self, kind: str, number: int, **values) -> None:
        """A line that begins with step:number/most."""
        values["train_time"] = f"{1000 * self.elapsed:.0f}ms"
        self.run.row(kind, f"step:{number}/{self.cfg.iterations}", **values)
        self.run.record[kind][-1]["step"] = number


def fingerprint(data: Data, cfg: Config, run: Run) -> dict[str, str]:
    """What steps depend on, by name, but the number of ranks: settings as their variables have
    them, the training text, the arithmetic."""
    names = ["seed", "gptq_seconds"]  # time for GPTQ is kept out of the cap
    for section in ("Model", "Training", "Optimizer"):
        names += [f.name for f in SECTIONS[section] if f.name not in STEPLESS]
    made_of = {name.upper(): text_of(getattr(cfg, name)) for name in names}
    return made_of | {
        "COMPUTE": str(compute_dtype(cfg, run.device)).removeprefix("torch."),
        "device": run.device.type,
        "training text": data.train.digest(),
        "vocabulary": data.corpus["vocabulary_sha256"],
    }


def as_tensor(content: bytes) -> Tensor:
    """Bytes (n,) uint8."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def digest_of(tensors: dict[str, Tensor]) -> Tensor:
    """SHA-256 (32,) uint8 of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return as_tensor(digest.digest())


def check_unfinished(cfg: Config) -> None:
    """RunError if the run to be resumed has ended by itself."""
    base = Path(cfg.logs_path, cfg.run_id)
    made = {}
    with contextlib.suppress(*UNREADABLE):
        record = json.loads(read_regular(f"{base}.json"))
        made = {"final": record["final"], "interrupted": record.get("interrupted")}
    trained = not Path(f"{base}.checkpoint").exists() and Path(f"{base}.safetensors").exists()
    if trained or (made.get("final") and not made["interrupted"]):
        raise RunError(
            f"RESUME=1: the training of {cfg.run_id} is finished; "
            f"LOAD_WEIGHTS={base}.safetensors exports and scores its weights"
        )


def read_checkpoint(data: Data, cfg: Config, run: Run) -> dict[str, Tensor]:
    """The checkpoint of RUN_ID; RunError if there is none that fits."""
    path = Path(cfg.logs_path, f"{cfg.run_id}.checkpoint")
    check_unfinished(cfg)
    if not path.exists():
        raise RunError(
            f"RESUME=1: there is no {path}; RUN_ID names the run to go on with, "
            "CHECKPOINT_SECONDS saves checkpoints, LOAD_WEIGHTS takes a finished training"
        )
    saved = read_tensors(path)
    digest = saved.pop("digest", torch.empty(0))
    if not torch.equal(digest, digest_of(saved)):
        raise RunError(f"{path}: damaged, or no checkpoint of this version (its digest differs)")
    made_of, own = json.loads(saved["made_of"].numpy().tobytes()), fingerprint(data, cfg, run)
    differing = [name for name in own | made_of if own.get(name) != made_of.get(name)]
    if differing:
        told = (f"{name} was {made_of.get(name)}, is {own.get(name)}" for name in differing)
        raise RunError(f"{path}: of another run: {'; '.join(told)}")
    return saved


class Checkpoint:
    """The checkpoint of a Trainer that is about to start; resumes it if RESUME=1.

    A resumed training takes the same steps on the same data as an uninterrupted one, on any number
    of ranks; without a wall-clock cap it ends with the same bits on as many (on a CPU: CUDA's
    backward passes add in any order). With one, the training time that was lost between the
    checkpoint and the end of the run before counts: a file beside it, .clock, tells it. Each rank
    reads the files, so that several machines need a folder in common.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.run = trainer, trainer.run
        self.saved_at = self.noted_at = 0.0  # training time in seconds; noted: of the clock
        self.prime_adam()
        if trainer.saved:
            self.run.on_all(self.load)
            self.saved_at = trainer.elapsed

    def prime_adam(self) -> None:
        """Make AdamW's state, which a first step would make; groups begin with lr 0."""
        optimizer = self.trainer.optimizer
        for p in optimizer.small:
            p.grad = torch.zeros_like(p)
        optimizer.adam.step()
        for p in optimizer.small:
            p.grad = None
            optimizer.adam.state[p]["step"].zero_()

    def is_due(self) -> bool:
        """Whether CHECKPOINT_SECONDS of training time have passed, on which ranks agree."""
        every = self.trainer.cfg.checkpoint_seconds
        return 0 < every <= self.trainer.elapsed - self.saved_at

    def note_clock(self) -> None:
        """Note the training time on rank 0, where checkpoints are wanted, every CLOCK_SECONDS."""
        every, now = self.trainer.cfg.checkpoint_seconds, self.trainer.elapsed
        if every and self.run.is_main and now >= self.noted_at + CLOCK_SECONDS:
            with contextlib.suppress(RunError):  # the next note may succeed
                write_atomic(Path(f"{self.run.base}.clock"), str(now).encode())
            self.noted_at = now

    def tensors(self) -> dict[str, Tensor]:
        """What steps change, by name, in place; of momenta what the banks' `full` hold."""
        optimizer, average = self.trainer.optimizer, self.trainer.average
        parts = {
            "weights": average.params,
            "average": average.average,
            "momenta": [bank.full[: len(bank.bank)] for bank in optimizer.banks],
        }
        for i, state in enumerate(optimizer.adam.state.values()):
            parts[f"adam.{i}"] = state.values()
        return {f"{kind}.{i}": t for kind, part in parts.items() for i, t in enumerate(part)}

    def save(self) -> None:
        """Write all that the next step depends on; all ranks take part, for momenta are divided."""
        trainer, average = self.trainer, self.trainer.average
        trainer.settle()
        for bank in trainer.optimizer.banks:
            bank.gather_momentum()
        numbers = [trainer.steps, trainer.elapsed, trainer.last_progress, trainer.last_loss]
        numbers += [trainer.loader.position, average.mass, average.samples]
        if self.run.is_main:
            state = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
            state["numbers"] = torch.tensor(numbers, dtype=torch.float64)
            state["recent"] = torch.tensor(trainer.recent, dtype=torch.float64)
            made_of = fingerprint(trainer.data, trainer.cfg, self.run)
            state["made_of"] = as_tensor(json.dumps(made_of).encode())
            self.run.save(".checkpoint", state | {"digest": digest_of(state)})
        self.saved_at = trainer.elapsed

    def load(self) -> None:
        """Take over what the trainer has read."""
        trainer, average, saved = self.trainer, self.trainer.average, self.trainer.saved
        for name, tensor in self.tensors().items():
            if name not in saved or saved[name].shape != tensor.shape:
                raise RunError(f"{self.run.base}.checkpoint: without {name} of this network")
            tensor.copy_(saved[name])
        for bank in trainer.optimizer.banks:
            if self.run.world_size > 1:
                bank.momentum.copy_(bank.own())
        steps, trainer.elapsed, trainer.last_progress, trainer.last_loss, *more = saved[
            "numbers"
        ].tolist()
        position, average.mass, samples = more
        trainer.steps, trainer.loader.position = int(steps), int(position)
        average.samples = int(samples)
        trainer.recent.extend(saved["recent"].tolist())
        lost = self.lost_seconds()
        trainer.elapsed += lost
        self.run.log(
            f"resumed {self.run.base}.checkpoint: {trainer.steps} steps, {trainer.elapsed:.1f} s, "
            f"of which {lost:.1f} s were lost after it"
        )

    def lost_seconds(self) -> float:
        """Training time that the run before spent after its checkpoint, as far as it was noted."""
        try:
            noted = float(read_regular(f"{self.run.base}.clock"))
        except (OSError, ValueError, RunError):  # it ended before the first note
            return 0.0
        return max(0.0, noted - self.trainer.elapsed)


# ==================================================================================================
# 9. Quantization
# ==================================================================================================
#
# In: weights; out: of each matrix or embedding w (M,rows,cols) integer codes q and int8 logarithms
# a (M,rows), b (M,cols) of steps, in quarters of an octave, so that
#
#     w[m,i,j] ~ q[m,i,j] * 2^((a[m,i] + b[m,j]) / 4)
#
# and float16 values of all other tensors. An entropy coder charges for what codes tell, not for
# their width: bytes follow from the steps. Which steps, for so many bytes? High-rate theory makes
# an error cost the same everywhere, step^2 * E[gradient^2] = constant, which for a mean square that
# is about a product of rows and columns asks for the power -1/2 of each of these. By measurement
# half of that exponent is better (bench/quantization.py --exponents): the mean square overstates
# how unequal the curvature is, and codes end at +-127, so that steps much finer than a row's
# largest value cannot be had. One multiple of all steps is then searched on exact sizes until the
# budget is full. GPTQ (Frantar et al. 2022) rounds column by column and moves each error into the
# columns to come, along the inputs' correlations.

PER_OCTAVE = 4  # steps, and the coder's spreads, are quarters of an octave apart
STEP_EXPONENT = 0.25  # steps go with the mean square gradient to the power of minus this
FINEST_LOG_STEP = -64.0  # log2 of a multiple of all steps that is finer than any use
COARSEST_LOG_STEP = 64.0  # log2 of one that is coarser than any use: every code is 0
NEWTON_TRIALS = 12  # multiples tried by Newton's method; each is a whole export
EXPORT_TRIALS = 26  # multiples tried in all, where Newton's method has found none that fits
BYTES_NEAR = 5e-4  # a trial this share below the budget is good enough
BYTES_AIM = 0.9998  # share of the budget that the next trial aims at
GAUSSIAN_BITS = 2.9  # of a Gaussian's code beyond its mean log2 |w / step|: for the first guess
CALIBRATION_SEQUENCES = 64  # most of a rank
CALIBRATION_BATCH = 4  # of them at a time; 1, 4 and 16 score alike (docs/quantization.md)
DAMPING = 0.01  # GPTQ's, of the mean diagonal
GPTQ_BLOCK = 64  # columns between updates of all columns to come
GRADIENT_SCALE = 2.0**20  # before squaring: no denormal numbers
SENSITIVITY_FLOOR = 1e-5  # of the mean: what the sample has not shown, such as a rare token's row
ROW_PHASE = 0.618034  # of a row's place: rows switch to the next step one by one
HALF_MAX = 65504.0  # float16's largest number


class Sensitivity(NamedTuple):
    """What errors in a tensor cost."""

    row: Tensor  # (M,rows) E[gradient^2] of its rows, up to a factor
    col: Tensor  # (M,cols) of its columns
    factor: Tensor | None  # (M,cols,cols) gptq_factor; None: looked up, not multiplied


class HalfTensor(NamedTuple):
    """A tensor that is stored as it is."""

    values: np.ndarray  # float16

    def tensor(self) -> Tensor:
        """float32, in the tensor's shape."""
        return torch.from_numpy(self.values.astype(np.float32))

    def plain(self) -> bytes:
        """What the artifact holds of it beside codes."""
        return self.values.tobytes()


class CodedTensor(NamedTuple):
    """A tensor that is stored as integer codes times steps."""

    shape: tuple[int, ...]  # of the tensor
    step_logs: np.ndarray  # int8 (M,rows+cols)
    codes: np.ndarray  # int8 (M,rows,cols)

    def tensor(self) -> Tensor:
        """float32, in the tensor's shape."""
        logs = torch.from_numpy(self.step_logs.astype(np.float32))
        codes = torch.from_numpy(self.codes.astype(np.float32))
        return (codes * cell_steps(logs, codes.size(1))).view(self.shape)

    def plain(self) -> bytes:
        """What the artifact holds of it beside codes."""
        return self.step_logs.tobytes()


def is_coded(name: str) -> bool:
    """Whether a tensor is stored as codes times steps."""
    return name in BANKS + EMBEDDINGS


def code_limit(name: str, cfg: Config) -> int:
    """Largest code q: 31 for 6 bits, 127 for 8 and for "ans", whose bits are averages; 0: stored
    as it is."""
    if not is_coded(name):
        return 0
    bits = cfg.embed_bits if name in EMBEDDINGS else cfg.matrix_bits
    if cfg.compressor == "ans":
        bits = 8
    return 2 ** (bits - 1) - 1


def calibration_batches(loader: TrainLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's sequences, CALIBRATION_BATCH or what is left of a step's at a time, without end:
    (inputs, targets), each (B,T)."""
    while True:
        inputs, targets = (x.split(CALIBRATION_BATCH) for x in loader.next_batch())
        yield from zip(inputs, targets, strict=True)


class Observation(NamedTuple):
    """What training sequences show of the coded tensors, by name, summed over them."""

    rows: dict[str, Tensor]  # (M,rows) mean squares of the gradient
    cols: dict[str, Tensor]  # (M,cols)
    grams: dict[str, Tensor]  # (M,cols,cols) x^T x of inputs x; tensors that are multiplied only
    sequences: int

    def tensors(self) -> list[Tensor]:
        """All sums."""
        return [t for sums in self[:3] for t in sums.values()]


def observe(
    model: GPT, data: Data, cfg: Config, run: Run, seconds: float, sequences: int
) -> Observation:
    """Gradients and inputs on this rank's training sequences, in batches: at least one of these,
    none beyond so many sequences, and none that starts after so many seconds."""
    started, used = run.sync(), 0
    params = {n: p for n, p in model.named_parameters() if is_coded(n)}
    rows = {n: p.new_zeros(matrices(p).shape[:2]) for n, p in params.items()}
    cols = {n: p.new_zeros(matrices(p).mT.shape[:2]) for n, p in params.items()}
    w, model.grams = model.weights(), {}
    for x, y in calibration_batches(TrainLoader(data.train, cfg, run)):
        if used >= sequences or (used and run.sync() - started >= seconds):
            break
        model.cross_entropy(model.trunk(w, x, x.size(1)), w, y).backward()
        used += len(x)
        for name, p in params.items():
            square = (GRADIENT_SCALE * matrices(p.grad)).square()
            rows[name] += square.mean(2)
            cols[name] += square.mean(1)
        for p in model.parameters():
            p.grad = None
    seen, model.grams = model.grams, None
    grams = {}
    for name, p in params.items():
        own = [seen[name, i] for i in range(len(matrices(p))) if (name, i) in seen]
        if own:
            grams[name] = torch.stack(own)
    return Observation(rows, cols, grams, used)


def calibrate(model: GPT, data: Data, cfg: Config, run: Run) -> dict[str, Sensitivity]:
    """Sensitivities by name on rank 0, {} on the others or if GPTQ_SECONDS is 0: half of
    calibration_seconds goes to sequences, on every rank. A tensor for whose factor the rest does
    not suffice is rounded without GPTQ."""
    if not cfg.gptq_seconds:
        return {}
    started, limit = run.sync(), calibration_seconds(cfg) or math.inf
    seen = observe(model, data, cfg, run, limit / 2, CALIBRATION_SEQUENCES)
    for total in seen.tensors():
        run.all_reduce(total)
    (used,) = run.of_ranks(seen.sequences)
    senses: dict[str, Sensitivity] = {}
    if not run.is_main:
        return senses
    longest, factors = 0.0, 0
    for name in seen.rows:
        before, factor = run.sync(), None
        if name in seen.grams and before - started + longest < limit:
            factor = gptq_factor(seen.grams[name])
            factors += 1
        senses[name] = Sensitivity(seen.rows[name], seen.cols[name], factor)
        longest = max(longest, run.sync() - before)
    run.row(
        "calibration",
        sequences=int(sum(used)),
        factors=f"{factors}/{len(seen.grams)}",
        seconds=run.sync() - started,
    )
    return senses


def warm_calibration(model: GPT, data: Data, cfg: Config, run: Run) -> None:
    """Pay for what the first calibration has to load: kernels, solvers of each matrix size."""
    if not cfg.gptq_seconds:
        return
    seen = observe(model, data, cfg, run, 0.0, 1)
    for gram in {gram.size(-1): gram[:1] for gram in seen.grams.values()}.values():
        gptq_factor(gram)


@threads(1)  # a batch's inverses on several threads can hang (pytorch/pytorch #141358, #142815)
def gptq_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor (M,cols,cols) of the inverse of the damped x^T x (M,cols,cols)."""
    gram = gram.double()
    damping = DAMPING * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    gram = gram + damping[:, None, None] * torch.eye(gram.size(-1), device=gram.device)
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True).float()


def relative_steps(mean_square: Tensor) -> Tensor:
    """log2 of the steps (M,n) that rows or columns of such mean square gradients (M,n) take."""
    floor = SENSITIVITY_FLOOR * float(mean_square.mean()) + 1e-30
    return -STEP_EXPONENT * mean_square.clamp(min=floor).log2()


def step_logs(
    w: Tensor, limit: int, sense: Sensitivity | None = None, log_step: float = FINEST_LOG_STEP
) -> Tensor:
    """Logarithms (M,rows+cols) int8, in 1/PER_OCTAVE octaves, of the steps of w (M,rows,cols):
    2^log_step by the sensitivities, unless a row's largest value needs more."""
    row, col = w.new_zeros(w.shape[:2]), w.new_zeros(len(w), w.size(2))
    if sense:
        row, col = relative_steps(sense.row), relative_steps(sense.col)
    middle = col.mean(1, keepdim=True)
    col = (PER_OCTAVE * (col - middle)).round().clamp(-127, 127)
    finest = (w.abs() * torch.exp2(-col / PER_OCTAVE)[:, None]).amax(2) / limit
    phase = torch.arange(w.size(1), device=w.device) * ROW_PHASE % 1
    row = (PER_OCTAVE * (row + middle + log_step) + phase).floor()
    row = row.maximum((PER_OCTAVE * finest.log2()).ceil()).clamp(-127, 127)
    return torch.cat([row, col], 1).to(torch.int8)


def cell_steps(logs: Tensor, rows: int) -> Tensor:
    """float32 (M,rows,cols) steps from their logarithms (M,rows+cols)."""
    row, col = logs.double().tensor_split([rows], 1)
    return torch.exp2((row[:, :, None] + col[:, None]) / PER_OCTAVE).float()


def round_codes(w: Tensor, step: Tensor, limit: int, factor: Tensor | None = None) -> Tensor:
    """Integer-valued codes within +-limit of w (M,rows,cols); by GPTQ if there is a factor."""
    if factor is None:
        return (w / step).round().clamp(-limit, limit)
    w, codes = w.clone(), torch.empty_like(w)
    for begin in range(0, w.size(2), GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, w.size(2))
        errors = torch.empty_like(w[:, :, begin:end])
        for j in range(begin, end):
            code = (w[:, :, j] / step[:, :, j]).round().clamp(-limit, limit)
            error = (w[:, :, j] - code * step[:, :, j]) / factor[:, j, j, None]
            w[:, :, j:end] -= error[:, :, None] * factor[:, None, j, j:end]
            codes[:, :, j] = code
            errors[:, :, j - begin] = error
        w[:, :, end:] -= errors @ factor[:, begin:end, end:]
    return codes


StoredTensor = HalfTensor | CodedTensor


def quantize(
    weights: dict[str, Tensor],
    cfg: Config,
    senses: dict[str, Sensitivity] | None = None,
    log_step: float = FINEST_LOG_STEP,
) -> dict[str, StoredTensor]:
    """Every exported tensor (MTP heads stay behind), by name; RunError on NaN or infinity."""
    stored: dict[str, StoredTensor] = {}
    for name in sorted(weights.keys() - set(TRAINING_ONLY)):
        w, limit = weights[name].detach().float(), code_limit(name, cfg)
        if not torch.isfinite(w).all():
            raise RunError(f"weights: {name} has NaN or infinite values; nothing can be exported")
        if not limit:
            stored[name] = HalfTensor(w.clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy())
            continue
        sense, cube = (senses or {}).get(name), matrices(w)
        logs = step_logs(cube, limit, sense, log_step)
        steps = cell_steps(logs, cube.size(1))
        codes = round_codes(cube, steps, limit, sense.factor if sense else None)
        codes = codes.to(torch.int8).cpu().numpy()
        stored[name] = CodedTensor(tuple(w.shape), logs.cpu().numpy(), codes)
    return stored


def expected_log_step(
    cubes: dict[str, Tensor], senses: dict[str, Sensitivity], budget_bytes: int
) -> tuple[float, int]:
    """(log2 of the multiple of all steps that should fill the budget, number of nonzero weights).

    Zeros cost little, the other weights log2 |w / step| + GAUSSIAN_BITS bits each, on average, with
    the steps that sensitivities alone would give.
    cubes: {name: (M,rows,cols)} of every coded tensor.
    """
    logs = []
    for name, w in cubes.items():
        unbound = step_logs(torch.zeros_like(w), 1, senses.get(name), 0.0)
        ratio = (w / cell_steps(unbound, w.size(1))).abs().flatten()
        logs.append(ratio[ratio > 0].log2())
    sizes = torch.cat(logs)
    count = len(sizes) or 1
    return float(sizes.mean()) + GAUSSIAN_BITS - 8 * budget_bytes / count, count


def search_steps(
    attempt: Callable[[float], bytes], guess: float, budget_bytes: int, nonzero: int
) -> tuple[bytes, float]:
    """(artifact, log2 of its multiple of all steps): the finest steps found that fit the budget.

    attempt(log_step) makes an artifact. From a guess, by Newton's method, for an octave is a bit
    per nonzero weight. Near the smallest size an octave is worth less, and Newton's steps are too
    short: then coarse steps are tried, from the coarsest on, for where every code is 0 sizes still
    differ by a word; and the space between what fits and what does not is halved. What cannot fit
    comes out as small as it gets.
    """
    blob, found = attempt(FINEST_LOG_STEP), FINEST_LOG_STEP
    if len(blob) <= budget_bytes:
        return blob, found
    low, high, middle, coarse = FINEST_LOG_STEP, COARSEST_LOG_STEP, guess, COARSEST_LOG_STEP
    for number in range(EXPORT_TRIALS):
        is_newtons, one_fits = number < NEWTON_TRIALS, len(blob) <= budget_bytes
        if not is_newtons and not one_fits:
            middle, coarse = coarse, coarse / 2
        elif not is_newtons or not low < middle < high:
            middle = (low + high) / 2
        if middle <= low or (number == NEWTON_TRIALS and one_fits):
            break
        trial = attempt(middle)
        fits = len(trial) <= budget_bytes
        if fits or len(trial) < len(blob):
            blob, found = trial, middle
        if fits and budget_bytes - len(trial) < BYTES_NEAR * budget_bytes:
            break
        if fits:
            high = middle
        elif is_newtons or one_fits:
            low = middle
        middle += 8 * (len(trial) - BYTES_AIM * budget_bytes) / nonzero
    return blob, found


def export_budget(cubes: dict[str, Tensor], cfg: Config) -> int:
    """Bytes that the artifact may have: the budget less this file and, with "ans", at most
    MATRIX_BITS and EMBED_BITS a code on average."""
    budget = cfg.artifact_bytes - code_bytes()
    if cfg.compressor != "ans":
        return budget
    bits = 0
    for name, w in cubes.items():
        bits += w.numel() * (cfg.embed_bits if name in EMBEDDINGS else cfg.matrix_bits)
    return min(budget, bits // 8)


def export(model: GPT, senses: dict[str, Sensitivity], data: Data, cfg: Config, run: Run) -> bytes:
    """The artifact, with the finest multiple of the sensitivities' steps that fits the budget."""
    started = run.sync()
    named = model.named_parameters()
    weights = {n: p.detach() for n, p in named if n not in TRAINING_ONLY}
    cubes = {n: matrices(w).float() for n, w in weights.items() if is_coded(n)}
    budget = export_budget(cubes, cfg)

    def attempt(log_step: float) -> bytes:
        stored = quantize(weights, cfg, senses, log_step)
        return pack(stored, cfg, data.corpus["vocabulary_sha256"])

    guess, nonzero = expected_log_step(cubes, senses, budget)
    blob, found = search_steps(attempt, guess, budget, nonzero)
    parameters = sum(w.numel() for w in weights.values())
    run.row(
        "artifact",
        artifact_bytes=len(blob),
        code_bytes=code_bytes(),
        log2_step=found,
        compressor=cfg.compressor,
        bits_per_parameter=8 * len(blob) / parameters,
        seconds=run.sync() - started,
    )
    return blob


# ==================================================================================================
# 10. Artifact
# ==================================================================================================
#
# In: codes, steps and float16 values; out: a file of magic, version, size of the header, SHA-256 of
# the rest; the header, JSON (architecture, hash of the vocabulary, table of tensors); a compressed
# section of everything but codes; the codes, with "ans" as words of their own, with the other
# compressors as a byte each inside of the section. ANS, asymmetric numeral systems (Duda 2009),
# writes each code by a Gaussian as wide as its row and column are, so that the bytes follow the
# steps. Reading an artifact executes nothing, and makes no more than the network's shapes need. A
# network has one spelling: a header that this program would not write, anything behind the end of a
# section, and, of a file that is loaded, any other bytes than `pack` makes are refused.

MAGIC = b"GOLFINT6"
VERSION = 2
PREFIX = struct.Struct("<8sHI32s")  # magic, version, bytes of the header, digest
LZMA_MEMORY_BYTES = 1 << 30  # most that unpacking may take; its largest window is 2^30 - 1
# Parameters that an artifact may have, so that no header makes reading it take more memory or time
# than its bytes are worth: an eighth of a bit each is less than any network that says something
# has. So many that reading takes a second are free.
MOST_PARAMETERS, PARAMETERS_PER_BYTE, FREE_PARAMETERS = 1 << 30, 64, 1 << 22
SPREAD_LIMIT = 63  # of logarithms of a row's or column's spread: their sum fits into int8
SPREAD_ROUNDS = 3  # alternating means of rows and columns settle at once
LEAST_STD, MOST_STD = 0.1, 1e4  # of the Gaussians: all codes 0, all codes alike

Shape3 = tuple[int, int, int]  # (M,rows,cols) of a coded tensor


class PackedCodes(NamedTuple):
    """Codes as bytes: in the compressed section, or after it."""

    inside: bytes
    after: bytes


class Compressor(NamedTuple):
    """How the artifact's bytes are made."""

    compress: Callable[[bytes], bytes]
    # (data, n): n bytes of the result, or all if fewer; none if data do not end with it
    decompress: Callable[[bytes, int], bytes]
    damage: tuple[type[Exception], ...]  # what decompress raises of damaged data
    encode: Callable[[list[np.ndarray]], PackedCodes]  # of int8 (M,rows,cols)
    decode: Callable[[PackedCodes, list[Shape3]], list[np.ndarray]]  # flat int8
    inside_bytes: Callable[[list[Shape3]], int]  # length of PackedCodes.inside


def compress_lzma(data: bytes) -> bytes:
    """lzma at preset 9, extreme."""
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def decompress_lzma(data: bytes, most_bytes: int) -> bytes:
    """At most so many bytes of what lzma compressed; none if anything follows it."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY_BYTES)
    plain = reader.decompress(data, most_bytes)
    return plain if reader.eof and not reader.unused_data else b""


def compress_zstd(data: bytes) -> bytes:
    """zstd at level 22."""
    return zstandard.compress(data, 22)


def decompress_zstd(data: bytes, most_bytes: int) -> bytes:
    """At most so many bytes of what zstd compressed; none if anything follows it, or if it is
    longer."""
    if not 0 <= zstandard.frame_content_size(data) < most_bytes:  # -1: it does not say
        return b""
    reader = zstandard.ZstdDecompressor().decompressobj()
    plain = reader.decompress(data)
    return plain if reader.eof and not reader.unused_data else b""


def encode_bytes(codes: list[np.ndarray]) -> PackedCodes:
    """A byte per code: packing bits before a dictionary coder costs 12 % (submission #1649)."""
    return PackedCodes(b"".join(c.tobytes() for c in codes), b"")


def decode_bytes(packed: PackedCodes, shapes: list[Shape3]) -> list[np.ndarray]:
    """Inverse of encode_bytes; RunError on damage."""
    if packed.after:
        raise RunError("artifact: bytes follow its last section")
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return np.split(np.frombuffer(packed.inside, np.int8), ends[:-1])


def count_codes(shapes: list[Shape3]) -> int:
    """Number of codes: bytes of encode_bytes."""
    return sum(math.prod(shape) for shape in shapes)


def spreads(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (M,rows,1) and (M,1,cols) for codes (M,rows,cols): logarithms, in 1/PER_OCTAVE octaves;
    a code's root mean square is about the product."""
    square, row = codes.astype(np.float32) ** 2, np.float32(1)
    for _ in range(SPREAD_ROUNDS):
        col = (square / row).mean(1, keepdims=True) + 1e-3
        row = (square / col).mean(2, keepdims=True) + 1e-3
    logs = (PER_OCTAVE / 2 * np.log2(row), PER_OCTAVE / 2 * np.log2(col))
    return tuple(x.round().clip(-SPREAD_LIMIT, SPREAD_LIMIT).astype(np.int8) for x in logs)


def cell_models(sides: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, Any]]:
    """(indices of the codes of one spread, in their order; its Gaussian), by rising spread."""
    cells = np.concatenate([(row.astype(np.int16) + col).ravel() for row, col in sides])
    order = np.argsort(cells, kind="stable")
    used, starts = np.unique(cells[order], return_index=True)
    for spread, members in zip(used.tolist(), np.split(order, starts[1:]), strict=True):
        std = min(max(2.0 ** (spread / PER_OCTAVE), LEAST_STD), MOST_STD)
        yield members, constriction.stream.model.QuantizedGaussian(-127, 127, 0.0, std)


def ans_encode(codes: list[np.ndarray]) -> PackedCodes:
    """Spreads of rows and columns inside, code words after, of int8 (M,rows,cols)."""
    sides = [spreads(c) for c in codes]
    symbols = np.concatenate([c.ravel() for c in codes])
    coder = constriction.stream.stack.AnsCoder()
    for members, model in reversed([*cell_models(sides)]):  # a stack: last in, first out
        coder.encode_reverse(symbols[members].astype(np.int32), model)
    inside = b"".join(x.tobytes() for side in sides for x in side)
    return PackedCodes(inside, coder.get_compressed().astype("<u4").tobytes())


def ans_decode(packed: PackedCodes, shapes: list[Shape3]) -> list[np.ndarray]:
    """Inverse of ans_encode; RunError on damage."""
    words = packed.after
    if len(words) % 4 or (words and not any(words[-4:])):  # no encoder ends with a zero word
        raise RunError("artifact: its code words are damaged")
    sizes = [size for m, rows, cols in shapes for size in (m * rows, m * cols)]
    parts = iter(np.split(np.frombuffer(packed.inside, np.int8), np.cumsum(sizes)[:-1]))
    sides = []
    for m, rows, cols in shapes:
        row, col = next(parts), next(parts)
        sides.append((row.reshape(m, rows, 1), col.reshape(m, 1, cols)))
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    codes = np.empty(count_codes(shapes), np.int8)
    for members, model in cell_models(sides):
        codes[members] = coder.decode(model, len(members))
    if not coder.is_empty():
        raise RunError("artifact: its code words do not end with its codes")
    return np.split(codes, np.cumsum([math.prod(shape) for shape in shapes])[:-1])


def ans_inside_bytes(shapes: list[Shape3]) -> int:
    """Bytes of the spreads."""
    return sum(m * (rows + cols) for m, rows, cols in shapes)


COMPRESSORS = {
    "ans": Compressor(
        compress_lzma,
        decompress_lzma,
        (lzma.LZMAError, EOFError),
        ans_encode,
        ans_decode,
        ans_inside_bytes,
    ),
    "zstd": Compressor(
        compress_zstd,
        decompress_zstd,
        (zstandard.ZstdError,),
        encode_bytes,
        decode_bytes,
        count_codes,
    ),
    "lzma": Compressor(
        compress_lzma,
        decompress_lzma,
        (lzma.LZMAError, EOFError),
        encode_bytes,
        decode_bytes,
        count_codes,
    ),
}
assert [*COMPRESSORS] == FIELDS["compressor"].metadata["allowed"], "list it in ArtifactSettings too"


def read_section(data: bytes, compressor: Compressor, size: int) -> bytes:
    """`size` bytes; RunError if the data give fewer or more, without making more of them."""
    try:
        plain = compressor.decompress(data, size + 1)
    except compressor.damage:
        plain = b""
    if len(plain) != size:
        raise RunError("artifact: its compressed section is damaged")
    return plain


class TensorEntry(NamedTuple):
    """A line of the header's table of tensors; as JSON, a list."""

    name: str
    shape: list[int]
    limit: int  # code_limit; 0: float16 values

    def cube(self) -> Shape3:
        """(M,rows,cols) of a coded tensor."""
        return (math.prod(self.shape[:-2]), *self.shape[-2:])

    def plain_bytes(self) -> int:
        """Bytes of what the artifact holds beside codes."""
        if not self.limit:
            return 2 * math.prod(self.shape)
        m, rows, cols = self.cube()
        return m * (rows + cols)

    def stored(self, plain: np.ndarray, codes: np.ndarray | None) -> StoredTensor:
        """The tensor, from its plain bytes (int8) and, flat, its codes."""
        if not self.limit:
            return HalfTensor(plain.view("<f2").reshape(self.shape))
        m, rows, cols = self.cube()
        logs = plain.reshape(m, rows + cols)
        return CodedTensor(tuple(self.shape), logs, codes.reshape(m, rows, cols))


def tensor_table(cfg: Config) -> list[TensorEntry]:
    """Every exported tensor of the architecture, by name; takes no memory."""
    with torch.device("meta"):
        model = GPT(replace(cfg, mtp_num_heads=0), None)
    named = sorted(model.named_parameters())
    return [TensorEntry(n, list(p.shape), code_limit(n, cfg)) for n, p in named]


def header_text(cfg: Config, vocabulary: str, section_bytes: int) -> bytes:
    """The header of an artifact, JSON, in the one way in which it is written."""
    header = {
        "architecture": named_settings(cfg),
        "vocabulary": vocabulary,
        "compressor": cfg.compressor,
        "tensors": tensor_table(cfg),
        "section_bytes": section_bytes,
    }
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def pack(stored: dict[str, StoredTensor], cfg: Config, vocabulary: str) -> bytes:
    """The artifact, with COMPRESSOR; `vocabulary` is the hash of the network's tokenizer."""
    compressor = COMPRESSORS[cfg.compressor]
    assert [*stored] == [entry.name for entry in tensor_table(cfg)]
    plain = b"".join(t.plain() for t in stored.values())
    packed = compressor.encode([t.codes for t in stored.values() if isinstance(t, CodedTensor)])
    section = compressor.compress(plain + packed.inside)
    text = header_text(cfg, vocabulary, len(section))
    body = text + section + packed.after
    return PREFIX.pack(MAGIC, VERSION, len(text), hashlib.sha256(body).digest()) + body


def network_digest(stored: dict[str, StoredTensor], cfg: Config, vocabulary: str) -> str:
    """SHA-256, in hex, of what an artifact's network computes with: shapes, steps, codes, values.
    It does not depend on how they are compressed."""
    digest = hashlib.sha256(header_text(replace(cfg, compressor="ans"), vocabulary, 0))
    for tensor in stored.values():
        digest.update(tensor.plain())
        digest.update(tensor.codes.tobytes() if isinstance(tensor, CodedTensor) else b"")
    return digest.hexdigest()


def open_artifact(blob: bytes) -> tuple[bytes, bytes]:
    """(header's text, what follows it); RunError for any other file, or a damaged one."""
    magic, version, size, digest = PREFIX.unpack_from(blob.ljust(PREFIX.size, b"\0"))
    body = blob[PREFIX.size :]
    if magic != MAGIC:
        raise RunError("artifact: not one of ours")
    if version != VERSION:
        raise RunError(f"artifact: of format version {version}, not {VERSION}")
    if size > len(body) or hashlib.sha256(body).digest() != digest:
        raise RunError("artifact: truncated or damaged (its SHA-256 does not match)")
    return body[:size], body[size:]


def named_settings(cfg: Config) -> dict[str, Any]:
    """The architecture's settings that a header names: those that are not as in PLAIN."""
    values = {name: getattr(cfg, name) for name in ARCHITECTURE}
    return {k: v for k, v in values.items() if k not in PLAIN or v != PLAIN[k]}


def header_config(header: dict, cfg: Config) -> Config:
    """cfg with the header's compressor and architecture; settings that it does not name are as in
    PLAIN. Any exception if the header is none."""
    named = PLAIN | header["architecture"]
    values = {}
    for name in ARCHITECTURE:
        values[name] = parse_value(name, str(named[name]).strip("[]()"))  # a tuple or a list
    values["compressor"] = parse_value("compressor", header["compressor"])
    cfg = replace(cfg, **values)
    check_config(cfg)
    return cfg


def other_tensor(told: Any, table: list[TensorEntry]) -> str:
    """How a header's first tensor that is not in this program's table, or not so, differs."""
    try:
        theirs = {name: (shape, limit) for name, shape, limit in told}
    except (TypeError, ValueError):
        return ""
    ours = {entry.name: (entry.shape, entry.limit) for entry in table}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            shapes = [x[name][0] if name in x else "absent" for x in (theirs, ours)]
            return f": tensor {name} is {shapes[0]} in it and {shapes[1]} here"
    return ""


def read_header(text: bytes, payload_bytes: int, cfg: Config) -> tuple[Config, dict]:
    """(cfg with the header's architecture and compressor, header); RunError if the header does not
    describe one of this program's networks."""
    reason = ""
    try:
        header = json.loads(text)
        cfg = header_config(header, cfg)
        size = header["section_bytes"]
        fits = type(size) is int and 0 <= size <= payload_bytes and bool(header["vocabulary"])
        table = tensor_table(cfg)
        parameters = sum(math.prod(entry.shape) for entry in table)
        held = max(FREE_PARAMETERS, PARAMETERS_PER_BYTE * payload_bytes)
        if parameters > min(held, MOST_PARAMETERS):
            fits, reason = False, f": {parameters} parameters do not fit into {payload_bytes} bytes"
        fits = fits and header["tensors"] == [list(entry) for entry in table]
        reason = reason or other_tensor(header["tensors"], table)
        if fits and text != header_text(cfg, header["vocabulary"], size):
            fits, reason = False, " in the one way in which it is written"
    except (ValueError, KeyError, TypeError, AttributeError, RunError, RuntimeError, OverflowError):
        fits = False
    if not fits:
        raise RunError(f"artifact: its header describes none of this program's networks{reason}")
    return cfg, header


def unpack(blob: bytes, cfg: Config, vocabulary: str) -> tuple[Config, dict[str, StoredTensor]]:
    """(cfg with the artifact's architecture, its tensors by name); RunError for any other file."""
    text, payload = open_artifact(blob)
    cfg, header = read_header(text, len(payload), cfg)
    if header["vocabulary"] != vocabulary:
        raise RunError(
            "artifact: made with another vocabulary than this tokenizer's; TEXT_FILES, or "
            "DATA_PATH and TOKENIZER_PATH, must be those of its run, which its .json tells"
        )
    if cfg.compressor == "ans" and not constriction:
        raise RunError("artifact: its codes need the package constriction, which is not installed")
    table, compressor = tensor_table(cfg), COMPRESSORS[cfg.compressor]
    cubes = [entry.cube() for entry in table if entry.limit]
    sizes = [entry.plain_bytes() for entry in table]
    section, after = payload[: header["section_bytes"]], payload[header["section_bytes"] :]
    whole = sum(sizes) + compressor.inside_bytes(cubes)
    content = np.frombuffer(read_section(section, compressor, whole), np.int8)
    *parts, inside = np.split(content, np.cumsum(sizes))
    codes = iter(compressor.decode(PackedCodes(inside.tobytes(), after), cubes))
    stored = {}
    for entry, part in zip(table, parts, strict=True):
        stored[entry.name] = entry.stored(part, next(codes) if entry.limit else None)
        if not entry.limit and not np.isfinite(stored[entry.name].values).all():
            raise RunError("artifact: it holds NaN or infinite numbers")
    return cfg, stored


def check_spelling(blob: bytes, cfg: Config, vocabulary: str) -> None:
    """RunError for an artifact that is written otherwise than `pack` writes its network."""
    cfg, stored = unpack(blob, cfg, vocabulary)
    if pack(stored, cfg, vocabulary) != blob:
        raise RunError(
            "artifact: not the bytes in which this program writes its network: altered, or written "
            "with another version of lzma, zstd or numpy; AUDIT=0 scores it all the same, unaudited"
        )


def code_bytes() -> int:
    """Bytes of this file: all the code there is."""
    return os.path.getsize(__file__)


# ==================================================================================================
# 11. Windows and neural pass
# ==================================================================================================
#
# A window is eval_seq_len tokens. The first scores all its targets, each next one, a stride on, its
# last `stride`; the last one is shifted back and scores what remains. So the scored spans tile the
# targets: each is scored once, after the first window with at least eval_seq_len - stride tokens of
# context. Windows come in batches of one shape, on a grid that does not depend on the ranks; ranks
# take runs of batches. Of each target the pass keeps log p(target), the entropy H of the network's
# distribution, and log p(y_i) of each hint y_i (section 14).

# Inductor's: no kernel is chosen by timing it, so that all ranks and runs add in the same order
DETERMINISTIC = {"deterministic": True}
LOG_SHARE = 50  # progress lines a pass: about every 2 %
CHALLENGE_RANKS = 8  # over which VAL_BATCH_SIZE is divided
HINTS = 2  # tokens that the counts name at a target; a third gains 0.001 bits per byte more


class Grid:
    """Windows in batches, the same for any number of ranks.

    Windows are numbered from 0. Batch 0 is window 0 alone, which scores all its targets; the others
    have `batch_windows` windows that score their `last` targets. Numbers from `count` on are
    windows at the stream's end that score nothing: they fill up a batch.

    num_targets, seq_len: of the stream, of a window. batches: each rank's, range of numbers. spans:
    each rank's targets (start, end).
    """

    def __init__(
        self, num_targets: int, cfg: Config, stride: int, world_size: int, batch_windows: int = 0
    ):
        """batch_windows: by default EVAL_BATCH_WINDOWS."""
        self.num_targets, self.last = num_targets, stride
        self.seq_len = min(cfg.eval_seq_len, num_targets)
        self.count = 1 + -(-(num_targets - self.seq_len) // stride)
        most = max(1, MOST_LOGITS // (self.last * cfg.vocab_size))
        self.batch_windows = min(most, batch_windows or cfg.eval_batch_windows)
        self.count_batches = 1 + -(-(self.count - 1) // self.batch_windows)
        cuts = [self.count_batches * r // world_size for r in range(world_size + 1)]
        ends = [self.scored_before(cut) for cut in cuts]
        self.batches = [range(a, b) for a, b in itertools.pairwise(cuts)]
        self.spans = list(itertools.pairwise(ends))

    def spans_of(self, numbers: Tensor) -> Tensor:
        """(windows,3) int64 of window numbers (windows,): start, first_scored, end. A window's
        tokens are [start, end), its scored targets [first_scored, end)."""
        end = (self.seq_len + self.last * numbers).clamp(max=self.num_targets)
        first = (self.seq_len + self.last * (numbers - 1)).clamp(max=self.num_targets)
        return torch.stack([end - self.seq_len, first.where(numbers > 0, 0), end], 1)

    def window_of(self, target: int) -> int:
        """Number of the window that scores a target."""
        return max(0, 1 + (target - self.seq_len) // self.last)

    def windows_before(self, batch: int) -> int:
        """How many windows the batches before this one have."""
        return min(1 + (batch - 1) * self.batch_windows, self.count) if batch else 0

    def scored_before(self, batch: int) -> int:
        """How many targets the batches before this one score."""
        before = self.windows_before(batch)
        return min(self.seq_len + self.last * (before - 1), self.num_targets) if before else 0

    def numbers(self, batch: int) -> Tensor:
        """Window numbers (1,) or (batch_windows,) int64 of a batch."""
        if not batch:
            return torch.zeros(1, dtype=torch.int64)
        return 1 + (batch - 1) * self.batch_windows + torch.arange(self.batch_windows)

    def row_of(self, number: int) -> int:
        """Which row of its batch a window is."""
        return max(0, number - 1) % self.batch_windows

    def sheets(self, numbers: Collection[int]) -> list[Tensor]:
        """Any windows as few batches of the grid's shapes, window numbers (1,) or (batch_windows,)
        int64 each: every window is in its own row, whose results do not depend on the others."""
        rows: dict[int, list[int]] = collections.defaultdict(list)
        for number in numbers:
            if number:
                rows[self.row_of(number)].append(number)
        depth = max(map(len, rows.values()), default=0)
        sheets = torch.full((depth, self.batch_windows), self.count)
        for row, column in rows.items():
            sheets[: len(column), row] = torch.tensor(column)
        return [torch.zeros(1, dtype=torch.int64)] * (0 in numbers) + list(sheets)

    def places(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch: positions of the windows' tokens (B,T), targets for which it has logits
        (B,last), which of these it scores (B,last) bool."""
        start, first, end = (column[:, None] for column in self.spans_of(numbers).unbind(1))
        inputs = start + torch.arange(self.seq_len, device=numbers.device)
        targets = inputs if len(numbers) == 1 and numbers[0] == 0 else inputs[:, -self.last :]
        return inputs, targets, (targets >= first) & (targets < end)


class NeuralColumns(NamedTuple):
    """The network at each target, float64, in nats."""

    logp: Tensor  # (N,) of the target
    entropy: Tensor  # (N,) of the distribution
    hint_logp: Tensor  # (HINTS,N) of each hint

    @staticmethod
    def of(rows: Sequence[Tensor]) -> NeuralColumns:
        """From its rows (N,)."""
        return NeuralColumns(rows[0], rows[1], torch.stack([*rows[2:]]))

    def rows(self) -> Tensor:
        """All as (NEURAL_ROWS,N)."""
        return torch.cat([self.logp[None], self.entropy[None], self.hint_logp])


NEURAL_ROWS = 2 + HINTS


def score_logits(logits: Tensor, targets: Tensor, hints: Tensor) -> Tensor:
    """NeuralColumns (...,NEURAL_ROWS) of logits (...,V) float32, targets (...) and hints
    (...,HINTS) int64.

    Hints are added in float64: one float32 near 1 would hide all that 1 - p(y) is made of.
    """
    z = logits - logits.amax(-1, keepdim=True)
    e = z.exp()
    energy = (e * z).sum(-1, keepdim=True).double()
    total = torch.zeros_like(energy)
    for hint in hints.split(1, -1):
        total += e.gather(-1, hint)
        e.scatter_(-1, hint, 0.0)
    total += e.sum(-1, keepdim=True)
    logp, hint_logp = (z.gather(-1, i).double() - total.log() for i in (targets[..., None], hints))
    return torch.cat([logp, total.log() - energy / total, hint_logp], -1)


def log_distribution(logits: Tensor) -> Tensor:
    """Log-probabilities (V,) float64, on the CPU, of logits (V,)."""
    return logits.double().log_softmax(-1).cpu()


class NeuralPass:
    """The network over a rank's windows; the stream stays on the device as integers.

    All its distributions, for scores, masses, encoder and decoder, come from `logits`, in batches
    of the grid's two shapes with every window in its own row: the same kernels add the same numbers
    in the same order. tokens: (N+1,) int32. start, end: this rank's span of targets. times: (span,)
    uint8, how often `columns` has written each target.
    """

    def __init__(
        self, model: GPT, data: Data, cfg: Config, run: Run, stride: int, batch_windows: int = 0
    ):
        """batch_windows: as of Grid."""
        self.cfg, self.run, self.data = cfg, run, data
        self.tokens = data.val.int().to(run.device)
        self.grid = Grid(len(self.tokens) - 1, cfg, stride, run.world_size, batch_windows)
        self.start, self.end = self.grid.spans[run.rank]
        self.times = torch.zeros(self.end - self.start, dtype=torch.uint8)
        self.logged_targets, self.logged_bytes = 0, 0
        self.model = model
        self.batch_logits = compiled(model.logits, cfg, run, DETERMINISTIC)

    def logits(self, inputs: Tensor, last: int) -> Tensor:
        """Logits (B,last,V) float32 of a batch's windows of tokens (B,T)."""
        if (len(inputs), last) == (self.grid.batch_windows, self.grid.last):
            return self.batch_logits(inputs, last)
        return self.model.logits(inputs, last)  # batch 0 alone: its shape is not compiled

    def score(self, inputs: Tensor, targets: Tensor, hints: Tensor) -> Tensor:
        """NeuralColumns (B,last,NEURAL_ROWS) at positions of Grid.places; hints (B,last,HINTS)
        int64."""
        logits = self.logits(self.tokens[inputs].long(), targets.size(1))
        return score_logits(logits, self.tokens[targets + 1].long(), hints)

    def columns(self, hints: Tensor | None = None, progress: bool = False) -> Tensor:
        """NeuralColumns (span,NEURAL_ROWS) of this rank's span; hints (HINTS,span), none where
        negative."""
        device, length = self.run.device, self.end - self.start
        if hints is None:
            hints = torch.zeros(HINTS, length, device=device)
        hints = F.pad(hints.clamp(min=0), (0, 1)).mT  # slot `length` is discarded
        out = torch.full((length + 1, NEURAL_ROWS), math.nan, dtype=torch.float64, device=device)
        times = torch.zeros(length + 1, dtype=torch.uint8, device=device)
        self.started = self.run.sync()
        for batch in self.grid.batches[self.run.rank]:
            numbers = self.grid.numbers(batch).to(device, non_blocking=True)
            inputs, targets, scored = self.grid.places(numbers)
            slot = torch.where(scored, targets - self.start, length)
            out[slot.flatten()] = self.score(inputs, targets, hints[slot].long()).flatten(0, 1)
            times.index_add_(0, slot.flatten(), torch.ones_like(slot.flatten(), dtype=times.dtype))
            if progress and self.run.speaks:
                self.log_progress(batch, out)
        self.times = times[:length]
        return out[:length]

    def log_progress(self, batch: int, out: Tensor) -> None:
        """On rank 0, the running bits per byte of the network about every 2 % of its batches."""
        mine = len(self.grid.batches[0])
        if (batch + 1) * LOG_SHARE // mine == batch * LOG_SHARE // mine:
            return
        end = self.grid.scored_before(batch + 1)
        new = self.data.val[self.logged_targets : end + 1]
        self.logged_bytes += int(self.data.table.target_bytes(new).sum())
        self.logged_targets = end
        bits = -float(out[:end, 0].sum()) / math.log(2)
        bpb = bits / max(1, self.logged_bytes)
        place = f"{self.grid.windows_before(batch + 1)}/{self.grid.count}"
        eta_seconds = eta(self.started, (batch + 1) / mine)
        self.run.row("eval", f"eval [{place}]", bpb=bpb, eta_seconds=eta_seconds)

    def sheet_logits(self, numbers: Tensor) -> Tensor:
        """Logits (B,last,V) of a batch of Grid.sheets."""
        inputs, targets, _ = self.grid.places(numbers.to(self.run.device))
        return self.logits(self.tokens[inputs].long(), targets.size(1))

    def distributions(self, targets: Iterable[int]) -> dict[int, Tensor]:
        """{target: log-probabilities (V,) float64, on the CPU}."""
        by_window: dict[int, list[int]] = collections.defaultdict(list)
        for target in targets:
            by_window[self.grid.window_of(target)].append(target)
        found = {}
        for sheet in self.grid.sheets(by_window):
            logits, spans = self.sheet_logits(sheet), self.grid.spans_of(sheet).tolist()
            for row, number in enumerate(sheet.tolist()):
                for target in by_window.get(number, ()):
                    found[target] = log_distribution(logits[row, target - spans[row][2]])
        return found


def score_of(logp: Tensor, byte_counts: Tensor) -> dict:
    """val_loss (nats per token) and val_bpb (bits per byte) of (N,), summed in stream order."""
    nats, total = -float(np.add.reduce(logp.double().numpy())), int(byte_counts.sum())
    return {
        "val_loss": nats / len(logp),
        "val_bpb": nats / math.log(2) / max(1, total),
        "tokens": len(logp),
        "bytes": total,
    }


def neural_score(model: GPT, data: Data, cfg: Config, run: Run) -> dict:
    """score_of windows that do not overlap, on rank 0; {} on the others."""
    most = -(-len(data.val) // cfg.eval_seq_len)
    batch_windows = max(1, min(most, cfg.val_batch_size // CHALLENGE_RANKS // cfg.eval_seq_len))
    neural = NeuralPass(model, data, cfg, run, cfg.eval_seq_len, batch_windows)
    columns = run.gather(neural.columns(), neural.grid.spans)
    return score_of(columns[:, 0], data.val_bytes) if run.is_main else {}


# ==================================================================================================
# 12. N-gram counts
# ==================================================================================================
#
# Of each position i and order n, with the n - 1 tokens before i as context: how often did the
# context occur before, how often with this token after it? Counting by sorting. With positions
# grouped by the n-gram that ends there, in stream order inside a group, "how often before" is a
# rank. Groups of length n + 1 come from those of length n: step one token on, split each group by
# that token with a stable sort, drop groups of one: no more is to repeat. So the sorts shrink with
# every order, there are no tables, no collisions, and position i sees positions before i only.
# Buckets in place of n-grams give a hashed table's counts, a rank among earlier chunks a coarser
# cache's, groups split by document those inside documents.
#
# Memory that is touched for the first time costs more than what is computed in it, and what jumps
# about more than what walks. So work goes in blocks, whose temporaries are reused, and sorting
# deals each block's members out to their digits' places, where they lie in rows.

# Members or positions of a block: on a CPU 2**15 to 2**19 take the same time, larger ones more
# memory; on CUDA few large blocks are few launches (by their count; not measured).
CPU_BLOCK, BLOCK = 2**18, 2**22
DIGIT_BITS = 11  # of a sort's pass: a vocabulary of 1,024 and the token after the end need one


class Counts(NamedTuple):
    """Columns (positions,) of one order n, integers, over the positions before each."""

    context: Tensor  # how often the n - 1 tokens before occurred
    pair: Tensor  # how often this token followed them
    distinct: Tensor | None = None  # how many different tokens did; exact counts only, as the rest
    hint: Tensor | None = None  # the token that did last; -1: none
    hint_count: Tensor | None = None  # how often that one did
    distance: Tensor | None = None  # how many tokens ago the context did
    streak: Tensor | None = None  # how many times in a row the hint followed, the last included


class Groups(NamedTuple):
    """M positions, group after group, in stream order inside each."""

    position: Tensor  # int32 (M,)
    start: Tensor  # int32 (M,), index in `position` of the group's first member: its name


class Ngrams(NamedTuple):
    """The groups of one order, whose ranks are its counts; valid until those of the next."""

    contexts: Groups  # M positions by the context before them
    grams: Groups  # K positions by the n-gram that ends there
    token: Tensor | None = None  # int16 or int32 (M,), at each context's position; exact only
    member: Tensor | None = None  # int32 (K,), index of a gram's position in contexts; exact only
    by_token: Tensor | None = None  # int32 (M,), indices in contexts, by token; exact only


def blocks(begin: int, column: Tensor) -> Iterator[slice]:
    """The entries of a column from `begin` on, in blocks."""
    size = CPU_BLOCK if column.device.type == "cpu" else BLOCK
    for first in range(begin, len(column), size):
        yield slice(first, min(first + size, len(column)))


def numbers(part: slice, device) -> Tensor:
    """int32 indices of a block."""
    return torch.arange(part.start, part.stop, dtype=torch.int32, device=device)


def changes(a: Tensor, b: Tensor) -> Tensor:
    """(M,) bool: True at 0 and wherever a or b differs from the entry before."""
    changed = torch.ones_like(a, dtype=torch.bool)
    for part in blocks(1, a):
        before = slice(part.start - 1, part.stop - 1)
        changed[part] = (a[part] != a[before]) | (b[part] != b[before])
    return changed


def run_starts(is_first: Tensor) -> Tensor:
    """(M,) int32: index of the latest True."""
    starts = torch.empty_like(is_first, dtype=torch.int32)
    for part in blocks(0, is_first):
        own = numbers(part, starts.device) * is_first[part]
        if part.start:
            own[:1] = own[:1].maximum(starts[part.start - 1])
        starts[part] = own.cummax(0).values
    return starts


def digits_of(keys: Tensor, shift: int) -> Tensor:
    """int16 digit of keys >= 0 that begins at bit `shift`."""
    return (keys >> shift).bitwise_and(2**DIGIT_BITS - 1).short()


def sort_by_digit(columns: list[Tensor], shift: int) -> list[Tensor]:
    """Columns (M,), stably sorted by a digit of the first. Each block is sorted by itself; then its
    members of a digit go, in a row, where those of the blocks before end."""
    keys, bins = columns[0], 2**DIGIT_BITS
    count = torch.zeros(bins, dtype=torch.int64, device=keys.device)
    for part in blocks(0, keys):
        count += torch.bincount(digits_of(keys[part], shift), minlength=bins)
    place = count.cumsum(0) - count  # of the next member of each digit
    result = [torch.empty_like(column) for column in columns]
    for part in blocks(0, keys):
        digit, order = digits_of(keys[part], shift).sort(stable=True)
        count = torch.bincount(digit, minlength=bins)
        moved = place - (count.cumsum(0) - count)
        target = moved.index_select(0, digit.int())
        target += torch.arange(len(digit), device=keys.device)
        for column, out in zip(columns, result, strict=True):
            out.scatter_(0, target, column[part].index_select(0, order))
        place += count
    return result


@threads(1)
def split(groups: Groups, keys: Tensor, largest: int) -> tuple[Groups, Tensor, Tensor]:
    """Divide each group by keys (M,) from 0 to `largest`, without the groups of one that result.

    Also int32, of each member left, its index in `groups`; and int32 (M,), all indices in `groups`
    by their keys, in rising order for a key.
    """
    columns = [keys, groups.start, groups.position, numbers(slice(0, len(keys)), keys.device)]
    for shift in range(0, max(1, largest.bit_length()), DIGIT_BITS):
        columns = sort_by_digit(columns, shift)
    keys, start, position, by_key = columns
    is_first, member = changes(keys, start), by_key.clone()
    del keys, start, columns
    repeats = ~is_first
    repeats[:-1] |= ~is_first[1:]
    size = 0
    for part in blocks(0, repeats):
        kept = repeats[part].nonzero().squeeze(1)
        for column in (is_first, position, member):  # what is left moves to the front
            column[size : size + len(kept)] = column[part].index_select(0, kept)
        size += len(kept)
    return Groups(position[:size], run_starts(is_first[:size])), member[:size], by_key


@threads(1)
def subgroups(groups: Groups, label: Tensor) -> Groups:
    """Each group divided where label[position] changes, labels rising with the position."""
    labels = label.index_select(0, groups.position)
    return Groups(groups.position, run_starts(changes(groups.start, labels)))


def document_numbers(tokens: Tensor) -> Tensor:
    """int32 (N+1,) number of each position's document, which begins after BOS; the last entry is
    that of the position after the end."""
    begins = F.pad(tokens == BOS, (1, 0))
    return begins.cumsum(0, dtype=torch.int32)


def target_chunks(total: int, granularity: int, first: int, device) -> Tensor | None:
    """Chunk (total+1,) int32 of each position: targets 1, 2, ... fall into chunks, the first of
    `first`, then `granularity` each; None if each target is a chunk of its own."""
    if granularity == first == 1:
        return None
    position = torch.arange(total + 1, dtype=torch.int32, device=device)
    chunk = ((position - first - 1) // granularity + 1).clamp(min=0)
    return chunk.masked_fill(position == 0, -1)


def all_positions(size: int, device) -> Groups:
    """The positions before `size` as one group."""
    position = numbers(slice(0, size), device)
    return Groups(position, torch.zeros_like(position))


def token_type(tokens: Tensor) -> torch.dtype:
    """The smallest type that holds tokens and a number more."""
    return torch.int16 if tokens.max() < 2**15 - 1 else torch.int32


def exact_ngrams(tokens: Tensor, max_order: int) -> Iterator[tuple[int, Ngrams]]:
    """(order, Ngrams) of a stream (N,) for orders 1 to max_order."""
    contexts = all_positions(len(tokens), tokens.device)
    end = int(tokens.max()) + 1  # after the stream, that no token equals
    tokens = F.pad(tokens.to(token_type(tokens)), (0, 1), value=end)
    for order in range(1, max_order + 1):
        token = tokens.index_select(0, contexts.position)
        grams, member, by_token = split(contexts, token, end)
        yield order, Ngrams(contexts, grams, token, member, by_token)
        contexts = Groups(grams.position.add_(1), grams.start)
        del token, grams, member, by_token  # before the next are made


@threads(1)
def next_keys(keys: Tensor, tokens: Tensor, prime: int, buckets: int) -> Tensor:
    """int32 (N,) bucket of the n tokens that end at each position, from keys (N,) of n - 1."""
    result = torch.empty_like(keys)
    for part in blocks(0, keys):
        result[part] = (tokens[part].long() * prime).bitwise_and_(buckets - 1)
    result[1:] ^= keys[:-1]
    return result


def hashed_ngrams(
    tokens: Tensor, max_order: int, buckets: int, primes: tuple[int, ...]
) -> Iterator[tuple[int, Ngrams]]:
    """(order, Ngrams) of a stream (N,) whose contexts and n-grams from order 2 on are buckets."""
    stream = contexts = all_positions(len(tokens), tokens.device)
    keys = torch.zeros_like(stream.position)
    for order in range(1, max_order + 1):
        keys = next_keys(keys, tokens, primes[(order - 1) % len(primes)], buckets)
        whole = Groups(*(column[order - 1 :] for column in stream))  # with all their tokens
        hashed, *_ = split(whole, keys[order - 1 :], buckets - 1)
        grams = hashed
        if order == 1:
            grams, *_ = split(stream, tokens.int(), int(tokens.max()))
        yield order, Ngrams(contexts, grams)
        contexts = Groups(hashed.position.add_(1), hashed.start)
        del hashed, grams  # before the next are made


def slots(position: Tensor, known: Tensor, start: int, size: int) -> Tensor:
    """int64 (M,): where positions of a known context come in a column of the positions `start` to
    start + size - 1; all others share the place after it."""
    slot = position.long() - start
    return slot.masked_fill_(~known | (slot < 0), size)


def ranks(groups: Groups, part: slice) -> Tensor:
    """int32: of a block of members, how many of the same group come before."""
    return numbers(part, groups.start.device) - groups.start[part]


@threads(1)
def rank_column(groups: Groups, chunk: Tensor | None, start: int, size: int) -> Tensor:
    """int32 (size,), of the positions from `start` on: members of the same group before them, in
    earlier chunks if given."""
    column = torch.zeros(size + 1, dtype=torch.int32, device=groups.start.device)
    seen = groups if chunk is None else subgroups(groups, chunk)
    for part in blocks(0, groups.start):
        rank = ranks(groups, part)
        if chunk is not None:
            rank -= ranks(seen, part)
        column.scatter_(0, slots(groups.position[part], rank > 0, start, size), rank)
    return column[:size]


def member_counts(ngrams: Ngrams) -> Iterator[tuple[slice, Counts]]:
    """(indices in the contexts, their Counts), a block at a time. Of a context that is new all but
    the count of 0 is meaningless; the very first member, which has one, is left out."""
    contexts, grams, token, member, _ = ngrams
    streak_start = run_starts(changes(contexts.start, token))
    pair = torch.zeros_like(contexts.start)
    for part in blocks(0, member):
        pair.scatter_(0, member[part].long(), ranks(grams, part))
    novel = (pair == 0).cumsum(0, dtype=torch.int32)  # up to each member, itself included
    for part in blocks(1, pair):
        before = slice(part.start - 1, part.stop - 1)
        position = contexts.position[part]
        first_novel = novel.index_select(0, contexts.start[part])
        counts = Counts(
            context=ranks(contexts, part),
            pair=pair[part],
            distinct=novel[before] - first_novel + 1,
            hint=token[before],
            hint_count=pair[before] + 1,
            distance=position - contexts.position[before],
            streak=numbers(part, position.device) - streak_start[before],
        )
        yield part, counts


@threads(1)
def count_columns(ngrams: Ngrams, start: int, size: int) -> Counts:
    """Exact Counts (size,) int32 of the positions from `start` on."""
    device, fills = ngrams.contexts.start.device, Counts(0, 0, 0, -1, 0, 0, 0)
    columns = [torch.full((size + 1,), x, dtype=torch.int32, device=device) for x in fills]
    for part, counts in member_counts(ngrams):
        slot = slots(ngrams.contexts.position[part], counts.context > 0, start, size)
        for column, values in zip(columns, counts, strict=True):
            column.scatter_(0, slot, values.int())
    return Counts(*(column[:size] for column in columns))


def in_documents(ngrams: Ngrams, document: Tensor) -> Ngrams:
    """Exact Ngrams as if each document was a stream: what runs over an end occurs once inside."""
    contexts, grams = (subgroups(groups, document) for groups in ngrams[:2])
    return ngrams._replace(contexts=contexts, grams=grams)


def count_ngrams(
    tokens: Tensor,
    max_order: int,
    start: int = 0,
    buckets: int = 0,
    granularity: int = 1,
    first: int | None = None,
    primes: tuple[int, ...] | None = None,
    documents: bool = False,
    followers: bool = True,
) -> Iterator[tuple[int, Counts]]:
    """Yield (order, Counts of the positions from `start` on) for orders 1 to max_order.

    tokens (N,) integers on any device. buckets: 0 exact, a power of 2 hashed with `primes`.
    granularity, first: a position sees the n-grams whose target lies in an earlier chunk
    (target_chunks). documents: count inside each document alone; exact only. followers: distinct
    and hints are wanted; exact, one target a chunk only.
    """
    size, first = len(tokens) - start, first or granularity
    chunk = target_chunks(len(tokens), granularity, first, tokens.device)
    if buckets:
        found = hashed_ngrams(tokens, max_order, buckets, primes or Config.ngram_primes)
    else:
        found = exact_ngrams(tokens, max_order)
    document = document_numbers(tokens) if documents else None
    for order, ngrams in found:
        if documents:
            ngrams = in_documents(ngrams, document)
        if followers and chunk is None and not buckets:
            counts = count_columns(ngrams, start, size)
        else:
            counts = Counts(*(rank_column(groups, chunk, start, size) for groups in ngrams[:2]))
        del ngrams
        yield order, counts
        del counts


class BackoffRule(NamedTuple):
    """Which counts a backoff rule reads."""

    buckets: int = 0  # 0: exact
    match: str = "context"  # or "pair" too
    first: int = 1  # targets of the first chunk
    granularity: int = 1  # of the others
    cold: bool = False  # the history begins with a rank's span

    def history(self, start: int) -> tuple[int, int]:
        """(target with which the history of a span that begins at `start` begins, targets of the
        first chunk)."""
        if not self.cold:
            return 0, self.first
        return start, self.granularity if start else self.first

    def counted(
        self, tokens: Tensor, span: tuple[int, int], cfg: Config
    ) -> Iterator[tuple[int, Counts]]:
        """(order, Counts) of the targets `span` of a stream; a rank counts all before (prefill)."""
        start, end = span
        begin, first = self.history(start)
        return count_ngrams(
            tokens[begin : end + 1],
            cfg.ngram_max_order,
            start=start + 1 - begin,
            buckets=self.buckets,
            granularity=self.granularity,
            first=first,
            primes=cfg.ngram_primes,
            followers=False,
        )

    def visible(self, target: int, begin: int) -> int:
        """How many tokens from `begin` on a target sees counted."""
        _, first = self.history(begin)
        place = target - begin - first
        if place < 0:  # in the history's first chunk
            return 1
        return 1 + first + place // self.granularity * self.granularity


EXACT = BackoffRule()


def scan_ngrams(
    tokens: Tensor, target: int, rule: BackoffRule, max_order: int, cfg: Config, begin: int = 0
) -> Iterator[tuple[int, Counts]]:
    """Yield (order, Counts (V,)) of every token as if it were the target, which follows
    tokens[target].

    Independent of count_ngrams: looks through the history, tokens[begin] to tokens[target], and no
    further.
    """
    device, known = tokens.device, tokens[begin : target + 1]
    words, place = torch.arange(cfg.vocab_size, device=device), len(known)
    visible = min(place, rule.visible(target, begin))
    # Places whose order - 1 tokens before are those before the target.
    ends = torch.arange(visible, dtype=torch.int32, device=device)
    keys = torch.zeros(place + 1, dtype=torch.int32, device=device)
    for order in range(1, max_order + 1):
        n = order - 1
        if n > place:
            ends = ends[:0]
        elif n and not rule.buckets:
            first = known.index_select(0, (ends - n).clamp_(min=0))
            ends = ends[(first == known[place - n]) & (ends >= n)]
        pair_keys = keys
        if rule.buckets:
            prime = cfg.ngram_primes[n % len(cfg.ngram_primes)]
            pair_keys = scan_keys(keys, known, prime, rule.buckets)
        if rule.buckets and 0 < n <= place:
            wanted = (keys[place] ^ words * prime) & (rule.buckets - 1)
            pairs = pair_keys[order : visible + 1]
            yield order, scan_buckets(keys[n:visible] == keys[place], pairs, wanted)
        else:
            yield order, scan_exact(known, ends, words)
        keys = pair_keys


def scan_keys(keys: Tensor, known: Tensor, prime: int, buckets: int) -> Tensor:
    """int32 (place+1,) bucket of the n tokens before each place, from keys of n - 1."""
    longer = torch.zeros_like(keys)
    for part in blocks(0, known):
        own = (known[part].long() * prime) & (buckets - 1)
        longer[part.start + 1 : part.stop + 1] = keys[part] ^ own
    return longer


def scan_buckets(same: Tensor, pairs: Tensor, wanted: Tensor) -> Counts:
    """Hashed Counts (V,): which places had the target's context, bool, the buckets of what followed
    at each, and those (V,) that each token would have."""
    asked = wanted.unique().to(pairs.dtype)  # counted alone: a table has more entries than history
    place = torch.searchsorted(asked, pairs).clamp_(max=len(asked) - 1)
    counts = torch.bincount(place[asked[place] == pairs], minlength=len(asked))
    pair = counts[torch.searchsorted(asked, wanted.to(pairs.dtype))]
    return Counts(same.sum().expand(len(wanted)), pair)


def scan_exact(known: Tensor, ends: Tensor, words: Tensor) -> Counts:
    """Exact Counts (V,) at place len(known): the context occurred before each of `ends`."""
    followed = known.index_select(0, ends)
    pair, count = torch.bincount(followed, minlength=len(words)), len(followed)
    hint = int(followed[-1]) if count else -1
    hint_count = int(pair[hint]) if count else 0
    distance = len(known) - int(ends[-1]) if count else 0
    others = (followed != hint).nonzero()
    streak = count - 1 - int(others[-1]) if len(others) else count
    facts = (int((pair > 0).sum()), hint, hint_count, distance, streak)
    return Counts(torch.full_like(words, count), pair, *(torch.full_like(words, x) for x in facts))


# ==================================================================================================
# 13. Backoff mixing
# ==================================================================================================
#
# Submissions #889, #806, #890 and #1094. The longest context that matches, of order n*, gives the
# ratio p_ngram = min(pair, context) / context, blended with the network's p:
#
#     p <- (1 - alpha) p + alpha p_ngram,   alpha = base + range * sigmoid(scale * (H - center[n*]))
#
# With exact counts and a match on the context alone this is a distribution; with colliding tables,
# or a match that looks at the target, it is not: the ratios then sum to hundreds (docs/mixer.md).

PROBABILITY_FLOOR = 1e-12  # of #889, #806 and #1094


class BackoffColumns(NamedTuple):
    """A rule's n-gram part of each target, (N,)."""

    order: Tensor  # int8, of the longest match; 0: none
    probability: Tensor  # float64, of the target


def backoff_rules(cfg: Config) -> dict[str, BackoffRule]:
    """Every backoff scoring of a run, by its name in the score table."""
    windows_between = {"token": 0, "window": 1, "batch": cfg.ngram_batch_windows}
    lag = windows_between[cfg.ngram_granularity] * cfg.eval_stride
    rules = {
        "backoff_exact": EXACT,
        "backoff_hashed": BackoffRule(
            buckets=cfg.ngram_buckets,
            match=cfg.ngram_match,
            first=cfg.eval_seq_len - cfg.eval_stride + lag if lag else 1,
            granularity=lag or 1,
            cold=cfg.ngram_history == "cold",
        ),
    }
    if cfg.ngram_match == "pair":  # looks at the target: not normalized even with exact counts
        rules["backoff_exact_pair"] = BackoffRule(match="pair")
    return rules


def backoff_columns(
    counted: Iterable[tuple[int, Counts]], match: str, cfg: Config
) -> BackoffColumns:
    """The longest match of each position, from (order, Counts) in rising order, from 1 on."""
    for order, counts in counted:
        context = counts.context.double()
        if order == 1:
            unigram = cfg.ngram_fallback == "unigram"
            matched = torch.full_like(counts.context, int(unigram), dtype=torch.int8)
            probability = (counts.pair + 0.5) / (context + 0.5 * cfg.vocab_size)
            started = counts.context >= cfg.ngram_start_tokens
        elif order >= cfg.ngram_min_order:
            hit = counts.context >= cfg.ngram_min_count
            if match == "pair":
                hit = hit & (counts.pair > 0)
            matched = torch.where(hit, order, matched).to(torch.int8)
            ratio = counts.pair.double().minimum(context) / context.clamp(min=1)
            probability = torch.where(hit, ratio, probability)
    return BackoffColumns(torch.where(started, matched, 0), probability)


def backoff_logp(logp: Tensor, entropy: Tensor, part: BackoffColumns, cfg: Config) -> Tensor:
    """Log of the blend (N,) where an order matched, the network's logp elsewhere; entropy H (N,) in
    nats."""
    centers = cfg.ngram_ent_center
    if len(centers) == 1:
        centers = centers * cfg.ngram_max_order
    place = (part.order.long() - 2).clamp(min=0)  # the first center is order 2's, and order 1's
    center = torch.tensor(centers, dtype=torch.float64, device=place.device)[place]
    alpha = cfg.ngram_ent_base + cfg.ngram_ent_range * torch.sigmoid(
        cfg.ngram_ent_scale * (entropy - center)
    )
    if not cfg.ngram_entropy:
        alpha = torch.full_like(alpha, cfg.ngram_alpha)
    mixed = (1 - alpha) * logp.exp() + alpha * part.probability
    return torch.where(part.order > 0, mixed.clamp(min=PROBABILITY_FLOOR).log(), logp)


# ==================================================================================================
# 14. Calibrated mixing
# ==================================================================================================
#
# Ours: two stages, both distributions, both learned online from scored targets only.
#
# Interpolation (Jelinek and Mercer 1980) over contexts of rising length k, first those of the
# document, then those of the stream, with m_k = pair/context of level k:
#
#     P <- (1 - lambda_k) P + lambda_k m_k   or   P0 = sum_k m_k lambda_k prod_{j>k} (1 - lambda_j)
#
# with the network as level 0: sticks broken from the longest context down. lambda_k = (a +
# explained) / (a + b + reached) comes from a table by what the context looks like, re-estimated by
# EM: explained sums the responsibilities of the level for the targets, reached those of it and all
# levels below.
#
# Hints. A known context names the token that followed it last. y_1 is the longest context's, y_2
# that of the longest one which names another. What remains for y_i is q_i = P0(y_i) / (1 - sum_j<i
# P0(y_j)); tables hold how often such hints were right, right[b,k] of seen[b,k]: buckets b by what
# counts say of the hint, knots k at whole logits from -KNOT_MAX to KNOT_MAX of q_i (adaptive
# probability maps, as in PAQ). A bucket starts with HINT_PRIOR observations of the opinion that it
# corrects, sigmoid(k). What the tables say is mixed in the logistic domain (Mahoney 2005):
#
#     logit s[b,k] = logit of (right[b,k] + prior sigmoid(k)) / (seen[b,k] + prior)
#     logit s_i = w_i . x_i,   x_i = (logit q_i; of each table, linearly between the knots; a bias)
#     P(y_1) = s_1,   P(y_2) = (1 - s_1) s_2
#     P(x) = (1 - s_1)(1 - s_2) P0(x) / (1 - P0(y_1) - P0(y_2)) for any other x
#
# a distribution whatever the s_i are. A scored target that is none of the hints before counts for
# hint i, at the two knots around logit q_i, in the shares of the interpolation. The weights w_i
# start as the mean of the tables; a chunk moves them by a step of Newton's method for logistic
# regression, with the curvature of all that was scored (online Newton; Hazan et al. 2007).
#
# Buckets look at nothing that depends on the target, and tables change between chunks only, so a
# distribution is there before its target. All sums are of integers, of 2^-32 but for the curvature:
# no order of adding changes them. The constants were chosen on the first half of a stream by
# bench/mixers.py, which scores saved neural passes anew.

ONE = 2.0**32  # the tables' unit
CURVATURE_ONE = 2.0**24  # the curvature's unit: 2^31 targets of at most 200 each fit into int64
KNOT_MAX = 12
KNOTS = 2 * KNOT_MAX + 1  # of a bucket
HINT_PRIOR = 10.0  # pseudo-observations of the opinion that is corrected, a knot
LEVEL_PRIOR = (0.1, 2.0)  # a, b
LEAST_REST = 2.0**-52  # 1 - P0(y_1) - P0(y_2), in float64
DOCUMENT_MAX_ORDER = 4  # the document's levels are the orders 2 to this
AGREEING_ORDERS = (2, 3, 4)  # of the stream, asked whether they name the same hint
FAR_WINDOWS = 16  # attention windows beyond which a context is far away
ENTROPIES = 6  # bins of the network's entropy, in whole nats
# What contexts and hints are told apart by, and in how many bins. The order counts from 2 on, so
# that no hint's key is 0; orders from 16 on share a bin. Agreement is added when all orders are in.
LEVEL_FEATURES = {"log2_count": 13, "variety": 8, "distance": 3}
LEVEL_KEYS = 1 + math.prod(LEVEL_FEATURES.values())
HINT_TABLES = (
    {"order": 17, "share": 5, "distance": 3, "agreement": 2 ** len(AGREEING_ORDERS)},
    {"order": 17, "streak": 6, "distinct": 5},
    {"token": 1024, "length": 3},  # vocabularies of more pieces share bins
)
# Of each table the first key; of all of them how many keys there are.
*HINT_FIRST_KEYS, HINT_KEYS = itertools.accumulate(
    map(math.prod, map(dict.values, HINT_TABLES)), initial=0
)
INPUTS = 1 + len(HINT_TABLES) + 1  # of a hint's weights
BIAS = 0.3  # input of the weight that stands alone; small, for rates are much the same
# Curvature of each weight at the start: the first chunks, whose tables know nothing, move little.
WEIGHT_PRIOR = 1000.0
assert max(HINT_KEYS, LEVEL_KEYS) < 2**15, "keys are int16"
assert FIELDS["mixer_max_order"].metadata["allowed"][0] >= max(DOCUMENT_MAX_ORDER, *AGREEING_ORDERS)


class NgramColumns(NamedTuple):
    """What the counts say of each target's context."""

    hints: Tensor  # int16 or int32 (HINTS,N); -1: none
    hint_key: Tensor  # int16 (HINTS,tables,N), below HINT_KEYS; the first table's 0: no hint
    # Of each level float32 (known+1,1+HINTS): pair/context of the target and of the hints, at the
    # targets whose context is known, in their order; zeros at the end, for the others.
    ratios: list[Tensor]
    level_key: Tensor  # int16 (levels,N), below LEVEL_KEYS; 0: a new context

    def hint_number(self, targets: Tensor) -> Tensor:
        """int8 (N,): which hint each target (N,) is, from 1 on; 0: none."""
        number = torch.zeros_like(targets, dtype=torch.int8)
        for i, hint in enumerate(self.hints):
            number.masked_fill_(hint == targets, i + 1)
        return number


class MixInputs(NamedTuple):
    """What the mixer reads of M candidates: targets of a chunk, or all tokens at one position."""

    neural: NeuralColumns  # of the M candidates
    hint_number: Tensor  # int8 (M,), which hint the candidate is, from 1 on; 0: none
    hint_key: Tensor  # integers (HINTS,tables,M), of NgramColumns
    ratio: Tensor  # float32 (levels,M,1+HINTS), pair/context of the candidate and of the hints
    level_key: Tensor  # int16 (levels,M), of NgramColumns


def chunks_of(
    neural: NeuralColumns, ngram: NgramColumns, hint_number: Tensor, chunk: int
) -> Iterator[MixInputs]:
    """The targets of a stream (N,), from its columns, chunk after chunk."""
    levels, size = ngram.level_key.shape
    before = torch.zeros(levels, 1, dtype=torch.int64, device=ngram.level_key.device)
    for begin in range(0, size, chunk):
        part = slice(begin, begin + chunk)
        level_key = ngram.level_key[:, part]
        known = level_key > 0
        place = before + known.cumsum(1)
        before = place[:, -1:]
        ratio = [
            ratios.index_select(0, torch.where(k, p - 1, len(ratios) - 1))
            for ratios, k, p in zip(ngram.ratios, known, place, strict=True)
        ]
        own = NeuralColumns(*(column[..., part] for column in neural))
        hint_key = ngram.hint_key[..., part]
        yield MixInputs(own, hint_number[part], hint_key, torch.stack(ratio), level_key)


class Evidence(NamedTuple):
    """What the tables learn from M scored candidates."""

    asked: Tensor  # bool (HINTS,M), the candidate has the hint, and is none of those before it
    right: Tensor  # bool (HINTS,M), it is the hint
    hint_cells: Tensor  # int64 (2,HINTS,tables,M), of the hint tables: the knots around logit q
    hint_shares: Tensor  # int64 as hint_cells, how much each counts, in units of 1/ONE
    hint_inputs: Tensor  # float64 (HINTS,INPUTS,M), x of the weights
    hint_logit: Tensor  # float64 (HINTS,M), of s
    level_cells: Tensor  # int64 (levels,M), of the level table
    responsibilities: Tensor  # float64 (1+levels,M), the share of P0 that each level explains


def number_of(digits: dict[str, Any], sizes: dict[str, int]) -> Any:
    """One number of the digits that have a number of bins, the first the most significant; digits
    that exceed their bins share the last one."""
    number = 0
    for name, size in sizes.items():
        number = number * size + torch.as_tensor(digits[name]).clamp(0, size - 1)
    return number


def distance_bin(distance: Tensor, near: int) -> Tensor:
    """0 to 2: the context occurred last within attention (near tokens), farther, or far away."""
    return (distance >= near).int() + (distance >= FAR_WINDOWS * near).int()


def level_key(counts: Counts, near: int) -> Tensor:
    """int16 key of each position's context by LEVEL_FEATURES; 0 if it is new."""
    most = 2 ** (LEVEL_FEATURES["log2_count"] - 1)
    varieties = LEVEL_FEATURES["variety"]
    digits = {
        "log2_count": torch.frexp(counts.context.clamp(1, most).float()).exponent - 1,
        "variety": (counts.distinct * varieties - 1) // counts.context.clamp(min=1),
        "distance": distance_bin(counts.distance, near),
    }
    key = 1 + number_of(digits, LEVEL_FEATURES)
    return torch.where(counts.context > 0, key, 0).to(torch.int16)


def hint_keys(order: int | Tensor, counts: Counts, near: int) -> Tensor:
    """int16 (tables,M) keys of the hints that contexts of this order (or of orders (M,)) name, by
    HINT_TABLES; without agreement, which the other orders tell."""
    digits = {
        "order": torch.as_tensor(order, device=counts.context.device).expand_as(counts.context),
        "share": counts.hint_count * 4 // counts.context.clamp(min=1),
        "distance": distance_bin(counts.distance, near),
        "agreement": 0,
        "streak": counts.streak,
        "distinct": counts.distinct,
        "token": counts.hint % 1024,
    }
    digits["length"] = (digits["order"] > 3).int() + (digits["order"] > 6).int()
    tables = zip(HINT_FIRST_KEYS, HINT_TABLES, strict=True)
    keys = [first + number_of(digits, sizes) for first, sizes in tables]
    return torch.stack(keys).to(torch.int16)


class Followed(NamedTuple):
    """What is known of M contexts before targets."""

    slot: Tensor  # int64 (M,), where they come in the targets' columns (slots)
    counts: Counts  # (M,)
    hints: list[Tensor]  # (M,) each, the targets' hints
    pairs: list[Tensor]  # int32 (M,) each, how often these followed


class UnfinishedColumns:
    """NgramColumns, filled in place, order by order, for the targets of given hints.

    Columns are zero where nothing is put, and have a place more, for what belongs to no target
    (slots). hints: (HINTS,size+1). agreement: int16 (HINTS,size+1), a bit for each of
    AGREEING_ORDERS that names the hint.
    """

    def __init__(self, hints: Tensor, levels: int, near: int):
        self.hints, self.near, device = F.pad(hints, (0, 1), value=-1), near, hints.device
        places, kind = self.hints.size(1), {"dtype": torch.int16, "device": device}
        self.hint_key = torch.zeros(HINTS, len(HINT_TABLES), places, **kind)
        self.agreement = torch.zeros(HINTS, places, **kind)
        self.ratios = [torch.empty(0)] * levels
        self.level_key = torch.zeros(levels, places, **kind)

    def add(self, level: int, counted: Iterable[Followed], order: int = 0) -> None:
        """Fill a level's rows. order: a level's of the stream, which names hints."""
        keys, places = self.level_key[level], self.hints.size(1)
        ratio = torch.zeros(places, 1 + HINTS, device=keys.device)
        for slot, counts, hints, hint_pairs in counted:
            keys.scatter_(0, slot, level_key(counts, self.near))
            pairs = torch.stack([counts.pair, *hint_pairs], 1)
            context = counts.context.clamp(min=1).double()
            ratio.index_copy_(0, slot, (pairs / context[:, None]).float())
            if order:
                self.put_keys(order, slot, counts, hints)
        known = (keys[:-1] > 0).nonzero().squeeze(1)
        self.ratios[level] = F.pad(ratio.index_select(0, known), (0, 0, 0, 1))

    def put_keys(self, order: int, slot: Tensor, counts: Counts, hints: list[Tensor]) -> None:
        """The keys of those hints of a block that contexts of this order name."""
        keys = hint_keys(order, counts, self.near)
        for i, hint in enumerate(hints):
            named = (hint == counts.hint).nonzero().squeeze(1)
            own = slot[named]
            for row, key in zip(self.hint_key[i], keys, strict=True):
                row.scatter_(0, own, key[named])
            if order in AGREEING_ORDERS:
                bit = torch.full_like(own, 1 << AGREEING_ORDERS[::-1].index(order))
                self.agreement[i].scatter_add_(0, own, bit.short())

    def finish(self) -> NgramColumns:
        """The columns without the place more, with agreement in the hints' keys."""
        self.hint_key[:, 0] += self.agreement
        self.hint_key.masked_fill_(self.hints[:, None] < 0, 0)
        hints, hint_key, level_key = (
            column[..., :-1] for column in (self.hints, self.hint_key, self.level_key)
        )
        return NgramColumns(hints, hint_key, self.ratios, level_key)


def scanned_columns(
    document_counts: Iterable[tuple[int, Counts]],
    stream_counts: Iterable[tuple[int, Counts]],
    near: int,
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """(hints, MixInputs.hint_key, .ratio, .level_key) of all tokens (V,) at one position, from
    (order, Counts (V,)) inside its document and over the stream (scan_ngrams); near: tokens of a
    window. Keys (...,1) are the same for all tokens."""
    # A context of no token tells nothing that the network does not know.
    in_document, in_stream = (
        [(order, counts) for order, counts in pairs if order > 1]
        for pairs in (document_counts, stream_counts)
    )
    levels = [counts for _, counts in in_document + in_stream]
    context, pair, *facts = (torch.stack(columns) for columns in zip(*levels, strict=True))
    facts = Counts(context[:, 0], pair[:, 0], *(column[:, 0] for column in facts))
    orders = torch.tensor([order for order, _ in in_stream])
    stream = Counts(*(column[len(in_document) :] for column in facts))
    keys = hint_keys(orders, stream, near)
    hints = [y for y in dict.fromkeys(reversed(stream.hint.tolist())) if y >= 0][:HINTS]
    hint_key = torch.zeros(HINTS, len(HINT_TABLES), 1, dtype=torch.int16)
    share = (pair / context.clamp(min=1).double()).float()
    ratio = torch.zeros(len(levels), share.size(1), 1 + HINTS)
    ratio[..., 0] = share
    for i, hint in enumerate(hints):
        names = stream.hint == hint
        hint_key[i, :, 0] = keys[:, names.nonzero()[-1, 0]]
        for order in AGREEING_ORDERS:
            bit = 1 << AGREEING_ORDERS[::-1].index(order)
            hint_key[i, 0] += bit * names[orders == order].short()
        ratio[..., 1 + i] = share[:, hint, None]
    return hints, hint_key, ratio, level_key(facts, near)[:, None]


def members_by_token(ngrams: Ngrams) -> Tensor:
    """int64 (M,), rising: token * M + index of each of the contexts' members."""
    token = ngrams.token.index_select(0, ngrams.by_token).long()
    return token.mul_(len(token)).add_(ngrams.by_token)


def occurrences(by_token: Tensor, token: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """int32 (m,): how many of the contexts' members from index `begin` to before `end` have a
    token, integers (m,) each; by_token: of members_by_token."""
    first = token.long().mul_(len(by_token))
    last, before = (torch.searchsorted(by_token, first + i, out_int32=True) for i in (end, begin))
    return last.sub_(before)


def target_counts(
    ngrams: Ngrams, by_token: Tensor, hints: Tensor, start: int
) -> Iterator[Followed]:
    """Of the contexts' members, a block at a time, for columns of the positions from `start` on,
    whose hints (HINTS,size+1) are given. by_token: of members_by_token."""
    contexts, size = ngrams.contexts, hints.size(1) - 1
    for part, counts in member_counts(ngrams):
        slot = slots(contexts.position[part], counts.context > 0, start, size)
        tokens, pairs = [row.index_select(0, slot) for row in hints], []
        for token in tokens:
            is_own = token == counts.hint
            asked = ((token >= 0) & ~is_own).nonzero().squeeze(1)
            # Neighbours are looked up in neighbouring memory.
            wanted, order = token.index_select(0, asked).sort()
            asked = asked.index_select(0, order)
            group = contexts.start[part].index_select(0, asked)
            found = occurrences(by_token, wanted, group, asked + part.start)
            pairs.append((counts.hint_count * is_own).scatter_(0, asked, found))
        yield Followed(slot, counts, tokens, pairs)


def stream_columns(
    tokens: Tensor, span: tuple[int, int], cfg: Config, hints: Tensor | None = None
) -> NgramColumns:
    """NgramColumns of the targets `span` of a stream (N+1,), from counts of all before. hints
    (HINTS,span): those of stream_hints, if they are at hand."""
    if hints is None:
        hints = stream_hints(tokens, span, cfg)
    tokens, start, document = tokens[: span[1] + 1], span[0] + 1, document_numbers(tokens)
    in_stream = DOCUMENT_MAX_ORDER - 1  # the first level of the stream
    levels = in_stream + cfg.mixer_max_order - 1
    columns = UnfinishedColumns(hints, levels, cfg.eval_seq_len)
    with threads(1):
        for order, ngrams in exact_ngrams(tokens, cfg.mixer_max_order):
            if order == 1:
                continue
            by_token = members_by_token(ngrams)
            if order <= DOCUMENT_MAX_ORDER:
                inside = in_documents(ngrams, document)
                columns.add(order - 2, target_counts(inside, by_token, columns.hints, start))
                del inside
            else:
                document = None  # no longer needed, and large
            counted = target_counts(ngrams, by_token, columns.hints, start)
            columns.add(in_stream + order - 2, counted, order)
            del counted, by_token, ngrams
    return columns.finish()


def name_hints(ngrams: Ngrams, hints: Tensor, start: int) -> None:
    """Put what followed each known context last in front of the hints (HINTS,size+1) of positions
    from `start` on, without naming a token twice."""
    contexts, token, size = ngrams.contexts, ngrams.token, hints.size(1) - 1
    for part in blocks(1, token):
        known = ranks(contexts, part) > 0
        slot = slots(contexts.position[part], known, start, size)
        moved = token[part.start - 1 : part.stop - 1]
        settled = torch.zeros_like(known)
        for row in hints:
            old = row.index_select(0, slot)
            row.scatter_(0, slot, torch.where(settled, old, moved))
            settled |= old == moved
            moved = old


def stream_hints(tokens: Tensor, span: tuple[int, int], cfg: Config) -> Tensor:
    """Hints (HINTS,span), int16 or int32, of the targets `span` of a stream (N+1,); -1: none."""
    tokens, start, size = tokens[: span[1] + 1], span[0] + 1, span[1] - span[0]
    shape, kind = (HINTS, size + 1), token_type(tokens)
    hints = torch.full(shape, -1, dtype=kind, device=tokens.device)
    with threads(1):
        for order, ngrams in exact_ngrams(tokens, cfg.mixer_max_order):
            if order > 1:
                name_hints(ngrams, hints, start)
            del ngrams
    return hints[:, :size]


class CalibratedMixer:
    """The tables. `predict` reads them, `update` adds scored targets; nothing else changes them.

    hint_seen, hint_right: (HINTS * HINT_KEYS * KNOTS,) int64, how many hints were seen
    there, and right. reached, explained: (levels * ENTROPIES * LEVEL_KEYS,) int64, the mass of
    targets that reached a level, and that it explained. All in units of 1/ONE. weights:
    (HINTS,INPUTS) float64. curvature: (HINTS,INPUTS,INPUTS) int64 in units of 1/CURVATURE_ONE.
    """

    def __init__(self, levels: int, device: str | torch.device = "cpu"):
        self.weights = torch.zeros(HINTS, INPUTS, dtype=torch.float64, device=device)
        self.weights[:, 1:-1] = 1 / len(HINT_TABLES)
        shape = (HINTS, INPUTS, INPUTS)
        self.curvature = torch.zeros(shape, dtype=torch.int64, device=device)
        hints = HINTS * HINT_KEYS * KNOTS
        cells = levels * ENTROPIES * LEVEL_KEYS
        self.hint_seen, self.hint_right = torch.zeros(2, hints, dtype=torch.int64, device=device)
        self.reached, self.explained = torch.zeros(2, cells, dtype=torch.int64, device=device)

    def tables(self) -> dict[str, Tensor]:
        """All that is learned, by name."""
        return vars(self)

    def snapshot(self) -> CalibratedMixer:
        """The tables as they are now, on the CPU."""
        other = copy.copy(self)
        for name, table in self.tables().items():
            setattr(other, name, table.to("cpu", copy=True))
        return other

    def lambdas(self) -> Tensor:
        """float64 (cells,), of the level table; 0 for new contexts. They are fewer than what a
        chunk looks up."""
        a, b = LEVEL_PRIOR
        explained, reached = self.explained.double() / ONE, self.reached.double() / ONE
        lambdas = (a + explained) / (a + b + reached)
        lambdas.view(-1, LEVEL_KEYS)[:, 0] = 0.0
        return lambdas

    def interpolate(self, x: MixInputs) -> tuple[Tensor, Tensor, Tensor]:
        """P0 (1+HINTS,M) of the candidate and of each hint, with Evidence.level_cells and
        .responsibilities."""
        level = torch.arange(len(x.level_key), device=x.level_key.device)[:, None]
        entropy = x.neural.entropy.long().clamp(0, ENTROPIES - 1)
        level_cells = level * (ENTROPIES * LEVEL_KEYS) + entropy * LEVEL_KEYS
        level_cells += x.level_key
        weights = self.lambdas()[level_cells]
        # left[k]: of the stick, by level k and all above it. Level k gets its lambda of what the
        # levels above it leave: left[k + 1], or all.
        left = 1 - weights
        for k in reversed(range(len(left) - 1)):  # a row at a time: cumprod goes down the columns
            left[k] *= left[k + 1]
        weights[:-1] *= left[1:]
        total = left[0] * torch.cat([x.neural.logp[None], x.neural.hint_logp]).exp()
        total = total.mT.contiguous()
        parts = torch.empty(1 + len(left), left.size(1), dtype=left.dtype, device=left.device)
        parts[0] = total[:, 0]
        for weight, ratio, part in zip(weights, x.ratio, parts[1:], strict=True):
            own = weight[:, None] * ratio  # `sum` adds the last columns in another order
            part.copy_(own[:, 0])
            total += own
        return total.mT, level_cells, parts.div_(total[:, 0])

    def opinions(self, x: MixInputs, logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Evidence.hint_inputs, .hint_cells and .hint_shares (before `asked`) of hints of logit q
        (HINTS,M)."""
        # Where logit q lies on the axis of the knots, and the knot below it.
        place = (logit + KNOT_MAX).clamp(0, KNOTS - 1)
        below = place.long().clamp(0, KNOTS - 2)  # of NaN, too: the audit tells of it
        knots = torch.stack([below, below + 1])[:, :, None]
        hint = torch.arange(HINTS, device=logit.device)[:, None, None]
        cells = (hint * HINT_KEYS + x.hint_key) * KNOTS + knots
        prior = torch.sigmoid(knots.double() - KNOT_MAX) * HINT_PRIOR
        right = prior + self.hint_right[cells].double() / ONE
        wrong = HINT_PRIOR + self.hint_seen[cells].double() / ONE - right
        logits = right.log() - wrong.log()
        upper = (place - below)[:, None]
        logits = torch.lerp(logits[0], logits[1], upper)
        own = logit.clamp(-KNOT_MAX, KNOT_MAX)[:, None]
        inputs = torch.cat([own, logits, torch.full_like(own, BIAS)], 1)
        upper_share = (upper * ONE).round().long()
        shares = torch.stack([int(ONE) - upper_share, upper_share]).expand_as(cells)
        return inputs, cells, shares

    def predict(self, x: MixInputs) -> tuple[Tensor, Evidence]:
        """(log P (M,) of the candidates, what there is to learn if they are scored)."""
        total, level_cells, responsibilities = self.interpolate(x)
        has_hint = x.hint_key[:, 0] > 0
        left, rests = 1.0, []  # of P0, after each hint
        for i, own in enumerate(has_hint):
            left = torch.where(own, left - total[1 + i], left)
            rests.append(left.clamp(min=LEAST_REST).log())
        logp, rest = total[0].log(), torch.stack(rests)
        inputs, cells, shares = self.opinions(x, total[1:].log() - rest)
        logit = torch.zeros_like(rest)
        for k in range(INPUTS):  # `sum` adds the last columns in another order than the others
            logit += self.weights[:, k, None] * inputs[:, k]
        logit.clamp_(-KNOT_MAX, KNOT_MAX)
        number = x.hint_number.long()[None]
        none, others = torch.zeros_like(logp), logp  # that it is no hint so far; which one it is
        hits, asked = [], []
        for i, own in enumerate(has_hint):
            asked.append(own & ((number[0] == 0) | (number[0] > i)))
            hits.append(none + F.logsigmoid(logit[i]))
            none = torch.where(own, none + F.logsigmoid(-logit[i]), none)
            others = torch.where(own, logp - rest[i], others)
        logp = torch.stack([none + others, *hits]).gather(0, number)[0]
        asked = torch.stack(asked)
        shares = shares.masked_fill(~asked[:, None], 0)
        right = number == torch.arange(1, HINTS + 1, device=number.device)[:, None]
        hints = (asked, right, cells, shares, inputs, logit)
        return logp, Evidence(*hints, level_cells, responsibilities)

    def update(self, seen: Evidence) -> None:
        """Add scored targets. What reaches a level is what it and all below it explain."""
        self.move_weights(seen)
        cells, shares = seen.hint_cells.flatten(), seen.hint_shares
        self.hint_seen.index_add_(0, cells, shares.flatten())
        right = shares.masked_fill(~seen.right[:, None], 0)
        self.hint_right.index_add_(0, cells, right.flatten())
        cells, reaching = seen.level_cells.flatten(), seen.responsibilities.clone()
        for k in range(1, len(reaching)):
            reaching[k] += reaching[k - 1]
        for table, mass in ((self.explained, seen.responsibilities), (self.reached, reaching)):
            table.index_add_(0, cells, (mass[1:] * ONE).round_().long().flatten())

    def move_weights(self, seen: Evidence) -> None:
        """A step of Newton's method: the slope of these targets, the curvature of all so far."""
        x, s = seen.hint_inputs, torch.sigmoid(seen.hint_logit)
        slope = ((seen.right.double() - s) * seen.asked)[:, None] * x
        slope = (slope * ONE).round_().long().sum(-1)
        steepness = (s * (1 - s) * seen.asked * CURVATURE_ONE)[:, None] * x
        for k in range(INPUTS):
            self.curvature[:, k] += (steepness * x[:, k, None]).round_().long().sum(-1)
        start = WEIGHT_PRIOR * torch.eye(INPUTS, dtype=x.dtype, device=x.device)
        curvature = start + self.curvature.double() / CURVATURE_ONE
        self.weights += torch.linalg.solve_ex(curvature, slope.double()[..., None] / ONE)[0][..., 0]


def mix(
    neural: NeuralColumns,
    ngram: NgramColumns,
    hint_number: Tensor,
    chunk: int,
    keep: Collection[int] = (),
) -> tuple[Tensor, dict[int, CalibratedMixer]]:
    """(log-probability (N,) of every target, tables by target) from a stream's columns.

    Score first: the tables are read for a chunk of targets, then updated. keep: targets whose
    tables to keep as they were read; key N: the tables after the last update.
    """
    size = len(neural.logp)
    out, kept = torch.empty_like(neural.logp), {}
    mixer = CalibratedMixer(len(ngram.ratios), out.device)
    with threads(1):
        inputs = chunks_of(neural, ngram, hint_number, chunk)
        for begin, x in zip(range(0, size, chunk), inputs, strict=True):
            wanted = [i for i in keep if begin <= i < begin + chunk]
            if wanted:
                kept |= dict.fromkeys(wanted, mixer.snapshot())
            logp, evidence = mixer.predict(x)
            out[begin : begin + chunk] = logp
            mixer.update(evidence)
    return out, kept | {size: mixer.snapshot()}


# ==================================================================================================
# 15. Evaluation
# ==================================================================================================
#
# What would be shipped is scored: the network reloaded from the artifact passes over the validation
# stream once, and every scoring mixes the same columns: the network alone, the recipe's backoff on
# hashed and on exact counts, the calibrated mixer. The one that the run is about is the headline.
# Each is also summed over the vocabulary at sampled targets: a scoring whose mass is not 1 is no
# probability distribution, and its bits per byte are the length of no message.

MASS_POSITIONS = 32  # targets at which scorings are summed
LEAST_MASS_POSITIONS = 4  # of long streams, whose scans are slow
MASS_SCANNED_TOKENS = 2**28  # that all scans together may look through
NORMALIZED_WITHIN = 1e-4  # of 1, for normalized:yes; the audit asks for MASS_WITHIN
AUDIT_UPDATES = 3  # updates of the largest tables before the windows that are coded
AUDIT_BATCHES = 4  # from which these are drawn: the decoder has to score all that is before
AUDIT_TARGETS = 1024  # targets coded, if a batch has windows enough
AUDIT_STEPS = 24  # of a window; the decoder computes a batch for each


def hint_orders(ngram: NgramColumns) -> Tensor:
    """Order (N,) of each target's first hint, 0: none, from its key, whose first digit it is."""
    return ngram.hint_key[0, 0] // (HINT_FIRST_KEYS[1] // HINT_TABLES[0]["order"])


class Places(NamedTuple):
    """Targets that the audit looks at; none by default."""

    samples: list[int]  # where scorings are summed
    changed: int  # from which on tokens are replaced
    prefix: int  # targets, in whole batches, among which `changed` and `coded` are
    coded: list[tuple[int, int]]  # runs of targets (first, end), each in a window of its own

    def targets(self) -> list[int]:
        """Those at which the calibrated tables are needed."""
        return [*self.samples, self.changed, *(first for first, _ in self.coded)]


def audited_batches(evaluation: Evaluation) -> range:
    """Batches of which windows are coded: after AUDIT_UPDATES, or the last of a short stream."""
    cfg, grid = evaluation.cfg, evaluation.neural.grid
    rule = evaluation.rules.get(evaluation.headline, EXACT)
    updates = AUDIT_UPDATES * max(rule.granularity, cfg.mixer_chunk_tokens)
    known = max(rule.first + updates, cfg.ngram_start_tokens)  # targets before the first batch
    batches = grid.count_batches - 1  # batch 0 is no whole one
    if rule.cold:  # the next rank's history begins with its span
        batches = len(next(filter(len, grid.batches))) - 1
    first = min(-(-known // (grid.last * grid.batch_windows)), max(0, batches - AUDIT_BATCHES))
    return range(1 + first, 1 + min(first + AUDIT_BATCHES, batches))


def draw_runs(
    evaluation: Evaluation, random: np.random.RandomState, batches: range
) -> list[tuple[int, int]]:
    """Runs of targets (first, end) in windows in different rows of a batch, so that one batch
    serves a decoder of each: their last AUDIT_STEPS targets, since an update of the calibrated
    tables if there is one, so that one state of these serves a run."""
    grid, chunk = evaluation.neural.grid, evaluation.cfg.mixer_chunk_tokens
    windows, steps = [0], min(AUDIT_STEPS, grid.last)  # window 0 of a stream with no other
    if batches:
        rows = random.permutation(grid.batch_windows)[: -(-AUDIT_TARGETS // steps)]
        drawn = random.randint(batches.start, batches.stop, len(rows))
        numbers = 1 + (drawn - 1) * grid.batch_windows + rows
        windows = numbers[numbers < grid.count].tolist() or [1]
    runs = []
    for _, scored, end in grid.spans_of(torch.tensor(windows)).tolist():
        updated = (end - 1) // chunk * chunk if evaluation.headline == "calibrated" else 0
        runs.append((max(scored, end - steps, updated), end))
    return sorted(runs)


def drawn_by(evaluation: Evaluation, purpose: str) -> np.random.RandomState:
    """Random numbers that follow from what is scored: the network as it computes, and its
    log-probability of every target. Who would have others needs another network."""
    digest = hashlib.sha256(f"{purpose} {evaluation.network}".encode())
    digest.update(evaluation.columns.logp.numpy())
    return np.random.RandomState(list(digest.digest()))


def draw_places(evaluation: Evaluation) -> Places:
    """Places for the audit of an evaluation after its neural pass, on rank 0."""
    grid, batches = evaluation.neural.grid, audited_batches(evaluation)
    random = drawn_by(evaluation, "places")
    affordable = MASS_SCANNED_TOKENS // grid.num_targets
    count = max(LEAST_MASS_POSITIONS, min(MASS_POSITIONS, affordable))
    samples = random.randint(0, grid.num_targets, count).tolist()
    prefix = grid.scored_before(max(1, batches.stop))
    changed = int(random.randint(1, prefix))
    if grid.window_of(changed) != grid.window_of(changed + 1):
        changed -= 1  # what is changed has to be in the window, where it could be seen, if any is
    return Places(samples, changed, prefix, draw_runs(evaluation, random, batches))


class Evaluation:
    """One neural pass, scored in several ways; columns, rows and logp are on rank 0.

    neural: this rank's NeuralPass. rules: backoff scorings. headline: name of the run's scoring;
    scorings: all, the headline first. places: targets that the audit looks at, drawn on rank 0
    after the neural pass unless they are given. columns: NeuralColumns of all targets. hints:
    (HINTS,N) of all targets. rows: {scoring: results}. logp: {scoring: (N,) float64}. mixers:
    {target: the calibrated tables as they were when it was scored}. matched: {scoring: facts on
    the orders that matched, for the picture}. times: (N,) integers, how often the pass wrote each
    target. network: network_digest of the artifact, from which the places are drawn. blob: the
    artifact itself, if there is one.
    """

    def __init__(
        self,
        model: GPT,
        data: Data,
        cfg: Config,
        run: Run,
        network: str = "",
        places: Places | None = None,
        blob: bytes = b"",
    ):
        self.cfg, self.run, self.data = cfg, run, data
        self.network, self.blob = network, blob
        self.neural = NeuralPass(model, data, cfg, run, cfg.eval_stride)
        self.rules = backoff_rules(cfg) if cfg.ngram_enabled else {}
        names = ["neural", *self.rules]
        if cfg.ngram_enabled:
            names.append("calibrated")
        wanted = f"backoff_{cfg.ngram_table}" if cfg.scoring == "backoff" else cfg.scoring
        self.headline = wanted if wanted in names else "neural"
        self.scorings = sorted(names, key=lambda name: name != self.headline)
        self.columns: NeuralColumns | None = None
        self.hints: Tensor | None = None
        self.rows: dict[str, dict] = {}
        self.logp: dict[str, Tensor] = {}
        self.mixers: dict[int, CalibratedMixer] = {}
        self.matched: dict[str, dict] = {}
        self.times: Tensor | None = None
        self.pass_seconds = 0.0
        self.places = places

    def neural_pass(self) -> None:
        """Count, to name the hints, run the network over this rank's windows, gather its columns on
        rank 0; then draw the places."""
        cfg, run, spans = self.cfg, self.run, self.neural.grid.spans
        started = run.sync()
        hints = None
        if cfg.ngram_enabled:
            hints = stream_hints(self.neural.tokens, spans[run.rank], cfg)
        out = self.neural.columns(hints, progress=True)
        columns = [run.gather(column.contiguous(), spans) for column in out.unbind(1)]
        named = [run.gather(row.int(), spans) for row in (() if hints is None else hints)]
        self.times = run.gather(self.neural.times, spans)
        if run.is_main:
            self.columns = NeuralColumns.of(columns)
            self.hints = torch.stack(named) if named else None
            self.pass_seconds = run.sync() - started
            if self.places is None:
                self.places = draw_places(self)

    def mix_inputs(self, end: int) -> tuple[NeuralColumns, NgramColumns, Tensor]:
        """What `mix` reads of the targets before `end`, on rank 0's device."""
        tokens = self.neural.tokens[: end + 1]
        hints = self.hints[:, :end].to(tokens.device)
        ngram = stream_columns(tokens, (0, end), self.cfg, hints)
        neural = NeuralColumns(*(column[..., :end].to(tokens.device) for column in self.columns))
        return neural, ngram, ngram.hint_number(tokens[1:])

    def mixed(self, scoring: str) -> Tensor | None:
        """Log-probabilities (N,) of a scoring on rank 0; all ranks take part."""
        if scoring in self.rules:
            return self.mixed_backoff(scoring)
        if not self.run.is_main:
            return None
        return self.mixed_calibrated() if scoring == "calibrated" else self.columns.logp

    def mixed_calibrated(self) -> Tensor:
        """Log-probabilities (N,) of the calibrated mixer, on rank 0."""
        inputs = self.mix_inputs(len(self.neural.tokens) - 1)
        logp, self.mixers = mix(*inputs, self.cfg.mixer_chunk_tokens, self.places.targets())
        _, ngram, hint_number = inputs
        order = hint_orders(ngram)
        right = order[hint_number == 1].bincount(minlength=int(order.max()) + 1)
        self.matched["calibrated"] = {
            "count": order.bincount().tolist(),
            "right": right.tolist(),
        }
        return logp.cpu()

    def mixed_backoff(self, scoring: str) -> Tensor | None:
        """Log-probabilities (N,) of a backoff rule on rank 0; each rank looks up its span."""
        run, spans = self.run, self.neural.grid.spans
        part = self.backoff_part(scoring, spans[run.rank])
        part = BackoffColumns(*(run.gather(column, spans) for column in part))
        if not run.is_main:
            return None
        self.matched[scoring] = {"count": part.order.long().bincount().tolist()}
        return self.blended(part)

    def backoff_part(self, scoring: str, span: tuple[int, int]) -> BackoffColumns:
        """A backoff rule's n-gram part of the targets of a rank's span, on this rank's device."""
        rule = self.rules[scoring]
        counted = rule.counted(self.neural.tokens, span, self.cfg)
        return backoff_columns(counted, rule.match, self.cfg)

    def blended(self, part: BackoffColumns) -> Tensor:
        """Log-probabilities (N,), on the CPU, of a rule's n-gram part of all targets."""
        columns = (*part, self.columns.logp, self.columns.entropy)
        order, probability, logp, entropy = (x.to(self.run.device) for x in columns)
        part = BackoffColumns(order, probability)
        return backoff_logp(logp, entropy, part, self.cfg).cpu()

    def score(self, scoring: str, started: float) -> None:
        """Mix, and keep the row with its seconds since `started`; all ranks take part."""
        logp = self.mixed(scoring)
        if logp is None:
            return
        row = score_of(logp, self.data.val_bytes)
        row["seconds"] = self.run.sync() - started
        self.logp[scoring], self.rows[scoring] = logp, row

    def candidates(self, target: int, logp: Tensor, tokens: Tensor) -> MixInputs:
        """All tokens (V,) at a target, on the CPU, from the network's log-probabilities (V,) and
        the tokens up to the target."""
        cfg, words = self.cfg, torch.arange(len(logp))
        starts = (tokens[: target + 1] == BOS).nonzero()
        begin = int(starts[-1]) + 1 if len(starts) else 0  # of the document
        scans = (
            scan_ngrams(tokens, target, EXACT, DOCUMENT_MAX_ORDER, cfg, begin),
            scan_ngrams(tokens, target, EXACT, cfg.mixer_max_order, cfg),
        )
        on_cpu = (
            [(order, Counts(*(column.cpu() for column in counts))) for order, counts in scan]
            for scan in scans
        )
        hints, hint_key, ratio, level_key = scanned_columns(*on_cpu, cfg.eval_seq_len)
        hint_number = torch.zeros_like(words, dtype=torch.int8)
        hint_number[hints] = torch.arange(1, len(hints) + 1, dtype=torch.int8)
        facts = [-(logp.exp() * logp).sum(), *logp[(hints + [0] * HINTS)[:HINTS]]]
        neural = NeuralColumns.of([logp, *(fact.expand_as(logp) for fact in facts)])
        hint_key, level_key = hint_key.expand(-1, -1, len(words)), level_key.expand(-1, len(words))
        return MixInputs(neural, hint_number, hint_key, ratio, level_key)

    def distribution(
        self,
        scoring: str,
        target: int,
        logp: Tensor,
        tokens: Tensor | None = None,
        mixer: CalibratedMixer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (V,) of a scoring from the network's, and a rule's n-gram part (V,).

        tokens: the stream as far as it is known (default: all); mixer: the calibrated tables
        (default: those that the target was scored with).
        """
        tokens = self.neural.tokens if tokens is None else tokens
        if scoring == "calibrated":
            mixer = mixer or self.mixers[target]
            return mixer.predict(self.candidates(target, logp, tokens))[0], None
        if scoring not in self.rules:
            return logp, None
        cfg, rule = self.cfg, self.rules[scoring]
        begin = 0
        if rule.cold:
            begin = max(start for start, end in self.neural.grid.spans if start <= target < end)
        counted = scan_ngrams(tokens, target, rule, cfg.ngram_max_order, cfg, begin)
        part = backoff_columns(counted, rule.match, cfg)
        part = BackoffColumns(*(column.cpu() for column in part))
        entropy = -(logp.exp() * logp).sum().expand_as(logp)
        ngram = torch.where(part.order > 0, part.probability, 0.0)
        return backoff_logp(logp, entropy, part, cfg), ngram

    def masses(self) -> None:
        """Sum each scoring over the vocabulary at the samples, into its row."""
        networks = self.neural.distributions(self.places.samples)
        for scoring, row in self.rows.items():
            row |= self.mass_of(scoring, networks)

    def mass_of(self, scoring: str, networks: dict[int, Tensor]) -> dict:
        """Facts on the sums of a scoring at the samples. score_error: largest difference, in nats,
        of the summed distribution's entry at the target to the score that was given."""
        masses, ngram_masses, errors = [], [], []
        for target, network in networks.items():
            logp, ngram = self.distribution(scoring, target, network)
            masses.append(float(logp.exp().sum()))
            if ngram is not None and ngram.any():
                ngram_masses.append(float(ngram.sum()))
            token = self.data.val[target + 1]
            errors.append(abs(float(logp[token] - self.logp[scoring][target])))
        facts = {
            "mass": float(np.mean(masses)),
            "max_mass": float(np.max(masses)),
            "score_error": float(np.max(errors)),
            "mass_error": float(np.max(np.abs(np.array(masses) - 1))),
        }
        if ngram_masses:
            facts["ngram_mass"] = float(np.mean(ngram_masses))
        facts["normalized"] = "yes" if facts["mass_error"] <= NORMALIZED_WITHIN else "no"
        return facts


def neural_pass_base(evaluation: Evaluation) -> str:
    """Path without suffix of the saved pass of an artifact over a stream, named by what the pass
    depends on but for this file, so that it is found whatever the run is called."""
    cfg, run = evaluation.cfg, evaluation.run
    settings = [cfg.eval_seq_len, cfg.eval_stride, cfg.eval_batch_windows, cfg.ngram_enabled]
    settings += [cfg.mixer_max_order, cfg.compile, str(compute_dtype(cfg, run.device))]
    settings += [run.device.type, run.attention[0], torch.__version__]
    made_of = json.dumps([evaluation.network, evaluation.data.corpus["val_sha256"], settings])
    digest = hashlib.sha256(made_of.encode()).hexdigest()
    return str(Path(cfg.logs_path, f"neural-{digest[:16]}"))


def save_neural_pass(evaluation: Evaluation) -> None:
    """Keep a pass, on rank 0, if that is wanted.

    The file holds columns (NEURAL_ROWS,N) float64, NeuralColumns; for bench/mixers.py tokens (N+1,)
    uint16, byte_counts (N,) int16, hints (HINTS,N), and eval_seq_len, mixer_max_order and
    vocab_size, () each; seconds (), the time that the pass took.
    """
    cfg, data = evaluation.cfg, evaluation.data
    if not cfg.save_pass:
        return
    content = {
        "columns": evaluation.columns.rows(),
        "tokens": data.val.to(torch.uint16),
        "byte_counts": data.val_bytes.short(),
        "hints": torch.zeros(0) if evaluation.hints is None else evaluation.hints,
        "seconds": torch.tensor(evaluation.pass_seconds),
    }
    for name in ("eval_seq_len", "mixer_max_order", "vocab_size"):
        content[name] = torch.tensor(getattr(cfg, name))
    evaluation.run.save(".safetensors", content, neural_pass_base(evaluation))


# ==================================================================================================
# 16. Audit
# ==================================================================================================
#
# The run proves its own score: what the challenge's issue #1017 asks (causal, normalized, scored
# before seen, one pass), its bytes, and that it is the length of a message that decodes. Checks go
# another way than the score: a changed stream, counts by scans, a coder that goes token by token;
# the network's distributions alone have one source, NeuralPass.logits, which each check asks anew.
# Rank 0 makes them all by itself, after the clock of the evaluation has stopped. Places are drawn
# from the network and its scores. `share` is the share of the targets that a check has looked at.

RESCORED_WINDOWS = 256  # in which the network's columns are computed again
AUDIT_TEXT_TOKENS = 2_000_000  # whose bytes are counted in their text
AUDIT_TABLES = 4  # that are rebuilt, from streams cut off at as many samples
REBUILT_TOKENS = 2**22  # of all streams cut off; beyond, only those of the earliest samples
MASS_WITHIN = 1e-6  # of 1
MOST_LOGP = 1e-9  # log-probabilities are at most 0, or so much more by rounding
SUM_WITHIN = 1e-9  # of the score, relative: sums of the same numbers in another order
SCORE_WITHIN = 1e-4  # of the score, in nats
SAMPLE_HISTORY = 16384  # validation tokens before a sample, from which the mixer learns
SAMPLE_BLOCKS = 2  # of EVAL_STRIDE tokens each
CODED_SHARE, CODED_BITS = 1e-3, 64  # of the claim: a coder's fixed-point loss and its last words
AUDIT_LINES = 4  # of progress while the message is decoded


def evaluate_alone(model: GPT, val: Tensor, cfg: Config, run: Run, places: Places) -> Evaluation:
    """An evaluation of another stream after its neural pass, on this rank alone."""
    data = Data(None, None, None, val, {})
    evaluation = Evaluation(model, data, cfg, run.alone(), places=places)
    evaluation.neural_pass()
    return evaluation


def audit_causal(evaluation: Evaluation) -> dict:
    """Replace all tokens from a target on and end the stream soon after: no score before, nor the
    distribution there, differs from the run's."""
    cfg, val, headline = evaluation.cfg, evaluation.data.val, evaluation.headline
    target, end = evaluation.places.changed, evaluation.places.prefix
    changed = val[: end + 1].clone()
    random = np.random.RandomState(target)
    replaced = random.randint(0, cfg.vocab_size, end - target)
    changed[target + 1 :] = torch.from_numpy(replaced)
    places = Places([], target, end, [])
    other = evaluate_alone(evaluation.neural.model, changed, cfg, evaluation.run, places)
    pairs = [(evaluation.logp[headline][:target], other.mixed(headline)[:target])]
    # At the target, all but its own log-probability, which belongs to another token.
    columns = list(zip(evaluation.columns, other.columns, strict=True))[1:]
    pairs += [(a[..., : target + 1], b[..., : target + 1]) for a, b in columns]
    whole = [
        x.distribution(headline, target, x.neural.distributions([target])[target])[0]
        for x in (evaluation, other)
    ]
    pairs.append((whole[0], whole[1]))
    differing = sum(int((a != b).sum()) for a, b in pairs)
    return {
        "passed": differing == 0,
        "target": target,
        "replaced": end - target,
        "differing": differing,
        "share": target / len(evaluation.logp[headline]),
    }


def draw_windows(evaluation: Evaluation) -> list[int]:
    """The first window and, at random, RESCORED_WINDOWS others or all."""
    grid = evaluation.neural.grid
    random = drawn_by(evaluation, "windows")
    sheets, batches = -(-RESCORED_WINDOWS // grid.batch_windows), grid.count_batches - 1
    if sheets >= batches:
        return list(range(grid.count))
    columns = [random.permutation(batches)[:sheets] for _ in range(grid.batch_windows)]
    drawn = 1 + np.stack(columns, 1) * grid.batch_windows + np.arange(grid.batch_windows)
    return [0, *drawn[drawn < grid.count].tolist()]


def rescore(evaluation: Evaluation) -> dict:
    """The network's columns in some windows, computed again.

    rescore_error: largest difference in nats; finds_one_score, finds_one_percent: the probability
    with which the windows show that one score, or that a window in a hundred, is altered, both
    outside of the first window, which is always looked at.
    """
    neural, windows = evaluation.neural, draw_windows(evaluation)
    num_targets = neural.grid.num_targets
    hints = torch.zeros(HINTS, num_targets, dtype=torch.int64, device=neural.tokens.device)
    if evaluation.cfg.ngram_enabled:
        hints = stream_hints(neural.tokens, (0, num_targets), evaluation.cfg).long().clamp(min=0)
    hints, columns, errors, compared = hints.mT, evaluation.columns.rows().mT, [], 0
    for sheet in neural.grid.sheets(windows):
        inputs, targets, scored = neural.grid.places(sheet.to(hints.device))
        again = neural.score(inputs, targets, hints[targets])[scored].cpu()
        given = columns[targets[scored].cpu()]
        errors.append(float((again - given).abs().max()))
        compared += len(given)
    first = neural.grid.seq_len  # targets of the first window
    count, drawn = neural.grid.count - 1, len(windows) - 1
    altered = -(-count // 100)
    one_score, one_percent = 1.0, 1.0
    if drawn < count:
        one_score = (compared - first) / (num_targets - first)
        one_percent = 1 - math.comb(count - altered, drawn) / math.comb(count, drawn)
    return {
        "rescored": compared,
        "rescore_error": float(np.max(errors)),
        "finds_one_score": one_score,
        "finds_one_percent": one_percent,
    }


def audit_normalized(evaluation: Evaluation) -> dict:
    """Sums over the vocabulary at the sampled targets, by scans; the scores given were theirs, and
    the network's columns are what it gives again."""
    row, facts = evaluation.rows[evaluation.headline], rescore(evaluation)
    errors = (row["score_error"], facts["rescore_error"])
    passed = row["mass_error"] <= MASS_WITHIN and all(e <= SCORE_WITHIN for e in errors)
    shown = ("mass", "mass_error", "score_error", "ngram_mass")
    sums = {key: row[key] for key in shown if key in row}
    count = len(evaluation.places.samples)
    share = count / len(evaluation.data.val[1:])
    return {"passed": passed, "targets": count} | sums | {"share": share} | facts


def rebuilt_samples(evaluation: Evaluation) -> list[int]:
    """Samples, in rising order, at which streams are cut off: from early to the last, or the
    earliest of a long stream."""
    samples = sorted(evaluation.places.samples)
    spread = samples[:: -max(1, len(samples) // AUDIT_TABLES)][:AUDIT_TABLES]
    return sorted(spread if sum(spread) <= REBUILT_TOKENS else samples[:AUDIT_TABLES])


class Rebuilt(NamedTuple):
    """What mixing a stream anew that is cut off before a target's chunk gives."""

    scores: int  # of the targets before the cut
    differing_scores: int  # of them, from those that were given
    differs: bool  # the tables that it leaves, from those with which the target was scored


def rebuild(evaluation: Evaluation, target: int) -> Rebuilt:
    """Mix the stream that ends before a target's chunk."""
    chunk = evaluation.cfg.mixer_chunk_tokens
    begin = target // chunk * chunk
    scores, kept = mix(*evaluation.mix_inputs(begin), chunk)
    rebuilt, used = kept[begin].tables(), evaluation.mixers[target].tables()
    given = evaluation.logp["calibrated"][:begin]
    differing = int((scores.cpu() != given).sum())
    return Rebuilt(begin, differing, not all(torch.equal(used[k], rebuilt[k]) for k in used))


def scores_again(evaluation: Evaluation) -> Tensor:
    """Log-probabilities (n,) of the headline, mixed anew from the network's columns: of all N
    targets, or of none where the calibrated mixer would have to go through a long stream again."""
    total, headline = evaluation.neural.grid.num_targets, evaluation.headline
    if headline == "neural":
        return evaluation.columns.logp
    if headline == "calibrated":
        end = total if total <= REBUILT_TOKENS else 0
        return mix(*evaluation.mix_inputs(end), evaluation.cfg.mixer_chunk_tokens)[0].cpu()
    parts = [
        evaluation.backoff_part(headline, span)
        for span in evaluation.neural.grid.spans
        if span[0] < span[1]
    ]
    part = BackoffColumns(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    return evaluation.blended(part)


def audit_single_pass(evaluation: Evaluation) -> dict:
    """Every target was scored once, by a probability; the scores add up to the result and are those
    of mixing anew; streams that are cut off have the same scores and tables.

    share: of the targets whose scores were compared with those of mixing anew; what comes before it
    was asked of all.
    """
    times, row = evaluation.times, evaluation.rows[evaluation.headline]
    scores = evaluation.logp[evaluation.headline]
    again = scores_again(evaluation)
    changed = int((scores[: len(again)] != again).sum())
    possible = torch.isfinite(scores) & (scores <= MOST_LOGP)
    scored = torch.isfinite(evaluation.columns.logp) & (times > 0)
    nats = -float(scores.flip(0).sum())
    sum_error = abs(nats / len(scores) - row["val_loss"]) / max(nats / len(scores), 1e-300)
    samples = rebuilt_samples(evaluation) if evaluation.headline == "calibrated" else []
    rebuilt = [rebuild(evaluation, target) for target in samples]
    tables = sum(r.differs for r in rebuilt)
    differing = changed + sum(r.differing_scores for r in rebuilt)
    passed = bool((times == 1).all()) and bool(scored.all()) and bool(possible.all())
    return {
        "passed": passed and sum_error <= SUM_WITHIN and not tables and not differing,
        "targets": len(times),
        "most_times": int(times.max()),
        "unscored": int((~scored).sum()),
        "impossible_scores": int((~possible).sum()),
        "sum_error": sum_error,
        "rebuilt_tables": len(rebuilt),
        "wrong_tables": tables,
        "differing_scores": differing,
        "share": max(len(again), *(r.scores for r in rebuilt), 0) / len(times),
    }


def audit_bytes(evaluation: Evaluation) -> dict:
    """The bytes by which the score is divided, document by document, against the UTF-8 length of
    the decoded text, in which no U+2581 is left; that text against the one that the stream was made
    of, where this is at hand; no unknown pieces; val_bpb is of these bytes."""
    data, row = evaluation.data, evaluation.rows[evaluation.headline]
    val, tokenizer = data.val, data.tokenizer
    stream = whole_characters(val[:AUDIT_TEXT_TOKENS], tokenizer)
    documents = split_at_bos(stream)
    ends = np.cumsum([len(document) for document in documents])
    texts = [tokenizer.decode(document[1:].tolist()) for document in documents]
    wrong = 0
    for document, text, end in zip(documents, texts, ends.tolist(), strict=True):
        # Target i is token i + 1: a document's are those of its tokens but its BOS.
        size = int(data.val_bytes[end - len(document) : end - 1].sum())
        wrong += size != len(text.encode()) or SPACE in text
    counted = int(data.val_bytes[: len(stream) - 1].sum())
    text = "".join(texts).encode()
    same_text = data.text is None or data.text.startswith(text)
    unknown = int((val[1:] == tokenizer.unk_id()).sum())
    nats = row["val_loss"] * (len(val) - 1)
    by_bytes = row["val_bpb"] * math.log(2) * int(data.val_bytes.sum())
    divided_right = abs(by_bytes - nats) <= SUM_WITHIN * nats
    total = int(data.table.target_bytes(val).sum())
    divided_right &= row["bytes"] == int(data.val_bytes.sum()) == total
    divided_right &= row["tokens"] == len(val) - 1
    return {
        "passed": wrong == unknown == 0 and counted == len(text) and same_text and divided_right,
        "documents": len(documents),
        "bytes": counted,
        "text_bytes": len(text),
        "wrong_documents": wrong,
        "unknown_targets": unknown,
        "against": "decoded text" if data.text is None else "source text",
        "same_text": same_text,
        "divided_right": divided_right,
        "share": len(stream) / len(val),
    }


def entropy_model(logp: Tensor):
    """constriction's model of a distribution (V,), made to add up to 1 whatever it claims."""
    probabilities = (logp - logp.logsumexp(0)).exp().float().numpy()
    return constriction.stream.model.Categorical(probabilities, perfect=False)


class CodedWindows:
    """The runs of targets that are coded, side by side: one after the other inside a run, each
    from the tokens before it alone. Used by the encoder and by the decoder.

    runs: (first, end) of each, in windows of different rows. sheet: window numbers of their batch.
    tokens: the stream of each run as far as it is known, (end+1,) int64; zeros beyond.
    """

    def __init__(self, evaluation: Evaluation, runs: list[tuple[int, int]], tokens: Tensor):
        self.evaluation, self.runs, grid = evaluation, runs, evaluation.neural.grid
        numbers = [grid.window_of(end - 1) for _, end in runs]
        (self.sheet,) = grid.sheets(numbers)
        self.rows = [grid.row_of(number) for number in numbers]
        self.tokens = [F.pad(tokens[: first + 1], (0, end - first)) for first, end in runs]

    def order(self) -> Iterator[list[tuple[int, int]]]:
        """Step by step, the (run, target) that are coded in it, one of each run."""
        for step in range(max(end - first for first, end in self.runs)):
            yield [
                (i, first + step) for i, (first, end) in enumerate(self.runs) if first + step < end
            ]

    def logits(self) -> Tensor:
        """Logits (B,last,V) of the batch, from the known tokens; other rows are of zeros."""
        positions, targets, _ = self.evaluation.neural.grid.places(self.sheet)
        inputs = torch.zeros_like(positions)
        for row, known in zip(self.rows, self.tokens, strict=True):
            inputs[row] = known[positions[row]]
        neural = self.evaluation.neural
        return neural.logits(inputs.to(neural.tokens.device), targets.size(1))

    def predict(self, logits: Tensor, run: int, target: int) -> Tensor:
        """The headline's log-probabilities (V,) at a run's target, from the batch's logits."""
        evaluation, (first, end) = self.evaluation, self.runs[run]
        network = log_distribution(logits[self.rows[run], target - end])
        mixer, tokens = evaluation.mixers.get(first), self.tokens[run]
        return evaluation.distribution(evaluation.headline, target, network, tokens, mixer)[0]


class Coded(NamedTuple):
    """A message and what it tells of its coder."""

    message: bytes  # the runs, the tokens before the last as they are, code words
    bits: int  # of the code words
    scores: list[float]  # the log-probability of each coded token, in the order of coding
    masses: list[float]  # the sum of each distribution, before it is made to add up to 1


def encode_message(evaluation: Evaluation, runs: list[tuple[int, int]]) -> Coded:
    """Code runs of targets by the headline's distributions."""
    val, scores, masses = evaluation.data.val, [], []
    coder = constriction.stream.queue.RangeEncoder()
    windows = CodedWindows(evaluation, runs, val)
    for known, (_, end) in zip(windows.tokens, runs, strict=True):
        known.copy_(val[: end + 1])
    logits = windows.logits()
    for step in windows.order():
        for run, target in step:
            token, logp = int(val[target + 1]), windows.predict(logits, run, target)
            coder.encode(token, entropy_model(logp))
            scores.append(float(logp[token]))
            masses.append(float(logp.exp().sum()))
    head = struct.pack(f"<I{2 * len(runs)}I", len(runs), *itertools.chain(*runs))
    prefix = val[: runs[-1][0] + 1].numpy().astype("<u2").tobytes()
    words = coder.get_compressed().astype("<u4").tobytes()
    return Coded(head + prefix + words, 8 * len(words), scores, masses)


def decode_message(model: GPT, message: bytes, cfg: Config, run: Run) -> list[Tensor]:
    """The tokens (end+1,) of each run of an encoded message, from the network and the message.

    What is before the last run is scored and counted once; each run sees no more of that than is
    before itself.
    """
    (count,) = struct.unpack_from("<I", message)
    numbers = struct.unpack_from(f"<{2 * count}I", message, 4)
    runs = list(zip(numbers[::2], numbers[1::2], strict=True))
    (first, end), begin = runs[-1], 4 + 8 * count
    prefix = torch.from_numpy(np.frombuffer(message, "<u2", first + 1, begin).astype(np.int64))
    words = np.frombuffer(message, "<u4", offset=begin + 2 * len(prefix)).astype(np.uint32)
    coder = constriction.stream.queue.RangeDecoder(words)
    places = Places([], first, end, runs)
    known = F.pad(prefix, (0, end - first))
    evaluation = evaluate_alone(model, known, cfg, run, places)
    if evaluation.headline == "calibrated":
        evaluation.mixed_calibrated()
    windows, started = CodedWindows(evaluation, runs, known), run.sync()
    steps = list(windows.order())
    for done, step in enumerate(steps):
        if done and done * AUDIT_LINES // len(steps) != (done - 1) * AUDIT_LINES // len(steps):
            left = eta(started, done / len(steps))
            run.log(f"audit decodable [{done}/{len(steps)}] eta_seconds:{left}")
        logits = windows.logits()
        for i, target in step:
            token = coder.decode(entropy_model(windows.predict(logits, i, target)))
            windows.tokens[i][target + 1] = int(token)
    return windows.tokens


def other_weights(evaluation: Evaluation) -> int:
    """How many of the network's tensors are not those of the artifact."""
    if not evaluation.blob:
        return 0
    vocabulary = evaluation.data.corpus["vocabulary_sha256"]
    _, stored = unpack(evaluation.blob, evaluation.cfg, vocabulary)
    own = dict(evaluation.neural.model.named_parameters())
    same = [
        name
        for name, tensor in stored.items()
        if name in own and torch.equal(own[name].detach().cpu(), tensor.tensor())
    ]
    return len(own.keys() | stored.keys()) - len(same)


def audit_decodable(evaluation: Evaluation) -> dict:
    """Code parts of the stream from the headline's distributions, and decode them, with the network
    that the artifact holds.

    The message may have allowed_bits more than the claim, for its last word and the coder's fixed
    point. So few targets would leave room in that for a mass above 1: the masses are asked, too.
    """
    cfg, val, runs = evaluation.cfg, evaluation.data.val, evaluation.places.coded
    message, bits, scores, masses = encode_message(evaluation, runs)
    decoded = decode_message(evaluation.neural.model, message, cfg, evaluation.run)
    same = all(torch.equal(tokens, val[: len(tokens)]) for tokens in decoded)
    order = CodedWindows(evaluation, runs, val).order()
    coded = [target for step in order for _, target in step]
    claimed = evaluation.logp[evaluation.headline][coded]
    claim = -float(claimed.sum()) / math.log(2)
    error = float((claimed - torch.tensor(scores, dtype=claimed.dtype)).abs().max())
    allowed = CODED_SHARE * claim + CODED_BITS  # fewer bits than claimed: nothing was overclaimed
    mass_error = float(np.max(np.abs(np.array(masses) - 1)))
    within = bits <= claim + allowed and mass_error <= MASS_WITHIN
    other = other_weights(evaluation)
    return {
        "passed": same and within and error <= SCORE_WITHIN and not other,
        "targets": len(coded),
        "windows": len(runs),
        "prefix_tokens": runs[-1][0] + 1,
        "other_weights": other,
        "same_tokens": same,
        "score_error": error,
        "mass_error": mass_error,
        "coded_bits": bits,
        "claimed_bits": round(claim, 1),
        "allowed_bits": round(allowed, 1),
        "share": len(coded) / len(val[1:]),
    }


AUDITS = {
    "causal": audit_causal,
    "normalized": audit_normalized,
    "single_pass": audit_single_pass,
    "bytes": audit_bytes,
    "decodable": audit_decodable,
}


def audit(evaluation: Evaluation) -> list[str]:
    """Run every check and log its verdict, on rank 0 all by itself; the names of those failed."""
    run, failed = evaluation.run, []
    for name, check in AUDITS.items():
        started = run.sync()
        figures = check(evaluation)
        verdict = "PASS" if figures.pop("passed") else "FAIL"
        run.row("audit", f"audit {name} {verdict}", **figures, seconds=run.sync() - started)
        run.record["audit"][-1] |= {"name": name, "verdict": verdict}
        if verdict == "FAIL":
            failed.append(name)
    return failed


def continue_tokens(
    model: GPT, history: Tensor, cfg: Config, run: Run, random: np.random.Generator
) -> Tensor:
    """EVAL_STRIDE tokens that follow history (n,), n = 1 + EVAL_SEQ_LEN and any number of strides,
    so that they are one window's targets. They are what a message of random bits decodes to: each
    is drawn from the distribution by which it would be scored."""
    first = len(history) - 1
    end = first + cfg.eval_stride
    bits = random.bytes(8 * cfg.eval_stride)  # 64 a token, more than the rarest needs
    head = struct.pack("<3I", 1, first, end) + history.numpy().astype("<u2").tobytes()
    return decode_message(model, head + bits, cfg, run.alone())[0][first + 1 :]


def sample(model: GPT, data: Data, cfg: Config, run: Run) -> None:
    """Log how SAMPLE goes on, by the network and by the mixer, which has learned from validation
    text before it; on rank 0."""
    prompt = torch.tensor([BOS, *data.tokenizer.encode(cfg.sample)])
    blocks = (min(len(data.val), SAMPLE_HISTORY) - 1 - cfg.eval_seq_len) // cfg.eval_stride
    size = 1 + cfg.eval_seq_len + blocks * cfg.eval_stride
    if blocks < 0 or len(prompt) > size:
        raise RunError(f"SAMPLE: has {len(prompt)} tokens, at most {size} fit")
    for scoring in ("neural", "calibrated") if cfg.ngram_enabled else ("neural",):
        own = replace(cfg, scoring=scoring, eval_batch_windows=1)
        tokens = torch.cat([data.val[: size - len(prompt)], prompt])
        random = np.random.default_rng(cfg.seed)
        for _ in range(SAMPLE_BLOCKS):
            more = continue_tokens(model, tokens[-size:], own, run, random)
            tokens = torch.cat([tokens, more])
        text = data.tokenizer.decode(tokens[size - len(prompt) :].tolist())
        run.log(f"sample of the {'network' if scoring == 'neural' else 'mixer'}:")
        for line in [*text.expandtabs().split("\n"), ""]:
            run.log(line)


# ==================================================================================================
# 17. Report
# ==================================================================================================
#
# What a run leaves for people: its log, the same as data (.json), a picture, and the challenge's
# submission.json. The picture and the submission are made of the record alone.

# Scores that are true, but say little: strict runs end well.
TOO_LITTLE, INTERRUPTED = "TOO LITTLE TEXT", "INTERRUPTED"
LEAST_VAL_BYTES = 100_000  # of text that does not repeat itself; below, a page decides the score
BYTES_A_TARGET = (1.2, 8.0)  # FineWeb's by the challenge's 1,024 pieces: 2.4; by 8,192: 3.7
# The challenge's validation text: its documents (openai/parameter-golf, NUM_VAL_DOCS), and its
# bytes, which are val_loss / val_bpb / ln 2 times targets of the logs published there. By 1,024,
# 4,096 and 8,192 pieces and cut to whole windows these are 151,054,500 to 151,083,900. What is cut
# off, fewer tokens than a window has, may be some whole documents.
CHALLENGE_DOCUMENTS, CHALLENGE_BYTES = 50_000, 151_080_000
CHALLENGE_DOCUMENTS_WITHIN, CHALLENGE_BYTES_WITHIN = 20, 30_000
CHALLENGE_LIMITS = {  # its rules
    "artifact_bytes": 16_000_000,
    "max_wallclock_seconds": 600.0,
    "max_eval_seconds": 600.0,
}
IN_TRAIN_SHARE = 0.03  # of the validation text that may occur in the training text unnoted
NOT_HELD_OUT_SHARE = 0.25  # of it that makes the score no score of text that is new
LEGEND = (
    "  val_bpb: bits per byte of the validation text, lower is better",
    "  mass: sum of all tokens' probabilities, mean of samples; not 1: no length of a message",
    "  calibrated: ours. backoff: a submission's rule, on exact counts or in hashed tables",
    "  neural: the network alone. (unigram, fitted): tokens by their frequency in this very text",
)
CURVE_POINTS = 200  # places of the running score
CURVE_SKIPPED = 4  # of them: the first few targets are noise
# Okabe and Ito's palette (2008), told apart by colour-blind eyes.
SCORING_COLORS = {
    "calibrated": "#0072B2",
    "backoff_exact": "#009E73",
    "backoff_exact_pair": "#CC79A7",
    "backoff_hashed": "#D55E00",
    "neural": "#000000",
    "unigram": "#999999",
}
PICTURE_INCHES, PICTURE_DPI = (8, 7), 200  # 1600 x 1400; its text is readable at half the size
TRAINING_COLOR, POINT_COLOR = "#777777", "#D55E00"  # points: validations, right hints


def revision() -> str:
    """The git commit in which this file is, with "+" if the file was changed since; "unknown" if
    git does not track it.

    `git rev-parse` looks names up and runs nothing that a folder's settings name: no file system
    monitor, filter or hook. Whether the file is the commit's, its own hash tells.
    """
    file = Path(__file__).resolve()
    command = ["git", "rev-parse", "HEAD", f"HEAD:./{file.name}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    with contextlib.suppress(OSError):
        done = subprocess.run(command, text=True, cwd=file.parent, env=env, capture_output=True)
        found = done.stdout.split()
        if done.returncode == 0 and len(found) == 2:
            content = file.read_bytes()
            blob = b"blob %d\0" % len(content) + content
            hashed = (hashlib.sha1(blob).hexdigest(), hashlib.sha256(blob).hexdigest())
            return found[0] + "+" * (found[1] not in hashed)
    return "unknown"


def describe_run(cfg: Config, notes: list[str], data: Data, run: Run) -> None:
    """Log configuration, versions, hardware, revision and corpus."""
    settings = asdict(cfg)
    run.record["notes"] = notes
    run.record["facts"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": device_name(run.device),
        "world_size": run.world_size,
        "launcher": launched_by(run),
        "revision": revision(),
        "code_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "code_bytes": code_bytes(),
    }
    run.record["corpus"] = data.corpus
    run.record["config"] = {name: settings[name] for name in FIELDS}
    for kind in ("facts", "corpus"):
        run.log(f"{kind} " + " ".join(f"{k}:{v}" for k, v in run.record[kind].items()))
    chosen = {"RECIPE": cfg.recipe, "SCALE": cfg.scale, "SMOKE": str(int(cfg.smoke))}
    usual = asdict(load_config(chosen)[0])
    config = run.record["config"].items()
    changed = ["SMOKE=1"] * cfg.smoke + [
        f"{k.upper()}={text_of(v)}" for k, v in config if v != usual[k]
    ]
    told = " ".join(changed) or "nothing"
    run.log(
        f"changed from {cfg.recipe} at scale {cfg.scale}: {told} (every setting is in the .json)"
    )


def unigram_bpb(data: Data) -> float:
    """Bits per byte of the validation targets by their own frequencies: a score to compare with."""
    counts = np.bincount(data.val[1:].numpy())
    counts = counts[counts > 0]
    bits = float((counts * np.log2(counts.sum() / counts)).sum())
    return bits / int(data.val_bytes.sum())


def score_table(evaluation: Evaluation) -> list[str]:
    """The scorings, best first, and a unigram model of the same targets for comparison."""
    lines = [f"{'scoring':20} {'val_bpb':>10} {'mass':>12}  normalized"]
    for scoring, row in sorted(evaluation.rows.items(), key=lambda item: item[1]["val_bpb"]):
        mark = "  <- headline" if scoring == evaluation.headline else ""
        mass = f"{row['mass']:12.6g}  {row['normalized']}{mark}"
        lines.append(f"{scoring:20} {row['val_bpb']:10.6f} {mass}")
    unigram = evaluation.run.record["unigram_bpb"]
    return [*lines, f"{'(unigram, fitted)':20} {unigram:10.6f}", *LEGEND]


def curves(evaluation: Evaluation) -> list[dict]:
    """The scores along the stream: bits per byte of the first k targets at CURVE_POINTS places."""
    byte_ends, out = evaluation.data.val_bytes.numpy().cumsum(), []
    for scoring, logp in evaluation.logp.items():
        at = np.linspace(1, len(logp), CURVE_POINTS).astype(int) - 1
        bits = -logp.numpy().cumsum()[at] / np.log(2)
        bpb = bits / byte_ends[at].clip(1)
        out.append({"scoring": scoring, "targets": (at + 1).tolist(), "bpb": bpb.tolist()})
    return out


def plot_training(axes, record: dict) -> None:
    """Training loss, with the validation points on the same axes."""
    train, checks = record["train"], record["validation"]
    axes.set(title="Training", xlabel="step", ylabel="loss, nats per token")
    if not train:
        axes.text(0.5, 0.5, "no training in this run", ha="center", transform=axes.transAxes)
        return
    losses = [row["train_loss"] for row in train]
    axes.plot([row["step"] for row in train], losses, color=TRAINING_COLOR, label="training")
    axes.plot(
        [row["step"] for row in checks],
        [row["val_loss"] for row in checks],
        linestyle="none",
        marker="D",
        color=POINT_COLOR,
        label="validation",
    )
    for row in checks[-1:]:
        where = (row["step"], row["val_loss"])
        axes.annotate(
            f"{row['val_loss']:.3f}", where, (0, 8), textcoords="offset points", ha="right"
        )
    axes.legend()


def scores_by_stage(record: dict) -> list[dict]:
    """Rows with `name`, `scoring`, `val_bpb` and perhaps `mass`: the network as trained and as
    shipped, both in windows that do not overlap, every scoring, and the unigram model."""
    trained = record["validation"][-1:] if record["train"] else []
    rows = [{"name": "neural, trained", "scoring": "neural"} | row for row in trained]
    for row in record["result"]:
        name = row["scoring"]
        if name == "neural":
            name += ", shipped" if row["stage"].endswith("roundtrip") else ", sliding"
        rows.append({"name": name} | row)
    unigram = {"name": "unigram, fitted", "scoring": "unigram", "val_bpb": record["unigram_bpb"]}
    return sorted([*rows, unigram], key=lambda row: -row["val_bpb"])


def plot_scores(axes, record: dict) -> None:
    """A bar for each stage of the network and each scoring, best first, with its mass and a mark
    where it is no distribution."""
    rows = scores_by_stage(record)
    for place, row in enumerate(rows):
        color = SCORING_COLORS[row["scoring"]]
        label = f"{row['name']}  {row['val_bpb']:.4f}"
        if "mass" in row:
            label += f"  mass {row['mass']:.4g}"
        axes.text(0, place + 0.27, label, va="bottom")
        bar = {"height": 0.4, "color": color}
        if row.get("normalized") == "no":
            bar |= {"color": "white", "edgecolor": color, "hatch": "////"}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(0.05, place, "NO DISTRIBUTION", va="center", fontsize=8, bbox=box)
        axes.barh(place, row["val_bpb"], **bar)
    axes.set(title="Score by stage and scoring", xlabel="bits per byte, lower is better", yticks=[])
    axes.set_ylim(-0.5, len(rows) - 0.2)


def plot_curves(axes, record: dict) -> None:
    """The running score along the stream, dashed where it is no distribution."""
    invalid = {row["scoring"] for row in record["result"] if row.get("normalized") == "no"}
    for row in record["curves"]:
        valid = row["scoring"] not in invalid
        axes.plot(
            np.array(row["targets"][CURVE_SKIPPED:]) / 1000,
            row["bpb"][CURVE_SKIPPED:],
            linestyle="-" if valid else "--",
            color=SCORING_COLORS[row["scoring"]],
            label=row["scoring"] + ("" if valid else " (no distribution)"),
        )
    unigram = {"color": SCORING_COLORS["unigram"], "linewidth": 1}
    axes.axhline(record["unigram_bpb"], label="unigram, fitted to all", **unigram)
    title = "Running score: mean of all targets so far"
    axes.set(title=title, xlabel="thousand targets", ylabel="bits per byte")
    axes.legend()


def plot_orders(axes, record: dict) -> None:
    """Of the calibrated mixer, else of the headline's rule: which order's context was the longest
    known, and how often the token that it names was right."""
    rows = {row["scoring"]: row for row in record["matched_orders"]}
    headline = record["final"][-1]["scoring"]
    row = rows.get("calibrated") or rows.get(headline)
    axes.set(title="Longest known context", xlabel="order (0: none)")
    if not row:
        axes.text(0.5, 0.5, "no n-grams in this run", ha="center", transform=axes.transAxes)
        return
    count = np.array(row["count"])
    orders = np.arange(len(count))
    share = 100 * count / count.sum()
    axes.bar(orders, share, color=SCORING_COLORS[row["scoring"]], alpha=0.6)
    axes.set(ylabel="bars: % of all targets", xticks=orders[::2])
    if "right" in row:
        seen = (count > 0) & (orders > 0)
        right = 100 * np.array(row["right"])[seen] / count[seen]
        own = axes.twinx()
        own.plot(orders[seen], right, "o-", color=POINT_COLOR)
        own.set_ylabel("points: % of these whose hint was right", color=POINT_COLOR)
        own.set(ylim=(0, 105))
        own.grid(False)


def save_picture(run: Run) -> None:
    """Draw and keep the picture, if it is wanted. It is a decoration, for which nobody loses a
    score: whatever goes wrong with it is a line."""
    if not run.record["config"].get("picture", True):
        return
    try:
        picture = plot(run.record)
    except (Exception, SystemExit) as error:  # of a package, its settings, its fonts
        run.log(f"no picture: {type(error).__name__}: {error}")
        return
    run.save(".png", picture)


def plot(record: dict) -> bytes:
    """The picture of a run, PNG; any exception of matplotlib's. No back end of a window system or a
    notebook is asked, and no text is read as a formula."""
    os.environ["MPLBACKEND"] = "agg"
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    style = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 8}
    quiet = warnings.catch_warnings()  # of letters that no font here has
    with quiet, matplotlib.rc_context(style | {"text.parse_math": False}):
        warnings.simplefilter("ignore")
        figure = figures.Figure(figsize=PICTURE_INCHES, layout="constrained")
        axes = figure.subplots(2, 2)
        panels = (plot_training, plot_scores, plot_curves, plot_orders)
        for panel, place in zip(panels, axes.flat, strict=True):
            panel(place, record)
        final, config = record["final"][-1], record["config"]
        figure.suptitle(
            f"{config['run_id']}: {final['val_bpb']:.4f} bits per byte, {final['scoring']}\n"
            f"{verdict_line(record['verdict'][-1])}",
            fontsize=11,
        )
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=PICTURE_DPI, facecolor="white")
    return image.getvalue()


def submission(record: dict) -> bytes:
    """The run in the form of the challenge's submission.json."""
    facts, final, config = record["facts"], record["final"][-1], record["config"]
    trained = (record["trained"] or [{}])[-1]
    used = {row["name"]: row["used"] for row in record["budget"]}
    hardware = f"{facts['world_size']}x {facts['gpu']}"
    if facts["gpu"] == "none":
        hardware = f"{facts['cores']} CPU cores, {facts['machine']}"
    copied = {key: config[key] for key in ("author", "github_id", "recipe", "scale", "seed")}
    scores = {key: final[key] for key in ("val_loss", "val_bpb", "scoring")}
    more = {
        "normalized": final["normalized"] == "yes",
        "bytes_total": final["total_bytes"],
        "bytes_code": facts["code_bytes"],
        "steps": trained.get("steps"),
        "train_seconds": round(trained["train_seconds"], 3) if trained else None,
        "eval_seconds": round(used["eval_seconds"], 3),
        "audit": {row["name"]: row["verdict"] for row in record.get("audit", [])},
        "verdict": verdict_line(record["verdict"][-1]),
        "hardware": hardware,
        "torch": facts["torch"],
        "corpus": record["corpus"],
        "revision": facts["revision"],
    }
    return as_json(copied | {"name": config["run_id"]} | scores | more)


def as_json(value: Any) -> bytes:
    """JSON of nested data. It has no numbers for what is infinite or none: these become text."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: finite(x) for key, x in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(x) for x in part]
        return str(part) if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=1, allow_nan=False).encode()


def report_budgets(total_bytes: int, eval_seconds: float, cfg: Config, run: Run) -> None:
    """Log what was used of each budget, and whether that is too much."""
    budgets = [
        ("total_bytes", total_bytes, cfg.artifact_bytes),
        ("eval_seconds", eval_seconds, cfg.max_eval_seconds),
    ]
    if run.record["trained"] and cfg.max_wallclock_seconds:
        used = run.record["trained"][0]["train_seconds"]
        used += sum(row["seconds"] for row in run.record["calibration"])
        budgets.append(("train_seconds", used, cfg.max_wallclock_seconds))
    for name, used, limit in budgets:
        verdict = "PASS" if used <= limit else f"FAIL excess:{used - limit:.3g}"
        row = {"name": name, "used": used, "limit": limit, "verdict": verdict}
        run.record["budget"].append(row)
        run.log(f"budget {name}:{used_text(used)}/{limit:.10g} {verdict}")


def used_text(used: float) -> str:
    """What was used of a budget: bytes, or seconds to the millisecond."""
    return str(used) if isinstance(used, int) else f"{used:.3f}"


def verdict_of(record: dict) -> dict[str, str]:
    """{what is wrong with the headline: the figure}, worst first; {} if the score is valid."""
    final, corpus, found = record["final"][-1], record["corpus"], {}
    scored = [row["val_bpb"] for row in record["result"] if row["scoring"] == final["scoring"]]
    if final["val_bpb"] not in scored or not 0 < final["val_bpb"] < math.inf:
        found["NO SCORE"] = f"val_bpb {final['val_bpb']}"
    if final["normalized"] != "yes":
        rows = {row["scoring"]: row for row in record["result"] if "mass" in row}
        found["NOT A DISTRIBUTION"] = f"mass {rows[final['scoring']]['mass']:.4g}"
    failed = [row["name"] for row in record["audit"] if row["verdict"] != "PASS"]
    if failed:
        found["AUDIT FAILED"] = ", ".join(failed)
    missing = AUDITS.keys() - {row["name"] for row in record["audit"]}
    if missing:
        found["NOT AUDITED"] = ", ".join(sorted(missing)) if record["audit"] else "AUDIT=0"
    budgets = {row["name"] for row in record["budget"]}
    if not budgets >= {"total_bytes", "eval_seconds"}:
        found["OVER BUDGET"] = "not known"
    over = [row for row in record["budget"] if not 0 <= row["used"] <= row["limit"] < math.inf]
    if over:
        found["OVER BUDGET"] = ", ".join(
            f"{row['name']} {used_text(row['used'])}/{row['limit']:.10g}" for row in over
        )
    in_train = corpus.get("val_in_train_share", 0.0)
    if not in_train <= NOT_HELD_OUT_SHARE:
        found["NOT HELD OUT"] = f"{in_train:.1%} of the validation text is in the training text"
    for row in record.get("interrupted", []):
        found[INTERRUPTED] = f"training ended by a signal after {row['steps']} steps"
    distinct = corpus["val_distinct_share"]
    size = record["result"][0]["bytes"] * (distinct if 0 <= distinct <= 1 else 0)
    if not size >= LEAST_VAL_BYTES:
        found[TOO_LITTLE] = f"{size:.0f} bytes that do not repeat others, of {LEAST_VAL_BYTES}"
    return found


def verdict_line(verdict: dict[str, str]) -> str:
    """The verdict in a line."""
    faults = (f"{fault} ({figure})" for fault, figure in verdict.items())
    return "; ".join(faults) or "VALID"


def is_challenge_text(record: dict) -> bool:
    """Whether a record's validation text is the challenge's, in whatever vocabulary."""
    size, documents = record["result"][0]["bytes"], record["corpus"]["val_documents"]
    same_documents = abs(documents - CHALLENGE_DOCUMENTS) <= CHALLENGE_DOCUMENTS_WITHIN
    return same_documents and abs(size - CHALLENGE_BYTES) <= CHALLENGE_BYTES_WITHIN


def warnings_of_limits(record: dict) -> Iterator[str]:
    """What a run's budgets do not show."""
    config = record["config"]
    for name, limit in CHALLENGE_LIMITS.items():
        own = config[name] or math.inf
        if name == "max_wallclock_seconds" and not record["trained"]:
            continue
        if own > limit:
            yield (
                f"{name.upper()}={config[name]:.10g} is not the challenge's limit of {limit:.10g}: "
                "the score does not compare with its leaderboard"
            )
    if not record["trained"]:
        yield (
            "nothing was trained in this run: nothing shows with what time, text and seed the "
            f"{'artifact' if config['load_artifact'] else 'weights'} were made"
        )


def warnings_of(record: dict) -> Iterator[str]:
    """What would mislead who reads the score."""
    in_train = record["corpus"].get("val_in_train_share", 0.0)
    if in_train > IN_TRAIN_SHARE:
        yield (
            f"{in_train:.1%} of the validation text, in runs of {RUN_TOKENS} tokens, is in the "
            "training text too: the score is better than on text that is new"
        )
    yield from warnings_of_limits(record)
    unigram = record["unigram_bpb"]
    row = {row["scoring"]: row for row in record["result"]}["neural"]  # the last: sliding
    neural = row["val_bpb"]
    if neural > unigram:
        yield (
            f"the network alone ({neural:.4f}) is worse than the text's own token frequencies "
            f"({unigram:.4f}): the score is the n-grams', on text that repeats itself"
        )
    per_target = row["bytes"] / row["tokens"]
    if not BYTES_A_TARGET[0] <= per_target <= BYTES_A_TARGET[1]:
        yield (
            f"{per_target:.2f} bytes per target: this text is not like the text of its vocabulary, "
            f"and bits per byte do not compare with other text's"
        )
    if not is_challenge_text(record):
        yield "not the challenge's validation text: the score does not compare with its leaderboard"


def report_headline(evaluation: Evaluation) -> None:
    """Log the score as soon as it is there: the audit is to come, and may be cut off."""
    row = evaluation.rows[evaluation.headline]
    values = {key: row[key] for key in ("val_bpb", "seconds")}
    evaluation.run.row("headline", scoring=evaluation.headline, **values)


def final_report(evaluation: Evaluation, blob: bytes, cfg: Config, run: Run) -> dict[str, str]:
    """Result lines, budgets, score table, files and, last, verdict and final line; on rank 0. The
    verdict."""
    for scoring, row in evaluation.rows.items():
        run.row("result", stage=f"int{cfg.matrix_bits}_sliding", scoring=scoring, **row)
    best, total = evaluation.rows[evaluation.headline], len(blob) + code_bytes()
    report_budgets(total, best["seconds"], cfg, run)
    final = {
        "val_loss": best["val_loss"],
        "val_bpb": best["val_bpb"],
        "scoring": evaluation.headline,
        "normalized": best["normalized"],
        "total_bytes": total,
        "seed": cfg.seed,
    }
    run.record["final"].append(final)
    run.record["unigram_bpb"] = unigram_bpb(evaluation.data)
    run.record["curves"] = curves(evaluation)
    matched = evaluation.matched.items()
    run.record["matched_orders"] = [{"scoring": scoring} | facts for scoring, facts in matched]
    for line in score_table(evaluation):
        run.log(line)
    run.record["warnings"] = [*warnings_of(run.record)]
    for line in run.record["warnings"]:
        run.log(f"warning: {line}")
    verdict = verdict_of(run.record)
    run.record["verdict"] = [verdict]
    run.record["verdict_line"] = verdict_line(verdict)
    run.save(".submission.json", submission(run.record))
    run.save(".json", as_json(run.record))
    save_picture(run)
    run.record["final"].clear()  # the line is logged as data once more, as the last
    run.log(f"verdict {verdict_line(verdict)}")
    run.row("final", **final)
    return verdict


# ==================================================================================================
# 18. Main
# ==================================================================================================
#
# Exit status: 0; 1 for a fault of this program, with its traceback; 2 for any other error, or a
# file that could not be written; 3 where AUDIT=strict and the score is not valid, though true of
# little text.


def make_artifact(data: Data, cfg: Config, run: Run) -> bytes:
    """Train and save the weights, or load some; export and save; the artifact, on every rank."""
    if cfg.load_weights:
        model = build_model(cfg, run, read_tensors(cfg.load_weights))
        run.open_log(cfg)
    else:
        run.stage = "training"
        model = build_model(cfg, run)
        trainer = Trainer(model, data, cfg, run)
        run.open_log(cfg)
        trainer.train()
        cfg = trainer.cfg
        if run.is_main:
            named = model.named_parameters()
            run.save(".safetensors", {n: p.detach().cpu().contiguous() for n, p in named})
            trainer.forget_checkpoint()
        trainer.validate()
    run.stage = "export"
    senses = calibrate(model, data, cfg, run)

    def export_and_save() -> bytes:
        with threads(run.cores):  # the others wait
            blob = export(model, senses, data, cfg, run)
        run.save(f".int{cfg.matrix_bits}.ptz", blob)
        return blob

    return run.on_main(export_and_save)


def load_network(blob: bytes, data: Data, cfg: Config, run: Run) -> tuple[Config, GPT, str]:
    """(cfg with the artifact's architecture, its network, its network_digest); a run that began
    with the artifact has passed all checks then."""
    vocabulary = data.corpus["vocabulary_sha256"]
    cfg, stored = unpack(blob, cfg, vocabulary)
    pieces = data.tokenizer.get_piece_size()
    if cfg.vocab_size != pieces:
        raise RunError(f"artifact: its network has {cfg.vocab_size} pieces, its tokenizer {pieces}")
    weights = {name: tensor.tensor() for name, tensor in stored.items()}
    model = build_model(replace(cfg, mtp_num_heads=0), run, weights)
    run.open_log(cfg)
    return cfg, model, network_digest(stored, cfg, vocabulary)


def evaluate_artifact(blob: bytes, data: Data, cfg: Config, run: Run) -> int:
    """Score what would be shipped; the exit status."""
    run.stage, started = "evaluation", run.sync()
    cfg, model, network = load_network(blob, data, cfg, run)
    windows = -(-len(data.val) // cfg.eval_stride)  # no more than these need a place in a batch
    cfg = replace(cfg, eval_batch_windows=min(cfg.eval_batch_windows, windows))
    run.record["network_sha256"] = network
    evaluation = Evaluation(model, data, cfg, run, network, blob=blob)
    evaluation.neural_pass()
    evaluation.score(evaluation.headline, started)  # the clock ends
    run.on_main(lambda: report_headline(evaluation))
    run.on_main(lambda: save_neural_pass(evaluation))
    for scoring in evaluation.scorings[1:]:
        evaluation.score(scoring, run.sync())
    started = run.sync()
    roundtrip = neural_score(model, data, cfg, run)
    if run.is_main:
        roundtrip["seconds"] = run.sync() - started
        run.row("result", stage=f"int{cfg.matrix_bits}_roundtrip", scoring="neural", **roundtrip)
    run.dismiss_others()
    return prove_and_report(evaluation, blob, cfg, run) if run.is_main else 0


def prove_and_report(evaluation: Evaluation, blob: bytes, cfg: Config, run: Run) -> int:
    """Masses, audit and report, by rank 0 alone; the exit status."""
    evaluation.masses()
    run.stage = "audit"
    if cfg.audit != "0":
        audit(evaluation)
    run.stage = "report"
    verdict = final_report(evaluation, blob, cfg, run)
    if run.unsaved:
        raise RunError("; ".join(run.unsaved))
    return 3 if verdict.keys() - {TOO_LITTLE, INTERRUPTED} and cfg.audit == "strict" else 0


def run_all(cfg: Config, notes: list[str], run: Run) -> int:
    """The whole run, as a table of contents; the exit status."""
    for line in (what_it_does(cfg), *notes):
        run.log(line)
    check_packages(cfg)
    cfg = try_compiler(cfg, run)
    run.log(how_it_computes(cfg, run))
    run.stage = "data"
    if not cfg.load_artifact:
        fit_micro_batch(cfg, run.world_size)  # fails before expensive work
    data = load_data(cfg, run)
    run.on_main(lambda: describe_run(cfg, notes, data, run))
    if cfg.load_artifact:
        blob = run.on_main(lambda: read_regular(cfg.load_artifact))
        if cfg.audit != "0":
            run.on_main(lambda: check_spelling(blob, cfg, data.corpus["vocabulary_sha256"]))
    else:
        blob = make_artifact(data, cfg, run)
    if cfg.sample:
        cfg, model, _ = load_network(blob, data, cfg, run)
        run.on_main(lambda: sample(model, data, cfg, run))
        return 0
    return evaluate_artifact(blob, data, cfg, run)


def launched_by(run: Run) -> str:
    """Who started this run's ranks."""
    return "itself" if CORES_VARIABLE in os.environ or run.world_size == 1 else "torchrun"


def device_name(device: torch.device) -> str:
    """Name of the accelerator, "none" of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "none" if device.type == "cpu" else device.type


def what_it_does(cfg: Config) -> str:
    """The log's first line: the stages that this run has."""
    if cfg.load_artifact:
        stages = ["artifact"]
    elif cfg.load_weights:
        stages = ["weights", "export"]
    else:
        limit = f"at most {cfg.max_wallclock_seconds:g} s"
        if not cfg.max_wallclock_seconds:
            limit = f"{cfg.iterations} steps"
        stages = [f"training ({limit})", "export"]
    stages += ["sample"] if cfg.sample else ["evaluation"] + ["audit"] * (cfg.audit != "0")
    return f"{cfg.recipe} at {cfg.scale} scale: " + ", ".join(["data", *stages])


def how_it_computes(cfg: Config, run: Run) -> str:
    """The log line of ranks, threads, compilation and arithmetic, and what sets them."""
    own = torch.get_num_threads()
    ranks = f"{run.world_size} x {run.device.type}"
    if run.device.type == "cpu":
        ranks = f"{run.world_size} ranks of {launched_by(run)}, {own} threads each"
        if launched_by(run) == "itself":
            ranks = f"RANKS={run.world_size}, {own} threads each, on {run.cores} cores"
    trains = not (cfg.load_artifact or cfg.load_weights)
    graphs = ["training"] * (trains and compiles(cfg, run, is_long_training(cfg, run)))
    graphs += ["evaluation"] * compiles(cfg, run)
    told = " and ".join(graphs) or "nothing"
    dtype = str(compute_dtype(cfg, run.device)).removeprefix("torch.")
    return f"computing with {ranks}; compiled (COMPILE): {told}; COMPUTE={dtype}"


# What makes a stage need less memory.
MEMORY_SETTINGS = {
    "training": "MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or MODEL_DIM",
    "evaluation": "EVAL_BATCH_WINDOWS or VAL_BATCH_SIZE",
    "audit": "EVAL_BATCH_WINDOWS",
}


def explain(error: Exception, run: Run | None) -> str | None:
    """The line that this rank prints of an error that ended the run, "" if another rank speaks;
    None if the error is a fault of this program's, of which the traceback is wanted."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_allocators(error):
        device = run.device.type if run else "cpu"
        return (
            f"out of memory of the {device} during {run.stage if run else 'start'}: lower "
            f"{MEMORY_SETTINGS.get(run.stage if run else '', 'MODEL_DIM')}; saved so far: "
            f"{', '.join(run.saved) if run and run.saved else 'nothing'}"
        )
    # By its name: to import the compiler for the sake of an error takes seconds.
    if "TorchDynamoException" in (kind.__name__ for kind in type(error).__mro__):
        reason = " ".join(str(error).split("\n\n")[0].split())
        return f"compilation failed during {run.stage if run else 'start'}: {reason}; see COMPILE=0"
    if run and run.world_size > 1:
        found = dead_ranks(run, error)
        if found:
            line, is_speaker = found
            return line if is_speaker else ""
    if isinstance(error, KeyboardInterrupt):
        saved = ", ".join(run.saved) if run and run.saved else "nothing"
        return f"interrupted during {run.stage if run else 'start'}; saved so far: {saved}"
    if isinstance(error, LaunchError):
        return str(error)
    if isinstance(error, (RunError, OSError)):
        return str(error) if os.environ.get("RANK", "0") == "0" else ""
    return None


def is_allocators(error: Exception) -> bool:
    """Whether an error is the CPU allocator's, which has no class of its own."""
    words = ("can't allocate memory", "not enough memory", "std::bad_alloc")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def print_help() -> int:
    """Print the help, as far as the reader (`head`, say) wants it; the exit status."""
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:
        return 0
    except OSError as error:
        tell(f"error: cannot print the help: {error.strerror}", sys.stderr)
        return 2
    return 0


def check_arguments(arguments: list[str]) -> None:
    """RunError for arguments of the command line, with the variables that they may have meant."""
    if not arguments:
        return
    words = (word.lstrip("-").partition("=") for word in arguments)
    meant = {name.upper().replace("-", "_"): value for name, _, value in words}
    known = [f"{k}={v or '...'}" for k, v in meant.items() if k in VARIABLES]
    raise RunError(
        f"arguments are not read: {' '.join(arguments)}. Everything is set by environment "
        f"variables: {' '.join(known) or 'SEED=7'} python train_gpt.py, see --help"
    )


def main() -> int:
    """Run as the environment says; the exit status."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that it cannot spell
    if {"-h", "--help"} & set(sys.argv[1:]):
        return print_help()
    with heed_signals():
        return run_as_told()


def run_as_told() -> int:
    """Run as the environment says, with an error as one line; the exit status."""
    run, launcher, status = None, None, 1
    try:
        check_arguments(sys.argv[1:])
        cfg, notes = load_config(os.environ)
        launcher = Launcher(cfg)
        launcher.start()
        run = Run(cfg, launcher.cores)
        launcher.joined = True
        status = run_all(cfg, notes, run)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        line = explain(error, run)
        if line is None or BOOLEANS.get(os.environ.get("DEBUG", "").lower()):
            traceback.print_exc()
        elif line and LAST_WORD.acquire(blocking=False):
            tell(f"error: {line}", sys.stderr)
        status = 1 if line is None else 2
    if launcher:
        launcher.end()
    return status


if __name__ == "__main__":
    os._exit(main())  # not through the teardown of the collectives' threads, which can abort
