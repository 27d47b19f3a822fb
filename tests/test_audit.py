"""The audit passes what is true and catches planted faults, each by the check made for it."""

import math
import re
import statistics
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import torch

import train_gpt as golf
from conftest import FEW_BLOCKS, ROOT


@pytest.fixture(scope="module")
def artifact(trained):
    """(path, header's vocabulary) of the tiny run's artifact."""
    return trained.logs / "golf-demo-1337.int6.ptz"


def evaluated(data, artifact, targets=1024, scored=True, **values):
    """An evaluation of the tiny artifact over a short stream, scored by its headline; with sums
    over the vocabulary unless scored is False."""
    cfg, run, corpus = data
    corpus = golf.replace(corpus, val=corpus.val[: targets + 1])
    cfg, tensors = golf.unpack(
        artifact.read_bytes(), golf.replace(cfg, **values), corpus.corpus["vocabulary_sha256"]
    )
    model = golf.build_model(cfg, run, {n: t.tensor() for n, t in tensors.items()})
    evaluation = golf.Evaluation(model, corpus, cfg, run)
    evaluation.neural_pass()
    evaluation.score(evaluation.headline, 0.0)
    if scored:
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
    assert rows["normalized"]["rescored"] == 1024 and rows["normalized"]["finds_one_score"] == 1
    assert (rows["single_pass"]["rebuilt_tables"] > 0) == (scoring == "calibrated")


@pytest.mark.parametrize("more_bits, verdict", [(-200, "PASS"), (0, "PASS"), (200, "FAIL")])
def test_fewer_bits_than_claimed_are_no_fault(data, artifact, monkeypatch, more_bits, verdict):
    """A coder's fixed point makes a token that is next to impossible cheaper than its score."""
    encode = golf.encode_message

    def counted(evaluation, runs):
        coded = encode(evaluation, runs)
        return coded._replace(bits=coded.bits + more_bits)

    monkeypatch.setattr(golf, "encode_message", counted)
    evaluation = evaluated(data, artifact, scoring="neural", **SMALL)
    failed(evaluation, monkeypatch)
    rows = {r["name"]: r for r in evaluation.run.record["audit"]}
    assert rows["decodable"]["verdict"] == verdict


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

    def peeking(self, w, tokens, last, looping):
        return trunk(self, w, torch.cat([tokens[:, 1:], tokens[:, -1:]], 1), last, looping)

    monkeypatch.setattr(golf.GPT, "trunk", peeking)
    assert {"causal", "decodable"} <= failed(evaluated(data, artifact, **SMALL), monkeypatch)


def test_a_gate_that_looks_at_the_target_is_no_distribution(data, artifact, monkeypatch):
    predict = golf.CalibratedMixer.predict

    def gated(self, x):  # trusts a level more where it is right
        return predict(self, x._replace(level_key=x.level_key.where(x.ratio[..., 0] > 0, 0)))

    monkeypatch.setattr(golf.CalibratedMixer, "predict", gated)
    assert "normalized" in failed(evaluated(data, artifact, **SMALL), monkeypatch)


def test_a_grid_that_scores_twice_is_no_single_pass(data, artifact, monkeypatch):
    spans_of = golf.Grid.spans_of

    def twice(self, numbers):
        spans = spans_of(self, numbers)
        spans[:, 1] -= (numbers == self.count - 1).int()  # the last window reaches back by one
        return spans

    monkeypatch.setattr(golf.Grid, "spans_of", twice)
    row = golf.audit_single_pass(evaluated(data, artifact, 1030, False, **SMALL))
    assert not row["passed"] and row["most_times"] == 2 and row["unscored"] == 0


def test_a_target_that_no_window_scores_is_found(data, artifact, monkeypatch):
    spans_of = golf.Grid.spans_of

    def hole(self, numbers):
        spans = spans_of(self, numbers)
        spans[:, 1] += (numbers == self.count - 1).int()
        return spans

    monkeypatch.setattr(golf.Grid, "spans_of", hole)
    row = golf.audit_single_pass(evaluated(data, artifact, 1030, False, **SMALL))
    assert not row["passed"] and row["most_times"] == 1 and row["unscored"] == 1
    assert row["impossible_scores"] >= 1  # what is not scored stays NaN, and what comes of it


