"""Quantization and the artifact: identity, budgets, and damage that is always one clear error."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as golf

VOCABULARY = "f" * 64


def packed(model, cfg):
    """(tensors, artifact) of a model."""
    tensors = golf.quantize(dict(model.named_parameters()), cfg)
    return tensors, golf.pack(tensors, cfg, VOCABULARY)


@pytest.mark.parametrize("compressor", ["ans", "zstd", "lzma", "auto"])
@pytest.mark.parametrize("bits", [2, 5, 6, 8])
@pytest.mark.parametrize("values", ["random", "zeros", "constant rows", "huge", "one outlier"])
def test_unpack_gives_back_what_was_packed(tiny_model, compressor, bits, values):
    cfg, model = tiny_model(compressor=compressor, matrix_bits=bits, value_residual=True)
    with torch.no_grad():
        for p in model.parameters():
            if values == "zeros":
                p.zero_()
            elif values == "constant rows":
                p.copy_(torch.arange(p.numel() // p.shape[-1]).view(*p.shape[:-1], 1).expand_as(p))
            elif values == "huge":
                p.mul_(1e30)
            elif values == "one outlier":
                p.view(-1)[0] = 50.0
    tensors, blob = packed(model, cfg)
    other = golf.replace(golf.Config(), eval_stride=7)
    loaded, got = golf.unpack(blob, other, VOCABULARY)
    assert loaded.model_dim == cfg.model_dim and loaded.eval_stride == 7
    assert list(got) == list(tensors)
    for name in tensors:
        assert torch.equal(got[name].tensor(), tensors[name].tensor()), name
    assert golf.pack(got, cfg, VOCABULARY) == blob


@given(st.data())
@settings(max_examples=60)
def test_ans_codes_of_any_shape(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1,
                                max_size=5))
    limits = [data.draw(st.sampled_from([1, 15, 31, 127])) for _ in shapes]
    rng = np.random.RandomState(data.draw(st.integers(0, 1000)))
    codes = [rng.randint(-q, q + 1, s).astype(np.int8) for s, q in zip(shapes, limits)]
    side, words = golf.ans_encode(codes, limits)
    for a, b in zip(golf.ans_decode(side, words, shapes), codes):
        assert np.array_equal(a, b)


@given(st.integers(0, 10**6), st.sampled_from([1, 15, 31, 127]))
def test_row_steps_are_no_worse_than_the_largest_value(seed, limit):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 33, generator=generator) * torch.rand(5, 1, generator=generator).exp2()
    step, whole = golf.row_steps(w, limit), w.abs().amax(1, keepdim=True) / limit
    for s in (step, whole.half().float()):
        codes = golf.round_codes(w, s, limit)
        assert codes.abs().max() <= limit
        error = (codes * s - w).square().sum(1)
        best = error if s is step else best  # noqa: F821
    assert (best <= error + 1e-9).all()


def test_nan_is_refused(tiny_model):
    cfg, model = tiny_model()
    with torch.no_grad():
        model.kv_bank[0, 0, 0] = torch.nan
    with pytest.raises(golf.RunError, match="kv_bank has NaN"):
        golf.quantize(dict(model.named_parameters()), cfg)


def test_equal_weights_give_equal_bytes_whatever_the_run(tiny_model):
    cfg, model = tiny_model()
    _, blob = packed(model, cfg)
    renamed = golf.replace(cfg, run_id="x", seed=5, iterations=3, recipe="pr806", eval_stride=3)
    assert packed(model, renamed)[1] == blob


def test_rate_control_fits_the_budget(data, tiny_model):
    cfg, run, corpus = data
    _, model = tiny_model()
    free = len(golf.export(model, corpus, cfg, run))
    for share in (0.9, 0.7):
        budget = golf.code_bytes() + int(share * free)
        blob = golf.export(model, corpus, golf.replace(cfg, artifact_bytes=budget), run)
        assert 0.97 * share * free <= len(blob) <= share * free
        row = run.record["artifact"][-1]
        assert row["artifact_bytes"] == len(blob) and row["clip_floor"] > 0


@pytest.fixture(scope="module")
def blob():
    """An artifact of a small network, for damaging."""
    cfg = golf.replace(golf.Config(), model_dim=16, num_heads=2, num_kv_heads=1, num_layers=2,
                       rope_dims=4, vocab_size=260, bigram_vocab_size=8, bigram_dim=8, ve_dim=8,
                       ve_layers=(1,), xsa_last_n=1)
    return packed(golf.GPT(cfg, golf.sdpa_attention).initialize(0), cfg)[1]


@given(st.data())
@settings(max_examples=400)
def test_damage_is_one_clear_error(blob, data):
    kind = data.draw(st.sampled_from(["cut", "flip", "extend", "random", "prefix + random"]))
    if kind == "cut":
        bad = blob[:data.draw(st.integers(0, len(blob) - 1))]
    elif kind == "flip":
        at = data.draw(st.integers(0, len(blob) - 1))
        bad = blob[:at] + bytes([blob[at] ^ (1 << data.draw(st.integers(0, 7)))]) + blob[at + 1:]
    elif kind == "extend":
        bad = blob + data.draw(st.binary(min_size=1, max_size=40))
    else:
        bad = data.draw(st.binary(max_size=300))
        bad = blob[:golf.PREFIX.size] + bad if kind.startswith("prefix") else bad
    with pytest.raises(golf.RunError, match="^artifact: "):
        golf.unpack(bad, golf.Config(), VOCABULARY)


def resealed(blob, change):
    """The artifact with its header changed and its hash made right again."""
    size = golf.PREFIX.unpack_from(blob)[2]
    header = json.loads(blob[golf.PREFIX.size:golf.PREFIX.size + size])
    change(header)
    text = json.dumps(header).encode()
    body = text + blob[golf.PREFIX.size + size:]
    digest = golf.hashlib.sha256(body).digest()
    return golf.PREFIX.pack(golf.MAGIC, golf.VERSION, len(text), digest) + body


@pytest.mark.parametrize("change", [
    lambda h: h["architecture"].update(model_dim=1 << 40),
    lambda h: h["architecture"].update(num_layers="__import__('os')"),
    lambda h: h["architecture"].update(num_heads=3),
    lambda h: h["architecture"].pop("num_layers"),
    lambda h: h.update(tensors=h["tensors"][1:]),
    lambda h: h.update(tensors=h["tensors"] + [["evil", [1], 0]]),
    lambda h: h["tensors"][0].__setitem__(1, [1 << 40]),
    lambda h: h.update(section_bytes=-1), lambda h: h.update(section_bytes=1 << 60),
    lambda h: h.update(section_bytes=10), lambda h: h.update(compressor="pickle"),
    lambda h: h.update(compressor="zstd"), lambda h: h.update(architecture=7),
    lambda h: h.clear()])
def test_lying_headers_are_refused(blob, change):
    with pytest.raises(golf.RunError, match="^artifact: "):
        golf.unpack(resealed(blob, change), golf.Config(), VOCABULARY)


def test_other_version_vocabulary_and_file(blob):
    version = golf.PREFIX.pack(golf.MAGIC, 9, *golf.PREFIX.unpack_from(blob)[2:])
    for bad, vocabulary, words in [
            (version + blob[golf.PREFIX.size:], VOCABULARY, "format version 9"),
            (blob, "0" * 64, "another vocabulary"), (b"PK\3\4" * 30, VOCABULARY, "not one of")]:
        with pytest.raises(golf.RunError, match=words):
            golf.unpack(bad, golf.Config(), vocabulary)
