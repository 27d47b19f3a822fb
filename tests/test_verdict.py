"""The verdict and the warnings: one line of what a score is worth."""

import copy

import pytest

import train_gpt as golf

RECORD = {
    "final": [{"scoring": "calibrated", "normalized": "yes", "val_bpb": 1.2}],
    "corpus": {"val_documents": 17},
    "result": [
        {"scoring": "neural", "val_bpb": 1.9, "bytes": 240_000, "tokens": 100_000},
        {"scoring": "calibrated", "val_bpb": 1.2, "bytes": 240_000, "tokens": 100_000, "mass": 1.0},
        {"scoring": "neural", "val_bpb": 1.8, "bytes": 240_000, "tokens": 100_000, "mass": 1.0},
        {"scoring": "backoff_hashed", "bytes": 240_000, "tokens": 100_000, "mass": 248.02},
    ],
    "audit": [{"name": "causal", "verdict": "PASS"}, {"name": "bytes", "verdict": "PASS"}],
    "budget": [{"name": "total_bytes", "used": 15_999_999, "limit": 16_000_000}],
    "unigram_bpb": 3.5,
}


def changed(**values):
    """RECORD with entries "kind" or "kind__key" replaced, in the kind's first row."""
    record = copy.deepcopy(RECORD)
    for name, value in values.items():
        kind, _, key = name.partition("__")
        if not key:
            record[kind] = value
        else:
            row = record[kind] if isinstance(record[kind], dict) else record[kind][0]
            row[key] = value
    return record


@pytest.mark.parametrize(
    "values, line",
    [
        ({}, "VALID"),
        (
            dict(final__scoring="backoff_hashed", final__normalized="no"),
            "NOT A DISTRIBUTION (mass 248)",
        ),
        (dict(audit=[]), "NOT AUDITED (AUDIT=0)"),
        (dict(audit__verdict="FAIL"), "AUDIT FAILED (causal)"),
        (dict(budget__used=16_000_001), "OVER BUDGET (total_bytes 16000001/16000000)"),
        (dict(corpus__val_documents=2), "TOO LITTLE TEXT (2 documents, 240000 bytes)"),
        (dict(result__bytes=99_999), "TOO LITTLE TEXT (17 documents, 99999 bytes)"),
        (
            dict(interrupted=[{"steps": 7}]),
            "INTERRUPTED (training ended by a signal after 7 steps)",
        ),
        (
            dict(audit=[], budget__used=16_000_001),
            "NOT AUDITED (AUDIT=0); OVER BUDGET (total_bytes 16000001/16000000)",
        ),
    ],
)
def test_a_verdict_names_what_is_wrong_with_its_figure(values, line):
    assert golf.verdict_line(golf.verdict_of(changed(**values))) == line


def test_what_would_mislead_is_said():
    foreign = "not the challenge's validation text"
    (only,) = golf.warnings_of(RECORD)
    assert foreign in only
    record = changed(unigram_bpb=1.7)
    assert "(1.8000) is worse than the text's own token frequencies (1.7000)" in next(
        golf.warnings_of(record)
    )
    for row in record["result"]:
        row |= dict(bytes=10 * row["tokens"], val_bpb=1.0)
    first, second = golf.warnings_of(record)
    assert "10.00 bytes a target" in first and foreign in second
    for row in record["result"]:
        row |= dict(tokens=golf.CHALLENGE_TARGETS, bytes=150_000_000)
    assert not [*golf.warnings_of(record)]
