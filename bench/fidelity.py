"""Do the recipes score as the four submissions' own code does? Target by target, on a CPU.

    git clone https://github.com/openai/parameter-golf
    git -C parameter-golf fetch origin pull/806/head pull/889/head pull/890/head pull/1094/head
    python bench/fidelity.py parameter-golf

Each submission's evaluation function, unchanged but for torch.compile, which is the identity here,
runs on a stub network and a stream of text with the settings of its published run; the windows, the
tables and the stream are smaller. What it gives each target is read where it computes it, by a
tracer on one line of one file. The same stream is scored by the recipe, and by an emulation: a
table that is read, then updated, window by window, and that has the submission's quirks as switches
(--quirks; --help lists them). Without a quirk the emulation must be the recipe; with its quirks it
must be the submission at every scoring, also where a target is scored again.

Columns of the table: `updates`, windows between updates of the tables; `left` and `right`, the two
sides, where `+ quirk` is the emulation with this quirk and those of the rows above; `targets
differ`, targets whose first scoring differs by more than 1e-6 nats; `largest`, of these
differences, nats; `scorings`, of the left side, repeats too; `scorings differ`, or one side lacks
them; bits per token of all the left side's scorings, of the left and of the right each target once.
Exit status: 0, 1 if something is not explained by the quirks, 2 if a file cannot be had.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import math
import os
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import golf

TOLERANCE = 1e-6  # nats; float32 of theirs stays below
NETWORK_TOLERANCE = 1e-5  # nats, of an entropy that is a float32 sum over the vocabulary
VOCAB = 1024
HOW_TO = __doc__.split("\n\n")[1]
COLUMNS = (
    *("submission", "updates", "ranks", "buckets", "targets", "left", "right", "targets differ"),
    *("largest", "scorings", "scorings differ", "bits, all", "left, once", "right, once"),
)

# What the submissions do and the recipes do not.
QUIRKS = {
    "context_left": "the context is looked up and counted one token too far left",
    "lost_at_updates": "n-grams that cross the boundary between two updates are not counted",
    "tail_again": "the windows that the stream's end cuts short score its last stride again",
    "tail_counted_again": "and count it again",
    "context_in_window": "a context reaches back to its window's first token, no further",
    "cold_from_window": "a cold rank counts from its first window's first token, not from its "
    "first target, and contexts reach back further",
    "prefill_hole": "a rank's prefill ends where its first window begins, not at its first target",
    "every_rank_all": "every rank scores all windows",
    "floor_everywhere": "the least probability holds where nothing matched, too",
    "floor_1e-30": "the least probability is 1e-30",
}
OF_RANKS = {"cold_from_window", "prefill_hole", "every_rank_all"}  # nothing at one rank


class Unavailable(Exception):
    """A file of a submission cannot be had, or is not the one that was looked at."""


class Case(NamedTuple):
    """Sizes of a comparison."""

    window: int  # tokens
    buckets: int  # per order
    ranks: int
    updates: int  # windows between updates of the tables


class Scorings(NamedTuple):
    """What was given to targets, in order, one rank after the other."""

    target: np.ndarray  # (n,) int64
    nats: np.ndarray  # (n,) float64

    def nth(self) -> np.ndarray:
        """(n,) int64: which scoring of its target each is, from 0."""
        order = np.argsort(self.target, kind="stable")
        ordered, nth = self.target[order], np.empty_like(order)
        nth[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        return nth

    def bits(self, once: bool = False) -> float:
        """Bits a token over all scorings, or over each target's first."""
        return float((self.nats[self.nth() == 0] if once else self.nats).mean() / math.log(2))


class Difference(NamedTuple):
    """Of two sides' scorings."""

    targets: int  # whose first scorings differ by more than TOLERANCE
    largest: float  # of their differences, nats
    scorings: int  # that differ, or that one side lacks


def join(parts) -> Scorings:
    """Scorings of [(first target, nats of it and those that follow it)]."""
    targets = [np.arange(first, first + len(nats)) for first, nats in parts]
    return Scorings(np.concatenate(targets), np.concatenate([nats for _, nats in parts]))


