"""Whole runs on an accelerator: on one that is there, else on one that is not (tests/pretend).

On the pretended one a tensor of the CPU that meets one of the device is an error. Operations and
waits are counted. Its results are the CPU's.
"""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

PRESENT = torch.cuda.is_available()
PRETEND = str(ROOT / "tests" / "pretend")
DEVICE = {"DEVICE": "cuda"} if PRESENT else {"DEVICE": "pretend", "PYTHONPATH": PRETEND}
# A run of seconds, though every operation goes through Python.
SMALL = DEVICE | dict(
    COMPILE="0",
    ITERATIONS="2",
    NUM_LAYERS="3",
    WARMUP_STEPS="0",
    MAX_WALLCLOCK_SECONDS="60",
    GPTQ_SECONDS="0.2",
    TRAIN_BATCH_TOKENS="128",
    VAL_TOKENS="512",
    EVAL_STRIDE="32",
    NGRAM_BUCKETS="1024",
)


def test_golf_runs_and_proves_its_score_and_is_the_cpus(job):
    """Training, GPTQ, export, the pass, all scorings, masses, a strict audit; then its sample."""
    loop = dict(LOOP_FIRST="1", LOOP_LAST="1", LOOP_PASSES="2", LANES_FROM="2", ATTN_GATE="1")
    loop |= dict(CONTENT_SMEAR="1", MTP_NUM_HEADS="1", VALUE_RESIDUAL="1", LOOP_FROM="0")
    done = job(**SMALL | loop | dict(AUDIT="strict"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" PASS") == 5 + 3  # five checks, three budgets
    kind = "cuda" if PRESENT else "pretend"
    assert f"computing with 1 x {kind}" in done.stdout
    (artifact,) = done.logs.glob("*.ptz")
    on_cpu = job(LOAD_ARTIFACT=str(artifact), **loop | dict(VAL_TOKENS="512", EVAL_STRIDE="32"))
    assert on_cpu.returncode == 0, on_cpu.stderr
    scores = [float(re.search(r"val_bpb:(\S+)", text)[1]) for text in (done.final, on_cpu.final)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3 if PRESENT else 1e-8)
    sample = job(**SMALL | loop | dict(LOAD_ARTIFACT=str(artifact), SAMPLE="def "))
    assert sample.returncode == 0 and "def " in sample.stdout, sample.stderr
    assert done.record["corpus"]["val_targets"] == 512


@pytest.mark.parametrize("recipe", ["pr889", "pr806", "pr890", "pr1094"])
def test_every_recipe_runs(job, recipe):
    """Two of them in bfloat16, two with checkpoints."""
    more = dict(COMPUTE="bfloat16") if recipe < "pr889" else dict(CHECKPOINT_SECONDS="1e-6")
    done = job(RECIPE=recipe, **SMALL | more | dict(NUM_LAYERS="4", GPTQ_SECONDS="0"))
    assert done.returncode == 0 and done.final.startswith("final "), done.stderr


def test_a_killed_training_goes_on_from_its_checkpoint(job, tmp_path):
    more = SMALL | dict(ITERATIONS="6", CHECKPOINT_SECONDS="1e-6", LOGS_PATH=str(tmp_path))
    more |= dict(RUN_ID="killed", NGRAM_ENABLED="0", TRAIN_LOG_EVERY="1", GPTQ_SECONDS="0")
    process = job(wait=False, **more)
    for line in iter(process.stdout.readline, ""):
        if line.startswith("step:3/6"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = job(RESUME="1", **more)
    assert done.returncode == 0 and "resumed " in done.stdout, done.stderr
    assert "trained steps:6 " in done.stdout


@pytest.mark.skipif(PRESENT and torch.cuda.device_count() < 2, reason="a rank needs a device")
def test_two_ranks_score_as_one(job):
    fast = SMALL | dict(GPTQ_SECONDS="0", SCORING="neural")
    one, two = job(**fast), job(2, **fast)
    assert two.returncode == 0, two.stderr
    assert "computing with 2 x " in two.stdout
    (artifact,) = one.logs.glob("*.ptz")
    again = job(2, LOAD_ARTIFACT=str(artifact), **fast)
    assert again.final == one.final


def test_a_device_that_is_not_there_is_one_line(job):
    done = job(DEVICE="cuda", CUDA_VISIBLE_DEVICES="", fresh=True)
    assert done.returncode == 2 and "DEVICE=cuda" in done.stderr
    if not PRESENT:  # the device is known, but only cuda is taken unasked
        done = job(**SMALL | dict(DEVICE="auto", NGRAM_ENABLED="0"))
        assert done.returncode == 0 and "1 x pretend" not in done.stdout
    done = job(**SMALL | dict(LOCAL_RANK="64", RANK="0", WORLD_SIZE="1"))
    assert done.returncode == 2 and "LOCAL_RANK=64: there are " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def program(name: str, *args: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TEXT_FILES")}
    env |= {"PYTHONPATH": f"{PRETEND}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / name), *args]
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=600)


@pytest.fixture(scope="session")
def launches(text_folder):
    """{stage: (operations, {kind: waits})} of bench/launches.py."""
    os.environ["TEXT_FILES"] = f"{text_folder}/*.txt"
    done = program("bench/launches.py", "--json")
    del os.environ["TEXT_FILES"]
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_training_step_waits_once_and_batches_and_chunks_never(launches):
    assert launches["training step"][1] == {"event": 1}
    for stage in ("batch of the neural pass", "chunk of mixing"):
        operations, waits = launches[stage]
        assert operations > 100 and waits == {}, stage
    audit = sum(count for stage, (count, _) in launches.items() if stage.startswith("audit"))
    assert audit + launches["masses"][0] < 250_000  # a second of launches, at 5 us


@pytest.mark.slow
def test_a_planted_mix_of_devices_is_found_in_each_section(text_folder, tmp_path):
    """Each plant leaves a tensor on the CPU that belongs on the device (planted_mixes.py)."""
    os.environ["TEXT_FILES"] = f"{text_folder}/*.txt"
    done = program("tests/planted_mixes.py", str(tmp_path))
    del os.environ["TEXT_FILES"]
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {int(name.split()[0]) for name in found} == set(range(6, 17))
    for name, error in found.items():
        assert re.search("same device|indexed by one of|tensor to numpy", error), (name, error)
