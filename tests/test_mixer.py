"""The calibrated mixer against a slow scalar mixer, and its promises."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as golf

V, MAX_ORDER, CHUNK, NEAR = 23, 8, 64, 32
CFG = golf.replace(golf.Config(), mixer_max_order=MAX_ORDER, eval_seq_len=NEAR)


def text(n, seed=0):
    """A stream (n+1,) with repeats: phrases copied from before, noise between, some BOS."""
    generator = torch.Generator().manual_seed(seed)

    def rand(k):
        return int(torch.randint(k, (1,), generator=generator))

    out = [golf.BOS] + [2 + rand(V - 2) for _ in range(40)]
    while len(out) < n + 1:
        if rand(3):
            begin = rand(len(out) - 20)
            out += out[begin : begin + 2 + rand(12)]
        else:
            out += [2 + rand(V - 2) for _ in range(1 + rand(3))]
            if rand(20) == 0:
                out.append(golf.BOS)
    return torch.tensor(out[: n + 1])


def network(n, seed=0):
    """(n, V) random log-probabilities, float64."""
    z = torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.5 * z).log_softmax(-1)


def inputs(tokens, logp):
    """MixInputs of a stream (n+1,) and a network's log-probabilities (n, V)."""
    ngram = golf.stream_columns(tokens, (0, len(logp)), CFG)
    y = ngram.hint.long().clamp(min=0)[:, None]
    neural = (
        logp.gather(1, tokens[1:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        logp.gather(1, y)[:, 0],
        logp.scatter(1, y, -math.inf).logsumexp(-1),
    )
    return golf.MixInputs(*neural, ngram.hint == tokens[1:], *ngram[1:])


def batched(tokens, logp):
    return golf.mix(inputs(tokens, logp), CHUNK)[0]


def scan(history, order):
    """{token: how often it followed the last order - 1 tokens}, the latest, how long ago."""
    n, seen, last, where = order - 1, {}, -1, 0
    if len(history) < n:
        return seen, last, 0
    for j in range(n, len(history)):
        if history[j - n : j] == history[len(history) - n :]:
            seen[history[j]] = seen.get(history[j], 0) + 1
            last, where = history[j], j
    return seen, last, len(history) - where if seen else 0


def far(distance):
    return 0 if distance < NEAR else 1 if distance < 16 * NEAR else 2


class Slow:
    """The mixer written again: dictionaries, one position at a time, floats, no fixed point."""

    def __init__(self):
        self.hints, self.levels = {}, {}

    def contexts(self, history):
        """Levels from weak to strong, and the hint with its bucket."""
        begin = max(i for i, t in enumerate(history) if t == golf.BOS)
        levels = [("document", o, *scan(history[begin + 1 :], o)) for o in (2, 3, 4)]
        stream = [("stream", o, *scan(history, o)) for o in range(2, MAX_ORDER + 1)]
        hint, bucket = -1, None
        for _, order, seen, last, distance in stream:
            if seen:
                hint, bucket = last, [order, seen[last] * 4 // sum(seen.values()), far(distance)]
        if bucket:
            bucket = (*bucket, *(level[3] == hint for level in stream[:3]))
        return levels + stream, hint, bucket

    def distribution(self, history, logp):
        """Probabilities of all tokens, and what an update takes."""
        p = [math.exp(x) for x in logp.tolist()]
        entropy = -sum(a * math.log(a) for a in p)
        levels, hint, bucket = self.contexts(history)
        knots = None
        if bucket:
            rest = sum(a for t, a in enumerate(p) if t != hint)
            place = min(max(math.log(p[hint] / rest) + 12, 0), 24)
            low, logits = min(int(place), 23), []
            for k in (low, low + 1):
                seen, right = self.hints.get((bucket, k), (0, 0))
                s = (right + 10 / (1 + math.exp(12 - k))) / (seen + 10)
                logits.append(math.log(s / (1 - s)))
            s = 1 / (1 + math.exp(-(logits[0] + (logits[1] - logits[0]) * (place - low))))
            knots = [(bucket, low, 1 - place + low), (bucket, low + 1, place - low)]
            p = [s if t == hint else a * (1 - s) / rest for t, a in enumerate(p)]
        parts, keys = [p], []
        for kind, order, seen, _, distance in levels:
            if not seen:
                continue
            total = sum(seen.values())
            key = (
                kind,
                order,
                min(int(math.log2(total)), 12),
                (len(seen) * 8 - 1) // total,
                far(distance),
                min(int(entropy), 5),
            )
            reached, explained = self.levels.get(key, (0.0, 0.0))
            weight = (0.1 + explained) / (2.1 + reached)
            parts = [[a * (1 - weight) for a in part] for part in parts]
            parts.append([weight * seen.get(t, 0) / total for t in range(V)])
            keys.append(key)
        return [sum(x) for x in zip(*parts, strict=True)], (hint, knots, parts, keys)

    def update(self, token, memory):
        """Learn that `token` came where `memory` was the state."""
        hint, knots, parts, keys = memory
        for bucket, k, w in knots or []:
            seen, right = self.hints.get((bucket, k), (0, 0))
            self.hints[bucket, k] = (seen + w, right + (w if token == hint else 0))
        total = sum(part[token] for part in parts)
        reach = parts[0][token] / total
        for key, part in zip(keys, parts[1:], strict=True):
            reach += part[token] / total
            reached, explained = self.levels.get(key, (0.0, 0.0))
            self.levels[key] = (reached + reach, explained + part[token] / total)


def test_equals_a_slow_scalar_mixer_whose_mass_is_one():
    n = 700
    tokens, logp = text(n), network(n)
    fast, slow, pending = batched(tokens, logp), Slow(), []
    for i in range(n):
        p, memory = slow.distribution(tokens[: i + 1].tolist(), logp[i])
        target = int(tokens[i + 1])
        assert abs(sum(p) - 1) < 1e-9
        assert math.log(p[target]) == pytest.approx(float(fast[i]), abs=1e-6)
        pending.append((target, memory))
        if len(pending) == CHUNK:
            for item in pending:
                slow.update(*item)
            pending = []


def test_a_changed_suffix_leaves_the_scores_before_it():
    """Bit-identical, wherever the change falls in a chunk."""
    n = 1000
    tokens, logp = text(n, 2), network(n, 2)
    scores = batched(tokens, logp)
    for j in (1, 63, 64, 65, 500, 999):
        other = tokens.clone()
        other[j + 1 :] = torch.randint(2, V, (n - j,), generator=torch.Generator().manual_seed(j))
        assert torch.equal(batched(other, logp)[:j], scores[:j])


def same(one, other):
    """Two mixers have the same tables, to the last bit."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_tables_change_after_a_chunk_only_and_in_any_order():
    n = 640
    tokens, logp = text(n, 3), network(n, 3)
    long, kept = golf.mix(inputs(tokens, logp), CHUNK, [0, 63, 64, 400])
    for k in range(1, 10):
        short, tables = golf.mix(inputs(tokens[: k * CHUNK + 1], logp[: k * CHUNK]), CHUNK)
        assert torch.equal(short, long[: k * CHUNK])
        for i in (i for i in kept if i // CHUNK == k and i < n):
            assert same(tables[k * CHUNK], kept[i])
    x = inputs(tokens, logp)
    one, other = (golf.CalibratedMixer(len(x.ratio)) for _ in range(2))
    _, evidence = one.predict(x)
    assert not any(t.any() for t in vars(one).values())
    one.update(evidence)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    other.update(other.predict(golf.MixInputs(*(c[..., shuffled] for c in x)))[1])
    assert same(one, other) and all(t.any() for t in vars(one).values())


def test_the_hint_stage_starts_as_the_network():
    n = 300
    tokens, logp = text(n, 4), network(n, 4)
    x = inputs(tokens, logp)
    mixed, _ = golf.CalibratedMixer(len(x.ratio)).predict(x._replace(level_key=x.level_key * 0))
    assert torch.allclose(mixed, x.logp, atol=1e-6)


def test_repeats_are_worth_bits_and_noise_costs_few():
    """Tokens drawn from the network itself: n-grams carry nothing, and must cost next to nothing.
    The full measure, 1 M tokens of a vocabulary of 1,024, is bench/mixers.py --noise 1000000."""
    n = 20000
    tokens, logp = text(n, 5), network(n, 5)
    own = logp.gather(1, tokens[1:, None]).mean()
    assert float(batched(tokens, logp).mean() - own) > 0.5
    drawn = torch.multinomial(logp.exp(), 1, generator=torch.Generator().manual_seed(6))[:, 0]
    noise = torch.cat([torch.tensor([golf.BOS]), drawn])
    own = logp.gather(1, noise[1:, None]).mean()
    cost = float(own - batched(noise, logp).mean()) / math.log(2)
    # at most 0.002 bits over a million tokens; what is learned costs about log n, so per token
    # it may be log(20,000)/log(1,000,000) * 50 times that here
    assert cost < 0.002 * 50 * math.log(n) / math.log(1e6)


def test_documents_do_not_leak_into_each_other():
    """A level of the document knows nothing at its start, a level of the stream does."""
    tokens = torch.tensor([golf.BOS, 5, 6, 7, golf.BOS, 5, 6, 7])
    x = golf.stream_columns(tokens, (0, 7), CFG)
    assert x.level_key[:3, 4:].eq(0).all() and x.level_key[3, 5] > 0 and x.ratio[3, 5] == 1.0
    assert x.hint.tolist() == [-1, -1, -1, -1, 5, 6, 7]


def test_keys_are_numbers_of_their_digits():
    """Every digit has a number of bins; what exceeds them shares the last one, no other's key."""
    sizes = dict(a=3, b=4)
    digits = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    keys = golf.number_of(dict(a=digits[:, 0], b=digits[:, 1]), sizes)
    assert keys.tolist() == list(range(12))
    assert golf.number_of(
        dict(a=torch.tensor([1, 1]), b=torch.tensor([4, -1])), sizes
    ).tolist() == [
        7,
        4,
    ]
    for wrong in (dict(a=1), dict(a=1, b=1, c=1)):
        with pytest.raises(AssertionError, match="bins"):
            golf.number_of(wrong, sizes)


def test_keys_of_hints_tell_their_order():
    tokens, logp = text(500, 7), network(500, 7)
    x, longest = inputs(tokens, logp), torch.zeros(500, dtype=torch.int64)
    for order, counts in golf.count_ngrams(tokens, MAX_ORDER, 1):
        if order > 1:
            longest = torch.where(counts.context > 0, order, longest)
    assert torch.equal(golf.hint_orders(x.hint_key).long(), longest)
    assert int(x.hint_key.max()) < golf.HINT_KEYS and longest.max() == MAX_ORDER


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 40000]), min_size=2, max_size=60),
    st.integers(0, 58),
    st.integers(1, 60),
    st.integers(1, 9),
)
def test_hints_alone_are_those_of_the_columns(tokens, start, length, block):
    """Of any span, of 16-bit tokens too, and whatever the blocks' size."""
    start = min(start, len(tokens) - 2)
    span = (start, min(start + length, len(tokens) - 1))
    columns = golf.stream_columns(torch.tensor(tokens), span, CFG)
    with mock.patch.object(golf, "BLOCK", {"cpu": block}):
        hints = golf.stream_hints(torch.tensor(tokens), span, CFG)
        again = golf.stream_columns(torch.tensor(tokens), span, CFG)
    assert hints.dtype == columns.hint.dtype and torch.equal(hints, columns.hint)
    assert all(torch.equal(a, b) for a, b in zip(columns, again, strict=True))


