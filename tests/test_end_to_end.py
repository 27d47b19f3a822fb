"""The real command line, alone and under torchrun."""

import json
import re
import signal
import time

import pytest

# The submissions' published variables.
PUBLISHED = dict(
    pr889="SEED=1337 NGRAM_ENABLED=1 NGRAM_ORDER=7 VRL_ENABLED=1",
    pr806="NCCL_IB_DISABLE=1 NUM_LAYERS=11 RELU_SLOPE=0.9 MUON_WD=0.04 ADAM_WD=0.04 "
          "MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 "
          "MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3000 "
          "NGRAM_CACHE=1 NGRAM_ENTROPY=1",
    pr890="SEED=42",
    pr1094="LATE_QAT_THRESHOLD=0 TTT_ENABLED=0 KG_LOSS_WEIGHT=0.1 USE_NGRAM_MIXER=1 NGRAM_ORDER=10 "
           "ALPHA_BASE=0.20 ALPHA_RANGE=0.55 ALPHA_CENTER=3.0 COMPLEMENT_ALPHA=0 NGRAM_MIN_COUNT=1")


def results(done):
    """{(stage, scoring): row} of a run."""
    return {(r["stage"], r["scoring"]): r for r in done.record["result"]}


def test_a_run_ends_with_its_final_line_and_files(trained):
    pattern = (r"final val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} scoring:backoff_exact normalized:yes "
               r"total_bytes:\d+ seed:1337")
    assert re.fullmatch(pattern, trained.final)
    names = {p.name.split(".", 1)[1] for p in trained.logs.iterdir()}
    assert names == {"txt", "json", "png", "submission.json", "safetensors", "int6.ptz"}
    record = trained.record
    assert record["config"]["model_dim"] == 32 and record["facts"]["code_sha256"]
    assert (trained.logs / "golf-demo-1337.txt").read_text() == trained.stdout
    submission = json.loads((trained.logs / "golf-demo-1337.submission.json").read_text())
    assert submission["val_bpb"] == record["final"][0]["val_bpb"]
    assert submission["author"] == "a tester" and submission["normalized"] is True
    sizes = {p.name.split(".", 1)[1]: p.stat().st_size for p in trained.logs.iterdir()}
    assert submission["bytes_total"] == sizes["int6.ptz"] + submission["bytes_code"]
    assert (trained.logs / "golf-demo-1337.png").read_bytes().startswith(b"\x89PNG")
    rows = results(trained)
    assert rows["int6_sliding", "backoff_exact"]["tokens"] == 4096
    assert rows["int6_sliding", "neural"]["val_bpb"] > rows[
        "int6_sliding", "backoff_exact"]["val_bpb"]


def test_the_same_seed_gives_the_same_bytes_and_warm_up_leaves_no_trace(job, trained):
    again = job(WARMUP_STEPS="0")
    assert again.final == trained.final
    name = "golf-demo-1337.int6.ptz"
    assert (again.logs / name).read_bytes() == (trained.logs / name).read_bytes()
    assert job(SEED="7").final != trained.final


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_is_bit_identical_for_any_world_size(job, trained, processes):
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    done = job(processes, LOAD_ARTIFACT=artifact)
    assert done.returncode == 0, done.stderr
    assert done.final == trained.final
    for key, row in results(trained).items():
        assert results(done)[key]["val_loss"] == row["val_loss"], key


def test_a_cold_start_depends_on_the_number_of_ranks(job, trained):
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    one, two = (job(n, LOAD_ARTIFACT=artifact, RECIPE="pr889") for n in (1, 2))
    key = ("int6_sliding", "backoff_hashed")
    assert results(one)[key]["val_bpb"] != results(two)[key]["val_bpb"]
    key = ("int6_sliding", "backoff_exact")
    assert results(one)[key]["val_bpb"] == results(two)[key]["val_bpb"]
    assert "each of the 2 ranks begins with a cold cache" in two.stdout


def test_two_ranks_train_the_same_network(job, trained):
    done = job(2)
    assert done.returncode == 0, done.stderr
    losses = [[r["train_loss"] for r in d.record["train"]] for d in (trained, done)]
    assert len(losses[0]) == len(losses[1]) == 6
    final = [d.record["validation"][-1]["val_loss"] for d in (trained, done)]
    assert abs(final[0] - final[1]) < 2e-3


def test_a_stride_and_scoring_of_choice_on_an_artifact(job, trained):
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    done = job(LOAD_ARTIFACT=artifact, EVAL_STRIDE="64", SCORING="neural", VAL_TOKENS="1024")
    assert done.returncode == 0 and "scoring:neural" in done.final
    rows = results(done)
    assert rows["int6_sliding", "neural"]["val_loss"] == rows[
        "int6_roundtrip", "neural"]["val_loss"]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_recipe_runs_with_its_published_variables(job, recipe):
    variables = dict(v.split("=") for v in PUBLISHED[recipe].split())
    own = ("NUM_KV_HEADS", "ROPE_DIMS")  # the recipe's, not the tiny run's
    done = job(RECIPE=recipe, drop=own, VAL_TOKENS="8192", **variables)
    assert done.returncode == 0, done.stderr
    assert "scoring:backoff_hashed normalized:no" in done.final
    assert "warning: backoff_hashed is no probability distribution" in done.stdout
    for name in variables:
        if name in ("TTT_ENABLED", "KG_LOSS_WEIGHT", "COMPLEMENT_ALPHA"):
            assert f"variable {name} has no effect" in done.stdout
    averaged = done.record["trained"][0]
    assert averaged["averaged"] == ("swa" if recipe == "pr806" else "ema")
    assert averaged["samples"] > 0
    rows = results(done)
    bits = "int5" if recipe == "pr890" else "int6"
    assert rows[f"{bits}_sliding", "backoff_exact"]["normalized"] == "yes"
    assert ((f"{bits}_sliding", "backoff_exact_pair") in rows) == (recipe == "pr890")


def test_the_wall_clock_cap_holds(job):
    done = job(MAX_WALLCLOCK_SECONDS="4", ITERATIONS="100000", NGRAM_ENABLED="0")
    trained = done.record["trained"][0]
    assert 2 < trained["train_seconds"] <= 4 and trained["steps"] > 10
    assert done.record["train"][-1]["lr_scale"] < 0.2
    # 1/(1 - 0.997) of 7,000 steps is 4.8 % of the run, also where progress is measured in time
    assert 1 <= trained["averaged_steps"] < 0.15 * trained["steps"]
    assert "budget train_seconds" in done.stdout and "scoring:neural" in done.final


def test_sigterm_ends_training_and_still_scores(job):
    process = job(wait=False, ITERATIONS="1000000", TRAIN_LOG_EVERY="1")
    for line in process.stdout:
        if line.startswith("step:"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stop requested" in out and out.strip().splitlines()[-1].startswith("final ")


def test_an_existing_runs_files_stay(job, tmp_path):
    first = job(RUN_ID="same", NGRAM_ENABLED="0", LOGS_PATH=str(tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    job(RUN_ID="same", NGRAM_ENABLED="0", LOGS_PATH=str(tmp_path))
    assert first.returncode == 0 and (tmp_path / "same-2.txt").exists()
    assert all((tmp_path / n).read_bytes() == b for n, b in before.items())
