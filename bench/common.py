"""What the benches share: train_gpt as `golf`, the plain network, the clock and the figures.

The plain network is the same maths as train_gpt.GPT written in the manner of the public
submissions: a module a block with its own 2-D weights, every position through every layer, one
operation after the other. It is what a reader would write first; nothing in it is slow on purpose.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as golf

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 SXM, NVIDIA's data sheet
FULL_TOKENS = 98304  # one of eight ranks' share of the challenge's step


def plain_norm(x):
    return F.rms_norm(x, (x.size(-1),))


def plain_attention(q, k, v):
    """Causal attention of q (B,T,H,D), k and v (B,T,Hkv,D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2).contiguous()


def plain_rotary(x, cos, sin):
    """RoPE on the first 2*cos.size(-1) dims of x (B,T,H,D)."""
    half = cos.size(-1)
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = rotated[..., :half], rotated[..., half:]
    rotated = torch.cat((a * cos + b * sin, a * (-sin) + b * cos), dim=-1)
    return torch.cat((rotated, rest), dim=-1)


def plain_xsa(y, v):
    """y (B,T,H,D) less its projection on the own normalized value v (B,T,Hkv,D)."""
    B, T, H, D = y.shape
    grouped = y.reshape(B, T, v.size(2), -1, D)
    direction = F.normalize(v, dim=-1).unsqueeze(-2)
    projection = (grouped * direction).sum(dim=-1, keepdim=True) * direction
    return (grouped - projection).reshape(B, T, H, D)


def copied(x):
    """A parameter that is a copy of tensor x."""
    return nn.Parameter(x.detach().clone())


class PlainBlock(nn.Module):
    """Attention and MLP of layer i, with copies of a golf.GPT's weights."""

    def __init__(self, model, i, attention):
        super().__init__()
        cfg, L = model.cfg, model.cfg.num_layers
        self.cfg, self.attention, self.xsa = cfg, attention, i >= L - cfg.xsa_last_n
        self.ln_scale = 1 / math.sqrt(i + 1) if cfg.ln_scale else 1.0
        self.q, self.o = copied(model.qo_bank[i]), copied(model.qo_bank[L + i])
        self.k, self.v = copied(model.kv_bank[i]), copied(model.kv_bank[L + i])
        self.up, self.down = copied(model.mlp_up_bank[i]), copied(model.mlp_down_bank[i])
        self.attn_scale, self.mlp_scale = copied(model.attn_scale[i]), copied(model.mlp_scale[i])
        self.resid_mix, self.q_gain = copied(model.resid_mix[i]), copied(model.q_gain[i])

    def forward(self, x, x0, cos, sin, value_embedding):
        cfg, (B, T, C), dtype = self.cfg, x.shape, x.dtype

        def as_x(p):
            return p.to(dtype)

        mix = as_x(self.resid_mix)
        x = mix[0][None, None, :] * x + mix[1][None, None, :] * x0
        h = plain_norm(x) * self.ln_scale
        q = F.linear(h, as_x(self.q)).reshape(B, T, cfg.num_heads, -1)
        k = F.linear(h, as_x(self.k)).reshape(B, T, cfg.num_kv_heads, -1)
        v = F.linear(h, as_x(self.v))
        if value_embedding is not None:
            v = v + value_embedding
        v = v.reshape(B, T, cfg.num_kv_heads, -1)
        q, k = plain_rotary(plain_norm(q), cos, sin), plain_rotary(plain_norm(k), cos, sin)
        q = q * as_x(self.q_gain)[None, None, :, None]
        y = self.attention(q, k, v)
        y = plain_xsa(y, v) if self.xsa else y
        x = x + as_x(self.attn_scale)[None, None, :] * F.linear(y.reshape(B, T, C), as_x(self.o))
        h = F.linear(plain_norm(x) * self.ln_scale, as_x(self.up))
        h = F.linear(F.leaky_relu(h, negative_slope=cfg.relu_slope).square(), as_x(self.down))
        return x + as_x(self.mlp_scale)[None, None, :] * h


