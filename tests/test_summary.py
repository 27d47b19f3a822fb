"""tools/summary.py: statistics against hand-made ones, errors, and a records folder that runs."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCORES = {1: 1.10, 2: 1.12, 3: 1.13}


def summary(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/summary.py"), *map(str, args)],
        text=True,
        capture_output=True,
    )


@pytest.fixture
def runs(trained, tmp_path):
    """Records of three seeds, made of one real run's."""
    code = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    paths = []
    for seed, bpb in SCORES.items():
        record = json.loads(json.dumps(trained.record))
        record["final"][-1] |= dict(seed=seed, val_bpb=bpb, val_loss=2 * bpb)
        record["facts"]["code_sha256"] = code
        paths.append(tmp_path / f"run{seed}.json")
        paths[-1].write_text(json.dumps(record))
        paths[-1].with_suffix(".txt").write_text(f"log of seed {seed}\n")
    return paths


def change(path, **values):
    """Set entries of a record, given as section__key=value."""
    record = json.loads(path.read_text())
    for name, value in values.items():
        section, key = name.split("__")
        part = record[section]
        last = part[-1] if isinstance(part, list) else part
        last[key] = value
    path.write_text(json.dumps(record))


def test_table_and_statistics(runs):
    done = summary(*runs)
    assert done.returncode == 0, done.stderr
    mean = sum(SCORES.values()) / 3
    std = math.sqrt(sum((x - mean) ** 2 for x in SCORES.values()) / 2)
    assert f"val_bpb mean {mean:.8f} std {std:.8f} over 3 runs" in done.stdout
    for seed, bpb in SCORES.items():
        assert f"run{seed}" in done.stdout and f"{bpb:.8f}" in done.stdout
    assert done.stdout.count("calibrated") == 3 and done.stdout.count(" PASS ") == 3


def test_t_tests(runs):
    """Student's t with two degrees of freedom has a closed form."""

    def below(t):
        return 0.5 + t / (2 * math.sqrt(2 + t * t))

    mean = sum(SCORES.values()) / 3
    std = math.sqrt(sum((x - mean) ** 2 for x in SCORES.values()) / 2)
    for baseline, margin in ((1.15, 0.0), (1.15, 0.02), (1.0, 0.0)):
        done = summary(*runs, "--baseline", baseline, "--margin", margin)
        p = below((mean - (baseline - margin)) / (std / math.sqrt(3)))
        assert float(done.stdout.split("p = ")[1]) == pytest.approx(p, rel=1e-2)
    many = summary(*runs, "--baseline", "1.3,1.31,1.29")
    assert float(many.stdout.split("p = ")[1]) < 0.01
    assert summary(runs[0], "--baseline", "1.2").returncode == 2


def test_submission_of_all_seeds(runs, tmp_path):
    out = tmp_path / "submission.json"
    assert summary(*runs, "--submission", out, "--baseline", "1.2").returncode == 0
    made = json.loads(out.read_text())
    assert made["val_bpb"] == pytest.approx(sum(SCORES.values()) / 3)
    assert [s["seed"] for s in made["seeds"]] == [1, 2, 3] and 0 < made["p_value"] < 0.05
    assert made["normalized"] is True and made["author"] == "a tester"
    before = out.read_text()
    again = summary(*runs, "--submission", out)
    assert again.returncode == 2 and "exists" in again.stderr and out.read_text() == before
    assert summary(*runs, "--submission", out, "--force").returncode == 0


def test_a_records_folder_runs_from_there(runs, tmp_path):
    folder = tmp_path / "records" / "mine"
    done = summary(*runs, "--record", folder)
    assert done.returncode == 0, done.stderr
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names >= {
        "README.md",
        "submission.json",
        "train_gpt.py",
        "requirements.txt",
        "train_seed1.log",
        "train_seed2.log",
        "train_seed3.log",
    }
    assert (folder / "train_seed2.log").read_text() == "log of seed 2\n"
    assert "1.11666667" in (folder / "README.md").read_text()
    started = subprocess.run(
        [sys.executable, "train_gpt.py", "--help"], cwd=folder, text=True, capture_output=True
    )
    assert started.returncode == 0 and "RECIPE=pr1094" in started.stdout
    assert "exists" in summary(*runs, "--record", folder).stderr


