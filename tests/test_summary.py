"""tools/summary.py: statistics against SciPy's, errors, and a records folder that runs."""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

import train_gpt as golf
from tools.pack import packed
from tools.summary import t_test

ROOT = Path(__file__).resolve().parent.parent
SCORES = {1: 1.10, 2: 1.12, 3: 1.13}


def summary(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/summary.py"), *map(str, args)],
        text=True,
        capture_output=True,
    )


def config_of(env):
    """The settings of a run with these variables, as its record has them."""
    return json.loads(json.dumps(dataclasses.asdict(golf.load_config(env)[0])))


@pytest.fixture
def runs(trained, tmp_path):
    """Records of three seeds, made of one real run's, as if it had scored enough text."""
    code = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    paths = []
    for seed, bpb in SCORES.items():
        record = json.loads(json.dumps(trained.record))
        record["final"][-1] |= dict(seed=seed, val_bpb=bpb, val_loss=2 * bpb)
        record["config"] |= dict(seed=seed, run_id=f"run{seed}", github_id="a-tester")
        record["config"]["max_wallclock_seconds"] = 600.0
        record["verdict"], record["network_sha256"] = [{}], f"network of seed {seed}"
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
    assert done.stdout.count("  VALID\n") == 3 and not done.stderr


@pytest.mark.parametrize("values", [dict(trained=[]), dict(config__max_wallclock_seconds=0.0)])
def test_runs_that_did_not_train_under_a_cap_are_no_result(runs, tmp_path, values):
    """Two scores of loaded artifacts are no two seeds, whatever their records say."""
    record = json.loads(runs[0].read_text())
    for path in runs:
        record = json.loads(path.read_text())
        record["trained"] = values.get("trained", record["trained"])
        record["config"] |= {"max_wallclock_seconds": 0.0} if "trained" not in values else {}
        path.write_text(json.dumps(record))
    assert summary(*runs).returncode == 0
    for options in (["--baseline", "1.3"], ["--record", tmp_path / "x"]):
        done = summary(*runs, *options)
        assert done.returncode == 2 and "not trained under a cap" in done.stderr
        assert str(runs[0]) in done.stderr and "--untrained" in done.stderr
    done = summary(*runs, "--record", tmp_path / "x", "--untrained")
    assert done.returncode == 0, done.stderr
    assert "Not trained under a cap" in (tmp_path / "x/README.md").read_text()
    assert json.loads((tmp_path / "x/submission.json").read_text())["trained_under_cap"] is False


def test_one_network_is_not_two_seeds(runs):
    network = json.loads(runs[0].read_text())["network_sha256"]
    record = json.loads(runs[2].read_text()) | {"network_sha256": network}
    runs[2].write_text(json.dumps(record))
    done = summary(*runs, "--baseline", "1.3")
    assert done.returncode == 2 and f"{runs[2]}: the same network as {runs[0]}" in done.stderr


def test_warnings_of_the_runs_go_along(runs, tmp_path):
    record = json.loads(runs[1].read_text())
    record["warnings"].append("odd bytes")
    runs[1].write_text(json.dumps(record))
    done = summary(*runs, "--record", tmp_path / "record")
    text = (tmp_path / "record/README.md").read_text()
    assert done.stdout.count("warning: odd bytes\n") == 1 and "\nWarning: odd bytes.\n" in text
    elsewhere = "not the challenge's validation text: the score does not compare"
    assert done.stdout.count(elsewhere) == 1 and elsewhere in text  # of every run, told once


def test_a_one_sample_t_test_in_the_challenges_unit(runs):
    """Student's t with two degrees of freedom has a closed form."""

    def below(t):
        return 0.5 + t / (2 * math.sqrt(2 + t * t))

    mean = sum(SCORES.values()) / 3
    std = math.sqrt(sum((x - mean) ** 2 for x in SCORES.values()) / 2)
    for baseline, nats in ((1.15, None), (1.15, 0.0), (1.15, 0.04), (1.0, 0.0)):
        margin = ["--margin", nats] if nats is not None else []
        done = summary(*runs, "--baseline", baseline, *margin)
        nats = 0.005 if nats is None else nats
        t = (mean - (baseline - nats / 2)) / (std / math.sqrt(3))  # two nats a bit in the fixture
        line = done.stdout.splitlines()[-1]
        assert line.startswith(
            f"one-sided one-sample t-test, n = 3: is mean val_bpb 1.116667 lower than "
            f"{baseline:.6f} by more than {nats / 2:.6f} ({nats:g} nats per token)? "
            f"t = {t:.4g}, df = 2, p = {below(t):.3g}: "
        )


