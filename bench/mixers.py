"""Which mixing rule is worth how much? Scores saved neural passes by every rule, without a network.

    python bench/mixers.py logs/neural-*.safetensors     bpb and gain of each rule and ablation
    python bench/mixers.py --noise 1000000       cost where n-grams carry nothing
    LOAD_ARTIFACT=x.int6.ptz python bench/mixers.py --masses 1000    sums over the vocabulary

Constants were tuned on the first half of a stream; the second half is the report. Evaluations with
SAVE_PASS=1 keep their neural pass (save_neural_pass). A pass knows the network's opinion of its own
hints, which follow from MIXER_MAX_ORDER: other orders need a pass made with that variable.
"""

import argparse
import contextlib
import itertools
import math
import os
import time
from pathlib import Path
from unittest import mock

import torch

from common import golf

CHUNK, FAR = 8192, 2**40
DOCUMENT_ORDERS = tuple(range(2, golf.DOCUMENT_MAX_ORDER + 1))  # levels before the stream's


def load(path):
    """The tensors of a saved pass; SystemExit if they are not what this file's mixer reads."""
    saved = golf.read_tensors(path)
    missing = {"columns", "hints", "eval_seq_len", "mixer_max_order"} - saved.keys()
    if missing or len(saved["columns"]) != golf.NEURAL_ROWS or not len(saved["hints"]):
        raise SystemExit(f"{path}: a pass of another mixer (make one with SAVE_PASS=1)")
    return saved


def columns(saved, near, documents=DOCUMENT_ORDERS):
    """NgramColumns of a saved pass, with a window of `near` tokens."""
    order = int(saved["mixer_max_order"])
    cfg = golf.replace(golf.Config(), mixer_max_order=order, eval_seq_len=near)
    tokens = saved["tokens"].int()
    ngram = golf.stream_columns(tokens, (0, len(tokens) - 1), cfg, saved["hints"])
    kept = [k for k, n in enumerate(DOCUMENT_ORDERS) if n in documents]
    kept += range(len(DOCUMENT_ORDERS), len(ngram.ratios))
    return ngram._replace(ratios=[ngram.ratios[k] for k in kept], level_key=ngram.level_key[kept])


def hint_distance(tokens, max_order):
    """int64 (N,): how many tokens ago the longest known context of each target was; 0: none is."""
    distance = torch.zeros(len(tokens) - 1, dtype=torch.int64)
    for order, counts in golf.count_ngrams(tokens, max_order, 1):
        if order > 1:
            distance = torch.where(counts.context > 0, counts.distance.long(), distance)
    return distance


class Table:
    """A saved pass, and its scores by every rule, a printed line each."""

    def __init__(self, path):
        self.saved = load(path)
        self.tokens, self.sizes = self.saved["tokens"].long(), self.saved["byte_counts"].double()
        self.neural = golf.NeuralColumns.of(self.saved["columns"])
        self.near = near = int(self.saved["eval_seq_len"])
        size, half = len(self.sizes), len(self.sizes) // 2
        self.parts = (slice(0, size), slice(0, half), slice(half, size))
        names = ("bpb", "1st half", "2nd half", "gain", "1st half", "2nd half", "s")
        print(f"\n{path}: {size} targets, window {near}")
        print(f"{'rule':42}" + "".join(f"{name:>9}" for name in names))

    def bpb(self, logp):
        """Bits per byte of all targets, of the first half and of the second."""
        return [
            -float(logp[part].sum()) / math.log(2) / float(self.sizes[part].sum())
            for part in self.parts
        ]

    def row(self, name, logp, seconds=0.0):
        """Print a rule's line."""
        cells = self.bpb(logp)
        gains = [a - b for a, b in zip(self.bpb(self.neural.logp), cells, strict=True)]
        numbers = "".join(f"{x:9.4f}" for x in cells + gains)
        print(f"{name:42}{numbers}{seconds:8.2f}", flush=True)

    def backoff(self, recipe):
        """A row of a recipe's rule with exact counts."""
        cfg, _ = golf.load_config(dict(RECIPE=recipe))
        started = time.perf_counter()
        counted = golf.BackoffRule().counted(self.tokens, (0, len(self.sizes)), cfg)
        part = golf.backoff_columns(counted, "context", cfg)
        logp = golf.backoff_logp(self.neural.logp, self.neural.entropy, part, cfg)
        self.row(f"backoff {recipe}, exact counts", logp, time.perf_counter() - started)

    def calibrated(self, name, edit=lambda ngram: ngram, chunk=CHUNK, constants=(), **options):
        """A row of the calibrated mixer; its scores. edit: of its NgramColumns."""
        with contextlib.ExitStack() as stack:
            for constant, value in dict(constants).items():
                stack.enter_context(mock.patch.object(golf, constant, value))
            ngram = edit(columns(self.saved, **dict(near=self.near) | options))
            number = ngram.hint_number(self.tokens[1:])
            started = time.perf_counter()
            logp, _ = golf.mix(self.neural, ngram, number, chunk)
            self.row(name, logp, time.perf_counter() - started)
        return logp