@pytest.mark.parametrize(
    "change_to, words",
    [
        (dict(config__recipe="pr889"), ["RECIPE is golf", "pr889 in"]),
        (dict(config__scale="full"), ["SCALE is demo", "full in"]),
        (dict(config__eval_stride=32), ["EVAL_STRIDE is 16", "32 in"]),
        (dict(config__max_wallclock_seconds=1200.0), ["MAX_WALLCLOCK_SECONDS is 0.0", "1200.0 in"]),
        (dict(config__matrix_lr=0.05), ["MATRIX_LR is 0.025", "0.05 in"]),
        (dict(final__scoring="neural"), ["scoring is calibrated", "neural in"]),
        (dict(facts__code_sha256="x"), ["code_sha256 is", "x in"]),
        (dict(facts__world_size=8), ["world_size is 1", "8 in"]),
        (dict(facts__gpu="a GPU"), ["gpu is none", "a GPU in"]),
        (dict(corpus__vocabulary_sha256="x"), ["vocabulary_sha256 is", "x in"]),
        (dict(corpus__val_targets=7), ["val_targets is 4096", "7 in"]),
        (dict(corpus__train_tokens=7), ["train_tokens is", "7 in"]),
    ],
    ids=str,
)
def test_runs_that_are_not_alike(runs, tmp_path, change_to, words):
    change(runs[2], **change_to)
    done = summary(*runs, "--record", tmp_path / "x", "--submission", tmp_path / "y")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert all(word in done.stderr for word in words) and done.stderr.count(" is ") == 1
    assert f"in {runs[0]}, {runs[1]} and" in done.stderr and f"in {runs[2]}" in done.stderr
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()
    assert summary(*runs, "--mixed").returncode == 0
    assert summary(*runs, "--mixed", "--record", tmp_path / "x").returncode == 2


def test_everything_that_differs_is_named_at_once(runs):
    change(runs[1], config__eval_stride=8, config__matrix_lr=0.05)
    change(runs[2], config__eval_stride=32)
    done = summary(*runs)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"EVAL_STRIDE is 16 in {runs[0]} and 8 in {runs[1]} and 32 in {runs[2]};" in done.stderr
    assert f"MATRIX_LR is 0.025 in {runs[0]}, {runs[2]} and 0.05 in {runs[1]} " in done.stderr


def test_the_validation_tokens_are_compared_where_they_are_known(runs):
    for path in runs:
        change(path, corpus__val_sha256=None)
    change(runs[0], corpus__val_sha256="x")
    assert summary(*runs).returncode == 0
    change(runs[1], corpus__val_sha256="y")
    done = summary(*runs)
    assert done.returncode == 2
    assert f"val_sha256 is x in {runs[0]} and y in {runs[1]} " in done.stderr


def test_what_seeds_need_not_share(runs):
    change(
        runs[2],
        config__seed=3,
        config__run_id="another",
        config__author="another",
        config__github_id="another",
        config__logs_path="elsewhere",
        config__data_path="elsewhere",
        config__tokenizer_path="elsewhere",
        config__prepared_path="elsewhere",
        config__load_artifact="elsewhere",
        config__train_log_every=7,
        config__checkpoint_seconds=60.0,
        config__resume=True,
        config__debug=True,
        corpus__train_tokens=0,
    )
    done = summary(*runs)
    assert done.returncode == 0, done.stderr


def test_a_seed_counts_once(runs):
    change(runs[2], final__seed=1)
    done = summary(*runs)
    assert done.returncode == 2 and "seed 1 appears 2 times" in done.stderr


@pytest.mark.parametrize(
    "content, word",
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "finished run"),
        ("{}", "finished run"),
        ('{"final": []}', "finished run"),
    ],
)
def test_files_that_are_no_records(runs, content, word):
    if content is None:
        runs[1].unlink()
    else:
        runs[1].write_text(content)
    done = summary(*runs)
    assert done.returncode == 2 and word in done.stderr and runs[1].name in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_a_record_of_other_code_or_without_its_log_is_refused(runs, tmp_path):
    runs[1].with_suffix(".txt").unlink()
    assert "log is missing" in summary(*runs, "--record", tmp_path / "x").stderr
    for path in runs:
        change(path, facts__code_sha256="0" * 64)
    done = summary(*runs, "--record", tmp_path / "x")
    assert done.returncode == 2 and "another train_gpt.py" in done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
