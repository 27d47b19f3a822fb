"""Muon and AdamW against plain references; parameters owned once."""

import pytest
import torch

import train_gpt as golf
from conftest import ALL_LAYERS

LOSSES = [6.2383, 5.6305, 4.5983, 4.2062, 4.1163, 4.0406, 4.0036, 3.8999, 3.8600, 3.8279]


def plain_newton_schulz(x, steps=5):
    """One matrix (rows, columns), as Jordan's article has it, in float64."""
    x = x.double() / x.double().norm()
    if len(x) > len(x[0]):
        return plain_newton_schulz(x.T, steps).T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("shape", [(3, 24, 32), (2, 16, 48), (2, 48, 16), (1, 32, 8)])
def test_newton_schulz_is_nearly_orthogonal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(golf.newton_schulz(x, 5))
    assert singular.min() > 0.5 and singular.max() < 1.3
    for matrix, got in zip(x, golf.newton_schulz(x, 5), strict=True):
        assert torch.allclose(got.double(), plain_newton_schulz(matrix), atol=1e-4)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        golf.newton_schulz(x, 5).flatten(), (u @ vh).flatten(), dim=0
    )
    assert cosine > 0.95


@pytest.mark.parametrize("recipe", golf.RECIPES)
def test_every_parameter_is_in_exactly_one_group(recipe):
    cfg, _ = golf.load_config(dict(RECIPE=recipe, SCALE="demo"))
    model = golf.GPT(cfg, golf.sdpa_attention)
    banks, groups = golf.parameter_groups(model, cfg)
    owned = [id(p) for p in banks] + [id(p) for g in groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 3 for p in banks)
    lrs = {id(p): g["base_lr"] for g in groups for p in g["params"]}
    assert lrs[id(model.tok_emb)] == cfg.tied_embed_lr
    assert lrs[id(model.smear_gate)] == cfg.scalar_lr
    if cfg.mtp_num_heads:
        assert lrs[id(model.mtp_heads)] == cfg.head_lr


@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_step_equals_plain_muon_and_adamw(tiny_model, run, clip, row_norm):
    decays = dict(muon_wd=0.06, adam_wd=0.03, embed_wd=0.09)
    cfg, model = tiny_model(grad_clip_norm=clip, mtp_num_heads=1, muon_row_norm=row_norm, **decays)
    _, plain = tiny_model(mtp_num_heads=1)
    optimizer = golf.Optimizer(model, cfg, run)
    momenta = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    lrs = dict(
        tok_emb=cfg.tied_embed_lr,
        bigram_emb=cfg.tied_embed_lr,
        value_emb=cfg.tied_embed_lr,
        mtp_heads=cfg.head_lr,
    )
    adams = {
        n: torch.optim.AdamW(
            [p],
            lr=lrs.get(n, cfg.scalar_lr),
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.09 if n in lrs else 0.03,
        )
        for n, p in plain.named_parameters()
        if n not in golf.BANKS
    }
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in plain.named_parameters()}
        for n, p in model.named_parameters():
            p.grad = grads[n].clone()
        optimizer.step(0.7, 0.9)
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        for n, p in plain.named_parameters():
            grad = grads[n] * (min(1, clip / norm) if clip else 1)
            if n in adams:
                p.grad = grad
                adams[n].param_groups[0]["lr"] = 0.7 * lrs.get(n, cfg.scalar_lr)
                adams[n].step()
                continue
            momenta[n] = 0.9 * momenta[n] + grad
            for i in range(len(p)):
                direction = (grad + 0.9 * momenta[n])[i].double()
                if row_norm:
                    direction = direction / direction.norm(dim=1, keepdim=True)
                direction = plain_newton_schulz(direction).float()
                scale = max(1, p.shape[1] / p.shape[2]) ** 0.5
                with torch.no_grad():
                    p[i] *= 1 - 0.7 * cfg.matrix_lr * 0.06
                    p[i] -= 0.7 * cfg.matrix_lr * scale * direction
    pairs = zip(model.named_parameters(), plain.named_parameters(), strict=True)
    for (n, a), (_, b) in pairs:
        assert torch.allclose(a, b, atol=2e-5), n
        assert a.grad is None


def test_blocks_loop_from_a_part_of_the_training_on(data, monkeypatch):
    """Steps before loop_from visit blocks once; warm-up sees both graphs, the loop's first."""
    cfg, run, corpus = data
    cfg = golf.replace(cfg, iterations=10, warmup_steps=1, loop_passes=2, loop_from=0.35)
    seen, forward = [], golf.GPT.forward

    def recorded(self, tokens, targets, looping=True):
        seen.append(looping)
        return forward(self, tokens, targets, looping)

    monkeypatch.setattr(golf.GPT, "forward", recorded)
    golf.Trainer(golf.build_model(cfg, run), corpus, cfg, run).train()
    assert seen == [True, False] + 4 * [False] + 6 * [True]


def test_micro_batches_divide_a_ranks_share():
    cfg = golf.Config()
    assert all(golf.fit_micro_batch(cfg, world) == 98304 for world in (1, 8))
    assert golf.fit_micro_batch(golf.replace(cfg, micro_batch_tokens=2048 * 16), 8) == 2048 * 16
    with pytest.raises(golf.RunError, match="sequences of 2048 do not divide among 5 ranks"):
        golf.fit_micro_batch(cfg, 5)
    # 48 sequences in equal parts of at most 7
    assert golf.fit_micro_batch(golf.replace(cfg, micro_batch_tokens=2048 * 7), 8) == 2048 * 6


def test_ten_steps_of_training_have_these_losses(data, workplace, tmp_path):
    """A change of speed must not change what is learned.

    The tokens are made up, so that the text's version does not matter. The losses were recorded
    with torch 2.13.0 on x86-64; others differ by rounding.
    """
    _, run, corpus = data
    cfg, _ = golf.load_config(workplace[1] | ALL_LAYERS)
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, 64, (40_000,), generator=generator)
    tokens[1::2] = (3 * tokens[0::2] + 7) % 64  # every second token follows from the one before
    golf.write_shard(tmp_path / "x_train_0.bin", tokens.numpy())
    stream = golf.TokenStream([str(tmp_path / "x_train_0.bin")], cfg.vocab_size)
    cfg = golf.replace(
        cfg,
        iterations=10,
        schedule_steps=10,
        warmdown_iters=5,
        warmup_steps=1,
        train_log_every=1,
        val_loss_every=0,
    )
    run.record["train"].clear()
    model = golf.build_model(cfg, run)
    golf.Trainer(model, golf.replace(corpus, train=stream), cfg, run).train()
    losses = [row["train_loss"] for row in run.record["train"]]
    assert losses == pytest.approx(LOSSES, abs=2e-3), losses
