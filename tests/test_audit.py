"""The audit passes what is true and catches planted faults, each by the check made for it."""

import subprocess
import sys
import types

import pytest
import torch

import train_gpt as golf
from conftest import ROOT


@pytest.fixture(scope="module")
def artifact(trained):
    """(path, header's vocabulary) of the tiny run's artifact."""
    return trained.logs / "golf-demo-1337.int6.ptz"


def evaluated(data, artifact, targets=1024, **values):
    """An evaluation of the tiny artifact over a short stream, scored by its headline."""
    cfg, run, corpus = data
    corpus = golf.replace(corpus, val=corpus.val[: targets + 1])
    cfg, tensors = golf.unpack(
        artifact.read_bytes(), golf.replace(cfg, **values), corpus.corpus["vocabulary_sha256"]
    )
    model = golf.build_model(cfg, run, {n: t.tensor() for n, t in tensors.items()})
    evaluation = golf.Evaluation(model, corpus, cfg, run)
    evaluation.neural_pass()
    evaluation.score(evaluation.headline, 0.0)
    evaluation.masses()
    return evaluation


SMALL = dict(mixer_chunk_tokens=64)


def failed(evaluation, monkeypatch):
    """Names of the checks that fail, coding few targets."""
    monkeypatch.setattr(golf, "AUDIT_TARGETS", 96)
    evaluation.run.record["audit"].clear()
    return set(golf.audit(evaluation))


@pytest.mark.parametrize("scoring", ["calibrated", "backoff", "neural"])
def test_a_true_score_passes(data, artifact, monkeypatch, scoring):
    evaluation = evaluated(data, artifact, scoring=scoring, **SMALL)
    assert failed(evaluation, monkeypatch) == set()
    rows = {r["name"]: r for r in evaluation.run.record["audit"]}
    assert set(rows) == {"causal", "normalized", "single_pass", "bytes", "decodable"}
    assert rows["decodable"]["targets"] >= 96 and rows["causal"]["replaced"] > 0
    assert (rows["single_pass"]["rebuilt_tables"] > 0) == (scoring == "calibrated")


def test_a_hashed_headline_fails_by_its_mass_alone(data, artifact, monkeypatch):
    """Its fault is the distribution, not the order of reading."""
    evaluation = evaluated(
        data,
        artifact,
        scoring="backoff",
        ngram_table="hashed",
        ngram_buckets=64,
        ngram_min_count=1,
        **SMALL,
    )
    assert failed(evaluation, monkeypatch) == {"normalized", "decodable"}
    row = {r["name"]: r for r in evaluation.run.record["audit"]}
    assert row["normalized"]["mass"] > 1.5
    assert row["decodable"]["coded_bits"] > 1.2 * row["decodable"]["claimed_bits"]
    assert row["decodable"]["same_tokens"]


def test_a_network_that_peeks_is_not_causal(data, artifact, monkeypatch):
    trunk = golf.GPT.trunk

    def peeking(self, w, tokens, last):
        return trunk(self, w, torch.cat([tokens[:, 1:], tokens[:, -1:]], 1), last)

    monkeypatch.setattr(golf.GPT, "trunk", peeking)
    assert {"causal", "decodable"} <= failed(evaluated(data, artifact, **SMALL), monkeypatch)


def test_a_gate_that_looks_at_the_target_is_no_distribution(data, artifact, monkeypatch):
    predict = golf.CalibratedMixer.predict

    def gated(self, x):  # trusts a level more where it is right
        return predict(self, x._replace(level_key=x.level_key.where(x.ratio > 0, 0)))

    monkeypatch.setattr(golf.CalibratedMixer, "predict", gated)
    assert "normalized" in failed(evaluated(data, artifact, **SMALL), monkeypatch)


def test_a_grid_that_scores_twice_is_no_single_pass(data, artifact, monkeypatch):
    tile = golf.windows

    def twice(num_targets, seq_len, stride):
        *most, last = tile(num_targets, seq_len, stride)
        yield from most
        yield last
        yield last

    monkeypatch.setattr(golf, "windows", twice)
    assert "single_pass" in failed(evaluated(data, artifact, **SMALL), monkeypatch)


def test_tables_updated_before_the_score_are_found(data, artifact, monkeypatch):
    """A mixer that has learned from its own chunk before it scores it."""
    predict, update = golf.CalibratedMixer.predict, golf.CalibratedMixer.update

    def eager(self, x):
        if x.logp.numel() > 1 and x.is_hint.sum() != 1:
            update(self, predict(self, x)[1])
        return predict(self, x)

    monkeypatch.setattr(golf.CalibratedMixer, "predict", eager)
    assert failed(evaluated(data, artifact, **SMALL), monkeypatch) & {"causal", "decodable"}


def test_a_byte_table_off_by_one_is_found(data, artifact, monkeypatch):
    cfg, run, corpus = data
    evaluation = evaluated(data, artifact, **SMALL)
    table = golf.ByteTable(corpus.tokenizer)
    table.base[int(torch.bincount(corpus.val[1:1025]).argmax())] += 1
    evaluation.data = golf.replace(evaluation.data, table=table)
    assert failed(evaluation, monkeypatch) == {"bytes"}


def test_an_unknown_token_among_the_targets_is_found(data, artifact, monkeypatch):
    evaluation = evaluated(data, artifact, **SMALL)
    val = evaluation.data.val.clone()
    unknown = evaluation.data.tokenizer.unk_id()
    val[1000] = unknown
    evaluation.data = golf.replace(evaluation.data, val=val)
    row = golf.audit_bytes(evaluation)
    assert not row["passed"] and row["unknown_targets"] == 1 and unknown > 0