def difference(left: Scorings, right: Scorings) -> Difference:
    """The n-th scoring of a target on the left against the n-th on the right."""
    size = 1 + max(left.target.max(), right.target.max())
    codes = [side.nth() * size + side.target for side in (left, right)]
    both, i, j = np.intersect1d(*codes, assume_unique=True, return_indices=True)
    gap = np.abs(left.nats[i] - right.nats[j])
    same, first = gap <= TOLERANCE, both < size
    all_codes = np.union1d(*codes)
    return Difference(
        targets=int((all_codes < size).sum() - (same & first).sum()),
        largest=float(gap[first].max(initial=0.0)),
        scorings=int(len(all_codes) - same.sum()),
    )


# --- The submissions ------------------------------------------------------------------------------


class Submission(NamedTuple):
    """Where a submission's code is, and how to run it and read what it scores.

    `reads` gets the local variables of `function` each time that it reaches `line` of the first of
    `files`, and returns (first target, nats of it and those that follow it).
    """

    recipe: str
    commit: str
    folder: str
    files: dict[str, str]  # name: SHA-256
    environment: dict[str, str]  # what evaluation reads of its published command
    function: str
    line: int
    reads: Callable[[dict[str, Any]], tuple[int, Any]]
    call: Callable[..., float]  # (module, common arguments, Case) -> nats per token
    quirks: tuple[str, ...]
    updates: tuple[int, ...] = (1,)  # windows between updates of its published runs
    softmax: bool = False  # p is softmax(logits), not exp(log_softmax(logits))


def call_889(module, common, case):
    """The table's size is written in the function: its class is wrapped."""
    own = module.NgramBackoffCache
    args = common[0]

    def sized(*values, hash_size, **options):
        return own(*values, hash_size=case.buckets, **options)

    with mock.patch.object(module, "NgramBackoffCache", sized):
        return module.eval_val_ngram_backoff(
            *common,
            stride=args.eval_stride,
            batch_seqs=32,
            log0=lambda line: None,
            ngram_order=7,
        )


def call_806(module, common, case):
    """Its Hyperparameters hold the n-gram settings."""
    args = common[0]
    return module.eval_val_sliding_ngram(
        *common, stride=args.eval_stride, eval_seq_len=args.train_seq_len
    )


def call_890(module, common, case):
    """Its main() reads these from the environment; its published runs left the defaults."""
    args = common[0]
    return module.eval_val_ngram(
        *common,
        eval_seq_len=args.train_seq_len,
        stride=args.eval_stride,
        ngram_order=9,
        ngram_min_order=2,
        ngram_buckets=case.buckets,
        ngram_min_count=2,
        fixed_alpha=0.2,
        ent_base=0.05,
        ent_range=0.55,
        ent_scale=2.0,
        ent_thresh=4.0,
    )


def call_1094(module, common, case):
    """Its main() makes the tables; its published runs had batches of 128 and of 64 windows."""
    args, device = common[0], common[4]
    mixer = module.BackoffNgramMixer(
        args.vocab_size,
        device,
        num_buckets=args.ngram_buckets,
        max_order=args.ngram_order,
        min_count=args.ngram_min_count,
        alpha_base=args.alpha_base,
        alpha_range=args.alpha_range,
        alpha_center=args.alpha_center,
    )
    return module.eval_val_sliding(
        *common,
        stride=args.eval_stride,
        batch_seqs=case.updates,
        eval_seq_len=args.train_seq_len,
        mixer=mixer,
    )


