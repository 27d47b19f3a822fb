"""Which mixing rule is worth how much? Scores saved neural passes by every rule, without a network.

    python bench/mixers.py logs/neural-*.safetensors     bpb and gain of each rule and ablation
    python bench/mixers.py --noise 1000000       cost where n-grams carry nothing
    LOAD_ARTIFACT=x.int6.ptz python bench/mixers.py --masses 1000    sums over the vocabulary

Constants were tuned on the first half of a stream; the second half is the report. Evaluations with
SAVE_PASS=1 keep their neural pass (save_neural_pass). A pass knows of each target one hint, the
longest context's, up to MIXER_MAX_ORDER: a table of shorter orders needs a pass made with that
variable.
"""

import argparse
import contextlib
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
    """(tokens (N+1,), byte_counts (N,), NeuralColumns) of a saved pass."""
    saved = golf.read_tensors(path)
    neural = golf.NeuralColumns(*saved["columns"].unbind(1))
    return saved["tokens"].long(), saved["byte_counts"].double(), neural


def inputs(tokens, neural, max_order=12, near=256, documents=DOCUMENT_ORDERS):
    """(MixInputs, distance of the hint's context) of a pass made with hints of up to max_order."""
    span = (0, len(tokens) - 1)
    cfg = golf.replace(golf.Config(), mixer_max_order=max_order, eval_seq_len=near)
    ngram = golf.stream_columns(tokens, span, cfg)
    if documents != DOCUMENT_ORDERS:
        kept = [k for k, n in enumerate(DOCUMENT_ORDERS) if n in documents]
        kept += range(len(DOCUMENT_ORDERS), len(ngram.ratio))
        ngram = ngram._replace(ratio=ngram.ratio[kept], level_key=ngram.level_key[kept])
    distance = torch.zeros(span[1], dtype=torch.int64)
    for order, counts in golf.count_ngrams(tokens, max_order, 1):
        if order > 1:
            distance = torch.where(counts.context > 0, counts.distance.long(), distance)
    return golf.MixInputs(*neural, ngram.hint == tokens[1:], *ngram[1:]), distance


class Table:
    """A saved pass, and its scores by every rule, a printed line each."""

    def __init__(self, path, near, max_order):
        self.tokens, self.sizes, self.neural = load(path)
        self.near, self.max_order = near, max_order
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

    def calibrated(self, name, edit=lambda x: x, chunk=CHUNK, constants=(), **options):
        """A row of the calibrated mixer; (its scores, the distance of each hint's context)."""
        with contextlib.ExitStack() as stack:
            for constant, value in dict(constants).items():
                stack.enter_context(mock.patch.object(golf, constant, value))
            options = dict(near=self.near) | options
            x, distance = inputs(self.tokens, self.neural, self.max_order, **options)
            started = time.perf_counter()
            logp, _ = golf.mix(edit(x), chunk)
            self.row(name, logp, time.perf_counter() - started)
        return logp, distance


def ablations(table):
    """Rows of the calibrated mixer without each of its parts, and with other constants."""
    table.calibrated("  chunks of 1,024", chunk=1024)
    table.calibrated("  hint alone", lambda x: x._replace(level_key=x.level_key * 0))
    table.calibrated("  interpolation alone", lambda x: x._replace(hint_key=x.hint_key * 0))
    table.calibrated("  without the document's levels", documents=())
    table.calibrated("  without distance", near=FAR)
    table.calibrated("  without entropy bins", constants=dict(ENTROPIES=1))
    table.calibrated(
        "  without agreement of short hints", lambda x: x._replace(hint_key=x.hint_key // 8 * 8)
    )
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


def compare(path, near, max_order):
    """Print a pass's score by every rule."""
    table = Table(path, near, max_order)
    table.row("network alone", table.neural.logp)
    for recipe in ("pr889", "pr890", "pr1094"):
        table.backoff(recipe)
    best, distance = table.calibrated("calibrated")
    ablations(table)
    gain_by_distance((best - table.neural.logp) / math.log(2), distance, near)


def neural_columns(logp, tokens, hints):
    """(n,4) of NeuralColumns, of log-probabilities (n,V), targets (n,) and hints (n,)."""
    y = hints.long().clamp(min=0)[:, None]
    columns = [
        logp.gather(1, tokens[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        logp.gather(1, y)[:, 0],
        logp.scatter(1, y, -math.inf).logsumexp(-1),
    ]
    return torch.stack(columns, 1)


def noise(count, vocab_size=1024, sigma=2.0, block=8192):
    """Cost in bits a token where every token is drawn from a random softmax of its own."""
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
    neural = []
    for b in range(0, count, block):
        part = slice(b, min(b + block, count))
        neural.append(neural_columns(logp_of(b), tokens[1:][part], ngram.hint[part]))
    neural = golf.NeuralColumns(*torch.cat(neural).unbind(1))
    x = golf.MixInputs(*neural, ngram.hint == tokens[1:], *ngram[1:])
    for chunk in (8192, 1024):
        logp, _ = golf.mix(x, chunk)
        cost = (neural.logp - logp) / math.log(2)
        print(
            f"{count} tokens of noise, chunks of {chunk}: {float(cost.mean()):+.5f} bits a token "
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
    parser.add_argument("--max-order", type=int, default=12, help="their MIXER_MAX_ORDER")
    parser.add_argument("--near", type=int, default=256, help="tokens of the network's window")
    parser.add_argument("--noise", type=int, default=0, help="tokens of noise to score")
    parser.add_argument("--masses", type=int, default=0, help="targets to sum distributions at")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for path in options.passes:
        compare(path, options.near, options.max_order)
    if options.noise:
        noise(options.noise)
    if options.masses:
        masses(options.masses)


if __name__ == "__main__":
    main()
