"""Which mixing rule is worth how much? Scores saved neural passes by every rule, without a network.

    python bench/mixers.py logs/neural-*.safetensors     bpb and gain of each rule and ablation
    python bench/mixers.py --noise 1000000       cost where n-grams carry nothing
    LOAD_ARTIFACT=x.int6.ptz python bench/mixers.py --masses 1000    sums over the vocabulary

Constants were tuned on the first half of a stream; the second half is the report. Every evaluation
saves its neural pass (tools/saved_pass.py). A pass knows of each target one hint, the longest
context's, up to MIXER_MAX_ORDER: a table of shorter orders needs a pass made with that variable.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as golf

CHUNK, FAR = 8192, 2**40
LEVELS = len(golf.SHORT_ORDERS)  # of the document, before those of the stream


def load(path):
    """(tokens (N+1,), byte_counts (N,), NeuralColumns) of a saved pass."""
    saved = golf.read_weights(path)
    neural = golf.NeuralColumns(*saved["columns"].unbind(1))
    return saved["tokens"], saved["byte_counts"].double(), neural


def inputs(tokens, neural, max_order=12, near=256, documents=golf.SHORT_ORDERS):
    """(MixInputs, distance of the hint's context) of a pass made with hints of up to max_order."""
    span = (0, len(tokens) - 1)
    cfg = golf.replace(golf.Config(), mixer_max_order=max_order, eval_seq_len=near)
    ngram = golf.stream_columns(tokens, span, cfg)
    if documents != golf.SHORT_ORDERS:
        kept = [k for k, n in enumerate(golf.SHORT_ORDERS) if n in documents]
        kept += range(LEVELS, len(ngram.ratio))
        ngram = ngram._replace(ratio=ngram.ratio[kept], level_key=ngram.level_key[kept])
    distance = torch.zeros(span[1], dtype=torch.int64)
    for order, counts in golf.count_ngrams(tokens, max_order, 1):
        if order > 1:
            distance = torch.where(counts.context > 0, counts.distance.long(), distance)
    return golf.MixInputs(*neural, ngram.hint == tokens[1:], *ngram[1:]), distance


def table(path, near, max_order):
    """Print a pass's score by every rule."""
    tokens, sizes, neural = load(path)
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
            x, distance = inputs(tokens, neural, max_order, **(dict(near=near) | options))
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
    best, x, distance = calibrated("calibrated")
    calibrated("  chunks of 1,024", chunk=1024)
    calibrated("  hint alone", lambda x: x._replace(level_key=x.level_key * 0))
    calibrated("  interpolation alone", lambda x: x._replace(hint_key=x.hint_key * 0))
    calibrated("  without the document's levels", documents=())
    calibrated("  without distance", near=FAR)
    calibrated("  without entropy bins", constants=dict(ENTROPIES=1))
    calibrated("  without agreement of short hints", lambda x: x._replace(
        hint_key=x.hint_key // 8 * 8))
    calibrated("  hint prior 5", constants=dict(HINT_PRIOR=5.0))
    calibrated("  hint prior 20", constants=dict(HINT_PRIOR=20.0))
    calibrated("  level prior 0.05, 1", constants=dict(LEVEL_PRIOR=(0.05, 1.0)))
    calibrated("  level prior 0.2, 4", constants=dict(LEVEL_PRIOR=(0.2, 4.0)))
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
    parser.add_argument("passes", nargs="*", help="neural passes that runs have saved")
    parser.add_argument("--max-order", type=int, default=12, help="their MIXER_MAX_ORDER")
    parser.add_argument("--near", type=int, default=256, help="tokens of the network's window")
    parser.add_argument("--noise", type=int, default=0, help="tokens of noise to score")
    parser.add_argument("--masses", type=int, default=0, help="targets to sum distributions at")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for path in options.passes:
        table(path, options.near, options.max_order)
    if options.noise:
        noise(options.noise)
    if options.masses:
        masses(options.masses)


if __name__ == "__main__":
    main()