SUBMISSIONS = {
    "889": Submission(
        recipe="pr889",
        commit="50ec6bce1d6722caa8d20ad6f6f53fbec9abfdae",
        folder="records/track_10min_16mb/2026-03-26_NgramBackoff_VRL_LeakyReLU2",
        files={"train_gpt.py": "d23ef5ed42e82f6709b0123b3289a4265bac5d3ad74b049e3258837858bcd8ac"},
        environment={"NGRAM_ENABLED": "1", "NGRAM_ORDER": "7", "VOCAB_SIZE": "1024"},
        function="eval_val_ngram_backoff",
        line=1022,
        reads=lambda v: (v["ws"] + v["t"], [v["scored_nll"]]),
        call=call_889,
        quirks=("cold_from_window", "tail_again"),
    ),
    "806": Submission(
        recipe="pr806",
        commit="9876d60008393c88f90b38b53329dfdaf74f64e8",
        folder="records/track_10min_16mb/2026-03-26_NgramCache_LeakyReLU09_BackoffMixer",
        files={"train_gpt.py": "f219e3341ee493fe6d723439dd6d3667359701a6222627fd6343048ecd0c0094"},
        environment={"NGRAM_CACHE": "1", "NGRAM_ENTROPY": "1", "EVAL_STRIDE": "64"},
        function="eval_val_sliding_ngram",
        line=1438,
        reads=lambda v: (v["ws"] + v["s"], v["seg_nll"]),
        call=call_806,
        quirks=("tail_again", "tail_counted_again", "floor_everywhere"),
    ),
    "890": Submission(
        recipe="pr890",
        commit="1a2ac56c297b1081b0819abf41f1c34315ea4f35",
        folder="records/track_10min_16mb/2026-03-26_OrderAdaptive_9gram_Prefill",
        files={"train_gpt.py": "19b721c8b1f02df1881cfa50e41ff2327b9439ad6d37868a200143694a32ea2c"},
        environment={},
        function="eval_val_ngram",
        line=1097,
        reads=lambda v: (v["abs_start"], v["seg_nll"]),
        call=call_890,
        quirks=(
            *("context_left", "prefill_hole", "tail_again", "tail_counted_again"),
            *("floor_1e-30", "floor_everywhere"),
        ),
        softmax=True,
    ),
    "1094": Submission(
        recipe="pr1094",
        commit="69cf56ae69d9476d8936ec5c01ce8b9ebc274b50",
        folder="records/track_10min_16mb/2026-03-29_SwarmDesigned_CausalBackoffNgramMixer_0.4027",
        files={
            "train_gpt.py": "947aca1c9b01b88ade3fc93a407e57e0f77ba929a7f3f1449f5ae319a6f1c415",
            "swarm_agents.py": "72cc34204edc036b38ad7fdb02c2437d9dc0f28a0122998110f16a485922fbea",
        },
        environment={
            "USE_NGRAM_MIXER": "1",
            "NGRAM_ORDER": "10",
            "NGRAM_MIN_COUNT": "1",
            "ALPHA_BASE": "0.20",
            "ALPHA_RANGE": "0.55",
            "ALPHA_CENTER": "3.0",
        },
        function="eval_val_sliding",
        line=916,
        reads=lambda v: (v["ws"] + v["s"], v["scored_nll"]),
        call=call_1094,
        quirks=(
            *("every_rank_all", "lost_at_updates", "tail_again", "context_in_window"),
            "floor_everywhere",
        ),
        updates=(128, 64),
    ),
}


def read_file(clone: str, submission: Submission, name: str) -> bytes:
    """A file of a submission out of a clone; Unavailable if it is not there or another one."""
    place = f"{submission.commit}:{submission.folder}/{name}"
    shown = subprocess.run(["git", "-C", clone, "show", place], capture_output=True)
    if shown.returncode:
        reason = shown.stderr.decode(errors="replace").strip()
        raise Unavailable(f"{place}\nis not in {clone}: {reason}\nTo get it:\n{HOW_TO}")
    if hashlib.sha256(shown.stdout).hexdigest() != submission.files[name]:
        raise Unavailable(f"{place}\nhas another SHA-256 than {submission.files[name]}")
    return shown.stdout


@contextlib.contextmanager
def importable(folder: Path, submission: Submission):
    """While entered: a submission's files can import each other and a module of FlashAttention,
    which they never call here, and see the environment of the published run."""
    attention = types.ModuleType("flash_attn_interface")
    attention.flash_attn_func = None
    own = {"flash_attn_interface", *(Path(name).stem for name in submission.files)}
    hidden = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    sys.modules["flash_attn_interface"] = attention
    try:
        with (
            mock.patch.object(sys, "path", [str(folder), *sys.path]),
            mock.patch.dict(os.environ, submission.environment, clear=True),
        ):
            yield
    finally:
        for name in own & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(hidden)