def test_columns_of_a_stream_are_those_of_scans():
    """Two ways to the same numbers: counts of all targets, and a scan for each."""
    tokens = text(300, 8)
    cfg = golf.replace(CFG, vocab_size=V)
    columns = golf.stream_columns(tokens, (0, 300), cfg)
    for target in range(0, 300, 7):
        begin = int((tokens[: target + 1] == golf.BOS).nonzero()[-1]) + 1
        scans = [
            golf.scan_ngrams(tokens, target, golf.EXACT, order, cfg, first)
            for order, first in ((golf.DOCUMENT_MAX_ORDER, begin), (MAX_ORDER, 0))
        ]
        word = tokens[target + 1]
        for a, b in zip(columns, golf.ngram_columns(*scans, NEAR), strict=True):
            assert torch.equal(a[..., target].double(), b[..., word].double())


def test_mixing_asks_the_device_for_no_value():
    """On the device "meta" there are none: reading one back, which waits for a GPU, would raise."""
    levels, n = 5, 7
    shapes = dict(ratio=(levels, n), level_key=(levels, n))
    types = dict(is_hint=torch.bool, hint_key=torch.int16, ratio=torch.float32)
    types["level_key"] = torch.int16
    x = golf.MixInputs(
        *(
            torch.empty(shapes.get(name, n), dtype=types.get(name, torch.float64), device="meta")
            for name in golf.MixInputs._fields
        )
    )
    mixer = golf.CalibratedMixer(levels, "meta")
    logp, evidence = mixer.predict(x)
    mixer.update(evidence)
    assert logp.shape == (n,)


def test_the_bits_of_a_score_do_not_depend_on_what_follows():
    """Wherever the stream ends: a chunk that is cut off has the scores of a whole one."""
    tokens, logp = text(3 * CHUNK + 7), network(3 * CHUNK + 7)
    whole = batched(tokens, logp)
    for end in range(1, len(logp), 3):
        assert torch.equal(batched(tokens[: end + 1], logp[:end]), whole[:end]), end
