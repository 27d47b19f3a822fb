"""The real command line, alone and under torchrun."""

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

import reference
import train_gpt as golf
from conftest import FRONTIER

# The submissions' published variables.
PUBLISHED = dict(
    pr889="SEED=1337 NGRAM_ENABLED=1 NGRAM_ORDER=7 VRL_ENABLED=1",
    pr806="NCCL_IB_DISABLE=1 NUM_LAYERS=11 RELU_SLOPE=0.9 MUON_WD=0.04 ADAM_WD=0.04 "
    "MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 "
    "MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3000 "
    "NGRAM_CACHE=1 NGRAM_ENTROPY=1",
    pr890="SEED=42",
    pr1094="LATE_QAT_THRESHOLD=0 TTT_ENABLED=0 KG_LOSS_WEIGHT=0.1 USE_NGRAM_MIXER=1 NGRAM_ORDER=10 "
    "ALPHA_BASE=0.20 ALPHA_RANGE=0.55 ALPHA_CENTER=3.0 COMPLEMENT_ALPHA=0 NGRAM_MIN_COUNT=1",
)


def results(done):
    """{(stage, scoring): row} of a run."""
    return {(r["stage"], r["scoring"]): r for r in done.record["result"]}


def test_a_run_ends_with_its_final_line_and_files(trained):
    pattern = (
        r"final val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} scoring:calibrated normalized:yes "
        r"total_bytes:\d+ seed:1337"
    )
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
    bpb = {scoring: row["val_bpb"] for (stage, scoring), row in rows.items() if "sliding" in stage}
    assert rows["int6_sliding", "calibrated"]["tokens"] == 4096
    assert bpb["neural"] > bpb["backoff_exact"] > bpb["calibrated"]
    checks = ("causal", "normalized", "single_pass", "bytes", "decodable")
    assert [(a["name"], a["verdict"]) for a in record["audit"]] == [(n, "PASS") for n in checks]
    verdict = trained.stdout.splitlines()[-2]
    assert re.fullmatch(
        r"verdict TOO LITTLE TEXT \(\d+ bytes that do not repeat others, of 100000\)", verdict
    )
    assert submission["verdict"] == verdict.removeprefix("verdict ")


def test_a_run_says_what_it_will_do_and_how_long_it_takes(trained):
    lines = trained.stdout.splitlines()
    assert lines[0] == "golf at demo scale: data, training (6 steps), export, evaluation, audit"
    (expected,) = trained.record["expected"]
    assert expected.keys() == {"training_seconds", "evaluation_seconds", "audit_seconds"}
    rows = trained.record["train"] + trained.record["eval"]
    assert all(row["eta_seconds"] >= 0 for row in rows) and rows[-1]["eta_seconds"] == 0
    text = "\n".join(lines)
    decoded = re.findall(r"audit decodable \[(\d+)/(\d+)\] eta_seconds:\d+$", text, re.M)
    # How many steps the coded windows take follows from the artifact's bits.
    shares = [int(done) / int(steps) for done, steps in decoded]
    assert len(shares) == golf.AUDIT_LINES - 1 and shares == sorted(shares) and shares[-1] < 1


def test_the_picture_has_the_network_by_stage(trained):
    rows = {row["name"]: row["val_bpb"] for row in golf.scores_by_stage(trained.record)}
    networks = {"neural, trained", "neural, shipped", "neural, sliding"}
    scorings = {"calibrated", "backoff_exact", "backoff_hashed", "unigram, fitted"}
    assert rows.keys() == networks | scorings and len({rows[name] for name in networks}) == 3
    assert rows["neural, trained"] == trained.record["validation"][-1]["val_bpb"]
    assert [*rows.values()] == sorted(rows.values(), reverse=True)


def test_the_same_seed_gives_the_same_bytes_and_warm_up_leaves_no_trace(job, trained):
    again = job(WARMUP_STEPS="0")
    assert again.final == trained.final
    name = "golf-demo-1337.int6.ptz"
    assert (again.logs / name).read_bytes() == (trained.logs / name).read_bytes()
    weights = "golf-demo-1337.safetensors"
    assert (again.logs / weights).read_bytes() == (trained.logs / weights).read_bytes()
    losses = [[r["train_loss"] for r in d.record["train"]] for d in (again, trained)]
    assert losses[0] == losses[1]


