"""Parameter Golf, whole: train a small GPT, ship it in 16,000,000 bytes, score it in bits per byte.

    text or shards -> train -> weights -> quantize + compress -> artifact -> evaluate -> val_bpb

    python train_gpt.py                                       a laptop, no data needed: minutes
    TEXT_FILES='notes/**/*.md' python train_gpt.py            the same on your own text
    torchrun --standalone --nproc_per_node=8 train_gpt.py     the challenge: 8 GPUs, FineWeb shards
    RECIPE=pr1094 python train_gpt.py                         one of the four public submissions
    LOAD_ARTIFACT=logs/x.int6.ptz python train_gpt.py         evaluation alone
    python train_gpt.py --help                                every variable and recipe

Everything is set by environment variables; the last line that a run prints is its `final` line.
Units are in names (`_seconds`, `_bytes`, `_tokens`); shapes in comments use B windows, T tokens of
a window, C model_dim, H heads, D head_dim, L layers, V vocabulary, N targets.
"""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import functools
import glob
import hashlib
import importlib
import io
import json
import lzma
import math
import operator
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import time
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import constriction
import numpy as np
import safetensors.torch
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from tqdm import tqdm

# PyTorch 2.13 renames two collectives; before, only the old names exist.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# ---- Configuration and recipes -------------------------------------------------------------------
class RunError(Exception):
    """Bad input or a failed stage: one line for the user, non-zero exit on every rank."""

NONNEGATIVE, POSITIVE, FRACTION = (0, math.inf), (1, math.inf), (0, 1)

def knob(default, meaning: str, allowed=NONNEGATIVE):
    """A field of Config; `allowed` is an inclusive (low, high) range or a list of choices."""
    return field(default=default, metadata=dict(meaning=meaning, allowed=allowed))

@dataclass(frozen=True)
class Config:
    """Every setting of a run. The environment variable is the field's name in capitals."""

    # run
    recipe: str = knob("golf", "ours (golf) or a submission's (pr889, pr806, pr890, pr1094)")
    scale: str = knob("auto", "the challenge's size or a laptop's", ["auto", "full", "demo"])
    run_id: str = knob("", "name of the run's files; empty: recipe-scale-seed")
    seed: int = knob(1337, "seed of the initialization", (0, 2**32 - 1))
    logs_path: str = knob("logs", "folder of logs, weights and artifacts")
    device: str = knob("auto", "auto takes CUDA where present", ["auto", "cpu", "cuda"])
    compile: str = knob("auto", "torch.compile; auto: on CUDA only", ["auto", "0", "1"])
    attention: str = knob("auto", "attention back end", ["auto", "flash3", "flash2", "sdpa"])
    dist_timeout_seconds: float = knob(1800.0, "a rank silent for so long ends the run", POSITIVE)
    author: str = knob("", "author, for submission.json")
    github_id: str = knob("", "author's GitHub name, for submission.json")
    debug: bool = knob(False, "1: tracebacks instead of one-line errors")
    # data
    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder of shards")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model", "their tokenizer")
    text_files: str = knob("", "globs of UTF-8 text separated by ':'; each file is a document")
    prepared_path: str = knob("data", "folder for tokenizers and shards made from text")
    vocab_size: int = knob(1024, "pieces of the tokenizer", (260, 65536))
    val_tokens: int = knob(0, "validation targets to score; 0: all")
    # model
    num_layers: int = knob(11, "blocks", (2, 256))
    model_dim: int = knob(512, "width", (8, 65536))
    num_heads: int = knob(8, "query heads", POSITIVE)
    num_kv_heads: int = knob(4, "key and value heads", POSITIVE)
    mlp_mult: float = knob(3.0, "hidden width of the MLP over model_dim", (0.1, 64))
    relu_slope: float = knob(0.5, "MLP activation: leaky_relu(x, slope) squared", FRACTION)
    tied_embed_init_std: float = knob(0.005, "std of the token embedding at the start")
    logit_softcap: float = knob(30.0, "logits are softcap*tanh(x/softcap)", (1e-3, 1e6))
    qk_gain_init: float = knob(1.5, "start of the queries' per-head gain")
    rope_base: float = knob(10000.0, "base of the rotary embedding (RoPE)", (1, 1e9))
    rope_dims: int = knob(16, "rotated dims of each head; even", (2, 65536))
    ln_scale: bool = knob(True, "scale normed inputs by 1/sqrt(layer+1)")
    bigram_vocab_size: int = knob(2048, "rows of the bigram-hash embedding; 0: none")
    bigram_dim: int = knob(128, "its width", POSITIVE)
    ve_enabled: bool = knob(True, "value embedding on ve_layers")
    ve_dim: int = knob(128, "its width", POSITIVE)
    ve_layers: tuple[int, ...] = knob((9, 10), "layers with a value embedding", None)
    xsa_last_n: int = knob(11, "last layers with exclusive self-attention (XSA)")
    value_residual: bool = knob(False, "mix every layer's values with the first layer's")
    mtp_num_heads: int = knob(0, "multi-token prediction heads; trained, not exported", (0, 16))
    mtp_loss_weight: float = knob(0.2, "weight of their mean loss")
    # training
    iterations: int = knob(20000, "most training steps")
    max_wallclock_seconds: float = knob(600.0, "cap on training time; 0: none")
    train_batch_tokens: int = knob(786432, "tokens a step, over all ranks", POSITIVE)
    micro_batch_tokens: int = knob(0, "tokens of a rank's forward pass; 0: its share, <= 98,304")
    train_seq_len: int = knob(2048, "tokens of a training sequence", (2, 10**6))
    schedule_steps: int = knob(7000, "steps that the step counts below are parts of", POSITIVE)
    warmup_steps: int = knob(20, "steps before the clock; they leave no trace")
    warmdown_iters: int = knob(3500, "final steps in which the lr falls to 0")
    val_loss_every: int = knob(4000, "steps between validations; 0: at the end only")
    val_batch_size: int = knob(524288, "tokens of a validation batch, over 8 ranks", POSITIVE)
    train_log_every: int = knob(200, "steps between training lines")
    averaging: str = knob("ema", "weights to export", ["ema", "swa", "none"])
    ema_decay: float = knob(0.997, "per step of schedule_steps", FRACTION)
    swa_enabled: bool = knob(True, "0 turns AVERAGING=swa off")
    swa_every: int = knob(200, "steps between SWA samples, once the lr scale is < 0.5", POSITIVE)
    qat_enabled: bool = knob(False, "quantization-aware training (QAT) from the start")
    late_qat_threshold: float = knob(0.15, "QAT once the lr scale is below; 0: never", FRACTION)
    # optimizers
    matrix_lr: float = knob(0.025, "Muon's lr")
    scalar_lr: float = knob(0.025, "AdamW's lr of vectors")
    tied_embed_lr: float = knob(0.035, "AdamW's lr of embeddings and tied head")
    head_lr: float = knob(0.008, "AdamW's lr of MTP heads")
    muon_momentum: float = knob(0.99, "Muon's momentum", FRACTION)
    muon_momentum_warmup_start: float = knob(0.92, "Muon's momentum at the start", FRACTION)
    muon_momentum_warmup_steps: int = knob(1500, "steps until full momentum")
    muon_backend_steps: int = knob(5, "Newton-Schulz steps", (1, 20))
    muon_wd: float = knob(0.04, "Muon's decoupled weight decay")
    beta1: float = knob(0.9, "AdamW's beta 1", FRACTION)
    beta2: float = knob(0.95, "AdamW's beta 2", FRACTION)
    adam_eps: float = knob(1e-8, "AdamW's epsilon", FRACTION)
    adam_wd: float = knob(0.04, "AdamW's decoupled weight decay")
    grad_clip_norm: float = knob(0.3, "largest norm of the averaged gradient; 0: no clipping")
    # artifact
    matrix_bits: int = knob(6, "bits of a matrix code", (2, 8))
    embed_bits: int = knob(8, "bits of an embedding code", (2, 8))
    compressor: str = knob("ans", "entropy coder of the codes", ["ans", "zstd", "lzma", "auto"])
    artifact_bytes: int = knob(16_000_000, "budget for code + artifact", POSITIVE)
    load_artifact: str = knob("", "evaluate this artifact; no training")
    # evaluation
    eval_seq_len: int = knob(2048, "tokens of a window", (2, 10**6))
    eval_stride: int = knob(64, "targets a window scores", POSITIVE)
    eval_batch_windows: int = knob(128, "windows of a batch", POSITIVE)
    max_eval_seconds: float = knob(600.0, "budget of the evaluation", POSITIVE)
    # scoring
    scoring: str = knob("backoff", "headline score", ["neural", "backoff"])
    ngram_table: str = knob("exact", "keys of the backoff headline", ["exact", "hashed"])
    ngram_enabled: bool = knob(True, "mix with n-grams at all")
    ngram_min_order: int = knob(2, "shortest n-gram of the backoff", (2, 64))
    ngram_max_order: int = knob(7, "longest n-gram of the backoff", (2, 64))
    ngram_min_count: int = knob(2, "a context matches from this count on", POSITIVE)
    ngram_entropy: bool = knob(True, "alpha follows the entropy H; 0: it is ngram_alpha")
    ngram_alpha: float = knob(0.4, "fixed alpha", FRACTION)
    ngram_ent_base: float = knob(0.05, "alpha = base + range*sigmoid(scale*(H-center))", FRACTION)
    ngram_ent_range: float = knob(0.55, "see ngram_ent_base", FRACTION)
    ngram_ent_scale: float = knob(2.0, "see ngram_ent_base")
    ngram_ent_center: tuple[float, ...] = knob((4.0,), "nats; one, or one per order from 2", None)
    ngram_fallback: str = knob("network", "without a match", ["network", "unigram"])
    ngram_start_tokens: int = knob(0, "network alone until so many tokens are counted")
    ngram_buckets: int = knob(2**22, "hashed: buckets of an order's table", (1, 2**30))
    ngram_match: str = knob("context", "hashed: what counts as a match", ["context", "pair"])
    ngram_granularity: str = knob("window", "hashed: counts lag", ["token", "window", "batch"])
    ngram_history: str = knob("prefill", "hashed: a rank's start", ["prefill", "cold"])
    ngram_primes: tuple[int, ...] = knob(
        (36313, 27191, 51647, 81929, 131071, 174763, 233017), "hashed: multipliers of tokens", None)

# Other names of fields in the submissions' scripts.
ALIASES = dict(
    VRL_ENABLED="value_residual", NGRAM_ORDER="ngram_max_order", NGRAM_CACHE="ngram_enabled",
    USE_NGRAM_MIXER="ngram_enabled", ALPHA_BASE="ngram_ent_base", ALPHA_RANGE="ngram_ent_range",
    ALPHA_CENTER="ngram_ent_center")

# The four submissions: values that differ from Config's defaults, which are `golf`, ours.
RECIPES: dict[str, dict] = {
    "golf": {},
    "pr889": dict(xsa_last_n=4, value_residual=True, compressor="lzma", ngram_table="hashed",
                  ngram_history="cold", schedule_steps=6760,
                  ngram_primes=(36313, 27191, 51647, 81929, 131071, 175447, 209591)),
    "pr806": dict(relu_slope=0.9, ve_enabled=False, xsa_last_n=0, rope_dims=64, ln_scale=False,
                  warmdown_iters=3000, averaging="swa", late_qat_threshold=0.0, compressor="zstd",
                  ngram_table="hashed", schedule_steps=7185),
    "pr890": dict(num_kv_heads=8, mlp_mult=3.5, bigram_vocab_size=4096, late_qat_threshold=0.5,
                  matrix_bits=5, compressor="zstd", eval_stride=32, ngram_max_order=9,
                  ngram_ent_center=(4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 2.8, 2.6), schedule_steps=5180,
                  ngram_table="hashed", ngram_match="pair", ngram_primes=(
                      36313, 27191, 51647, 81929, 131071, 174763, 233017, 299993, 350377)),
    "pr1094": dict(relu_slope=0.75, xsa_last_n=4, mtp_num_heads=2, mtp_loss_weight=0.1,
                   matrix_lr=0.027, warmdown_iters=3700, late_qat_threshold=0.0,
                   compressor="lzma", ngram_max_order=10, ngram_min_count=1, ngram_ent_base=0.2,
                   ngram_ent_center=(3.0,), ngram_fallback="unigram", ngram_start_tokens=5000,
                   ngram_table="hashed", ngram_granularity="batch", schedule_steps=7020),
}

# A laptop's sizes: 11 layers still, about two minutes of training on 2 cores.
DEMO = dict(model_dim=128, num_heads=4, train_seq_len=256, eval_seq_len=256,
            train_batch_tokens=4096, bigram_vocab_size=1024, bigram_dim=32, ve_dim=32,
            val_tokens=131072, max_wallclock_seconds=120.0, warmup_steps=2, eval_batch_windows=16,
            val_batch_size=32768)

# What determines the network's function: the artifact's header holds these and nothing else.
ARCHITECTURE = """matrix_bits embed_bits vocab_size num_layers model_dim num_heads num_kv_heads
    mlp_mult relu_slope logit_softcap rope_base rope_dims ln_scale bigram_vocab_size
    bigram_dim ve_enabled ve_dim ve_layers xsa_last_n value_residual""".split()

HELP_SECTIONS = dict(  # by the section's first field
    recipe="Run", data_path="Data", num_layers="Model", iterations="Training", scoring="Scoring",
    matrix_lr="Optimizers", matrix_bits="Artifact", eval_seq_len="Evaluation")

# Variables of the submissions' scripts that change nothing here ("*": all that begin so).
WITHOUT_EFFECT = {
    "MUON_BETA2": "read by the submissions, used by none", "DTG_ENABLED": "off in every submission",
    "GATED_ATTENTION": "off in every submission", "COMPLEMENT_ALPHA": "0 in #1094",
    "NGRAM_ENT_THRESH": "read by #890, used nowhere", "DISTILL_*": "dead code in #806",
    "KG_LOSS_WEIGHT": "its code is absent from #1094", "PAID_PREFIX_*": "dead code in #806",
    "CONTROL_TENSOR_NAME_PATTERNS": "tensors are classed by what they are, not by name patterns",
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": "as CONTROL_TENSOR_NAME_PATTERNS",
    "TIE_EMBEDDINGS": "always tied, as in every submission", "EMBED_LR": "as TIE_EMBEDDINGS",
    "TTT_*": "training on validation text is no part of this system"}