def tables(*features):
    """The file's constants with other tables of hints."""
    *first, count = itertools.accumulate((math.prod(x.values()) for x in features), initial=0)
    constants = dict(HINT_TABLES=features, HINT_FIRST_KEYS=first, HINT_KEYS=count)
    return constants | dict(INPUTS=2 + len(features))


def without_hints(ngram, first):
    """NgramColumns whose hints from number `first` on are none."""
    hints, keys = ngram.hints.clone(), ngram.hint_key.clone()
    hints[first:], keys[first:] = -1, 0
    return ngram._replace(hints=hints, hint_key=keys)


def ablations(table):
    """Rows of the calibrated mixer without each of its parts, and with other constants."""
    table.calibrated("  chunks of 1,024", chunk=1024)
    table.calibrated("  hints alone", lambda x: x._replace(level_key=x.level_key * 0))
    table.calibrated("  interpolation alone", lambda x: without_hints(x, 0))
    table.calibrated("  one hint", lambda x: without_hints(x, 1))
    first, second, third = golf.HINT_TABLES
    table.calibrated("  the first table alone", constants=tables(first))
    table.calibrated("  without the second table", constants=tables(first, third))
    table.calibrated("  without the third table", constants=tables(first, second))
    table.calibrated("  without streaks", constants=tables(first, second | dict(streak=1), third))
    table.calibrated("  the mean of the tables", constants=dict(WEIGHT_PRIOR=1e30))
    table.calibrated("  without the document's levels", documents=())
    table.calibrated("  without distance", near=FAR)
    table.calibrated("  without entropy bins", constants=dict(ENTROPIES=1))
    disagreeing = tables(first | dict(agreement=1), second, third) | dict(AGREEING_ORDERS=())
    table.calibrated("  without agreement of short hints", constants=disagreeing)
    table.calibrated("  weight prior 300", constants=dict(WEIGHT_PRIOR=300.0))
    table.calibrated("  weight prior 3000", constants=dict(WEIGHT_PRIOR=3000.0))
    table.calibrated("  hint prior 5", constants=dict(HINT_PRIOR=5.0))
    table.calibrated("  hint prior 20", constants=dict(HINT_PRIOR=20.0))
    table.calibrated("  level prior 0.05, 1", constants=dict(LEVEL_PRIOR=(0.05, 1.0)))
    table.calibrated("  level prior 0.2, 4", constants=dict(LEVEL_PRIOR=(0.2, 4.0)))


def gain_by_distance(gain, distance, near):
    """Print how much of the gain in bits (N,) comes with hints from how far."""
    groups = {
        "within the window": (distance > 0) & (distance < near),
        "beyond it": distance >= near,
        "none": distance == 0,
    }
    for name, where in groups.items():
        print(
            f"hint {name:18}{100 * float(where.double().mean()):6.1f} % of targets, gain "
            f"{float(gain[where].mean()):.4f} bits a target, "
            f"{float(gain[where].sum() / gain.sum()) * 100:.1f} % of the whole gain"
        )


