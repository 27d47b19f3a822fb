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
# ruff: noqa: E401
import collections, contextlib, copy, glob, hashlib, importlib, itertools, json, lzma, math
import os, platform, resource, signal, struct, subprocess, sys, time, typing
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
import constriction, numpy as np, safetensors.torch, sentencepiece, torch, zstandard
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # 2.13's new names
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# ---- Configuration and recipes -------------------------------------------------------------------
class RunError(Exception):
    """Bad input or a failed stage: one line for the user, non-zero exit on every rank."""

NONNEGATIVE, POSITIVE, FRACTION = (0, math.inf), (1, math.inf), (0, 1)

def knob(default, meaning: str, allowed=NONNEGATIVE):
    """A field of Config; allowed: an inclusive (low, high) range, for text a list of choices."""
    allowed = [] if default == str(default) and allowed is NONNEGATIVE else allowed
    return field(default=default, metadata=dict(meaning=meaning, allowed=allowed))

@dataclass(frozen=True)
class Config:
    """Every setting of a run. The environment variable is the field's name in capitals."""
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
    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder of shards")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model", "their tokenizer")
    text_files: str = knob("", "globs of UTF-8 text separated by ':'; each file is a document")
    prepared_path: str = knob("data", "folder for tokenizers and shards made from text")
    vocab_size: int = knob(1024, "pieces of the tokenizer", (260, 65536))
    val_tokens: int = knob(0, "validation targets to score; 0: all")
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
    ve_layers: tuple[int, ...] = knob((9, 10), "layers with a value embedding")
    xsa_last_n: int = knob(11, "last layers with exclusive self-attention (XSA)")
    value_residual: bool = knob(False, "mix every layer's values with the first layer's")
    mtp_num_heads: int = knob(0, "multi-token prediction heads; trained, not exported", (0, 16))
    mtp_loss_weight: float = knob(0.2, "weight of their mean loss")
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
    checkpoint_seconds: float = knob(0.0, "training time between checkpoints; 0: none")
    resume: bool = knob(False, "1: go on from the checkpoint of RUN_ID")
    averaging: str = knob("ema", "weights to export", ["ema", "swa", "none"])
    ema_decay: float = knob(0.997, "per step of schedule_steps", FRACTION)
    swa_enabled: bool = knob(True, "0 turns AVERAGING=swa off")
    swa_every: int = knob(200, "steps between SWA samples, once the lr scale is < 0.5", POSITIVE)
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
    gptq_seconds: float = knob(10.0, "training time kept for calibration; 0: no GPTQ")
    matrix_bits: int = knob(6, "bits of a matrix code; with ans, on average", (2, 8))
    embed_bits: int = knob(8, "bits of an embedding code, likewise", (2, 8))
    compressor: str = knob("ans", "entropy coder of the codes", ["ans", "zstd", "lzma", "auto"])
    artifact_bytes: int = knob(16_000_000, "budget for code + artifact", POSITIVE)
    load_weights: str = knob("", "quantize these weights (.safetensors); no training")
    load_artifact: str = knob("", "evaluate this artifact; no training")
    eval_seq_len: int = knob(2048, "tokens of a window", (2, 10**6))
    eval_stride: int = knob(64, "targets a window scores", POSITIVE)
    eval_batch_windows: int = knob(128, "windows of a batch", POSITIVE)
    max_eval_seconds: float = knob(600.0, "budget of the evaluation", POSITIVE)
    scoring: str = knob("calibrated", "headline", ["neural", "backoff", "calibrated"])
    ngram_table: str = knob("exact", "keys of the backoff headline", ["exact", "hashed"])
    audit: str = knob("1", "check the score; strict: exit 3 if one fails", ["0", "1", "strict"])
    mixer_max_order: int = knob(12, "longest n-gram of the calibrated mixer", (4, 64))
    mixer_chunk_tokens: int = knob(8192, "targets between updates of its tables", POSITIVE)
    resume_eval: bool = knob(False, "1: take the neural pass that an earlier run saved, if any")
    ngram_enabled: bool = knob(True, "mix with n-grams at all")
    ngram_min_order: int = knob(2, "shortest n-gram of the backoff", (2, 64))
    ngram_max_order: int = knob(7, "longest n-gram of the backoff", (2, 64))
    ngram_min_count: int = knob(2, "a context matches from this count on", POSITIVE)
    ngram_entropy: bool = knob(True, "alpha follows the entropy H; 0: it is ngram_alpha")
    ngram_alpha: float = knob(0.4, "fixed alpha", FRACTION)
    ngram_ent_base: float = knob(0.05, "alpha = base + range*sigmoid(scale*(H-center))", FRACTION)
    ngram_ent_range: float = knob(0.55, "see ngram_ent_base", FRACTION)
    ngram_ent_scale: float = knob(2.0, "see ngram_ent_base")
    ngram_ent_center: tuple[float, ...] = knob((4.0,), "nats; one, or one per order from 2")
    ngram_fallback: str = knob("network", "without a match", ["network", "unigram"])
    ngram_start_tokens: int = knob(0, "network alone until so many tokens are counted")
    ngram_buckets: int = knob(2**22, "hashed: buckets of an order's table", (1, 2**30))
    ngram_match: str = knob("context", "hashed: what counts as a match", ["context", "pair"])
    ngram_granularity: str = knob("window", "hashed: counts lag", ["token", "window", "batch"])
    ngram_history: str = knob("prefill", "hashed: a rank's start", ["prefill", "cold"])
    ngram_primes: tuple[int, ...] = knob(
        (36313, 27191, 51647, 81929, 131071, 174763, 233017), "hashed: multipliers of tokens")
FIELDS = {f.name: f for f in fields(Config)}
# Other names of fields in the submissions' scripts.
ALIASES = dict(VRL_ENABLED="value_residual", NGRAM_ORDER="ngram_max_order", USE_NGRAM_MIXER=(
    "ngram_enabled"), NGRAM_CACHE="ngram_enabled", ALPHA_BASE="ngram_ent_base",
    ALPHA_RANGE="ngram_ent_range", ALPHA_CENTER="ngram_ent_center")
# The four submissions: values that differ from Config's defaults, which are `golf`, ours.
RECIPES = {
    "golf": {},
    "pr889": dict(xsa_last_n=4, value_residual=True, compressor="lzma", scoring="backoff",
                  ngram_table="hashed", ngram_history="cold", schedule_steps=6760,
                  ngram_primes=(36313, 27191, 51647, 81929, 131071, 175447, 209591)),
    "pr806": dict(relu_slope=0.9, ve_enabled=False, xsa_last_n=0, rope_dims=64, ln_scale=False,
                  warmdown_iters=3000, averaging="swa", compressor="zstd", schedule_steps=7185,
                  scoring="backoff", ngram_table="hashed"),
    "pr890": dict(num_kv_heads=8, mlp_mult=3.5, bigram_vocab_size=4096, matrix_bits=5,
                  compressor="zstd", schedule_steps=5180, eval_stride=32, scoring="backoff",
                  ngram_ent_center=(4.5, 4.2, 3.8, 3.5, 3.2, 3.0, 2.8, 2.6), ngram_max_order=9,
                  ngram_table="hashed", ngram_match="pair", ngram_primes=(
                      36313, 27191, 51647, 81929, 131071, 174763, 233017, 299993, 350377)),
    "pr1094": dict(relu_slope=0.75, xsa_last_n=4, mtp_num_heads=2, mtp_loss_weight=0.1,
                   matrix_lr=0.027, warmdown_iters=3700, schedule_steps=7020, compressor="lzma",
                   scoring="backoff", ngram_table="hashed", ngram_granularity="batch",
                   ngram_max_order=10, ngram_min_count=1, ngram_ent_center=(3.0,),
                   ngram_ent_base=0.2, ngram_start_tokens=5000, ngram_fallback="unigram")}
# A laptop's sizes: 11 layers still, about two minutes of training on 2 cores.
DEMO = dict(model_dim=128, num_heads=4, train_seq_len=256, eval_seq_len=256,
            train_batch_tokens=4096, bigram_vocab_size=1024, bigram_dim=32, ve_dim=32,
            val_tokens=131072, max_wallclock_seconds=120.0, warmup_steps=2, eval_batch_windows=16,
            val_batch_size=32768, mixer_chunk_tokens=1024)
# What determines the network's function: the artifact's header holds these and nothing else.
ARCHITECTURE = """matrix_bits embed_bits vocab_size num_layers model_dim num_heads num_kv_heads
    mlp_mult relu_slope logit_softcap rope_base rope_dims ln_scale bigram_vocab_size
    bigram_dim ve_enabled ve_dim ve_layers xsa_last_n value_residual""".split()

def tool(name: str, needed: bool = False):
    """The module tools/<name>.py for what people want beside the score; None if there is none."""
    if not Path(__file__).with_name("tools").exists():
        if needed: raise RunError(f"this needs tools/{name}.py beside {Path(__file__).name}")
        return None
    sys.modules.setdefault("train_gpt", sys.modules[__name__])  # which may be __main__
    return importlib.import_module(f"tools.{name}")

def parse_value(name: str, text: str):
    """The value of a field of Config; RunError names the variable, its value, what is allowed."""
    kind, allowed = FIELDS[name].type, FIELDS[name].metadata["allowed"]
    item, wanted = (float, "a number") if "float" in kind else (int, "an integer")
    try:
        if kind == "bool":
            wanted = "0 or 1"
            return {"0": False, "1": True, "false": False, "true": True}[text.strip().lower()]
        if kind == "str":
            value, fits, wanted = text, not allowed or text in allowed, ", ".join(allowed)
        elif kind.startswith("tuple"):
            wanted = "numbers below 2^31, separated by ','"
            value = tuple(item(part) for part in text.split(",") if part.strip())
            fits = all(abs(v) < 2**31 for v in value)
        else:
            value, (low, high) = item(text), allowed
            fits, wanted = low <= value <= high, f"{wanted} from {low:g} to {high:g}"
    except (ValueError, KeyError): fits = False
    if not fits: raise RunError(f"{name.upper()}={text!r}: expected {wanted}")
    return value

def read_environment(env: typing.Mapping[str, str]) -> tuple[dict, list[str]]:
    """({field: value} from the environment, log lines); RunError for a bad or mistyped variable."""
    known, values, notes = {name.upper(): name for name in FIELDS} | ALIASES, {}, []
    for name in sorted(env):
        if name not in known: continue
        value = parse_value(known[name], env[name])
        if values.setdefault(known[name], value) != value:
            raise RunError(f"{name}={value}: {known[name].upper()} is set to another value")
        notes += [f"variable {name} sets {known[name].upper()}"] if name in ALIASES else []
    if variables := tool("variables"): notes += variables.check_names(sorted(env), known)
    return values, notes

def load_config(env: typing.Mapping[str, str]) -> tuple[Config, list[str]]:
    """(configuration, log lines): environment > sizes of SCALE > RECIPE > defaults."""
    values, notes = read_environment(env)
    name, path = values.get("recipe", Config.recipe), values.get("data_path", Config.data_path)
    if name not in RECIPES: raise RunError(f"RECIPE={name!r}: allowed are {', '.join(RECIPES)}")
    scale, reason = values.get("scale", "auto"), "SCALE is set"
    if scale == "auto":
        full = torch.cuda.is_available() and find_shards(path, "train")
        scale, neither = ("full", "") if full else ("demo", "not both ")
        reason = f"CUDA and train shards at {path} are {neither}present"
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
    layers, centers = set(c.ve_layers) & set(range(c.num_layers)), len(c.ngram_ent_center)
    by_length = f"divisible by TRAIN_SEQ_LEN {c.train_seq_len}"
    for name, failed, rule in (
            ("model_dim", c.model_dim % c.num_heads, f"divisible by NUM_HEADS {c.num_heads}"),
            ("num_heads", c.num_heads % c.num_kv_heads,
             f"divisible by NUM_KV_HEADS {c.num_kv_heads}"),
            ("rope_dims", c.rope_dims % 2 or c.rope_dims > head_dim, f"even, at most {head_dim}"),
            ("eval_stride", c.eval_stride > c.eval_seq_len, "at most EVAL_SEQ_LEN"),
            ("train_batch_tokens", c.train_batch_tokens % c.train_seq_len, by_length),
            ("micro_batch_tokens", c.micro_batch_tokens % c.train_seq_len, by_length),
            ("xsa_last_n", c.xsa_last_n > c.num_layers, f"at most NUM_LAYERS {c.num_layers}"),
            ("ve_layers", c.ve_enabled and len(layers) < len(c.ve_layers),
             f"different layers from 0 to below NUM_LAYERS {c.num_layers}"),
            ("bigram_vocab_size", c.bigram_vocab_size == 1, "0 or at least 2"),
            ("ngram_min_order", c.ngram_min_order > orders + 1, "at most NGRAM_MAX_ORDER"),
            ("ngram_ent_center", centers not in (1, orders),
             f"one number or, for orders 2 to NGRAM_MAX_ORDER, {orders}"),
            ("ngram_ent_base", c.ngram_ent_base + c.ngram_ent_range > 1,
             f"at most 1 - NGRAM_ENT_RANGE = {1 - c.ngram_ent_range:g}"),
            ("iterations", not (c.load_artifact or c.load_weights or c.max_wallclock_seconds
                                or c.iterations), "above 0 where MAX_WALLCLOCK_SECONDS is 0"),
            ("ngram_buckets", c.ngram_buckets & (c.ngram_buckets - 1), "a power of 2"),
            ("ngram_primes", not c.ngram_primes, "at least one number"),
            ("run_id", "/" in c.run_id, "without '/'")):
        if failed: raise RunError(f"{name.upper()}={getattr(c, name)}: must be {rule}")