def test_one_doctored_score_among_the_rescored_is_found(data, artifact, monkeypatch):
    """Whatever headline reads it; here every window is computed again."""
    evaluation = evaluated(data, artifact, **SMALL)
    assert golf.audit_normalized(evaluation)["passed"]
    sampled = set(evaluation.places.samples)
    target = next(i for i in range(500, 1024) if i not in sampled)
    evaluation.columns.logp[target] += 0.01
    row = golf.audit_normalized(evaluation)
    assert not row["passed"] and abs(row["rescore_error"] - 0.01) < 1e-6
    assert row["score_error"] < 1e-4


def test_the_stated_probability_of_finding_an_altered_window(data, artifact, monkeypatch):
    """Windows follow from network and scores; those of other networks hit one altered window as
    often as stated."""
    monkeypatch.setattr(golf, "RESCORED_WINDOWS", 8)
    evaluation = evaluated(data, artifact, **SMALL)
    assert golf.draw_windows(evaluation) == golf.draw_windows(evaluation)

    def of_network(number: int, look: Callable):
        evaluation.network = f"network {number}"
        return look(evaluation)

    drawn = [of_network(number, golf.draw_windows) for number in range(400)]
    assert len({tuple(windows) for windows in drawn}) > 300
    assert all(0 in windows and len(set(windows)) == len(windows) for windows in drawn)
    hits = sum(17 in windows for windows in drawn) / len(drawn)
    # Rows beyond the stream's end are drawn, too, and dropped: fewer windows then.
    facts = [of_network(number, golf.rescore) for number in range(20)]
    for stated in ("finds_one_percent", "finds_one_score"):
        assert abs(statistics.fmean(row[stated] for row in facts) - hits) < 0.04


def test_tables_updated_before_the_score_are_found(data, artifact, monkeypatch):
    """A mixer that has learned from its own chunk before it scores it."""
    predict, update = golf.CalibratedMixer.predict, golf.CalibratedMixer.update

    def eager(self, x):
        if len(x.neural.entropy.unique()) > 1:  # not where all tokens of one place are asked
            update(self, predict(self, x)[1])
        return predict(self, x)

    monkeypatch.setattr(golf.CalibratedMixer, "predict", eager)
    assert failed(evaluated(data, artifact, **SMALL), monkeypatch) & {"causal", "decodable"}


def test_a_mass_that_is_no_number_is_no_distribution(data, artifact):
    """Wherever it stands among the samples: NaN is neither above nor below."""
    evaluation = evaluated(data, artifact, scored=False, **SMALL)
    distribution, places = evaluation.distribution, evaluation.places.samples
    networks = evaluation.neural.distributions(places)
    for spoiled in (list(networks)[0], list(networks)[-1]):

        def one_nan(scoring, target, *more, spoiled=spoiled):
            logp, ngram = distribution(scoring, target, *more)
            return logp * (golf.math.nan if target == spoiled else 1.0), ngram

        evaluation.distribution = one_nan
        facts = evaluation.mass_of("calibrated", networks)
        assert facts["normalized"] == "no" and golf.math.isnan(facts["mass_error"])
        evaluation.rows["calibrated"] |= facts
        assert not golf.audit_normalized(evaluation)["passed"]


@pytest.mark.parametrize("value", [golf.math.nan, -golf.math.inf, 0.5])
def test_a_score_that_is_no_probability_is_found(data, artifact, monkeypatch, value):
    """Outside of the samples, of the replaced tokens and of the coded targets."""
    evaluation = evaluated(data, artifact, **SMALL)
    evaluation.logp["calibrated"][-1] = value
    evaluation.rows["calibrated"] |= golf.score_of(
        evaluation.logp["calibrated"], evaluation.data.val_bytes
    )
    row = golf.audit_single_pass(evaluation)
    assert not row["passed"] and row["impossible_scores"] == 1


def test_cut_off_streams_are_compared_score_by_score(data, artifact, monkeypatch):
    """One score that no sample, coded target or changed stream touches."""
    evaluation = evaluated(data, artifact, **SMALL)
    last = max(golf.rebuilt_samples(evaluation)) // 64 * 64 - 1
    row = golf.audit_single_pass(evaluation)
    assert row["passed"] and row["share"] == 1.0
    # As of a stream that is too long to be mixed anew as a whole.
    monkeypatch.setattr(golf, "scores_again", lambda _: torch.empty(0))
    row = golf.audit_single_pass(evaluation)
    assert row["passed"] and row["share"] == (last + 1) / 1024 > 0.8
    evaluation.logp["calibrated"][last] += 1e-12
    row = golf.audit_single_pass(evaluation)
    assert not row["passed"] and row["differing_scores"] == 1 and row["wrong_tables"] == 0


