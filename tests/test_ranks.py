"""The ranks that a run starts by itself, and what it compiles unasked."""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest

import train_gpt as golf

CORES = {"OMP_NUM_THREADS": "2"}


@pytest.fixture
def unlaunched(monkeypatch):
    """A process that torchrun has not launched."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(golf, "is_file_run", lambda: True)


def ranks(cores=8, **values):
    cfg = golf.replace(golf.load_config({"SCALE": "demo", "DEVICE": "cpu"})[0], **values)
    return golf.own_ranks(cfg, cores)


@pytest.mark.parametrize(
    "cores, gigabytes, targets, expected",
    [
        *((1, 64, 1, 1), (2, 64, 1, 2), (3, 64, 1, 2), (6, 64, 1, 4), (16, 64, 1, 8)),
        *((16, 4.1, 1, 2), (2, 1, 1, 1)),
        *((8, 24, 10**7, 4), (8, 24, 62 * 10**6, 2), (8, 8, 62 * 10**6, 1), (8, 24, 0, 4)),
    ],
)
def test_a_rank_a_core_that_divides_a_step_and_fits_into_memory(
    unlaunched, monkeypatch, cores, gigabytes, targets, expected
):
    """A step of the demo has 16 sequences; every rank holds the whole text."""
    monkeypatch.setattr(golf, "memory_bytes", lambda: gigabytes * 2**30)
    assert ranks(cores, val_tokens=targets) == expected


def test_one_rank_where_more_would_change_something(unlaunched, monkeypatch):
    assert ranks(sample="Once") == 1
    assert ranks(ngram_history="cold") == 1  # pr889's score depends on the number of ranks
    assert ranks(scale="full") == 1  # whose memory nobody knows
    assert ranks(ranks=4, scale="full") == 4  # asked for
    with pytest.raises(golf.RunError, match="do not divide among 3 ranks"):
        ranks(ranks=3)
    assert ranks(ranks=3, load_artifact="x") == 3
    assert ranks(data_path="shards", val_tokens=0) == 1  # as long as they are
    with monkeypatch.context() as changed:
        changed.setattr(golf, "is_file_run", lambda: False)
        assert ranks() == 1 and ranks(ranks=4) == 1
    with monkeypatch.context() as changed:
        changed.setattr(sys, "platform", "win32")
        assert ranks() == 1
    assert ranks() > 1
    monkeypatch.setenv("RANK", "0")
    assert ranks() == 1 and ranks(ranks=4) == 1  # torchrun's are what was asked for


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, expected",
    [
        (["a.py"], True),
        (["-u", "./a.py", "x"], True),
        (["-m", "a"], False),
        (["-m", "pdb", "a.py"], False),  # whose ranks would wait for commands
        (["-c", "exec(open('a.py').read())"], False),
        (["-u"], False),
    ],
)
def test_only_a_program_in_a_file_is_started_again(tmp_path, command, expected):
    (tmp_path / "a.py").write_text("import train_gpt\nprint('is', train_gpt.is_file_run())\n")
    path = os.pathsep.join([os.path.dirname(golf.__file__), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        input="c\n" if "pdb" in command else (tmp_path / "a.py").read_text(),
        text=True,
        capture_output=True,
    )
    assert f"is {expected}" in done.stdout, done.stderr


def test_memory_and_cores_are_the_machines_or_the_containers(monkeypatch):
    files = {}

    def numbers(*names):
        return [number for name in names for number in files.get(name, [])]

    monkeypatch.setattr(golf, "cgroup_numbers", numbers)
    monkeypatch.setattr(golf.torch, "get_num_threads", lambda: 8)
    assert 2**28 < golf.memory_bytes() < 2**60 and golf.count_cores() == 8
    for share, cores in ((0.5, 1), (2.5, 2), (16.0, 8)):
        files |= {"memory.max": [2.0**28], "cpu.max": [share * 100_000, 100_000.0]}
        assert golf.memory_bytes() == 2**28 and golf.count_cores() == cores
    files.clear()
    files |= {"cpu/cpu.cfs_quota_us": [300_000.0], "cpu/cpu.cfs_period_us": [100_000.0]}
    files |= {"memory/memory.limit_in_bytes": [2.0**29]}
    assert golf.memory_bytes() == 2**29 and golf.count_cores() == 3
    files |= {"cpu/cpu.cfs_quota_us": [], "memory/memory.limit_in_bytes": [2.0**63]}
    assert golf.count_cores() == 8 and golf.memory_bytes() < 2**60
    files.clear()
    monkeypatch.delattr(os, "sysconf")
    assert golf.memory_bytes() == float("inf")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("max\n", []),
        ("max 100000\n", [1e5]),
        ("200000 100000\n", [2e5, 1e5]),
        ("-1\n", []),
        (None, []),
    ],
)
def test_a_containers_limits_are_read(monkeypatch, text, expected):
    def read_text(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(golf.Path, "read_text", read_text)
    assert golf.cgroup_numbers("cpu.max") == expected
    assert golf.cgroup_numbers("a", "b") == 2 * expected


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_rank_outlives_the_first(job, trained, number):
    """The others hold the same pipes: reading ends when all of them have ended, long before an
    evaluation in strides of one target would."""
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    process = job(wait=False, LOAD_ARTIFACT=artifact, VAL_TOKENS="0", EVAL_STRIDE="1", **CORES)
    assert "computing with RANKS=2" in wait_for(process, "eval [")
    process.send_signal(number)
    _, err = process.communicate(timeout=15)
    assert process.returncode == (-number if number == signal.SIGKILL else 2)
    if number != signal.SIGKILL:
        assert err.startswith("error: interrupted during evaluation") and err.count("\n") == 1


def test_ctrl_c_ends_the_training_of_all_ranks_and_is_scored(job):
    process = job(wait=False, ITERATIONS="1000000", TRAIN_LOG_EVERY="1", **CORES)
    wait_for(process, "step:1/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err
    assert "stop requested" in out and "verdict NOT AUDITED" in out


MISSING_RANK = """
import os, time
if __name__ != "__main__":  # another rank, which imports this program
    {happens}
