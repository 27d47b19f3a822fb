"""Quantization and the artifact: identity, budgets, and damage that is always one clear error."""

import hashlib
import itertools
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


@pytest.mark.parametrize("compressor", ["ans", "zstd", "lzma"])
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


SMALL = dict(
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    num_layers=4,
    loop_first=1,
    loop_last=1,
    loop_passes=2,
    lanes_from=3,
    rope_dims=4,
    vocab_size=260,
    bigram_vocab_size=8,
    bigram_dim=8,
    ve_dim=8,
    ve_layers=(1,),
    xsa_last_n=1,
)
ROWS = {
    "zeros": lambda row, scale: torch.zeros_like(row),
    "constant": lambda row, scale: torch.full_like(row, scale),
    "normal": lambda row, scale: scale * row,
    "outlier": lambda row, scale: torch.cat([row[:-1], row.new_tensor([1000 * scale])]),
}


@given(
    st.sampled_from(["ans", "zstd", "lzma"]),
    st.integers(2, 8),
    st.integers(2, 8),
    st.lists(
        st.tuples(st.sampled_from(list(ROWS)), st.sampled_from([1.0, -0.02, 1e-9, 3e4, 1e34])),
        min_size=1,
        max_size=7,
    ),
    st.integers(0, 99),
)
def test_unpack_gives_back_any_values(compressor, matrix_bits, embed_bits, kinds, seed):
    """Rows of every kind, side by side, in every tensor."""
    cfg = golf.replace(
        golf.Config(),
        compressor=compressor,
        matrix_bits=matrix_bits,
        embed_bits=embed_bits,
        **SMALL,
    )
    model, generator = golf.GPT(cfg, None), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            rows = torch.randn(p.shape, generator=generator).view(-1, p.shape[-1])
            own = zip(rows, itertools.cycle(kinds), strict=False)
            changed = [ROWS[kind](row, scale) for row, (kind, scale) in own]
            p.copy_(torch.stack(changed).view_as(p))
    tensors, blob = packed(model, cfg)
    _, got = golf.unpack(blob, golf.Config(), VOCABULARY)
    assert list(got) == list(tensors)
    for name, stored in tensors.items():
        assert torch.equal(got[name].tensor(), stored.tensor()), name
        assert stored.tensor().shape == dict(model.named_parameters())[name].shape
        assert isinstance(stored, golf.HalfTensor) or np.abs(stored.codes).max() <= golf.code_limit(
            name, cfg
        )


@given(st.data())
@settings(max_examples=60)
def test_ans_codes_of_any_shape(data):
    shape = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20))
    shapes = data.draw(st.lists(shape, min_size=1, max_size=5))
    limits = [data.draw(st.sampled_from([1, 15, 31, 127])) for _ in shapes]
    rng = np.random.RandomState(data.draw(st.integers(0, 1000)))
    sizes = zip(shapes, limits, strict=True)
    codes = [rng.randint(-q, q + 1, shape).astype(np.int8) for shape, q in sizes]
    packed = golf.ans_encode(codes)
    assert len(packed.inside) == golf.ans_inside_bytes(shapes)
    for a, b in zip(golf.ans_decode(packed, shapes), codes, strict=True):
        assert np.array_equal(a, b.ravel())


def random_senses(model, gptq=True, seed=0):
    """Sensitivities of unequal rows and columns, and GPTQ's factors of correlated inputs."""
    generator, senses = torch.Generator().manual_seed(seed), {}
    for name, p in model.named_parameters():
        if name in golf.BANKS + golf.EMBEDDINGS:
            m, r, c = golf.matrices(p).shape
            x = torch.randn(m, 3 * c, c, generator=generator)
            x = x + x.roll(1, 2)
            senses[name] = golf.Sensitivity(
                torch.rand(m, r, generator=generator) ** 4,
                torch.rand(m, c, generator=generator) ** 4,
                golf.gptq_factor(x.mT @ x) if gptq else None,
            )
    return senses


@pytest.mark.parametrize("log_step", [-64.0, -4.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e30, 1e-34])
def test_unpack_gives_back_any_steps(tiny_model, log_step, scale):
    cfg, model = tiny_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    tensors = golf.quantize(dict(model.named_parameters()), cfg, random_senses(model), log_step)
    _, got = golf.unpack(golf.pack(tensors, cfg, VOCABULARY), golf.Config(), VOCABULARY)
    for name, stored in tensors.items():
        assert torch.equal(got[name].tensor(), stored.tensor()), name
        assert torch.isfinite(stored.tensor()).all()