@pytest.mark.parametrize("scoring", ["neural", "backoff", "calibrated"])
def test_every_score_of_the_headline_is_mixed_anew(data, artifact, scoring):
    """Also the last one, which no cut-off stream has."""
    evaluation = evaluated(data, artifact, scoring=scoring, **SMALL)
    assert golf.audit_single_pass(evaluation)["passed"]
    scores = evaluation.logp[evaluation.headline].clone()  # the network's are its column
    scores[-1] += 1e-12
    evaluation.logp[evaluation.headline] = scores
    row = golf.audit_single_pass(evaluation)
    assert not row["passed"] and row["differing_scores"] == 1 and row["share"] == 1.0


def test_places_follow_from_what_is_scored_and_not_from_its_spelling(data, artifact):
    """Of an artifact's bytes they know nothing: another network or other scores draw others."""
    evaluation = evaluated(data, artifact, scored=False, **SMALL)
    assert golf.draw_places(evaluation) == evaluation.places
    seen = {tuple(evaluation.places.samples)}
    evaluation.columns.logp[17] += 1e-12
    seen.add(tuple(golf.draw_places(evaluation).samples))
    evaluation.network = "another"
    seen.add(tuple(golf.draw_places(evaluation).samples))
    assert len(seen) == 3
    cfg, stored = golf.unpack(artifact.read_bytes(), data[0], data[2].corpus["vocabulary_sha256"])
    digest = golf.network_digest(stored, cfg, "v")
    assert golf.network_digest(stored, golf.replace(cfg, compressor="lzma"), "v") == digest
    name = next(k for k, t in stored.items() if isinstance(t, golf.CodedTensor))
    codes = stored[name].codes.copy()
    codes.flat[0] ^= 1
    changed = stored | {name: stored[name]._replace(codes=codes)}
    assert golf.network_digest(changed, cfg, "v") != digest


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
        data = golf.replace(corpus, val=val, text=None)
        rows = {"neural": golf.score_of(torch.full((len(val) - 1,), -1.0), data.val_bytes)}
        return golf.audit_bytes(types.SimpleNamespace(data=data, rows=rows, headline="neural"))

    assert row(whole, whole)["passed"] and row(whole, whole[:-1])["passed"]
    cut = row(whole[:-1], whole)
    assert not cut["passed"] and cut["wrong_documents"] == 1


def test_a_message_decodes_in_another_process_from_artifact_and_message(
    data, artifact, workplace, tmp_path, monkeypatch
):
    """No validation tokens are in reach there: the folder holds the two files and nothing else, and
    the message one run of targets, which is not among the tokens that it holds as they are."""
    evaluation = evaluated(data, artifact, **SMALL)
    runs = [run for run in evaluation.places.coded if run[0] >= 3 * 64][:1]
    message, bits, scores, _ = golf.encode_message(evaluation, runs)
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
(tokens,) = golf.decode_message(model, open("message", "rb").read(), cfg, run)
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
    ((first, end),) = runs
    assert decoded == evaluation.data.val[: end + 1].tolist() and end - first == len(scores) == 16
    claimed = -float(evaluation.logp["calibrated"][first:end].sum()) / golf.math.log(2)
    assert abs(bits - claimed) <= 0.001 * claimed + 64


def test_strict_audits_decide_the_exit_status(job, artifact):
    more = dict(LOAD_ARTIFACT=str(artifact), VAL_TOKENS="1024", MIXER_CHUNK_TOKENS="64")
    good = job(AUDIT="strict", **more)
    assert good.returncode == 0, good.stderr
    assert "\nverdict TOO LITTLE TEXT" in good.stdout  # what it says is true
    bad = job(AUDIT="strict", SCORING="backoff", NGRAM_TABLE="hashed", NGRAM_BUCKETS="64", **more)
    assert bad.returncode == 3 and bad.final.startswith("final ")
    assert "audit normalized FAIL" in bad.stdout and "audit causal PASS" in bad.stdout
    assert "\nverdict NOT A DISTRIBUTION (mass" in bad.stdout
    over = job(AUDIT="strict", ARTIFACT_BYTES="1000", **more)
    assert over.returncode == 3 and "\nverdict OVER BUDGET (total_bytes" in over.stdout
    off = job(AUDIT="0", **more)
    assert off.returncode == 0 and "\naudit " not in off.stdout
    assert "\nverdict NOT AUDITED" in off.stdout


