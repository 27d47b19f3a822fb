"""The network: causality, the last k positions, options, attention back ends, averaging."""

import math
import sys
import types

import pytest
import torch

import train_gpt as golf
from common import PlainGPT, plain_attention
from conftest import TINY

RECIPES = {
    name: {k: v for k, v in values.items() if k in golf.ARCHITECTURE or "mtp" in k}
    for name, values in golf.RECIPES.items()
}
for options in RECIPES.values():  # recipes' head counts and RoPE dims are the full size's
    options.pop("num_kv_heads", None)
    options.pop("rope_dims", None)
RECIPES["small"] = dict(
    num_kv_heads=4, rope_dims=8, bigram_vocab_size=0, num_layers=4, ve_layers=(3,), xsa_last_n=2
)
# What the frontier's networks have beyond the submissions', alone and together.
INGREDIENTS = {
    "wide": dict(mlp_mult=4.0),
    "loop": dict(loop_passes=3),
    "lanes": dict(lanes_from=8),
    "attention gate": dict(attn_gate=True),
    "content smear": dict(content_smear=True),
}
RECIPES |= INGREDIENTS
RECIPES["all"] = {k: v for options in INGREDIENTS.values() for k, v in options.items()}
RECIPES["all, values of the first"] = RECIPES["all"] | dict(value_residual=True, loop_first=1)


def batch(cfg, rows=3, length=24):
    """Random tokens (rows, length)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, cfg.vocab_size, (rows, length), generator=generator)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_last_k_positions_equal_the_full_forward(tiny_model, recipe):
    cfg, model = tiny_model(**RECIPES[recipe])
    tokens = batch(cfg)
    with torch.no_grad():
        full = model.logits(tokens)
        for k in range(1, 25):
            assert torch.allclose(model.logits(tokens, k), full[:, -k:], atol=2e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_position_sees_a_later_token(tiny_model, recipe):
    cfg, model = tiny_model(**RECIPES[recipe])
    tokens, changed = batch(cfg), batch(cfg)
    changed[:, 10:] = (changed[:, 10:] + 1) % cfg.vocab_size
    with torch.no_grad():
        a, b = model.logits(tokens), model.logits(changed)
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.allclose(a[:, 10:], b[:, 10:])


@pytest.mark.parametrize("options", ["golf", *INGREDIENTS, "all"])
def test_the_network_is_what_a_plain_one_computes(tiny_model, options):
    """Logits and gradients of the same network written block by block, operation by operation."""
    cfg, model = tiny_model(**RECIPES[options])
    plain = PlainGPT(model, plain_attention)
    tokens = batch(cfg)
    tokens[:, 5] = golf.BOS  # where the content's smear stops
    assert torch.allclose(model.logits(tokens), plain.logits(tokens), atol=1e-4)
    model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    plain(tokens[:, :-1], tokens[:, 1:]).backward()
    gradients = plain.like_golf(lambda p: p.grad)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-5, rtol=1e-3), name


def test_a_loop_that_is_off_is_the_network_without_one(tiny_model):
    """loop_from: until then blocks are visited once, with the skips of the first visits."""
    cfg, looped = tiny_model(loop_passes=3)
    _, once = tiny_model()
    weights = looped.state_dict()
    weights["skip_weights"] = weights.pop("skips_by_source")[:5].flip(0)
    once.load_state_dict(weights)
    tokens = batch(cfg)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    assert torch.equal(looped(inputs, targets, False)[0], once(inputs, targets)[0])
    assert not torch.equal(looped(inputs, targets)[0], once(inputs, targets)[0])
    walk = [visit.layer for visit in golf.block_visits(cfg, looping=True)]
    assert walk == [0, 1, 2, *3 * [3, 4, 5], 6, 7, 8, 9, 10]
    with torch.no_grad():
        assert torch.equal(looped.logits(tokens), looped.logits(tokens, 24))


def connections(cfg, looping: bool) -> dict[int, tuple[int, int]]:
    """{row: (layer whose output is kept, layer where it comes in)} of the trunk's skips."""
    found, waiting = {}, []
    for visit in golf.block_visits(cfg, looping):
        if visit.skip is not None:
            found[visit.skip] = waiting.pop(), visit.layer
        if visit.waits:
            waiting.append(visit.layer)
    return found


def test_skips_keep_their_rows_when_the_loop_comes_on():
    cfg = golf.replace(golf.Config(), num_layers=11, loop_first=3, loop_last=5, loop_passes=3)
    off, on = (connections(cfg, looping) for looping in (False, True))
    assert off == {0: (0, 9), 1: (1, 8), 2: (2, 7), 3: (3, 6), 4: (4, 5)}
    assert on == off | {5: (5, 4), 6: (3, 3), 7: (4, 5)}
    plain = connections(golf.replace(cfg, loop_passes=1), True)
    assert plain == {4 - row: pair for row, pair in off.items()}  # as the submissions number them