@pytest.mark.parametrize(
    "baseline, margin, words",
    [
        (
            "1.3,1.31,1.29",
            [],
            "n = 3 and 3: | df = 3.448, p = 9.21e-05: | the challenge's p < 0.01 is met",
        ),
        ("1.15", [], "the challenge's p < 0.01 is NOT met"),
        (
            "1.3",
            ["--margin", "0.1"],
            "(0.1 nats per token)? | the challenge asks for 0.005 nats at p < 0.01",
        ),
    ],
)
def test_the_line_says_whether_the_challenges_bar_is_met(runs, baseline, margin, words):
    line = summary(*runs, "--baseline", baseline, *margin).stdout.splitlines()[-1]
    assert all(word in line for word in words.split(" | ")), line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--baseline", "1.1,x"], "--baseline '1.1,x': expected val_bpb"),
        (["--baseline", "nan"], "--baseline 'nan': expected val_bpb"),
        (["--baseline", "1.1", "--margin", "-1"], "--margin -1.0: expected nats per token"),
    ],
)
def test_a_comparison_that_means_nothing_is_refused(runs, options, words):
    done = summary(*runs, *options)
    assert done.returncode == 2 and words in done.stderr and not done.stdout


def test_a_t_test_needs_scores_that_vary(runs):
    assert "at least two runs" in summary(runs[0], "--baseline", "1.2").stderr
    for path in runs:
        change(path, final__val_bpb=1.1)
    done = summary(*runs, "--baseline", "1.2")
    assert done.returncode == 2 and "do not vary" in done.stderr


BPB = st.integers(900_000, 1_400_000).map(lambda x: x / 1e6)


@given(
    st.lists(BPB, min_size=2, max_size=8),
    st.lists(BPB, min_size=1, max_size=8),
    st.sampled_from([0.0, 0.003, 0.2]),
)
def test_t_tests_are_scipys(values, baseline, margin):
    assume(len({*values}) > 1 and (len(baseline) == 1 or len({*baseline}) > 1))
    ours, shifted = t_test(values, baseline, margin), [x - margin for x in baseline]
    if len(baseline) == 1:
        theirs = stats.ttest_1samp(values, shifted[0], alternative="less")
    else:
        theirs = stats.ttest_ind(values, shifted, equal_var=False, alternative="less")
    assert ours.n == ([len(values)] if len(baseline) == 1 else [len(values), len(baseline)])
    assert ours.t == pytest.approx(theirs.statistic, rel=1e-6, abs=1e-9)
    assert ours.df == pytest.approx(theirs.df, rel=1e-9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-14)


def test_submission_of_all_seeds(runs, tmp_path):
    out = tmp_path / "submission.json"
    assert summary(*runs, "--submission", out, "--baseline", "1.2").returncode == 0
    made = json.loads(out.read_text())
    assert made["val_bpb"] == pytest.approx(sum(SCORES.values()) / 3)
    assert [s["seed"] for s in made["seeds"]] == [1, 2, 3] and 0 < made["p_value"] < 0.05
    assert made["normalized"] is True and made["author"] == "a tester"
    assert made["verdict"] == "VALID" and {s["verdict"] for s in made["seeds"]} == {"VALID"}
    assert made["test"] == "one-sided one-sample t-test" and made["n"] == [3]
    assert (made["margin_nats"], made["margin_bpb"]) == (0.005, pytest.approx(0.0025))
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
    text = (folder / "README.md").read_text()
    assert "1.11666667" in text and "Verdict: VALID.\n" in text and "Seeds: 1, 2, 3." in text
    started = subprocess.run(
        [sys.executable, "train_gpt.py", "--help"], cwd=folder, text=True, capture_output=True
    )
    assert started.returncode == 0 and "RECIPE=pr1094" in started.stdout
    assert "exists" in summary(*runs, "--record", folder).stderr


