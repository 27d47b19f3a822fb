"""Each recipe's rule against dictionaries and loops; masses by brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import train_gpt as golf


def recipe_config(recipe, granularity=None, **more):
    """The recipe's rule at a size where a thousand tokens fill several chunks."""
    env = dict(
        RECIPE=recipe,
        EVAL_SEQ_LEN="64",
        EVAL_STRIDE="2",
        VOCAB_SIZE="512",
        NGRAM_BUCKETS="128",
        NGRAM_START_TOKENS="100",
    )
    env |= more | (dict(NGRAM_GRANULARITY=granularity) if granularity else {})
    cfg, _ = golf.load_config(env)
    return cfg


def network(count):
    """Made-up log-probabilities and entropies of `count` targets."""
    generator = torch.Generator().manual_seed(3)
    logp = -8 * torch.rand(count, generator=generator, dtype=torch.float64)
    return logp, 6 * torch.rand(count, generator=generator, dtype=torch.float64)


def agrees(tokens, cfg, span=None):
    """Every rule of a configuration gives the reference's loss at each target."""
    start, end = span or (0, len(tokens) - 1)
    logp, entropy = network(end - start)
    for name, rule in golf.backoff_rules(cfg).items():
        part = golf.backoff_columns(rule.counted(tokens, (start, end), cfg), rule.match, cfg)
        got = -golf.backoff_logp(logp, entropy, part, cfg)
        begin = start if rule.cold else 0
        first = rule.granularity if rule.cold and start else rule.first
        want = reference.backoff_loss(
            tokens[begin : end + 1].tolist(),
            [0.0] * (start - begin) + logp.tolist(),
            [0.0] * (start - begin) + entropy.tolist(),
            cfg,
            buckets=rule.buckets,
            match=rule.match,
            granularity=rule.granularity,
            first=first,
        )[start - begin :]
        assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=0), name
        assert not torch.allclose(got, -logp), name


@pytest.mark.parametrize("recipe", golf.RECIPES)
@pytest.mark.parametrize("granularity", ["token", "window", "batch"])
def test_every_rule_on_real_text(data, recipe, granularity):
    agrees(data[2].val[:1001], recipe_config(recipe, granularity))


@pytest.mark.parametrize("windows", [1, 64, 128])
def test_windows_of_a_batch_are_a_setting(data, windows):
    """Two of #1094's three seeds updated their tables every 64 windows, one every 128."""
    cfg = recipe_config("pr1094", NGRAM_BATCH_WINDOWS=str(windows))
    rule = golf.backoff_rules(cfg)["backoff_hashed"]
    assert rule.granularity == windows * cfg.eval_stride
    agrees(data[2].val[:1001], cfg)


@pytest.mark.parametrize("recipe", golf.RECIPES)
def test_a_rank_in_the_middle_scores_as_the_rule_says(data, recipe):
    """From its span alone if the history is cold, else as one pass over everything before it."""
    agrees(data[2].val[:1001], recipe_config(recipe), (414, 1000))