def test_new_skips_are_fresh_when_the_loop_comes_on(data):
    """Decay, which needs no gradient, leaves them alone until then; so does the average."""
    cfg, run, corpus = data
    own = golf.replace(cfg, loop_passes=3, loop_first=1, loop_last=2, loop_from=0.5, adam_wd=5.0)
    own = golf.replace(own, iterations=8, max_wallclock_seconds=0.0, warmup_steps=0)
    trainer = golf.Trainer(golf.build_model(own, run), corpus, own, run)
    trainer.average = golf.WeightAverage(trainer.model, own)
    trainer.optimizer = golf.Optimizer(trainer.model, own, run)
    used = len(golf.block_visits(own, looping=False)) // 2
    skips = trainer.model.skips_by_source
    assert used < len(skips)
    for _ in range(4):
        trainer.take_step()
        assert (skips[used:] == 1).all() and not (skips[:used] == 1).any()
    trainer.take_step()  # the loop is on
    assert not (skips[used:] == 1).any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_gets_a_gradient(tiny_model, recipe):
    """No feature is dead: from the real initialization, after one step, each tensor moves."""
    cfg, _ = tiny_model(**RECIPES[recipe])
    model = golf.GPT(cfg, golf.sdpa_attention).initialize(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # zero output projections hide the layers before them for a step
        tokens = batch(cfg, 8)
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
        optimizer.step()
    idle = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert not idle


def test_mtp_heads_train_and_stay_out_of_the_artifact(tiny_model):
    cfg, model = tiny_model(mtp_num_heads=2)
    tokens = batch(cfg)
    loss, nats = model(tokens[:, :-1], tokens[:, 1:])
    assert float(loss.detach()) > float(nats)
    assert "mtp_heads" not in golf.quantize(dict(model.named_parameters()), cfg)
    heads = id(model.mtp_heads)
    assert any(heads == id(p) for g in golf.parameter_groups(model, cfg)[1] for p in g["params"])


@pytest.mark.parametrize(
    "option, value",
    [
        ("value_residual", True),
        ("xsa_last_n", 0),
        ("ve_enabled", False),
        ("ln_scale", False),
        ("relu_slope", 0.9),
        ("rope_dims", 8),
        ("bigram_vocab_size", 0),
        ("logit_softcap", 5.0),
        ("num_kv_heads", 1),
        ("mlp_mult", 2.0),
        *(change for options in INGREDIENTS.values() for change in options.items()),
    ],
)
def test_every_option_changes_the_network(tiny_model, option, value):
    cfg, model = tiny_model()
    _, other = tiny_model(**{option: value})
    state, own = model.state_dict(), other.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    other.load_state_dict(fitting, strict=False)
    tokens = batch(cfg)
    with torch.no_grad():
        assert not torch.allclose(model.logits(tokens), other.logits(tokens), atol=1e-4)


@pytest.mark.parametrize("recipe", golf.RECIPES)
def test_projections_start_as_the_submissions_do(recipe):
    """Orthogonal, times the gain: as published 1/sqrt(22) in three, 1 in #1094 and ours."""
    cfg, _ = golf.load_config(TINY | dict(RECIPE=recipe))
    gain = 1.0 if recipe in ("golf", "pr1094") else 22**-0.5
    model = golf.GPT(cfg, golf.sdpa_attention).initialize(1)
    for name in golf.PROJECTIONS:
        if (projection := getattr(model, name, None)) is not None:
            gram = projection[0].mT @ projection[0]
            assert torch.allclose(gram, gain**2 * torch.eye(len(gram)), atol=1e-5), name


def test_xsa_leaves_nothing_along_the_own_value():
    y, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    out = golf.exclude_own_value(y, v).view(2, 5, 2, 2, 8)
    assert torch.allclose((out * v[:, :, :, None]).sum(-1), torch.zeros(2, 5, 2, 2), atol=1e-5)


def test_attention_matches_a_plain_softmax_in_float64():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    got = golf.sdpa_attention(q, k, v)
    k, v = (x.repeat_interleave(2, dim=2).double() for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) / math.sqrt(8)
    mask = torch.arange(9) > torch.arange(6, 9)[:, None]
    want = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(mask, -torch.inf).softmax(-1), v)
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_long_windows_rescale_the_rope_base():
    short = golf.rope_tables(1024, 10000.0, 8, "cpu")[1][1, 0]
    long = golf.rope_tables(2048, 10000.0, 8, "cpu")[1][1, 0]
    want = [math.sin((10000 * 2 ** (8 / 6)) ** (-i / 8)) for i in (0, 2, 4, 6)]
    assert torch.allclose(long, torch.tensor(want)) and not torch.allclose(short, long)