def load(clone: str, submission: Submission, folder: Path) -> types.ModuleType:
    """A submission's script as a module; its files are written to a folder of their own."""
    folder.mkdir()
    for name in submission.files:
        (folder / name).write_bytes(read_file(clone, submission, name))
    script = folder / next(iter(submission.files))
    spec = importlib.util.spec_from_file_location(f"{submission.recipe}_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    with importable(folder, submission):
        spec.loader.exec_module(module)
    return module


def trace(function, line: int, reads: Callable, call: Callable) -> tuple[Any, list]:
    """(result of call(), what `reads` returned, nats as float64 (n,), whenever `function` reached
    that line of its file)."""
    records: list[tuple[int, np.ndarray]] = []

    def of_the_function(frame, event, _):
        if event == "line" and frame.f_lineno == line:
            first, nats = reads(frame.f_locals)
            records.append((int(first), np.array(nats, dtype=np.float64)))
        return of_the_function

    def of_any_call(frame, event, _):
        return of_the_function if frame.f_code is function.__code__ else None

    previous = sys.gettrace()
    sys.settrace(of_any_call)
    try:
        return call(), records
    finally:
        sys.settrace(previous)


def run_theirs(submission: Submission, module, network, tokens, case: Case) -> Scorings:
    """What a submission's own code gives the targets of tokens (N+1,), one rank after the other."""
    args = module.Hyperparameters()
    args.train_seq_len, args.ngram_buckets = case.window, case.buckets
    base_bytes = torch.ones(VOCAB, dtype=torch.int16)
    leading_space = is_boundary = torch.zeros(VOCAB, dtype=torch.bool)
    tables = (tokens, base_bytes, leading_space, is_boundary)
    function, parts = getattr(module, submission.function), []
    for rank in range(case.ranks):
        common = (args, network, rank, case.ranks, torch.device("cpu"), *tables)
        with (
            mock.patch.object(torch, "compile", lambda function, **_: function),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # autocast of CUDA, where there may be none
            (returned, _), scored = trace(
                function,
                submission.line,
                submission.reads,
                lambda common=common: submission.call(module, common, case),
            )
        if not abs(join(scored).nats.mean() - returned) <= TOLERANCE:
            raise SystemExit(f"{submission.recipe}: what was read is not what it returned")
        parts += scored
    return join(parts)


# --- The stream and the stub network --------------------------------------------------------------


class StubNetwork(nn.Module):
    """Logits of a bigram table of the stream itself, sharper or flatter by the token before.

    A position's logits depend on two tokens, and are the same in every window that shows both.
    """

    def __init__(self, tokens, sharpest: float = 1.3):
        super().__init__()
        pairs = tokens[:-1] * VOCAB + tokens[1:]
        counts = pairs.bincount(minlength=VOCAB * VOCAB).reshape(VOCAB, VOCAB)
        generator = torch.Generator().manual_seed(0)
        noise = (2 * torch.randn(VOCAB, VOCAB, generator=generator)).exp()
        self.log_counts = (counts + 0.02 * noise).log()
        self.sharpness = 0.4 + (sharpest - 0.4) * torch.rand(VOCAB, generator=generator)

    def forward_logits(self, inputs):
        """(B,T,V) float32 of tokens (B,T); before a window's first token is token 0."""
        before = F.pad(inputs, (1, 0))[:, :-1]
        return self.sharpness[before][..., None] * self.log_counts[inputs]


class Window(NamedTuple):
    """Tokens [start, end) go in, targets [first, end) are scored."""

    start: int
    first: int
    end: int


class Stream(NamedTuple):
    """Tokens, their windows and the network at the targets that these score."""

    tokens: torch.Tensor  # (N+1,) int64
    windows: list[Window]  # the submissions': at each multiple of the stride, to the very end
    columns: list[np.ndarray]  # (2, scored) float64 each: log p(target), entropy, nats

    def scored_before(self, window: int) -> int:
        """How many targets the windows before this one score at least once."""
        return self.windows[window - 1].end if window else 0

    def part(self, ranks: int, rank: int) -> range:
        """The windows of a rank, as the submissions divide them."""
        total = len(self.windows)
        return range(total * rank // ranks, total * (rank + 1) // ranks)


def network_columns(logits, targets, softmax: bool) -> np.ndarray:
    """(2,n) float64 log p(target) and entropy, nats, of logits (n,V).

    In float32 as the submissions compute them, so that what differs is not the network's rounding;
    softmax: p is softmax(logits), otherwise exp(log_softmax(logits)).
    """
    logp, chosen = F.log_softmax(logits, dim=-1), targets[:, None]
    p = F.softmax(logits, dim=-1) if softmax else logp.exp()
    target = p.gather(-1, chosen).double().log() if softmax else logp.gather(-1, chosen).double()
    return torch.stack([target[:, 0], -(p * logp).sum(dim=-1).double()]).numpy()


def make_stream(tokens, network, window: int, stride: int, softmax: bool = False) -> Stream:
    """The windows of tokens (N+1,), scored by the network alone."""
    stream = Stream(tokens, [], [])
    for start in range(0, len(tokens) - 1, stride):
        end = min(start + window, len(tokens) - 1)
        first = max(start, end - stride) if start else 0
        logits = network.forward_logits(tokens[None, start:end])[0, first - start :]
        stream.windows.append(Window(start, first, end))
        stream.columns.append(network_columns(logits, tokens[first + 1 : end + 1], softmax))
    return stream


def own_text(folder: str) -> torch.Tensor:
    """Validation tokens, int64, of the text that the project's demo makes of Python's sources."""
    cfg, _ = golf.load_config({"SCALE": "demo", "DEVICE": "cpu", "PREPARED_PATH": folder})
    silent = types.SimpleNamespace(log=lambda line: None)  # all that is needed of a Run
    shard = golf.prepare_text(cfg, silent) / "text_val_000000.bin"
    return torch.from_numpy(golf.open_shard(str(shard))[:].astype(np.int64))


# --- The recipe -----------------------------------------------------------------------------------


def recipe_config(recipe: str, case: Case, **settings: str):
    """The recipe's Config at the sizes of a case."""
    env = {
        "RECIPE": recipe,
        "SCALE": "full",
        "DEVICE": "cpu",
        "VOCAB_SIZE": str(VOCAB),
        "EVAL_SEQ_LEN": str(case.window),
        "NGRAM_BUCKETS": str(case.buckets),
    }
    if golf.RECIPES[recipe].get("ngram_granularity") == "batch":
        env["NGRAM_BATCH_WINDOWS"] = str(case.updates)
    return golf.load_config(env | settings)[0]


def run_ours(stream: Stream, cfg, ranks: int) -> Scorings:
    """What a Config's hashed rule gives the targets; ranks begin at the submissions' targets."""
    starts = [stream.scored_before(stream.part(ranks, rank).start) for rank in range(ranks)]
    ends = [*starts[1:], len(stream.tokens) - 1]
    columns = np.empty((2, ends[-1]))
    for window, scored in zip(reversed(stream.windows), reversed(stream.columns), strict=True):
        columns[:, window.first : window.end] = scored  # the first scoring is written last
    rule, parts = golf.backoff_rules(cfg)["backoff_hashed"], []
    for start, end in zip(starts, ends, strict=True):
        counted = rule.counted(stream.tokens, (start, end), cfg)
        part = golf.backoff_columns(counted, rule.match, cfg)
        logp, entropy = torch.from_numpy(columns[:, start:end].copy())
        parts.append((start, -golf.backoff_logp(logp, entropy, part, cfg).numpy()))
    return join(parts)


# --- The emulation --------------------------------------------------------------------------------


class Keys(NamedTuple):
    """Buckets of the n-gram of each order that ends at each position of a stream."""

    context: dict[int, np.ndarray]  # order: (N+1,) int64
    pair: dict[int, np.ndarray]
    reach: dict[int, int]  # order: how far before the position the context begins


def hash_stream(tokens: np.ndarray, cfg, context_left: bool) -> Keys:
    """Keys of tokens (N+1,); what a position too near the stream's start has is never used."""
    keys, primes = Keys({}, {}, {}), cfg.ngram_primes
    for order in range(cfg.ngram_min_order, cfg.ngram_max_order + 1):
        length = order - 1
        reach = length + 1 if context_left else length
        context = np.zeros(len(tokens), dtype=np.int64)
        for k in range(length):
            context[reach:] ^= tokens[k : len(tokens) - reach + k] * primes[k % len(primes)]
        pair = context ^ tokens * primes[length % len(primes)]
        keys.context[order] = context & (cfg.ngram_buckets - 1)
        keys.pair[order] = pair & (cfg.ngram_buckets - 1)
        keys.reach[order] = reach
    return keys


class Tables:
    """One rank's counts."""

    def __init__(self, tokens: np.ndarray, keys: Keys, cfg):
        self.tokens, self.keys, self.cfg = tokens, keys, cfg
        self.token_count, self.seen = np.zeros(cfg.vocab_size, dtype=np.int64), 0
        self.context_count = {n: np.zeros(cfg.ngram_buckets, np.int64) for n in keys.reach}
        self.pair_count = {n: np.zeros(cfg.ngram_buckets, np.int64) for n in keys.reach}

    def count(self, begin: int, end: int, oldest: int):
        """Count the n-grams that end at positions [begin, end) and begin at `oldest` or later."""
        np.add.at(self.token_count, self.tokens[begin:end], 1)
        self.seen += end - begin
        for order, reach in self.keys.reach.items():
            part = slice(max(begin, oldest + reach), end)
            np.add.at(self.context_count[order], self.keys.context[order][part], 1)
            np.add.at(self.pair_count[order], self.keys.pair[order][part], 1)

    def look_up(self, positions: np.ndarray, oldest: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the longest match, 0 if none, its ratio) of the n-grams that end at positions
        (n,) and begin at `oldest` or later."""
        cfg, matched = self.cfg, np.zeros(len(positions), dtype=np.int64)
        ratio = np.zeros(len(positions))
        if self.seen < cfg.ngram_start_tokens:
            return matched, ratio
        if cfg.ngram_fallback == "unigram":
            matched += 1
            count = self.token_count[self.tokens[positions]]
            ratio = (count + 0.5) / (self.seen + 0.5 * cfg.vocab_size)
        for order, reach in self.keys.reach.items():
            context_count = self.context_count[order][self.keys.context[order][positions]]
            pair_count = self.pair_count[order][self.keys.pair[order][positions]]
            hit = (context_count >= cfg.ngram_min_count) & (positions - reach >= oldest)
            if cfg.ngram_match == "pair":
                hit &= pair_count > 0
            matched[hit] = order
            ratio[hit] = (np.minimum(pair_count, context_count) / np.maximum(context_count, 1))[hit]
        return matched, ratio


def blend(columns: np.ndarray, matched: np.ndarray, ratio: np.ndarray, cfg, quirks) -> np.ndarray:
    """Nats (n,) of the network's columns (2,n) mixed with what Tables.look_up found."""
    logp, entropy = columns
    centers = np.array(cfg.ngram_ent_center)
    center = centers[np.clip(matched - 2, 0, len(centers) - 1)]
    sigmoid = 1 / (1 + np.exp(-cfg.ngram_ent_scale * (entropy - center)))
    alpha = cfg.ngram_ent_base + cfg.ngram_ent_range * sigmoid
    floor = 1e-30 if "floor_1e-30" in quirks else golf.PROBABILITY_FLOOR
    mixed = -np.log(np.maximum((1 - alpha) * np.exp(logp) + alpha * ratio, floor))
    alone = np.minimum(-logp, -math.log(floor)) if "floor_everywhere" in quirks else -logp
    return np.where(matched > 0, mixed, alone)


def first_tables(stream: Stream, keys: Keys, mine: range, begin: int, cfg, quirks):
    """(Tables at a rank's start, position from which it counts on, oldest token that it knows).

    begin: the first target of the group of windows in which the rank's windows begin.
    """
    tables = Tables(stream.tokens.numpy(), keys, cfg)
    if cfg.ngram_history == "cold":
        if "cold_from_window" in quirks:
            return tables, stream.windows[mine.start].start, 0
        return tables, begin, begin
    if not begin:
        return tables, 0, 0
    prefilled = stream.windows[mine.start].start if "prefill_hole" in quirks else begin
    tables.count(0, prefilled + 1, 0)
    return tables, begin + 1, 0


def walk(stream: Stream, keys: Keys, mine: range, cfg, quirks) -> list[tuple[int, np.ndarray]]:
    """[(first target, nats)] of the windows `mine`: look up a group of windows, then count it."""
    size = cfg.ngram_batch_windows if cfg.ngram_granularity == "batch" else 1
    scored, first_group = [], mine.start // size
    begin = stream.scored_before(first_group * size)
    tables, counted, oldest = first_tables(stream, keys, mine, begin, cfg, quirks)
    for group in range(first_group, -(-mine.stop // size)):
        numbers = range(group * size, min((group + 1) * size, len(stream.windows)))
        for number in sorted({*numbers} & {*mine}):
            window, columns = stream.windows[number], stream.columns[number]
            first = window.first
            if "tail_again" not in quirks:
                first = max(first, stream.scored_before(number))
            reach = max(oldest, window.start) if "context_in_window" in quirks else oldest
            found = tables.look_up(np.arange(first + 1, window.end + 1), reach)
            nats = blend(columns[:, first - window.first :], *found, cfg, quirks)
            scored.append((first, nats))
        last = stream.windows[numbers[-1]]
        if "tail_counted_again" in quirks:
            counted = min(counted, last.first + 1)
        if counted <= last.end:
            tables.count(counted, last.end + 1, counted if "lost_at_updates" in quirks else oldest)
            counted = last.end + 1
    return scored


def emulate(stream: Stream, cfg, ranks: int, quirks=()) -> Scorings:
    """What a recipe's rule, with these quirks, gives the targets, by tables alone.

    In the settings that the four recipes have: alpha follows the entropy, counts lag by windows or
    batches, and a fallback to unigrams waits for more than one token.
    """
    keys = hash_stream(stream.tokens.numpy(), cfg, "context_left" in quirks)
    parts = [stream.part(ranks, rank) for rank in range(ranks)]
    if "every_rank_all" in quirks:
        parts = [range(len(stream.windows))] * ranks
    return join([piece for mine in parts for piece in walk(stream, keys, mine, cfg, quirks)])


# --- The comparison -------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table: two sides of one case."""

    left: str
    right: str
    difference: Difference
    scorings: int  # of the left side
    bits: tuple[float, float, float]  # of the left side with repeats, of both sides once

    def cells(self) -> list[str]:
        """As text, in the order of COLUMNS."""
        differing, largest, differing_scorings = self.difference
        counts = [f"{differing:,}", f"{largest:.1e}", f"{self.scorings:,}"]
        bits = [f"{x:.6f}" for x in self.bits]
        return [self.left, self.right, *counts, f"{differing_scorings:,}", *bits]


def compare_sides(left: str, a: Scorings, right: str, b: Scorings) -> Row:
    """The Row of two named sides."""
    bits = (a.bits(), a.bits(once=True), b.bits(once=True))
    return Row(left, right, difference(a, b), len(a.target), bits)


def compare(theirs: Scorings, stream: Stream, cfg, ranks: int, quirks) -> list[Row]:
    """Theirs against the recipe, the recipe against the emulation without quirks, and theirs
    against the emulation with one quirk more from row to row."""
    ours, plain = run_ours(stream, cfg, ranks), emulate(stream, cfg, ranks)
    rows = [
        compare_sides("theirs", theirs, "recipe", ours),
        compare_sides("recipe", ours, "emulation", plain),
    ]
    quirks = [name for name in quirks if ranks > 1 or name not in OF_RANKS]
    if not quirks:
        rows.append(compare_sides("theirs", theirs, "emulation", plain))
    for last in range(1, len(quirks) + 1):
        emulated = emulate(stream, cfg, ranks, quirks[:last])
        rows.append(compare_sides("theirs", theirs, f"+ {quirks[last - 1]}", emulated))
    return rows


def explained(rows: list[Row]) -> bool:
    """The emulation is the recipe without quirks, and the submission with all that were asked."""
    return not (rows[1].difference.scorings or rows[-1].difference.scorings)


def print_row(cells):
    """A line of the table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def cases(submission: Submission, args, targets: int) -> list[Case]:
    """The grid of a submission: every size at the first length, one at the others."""
    ranks, buckets = args.ranks, args.buckets
    if targets != args.targets[0]:
        ranks, buckets = ranks[:1], buckets[-1:]
    return [Case(args.window, b, r, u) for u in submission.updates for r in ranks for b in buckets]


def compare_submission(name: str, module, tokens, network, args) -> int:
    """Print the rows of a submission; the number of cases that are not explained."""
    submission, unexplained = SUBMISSIONS[name], 0
    quirks = submission.quirks if args.quirks is None else args.quirks
    stride = golf.replace(golf.Config(), **golf.RECIPES[submission.recipe]).eval_stride
    for targets in args.targets:
        part = tokens[: targets + 1]
        stream = make_stream(part, network, args.window, stride, submission.softmax)
        for case in cases(submission, args, targets):
            cfg = recipe_config(submission.recipe, case)
            theirs = run_theirs(submission, module, network, part, case)
            rows = compare(theirs, stream, cfg, case.ranks, quirks)
            for row in rows:
                sizes = (case.updates, case.ranks, f"{case.buckets:,}", f"{targets:,}")
                print_row([f"#{name}", *sizes, *row.cells()])
            unexplained += not explained(rows)
    return unexplained


def quirk_names(text: str) -> list[str]:
    """Names of QUIRKS, separated by commas; "none"."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in QUIRKS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(QUIRKS)}")
    return names


def arguments():
    """The command line."""
    lines = [f"  {name}: {meaning}" for name, meaning in QUIRKS.items()]
    lines += [f"  #{name} has {', '.join(s.quirks)}" for name, s in SUBMISSIONS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["quirks:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("clone", nargs="?", help="clone of openai/parameter-golf, or its .git")
    parser.add_argument("--submissions", nargs="+", default=[*SUBMISSIONS], choices=SUBMISSIONS)
    parser.add_argument("--quirks", type=quirk_names, help="NAME,NAME or none; default: its own")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--buckets", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument(
        "--targets",
        type=int,
        nargs="+",
        default=[40000, 39973],
        help="all sizes at the first, one rank and the last number of buckets at the others",
    )
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument(
        "--sharpest",
        type=float,
        default=1.3,
        help="of the stub's distributions; 5 reaches the least probabilities, where nats above 16 "
        "differ by more than 1e-6 for their float32 alone",
    )
    parser.add_argument("--tokens", metavar="SHARD", help="of the challenge; default: own text")
    return parser.parse_args()


def load_tokens(path: str | None, length: int) -> torch.Tensor:
    """int64 (length,): a shard's first, or of text that is made here."""
    with tempfile.TemporaryDirectory() as folder:
        if path:
            tokens = torch.from_numpy(golf.open_shard(path)[:length].astype(np.int64))
        else:
            tokens = own_text(folder)[:length]
    if len(tokens) < length or int(tokens.max()) >= VOCAB:
        raise SystemExit(f"{path or 'own text'}: fewer than {length} tokens below {VOCAB}")
    return tokens


def print_head(tokens, network, args) -> float:
    """What is compared, on what; the largest difference of golf's log p and entropy, nats."""
    stream = make_stream(tokens, network, args.window, args.window)
    columns, gap = np.concatenate(stream.columns, axis=1), 0.0
    for part, scored in zip(stream.windows, stream.columns, strict=True):
        logits = network.forward_logits(tokens[None, part.start : part.end])[0]
        targets = tokens[part.start + 1 : part.end + 1]
        golfs = golf.score_logits(logits, targets, targets.new_zeros(len(targets), golf.HINTS))[
            :, :2
        ]
        gap = max(gap, float(np.abs(golfs.numpy().T - scored).max()))
    entropy = np.quantile(columns[1], (0.05, 0.5, 0.95))
    digest = hashlib.sha256(tokens.numpy()).hexdigest()
    places = {args.clone: "CLONE", args.tokens: "SHARD"}
    print(" ".join(["python bench/fidelity.py", *(places.get(x, x) for x in sys.argv[1:])]))
    print(f"torch {torch.__version__}; {len(tokens):,} tokens, as int64 of SHA-256 {digest}")
    print(
        f"network alone: {-columns[0].mean() / math.log(2):.4f} bits per token, entropies "
        f"{entropy[0]:.2f} {entropy[1]:.2f} {entropy[2]:.2f} nats (5, 50, 95 %), "
        f"golf.score_logits within {gap:.1e} nats"
    )
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    return gap


def main() -> int:
    """The exit status."""
    args = arguments()
    if not args.clone:
        print(f"A clone with the submissions' commits is needed:\n{HOW_TO}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            modules = {
                name: load(args.clone, SUBMISSIONS[name], Path(folder) / name)
                for name in args.submissions
            }
        except Unavailable as error:
            print(error, file=sys.stderr)
            return 2
        tokens = load_tokens(args.tokens, max(args.targets) + 1)
        network = StubNetwork(tokens, args.sharpest)
        gap = print_head(tokens, network, args)
        unexplained = sum(
            compare_submission(name, module, tokens, network, args)
            for name, module in modules.items()
        )
    if not gap <= NETWORK_TOLERANCE:
        print(f"golf.score_logits is off by more than {NETWORK_TOLERANCE} nats")
        return 1
    print(f"cases that are not explained: {unexplained}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
