"""bench/gpu_day.py: every stage at tiny size, resuming, and a stage that fails."""

import json
import lzma
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

LETTERS = ["a", "b", "c1", "c2", "d1", "d2", "f1", "f2", "f3", "f4", "g1", "g2", "e"]


@pytest.fixture(scope="module")
def day(workplace, tmp_path_factory):
    """day(*arguments, **variables) -> a finished call on the tests' text; day.out: its folder."""
    base = workplace[1]
    paths = {key: base[key] for key in ("TEXT_FILES", "PREPARED_PATH")}
    paths |= {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}

    def call(*args, **variables):
        out = variables.pop("out", call.out)
        command = [sys.executable, str(ROOT / "bench/gpu_day.py"), "--out", str(out), *args]
        return subprocess.run(
            command, cwd=workplace[0], env=paths | variables, text=True, capture_output=True
        )

    call.out = tmp_path_factory.mktemp("day")
    return call


@pytest.fixture(scope="module")
def whole(day):
    """The call that ran every stage."""
    return day("--small")


def result(folder, letter):
    """What a stage's JSON says."""
    return json.loads((folder / f"{letter}.json").read_text())


def test_the_list_names_every_stage_and_its_minutes(day, tmp_path):
    done = day("--list", out=tmp_path / "nothing")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [*LETTERS, "together"]
    assert all("min" in row for row in rows) and not (tmp_path / "nothing").exists()


def test_every_stage_runs_and_leaves_its_figures(day, whole):
    assert whole.returncode == 0, whole.stdout + whole.stderr
    results = {letter: result(day.out, letter) for letter in LETTERS}
    assert {letter: r["status"] for letter, r in results.items()} == dict.fromkeys(LETTERS, "ok")
    for letter, found in results.items():
        assert found["figures"] and found["small"] and found["device"]["torch"]
        assert (day.out / f"{letter}.log").read_text().count("$ ") == len(found["commands"])
        assert f"\n{letter} {found['name']}" in whole.stdout
    start = results["a"]["figures"]["golf"]
    assert start["steps"] == 6 and start["attention"] and start["audit"]["decodable"][:4] == "PASS"
    assert start["final"]["scoring"] == "calibrated" and start["peak_memory_bytes"] > 0
    assert results["b"]["figures"]["training_step_demo_cpu"]["ours_ms"] > 0
    assert results["c1"]["figures"]["neural_pass_demo_cpu"]["ratio"] > 0
    strides = results["c2"]["figures"]
    assert sorted(strides) == ["stride128", "stride256", "stride512", "stride64"]
    assert any(name.startswith("cpu 20,000") for name in results["d1"]["figures"])
    scored = results["f4"]["figures"]["pr1094"]
    gain = scored["bpb"]["neural"] - scored["bpb"]["calibrated"]
    assert scored["mixer_gain_bpb"] == pytest.approx(gain)
    assert any("GPTQ" in name for name in results["e"]["figures"])


def test_the_long_stream_is_made_of_training_tokens(day, whole):
    found = result(day.out, "d2")
    assert found["figures"]["long"]["targets"] == 8192
    assert found["figures"]["long"]["neural_pass_seconds"] > 0
    assert found["commands"][0]["environment"]["DATA_PATH"] == str(day.out / "d2" / "data")
    assert not list((day.out / "d2").rglob("neural-*"))


def test_what_has_finished_is_skipped(day, whole):
    before = (day.out / "a.json").read_bytes()
    again = day("--small")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("skipped") == len(LETTERS)
    assert (day.out / "a.json").read_bytes() == before
    assert again.stdout.count(" ok ") == len(LETTERS)
    assert " ok " not in day("--list").stdout  # of full size there is nothing


def test_a_stage_that_fails_says_why_and_the_others_run(day, whole, tmp_path):
    kept = tmp_path / "day"
    shutil.copytree(day.out, kept)
    done = day("--small", "--force", "--only", "f3,f1,d1", out=kept, SEED="-1")
    assert done.returncode == 1
    failed = result(kept, "f1")
    assert failed["status"] == "failed" and failed["error"].startswith("error: SEED='-1'")
    assert failed["error"] in (kept / "f1.log").read_text() and failed["error"] in done.stdout
    assert failed["ambient"]["SEED"] == "-1" and failed["commands"][0]["exit_status"] == 2
    assert "which stage f1 leaves" in result(kept, "f3")["error"]
    assert result(kept, "d1")["status"] == "ok"


def test_a_stage_that_takes_too_long_is_killed(day, tmp_path):
    done = day("--small", "--only", "f1", "--limit", "0.5", out=tmp_path)
    found = result(tmp_path, "f1")
    assert done.returncode == 1 and found["error"].startswith("golf: killed after")
    assert found["commands"][0]["exit_status"] is None


def test_packed_shards_are_unpacked_once(day, whole, tmp_path):
    record = json.loads((day.out / "a/golf/golf.json").read_text())
    folder = os.path.dirname(record["corpus"]["tokenizer"])
    shutil.copy(f"{folder}/tokenizer.model", tmp_path)
    for split in ("train", "val"):
        name = f"text_{split}_000000.bin"
        with open(f"{folder}/{name}", "rb") as shard:
            (tmp_path / f"{name}.xz").write_bytes(lzma.compress(shard.read()))
    out = tmp_path / "out"
    args = ("--small", "--only", "f1", "--data", str(tmp_path))
    done = day(*args, out=out, TEXT_FILES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("unpacking") == 2
    env = result(out, "f1")["commands"][0]["environment"]
    assert env["DATA_PATH"] == str(out / "data") and env["VOCAB_SIZE"] == "512"
    assert "unpacking" not in day(*args, out=out).stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (("--only", "z"), "--only z: no such stage"),
        (("--data", "/nowhere"), "--data /nowhere: no *_train_*.bin"),
    ],
)
def test_bad_input_is_one_line(day, tmp_path, args, words):
    done = day(*args, out=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