@pytest.mark.parametrize(
    "more",
    [
        dict(NGRAM_ENTROPY="0", NGRAM_ALPHA="0.3"),
        dict(NGRAM_MIN_ORDER="4"),
        dict(NGRAM_MIN_ORDER="7", NGRAM_FALLBACK="unigram"),
        dict(NGRAM_MIN_COUNT="5"),
        dict(NGRAM_START_TOKENS="0", NGRAM_FALLBACK="unigram"),
        dict(NGRAM_MAX_ORDER="2"),
        dict(NGRAM_MATCH="pair", NGRAM_FALLBACK="unigram"),
        dict(NGRAM_BUCKETS="1"),
        dict(NGRAM_ENT_CENTER="1,2,3,4,5,6"),
        dict(NGRAM_HISTORY="cold", NGRAM_GRANULARITY="token"),
        dict(NGRAM_PRIMES="7,11"),
    ],
    ids=str,
)
def test_every_setting_of_the_rule(data, more):
    agrees(data[2].val[:601], recipe_config("golf", **more), (100, 600))


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=60),
    st.integers(0, 3),
    st.sampled_from(["network", "unigram"]),
    st.sampled_from(["context", "pair"]),
)
def test_rules_on_small_streams(tokens, start_tokens, fallback, match):
    cfg = recipe_config(
        "golf",
        NGRAM_START_TOKENS=str(start_tokens),
        NGRAM_FALLBACK=fallback,
        NGRAM_MATCH=match,
        NGRAM_BUCKETS="4",
        EVAL_SEQ_LEN="8",
        VOCAB_SIZE="260",
    )
    logp, entropy = network(len(tokens) - 1)
    for rule in golf.backoff_rules(cfg).values():
        counted = rule.counted(torch.tensor(tokens), (0, len(logp)), cfg)
        got = golf.backoff_logp(logp, entropy, golf.backoff_columns(counted, rule.match, cfg), cfg)
        want = reference.backoff_loss(
            tokens,
            logp.tolist(),
            entropy.tolist(),
            cfg,
            buckets=rule.buckets,
            match=rule.match,
            granularity=rule.granularity,
            first=rule.first,
        )
        assert torch.allclose(-got, torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("recipe", golf.RECIPES)
def test_a_direct_scan_agrees_with_the_counts_at_the_target(data, recipe):
    cfg, tokens = recipe_config(recipe), data[2].val[:601]
    for rule in golf.backoff_rules(cfg).values():
        for start, end in ((0, 600), (300, 600), (599, 600)):
            begin = start if rule.cold else 0
            counted = dict(rule.counted(tokens, (start, end), cfg))
            for target in {start, min(start + 1, 599), *range(max(start, 361), 600, 17), 599}:
                scan = golf.scan_ngrams(tokens, target, rule, cfg.ngram_max_order, cfg, begin)
                scanned = dict(scan)
                for order in counted:
                    for a, b in zip(counted[order][:2], scanned[order][:2], strict=True):
                        assert int(a[target - start]) == int(b[tokens[target + 1]])


def test_masses_of_each_kind_of_rule(data, tiny_model):
    """Exact counts with a match on the context alone sum to 1; no other rule does."""
    _, run, corpus = data
    cfg, model = tiny_model(
        ngram_match="pair", ngram_buckets=256, ngram_max_order=5, scoring="backoff"
    )
    evaluation = golf.Evaluation(model, corpus, cfg, run)
    evaluation.neural_pass()
    for scoring in evaluation.scorings:
        evaluation.score(scoring, 0.0)
    evaluation.masses()
    rows = evaluation.rows
    assert set(rows) == {
        "neural",
        "backoff_exact",
        "backoff_exact_pair",
        "backoff_hashed",
        "calibrated",
    }
    for scoring in ("neural", "backoff_exact", "calibrated"):
        assert abs(rows[scoring]["mass"] - 1) < 1e-6 and abs(rows[scoring]["max_mass"] - 1) < 1e-6
        assert rows[scoring]["normalized"] == "yes"
    for scoring in ("backoff_exact_pair", "backoff_hashed"):
        assert rows[scoring]["mass"] > 1.01 and rows[scoring]["normalized"] == "no"
    assert rows["backoff_hashed"]["mass"] > 5 and rows["backoff_hashed"]["ngram_mass"] > 10


def test_the_score_is_the_distribution_at_the_target(data, tiny_model):
    """What is summed over the vocabulary is what was scored."""
    _, run, corpus = data
    cfg, model = tiny_model(
        ngram_match="pair",
        ngram_buckets=256,
        ngram_max_order=5,
        ngram_fallback="unigram",
        ngram_min_count=1,
    )
    evaluation = golf.Evaluation(model, corpus, cfg, run)
    evaluation.neural_pass()
    neural = evaluation.neural
    networks = neural.distributions([0, 5, 64, 1000, 4095])
    for scoring, rule in evaluation.rules.items():
        counted = rule.counted(neural.tokens, (neural.start, neural.end), cfg)
        part = golf.backoff_columns(counted, rule.match, cfg)
        scored = golf.backoff_logp(evaluation.columns.logp, evaluation.columns.entropy, part, cfg)
        for target, network in networks.items():
            logp, _ = evaluation.distribution(scoring, target, network)
            assert abs(float(logp[corpus.val[target + 1]] - scored[target])) < 1e-4
