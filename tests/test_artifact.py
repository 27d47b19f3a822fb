"""Quantization and the artifact: identity, budgets, and damage that is always one clear error."""

import hashlib
import json
import math

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


SMALL = dict(model_dim=16, num_heads=2, num_kv_heads=1, num_layers=2, rope_dims=4, vocab_size=260,
             bigram_vocab_size=8, bigram_dim=8, ve_dim=8, ve_layers=(1,), xsa_last_n=1)
ROWS = {
    "zeros": lambda row, scale: torch.zeros_like(row),
    "constant": lambda row, scale: torch.full_like(row, scale),
    "normal": lambda row, scale: scale * row,
    "outlier": lambda row, scale: torch.cat([row[:-1], row.new_tensor([1000 * scale])])}


@given(st.sampled_from(["ans", "zstd", "lzma"]), st.integers(2, 8), st.integers(2, 8),
       st.lists(st.tuples(st.sampled_from(list(ROWS)), st.sampled_from(
           [1.0, -0.02, 1e-9, 3e4, 1e34])), min_size=1, max_size=7), st.integers(0, 99))
def test_unpack_gives_back_any_values(compressor, matrix_bits, embed_bits, kinds, seed):
    """Rows of every kind, side by side, in every tensor; each within half a step if not clipped."""
    cfg = golf.replace(golf.Config(), compressor=compressor, matrix_bits=matrix_bits,
                       embed_bits=embed_bits, **SMALL)
    model, generator = golf.GPT(cfg, None), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            rows = torch.randn(p.shape, generator=generator).view(-1, p.shape[-1])
            p.copy_(torch.stack([ROWS[kind](row, scale) for row, (kind, scale) in zip(
                rows, kinds * len(rows))]).view_as(p))
    tensors, blob = packed(model, cfg)
    _, got = golf.unpack(blob, golf.Config(), VOCABULARY)
    assert list(got) == list(tensors)
    for name, stored in tensors.items():
        assert torch.equal(got[name].tensor(), stored.tensor()), name
        assert stored.tensor().shape == dict(model.named_parameters())[name].shape
        assert stored.limit == 0 or np.abs(stored.codes).max() <= stored.limit


@given(st.data())
@settings(max_examples=60)
def test_ans_codes_of_any_shape(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20)),
                                min_size=1, max_size=5))
    limits = [data.draw(st.sampled_from([1, 15, 31, 127])) for _ in shapes]
    rng = np.random.RandomState(data.draw(st.integers(0, 1000)))
    codes = [rng.randint(-q, q + 1, s).astype(np.int8) for s, q in zip(shapes, limits)]
    side, words = golf.ans_encode(codes)
    for a, b in zip(golf.ans_decode(side, words, shapes), codes):
        assert np.array_equal(a, b.ravel())


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["kv_bank", "tok_emb", "smear_gate"])
def test_nan_and_infinity_are_refused(tiny_model, name, value):
    cfg, model = tiny_model()
    with torch.no_grad():
        getattr(model, name).view(-1)[3] = value
    with pytest.raises(golf.RunError, match=f"{name} has NaN or inf"):
        golf.quantize(dict(model.named_parameters()), cfg)


def test_equal_weights_give_equal_bytes_whatever_the_run(tiny_model):
    cfg, model = tiny_model()
    _, blob = packed(model, cfg)
    renamed = golf.replace(cfg, run_id="x", seed=5, iterations=3, recipe="pr806", eval_stride=3)
    assert packed(model, renamed)[1] == blob


def test_rate_control_fits_the_budget(data, tiny_model):
    """Under the budget by little: within 0.1 % where a code is a small part of it."""
    cfg, run, corpus = data
    _, model = tiny_model()
    free = len(golf.export(model, corpus, cfg, run))
    for share in (0.9, 0.7):
        budget = golf.code_bytes() + int(share * free)
        blob = golf.export(model, corpus, golf.replace(cfg, artifact_bytes=budget), run)
        assert 0.99 * share * free <= len(blob) <= share * free
        row = run.record["artifact"][-1]
        assert row["artifact_bytes"] == len(blob) and row["clip_floor"] > 0


def test_a_model_that_cannot_fit_is_the_smallest_there_is(data, tiny_model):
    """...and the budget line says by how much it is over."""
    cfg, run, corpus = data
    _, model = tiny_model()
    free = len(golf.export(model, corpus, cfg, run))
    blob = golf.export(model, corpus, golf.replace(cfg, artifact_bytes=1), run)
    assert 1 < len(blob) < free / 3


