"""bench/gpu_visit.py on stages that are stubs, its figures, and what its rehearsal looks at."""

import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time

import gpu_visit
import ngram_counts
import numpy as np
import pytest
import rehearse
import sentencepiece
import visit_figures as figures

import train_gpt as golf
from conftest import ROOT

REFERENCE = ROOT / "logs" / "reference"


@pytest.fixture
def visiting(tmp_path):
    """visiting([stub, ...], *arguments) -> a Visit of made-up stages, not begun."""

    def make(stages, *args):
        paths = ["--pack", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
        options = gpu_visit.arguments([*paths, *args])
        options.started = time.time()
        return gpu_visit.Visit(options, stages)

    return make


@pytest.fixture
def stub(tmp_path):
    """stub(name, code, **of a Stage) -> a Stage that executes code with `os` and `time`."""

    def make(name, code, least=0, most=60, read=figures.run_figures, **more):
        path = tmp_path / f"{name}.py"
        path.write_text(f"import os, signal, subprocess, sys, time\n{code}\n")
        return gpu_visit.Stage(name, least, most, str(path), read, **more)

    return make


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder as --data wants it: two small packed shards and a tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=64,
        minloglevel=2,
    )
    for split in ("train", "val"):
        path = folder / f"made_{split}_000000.bin"
        golf.write_shard(path, np.arange(3000) % 64)
        path.with_suffix(".bin.xz").write_bytes(lzma.compress(path.read_bytes()))
        path.unlink()
    return folder


def names(folder):
    """Names of a folder's files."""
    return sorted(path.name for path in folder.iterdir())


