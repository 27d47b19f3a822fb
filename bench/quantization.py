"""What do bytes buy? Methods of quantization, entropy coders, and an export at full width.

    python bench/quantization.py logs/x.safetensors [--bits 4.7 3.5] [--kl-tokens 32768]
    python bench/quantization.py logs/x.safetensors --exponents 0.2 0.25 0.3 0.5
    MAX_WALLCLOCK_SECONDS=0 python bench/quantization.py logs/x.safetensors --sequences 8 64 256
    python bench/quantization.py --full-width

Weights are those that a run saved; the environment is that run's (SCALE, DATA_PATH, ...). A method
is judged by two figures against the unquantized weights, both in bits per byte: the gap in val_bpb,
and the Kullback-Leibler divergence of its predictions on --kl-tokens, which is less noisy. The
submissions' method is their code's: clips of five percentiles, one choice for a whole tensor, no
step under 1/31, torch.save and lzma; ours is then given exactly as many bytes. --exponents compares
powers of the mean square gradient that steps go with (STEP_EXPONENT), --sequences how many of the
training text calibrate (CALIBRATION_SEQUENCES; without a cap, so that time is no limit).
--full-width needs no weights: random 11x512 matrices, rows and columns of unequal spread; with
weights it means those of a model of that size.
"""

import argparse
import io
import lzma
import math
import os
import time
from unittest import mock

import brotli
import numpy as np
import safetensors.torch
import torch
import zstandard

from common import golf

PERCENTILES = 0.999, 0.9995, 0.9999, 0.99999, 1.0  # the submissions'


def saved(tensors):
    """The bytes that torch.save makes of a dictionary of arrays or tensors."""
    buffer = io.BytesIO()
    torch.save({n: torch.as_tensor(t) for n, t in tensors.items()}, buffer)
    return buffer.getvalue()


def shuffled(data):
    """Even bytes, then odd bytes: the submissions' byte shuffle before brotli."""
    return data[0::2] + data[1::2]


def clip_steps(w, limit, floor, per_row):
    """Steps (rows,1) of w (rows,cols): the clip of PERCENTILES with the least squared error, of
    each row or of the whole tensor."""
    best, least = None, None
    for percentile in PERCENTILES:
        clip = torch.quantile(w.abs(), percentile, dim=1, keepdim=True)
        step = (clip / limit).clamp(min=floor).half().float()
        error = (w - (w / step).round().clamp(-limit, limit) * step).square().sum(1, keepdim=True)
        error = error if per_row else error.sum().expand(error.shape)
        better = torch.ones_like(error, dtype=bool) if best is None else error < least
        best = step if best is None else torch.where(better, step, best)
        least = error if least is None else torch.minimum(error, least)
    return best


def clip_search(weights, limit, floor, per_row):
    """(tensors to store, weights back): codes of matrices up to `limit`, of embeddings up to 127.
    With a floor no step is under 1/limit."""
    stored, back = {}, {}
    for name, w in weights.items():
        stored[name], back[name] = w.half(), w.half().float()
        if name in golf.BANKS + golf.EMBEDDINGS:
            q = 127 if name in golf.EMBEDDINGS else limit
            rows = w.view(-1, w.shape[-1])
            step = clip_steps(rows, q, 1 / q if floor else 1e-7, per_row)
            codes = (rows / step).round().clamp(-q, q)
            stored[name], stored[name + ".step"] = codes.to(torch.int8), step.half()
            back[name] = (codes * step).view(w.shape)
    return stored, back


def ans_bytes(stored, weights):
    """Size of codes and float16 tensors with our coder."""
    codes = {n: t for n, t in stored.items() if t.dtype == torch.int8}
    cubes = [t.view(-1, *weights[n].shape[-2:]).numpy() for n, t in codes.items()]
    packed = golf.ans_encode(cubes)
    rest = b"".join(t.numpy().tobytes() for n, t in stored.items() if n not in codes)
    return len(packed.after) + len(lzma.compress(packed.inside + rest, preset=9))


