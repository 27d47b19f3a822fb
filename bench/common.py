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
from types import SimpleNamespace

import numpy as np
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
        for name in IN_BLOCKS:
            if hasattr(model, name):
                setattr(self, name, copied(getattr(model, name)[i]))
        if 0 < cfg.lanes_from <= i:
            for name in IN_LANES:
                setattr(self, name, copied(getattr(model, name)[i - cfg.lanes_from]))

    def attend(self, h, cos, sin, value_embedding):
        """Attention's output (B,T,C) of a normed and scaled input h (B,T,C)."""
        cfg, (B, T, C), dtype = self.cfg, h.shape, h.dtype
        q = F.linear(h, self.q.to(dtype)).reshape(B, T, cfg.num_heads, -1)
        k = F.linear(h, self.k.to(dtype)).reshape(B, T, cfg.num_kv_heads, -1)
        v = F.linear(h, self.v.to(dtype))
        if value_embedding is not None:
            v = v + value_embedding
        v = v.reshape(B, T, cfg.num_kv_heads, -1)
        q, k = plain_rotary(plain_norm(q), cos, sin), plain_rotary(plain_norm(k), cos, sin)
        q = q * self.q_gain.to(dtype)[None, None, :, None]
        y = self.attention(q, k, v)
        y = plain_xsa(y, v) if self.xsa else y
        if cfg.attn_gate:
            gate = F.linear(h[:, :, : golf.GATE_WIDTH], self.attn_gate.to(dtype))
            y = y * (2 * torch.sigmoid(gate)).unsqueeze(-1)
        return F.linear(y.reshape(B, T, C), self.o.to(dtype))

    def forward(self, lanes, x0, cos, sin, value_embedding):
        """The lanes, one or two of (B,T,C), after the block."""
        dtype = x0.dtype
        mix, attn_scale = self.resid_mix.to(dtype), self.attn_scale.to(dtype)[None, None, :]
        x = mix[0][None, None, :] * lanes[0] + mix[1][None, None, :] * x0
        h = self.attend(plain_norm(x) * self.ln_scale, cos, sin, value_embedding)
        if len(lanes) == 1:
            x = x + attn_scale * h
            return [x + self.feed(x)]
        a, b = lanes
        keep, share = self.lane_keep.to(dtype), self.lane_route.to(dtype)
        p, q = attn_scale * h, self.feed(b)
        a_next = keep[0] * a + share[0, 0] * p + share[1, 0] * q
        b_next = keep[1] * b + share[0, 1] * p + share[1, 1] * q
        return [a_next, b_next]

    def feed(self, x):
        """The MLP's scaled output (B,T,C) on x (B,T,C)."""
        h = F.linear(plain_norm(x) * self.ln_scale, self.up.to(x.dtype))
        h = F.leaky_relu(h, negative_slope=self.cfg.relu_slope).square()
        h = F.linear(h, self.down.to(x.dtype))
        return self.mlp_scale.to(x.dtype)[None, None, :] * h


# Parameters of golf.GPT that a PlainBlock holds, a block's part of each, by its name there.
IN_BLOCKS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "attn_gate")
IN_LANES = ("lane_keep", "lane_route")  # likewise, of the blocks from lanes_from on
BANKS = {
    "qo_bank": ("q", "o"),
    "kv_bank": ("k", "v"),
    "mlp_up_bank": ("up",),
    "mlp_down_bank": ("down",),
}