import train_gpt as golf
golf.START_SECONDS = 2.0
if __name__ == "__main__":
    os._exit(golf.main())
"""
HANGING_RANK = """
import os, time
import train_gpt as golf
take_step = golf.Trainer.take_step
def hang(trainer):
    if trainer.steps == 2 and trainer.run.rank == 1:
        time.sleep(1000)
    take_step(trainer)
golf.Trainer.take_step = hang
if __name__ == "__main__":
    os._exit(golf.main())
"""


@pytest.fixture
def program(workplace, tmp_path):
    """program(text, **variables) -> the process of a program on two ranks of its own."""

    def start(text, **variables):
        (tmp_path / "program.py").write_text(text)
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.path.dirname(golf.__file__)}
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py")],
            cwd=workplace[0],
            env=env | workplace[1] | CORES | dict(LOGS_PATH=str(tmp_path)) | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.mark.slow
@pytest.mark.parametrize("happens", ["os._exit(7)", "time.sleep(1000)"])
def test_a_rank_that_does_not_start_is_told(program, happens):
    process = program(MISSING_RANK.format(happens=happens))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "error: another rank did not start; RANKS=1 needs none\n"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_that_waits_for_a_rank(program):
    """The first rank waits in a collective, where no handler of Python's is called."""
    process = program(HANGING_RANK, TRAIN_LOG_EVERY="1")
    wait_for(process, "step:1/")  # the second is told in the third
    time.sleep(2.0)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err == "error: a second signal: ended at once\n"


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_as_long_as_was_asked(program):
    process = program(HANGING_RANK, DIST_TIMEOUT_SECONDS="10")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "rank 1" in err.splitlines()[0], err


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


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An own cache folder, and nothing that names another one for compiled graphs."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def told_by(run, capsys):
    """(what use_kept_graphs says, the folder that it chooses)."""
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    golf.use_kept_graphs(run)
    return capsys.readouterr().out, golf.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def test_graphs_are_kept_where_only_this_user_can_write(run, cache, monkeypatch, capsys):
    """They are unpickled: whoever can write there can run programs as this user."""
    said, folder = told_by(run, capsys)
    assert not said and folder == golf.kept_graphs() and folder.is_relative_to(cache)
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    for place in (folder, folder.parent):
        for mode in (0o770, 0o707):
            place.chmod(mode)
            said, other = told_by(run, capsys)
            assert "are not kept: " in said and "others can write there" in said
            assert other != folder and other.stat().st_mode & 0o777 == 0o700
        place.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # somebody else's folder
    assert "others can write there" in told_by(run, capsys)[0]


def test_graphs_are_not_kept_where_commands_cannot_name_the_folder(run, cache, monkeypatch, capsys):
    """Inductor's commands fall apart at spaces and quotes; a file is no folder."""
    for name, reason in (("my cache", "name it"), ("Tim's", "No closing"), ("file", "File exists")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / name))
        (cache.parent / "file").touch()
        said, folder = told_by(run, capsys)
        assert reason in said and not folder.is_relative_to(cache.parent / name)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "asked for")
    golf.use_kept_graphs(run)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "asked for"