def test_runs_of_the_packed_program_have_both_programs_in_their_record(runs, tmp_path):
    program = packed((ROOT / "train_gpt.py").read_bytes())
    for path in runs:
        record = json.loads(path.read_text())
        record["facts"]["code_sha256"] = hashlib.sha256(program).hexdigest()
        path.write_text(json.dumps(record))
    done = summary(*runs, "--record", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x" / "train_gpt.py").read_bytes() == program
    readable = (tmp_path / "x" / "train_gpt_readable.py").read_bytes()
    assert readable == (ROOT / "train_gpt.py").read_bytes()


def test_a_record_says_how_it_compares(runs, tmp_path):
    done = summary(*runs, "--record", tmp_path / "x", "--baseline", "1.3,1.31,1.29")
    line = done.stdout.splitlines()[-1]
    assert line.startswith("one-sided Welch")
    assert f"O{line[1:]}.\n" in (tmp_path / "x/README.md").read_text()


def environment_of(command, tmp_path):
    """The settings' variables, and arguments, with which a shell starts a command's program."""
    for name in ("python", "torchrun"):
        program = tmp_path / name
        program.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            "print(json.dumps([dict(os.environ), sys.argv]))\n"
        )
        program.chmod(0o755)
    done = subprocess.run(
        command, shell=True, env={"PATH": str(tmp_path)}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    env, (program, *args) = json.loads(done.stdout)
    env = {name: text for name, text in env.items() if name in golf.VARIABLES}
    return env, [Path(program).name, *args]


DEMO = golf.SHARED | golf.DEMO


@pytest.mark.parametrize(
    "env",
    [
        dict(),
        dict(VOCAB_SIZE="512", TEXT_FILES="my notes/*.md, 'b' $c", MAX_WALLCLOCK_SECONDS="1e-3"),
        dict(RECIPE="pr1094", NGRAM_BUCKETS="512", NGRAM_ENT_CENTER="3.5", AUTHOR="O'Brien & co"),
        dict(SCALE="full", NGRAM_ENABLED="0", SWA_ENABLED="0", DATA_PATH="shards", LOGS_PATH="x"),
        # Variables that move others, which were set back to their defaults.
        dict(SMOKE="1", VAL_TOKENS=str(DEMO["val_tokens"])),
        dict(NUM_LAYERS="12", XSA_LAST_N=str(golf.Config.xsa_last_n), VE_LAYERS="9,10"),
    ],
    ids=str,
)
def test_the_command_makes_the_runs_again(runs, tmp_path, env):
    own = {}
    for seed, path in zip(SCORES, runs, strict=True):
        own[seed] = config_of({"SCALE": "demo"} | env | dict(SEED=str(seed), RUN_ID=f"r{seed}"))
        change(path, **{f"config__{name}": value for name, value in own[seed].items()})
    done = summary(*runs, "--record", tmp_path / "record")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "record/submission.json").read_text())
    (command,) = made["commands"]
    assert f"\n    {command}\n" in (tmp_path / "record/README.md").read_text()
    told = {"RECIPE": "golf", "SCALE": "demo"} | env
    assert made["variables"].keys() >= told.keys() and "SEED" not in made["variables"]
    for seed, config in own.items():
        set_to, program = environment_of(command.replace("<seed>", str(seed)), tmp_path)
        assert program == ["python", "train_gpt.py"] and not set_to.keys() & {"RUN_ID", "RESUME"}
        assert set_to.pop("RANKS") == "1"  # as the runs had
        again = config_of(set_to | {"RUN_ID": f"r{seed}"})
        assert again == config