class Judge:
    """val_bpb and predictions of weights against the unquantized ones."""

    def __init__(self, weights, data, cfg, run, kl_tokens):
        self.model, self.data, self.cfg, self.run = golf.build_model(cfg, run), data, cfg, run
        self.weights = weights
        self.tokens = torch.as_tensor(data.val[:kl_tokens]).view(-1, cfg.eval_seq_len).long()
        self.bytes = int(data.table.target_bytes(data.val[: kl_tokens + 1]).sum())
        self.bpb, self.reference = self.val_bpb(weights), self.predictions()

    def load(self, weights):
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])
        return self.model

    def val_bpb(self, weights):
        return golf.neural_score(self.load(weights), self.data, self.cfg, self.run)["val_bpb"]

    @torch.no_grad()
    def predictions(self):
        device = self.run.device
        batches = self.tokens.split(self.cfg.eval_batch_windows)
        return torch.cat([self.model.logits(x.to(device)).log_softmax(-1).cpu() for x in batches])

    def row(self, method, size, weights):
        gap, other = self.val_bpb(weights) - self.bpb, self.predictions()
        kl = float((self.reference.exp() * (self.reference - other)).sum(dtype=torch.double))
        bits = kl / math.log(2) / self.bytes
        print(f"{method:44}{size:>12,}{gap:>10.5f}{bits:>10.5f}", flush=True)

    def ours(self, method, senses, size):
        """A row of our exporter with `size` bytes."""
        cfg = golf.replace(self.cfg, artifact_bytes=size + golf.code_bytes())
        blob = golf.export(self.load(self.weights), senses, self.data, cfg, self.run)
        _, tensors = golf.unpack(blob, cfg, self.data.corpus["vocabulary_sha256"])
        self.row(method, len(blob), {n: t.tensor() for n, t in tensors.items()})

    def searched(self, size):
        """A row of the per-row clip search, its number of levels fitted to `size` bytes."""
        low, high = 1.0, 127.0
        for _ in range(9):
            limit = (low * high) ** 0.5
            stored, back = clip_search(self.weights, limit, False, True)
            used = ans_bytes(stored, self.weights)
            low, high = (limit, high) if used <= size else (low, limit)
        self.row(f"  clip search per row, {limit:.1f} levels, ANS", used, back)


def methods(judge, bits):
    """The table of methods; returns the sensitivities."""
    senses = golf.calibrate(judge.load(judge.weights), judge.data, judge.cfg, judge.run)
    rounded = {n: s._replace(factor=None) for n, s in senses.items()}
    print(
        f"\n{'method':44}{'bytes':>12}{'gap':>10}{'KL':>10}   (bits per byte; unquantized "
        f"{judge.bpb:.5f})"
    )
    cells, sizes = sum(w.numel() for w in judge.weights.values()), []
    for limit, name in ((31, "int6"), (15, "int5")):
        stored, back = clip_search(judge.weights, limit, True, False)
        sizes.append(len(lzma.compress(saved(stored), preset=6)))
        judge.row(f"the submissions' {name}, lzma", sizes[-1], back)
    for size in sizes + [int(b * cells / 8) for b in bits]:
        print(f"in {size:,} bytes, {8 * size / cells:.3f} bits a parameter:")
        judge.searched(size)
        judge.ours("  ours, one step for all", {}, size)
        judge.ours("  ours, steps by sensitivity", rounded, size)
        judge.ours("  ours, steps by sensitivity, GPTQ", senses, size)
    return senses


def exponents(judge, bits, powers):
    """Steps by sensitivity, without GPTQ, that go with other powers of the mean square gradient."""
    senses = golf.calibrate(judge.load(judge.weights), judge.data, judge.cfg, judge.run)
    rounded = {n: s._replace(factor=None) for n, s in senses.items()}
    cells = sum(w.numel() for w in judge.weights.values())
    print(f"\n{'exponent of the steps':44}{'bytes':>12}{'gap':>10}{'KL':>10}")
    for b in bits:
        print(f"{b} bits a parameter:")
        for power in powers:
            with mock.patch.object(golf, "STEP_EXPONENT", power):
                judge.ours(f"  {power:g}", rounded, int(b * cells / 8))


def sequences(judge, bits, counts):
    """Ours, with at most so many sequences of calibration, if calibration_seconds allow it."""
    cells = sum(w.numel() for w in judge.weights.values())
    for count in counts:
        with mock.patch.object(golf, "CALIBRATION_SEQUENCES", count):
            model = judge.load(judge.weights)
            senses = golf.calibrate(model, judge.data, judge.cfg, judge.run)
        for b in bits:
            judge.ours(f"  at most {count} sequences, {b} bits", senses, int(b * cells / 8))