@pytest.mark.parametrize("compressor, bits", [("ans", 6), ("lzma", 6), ("zstd", 5)])
def test_rounding_is_within_half_a_step(tiny_model, compressor, bits):
    """And the steps are what their logarithms say: powers of 2 of row plus column, in quarters."""
    cfg, model = tiny_model(compressor=compressor, matrix_bits=bits)
    senses = random_senses(model, gptq=False)
    for log_step in (golf.FINEST_LOG_STEP, -6.0):
        tensors = golf.quantize(dict(model.named_parameters()), cfg, senses, log_step)
        for name, p in model.named_parameters():
            stored = tensors[name]
            if isinstance(stored, golf.HalfTensor):
                continue
            cube = golf.matrices(p.detach())
            row, col = np.split(stored.step_logs.astype(float), [cube.size(1)], 1)
            steps = torch.from_numpy(2 ** ((row[:, :, None] + col[:, None, :]) / 4))
            error = stored.tensor().view_as(cube) - cube
            assert (error.abs() <= 0.5001 * steps).all(), name
            wide = compressor == "ans" or name in golf.EMBEDDINGS
            assert golf.code_limit(name, cfg) == (127 if wide else 2 ** (bits - 1) - 1)
            assert np.abs(stored.codes).max() <= golf.code_limit(name, cfg)


def test_steps_follow_the_fourth_root_of_what_errors_cost():
    """A row whose gradients are 16 times larger gets steps of a quarter, as does a column."""
    w = 1e-3 * torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1, 4)
    plain = golf.step_logs(w, 127, golf.Sensitivity(one, one, None), -6.0)
    large = one.clone()
    large[0, 1] = 16.0**2
    by_row = golf.step_logs(w, 127, golf.Sensitivity(large, one, None), -6.0)
    by_col = golf.step_logs(w, 127, golf.Sensitivity(one, large, None), -6.0)
    assert (by_row - plain).tolist() == [[0, -8, 0, 0, 0, 0, 0, 0]]  # 2^(-8/4) = 1/4
    steps = golf.cell_steps(by_col, 4) / golf.cell_steps(plain, 4)
    assert torch.allclose(steps[0, :, 1] / steps[0, :, 0], torch.full((4,), 0.25))


def test_gptq_lowers_the_error_of_outputs():
    generator = torch.Generator().manual_seed(3)
    n = 150  # columns: errors travel inside blocks of 64, and beyond
    x = torch.randn(2, 500, n, generator=generator) @ torch.randn(n, n, generator=generator)
    w, step = torch.randn(2, 16, n, generator=generator), torch.full((2, 16, n), 0.3)

    def error(factor):
        codes = golf.round_codes(w, step, 127, factor)
        assert torch.equal(codes, codes.round()) and codes.abs().max() <= 127
        return ((w - codes * step) @ x.mT).square().sum()

    gptq = error(golf.gptq_factor(x.mT @ x)) / error(None)
    assert gptq < 0.5, gptq


