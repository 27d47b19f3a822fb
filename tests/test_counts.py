"""N-gram counts against tables of counters, and prefill against one pass."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import train_gpt as golf

STREAMS = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def columns(tokens, max_order, **options):
    """{order: [(context, pair, distinct, hint, hint_count, distance, streak)]} of count_ngrams."""
    out = {}
    for order, counts in golf.count_ngrams(torch.tensor(tokens), max_order, **options):
        present = [c.tolist() for c in counts if c is not None]
        out[order] = list(zip(*present, strict=True))
    return out


@given(STREAMS)
def test_exact_counts_equal_a_dictionary_of_counters(tokens):
    for order, rows in columns(tokens, 5).items():
        assert rows == reference.count(tokens, order)


@given(STREAMS, st.integers(1, 7), st.integers(1, 20), st.sampled_from([0, 2, 16, 1 << 22]))
def test_visibility_and_buckets(tokens, granularity, first, buckets):
    primes = (36313, 27191, 51647)
    got = columns(tokens, 5, granularity=granularity, first=first, buckets=buckets, primes=primes)
    for order, rows in got.items():
        want = reference.count(tokens, order, buckets, granularity, first, primes)
        assert [r[:2] for r in rows] == [r[:2] for r in want]


@given(STREAMS, st.integers(1, 9), st.integers(1, 3), st.booleans())
def test_blocks_and_digits_of_any_size(tokens, block, digit_bits, documents):
    options = (dict(documents=documents), dict(buckets=16), dict(granularity=3, first=5))
    whole = [columns(tokens, 4, **option) for option in options]
    with mock.patch.multiple(golf, CPU_BLOCK=block, DIGIT_BITS=digit_bits):
        assert [columns(tokens, 4, **option) for option in options] == whole


@given(STREAMS, st.booleans())
def test_without_followers_contexts_and_pairs_are_the_same(tokens, documents):
    whole = columns(tokens, 4, documents=documents)
    for order, rows in columns(tokens, 4, documents=documents, followers=False).items():
        assert rows == [row[:2] for row in whole[order]]


@given(STREAMS, st.integers(0, 60), st.sampled_from([0, 16]))
def test_a_start_only_drops_the_rows_before_it(tokens, start, buckets):
    start = min(start, len(tokens))
    whole = columns(tokens, 4, buckets=buckets)
    for order, rows in columns(tokens, 4, start=start, buckets=buckets).items():
        assert rows == whole[order][start:]


@given(
    st.lists(st.sampled_from([0, 1, 32767, 32768, 65535]), min_size=1, max_size=80),
    st.sampled_from([0, 64]),
)
def test_token_numbers_up_to_16_bits(tokens, buckets):
    for order, rows in columns(tokens, 4, buckets=buckets).items():
        want = reference.count(tokens, order, buckets, primes=golf.Config.ngram_primes)
        width = 2 if buckets else 7
        assert [r[:width] for r in rows] == [r[:width] for r in want]


def test_counts_of_64_orders_and_of_one_repeated_token():
    for tokens in ([3] * 100, list(range(50)) * 3):
        for order, rows in columns(tokens, 64).items():
            assert rows == reference.count(tokens, order)


def test_every_chunk_boundary_of_a_short_stream():
    tokens = [1, 2, 1, 2, 1, 1, 2, 2, 1, 2, 1, 2, 1]
    for first in range(1, 15):
        for granularity in range(1, 15):
            got = columns(tokens, 3, granularity=granularity, first=first)
            for order, rows in got.items():
                want = reference.count(tokens, order, 0, granularity, first)
                assert [r[:2] for r in rows] == [r[:2] for r in want]


@pytest.mark.parametrize("recipe", golf.RECIPES)
@pytest.mark.parametrize("granularity", ["token", "window", "batch"])
def test_real_text_with_each_recipes_tables(data, recipe, granularity):
    tokens = data[2].val[:1500].tolist()
    cfg, _ = golf.load_config(
        dict(
            RECIPE=recipe,
            NGRAM_GRANULARITY=granularity,
            EVAL_SEQ_LEN="64",
            EVAL_STRIDE="4",
            NGRAM_BUCKETS="256",
        )
    )
    rule = golf.backoff_rules(cfg)["backoff_hashed"]
    got = columns(
        tokens,
        cfg.ngram_max_order,
        buckets=256,
        granularity=rule.granularity,
        first=rule.first,
        primes=cfg.ngram_primes,
    )
    for order, rows in got.items():
        want = reference.count(tokens, order, 256, rule.granularity, rule.first, cfg.ngram_primes)
        assert [r[:2] for r in rows] == [r[:2] for r in want]


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("options", [{}, dict(buckets=64, granularity=8, first=32)])
def test_prefill_is_one_pass(data, ranks, options):
    tokens = data[2].val[:2001]
    whole = dict(golf.count_ngrams(tokens, 6, **options))
    cuts = [len(tokens) * r // ranks for r in range(ranks + 1)]
    for start, end in itertools.pairwise(cuts):
        for order, part in golf.count_ngrams(tokens[:end], 6, start=start, **options):
            for a, b in zip(part, whole[order], strict=True):
                assert (a is None and b is None) or torch.equal(a, b[start:end])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_counts_inside_documents(tokens):
    """A document's targets end with the BOS of the next: its counts are those of its own stream,
    of which that BOS is the last token."""
    whole = columns(tokens, 4, documents=True)
    begin = 0
    for i in [*(i for i, t in enumerate(tokens) if t == golf.BOS), len(tokens) - 1]:
        for order in whole:
            assert whole[order][begin : i + 1] == reference.count(tokens[begin : i + 1], order)
        begin = i + 1


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(0, 39), st.integers(0, 9))
def test_a_scan_of_the_history_gives_every_column(tokens, target, begin):
    """The scan that masses and the audit trust, against tables of counters."""
    target = min(target, len(tokens) - 2)
    begin = min(begin, target)
    cfg, _ = golf.load_config(dict(VOCAB_SIZE="260"))
    for order, counts in golf.scan_ngrams(
        torch.tensor(tokens), target, golf.BackoffRule(), 6, cfg, begin
    ):
        for word in range(5):
            want = reference.count([*tokens[begin : target + 1], word], order)[-1]
            assert tuple(int(c[word]) for c in counts) == want


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=40),
    st.integers(0, 39),
    st.sampled_from([1, 4, 64]),
    st.integers(1, 9),
)
def test_a_scan_of_the_history_gives_the_counts_of_buckets(tokens, target, buckets, block):
    target = min(target, len(tokens) - 2)
    cfg, _ = golf.load_config(dict(VOCAB_SIZE="260"))
    rule = golf.BackoffRule(buckets=buckets)
    with mock.patch.object(golf, "BLOCK", {"cpu": block}):
        scanned = dict(golf.scan_ngrams(torch.tensor(tokens), target, rule, 6, cfg))
    for word in range(5):
        stream = torch.tensor([*tokens[: target + 1], word])
        for order, counts in golf.count_ngrams(stream, 6, buckets=buckets, primes=cfg.ngram_primes):
            counted = (int(counts.context[-1]), int(counts.pair[-1]))
            assert counted == tuple(int(column[word]) for column in scanned[order][:2])