def test_several_ranks_audit_what_one_does(job, artifact):
    more = dict(LOAD_ARTIFACT=str(artifact), VAL_TOKENS="2048", MIXER_CHUNK_TOKENS="64")
    one, two = (job(RANKS=n, AUDIT="strict", **more) for n in ("1", "2"))
    assert one.returncode == 0 and two.returncode == 0, two.stderr
    for a, b in zip(one.record["audit"], two.record["audit"], strict=True):
        assert a | dict(seconds=0) == b | dict(seconds=0)


def test_a_pass_is_kept_if_that_is_asked_for(job, artifact, tmp_path):
    """Its columns are the run's, to the bit; an evaluation makes its own whatever is there."""
    more = dict(LOAD_ARTIFACT=str(artifact), VAL_TOKENS="1024", LOGS_PATH=str(tmp_path))
    plain = job(**more)
    assert not list(tmp_path.glob("neural-*"))
    kept = job(SAVE_PASS="1", **more)
    (path,) = tmp_path.glob("neural-*.safetensors")
    assert kept.final == plain.final and f"saved {path}" in kept.stdout
    saved = golf.read_tensors(path)
    bits = -float(saved["columns"][0].sum()) / math.log(2)
    told = re.search(r"int6_sliding scoring:neural val_loss:\S+ val_bpb:(\S+)", kept.stdout)[1]
    assert bits / int(saved["byte_counts"].sum()) == pytest.approx(float(told), abs=1e-8)
    saved["columns"][0, 500:560] = -0.01
    golf.write_atomic(path, saved)
    assert job(SAVE_PASS="1", **more).final == plain.final


def test_a_stream_of_one_window_is_audited(job, artifact):
    """Its end is coded, from what is before."""
    done = job(LOAD_ARTIFACT=str(artifact), VAL_TOKENS="64", MIXER_CHUNK_TOKENS="16", AUDIT="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout.count(" PASS ") >= 5 and " FAIL " not in done.stdout
    assert "audit decodable PASS targets:16 windows:1 prefix_tokens:49" in done.stdout


def test_what_a_gpu_runs_is_proved(job):
    """Compiled graphs in bfloat16 on two ranks, from training to the decoder, as on CUDA; with the
    loop, that is with two graphs of training, and with all that golf has at full size."""
    more = dict(COMPILE="1", COMPUTE="bfloat16", AUDIT="strict", VAL_TOKENS="2048")
    done = job(2, **FEW_BLOCKS, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    rows = {row["name"]: row for row in done.record["audit"]}
    assert {row["verdict"] for row in rows.values()} == {"PASS"} and len(rows) == 5
    assert done.record["model"][-1]["compute"] == "bfloat16"
    assert rows["decodable"]["score_error"] <= 1e-4 >= rows["normalized"]["rescore_error"]
    assert rows["decodable"]["targets"] == 128 and done.record["trained"][0]["recompiles"] == 0


@pytest.mark.parametrize("scoring", ["neural", "calibrated", "backoff_hashed"])
@pytest.mark.parametrize("recipe", ["golf", "pr889", "pr1094"])
def test_places_lie_where_the_checks_can_see(recipe, scoring):
    """Of many networks: the replaced tokens begin inside a window; coded runs are in whole windows
    of rows of their own, after no update of tables, and in the first rank's history if it is
    cold."""
    cfg = golf.replace(golf.Config(), **golf.RECIPES[recipe])
    cfg = golf.replace(cfg, eval_seq_len=64, eval_stride=16, eval_batch_windows=8)
    cfg = golf.replace(cfg, mixer_chunk_tokens=40)
    seen = set()
    for number in range(60):
        grid = golf.Grid(64 * (1 + number), cfg, 16, 2)
        evaluation = types.SimpleNamespace(
            cfg=cfg,
            neural=types.SimpleNamespace(grid=grid),
            rules=golf.backoff_rules(cfg),
            headline=scoring,
            network=str(number),
            columns=golf.NeuralColumns.of(torch.zeros(golf.NEURAL_ROWS, grid.num_targets)),
        )
        places = golf.draw_places(evaluation)
        assert grid.window_of(places.changed) == grid.window_of(places.changed + 1)
        assert 0 <= places.changed < places.prefix <= grid.num_targets
        windows = [grid.window_of(end - 1) for _, end in places.coded]
        assert len({grid.row_of(window) for window in windows}) == len(windows)
        for window, (first, end) in zip(windows, places.coded, strict=True):
            assert grid.window_of(first) == window and first < end <= places.prefix
            assert scoring != "calibrated" or first // 40 == (end - 1) // 40
            if scoring == "backoff_hashed" and recipe == "pr889":
                assert end <= next(b for a, b in grid.spans if b > a)
        seen.add((places.changed, *places.samples))
    assert len(seen) == 60