def coders(tensors, cfg):
    """The table of coders: what each makes of the same codes, steps and float16 values."""
    coded = {n: t for n, t in tensors.items() if isinstance(t, golf.CodedTensor)}
    plain = {n: t.codes if n in coded else t.values for n, t in tensors.items()}
    plain |= {f"{n}.steps": t.step_logs for n, t in coded.items()}
    data, codes = saved(plain), [t.codes for t in coded.values()]
    counts = [np.unique(c, return_counts=True)[1] for c in codes]
    entropy = sum(float((n * np.log2(n.sum() / n)).sum()) / 8 for n in counts)
    rows = {
        "torch.save + lzma-9": (lambda: lzma.compress(data, preset=9), lzma.decompress),
        "torch.save + zstd-22": (lambda: zstandard.compress(data, 22), zstandard.decompress),
        "byte shuffle + brotli-11": (
            lambda: brotli.compress(shuffled(data), quality=11),
            brotli.decompress,
        ),
    }
    for method in ("lzma", "zstd", "ans"):
        other = golf.replace(cfg, compressor=method)
        rows[f"ours, COMPRESSOR={method}"] = (
            lambda c=other: golf.pack(tensors, c, "0" * 64),
            lambda blob, c=other: golf.unpack(blob, c, "0" * 64),
        )
    print(
        f"\n{'coder, on equal codes':44}{'bytes':>12}{'of first':>10}{'encode s':>10}"
        f"{'decode s':>10}"
    )
    first = None
    for name, (encode, decode) in rows.items():
        begin = time.perf_counter()
        blob = encode()
        middle = time.perf_counter()
        decode(blob)
        first = first or len(blob)
        print(
            f"{name:44}{len(blob):>12,}{len(blob) / first:>10.4f}{middle - begin:>10.2f}"
            f"{time.perf_counter() - middle:>10.2f}",
            flush=True,
        )
    print(
        f"{'order-0 entropy of each tensor, codes alone':44}{entropy:>12,.0f}"
        f"{entropy / first:>10.4f}"
    )


def full_width(cfg, run):
    """Export of random matrices of the challenge's size, with the budget binding."""
    generator, senses = torch.Generator().manual_seed(0), {}
    model = golf.GPT(golf.replace(cfg, mtp_num_heads=0), None)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(random(*p.shape))
            if name in golf.BANKS + golf.EMBEDDINGS:
                cube = p.view(-1, *p.shape[-2:])
                row = (0.5 * random(*cube.shape[:2], 1)).exp2()
                col = (0.5 * random(len(cube), 1, cube.size(2))).exp2()
                cube.mul_(0.1 * row * col)
                senses[name] = golf.Sensitivity(
                    random(*cube.shape[:2]).exp2(), random(len(cube), cube.size(2)).exp2(), None
                )
    text = argparse.Namespace(corpus=dict(vocabulary_sha256="0" * 64))
    begin = time.perf_counter()
    blob = golf.export(model, senses, text, cfg, run)
    middle = time.perf_counter()
    golf.unpack(blob, cfg, "0" * 64)
    print(
        f"full width: {len(blob) + golf.code_bytes():,} bytes with code, export "
        f"{middle - begin:.1f} s, unpack {time.perf_counter() - middle:.1f} s"
    )
    return golf.quantize(
        dict(model.named_parameters()), cfg, senses, run.record["artifact"][-1]["log2_step"]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", nargs="?")
    parser.add_argument("--bits", type=float, nargs="*", default=[4.7])
    parser.add_argument("--kl-tokens", type=int, default=32768)
    parser.add_argument("--exponents", type=float, nargs="*", default=[])
    parser.add_argument("--sequences", type=int, nargs="*", default=[])
    parser.add_argument("--full-width", action="store_true")
    args = parser.parse_args()
    # Wide codes: the number of bytes alone is the limit.
    env = dict(os.environ, RUN_ID="bench-quantization", MATRIX_BITS="8", EMBED_BITS="8")
    cfg, _ = golf.load_config(env | (dict(SCALE="full") if args.full_width else {}))
    run = golf.Run(cfg)
    if not args.weights:
        coders(full_width(cfg, run), cfg)
    else:
        data = golf.load_data(cfg, run)
        judge = Judge(safetensors.torch.load_file(args.weights), data, cfg, run, args.kl_tokens)
        if args.exponents:
            exponents(judge, args.bits, args.exponents)
            return
        if args.sequences:
            sequences(judge, args.bits, args.sequences)
            return
        senses = methods(judge, args.bits)
        found = run.record["artifact"][-1]["log2_step"]
        weights = dict(judge.load(judge.weights).named_parameters())  # where the senses are
        coders(golf.quantize(weights, cfg, senses, found), cfg)
    golf.dist.destroy_process_group()


if __name__ == "__main__":
    main()