@pytest.mark.slow
def test_calibration_measures_gradients_and_inputs(data, tiny_model):
    """Against gradients of a batch of sequences at a time and inputs that a hook sees."""
    _, run, corpus = data
    cfg, model = tiny_model()
    senses = golf.calibrate(model, corpus, cfg, run)
    params = {n: p for n, p in model.named_parameters() if n in golf.BANKS + golf.EMBEDDINGS}
    assert senses.keys() == params.keys() and model.grams is None
    assert all(p.grad is None for p in model.parameters())
    assert run.record["calibration"][-1]["sequences"] == golf.CALIBRATION_SEQUENCES
    loader = golf.TrainLoader(corpus.train, cfg, run)
    batches = [
        [batch for step in part for batch in step.split(golf.CALIBRATION_BATCH)]
        for part in zip(*(loader.next_batch() for _ in range(3)), strict=True)
    ]
    batches = [part[: golf.CALIBRATION_SEQUENCES // golf.CALIBRATION_BATCH] for part in batches]
    want, gram = {n: torch.zeros_like(p) for n, p in params.items()}, 0.0
    for x, y in zip(*batches, strict=True):
        model(x, y)[0].backward()
        states = model.trunk(model.weights(), x, x.size(1)).detach().flatten(0, 1)
        gram = gram + states.mT @ states  # the head's inputs
        for name, p in params.items():
            want[name] += p.grad.square()
        for p in model.parameters():
            p.grad = None
    for name, own in want.items():
        cube = golf.matrices(own)
        for got, d in ((senses[name].row, 2), (senses[name].col, 1)):
            ratio = got / (2.0**40 * cube.mean(d)).clamp(min=1e-30)
            assert torch.allclose(ratio[cube.mean(d) > 0], torch.ones(()), rtol=1e-3), name
    factor = senses["tok_emb"].factor
    assert torch.allclose(factor, golf.gptq_factor(gram[None]), rtol=1e-2, atol=1e-4)
    factor = senses["mlp_up_bank"].factor
    assert torch.equal(factor, factor.triu()) and (factor.diagonal(dim1=1, dim2=2) > 0).all()
    assert senses["value_emb"].factor is None  # looked up, not multiplied


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


def test_the_header_names_what_is_not_plain(tiny_model):
    """A network without the later settings has the bytes that it had before there were any."""
    for options in ({}, dict(loop_passes=3, loop_first=2, attn_gate=True, lanes_from=9)):
        cfg, model = tiny_model(**options)
        _, blob = packed(model, cfg)
        named = json.loads(golf.open_artifact(blob)[0])["architecture"]
        assert {k: v for k, v in named.items() if k in golf.PLAIN} == options
        other = golf.replace(cfg, **golf.PLAIN) if options else golf.replace(cfg, loop_passes=2)
        read, tensors = golf.unpack(blob, other, VOCABULARY)
        assert {k: getattr(read, k) for k in golf.PLAIN} == golf.PLAIN | options
        assert tensors.keys() == dict(model.named_parameters()).keys()


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("compressor", ["ans", "zstd", "lzma"])
def test_the_budget_is_filled(data, tiny_model, known, compressor):
    """Under the budget by little: as near as the few codes of a tiny model allow."""
    _, run, corpus = data
    cfg, model = tiny_model(matrix_bits=8, compressor=compressor)
    senses = random_senses(model) if known else {}
    free = len(golf.export(model, senses, corpus, cfg, run))
    for share in (0.9, 0.7):
        budget = int(share * free)
        other = golf.replace(cfg, artifact_bytes=golf.code_bytes() + budget)
        blob = golf.export(model, senses, corpus, other, run)
        assert 0.985 * budget <= len(blob) <= budget
        assert run.record["artifact"][-1]["artifact_bytes"] == len(blob)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_bits_of_ans_are_an_average(data, tiny_model, bits):
    _, run, corpus = data
    cfg, model = tiny_model()
    wide = golf.replace(cfg, matrix_bits=bits, embed_bits=bits)
    blob = golf.export(model, random_senses(model), corpus, wide, run)
    cells = sum(p.numel() for n, p in model.named_parameters() if golf.code_limit(n, cfg))
    assert 0.98 * bits * cells <= 8 * len(blob) <= bits * cells


def test_many_zeros_do_not_mislead_the_search(data, tiny_model):
    """Embeddings that no text has touched are zero, and cost next to nothing."""
    _, run, corpus = data
    cfg, model = tiny_model()
    with torch.no_grad():
        for name in ("bigram_emb", "value_emb", "tok_emb", "mlp_up_bank"):
            golf.matrices(getattr(model, name))[:, 3:] = 0
    budget = len(golf.export(model, {}, corpus, golf.replace(cfg, matrix_bits=8), run)) * 3 // 4
    other = golf.replace(cfg, matrix_bits=8, artifact_bytes=golf.code_bytes() + budget)
    assert 0.97 * budget <= len(golf.export(model, {}, corpus, other, run)) <= budget


def test_a_model_that_cannot_fit_is_the_smallest_there_is(data, tiny_model):
    """...and the budget line says by how much it is over."""
    _, run, corpus = data
    cfg, model = tiny_model()
    blob = golf.export(model, {}, corpus, golf.replace(cfg, artifact_bytes=1), run)
    _, tensors = golf.unpack(blob, cfg, corpus.corpus["vocabulary_sha256"])
    assert all(not t.codes.any() for t in tensors.values() if isinstance(t, golf.CodedTensor))


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
        bad = blob[: data.draw(st.integers(0, len(blob) - 1))]
    elif kind == "flip":
        at = data.draw(st.integers(0, len(blob) - 1))
        bad = blob[:at] + bytes([blob[at] ^ (1 << data.draw(st.integers(0, 7)))]) + blob[at + 1 :]
    elif kind == "extend":
        bad = blob + data.draw(st.binary(min_size=1, max_size=40))
    else:
        bad = data.draw(st.binary(max_size=300))
        bad = blob[: golf.PREFIX.size] + bad if kind.startswith("prefix") else bad
    with pytest.raises(golf.RunError, match="^artifact: "):
        golf.unpack(bad, golf.Config(), VOCABULARY)


def opened(blob):
    """(header, section, words) of an artifact."""
    size = golf.PREFIX.unpack_from(blob)[2]
    header = json.loads(blob[golf.PREFIX.size : golf.PREFIX.size + size])
    payload = blob[golf.PREFIX.size + size :]
    return header, payload[: header["section_bytes"]], payload[header["section_bytes"] :]


def sealed(header, section, words):
    """An artifact of these parts, with the right hash."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    body = text + section + words
    digest = hashlib.sha256(body).digest()
    return golf.PREFIX.pack(golf.MAGIC, golf.VERSION, len(text), digest) + body


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150)
def test_a_forged_payload_is_numbers_or_one_clear_error(blob, data):
    """Its hash is right, so that every check behind it is reached."""
    header, section, words = opened(blob)
    compressor = golf.COMPRESSORS[header["compressor"]]

    def spoil(part):
        at = data.draw(st.integers(0, len(part)))
        to = data.draw(st.sampled_from([at, at + 1, at + 4, len(part)]))
        return part[:at] + data.draw(st.binary(max_size=8)) + part[to:]

    kind = data.draw(st.sampled_from(["section", "words", "inside", "zero word", "no words"]))
    if kind == "section":
        section = spoil(section)
    elif kind == "inside":
        plain = compressor.decompress(section, 1 << 30)
        section = compressor.compress(spoil(plain))
    elif kind == "words":
        words = spoil(words)
    else:
        words = words + bytes(4) if kind == "zero word" else b""
    header["section_bytes"] = len(section)
    try:
        _, tensors = golf.unpack(sealed(header, section, words), golf.Config(), VOCABULARY)
    except golf.RunError as error:
        assert str(error).startswith("artifact: ")
    else:
        assert all(torch.isfinite(t.tensor()).all() for t in tensors.values())


@pytest.mark.parametrize(
    "change",
    [
        dict(model_dim=1 << 40),
        dict(num_layers="__import__('os')"),
        dict(num_heads=3),
        dict(num_heads=0),
        dict(num_layers=None),
        dict(ve_layers=[1, 1]),
        dict(ve_layers=[7]),
        dict(mlp_mult=math.nan),
        dict(mlp_mult=math.inf),
        dict(vocab_size=-1),
        dict(matrix_bits=1),
        dict(ln_scale=3),
        dict(rope_dims=[]),
    ],
    ids=str,
)
def test_another_architecture_is_refused(blob, change):
    header, *payload = opened(blob)
    header["architecture"].update(change)
    with pytest.raises(golf.RunError, match="^artifact: "):
        golf.unpack(sealed(header, *payload), golf.Config(), VOCABULARY)


@pytest.mark.parametrize(
    "change",
    [
        dict(section_bytes=-1),
        dict(section_bytes=1 << 60),
        dict(section_bytes=10),
        dict(section_bytes="10"),
        dict(section_bytes=10.5),
        dict(section_bytes=math.inf),
        dict(section_bytes=None),
        dict(vocabulary=None),
        dict(vocabulary=""),
        dict(tensors=[]),
        dict(tensors=[["evil", [1], 0]]),
        dict(tensors=[["kv_bank", [1 << 40], 31]]),
        dict(tensors="x"),
        dict(compressor="pickle"),
        dict(compressor=["ans"]),
        dict(architecture=7),
        dict(architecture={}),
        dict(architecture=[]),
    ],
    ids=str,
)
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
        (version + blob[golf.PREFIX.size :], VOCABULARY, "format version 9"),
        (blob, "0" * 64, "another vocabulary"),
        (b"PK\3\4" * 30, VOCABULARY, "not one of"),
    ]:
        with pytest.raises(golf.RunError, match=words):
            golf.unpack(bad, golf.Config(), vocabulary)


@pytest.mark.parametrize("compressor", ["ans", "zstd", "lzma"])
def test_a_setting_that_a_header_does_not_name_is_plain(tiny_model, compressor):
    """Whatever the environment says: a setting that is added later changes nothing in artifacts
    from before. One that had to be named, or that is unknown, is refused."""
    own, model = tiny_model(compressor=compressor)
    header, *payload = opened(packed(model, own)[1])
    assert "attn_gate" not in header["architecture"]
    asked = golf.replace(golf.Config(), attn_gate=True, content_smear=True)
    cfg, tensors = golf.unpack(sealed(header, *payload), asked, VOCABULARY)
    assert not cfg.attn_gate and not cfg.content_smear and "attn_gate" not in tensors
    more, fewer = (json.loads(json.dumps(header)) for _ in range(2))
    more["architecture"]["of_the_future"] = 1
    del fewer["architecture"]["value_residual"]
    for other in (more, fewer):
        with pytest.raises(golf.RunError, match="header"):
            golf.unpack(sealed(other, *payload), asked, VOCABULARY)


def test_another_networks_tensor_is_named(blob):
    """As of an artifact from before a parameter was added, or of a changed shape."""
    for change, words in [
        (lambda tensors: tensors.pop(0), "absent in it"),
        (lambda tensors: tensors.append(["zz", [3], 0]), r"zz is \[3\] in it and absent here"),
        (lambda tensors: tensors[1].__setitem__(1, [9, 9]), r"is \[9, 9\] in it and \["),
    ]:
        header, *payload = opened(blob)
        name = header["tensors"][0][0]
        change(header["tensors"])
        with pytest.raises(golf.RunError, match=words) as caught:
            golf.unpack(sealed(header, *payload), golf.Config(), VOCABULARY)
        assert "none of this program's networks: tensor" in str(caught.value)
        assert words != "absent in it" or name in str(caught.value)


def test_bytes_after_the_codes_are_refused(blob):
    header, section, words = opened(blob)
    with pytest.raises(golf.RunError, match="^artifact: "):
        golf.unpack(sealed(header, section, words + b"more"), golf.Config(), VOCABULARY)


def test_a_header_of_a_monster_is_refused_before_memory_is_taken(data):
    """Consistent in itself, 155 billion parameters in a file of a few kB."""
    cfg = golf.replace(data[0], model_dim=65536, num_heads=64, num_layers=11, rope_dims=64)
    header = {
        "architecture": {name: getattr(cfg, name) for name in golf.ARCHITECTURE},
        "vocabulary": "x",
        "compressor": cfg.compressor,
        "tensors": golf.tensor_table(cfg),
        "section_bytes": 0,
    }
    cells = sum(math.prod(entry.shape) for entry in header["tensors"])
    assert cells > golf.MOST_PARAMETERS
    with pytest.raises(golf.RunError, match="its header describes none"):
        golf.read_header(json.dumps(header).encode(), 0, data[0])
    small = golf.replace(cfg, model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=4)
    text = golf.header_text(small, "x", 0)
    assert golf.read_header(text, 0, data[0])[0].model_dim == 64


@given(st.floats(-12, 12), st.integers(100, 10**6), st.floats(0, 1), st.floats(0.05, 3))
def test_whatever_the_coarsest_steps_meet_is_met(guess, nonzero, part, slope):
    """Sizes that fall slower or faster than Newton's method takes them to, down to a floor."""
    floor, top, trials = 5000, 5000 + nonzero, []

    def attempt(log_step):
        trials.append(log_step)
        return bytes(floor + int((top - floor) / (1 + 2 ** (slope * (log_step + 3)))))

    smallest, largest = len(attempt(golf.COARSEST_LOG_STEP)), len(attempt(golf.FINEST_LOG_STEP))
    budget = smallest + int(part * (largest - smallest))
    trials.clear()
    blob, found = golf.search_steps(attempt, guess, budget, nonzero)
    assert len(blob) <= budget and len(trials) <= 1 + golf.EXPORT_TRIALS
    assert blob == attempt(found)
    if smallest:
        less, _ = golf.search_steps(attempt, guess, smallest - 1, nonzero)
        assert len(less) == smallest  # what cannot fit comes out as small as it gets


@pytest.mark.slow
def test_a_calibration_out_of_time_leaves_gptq_out(data, tiny_model, monkeypatch):
    """The time kept for it is never exceeded by more than the longest factor so far."""
    _, run, corpus = data
    cfg, model = tiny_model()
    capped = golf.replace(cfg, max_wallclock_seconds=1.0)
    factor = golf.gptq_factor

    def slow(gram):
        golf.time.sleep(0.1)
        return factor(gram)

    monkeypatch.setattr(golf, "gptq_factor", slow)
    senses = golf.calibrate(model, corpus, capped, run)
    made = [name for name, sense in senses.items() if sense.factor is not None]
    assert len(made) < 4 and run.record["calibration"][-1]["factors"] == f"{len(made)}/7"
    senses = golf.calibrate(model, corpus, cfg, run)  # no cap, no limit
    assert run.record["calibration"][-1]["factors"] == "7/7"
    assert len(golf.export(model, senses, corpus, cfg, run)) > 0
