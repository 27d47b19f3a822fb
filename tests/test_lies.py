"""Planted lies: each falsifies one thing in one stage, is found by the checks that are named with
it and by no others, and passes as a valid score once these are taken out.

What a lie leaves is an evaluation, an artifact, settings of data, a run's record, or records of
several runs; `findings` asks of each all that is asked of it in a run.
"""

import argparse
import ast
import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import lzma
import math
import shutil
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from test_artifact import opened, sealed
from test_verdict import RECORD

import train_gpt as golf
from tools import summary

DOCUMENTS, DOCUMENT_TOKENS = 4, 256  # of the validation stream that is scored here
TARGETS = DOCUMENTS * DOCUMENT_TOKENS
SAMPLES = 8  # targets at which scorings are summed here
DRAWS = 24  # of windows and samples, for a lie that is found by chance
NORMALIZED = {"normalized", "decodable"}  # find what is no distribution, or not the one scored
DRAWN_BY = golf.drawn_by
# Checks that end a run: module, function, words of the message.
REFUSALS = {
    "magic": (golf, "open_shard", ": magic "),
    "size of a shard": (golf, "open_shard", "the file has"),
    "vocabulary of a shard": (golf, "check_shard", "not below"),
    "text of a shard": (golf, "check_shard", "stand for no text"),
    "first token": (golf, "read_validation", "does not begin with BOS"),
    "tokenizer": (golf, "check_tokenizer", "bits per byte cannot be told"),
    "number of BOS": (golf, "load_tokenizer", "shards have"),
    "unknown pieces": (golf, "read_data", "whose bytes nobody knows"),
    "space sign": (golf, "read_text", "has U+2581"),
    "bytes of a document": (golf, "encode_documents", "its tokens stand for"),
    "digest": (golf, "open_artifact", "does not match"),
    "version": (golf, "open_artifact", "of format version"),
    "header": (golf, "read_header", "its header describes none"),
    "vocabulary": (golf, "unpack", "another vocabulary"),
    "finite": (golf, "unpack", "NaN or infinite"),
    "end of codes": (golf, "ans_decode", "do not end with its codes"),
    "spelling": (golf, "check_spelling", "not the bytes in which"),
    "pieces": (golf, "load_network", "its network has"),
    "end of section": (golf, "read_section", "compressed section is damaged"),
    "one configuration": (summary, "check_alike", "not one configuration"),
    "seeds": (summary, "check_alike", "appears"),
    "verdicts": (summary, "check_verdicts", "not VALID"),
    "code": (summary, "make_record", "made by another"),
    "gaps": (summary, "read_run", "a run's record without"),
    "one network": (summary, "check_networks", "the same network as"),
    "training": (summary, "check_trained", "not trained under a cap"),
}
VERDICTS = {
    *("NOT A DISTRIBUTION", "AUDIT FAILED", "NOT AUDITED", "OVER BUDGET", "NOT HELD OUT"),
    *("INTERRUPTED", "TOO LITTLE TEXT", "NO SCORE"),
}
NOT_THE_CHALLENGES = "not the challenge's validation text"
# Parts of what a record is warned of; the others are verdicts.
WARNINGS = (
    "is not the challenge's limit",
    "nothing was trained",
    "is in the training text too",
    "worse than the text's own token frequencies",
    "bytes per target",
    NOT_THE_CHALLENGES,
)


@dataclasses.dataclass
class World:
    """What a lie can falsify, honest at first, for one test.

    cfg, run, corpus: of a tiny run whose validation stream has DOCUMENTS documents. blob: its
    artifact. folder: empty. out: names of the checks that are taken out.
    """

    patch: pytest.MonkeyPatch
    folder: Path
    cfg: golf.Config
    run: golf.Run
    corpus: golf.Data
    blob: bytes
    out: set[str] = dataclasses.field(default_factory=set)

    def network(self, scoring: str = "neural", **values) -> golf.Evaluation:
        """The artifact's network, before its pass."""
        run = self.run.alone()
        run.base = str(self.folder / "run")
        cfg = golf.replace(self.cfg, scoring=scoring, **values)
        cfg, model, digest = golf.load_network(self.blob, self.corpus, cfg, run)
        return golf.Evaluation(model, self.corpus, cfg, run, digest, blob=self.blob)

    def scored(self, scoring: str = "neural", **values) -> golf.Evaluation:
        """An evaluation of the artifact, before its audit."""
        return score(self.network(scoring, **values))

    def honest(self, scoring: str = "neural") -> golf.Evaluation:
        """The same where nothing was falsified so far, for it is scored once for all tests."""
        evaluation = self.network(scoring)
        if scoring not in SCORED:
            SCORED[scoring] = score(self.network(scoring))
        for name in ("columns", "hints", "times", "places", "pass_seconds"):
            setattr(evaluation, name, getattr(SCORED[scoring], name))
        for name in ("rows", "logp", "mixers", "matched"):
            setattr(evaluation, name, copy.copy(getattr(SCORED[scoring], name)))
        evaluation.rows = copy.deepcopy(evaluation.rows)
        return evaluation

    def shards(self, model: bytes = b"", **splits) -> golf.Config:
        """Settings of a run on a folder of these shards, train= and val=, by default honest, with a
        tokenizer, by default the honest one."""
        path = Path(self.corpus.corpus["tokenizer"])
        if model:
            path = self.folder / "tokenizer.model"
            path.write_bytes(model)
        honest = {"train": self.corpus.train.read(0, 20_000), "val": self.corpus.val.numpy()}
        for split, tokens in (honest | splits).items():
            golf.write_shard(self.folder / f"x_{split}_000000.bin", np.asarray(tokens))
        paths = dict(data_path=str(self.folder), tokenizer_path=str(path))
        return golf.replace(self.cfg, text_files="", **paths)

    def pages(self) -> list[str]:
        """Forty different texts."""
        tokens = self.corpus.train.read(0, 20_000)
        parts = np.array_split(tokens[tokens != golf.BOS], 40)
        return [self.corpus.tokenizer.decode(part.tolist()) for part in parts]

    def texts(self, texts: list[str]) -> golf.Config:
        """Settings of a run on a folder of these texts."""
        (self.folder / "texts").mkdir()
        for i, text in enumerate(texts):
            (self.folder / "texts" / f"{i:02}.txt").write_bytes(text.encode())
        own = dict(text_files=f"{self.folder}/texts/*.txt", prepared_path=str(self.folder))
        return golf.replace(self.cfg, vocab_size=400, **own)


@dataclasses.dataclass
class Lie:
    """What is falsified, in which stage, and which checks find it.

    plant: makes it in a World, and returns what there is to judge. probability: with which its one
    check finds it, over what it draws.
    """

    name: str
    stage: str
    plant: Callable[[World], Any]
    found_by: set[str]
    probability: float = 1.0


