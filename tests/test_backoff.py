"""Each recipe's rule against dictionaries and loops; masses by brute force."""

import pytest
import reference
import torch

import train_gpt as golf


def recipe_config(recipe, granularity=None):
    """The recipe's rule at a size where a thousand tokens fill several chunks."""
    env = dict(RECIPE=recipe, EVAL_SEQ_LEN="64", EVAL_STRIDE="2", VOCAB_SIZE="512",
               NGRAM_BUCKETS="128", NGRAM_START_TOKENS="100")
    cfg, _ = golf.load_config(env | (dict(NGRAM_GRANULARITY=granularity) if granularity else {}))
    return cfg


def network(count):
    """Made-up log-probabilities and entropies of `count` targets."""
    generator = torch.Generator().manual_seed(3)
    logp = -8 * torch.rand(count, generator=generator, dtype=torch.float64)
    return logp, 6 * torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("recipe", golf.RECIPES)
@pytest.mark.parametrize("granularity", ["token", "window", "batch"])
def test_every_rule_on_real_text(data, recipe, granularity):
    cfg = recipe_config(recipe, granularity)
    tokens = data[2].val[:1001]
    logp, entropy = network(1000)
    for name, rule in golf.backoff_rules(cfg).items():
        part = golf.backoff_columns(rule.counted(tokens, (0, 1000), cfg), rule.match, cfg)
        got = -golf.backoff_logp(logp, entropy, part, cfg)
        want = reference.backoff_loss(
            tokens.tolist(), logp.tolist(), entropy.tolist(), cfg, buckets=rule.buckets,
            match=rule.match, granularity=rule.granularity, first=rule.first)
        assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-9), name
        assert not torch.allclose(got, -logp)


@pytest.mark.parametrize("recipe", golf.RECIPES)
def test_a_direct_scan_agrees_with_the_counts_at_the_target(data, recipe):
    cfg, tokens = recipe_config(recipe), data[2].val[:601]
    for rule in golf.backoff_rules(cfg).values():
        for start, end in ((0, 600), (300, 600)):
            begin = start if rule.cold else 0
            counted = dict(rule.counted(tokens, (start, end), cfg))
            for target in (start, start + 1, 363, 364, 471, 599):
                scanned = dict(rule.counted_for_all(tokens, target, begin, cfg))
                for order in counted:
                    for a, b in zip(counted[order][:2], scanned[order][:2]):
                        assert int(a[target - start]) == int(b[tokens[target + 1]])


def test_masses_of_each_kind_of_rule(data, tiny_model):
    """Exact counts with a match on the context alone sum to 1; no other rule does."""
    _, run, corpus = data
    cfg, model = tiny_model(ngram_match="pair", ngram_buckets=256, ngram_max_order=5)
    evaluation = golf.Evaluation(model, corpus, cfg, run)
    evaluation.neural_pass()
    for scoring in evaluation.order:
        evaluation.score(scoring, 0.0)
    evaluation.masses()
    rows = evaluation.rows
    assert set(rows) == {"neural", "backoff_exact", "backoff_exact_pair", "backoff_hashed"}
    for scoring in ("neural", "backoff_exact"):
        assert abs(rows[scoring]["mass"] - 1) < 1e-6 and abs(rows[scoring]["max_mass"] - 1) < 1e-6
        assert rows[scoring]["normalized"] == "yes"
    for scoring in ("backoff_exact_pair", "backoff_hashed"):
        assert rows[scoring]["mass"] > 1.01 and rows[scoring]["normalized"] == "no"
    assert rows["backoff_hashed"]["mass"] > 5 and rows["backoff_hashed"]["ngram_mass"] > 10


def test_the_score_is_the_distribution_at_the_target(data, tiny_model):
    """What is summed over the vocabulary is what was scored."""
    _, run, corpus = data
    cfg, model = tiny_model(ngram_match="pair", ngram_buckets=256, ngram_max_order=5,
                            ngram_fallback="unigram", ngram_min_count=1)
    evaluation = golf.Evaluation(model, corpus, cfg, run)
    evaluation.neural_pass()
    neural = evaluation.neural
    for scoring, rule in evaluation.rules.items():
        counted = rule.counted(neural.tokens, (neural.start, neural.end), cfg)
        part = golf.backoff_columns(counted, rule.match, cfg)
        scored = golf.backoff_logp(evaluation.columns.logp, evaluation.columns.entropy, part, cfg)
        for target in (0, 5, 64, 1000, 4095):
            logp, _ = evaluation.distribution(scoring, target, neural.distribution(target))
            assert abs(float(logp[corpus.val[target + 1]] - scored[target])) < 1e-4