def compare(path):
    """Print a pass's score by every rule."""
    table = Table(path)
    table.row("network alone", table.neural.logp)
    for recipe in ("pr889", "pr890", "pr1094"):
        table.backoff(recipe)
    best = table.calibrated("calibrated")
    ablations(table)
    distance = hint_distance(table.tokens, int(table.saved["mixer_max_order"]))
    gain_by_distance((best - table.neural.logp) / math.log(2), distance, table.near)


def neural_rows(logp, tokens, hints):
    """NeuralColumns' rows (NEURAL_ROWS,n) of log-probabilities (n,V), targets (n,) and hints
    (HINTS,n)."""
    own = logp.gather(1, tokens[:, None]).mT
    entropy = -(logp.exp() * logp).sum(-1)[None]
    return torch.cat([own, entropy, logp.gather(1, hints.long().clamp(min=0).mT).mT])


def noise(count, vocab_size=1024, sigma=2.0, block=8192):
    """Cost in bits per token where every token is drawn from a random softmax of its own."""
    draw = torch.Generator().manual_seed(0)

    def logp_of(begin):
        own = torch.Generator().manual_seed(1 + begin)
        size = min(block, count - begin)
        return (sigma * torch.randn(size, vocab_size, generator=own)).double().log_softmax(-1)

    tokens = [torch.tensor([golf.BOS])]
    for b in range(0, count, block):
        tokens.append(torch.multinomial(logp_of(b).exp(), 1, generator=draw)[:, 0])
    tokens = torch.cat(tokens)
    ngram = golf.stream_columns(tokens, (0, count), golf.replace(golf.Config(), mixer_max_order=12))
    rows = []
    for b in range(0, count, block):
        part = slice(b, min(b + block, count))
        rows.append(neural_rows(logp_of(b), tokens[1:][part], ngram.hints[:, part]))
    neural = golf.NeuralColumns.of(torch.cat(rows, 1))
    for chunk in (8192, 1024):
        logp, _ = golf.mix(neural, ngram, ngram.hint_number(tokens[1:]), chunk)
        cost = (neural.logp - logp) / math.log(2)
        print(
            f"{count} tokens of noise, chunks of {chunk}: {float(cost.mean()):+.5f} bits per token "
            f"(first tenth {float(cost[: count // 10].mean()):+.5f})"
        )


def masses(count):
    """Sums over the vocabulary of every scoring at `count` targets, by scans of the stream."""
    cfg, _ = golf.load_config(os.environ)
    run = golf.Run(cfg)
    data = golf.load_data(cfg, run)
    blob = Path(cfg.load_artifact).read_bytes()
    cfg, tensors = golf.unpack(blob, cfg, data.corpus["vocabulary_sha256"])
    model = golf.build_model(cfg, run, {name: t.tensor() for name, t in tensors.items()})
    with mock.patch.object(golf, "MASS_POSITIONS", count):
        evaluation = golf.Evaluation(model, data, cfg, run)
    evaluation.neural_pass()
    for scoring in evaluation.scorings:
        evaluation.score(scoring, 0.0)
    evaluation.masses()
    for scoring, row in evaluation.rows.items():
        print(
            f"{scoring:20} mass {row['mass']:.9g}, largest |mass - 1| {row['mass_error']:.2g}, "
            f"largest difference to the score given {row['score_error']:.2g} nats"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("passes", nargs="*", help="neural passes that runs have saved")
    parser.add_argument("--noise", type=int, default=0, help="tokens of noise to score")
    parser.add_argument("--masses", type=int, default=0, help="targets to sum distributions at")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for path in options.passes:
        compare(path)
    if options.noise:
        noise(options.noise)
    if options.masses:
        masses(options.masses)


if __name__ == "__main__":
    main()