LIES: list[Lie] = []
SCORED: dict[str, golf.Evaluation] = {}  # by scoring, of the honest artifact


def lie(stage: str, *found_by: str, probability: float = 1.0):
    """Put a function among the lies, under its own name."""

    def put(plant):
        LIES.append(Lie(plant.__name__, stage, plant, {*found_by}, probability))
        return plant

    return put


# Judging.


def score(evaluation: golf.Evaluation) -> golf.Evaluation:
    """Make the pass, and score the headline and the network alone."""
    evaluation.neural_pass()
    for scoring in dict.fromkeys([evaluation.headline, "neural"]):
        evaluation.score(scoring, evaluation.run.sync())
    return evaluation


def faults(record: dict) -> set[str]:
    """The verdict on a record, and the warnings by their words."""
    warnings = [*golf.warnings_of(record)]
    said = {words for words in WARNINGS if any(words in line for line in warnings)}
    return said | golf.verdict_of(record).keys()


def judge_evaluation(world: World, evaluation: golf.Evaluation) -> set[str]:
    """The checks that fail, and the verdict of the report."""
    run = evaluation.run
    run.record.clear()
    if "mass" not in evaluation.rows[evaluation.headline]:
        evaluation.masses()
    failed = {*golf.audit(evaluation)}
    golf.describe_run(evaluation.cfg, [], evaluation.data, run)
    verdict = golf.final_report(evaluation, world.blob, evaluation.cfg, run)
    assert ("AUDIT FAILED" in verdict) == bool(failed)
    return failed | (verdict.keys() - {"AUDIT FAILED"})


def judge_artifact(world: World, blob: bytes) -> set[str]:
    """Nothing but refusals: of its spelling, then of the network."""
    run = world.run.alone()
    golf.check_spelling(blob, world.cfg, world.corpus.corpus["vocabulary_sha256"])
    golf.load_network(blob, world.corpus, world.cfg, run)
    return set()


def judge_data(world: World, cfg: golf.Config) -> set[str]:
    """Refusals, the audit of the bytes, and the verdict on the text."""
    data = golf.load_data(cfg, world.run.alone())
    row = golf.score_of(torch.full((len(data.val) - 1,), -1.0), data.val_bytes)
    stub = types.SimpleNamespace(data=data, rows={"neural": row}, headline="neural")
    failed = {"bytes"} - world.out if not golf.audit_bytes(stub)["passed"] else set()
    shares = {key: x for key, x in data.corpus.items() if key.endswith("_share")}
    record = challenge_record()
    record["corpus"] |= shares
    for row in record["result"]:
        row |= dict(bytes=int(data.val_bytes.sum()), tokens=len(data.val) - 1)
    return failed | (faults(record) - {NOT_THE_CHALLENGES})


def judge_runs(world: World, records: list[dict]) -> set[str]:
    """Nothing but refusals of the records folder that is made of several runs."""
    paths = [world.folder / f"{i}.json" for i, _ in enumerate(records)]
    for path, record in zip(paths, records, strict=True):
        path.write_text(json.dumps(record))
        path.with_suffix(".txt").write_text("a log")
    parts = dict(runs=[*map(str, paths)], record=str(world.folder / "record"), submission="")
    wanted = dict(baseline="", mixed=False, any_verdict=False, untrained=False)
    summary.run(argparse.Namespace(**parts, **wanted))
    shutil.rmtree(parts["record"])  # for who asks again
    return set()


JUDGES = {
    golf.Evaluation: judge_evaluation,
    bytes: judge_artifact,
    golf.Config: judge_data,
    dict: lambda _, record: faults(record),
    list: judge_runs,
    types.FunctionType: lambda world, make: judge_evaluation(world, make()),
}


def findings(world: World, planted) -> set[str]:
    """All checks that find a fault. A refusal ends a run, so it is taken out, and the rest asked:
    what one check finds may be found by others too."""
    refused: set[str] = set()
    while True:
        try:
            return refused | JUDGES[type(planted)](world, planted)
        except (golf.RunError, summary.SummaryError) as error:
            names = [name for name, (_, _, words) in REFUSALS.items() if words in str(error)]
            assert len(names) == 1 and names[0] not in world.out, (names, error)
            refused |= {*names}
            take_out(world, *names)


# Taking checks out.


def without_refusal(function, words: str):
    """A function as its source has it, but for the one `if` that raises with these words."""
    tree, found = ast.parse(inspect.getsource(function)), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            raised = [x for x in node.body if isinstance(x, ast.Raise)]
            if any(words in ast.unparse(x).replace("\\'", "'") for x in raised):
                node.test, found = ast.Constant(False), found + 1
    assert found == 1, (function, words)
    made: dict[str, Any] = {}
    code = compile(ast.fix_missing_locations(tree), "<a check taken out>", "exec")
    exec(code, function.__globals__, made)  # it sees what its module has at any time
    return made[function.__name__]


def any_section(data: bytes, most_bytes: int) -> bytes:
    """decompress_lzma, whatever follows."""
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, most_bytes)


def kept(check: Callable) -> Callable:
    """A check that asks an evaluation once: whether others are taken out changes no answer."""
    told: dict[golf.Evaluation, dict] = {}

    def ask(evaluation):
        if evaluation not in told:
            told[evaluation] = check(evaluation)
        return {**told[evaluation]}

    return ask


def take_out(world: World, *names: str) -> None:
    """Leave these checks out of all that is asked from now on."""
    for name in {*names} - world.out:
        world.out.add(name)
        if name in golf.AUDITS:
            audits = {n: check for n, check in golf.AUDITS.items() if n != name}
            world.patch.setattr(golf, "AUDITS", audits)
        elif name in ("end of section", "end of codes"):  # of functions in a table
            lenient = {"decompress": any_section}
            if name == "end of codes":
                lenient = {"decode": without_refusal(golf.ans_decode, REFUSALS[name][2])}
            other = golf.COMPRESSORS["ans"]._replace(**lenient)
            world.patch.setitem(golf.COMPRESSORS, "ans", other)
        elif name == "space sign":  # of what is read; the words are there, the check is elsewhere
            read = golf.read_text
            world.patch.setattr(golf, "read_text", lambda path, read=read: (read(path)[0], ""))
        elif name in REFUSALS:
            module, function, words = REFUSALS[name]
            other = without_refusal(getattr(module, function), words)
            world.patch.setattr(module, function, other)
        elif name in WARNINGS:
            drop_from(world, "warnings_of", name)
        else:
            drop_from(world, "verdict_of", name)


