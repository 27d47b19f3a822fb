"""The verdict and the warnings: one line of what a score is worth."""

import copy
import math
import os
import subprocess

import pytest

import train_gpt as golf

RECORD = {
    "final": [{"scoring": "calibrated", "normalized": "yes", "val_bpb": 1.2}],
    "corpus": {"val_documents": 17, "val_distinct_share": 1.0, "val_in_train_share": 0.01},
    "config": {
        "artifact_bytes": 16_000_000,
        "max_wallclock_seconds": 600.0,
        "max_eval_seconds": 600.0,
        "load_artifact": "",
    },
    "trained": [{"steps": 7000}],
    "result": [
        {"scoring": "neural", "val_bpb": 1.9, "bytes": 240_000, "tokens": 100_000},
        {"scoring": "calibrated", "val_bpb": 1.2, "bytes": 240_000, "tokens": 100_000, "mass": 1.0},
        {"scoring": "neural", "val_bpb": 1.8, "bytes": 240_000, "tokens": 100_000, "mass": 1.0},
        {
            "scoring": "backoff_hashed",
            "val_bpb": 1.2,
            "bytes": 240_000,
            "tokens": 100_000,
            "mass": 248.02,
        },
    ],
    "audit": [
        {"name": name, "verdict": "PASS"}
        for name in ("causal", "normalized", "single_pass", "bytes", "decodable")
    ],
    "budget": [
        {"name": "total_bytes", "used": 15_999_999, "limit": 16_000_000},
        {"name": "eval_seconds", "used": 599.9, "limit": 600.0},
    ],
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
        (dict(audit=RECORD["audit"][:3]), "NOT AUDITED (bytes, decodable)"),
        (dict(budget=[]), "OVER BUDGET (not known)"),
        (dict(final__normalized="maybe"), "NOT A DISTRIBUTION (mass 1)"),
        (
            dict(corpus__val_distinct_share=math.nan),
            "TOO LITTLE TEXT (0 bytes that do not repeat others, of 100000)",
        ),
        (dict(final__val_bpb=math.nan), "NO SCORE (val_bpb nan)"),
        (dict(final__val_bpb=1.1), "NO SCORE (val_bpb 1.1)"),
        (dict(budget__used=16_000_001), "OVER BUDGET (total_bytes 16000001/16000000)"),
        (dict(budget__used=16_000_000.0004), "OVER BUDGET (total_bytes 16000000.000/16000000)"),
        (dict(budget__used=math.nan), "OVER BUDGET (total_bytes nan/16000000)"),
        (dict(corpus__val_documents=1), "VALID"),  # one long book
        (
            dict(result__bytes=99_999),
            "TOO LITTLE TEXT (99999 bytes that do not repeat others, of 100000)",
        ),
        (
            dict(corpus__val_distinct_share=0.25),
            "TOO LITTLE TEXT (60000 bytes that do not repeat others, of 100000)",
        ),
        (
            dict(corpus__val_in_train_share=0.987),
            "NOT HELD OUT (98.7% of the validation text is in the training text)",
        ),
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
    assert "10.00 bytes per target" in first and foreign in second
    for row in record["result"]:
        row |= dict(tokens=62_021_632, bytes=151_080_362)
    record["corpus"]["val_documents"] = 50_000
    assert not [*golf.warnings_of(record)]


@pytest.mark.parametrize(
    "tokens, size, documents, known",
    [
        (62_021_632, 151_080_362, 50_000, True),
        (40_540_160, 151_078_200, 50_000, True),  # in 8,192 pieces
        (45_508_608, 151_054_500, 50_000, True),  # in 4,096
        (62_021_632, 150_000_000, 50_000, False),  # another text cut to as many targets
        (62_021_632, 151_080_362, 49_998, True),  # the last ones are cut off
        (62_021_632, 151_080_362, 49_000, False),
    ],
)
def test_the_challenges_text_is_known_by_bytes_and_documents(tokens, size, documents, known):
    record = changed(corpus__val_documents=documents)
    for row in record["result"]:
        row |= dict(tokens=tokens, bytes=size)
    foreign = any("not the challenge's validation" in line for line in golf.warnings_of(record))
    assert foreign != known


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(config__artifact_bytes=32_000_000), "ARTIFACT_BYTES=32000000 is not"),
        (dict(config__max_wallclock_seconds=36000.0), "MAX_WALLCLOCK_SECONDS=36000 is not"),
        (dict(config__max_wallclock_seconds=0.0), "MAX_WALLCLOCK_SECONDS=0 is not"),
        (dict(config__max_eval_seconds=601.0), "MAX_EVAL_SECONDS=601 is not"),
        (dict(trained=[], config__load_artifact="x"), "text and seed the artifact were made"),
        (dict(trained=[]), "text and seed the weights were made"),
        (dict(corpus__val_in_train_share=0.05), "5.0% of the validation text, in runs of 64"),
    ],
)
def test_what_a_budget_or_a_split_does_not_show_is_said(values, words):
    lines = [*golf.warnings_of(changed(**values))]
    assert sum(words in line for line in lines) == 1 and len(lines) == 2


def test_the_revision_is_this_files_or_unknown(tmp_path, monkeypatch):
    """A lone copy inside of somebody else's repository has no revision, and asking for it starts
    nothing that the repository's settings name."""
    file, ran = tmp_path / "train_gpt.py", tmp_path / "ran"
    program = tmp_path / "monitor.sh"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)

    def git(*words):
        own = ["-c", "user.name=x", "-c", "user.email=x", "-c", "core.fsmonitor=false"]
        done = subprocess.run(
            ["git", *own, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    monkeypatch.setattr(golf, "__file__", str(file))
    file.write_text("print()\n")
    assert golf.revision() == "unknown"
    git("init", "-q")
    for name in ("core.fsmonitor", "core.hooksPath", "filter.x.clean", "core.pager"):
        git("config", name, str(program))
    (tmp_path / ".gitattributes").write_text("*.py filter=x\n")
    (tmp_path / "other").write_text("theirs")
    git("add", "other")
    git("commit", "-q", "-m", "theirs")
    assert golf.revision() == "unknown"
    git("-c", "filter.x.clean=cat", "add", "train_gpt.py")
    git("-c", "filter.x.clean=cat", "commit", "-q", "-m", "ours")
    ran.unlink(missing_ok=True)
    commit = git("rev-parse", "HEAD")
    assert golf.revision() == commit
    file.write_text("print(1)\n")
    assert golf.revision() == commit + "+"
    monkeypatch.setenv("GIT_DIR", os.fspath(tmp_path / "nowhere"))
    assert golf.revision() == commit + "+"
    assert not ran.exists()
