"""The calibrated mixer against a slow scalar mixer, and its promises."""

import collections
import math
import types
from typing import NamedTuple
from unittest import mock

import mixers
import numpy as np
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
    """What golf.mix reads of a stream (n+1,) and a network's log-probabilities (n, V)."""
    ngram = golf.stream_columns(tokens, (0, len(logp)), CFG)
    named = logp.gather(1, ngram.hints.long().clamp(min=0).mT)
    own, entropy = logp.gather(1, tokens[1:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    return golf.NeuralColumns(own, entropy, named.mT), ngram, ngram.hint_number(tokens[1:])


def mix_inputs(tokens, logp):
    """MixInputs of a whole stream."""
    return next(golf.chunks_of(*inputs(tokens, logp), len(logp)))


def batched(tokens, logp):
    return golf.mix(*inputs(tokens, logp), CHUNK)[0]


class Scan(NamedTuple):
    """What followed a context of the slow mixer."""

    seen: dict[int, int]  # {token: how often}
    last: int = -1  # the latest
    ago: int = 0  # how many tokens ago that was
    streak: int = 0  # how many times in a row


def scan(history, order):
    """Scan of the last order - 1 tokens of a history."""
    n = order - 1
    if len(history) < n:
        return Scan({})
    places = [
        j for j in range(n, len(history)) if history[j - n : j] == history[len(history) - n :]
    ]
    if not places:
        return Scan({})
    followed = [history[j] for j in places]
    streak = next((i for i, t in enumerate(followed[::-1]) if t != followed[-1]), len(followed))
    return Scan(collections.Counter(followed), followed[-1], len(history) - places[-1], streak)


def far(distance):
    return 0 if distance < NEAR else 1 if distance < 16 * NEAR else 2


class Slow:
    """The mixer written again: dictionaries, one position at a time, floats, no fixed point."""

    def __init__(self):
        self.hints, self.levels = {}, {}
        self.weights = [np.array([0, 1 / 3, 1 / 3, 1 / 3, 0]) for _ in range(2)]
        self.curvature = [1000 * np.eye(5) for _ in range(2)]

    def hints_of(self, stream):
        """Each hint with its bucket in each table; stream: {order: Scan}."""
        found = {}
        for order, known in sorted(stream.items(), reverse=True):
            if known.seen and known.last not in found and len(found) < 2:
                share = known.seen[known.last] * 4 // sum(known.seen.values())
                agreement = tuple(stream[o].last == known.last for o in (2, 3, 4))
                found[known.last] = (
                    (order, share, far(known.ago), agreement),
                    (order, min(known.streak, 5), min(len(known.seen), 4)),
                    (known.last, (order > 3) + (order > 6)),
                )
        return [(hint, list(enumerate(buckets))) for hint, buckets in found.items()]

    def opinion(self, number, buckets, logit):
        """(corrected probability of a hint of this logit, the knots and inputs that led to it)."""
        place = min(max(logit + 12, 0), 24)
        low, inputs, knots = min(int(place), 23), [place - 12], []
        for bucket in buckets:
            inputs.append(0.0)
            for k, weight in ((low, 1 - place + low), (low + 1, place - low)):
                seen, right = self.hints.get((number, bucket, k), (0, 0))
                s = (right + 10 / (1 + math.exp(12 - k))) / (seen + 10)
                inputs[-1] += weight * math.log(s / (1 - s))
                knots.append(((number, bucket, k), weight))
        inputs = np.array([*inputs, 0.3])
        mixed = min(max(float(self.weights[number] @ inputs), -12), 12)
        return 1 / (1 + math.exp(-mixed)), (knots, inputs)

    def distribution(self, history, logp):
        """Probabilities of all tokens, and what an update takes."""
        p = [math.exp(x) for x in logp.tolist()]
        entropy = -sum(a * math.log(a) for a in p)
        begin = max(i for i, t in enumerate(history) if t == golf.BOS)
        stream = {o: scan(history, o) for o in range(2, MAX_ORDER + 1)}
        levels = [("document", o, scan(history[begin + 1 :], o)) for o in (2, 3, 4)]
        parts, keys = [p], []
        for kind, order, known in levels + [("stream", *item) for item in stream.items()]:
            if not known.seen:
                continue
            total = sum(known.seen.values())
            key = (
                kind,
                order,
                min(int(math.log2(total)), 12),
                (len(known.seen) * 8 - 1) // total,
                far(known.ago),
                min(int(entropy), 5),
            )
            reached, explained = self.levels.get(key, (0.0, 0.0))
            weight = (0.1 + explained) / (2.1 + reached)
            parts = [[a * (1 - weight) for a in part] for part in parts]
            parts.append([weight * known.seen.get(t, 0) / total for t in range(V)])
            keys.append(key)
        p, left, asked = [sum(x) for x in zip(*parts, strict=True)], 1.0, []
        for number, (hint, buckets) in enumerate(self.hints_of(stream)):
            others = {t for t in range(V) if t not in {h for h, _ in asked} | {hint}}
            rest = sum(p[t] for t in others)
            s, (knots, inputs) = self.opinion(number, buckets, math.log(p[hint] / rest))
            p = [left * (1 - s) / rest * a if t in others else a for t, a in enumerate(p)]
            p[hint], left = left * s, left * (1 - s)
            asked.append((hint, (number, s, knots, inputs)))
        return p, (asked, parts, keys)

    def learn(self, items):
        """Learn from a chunk's (token, memory)."""
        slopes = [np.zeros(5), np.zeros(5)]
        for token, (asked, _, _) in items:
            for hint, (number, s, _, inputs) in asked:
                slopes[number] += ((token == hint) - s) * inputs
                self.curvature[number] += s * (1 - s) * np.outer(inputs, inputs)
                if token == hint:
                    break
        for number, slope in enumerate(slopes):
            self.weights[number] += np.linalg.solve(self.curvature[number], slope)
        for item in items:
            self.update(*item)

    def update(self, token, memory):
        """Learn that `token` came where `memory` was the state, but for the weights."""
        asked, parts, keys = memory
        for hint, (_, _, knots, _) in asked:
            for place, weight in knots:
                seen, right = self.hints.get(place, (0, 0))
                self.hints[place] = (seen + weight, right + (weight if token == hint else 0))
            if token == hint:
                break
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
            slow.learn(pending)
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
    long, kept = golf.mix(*inputs(tokens, logp), CHUNK, [0, 63, 64, 400])
    for k in range(1, 10):
        short, tables = golf.mix(*inputs(tokens[: k * CHUNK + 1], logp[: k * CHUNK]), CHUNK)
        assert torch.equal(short, long[: k * CHUNK])
        for i in (i for i in kept if i // CHUNK == k and i < n):
            assert same(tables[k * CHUNK], kept[i])
    x = mix_inputs(tokens, logp)
    one, other = (golf.CalibratedMixer(len(x.ratio)) for _ in range(2))
    _, evidence = one.predict(x)
    assert same(one, golf.CalibratedMixer(len(x.ratio)))
    one.update(evidence)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    neural = golf.NeuralColumns(*(column[..., shuffled] for column in x.neural))
    number, hint_key, level_key = (c[..., shuffled] for c in (x[1], x.hint_key, x.level_key))
    mixed = golf.MixInputs(neural, number, hint_key, x.ratio[:, shuffled], level_key)
    other.update(other.predict(mixed)[1])
    assert same(one, other) and all(t.any() for t in vars(one).values())


def test_without_experience_the_hints_change_nothing():
    n = 300
    tokens, logp = text(n, 4), network(n, 4)
    x = mix_inputs(tokens, logp)
    mixed, _ = golf.CalibratedMixer(len(x.ratio)).predict(x._replace(level_key=x.level_key * 0))
    assert torch.allclose(mixed, x.neural.logp, atol=1e-6)


def test_the_mass_is_one_whatever_the_tables_hold_and_the_keys_are():
    """All tokens at one position, by the sum that the audit makes: with the run's keys, and with
    keys that collide and tables that hold nonsense."""
    n = 500
    tokens, logp = text(n, 9), network(n, 9)
    cfg = golf.replace(CFG, vocab_size=V)
    evaluation = types.SimpleNamespace(cfg=cfg)
    mixer = golf.mix(*inputs(tokens, logp), CHUNK)[1][n]
    nonsense = golf.CalibratedMixer(len(mixer.reached) // golf.ENTROPIES // golf.LEVEL_KEYS)
    generator = torch.Generator().manual_seed(0)
    for whole, part in (("hint_seen", "hint_right"), ("reached", "explained")):
        table = torch.randint(2**40, getattr(nonsense, whole).shape, generator=generator)
        setattr(nonsense, whole, table)
        setattr(nonsense, part, (table * torch.rand(table.shape, generator=generator)).long())
    nonsense.weights = torch.randn(nonsense.weights.shape, generator=generator).double()
    for target in range(3, n, 29):
        x = golf.Evaluation.candidates(evaluation, target, logp[target], tokens)
        collide = x._replace(hint_key=x.hint_key.clamp(max=1), level_key=x.level_key.clamp(max=1))
        for tables in (mixer, nonsense):
            for inputs_ in (x, collide):
                assert abs(float(tables.predict(inputs_)[0].exp().sum()) - 1) < 1e-7


def test_the_bench_scores_a_saved_pass_and_refuses_one_of_another_mixer(tmp_path, capsys):
    n = 1500
    tokens, logp = text(n, 10), network(n, 10)
    neural, ngram, number = inputs(tokens, logp)
    saved = dict(
        columns=neural.rows(), tokens=tokens.to(torch.uint16), hints=ngram.hints.contiguous()
    )
    saved |= dict(byte_counts=torch.full((n,), 2, dtype=torch.int16))
    saved |= dict(eval_seq_len=torch.tensor(NEAR), mixer_max_order=torch.tensor(MAX_ORDER))
    golf.write_atomic(tmp_path / "pass.safetensors", saved)
    mixers.compare(str(tmp_path / "pass.safetensors"))
    rows = {line[:42].strip(): line[42:].split() for line in capsys.readouterr().out.splitlines()}
    bits = -float(golf.mix(neural, ngram, number, mixers.CHUNK)[0].sum()) / math.log(2)
    assert float(rows["calibrated"][0]) == pytest.approx(bits / (2 * n), abs=1e-4)
    alone = golf.mix(neural, mixers.without_hints(ngram, 0), number * 0, mixers.CHUNK)[0]
    bits = -float(alone.sum()) / math.log(2)
    assert float(rows["interpolation alone"][0]) == pytest.approx(bits / (2 * n), abs=1e-4)
    golf.write_atomic(tmp_path / "old.safetensors", saved | dict(columns=torch.zeros(n, 4)))
    with pytest.raises(SystemExit, match="another mixer"):
        mixers.compare(str(tmp_path / "old.safetensors"))


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
    x = mix_inputs(tokens, network(7))
    assert x.level_key[:3, 4:].eq(0).all() and x.level_key[3, 5] > 0
    assert x.ratio[3, 5].tolist() == [1.0, 1.0, 0.0]
    hints = golf.stream_hints(tokens, (0, 7), CFG)
    assert hints.tolist() == [[-1, -1, -1, -1, 5, 6, 7], [-1] * 7]


def test_hints_are_the_latest_followers_of_the_longest_contexts():
    """The second is named by the longest context whose latest follower is another."""
    tokens = torch.tensor([9, 1, 2, 3, 8, 2, 4, 7, 1, 2, 5])
    hints = golf.stream_hints(tokens, (0, 10), CFG)
    # After 1 2 came 3, after 2 alone 4; after 1, and after 2, nothing else.
    assert hints[:, 9].tolist() == [3, 4] and hints[:, 8].tolist() == [2, -1]


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
    with pytest.raises(KeyError, match="b"):
        golf.number_of(dict(a=1), sizes)


def test_keys_of_hints_tell_their_order():
    tokens, logp = text(500, 7), network(500, 7)
    (_, x, _), longest = inputs(tokens, logp), torch.zeros(500, dtype=torch.int64)
    for order, counts in golf.count_ngrams(tokens, MAX_ORDER, 1):
        if order > 1:
            longest = torch.where(counts.context > 0, order, longest)
    assert torch.equal(golf.hint_orders(x).long(), longest)
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
    with mock.patch.object(golf, "CPU_BLOCK", block):
        hints = golf.stream_hints(torch.tensor(tokens), span, CFG)
        again = golf.stream_columns(torch.tensor(tokens), span, CFG)
    assert hints.dtype == columns.hints.dtype and torch.equal(hints, columns.hints)
    one, other = ([x.hints, x.hint_key, *x.ratios, x.level_key] for x in (columns, again))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_columns_of_a_stream_are_those_of_scans():
    """Two ways to the same numbers: counts of all targets, and a scan for each."""
    tokens = text(300, 8)
    cfg = golf.replace(CFG, vocab_size=V)
    columns = golf.stream_columns(tokens, (0, 300), cfg)
    neural = golf.NeuralColumns(torch.zeros(300), torch.zeros(300), torch.zeros(golf.HINTS, 300))
    x = next(golf.chunks_of(neural, columns, columns.hint_number(tokens[1:]), 300))
    for target in range(0, 300, 7):
        begin = int((tokens[: target + 1] == golf.BOS).nonzero()[-1]) + 1
        scans = [
            golf.scan_ngrams(tokens, target, golf.EXACT, order, cfg, first)
            for order, first in ((golf.DOCUMENT_MAX_ORDER, begin), (MAX_ORDER, 0))
        ]
        hints, hint_key, ratio, level_key = golf.scanned_columns(*scans, NEAR)
        assert hints == [y for y in columns.hints[:, target].tolist() if y >= 0]
        assert torch.equal(x.hint_key[..., target], hint_key[..., 0])
        assert torch.equal(x.level_key[:, target], level_key[:, 0])
        assert torch.equal(x.ratio[:, target], ratio[:, tokens[target + 1]])


def test_mixing_asks_the_device_for_no_value():
    """On the device "meta" there are none: reading one back, which waits for a GPU, would raise."""
    levels, n, hints, tables = 5, 70, golf.HINTS, len(golf.HINT_TABLES)

    def empty(*shape, dtype=torch.float64):
        return torch.empty(shape, dtype=dtype, device="meta")

    neural = golf.NeuralColumns(empty(n), empty(n), empty(hints, n))
    keys = dict(dtype=torch.int16)
    ratios = [empty(3, 1 + hints, dtype=torch.float32)] * levels
    ngram = golf.NgramColumns(
        empty(hints, n, **keys), empty(hints, tables, n, **keys), ratios, empty(levels, n, **keys)
    )
    mixer = golf.CalibratedMixer(levels, "meta")
    for x in golf.chunks_of(neural, ngram, empty(n, dtype=torch.int8), 32):
        logp, evidence = mixer.predict(x)
        mixer.update(evidence)
    assert logp.shape == (n % 32,)


def test_the_bits_of_a_score_do_not_depend_on_what_follows():
    """Wherever the stream ends: a chunk that is cut off has the scores of a whole one."""
    tokens, logp = text(3 * CHUNK + 7), network(3 * CHUNK + 7)
    whole = batched(tokens, logp)
    for end in range(1, len(logp), 3):
        assert torch.equal(batched(tokens[: end + 1], logp[:end]), whole[:end]), end
