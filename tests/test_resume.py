"""Nothing bought is lost: checkpoints, runs killed at any moment, full disks, ranks that die."""

import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gpt as golf
from conftest import FRONTIER, ROOT

NAME = "golf-demo-1337"


def files(done):
    """{suffix: bytes} of what a training must give again to the last bit."""
    found = {}
    for path in done.logs.glob(f"{NAME}.*"):
        suffix = path.name.split(".", 1)[1]
        if suffix in ("safetensors", "int6.ptz"):
            found[suffix] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(job):
    """An uninterrupted training of 12 steps."""
    done = job(ITERATIONS="12", NGRAM_ENABLED="0", TRAIN_LOG_EVERY="1")
    assert done.returncode == 0, done.stderr
    return done


def children(pid):
    """Process ids of the children of a process."""
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks(launcher):
    """Process ids of the ranks that a launcher has started."""
    found = children(launcher.pid)
    return [p for p in found if b"train_gpt.py" in Path(f"/proc/{p}/cmdline").read_bytes()]


def environment(process):
    """The variables of a process, NAME=value between zero bytes."""
    return b"\0" + Path(f"/proc/{process}/environ").read_bytes()


def killed_after(job, step, logs, processes=1, **variables):
    """Start a training that saves a checkpoint after every step, and kill it after `step`."""
    process = job(
        processes,
        wait=False,
        ITERATIONS="12",
        NGRAM_ENABLED="0",
        TRAIN_LOG_EVERY="1",
        CHECKPOINT_SECONDS="1e-6",
        LOGS_PATH=str(logs),
        **variables,
    )
    for line in iter(process.stdout.readline, ""):
        if re.match(rf"step:{step}/12 train_loss", line):
            break
    for pid in [process.pid, *(children(process.pid) if processes > 1 else [])]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


