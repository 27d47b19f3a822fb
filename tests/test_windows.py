"""Windows tile the targets; the grid shares them out; the neural pass scores each once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as golf


def grid_of(num_targets, seq_len, stride, batch=8, world=1):
    """A grid of these sizes."""
    cfg = golf.replace(golf.Config(), eval_seq_len=seq_len, eval_batch_windows=batch)
    return golf.Grid(num_targets, cfg, stride, world)


def windows(grid):
    """[(start, first_scored, end)] of every window."""
    return grid.spans_of(torch.arange(grid.count)).tolist()


@given(st.integers(1, 400), st.integers(1, 50), st.data())
def test_windows_tile_the_targets(num_targets, seq_len, more):
    stride = more.draw(st.integers(1, seq_len))
    scored, grid = 0, grid_of(num_targets, seq_len, stride)
    for number, (start, first, end) in enumerate(windows(grid)):
        assert {grid.window_of(target) for target in range(first, end)} == {number}
        assert first == scored and first < end <= num_targets
        assert end - start == min(seq_len, num_targets) and start >= 0
        assert first == 0 or first - start >= seq_len - stride
        assert first == 0 or end - first <= stride
        scored = end
    assert scored == num_targets


def test_the_challenge_has_969057_windows():
    assert grid_of(62_021_632, 2048, 64).count == 969_057


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_ranks_share_all_batches_and_spans_tile(count, stride, batch, world):
    num_targets = 10 * count
    grid = grid_of(num_targets, 10, stride, batch, world)
    shared = [b for batches in grid.batches for b in batches]
    assert shared == list(range(len(shared)))
    position = 0
    for batches, (start, end) in zip(grid.batches, grid.spans, strict=True):
        rows = [grid.spans_of(grid.numbers(b)) for b in batches]
        scored = torch.cat(rows) if rows else torch.empty(0, 3, dtype=torch.int64)
        spans = [(int(a), int(b)) for _, a, b in scored if b > a]
        assert start == position and end == (spans[-1][1] if spans else start)
        for a, b in spans:
            assert a == position
            position = b
    assert position == num_targets
    assert all(len(grid.numbers(b)) == batch for batches in grid.batches for b in batches if b)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.data())
def test_sheets_hold_any_windows_in_their_own_rows(count, stride, batch, more):
    """So that a window's results are those of the pass, whatever it is computed with."""
    grid = grid_of(10 * count, 10, stride, batch)
    wanted = set(more.draw(st.lists(st.integers(0, grid.count - 1), max_size=40)))
    found = []
    for sheet in grid.sheets(wanted):
        assert sheet.tolist() == [0] or len(sheet) == batch
        for row, number in enumerate(sheet.tolist()):
            if number >= grid.count:
                assert not grid.places(sheet)[2][row].any()
                continue
            own = next(b for b in range(grid.count_batches) if number in grid.numbers(b))
            assert grid.numbers(own)[row] == number
            found.append(number)
    assert sorted(found) == sorted(wanted)


def test_neural_pass_equals_each_window_by_hand(data, tiny_model):
    _, run, corpus = data
    cfg, model = tiny_model()
    neural = golf.NeuralPass(model, corpus, cfg, run, cfg.eval_stride)
    hints = torch.randint(0, cfg.vocab_size, (golf.HINTS, len(corpus.val) - 1))
    got = neural.columns(hints)
    with torch.no_grad():
        for start, first, end in windows(neural.grid)[:40:7]:
            logp = model.logits(corpus.val[None, start:end]).double().log_softmax(-1)[0]
            logp = logp[first - start :]
            targets = corpus.val[first + 1 : end + 1, None]
            span = slice(first, end)
            want = [logp.gather(1, targets)[:, 0], -(logp.exp() * logp).sum(1)]
            want += logp.gather(1, hints[:, span].mT).mT
            assert torch.allclose(got[span], torch.stack(want, 1), atol=1e-5)


def test_a_hint_that_is_nearly_certain_leaves_what_the_others_have():
    """1 - p(y) = 1e-12 cannot be had from a float32 p(y); whichever hint it is, or both."""
    logits = torch.full((1, 1, 4), -28.0)
    logits[..., 2] = 0.0
    for hints in ([2, 0], [0, 2], [2, 2]):
        hint = torch.tensor([[hints]])
        logp = golf.score_logits(logits, torch.tensor([[2]]), hint)[0, 0]
        exact = 3 * math.exp(-28)
        for certain in (logp[0], logp[2 + hints.index(2)]):
            assert -math.expm1(float(certain)) == pytest.approx(exact, rel=1e-3)


def test_the_distribution_at_a_target_is_the_one_that_was_scored(data, tiny_model):
    _, run, corpus = data
    cfg, model = tiny_model()
    neural = golf.NeuralPass(model, corpus, cfg, run, cfg.eval_stride)
    columns = golf.NeuralColumns.of(neural.columns().unbind(1))
    found = neural.distributions([0, 1, 63, 64, 79, 80, 1000, len(corpus.val) - 2])
    assert len(found) == 8
    for target, logp in found.items():
        assert abs(float(logp.exp().sum()) - 1) < 1e-12
        assert abs(float(logp[corpus.val[target + 1]] - columns.logp[target])) < 1e-5
        assert abs(float(-(logp.exp() * logp).sum() - columns.entropy[target])) < 1e-5


def test_batches_and_ranks_do_not_change_a_score(data, tiny_model, run):
    """Windows alone or together, the last batch filled up, one rank or five: the same scores."""
    cfg, _, corpus = data
    _, model = tiny_model()
    corpus = golf.Data(corpus.tokenizer, corpus.table, None, corpus.val[:643], corpus.corpus)
    want = golf.NeuralPass(model, corpus, cfg, run, 16).columns()
    for size in (1, 3, 64):
        config = golf.replace(cfg, eval_batch_windows=size)
        got = golf.NeuralPass(model, corpus, config, run, 16).columns()
        assert torch.allclose(got, want, atol=1e-5, rtol=0)
    neural, parts = golf.NeuralPass(model, corpus, cfg, run, 16), []
    neural.grid = golf.Grid(642, cfg, 16, 5)
    shares = list(zip(neural.grid.batches, neural.grid.spans, strict=True))
    for batches, (start, end) in shares:
        neural.grid.batches, neural.start, neural.end = [batches], start, end
        parts.append(neural.columns())
    assert torch.equal(torch.cat(parts), want)


def test_threads_change_scores_by_rounding_alone(data, tiny_model):
    """With AVX-512 by nothing at all; MKL's AVX2 kernels add in another order."""
    _, run, corpus = data
    cfg, model = tiny_model()
    corpus = golf.Data(corpus.tokenizer, corpus.table, None, corpus.val[:513], corpus.corpus)
    neural, threads = golf.NeuralPass(model, corpus, cfg, run, cfg.eval_stride), []
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        threads.append(neural.columns())
    torch.set_num_threads(before)
    for one, two in zip(*threads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