def test_another_seed_and_micro_batches(job, trained):
    """A seed gives other weights; the size of a forward pass gives the same up to rounding."""
    assert job(SEED="7", NGRAM_ENABLED="0").final != trained.final
    small = job(MICRO_BATCH_TOKENS="256", NGRAM_ENABLED="0")
    final = [d.record["validation"][-1]["val_loss"] for d in (trained, small)]
    assert abs(final[0] - final[1]) < 1e-3


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_is_bit_identical_for_any_world_size(job, trained, processes):
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    done = job(RANKS=str(processes), LOAD_ARTIFACT=artifact)
    assert done.returncode == 0, done.stderr
    assert done.final == trained.final
    for key, row in results(trained).items():
        assert results(done)[key]["val_loss"] == row["val_loss"], key


def test_a_cold_start_depends_on_the_number_of_ranks(job, trained):
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    one, two = (job(RANKS=n, LOAD_ARTIFACT=artifact, RECIPE="pr889") for n in ("1", "2"))
    key = ("int6_sliding", "backoff_hashed")
    assert results(one)[key]["val_bpb"] != results(two)[key]["val_bpb"]
    key = ("int6_sliding", "backoff_exact")
    assert results(one)[key]["val_bpb"] == results(two)[key]["val_bpb"]


@pytest.mark.parametrize("network", [{}, FRONTIER], ids=["shared", "golf's"])
def test_two_ranks_train_the_same_network(job, trained, network):
    alone = job(**network) if network else trained
    done = job(RANKS="2", **network) if network else job(2)  # torchrun's
    assert alone.returncode == done.returncode == 0, alone.stderr + done.stderr
    assert [len(d.record["train"]) for d in (alone, done)] == [6, 6]
    final = [d.record["validation"][-1]["val_loss"] for d in (alone, done)]
    assert abs(final[0] - final[1]) < 1e-3
    one, two = (load_file(d.logs / "golf-demo-1337.safetensors") for d in (alone, done))
    assert one.keys() == two.keys()
    for name in one:
        gap, moved = (one[name] - two[name]).abs().max(), one[name].abs().max()
        assert gap <= 1e-2 * moved + 1e-4, name


@pytest.mark.parametrize("pieces", ["4096"])
def test_larger_vocabularies_are_proved_like_any(job, pieces):
    done = job(VOCAB_SIZE=pieces, AUDIT="strict", ITERATIONS="3", VAL_TOKENS="2048")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.record["config"]["vocab_size"] == int(pieces)
    assert [row["verdict"] for row in done.record["audit"]] == 5 * ["PASS"]


def test_an_artifact_knows_its_text_and_vocabulary(job, trained, tmp_path):
    """From its run's record beside it; alone it knows how many pieces its vocabulary has."""
    artifact = trained.logs / "golf-demo-1337.int6.ptz"
    own = ("TEXT_FILES", "PREPARED_PATH", "VOCAB_SIZE", "VAL_TOKENS", "EVAL_SEQ_LEN", "SCALE")
    done = job(LOAD_ARTIFACT=str(artifact), drop=own)
    assert done.returncode == 0, done.stderr
    assert done.final == trained.final
    told = next(x for x in done.stdout.splitlines() if x.startswith("as the artifact's own run: "))
    assert all(f"{name}=" in told for name in {*own} - {"PREPARED_PATH"})
    assert "PREPARED_PATH" not in told  # a record never says where to write
    alone = tmp_path / "x.int6.ptz"
    alone.write_bytes(artifact.read_bytes())
    cfg, notes = golf.load_config(dict(LOAD_ARTIFACT=str(alone)))
    assert cfg.vocab_size == 512 and "as the artifact's own run: VOCAB_SIZE=512" in notes
    assert golf.load_config(dict(LOAD_ARTIFACT=str(alone), VOCAB_SIZE="600"))[0].vocab_size == 600
    for bad, reason in ((tmp_path / "none", "there is no such file"), (tmp_path, "not a regular")):
        with pytest.raises(golf.RunError, match=f"^LOAD_ARTIFACT=.*: {reason}"):
            golf.load_config(dict(LOAD_ARTIFACT=str(bad)))


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"config": 3}', '{"config": null}'])
def test_an_artifact_beside_a_foreign_record_is_one_alone(trained, tmp_path, text):
    path = tmp_path / "x.int6.ptz"
    path.write_bytes((trained.logs / "golf-demo-1337.int6.ptz").read_bytes())
    path.with_name("x.json").write_text(text)
    cfg, notes = golf.load_config(dict(LOAD_ARTIFACT=str(path)))
    assert cfg.vocab_size == 1024 and not any("artifact" in note for note in notes)