@pytest.fixture(scope="module", params=["ans", "zstd", "lzma"])
def blob(request):
    """An artifact of a small network, for damaging."""
    cfg = golf.replace(golf.Config(), compressor=request.param, **SMALL)
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


def opened(blob):
    """(header, section, words) of an artifact."""
    size = golf.PREFIX.unpack_from(blob)[2]
    header = json.loads(blob[golf.PREFIX.size:golf.PREFIX.size + size])
    payload = blob[golf.PREFIX.size + size:]
    return header, payload[:header["section_bytes"]], payload[header["section_bytes"]:]


def sealed(header, section, words):
    """An artifact of these parts, with the right hash."""
    text = json.dumps(header).encode()
    body = text + section + words
    digest = hashlib.sha256(body).digest()
    return golf.PREFIX.pack(golf.MAGIC, golf.VERSION, len(text), digest) + body


@given(st.data())
@settings(max_examples=150)
def test_a_forged_payload_is_numbers_or_one_clear_error(blob, data):
    """Its hash is right, so that every check behind it is reached."""
    header, section, words = opened(blob)
    method = "lzma" if words else header["compressor"]

    def spoil(part):
        at = data.draw(st.integers(0, len(part)))
        to = data.draw(st.sampled_from([at, at + 1, at + 4, len(part)]))
        return part[:at] + data.draw(st.binary(max_size=8)) + part[to:]

    kind = data.draw(st.sampled_from(["section", "words", "inside", "zero word", "no words"]))
    if kind == "section":
        section = spoil(section)
    elif kind == "inside":
        plain = golf.lzma.decompress(section) if method == "lzma" else (
            golf.zstandard.ZstdDecompressor().stream_reader(section).read())
        section = golf.compress(spoil(plain), method)
    else:
        words = dict(words=spoil(words)).get(kind, words + bytes(4) if "zero" in kind else b"")
    header["section_bytes"] = len(section)
    try:
        _, tensors = golf.unpack(sealed(header, section, words), golf.Config(), VOCABULARY)
    except golf.RunError as error:
        assert str(error).startswith("artifact: ")
    else:
        assert all(torch.isfinite(t.tensor()).all() for t in tensors.values())


@pytest.mark.parametrize("change", [
    dict(model_dim=1 << 40), dict(num_layers="__import__('os')"), dict(num_heads=3),
    dict(num_heads=0), dict(num_layers=None), dict(ve_layers=[1, 1]), dict(ve_layers=[7]),
    dict(mlp_mult=math.nan), dict(mlp_mult=math.inf), dict(vocab_size=-1),
    dict(matrix_bits=7), dict(ln_scale=3), dict(rope_dims=[])], ids=str)
def test_another_architecture_is_refused(blob, change):
    header, *payload = opened(blob)
    header["architecture"].update(change)
    with pytest.raises(golf.RunError, match="^artifact: "):
        golf.unpack(sealed(header, *payload), golf.Config(), VOCABULARY)


@pytest.mark.parametrize("change", [
    dict(section_bytes=-1), dict(section_bytes=1 << 60), dict(section_bytes=10),
    dict(section_bytes="10"), dict(section_bytes=10.5), dict(section_bytes=math.inf),
    dict(section_bytes=None), dict(vocabulary=None), dict(vocabulary=""), dict(tensors=[]),
    dict(tensors=[["evil", [1], 0]]), dict(tensors=[["kv_bank", [1 << 40], 31]]),
    dict(tensors="x"), dict(compressor="pickle"), dict(compressor=["ans"]), dict(architecture=7),
    dict(architecture={}), dict(architecture=[])], ids=str)
def test_lying_headers_are_refused(blob, change):
    header, *payload = opened(blob)
    with pytest.raises(golf.RunError, match="^artifact: "):
        golf.unpack(sealed(header | change, *payload), golf.Config(), VOCABULARY)


@pytest.mark.parametrize("header", [{}, [], None, 7, "x"])
def test_headers_that_are_no_header_are_refused(blob, header):
    with pytest.raises(golf.RunError, match="^artifact: "):
        golf.unpack(sealed(header, *opened(blob)[1:]), golf.Config(), VOCABULARY)


def test_other_version_vocabulary_and_file(blob):
    version = golf.PREFIX.pack(golf.MAGIC, 9, *golf.PREFIX.unpack_from(blob)[2:])
    for bad, vocabulary, words in [
            (version + blob[golf.PREFIX.size:], VOCABULARY, "format version 9"),
            (blob, "0" * 64, "another vocabulary"), (b"PK\3\4" * 30, VOCABULARY, "not one of")]:
        with pytest.raises(golf.RunError, match=words):
            golf.unpack(bad, golf.Config(), vocabulary)