PLAIN_NAMES = (
    "tok_emb",
    "bigram_emb",
    "bigram_proj",
    "bigram_scale",
    "value_emb",
    "value_proj",
    "value_scale",
    "value_layer_scale",
    "smear_gate",
    "skip_weights",
)


class PlainGPT(nn.Module):
    """The recipe golf's network with copies of a golf.GPT's weights."""

    def __init__(self, model, attention):
        super().__init__()
        cfg = self.cfg = model.cfg
        assert not cfg.value_residual and not cfg.mtp_num_heads
        self.dtype = model.compute_dtype
        self.blocks = nn.ModuleList(PlainBlock(model, i, attention) for i in range(cfg.num_layers))
        for name in PLAIN_NAMES:
            p = getattr(model, name).detach().clone()
            setattr(self, name, nn.Parameter(p[0] if name.endswith("proj") else p))

    def logits(self, tokens):
        """(B,T,V) float32 of tokens (B,T)."""
        cfg, half = self.cfg, self.cfg.num_layers // 2

        def as_x(p):
            return p.to(self.dtype)

        rows = len(self.bigram_emb) - 1
        first, second = golf.BIGRAM_PRIMES
        index = torch.full_like(tokens, rows)
        index[:, 1:] = torch.bitwise_xor(first * tokens[:, 1:], second * tokens[:, :-1]) % rows
        bigram = F.linear(F.embedding(index, as_x(self.bigram_emb)), as_x(self.bigram_proj))
        x = F.embedding(tokens, as_x(self.tok_emb)) + bigram * as_x(self.bigram_scale)
        x, gate = plain_norm(x), torch.sigmoid(as_x(self.smear_gate))[None, None, :]
        x = (1 - gate) * x + gate * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        x0, skips = x, []
        cos, sin = (
            t.to(x.dtype)
            for t in golf.rope_tables(tokens.size(1), cfg.rope_base, cfg.rope_dims, tokens.device)
        )
        values = F.linear(F.embedding(tokens, as_x(self.value_emb)), as_x(self.value_proj))
        values = values * as_x(self.value_scale)
        for i, block in enumerate(self.blocks):
            if i >= half and skips:
                x = x + as_x(self.skip_weights)[i - half][None, None, :] * skips.pop()
            own = None
            if i in cfg.ve_layers:
                own = values * as_x(self.value_layer_scale)[cfg.ve_layers.index(i)]
            x = block(x, x0, cos, sin, own)
            if i < half:
                skips.append(x)
        logits = F.linear(plain_norm(x), as_x(self.tok_emb))
        return cfg.logit_softcap * torch.tanh(logits.float() / cfg.logit_softcap)

    def forward(self, tokens, targets):
        """Mean cross-entropy () in nats."""
        logits = self.logits(tokens)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))

    @torch.no_grad()
    def like_golf(self, of=lambda p: p):
        """{name: tensor} in golf.GPT's names and shapes of of(parameter)."""

        def stack(*names):
            return torch.stack([of(getattr(b, n)) for n in names for b in self.blocks])

        out = dict(
            qo_bank=stack("q", "o"),
            kv_bank=stack("k", "v"),
            mlp_up_bank=stack("up"),
            mlp_down_bank=stack("down"),
        )
        out |= {n: stack(n) for n in ("attn_scale", "mlp_scale", "resid_mix", "q_gain")}
        for name, p in self.named_parameters(recurse=False):
            out[name] = of(p)[None] if name.endswith("proj") else of(p)
        return out


def setup(scale, **sizes):
    """(Config, Run, golf.GPT, PlainGPT) of the environment's settings, with equal weights.

    Every parameter is moved away from its start, where the zeros would hide differences.
    """
    device = "cuda" if scale == "full" else "cpu"
    logs = tempfile.mkdtemp()
    cfg, _ = golf.load_config(os.environ | dict(SCALE=scale, DEVICE=device, LOGS_PATH=logs))
    cfg = golf.replace(cfg, **sizes)
    run = golf.Run(cfg)
    model = golf.build_model(cfg, run)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p.device))
    own = model.attention

    def causal(q, k, v):
        return own(q, k, v, causal=True)

    attention = causal if device == "cuda" else plain_attention
    return cfg, run, model, PlainGPT(model, attention)