def test_what_makes_another_score_of_an_artifact_is_said(trained):
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")

    def told(**variables):
        notes = golf.load_config(dict(LOAD_ARTIFACT=artifact, **variables))[1]
        return [note for note in notes if note.startswith("unlike the artifact's own run, ")]

    own = dict(EVAL_STRIDE="16", MIXER_CHUNK_TOKENS="256", NGRAM_BUCKETS="1024")
    assert told(**own) == [] == told(**own, SAMPLE="x")
    (line,) = told(**own | dict(EVAL_STRIDE="32", NGRAM_ENT_CENTER="3"))
    bpb = trained.record["final"][0]["val_bpb"]
    assert line.endswith(f"of val_bpb:{bpb:.8f}, which had EVAL_STRIDE=16 NGRAM_ENT_CENTER=4.0")
    assert "which had RECIPE=golf SCORING=calibrated NGRAM_" in told(**own, RECIPE="pr890")[0]


def test_a_stride_and_scoring_of_choice_on_an_artifact(job, trained):
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    done = job(LOAD_ARTIFACT=artifact, EVAL_STRIDE="64", SCORING="neural", VAL_TOKENS="1024")
    assert done.returncode == 0 and "scoring:neural" in done.final
    rows = results(done)
    sliding, whole = rows["int6_sliding", "neural"], rows["int6_roundtrip", "neural"]
    assert sliding["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-7)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_recipe_runs_with_its_published_variables(job, recipe, data, run):
    variables = dict(v.split("=") for v in PUBLISHED[recipe].split())
    own = ("NUM_KV_HEADS", "ROPE_DIMS")  # the recipe's, not the tiny run's
    done = job(RECIPE=recipe, drop=own, VAL_TOKENS="8192", **variables)
    assert done.returncode == 0, done.stderr
    assert "scoring:backoff_hashed normalized:no" in done.final
    for name in variables:
        if name in ("TTT_ENABLED", "KG_LOSS_WEIGHT", "COMPLEMENT_ALPHA"):
            assert f"variable {name} has no effect" in done.stdout
    averaged = done.record["trained"][0]
    assert averaged["averaged"] == ("swa" if recipe == "pr806" else "ema")
    assert averaged["averaged_samples"] > 0
    rows = results(done)
    bits = "int5" if recipe == "pr890" else "int6"
    assert rows[f"{bits}_sliding", "backoff_exact"]["normalized"] == "yes"
    assert ((f"{bits}_sliding", "backoff_exact_pair") in rows) == (recipe == "pr890")
    mixes_as_it_should(done, golf.load_data(golf.replace(data[0], val_tokens=8192), run), run)


def mixes_as_it_should(done, corpus, run):
    """Every row of the score table, from the artifact's network and a mixer of dictionaries."""
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in done.record["config"].items()}
    cfg, name = golf.Config(**config), f"{config['run_id']}.int{config['matrix_bits']}.ptz"
    cfg, tensors = golf.unpack(
        (done.logs / name).read_bytes(), cfg, corpus.corpus["vocabulary_sha256"]
    )
    model = golf.GPT(golf.replace(cfg, mtp_num_heads=0), golf.sdpa_attention)
    model.load_state_dict({n: t.tensor() for n, t in tensors.items()})
    columns = golf.NeuralPass(model, corpus, cfg, run, cfg.eval_stride).columns()
    columns = golf.NeuralColumns.of(columns.unbind(1))
    hashed = dict(buckets=cfg.ngram_buckets, match=cfg.ngram_match)
    first, stride = cfg.eval_seq_len, cfg.eval_stride
    hashed |= dict(
        window=dict(first=first, granularity=stride),
        batch=dict(first=first + 127 * stride, granularity=128 * stride),
    )[cfg.ngram_granularity]
    rules = dict(backoff_hashed=hashed, backoff_exact={}, backoff_exact_pair=dict(match="pair"))
    rows = {r["scoring"]: r for r in done.record["result"] if "sliding" in r["stage"]}
    assert rows.pop("calibrated")["normalized"] == "yes"
    assert abs(rows.pop("neural")["val_loss"] + float(columns.logp.mean())) < 1e-7
    for scoring, row in rows.items():
        losses = reference.backoff_loss(
            corpus.val.tolist(),
            columns.logp.tolist(),
            columns.entropy.tolist(),
            cfg,
            **rules[scoring],
        )
        assert abs(row["val_loss"] - sum(losses) / len(losses)) < 1e-7, scoring
        bits = torch.tensor(losses).sum() / golf.math.log(2)
        assert abs(row["val_bpb"] - float(bits) / row["bytes"]) < 1e-6