# ---- Runtime: ranks, log, files ------------------------------------------------------------------
FORMATS = dict(val_loss=".8f", val_bpb=".8f", train_loss=".4f", lr_scale=".3f", seconds=".1f",
               bpb=".4f", unigram_bpb=".4f", mass=".7g", max_mass=".7g", ngram_mass=".7g",
               bits_per_parameter=".3f", log2_step=".4g", mass_error=".2g", score_error=".2g")

def write_atomic(path: Path, content) -> None:
    """Write bytes, or tensors by name, under another name, then rename; RunError if that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, bytes): temporary.write_bytes(content)
        else: safetensors.torch.save_file(content, temporary)
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError): temporary.unlink()
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', error)}") from None

class Run:
    """This process's place in the run: rank, device, log, and `record`, which becomes the JSON."""
    def __init__(self, cfg: Config):
        env, cuda = os.environ, cfg.device != "cpu" and torch.cuda.is_available()
        if cfg.device == "cuda" and not cuda:
            raise RunError("DEVICE=cuda: no CUDA device is available; set DEVICE=cpu")
        self.rank, self.world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.is_main, self.stage, self.log_file = self.rank == 0, "start", None
        self.saved, self.unsaved = [], []  # paths, and what could not be written and why
        self.record: dict = collections.defaultdict(list)
        self.device = torch.device(f"cuda:{env.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        cuda and torch.cuda.set_device(self.device)
        alone = dict(store=dist.HashStore(), rank=0, world_size=1) if self.world == 1 else {}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone,
                                timeout=timedelta(seconds=cfg.dist_timeout_seconds))
        self.agree(lambda: self.open_log(cfg))
    def open_log(self, cfg: Config) -> None:
        """Take the first free run name and open its log; existing files stay as they are."""
        folder, names = Path(cfg.logs_path), (f"{cfg.run_id}-{n}" for n in range(2, sys.maxsize))
        folder.mkdir(parents=True, exist_ok=True)
        self.base = folder / next(name for name in itertools.chain([cfg.run_id], names)
                                  if not any(folder.glob(glob.escape(name) + ".*")))
        self.log_file = open(f"{self.base}.txt", "x", encoding="utf-8")
    def alone(self) -> Run:
        """This rank by itself and without a log, for work in which the others take no part."""
        other = copy.copy(self)
        vars(other).update(rank=0, world=1, is_main=True, log_file=None,
                           record=collections.defaultdict(list))
        return other
    def save(self, suffix: str, content, base: str = "") -> None:
        """Write logs/<run_id><suffix>, on rank 0. If that fails the run goes on, and says so."""
        path = Path(f"{base or self.base}{suffix}")
        try: write_atomic(path, content)
        except RunError as error:
            self.unsaved.append(str(error))
            return self.log(self.unsaved[-1])
        self.saved.append(str(path))
        self.log(f"saved {path}")
    def log(self, line: str) -> None:
        """One line to console and log file, on rank 0."""
        if self.log_file:
            print(line, flush=True)
            try: print(line, file=self.log_file, flush=True)
            except OSError as error:
                self.unsaved = [f"cannot write {self.base}.txt: {error.strerror}"]
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
            try: own = work()
            except (RunError, OSError) as error: message = str(error)
        dist.all_gather_object(all_ranks, (message, None if everywhere else own))
        for error, _ in all_ranks:
            if error: raise RunError(error)
        return own if everywhere else all_ranks[0][1]
    def over_ranks(self, operation, *values: float) -> list[float]:
        """Each value's maximum or mean over the ranks (float64, exchanged through the CPU)."""
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation)
        return numbers.tolist()
    def gather(self, part: Tensor, spans: list[tuple[int, int]]) -> Tensor | None:
        """Every rank's rows (span, ...) end to end, on rank 0's CPU; None on the others."""
        if self.world == 1: return part.cpu()
        padded = part.new_zeros(max(b - a for a, b in spans), *part.shape[1:], device="cpu")
        padded[:len(part)] = part
        parts = [torch.empty_like(padded) for _ in spans] if self.is_main else None
        dist.gather(padded, parts, dst=0)
        return torch.cat([p[: b - a] for p, (a, b) in zip(parts, spans)]) if parts else None
    def sync(self) -> float:
        """Wait for the device; the time in seconds."""
        if self.device.type == "cuda": torch.cuda.synchronize()
        return time.perf_counter()
    def peak_memory_bytes(self) -> int:
        """Most memory this rank has held: of the CUDA device, else of the process."""
        if self.device.type == "cuda": return torch.cuda.max_memory_reserved()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB

# ---- Data: shards, tokenizer, bytes --------------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256  # the challenge's shard format
BOS, SPACE = 1, "\u2581"  # SentencePiece writes a space as this character
FETCH = ("hf download willdepueoai/parameter-golf --repo-type dataset --local-dir . --include "
         "'datasets/*/fineweb10B_sp1024/*' 'datasets/tokenizers/*' (then point DATA_PATH and "
         "TOKENIZER_PATH there)")

def open_shard(path: str) -> np.memmap:
    """Tokens of a shard, memory-mapped uint16 (n,). RunError if its header or size lies."""
    header, size = np.fromfile(path, "<i4", HEADER_INTS), os.path.getsize(path)
    magic, version, count = header[:3] if len(header) == HEADER_INTS else (0, 0, 0)
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise RunError(f"{path}: magic {magic} version {version}, expected {SHARD_MAGIC} version 1")
    if size != (expected := 4 * HEADER_INTS + 2 * int(count)) or count <= 0:
        raise RunError(f"{path}: {count} tokens need {expected} bytes, the file has {size}")
    return np.memmap(path, "<u2", "r", offset=4 * HEADER_INTS)

class TokenStream:
    """The shards' tokens end to end, read cyclically; each rank checks its share of the shards."""
    def __init__(self, paths: list[str], vocab_size: int, rank: int = 0, world: int = 1):
        self.shards = [open_shard(p) for p in paths]
        self.ends = np.cumsum([len(s) for s in self.shards])
        for path, shard in list(zip(paths, self.shards))[rank::world]:
            if (top := int(shard.max())) >= vocab_size:
                raise RunError(f"{path}: token {top} at {shard.argmax()}, not below {vocab_size}")
    def __len__(self) -> int: return int(self.ends[-1])
    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from cyclic position `start`, as int64."""
        parts = []
        while count > 0:
            k = int(np.searchsorted(self.ends, start % len(self), side="right"))
            first = start % len(self) - self.ends[k]  # negative: from the shard's end
            parts.append(self.shards[k][first:][:count].astype(np.int64))
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

class TrainLoader:
    """Batches that span the whole corpus, by a stride coprime to its blocks; state: `position`."""
    def __init__(self, stream: TokenStream, cfg: Config, run: Run):
        self.stream, self.run, self.position, self.seq_len = stream, run, 0, cfg.train_seq_len
        self.batch = cfg.train_batch_tokens // cfg.train_seq_len  # sequences a step, all ranks
        self.blocks = (len(stream) - 1) // self.seq_len
        self.stride = round(self.blocks * 0.618) or 1
        while math.gcd(self.stride, self.blocks) != 1: self.stride += 1
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
    """What each piece adds to the text, (V,) tensors. base: its UTF-8 bytes without a leading space
    sign. space: it has one, worth a byte unless the token before is a boundary (no real piece)."""
    def __init__(self, tokenizer):
        t, ids = tokenizer, range(tokenizer.get_piece_size())
        boundary = [t.is_control(i) or t.is_unknown(i) or t.is_unused(i) for i in ids]
        pieces = ["" if b else t.id_to_piece(i) for i, b in zip(ids, boundary)]
        space = [p.startswith(SPACE) for p in pieces]
        base = [1 if t.is_byte(i) else len(p.removeprefix(SPACE).replace(SPACE, " ").encode())
                for i, p in zip(ids, pieces)]
        self.base, self.space, self.boundary = map(torch.tensor, (base, space, boundary))
    def target_bytes(self, tokens: Tensor) -> Tensor:
        """Bytes (N,) int64 of the targets tokens[1:] of a stream (N+1,)."""
        before, target = tokens[:-1].long(), tokens[1:].long()
        return self.base[target] + (self.space[target] & ~self.boundary[before])
# What a run reads. train: TokenStream or None; val: (N+1,) int64; corpus: facts for the log.
Data = collections.namedtuple("Data", "tokenizer table train val corpus")

def load_tokenizer(path: str, vocab_size: int):
    """The SentencePiece processor at `path`; RunError if missing, foreign or of another size."""
    try:
        proto = Path(path).read_bytes() or b"\0"  # no bytes would load as no model at all
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
        size = len([tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())])  # UTF-8
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "not a SentencePiece model"
        raise RunError(f"TOKENIZER_PATH={path}: {reason}") from None
    if size != vocab_size:
        raise RunError(f"{path}: the tokenizer has {size} pieces, VOCAB_SIZE is {vocab_size}")
    return tokenizer

def find_shards(folder: str, split: str) -> list[str]:
    """Sorted paths of *_<split>_*.bin in a folder."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), f"*_{split}_*.bin")))

def load_data(cfg: Config, run: Run) -> Data:
    """Find or make the corpus, check it, and read the validation stream, cut to VAL_TOKENS."""
    folder, model, corpus = cfg.data_path, cfg.tokenizer_path, dict(source=cfg.data_path)
    nothing_given = folder == Config.data_path and not find_shards(folder, "val")
    if cfg.text_files or (cfg.scale == "demo" and nothing_given and tool("prepare_text")):
        text = tool("prepare_text", needed=True)
        folder = str(run.agree(lambda: text.prepare_text(cfg, run)))
        model = os.path.join(folder, "tokenizer.model")
        corpus = json.loads(Path(folder, "corpus.json").read_text())
    paths = {split: find_shards(folder, split) for split in ("train", "val")}
    missing = [s for s in paths if not paths[s] and (s == "val" or not cfg.load_artifact)]
    if missing:
        raise RunError(f"DATA_PATH={folder}: no *_{missing[0]}_*.bin shards there. Get the public "
                       f"ones: {FETCH}; or, with tools/ here, set TEXT_FILES='your/text/*.txt'")
    tokenizer, own = load_tokenizer(model, cfg.vocab_size), (cfg.vocab_size, run.rank, run.world)
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
    corpus |= dict(tokenizer=model, val_targets=usable, train_tokens=len(train) if train else 0,
                   vocabulary_sha256=hashlib.sha256(Path(model).read_bytes()).hexdigest())
    stream = torch.from_numpy(val.read(0, usable + 1))
    return Data(tokenizer, ByteTable(tokenizer), train, stream, corpus)

# ---- Model ---------------------------------------------------------------------------------------
# Weight matrices in banks (matrices, rows, columns): Muon works on them whole.
BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "bigram_proj", "value_proj")
EMBEDDINGS = ("tok_emb", "bigram_emb", "value_emb")
TRAINING_ONLY = ("mtp_heads",)
ROPE_TRAINED_LEN = 1024  # windows up to this long use ROPE_BASE as it is (the submissions' rule)
BIGRAM_PRIMES = 36313, 27191  # of the submissions' bigram hash

