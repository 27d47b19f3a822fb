"""Which mixing rule is worth how much? Scores saved neural passes by every rule, without a network.

    SAVE_NEURAL_PASS=pass.npz MIXER_MAX_ORDER=16 python train_gpt.py     saves one
    python bench/mixers.py pass.npz ...          bpb and gain of each rule and ablation, in seconds
    python bench/mixers.py --noise 1000000       cost where n-grams carry nothing
    LOAD_ARTIFACT=x.int6.ptz python bench/mixers.py --masses 1000    sums over the vocabulary

Constants were tuned on the first half of a stream; the second half is the report. `pass.npz` holds
tokens (N+1,), byte_counts (N,) and columns (N,2+2K): log p, entropy, and log p(y), log(1 - p(y)) of
the hints y of the longest order and of each order from 2.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as golf

CHUNK, FAR = 8192, 2**40
LEVELS = len(golf.SHORT_ORDERS)  # of the document, before those of the stream


def load(path):
    """(tokens (N+1,), byte_counts (N,), NeuralColumns of the longest hint, all columns)."""
    saved = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    columns = saved["columns"]
    neural = golf.NeuralColumns(*columns[:, :4].unbind(1))
    return saved["tokens"].long(), saved["byte_counts"].double(), neural, columns


def inputs(tokens, columns, max_order=16, near=256, documents=golf.SHORT_ORDERS):
    """(MixInputs, distance of the hint's context) for hints of up to max_order."""
    span = (0, len(tokens) - 1)
    cfg = golf.replace(golf.Config(), mixer_max_order=max_order, eval_seq_len=near)
    ngram = golf.stream_columns(tokens, span, cfg)
    if documents != golf.SHORT_ORDERS:
        kept = [k for k, n in enumerate(golf.SHORT_ORDERS) if n in documents]
        kept += range(LEVELS, len(ngram.ratio))
        ngram = ngram._replace(ratio=ngram.ratio[kept], level_key=ngram.level_key[kept])
    longest = torch.zeros(span[1], dtype=torch.int64)
    distance = torch.zeros(span[1], dtype=torch.int64)
    for order, counts in golf.count_ngrams(tokens, max_order, 1):
        if order > 1:
            longest[counts.context > 0] = order - 1
            distance = torch.where(counts.context > 0, counts.distance.long(), distance)
    # the columns of order n's hint are at 2 + 2*(n - 1); without a hint those of another do no harm
    place = 2 + 2 * longest
    pair = columns.gather(1, torch.stack([place, place + 1], 1))
    neural = golf.NeuralColumns(columns[:, 0], columns[:, 1], *pair.unbind(1))
    return golf.MixInputs(*neural, ngram.hint == tokens[1:], *ngram[1:]), distance


def table(path, near):
    """Print a pass's score by every rule."""
    tokens, sizes, neural, columns = load(path)
    size, half = len(sizes), len(sizes) // 2
    parts = dict(all=slice(0, size), first=slice(0, half), second=slice(half, size))

    def bpb(logp, part):
        return -float(logp[part].sum()) / math.log(2) / float(sizes[part].sum())

    def row(name, logp, seconds=0.0):
        cells = [bpb(logp, p) for p in parts.values()]
        gains = [bpb(neural.logp, p) - c for p, c in zip(parts.values(), cells)]
        print(f"{name:42}" + "".join(f"{c:9.4f}" for c in cells)
              + "".join(f"{g:9.4f}" for g in gains) + f"{seconds:8.2f}", flush=True)

    def calibrated(name, edit=lambda x: x, chunk=CHUNK, constants=(), **options):
        with contextlib.ExitStack() as stack:
            for constant, value in dict(constants).items():
                stack.enter_context(mock.patch.object(golf, constant, value))
            x, distance = inputs(tokens, columns, **(dict(near=near) | options))
            started = time.perf_counter()
            logp, _ = golf.mix(edit(x), chunk)
            row(name, logp, time.perf_counter() - started)
        return logp, x, distance

    print(f"\n{path}: {size} targets, window {near}\n{'rule':42}" + "".join(
        f"{h:>9}" for h in ("bpb", "1st half", "2nd half", "gain", "1st half", "2nd half", "s")))
    row("network alone", neural.logp)
    for recipe in ("pr889", "pr890", "pr1094"):
        cfg, _ = golf.load_config(dict(RECIPE=recipe))
        started = time.perf_counter()
        part = golf.backoff_columns(golf.Rule().counted(tokens, (0, size), cfg), "context", cfg)
        row(f"backoff {recipe}, exact counts",
            golf.backoff_logp(neural.logp, neural.entropy, part, cfg), time.perf_counter() - started)
    best, x, distance = calibrated("calibrated, order 12", max_order=12)
    calibrated("  chunks of 1,024", max_order=12, chunk=1024)
    for order in (4, 6, 8, 10, 14, 16):
        calibrated(f"  order {order}", max_order=order)
    calibrated("  hint alone", lambda x: x._replace(level_key=x.level_key * 0), max_order=12)
    calibrated("  interpolation alone", lambda x: x._replace(hint_key=x.hint_key * 0), max_order=12)
    calibrated("  without the document's levels", max_order=12, documents=())
    calibrated("  without distance", max_order=12, near=FAR)
    calibrated("  without entropy bins", max_order=12, constants=dict(ENTROPIES=1))
    calibrated("  without agreement of short hints", lambda x: x._replace(
        hint_key=x.hint_key // 8 * 8), max_order=12)
    calibrated("  hint prior 5", max_order=12, constants=dict(HINT_PRIOR=5.0))
    calibrated("  hint prior 20", max_order=12, constants=dict(HINT_PRIOR=20.0))
    calibrated("  level prior 0.05, 1", max_order=12, constants=dict(LEVEL_PRIOR=(0.05, 1.0)))
    calibrated("  level prior 0.2, 4", max_order=12, constants=dict(LEVEL_PRIOR=(0.2, 4.0)))
    gain = (best - neural.logp) / math.log(2)
    for name, where in (("within the window", (distance > 0) & (distance < near)),
                        ("beyond it", distance >= near), ("none", distance == 0)):
        print(f"hint {name:18}{100 * float(where.double().mean()):6.1f} % of targets, gain "
              f"{float(gain[where].mean()):.4f} bits a target, "
              f"{float(gain[where].sum() / gain.sum()) * 100:.1f} % of the whole gain")


def noise(count, vocab_size=1024, sigma=2.0, block=8192):
    """Cost in bits a token where every token is drawn from a random softmax of its own."""
    draw = torch.Generator().manual_seed(0)

    def logp_of(begin):
        own = torch.Generator().manual_seed(1 + begin)
        size = min(block, count - begin)
        return (sigma * torch.randn(size, vocab_size, generator=own)).double().log_softmax(-1)

    tokens = torch.cat([torch.tensor([golf.BOS]), *(
        torch.multinomial(logp_of(b).exp(), 1, generator=draw)[:, 0]
        for b in range(0, count, block))])
    ngram = golf.stream_columns(tokens, (0, count), golf.replace(golf.Config(), mixer_max_order=12))
    neural = []
    for b in range(0, count, block):
        logp, part = logp_of(b), slice(b, min(b + block, count))
        y = ngram.hint[part].long().clamp(min=0)[:, None]
        neural.append(torch.stack([
            logp.gather(1, tokens[1:][part, None])[:, 0], -(logp.exp() * logp).sum(-1),
            logp.gather(1, y)[:, 0], logp.scatter(1, y, -math.inf).logsumexp(-1)], 1))
    neural = golf.NeuralColumns(*torch.cat(neural).unbind(1))
    x = golf.MixInputs(*neural, ngram.hint == tokens[1:], *ngram[1:])
    for chunk in (8192, 1024):
        logp, _ = golf.mix(x, chunk)
        cost = (neural.logp - logp) / math.log(2)
        print(f"{count} tokens of noise, chunks of {chunk}: {float(cost.mean()):+.5f} bits a token "
              f"(first tenth {float(cost[:count // 10].mean()):+.5f})")


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
    for scoring in evaluation.order:
        evaluation.score(scoring, 0.0)
    evaluation.masses()
    for scoring, row in evaluation.rows.items():
        print(f"{scoring:20} mass {row['mass']:.9g}, largest |mass - 1| {row['mass_error']:.2g}, "
              f"largest difference to the score given {row['score_error']:.2g} nats")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("passes", nargs="*", help="files of SAVE_NEURAL_PASS")
    parser.add_argument("--near", type=int, default=256, help="tokens of the network's window")
    parser.add_argument("--noise", type=int, default=0, help="tokens of noise to score")
    parser.add_argument("--masses", type=int, default=0, help="targets to sum distributions at")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for path in options.passes:
        table(path, options.near)
    if options.noise:
        noise(options.noise)
    if options.masses:
        masses(options.masses)


if __name__ == "__main__":
    main()
