"""How fast is the neural pass? Ours against a plain one: same windows, network and results.

    python bench/neural_pass.py [--repeats 9] [--seconds 60] [--scale full] [--profile]

Windows of 256 tokens scored in steps of 64 on the CPU, float32; with a GPU also windows of 2,048,
bf16 and torch.compile on both sides. Ours is NeuralPass.columns with hints. The plain pass
(common.PlainGPT) copies every window from a CPU tensor into the batch, takes the logits of all
positions and their cross-entropy in float32, and goes window by window over the logits of the
scored ones for entropy and hint, as the submissions do for their n-gram mixing.

FLOPs a window, forward: common.forward_flops, of what each side computes.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from common import (
    alternate,
    arguments,
    check,
    cuda_figures,
    forward_flops,
    golf,
    profile,
    scales,
    setup,
)

BATCHES, STRIDE = 4, 64


class PlainPass:
    """Sliding-window scores of a CPU stream (N+1,), by a loop over windows."""

    def __init__(self, model, stream, hints, cfg, run):
        self.model, self.stream, self.hints, self.cfg = model, stream, hints, cfg
        grid = golf.Grid(len(stream) - 1, cfg, cfg.eval_stride, 1)
        self.windows = grid.spans_of(torch.arange(grid.count)).tolist()
        self.logits, self.run = golf.compiled(model.logits, cfg, run), run

    @torch.no_grad()
    def __call__(self):
        """(N,4) float32: log p of the target, entropy, log p and log(1 - p) of the hint."""
        size, out = self.cfg.eval_batch_windows, []
        for first in range(0, len(self.windows), size):
            out += self.batch(self.windows[first : first + size])
        return torch.cat(out)

    def batch(self, windows):
        """[(scored,4)] of each window."""
        device, length = self.run.device, self.cfg.eval_seq_len
        x = torch.zeros(len(windows), length, dtype=torch.int64, device=device)
        y = torch.zeros_like(x)
        for i, (start, _, end) in enumerate(windows):
            chunk = self.stream[start : end + 1].to(device)
            x[i, : end - start], y[i, : end - start] = chunk[:-1], chunk[1:]
        logits = self.logits(x)
        nats = F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(), y.reshape(-1), reduction="none"
        ).reshape(x.shape)
        out = []
        for i, (start, first, end) in enumerate(windows):
            scored = slice(first - start, end - start)
            logp = F.log_softmax(logits[i, scored].float(), dim=-1)
            entropy = -(logp.exp() * logp).sum(dim=-1)
            hints = logp.gather(-1, self.hints[:, first:end].mT)
            out.append(torch.cat([-nats[i, scored, None], entropy[:, None], hints], dim=-1))
        return out


def bench(scale, args):
    """Check and time one scale; prints."""
    cfg, run, model, plain_model = setup(scale, eval_stride=STRIDE)
    generator = torch.Generator().manual_seed(1)
    targets = cfg.eval_seq_len + BATCHES * cfg.eval_batch_windows * STRIDE
    stream = torch.randint(0, cfg.vocab_size, (targets + 1,), generator=generator)
    hints = torch.randint(0, cfg.vocab_size, (golf.HINTS, targets), generator=generator)
    hints = hints.to(run.device)
    ours = golf.NeuralPass(model, SimpleNamespace(val=stream), cfg, run, STRIDE)
    work = dict(
        ours=lambda: ours.columns(hints), plain=PlainPass(plain_model, stream, hints, cfg, run)
    )
    count = len(work["plain"].windows)
    print(f"{scale}: {count} windows of {cfg.eval_seq_len} that score {STRIDE}, {run.device}")
    sides = (golf.NeuralColumns.of(work[side]().unbind(1)) for side in ("ours", "plain"))
    tolerance = 2e-2 if model.compute_dtype == torch.bfloat16 else 1e-4
    for name, a, b in zip(golf.NeuralColumns._fields, *sides, strict=True):
        check(name, a, b, tolerance)
    middle, peak = alternate(f"neural_pass {scale} {run.device.type}", run, work, args)
    if scale == "full":
        last = dict(ours=STRIDE, plain=cfg.eval_seq_len)
        flops = {s: count * forward_flops(cfg, cfg.eval_seq_len, k) for s, k in last.items()}
        cuda_figures(middle, peak, flops)
    if args.profile:
        profile(work, run)
    golf.dist.destroy_process_group()


def main():
    args = arguments(__doc__)
    for scale in scales(args.scale):
        bench(scale, args)


if __name__ == "__main__":
    main()