def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]

def check_names(env: typing.Mapping[str, str], known: dict[str, str]) -> None:
    """RunError for a variable that is nearly a known name: a typing mistake."""
    for name in env.keys() - known.keys() - WITHOUT_EFFECT.keys():
        most = 0 if len(name) < 8 else 1 if len(name) < 12 else 2
        for near in known if most else ():
            if abs(len(near) - len(name)) <= most and edit_distance(name, near) <= most:
                raise RunError(f"unknown variable {name}: did you mean {near}?")

def parse_value(name: str, text: str, kind: str, allowed):
    """The variable's value as its field's type; RunError names variable, value, what is allowed."""
    item = float if "float" in kind else int
    try:
        if kind == "bool":
            value = {"0": False, "1": True, "false": False, "true": True}[text.strip().lower()]
        elif kind.startswith("tuple"):
            value = tuple(item(part) for part in text.split(",") if part.strip())
        else:
            value = text if kind == "str" else item(text)
    except (ValueError, KeyError):
        wanted = dict(bool="0 or 1", int="an integer", float="a number").get(kind, "numbers")
        raise RunError(f"{name}={text!r}: expected {wanted}") from None
    if isinstance(value, tuple) and not all(abs(v) < 2**31 for v in value):
        raise RunError(f"{name}={text}: numbers must be below {2**31}")
    if isinstance(allowed, list) and value not in allowed:
        raise RunError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    if kind in ("int", "float") and not allowed[0] <= value <= allowed[1]:
        top = "" if allowed[1] == math.inf else f" and at most {allowed[1]:g}"
        raise RunError(f"{name}={value}: must be at least {allowed[0]:g}{top}")
    return value

def read_environment(env: typing.Mapping[str, str]) -> tuple[dict, list[str]]:
    """({field: value} set by the environment, log lines about aliases and idle variables)."""
    by_name = {f.name: f for f in fields(Config)}
    known = {name.upper(): name for name in by_name} | ALIASES
    check_names(env, known)
    values, notes = {}, []
    for name in sorted(env):
        if name in known:
            f = by_name[known[name]]
            value = parse_value(name, env[name], f.type, f.metadata["allowed"])
            if values.setdefault(f.name, value) != value:
                raise RunError(f"{name}={value}: {f.name.upper()} is also set to {values[f.name]}")
            notes += [f"variable {name} sets {f.name.upper()}"] if name in ALIASES else []
        notes += [f"variable {name} has no effect: {reason}"
                  for idle, reason in WITHOUT_EFFECT.items() if fnmatch.fnmatchcase(name, idle)]
    return values, notes

def choose_scale(values: dict) -> tuple[str, str]:
    """(scale, reason): the requested one, or full where CUDA and shards are present."""
    path = values.get("data_path", Config.data_path)
    if values.get("scale", "auto") != "auto":
        return values["scale"], "SCALE is set"
    if not find_shards(path, "train") or not torch.cuda.is_available():
        return "demo", f"CUDA and train shards at {path} are not both present"
    return "full", f"CUDA and train shards at {path} are present"