def is_alive(number):
    """Whether there is such a process, other than as a name that its parent has not read yet."""
    try:
        with open(f"/proc/{number}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------


def test_all_stages_are_chosen_in_the_order_of_their_worth():
    order = ["check", "smoke", "mixing", "golf", "plain"]
    assert gpu_visit.chosen(gpu_visit.arguments([]).stages) == order
    assert gpu_visit.chosen("golf, plain") == ["golf", "plain"]


def test_a_stage_is_skipped_if_less_than_its_least_is_left(visiting, stub, capsys):
    stages = [stub("long", "", least=50), stub("short", "print('here')", least=1)]
    visit = visiting(stages, "--seconds", "30")
    assert visit.run(["long", "short"]) == 0
    assert {name: r["status"] for name, r in visit.results.items()} == {
        "long": "skipped",
        "short": "ok",
    }
    assert "long: skipped, 23 s are left" in capsys.readouterr().out


@pytest.mark.parametrize(
    "seconds, gone, train", [(430, 0, 109), (430, 40, 69), (330, 0, 45), (2000, 0, 300)]
)
def test_golf_trains_as_long_as_its_rest_leaves(visiting, seconds, gone, train):
    visit = visiting(gpu_visit.STAGES, "--seconds", str(seconds), "--rest", "314")
    visit.started -= gone
    visit.end -= gone
    golf_stage = visit.stages["golf"]
    _, env = visit.call(golf_stage)
    assert float(env["MAX_WALLCLOCK_SECONDS"]) == pytest.approx(train, abs=1)
    assert visit.least(golf_stage) == 314 + 45
    assert (visit.left() < visit.least(golf_stage)) == (seconds - gone < 314 + 45 + 7)


def test_the_time_counts_from_visit_started():
    now = time.time()
    assert gpu_visit.start_time(str(now - 100)) == now - 100
    assert abs(gpu_visit.start_time("") - now) < 5


@pytest.mark.slow
def test_a_stage_that_overruns_is_killed_with_its_children(visiting, stub, monkeypatch):
    monkeypatch.setattr(gpu_visit, "GRACE_SECONDS", 0.5)
    code = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
signal.signal(signal.SIGTERM, lambda *_: print("asked to end", flush=True))
print(child.pid, flush=True)
while True:
    time.sleep(0.1)
"""
    visit = visiting([stub("deaf", code, most=0.5), stub("next", "print(1)")])
    assert visit.run(["deaf", "next"]) == 1
    texts = [text for _, text in visit.over[0].lines()]
    assert texts[1:] == ["asked to end"] and not is_alive(int(texts[0]))
    assert visit.results["deaf"]["status"] == "killed after 1 s"
    assert 0.9 < visit.results["deaf"]["seconds"] < 10
    assert visit.results["next"]["status"] == "ok"


def test_a_stage_ends_with_the_visit(visiting, stub, monkeypatch):
    monkeypatch.setattr(gpu_visit, "RESERVE_SECONDS", 1.0)
    visit = visiting([stub("endless", "time.sleep(60)")], "--seconds", "1.5")
    assert visit.run(["endless"]) == 1
    assert visit.results["endless"]["status"].startswith("killed after")
    assert time.time() < visit.end + 5


def test_no_child_outlives_a_stage_that_ended(visiting, stub):
    code = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    visit = visiting([stub("parent", f"{code}\nprint(child.pid)")])
    assert visit.run(["parent"]) == 0
    assert not is_alive(int(visit.over[0].lines()[0].text))


# --------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------


def test_the_visit_ends_if_the_check_fails(visiting, stub):
    check = stub("check", "print('error: nothing works'); sys.exit(1)", read=figures.check_figures)
    visit = visiting([check, stub("smoke", "")])
    assert visit.run(["check", "smoke"]) == 2
    assert visit.results.keys() == {"check"}
    assert visit.results["check"]["error"] == "error: nothing works"
    assert "error: nothing works" in (visit.options.pack / "summary.txt").read_text()


def test_a_stage_that_fails_says_why_and_the_others_run(visiting, stub):
    visit = visiting([stub("smoke", "raise ValueError('so')"), stub("mixing", "")])
    assert visit.run(["smoke", "mixing"]) == 1
    assert visit.results["smoke"]["error"] == "ValueError: so"
    assert visit.results["mixing"]["status"] == "ok"


@pytest.mark.slow
def test_plain_runs_beside_golf_until_that_has_warmed_up(visiting, stub):
    seen = "print(os.path.exists(os.environ['LOGS_PATH'] + '/../plain/log'))"
    run = f"time.sleep(0.8)\n{seen}\nprint('warmup steps:2', flush=True)\ntime.sleep(0.8)"
    stages = [stub("golf", run), stub("plain", "time.sleep(60)", beside="golf")]
    visit = visiting(stages)
    assert visit.run(["golf", "plain"]) == 0
    assert [running.stage.name for running in visit.over] == ["plain", "golf"]
    assert visit.results["plain"]["status"] == "ended: golf has warmed up"
    assert visit.results["plain"]["seconds"] < visit.results["golf"]["seconds"]
    assert visit.over[1].lines()[0].text == "True"


def test_a_stage_gets_data_and_settings(visiting, shards, stub):
    env = {"SCALE": "full", "MAX_WALLCLOCK_SECONDS": "{train}"}
    stage = stub("golf", "", args=("--tokens", "{shard}"), env=env)
    visit = visiting([stage], "--data", str(shards))
    visit.take_data()
    command, env = visit.call(stage)
    assert command[2] == "--tokens" and command[3].endswith("made_train_000000.bin")
    assert env["VOCAB_SIZE"] == "64" and env["TOKENIZER_PATH"] == str(shards / "tokenizer.model")
    assert env["SCALE"] == "full" and env["LOGS_PATH"].endswith("work/golf")
    visit.options.small = True
    command, env = visit.call(stage)
    assert env["SCALE"] == "demo" and env["DEVICE"] == "cpu" and env["VOCAB_SIZE"] == "64"


def test_shards_are_unpacked_once(shards, tmp_path):
    looks = []
    folder = gpu_visit.unpacked(shards, tmp_path, lambda: looks.append(1))
    assert names(folder) == ["made_train_000000.bin", "made_val_000000.bin"] and looks
    assert golf.TokenStream([str(folder / "made_val_000000.bin")], 64).read(0, 3).tolist() == [
        *(0, 1, 2)
    ]
    assert gpu_visit.unpacked(shards, tmp_path, lambda: 1 / 0) == folder
    assert gpu_visit.unpacked(folder, tmp_path, lambda: 1 / 0) == folder  # nothing is packed


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------


def test_results_are_packed_after_each_stage(visiting, stub):
    leave = "open(os.environ['LOGS_PATH'] + '/golf.int6.ptz', 'w').write('x' * 500)"
    look = "print(open(os.environ['LOGS_PATH'] + '/../../results/summary.txt').read())"
    told = "print('trained steps:4 train_seconds:2.0 recompiles:0')"
    visit = visiting([stub("golf", f"{leave}\n{told}"), stub("smoke", look)])
    visit.device = "a GPU"
    assert visit.run(["golf", "smoke"]) == 0
    packed = visit.options.pack
    assert names(packed) == ["golf.int6.ptz", "logs.tar.gz", "summary.json", "summary.txt"]
    assert "== golf: ok" in "\n".join(text for _, text in visit.over[1].lines())
    said = json.loads((packed / "summary.json").read_text())
    assert said["device"] == "a GPU" and said["stages"]["golf"]["figures"]["step_ms"] == 500
    assert "golf.step_ms 500.0 (a GPU)" in (packed / "summary.txt").read_text().splitlines()
    with tarfile.open(packed / "logs.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["golf/log", "smoke/log"]


def test_nothing_large_is_packed(visiting, stub, monkeypatch):
    monkeypatch.setattr(gpu_visit, "MOST_BYTES", 20_000)
    leave = "open(os.environ['LOGS_PATH'] + '/golf.int6.ptz', 'w').write('x' * 30_000)"
    visit = visiting([stub("golf", f"{leave}\nprint('y' * 30_000)"), stub("smoke", "print(1)")])
    assert visit.run(["golf", "smoke"]) == 0
    assert names(visit.options.pack) == ["logs.tar.gz", "summary.json", "summary.txt"]
    with tarfile.open(visit.options.pack / "logs.tar.gz") as archive:
        assert archive.getnames() == ["smoke/log"]


@pytest.mark.slow
def test_a_signal_ends_children_and_packs(shards, stub, tmp_path):
    stage = stub("smoke", "print(os.getpid(), flush=True)\ntime.sleep(60)")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "bench")!r})
import gpu_visit, visit_figures
gpu_visit.STAGES = [gpu_visit.Stage("smoke", 0, 60, {stage.script!r}, visit_figures.run_figures)]
sys.exit(gpu_visit.main())
"""
    paths = ["--data", shards, "--work", tmp_path / "work", "--pack", tmp_path / "results"]
    command = [sys.executable, "-c", code, *map(str, paths)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "work" / "smoke" / "log"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not is_alive(int(figures.parse(log.read_text())[0].text))
    assert "== smoke: ended with the visit" in out
    assert out.endswith((tmp_path / "results" / "summary.txt").read_text())
    said = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert said["stages"]["smoke"]["status"] == "ended with the visit"


@pytest.mark.slow
def test_the_check_runs_on_a_cpu(shards, tmp_path):
    paths = ["--data", shards, "--work", tmp_path / "work", "--pack", tmp_path / "results"]
    command = [sys.executable, ROOT / "bench/gpu_visit.py", "--small", "--stages", "check", *paths]
    done = subprocess.run([*map(str, command)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "results" / "summary.json").read_text())
    found = said["stages"]["check"]
    assert found["status"] == "ok" and found["figures"]["attention"] == "sdpa"
    parts = ["attention", "compiler", "copy", "device", "packages", "product", "solver", "torch"]
    assert sorted(found["figures"]) == parts
    assert f"check.attention sdpa ({said['device']})" in done.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (["--stages", "check,z"], "--stages z: no such stage; there are check, smoke,"),
        ([], "--data FOLDER"),
        (["--data", "/nowhere"], "--data /nowhere: no *_train_*.bin or .bin.xz there"),
        (["--data", "{tmp_path}"], "tokenizer.model: no SentencePiece model there"),
        (["--rehearse", "/nowhere"], "--rehearse /nowhere: no folder data there"),
        (["--rehearse", "{tmp_path}"], "not inside the repository"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, args, words):
    for name in ("a_train_0.bin", "a_val_0.bin"):
        (tmp_path / name).touch()
    (tmp_path / "data").mkdir()
    args = [arg.format(tmp_path=tmp_path) for arg in args]
    monkeypatch.setattr(sys, "argv", ["gpu_visit.py", *args])
    assert gpu_visit.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and len(err.splitlines()) == 1


def test_a_start_that_is_no_number_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_visit.py", "--data", "/nowhere"])
    monkeypatch.setenv("VISIT_STARTED", "noon")
    assert gpu_visit.main() == 2
    assert capsys.readouterr().err == "error: VISIT_STARTED='noon': not a number of seconds\n"


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def stamped(texts):
    """Lines of a log, one a second."""
    return figures.parse("\n".join(figures.stamped(n, text) for n, text in enumerate(texts)))


def test_figures_of_a_run_are_those_of_its_record():
    log = (REFERENCE / "golf-demo-1337.txt").read_text().splitlines()
    record = json.loads((REFERENCE / "golf-demo-1337.json").read_text())
    found = figures.run_figures(stamped(log))
    sliding = {r["scoring"]: r for r in record["result"] if r["stage"] == "int6_sliding"}
    assert found["steps"] == record["trained"][-1]["steps"] == 177
    assert found["step_ms"] == pytest.approx(1000 * record["trained"][-1]["train_seconds"] / 177)
    assert 600 < found["step_ms_before_loop"] < 700 and 600 < found["step_ms_in_loop"] < 700
    for scoring, row in sliding.items():
        assert found["bpb"][scoring] == pytest.approx(row["val_bpb"], abs=1e-8)
        assert found["mass"][scoring] == pytest.approx(row["mass"], abs=1e-6)
    gap = record["result"][0]["val_bpb"] - record["validation"][-1]["val_bpb"]
    assert found["quantization_gap_bpb"] == pytest.approx(gap, abs=2e-8)
    assert found["audit"]["decodable"] == "PASS 17.4 s" and len(found["audit"]) == 5
    assert found["verdict"] == "VALID" and found["artifact_bytes"] == 1417115
    evals = sum(line.startswith("eval [") for line in log)
    assert found["window_ms"] == pytest.approx(1000 * (evals - 1) / (1009 - 17), abs=1e-3)


def test_a_run_that_was_killed_has_the_figures_so_far():
    log = (REFERENCE / "golf-demo-1337.txt").read_text().splitlines()[:20]
    found = figures.run_figures(stamped(log))
    assert found.keys() == {
        *("attention", "compute", "warmup_seconds", "micro_batch_tokens", "step_ms_before_loop")
    }


def test_figures_of_benches(capsys):
    measured = dict(hints=5.7, columns=14.6, mixing=4.6, bytes=1.5 * 2**30)
    ngram_counts.mixing_line(8_000_000, measured, None)
    lines = stamped(
        [
            "training_step full cuda: ours 62.5 ms, plain 125.0 ms, ratio 0.500 (median of 9)",
            "  ours: 400.0 TFLOP/s, MFU 40.4% of 989 TFLOP/s, peak 123 bytes",
            *capsys.readouterr().out.splitlines(),
            "check device: NVIDIA H200, 1 of 2 bytes free (0.1 s)",
        ]
    )
    side = {"ours_ms": 62.5, "plain_ms": 125.0, "ratio": 0.5}
    side |= {"ours_mfu": "40.4%", "ours_peak_bytes": 123}
    assert figures.versus_figures(lines) == {"training_step_full_cuda": side}
    mixing = {"columns_seconds": 14.6, "mixing_seconds": 4.6, "gib": 1.5, "hints_seconds": 5.7}
    assert figures.mixing_figures(lines) == {"8,000,000": mixing}
    assert figures.check_figures(lines) == {"device": "NVIDIA H200, 1 of 2 bytes free"}


def test_columns_and_mixing_of_a_short_stream_are_measured(tmp_path, capsys):
    """The same digests twice: --baseline compares them before it times two revisions."""
    np.save(tmp_path / "tokens.npy", ngram_counts.make_stream(5000))
    found = []
    for _ in range(2):
        ngram_counts.measure(str(ROOT), tmp_path / "tokens.npy")
        found.append(json.loads(capsys.readouterr().out))
    ngram_counts.compare(found[0]["digests"], found[1]["digests"])
    assert {"hints", "columns", "mixing", "bytes"} <= found[0].keys()
    ngram_counts.mixing_line(5000, found[0], found[1])


# --------------------------------------------------------------------------------------------------
# The rehearsal
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A made-up repository whose bench/gpu_visit.py imports a package that the machine lacks."""
    root = tmp_path / "repository"
    for name in ("bench", ".gpu/wheels", ".gpu/data"):
        (root / name).mkdir(parents=True)
    (root / ".gitignore").write_text("/.gpu/\n*.log\n")
    (root / "a.log").write_text("ignored")
    (root / "bench/gpu_visit.py").write_text("import json\nimport common\n")
    (root / "bench/common.py").write_text("def f():\n    import zstandard.c\n")
    (root / "bench/gpu_machine.txt").write_text("python==3.12.3\nnumpy==2.5.2\ntqdm\n")
    (root / ".gpu/data/x.bin").write_bytes(b"x" * 1000)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    monkeypatch.setattr(rehearse, "ROOT", root)
    monkeypatch.setattr(rehearse, "MACHINE", root / "bench/gpu_machine.txt")
    return root


def acting(seen, **files):
    """What stands in the place of rehearse.call: it looks around and leaves results."""

    def call(command, cwd, env):
        files_there = {str(p.relative_to(cwd)) for p in cwd.rglob("*") if p.is_file()}
        seen.update(files=files_there, command=command, env=env)
        results = cwd.parent / "results"
        results.mkdir()
        for name, content in files.items():
            (results / name.replace("_", ".")).write_text(content)
        return 0

    return call


def test_a_rehearsal_says_ready(repository, monkeypatch, capsys):
    (repository / ".gpu/wheels/zstandard-0.25.0-cp312-cp312-manylinux2014_x86_64.whl").touch()
    seen, status = {}, json.dumps({"stages": {"check": {"status": "ok"}}})
    monkeypatch.setattr(rehearse, "call", acting(seen, summary_json=status))
    assert rehearse.rehearse(repository / ".gpu", [], ["check"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "ready" and out.startswith("travels: 6 files, ")
    bench = {f"bench/{name}" for name in ("gpu_visit.py", "common.py", "gpu_machine.txt")}
    assert seen["files"] >= bench | {".gpu/data/x.bin"} and "a.log" not in seen["files"]
    assert seen["env"].keys() <= {"PATH", "HOME", "LANG", "PYTHONPATH", "OMP_NUM_THREADS"}
    assert "--small" in seen["command"] and ".gpu/data" in seen["command"]


def test_a_rehearsal_says_each_problem(repository, monkeypatch, capsys):
    monkeypatch.setattr(rehearse, "MOST_TRAVELS", 999)
    status = json.dumps({"stages": {"check": {"status": "failed"}}})
    files = {name: "" for name in ("a_b", "c_d", "e_f", "g h_i")}
    monkeypatch.setattr(rehearse, "call", acting({}, summary_json=status, **files))
    assert rehearse.rehearse(repository / ".gpu", [], ["check", "golf"]) == 1
    lines = capsys.readouterr().out.splitlines()
    problems = [line.removeprefix("problem: ") for line in lines if line.startswith("problem: ")]
    assert [problem.split(":")[0] for problem in problems[1:]] == [
        *("zstandard", "g h.i", "5 results, at most 4 come back", "stage check", "stage golf")
    ]
    assert problems[0].endswith("bytes would travel, at most 999 do")
    assert problems[1] == "zstandard: not on the machine, and no wheel of it is brought along"
    assert problems[4:] == ["stage check: failed", "stage golf: not run"]
    assert "ready" not in lines


def test_results_are_small_and_lie_in_no_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse, "MOST_BYTES", 5000)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").touch()
    (tmp_path / "large").write_bytes(b"x" * 5001)
    assert rehearse.result_problems(tmp_path, []) == [
        "deep: results lie in no folders",
        f"{os.path.join('deep', 'a')}: results lie in no folders",
        "large: 5001 bytes, at most 5000 come back",
        "summary.json does not come back",
    ]


@pytest.mark.parametrize(
    "wheel, fitting",
    [
        ("a-1-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("a-1-2-cp312-cp312-linux_x86_64.whl", True),
        ("a-1-cp39-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-py3-none-manylinux2014_x86_64.whl", True),
        ("a-1-cp311-cp311-manylinux2014_x86_64.whl", False),
        ("a-1-cp313-abi3-manylinux2014_x86_64.whl", False),
        ("a-1-cp312-cp312t-manylinux2014_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux2014_aarch64.whl", False),
        ("a-1-cp312-cp312-macosx_11_0_x86_64.whl", False),
        ("a-1-py2-none-any.whl", False),
        ("a-1.tar.gz", False),
    ],
)
def test_which_wheels_fit(wheel, fitting):
    assert rehearse.fits(wheel, "3.12.3") == fitting


def test_a_wheel_for_another_python_is_a_problem(capsys):
    machine = {"python": "3.12.3", "torch": "2.11.0", "python-dateutil": ""}
    brought = {"zstandard": "zstandard-0.25.0-cp311-cp311-manylinux2014_x86_64.whl"}
    owners = {"torch": ["torch"], "functorch": ["torch"], "dateutil": ["python_dateutil"]}
    names = {"torch", "functorch", "dateutil", "zstandard"}
    (problem,) = rehearse.package_problems(names, machine, brought, owners)
    assert problem == f"{brought['zstandard']}: not for Python 3.12.3 on x86_64"
    assert "there 2.11.0" in capsys.readouterr().out


def test_the_machine_lacks_two_packages():
    scripts = ["bench/gpu_visit.py", *(stage.script for stage in gpu_visit.STAGES)]
    machine = rehearse.machine_packages(rehearse.MACHINE.read_text())
    needed = rehearse.modules(scripts, ROOT)
    assert {"torch", "sentencepiece", "tqdm"} <= needed & machine.keys()
    assert needed - machine.keys() == {"constriction", "zstandard"}


def test_the_hook_refuses_packages(tmp_path):
    rehearse.unpack([], tmp_path, tmp_path, {"tqdm"})
    env = {"PYTHONPATH": str(tmp_path / "hook")}
    code = "import numpy.version; import tqdm.auto"
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("tqdm: the GPU machine has no such package")