def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """SDPA with FlashAttention's signature: q (B,Tq,H,D) at the last of T; k, v (B,T,Hkv,D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask, grouped = None, q.size(1) != k.size(1)
    if q.size(2) != k.size(2):  # is_causal would align the first query with the first key
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
        mask = mask.tril(k.size(2) - q.size(2))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)

def choose_attention(cfg: Config, device: torch.device):
    """(name, function) of the best back end present: FlashAttention 3 (Hopper), 2, SDPA."""
    for name, module in (("flash3", "flash_attn_interface"), ("flash2", "flash_attn")):
        if cfg.attention in ("auto", name) and device.type == "cuda" and (
                name == "flash2" or torch.cuda.get_device_capability(device)[0] == 9):
            with contextlib.suppress(ImportError):
                return name, importlib.import_module(module).flash_attn_func
    if cfg.attention not in ("auto", "sdpa"):
        raise RunError(f"ATTENTION={cfg.attention}: not installed or not for this device; use auto")
    if device.type != "cuda": return "sdpa", sdpa_attention
    order = "CUDNN_ATTENTION FLASH_ATTENTION EFFICIENT_ATTENTION MATH".split()
    torch.backends.cuda.enable_cudnn_sdp(True)  # up to twice FlashAttention 2's speed on Hopper
    torch._C._set_sdp_priority_order([int(getattr(nn.attention.SDPBackend, b)) for b in order])
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
    """GPT with U-Net skips, the submissions' common trunk; a layer's options are data."""
    def __init__(self, cfg: Config, attention, compute_dtype=torch.float32):
        super().__init__()
        self.cfg, self.attention, self.compute_dtype = cfg, attention, compute_dtype
        self.grams = None  # while calibrating: {(name, i): sum of xᵀx of the matrix's inputs x}
        L, C, V = cfg.num_layers, cfg.model_dim, cfg.vocab_size
        self.ln_scales = [(i + 1) ** -0.5 if cfg.ln_scale else 1.0 for i in range(L)]
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
        """Orthogonal matrices, zero output projections and bigram table (its projection is not)."""
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
    def weights(self) -> dict[str, Tensor]:
        """Parameters as the forward pass uses them, in compute_dtype."""
        return {n: p.to(self.compute_dtype) for n, p in self.named_parameters()}
    def linear(self, x: Tensor, w: dict[str, Tensor], name: str, i: int = 0) -> Tensor:
        """x (...,cols) times matrix i of a bank, or an embedding, transposed."""
        if self.grams is not None:
            seen = x.detach().flatten(0, -2).float()
            self.grams[name, i] = self.grams.get((name, i), 0.0) + seen.mT @ seen
        return F.linear(x, w[name].view(-1, *w[name].shape[-2:])[i])
    def embed(self, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """x0 (B,T,C): token and bigram embedding, RMSNorm, smear gate."""
        x = F.embedding(tokens, w["tok_emb"])
        if "bigram_emb" in w:
            first, second = BIGRAM_PRIMES
            index = (first * tokens[:, 1:] ^ second * tokens[:, :-1]) % (len(w["bigram_emb"]) - 1)
            index = F.pad(index, (1, 0), value=len(w["bigram_emb"]) - 1)
            bigram = self.linear(F.embedding(index, w["bigram_emb"]), w, "bigram_proj")
            x = x + w["bigram_scale"] * bigram
        x = norm(x)
        return torch.lerp(x, F.pad(x, (0, 0, 1, -1)), w["smear_gate"].sigmoid())
    def trunk(self, w: dict[str, Tensor], tokens: Tensor, last: int) -> Tensor:
        """Normed final states (B,last,C) of the last positions of tokens (B,T); of the last block
        only keys and values see all T."""
        cfg, T = self.cfg, tokens.size(1)
        x = x0 = self.embed(w, tokens)
        tables = rope_tables(T, cfg.rope_base, cfg.rope_dims, tokens.device)
        value_embedding, first_values, skips = None, None, []
        if self.value_layers:
            value_embedding = w["value_scale"] * self.linear(
                F.embedding(tokens, w["value_emb"]), w, "value_proj")
        half = cfg.num_layers // 2
        for i in range(cfg.num_layers):
            if skips and i >= half:  # with an odd number of blocks the last one has no skip
                x = torch.addcmul(x, w["skip_weights"][i - half], skips.pop())
            x = torch.addcmul(w["resid_mix"][i, 0] * x, w["resid_mix"][i, 1], x0)
            y, values = self.attend(w, i, x, tables, value_embedding, first_values,
                                    last if i == cfg.num_layers - 1 else T)
            first_values = values if first_values is None else first_values
            x = torch.addcmul(x[:, -y.size(1):], w["attn_scale"][i], y)
            hidden = self.linear(norm(x) * self.ln_scales[i], w, "mlp_up_bank", i)
            hidden = F.leaky_relu(hidden, cfg.relu_slope).square()
            x = torch.addcmul(x, w["mlp_scale"][i], self.linear(hidden, w, "mlp_down_bank", i))
            skips += [x] if i < half else []
        return norm(x)
    def attend(self, w, i: int, x: Tensor, tables, value_embedding, first_values, last: int):
        """Attention of block i: output (B,last,C) at the last positions, raw values (B,T,·)."""
        cfg, L, (B, T, C) = self.cfg, self.cfg.num_layers, x.shape
        D = C // cfg.num_heads
        cos, sin = (t.to(x.dtype) for t in tables)
        h = norm(x) * self.ln_scales[i]
        q = self.linear(h[:, T - last:], w, "qo_bank", i).view(B, last, cfg.num_heads, D)
        k = self.linear(h, w, "kv_bank", i).view(B, T, cfg.num_kv_heads, D)
        raw = v = self.linear(h, w, "kv_bank", L + i)
        if i in self.value_layers:
            v = v + w["value_layer_scale"][self.value_layers[i]] * value_embedding
        if cfg.value_residual and first_values is not None:
            v = torch.lerp(v, first_values, w["value_gate"][i - 1].sigmoid())
        v = v.view(B, T, cfg.num_kv_heads, D)
        q = rotate(norm(q), cos[T - last:], sin[T - last:]) * w["q_gain"][i][:, None]
        y = self.attention(q, rotate(norm(k), cos, sin), v, causal=True)
        if i >= L - cfg.xsa_last_n: y = exclude_own_value(y, v[:, T - last:])
        return self.linear(y.reshape(B, last, C), w, "qo_bank", L + i), raw
    def softcapped(self, x: Tensor, w, name: str = "tok_emb", i: int = 0) -> Tensor:
        """float32 logits of states x, within ±logit_softcap."""
        logits = self.linear(x, w, name, i).float()
        return self.cfg.logit_softcap * torch.tanh(logits / self.cfg.logit_softcap)
    def logits(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """Logits (B,last,V) float32 of the last positions (default: all) of tokens (B,T) int64."""
        w = self.weights()
        return self.softcapped(self.trunk(w, tokens, last or tokens.size(1)), w)
    @torch.no_grad()
    def scores(self, tokens: Tensor, targets: Tensor, hints: Tensor) -> Tensor:
        """score_logits of windows of tokens (B,T) at the targets and hints (B,last)."""
        return score_logits(self.logits(tokens, targets.size(1)), targets, hints)
    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(loss to minimize, cross-entropy in nats per token) for tokens and targets (B,T)."""
        w = self.weights()
        x = self.trunk(w, tokens, tokens.size(1))
        loss = main = self.cross_entropy(x, w, targets)
        if "mtp_heads" in w:  # head k predicts the token k + 2 places after its position
            extra = [self.cross_entropy(x[:, :-k - 1], w, targets[:, k + 1:], "mtp_heads", k)
                     for k in range(self.cfg.mtp_num_heads)]
            loss = loss + self.cfg.mtp_loss_weight * torch.stack(extra).mean()
        return loss, main.detach()
    def cross_entropy(self, x: Tensor, w, targets: Tensor, *head) -> Tensor:
        """Mean cross-entropy in nats of states x by a head: its name in w and number."""
        return F.cross_entropy(self.softcapped(x, w, *head).flatten(0, 1), targets.flatten())

def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention: y (B,T,H,D) less its projection on its position's v (B,T,Hkv,D)."""
    grouped = y.unflatten(2, (v.size(2), -1))  # (B,T,Hkv,H/Hkv,D)
    direction = F.normalize(v, dim=-1).unsqueeze(3)
    return grouped.addcmul((grouped * direction).sum(-1, True), direction, value=-1).flatten(2, 3)

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
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)

class BankShard:
    """The matrices of a bank that this rank updates: an equal run for each rank, zero-padded."""
    def __init__(self, bank: nn.Parameter, run: Run):
        self.bank, self.run = bank, run
        size = -(-len(bank) // run.world)
        self.full = torch.zeros(size * run.world, *bank.shape[1:], device=bank.device)
        self.grad, self.momentum, self.shard = (self.full[:size].clone() for _ in range(3))
    def reduce(self) -> None:
        """Start averaging the gradient over ranks into `grad` (reduce-scatter)."""
        self.full[: len(self.bank)] = self.bank.grad
        self.work = reduce_scatter(self.grad, self.full, dist.ReduceOp.AVG, async_op=True)
    def update(self, cfg: Config, lr: float, momentum: float) -> None:
        """Muon on the shard, then start sending it to every rank (all-gather)."""
        self.momentum.mul_(momentum).add_(self.grad)
        nesterov = self.grad.add(self.momentum, alpha=momentum)
        direction = newton_schulz(nesterov, cfg.muon_backend_steps)
        self.full[: len(self.bank)] = self.bank.data
        self.shard.copy_(self.full.chunk(self.run.world)[self.run.rank])
        scale = max(1, direction.size(-2) / direction.size(-1)) ** 0.5
        self.shard.mul_(1 - lr * cfg.muon_wd).add_(direction, alpha=-lr * scale)
        self.work = all_gather(self.full, self.shard, async_op=True)

def parameter_groups(model: GPT, cfg: Config) -> tuple[list[nn.Parameter], list[dict]]:
    """(banks for Muon, largest first; groups for AdamW); every parameter in one (asserted)."""
    lrs = dict.fromkeys(EMBEDDINGS, cfg.tied_embed_lr) | dict(mtp_heads=cfg.head_lr)
    banks, by_lr = [], collections.defaultdict(list)
    for name, p in model.named_parameters():
        (banks if name in BANKS else by_lr[lrs.get(name, cfg.scalar_lr)]).append(p)
    groups = [dict(params=params, lr=0.0, base_lr=lr) for lr, params in by_lr.items()]
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
        for bank in self.banks: bank.reduce()
        grads = [p.grad for p in self.small]
        flat = torch._utils._flatten_dense_tensors(grads)  # one all-reduce for all small ones
        dist.all_reduce(flat, dist.ReduceOp.AVG)
        torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))
        for bank in self.banks: bank.work.wait()
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
        for group in self.adam.param_groups: group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for bank in self.banks:
            bank.work.wait()
            bank.bank.data.copy_(bank.full[: len(bank.bank)])
        for p in [b.bank for b in self.banks] + self.small: p.grad = None

# ---- Training ------------------------------------------------------------------------------------
MICRO_BATCH_TOKENS = 98304  # one of eight ranks' share of the challenge's step
DEFAULT_HANDLERS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