def test_saved_weights_start_again_at_quantization(job, trained, tmp_path):
    """Weights give the artifact that the run gave, and a final line; foreign ones are one line."""
    name = "golf-demo-1337"
    done = job(LOAD_WEIGHTS=str(trained.logs / f"{name}.safetensors"))
    assert done.returncode == 0 and done.final == trained.final, done.stderr
    made, before = (d.logs / f"{name}.int6.ptz" for d in (done, trained))
    assert made.read_bytes() == before.read_bytes()
    assert "\nstep:" not in done.stdout
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    for path, more, word in (
        (tmp_path / "bad.safetensors", {}, "bad.safetensors"),
        (tmp_path / "none.safetensors", {}, "none.safetensors"),
        (trained.logs / f"{name}.safetensors", dict(MODEL_DIM="64"), "fit"),
    ):
        bad = job(LOAD_WEIGHTS=str(path), **more)
        assert bad.returncode == 2 and len(bad.stderr.splitlines()) == 1 and word in bad.stderr


def test_the_wall_clock_cap_holds(job):
    done = job(MAX_WALLCLOCK_SECONDS="4", ITERATIONS="100000", NGRAM_ENABLED="0")
    trained = done.record["trained"][0]
    assert 2 < trained["train_seconds"] <= 4 and trained["steps"] > 5
    # The last step begins about two steps before the cap, where the lr, which falls over half of
    # the run, has that part of it left, twice; as much again for steps that take longer.
    step_seconds = trained["train_seconds"] / trained["steps"]
    assert done.record["train"][-1]["lr_scale"] < 2 * 4 * step_seconds / 4
    assert "budget train_seconds" in done.stdout and "scoring:neural" in done.final


def test_sigterm_ends_training_and_still_scores(job, tmp_path):
    logs = tmp_path / "logs"
    process = job(wait=False, ITERATIONS="80", TRAIN_LOG_EVERY="1", LOGS_PATH=str(logs))
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("step:") for line in lines)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out[-300:] + err
    assert "stop requested" in out and out.strip().splitlines()[-1].startswith("final ")
    assert re.search(r"^trained steps:\d+ ", out, re.MULTILINE) and not err
    steps = re.search(r"training ends after (\d+) steps; RESUME=1 goes on; a second", out)[1]
    assert f"INTERRUPTED (training ended by a signal after {steps} steps)" in out
    more = dict(RESUME="1", LOGS_PATH=str(logs))
    refused = job(MAX_WALLCLOCK_SECONDS="2", **more, ITERATIONS="80")
    assert refused.returncode == 2 and "MAX_WALLCLOCK_SECONDS was 0" in refused.stderr
    assert "\nwarmup " not in refused.stdout
    done = job(ITERATIONS="80", NGRAM_ENABLED="0", **more)
    assert done.returncode == 0 and f"checkpoint: {steps} steps" in done.stdout
    assert "step:80/80" in done.stdout and "INTERRUPTED" not in done.stdout


def test_a_loop_that_was_never_on_is_no_part_of_the_network(job):
    """Validated, exported and scored as the network of LOOP_PASSES=1, which it is, bit for bit."""
    off = dict(FRONTIER, LOOP_FROM="0.9", ITERATIONS="4", VAL_LOSS_EVERY="2", NGRAM_ENABLED="0")
    done, plain = job(**off), job(**off | dict(LOOP_PASSES="1"))
    assert done.returncode == 0, done.stderr
    assert "training ended before LOOP_FROM=0.9: a network of LOOP_PASSES=1" in done.stdout
    names = ("validation", "result")
    bpb = [[row["val_bpb"] for n in names for row in d.record[n]] for d in (done, plain)]
    assert bpb[0] == bpb[1] and len(bpb[0]) >= 4
    artifacts = [(d.logs / "golf-demo-1337.int6.ptz").read_bytes() for d in (done, plain)]
    assert artifacts[0] == artifacts[1]


def test_an_existing_runs_files_stay(job, trained, tmp_path):
    """A second run of the same name takes the next free one."""
    artifact = str(trained.logs / "golf-demo-1337.int6.ptz")
    more = dict(RUN_ID="same", NGRAM_ENABLED="0", LOGS_PATH=str(tmp_path), LOAD_ARTIFACT=artifact)
    assert job(**more).returncode == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert job(**more).returncode == 0
    second = {n.replace("same", "same-2") for n in before}
    assert {p.name for p in tmp_path.iterdir()} == {*before, *second}
    assert all((tmp_path / n).read_bytes() == b for n, b in before.items())
