"""Damaged shards, tokenizers and weights: usable, or one clear error.

Damaged artifacts are in test_artifact.py.
"""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as golf


@st.composite
def damaged(draw, blob, tail=400):
    """A file cut, with bits flipped, extended, with a part of it twice, or of random bytes."""
    kind = draw(st.sampled_from(["cut", "flip", "many", "extend", "twice", "random"]))
    last = len(blob) - 1
    ends = st.integers(0, min(tail, last)) | st.integers(max(0, last + 1 - tail), last)
    at = st.integers(0, last) | ends  # ends hold what is not just numbers
    if kind == "cut":
        return blob[: draw(at)]
    if kind == "extend":
        return blob + draw(st.binary(min_size=1, max_size=60))
    if kind == "random":
        return draw(st.binary(max_size=600))
    if kind == "twice":
        i, j = draw(at), draw(at)
        return blob[:i] + blob[j : j + 200] + blob[i:]
    bad = bytearray(blob)
    for _ in range(1 if kind == "flip" else 20):
        bad[draw(at)] ^= 1 << draw(st.integers(0, 7))
    return bytes(bad)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


def test_shards(place):
    golf.write_shard(place, np.random.RandomState(0).randint(0, 512, 700))
    blob = place.read_bytes()

    @given(damaged(blob, 1100))
    @settings(max_examples=700)
    def check(bad):
        place.write_bytes(bad)
        try:
            stream = golf.TokenStream([str(place)], 512)
        except golf.RunError as error:
            assert str(place) in str(error) and "\n" not in str(error)
        else:
            assert len(stream) == (len(bad) - 1024) / 2 and stream.read(0, 9).max() < 512

    check()


def test_tokenizers(place, data):
    """A model that loads has as many pieces as it should, and its byte table can be made."""
    blob = Path(data[2].corpus["tokenizer"]).read_bytes()

    @given(damaged(blob))
    @settings(max_examples=700)
    def check(bad):
        place.write_bytes(bad)
        try:
            tokenizer = golf.load_tokenizer(str(place), 512)
        except golf.RunError as error:
            assert str(place) in str(error) and "\n" not in str(error)
        else:
            assert len(golf.ByteTable(tokenizer).base) == 512
            assert isinstance(tokenizer.decode(tokenizer.encode("any text")), str)

    check()


def test_weights(place, data, tiny_model):
    cfg, model = tiny_model(num_layers=2, ve_layers=(1,), xsa_last_n=2)
    blob = safetensors.torch.save({n: p.detach() for n, p in model.named_parameters()})

    @given(damaged(blob, 1500))
    @settings(max_examples=300)
    def check(bad):
        place.write_bytes(bad)
        try:
            built = golf.build_model(cfg, data[1], golf.read_tensors(place))
        except golf.RunError as error:
            assert "\n" not in str(error)
        else:
            assert [p.shape for p in built.parameters()] == [p.shape for p in model.parameters()]

    check()
