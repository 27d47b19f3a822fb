"""The ranks that a run starts by itself, and what it compiles unasked."""

import copy
import os
import signal
import subprocess
import sys

import pytest

import train_gpt as golf

CORES = {"OMP_NUM_THREADS": "2"}


@pytest.fixture
def unlaunched(monkeypatch):
    """A process that torchrun has not launched."""
    monkeypatch.delenv("RANK", raising=False)


def ranks(cores=8, **values):
    cfg = golf.replace(golf.load_config({"SCALE": "demo", "DEVICE": "cpu"})[0], **values)
    return golf.own_ranks(cfg, cores)


@pytest.mark.parametrize(
    "cores, gigabytes, expected",
    [(1, 64, 1), (2, 64, 2), (3, 64, 2), (6, 64, 4), (16, 64, 8), (16, 4, 2), (2, 1, 1)],
)
def test_a_rank_a_core_that_divides_a_step_and_fits_into_memory(
    unlaunched, monkeypatch, cores, gigabytes, expected
):
    """A step of the demo has 16 sequences."""
    monkeypatch.setattr(golf, "memory_bytes", lambda: gigabytes * 2**30)
    assert ranks(cores) == expected


def test_one_rank_where_more_would_change_something(unlaunched, monkeypatch):
    assert ranks(sample="Once") == 1
    assert ranks(ngram_history="cold") == 1  # pr889's score depends on the number of ranks
    assert ranks(scale="full") == 1  # whose memory nobody knows
    assert ranks(ranks=4, scale="full") == 4  # asked for
    with pytest.raises(golf.RunError, match="do not divide among 3 ranks"):
        ranks(ranks=3)
    assert ranks(ranks=3, load_artifact="x") == 3
    for command in (["python"], ["python", "-"]):  # a program typed in cannot be started again
        monkeypatch.setattr(sys, "orig_argv", command)
        assert ranks() == 1
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "win32")
    assert ranks() == 1
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "0")
    assert ranks() == 1 and ranks(ranks=4) == 1  # torchrun's are what was asked for


def test_memory_and_cores_are_the_machines_or_the_containers(monkeypatch):
    files = {}
    monkeypatch.setattr(golf, "cgroup_numbers", lambda name: files.get(name, []))
    monkeypatch.setattr(golf.torch, "get_num_threads", lambda: 8)
    assert 2**28 < golf.memory_bytes() < 2**60 and golf.count_cores() == 8
    for share, cores in ((0.5, 1), (2.5, 2), (16.0, 8)):
        files |= {"memory.max": [2.0**28], "cpu.max": [share * 100_000, 100_000.0]}
        assert golf.memory_bytes() == 2**28 and golf.count_cores() == cores
    files.clear()
    monkeypatch.delattr(os, "sysconf")
    assert golf.memory_bytes() == float("inf")


@pytest.mark.parametrize(
    "text, expected", [("max\n", []), ("max 100000\n", [1e5]), ("200000 100000\n", [2e5, 1e5])]
)
def test_a_containers_limits_are_read(monkeypatch, text, expected):
    monkeypatch.setattr(golf.Path, "read_text", lambda path: text)
    assert golf.cgroup_numbers("cpu.max") == expected


def test_two_ranks_of_its_own_score_as_one(job, trained):
    """The same bits, audited; the log says what was chosen, and nothing is left behind."""
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    one = job(LOAD_ARTIFACT=artifact, AUDIT="strict")
    two = job(LOAD_ARTIFACT=artifact, AUDIT="strict", **CORES)
    assert one.returncode == two.returncode == 0, two.stderr
    assert "computing with RANKS=1, 1 threads each, on 1 cores" in one.stdout
    assert "computing with RANKS=2, 1 threads each, on 2 cores" in two.stdout
    assert two.record["facts"]["world_size"] == 2
    assert two.final.split("total_bytes")[0] == one.final.split("total_bytes")[0]
    assert two.stdout.count(" PASS ") == one.stdout.count(" PASS ") and not two.stderr


