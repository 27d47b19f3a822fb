"""Slow, independent references: dictionaries and loops, no sorting, no tensors."""

import math
from collections import Counter, defaultdict


def chunk_start(position, granularity, first):
    """First position of the chunk of targets that a position (>= 1) belongs to."""
    place = position - 1
    if place < first:
        return 1
    return 1 + first + (place - first) // granularity * granularity


def key_of(tokens, primes, buckets):
    """A context or n-gram as a table knows it: itself, or its bucket."""
    if not buckets:
        return tuple(tokens)
    key = 0
    for k, token in enumerate(tokens):
        key ^= token * primes[k % len(primes)]
    return key & (buckets - 1)


def count(tokens, order, buckets=0, granularity=1, first=None, primes=(1,)):
    """[(context, pair, distinct, hint, hint_count, distance, streak)] of every position, by
    counters."""
    first, n, rows = first or granularity, order - 1, []
    buckets = buckets if order > 1 else 0
    contexts, pairs, followers, latest, counted = Counter(), Counter(), defaultdict(Counter), {}, 0
    streaks = Counter()
    for i in range(len(tokens)):
        visible = i if i == 0 else chunk_start(i, granularity, first)
        while counted < visible:  # positions before this chunk enter the tables
            j, counted = counted, counted + 1
            if j < n:
                continue
            context = tokens[j - n : j]
            contexts[key_of(context, primes, buckets)] += 1
            pairs[key_of([*context, tokens[j]], primes, buckets)] += 1
            followers[tuple(context)][tokens[j]] += 1
            again = tokens[latest.get(tuple(context), j)] == tokens[j]
            streaks[tuple(context)] = 1 + again * streaks[tuple(context)]
            latest[tuple(context)] = j
        if i < n:
            rows.append((0, 0, 0, -1, 0, 0, 0))
            continue
        context = tokens[i - n : i]
        place = latest.get(tuple(context))
        hint, distance = (-1, 0) if place is None else (tokens[place], i - place)
        seen = contexts[key_of(context, primes, buckets)]
        same = pairs[key_of([*context, tokens[i]], primes, buckets)]
        after = followers[tuple(context)]
        streak = streaks[tuple(context)]
        rows.append((seen, same, len(after), hint, after[hint], distance, streak))
    return rows


def backoff_loss(tokens, logp, entropy, cfg, *, buckets=0, match="context", granularity=1, first=1):
    """Nats of each target by a recipe's rule, written from its description."""
    tables = {
        n: count(tokens, n, buckets, granularity, first, cfg.ngram_primes)
        for n in range(1, cfg.ngram_max_order + 1)
    }
    losses = []
    for target in range(len(tokens) - 1):
        network, chosen = math.exp(logp[target]), None
        for n in range(cfg.ngram_max_order, cfg.ngram_min_order - 1, -1):
            context, pair = tables[n][target + 1][:2]
            if context >= cfg.ngram_min_count and (match == "context" or pair > 0):
                chosen = n, min(pair, context) / context
                break
        seen, same = tables[1][target + 1][:2]
        if chosen is None and cfg.ngram_fallback == "unigram":
            chosen = 1, (same + 0.5) / (seen + 0.5 * cfg.vocab_size)
        if chosen is None or seen < cfg.ngram_start_tokens:
            losses.append(-logp[target])
            continue
        centers = cfg.ngram_ent_center
        center = centers[0] if len(centers) == 1 else centers[max(0, chosen[0] - 2)]
        x = cfg.ngram_ent_scale * (entropy[target] - center)
        alpha = cfg.ngram_ent_base + cfg.ngram_ent_range / (1 + math.exp(-x))
        alpha = alpha if cfg.ngram_entropy else cfg.ngram_alpha
        losses.append(-math.log(max(1e-12, (1 - alpha) * network + alpha * chosen[1])))
    return losses
