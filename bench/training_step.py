"""How fast is a training step? Ours against a plain one: same maths, shapes and weights.

    python bench/training_step.py [--repeats 9] [--seconds 60] [--scale full] [--profile]

Demo size on the CPU, float32; with a GPU also one of eight ranks' share of the challenge's step
(98,304 tokens of 2,048), bf16 and torch.compile on both sides. Ours is Trainer.gradients,
Optimizer.step and WeightAverage.update. The plain step (common.PlainGPT) keeps the loss's float32
logits, runs Newton-Schulz matrix by matrix, AdamW and the EMA parameter by parameter, and clips
with torch's clip_grad_norm_. Gradients, weights and average are compared first.

FLOPs a token: 6 * (weights of matrices, head included) + 6 * length * dim * layers.
"""

import tempfile

import torch

from common import (
    FULL_TOKENS,
    alternate,
    arguments,
    check,
    cuda_figures,
    forward_flops,
    golf,
    profile,
    random_text,
    scales,
    setup,
)

MOMENTUM, LR_SCALE = 0.95, 1.0


class OurStep:
    """A step as Trainer.train takes it."""

    def __init__(self, model, data, cfg, run):
        self.trainer = golf.Trainer(model, data, cfg, run)
        self.optimizer = golf.Optimizer(model, cfg, run)
        self.average = golf.WeightAverage(model, cfg)
        self.model, self.step = model, 1 / cfg.schedule_steps

    def __call__(self, looping=True):
        self.trainer.gradients(looping=looping)
        self.optimizer.step(LR_SCALE, MOMENTUM)
        self.average.update(0.0, self.step, LR_SCALE)

    def averages(self):
        """{name: averaged weight}."""
        names = (name for name, _ in self.model.named_parameters())
        return dict(zip(names, self.average.average, strict=True))


def plain_newton_schulz(g, steps):
    """One matrix (rows, cols), roughly orthogonalized."""
    a, b, c = golf.NEWTON_SCHULZ
    x = g.bfloat16() if g.is_cuda else g
    x = x / (x.norm() + 1e-7)
    if g.size(0) > g.size(1):
        x = x.T
    for _ in range(steps):
        A = x @ x.T
        B = b * A + c * A @ A
        x = a * x + B @ x
    return (x.T if g.size(0) > g.size(1) else x).to(g.dtype)


# PlainGPT's weight matrices, which are Muon's.
MATRICES = {"q", "k", "v", "o", "up", "down", "bigram_proj", "value_proj"}


class PlainStep:
    """A step of the plain network, parameter by parameter."""

    def __init__(self, model, data, cfg, run):
        self.model, self.cfg = model, cfg
        self.loader = golf.TrainLoader(data.train, cfg, run)
        self.forward = golf.compiled(model, cfg, run)
        self.matrices, groups = [], {}
        for name, p in model.named_parameters():
            rates = cfg.scalar_lr, cfg.adam_wd
            if name.endswith("emb"):
                rates = cfg.tied_embed_lr, cfg.embed_wd
            if name.split(".")[-1] in MATRICES:
                self.matrices.append(p)
            else:
                groups.setdefault(rates, []).append(p)
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(
            [dict(params=ps, lr=lr, weight_decay=wd) for (lr, wd), ps in groups.items()],
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.adam_eps,
            foreach=False,
            fused=False,
        )
        self.ema = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.steps = 0

    def gradients(self):
        tokens, targets = self.loader.next_batch()
        self.forward(tokens, targets).backward()

    @torch.no_grad()
    def muon(self):
        cfg, lr = self.cfg, self.cfg.matrix_lr * LR_SCALE
        for p, momentum in zip(self.matrices, self.momenta, strict=True):
            momentum.mul_(MOMENTUM).add_(p.grad)
            direction = p.grad.add(momentum, alpha=MOMENTUM)
            if cfg.muon_row_norm:
                direction = torch.nn.functional.normalize(direction, dim=1)
            direction = plain_newton_schulz(direction, cfg.muon_backend_steps)
            p.mul_(1 - lr * cfg.muon_wd)
            p.add_(direction, alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)

    def __call__(self):
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip_norm)
        self.muon()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.steps += 1
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                self.ema[name].mul_(self.cfg.ema_decay).add_(p, alpha=1 - self.cfg.ema_decay)

    def averages(self):
        """{name: averaged weight} in golf's names, freed from the bias of the start at zero."""
        of = {id(p): self.ema[name] for name, p in self.model.named_parameters()}
        return self.model.like_golf(lambda p: of[id(p)] / (1 - self.cfg.ema_decay**self.steps))


def flat(tensors):
    """One vector of a {name: tensor}, in the order of names."""
    return torch.cat([tensors[name].detach().flatten().float() for name in sorted(tensors)])


def compare(ours, plain, bf16):
    """Gradients before any step, then weights' movement and averages after two."""
    named = dict(ours.model.named_parameters())
    before = flat(named)
    ours.trainer.gradients(looping=True)
    plain.gradients()
    check(
        "gradients",
        flat({n: p.grad for n, p in named.items()}),
        flat(plain.model.like_golf(lambda p: p.grad)),
        5e-2 if bf16 else 1e-4,
    )
    for step in (ours, plain):
        step.model.zero_grad(set_to_none=True)
        step()
        step()
    check(
        "movement of the weights",
        flat(named) - before,
        flat(plain.model.like_golf()) - before,
        1e-1 if bf16 else 1e-2,
    )
    check("averaged weights", flat(ours.averages()), flat(plain.averages()), 1e-2 if bf16 else 1e-4)


def bench(scale, folder, args):
    """Check and time one scale; prints."""
    sizes = dict(train_batch_tokens=FULL_TOKENS) if scale == "full" else {}
    cfg, run, model, plain_model = setup(scale, **sizes)
    print(f"{scale}: {cfg.train_batch_tokens} tokens of {cfg.train_seq_len}, {run.device}")
    data = random_text(folder, cfg)
    work = dict(ours=OurStep(model, data, cfg, run), plain=PlainStep(plain_model, data, cfg, run))
    compare(work["ours"], work["plain"], model.compute_dtype == torch.bfloat16)
    name = f"training_step {scale} {run.device.type}"
    middle, peak = alternate(name, run, work, args)
    if scale == "full":
        sequences = cfg.train_batch_tokens // cfg.train_seq_len
        flops = 3 * sequences * forward_flops(cfg, cfg.train_seq_len, cfg.train_seq_len)
        cuda_figures(middle, peak, dict.fromkeys(work, flops))
    if args.profile:
        profile(work, run)
    golf.dist.destroy_process_group()


def main():
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        for scale in scales(args.scale):
            bench(scale, folder, args)


if __name__ == "__main__":
    main()