def test_only_the_streams_end_may_cut_a_character(data):
    """A character of byte pieces, whole or cut off by the end, balances; cut off before, not."""
    corpus = data[2]
    whole = [golf.BOS, *corpus.tokenizer.encode("plain \N{SNOWMAN}")]
    assert all(map(corpus.tokenizer.is_byte, whole[-3:]))

    def row(*tokens):
        val = torch.tensor([t for part in tokens for t in part])
        return golf.audit_bytes(types.SimpleNamespace(data=golf.replace(corpus, val=val)))

    assert row(whole, whole)["passed"] and row(whole, whole[:-1])["passed"]
    cut = row(whole[:-1], whole)
    assert not cut["passed"] and cut["wrong_documents"] == 1


def test_a_message_decodes_in_another_process_from_artifact_and_message(
    data, artifact, workplace, tmp_path, monkeypatch
):
    """No validation tokens are in reach there: the folder holds the two files and nothing else."""
    evaluation = evaluated(data, artifact, **SMALL)
    monkeypatch.setattr(golf, "AUDIT_TARGETS", 128)
    span = golf.audit_span(evaluation)
    assert span[0] >= 3 * 64
    message, bits, _ = golf.encode_message(
        evaluation.neural.model, evaluation.data.val, span, evaluation.cfg, evaluation.run
    )
    (tmp_path / "message").write_bytes(message)
    (tmp_path / "artifact").write_bytes(artifact.read_bytes())
    vocabulary = data[2].corpus["vocabulary_sha256"]
    script = f"""
import os
import train_gpt as golf
cfg, _ = golf.load_config(os.environ)
run = golf.Run(cfg)
cfg, tensors = golf.unpack(open("artifact", "rb").read(), cfg, {vocabulary!r})
model = golf.build_model(cfg, run, {{n: t.tensor() for n, t in tensors.items()}})
tokens = golf.decode_message(model, open("message", "rb").read(), cfg, run)
print(",".join(map(str, tokens.tolist())))
"""
    env = {k: v for k, v in workplace[1].items() if k not in ("TEXT_FILES", "PREPARED_PATH")}
    env |= dict(PATH="/usr/bin:/bin", OMP_NUM_THREADS="1", MIXER_CHUNK_TOKENS="64")
    env |= dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    decoded = [int(t) for t in done.stdout.splitlines()[-1].split(",")]
    assert decoded == evaluation.data.val[: span[1] + 1].tolist()
    claimed = -float(evaluation.logp["calibrated"][span[0] : span[1]].sum()) / golf.math.log(2)
    assert abs(bits - claimed) <= 0.001 * claimed + 64


def test_strict_audits_decide_the_exit_status(job, artifact):
    more = dict(LOAD_ARTIFACT=str(artifact), VAL_TOKENS="1024", MIXER_CHUNK_TOKENS="64")
    good = job(AUDIT="strict", **more)
    assert good.returncode == 0, good.stderr
    bad = job(AUDIT="strict", SCORING="backoff", NGRAM_TABLE="hashed", NGRAM_BUCKETS="64", **more)
    assert bad.returncode == 3 and bad.final.startswith("final ")
    assert "audit normalized FAIL" in bad.stdout and "audit causal PASS" in bad.stdout
    off = job(AUDIT="0", **more)
    assert off.returncode == 0 and "\naudit " not in off.stdout


def test_several_ranks_audit_what_one_does(job, artifact):
    more = dict(LOAD_ARTIFACT=str(artifact), VAL_TOKENS="2048", MIXER_CHUNK_TOKENS="64")
    one, two = (job(n, AUDIT="strict", **more) for n in (1, 2))
    assert one.returncode == 0 and two.returncode == 0, two.stderr
    for a, b in zip(one.record["audit"], two.record["audit"], strict=True):
        assert a | dict(seconds=0) == b | dict(seconds=0)


def test_a_saved_pass_gives_the_same_bits_and_only_its_own(job, artifact, tmp_path):
    """RESUME_EVAL=1 takes the pass of the same artifact, stream and windows, and no other."""
    more = dict(
        LOAD_ARTIFACT=str(artifact),
        VAL_TOKENS="1024",
        MIXER_CHUNK_TOKENS="64",
        LOGS_PATH=str(tmp_path),
    )
    plain = job(**more)
    (path,) = tmp_path.glob("neural-*.safetensors")
    again = job(RESUME_EVAL="1", AUDIT="strict", **more)
    assert again.returncode == 0 and again.final == plain.final
    assert f"neural pass: {path}, made in" in again.stdout and "eval [" not in again.stdout
    other = job(RESUME_EVAL="1", RECIPE="pr1094", **more)  # another mixer of the same pass
    assert "eval [" not in other.stdout and "scoring:backoff_hashed" in other.final
    for change in (dict(EVAL_STRIDE="32"), dict(VAL_TOKENS="512"), dict(EVAL_BATCH_WINDOWS="4")):
        done = job(RESUME_EVAL="1", **more | change)
        assert done.returncode == 0 and "so it is made now" in done.stdout, change
    path.write_bytes(path.read_bytes()[:1000])
    done = job(RESUME_EVAL="1", **more)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(path) in done.stderr


def test_a_stream_of_one_window_is_audited(job, artifact):
    """Its second half is coded, from its first."""
    done = job(
        LOAD_ARTIFACT=str(artifact), VAL_TOKENS="64", MIXER_CHUNK_TOKENS="16", AUDIT="strict"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "audit decodable PASS targets:32 prefix_tokens:33" in done.stdout