def test_only_what_is_not_a_default_is_in_the_command(runs, tmp_path):
    for path, seed in zip(runs, SCORES, strict=True):
        config = config_of(dict(SCALE="demo", SEED=str(seed), NUM_LAYERS="12", AUDIT="0"))
        change(path, **{f"config__{name}": value for name, value in config.items()})
        change(path, config__audit="1" if seed == 2 else "0")
        change(path, facts__world_size=8, facts__launcher="torchrun")
    summary(*runs, "--submission", tmp_path / "x.json")
    made = json.loads((tmp_path / "x.json").read_text())
    layers = {"NUM_LAYERS", "XSA_LAST_N", "VE_LAYERS"}
    assert made["variables"].keys() == {"RECIPE", "SCALE"} | layers
    # More than the seed differs: a command for each.
    assert len(made["commands"]) == 3
    for seed, command in zip(SCORES, made["commands"], strict=True):
        set_to, program = environment_of(command, tmp_path)
        assert set_to["SEED"] == str(seed) and set_to.get("AUDIT") == (None if seed == 2 else "0")
        assert program[0] == "torchrun" and "--nproc_per_node=8" in program
    for path in runs:  # eight ranks that the run started itself
        change(path, facts__launcher="itself")
    summary(*runs, "--submission", tmp_path / "x.json", "--force")
    for command in json.loads((tmp_path / "x.json").read_text())["commands"]:
        assert command.endswith(" python train_gpt.py")


def test_of_other_code_every_setting_is_told(runs, tmp_path):
    """Its defaults are not known."""
    for path in runs:
        change(path, facts__code_sha256="0" * 64, config__of_another_day=1)
    assert summary(*runs, "--submission", tmp_path / "x.json").returncode == 0
    made = json.loads((tmp_path / "x.json").read_text())
    config = json.loads(runs[0].read_text())["config"]
    told = {name.upper() for name in config} - {"SEED", "RUN_ID", "RESUME"}
    assert made["variables"].keys() == told and made["variables"]["OF_ANOTHER_DAY"] == "1"


@pytest.mark.parametrize("options", [["--submission"], ["--record"], ["--baseline", "1.3"]])
def test_runs_that_are_not_valid_are_refused(runs, trained, tmp_path, options):
    """As the run itself says it: the tiny one has too little text."""
    verdict = trained.stdout.splitlines()[-2].removeprefix("verdict ")
    assert verdict.startswith("TOO LITTLE TEXT")
    record = json.loads(runs[1].read_text())
    runs[1].write_text(json.dumps(record | {"verdict": trained.record["verdict"]}))
    options = options if len(options) == 2 else [*options, tmp_path / "x"]
    done = summary(*runs, *options)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert f"not VALID: {verdict} in {runs[1]} (--any-verdict " in done.stderr
    assert not (tmp_path / "x").exists()
    assert f"  {verdict}\n" in summary(*runs).stdout
    done = summary(*runs, *options, "--any-verdict")
    assert done.returncode == 0 and f"  {verdict}\n" in done.stdout


def test_a_record_of_any_verdict_says_so(runs, tmp_path):
    faults = {"NOT AUDITED": "AUDIT=0", "OVER BUDGET": "total_bytes 2/1"}
    for path, verdict in zip(runs, ([faults], [faults], None), strict=True):
        record = json.loads(path.read_text()) | {"verdict": verdict}
        path.write_text(json.dumps(record))
    told = (
        "NOT AUDITED (AUDIT=0); OVER BUDGET (total_bytes 2/1) of seed 1, 2 and "
        "NO VERDICT (the run's train_gpt.py gave none) of seed 3"
    )
    assert summary(*runs, "--record", tmp_path / "x").returncode == 2
    assert summary(*runs, "--record", tmp_path / "x", "--any-verdict").returncode == 0
    assert f"**Not a valid score**: {told}.\n" in (tmp_path / "x/README.md").read_text()
    assert json.loads((tmp_path / "x/submission.json").read_text())["verdict"] == told


@pytest.mark.parametrize("blank", [["author"], ["author", "github_id"], []], ids=str)
def test_a_record_without_an_author_is_warned_of(runs, tmp_path, blank):
    for path in runs:
        change(path, **{f"config__{key}": " " for key in blank})
    done = summary(*runs, "--record", tmp_path / "x")
    assert done.returncode == 0 and (tmp_path / "x").exists()
    names = " and ".join(key.upper() for key in blank)
    assert done.stderr.count("\n") == bool(blank)
    assert not blank or f"by hand, and set {names} in the next runs" in done.stderr