@pytest.mark.parametrize("kind", ["ema", "swa", "none"])
def test_averages_against_their_formulas(tiny_model, kind):
    cfg, model = tiny_model(averaging=kind, schedule_steps=1000, ema_decay=0.99)
    names = [n for n, _ in model.named_parameters()]
    average, samples, generator = golf.WeightAverage(model, cfg), [], torch.Generator()
    for step in range(10):  # each step is a tenth of the run: 100 schedule steps
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator.manual_seed(step)))
        lr_scale = 1.0 if step < 4 else 0.3
        average.update(step / 10, (step + 1) / 10, lr_scale)
        due = lr_scale < 0.5 and ((step + 1) // 2 != step // 2 or not samples)
        if kind == "ema" or (kind == "swa" and due):
            samples.append(model.smear_gate.detach().clone().double())
    assert average.samples == len(samples)
    assert len(samples) == dict(ema=10, swa=4, none=0)[kind]
    weights = [0.99 ** (100 * k) if kind == "ema" else 1.0 for k in range(len(samples))][::-1]
    if samples:
        want = sum(w * x for w, x in zip(weights, samples, strict=True)) / sum(weights)
        got = average.average[names.index("smear_gate")].double()
        assert torch.allclose(got, want, atol=1e-5, rtol=0)


def test_swa_can_be_turned_off(tiny_model):
    cfg, model = tiny_model(averaging="swa", swa_enabled=False)
    average = golf.WeightAverage(model, cfg)
    average.update(0.8, 0.9, 0.1)
    assert average.samples == 0


def test_no_weights_at_all_do_not_fit(data):
    cfg, run, _ = data
    with pytest.raises(golf.RunError, match="do not fit"):
        golf.build_model(cfg, run, {})


def broken(q, k, v, causal):
    raise RuntimeError("no kernel image is available")


def with_statistics(q, k, v, causal):
    return golf.sdpa_attention(q, k, v), k


def aligned_at_the_start(q, k, v, causal):
    """Older packages': the first query is at the first position."""
    return golf.sdpa_attention(q, k[:, : q.size(1)], v[:, : q.size(1)])


def other_heads(q, k, v, causal):
    return golf.sdpa_attention(q, k, v).flatten(2)


@pytest.mark.parametrize("installed", [broken, with_statistics, aligned_at_the_start, other_heads])
def test_no_installed_package_can_end_an_auto_run(data, monkeypatch, capsys, installed):
    """What does not attend as SDPA does is left, with a line that says why."""
    cfg, run, _ = data
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = installed
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(golf.ATTENTION_ORDER, "cpu", ("flash3", "flash2", "sdpa"))
    monkeypatch.setattr(run, "attention", None)
    capsys.readouterr()
    name, function = golf.choose_attention(cfg, run)
    assert name == "sdpa" and function is golf.sdpa_attention
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("attention flash3: not used here (ModuleNotFoundError")
    assert lines[1].startswith("attention flash2: not used here (")
    monkeypatch.setattr(run, "attention", None)
    with pytest.raises(golf.RunError, match="ATTENTION=flash2"):
        golf.choose_attention(golf.replace(cfg, attention="flash2"), run)


def test_sdpa_does_not_pass_for_cudnn(data, monkeypatch, capsys):
    """Where cuDNN's kernel cannot run, here on a CPU, the next is taken and no priority is left."""
    cfg, run, _ = data
    monkeypatch.setitem(golf.ATTENTION_ORDER, "cpu", ("cudnn", "sdpa"))
    monkeypatch.setattr(run, "attention", None)
    monkeypatch.setattr(golf, "prefer_cudnn", lambda: pytest.fail("cuDNN is not there"))
    assert golf.choose_attention(cfg, run)[0] == "sdpa"
    assert "attention cudnn: not used here (RuntimeError" in capsys.readouterr().out


def test_an_installed_package_that_works_is_taken(data, monkeypatch):
    cfg, run, _ = data
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = lambda q, k, v, causal: golf.sdpa_attention(q, k, v)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(golf.ATTENTION_ORDER, "cpu", ("flash3", "flash2", "sdpa"))
    monkeypatch.setattr(run, "attention", None)
    assert golf.choose_attention(cfg, run) == ("flash2", package.flash_attn_func)


def test_compute_sets_the_arithmetic_everywhere(monkeypatch, data):
    """COMPUTE=bfloat16 on a CPU casts as CUDA does; parameters and logits stay float32."""
    cfg, run, corpus = data
    half = golf.replace(cfg, compute="bfloat16")
    model, exact = golf.build_model(half, run), golf.build_model(cfg, run)
    assert {w.dtype for w in model.weights().values()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {bank.dtype for bank in golf.Optimizer(model, half, run).banks} == {torch.bfloat16}
    tokens = corpus.val[None, :64]
    a, b = model.logits(tokens), exact.logits(tokens)
    assert a.dtype == torch.float32 and not torch.equal(a, b) and torch.allclose(a, b, atol=0.05)
    for name, dtype in (("auto", torch.float32), ("float32", torch.float32)):
        own = golf.compute_dtype(golf.replace(cfg, compute=name), torch.device("cpu"))
        assert own == dtype
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert golf.compute_dtype(cfg, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert golf.compute_dtype(cfg, torch.device("cuda")) == torch.float32