class WeightAverage:
    """Exported average: mass <- decay*mass + 1; average += (weights - average)/mass. Decay 1 is the
    mean of the samples (SWA), below 1 a bias-corrected EMA."""
    def __init__(self, model: GPT, cfg: Config):
        self.cfg, self.mass, self.samples = cfg, 0.0, 0
        self.params = [p.data for p in model.parameters()]
        self.average = [p.clone() for p in self.params]
    def update(self, before: float, after: float, lr_scale: float) -> None:
        """Take the weights in, progress having gone from `before` to `after`, in [0, 1]."""
        cfg, steps = self.cfg, [x * self.cfg.schedule_steps for x in (before, after)]
        due, decay = cfg.averaging == "ema", cfg.ema_decay ** (steps[1] - steps[0])
        if cfg.averaging == "swa":
            marks, decay = [x // cfg.swa_every for x in steps], 1.0
            due = cfg.swa_enabled and lr_scale < 0.5 and (marks[0] != marks[1] or not self.samples)
        if due:
            self.mass = decay * self.mass + 1
            self.samples += 1
            torch._foreach_lerp_(self.average, self.params, 1 / self.mass)

class Trainer:
    """Training under a cap on the time of its steps; SIGTERM or Ctrl-C ends it after the step."""
    def __init__(self, model: GPT, data: Data, cfg: Config, run: Run):
        self.model, self.data, self.cfg, self.run = model, data, cfg, run
        self.loader, self.forward = TrainLoader(data.train, cfg, run), compiled(model, cfg, run)
        self.elapsed, self.steps, self.last_loss, self.stopping = 0.0, 0, math.nan, False
        self.now, self.recompiles = 0.0, 0  # progress at the last step; graphs compiled since
        self.recent = collections.deque(maxlen=20)  # step times in seconds
        self.micro = micro_batch_tokens(cfg, run.world) // cfg.train_seq_len  # sequences
        self.cap = cfg.max_wallclock_seconds - calibration_seconds(cfg)  # seconds; 0: none
    def lr_scale(self, progress: float) -> float:
        """1, then linear to 0 over the warmdown; `progress` of the run in [0, 1]."""
        warmdown = min(1.0, self.cfg.warmdown_iters / self.cfg.schedule_steps)
        return min(1.0, (1 - progress) / warmdown) if warmdown else 1.0
    def momentum(self, progress: float) -> float:
        """Muon's momentum, warmed up linearly."""
        cfg = self.cfg
        part = min(1.0, progress * cfg.schedule_steps / max(1, cfg.muon_momentum_warmup_steps))
        return (1 - part) * cfg.muon_momentum_warmup_start + part * cfg.muon_momentum
    def progress(self) -> float:
        """Part of the run that is done, by time if there is a cap, else by steps."""
        by_steps = self.steps / max(1, self.cfg.iterations)
        return max(by_steps, min(1.0, self.elapsed / self.cap)) if self.cap else by_steps
    def gradients(self) -> Tensor:
        """Accumulate this rank's gradient of the next batch; its mean loss () in nats per token."""
        batches = list(zip(*(x.split(self.micro) for x in self.loader.next_batch())))
        total = torch.zeros((), device=self.run.device)
        for tokens, wanted in batches:
            loss, nats = self.forward(tokens, wanted)
            (loss / len(batches)).backward()
            total += nats / len(batches)
        return total
    def warm_up(self) -> None:
        """Compile and run steps; nothing remains but a micro-batch that fits into memory."""
        started, saved = self.run.sync(), [p.detach().clone() for p in self.model.parameters()]
        optimizer, position = Optimizer(self.model, self.cfg, self.run), self.loader.position
        steps, length = self.cfg.warmup_steps, self.cfg.train_seq_len
        while steps:
            try: self.gradients()
            except torch.OutOfMemoryError:
                if self.micro == 1 or self.cfg.micro_batch_tokens: raise
                smaller = replace(self.cfg, micro_batch_tokens=self.micro // 2 * length)
                self.micro = micro_batch_tokens(smaller, self.run.world) // length
                continue
            optimizer.step(1.0, self.cfg.muon_momentum)
            steps -= 1
        with torch.no_grad(): torch._foreach_copy_(list(self.model.parameters()), saved)
        self.loader.position = position
        self.run.row("warmup", steps=self.cfg.warmup_steps, seconds=self.run.sync() - started,
                     micro_batch_tokens=self.micro * length)
    def request_stop(self, number: int, _frame) -> None:
        """Signal handler: stop after this step; the next signal acts as it does by default."""
        self.stopping = True
        signal.signal(number, DEFAULT_HANDLERS[number])
    def may_continue(self) -> bool:
        """Whether another step starts, the same answer on every rank: it must end under the cap."""
        self.elapsed, slowest, stopping = self.run.over_ranks(
            dist.ReduceOp.MAX, self.elapsed, max(self.recent, default=0.0), float(self.stopping))
        if stopping: self.run.log(f"stop requested: training ends after {self.steps} steps")
        fits = not self.cap or self.elapsed + 1.1 * slowest <= self.cap
        return bool(fits and self.steps < self.cfg.iterations and not stopping)
    def train(self) -> None:
        """The loop; leaves the averaged weights in the model."""
        self.warm_up()
        for number in DEFAULT_HANDLERS: signal.signal(number, self.request_stop)
        self.average = average = WeightAverage(self.model, self.cfg)
        self.optimizer = optimizer = Optimizer(self.model, self.cfg, self.run)
        checkpoint, made = None, importlib.import_module("torch._dynamo.utils").counters["stats"]
        if self.cfg.resume or self.cfg.checkpoint_seconds:
            checkpoint = tool("checkpoint", needed=True).Checkpoint(self)
        while self.may_continue():  # ranks agree on the time here, and so on `now`
            if checkpoint: checkpoint.save_if_due()
            before, self.now = self.now, (now := self.progress())
            started, graphs = self.run.sync(), made["unique_graphs"]
            loss = self.gradients()
            optimizer.step(self.lr_scale(now), self.momentum(now))
            average.update(before, now, self.lr_scale(now))
            self.steps += 1
            self.recent.append(self.run.sync() - started)
            self.elapsed += self.recent[-1]
            self.recompiles += made["unique_graphs"] - graphs
            self.report(before, now, loss.item())
        for number, handler in DEFAULT_HANDLERS.items(): signal.signal(number, handler)
        if average.samples: torch._foreach_copy_(average.params, average.average)
        self.run.row("trained", steps=self.steps, train_seconds=round(self.elapsed, 3),
                     tokens=self.steps * self.cfg.train_batch_tokens, averaged=self.cfg.averaging,
                     averaged_samples=average.samples, averaged_steps=round(average.mass, 1),
                     recompiles=self.recompiles, peak_memory_bytes=self.run.peak_memory_bytes())
    def report(self, before: float, now: float, loss: float) -> None:
        """Log and validate where due between two times of progress; RunError if the loss is NaN."""
        cfg, (loss,) = self.cfg, self.run.over_ranks(dist.ReduceOp.AVG, loss)
        if not math.isfinite(loss):
            raise RunError(f"step {self.steps}: the loss is not finite (last finite loss "
                           f"{self.last_loss:.4f}); lower MATRIX_LR, SCALAR_LR or GRAD_CLIP_NORM")
        self.last_loss = loss
        steps = [x * cfg.schedule_steps for x in (before, now)]
        due = [bool(n) and steps[0] // n != steps[1] // n
               for n in (cfg.train_log_every, cfg.val_loss_every)]
        if due[0] or self.steps == 1:
            seconds = self.elapsed / self.steps
            self.log_step("train", train_loss=loss, lr_scale=self.lr_scale(now),
                          tokens_per_second=round(cfg.train_batch_tokens / seconds),
                          step_avg=f"{1000 * seconds:.2f}ms")
        if due[1]: self.validate()
    def validate(self) -> None:
        """Validation loss of the present weights on windows that do not overlap."""
        self.log_step("validation", **neural_score(self.model, self.data, self.cfg, self.run))
    def log_step(self, kind: str, **values) -> None:
        """A line that begins with step:done/most."""
        values["train_time"] = f"{1000 * self.elapsed:.0f}ms"
        self.run.row(kind, f"step:{self.steps}/{self.cfg.iterations}", **values)
        self.run.record[kind][-1]["step"] = self.steps

def micro_batch_tokens(cfg: Config, world: int) -> int:
    """Tokens of a rank's forward pass: the largest equal parts of its share within the limit."""
    sequences, rest = divmod(cfg.train_batch_tokens // cfg.train_seq_len, world)
    if rest or not sequences:
        raise RunError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: its sequences of "
                       f"{cfg.train_seq_len} do not divide among {world} ranks")
    most = max(1, (cfg.micro_batch_tokens or MICRO_BATCH_TOKENS) // cfg.train_seq_len)
    return cfg.train_seq_len * max(n for n in range(1, most + 1) if sequences % n == 0)

def compiled(function, cfg: Config, run: Run):
    """torch.compile where it is wanted: whole graphs of fixed shapes."""
    if cfg.compile == "0" or (cfg.compile == "auto" and run.device.type != "cuda"): return function
    import torch._inductor.config as inductor
    # 6 ms a step slower here, and silently wrong gradients (pytorch issues 179494, 193061)
    inductor.triton.mix_order_reduction = False
    return torch.compile(function, dynamic=False, fullgraph=True)

def build_model(cfg: Config, run: Run, weights: dict[str, Tensor] | None = None) -> GPT:
    """The model on the run's device, initialized or with weights; RunError if they do not fit."""
    name, attention = choose_attention(cfg, run.device)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    model = GPT(cfg, attention, dtype)
    try: model.load_state_dict(weights) if weights else model.initialize(cfg.seed)
    except RuntimeError as error:
        raise RunError(f"these weights do not fit: {str(error).splitlines()[1].strip()}") from None
    run.row("model", parameters=sum(p.numel() for p in model.parameters()), attention=name,
            compute=str(dtype).removeprefix("torch."))
    return model.to(run.device)

# ---- Quantization and artifact -------------------------------------------------------------------
# Matrices and embeddings are stored as int8 codes, a step for each row and one for each column: a
# cell is code * 2^((row + col) / 4). The rest is float16. An entropy coder charges for what codes
# tell, not for their width: bytes follow from the steps, and at equal bytes the loss is least where
# an error costs the same everywhere, step^2 * E[gradient^2] (high-rate theory; the mean square
# stands for the curvature): rows and columns take its fourth root each, and one multiple of all
# fills the budget. GPTQ (Frantar et al. 2022) rounds column by column and moves each error into the
# columns to come, along the inputs' correlations. "ans" codes a number by a Gaussian as wide as its
# row and column are (asymmetric numeral systems, Duda 2009), "zstd" and "lzma" a byte a code. File:
# magic, version, header size, SHA-256 of the rest, JSON header, compressed section, ANS words.
PER_OCTAVE = 4  # steps and spreads are quarters of an octave apart
FINEST, EXPORT_TRIALS = -64.0, 12  # log2 of the first multiple of all steps; trials of others
CALIBRATION_SEQUENCES, DAMPING = 64, 0.01  # most of a rank; GPTQ's, of the mean diagonal
MAGIC, VERSION = b"GOLFINT6", 2
PREFIX = struct.Struct("<8sHI32s")
HALF_MAX = 65504.0  # float16's largest number
# What errors in a tensor cost: E[gradient^2] of its rows (M,rows) and its columns (M,cols), up to a
# factor, and GPTQ's upper triangular matrices (M,cols,cols) or None.
Sensitivity = collections.namedtuple("Sensitivity", "row col factor")

def code_limit(name: str, cfg: Config) -> int:
    """Largest code q: 31 for 6 bits, 127 for 8 and for "ans", whose bits are averages; 0: none."""
    if name not in BANKS + EMBEDDINGS: return 0
    bits = cfg.embed_bits if name in EMBEDDINGS else cfg.matrix_bits
    return 2 ** ((8 if cfg.compressor == "ans" else bits) - 1) - 1

def matrices(w: Tensor) -> Tensor:
    """(M,rows,cols): a bank as it is, an embedding as a bank of one."""
    return w.view(-1, *w.shape[-2:])

def calibrate(model: GPT, data: Data, cfg: Config, run: Run) -> dict[str, Sensitivity]:
    """By name, from training sequences of every rank, as many as half of GPTQ_SECONDS allows."""
    if not cfg.gptq_seconds: return {}
    started, loader, used = run.sync(), TrainLoader(data.train, cfg, run), 0
    params, w = {n: p for n, p in model.named_parameters() if code_limit(n, cfg)}, model.weights()
    sums = {n: [torch.zeros_like(matrices(p.data).sum(d)) for d in (2, 1)]
            for n, p in params.items()}
    model.grams, limit = {}, calibration_seconds(cfg) / 2 or math.inf
    batches = (pair for _ in itertools.repeat(0)
               for pair in zip(*(part.split(1) for part in loader.next_batch())))
    for x, y in itertools.islice(batches, CALIBRATION_SEQUENCES):
        if used and run.sync() - started >= limit: break
        model.cross_entropy(model.trunk(w, x, x.size(1)), w, y).backward()
        used += 1
        for name, p in params.items():
            square = (2.0**20 * matrices(p.grad)).square()  # scaled: no denormal numbers
            for total, d in zip(sums[name], (2, 1)): total += square.mean(d)
        for p in model.parameters(): p.grad = None
    for total in [*itertools.chain(*sums.values()), *model.grams.values()]: dist.all_reduce(total)
    grams, model.grams, senses = model.grams, None, {}
    for n, p in params.items():
        own = [grams[n, i] for i in range(len(matrices(p))) if (n, i) in grams]
        senses[n] = Sensitivity(*sums[n], gptq_factor(torch.stack(own)) if own else None)
    (used,), seconds = run.over_ranks(dist.ReduceOp.SUM, used), run.sync() - started
    run.row("calibration", sequences=int(used), seconds=seconds)
    return senses

def calibration_seconds(cfg: Config) -> float:
    """Part of the cap on training time that calibration may take; 0 without a cap."""
    return min(cfg.gptq_seconds, cfg.max_wallclock_seconds / 40)

def gptq_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped gram (M,cols,cols)."""
    gram = gram.double()
    damping = DAMPING * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    gram = gram + damping[:, None, None] * torch.eye(gram.size(-1), device=gram.device)
    return torch.linalg.cholesky(torch.linalg.inv(gram), upper=True).float()

def step_logs(w: Tensor, limit: int, sense: Sensitivity | None = None,
              log_step: float = FINEST) -> Tensor:
    """(M,rows+cols) int8: logarithms, in 1/PER_OCTAVE octaves, of the steps of rows and columns of
    w (M,rows,cols): 2^log_step by the sensitivities, unless a row's largest value needs more."""
    row, col = w.new_zeros(w.shape[:2]), w.new_zeros(len(w), w.size(2))
    if sense:  # the floor stands for what the sample has not shown, such as a rare token's row
        row, col = (-0.25 * s.clamp(min=1e-5 * float(s.mean()) + 1e-30).log2() for s in sense[:2])
    middle = col.mean(1, keepdim=True)
    col = (PER_OCTAVE * (col - middle)).round().clamp(-127, 127)
    finest = (w.abs() * torch.exp2(-col / PER_OCTAVE)[:, None]).amax(2) / limit
    phase = torch.arange(w.size(1), device=w.device) * 0.618034 % 1  # rows switch one by one
    row = (PER_OCTAVE * (row + middle + log_step) + phase).floor()
    row = row.maximum((PER_OCTAVE * finest.log2()).ceil()).clamp(-127, 127)
    return torch.cat([row, col], 1).to(torch.int8)

def cell_steps(logs: Tensor, rows: int) -> Tensor:
    """float32 (M,rows,cols) steps from their logarithms (M,rows+cols)."""
    row, col = logs.double().tensor_split([rows], 1)
    return torch.exp2((row[:, :, None] + col[:, None]) / PER_OCTAVE).float()

def round_codes(w: Tensor, step: Tensor, limit: int, factor: Tensor | None = None) -> Tensor:
    """Integer-valued codes within +-limit of w (M,rows,cols); by GPTQ if there is a factor."""
    if factor is None: return (w / step).round().clamp(-limit, limit)
    w, codes, block = w.clone(), torch.empty_like(w), 64
    for a in range(0, w.size(2), block):
        b = min(a + block, w.size(2))
        errors = torch.empty_like(w[:, :, a:b])
        for j in range(a, b):
            codes[:, :, j] = (w[:, :, j] / step[:, :, j]).round().clamp(-limit, limit)
            error = (w[:, :, j] - codes[:, :, j] * step[:, :, j]) / factor[:, j, j, None]
            w[:, :, j:b] -= error[:, :, None] * factor[:, None, j, j:b]
            errors[:, :, j - a] = error
        w[:, :, b:] -= errors @ factor[:, a:b, b:]
    return codes

class Stored(collections.namedtuple("Stored", "shape limit steps codes")):
    """Arrays: int8 step_logs and codes (M,rows,cols); if limit is 0, float16 values in `steps`."""
    def tensor(self) -> Tensor:
        """float32, of `shape`."""
        steps = torch.from_numpy(self.steps.astype(np.float32))
        if self.limit:
            codes = torch.from_numpy(self.codes.astype(np.float32))
            steps = codes * cell_steps(steps, codes.size(1))
        return steps.view(self.shape)

def quantize(weights: dict[str, Tensor], cfg: Config, senses: dict | None = None,
             log_step: float = FINEST) -> dict[str, Stored]:
    """Every exported tensor (MTP heads stay behind), by name; RunError on NaN or infinity."""
    out = {}
    for name in sorted(weights.keys() - set(TRAINING_ONLY)):
        w, limit, codes = weights[name].detach().float(), code_limit(name, cfg), None
        if not torch.isfinite(w).all():
            raise RunError(f"weights: {name} has NaN or infinite values; nothing can be exported")
        steps, sense = w.clamp(-HALF_MAX, HALF_MAX).half(), (senses or {}).get(name)
        if limit:
            steps = step_logs(cube := matrices(w), limit, sense, log_step)
            codes = round_codes(cube, cell_steps(steps, cube.size(1)), limit,
                                sense.factor if sense else None).to(torch.int8).cpu().numpy()
        out[name] = Stored(tuple(w.shape), limit, steps.cpu().numpy(), codes)
    return out

def compress(data: bytes, method: str) -> bytes:
    """zstd level 22 or lzma preset 9."""
    return zstandard.compress(data, 22) if method == "zstd" else lzma.compress(
        data, preset=9 | lzma.PRESET_EXTREME)

def decompress(data: bytes, method: str, size: int) -> bytes:
    """Inverse of compress; RunError unless it gives `size` bytes, without making more of them."""
    try:
        plain = lzma.LZMADecompressor(memlimit=1 << 30).decompress(data, size + 1) if (
            method == "lzma") else zstandard.ZstdDecompressor().stream_reader(data).read(size + 1)
    except (lzma.LZMAError, zstandard.ZstdError, EOFError): plain = b""
    if len(plain) != size: raise RunError(f"artifact: its {method} section is damaged")
    return plain

def spreads(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (M,rows,1) and (M,1,cols) for codes (M,rows,cols): logarithms, in 1/PER_OCTAVE octaves;
    a code's root mean square is about the product."""
    square, row = codes.astype(np.float32) ** 2, np.float32(1)
    for _ in range(3):  # alternating means settle at once
        col = (square / row).mean(1, keepdims=True) + 1e-3
        row = (square / col).mean(2, keepdims=True) + 1e-3
    return tuple((PER_OCTAVE / 2 * np.log2(x)).round().clip(-63, 63).astype(np.int8)
                 for x in (row, col))

def cell_models(sides) -> tuple[np.ndarray, list]:
    """(number of each code's model; the numbers in use, each with its model)."""
    cells = np.concatenate([(row.astype(np.int16) + col).ravel() for row, col in sides])
    spread = {n: max(0.1, min(1e4, 2.0 ** (n / PER_OCTAVE))) for n in np.unique(cells).tolist()}
    gaussian = constriction.stream.model.QuantizedGaussian
    return cells, [(n, gaussian(-127, 127, 0.0, spread[n])) for n in spread]

def ans_encode(codes: list[np.ndarray]) -> tuple[bytes, bytes]:
    """(side information: spreads of rows and columns; words: the codes) of int8 (M,rows,cols)."""
    cells, models = cell_models(sides := [spreads(c) for c in codes])
    symbols, coder = np.concatenate([*map(np.ravel, codes)]), constriction.stream.stack.AnsCoder()
    for n, model in models[::-1]:  # a stack: last in, first out
        coder.encode_reverse(symbols[cells == n].astype(np.int32), model)
    return b"".join(x.tobytes() for side in sides for x in side), (
        coder.get_compressed().astype("<u4").tobytes())

def ans_decode(side: bytes, words: bytes, shapes: list[tuple]) -> list[np.ndarray]:
    """Inverse of ans_encode: flat int8 arrays of shapes (M,rows,cols); RunError on damage."""
    ends = np.cumsum([(m * rows, m * cols) for m, rows, cols in shapes])
    if len(words) % 4 or (words and not any(words[-4:])):  # no encoder ends with a zero word
        raise RunError("artifact: its code words are damaged")
    parts = iter(np.split(np.frombuffer(side, np.int8), ends[:-1]))
    cells, models = cell_models([(next(parts).reshape(m, rows, 1), next(parts).reshape(m, 1, cols))
                                 for m, rows, cols in shapes])
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    codes = np.empty(len(cells), np.int8)
    for n, model in models:
        codes[here] = coder.decode(model, int((here := cells == n).sum()))
    return np.split(codes, np.cumsum([math.prod(s) for s in shapes])[:-1])

def tensor_table(cfg: Config) -> list[list]:
    """[name, shape, limit] of every exported tensor of the architecture, by name; no memory."""
    with torch.device("meta"): model = GPT(replace(cfg, mtp_num_heads=0), None)
    return [[n, list(p.shape), code_limit(n, cfg)] for n, p in sorted(model.named_parameters())]

def pack(tensors: dict[str, Stored], cfg: Config, vocabulary: str) -> bytes:
    """The artifact, with COMPRESSOR; `vocabulary` is the hash of the network's tokenizer."""
    if cfg.compressor == "auto":
        return min((pack(tensors, replace(cfg, compressor=c), vocabulary)
                    for c in ("ans", "zstd", "lzma")), key=len)
    coded = [t.codes for t in tensors.values() if t.limit]
    plain, words = b"".join(t.steps.tobytes() for t in tensors.values()), b""
    if cfg.compressor == "ans":
        side, words = ans_encode(coded)
        section = compress(plain + side, "lzma")
    else:  # one byte a code: packing bits before a dictionary coder costs 12 % (#1649)
        section = compress(plain + b"".join(c.tobytes() for c in coded), cfg.compressor)
    header = json.dumps(dict(
        architecture={name: getattr(cfg, name) for name in ARCHITECTURE}, vocabulary=vocabulary,
        compressor=cfg.compressor, tensors=tensor_table(cfg), section_bytes=len(section)),
        sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(header + section + words).digest()
    return PREFIX.pack(MAGIC, VERSION, len(header), digest) + header + section + words

def unpack(blob: bytes, cfg: Config, vocabulary: str) -> tuple[Config, dict[str, Stored]]:
    """(cfg with the artifact's architecture, its tensors by name); RunError for any other file.
    Executes nothing, and allocates no more than the network's own shapes need."""
    magic, version, size, digest = PREFIX.unpack_from(blob.ljust(PREFIX.size, b"\0"))
    body, payload = blob[PREFIX.size:], blob[PREFIX.size + size:]
    if (magic, version) != (MAGIC, VERSION):
        raise RunError(f"artifact: not one of ours, or format version {version}, not {VERSION}")
    if size > len(body) or hashlib.sha256(body).digest() != digest:
        raise RunError("artifact: truncated or damaged (its SHA-256 does not match)")
    try:
        header = json.loads(body[:size])
        cfg = replace(cfg, compressor=header["compressor"], **{
            name: parse_value(name, str(header["architecture"][name]).strip("[]"))
            for name in ARCHITECTURE})
        check_config(cfg)
        assert cfg.compressor in ("ans", "zstd", "lzma") and header["vocabulary"]
        assert header["tensors"] == tensor_table(cfg)
        assert type(section := header["section_bytes"]) is int and 0 <= section <= len(payload)
    except (ValueError, KeyError, TypeError, AssertionError, RunError, RuntimeError, OverflowError):
        raise RunError("artifact: its header describes none of this program's networks") from None
    if header["vocabulary"] != vocabulary:
        raise RunError("artifact: made with another vocabulary than this tokenizer's")
    table, ans = header["tensors"], cfg.compressor == "ans"
    cubes = [(math.prod(shape[:-2]), *shape[-2:]) for _, shape, limit in table if limit]
    side, cells = sum(m * (r + c) for m, r, c in cubes), [math.prod(cube) for cube in cubes]
    sizes = [math.prod(shape[:-2]) * sum(shape[-2:]) if limit else 2 * math.prod(shape)
             for _, shape, limit in table]
    plain = decompress(payload[:section], "lzma" if ans else cfg.compressor,
                       sum(sizes) + (side if ans else sum(cells)))
    *steps, codes = np.split(np.frombuffer(plain, np.int8), np.cumsum(sizes))
    codes = iter(ans_decode(codes.tobytes(), payload[section:], cubes) if ans else np.split(
        codes, np.cumsum(cells)[:-1]))
    tensors = {name: Stored(tuple(shape), limit, own.reshape(-1, sum(shape[-2:])),
                            next(codes).reshape(-1, *shape[-2:])) if limit
               else Stored(tuple(shape), 0, own.view("<f2").reshape(shape), None)
               for (name, shape, limit), own in zip(table, steps)}
    if not all(t.limit or np.isfinite(t.steps).all() for t in tensors.values()):
        raise RunError("artifact: it holds NaN or infinite numbers")
    return cfg, tensors

def export(model: GPT, senses: dict, data: Data, cfg: Config, run: Run) -> bytes:
    """The artifact, with the finest steps that fit the budget, and with "ans" the bits a code too:
    a multiple of the sensitivities' steps, searched on exact sizes."""
    weights = {n: p.detach() for n, p in model.named_parameters() if n not in TRAINING_ONLY}
    attempt = lambda log_step: pack(  # noqa: E731
        quantize(weights, cfg, senses, log_step), cfg, data.corpus["vocabulary_sha256"])
    cubes = {n: matrices(w).float() for n, w in weights.items() if code_limit(n, cfg)}
    budget = cfg.artifact_bytes - code_bytes()
    if cfg.compressor == "ans": budget = min(budget, sum(w.numel() * (
        cfg.embed_bits if n in EMBEDDINGS else cfg.matrix_bits) for n, w in cubes.items()) // 8)
    started, (low, high), found, blob = run.sync(), (FINEST, -FINEST), FINEST, attempt(FINEST)
    sizes = torch.cat([(w / cell_steps(step_logs(0 * w, 1, senses.get(n), 0.0), w.size(1))).abs()
                       .flatten() for n, w in cubes.items()])
    sizes = sizes[sizes > 0].log2()  # zeros cost little, the others E log2 |w / step| + 2.9 bits
    middle, cells = float(sizes.mean()) + 2.9 - 8 * budget / (len(sizes) or 1), len(sizes) or 1
    for _ in range(EXPORT_TRIALS if len(blob) > budget else 0):
        trial = attempt(middle := middle if low < middle < high else (low + high) / 2)
        if len(trial) <= budget or len(trial) < len(blob): blob, found = trial, middle
        if 0 <= budget - len(trial) < 5e-4 * budget: break
        low, high = (low, middle) if len(trial) <= budget else (middle, high)
        middle += 8 * (len(trial) - 0.9998 * budget) / cells  # an octave is a bit a code
    run.row("artifact", artifact_bytes=len(blob), code_bytes=code_bytes(), log2_step=found,
            compressor=cfg.compressor, bits_per_parameter=8 * len(blob) / sum(
                w.numel() for w in weights.values()), seconds=run.sync() - started)
    return blob

def code_bytes() -> int:
    """Bytes of this file: all the code there is."""
    return os.path.getsize(__file__)

# ---- Windows and neural pass ---------------------------------------------------------------------
def windows(num_targets: int, seq_len: int, stride: int):
    """Yield (start, first_scored, end): spans tile the targets (i: token i + 1). The first window
    scores all, each next one its last `stride`, a window shifted back what remains."""
    end = min(seq_len, num_targets)
    yield 0, 0, end
    while end < num_targets:
        first, end = end, min(end + stride, num_targets)
        yield max(0, end - seq_len), first, end

class Grid:
    """Windows in batches, the same for any number of ranks: batch 0 is the first, the others score
    their `last` targets. table (windows,3): of `windows`. spans: each rank's targets, or none."""
    def __init__(self, num_targets: int, cfg: Config, stride: int, world: int):
        table = windows(num_targets, cfg.eval_seq_len, stride)
        self.table, self.last = torch.tensor(list(table)), stride
        self.batch = cfg.eval_batch_windows if stride < cfg.eval_seq_len else max(
            1, cfg.val_batch_size // 8 // cfg.eval_seq_len)
        count = 1 + -(-(len(self.table) - 1) // self.batch)
        cuts = [count * r // world for r in range(world + 1)]
        self.batches = [range(a, b) for a, b in zip(cuts, cuts[1:])]
        ends = [int(self.table[:1 + (c - 1) * self.batch][-1, 2]) if c else 0 for c in cuts]
        self.spans = list(zip(ends, ends[1:]))
    def rows(self, index: int) -> Tensor:
        """Windows (1 or batch, 3) of a batch; the last one is filled up with empty spans."""
        first = 1 + (index - 1) * self.batch
        rows = self.table[first:first + self.batch] if index else self.table[:1]
        filler = self.table[-1:, [0, 2, 2]].expand(self.batch - len(rows) if index else 0, 3)
        return torch.cat([rows, filler])
# Float64 (N,) each, in nats: log p of the target, entropy, log p(y) and log(1 - p(y)) of hint y.
NeuralColumns = collections.namedtuple("NeuralColumns", "logp entropy hint_logp hint_log1m")

def score_logits(logits: Tensor, targets: Tensor, hints: Tensor) -> Tensor:
    """(...,4) NeuralColumns of logits (...,V) float32, targets and hints (...). 1 - p(y) is a sum
    over the other tokens: a rounded p(y) near 1 leaves nothing to normalize with."""
    z = logits - logits.amax(-1, keepdim=True)
    e, t, y = z.exp(), targets[..., None], hints[..., None]
    others = e.scatter(-1, y, 0.0).sum(-1).double().clamp(min=1e-300)
    log_total = (others + e.gather(-1, y).squeeze(-1).double()).log()
    logp, hint_logp = (z.gather(-1, i).squeeze(-1).double() - log_total for i in (t, y))
    entropy = log_total - (e * z).sum(-1).double() / log_total.exp()
    return torch.stack([logp, entropy, hint_logp, others.log() - log_total], -1)

class NeuralPass:
    """The network over a rank's windows; the stream stays on the device as integers."""
    def __init__(self, model: GPT, data: Data, cfg: Config, run: Run, stride: int):
        self.cfg, self.run, self.model, self.data = cfg, run, model, data
        self.tokens = data.val.to(run.device)  # (N+1,) int64
        self.grid = Grid(len(self.tokens) - 1, cfg, stride, run.world)
        (self.start, self.end), self.window = self.grid.spans[run.rank], (None, None)
    def columns(self, hints: Tensor | None = None, progress: bool = False) -> Tensor:
        """score_logits (span,4) of this rank's span; hints (span,), none where negative."""
        device, length = self.run.device, self.end - self.start
        hints = torch.zeros(length, device=device) if hints is None else hints
        hints = F.pad(hints.long().clamp(min=0), (0, 1))  # slot `length` is discarded
        out = torch.zeros(length + 1, 4, dtype=torch.float64, device=device)
        score, self.byte_total = compiled(self.model.scores, self.cfg, self.run), None
        if progress and self.run.log_file:
            self.byte_total = self.data.table.target_bytes(self.data.val).cumsum(0)
        offsets = torch.arange(self.cfg.eval_seq_len, device=device)
        for b in self.grid.batches[self.run.rank]:
            rows = self.grid.rows(b)
            start, first, end = (c[:, None].to(device, non_blocking=True) for c in rows.unbind(1))
            inputs = start + offsets  # (B,T) token positions
            index = inputs if b == 0 else inputs[:, -self.grid.last:]  # (B,last) target numbers
            slot = torch.where((index >= first) & (index < end), index - self.start, length)
            function = score if b else self.model.scores  # batch 0's shape is its own: not compiled
            out[slot.flatten()] = function(self.tokens[inputs], self.tokens[index + 1],
                                           hints[slot]).flatten(0, 1)
            if self.byte_total is not None: self.log_progress(b, out)
        return out[:length]
    def log_progress(self, batch: int, out: Tensor) -> None:
        """On rank 0, the running bits per byte about every 2 % of its batches."""
        count, mine = batch * self.grid.batch + 1, len(self.grid.batches[0])
        if (batch + 1) * 50 // mine != batch * 50 // mine:
            end = int(self.grid.table[:count][-1, 2])
            bits = -float(out[:end, 0].sum()) / math.log(2)
            done = f"eval [{min(count, len(self.grid.table))}/{len(self.grid.table)}]"
            self.run.row("eval", done, bpb=bits / max(1, int(self.byte_total[end - 1])))
    @torch.no_grad()
    def distribution(self, target: int) -> Tensor:
        """Log-probabilities (V,) at a target; its window stays until `reveal` changes a token."""
        ends = self.grid.table[:, 2].contiguous()
        start, first, end = self.grid.table[torch.searchsorted(ends, target, right=True)].tolist()
        if self.window[0] != end:
            self.window = end, self.model.logits(self.tokens[None, start:end], end - first)[0]
        return self.window[1][target - first].double().log_softmax(-1).cpu()
    def reveal(self, target: int, token: int) -> None:
        """A decoder's next token becomes known."""
        if self.tokens[target + 1] != token: self.window = None, None
        self.tokens[target + 1] = self.data.val[target + 1] = token

def score_of(logp: Tensor, byte_counts: Tensor) -> dict:
    """val_loss (nats a token) and val_bpb (bits a byte) of (N,), summed in stream order."""
    nats, total = -float(np.add.reduce(logp.double().numpy())), int(byte_counts.sum())
    return dict(val_loss=nats / len(logp), val_bpb=nats / math.log(2) / max(1, total),
                tokens=len(logp), bytes=total)

def neural_score(model: GPT, data: Data, cfg: Config, run: Run) -> dict:
    """score_of windows that do not overlap, on rank 0; {} on the others."""
    neural = NeuralPass(model, data, cfg, run, cfg.eval_seq_len)
    columns = run.gather(neural.columns(), neural.grid.spans)
    return score_of(columns[:, 0], data.table.target_bytes(data.val)) if run.is_main else {}

# ---- N-gram counts -------------------------------------------------------------------------------
# Counting by sorting. With positions grouped by the n-gram that ends there, in stream order inside
# a group, "how often before" is a rank. Groups of length n + 1 come from those of length n: step
# one token on, split each group by that token with a stable sort, drop groups of one: no more is to
# repeat. Buckets in place of n-grams give a hashed table's counts, a rank among earlier chunks a
# coarser cache's.
# Columns of one order n, (positions,) int32: how often the n - 1 tokens before occurred, how often
# this token followed them; exact counts: how many different tokens did, the one that did last (-1:
# none), how often that one did, and how many tokens ago.
Counts = collections.namedtuple("Counts", "context pair distinct hint hint_count distance",
                                defaults=(None, None, None, None))
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
    else: run = run_starts(changes(groups.start, chunk[groups.position]))
    return run - groups.start

def hint_columns(contexts: Groups, occurred: Tensor, pair: Tensor, tokens: Tensor):
    """Columns (M,) of contexts that `occurred` so often, pair[position] times with this token."""
    seen = pair[contexts.position]
    novel = (seen == 0).int()
    before = novel.cumsum(0, dtype=torch.int32) - novel
    distinct = before - before.index_select(0, contexts.start)
    hint = tokens[contexts.position].roll(1).masked_fill_(occurred == 0, -1)
    hint_count = (seen + 1).roll(1).masked_fill_(occurred == 0, 0)
    distance = contexts.position.diff(prepend=contexts.position[:1]).masked_fill_(occurred == 0, 0)
    return distinct, hint, hint_count, distance

def count_ngrams(tokens, max_order, start=0, buckets=0, granularity=1, first=None, primes=None,
                 documents=False):
    """Yield (order, Counts from position `start` on), orders 1 to max_order. tokens (N,) integers.
    buckets: 0 exact, a power of 2 hashed. Targets 1, 2, ... fall into chunks, the first of `first`,
    then `granularity` each; a position sees the n-grams whose target lies in earlier chunks.
    distinct and hints: exact, one target a chunk only. documents: count inside each alone."""
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
    is_first = position[:-1] == 0
    is_first[1:] |= (tokens[:-2] == BOS) & documents
    contexts = stream = Groups(position[:-1], run_starts(is_first))
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
            columns += map(column, [contexts] * 4, hints, (0, -1, 0, 0))
        yield order, Counts(*(c[start:total] for c in columns))
        grams = hashed if buckets else grams
        contexts = Groups(grams.position + 1, grams.start)

def scan_ngrams(tokens, target, rule, max_order, cfg, begin=0):
    """(order, Counts) (V,) of every token as if it were the target, which follows tokens[target].
    Independent of count_ngrams: looks through the history, tokens [begin, target], no further."""
    known, words, primes = tokens[begin:target + 1], torch.arange(cfg.vocab_size), cfg.ngram_primes
    place, visible = len(known), min(target + 1 - begin, rule.visible(target, begin))
    ends, keys = torch.arange(visible), torch.zeros(place + 1, dtype=torch.int64)
    for order in range(1, max_order + 1):
        n = order - 1  # tokens of a context
        if n and n <= place:  # ends: places whose n tokens before are those before the target
            ends = ends[ends >= n]
            ends = ends[known[ends - n] == known[place - n]]
            if rule.buckets: keys = F.pad(keys[:-1] ^ known * primes[(n - 1) % len(primes)], (1, 0))
        followed = known[ends[:0] if n > place else ends]
        if rule.buckets and 0 < n <= place:
            last, mask = primes[n % len(primes)], rule.buckets - 1
            table = ((keys[n:visible] ^ known[n:visible] * last) & mask).sort().values
            wanted = (keys[place] ^ words * last) & mask
            low, high = (torch.searchsorted(table, wanted, right=r) for r in (False, True))
            context = (keys[n:visible] & mask == keys[place] & mask).sum()
            yield order, Counts(context.expand(len(words)), high - low)
            continue
        pair, count = torch.bincount(followed, minlength=len(words)), len(followed)
        hint = int(followed[-1]) if count else -1
        facts = (count, int((pair > 0).sum()), hint, int(pair[hint]) if count else 0,
                 place - int(ends[-1]) if count else 0)
        count, *rest = (torch.full_like(words, x) for x in facts)
        yield order, Counts(count, pair, *rest)
# ---- Mixing --------------------------------------------------------------------------------------
# Backoff (submissions #889, #806, #890, #1094): the longest context that matches gives the ratio
# min(pair, context)/context, which alpha, a function of the network's entropy, blends with the
# network: a distribution with exact counts and a match on the context alone, and not with colliding
# tables or a match that looks at the target. Calibrated (ours): two stages, both distributions,
# both learned online from scored targets only. Hint: the longest known context names a token y. A
# table holds how often such hints were right: a bucket by what counts say of the hint, KNOTS points
# over the network's logit p(y), linear in between (an adaptive probability map, as in PAQ), first
# the network's opinion. With s read from it, p(y) = s, and the other tokens share 1 - s in the
# network's proportions. Interpolation (Jelinek and Mercer 1980): P = (1 - lambda)*P + lambda*pair/
# context over contexts of rising length, the document's, then the stream's; lambda from a table by
# what the context looks like, re-estimated by EM: the mass that a level explained over what reached
# it. Buckets look at contexts alone and tables change between chunks only, so a distribution is
# there before its target. Tables count in integers of 2^-32: no order of adding changes them.
PROBABILITY_FLOOR, BATCH_WINDOWS = 1e-12, 128  # the submissions'; #1094's between table updates

class Rule(typing.NamedTuple):
    """Which counts a backoff rule reads."""
    buckets: int = 0  # 0: exact
    match: str = "context"  # or "pair" too
    first: int = 1  # targets of the first chunk; the others have `granularity`
    granularity: int = 1
    cold: bool = False  # the history begins with a rank's span
    def counted(self, tokens: Tensor, span: tuple[int, int], cfg: Config):
        """(order, Counts) of the targets `span` of a stream; a rank counts all before (prefill)."""
        (start, end), begin = span, span[0] if self.cold else 0
        first = self.granularity if self.cold and start else self.first
        return count_ngrams(tokens[begin:end + 1], cfg.ngram_max_order, start + 1 - begin,
                            self.buckets, self.granularity, first, cfg.ngram_primes)
    def visible(self, target: int, begin: int) -> int:
        """How many tokens from `begin` on a target sees counted."""
        first = self.granularity if self.cold and begin else self.first
        place = target - begin - first  # negative in the history's first chunk
        return 1 + (first + place // self.granularity * self.granularity if place >= 0 else 0)

def backoff_rules(cfg: Config) -> dict[str, Rule]:
    """Every backoff scoring of a run, by its name in the score table."""
    lag = dict(token=0, window=1, batch=BATCH_WINDOWS)[cfg.ngram_granularity] * cfg.eval_stride
    first = cfg.eval_seq_len - cfg.eval_stride + lag if lag else 1
    rules = dict(backoff_exact=Rule(), backoff_hashed=Rule(
        cfg.ngram_buckets, cfg.ngram_match, first, lag or 1, cfg.ngram_history == "cold"))
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
            matched = (counts.context * 0 + (cfg.ngram_fallback == "unigram")).to(torch.int8)
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

ONE = 2.0**32  # the tables' unit; these constants were chosen with bench/mixers.py
KNOTS, KNOT_MAX = 25, 12.0  # a knot per logit from -12 to 12
HINT_PRIOR = 10.0  # pseudo-observations a knot
LEVEL_PRIOR = 0.1, 2.0  # a, b: lambda starts at a/(a + b)
LOG2_COUNTS, VARIETIES, ENTROPIES = 13, 8, 6  # bins of a level's key; entropy in whole nats
LEVEL_KEYS = 1 + LOG2_COUNTS * VARIETIES * 3
HINT_ORDERS, SHARES = 17, 5  # bins of a hint's key; orders 16 and longer share theirs
SHORT_ORDERS = 2, 3, 4  # orders asked whether they name the same hint; the document's levels

# Of the counts: hint (N,) int32, -1: none; hint_key (N,) int32, what they say of it, 0: none; ratio
# (levels,N) float32, pair/context of the target; level_key (levels,N) int16, of the context.
NgramColumns = collections.namedtuple("NgramColumns", "hint hint_key ratio level_key")

def distance_bin(distance: Tensor, near: int) -> Tensor:
    """0 to 2: the context occurred last within attention, farther than `near`, or far away."""
    return (distance >= near).int() + (distance >= 16 * near).int()

def level_key(counts: Counts, near: int) -> Tensor:
    """int16 key of each position's context: how often, how varied, how long ago; 0 if new."""
    size = torch.frexp(counts.context.clamp(1, 2**(LOG2_COUNTS - 1)).float()).exponent - 1
    variety = (counts.distinct * VARIETIES - 1) // counts.context.clamp(min=1)  # < VARIETIES
    key = 1 + (size * VARIETIES + variety) * 3 + distance_bin(counts.distance, near)
    return torch.where(counts.context > 0, key, 0).to(torch.int16)

def ngram_columns(document_counts, counts, near: int) -> NgramColumns:
    """From (order, Counts) inside documents and over the stream. A hint's key: its order, share of
    the context, distance, and which of SHORT_ORDERS agree with it."""
    ratios, keys, short, hint, hint_key = [], [], [], -1, 0
    for in_stream, counted in enumerate((document_counts, counts)):
        for order, c in ((order, c) for order, c in counted if order > 1):
            ratios.append((c.pair.double() / c.context.clamp(min=1)).float())
            keys.append(level_key(c, near))
            if in_stream:
                share = c.hint_count * (SHARES - 1) // c.context.clamp(min=1)
                key = min(order, HINT_ORDERS - 1) * SHARES + share
                key = key * 3 + distance_bin(c.distance, near)
                hint = torch.where(c.context > 0, c.hint, hint)
                hint_key = torch.where(c.context > 0, key, hint_key)
                short += [c.hint] if order in SHORT_ORDERS else []
    for other in short: hint_key = hint_key * 2 + (other == hint)
    return NgramColumns(hint, torch.where(hint >= 0, hint_key, 0), torch.stack(ratios),
                        torch.stack(keys))

def stream_columns(tokens: Tensor, span: tuple[int, int], cfg: Config) -> NgramColumns:
    """NgramColumns of the targets `span` of a stream (N+1,), by one count of all before."""
    tokens, start = tokens[:span[1] + 1], span[0] + 1
    return ngram_columns(count_ngrams(tokens, max(SHORT_ORDERS), start, documents=True),
                         count_ngrams(tokens, cfg.mixer_max_order, start), cfg.eval_seq_len)
# M candidates, the targets of a chunk or all tokens at one position; is_hint: it is the hint.
MixInputs = collections.namedtuple(
    "MixInputs", "logp entropy hint_logp hint_log1m is_hint hint_key ratio level_key")
# Mixed logp (M,), and what an update takes: knot (2,M), cells of the hint table, with weight (2,M)
# int64; cell (levels,M) of the level table; posterior (1+levels,M), who explains how much of P.
Prediction = collections.namedtuple("Prediction", "logp is_hint knot weight cell posterior")

class CalibratedMixer:
    """The tables. `predict` reads them, `update` adds a scored chunk; nothing else changes them."""
    def __init__(self, levels: int, device="cpu"):
        hints = HINT_ORDERS * SHARES * 3 * 2**len(SHORT_ORDERS) * KNOTS
        self.hint_seen, self.hint_right = torch.zeros(2, hints, dtype=torch.int64, device=device)
        cells = levels * ENTROPIES * LEVEL_KEYS
        self.reached, self.explained = torch.zeros(2, cells, dtype=torch.int64, device=device)
        self.first_cell = torch.arange(levels, device=device)[:, None] * ENTROPIES * LEVEL_KEYS
    def copy(self) -> CalibratedMixer:
        """The tables as they are now, on the CPU."""
        other = copy.copy(self)
        vars(other).update({k: t.to("cpu", copy=True) for k, t in vars(self).items()})
        return other
    def hint_stage(self, x: MixInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (M,) after the hint, knots (2,M) and their weights (2,M)."""
        step, has_hint = 2 * KNOT_MAX / (KNOTS - 1), x.hint_key > 0
        place = ((x.hint_logp - x.hint_log1m + KNOT_MAX) / step).clamp(0, KNOTS - 1)
        below = place.long().clamp(max=KNOTS - 2)
        upper = ((place - below) * ONE).round().long()
        knot = x.hint_key.long() * KNOTS + torch.stack([below, below + 1])
        opinion = torch.sigmoid((knot % KNOTS).double() * step - KNOT_MAX) * HINT_PRIOR
        right = opinion + self.hint_right[knot].double() / ONE
        wrong = HINT_PRIOR + self.hint_seen[knot].double() / ONE - right
        logits = right.log() - wrong.log()
        logit = torch.lerp(logits[0], logits[1], place - below)
        others = x.logp - x.hint_log1m + F.logsigmoid(-logit)
        logp = torch.where(x.is_hint, F.logsigmoid(logit), others)
        weight = torch.stack([int(ONE) - upper, upper]) * has_hint
        return torch.where(has_hint, logp, x.logp), knot, weight
    def predict(self, x: MixInputs) -> Prediction:
        """Mix: P sums each level's lambda * ratio times the 1 - lambda of all levels above."""
        logp, knot, weight = self.hint_stage(x)
        entropy = x.entropy.long().clamp(0, ENTROPIES - 1)
        cell = x.level_key.long() + entropy * LEVEL_KEYS + self.first_cell
        a, b = LEVEL_PRIOR
        explained, reached = (t[cell].double() / ONE for t in (self.explained, self.reached))
        weights = ((a + explained) / (a + b + reached)).masked_fill_(x.level_key == 0, 0.0)
        passed = (1 - weights).flip(0).cumprod(0).flip(0)
        part = torch.cat([passed[:1] * logp.exp(), weights * x.ratio])
        part[1:-1] *= passed[1:]
        total = part.sum(0)
        return Prediction(total.log(), x.is_hint, knot, weight, cell, part / total)
    def update(self, seen: Prediction) -> None:
        """Add scored targets. What reaches a level is what it and all below it explain."""
        knot, cell = seen.knot.flatten(), seen.cell.flatten()
        self.hint_seen.index_add_(0, knot, seen.weight.flatten())
        self.hint_right.index_add_(0, knot, (seen.weight * seen.is_hint).flatten())
        for table, mass in ((self.explained, seen.posterior),
                            (self.reached, seen.posterior.cumsum(0))):
            table.index_add_(0, cell, (mass[1:] * ONE).round().long().flatten())

def mix(inputs: MixInputs, chunk: int, keep=()) -> tuple[Tensor, dict[int, CalibratedMixer]]:
    """(log-probability (N,) of every target, the tables as they were at the targets of `keep` and,
    by N, at the end). Score first: the tables are read for a chunk, then updated."""
    out, kept = torch.empty_like(inputs.logp), {}
    mixer, threads = CalibratedMixer(len(inputs.ratio), out.device), torch.get_num_threads()
    torch.set_num_threads(1)  # a chunk is too small to share, and sums keep their order
    for begin in range(0, len(out), chunk):
        if own := [i for i in keep if begin <= i < begin + chunk]:
            kept |= dict.fromkeys(own, mixer.copy())
        seen = mixer.predict(MixInputs(*(c[..., begin:begin + chunk] for c in inputs)))
        out[begin:begin + chunk] = seen.logp
        mixer.update(seen)
    torch.set_num_threads(threads)
    return out, kept | {len(out): mixer.copy()}

# ---- Evaluation ----------------------------------------------------------------------------------
MASS_POSITIONS, NORMALIZED_WITHIN = 32, 1e-4  # targets at which scorings are summed; tolerance

class Evaluation:
    """One neural pass, scored in several ways. On rank 0, by scoring: `rows` of results, `logp`
    (N,). `samples`: targets at which distributions are summed."""
    def __init__(self, model: GPT, data: Data, cfg: Config, run: Run):
        self.cfg, self.run, self.data = cfg, run, data
        self.neural = NeuralPass(model, data, cfg, run, cfg.eval_stride)
        self.rules = backoff_rules(cfg) if cfg.ngram_enabled else {}
        names = ["neural", *self.rules, *["calibrated"][:cfg.ngram_enabled]]
        wanted = f"backoff_{cfg.ngram_table}" if cfg.scoring == "backoff" else cfg.scoring
        self.headline = wanted if wanted in names else "neural"
        self.order = sorted(names, key=lambda name: name != self.headline)
        self.rows, self.logp, self.columns, self.mixers = {}, {}, None, {}
        self.earlier_seconds = 0.0  # of a resumed neural pass
        count = max(4, min(MASS_POSITIONS, 2**28 // len(data.val)))  # scans of long ones are slow
        self.samples = np.random.RandomState(cfg.seed).randint(0, len(data.val) - 1, count).tolist()
    def neural_pass(self, artifact: str = "") -> None:
        """Count, to name the hints, and run the network, unless RESUME_EVAL finds the artifact's
        (by its hash) columns saved; they are on rank 0."""
        cfg, run, spans, tokens = self.cfg, self.run, self.neural.grid.spans, self.neural.tokens
        started, saved = run.sync(), artifact and tool("saved_pass")
        if saved and cfg.resume_eval and run.agree(lambda: saved.load(self, artifact)): return
        hints = stream_columns(tokens, spans[run.rank], cfg).hint if cfg.ngram_enabled else None
        out = run.gather(self.neural.columns(hints, progress=True), spans)
        self.columns = NeuralColumns(*out.unbind(1)) if run.is_main else None
        if saved and run.is_main: saved.save(self, artifact, out, run.sync() - started)
    def mix_inputs(self, end: int) -> MixInputs:
        """What the calibrated mixer reads for the targets before `end`, on rank 0's device."""
        tokens = self.neural.tokens[:end + 1]
        ngram = stream_columns(tokens, (0, end), self.cfg)
        neural = (c[:end].to(tokens.device) for c in self.columns)
        return MixInputs(*neural, ngram.hint == tokens[1:], *ngram[1:])
    def mixed(self, scoring: str) -> Tensor | None:
        """Log-probabilities (N,) of a scoring on rank 0; all ranks take part."""
        cfg, run, spans, tokens = self.cfg, self.run, self.neural.grid.spans, self.neural.tokens
        if scoring == "calibrated" and run.is_main:
            inputs = self.mix_inputs(len(tokens) - 1)
            logp, self.mixers = mix(inputs, cfg.mixer_chunk_tokens, self.samples)
            return logp.cpu()
        if scoring in self.rules:
            rule = self.rules[scoring]
            part = backoff_columns(rule.counted(tokens, spans[run.rank], cfg), rule.match, cfg)
            part = BackoffColumns(*(run.gather(c, spans) for c in part))
            if run.is_main:
                return backoff_logp(self.columns.logp, self.columns.entropy, part, cfg)
        return self.columns.logp if run.is_main else None
    def score(self, scoring: str, started: float) -> None:
        """Mix, and keep the row with its seconds since `started`; all ranks take part."""
        logp = self.mixed(scoring)
        if logp is None: return
        byte_counts = self.data.table.target_bytes(self.data.val)
        seconds, self.logp[scoring] = self.run.sync() - started, logp
        self.rows[scoring] = score_of(logp, byte_counts) | dict(seconds=seconds)
    def candidates(self, target: int, logp: Tensor) -> MixInputs:
        """All tokens (V,) at a target, from the network's log-probabilities (V,)."""
        cfg, tokens, words = self.cfg, self.data.val, torch.arange(len(logp))
        starts = (tokens[:target + 1] == BOS).nonzero().flatten().tolist()
        begin = starts[-1] + 1 if starts else 0
        documents = scan_ngrams(tokens, target, Rule(), max(SHORT_ORDERS), cfg, begin)
        stream = scan_ngrams(tokens, target, Rule(), cfg.mixer_max_order, cfg)
        ngram = ngram_columns(documents, stream, cfg.eval_seq_len)
        y = ngram.hint[0].clamp(min=0)
        others = logp.masked_fill(words == y, -math.inf).logsumexp(0)
        neural = (x.expand_as(logp) for x in (-(logp.exp() * logp).sum(), logp[y], others))
        return MixInputs(logp, *neural, ngram.hint == words, *ngram[1:])
    def distribution(self, scoring: str, target: int, logp: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (V,) of a scoring from the network's, and a rule's n-gram part (V,)."""
        if scoring == "calibrated":
            return self.mixers[target].predict(self.candidates(target, logp)).logp, None
        if scoring not in self.rules: return logp, None
        rule, spans, cfg = self.rules[scoring], self.neural.grid.spans, self.cfg
        begin = max(a for a, b in spans if a <= target < b) if rule.cold else 0
        counted = scan_ngrams(self.data.val, target, rule, cfg.ngram_max_order, cfg, begin)
        part = backoff_columns(counted, rule.match, cfg)
        entropy = -(logp.exp() * logp).sum().expand_as(logp)
        ngram = torch.where(part.order > 0, part.probability, 0.0)
        return backoff_logp(logp, entropy, part, cfg), ngram
    def masses(self) -> None:
        """Sum each scoring over the vocabulary at the samples; score_error: to the score given."""
        networks = [self.neural.distribution(i) for i in self.samples]
        for scoring, row in self.rows.items():
            pairs = [self.distribution(scoring, i, n) for i, n in zip(self.samples, networks)]
            masses = [float(p.exp().sum()) for p, _ in pairs]
            sums = [float(n.sum()) for _, n in pairs if n is not None and n.any()]
            errors = [abs(float(p[self.data.val[i + 1]] - self.logp[scoring][i]))
                      for i, (p, _) in zip(self.samples, pairs)]
            row |= dict(mass=float(np.mean(masses)), max_mass=max(masses), score_error=max(errors),
                        mass_error=max(abs(m - 1) for m in masses))
            row |= dict(ngram_mass=float(np.mean(sums))) if sums else {}
            row["normalized"] = "no" if row["mass_error"] > NORMALIZED_WITHIN else "yes"

# ---- Audit ---------------------------------------------------------------------------------------
# The run proves its own score: what the challenge's issue #1017 asks (causal, normalized, scored
# before seen, one pass), its bytes, and that it is the length of a message that decodes. Checks go
# another way than the score: a changed stream, counts by scans, a coder that goes token by token.
AUDIT_UPDATES, AUDIT_TARGETS = 3, 1024  # table updates before coding starts; targets coded
AUDIT_TEXT_TOKENS = 2_000_000  # whose bytes are counted in their text
MASS_WITHIN, SCORE_WITHIN = 1e-6, 1e-4  # of 1; of the batched score, in nats
CODED_WITHIN, CODED_BITS = 1e-3, 64  # of the claim: a coder's fixed-point loss and its last words

def audit_span(e: Evaluation) -> tuple[int, int]:
    """(first, end) of the coded targets: whole windows, so that the run scored them by the same."""
    length, stride, rule = e.cfg.eval_seq_len, e.cfg.eval_stride, e.rules.get(e.headline, Rule())
    updates = AUDIT_UPDATES * max(rule.granularity, e.cfg.mixer_chunk_tokens)
    known = max(rule.first + updates, e.cfg.ngram_start_tokens)
    strides = (len(e.data.val) - 1 - length) // stride
    before = min(max(0, -((length - known) // stride)), strides // 2)
    coded = min(-(-AUDIT_TARGETS // stride), strides - before)
    return length + before * stride, length + (before + coded) * stride

def evaluate_alone(model: GPT, val: Tensor, cfg: Config, run: Run, samples=()) -> Evaluation:
    """An evaluation of another stream after its neural pass, on this rank alone."""
    evaluation = Evaluation(model, Data(None, None, None, val, {}), cfg, run.alone())
    evaluation.samples = samples
    evaluation.neural_pass()
    return evaluation

def audit_causal(evaluation: Evaluation) -> dict:
    """Replace all tokens from a target on: no score before, nor the distribution there, differs."""
    e, val, cfg = evaluation, evaluation.data.val, evaluation.cfg
    rng, (first, end) = np.random.RandomState(cfg.seed), audit_span(e)
    target = int(rng.randint(first, end))
    changed = val[:end + 1].clone()
    changed[target + 1:] = torch.from_numpy(rng.randint(0, cfg.vocab_size, end - target))
    both = [evaluate_alone(e.neural.model, x, cfg, e.run, [target])
            for x in (val[:end + 1], changed)]
    real, other = (x.mixed(e.headline) for x in both)
    whole = [x.distribution(e.headline, target, x.neural.distribution(target))[0] for x in both]
    pairs = [(real[:target], other[:target]), (real, e.logp[e.headline][:end]), whole]
    pairs += [(a[:target + 1], b[:target + 1])  # all but the target's own log-probability
              for a, b in list(zip(*(x.columns for x in both)))[1:]]
    differing = sum(int((a != b).sum()) for a, b in pairs)
    return dict(passed=not differing, target=target, replaced=end - target, differing=differing)

def audit_normalized(evaluation: Evaluation) -> dict:
    """Sums over the vocabulary at the sampled targets, by scans; the scores given were theirs."""
    row = evaluation.rows[evaluation.headline]
    passed = row["mass_error"] <= MASS_WITHIN and row["score_error"] <= SCORE_WITHIN
    return dict(passed=passed, targets=len(evaluation.samples), **{key: row[key] for key in (
        "mass", "mass_error", "score_error", "ngram_mass") if key in row})

def audit_single_pass(evaluation: Evaluation) -> dict:
    """Every target is in one scored span; sampled tables equal those made of a cut-off stream."""
    e, edges = evaluation, np.zeros(len(evaluation.data.val), np.int64)
    rows = torch.cat([e.neural.grid.rows(b) for part in e.neural.grid.batches for b in part])
    np.add.at(edges, rows[:, 1].numpy(), 1)
    np.add.at(edges, rows[:, 2].numpy(), -1)
    times, rebuilt, wrong = edges.cumsum()[:-1], sorted(e.mixers)[:4], 0
    for target in rebuilt:
        begin = target // e.cfg.mixer_chunk_tokens * e.cfg.mixer_chunk_tokens
        tables = vars(mix(e.mix_inputs(begin), e.cfg.mixer_chunk_tokens)[1][begin])
        wrong += any(not torch.equal(t, tables[k]) for k, t in vars(e.mixers[target]).items())
    return dict(passed=bool((times == 1).all()) and not wrong, targets=len(times),
                most_times=int(times.max()), unscored=int((times == 0).sum()),
                rebuilt_tables=len(rebuilt), wrong_tables=wrong)

def audit_bytes(evaluation: Evaluation) -> dict:
    """Token bytes of each document against the UTF-8 length of its decoded text; no <unk>."""
    tokenizer, val, table = evaluation.data.tokenizer, evaluation.data.val, evaluation.data.table
    unknown = int((val[1:] == tokenizer.unk_id()).sum())
    starts, wrong, counted, documents = (val == BOS).nonzero().flatten(), 0, 0, 0
    text = val[:AUDIT_TEXT_TOKENS]  # whose end may cut a character
    while len(text) > 1 and tokenizer.is_byte(int(text[-1])): text = text[:-1]
    for document in text.tensor_split(starts[starts < len(text)]):
        if len(document) < 2: continue
        own = int(table.target_bytes(document).sum())
        wrong += own != len(tokenizer.decode(document[1:].tolist()).encode())
        counted, documents = counted + own, documents + 1
    return dict(passed=documents > 0 == wrong == unknown, documents=documents, bytes=counted,
                wrong_documents=wrong, unknown_targets=unknown)

def replay(evaluation: Evaluation, first: int, choose) -> Tensor:
    """Go through the targets from `first` on one at a time: choose(target, log-probabilities (V,))
    gives each token, and only then it is known. Returns the tokens' log-probabilities."""
    e, out, chunk = evaluation, [], evaluation.cfg.mixer_chunk_tokens
    if calibrated := e.headline == "calibrated":
        full, inputs = first // chunk * chunk, e.mix_inputs(first)
        part = [MixInputs(*(c[..., a:b].cpu() for c in inputs))
                for a, b in ((0, full), (full, first))]
        mixer, pending = mix(part[0], chunk)[1][full], [part[1]]
    for target in range(first, len(e.data.val) - 1):
        network = e.neural.distribution(target)
        if calibrated:
            candidates = e.candidates(target, network)
            logp = mixer.predict(candidates).logp
        else: logp = e.distribution(e.headline, target, network)[0]
        token = choose(target, logp)
        e.neural.reveal(target, token)
        out.append(logp[token])
        if calibrated:
            pending.append(MixInputs(*(c[..., token:token + 1] for c in candidates)))
            if (target + 1) % chunk == 0:
                seen = MixInputs(*(torch.cat(c, -1) for c in zip(*pending)))
                mixer.update(mixer.predict(seen))
                pending = []
    return torch.stack(out)

def entropy_model(logp: Tensor):
    """constriction's model of a distribution (V,), made to add up to 1 whatever it claims."""
    probabilities = (logp - logp.logsumexp(0)).exp().float().numpy()
    return constriction.stream.model.Categorical(probabilities, perfect=False)

def encode_message(model: GPT, val: Tensor, span: tuple[int, int], cfg: Config, run: Run):
    """(message: span, the tokens before as they are, its targets coded; coded bits; their logp)."""
    coder, first = constriction.stream.queue.RangeEncoder(), span[0] + 1
    prefix = val[:first].numpy().astype("<u2").tobytes()
    def choose(target, logp):
        coder.encode(int(val[target + 1]), entropy_model(logp))
        return int(val[target + 1])
    logp = replay(evaluate_alone(model, val[:span[1] + 1].clone(), cfg, run), span[0], choose)
    words = coder.get_compressed().astype("<u4").tobytes()
    return struct.pack("<2I", *span) + prefix + words, 8 * len(words), logp

def decode_message(model: GPT, message: bytes, cfg: Config, run: Run) -> Tensor:
    """The tokens (end+1,) of an encoded message, from the network and the message alone."""
    first, end = struct.unpack_from("<2I", message)
    prefix = torch.from_numpy(np.frombuffer(message, "<u2", first + 1, 8).astype(np.int64))
    words = np.frombuffer(message, "<u4", offset=8 + 2 * len(prefix)).astype(np.uint32)
    coder = constriction.stream.queue.RangeDecoder(words)
    evaluation = evaluate_alone(model, F.pad(prefix, (0, end - first)), cfg, run)
    replay(evaluation, first, lambda _, logp: int(coder.decode(entropy_model(logp))))
    return evaluation.data.val

def audit_decodable(evaluation: Evaluation) -> dict:
    """Code a part of the stream from the headline's distributions, and decode it."""
    e, val, model = evaluation, evaluation.data.val, evaluation.neural.model
    first, end = span = audit_span(e)
    torch.set_num_threads(1)  # on one window at a time two would wait for each other
    message, bits, logp = encode_message(model, val, span, e.cfg, e.run)
    claimed = e.logp[e.headline][first:end]
    claim, error = -float(claimed.sum()) / math.log(2), float((claimed - logp).abs().max())
    same = torch.equal(decode_message(model, message, e.cfg, e.run), val[:end + 1])
    within = abs(bits - claim) <= CODED_WITHIN * claim + CODED_BITS
    return dict(passed=same and within and error <= SCORE_WITHIN, targets=end - first,
                prefix_tokens=first + 1, same_tokens=same, score_error=error, coded_bits=bits,
                claimed_bits=round(claim, 1))

def audit(evaluation: Evaluation) -> list[str]:
    """Run every check and log its verdict, on rank 0 all by itself; the names of those failed."""
    run = evaluation.run
    for check in (audit_causal, audit_normalized, audit_single_pass, audit_bytes, audit_decodable):
        started, name = run.sync(), check.__name__.removeprefix("audit_")
        figures = check(evaluation)
        verdict = "PASS" if figures.pop("passed") else "FAIL"
        run.row("audit", f"audit {name} {verdict}", **figures, seconds=run.sync() - started)
        run.record["audit"][-1] |= dict(name=name, verdict=verdict)
    return [row["name"] for row in run.record["audit"] if row["verdict"] == "FAIL"]

# ---- Report --------------------------------------------------------------------------------------
def describe_run(cfg: Config, notes: list[str], data: Data, run: Run) -> None:
    """Log configuration, versions, hardware, revision and corpus."""
    gpu = torch.cuda.get_device_name() if run.device.type == "cuda" else "none"
    code, revision = hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), ""
    describe = "git describe --always --abbrev=40 --dirty=+ --exclude=*"  # "+": changed since
    with contextlib.suppress(OSError): revision = subprocess.run(
        describe.split(), text=True, cwd=Path(__file__).resolve().parent,
        capture_output=True).stdout.strip()
    run.record |= dict(notes=notes, corpus=data.corpus, config=asdict(cfg), facts=dict(
        torch=torch.__version__, python=platform.python_version(), numpy=np.__version__,
        machine=platform.machine(), cores=os.cpu_count(), gpu=gpu, world_size=run.world,
        revision=revision or "unknown", code_sha256=code, code_bytes=code_bytes()))
    for kind in ("facts", "corpus", "config"):
        run.log(f"{kind} " + " ".join(f"{k}:{v}" for k, v in run.record[kind].items()))

def final_report(evaluation: Evaluation, blob: bytes, cfg: Config, run: Run) -> None:
    """Result lines, score table, budgets, files and, last, the final line; on rank 0."""
    stage, headline = f"int{cfg.matrix_bits}_sliding", evaluation.headline
    for scoring, row in evaluation.rows.items():
        run.row("result", stage=stage, scoring=scoring, **row)
    best, total = evaluation.rows[headline], len(blob) + code_bytes()
    budgets = [("total_bytes", total, cfg.artifact_bytes),
               ("eval_seconds", round(best["seconds"], 1), cfg.max_eval_seconds)]
    if run.record["trained"] and cfg.max_wallclock_seconds:
        used = run.record["trained"][0]["train_seconds"] + sum(
            row["seconds"] for row in run.record["calibration"])
        budgets.append(("train_seconds", round(used, 3), cfg.max_wallclock_seconds))
    for name, used, limit in budgets:
        verdict = "PASS" if used <= limit else f"FAIL excess:{used - limit:.10g}"
        run.record["budget"].append(dict(name=name, used=used, limit=limit, verdict=verdict))
        run.log(f"budget {name}:{used}/{limit:.10g} {verdict}")
    final = {key: best[key] for key in ("val_loss", "val_bpb")} | dict(
        scoring=headline, normalized=best["normalized"], total_bytes=total, seed=cfg.seed)
    run.record["final"].append(final)
    if report := tool("report"):
        for line in report.score_table(evaluation): run.log(line)
        run.record |= report.pictured(evaluation)
        if picture := report.plot(run.record): run.save(".png", picture)
        run.save(".submission.json", report.submission(run.record))
    run.save(".json", json.dumps(run.record, indent=1).encode())
    run.row("final", **final)

# ---- Main ----------------------------------------------------------------------------------------
def read_weights(path) -> dict[str, Tensor]:
    """Tensors by name of a file of safetensors; RunError for any other file."""
    try: return safetensors.torch.load(Path(path).read_bytes())
    except safetensors.SafetensorError as error: raise RunError(f"{path}: {error}") from None

def make_artifact(data: Data, cfg: Config, run: Run) -> bytes:
    """Train and save the weights, or load some; export and save; the artifact, on every rank."""
    if cfg.load_weights:
        model = build_model(cfg, run, read_weights(cfg.load_weights))
    else:
        run.stage, model = "training", build_model(cfg, run)
        trainer = Trainer(model, data, cfg, run)
        trainer.train()
        if run.is_main: run.save(".safetensors", {
            n: p.detach().cpu().contiguous() for n, p in model.named_parameters()})
        trainer.validate()
    run.stage = "export"
    senses = calibrate(model, data, cfg, run)
    def work():
        blob = export(model, senses, data, cfg, run)
        run.save(f".int{cfg.matrix_bits}.ptz", blob)
        return blob
    return run.agree(work)

def evaluate_artifact(blob: bytes, data: Data, cfg: Config, run: Run) -> int:
    """Score what would be shipped; the exit status, 3 if AUDIT=strict and a check failed."""
    run.stage, started = "evaluation", run.sync()
    cfg, tensors = unpack(blob, cfg, data.corpus["vocabulary_sha256"])
    weights = {name: tensor.tensor() for name, tensor in tensors.items()}
    model = build_model(replace(cfg, mtp_num_heads=0), run, weights)
    evaluation = Evaluation(model, data, cfg, run)
    evaluation.neural_pass(hashlib.sha256(blob).hexdigest())
    evaluation.score(evaluation.headline, started - evaluation.earlier_seconds)  # the clock ends
    for scoring in evaluation.order[1:]: evaluation.score(scoring, run.sync())
    started, roundtrip = run.sync(), neural_score(model, data, cfg, run)
    if run.is_main:
        run.row("result", stage=f"int{cfg.matrix_bits}_roundtrip", scoring="neural", **roundtrip,
                seconds=run.sync() - started)
        evaluation.masses()
    run.stage = "audit"
    failed = cfg.audit != "0" and run.agree(lambda: audit(evaluation))
    run.agree(lambda: final_report(evaluation, blob, cfg, run))
    if unsaved := run.agree(lambda: run.unsaved): raise RunError(unsaved[-1])
    return 3 if failed and cfg.audit == "strict" else 0

def run_all(cfg: Config, notes: list[str], run: Run) -> int:
    """The whole run, as a table of contents; the exit status."""
    for note in notes: run.log(note)
    run.stage = "data"
    cfg.load_artifact or micro_batch_tokens(cfg, run.world)  # fails before expensive work
    data = run.agree(lambda: load_data(cfg, run), everywhere=True)
    run.agree(lambda: describe_run(cfg, notes, data, run))
    if cfg.load_artifact: blob = run.agree(lambda: Path(cfg.load_artifact).read_bytes())
    else: blob = make_artifact(data, cfg, run)
    return evaluate_artifact(blob, data, cfg, run)

def main() -> int:
    """Run as the environment says; the exit status."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(tool("help").help_text() if tool("help") else __doc__, flush=True)
        return 0
    run, is_main = None, os.environ.get("RANK", "0") == "0"
    try:
        cfg, notes = load_config(os.environ)
        run = Run(cfg)
        status = run_all(cfg, notes, run)
        dist.destroy_process_group()
        return status
    except (RunError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("DEBUG", "0") == "1": raise
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = (f"out of device memory during {run.stage}: lower MICRO_BATCH_TOKENS or "
                       f"EVAL_BATCH_WINDOWS; saved so far: {', '.join(run.saved) or 'nothing'}")
            is_main = True
        elif run and run.world > 1 and tool("roll_call") and (
                found := tool("roll_call").dead_ranks(run, error)): message, is_main = found
        elif isinstance(error, RuntimeError): raise
        if is_main: print(f"error: {message}", file=sys.stderr, flush=True)
        return 2

if __name__ == "__main__":
    os._exit(main())  # not through the teardown of the collectives' threads, which can abort
