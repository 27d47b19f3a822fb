"""A train_gpt.py that unpacks itself: the same run in fewer bytes."""

import os
import subprocess
import sys

import pytest

import train_gpt as golf
from conftest import COMPILED, ROOT
from tools import pack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Path of the packed file."""
    folder = tmp_path_factory.mktemp("packed")
    command = [sys.executable, str(ROOT / "tools" / "pack.py"), str(folder)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0 and " bytes, from " in done.stdout, done.stderr
    return folder / "train_gpt.py"


@pytest.fixture(scope="module")
def start(program, workplace, tmp_path_factory):
    """start(file, **variables) -> (CompletedProcess, folder of its logs), by a fresh Python."""

    def run(file, *launcher, **variables):
        logs = tmp_path_factory.mktemp("logs")
        env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LOGS_PATH": str(logs)}
        env |= COMPILED | workplace[1] | dict(ITERATIONS="2", RUN_ID="r") | variables
        command = [sys.executable, *launcher, str(file)]
        done = subprocess.run(command, cwd=logs, env=env, text=True, capture_output=True)
        return done, logs

    return run


def test_a_packed_file_is_small_and_always_the_same(program):
    source = (ROOT / "train_gpt.py").read_bytes()
    assert program.read_bytes() == pack.packed(source)
    assert program.stat().st_size < 0.4 * len(source)
    program.read_text("ascii")


def test_a_packed_run_trains_exports_scores_and_audits_on_its_own_ranks(program, start):
    own = dict(RANKS="2", OMP_NUM_THREADS="2", AUDIT="strict", VAL_TOKENS="1024")
    (packed, a), (readable, b) = (start(f, **own) for f in (program, ROOT / "train_gpt.py"))
    assert packed.returncode == 0, packed.stderr
    for name in ("r.safetensors", "r.int6.ptz"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    told = [done.stdout.splitlines()[-1].split("total_bytes:") for done in (packed, readable)]
    assert told[0][0] == told[1][0] and packed.stdout.count(" PASS ") >= 5
    saved = (ROOT / "train_gpt.py").stat().st_size - program.stat().st_size
    assert int(told[1][1].split()[0]) - int(told[0][1].split()[0]) == saved


def test_an_artifact_takes_the_bytes_that_packing_won(program, start):
    budget = program.stat().st_size + 60_000
    own = dict(ARTIFACT_BYTES=str(budget), VAL_TOKENS="256", NGRAM_ENABLED="0", GPTQ_SECONDS="0")
    done, logs = start(program, **own)
    assert done.returncode == 0 and "OVER BUDGET" not in done.stdout, done.stderr
    assert (logs / "r.int6.ptz").stat().st_size <= 60_000
    readable, _ = start(ROOT / "train_gpt.py", **own)
    assert "OVER BUDGET" in readable.stdout + readable.stderr


def test_torchrun_starts_a_packed_file_and_a_fault_has_its_lines(program, start):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done, _ = start(program, *launcher, VAL_TOKENS="256", NGRAM_ENABLED="0")
    assert done.returncode == 0 and "final val_loss" in done.stdout, done.stderr
    done, _ = start(program, NUM_HEADS="5", DEBUG="1")
    assert "raise RunError(" in done.stderr and "train_gpt.py (unpacked)" in done.stderr


def test_bad_input_is_one_line(tmp_path):
    for args, status, words in [
        ([str(ROOT)], 2, "is the readable file itself"),
        ([str(tmp_path / "file" / "x")], 2, "cannot write"),
        ([], 2, ""),
        (["--help"], 0, ""),
    ]:
        (tmp_path / "file").write_text("")
        command = [sys.executable, str(ROOT / "tools" / "pack.py"), *args]
        done = subprocess.run(command, text=True, capture_output=True)
        assert done.returncode == status and words in done.stderr
        assert len(done.stderr.splitlines()) == bool(words)
    assert golf.code_bytes() == (ROOT / "train_gpt.py").stat().st_size