def drop_from(world: World, function: str, words: str) -> None:
    """Let a function of a record leave out what has these words: of its warnings, or its
    verdicts by name."""
    original = getattr(golf, function)

    def fewer(record):
        told = original(record)
        if isinstance(told, dict):
            return {fault: figure for fault, figure in told.items() if fault != words}
        return [line for line in told if words not in line]

    world.patch.setattr(golf, function, fewer)


# What is honest.


def challenge_record() -> dict:
    """The record of a valid run on the challenge's text, of which there is nothing to warn."""
    record = json.loads(json.dumps(RECORD))
    record["corpus"]["val_documents"] = golf.CHALLENGE_DOCUMENTS
    for row in record["result"]:
        row |= dict(tokens=62_021_632, bytes=golf.CHALLENGE_BYTES)
    return record


@pytest.fixture(scope="module")
def small(data):
    """(Config, Run, Data) of the beginnings of some validation documents."""
    cfg, run, corpus = data
    path = Path(corpus.corpus["tokenizer"]).with_name("text_val_000000.bin")
    tokenizer, stream = corpus.tokenizer, np.array(golf.open_shard(str(path)))
    whole = golf.split_at_bos(torch.from_numpy(stream.astype(np.int64)))
    cut = [document[:DOCUMENT_TOKENS] for document in whole if len(document) >= DOCUMENT_TOKENS]
    # No character is cut off.
    cut = [document for document in cut if not tokenizer.is_byte(int(document[-1]))][:DOCUMENTS]
    val = torch.cat([*cut, torch.tensor([golf.BOS])])
    assert len(val) == TARGETS + 1
    text = "".join(tokenizer.decode(document[1:].tolist()) for document in cut)
    facts = dict(val_targets=TARGETS, val_documents=DOCUMENTS)
    facts |= golf.held_out_facts(val, corpus.train, run)
    cfg = golf.replace(cfg, mixer_chunk_tokens=64, mixer_max_order=5)
    facts = corpus.corpus | facts
    return cfg, run, golf.replace(corpus, val=val, text=text.encode(), corpus=facts)