@pytest.mark.parametrize(
    "change_to, words",
    [
        (dict(config__recipe="pr889"), ["RECIPE is golf", "pr889 in"]),
        (dict(config__scale="full"), ["SCALE is demo", "full in"]),
        (dict(config__eval_stride=32), ["EVAL_STRIDE is 16", "32 in"]),
        (
            dict(config__max_wallclock_seconds=1200.0),
            ["MAX_WALLCLOCK_SECONDS is 600.0", "1200.0 in"],
        ),
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
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2 and not done.stdout
    name = words[0].split(" is")[0]
    assert done.stderr.startswith(f"error: not one configuration: {name} differs (--mixed shows ")
    assert all(word in done.stderr for word in words) and done.stderr.count(" is ") == 1
    assert f"in {runs[0]}, {runs[1]} and" in done.stderr and f"in {runs[2]}" in done.stderr
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()
    assert summary(*runs, "--mixed").returncode == 0
    assert summary(*runs, "--mixed", "--record", tmp_path / "x").returncode == 2


def test_everything_that_differs_is_named_at_once(runs):
    change(runs[1], config__eval_stride=8, config__matrix_lr=0.05)
    change(runs[2], config__eval_stride=32)
    done = summary(*runs)
    a, b, c = runs
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: not one configuration: EVAL_STRIDE, MATRIX_LR differ "
        "(--mixed shows the table all the same)",
        f"  EVAL_STRIDE is 16 in {a} and 8 in {b} and 32 in {c}",
        f"  MATRIX_LR is 0.025 in {a}, {c} and 0.05 in {b}",
    ]


def test_the_validation_tokens_are_compared_where_they_are_known(runs):
    for path in runs:
        change(path, corpus__val_sha256=None)
    change(runs[0], corpus__val_sha256="x")
    assert summary(*runs).returncode == 0
    change(runs[1], corpus__val_sha256="y")
    done = summary(*runs)
    assert done.returncode == 2
    assert f"val_sha256 is x in {runs[0]} and y in {runs[1]}\n" in done.stderr


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
        ('{"config": {}, "facts": {}, "final": [1]}', "a run's record without config.recipe, "),
        ('{"config": {}, "facts": {}, "final": 1}', "a run's record without config.recipe, "),
    ],
)
def test_files_that_end_it(runs, content, word):
    if content is None:
        runs[1].unlink()
    else:
        runs[1].write_text(content)
    done = summary(*runs)
    assert done.returncode == 2 and word in done.stderr and runs[1].name in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_a_record_with_a_gap_is_not_left_out_unseen(runs):
    change(runs[1], final__total_bytes=None)
    done = summary(*runs)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {runs[1]}: a run's record without final.total_bytes;")


def test_what_is_no_run_is_skipped(runs, trained, tmp_path):
    """As where a shell's glob, logs/s*.json, finds more than records."""
    (given,) = trained.logs.glob("*.submission.json")
    unfinished = tmp_path / "unfinished.json"
    record = json.loads(runs[0].read_text()) | {"final": []}
    unfinished.write_text(json.dumps(record))
    other = tmp_path / "list.json"
    other.write_text("[]")
    done = summary(runs[0], given, runs[1], unfinished, other, runs[2])
    assert done.returncode == 0 and "over 3 runs" in done.stdout
    assert done.stderr.splitlines() == [
        f"skipped {given}: not a run's record",
        f"skipped {unfinished}: an unfinished run, without a score",
        f"skipped {other}: not a run's record",
    ]
    done = summary(given, unfinished)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith(
        "error: no finished run: give logs/<run_id>.json"
    )


def test_a_record_of_other_code_or_without_its_log_is_refused(runs, tmp_path):
    runs[1].with_suffix(".txt").unlink()
    assert "log is missing" in summary(*runs, "--record", tmp_path / "x").stderr
    for path in runs:
        change(path, facts__code_sha256="0" * 64)
    done = summary(*runs, "--record", tmp_path / "x")
    assert done.returncode == 2 and "another train_gpt.py" in done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