class PlainGPT(nn.Module):
    """The recipe golf's network with copies of a golf.GPT's weights."""

    def __init__(self, model, attention):
        super().__init__()
        cfg = self.cfg = model.cfg
        assert not cfg.value_residual and not cfg.mtp_num_heads
        self.dtype = model.compute_dtype
        self.blocks = nn.ModuleList(PlainBlock(model, i, attention) for i in range(cfg.num_layers))
        for name, p in model.named_parameters():
            if name not in (*BANKS, *IN_BLOCKS, *IN_LANES):
                p = p.detach().clone()
                setattr(self, name, nn.Parameter(p[0] if name.endswith("proj") else p))

    def embed(self, tokens):
        """The smeared embedding (B,T,C) of tokens (B,T)."""

        def as_x(p):
            return p.to(self.dtype)

        rows = len(self.bigram_emb) - 1
        first, second = golf.BIGRAM_PRIMES
        index = torch.full_like(tokens, rows)
        index[:, 1:] = torch.bitwise_xor(first * tokens[:, 1:], second * tokens[:, :-1]) % rows
        bigram = F.linear(F.embedding(index, as_x(self.bigram_emb)), as_x(self.bigram_proj))
        x = F.embedding(tokens, as_x(self.tok_emb)) + bigram * as_x(self.bigram_scale)
        if self.cfg.content_smear:
            before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
            seen = x[:, :, : golf.GATE_WIDTH] * as_x(self.smear_content)[None, None, :]
            gate = as_x(self.smear_scale) * torch.sigmoid(seen.sum(dim=-1, keepdim=True))
            gate = torch.where((tokens == golf.BOS).unsqueeze(-1), torch.zeros_like(gate), gate)
            return plain_norm(x + gate * before)
        x, gate = plain_norm(x), torch.sigmoid(as_x(self.smear_gate))[None, None, :]
        return (1 - gate) * x + gate * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)

    def order(self):
        """The blocks' numbers in the order in which they are applied."""
        cfg = self.cfg
        before, after = range(cfg.loop_first), range(cfg.loop_last + 1, cfg.num_layers)
        if cfg.loop_passes == 1:
            return list(range(cfg.num_layers))
        inside = [i for _ in range(cfg.loop_passes) for i in range(len(before), after.start)]
        return [*before, *inside, *after]

    def logits(self, tokens):
        """(B,T,V) float32 of tokens (B,T)."""
        cfg, order = self.cfg, self.order()
        half = len(order) // 2
        x0, skips = self.embed(tokens), []
        lanes = [x0]
        cos, sin = (
            t.to(x0.dtype)
            for t in golf.rope_tables(tokens.size(1), cfg.rope_base, cfg.rope_dims, tokens.device)
        )
        values = F.embedding(tokens, self.value_emb.to(self.dtype))
        values = F.linear(values, self.value_proj.to(self.dtype)) * self.value_scale.to(self.dtype)
        for place, i in enumerate(order):
            if cfg.lanes_from and place >= half and i >= cfg.lanes_from and len(lanes) == 1:
                lanes = [lanes[0], lanes[0]]
            if place >= half and skips:
                row = place - half if cfg.loop_passes == 1 else 2 * half - 1 - place
                skip_weights = getattr(self, golf.skips_name(cfg))
                scale = skip_weights[row].to(self.dtype)[None, None, :]
                lanes[0] = lanes[0] + scale * skips.pop()
            own = None
            if i in cfg.ve_layers:
                scale = self.value_layer_scale.to(self.dtype)[cfg.ve_layers.index(i)]
                own = values * scale
            lanes = self.blocks[i](lanes, x0, cos, sin, own)
            if place < half:
                skips.append(lanes[0])
        x = plain_norm(sum(lanes) / len(lanes))
        logits = F.linear(x, self.tok_emb.to(self.dtype))
        return cfg.logit_softcap * torch.tanh(logits.float() / cfg.logit_softcap)

    def forward(self, tokens, targets):
        """Mean cross-entropy () in nats."""
        logits = self.logits(tokens)
        return F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1))

    @torch.no_grad()
    def like_golf(self, of=lambda p: p):
        """{name: tensor} in golf.GPT's names and shapes of of(parameter)."""

        def stack(blocks, *names):
            return torch.stack([of(getattr(b, n)) for n in names for b in blocks])

        out = {name: stack(self.blocks, *parts) for name, parts in BANKS.items()}
        lanes = self.blocks[self.cfg.lanes_from :] if self.cfg.lanes_from else []
        for names, blocks in ((IN_BLOCKS, self.blocks), (IN_LANES, lanes)):
            out |= {n: stack(blocks, n) for n in names if len(blocks) and hasattr(blocks[-1], n)}
        for name, p in self.named_parameters(recurse=False):
            out[name] = of(p)[None] if name.endswith("proj") else of(p)
        return out


def first_targets(end, neural, ngram, hint_number):
    """What golf.mix reads of the first targets of a stream, from what it reads of all."""
    neural = golf.NeuralColumns(*(column[..., :end] for column in neural))
    columns = {name: getattr(ngram, name)[..., :end] for name in ("hints", "hint_key", "level_key")}
    return neural, ngram._replace(**columns), hint_number[:end]


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


def random_text(folder, cfg):
    """Training data of nine batches of random tokens, as load_data gives it."""
    path = Path(folder, f"{cfg.scale}.bin")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 9 * cfg.train_batch_tokens)
    golf.write_shard(path, tokens)
    return SimpleNamespace(train=golf.TokenStream([str(path)], cfg.vocab_size))


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
    6 * (weights of matrices, head included) + 6 * length * dim * layers a token of training, each
    layer as often as it is visited.
    """
    C, V = cfg.model_dim, cfg.vocab_size
    L = len(golf.block_visits(cfg, looping=True))
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


def in_turn(name, run, work, args):
    """({side: median seconds}, {side: peak bytes}, calls of each) of `work` {side: callable}.

    Two calls of each are not counted. The order changes with every round, so that whatever else
    the machine does meets all sides alike.
    """
    for side in (*work, *work):
        timed(work[side], run)
    times, peak, begin = {side: [] for side in work}, {}, time.perf_counter()
    for number in tqdm(range(args.repeats), name, leave=False, disable=None):
        if number >= 3 and time.perf_counter() - begin > args.seconds:
            break
        for side in work if number % 2 else reversed(work):
            seconds, peak[side] = timed(work[side], run)
            times[side].append(seconds)
    middle = {side: statistics.median(t) for side, t in times.items()}
    return middle, peak, len(next(iter(times.values())))


def alternate(name, run, work, args):
    """`in_turn` of `work` {ours, plain} without the count; prints the table's line."""
    middle, peak, count = in_turn(name, run, work, args)
    print(
        f"{name}: ours {1000 * middle['ours']:.1f} ms, plain {1000 * middle['plain']:.1f} ms, "
        f"ratio {middle['ours'] / middle['plain']:.3f} (median of {count}, alternating)",
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
    """--repeats, --seconds, --scale, --profile."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs at most")
    parser.add_argument("--seconds", type=float, default=60, help="for the pairs of one line")
    parser.add_argument("--scale", choices=["demo", "full"], help="one size alone")
    parser.add_argument("--profile", action="store_true", help="print the top ten kernels")
    return parser.parse_args()


def scales(only=None):
    """demo always, full where there is CUDA; or the one that --scale names."""
    there = ["demo", "full"] if torch.cuda.is_available() else ["demo"]
    if only and only not in there:
        raise SystemExit(f"error: --scale {only}: no CUDA device is available")
    return [only] if only else there