@pytest.fixture(scope="module")
def blob(small):
    """The artifact of a network that was not trained, whose every weight matters."""
    cfg, _, corpus = small
    model = golf.GPT(cfg, golf.sdpa_attention).initialize(cfg.seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    stored = golf.quantize(dict(model.named_parameters()), cfg)
    return golf.pack(stored, cfg, corpus.corpus["vocabulary_sha256"])


def drawn(seed: int):
    """As drawn_by, whatever is scored: rounding on another machine moves no place."""
    return lambda evaluation, purpose: np.random.RandomState([seed, len(purpose)])


@pytest.fixture
def world(small, blob, tmp_path, monkeypatch):
    """An honest World, in which little text is enough and little of it is looked at."""
    for name, value in dict(
        MASS_POSITIONS=SAMPLES,
        AUDIT_TARGETS=4,
        AUDIT_STEPS=2,
        AUDIT_TABLES=2,
        LEAST_VAL_BYTES=int(0.8 * small[2].val_bytes.sum()),
        drawn_by=drawn(37),
        AUDITS={name: kept(check) for name, check in golf.AUDITS.items()},
    ).items():
        monkeypatch.setattr(golf, name, value)
    return World(monkeypatch, tmp_path, *small, blob)


KEPT: list[str] = []  # the record of an honest run, as JSON: its making takes a second


def honest_runs(world: World) -> list[dict]:
    """Records of two seeds of one configuration, made of one run's, as if it had trained."""
    if not KEPT:
        evaluation = world.honest()
        assert judge_evaluation(world, evaluation) == set()
        KEPT.append(json.dumps(evaluation.run.record))
    (text,), records = KEPT, []
    for seed in (1, 2):
        record = json.loads(text)
        record |= dict(trained=[{"steps": 7}], network_sha256=f"{seed:064}")
        record["config"] |= dict(seed=seed, run_id=f"run{seed}", max_wallclock_seconds=600.0)
        record["final"][-1] |= dict(seed=seed)
        records.append(record)
    return records


HONEST = {
    "neural": lambda world: world.scored(),
    "backoff": lambda world: world.scored("backoff", ngram_table="exact"),
    "calibrated": lambda world: world.scored("calibrated"),
    "artifact": lambda world: world.blob,
    "shards": lambda world: world.shards(),
    "texts": lambda world: world.texts(world.pages()),
    "record": lambda world: challenge_record(),
    "runs": honest_runs,
}


# The lies. First scores: what is claimed of targets, and how it is summed.


def claim(evaluation: golf.Evaluation, logp: torch.Tensor) -> golf.Evaluation:
    """Let the headline have these scores, in its row too."""
    evaluation.logp[evaluation.headline] = logp
    evaluation.rows[evaluation.headline] |= golf.score_of(logp, evaluation.data.val_bytes)
    return evaluation


def raised(evaluation: golf.Evaluation, targets, nats: float = 0.1) -> golf.Evaluation:
    """The scores of some targets, better than they are."""
    logp = evaluation.logp[evaluation.headline].clone()
    logp[targets] += nats
    return claim(evaluation, logp)


def unsampled(evaluation: golf.Evaluation, targets: Iterable[int]) -> int:
    """The first of these targets that is neither summed nor coded."""
    places = evaluation.places
    seen = {*places.samples}.union(*(range(*run) for run in places.coded))
    return next(target for target in targets if target not in seen)


def rows_with(world: World, change: Callable[[dict, int], dict]) -> golf.Evaluation:
    """An evaluation whose row was falsified where the scores are summed; change(row, targets)."""
    evaluation = world.honest()
    row = evaluation.rows["neural"]
    row |= change(row, TARGETS)
    return evaluation


@lie("score", "single_pass")
def scores_sum_to_less(world):
    """Loss and bits alike."""
    better = ("val_loss", "val_bpb")
    return rows_with(world, lambda row, _: {key: 0.99 * row[key] for key in better})


@lie("score", "bytes")
def a_row_tells_more_bytes(world):
    """So that less text looks like enough."""
    return rows_with(world, lambda row, _: {"bytes": row["bytes"] + 1000})


@lie("score", "bytes")
def a_row_tells_fewer_tokens(world):
    """So that a target looks like one of longer pieces."""
    return rows_with(world, lambda row, n: {"tokens": n - 1})


@lie("score", "bytes")
def the_bits_are_rounded_down(world):
    """To what a table would show."""
    return rows_with(world, lambda row, _: {"val_bpb": math.floor(1000 * row["val_bpb"]) / 1000})


def late(evaluation: golf.Evaluation) -> range:
    """The targets that no other stream than the run's own has."""
    return range(evaluation.places.prefix, TARGETS)


@lie("score", "single_pass")
def a_late_score_is_better(world):
    """Neither summed nor coded nor in a changed stream: the network's column has another."""
    evaluation = world.honest()
    return raised(evaluation, unsampled(evaluation, late(evaluation)))


@lie("score", "single_pass")
def a_late_backoff_score_is_better(world):
    """Likewise, of a rule."""
    evaluation = world.honest("backoff")
    return raised(evaluation, unsampled(evaluation, late(evaluation)))


@lie("score", "single_pass")
def a_late_calibrated_score_is_better(world):
    """After the last cut, too."""
    evaluation = world.honest("calibrated")
    cut = max(golf.rebuilt_samples(evaluation)) // 64 * 64
    return raised(evaluation, unsampled(evaluation, range(max(cut, late(evaluation)[0]), TARGETS)))


@lie("score", "single_pass")
def a_probability_is_above_one(world):
    """Of a late target."""
    evaluation = world.honest()
    target = unsampled(evaluation, late(evaluation))
    return raised(evaluation, target, 0.5 - float(evaluation.logp["neural"][target]))


@lie("score", "single_pass", "bytes", "NO SCORE")
def a_score_is_no_number(world):
    """Whatever is compared with it."""
    evaluation = world.honest()
    return raised(evaluation, unsampled(evaluation, late(evaluation)), math.nan)


# Windows, and the network in them.


def window(evaluation: golf.Evaluation) -> slice:
    """The targets of a late window."""
    return slice(TARGETS - 48, TARGETS - 32)


def with_column(
    evaluation: golf.Evaluation, name: str, nats: float, targets=None
) -> golf.Evaluation:
    """An evaluation whose pass has another number at some targets, by default a late window's,
    scored by what it has."""
    column = getattr(evaluation.columns, name).clone()
    column[window(evaluation) if targets is None else targets] += nats
    evaluation.columns = evaluation.columns._replace(**{name: column})
    return claim(evaluation, evaluation.mixed(evaluation.headline))


@lie("window", "normalized")
def a_window_is_better_than_the_network(world):
    """Of columns and scores alike."""
    return with_column(world.honest(), "logp", 1.0)


@lie("window", "causal")
def an_early_window_that_is_not_drawn_is_better(world):
    """Before what is replaced: another pass over the same tokens has another score."""
    world.patch.setattr(golf, "RESCORED_WINDOWS", 1)
    evaluation = world.honest()
    drawn_windows, grid = golf.draw_windows(evaluation), evaluation.neural.grid
    early = range(evaluation.places.changed)
    others = [target for target in early if grid.window_of(target) not in drawn_windows]
    return with_column(evaluation, "logp", 1.0, unsampled(evaluation, others))


@lie("window", "normalized", probability=1 - (1 - 2 / 8) * (1 - 16 / TARGETS) ** SAMPLES)
def a_window_that_may_not_be_drawn_is_better(world):
    """Two batches of eight are drawn for each row, and samples hit 16 targets of all."""
    world.patch.setattr(golf, "RESCORED_WINDOWS", 16)
    return with_column(world.honest(), "logp", 1.0)


@lie("window", "normalized")
def a_window_is_surer_than_the_network(world):
    """Its entropy is the mixer's to read."""
    return with_column(world.honest("calibrated"), "entropy", -1.0)


def spans_with(world: World, column: int, shift: int) -> golf.Evaluation:
    """An evaluation whose last window, of any stream, scores from or to another target."""
    spans_of = golf.Grid.spans_of

    def shifted(self, numbers):
        spans = spans_of(self, numbers)
        spans[:, column] += shift * (numbers == self.count - 1).int()
        return spans

    world.patch.setattr(golf.Grid, "spans_of", shifted)
    # The last window scores fewer targets than the others, or it would have no score to repeat.
    world.corpus = golf.replace(world.corpus, val=world.corpus.val[:-10])
    return world.scored()


@lie("window", "single_pass", "normalized")
def a_target_is_scored_twice(world):
    """With one context, then with another."""
    return spans_with(world, 1, -1)


@lie("window", "single_pass", "bytes", "NO SCORE")
def a_target_is_not_scored(world):
    """One that would cost much, say."""
    return spans_with(world, 1, 1)


@lie("network", "causal", "decodable")
def attention_has_no_mask(world):
    """Each token of a window sees those that follow."""

    def unmasked(q, k, v, causal=True):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return y.transpose(1, 2)

    world.run = world.run.alone()
    world.run.attention = ("none", unmasked)
    return world.scored()


@lie("weight after export", "decodable")
def another_network_is_scored(world):
    """Than the artifact's, by which all is asked, too."""
    evaluation = world.network()
    evaluation.neural.model.tok_emb.data.mul_(1.1)
    return score(evaluation)


@lie("weight after export", "causal", *NORMALIZED)
def another_network_makes_the_pass(world):
    """The artifact's makes whatever is asked again."""
    evaluation = world.network()
    weights = evaluation.neural.model.tok_emb.data
    exported = weights.clone()
    weights.mul_(1.1)
    score(evaluation)
    weights.copy_(exported)
    return evaluation


# Counts.


@lie("count", *NORMALIZED)
def the_target_is_counted_in(world):
    """Each target has occurred once after its context: itself."""
    counted = golf.target_counts

    def more(*args):
        for found in counted(*args):
            context, pair = found.counts.context + 1, found.counts.pair + 1
            yield found._replace(counts=found.counts._replace(context=context, pair=pair))

    world.patch.setattr(golf, "target_counts", more)
    return world.scored("calibrated")


@lie("count", *NORMALIZED)
def hints_are_counted_once_less(world):
    """So that more is left for the others."""
    counted = golf.target_counts

    def less(*args):
        for found in counted(*args):
            yield found._replace(pairs=[(pair - 1).clamp(min=0) for pair in found.pairs])

    world.patch.setattr(golf, "target_counts", less)
    return world.scored("calibrated")


@lie("count", *NORMALIZED)
def a_hint_is_the_target(world):
    """Wherever there is one."""
    named = golf.stream_hints

    def told(tokens, span, cfg):
        hints, targets = named(tokens, span, cfg), tokens[span[0] + 1 : span[1] + 1]
        hints[0] = torch.where(hints[0] >= 0, targets.to(hints.dtype), -1)
        return hints

    world.patch.setattr(golf, "stream_hints", told)
    return world.scored("calibrated")


def with_rule(world: World, settings: dict | None = None, **rule) -> golf.Evaluation:
    """An evaluation by a rule that calls itself exact."""
    world.patch.setattr(
        golf, "backoff_rules", lambda cfg: {"backoff_exact": golf.BackoffRule(**rule)}
    )
    settings = dict(ngram_table="exact", ngram_min_count=1) | (settings or {})
    return world.scored("backoff", **settings)


@lie("count", "NOT A DISTRIBUTION", *NORMALIZED)
def buckets_are_called_exact(world):
    """A hashed table's counts, under the name of exact ones."""
    return with_rule(world, buckets=64)


@lie("count", *NORMALIZED)
def counts_are_newer_than_their_rule_says(world):
    """Those of the target's own batch are in; nearly every target's score is of its frequency."""
    column = golf.rank_column
    world.patch.setattr(
        golf, "rank_column", lambda groups, chunk, *rest: column(groups, None, *rest)
    )
    every_target = dict(ngram_fallback="unigram", ngram_min_order=5, ngram_max_order=5)
    return with_rule(world, every_target, first=64, granularity=64)


@lie("count", "causal", "single_pass", *NORMALIZED)
def levels_are_weighed_by_what_is_to_come(world):
    """By how right each is on average, over the whole stream."""
    columns = golf.stream_columns

    def weighed(*args):
        found = columns(*args)
        return found._replace(ratios=[x * (1 - x.mean(0, keepdim=True)) for x in found.ratios])

    world.patch.setattr(golf, "stream_columns", weighed)
    return world.scored("calibrated")


# The mixer's tables.


def predicting(world: World, change: Callable) -> golf.Evaluation:
    """An evaluation whose tables are read otherwise; change(predict, tables, inputs)."""
    predict = golf.CalibratedMixer.predict
    world.patch.setattr(golf.CalibratedMixer, "predict", lambda self, x: change(predict, self, x))
    return world.scored("calibrated")


@lie("table", "causal", *NORMALIZED)
def tables_learn_before_they_are_read(world):
    """Of a chunk's targets; not where all tokens of one place are asked."""

    def eager(predict, tables, x):
        if len(x.hint_number) < len(world.corpus.table.base):
            tables.update(predict(tables, x)[1])
        return predict(tables, x)

    return predicting(world, eager)


@lie("table", "causal", "single_pass", "decodable")
def the_stream_is_mixed_twice(world):
    """The second time by the tables of the first."""
    mix = golf.mix

    def twice(neural, ngram, hint_number, chunk, keep=()):
        size = len(neural.logp)
        last = mix(neural, ngram, hint_number, chunk)[1][size]
        whole = golf.chunks_of(neural, ngram, hint_number, max(1, size))
        logp = [neural.logp[:0], *(last.predict(x)[0] for x in whole)]
        return torch.cat(logp), dict.fromkeys([*keep, size], last)

    world.patch.setattr(golf, "mix", twice)
    return world.scored("calibrated")


@lie("table", "single_pass", *NORMALIZED)
def kept_tables_are_the_last(world):
    """The scores are right, and the tables that are said to have given them are not; but for those
    where tokens are replaced, whose context may be new to all tables."""
    evaluation = world.honest("calibrated")
    last, changed = evaluation.mixers[TARGETS], evaluation.places.changed
    evaluation.mixers |= {target: last for target in evaluation.mixers if target != changed}
    return evaluation


@lie("table", "NOT A DISTRIBUTION", *NORMALIZED)
def a_level_is_trusted_where_it_is_right(world):
    """Its table is keyed by the target."""

    def gated(predict, tables, x):
        return predict(tables, x._replace(level_key=x.level_key.where(x.ratio[..., 0] > 0, 0)))

    return predicting(world, gated)


@lie("table", "NOT A DISTRIBUTION", *NORMALIZED)
def a_hint_is_trusted_where_it_is_right(world):
    """Its bucket is another for the hint itself."""

    def gated(predict, tables, x):
        key = torch.where(x.hint_number > 0, x.hint_key, x.hint_key.clamp(max=1))
        return predict(tables, x._replace(hint_key=key))

    return predicting(world, gated)


def heavier(mass: float):
    """All probabilities times `mass`."""

    def predict_more(predict, tables, x):
        logp, evidence = predict(tables, x)
        return logp + math.log(mass), evidence

    return lambda world: predicting(world, predict_more)


for name, mass, found_by in (("all_probabilities_are_slightly_larger", 1 + 1e-5, NORMALIZED),):
    LIES.append(Lie(name, "table", heavier(mass), found_by))


@lie("table", "decodable")
def the_mass_is_told_to_be_one(world):
    """Of a table that is hashed."""
    summed = golf.Evaluation.mass_of
    fine = dict(mass=1.0, max_mass=1.0, mass_error=0.0, normalized="yes")
    world.patch.setattr(golf.Evaluation, "mass_of", lambda self, *args: summed(self, *args) | fine)
    return with_rule(world, buckets=64)


# Bytes.


def recounted(evaluation: golf.Evaluation, **values) -> golf.Evaluation:
    """An evaluation whose data has other parts, by which its bytes are counted anew."""
    evaluation.data = golf.replace(evaluation.data, **values)
    return claim(evaluation, evaluation.logp["neural"])


def with_table(world: World, change: Callable[[golf.ByteTable], None]) -> golf.Evaluation:
    """An evaluation by a byte table that was falsified."""
    table = golf.ByteTable(world.corpus.tokenizer)
    change(table)
    return recounted(world.honest(), table=table)


@lie("byte table", "bytes")
def a_piece_is_worth_a_byte_more(world):
    """The commonest one."""
    commonest = int(world.corpus.val.where(world.corpus.val != golf.BOS, 0).bincount()[2:].argmax())
    return with_table(world, lambda table: table.base[2 + commonest].add_(1))


@lie("byte table", "bytes")
def bytes_move_between_documents(world):
    """From one where they cost little to another; their sum is right."""
    evaluation = world.honest()
    evaluation.data = golf.replace(evaluation.data)  # whose bytes are counted anew
    evaluation.data.val_bytes[9] += 5
    evaluation.data.val_bytes[TARGETS - 9] -= 5
    return evaluation


@lie("byte table", "bytes")
def bytes_count_twice_where_no_text_is_decoded(world):
    """After the tokens whose bytes are counted in their text."""
    world.patch.setattr(golf, "AUDIT_TEXT_TOKENS", TARGETS // 2)
    evaluation = world.honest()
    evaluation.data = golf.replace(evaluation.data)
    evaluation.data.val_bytes[TARGETS // 2 + 9 :] *= 2
    return claim(evaluation, evaluation.logp["neural"])


@lie("byte table", "bytes")
def a_space_is_worth_three_bytes(world):
    """As many as the sign has by which SentencePiece writes it, and so in the text."""
    evaluation, tokenizer = world.honest(), world.corpus.tokenizer

    class Signs:
        """A tokenizer that leaves the signs in the text."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, tokens):
            return tokenizer.decode(tokens).replace(" ", golf.SPACE)

    texts = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
    inner = torch.tensor([text.removeprefix(golf.SPACE).count(golf.SPACE) for text in texts])

    def signs(self, tokens):
        before, target = tokens[:-1].long(), tokens[1:].long()
        spaces = 3 * (self.space[target] & ~self.boundary[before])
        return self.base[target] + 2 * inner[target] + spaces

    world.patch.setattr(golf.ByteTable, "target_bytes", signs)
    return recounted(evaluation, tokenizer=Signs(), text=None)


@lie("byte table", "bytes")
def a_target_is_an_unknown_piece(world):
    """In place of one of no bytes, so that the sum is right."""
    evaluation = world.honest()
    val = evaluation.data.val.clone()
    val[-1] = evaluation.data.tokenizer.unk_id()
    evaluation.data = golf.replace(evaluation.data, val=val)
    return evaluation


@lie("byte table", "bytes")
def the_tokens_are_of_another_text(world):
    """As long, but for one letter the same."""
    text = bytearray(world.corpus.text)
    text[len(text) // 2] ^= 1
    return recounted(world.honest(), text=bytes(text))


@pytest.mark.parametrize("kind", HONEST)
def test_nothing_is_found_where_nothing_was_planted(world, kind):
    assert findings(world, HONEST[kind](world)) == set()


# The artifact: other bytes for the same network, or another network for the same claim.


def sealed_text(text: bytes, payload: bytes) -> bytes:
    """An artifact with a header's text as it is, and the right hash."""
    digest = hashlib.sha256(text + payload).digest()
    return golf.PREFIX.pack(golf.MAGIC, golf.VERSION, len(text), digest) + text + payload


def respelled(world: World, change: Callable[[bytes], bytes]) -> bytes:
    """The artifact with another text of its header."""
    text, payload = golf.open_artifact(world.blob)
    other = change(text)
    assert other != text
    return sealed_text(other, payload)


def renamed(**values) -> Callable[[bytes], bytes]:
    """A header's text with more, or other, entries."""
    told = dict(sort_keys=True, separators=(",", ":"))
    return lambda text: json.dumps(json.loads(text) | values, **told).encode()


for name, change in {
    "a_header_has_a_name_more": renamed(lucky_number=7),
    "a_header_names_a_key_twice": lambda text: b'{"section_bytes":1,' + text[1:],
}.items():
    plant = functools.partial(respelled, change=change)
    LIES.append(Lie(name, "hash", plant, {"header", "spelling"}))


def resectioned(world: World, change: Callable[[bytes, bytes], tuple[bytes, bytes]]) -> bytes:
    """The artifact with another compressed section, or other words: change(section, words)."""
    header, *payload = opened(world.blob)
    section, words = change(*payload)
    return sealed(header | {"section_bytes": len(section)}, section, words)


def squeezed(section: bytes, words: bytes) -> tuple[bytes, bytes]:
    """The same section at another preset."""
    return lzma.compress(lzma.decompress(section), preset=1), words


for name, change, found_by in (
    ("bytes_follow_a_section", lambda a, b: (a + b"1" * 8, b), {"end of section", "spelling"}),
    (
        "words_follow_the_codes",
        lambda a, b: (a, b"\1\0\0\0" * 9 + b),
        {"end of codes", "spelling"},
    ),
):
    plant = functools.partial(resectioned, change=change)
    LIES.append(Lie(name, "hash", plant, found_by))


@lie("hash", "spelling")
def spreads_are_shifted(world):
    """Those of a tensor's rows by one, of its columns by one back: every code's sum of the two,
    and so the words, are as they were."""
    header, section, words = opened(world.blob)
    _, stored = golf.unpack(world.blob, world.cfg, header["vocabulary"])
    cubes = [t.codes.shape for t in stored.values() if isinstance(t, golf.CodedTensor)]
    plain = bytearray(lzma.decompress(section))
    (m, rows, cols), begin = cubes[0], len(plain) - golf.ans_inside_bytes(cubes)
    sides = np.frombuffer(plain, np.int8)[begin : begin + m * (rows + cols)]
    assert abs(sides.astype(int)).max() < golf.SPREAD_LIMIT
    sides[: m * rows] += 1
    sides[m * rows :] -= 1
    return resectioned(world, lambda _, words: (golf.compress_lzma(bytes(plain)), words))


def repacked(world: World, name: str, change: Callable[[np.ndarray], None]) -> bytes:
    """An artifact of the same network but for a tensor's codes or values."""
    cfg, stored = golf.unpack(world.blob, world.cfg, opened(world.blob)[0]["vocabulary"])
    part = "codes" if isinstance(stored[name], golf.CodedTensor) else "values"
    changed = getattr(stored[name], part).copy()
    change(changed)
    stored[name] = stored[name]._replace(**{part: changed})
    return golf.pack(stored, cfg, opened(world.blob)[0]["vocabulary"])


@lie("weight after export", "digest", "spelling")
def a_code_is_changed_in_the_file(world):
    """By somebody who leaves the hash as it is."""

    def change(codes):
        codes.ravel()[7] -= np.sign(codes.ravel()[7])

    other, start = repacked(world, "tok_emb", change), golf.PREFIX.size
    magic, version, size, _ = golf.PREFIX.unpack_from(other)
    digest = golf.PREFIX.unpack_from(world.blob)[3]
    return golf.PREFIX.pack(magic, version, size, digest) + other[start:]


@lie("weight after export", "finite")
def a_weight_is_no_number(world):
    """A network of which every score is the same NaN, which no comparison tells from a score."""
    return repacked(world, "smear_gate", lambda values: values.fill(np.nan))


@lie("hash", "vocabulary", "spelling")
def an_artifact_is_of_another_tokenizer(world):
    """Of the same number of pieces, some of them longer."""
    header, *_ = opened(world.blob)
    cfg, stored = golf.unpack(world.blob, world.cfg, header["vocabulary"])
    return golf.pack(stored, cfg, "0" * 64)


@lie("hash", "pieces")
def an_artifact_has_pieces_more(world):
    """That its tokenizer does not have, though it names its hash."""
    header, *_ = opened(world.blob)
    cfg = golf.replace(world.cfg, vocab_size=520)
    model = golf.GPT(cfg, golf.sdpa_attention).initialize(0)
    stored = golf.quantize(dict(model.named_parameters()), cfg)
    return golf.pack(stored, cfg, header["vocabulary"])


@lie("hash", "version", "spelling")
def an_artifact_is_of_another_format(world):
    """In which the same bytes would have another meaning."""
    blob = bytearray(world.blob)
    blob[8] += 1
    return bytes(blob)


# The data: shards, their tokenizer, and the texts that they are made of.


def with_val(world: World, change: Callable[[np.ndarray], np.ndarray]) -> golf.Config:
    """Settings of shards of which the validation tokens were changed."""
    return world.shards(val=change(world.corpus.val.numpy().copy()))


def lost(tokens: np.ndarray) -> np.ndarray:
    """Zeros in place of the second half."""
    tokens[len(tokens) // 2 :] = 0
    return tokens


for name, stage, change, found_by in (
    (
        "half_of_a_shard_is_lost",
        "data",
        lost,
        {"text of a shard", "TOO LITTLE TEXT", "bytes per target"},
    ),
    (
        "a_shard_has_no_text",
        "data",
        lambda tokens: np.full_like(tokens, golf.BOS),
        {"text of a shard", "unknown pieces", "TOO LITTLE TEXT", "bytes per target", "bytes"},
    ),
    (
        "a_document_has_no_beginning",
        "data",
        lambda tokens: tokens[1:],
        {"first token", "tokenizer", "bytes"},
    ),
    (
        "a_page_is_repeated",
        "data",
        lambda tokens: np.append(golf.BOS, np.tile(tokens[2 * DOCUMENT_TOKENS - 99 :][:99], 12)),
        {"TOO LITTLE TEXT"},
    ),
    (
        "a_validation_token_is_unknown",
        "data",
        lambda tokens: np.insert(tokens, 99, 3),
        {"unknown pieces", "tokenizer", "bytes"},
    ),
):
    plant = functools.partial(with_val, change=change)
    LIES.append(Lie(name, stage, plant, found_by))


def with_header(world: World, place: int, change: int) -> golf.Config:
    """Settings of shards of which the validation's header was changed."""
    cfg = world.shards()
    path = Path(cfg.data_path) / "x_val_000000.bin"
    header = np.fromfile(path, "<i4", 3)
    header[place] += change
    path.write_bytes(header.tobytes() + path.read_bytes()[12:])
    return cfg


@lie("data", "magic")
def a_shard_is_of_another_program(world):
    """Whose tokens may be of another width."""
    return with_header(world, 0, 1)


@lie("data", "size of a shard")
def a_shard_tells_another_size(world):
    """A file that was cut off, or that goes on."""
    return with_header(world, 2, -1)


@lie("data", "vocabulary of a shard")
def a_training_token_is_of_no_piece(world):
    """It would end the training where it is read."""
    return world.shards(train=np.append(world.corpus.train.read(0, 20_000), 600))


@lie("split", "NOT HELD OUT", "is in the training text too")
def validation_shards_are_training_shards(world):
    """Under the other name."""
    return world.shards(val=np.append(golf.BOS, world.corpus.train.read(0, 2000)))


@lie("split", "is in the training text too")
def some_validation_text_is_in_the_training_text(world):
    """A page of it."""
    page = world.corpus.val.numpy()[TARGETS // 2 :][:200]
    return world.shards(train=np.append(world.corpus.train.read(0, 20_000), page))


@lie("split", "NOT HELD OUT", "is in the training text too")
def equal_documents_are_on_both_sides(world):
    """Each text is there twice, and a split that looks at names alone parts the two."""

    def by_name(documents):
        half = len(documents) // 2
        return documents[:half], documents[half:]

    world.patch.setattr(golf, "split_documents", by_name)
    return world.texts(2 * world.pages())


@lie("split", "bytes")
def the_kept_text_is_another(world):
    """Than the one that the shards are of, which were made before."""
    cfg = world.texts(world.pages())
    path = golf.prepare_text(cfg, world.run.alone()) / golf.VAL_TEXT
    path.write_bytes(path.read_bytes().replace(b"e", b"a"))
    return cfg


def with_tokenizer(world: World, edit=lambda model: model, **options) -> golf.Config:
    """Settings of shards of a tokenizer that was made with other options, or edited since."""
    pages = [("", page) for page in world.pages()]
    world.patch.setattr(golf, "TOKENIZER_OPTIONS", golf.TOKENIZER_OPTIONS | options)
    model = edit(golf.train_tokenizer(pages, world.cfg.vocab_size))
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)

    def tokens(texts):
        return np.concatenate([[golf.BOS, *tokenizer.encode(text)] for text in texts])

    texts = world.corpus.text.decode().splitlines(keepends=True)
    lines = [" " + "".join(part) for part in np.array_split(texts, 4)]  # begin with a space
    return world.shards(model, train=tokens(page for _, page in pages), val=tokens(lines))


for name, options in {
    "a_tokenizer_begins_no_document_with_a_space": dict(add_dummy_prefix=False),
    "a_tokenizer_has_no_piece_for_a_space": dict(
        # Of as many bytes as the sign of which the piece consisted.
        edit=lambda model: model.replace(b"\n\3\xe2\x96\x81", b"\n\3\xe2\x96\x82")
    ),
}.items():
    plant = functools.partial(with_tokenizer, **options)
    LIES.append(Lie(name, "data", plant, {"tokenizer", "bytes"}))


@lie("data", "number of BOS")
def a_tokenizer_begins_documents_otherwise(world):
    """By the number that ends them for the shards."""
    return with_tokenizer(world, bos_id=2, eos_id=1)


@lie("data", "space sign", "bytes of a document", "bytes")
def texts_have_the_space_sign(world):
    """Of three bytes, which becomes a space of one."""
    return world.texts([page.replace(",", golf.SPACE) for page in world.pages()])


@lie("data", "tokenizer")
def a_tokenizer_leaves_capitals_out(world):
    """The shards balance, and tell less than the text did."""
    return with_tokenizer(world, normalization_rule_name="nmt_nfkc_cf")


# Budgets and the clock, and what else a run tells of itself.


@lie("budget", "OVER BUDGET")
def the_code_is_not_counted(world):
    """The artifact alone would fit."""
    return world.scored(artifact_bytes=len(world.blob) + golf.code_bytes() - 1)


@lie("clock", "OVER BUDGET")
def the_evaluation_is_too_slow(world):
    """By less than its line shows."""
    evaluation = world.honest()
    evaluation.rows["neural"]["seconds"] = evaluation.cfg.max_eval_seconds + 0.0004
    return evaluation


def told(**values) -> Callable[[World], dict]:
    """The challenge's record with entries "kind" or "kind__key" replaced, in each of the kind's
    rows."""

    def plant(_):
        record = challenge_record()
        for name, value in values.items():
            kind, _, key = name.partition("__")
            if not key:
                record[kind] = value
                continue
            for row in record[kind] if isinstance(record[kind], list) else [record[kind]]:
                row[key] = value
        return record

    return plant


LIMITS = WARNINGS[0]
for name, stage, values, found_by in (
    ("a_byte_too_much", "budget", dict(budget__used=16_000_001), {"OVER BUDGET"}),
    ("the_artifact_may_be_larger", "budget", dict(config__artifact_bytes=16_000_001), {LIMITS}),
    ("training_has_no_limit", "budget", dict(config__max_wallclock_seconds=0.0), {LIMITS}),
    ("a_budget_is_below_nothing", "budget", dict(budget__used=-1), {"OVER BUDGET"}),
    ("the_clock_is_broken", "clock", dict(budget__used=math.nan), {"OVER BUDGET"}),
    ("a_budget_has_no_end", "budget", dict(budget__limit=math.inf), {"OVER BUDGET"}),
    ("nothing_was_trained", "record", dict(trained=[]), {"nothing was trained"}),
    ("the_training_was_cut_off", "record", dict(interrupted=[{"steps": 7}]), {"INTERRUPTED"}),
    ("nothing_was_audited", "record", dict(audit=[]), {"NOT AUDITED"}),
    ("one_check_was_made", "record", dict(audit=RECORD["audit"][:1]), {"NOT AUDITED"}),
    (
        "a_score_is_none",
        "score",
        dict(final__val_bpb=math.nan, result__val_bpb=math.nan),
        {"NO SCORE"},
    ),
    ("a_score_is_nothing", "score", dict(final__val_bpb=0.0, result__val_bpb=0.0), {"NO SCORE"}),
    ("a_score_is_of_no_row", "score", dict(final__val_bpb=1.1), {"NO SCORE"}),
    ("a_share_is_none", "split", dict(corpus__val_in_train_share=math.nan), {"NOT HELD OUT"}),
    ("a_check_failed", "record", dict(audit__verdict="FAIL"), {"AUDIT FAILED"}),
    (
        "a_mass_is_not_one",
        "record",
        dict(final__normalized="no", result__mass=1.1),
        {"NOT A DISTRIBUTION"},
    ),
    (
        "as_many_targets_of_another_text",
        "record",
        dict(result__bytes=golf.CHALLENGE_BYTES + golf.CHALLENGE_BYTES_WITHIN + 1),
        {NOT_THE_CHALLENGES},
    ),
    (
        "as_many_bytes_of_other_documents",
        "record",
        dict(corpus__val_documents=golf.CHALLENGE_DOCUMENTS - 1000),
        {NOT_THE_CHALLENGES},
    ),
    ("pieces_are_of_strange_text", "record", dict(result__tokens=9_999_999), {"bytes per target"}),
    ("the_network_knows_nothing", "record", dict(unigram_bpb=1.7), {WARNINGS[3]}),
):
    LIES.append(Lie(name, stage, told(**values), found_by))


def runs_with(**values) -> Callable[[World], list[dict]]:
    """Records of two runs, the second with entries "kind__key" replaced in the kind's last row."""

    def plant(world):
        records = honest_runs(world)
        for name, value in values.items():
            kind, _, key = name.partition("__")
            part = records[1][kind] if key else records[1]
            (part[-1] if isinstance(part, list) else part)[key or kind] = value
        return records

    return plant


for name, values, found_by in (
    ("a_seed_counts_twice", dict(final__seed=1), {"seeds"}),
    ("a_seed_has_another_rate", dict(config__matrix_lr=0.5), {"one configuration"}),
    ("a_seed_has_other_code", dict(facts__code_sha256="0"), {"one configuration", "code"}),
    ("a_seed_is_not_valid", dict(verdict=[{"OVER BUDGET": "total_bytes"}]), {"verdicts"}),
    ("a_seed_has_the_others_network", dict(network_sha256=f"{1:064}"), {"one network"}),
    ("a_seed_trained_nothing", dict(trained=[]), {"training"}),
    (
        "a_seed_trained_without_end",
        dict(config__max_wallclock_seconds=0.0),
        {"one configuration", "training"},
    ),
    ("a_seed_has_no_revision", dict(facts__revision=None), {"gaps"}),
):
    LIES.append(Lie(name, "record", runs_with(**values), found_by))


BY_CHANCE = [planted for planted in LIES if planted.probability < 1]


def name_of(planted: Lie) -> str:
    """Of a test's case."""
    return planted.name


STAGES = {
    *("score", "window", "network", "weight after export", "count", "table", "byte table"),
    *("hash", "data", "split", "budget", "clock", "record"),
}


def test_the_lies_are_many_and_of_every_stage_and_check():
    """Each audit alone finds some lie, and no check is without one."""
    assert len(LIES) == len({planted.name for planted in LIES}) >= 80
    assert {planted.stage for planted in LIES} == STAGES
    alone = set().union(*(planted.found_by for planted in LIES if len(planted.found_by) == 1))
    assert golf.AUDITS.keys() <= alone
    named = set().union(*(planted.found_by for planted in LIES))
    assert named == golf.AUDITS.keys() | REFUSALS.keys() | {*WARNINGS} | VERDICTS


@pytest.mark.parametrize("planted", LIES, ids=name_of)
def test_a_lie_is_found_by_its_checks_alone_and_passes_without_them(world, planted):
    left = planted.plant(world)
    found = findings(world, left)
    assert found == planted.found_by or (planted in BY_CHANCE and found <= planted.found_by)
    take_out(world, *planted.found_by)
    assert findings(world, left) == set()


@pytest.mark.parametrize("planted", BY_CHANCE, ids=name_of)
def test_a_lie_is_found_as_often_as_stated(world, planted):
    """Over draws of places and windows, by its check alone; within three standard deviations."""
    evaluation, (name,), found = planted.plant(world), planted.found_by, 0
    for draw in range(DRAWS):
        world.patch.setattr(golf, "drawn_by", drawn(draw))
        evaluation.places = golf.draw_places(evaluation)
        evaluation.masses()
        found += not getattr(golf, f"audit_{name}")(evaluation)["passed"]
    spread = math.sqrt(planted.probability * (1 - planted.probability) / DRAWS)
    assert abs(found / DRAWS - planted.probability) <= 3 * spread


def test_who_spells_an_artifact_otherwise_gets_no_other_places(world):
    """They follow from the network and its scores: bytes that AUDIT=0 would take change no draw;
    another network does, and so does any other score."""
    world.patch.setattr(golf, "drawn_by", DRAWN_BY)
    honest = world.scored()
    world.blob = resectioned(world, squeezed)
    other = world.scored()
    assert other.network == honest.network and other.places == honest.places
    other.network = "0" * 64
    assert golf.draw_places(other) != honest.places
    honest.columns.logp[5] -= 1e-12
    assert golf.draw_places(honest) != honest.places