def resumed(job, logs, processes=1, **variables):
    """Go on with what killed_after has left."""
    done = job(
        processes,
        RESUME="1",
        ITERATIONS="12",
        NGRAM_ENABLED="0",
        TRAIN_LOG_EVERY="1",
        LOGS_PATH=str(logs),
        **variables,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("processes, again", [(1, 1), (2, 2), (1, 2)])
def test_a_resumed_training_is_the_uninterrupted_one(job, whole, tmp_path, processes, again):
    """To the last bit on as many ranks; on others up to rounding."""
    killed_after(job, 7, tmp_path, processes)
    assert not (tmp_path / f"{NAME}.safetensors").exists()
    done = resumed(job, tmp_path, again)
    steps = int(re.search(r"^resumed .*checkpoint: (\d+) steps", done.stdout, re.M)[1])
    assert 5 <= steps <= 8
    assert f"step:{steps}/12 train_loss" not in done.stdout
    assert f"step:{steps + 1}/12" in done.stdout or steps == 11
    if processes == 1 and again == 1:
        assert done.final == whole.final
        for suffix in ("safetensors", "int6.ptz"):  # under its own name
            assert (tmp_path / f"{NAME}.{suffix}").read_bytes() == files(whole)[suffix]
        log = (tmp_path / f"{NAME}.txt").read_text()
        assert log.endswith(done.stdout) and f"step:{steps}/12 train_loss" in log
    elif processes == again:
        same = job(again, ITERATIONS="12", NGRAM_ENABLED="0")
        assert done.final == same.final
    loss = [float(re.search(r"step:12/12 train_loss:(\S+)", d.stdout)[1]) for d in (whole, done)]
    assert abs(loss[0] - loss[1]) < 1e-3


def test_blocks_loop_in_a_resumed_training_as_in_the_whole(job, tmp_path):
    """Killed before the loop is switched on, at 0.35 of 12 steps."""
    done = job(ITERATIONS="12", NGRAM_ENABLED="0", **FRONTIER)
    assert done.returncode == 0, done.stderr
    killed_after(job, 3, tmp_path, **FRONTIER)
    again = resumed(job, tmp_path, **FRONTIER)
    for suffix, content in files(done).items():
        assert (tmp_path / f"{NAME}.{suffix}").read_bytes() == content
    assert again.final == done.final


def test_checkpoints_that_do_not_fit_are_refused(job, tmp_path):
    killed_after(job, 3, tmp_path)
    path = tmp_path / f"{NAME}.checkpoint"
    more = dict(RESUME="1", ITERATIONS="12", NGRAM_ENABLED="0", LOGS_PATH=str(tmp_path))
    cases = [
        (dict(MATRIX_LR="0.5"), "MATRIX_LR was 0.025, is 0.5"),
        (dict(RUN_ID="none"), "there is no"),
        (dict(MODEL_DIM="64"), "MODEL_DIM was 32, is 64"),
        (dict(COMPUTE="bfloat16"), "COMPUTE was float32, is bfloat16"),
    ]
    for change, word in cases:
        done = job(**more | change)
        assert done.returncode == 2 and word in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and ".checkpoint" in done.stderr
    blob = path.read_bytes()
    flipped = bytearray(blob)
    flipped[-1000] ^= 4
    for bad in (blob[: len(blob) // 2], b"", b"x" * 99, bytes(flipped)):
        path.write_bytes(bad)
        done = job(**more)
        assert done.returncode == 2 and str(path) in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_killed_at_any_moment_a_run_goes_on_or_says_what_is_missing(job, tmp_path):
    """kill -9 in training, export or evaluation; then whatever the folder holds is taken on."""
    draw, base = random.Random(5), dict(ITERATIONS="40", LOGS_PATH=str(tmp_path), VAL_TOKENS="2048")
    killed = []
    for wait in [*(draw.uniform(2.5, 7.0) for _ in range(5)), 200]:
        saved = {}
        for suffix in ("int6.ptz", "safetensors", "checkpoint"):
            found = sorted(tmp_path.glob(f"run*.{suffix}"))
            if found:
                saved[suffix] = found[-1]
        if "int6.ptz" in saved:
            go_on = dict(LOAD_ARTIFACT=str(saved["int6.ptz"]))
        elif "safetensors" in saved:
            go_on = dict(LOAD_WEIGHTS=str(saved["safetensors"]))
        else:
            go_on = dict(CHECKPOINT_SECONDS="1e-3")
            if "checkpoint" in saved:  # of run, or of run-2 where run left nothing but a log
                go_on |= dict(RESUME="1", RUN_ID=saved["checkpoint"].stem)
        process = job(wait=False, **dict(RUN_ID="run") | base | go_on)
        try:
            out, err = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed.append(go_on)
            for path in tmp_path.glob("*.safetensors"):  # what has a final name is whole
                golf.read_tensors(path)
            continue
        assert process.returncode == 0 and not err, (go_on, err)
        assert out.strip().splitlines()[-1].startswith("final ")
    assert killed  # and the last one, which nobody killed, ended well


def limited(job_env, folder, size, **variables):
    """A run that may write no file larger than `size` bytes, as on a full disk."""
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | job_env | variables
    return subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        cwd=folder,
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


@pytest.mark.parametrize("size, lost", [(60_000, ".safetensors"), (2_000, ".txt")])
def test_a_full_disk_loses_files_but_no_result(workplace, trained, tmp_path, size, lost):
    """The run reports its score, then says what it could not write, and fails."""
    folder, env = workplace
    done = limited(env, folder, size, LOGS_PATH=str(tmp_path), AUDIT="strict")
    assert done.returncode == 2
    assert done.stdout.strip().splitlines()[-1] == trained.final
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot write") and str(tmp_path) in line
    assert f"cannot write {tmp_path}/{NAME}{lost}" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.tmp"))
    for path in tmp_path.glob("*.json"):
        golf.json.loads(path.read_text())
    for path in tmp_path.glob("*.safetensors"):
        golf.read_tensors(path)


def two_nodes(folder, env, per_node, port, **variables):
    """Two launchers on loopback, as on two machines with a folder in common."""
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | env | variables
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                f"--node_rank={node}",
                f"--nproc_per_node={per_node}",
                "--master_addr=127.0.0.1",
                f"--master_port={port}",
                str(ROOT / "train_gpt.py"),
            ],
            cwd=folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for node in (0, 1)
    ]


def free_port():
    """A port of loopback that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_nodes_give_the_same_score(workplace, trained, tmp_path):
    """Only the first node needs the artifact."""
    folder, env = workplace
    nodes = two_nodes(
        folder,
        env,
        1,
        free_port(),
        LOGS_PATH=str(tmp_path),
        LOAD_ARTIFACT=str(trained.logs / f"{NAME}.int6.ptz"),
    )
    outs = [p.communicate(timeout=200) for p in nodes]
    assert [p.returncode for p in nodes] == [0, 0], outs
    assert outs[0][0].strip().splitlines()[-1] == trained.final and outs[1][0] == ""


def two_training_nodes(workplace, tmp_path, **variables):
    """Two nodes of a rank each in the midst of a training without end."""
    folder, env = workplace
    endless = dict(LOGS_PATH=str(tmp_path), ITERATIONS="1000000", TRAIN_LOG_EVERY="1")
    nodes = two_nodes(folder, env, 1, free_port(), **endless | variables)
    wait_for_a_step(nodes[0])
    return nodes


def wait_for_a_step(process):
    """Read a run's output until it has trained a step."""
    for line in iter(process.stdout.readline, ""):
        if line.startswith("step:"):
            break


@pytest.mark.slow
def test_two_ranks_that_torchrun_stops_reach_the_score(workplace, tmp_path):
    """torchrun passes the signal on and waits; itself it ends with an error for any signal."""
    folder, env = workplace
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | env
    env |= dict(LOGS_PATH=str(tmp_path), ITERATIONS="1000000", TRAIN_LOG_EVERY="1", AUDIT="strict")
    rank = f"trap : TERM; {sys.executable} {ROOT}/train_gpt.py; echo $? > {tmp_path}/status.$RANK"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*launch, "--shutdown-timeout=600", "--no-python", "bash", "-c", rank],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    wait_for_a_step(process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    assert out.strip().splitlines()[-1].startswith("final "), out[-2000:]
    assert "--shutdown-timeout=600" in out and out.count("PASS") >= 5
    assert [(tmp_path / f"status.{r}").read_text() for r in (0, 1)] == ["0\n", "0\n"]


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_with_its_name(workplace, tmp_path):
    """Two nodes: the launcher of the one cannot know that a rank of the other is dead."""
    nodes = two_training_nodes(workplace, tmp_path)
    dead = ranks(nodes[1])[0]
    began = time.monotonic()
    os.kill(dead, signal.SIGKILL)
    outs = [p.communicate(timeout=120) for p in nodes]
    assert time.monotonic() - began < 60 and all(p.returncode != 0 for p in nodes)
    ours = [x for x in outs[0][1].splitlines() if x.startswith("error: ")]
    assert ours == ["error: rank 1 of 2 died or does not answer (during training)"], outs[0][1]
    assert "\nfinal " not in outs[0][0] and 'train_gpt.py", line' not in outs[0][1]


@pytest.mark.slow
def test_a_dead_rank_is_named_though_torchrun_stops_the_others(job):
    """The launcher sees the death first: its signal comes while the ranks count who is there."""
    process = job(2, wait=False, ITERATIONS="1000000", TRAIN_LOG_EVERY="1")
    wait_for_a_step(process)
    (dead,) = (p for p in ranks(process) if b"\0RANK=1\0" in environment(p))
    os.kill(dead, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "\nfinal " not in out
    ours = [line for line in err.splitlines() if line.startswith("error: ")]
    assert ours == ["error: rank 1 of 2 died or does not answer (during training)"], err
    assert 'train_gpt.py", line' not in err


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_after_the_timeout(workplace, tmp_path):
    nodes = two_training_nodes(workplace, tmp_path, DIST_TIMEOUT_SECONDS="5")
    hung = ranks(nodes[1])[0]
    os.kill(hung, signal.SIGSTOP)
    out, err = nodes[0].communicate(timeout=120)
    os.kill(hung, signal.SIGKILL)
    nodes[1].communicate(timeout=120)
    assert nodes[0].returncode != 0
    assert "error: rank 1 of 2 died or does not answer (during training)" in err.splitlines()


def test_out_of_memory_divides_the_micro_batch(data, tiny_model, monkeypatch):
    """Warm-up finds the largest one that fits, unless MICRO_BATCH_TOKENS is given."""
    cfg, run, corpus = data
    cfg = golf.replace(cfg, warmup_steps=2)

    def trainer(**values):
        config = golf.replace(cfg, **values)
        made = golf.Trainer(golf.build_model(config, run), corpus, config, run)
        forward = made.forward

        def small(tokens, wanted, looping):
            if len(tokens) > 7:
                raise torch.OutOfMemoryError("no memory")
            return forward(tokens, wanted, looping)

        made.forward = small
        return made

    made = trainer()
    assert made.micro_batch == 24
    made.warm_up()
    assert made.micro_batch == 6 and run.record["warmup"][-1]["micro_batch_tokens"] == 6 * 64
    with pytest.raises(torch.OutOfMemoryError):
        trainer(micro_batch_tokens=24 * 64).warm_up()


def test_the_clock_stands_still_for_validation_and_for_nothing_else(data, monkeypatch):
    """From the first step to the last; one exchange a step, and no other wait for the device."""
    cfg, run, corpus = data
    cfg = golf.replace(
        cfg, iterations=3, warmup_steps=1, schedule_steps=3, train_log_every=1, val_loss_every=1
    )
    trainer = golf.Trainer(golf.build_model(cfg, run), corpus, cfg, run)
    log_step, exchanges, validations = trainer.log_step, [], []

    def slow_validation():
        validations.append(trainer.steps)
        time.sleep(0.7)

    monkeypatch.setattr(trainer, "validate", slow_validation)

    def slow_log(*args, **values):
        time.sleep(0.2)
        log_step(*args, **values)

    monkeypatch.setattr(trainer, "log_step", slow_log)
    monkeypatch.setattr(run, "of_ranks", lambda *values: exchanges.append(values) or [*zip(values)])
    trainer.warm_up()
    exchanges.clear()
    monkeypatch.setattr(trainer, "warm_up", lambda: None)
    began = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - began
    assert trainer.steps == 3 and len(exchanges) == 3 + 2
    assert validations == [2, 3]
    assert 0.4 <= trainer.elapsed <= total - 2 * 0.7 - 0.2  # the last line is after the last step
    assert run.record["trained"][-1]["train_seconds"] == trainer.elapsed


def test_a_resumed_run_counts_the_time_that_was_lost(job, tmp_path):
    killed_after(job, 3, tmp_path)
    (tmp_path / f"{NAME}.clock").write_text("100.25")
    done = resumed(job, tmp_path)
    assert re.search(
        r"^resumed .* steps, 100\.2 s, of which (99|100)\.\d s were lost", done.stdout, re.M
    )
    assert float(re.search(r"train_seconds:(\S+)", done.stdout)[1]) > 100.25


def test_a_killed_run_has_noted_its_clock(job, tmp_path):
    """Beside the checkpoint, about every second."""
    process = job(
        wait=False,
        ITERATIONS="1000000",
        CHECKPOINT_SECONDS="1000",
        LOGS_PATH=str(tmp_path),
    )
    path = tmp_path / f"{NAME}.clock"
    for _ in range(200):
        if path.exists():
            break
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=60)
    assert 1.0 <= float(path.read_text()) < 60


SLOW_FIRST_RANK = """
import os
import time
import train_gpt as golf
score_of = golf.score_of
def slow(*values):  # of a validation, on rank 0 alone
    time.sleep(1.5)
    return score_of(*values)
golf.score_of = slow
os._exit(golf.main())  # as train_gpt.py itself: the collectives' threads can abort a teardown
"""


@pytest.mark.slow
def test_no_rank_counts_what_another_validates(workplace, tmp_path):
    """Two ranks: the second is done with a validation long before the first."""
    folder, env = workplace
    (tmp_path / "slow.py").write_text(SLOW_FIRST_RANK)
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    env |= dict(LOGS_PATH=str(tmp_path), SCHEDULE_STEPS="6", VAL_LOSS_EVERY="1", VAL_TOKENS="64")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "slow.py")], cwd=folder, env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val_loss:") >= 6
    assert float(re.search(r"train_seconds:(\S+)", done.stdout)[1]) < 5 * 1.5