def load_config(env: typing.Mapping[str, str]) -> tuple[Config, list[str]]:
    """(configuration, log lines): environment > sizes of SCALE > RECIPE > defaults. RunError for a
    near-miss name, a value that does not parse or is out of range, a contradiction."""
    values, notes = read_environment(env)
    name = values.get("recipe", Config.recipe)
    if name not in RECIPES:
        raise RunError(f"RECIPE={name!r}: allowed are {', '.join(RECIPES)}")
    scale, reason = choose_scale(values)
    cfg = replace(Config(), **RECIPES[name])
    if scale == "demo":  # the recipe's ratio of heads and fraction of rotated dims
        head_dim, sizes = cfg.model_dim // cfg.num_heads, DEMO | values
        heads = sizes["num_heads"]
        rotated = cfg.rope_dims * sizes["model_dim"] // heads // head_dim
        cfg = replace(cfg, **DEMO, rope_dims=max(2, rotated // 2 * 2),
                      num_kv_heads=max(1, heads * cfg.num_kv_heads // cfg.num_heads))
    run_id = f"{name}-{scale}-{values.get('seed', cfg.seed)}"
    cfg = replace(cfg, **(dict(run_id=run_id) | values | dict(scale=scale)))
    check_config(cfg)
    return cfg, [f"scale {scale}: {reason}", *notes]

def check_config(cfg: Config) -> None:
    """RunError for values that contradict each other."""
    c, head_dim, orders = cfg, cfg.model_dim // cfg.num_heads, cfg.ngram_max_order - 1
    checks = [
        (c.model_dim % c.num_heads, "MODEL_DIM", "divisible by NUM_HEADS", c.num_heads),
        (c.num_heads % c.num_kv_heads, "NUM_HEADS", "divisible by NUM_KV_HEADS", c.num_kv_heads),
        (c.rope_dims % 2 or c.rope_dims > head_dim, "ROPE_DIMS", "even, at most", head_dim),
        (c.eval_stride > c.eval_seq_len, "EVAL_STRIDE", "at most EVAL_SEQ_LEN", c.eval_seq_len),
        (c.train_batch_tokens % c.train_seq_len, "TRAIN_BATCH_TOKENS", "divisible by TRAIN_SEQ_LEN",
         c.train_seq_len),
        (c.micro_batch_tokens % c.train_seq_len, "MICRO_BATCH_TOKENS", "divisible by TRAIN_SEQ_LEN",
         c.train_seq_len),
        (c.xsa_last_n > c.num_layers, "XSA_LAST_N", "at most NUM_LAYERS", c.num_layers),
        (c.ve_enabled and len(set(c.ve_layers) & set(range(c.num_layers))) < len(c.ve_layers),
         "VE_LAYERS", "different layers from 0 to below NUM_LAYERS", c.num_layers),
        (c.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE", "0 or at least", 2),
        (c.ngram_min_order > c.ngram_max_order, "NGRAM_MIN_ORDER", "at most NGRAM_MAX_ORDER",
         c.ngram_max_order),
        (len(c.ngram_ent_center) not in (1, orders), "NGRAM_ENT_CENTER",
         "one number or, for orders 2 to NGRAM_MAX_ORDER,", orders),
        (c.ngram_ent_base + c.ngram_ent_range > 1, "NGRAM_ENT_BASE", "at most 1 - NGRAM_ENT_RANGE",
         1 - c.ngram_ent_range),
        (not (c.max_wallclock_seconds or c.iterations or c.load_artifact), "ITERATIONS",
         "above 0 where MAX_WALLCLOCK_SECONDS is", 0),
        (c.ngram_buckets & (c.ngram_buckets - 1), "NGRAM_BUCKETS", "a power of", 2),
        (not c.ngram_primes, "NGRAM_PRIMES", "numbers; at least", 1),
        ("/" in c.run_id, "RUN_ID", "without", "'/'")]
    for failed, name, rule, bound in checks:
        if failed:
            raise RunError(f"{name}={getattr(c, name.lower())}: must be {rule} {bound}")

def help_text() -> str:
    """What --help prints: every variable with default and meaning, by section, and the recipes."""
    lines = [__doc__.strip(), "", "Variables, with defaults"]
    for f in fields(Config):
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        default = int(default) if isinstance(default, bool) else default
        lines += ["", HELP_SECTIONS[f.name]] if f.name in HELP_SECTIONS else []
        allowed = f.metadata["allowed"]
        choices = f" ({', '.join(allowed)})" if isinstance(allowed, list) else ""
        demo = f"; demo: {DEMO[f.name]}" if f.name in DEMO else ""
        names = " / ".join([f.name.upper(), *(a for a, name in ALIASES.items() if name == f.name)])
        lines.append(f"  {names}={default}{demo}\n      {f.metadata['meaning']}{choices}")
    lines += ["", "Recipes: what differs from the defaults above"]
    lines += [" ".join([f"  RECIPE={name}:", *(f"{k.upper()}={v}" for k, v in recipe.items())])
              for name, recipe in RECIPES.items()]
    idle = [f"  {name}: {reason}" for name, reason in WITHOUT_EFFECT.items()]
    return "\n".join([*lines, "", "Accepted without effect (logged)", *idle])

# ---- Runtime: ranks, log, files ------------------------------------------------------------------
FORMATS = dict(val_loss=".8f", val_bpb=".8f", train_loss=".4f", lr_scale=".3f", seconds=".1f",
               bpb=".4f", unigram_bpb=".4f", mass=".7g", max_mass=".7g", ngram_mass=".7g")

def write_atomic(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: no partial file has a final name."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None

class Run:
    """This process's place in the run: rank, device, log, and `record`, which becomes the JSON."""
    def __init__(self, cfg: Config):
        env, cuda = os.environ, cfg.device != "cpu" and torch.cuda.is_available()
        if cfg.device == "cuda" and not cuda:
            raise RunError("DEVICE=cuda: no CUDA device is available; set DEVICE=cpu")
        self.rank, self.world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.is_main, self.stage = self.rank == 0, "start"
        self.record: dict = collections.defaultdict(list)
        self.base, self.log_file = None, None
        self.device = torch.device(f"cuda:{env.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        cuda and torch.cuda.set_device(self.device)
        alone = dict(store=dist.HashStore(), rank=0, world_size=1) if self.world == 1 else {}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone,
                                timeout=timedelta(seconds=cfg.dist_timeout_seconds))
        self.agree(lambda: self.open_log(cfg))

    def open_log(self, cfg: Config) -> None:
        """Take the first free run name and open its log; existing files stay as they are."""
        folder, name, n = Path(cfg.logs_path), cfg.run_id, 1
        folder.mkdir(parents=True, exist_ok=True)
        while any(folder.glob(glob.escape(name) + ".*")):
            n += 1
            name = f"{cfg.run_id}-{n}"
        self.base = folder / name
        self.log_file = open(f"{self.base}.txt", "x", encoding="utf-8")

    def path(self, suffix: str) -> Path:
        """logs/<run_id><suffix>, on rank 0."""
        return Path(f"{self.base}{suffix}")

    def log(self, line: str) -> None:
        """One line to console and log file, on rank 0."""
        if self.is_main:
            print(line, flush=True)
            print(line, file=self.log_file, flush=True)

    def row(self, kind: str, prefix: str | None = None, **values) -> None:
        """Log `kind key:value ...` (or another prefix) and keep the values for the JSON."""
        self.record[kind].append(values)
        body = (f"{k}:{format(v, FORMATS.get(k, '')) if isinstance(v, float) else v}"
                for k, v in values.items())
        self.log(" ".join([kind if prefix is None else prefix, *body]))

    def agree(self, work, everywhere: bool = False):
        """Rank 0's work(), sent to all, or every rank's own; an error on one is raised on all."""
        own, message, all_ranks = None, None, [None] * self.world
        if everywhere or self.is_main:
            try:
                own = work()
            except (RunError, OSError) as error:
                message = str(error)
        dist.all_gather_object(all_ranks, (message, None if everywhere else own))
        for error, _ in all_ranks:
            if error:
                raise RunError(error)
        return own if everywhere else all_ranks[0][1]

    def over_ranks(self, operation, *values: float) -> list[float]:
        """Each value's maximum or mean over the ranks (float64, exchanged through the CPU)."""
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation)
        return numbers.tolist()

    def gather(self, part: Tensor, spans: list[tuple[int, int]]) -> Tensor | None:
        """Every rank's rows (span, ...) end to end, on rank 0's CPU; None on the others."""
        longest = max(b - a for a, b in spans)
        padded = torch.cat([part.cpu(), part.new_zeros(longest - len(part), device="cpu")])
        parts = [torch.empty_like(padded) for _ in spans] if self.is_main else None
        dist.gather(padded, parts, dst=0)
        return torch.cat([p[: b - a] for p, (a, b) in zip(parts, spans)]) if parts else None

    def sync(self) -> float:
        """Wait for the device; the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_memory_bytes(self) -> int:
        """Most memory this rank has held: of the CUDA device, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB

    def close(self) -> None:
        """Leave the process group and the log."""
        if self.log_file:
            self.log_file.close()
        dist.destroy_process_group()

# ---- Data: shards, tokenizer, bytes, text --------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256  # the challenge's shard format
BOS, SPACE = 1, "\u2581"  # SentencePiece writes a space as this character
FETCH = ("hf download willdepueoai/parameter-golf --repo-type dataset --local-dir . --include "
         "'datasets/*/fineweb10B_sp1024/*' 'datasets/tokenizers/*' (then point DATA_PATH and "
         "TOKENIZER_PATH there)")
TOKENIZER_TEXT_BYTES = 4_000_000  # more text changes the 1,024 pieces little and costs seconds
TEXT_RECIPE = "v1: BPE, byte fallback, identity normalization, dummy prefix"  # part of the hash
VAL_SHARE, VAL_MOST_BYTES = 0.1, 8_000_000  # of a text corpus, in whole documents

def open_shard(path: str) -> np.memmap:
    """Tokens of a shard, memory-mapped uint16 (n,). RunError if its header or size lies."""
    header, size = np.fromfile(path, "<i4", HEADER_INTS), os.path.getsize(path)
    magic, version, count = header[:3] if len(header) == HEADER_INTS else (0, 0, 0)
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise RunError(f"{path}: magic {magic} version {version}, expected {SHARD_MAGIC} version 1")
    expected = 4 * HEADER_INTS + 2 * int(count)
    if size != expected or count <= 0:
        raise RunError(f"{path}: {count} tokens need {expected} bytes, the file has {size}")
    return np.memmap(path, "<u2", "r", offset=4 * HEADER_INTS)

def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (n,) in the challenge's format."""
    numbers = [SHARD_MAGIC, SHARD_VERSION, len(tokens)]
    header = np.array(numbers + [0] * (HEADER_INTS - len(numbers)), "<i4")
    write_atomic(path, header.tobytes() + tokens.astype("<u2").tobytes())

class TokenStream:
    """The shards' tokens end to end, read cyclically; each rank checks its share of the shards."""
    def __init__(self, paths: list[str], vocab_size: int, rank: int = 0, world: int = 1):
        self.shards = [open_shard(p) for p in paths]
        self.ends = np.cumsum([len(s) for s in self.shards])
        for path, shard in list(zip(paths, self.shards))[rank::world]:
            if (top := int(shard.max())) >= vocab_size:
                raise RunError(f"{path}: token {top} at {shard.argmax()}, not below {vocab_size}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from cyclic position `start`, as int64."""
        parts = []
        while count > 0:
            start %= len(self)
            k = int(np.searchsorted(self.ends, start, side="right"))
            first = start - (self.ends[k] - len(self.shards[k]))
            parts.append(self.shards[k][first:first + count].astype(np.int64))
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

class TrainLoader:
    """Batches of the train stream; `position` (sequences drawn) is its state. Blocks of seq_len are
    visited with a stride coprime to their number, so a batch spans the whole corpus."""
    def __init__(self, stream: TokenStream, cfg: Config, run: Run):
        self.stream, self.run, self.position, self.seq_len = stream, run, 0, cfg.train_seq_len
        self.batch = cfg.train_batch_tokens // cfg.train_seq_len  # sequences a step, all ranks
        self.blocks = (len(stream) - 1) // self.seq_len
        self.stride = round(self.blocks * 0.618) or 1
        while math.gcd(self.stride, self.blocks) != 1:
            self.stride += 1

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next step, each (sequences, seq_len) int64."""
        share = self.batch // self.run.world
        first = self.position + self.run.rank * share
        blocks = [(first + i) * self.stride % self.blocks for i in range(share)]
        self.position += self.batch
        tokens = torch.from_numpy(np.stack(
            [self.stream.read(b * self.seq_len, self.seq_len + 1) for b in blocks]))
        if self.run.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.run.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

class ByteTable:
    """Per piece of a SentencePiece vocabulary, what it adds to the text: (V,) tensors. base: its
    UTF-8 bytes without a leading space sign, other space signs being a byte each. space: it has
    one, worth a byte unless the token before is a boundary: a control, unknown or unused piece."""
    def __init__(self, tokenizer):
        t, ids = tokenizer, range(tokenizer.get_piece_size())
        boundary = [t.is_control(i) or t.is_unknown(i) or t.is_unused(i) for i in ids]
        space = [t.id_to_piece(i).startswith(SPACE) and not boundary[i] for i in ids]
        base = [0 if boundary[i] else 1 if t.is_byte(i) else
                len(t.id_to_piece(i).removeprefix(SPACE).replace(SPACE, " ").encode()) for i in ids]
        self.base, self.space, self.boundary = map(torch.tensor, (base, space, boundary))

    def target_bytes(self, tokens: Tensor) -> Tensor:
        """Bytes (N,) int64 of the targets tokens[1:] of a stream (N+1,)."""
        before, target = tokens[:-1].long(), tokens[1:].long()
        return self.base[target] + (self.space[target] & ~self.boundary[before])

# What a run reads: SentencePiece processor, ByteTable, train TokenStream (None without training),
# validation stream (N+1,) int64, and `corpus`, a dictionary for the log.
Data = collections.namedtuple("Data", "tokenizer table train val corpus")

def load_tokenizer(path: str, vocab_size: int):
    """The SentencePiece processor at `path`; RunError if missing, foreign or of another size."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        size = tokenizer.get_piece_size()
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "not a SentencePiece model"
        raise RunError(f"TOKENIZER_PATH={path}: {reason}") from None
    if size != vocab_size:
        raise RunError(f"{path}: the tokenizer has {size} pieces, VOCAB_SIZE is {vocab_size}")
    return tokenizer

def vocabulary_hash(tokenizer) -> str:
    """SHA-256 over pieces and their types, in id order: equal hashes read tokens alike."""
    t, size = tokenizer, tokenizer.get_piece_size()
    return hashlib.sha256(repr([(t.id_to_piece(i), t.is_control(i), t.is_unknown(i), t.is_byte(i))
                                for i in range(size)]).encode()).hexdigest()

def python_documents() -> list[tuple[str, str]]:
    """(name, text) of the text that comes with Python: topics, docstrings of built-in modules,
    sources of the standard library (without tests, tools and character tables)."""
    import sysconfig
    documents = []
    with contextlib.suppress(ImportError):  # minimal installations leave pydoc out
        documents += sorted(importlib.import_module("pydoc_data.topics").topics.items())
    for name in sorted(set(sys.builtin_module_names) - {"__main__"}):
        docs = {getattr(m, "__doc__", 0) for m in vars(importlib.import_module(name)).values()}
        documents.append((name, "\n\n".join(sorted(d for d in docs if isinstance(d, str)))))
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings",
               "pydoc_data", "idle_test"}
    documents += [(str(path.relative_to(root)), path.read_text("utf-8", errors="ignore"))
                  for path in sorted(root.rglob("*.py"))
                  if not skipped.intersection(path.relative_to(root).parts)]
    return [(name, text) for name, text in documents if text and SPACE not in text]

def user_documents(patterns: str) -> list[tuple[str, str]]:
    """(name, text) of the globs' files; RunError if there are none or one is unfit."""
    paths = {p for pattern in patterns.split(":") if pattern
             for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)}
    if not paths:
        raise RunError(f"TEXT_FILES={patterns!r} matches no file; give globs separated by ':'")
    documents = []
    for path in sorted(paths):
        try:
            documents.append((path, Path(path).read_bytes().decode("utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        if SPACE in documents[-1][1]:
            raise RunError(f"{path}: has the character U+2581, SentencePiece's space: replace it")
    return [(name, text) for name, text in documents if text]

def cut_documents(documents: list[tuple[str, str]], least: int = 20) -> list[tuple[str, str]]:
    """Split few documents at line ends into about `least`: validation takes whole documents."""
    if len(documents) >= least:
        return documents
    size, parts = max(1, sum(len(text) for _, text in documents) // least), []
    for name, text in documents:
        while text:
            end = text.find("\n", size) + 1 or len(text)
            parts.append((f"{name}, part {len(parts)}", text[:end]))
            text = text[end:]
    return parts

def train_tokenizer(documents: list[tuple[str, str]], vocab_size: int) -> bytes:
    """A serialized BPE model with the challenge's options and identity normalization:
    decode(encode(s)) == s for every s without U+2581."""
    every = max(1, sum(len(text) for _, text in documents) // TOKENIZER_TEXT_BYTES)
    lines = [line for _, text in documents for line in text.splitlines() if line.strip()][::every]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=True, pad_id=0, bos_id=BOS, eos_id=2,
            unk_id=3, character_coverage=0.999, split_digits=True, max_sentence_length=1 << 20,
            minloglevel=2)
    except RuntimeError as error:
        raise RunError(f"the text is too small or too uniform for a tokenizer of {vocab_size} "
                       f"pieces; give more text ({str(error).splitlines()[-1]})") from None
    return model.getvalue()

def encode_documents(tokenizer, documents: list[tuple[str, str]], table: ByteTable) -> np.ndarray:
    """Tokens (uint16) of the documents, each after a BOS; every document's bytes must balance."""
    encoded = []
    for name, text in tqdm(documents, desc="tokenizing", unit="doc", disable=None):
        encoded.append(np.array([BOS, *tokenizer.encode(text)]))
        counted = int(table.target_bytes(torch.from_numpy(encoded[-1])).sum())
        if counted != (size := len(text.encode())):
            raise RunError(f"{name}: its tokens stand for {counted} bytes, its text has {size}")
    return np.concatenate(encoded)

def split_documents(documents: list[tuple[str, str]]) -> tuple[list, list]:
    """(train, validation) documents in an order drawn by their hash; whole documents only."""
    shuffled = sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).digest())
    sizes = np.cumsum([len(text) for _, text in shuffled])
    wanted = min(VAL_SHARE * sizes[-1], VAL_MOST_BYTES) if documents else 0
    count = min(int(np.searchsorted(sizes, wanted)) + 1, len(shuffled) - 1)
    if count < 1:
        raise RunError("the text has one document that cannot be split: give more text")
    return shuffled[count:], shuffled[:count]

def prepare_text(cfg: Config, run: Run) -> Path:
    """Tokenizer and shards of the text, made once; the folder, named by the text's hash."""
    started = time.perf_counter()
    documents = cut_documents(
        user_documents(cfg.text_files) if cfg.text_files else python_documents())
    digest = hashlib.sha256(repr((TEXT_RECIPE, cfg.vocab_size, documents)).encode()).hexdigest()
    folder = Path(cfg.prepared_path) / f"text_{digest[:16]}"
    if (folder / "corpus.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train, val = split_documents(documents)
    model = folder / "tokenizer.model"
    write_atomic(model, train_tokenizer(train, cfg.vocab_size))
    tokenizer = load_tokenizer(str(model), cfg.vocab_size)
    for split, part in (("train", train), ("val", val)):
        write_shard(folder / f"text_{split}_000000.bin",
                    encode_documents(tokenizer, part, ByteTable(tokenizer)))
    corpus = dict(source=cfg.text_files or "python", sha256=digest, documents=len(documents),
                  text_bytes=sum(len(t.encode()) for _, t in documents))
    write_atomic(folder / "corpus.json", json.dumps(corpus, indent=1).encode())
    run.log(f"prepared {len(documents)} documents in {folder} "
            f"({time.perf_counter() - started:.1f} s)")
    return folder

def find_shards(folder: str, split: str) -> list[str]:
    """Sorted paths of *_<split>_*.bin in a folder."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), f"*_{split}_*.bin")))

def load_data(cfg: Config, run: Run) -> Data:
    """Find or make the corpus, check it, and read the validation stream, cut to VAL_TOKENS."""
    folder, model, corpus = cfg.data_path, cfg.tokenizer_path, dict(source=cfg.data_path)
    nothing_given = folder == Config.data_path and not find_shards(folder, "val")
    if cfg.text_files or (cfg.scale == "demo" and nothing_given):
        folder = str(run.agree(lambda: prepare_text(cfg, run)))
        model = os.path.join(folder, "tokenizer.model")
        corpus = json.loads(Path(folder, "corpus.json").read_text())
    paths = {split: find_shards(folder, split) for split in ("train", "val")}
    missing = [s for s in paths if not paths[s] and (s == "val" or not cfg.load_artifact)]
    if missing:
        raise RunError(f"DATA_PATH={folder}: no *_{missing[0]}_*.bin shards there. Get the "
                       f"published ones with: {FETCH}; or set TEXT_FILES='your/text/*.txt'")
    tokenizer = load_tokenizer(model, cfg.vocab_size)
    own = cfg.vocab_size, run.rank, run.world
    train = None if cfg.load_artifact else TokenStream(paths["train"], *own)
    if train and len(train) <= cfg.train_batch_tokens:
        raise RunError(f"{folder}: {len(train)} training tokens, a step needs "
                       f"{cfg.train_batch_tokens + 1}; lower TRAIN_BATCH_TOKENS or give more text")
    val = TokenStream(paths["val"], *own)
    targets = min(len(val) - 1, cfg.val_tokens or len(val))
    usable = targets // cfg.eval_seq_len * cfg.eval_seq_len  # the challenge scores whole windows
    if not usable:
        raise RunError(f"{folder}: {targets} validation targets, a window needs EVAL_SEQ_LEN="
                       f"{cfg.eval_seq_len}; give more text or lower EVAL_SEQ_LEN")
    corpus |= dict(tokenizer=model, vocabulary_sha256=vocabulary_hash(tokenizer),
                   train_tokens=len(train) if train else 0, val_targets=usable)
    return Data(tokenizer, ByteTable(tokenizer), train, torch.from_numpy(val.read(0, usable + 1)),
                corpus)

# ---- Model ---------------------------------------------------------------------------------------
# Weight matrices in banks (matrices, rows, columns): Muon works on them whole.
BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "bigram_proj", "value_proj")
EMBEDDINGS = ("tok_emb", "bigram_emb", "value_emb")
TRAINING_ONLY = ("mtp_heads",)
ROPE_TRAINED_LEN = 1024  # windows up to this long use ROPE_BASE as it is (the submissions' rule)
BIGRAM_PRIMES = 36313, 27191  # of the submissions' bigram hash

def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """PyTorch's attention with FlashAttention's signature: q (B,Tq,H,D), k and v (B,T,Hkv,D). The
    queries are the last Tq positions of the keys' T."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask, grouped = None, q.size(1) != k.size(1)
    if q.size(2) != k.size(2):  # is_causal would align the first query with the first key
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
        mask = mask.tril(k.size(2) - q.size(2))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)

def choose_attention(cfg: Config, device: torch.device):
    """(name, function) of the best attention back end present: FlashAttention 3 (Hopper), 2, SDPA.
    RunError if the one that ATTENTION asks for is not there."""
    for name, module in (("flash3", "flash_attn_interface"), ("flash2", "flash_attn")):
        if cfg.attention in ("auto", name) and device.type == "cuda" and (
                name == "flash2" or torch.cuda.get_device_capability(device)[0] == 9):
            with contextlib.suppress(ImportError):
                return name, importlib.import_module(module).flash_attn_func
    if cfg.attention not in ("auto", "sdpa"):
        raise RunError(f"ATTENTION={cfg.attention}: not installed or not for this device; use auto")
    if device.type != "cuda":
        return "sdpa", sdpa_attention
    from torch.nn.attention import SDPBackend as B
    torch.backends.cuda.enable_cudnn_sdp(True)  # up to twice FlashAttention 2's speed on Hopper
    torch._C._set_sdp_priority_order([int(b) for b in (
        B.CUDNN_ATTENTION, B.FLASH_ATTENTION, B.EFFICIENT_ATTENTION, B.MATH)])
    return "sdpa(cuDNN,flash)", sdpa_attention

def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dim without weights."""
    return F.rms_norm(x, (x.size(-1),))

def rope_tables(length: int, base: float, dims: int, device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, 1, dims/2) float32. Long windows stretch the base (NTK scaling)."""
    if length > ROPE_TRAINED_LEN and dims > 2:
        base = base * (length / ROPE_TRAINED_LEN) ** (dims / (dims - 2))
    inverse = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
    return angles.cos()[:, None], angles.sin()[:, None]

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial RoPE: rotate the first 2·cos.size(-1) dims of x (B,T,H,D), leave the rest."""
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)

class GPT(nn.Module):
    """GPT with U-Net skips, the submissions' common trunk. Parameters are float32, computation in
    `compute_dtype`. Per-layer vectors are stacked: a layer's options are data, not branches."""
    def __init__(self, cfg: Config, attention, compute_dtype=torch.float32):
        super().__init__()
        self.cfg, self.attention, self.compute_dtype = cfg, attention, compute_dtype
        L, C, V = cfg.num_layers, cfg.model_dim, cfg.vocab_size
        kv_dim, hidden = C // cfg.num_heads * cfg.num_kv_heads, round(cfg.mlp_mult * C)
        new = lambda *shape, value=0.0: nn.Parameter(torch.full(shape, value))  # noqa: E731
        self.tok_emb = new(V, C)
        if cfg.bigram_vocab_size:
            self.bigram_emb = new(cfg.bigram_vocab_size, cfg.bigram_dim)
            self.bigram_proj = new(1, C, cfg.bigram_dim)
            self.bigram_scale = new(1, value=0.05)
        self.value_layers = {n: i for i, n in enumerate(cfg.ve_layers)} if cfg.ve_enabled else {}
        if self.value_layers:
            self.value_emb, self.value_proj = new(V, cfg.ve_dim), new(1, kv_dim, cfg.ve_dim)
            self.value_scale = new(1, value=0.1)
            self.value_layer_scale = new(len(self.value_layers), value=1.0)
        self.value_gate = new(L - 1, value=-1.5) if cfg.value_residual else None
        self.smear_gate, self.skip_weights = new(C), new(L // 2, C, value=1.0)
        self.attn_scale, self.mlp_scale = new(L, C, value=1.0), new(L, C, value=1.0)
        self.resid_mix, self.q_gain = new(L, 2, C), new(L, cfg.num_heads, value=cfg.qk_gain_init)
        self.qo_bank = new(2 * L, C, C)  # queries of layer i at i, output of layer i at L + i
        self.kv_bank = new(2 * L, kv_dim, C)  # keys at i, values at L + i
        self.mlp_up_bank, self.mlp_down_bank = new(L, hidden, C), new(L, C, hidden)
        self.mtp_heads = new(cfg.mtp_num_heads, V, C) if cfg.mtp_num_heads else None

    @torch.no_grad()
    def initialize(self, seed: int) -> GPT:
        """Orthogonal matrices, zero output projections, small embeddings. The bigram table is zero,
        its projection is not: with both at zero neither would ever get a gradient."""
        generator, L = torch.Generator().manual_seed(seed), self.cfg.num_layers
        stds = dict(tok_emb=self.cfg.tied_embed_init_std, value_emb=0.01)
        for name, p in self.named_parameters():
            if name in stds:
                p.copy_(torch.empty(p.shape).normal_(0.0, stds[name], generator=generator))
            elif name in BANKS and name != "mlp_down_bank":
                for i in range(L if name == "qo_bank" else len(p)):
                    p[i] = nn.init.orthogonal_(torch.empty(p[i].shape), generator=generator)
        self.resid_mix[:, 0] = 1.0
        return self

    def weights(self, qat: bool) -> dict[str, Tensor]:
        """Parameters as the forward pass uses them: fake-quantized if `qat`, in compute_dtype."""
        named = dict(self.named_parameters())
        if qat:
            named = {n: fake_quantize(p, code_limit(n, self.cfg)) if n in BANKS + EMBEDDINGS else p
                     for n, p in named.items()}
        return {n: p.to(self.compute_dtype) for n, p in named.items()}

    def embed(self, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """x0 (B,T,C): token and bigram embedding, RMSNorm, smear gate."""
        x = F.embedding(tokens, w["tok_emb"])
        if "bigram_emb" in w:
            first, second = BIGRAM_PRIMES
            index = (first * tokens[:, 1:] ^ second * tokens[:, :-1]) % (len(w["bigram_emb"]) - 1)
            index = F.pad(index, (1, 0), value=len(w["bigram_emb"]) - 1)
            bigram = F.linear(F.embedding(index, w["bigram_emb"]), w["bigram_proj"][0])
            x = x + w["bigram_scale"] * bigram
        x = norm(x)
        return torch.lerp(x, F.pad(x, (0, 0, 1, -1)), w["smear_gate"].sigmoid())

    def trunk(self, w: dict[str, Tensor], tokens: Tensor, last: int) -> Tensor:
        """Normed final states (B,last,C) of the last positions of tokens (B,T). The only walk over
        the blocks. In the last block only keys and values see all T positions."""
        cfg, T = self.cfg, tokens.size(1)
        x = x0 = self.embed(w, tokens)
        tables = rope_tables(T, cfg.rope_base, cfg.rope_dims, tokens.device)
        value_embedding, first_values, skips = None, None, []
        if self.value_layers:
            value_embedding = w["value_scale"] * F.linear(F.embedding(tokens, w["value_emb"]),
                                                          w["value_proj"][0])
        half = cfg.num_layers // 2
        for i in range(cfg.num_layers):
            if skips and i >= half:  # with an odd number of blocks the last one has no skip
                x = x + w["skip_weights"][i - half] * skips.pop()
            x = w["resid_mix"][i, 0] * x + w["resid_mix"][i, 1] * x0
            y, values = self.attend(w, i, x, tables, value_embedding, first_values,
                                    last if i == cfg.num_layers - 1 else T)
            first_values = values if first_values is None else first_values
            x = x[:, -y.size(1):] + w["attn_scale"][i] * y
            hidden = F.linear(norm(x) * self.ln_scale(i), w["mlp_up_bank"][i])
            hidden = F.leaky_relu(hidden, cfg.relu_slope).square()
            x = x + w["mlp_scale"][i] * F.linear(hidden, w["mlp_down_bank"][i])
            skips += [x] if i < half else []
        return norm(x)

    def ln_scale(self, layer: int) -> float:
        """Factor on a block's normed inputs."""
        return 1 / math.sqrt(layer + 1) if self.cfg.ln_scale else 1.0

    def attend(self, w, i: int, x: Tensor, tables, value_embedding, first_values, last: int):
        """Attention of block i: output (B,last,C) at the last positions, raw values (B,T,·)."""
        cfg, L, (B, T, C) = self.cfg, self.cfg.num_layers, x.shape
        D = C // cfg.num_heads
        cos, sin = (t.to(x.dtype) for t in tables)
        h = norm(x) * self.ln_scale(i)
        q = F.linear(h[:, T - last:], w["qo_bank"][i]).view(B, last, cfg.num_heads, D)
        k = F.linear(h, w["kv_bank"][i]).view(B, T, cfg.num_kv_heads, D)
        raw = v = F.linear(h, w["kv_bank"][L + i])
        if i in self.value_layers:
            v = v + w["value_layer_scale"][self.value_layers[i]] * value_embedding
        if cfg.value_residual and first_values is not None:
            v = torch.lerp(v, first_values, w["value_gate"][i - 1].sigmoid())
        v = v.view(B, T, cfg.num_kv_heads, D)
        q = rotate(norm(q), cos[T - last:], sin[T - last:]) * w["q_gain"][i][:, None]
        y = self.attention(q, rotate(norm(k), cos, sin), v, causal=True)
        if i >= L - cfg.xsa_last_n:
            y = exclude_own_value(y, v[:, T - last:])
        return F.linear(y.reshape(B, last, C), w["qo_bank"][L + i]), raw

    def softcap(self, logits: Tensor) -> Tensor:
        """float32 logits within ±logit_softcap."""
        return self.cfg.logit_softcap * torch.tanh(logits.float() / self.cfg.logit_softcap)

    def logits(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Logits (B,last,V) float32 of the last positions (default: all) of tokens (B,T) int64."""
        w = self.weights(False)
        x = self.trunk(w, tokens, last or tokens.size(1))
        return self.softcap(F.linear(x, w["tok_emb"]))

    def forward(self, tokens: Tensor, targets: Tensor, qat: bool = False) -> tuple[Tensor, Tensor]:
        """(loss to minimize, cross-entropy in nats per token) for tokens and targets (B,T)."""
        w = self.weights(qat)
        x = self.trunk(w, tokens, tokens.size(1))
        loss = main = self.cross_entropy(x, w["tok_emb"], targets)
        if "mtp_heads" in w:  # head k predicts the token k + 2 places after its position
            extra = [self.cross_entropy(x[:, :-k - 1], w["mtp_heads"][k], targets[:, k + 1:])
                     for k in range(self.cfg.mtp_num_heads)]
            loss = loss + self.cfg.mtp_loss_weight * torch.stack(extra).mean()
        return loss, main.detach()

    def cross_entropy(self, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the softcapped logits x @ headᵀ."""
        return F.cross_entropy(self.softcap(F.linear(x, head)).flatten(0, 1), targets.flatten())

def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: y (B,T,H,D) less each head's projection on the normalized value v (B,T,Hkv,D) of its own
    position (exclusive self-attention, as in the submissions)."""
    grouped = y.unflatten(2, (v.size(2), -1))  # (B,T,Hkv,H/Hkv,D)
    direction = F.normalize(v, dim=-1).unsqueeze(3)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)

# ---- Optimizers ----------------------------------------------------------------------------------
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # Muon's quintic coefficients (Keller Jordan, 2024)

def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """Roughly the orthogonal factor of each matrix of g (M,rows,cols): singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(torch.bfloat16 if g.is_cuda else g.dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)

class BankShard:
    """The matrices of a bank that this rank updates: an equal run for each rank, zero-padded."""
    def __init__(self, bank: nn.Parameter, run: Run):
        self.bank, self.run = bank, run
        size = -(-len(bank) // run.world)
        self.full = torch.zeros(size * run.world, *bank.shape[1:], device=bank.device)
        self.grad, self.momentum, self.shard = torch.zeros(3, *self.full[:size].shape,
                                                           device=bank.device)

    def reduce(self) -> None:
        """Start averaging the gradient over ranks into `grad` (reduce-scatter)."""
        self.full[: len(self.bank)] = self.bank.grad
        self.work = reduce_scatter(self.grad, self.full, dist.ReduceOp.AVG, async_op=True)

    def update(self, cfg: Config, lr: float, momentum: float) -> None:
        """Muon on the shard, then start sending it to every rank (all-gather)."""
        self.momentum.mul_(momentum).add_(self.grad)
        direction = newton_schulz(self.grad.add(self.momentum, alpha=momentum),  # Nesterov
                                  cfg.muon_backend_steps)
        self.full[: len(self.bank)] = self.bank.data
        self.shard.copy_(self.full.view(self.run.world, *self.shard.shape)[self.run.rank])
        scale = max(1, direction.size(-2) / direction.size(-1)) ** 0.5
        self.shard.mul_(1 - lr * cfg.muon_wd).add_(direction, alpha=-lr * scale)
        self.work = all_gather(self.full, self.shard, async_op=True)

def parameter_groups(model: GPT, cfg: Config) -> tuple[list[nn.Parameter], list[dict]]:
    """(banks for Muon, largest first; groups for AdamW); every parameter in one (asserted)."""
    lrs = dict.fromkeys(EMBEDDINGS, cfg.tied_embed_lr) | dict(mtp_heads=cfg.head_lr)
    banks, by_lr = [], collections.defaultdict(list)
    for name, p in model.named_parameters():
        (banks if name in BANKS else by_lr[lrs.get(name, cfg.scalar_lr)]).append(p)
    groups = [dict(params=params, lr=lr, base_lr=lr) for lr, params in by_lr.items()]
    owned = [id(p) for p in banks + [p for g in groups for p in g["params"]]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    return sorted(banks, key=lambda p: -p.numel()), groups

class Optimizer:
    """Muon on banks, sharded over ranks, and AdamW on the rest; data parallel without DDP."""
    def __init__(self, model: GPT, cfg: Config, run: Run):
        self.cfg, self.run = cfg, run
        banks, groups = parameter_groups(model, cfg)
        self.banks = [BankShard(p, run) for p in banks]
        self.small = [p for g in groups for p in g["params"]]
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                                      weight_decay=cfg.adam_wd, fused=run.device.type == "cuda")

    def reduce_gradients(self) -> Tensor:
        """Average all gradients over ranks; the global norm () of the averaged gradient."""
        for bank in self.banks:
            bank.reduce()
        grads = [p.grad for p in self.small]
        flat = torch.cat([g.flatten() for g in grads])  # one all-reduce for all small ones
        dist.all_reduce(flat, dist.ReduceOp.AVG)
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])
        for bank in self.banks:
            bank.work.wait()
        shards = [bank.grad for bank in self.banks]
        parts = shards + grads if self.run.is_main else shards  # each element counted once
        square = torch.stack(torch._foreach_norm(parts)).square().sum()
        dist.all_reduce(square)
        return square.sqrt()

    def step(self, lr_scale: float, momentum: float) -> None:
        """One update from the gradients in .grad, which it clears."""
        norm_ = self.reduce_gradients()
        if self.cfg.grad_clip_norm:
            clip = (self.cfg.grad_clip_norm / (norm_ + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([b.grad for b in self.banks] + [p.grad for p in self.small], clip)
        for bank in self.banks:  # a bank travels while the next one is orthogonalized
            bank.update(self.cfg, self.cfg.matrix_lr * lr_scale, momentum)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for bank in self.banks:
            bank.work.wait()
            bank.bank.data.copy_(bank.full[: len(bank.bank)])
        for p in [b.bank for b in self.banks] + self.small:
            p.grad = None

# ---- Training ------------------------------------------------------------------------------------
MICRO_BATCH_TOKENS = 98304  # one of eight ranks' share of the challenge's step
DEFAULT_HANDLERS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

class WeightAverage:
    """Average of the weights, which is exported: mass <- decay*mass + 1; average += (weights -
    average)/mass. Decay 1 is the mean of the samples (SWA), below 1 a bias-corrected EMA."""
    def __init__(self, model: GPT, cfg: Config):
        self.cfg, self.mass, self.samples = cfg, 0.0, 0
        self.params = [p.data for p in model.parameters()]
        self.average = [p.clone() for p in self.params]

    def update(self, before: float, after: float, lr_scale: float) -> None:
        """Take the weights in, progress having gone from `before` to `after`, in [0, 1]."""
        cfg, steps = self.cfg, [x * self.cfg.schedule_steps for x in (before, after)]
        if cfg.averaging == "swa":
            due = steps[0] // cfg.swa_every != steps[1] // cfg.swa_every or not self.samples
            due, decay = due and cfg.swa_enabled and lr_scale < 0.5, 1.0
        else:
            due, decay = cfg.averaging == "ema", cfg.ema_decay ** (steps[1] - steps[0])
        if due:
            self.mass = decay * self.mass + 1
            self.samples += 1
            torch._foreach_lerp_(self.average, self.params, 1 / self.mass)

class Trainer:
    """Training under a wall-clock cap; the clock counts steps only, not validation or logging.
    SIGTERM or Ctrl-C finishes the step and goes on to export; a second one exits."""
    def __init__(self, model: GPT, data: Data, cfg: Config, run: Run):
        self.model, self.data, self.cfg, self.run = model, data, cfg, run
        self.loader, self.forward = TrainLoader(data.train, cfg, run), compiled(model, cfg, run)
        self.elapsed, self.steps, self.last_loss, self.stopping = 0.0, 0, math.nan, False
        self.recent: collections.deque = collections.deque(maxlen=20)  # step times in seconds
        self.micro = micro_batch_tokens(cfg, run.world) // cfg.train_seq_len  # sequences

    def lr_scale(self, progress: float) -> float:
        """1, then linear to 0 over the warmdown; `progress` of the run in [0, 1]."""
        warmdown = min(1.0, self.cfg.warmdown_iters / self.cfg.schedule_steps)
        return min(1.0, (1 - progress) / warmdown) if warmdown else 1.0

    def momentum(self, progress: float) -> float:
        """Muon's momentum, warmed up linearly."""
        cfg, done = self.cfg, progress * self.cfg.schedule_steps
        part = min(1.0, done / max(1, cfg.muon_momentum_warmup_steps))
        return (1 - part) * cfg.muon_momentum_warmup_start + part * cfg.muon_momentum

    def qat(self, progress: float) -> bool:
        """Whether the forward pass is fake-quantized."""
        return self.cfg.qat_enabled or self.lr_scale(progress) < self.cfg.late_qat_threshold

    def progress(self) -> float:
        """Part of the run that is done, by time if there is a cap, else by steps."""
        cap, by_steps = self.cfg.max_wallclock_seconds, self.steps / max(1, self.cfg.iterations)
        return max(by_steps, min(1.0, self.elapsed / cap)) if cap else by_steps

    def gradients(self, qat: bool) -> Tensor:
        """Accumulate this rank's gradient of the next batch; its mean loss () in nats per token."""
        inputs, targets = self.loader.next_batch()
        batches = list(zip(inputs.split(self.micro), targets.split(self.micro)))
        total = torch.zeros((), device=self.run.device)
        for tokens, wanted in batches:
            loss, nats = self.forward(tokens, wanted, qat)
            (loss / len(batches)).backward()
            total += nats / len(batches)
        return total

    def warm_up(self) -> None:
        """Compile and run steps, with and without QAT if both will come, then put back weights and
        data position; the optimizer of these steps is thrown away."""
        started, saved = self.run.sync(), [p.detach().clone() for p in self.model.parameters()]
        kinds = sorted({self.qat(0.0), self.qat(1.0)})
        optimizer = Optimizer(self.model, self.cfg, self.run)
        for step in range(self.cfg.warmup_steps):
            self.gradients(kinds[step % len(kinds)])
            optimizer.step(1.0, self.cfg.muon_momentum)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), saved)
        self.loader.position = 0
        self.run.row("warmup", steps=self.cfg.warmup_steps, seconds=self.run.sync() - started)

    def request_stop(self, number: int, _frame) -> None:
        """Signal handler: stop after this step; the next signal acts as it does by default."""
        self.stopping = True
        signal.signal(number, DEFAULT_HANDLERS[number])

    def may_continue(self) -> bool:
        """Whether another step starts, the same answer on every rank: it must end under the cap."""
        self.elapsed, slowest, stopping = self.run.over_ranks(
            dist.ReduceOp.MAX, self.elapsed, max(self.recent, default=0.0), float(self.stopping))
        if stopping:
            self.run.log(f"stop requested: training ends after {self.steps} steps")
        cap = self.cfg.max_wallclock_seconds
        fits = not cap or self.elapsed + 1.1 * slowest <= cap
        return bool(fits and self.steps < self.cfg.iterations and not stopping)

    def train(self) -> None:
        """The loop; leaves the averaged weights in the model."""
        self.warm_up()
        for number in DEFAULT_HANDLERS:
            signal.signal(number, self.request_stop)
        average = WeightAverage(self.model, self.cfg)
        optimizer, now = Optimizer(self.model, self.cfg, self.run), 0.0
        while self.may_continue():  # ranks agree on the time here, and so on `now`
            before, now, started = now, self.progress(), self.run.sync()
            loss = self.gradients(self.qat(now))
            optimizer.step(self.lr_scale(now), self.momentum(now))
            average.update(before, now, self.lr_scale(now))
            self.steps += 1
            self.recent.append(self.run.sync() - started)
            self.elapsed += self.recent[-1]
            self.report(before, now, loss.item())
        for number, handler in DEFAULT_HANDLERS.items():
            signal.signal(number, handler)
        if average.samples:
            torch._foreach_copy_(average.params, average.average)
        self.run.row("trained", steps=self.steps, train_seconds=round(self.elapsed, 3),
                     tokens=self.steps * self.cfg.train_batch_tokens, samples=average.samples,
                     averaged=self.cfg.averaging if average.samples else "none",
                     averaged_steps=round(average.mass, 1),
                     peak_memory_bytes=self.run.peak_memory_bytes())

    def report(self, before: float, now: float, loss: float) -> None:
        """Log and validate where due between two times of progress; RunError if the loss is NaN."""
        loss = self.run.over_ranks(dist.ReduceOp.AVG, loss)[0]
        if not math.isfinite(loss):
            raise RunError(f"step {self.steps}: the loss is not finite (last finite loss "
                           f"{self.last_loss:.4f}); lower MATRIX_LR, SCALAR_LR or GRAD_CLIP_NORM")
        self.last_loss = loss
        def due(every: int) -> bool:
            marks = [x * self.cfg.schedule_steps // (every or 1) for x in (before, now)]
            return bool(every) and marks[0] != marks[1]
        if due(self.cfg.train_log_every) or self.steps == 1:
            average, tokens = self.elapsed / self.steps, self.cfg.train_batch_tokens
            self.log_step("train", train_loss=self.last_loss, lr_scale=self.lr_scale(now),
                          qat=int(self.qat(now)), step_avg=f"{1000 * average:.2f}ms",
                          tokens_per_second=round(tokens / average))
        if due(self.cfg.val_loss_every):
            self.validate()

    def validate(self) -> None:
        """Validation loss of the present weights on windows that do not overlap."""
        self.log_step("validation", **neural_score(self.model, self.data, self.cfg, self.run))

    def log_step(self, kind: str, **values) -> None:
        """A line that begins with step:done/most."""
        values["train_time"] = f"{1000 * self.elapsed:.0f}ms"
        self.run.row(kind, f"step:{self.steps}/{self.cfg.iterations}", **values)
        self.run.record[kind][-1]["step"] = self.steps

def micro_batch_tokens(cfg: Config, world: int) -> int:
    """Tokens of one forward pass on one rank; RunError if the step cannot be divided so."""
    sequences, rest = divmod(cfg.train_batch_tokens // cfg.train_seq_len, world)
    if rest or not sequences:
        raise RunError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: its "
                       f"{cfg.train_batch_tokens // cfg.train_seq_len} sequences of "
                       f"{cfg.train_seq_len} do not divide among {world} ranks")
    share = sequences * cfg.train_seq_len
    if cfg.micro_batch_tokens and share % cfg.micro_batch_tokens:
        raise RunError(f"MICRO_BATCH_TOKENS={cfg.micro_batch_tokens}: must divide a rank's {share}")
    most = max(1, (cfg.micro_batch_tokens or MICRO_BATCH_TOKENS) // cfg.train_seq_len)
    return cfg.train_seq_len * max(n for n in range(1, most + 1) if sequences % n == 0)

def compiled(function, cfg: Config, run: Run):
    """torch.compile where it is wanted: whole graphs of fixed shapes."""
    if cfg.compile == "0" or (cfg.compile == "auto" and run.device.type != "cuda"):
        return function
    import torch._inductor.config as inductor
    # 6 ms a step slower here, and silently wrong gradients (pytorch issues 179494, 193061)
    inductor.triton.mix_order_reduction = False
    return torch.compile(function, dynamic=False, fullgraph=True)

def build_model(cfg: Config, run: Run) -> GPT:
    """The initialized model on the run's device."""
    name, attention = choose_attention(cfg, run.device)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    model = GPT(cfg, attention, dtype).initialize(cfg.seed).to(run.device)
    run.row("model", parameters=sum(p.numel() for p in model.parameters()), attention=name,
            compute=str(dtype).removeprefix("torch."))
    return model

# ---- Quantization and artifact -------------------------------------------------------------------
# A matrix or embedding is stored as a float16 step per row and integer codes -q...q, q =
# 2^(bits-1) - 1; everything else as float16. Per row the clip is the one of CLIP_QUANTILES of |w|
# with the least squared error. "ans" codes groups of rows of like spread, each with its own
# histogram (asymmetric numeral systems, Duda 2009); "zstd" and "lzma" compress one byte a code.
# File: magic, version, header size, SHA-256 of the rest, JSON header, one compressed section
# (steps, float16 values, then codes or ANS side information), ANS words.

CLIP_QUANTILES = 0.999, 0.9995, 0.9999, 1.0  # after #889's per-row search
MAGIC, VERSION = b"GOLFINT6", 1
PREFIX = struct.Struct("<8sHI32s")
ANS_CLUSTERS = 16  # a code width's groups of rows; DESIGN's measurement
SYMBOLS = 255  # codes of 8 bits, -127...127; narrower codes use the middle
HALF_MIN, HALF_MAX = 6.104e-05, 65504.0  # float16's normal range

def code_limit(name: str, cfg: Config) -> int:
    """Largest code q of a tensor: 31 for 6 bits, 15 for 5, 127 for 8; 0: kept as float16."""
    if name not in BANKS + EMBEDDINGS:
        return 0
    return 2 ** ((cfg.embed_bits if name in EMBEDDINGS else cfg.matrix_bits) - 1) - 1

def row_steps(w: Tensor, limit: int, floor: float = 0.0) -> Tensor:
    """Step (...,1), a float16 number, of each row of w (...,cols): its best clip over `limit`.
    floor: least clip as a multiple of the row's root mean square (rate control)."""
    magnitudes = w.abs().sort(dim=-1).values
    least = floor * w.square().mean(-1, keepdim=True).sqrt() if floor else torch.zeros(())
    steps, errors = [], []
    for quantile in CLIP_QUANTILES:
        clip = magnitudes[..., math.ceil(quantile * (w.size(-1) - 1)), None].maximum(least)
        steps.append((clip / limit).clamp(HALF_MIN, HALF_MAX).half().float())
        error = w - round_codes(w, steps[-1], limit) * steps[-1]
        errors.append(error.square().sum(-1, keepdim=True))
    return torch.cat(steps, -1).gather(-1, torch.cat(errors, -1).argmin(-1, keepdim=True))

def round_codes(w: Tensor, step: Tensor, limit: int) -> Tensor:
    """Integer-valued codes within +-limit, shaped like w."""
    return (w / step).round().clamp(-limit, limit)

def fake_quantize(w: Tensor, limit: int) -> Tensor:
    """w as the artifact will store it; gradients pass straight through (STE)."""
    with torch.no_grad():
        step = row_steps(w, limit)
        error = round_codes(w, step, limit) * step - w
    return w + error

class Stored(collections.namedtuple("Stored", "shape limit steps codes")):
    """A tensor as stored: float16 steps (rows,) and int8 codes (rows,cols), or only float16 values
    in `steps` if limit is 0."""
    def tensor(self) -> Tensor:
        """float32, of `shape`."""
        steps = torch.from_numpy(self.steps.astype(np.float32))
        codes = torch.from_numpy(self.codes.astype(np.float32)) if self.limit else torch.ones(1)
        return (codes * (steps[:, None] if self.limit else steps)).view(self.shape)

def quantize(weights: dict[str, Tensor], cfg: Config, floor: float = 0.0) -> dict[str, Stored]:
    """Every exported tensor (MTP heads stay behind), by name; RunError on NaN or infinity."""
    out = {}
    for name in sorted(weights.keys() - set(TRAINING_ONLY)):
        w, limit = weights[name].detach().float().cpu(), code_limit(name, cfg)
        if not torch.isfinite(w).all():
            raise RunError(f"weights: {name} has NaN or infinite values; nothing can be exported")
        steps, codes = w.clamp(-HALF_MAX, HALF_MAX), None
        if limit:
            w = w.view(-1, w.size(-1))
            steps = row_steps(w, limit, floor)
            codes = round_codes(w, steps, limit).to(torch.int8).numpy()
        out[name] = Stored(tuple(weights[name].shape), limit, steps.flatten().half().numpy(), codes)
    return out

def compress(data: bytes, method: str) -> bytes:
    """zstd level 22 or lzma preset 9."""
    return zstandard.compress(data, 22) if method == "zstd" else lzma.compress(
        data, preset=9 | lzma.PRESET_EXTREME)

def decompress(data: bytes, method: str, most: int) -> bytes:
    """Inverse of compress; RunError on damage or more than `most` bytes."""
    try:
        plain = lzma.LZMADecompressor(memlimit=1 << 30).decompress(data, most + 1) if (
            method == "lzma") else zstandard.ZstdDecompressor().stream_reader(data).read(most + 1)
    except (lzma.LZMAError, zstandard.ZstdError, EOFError):
        raise RunError(f"artifact: its {method} section is damaged") from None
    if len(plain) > most:
        raise RunError(f"artifact: its {method} section is larger than the network's {most} bytes")
    return plain

def coding_order(clusters: np.ndarray, rows: list[int]) -> list[tuple[int, int, np.ndarray]]:
    """(tensor, cluster, rows) of each run coded with one histogram; clusters of all rows."""
    owns = np.split(clusters, np.cumsum(rows)[:-1])
    return [(i, int(c), np.flatnonzero(own == c)) for i, own in enumerate(owns)
            for c in np.unique(own)]

def ans_models(histograms: np.ndarray) -> list:
    """constriction's entropy models of histograms uint16 (clusters, SYMBOLS)."""
    weights = histograms + 2.0**-10  # a cluster without rows is still a distribution
    shares = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return [constriction.stream.model.Categorical(row, perfect=False) for row in shares]

def ans_encode(codes: list[np.ndarray], limits: list[int]) -> tuple[bytes, bytes]:
    """(side information: cluster of each row, histograms; words: the compressed codes)."""
    limit = np.concatenate([np.full(len(c), q) for c, q in zip(codes, limits)])
    spread = np.concatenate([c.astype(np.float32).std(1) for c in codes])
    clusters = np.zeros(len(limit), np.uint8)
    for k, q in enumerate(sorted(set(limits))):  # ANS_CLUSTERS equal groups of like spread
        rank = spread[limit == q].argsort(kind="stable").argsort(kind="stable")
        clusters[limit == q] = k * ANS_CLUSTERS + rank * ANS_CLUSTERS // len(rank)
    order = coding_order(clusters, [len(c) for c in codes])
    runs = [codes[i][rows].ravel().astype(np.int32) + SYMBOLS // 2 for i, _, rows in order]
    counts = np.zeros((int(clusters.max()) + 1, SYMBOLS), np.int64)
    for (_, c, _), run in zip(order, runs):
        counts[c] += np.bincount(run, minlength=SYMBOLS)
    scaled = np.ceil(counts * (65535 / counts.max(1, keepdims=True).clip(1)))
    histograms = scaled.clip(max=65535).astype("<u2")
    models, coder = ans_models(histograms), constriction.stream.stack.AnsCoder()
    for (_, c, _), run in reversed(list(zip(order, runs))):  # a stack: last in, first out
        coder.encode_reverse(run, models[c])
    return clusters.tobytes() + histograms.tobytes(), coder.get_compressed().astype("<u4").tobytes()

def ans_decode(side: bytes, words: bytes, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Inverse of ans_encode for int8 code arrays of the given (rows, cols); RunError on damage."""
    rows = sum(r for r, _ in shapes)
    clusters, histograms = np.frombuffer(side[:rows], np.uint8), side[rows:]
    if len(histograms) != 2 * SYMBOLS * (int(clusters.max()) + 1) or len(words) % 4 or (
            words and not any(words[-4:])):  # no encoder ends with a zero word
        raise RunError("artifact: the sizes of its code sections do not fit the network")
    models = ans_models(np.frombuffer(histograms, "<u2").reshape(-1, SYMBOLS))
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    codes = [np.zeros(shape, np.int8) for shape in shapes]
    for i, c, own in coding_order(clusters, [r for r, _ in shapes]):
        symbols = coder.decode(models[c], len(own) * shapes[i][1])
        codes[i][own] = symbols.reshape(len(own), -1) - SYMBOLS // 2
    return codes

def tensor_table(cfg: Config) -> list[list]:
    """[name, shape, limit] of every exported tensor of the architecture, by name; no memory."""
    with torch.device("meta"):
        model = GPT(replace(cfg, mtp_num_heads=0), None)
    return [[n, list(p.shape), code_limit(n, cfg)] for n, p in sorted(model.named_parameters())]

def pack(tensors: dict[str, Stored], cfg: Config, vocabulary: str) -> bytes:
    """The artifact, with COMPRESSOR; `vocabulary` is the hash of the network's tokenizer."""
    if cfg.compressor == "auto":
        return min((pack(tensors, replace(cfg, compressor=c), vocabulary)
                    for c in ("ans", "zstd", "lzma")), key=len)
    coded = [t for t in tensors.values() if t.limit]
    plain, words = b"".join(t.steps.astype("<f2").tobytes() for t in tensors.values()), b""
    if cfg.compressor == "ans":
        side, words = ans_encode([t.codes for t in coded], [t.limit for t in coded])
        section = compress(plain + side, "lzma")
    else:  # one byte a code: packing bits before a dictionary coder costs 12 % (#1649)
        section = compress(plain + b"".join(t.codes.tobytes() for t in coded), cfg.compressor)
    header = json.dumps(dict(
        architecture={name: getattr(cfg, name) for name in ARCHITECTURE}, vocabulary=vocabulary,
        compressor=cfg.compressor, tensors=tensor_table(cfg), section_bytes=len(section)),
        sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(header + section + words).digest()
    return PREFIX.pack(MAGIC, VERSION, len(header), digest) + header + section + words

def read_header(blob: bytes, cfg: Config) -> tuple[dict, bytes, Config]:
    """(header, payload, cfg with the artifact's architecture), each checked; RunError if wrong."""
    magic, version, size, digest = PREFIX.unpack_from(blob.ljust(PREFIX.size, b"\0"))
    body = blob[PREFIX.size:]
    if (magic, version) != (MAGIC, VERSION):
        raise RunError(f"artifact: not one of this program's, or format version {version} of it "
                       f"(this program reads {VERSION})")
    if size > len(body) or hashlib.sha256(body).digest() != digest:
        raise RunError("artifact: truncated or damaged (its SHA-256 does not match)")
    kinds = {f.name: f for f in fields(Config)}
    try:
        header, values = json.loads(body[:size]), {}
        for name in ARCHITECTURE:
            text, kind = str(header["architecture"][name]).strip("[]"), kinds[name]
            values[name] = parse_value(name, text, kind.type, kind.metadata["allowed"])
        cfg = replace(cfg, **values)
        check_config(cfg)
        table, vocabulary = tensor_table(cfg), str(header["vocabulary"])
        assert header["tensors"] == table and header["compressor"] in ("ans", "zstd", "lzma")
        assert type(header["section_bytes"]) is int and vocabulary
        assert 0 <= header["section_bytes"] <= len(body) - size
    except (ValueError, KeyError, TypeError, AssertionError, RunError, RuntimeError, OverflowError):
        raise RunError("artifact: its header describes none of this program's networks") from None
    return header, body[size:], cfg

def unpack(blob: bytes, cfg: Config, vocabulary: str) -> tuple[Config, dict[str, Stored]]:
    """(cfg with the artifact's architecture, its tensors by name); RunError for any other file.
    Executes nothing, and allocates no more than the network's own shapes need."""
    header, payload, cfg = read_header(blob, cfg)
    if header["vocabulary"] != vocabulary:
        raise RunError("artifact: made with another vocabulary than this tokenizer's")
    shapes = {name: (math.prod(shape[:-1]), shape[-1]) for name, shape, _ in header["tensors"]}
    limits = {name: limit for name, _, limit in header["tensors"]}
    halves = {n: r if limits[n] else r * c for n, (r, c) in shapes.items()}
    coded, ans = [shapes[n] for n in shapes if limits[n]], header["compressor"] == "ans"
    rows, cells = sum(r for r, _ in coded), sum(r * c for r, c in coded)
    floats = 2 * sum(halves.values())
    section, words = np.split(np.frombuffer(payload, np.uint8), [header["section_bytes"]])
    plain = decompress(section.tobytes(), "lzma" if ans else header["compressor"],
                       floats + (rows + 512 * SYMBOLS if ans else cells))
    if len(plain) < floats + (rows if ans else cells):
        raise RunError("artifact: its section is shorter than the network")
    ends = np.cumsum([r * c for r, c in coded])
    codes = ans_decode(plain[floats:], words.tobytes(), coded) if ans else (
        np.split(np.frombuffer(plain[floats:], np.int8), ends))
    steps = np.split(np.frombuffer(plain[:floats], "<f2"), np.cumsum(list(halves.values())))
    if not all(np.isfinite(s).all() for s in steps):
        raise RunError("artifact: it holds NaN or infinite numbers")
    rest = iter(codes)
    return cfg, {name: Stored(tuple(shape), limit, step, next(rest).reshape(shapes[name])
                              if limit else None)
                 for (name, shape, limit), step in zip(header["tensors"], steps)}

def export(model: GPT, data: Data, cfg: Config, run: Run) -> bytes:
    """The artifact of the model's weights. If the best clips do not fit the budget, the least clip,
    a multiple of the row's RMS, is raised by bisection on exact sizes."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    budget, low, high, floor = cfg.artifact_bytes - code_bytes(), 0.0, 64.0, 0.0
    blob = pack(quantize(weights, cfg), cfg, data.corpus["vocabulary_sha256"])
    for _ in range(12 if len(blob) > budget else 0):  # to 64/2^12 = 0.016 of the RMS
        middle = (low + high) / 2
        trial = pack(quantize(weights, cfg, middle), cfg, data.corpus["vocabulary_sha256"])
        low, high = (low, middle) if len(trial) <= budget else (middle, high)
        if len(trial) <= budget or len(trial) < len(blob):
            blob, floor = trial, middle
    bits = 8 * len(blob) / sum(math.prod(shape) for _, shape, _ in tensor_table(cfg))
    run.row("artifact", artifact_bytes=len(blob), code_bytes=code_bytes(), clip_floor=floor,
            compressor=cfg.compressor, bits_per_parameter=round(bits, 3))
    return blob

def code_bytes() -> int:
    """Bytes of this file: all the code there is."""
    return os.path.getsize(__file__)

# ---- Windows and neural pass ---------------------------------------------------------------------
def windows(num_targets: int, seq_len: int, stride: int):
    """Yield (start, first_scored, end): windows of seq_len inputs whose spans [first_scored, end)
    tile the targets [0, num_targets). The first window scores all its targets, each next one its
    last `stride`, a remainder is scored by a window shifted back. Target i is token i + 1."""
    end = min(seq_len, num_targets)
    yield 0, 0, end
    while end < num_targets:
        first, end = end, min(end + stride, num_targets)
        yield max(0, end - seq_len), first, end

class Grid:
    """Windows in batches of one shape, the same for any number of ranks. Batch 0 is the first
    window; the others have `batch` windows that score their last `last` targets. table: (windows,3)
    int64 of start, first_scored, end. spans: each rank's targets [start, end), possibly none."""
    def __init__(self, num_targets: int, cfg: Config, stride: int, world: int):
        table = windows(num_targets, cfg.eval_seq_len, stride)
        self.table, self.last = torch.tensor(list(table)), stride
        self.batch = cfg.eval_batch_windows if stride < cfg.eval_seq_len else max(
            1, cfg.val_batch_size // 8 // cfg.eval_seq_len)
        count = 1 + -(-(len(self.table) - 1) // self.batch)
        cuts = [count * r // world for r in range(world + 1)]
        self.batches = [range(a, b) for a, b in zip(cuts, cuts[1:])]
        ends = [int(self.table[min((c - 1) * self.batch, len(self.table) - 1), 2]) if c else 0
                for c in cuts]
        self.spans = list(zip(ends, ends[1:]))

    def rows(self, index: int) -> Tensor:
        """Windows (1 or batch, 3) of a batch; the last one is filled up with empty spans."""
        first = 1 + (index - 1) * self.batch
        rows = self.table[first:first + self.batch] if index else self.table[:1]
        filler = self.table[-1:, [0, 2, 2]].expand(self.batch - len(rows) if index else 0, 3)
        return torch.cat([rows, filler])

# What mixing needs of the network, float64 (N,) each, in nats: log p of the target, entropy of the
# distribution, log p(y) and log(1 - p(y)) of the hint y.
NeuralColumns = collections.namedtuple("NeuralColumns", "logp entropy hint_logp hint_log1m")

def score_logits(logits: Tensor, targets: Tensor, hints: Tensor) -> Tensor:
    """NeuralColumns stacked in the last dim, (...,4) float64, of logits (...,V) float32. 1 - p(y)
    is a sum over the other tokens: a rounded p(y) near 1 leaves nothing to normalize with.
    Exponentials and row sums are float32, their logarithms float64."""
    z = logits - logits.amax(-1, keepdim=True)
    e, hints, targets = z.exp(), hints[..., None], targets[..., None]
    others = e.scatter(-1, hints, 0.0).sum(-1).double().clamp(min=1e-300)
    total = others + e.gather(-1, hints).squeeze(-1).double()
    log_total = total.log()
    entropy = log_total - (e * z).sum(-1).double() / total
    target_z, hint_z = (z.gather(-1, x).squeeze(-1).double() for x in (targets, hints))
    return torch.stack([target_z - log_total, entropy, hint_z - log_total,
                        others.log() - log_total], -1)

class NeuralPass:
    """The network over a rank's windows; the stream stays on the device as integers."""
    def __init__(self, model: GPT, data: Data, cfg: Config, run: Run, stride: int):
        self.cfg, self.run, self.model, self.data = cfg, run, model, data
        self.tokens = data.val.to(run.device)  # (N+1,) int64
        self.grid = Grid(len(self.tokens) - 1, cfg, stride, run.world)
        self.start, self.end = self.grid.spans[run.rank]

    @torch.no_grad()
    def scores(self, tokens: Tensor, targets: Tensor, hints: Tensor) -> Tensor:
        """score_logits (B,last,4) of windows of tokens (B,T); targets and hints (B,last)."""
        return score_logits(self.model.logits(tokens, targets.size(1)), targets, hints)

    def columns(self, hints: Tensor | None = None, progress: bool = False) -> NeuralColumns:
        """Columns of this rank's span; hints (span,) int64, none where negative."""
        device, length = self.run.device, self.end - self.start
        hints = torch.zeros(length, dtype=torch.int64, device=device) if hints is None else hints
        out = torch.zeros(length + 1, 4, dtype=torch.float64, device=device)  # last row: discarded
        score = compiled(self.scores, self.cfg, self.run)
        offsets = torch.arange(self.cfg.eval_seq_len, device=device)
        for b in self.grid.batches[self.run.rank]:
            rows = self.grid.rows(b)
            start, first, end = (c[:, None].to(device, non_blocking=True) for c in rows.unbind(1))
            inputs = start + offsets  # (B,T) token positions
            index = inputs if b == 0 else inputs[:, -self.grid.last:]  # (B,last) target numbers
            slot = torch.where((index >= first) & (index < end), index - self.start, length)
            hinted = hints[slot.clamp(max=length - 1)].clamp(min=0)
            function = score if b else self.scores  # batch 0 has a shape of its own: not compiled
            out[slot.flatten()] = function(self.tokens[inputs], self.tokens[index + 1],
                                           hinted.long()).flatten(0, 1)
            if progress:
                self.log_progress(b, out)
        return NeuralColumns(*out[:length].unbind(1))

    def log_progress(self, batch: int, out: Tensor) -> None:
        """On rank 0, the running bits per byte about every 2 % of its batches."""
        mine = self.grid.batches[0]
        if self.run.is_main and (batch + 1) * 50 // len(mine) != batch * 50 // len(mine):
            windows_done = min(batch * self.grid.batch + 1, len(self.grid.table))
            targets = int(self.grid.table[windows_done - 1, 2])
            count = int(self.data.table.target_bytes(self.data.val[:targets + 1]).sum())
            bpb = -float(out[:targets, 0].sum()) / math.log(2) / max(1, count)
            self.run.row("eval", f"eval [{windows_done}/{len(self.grid.table)}]", bpb=bpb)

    @torch.no_grad()
    def distribution(self, target: int) -> Tensor:
        """The network's log-probabilities (V,) at a target, by the window that scores it."""
        ends = self.grid.table[:, 2].contiguous()
        start, _, end = self.grid.table[torch.searchsorted(ends, target, right=True)].tolist()
        logits = self.model.logits(self.tokens[None, start:end], end - target)[0, 0]
        return logits.double().log_softmax(-1).cpu()

def score_of(logp: Tensor, byte_counts: Tensor) -> dict:
    """val_loss (nats per token) and val_bpb (bits per byte) of per-target log-probabilities (N,).
    numpy adds in stream order on one thread, so that the sum's bits depend on nothing else."""
    nats, total = -float(np.add.reduce(logp.double().numpy())), int(byte_counts.sum())
    return dict(val_loss=nats / len(logp), val_bpb=nats / math.log(2) / max(1, total),
                tokens=len(logp), bytes=total)

def neural_score(model: GPT, data: Data, cfg: Config, run: Run) -> dict:
    """score_of windows that do not overlap, on rank 0; {} on the others."""
    neural = NeuralPass(model, data, cfg, run, cfg.eval_seq_len)
    logp = run.gather(neural.columns().logp, neural.grid.spans)
    return score_of(logp, data.table.target_bytes(data.val)) if run.is_main else {}

# ---- N-gram counts -------------------------------------------------------------------------------
# Counting by sorting. Grouping positions by the n-gram that ends at each, in stream order inside
# a group, makes "how often before" a rank in the group. The groups of length n + 1 come from
# those of length n: step one token on and split every group by that token with a stable sort.
# Groups of one are dropped as they arise: what has occurred once has no count, and nothing longer
# that begins with it can either, so the sorts shrink with every order. Buckets in place of
# n-grams give a hashed table's counts, a rank among earlier chunks a coarser cache's.

# Columns of one order n, (positions,) int32, over what is visible at the position: how often the
# n - 1 tokens before it occurred, how often this token followed them, how many different tokens
# did, the one that did last (-1: none), how often that one did. The last three: exact counts only.
Counts = collections.namedtuple("Counts", "context pair distinct hint hint_count",
                                defaults=(None, None, None))
# M positions int64 (M,), group after group, in stream order inside each; index int32 (M,) of the
# group's first member, which names the group.
Groups = collections.namedtuple("Groups", "position start")

def changes(a: Tensor, b: Tensor) -> Tensor:
    """(M,) bool: True at 0 and wherever a or b differs from the entry before."""
    changed = torch.ones_like(a, dtype=torch.bool)
    changed[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return changed

def run_starts(is_first: Tensor) -> Tensor:
    """(M,) int32: index of the latest True; int32 halves the memory traffic that dominates here."""
    starts = is_first.nonzero().squeeze(1)
    sizes = starts.diff(append=starts.new_tensor([len(is_first)]))
    return starts.int().repeat_interleave(sizes, output_size=len(is_first))

def split(groups: Groups, keys: Tensor) -> Groups:
    """Divide each group by keys[position], without the groups of one that result."""
    keys, order = keys[groups.position].sort(stable=True)  # keys first, then the old groups
    is_first = changes(keys, groups.start[order])
    repeats = ~is_first
    repeats[:-1] |= ~is_first[1:]
    kept = repeats.nonzero().squeeze(1)
    return Groups(groups.position[order[kept]], run_starts(is_first[kept]))

def earlier(groups: Groups, chunk: Tensor | None) -> Tensor:
    """(M,) int32: members of the same group before this one, and in earlier chunks if given."""
    if chunk is None:
        run = torch.arange(len(groups.start), dtype=torch.int32, device=groups.start.device)
    else:
        run = run_starts(changes(groups.start, chunk[groups.position]))
    return run - groups.start

def hint_columns(contexts: Groups, occurred: Tensor, pair: Tensor, tokens: Tensor):
    """(M,) distinct, hint and hint_count of `contexts`: `occurred` times, pair[position] so."""
    seen = pair[contexts.position]
    novel = (seen == 0).int()
    before = novel.cumsum(0, dtype=torch.int32) - novel
    distinct = before - before.index_select(0, contexts.start)
    hint = tokens[contexts.position].roll(1).masked_fill_(occurred == 0, -1)
    hint_count = (seen + 1).roll(1).masked_fill_(occurred == 0, 0)
    return distinct, hint, hint_count

def count_ngrams(tokens, max_order, start=0, buckets=0, granularity=1, first=None, primes=None):
    """Yield (order, Counts from position `start` on) for orders 1 to max_order. tokens (N,)
    integers >= 0. buckets: 0 exact, a power of two hashed. Targets 1, 2, ... fall into chunks, the
    first of `first`, then `granularity` each; a position sees the n-grams whose target lies in
    earlier chunks. distinct and the hints: exact and one target a chunk only."""
    total, device = len(tokens), tokens.device
    primes, first = primes or Config.ngram_primes, first or granularity
    one_each, position = granularity == first == 1, torch.arange(total + 1, device=device)
    chunk = ((position - first - 1) // granularity + 1).clamp(min=0).int()  # of a target
    chunk = None if one_each else chunk.masked_fill(position == 0, -1)
    # 16-bit keys take half the sort's passes; the token -1 after the end repeats in no n-gram.
    narrow = torch.int16 if tokens.max() < 2**15 else torch.int32
    tokens = F.pad(tokens.to(narrow), (0, 1), value=-1)

    def column(groups, values, fill=0):
        out = torch.full((total + 1,), fill, dtype=torch.int32, device=device)
        out[groups.position] = values.int()
        return out

    contexts = stream = Groups(position[:-1], torch.zeros_like(position[:-1], dtype=torch.int32))
    key = torch.zeros(total + 1, dtype=torch.int64, device=device)
    for order in range(1, max_order + 1):
        if buckets:
            key = key.roll(1) ^ tokens.long() * primes[(order - 1) % len(primes)]
            full = Groups(stream.position[order - 1:], stream.start[order - 1:])
            hashed = split(full, (key & (buckets - 1)).int())
        grams = hashed if buckets and order > 1 else split(contexts, tokens)
        occurred = earlier(contexts, chunk)
        columns = [column(contexts, occurred), column(grams, earlier(grams, chunk))]
        if one_each and not buckets:
            hints = hint_columns(contexts, occurred, columns[1], tokens)
            columns += map(column, [contexts] * 3, hints, (0, -1, 0))
        yield order, Counts(*(c[start:total] for c in columns))
        grams = hashed if buckets else grams
        contexts = Groups(grams.position + 1, grams.start)

# ---- Mixing --------------------------------------------------------------------------------------
# Backoff (submissions #889, #806, #890, #1094): the longest context that matches gives the ratio
# min(pair, context)/context, which alpha, a function of the network's entropy, blends with the
# network. With exact counts and a match that looks at the context alone this is a probability
# distribution; with colliding tables, or a match that looks at the target, it is not.

PROBABILITY_FLOOR, BATCH_WINDOWS = 1e-12, 128  # the submissions'; #1094's between table updates

@dataclass(frozen=True)
class Rule:
    """Which counts a backoff rule reads: buckets (0: exact), a match on "context" or "pair" too,
    chunks of targets (`first`, then `granularity`), a history that begins cold with the span."""
    buckets: int = 0
    match: str = "context"
    first: int = 1
    granularity: int = 1
    cold: bool = False

    def counted(self, tokens: Tensor, span: tuple[int, int], cfg: Config):
        """(order, Counts) of the targets `span` of a stream (N+1,). Distributed prefill: a rank
        counts all up to the end of its span, so its counts are those of one sequential pass."""
        start, end = span
        begin = start if self.cold else 0
        first = self.granularity if self.cold and start else self.first
        return count_ngrams(tokens[begin:end + 1], cfg.ngram_max_order, start + 1 - begin,
                            self.buckets, self.granularity, first, cfg.ngram_primes)

    def counted_for_all(self, tokens: Tensor, target: int, begin: int, cfg: Config):
        """(order, Counts) of every token of the vocabulary (V,) as if it were the target.
        Independent of count_ngrams: a direct scan of the history, which starts at token `begin`."""
        first = self.granularity if self.cold and begin else self.first
        place = target - begin - first  # negative in the history's first chunk
        visible = 1 + (first + place // self.granularity * self.granularity if place >= 0 else 0)
        history, words = tokens[begin:begin + visible], torch.arange(cfg.vocab_size)
        for n in range(cfg.ngram_max_order):  # n context tokens: order n + 1
            ends, own = history[n:], tokens[target + 1 - n:target + 1]
            past = [history[k:k + len(ends)] for k in range(n)]  # k-th context token of each end
            if target + 1 - begin < n:
                yield n + 1, Counts(torch.zeros_like(words), torch.zeros_like(words))
            elif self.buckets and n:
                *primes, last = [cfg.ngram_primes[k % len(cfg.ngram_primes)] for k in range(n + 1)]
                keys, key = (functools.reduce(operator.xor, [t * p for t, p in zip(x, primes)])
                             for x in (past, own))
                mask = self.buckets - 1
                table = torch.bincount((keys ^ ends * last) & mask, minlength=self.buckets)
                context = ((keys & mask) == (key & mask)).sum().expand(cfg.vocab_size)
                yield n + 1, Counts(context, table[(key ^ words * last) & mask])
            else:
                same = functools.reduce(operator.and_, [t == o for t, o in zip(past, own)],
                                        torch.ones_like(ends, dtype=torch.bool))
                pair = torch.bincount(ends[same], minlength=cfg.vocab_size)
                yield n + 1, Counts(same.sum().expand(cfg.vocab_size), pair)

def backoff_rules(cfg: Config) -> dict[str, Rule]:
    """Every backoff scoring of a run, by its name in the score table."""
    first, granularity = dict(
        token=(1, 1), window=(cfg.eval_seq_len, cfg.eval_stride),
        batch=(cfg.eval_seq_len + (BATCH_WINDOWS - 1) * cfg.eval_stride,
               BATCH_WINDOWS * cfg.eval_stride))[cfg.ngram_granularity]
    rules = dict(backoff_exact=Rule(), backoff_hashed=Rule(
        cfg.ngram_buckets, cfg.ngram_match, first, granularity, cfg.ngram_history == "cold"))
    if cfg.ngram_match == "pair":  # looks at the target: not normalized even with exact counts
        rules["backoff_exact_pair"] = Rule(match="pair")
    return rules

# A rule's n-gram part: matched order int8 (0: none) and the target's probability float64.
BackoffColumns = collections.namedtuple("BackoffColumns", "order probability")

def backoff_columns(counted, match: str, cfg: Config) -> BackoffColumns:
    """The longest match of each position, from (order, Counts) in rising order."""
    for order, counts in counted:
        context = counts.context.double()
        if order == 1:
            matched = torch.full_like(counts.context, int(cfg.ngram_fallback == "unigram"),
                                      dtype=torch.int8)
            probability = (counts.pair + 0.5) / (context + 0.5 * cfg.vocab_size)
            started = counts.context >= cfg.ngram_start_tokens
        elif order >= cfg.ngram_min_order:
            hit = counts.context >= cfg.ngram_min_count
            hit = hit & (counts.pair > 0) if match == "pair" else hit
            matched = torch.where(hit, order, matched).to(torch.int8)
            ratio = counts.pair.double().minimum(context) / context.clamp(min=1)
            probability = torch.where(hit, ratio, probability)
    return BackoffColumns(matched * started, probability)

def backoff_logp(logp: Tensor, entropy: Tensor, part: BackoffColumns, cfg: Config) -> Tensor:
    """log((1 - alpha)*p_network + alpha*p_ngram) where an order matched, the network elsewhere.
    alpha = base + range*sigmoid(scale*(H - center of the matched order)), H in nats."""
    centers = cfg.ngram_ent_center * (1 if len(cfg.ngram_ent_center) > 1 else cfg.ngram_max_order)
    center = torch.tensor(centers, dtype=torch.float64)[(part.order.long() - 2).clamp(min=0)]
    alpha = cfg.ngram_ent_base + cfg.ngram_ent_range * torch.sigmoid(
        cfg.ngram_ent_scale * (entropy - center))
    alpha = alpha if cfg.ngram_entropy else torch.full_like(alpha, cfg.ngram_alpha)
    mixed = (1 - alpha) * logp.exp() + alpha * part.probability
    return torch.where(part.order > 0, mixed.clamp(min=PROBABILITY_FLOOR).log(), logp)

# ---- Evaluation ----------------------------------------------------------------------------------
MASS_POSITIONS, NORMALIZED_WITHIN = 32, 1e-4  # targets at which scorings are summed; tolerance

class Evaluation:
    """One neural pass over the validation stream, scored in several ways: the score table. `rows`
    holds a result by scoring, on rank 0; `order`: the scorings, the headline first."""
    def __init__(self, model: GPT, data: Data, cfg: Config, run: Run):
        self.cfg, self.run, self.data = cfg, run, data
        self.neural = NeuralPass(model, data, cfg, run, cfg.eval_stride)
        self.rules = backoff_rules(cfg) if cfg.ngram_enabled else {}
        headline = f"backoff_{cfg.ngram_table}" if cfg.scoring == "backoff" else cfg.scoring
        self.headline = headline if headline in self.rules else "neural"
        others = sorted({"neural", *self.rules} - {self.headline})
        self.order, self.rows, self.columns = [self.headline, *others], {}, None

    def neural_pass(self) -> None:
        """Run the network; its columns on rank 0."""
        part = self.neural.columns(progress=True)
        columns = [self.run.gather(c, self.neural.grid.spans) for c in part]
        self.columns = NeuralColumns(*columns) if self.run.is_main else None

    def score(self, scoring: str, started: float) -> None:
        """Count for this rank's span, mix on rank 0, and keep the row; all ranks take part."""
        cfg, run, part = self.cfg, self.run, None
        if scoring in self.rules:
            rule, span = self.rules[scoring], (self.neural.start, self.neural.end)
            part = backoff_columns(rule.counted(self.neural.tokens, span, cfg), rule.match, cfg)
            part = BackoffColumns(*(run.gather(c, self.neural.grid.spans) for c in part))
            if rule.cold and run.world > 1:
                run.log(f"{scoring}: each of the {run.world} ranks begins with a cold cache, so "
                        "its score depends on their number")
        if not run.is_main:
            return
        logp = self.columns.logp
        logp = logp if part is None else backoff_logp(logp, self.columns.entropy, part, cfg)
        byte_counts = self.data.table.target_bytes(self.data.val)
        self.rows[scoring] = score_of(logp, byte_counts) | dict(seconds=run.sync() - started)
        run.record["curves"].append(dict(scoring=scoring, **running_bpb(logp, byte_counts)))
        if part is not None:
            orders = torch.bincount(part.order.long(), minlength=cfg.ngram_max_order + 1)
            run.record["matched_orders"].append(dict(scoring=scoring, count=orders.tolist()))

    def distribution(self, scoring: str, target: int, logp: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (V,) of a scoring at a target, and the n-gram part's (V,) if a rule's.
        logp: the network's (V,). Counts come from a direct scan, not from count_ngrams."""
        if scoring not in self.rules:
            return logp, None
        rule, begin = self.rules[scoring], 0
        if rule.cold:
            begin = max(a for a, b in self.neural.grid.spans if a <= target < b)
        counted = rule.counted_for_all(self.data.val, target, begin, self.cfg)
        part = backoff_columns(counted, rule.match, self.cfg)
        entropy = -(logp.exp() * logp).sum().expand_as(logp)
        ngram = torch.where(part.order > 0, part.probability, 0.0)
        return backoff_logp(logp, entropy, part, self.cfg), ngram

    def masses(self) -> None:
        """Sum each scoring over the vocabulary at sampled targets; marks the rows, on rank 0."""
        positions = np.random.RandomState(self.cfg.seed).randint(
            0, len(self.data.val) - 1, MASS_POSITIONS).tolist()
        networks = [self.neural.distribution(i) for i in positions]
        for scoring, row in self.rows.items():
            pairs = [self.distribution(scoring, i, n) for i, n in zip(positions, networks)]
            masses = [float(p.exp().sum()) for p, _ in pairs]
            sums = [float(n.sum()) for _, n in pairs if n is not None and n.any()]
            row |= dict(mass=float(np.mean(masses)), max_mass=max(masses))
            row |= dict(ngram_mass=float(np.mean(sums))) if sums else {}
            wrong = max(abs(m - 1) for m in masses) > NORMALIZED_WITHIN
            row["normalized"] = "no" if wrong else "yes"

def running_bpb(logp: Tensor, byte_counts: Tensor, points: int = 200) -> dict:
    """The score along the stream: bits per byte of the first k targets at `points` places."""
    at = torch.linspace(1, len(logp), points).long() - 1
    bits = -logp.cumsum(0)[at] / math.log(2)
    return dict(targets=(at + 1).tolist(), bpb=(bits / byte_counts.cumsum(0)[at].clip(1)).tolist())

def unigram_bpb(data: Data) -> float:
    """Bits per byte of the best fixed unigram model of the validation targets, for comparison."""
    counts = torch.bincount(data.val[1:]).double()
    bits = -(counts * (counts / counts.sum()).clamp(min=1e-300).log2()).sum()
    return float(bits / data.table.target_bytes(data.val).sum())

# ---- Report --------------------------------------------------------------------------------------
def describe_run(cfg: Config, notes: list[str], data: Data, run: Run) -> None:
    """Log configuration, versions, hardware, revision and corpus."""
    gpu = torch.cuda.get_device_name() if run.device.type == "cuda" else "none"
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    run.record |= dict(notes=notes, corpus=data.corpus, config=asdict(cfg), facts=dict(
        torch=torch.__version__, python=platform.python_version(), numpy=np.__version__,
        machine=platform.machine(), cores=os.cpu_count(), gpu=gpu, world_size=run.world,
        revision=git_revision(), code_sha256=code))
    for kind in ("facts", "corpus", "config"):
        run.log(f"{kind} " + " ".join(f"{k}:{v}" for k, v in run.record[kind].items()))

def git_revision() -> str:
    """The commit this file is at, "+" if changed since, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always",
               "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, text=True, capture_output=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"

def report_budgets(run: Run, cfg: Config, total_bytes: int, eval_seconds: float) -> None:
    """One PASS or FAIL line for each of the challenge's budgets."""
    budgets = [("total_bytes", total_bytes, cfg.artifact_bytes),
               ("eval_seconds", round(eval_seconds, 1), cfg.max_eval_seconds)]
    budgets += [("train_seconds", row["train_seconds"], cfg.max_wallclock_seconds)
                for row in run.record["trained"] if cfg.max_wallclock_seconds]
    for name, used, limit in budgets:
        verdict = "PASS" if used <= limit else f"FAIL excess:{used - limit:.10g}"
        run.record["budget"].append(dict(name=name, used=used, limit=limit, verdict=verdict))
        run.log(f"budget {name}:{used}/{limit:.10g} {verdict}")

def submission(cfg: Config, run: Run, final: dict, eval_seconds: float) -> dict:
    """The run in the form of the challenge's submission.json."""
    facts, trained = run.record["facts"], (run.record["trained"] or [{}])[-1]
    hardware = f"{run.world}x {facts['gpu']}" if facts["gpu"] != "none" else (
        f"{facts['cores']} CPU cores, {facts['machine']}")
    own = {key: getattr(cfg, key) for key in ("author", "github_id", "recipe", "scale", "seed")}
    return own | dict(
        name=cfg.run_id, val_loss=final["val_loss"], val_bpb=final["val_bpb"],
        scoring=final["scoring"], normalized=final["normalized"] == "yes",
        bytes_total=final["total_bytes"], bytes_code=code_bytes(), steps=trained.get("steps"),
        train_seconds=trained.get("train_seconds"), eval_seconds=round(eval_seconds, 1),
        hardware=hardware, torch=facts["torch"], corpus=run.record["corpus"],
        revision=facts["revision"])

def plot(record: dict) -> bytes:
    """Four panels as PNG, 1200 x 900: training, validation, running score, matched orders."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    loss, validation, curve, orders = axes.flat
    scale, train, checks = loss.twinx(), record["train"], record["validation"]
    steps = [r["step"] for r in train]
    loss.plot(steps, [r["train_loss"] for r in train], color="C0")
    scale.plot(steps, [r["lr_scale"] for r in train], color="C7", linestyle="--")
    scale.set(ylabel="lr scale (dashed)", ylim=(0, 1.05))
    validation.plot([r["step"] for r in checks], [r["val_bpb"] for r in checks], "o-")
    for row in record["curves"]:
        skip = len(row["bpb"]) // 50  # the first few targets are noise
        curve.plot(row["targets"][skip:], row["bpb"][skip:], label=row["scoring"])
    for row in record["matched_orders"]:
        orders.plot(100 * np.array(row["count"]) / sum(row["count"]), "o-", label=row["scoring"])
    loss.set(title="Training loss", xlabel="step", ylabel="nats per token")
    validation.set(title="Validation during training", xlabel="step", ylabel="bits per byte")
    curve.set(title="Score along the stream", xlabel="targets scored", ylabel="bits per byte")
    orders.set(title="Longest matching order", xlabel="order (0: none)", ylabel="% of targets")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    pyplot.close(figure)
    return image.getvalue()

def final_report(evaluation: Evaluation, blob: bytes, cfg: Config, run: Run) -> None:
    """Result lines, score table, budgets, files and, last, the final line; on rank 0."""
    stage, headline = f"int{cfg.matrix_bits}_sliding", evaluation.headline
    for scoring, row in evaluation.rows.items():
        run.row("result", stage=stage, scoring=scoring, **row)
    run.log(f"{'scoring':20} {'val_bpb':>10} {'mass':>12}  normalized")
    for scoring, row in sorted(evaluation.rows.items(), key=lambda item: item[1]["val_bpb"]):
        run.log(f"{scoring:20} {row['val_bpb']:10.6f} {row['mass']:12.6g}  {row['normalized']}"
                + ("  <- headline" if scoring == headline else ""))
    best, total = evaluation.rows[headline], len(blob) + code_bytes()
    if best["normalized"] == "no":
        run.log(f"warning: {headline} is no probability distribution (mass {best['mass']:.6g}): "
                "its bits per byte are not a compression rate")
    report_budgets(run, cfg, total, best["seconds"])
    final = {key: best[key] for key in ("val_loss", "val_bpb")} | dict(
        scoring=headline, normalized=best["normalized"], total_bytes=total, seed=cfg.seed)
    record = submission(cfg, run, final, best["seconds"])
    write_atomic(run.path(".submission.json"), json.dumps(record, indent=1).encode())
    write_atomic(run.path(".png"), plot(run.record))
    run.log(f"files {run.base}.txt .json .png .submission.json")
    run.record["final"].append(final)
    write_atomic(run.path(".json"), json.dumps(run.record, indent=1).encode())
    run.row("final", **final)

# ---- Main ----------------------------------------------------------------------------------------
def make_artifact(data: Data, cfg: Config, run: Run) -> Path:
    """Train, save the weights, export; the artifact's path, on every rank."""
    run.stage = "training"
    model = build_model(cfg, run)
    trainer = Trainer(model, data, cfg, run)
    trainer.train()
    run.stage = "export"

    def save(suffix: str, make) -> Path:
        write_atomic(run.path(suffix), make())
        run.log(f"saved {run.path(suffix)}")
        return run.path(suffix)
    weights = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    run.agree(lambda: save(".safetensors", lambda: safetensors.torch.save(weights)))
    trainer.validate()
    return run.agree(lambda: save(f".int{cfg.matrix_bits}.ptz",
                                  lambda: export(model, data, cfg, run)))

def evaluate_artifact(path: Path, data: Data, cfg: Config, run: Run) -> None:
    """Score what would be shipped, from the artifact's first byte to the final line."""
    run.stage, started = "evaluation", run.sync()
    blob = path.read_bytes()
    cfg, tensors = unpack(blob, cfg, data.corpus["vocabulary_sha256"])
    model = build_model(replace(cfg, mtp_num_heads=0), run)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[name].tensor())
    evaluation = Evaluation(model, data, cfg, run)
    evaluation.neural_pass()
    evaluation.score(evaluation.headline, started)  # the evaluation clock ends here
    for scoring in evaluation.order[1:]:
        evaluation.score(scoring, run.sync())
    started = run.sync()
    roundtrip = neural_score(model, data, cfg, run)
    if run.is_main:
        run.row("result", stage=f"int{cfg.matrix_bits}_roundtrip", scoring="neural", **roundtrip,
                seconds=run.sync() - started)
        run.row("baseline", unigram_bpb=unigram_bpb(data))
        evaluation.masses()
    run.agree(lambda: final_report(evaluation, blob, cfg, run))

def run_all(cfg: Config, notes: list[str], run: Run) -> None:
    """The whole run, as a table of contents."""
    for note in notes:
        run.log(note)
    run.stage = "data"
    cfg.load_artifact or micro_batch_tokens(cfg, run.world)  # fails before expensive work
    data = run.agree(lambda: load_data(cfg, run), everywhere=True)
    run.agree(lambda: describe_run(cfg, notes, data, run))
    path = Path(cfg.load_artifact) if cfg.load_artifact else make_artifact(data, cfg, run)
    evaluate_artifact(path, data, cfg, run)

def main() -> int:
    """Run as the environment says; the exit status."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(), flush=True)
        return 0
    run, is_main = None, os.environ.get("RANK", "0") == "0"
    try:
        cfg, notes = load_config(os.environ)
        run = Run(cfg)
        run_all(cfg, notes, run)
        return 0
    except (RunError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("DEBUG", "0") == "1":
            raise
        full = isinstance(error, torch.OutOfMemoryError)
        message = (f"out of device memory during {run.stage}: lower MICRO_BATCH_TOKENS or "
                   "EVAL_BATCH_WINDOWS") if full else str(error)
        if is_main or full:
            print(f"error: {message}", file=sys.stderr, flush=True)
        return 2
    finally:
        if run:
            run.close()

if __name__ == "__main__":
    os._exit(main())  # not through the teardown of the collectives' threads, which can abort