def test_training_on_its_own_ranks_is_torchruns(job, tmp_path):
    own = job(LOGS_PATH=str(tmp_path / "own"), **CORES)
    launched = job(2, LOGS_PATH=str(tmp_path / "launched"))
    assert own.returncode == launched.returncode == 0, own.stderr
    weights = [tmp_path / name / "golf-demo-1337.safetensors" for name in ("own", "launched")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not [*tmp_path.glob("*/*.png")]  # PICTURE=0


def wait_for(process, beginning):
    """What a run says until a line begins so."""
    said = ""
    for line in iter(process.stdout.readline, ""):
        said += line
        if line.startswith(beginning):
            return said
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_first(job, trained, number):
    """The others hold the same pipes: reading ends when all of them have ended, long before an
    evaluation in strides of one target would."""
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    process = job(wait=False, LOAD_ARTIFACT=artifact, VAL_TOKENS="0", EVAL_STRIDE="1", **CORES)
    assert "computing with RANKS=2" in wait_for(process, "eval [")
    process.send_signal(number)
    _, err = process.communicate(timeout=15)
    assert process.returncode == (2 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert err.startswith("error: interrupted during evaluation") and err.count("\n") == 1


def test_ctrl_c_ends_the_training_of_all_ranks_and_is_scored(job):
    process = job(wait=False, ITERATIONS="1000000", TRAIN_LOG_EVERY="1", **CORES)
    wait_for(process, "step:1/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err
    assert "stop requested" in out and "verdict NOT AUDITED" in out


ABSENT_RANK = """
import os, sys
if os.environ.get("RANK") == "1":
    os._exit(7)
import train_gpt as golf
os._exit(golf.main())
"""


@pytest.mark.slow
def test_a_rank_that_does_not_start_is_told_at_once(workplace, tmp_path):
    (tmp_path / "absent.py").write_text(ABSENT_RANK)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.path.dirname(golf.__file__)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "absent.py")],
        cwd=workplace[0],
        env=env | workplace[1] | CORES | dict(LOGS_PATH=str(tmp_path)),
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "error: another rank did not start; RANKS=1 needs none\n"


def test_an_error_is_told_once(job):
    done = job(TEXT_FILES="nothing/*", **CORES)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


LONG = dict(
    MAX_WALLCLOCK_SECONDS="100",
    ITERATIONS="100",
    NUM_LAYERS="2",
    NGRAM_ENABLED="0",
    SCORING="neural",
)


def test_a_machine_without_a_compiler_says_so_and_goes_on(job, tmp_path):
    """In the forward pass, where compilation begins, on every rank."""
    fresh = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"), CXX="/bin/false")
    done = job(**LONG, **fresh, **CORES)
    assert done.returncode == 0, done.stderr
    assert "compiled (COMPILE): training" in done.stdout
    assert "not compiled, for not every rank can: InvalidCxxCompiler" in done.stdout


@pytest.mark.parametrize(
    "values, cores, expected",
    [
        ({}, 2, True),
        ({}, 1, False),
        (dict(max_wallclock_seconds=golf.COMPILE_PAYS_SECONDS - 1), 2, False),
        (dict(max_wallclock_seconds=0.0), 2, False),
        (dict(iterations=golf.COMPILE_PAYS_STEPS - 1), 2, False),
        (dict(warmup_steps=0), 2, False),  # it would be on the clock
        (dict(compile="0"), 2, False),
        (dict(compile="1"), 1, True),
    ],
)
def test_what_is_compiled_on_a_cpu(data, values, cores, expected):
    run = copy.copy(data[1])
    run.cores = cores
    cfg = golf.replace(golf.load_config({"SCALE": "demo"})[0], **values)
    assert golf.compiles(cfg, run, golf.is_long_training(cfg, run)) == expected
    assert golf.compiles(cfg, run) == (cfg.compile == "1")  # evaluation


def test_graphs_are_kept_beside_the_text_where_commands_can_name_it(data, monkeypatch, tmp_path):
    """Inductor's commands fall apart at a space: its own folder then."""
    cfg, run, _ = data
    for name, kept in (("my text", False), ("text", True)):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        own = golf.replace(cfg, compile="1", prepared_path=str(tmp_path / name))
        golf.compiled(lambda x: x, own, run)
        # Inductor, once imported, may have named its own folder there.
        chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        assert (chosen == str(golf.kept_graphs(own))) == kept
    assert str(golf.kept_graphs(own)).startswith(f"{tmp_path}/text/compiled_")