def difference(a, b):
    """|a - b| over |b|, of all elements together."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def check(what, a, b, tolerance):
    """SystemExit unless a is b within a relative tolerance; prints the difference."""
    got = difference(a, b)
    print(f"  {what}: relative difference {got:.1e} (at most {tolerance:.0e})")
    if not got <= tolerance:
        raise SystemExit(f"{what}: not the same results; nothing to compare")


def forward_flops(cfg, length, last):
    """FLOPs of one window's forward pass that scores its last positions.

    2 a weight and position, and for attention, causal, 2*length*dim a position and layer; in the
    last layer only keys and values see every position. With last = length times 3 it is the usual
    6 * (weights of matrices, head included) + 6 * length * dim * layers a token of training.
    """
    C, L, V = cfg.model_dim, cfg.num_layers, cfg.vocab_size
    kv, hidden = C // cfg.num_heads * cfg.num_kv_heads, round(cfg.mlp_mult * C)
    keys, rest = 2 * kv * C, 2 * C * C + 2 * hidden * C
    extra = cfg.bigram_dim * C + cfg.ve_dim * kv
    everywhere = 2 * length * ((L - 1) * (keys + rest) + keys + extra + (L - 1) * length * C)
    attended = last * length - last * last / 2  # causal pairs of the last layer, halved on average
    return everywhere + 2 * last * (rest + V * C) + 4 * C * attended


def timed(work, run):
    """(seconds, peak bytes of the CUDA device or 0) of one call."""
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = run.sync()
    work()
    return run.sync() - begin, torch.cuda.max_memory_allocated() if cuda else 0


def alternate(name, run, work, args):
    """{side: median seconds} of `work` {ours, plain}, run in turn; prints the table's line.

    Two calls of each are not counted. The order changes with every pair, so that whatever else
    the machine does meets both sides alike.
    """
    for side in (*work, *work):
        timed(work[side], run)
    times, peak, begin = {side: [] for side in work}, {}, time.perf_counter()
    for pair in tqdm(range(args.repeats), name, leave=False, disable=None):
        if pair >= 3 and time.perf_counter() - begin > args.seconds:
            break
        for side in work if pair % 2 else reversed(work):
            seconds, peak[side] = timed(work[side], run)
            times[side].append(seconds)
    middle = {side: statistics.median(t) for side, t in times.items()}
    print(
        f"{name}: ours {1000 * middle['ours']:.1f} ms, plain {1000 * middle['plain']:.1f} ms, "
        f"ratio {middle['ours'] / middle['plain']:.3f} (median of {len(times['ours'])}, "
        f"alternating)",
        flush=True,
    )
    return middle, peak


def cuda_figures(middle, peak, flops):
    """Print MFU and memory of both sides; flops {side: FLOPs of a call}."""
    for side, seconds in middle.items():
        rate = flops[side] / seconds
        print(
            f"  {side}: {rate / 1e12:.1f} TFLOP/s, MFU {rate / PEAK_FLOPS:.1%} of "
            f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s, peak {peak[side]} bytes"
        )


def profile(work, run):
    """Print the ten kernels that take most time of each side."""
    cuda = run.device.type == "cuda"
    activities = [ProfilerActivity.CPU]
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    for side, call in work.items():
        with torch.profiler.profile(activities=activities) as result:
            timed(call, run)
        key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(f"{side}\n{result.key_averages().table(sort_by=key, row_limit=10)}")


def arguments(doc):
    """--repeats, --seconds, --profile."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs at most")
    parser.add_argument("--seconds", type=float, default=60, help="for the pairs of one line")
    parser.add_argument("--profile", action="store_true", help="print the top ten kernels")
    return parser.parse_args()


def scales():
    """demo always, full where there is CUDA."""
    return ["demo", "full"] if torch.cuda.is_available() else ["demo"]
