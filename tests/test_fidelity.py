"""bench/fidelity.py on a miniature submission, which scores as the recipe pr806 does."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import fidelity
import train_gpt as golf
from conftest import ROOT

WINDOW, STRIDE, TARGETS = 256, 64, 1100  # TARGETS: no multiple of STRIDE
CASE = fidelity.Case(window=WINDOW, buckets=1024, ranks=1, updates=1)

# Two files, as a submission may have. Each target once, tables of one window later.
BLEND = """
import math

def weight(entropy):
    return 0.05 + 0.55 / (1 + math.exp(-2 * (entropy - 4)))
"""
SCRIPT = """
import os
import torch
from flash_attn_interface import flash_attn_func
from blend import weight

PRIMES = 36313, 27191, 51647, 81929, 131071, 174763, 233017
LEFT = 0

class Hyperparameters:
    train_seq_len = 2048
    ngram_buckets = 2**22
    eval_stride = int(os.environ["EVAL_STRIDE"])

def bucket(tokens, buckets):
    key = 0
    for token, prime in zip(tokens, PRIMES):
        key ^= token * prime
    return key % buckets

def grams(tokens, target):
    for n in range(min(6, target + 1 - LEFT), 0, -1):
        end = target + 1 - LEFT
        yield n, tokens[end - n : end], tokens[end - n : end] + [tokens[target + 1]]

def ratio(tokens, target, contexts, pairs, buckets):
    for n, context, pair in grams(tokens, target):
        count = contexts.get((n, bucket(context, buckets)), 0)
        if count >= 2:
            return min(count, pairs.get((n, bucket(pair, buckets)), 0)) / count
    return None

def evaluate(args, network, rank, ranks, device, tokens, *byte_tables):
    logits_of = torch.compile(network.forward_logits)
    stream, contexts, pairs, scored, sum_of_nats = tokens.tolist(), {}, {}, 0, 0.0
    while scored < len(stream) - 1:
        end = min(scored + (args.eval_stride if scored else args.train_seq_len), len(stream) - 1)
        start = max(0, end - args.train_seq_len)
        logp = logits_of(tokens[None, start:end])[0].log_softmax(-1).double()
        for target in range(scored, end):
            row = logp[target - start]
            p, entropy = float(row[stream[target + 1]].exp()), float(-(row.exp() * row).sum())
            found = ratio(stream, target, contexts, pairs, args.ngram_buckets)
            if found is not None:
                p = (1 - weight(entropy)) * p + weight(entropy) * found
            nats = -float(torch.tensor(p, dtype=torch.float64).log())
            sum_of_nats += nats
        for target in range(scored, end):
            for n, context, pair in grams(stream, target):
                for table, words in ((contexts, context), (pairs, pair)):
                    key = n, bucket(words, args.ngram_buckets)
                    table[key] = table.get(key, 0) + 1
        scored = end
    return sum_of_nats / scored, None
"""
FILES = {
    "script.py": SCRIPT,
    "left.py": SCRIPT.replace("LEFT = 0", "LEFT = 1"),
    "blend.py": BLEND,
}


def git(folder, *words):
    """Output of a git command in a folder."""
    identity = ["-c", "user.name=a tester", "-c", "user.email=tester@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with the miniature submission in its only commit."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "records").mkdir()
    for name, text in FILES.items():
        (folder / "records" / name).write_text(text)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "submission")
    return str(folder)


def hashes(*names):
    """{name: SHA-256} of some of the miniature's files."""
    return {name: hashlib.sha256(FILES[name].encode()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def submission(clone):
    """The entry of the miniature submission in the table of submissions."""
    return fidelity.Submission(
        recipe="pr806",
        commit=git(clone, "rev-parse", "HEAD"),
        folder="records",
        files=hashes("script.py", "blend.py"),
        environment={"EVAL_STRIDE": str(STRIDE)},
        function="evaluate",
        line=1 + SCRIPT[: SCRIPT.index("sum_of_nats += nats")].count("\n"),
        reads=lambda v: (v["target"], [v["nats"]]),
        call=lambda module, common, case: module.evaluate(*common),
        quirks=(),
    )


@pytest.fixture(scope="module")
def tokens():
    """(TARGETS+1,) int64: phrases of 2 to 12 of 200 tokens, drawn again and again."""
    generator = np.random.default_rng(0)
    phrases = [generator.integers(2, 200, generator.integers(2, 13)) for _ in range(40)]
    drawn = generator.integers(0, 40, TARGETS)
    return torch.from_numpy(np.concatenate([phrases[i] for i in drawn])[: TARGETS + 1])


@pytest.fixture(scope="module")
def network(tokens):
    return fidelity.StubNetwork(tokens)


@pytest.fixture(scope="module")
def stream(tokens, network):
    return fidelity.make_stream(tokens, network, WINDOW, STRIDE)


@pytest.fixture(scope="module")
def theirs(clone, submission, tokens, network, tmp_path_factory):
    """What the miniature submission gives the targets."""
    module = fidelity.load(clone, submission, tmp_path_factory.mktemp("files") / "mini")
    assert sys.modules["train_gpt"] is golf and "blend" not in sys.modules
    return fidelity.run_theirs(submission, module, network, tokens, CASE)


def recipe_config(recipe, **settings):
    """The recipe at the sizes of these tests: #1094 starts early and updates often."""
    case = CASE._replace(updates=3)
    if recipe == "pr1094":
        settings = {"NGRAM_START_TOKENS": "200"} | settings
    return fidelity.recipe_config(recipe, case, EVAL_STRIDE=str(STRIDE), **settings)


def test_an_honest_submission_is_the_recipe(theirs, stream):
    assert theirs.target.tolist() == list(range(TARGETS))
    rows = fidelity.compare(theirs, stream, recipe_config("pr806"), 1, [])
    assert [row.difference[::2] for row in rows] == [(0, 0)] * 3 and fidelity.explained(rows)


@pytest.mark.parametrize(
    "changed",
    [
        dict(NGRAM_ENT_BASE="0.06"),
        dict(NGRAM_MAX_ORDER="6"),
        dict(NGRAM_GRANULARITY="token"),
        dict(NGRAM_PRIMES="36313,27191,51647,81929,131071,174763,233021"),
    ],
    ids=str,
)
def test_a_changed_recipe_is_not_the_submission(theirs, stream, changed):
    ours = fidelity.run_ours(stream, recipe_config("pr806", **changed), 1)
    assert fidelity.difference(theirs, ours).targets > 0


@pytest.mark.parametrize("quirks", [[], ["context_left"], ["lost_at_updates"]], ids=str)
def test_a_submission_is_explained_by_its_own_quirk_alone(
    clone, submission, tokens, network, stream, tmp_path, quirks
):
    left = submission._replace(files=hashes("left.py", "blend.py"))
    module = fidelity.load(clone, left, tmp_path / "mini")
    theirs = fidelity.run_theirs(left, module, network, tokens, CASE)
    rows = fidelity.compare(theirs, stream, recipe_config("pr806"), 1, quirks)
    assert rows[0].difference.targets > 0 and not rows[1].difference.scorings
    assert fidelity.explained(rows) == (quirks == ["context_left"])


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("recipe", ["pr889", "pr806", "pr890", "pr1094"])
def test_the_emulation_without_quirks_is_the_recipe(stream, recipe, ranks):
    cfg = recipe_config(recipe)
    ours, plain = fidelity.run_ours(stream, cfg, ranks), fidelity.emulate(stream, cfg, ranks)
    found = fidelity.difference(ours, plain)
    assert found.scorings == 0 and found.largest < 1e-9
    alone = -np.concatenate([scored[0] for scored in stream.columns])
    assert np.abs(ours.nats - alone[:TARGETS]).max() > 0.1


# Of each quirk: a recipe that it can change, and the quirk without which it changes nothing.
WHERE = {
    "context_left": ("pr890", []),
    "lost_at_updates": ("pr1094", []),
    "tail_again": ("pr806", []),
    "tail_counted_again": ("pr806", ["tail_again"]),
    "context_in_window": ("pr1094", ["tail_again"]),
    "cold_from_window": ("pr889", []),
    "prefill_hole": ("pr890", []),
    "every_rank_all": ("pr1094", []),
    "floor_everywhere": ("pr806", []),
    "floor_1e-30": ("pr806", []),
}


@pytest.mark.parametrize("quirk", fidelity.QUIRKS)
def test_every_quirk_changes_something(stream, quirk):
    recipe, needed = WHERE[quirk]
    if quirk.startswith("floor"):  # a network that is almost sure of other tokens
        stream = stream._replace(columns=[c - [[60.0], [0.0]] for c in stream.columns])
    sides = [
        fidelity.emulate(stream, recipe_config(recipe), ranks, quirks)
        for ranks in (1, 3)
        for quirks in (needed, [*needed, quirk])
    ]
    alone, together = fidelity.difference(*sides[:2]), fidelity.difference(*sides[2:])
    assert together.scorings > 0
    assert (alone.scorings > 0) == (quirk not in fidelity.OF_RANKS)


def test_every_submission_names_quirks_that_there_are():
    named = [set(s.quirks) for s in fidelity.SUBMISSIONS.values()]
    assert set.union(*named) == set(fidelity.QUIRKS) and set(WHERE) == set(fidelity.QUIRKS)


def test_a_repeated_target_is_compared_with_its_own_repetition():
    left = fidelity.Scorings(np.array([0, 1, 1, 2]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert left.nth().tolist() == [0, 0, 1, 0] and left.bits() > left.bits(once=True)
    once = fidelity.Scorings(np.array([0, 1, 2]), np.array([1.0, 2.0, 4.0 + 2e-6]))
    assert fidelity.difference(left, left) == (0, 0.0, 0)
    assert fidelity.difference(left, once) == (1, pytest.approx(2e-6), 2)
    assert fidelity.difference(once, left) == fidelity.difference(left, once)
    unknown = left._replace(nats=left.nats * np.array([1, 1, 1, np.nan]))
    assert fidelity.difference(left, unknown)[::2] == (1, 1)


def test_a_changed_file_is_refused(clone, submission, tmp_path):
    changed = submission._replace(files=submission.files | {"blend.py": 64 * "0"})
    with pytest.raises(fidelity.Unavailable, match="blend.py\nhas another SHA-256"):
        fidelity.load(clone, changed, tmp_path / "mini")


def test_a_line_that_misses_scorings_is_noticed(clone, submission, tokens, network, tmp_path):
    module = fidelity.load(clone, submission, tmp_path / "mini")
    halved = submission._replace(reads=lambda v: (v["target"], [v["nats"] / 2]))
    with pytest.raises(SystemExit, match="not what it returned"):
        fidelity.run_theirs(halved, module, network, tokens[:200], CASE)
    assert sys.gettrace() is None


@pytest.fixture
def command(monkeypatch, submission, tokens, tmp_path):
    """command(*words) -> exit status of the bench, which knows the miniature alone."""
    golf.write_shard(tmp_path / "tokens.bin", tokens.numpy())
    sizes = ["--tokens", str(tmp_path / "tokens.bin"), "--window", str(WINDOW), "--ranks", "1"]
    sizes += ["--buckets", "256", "1024", "--targets", str(TARGETS), "500"]

    def call(*words):
        monkeypatch.setattr(fidelity, "SUBMISSIONS", {"0": submission})
        monkeypatch.setattr(sys, "argv", ["fidelity.py", *words, *sizes])
        return fidelity.main()

    return call


def test_the_table_and_the_exit_status(command, clone, capsys):
    assert command(clone) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fidelity.py CLONE --tokens SHARD" in lines[0] and str(clone) not in lines[0]
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert table[0] == list(fidelity.COLUMNS) and {len(row) for row in table} == {len(table[0])}
    rows = [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    cases = [(row["buckets"], row["targets"], row["left"], row["right"]) for row in rows]
    sides = [("theirs", "recipe"), ("recipe", "emulation"), ("theirs", "emulation")]
    sizes = [("256", "1,100"), ("1,024", "1,100"), ("1,024", "500")]
    assert cases == [size + side for size in sizes for side in sides]
    assert {row["targets differ"] for row in rows} == {"0"}
    assert lines[-1] == "cases that are not explained: 0"
    assert command(clone, "--quirks", "context_left,tail_again") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "cases that are not explained: 3"


@pytest.mark.parametrize("words", [[], ["/nowhere"], [str(ROOT)]], ids=["none", "no", "other"])
def test_without_a_clone_it_says_how_to_get_one(command, words, capsys):
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert "git clone https://github.com/openai/parameter-golf" in said
    assert "fetch origin pull/806/head pull/889/head pull/890/head pull/1094/head" in said


def test_the_docs_table_is_the_logs():
    """Targets that differ and bits per token, of every case of 40,000 targets."""
    log = (ROOT / "logs/reference/fidelity.txt").read_text().splitlines()
    logged = [[cell.strip() for cell in line.split("|")[1:-1]] for line in log if line[:3] == "| #"]
    page = (ROOT / "docs/recipes.md").read_text("utf-8")
    assert f"{len(logged)} rows in `logs/reference/fidelity.txt`" in page
    cases = [row for row in logged if row[4:7] == ["40,000", "theirs", "recipe"]]
    found = {(row[0], row[2], row[3], row[7], *row[11:]) for row in cases}
    said = set()
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if line.startswith("| #") and cells[1] in ("1", "8", "1 and 8"):
            number = cells[0].split(",")[0]
            said |= {(number, ranks, *cells[2:4], *cells[6:]) for ranks in cells[1].split(" and ")}
    assert said == found and len(said) >= 16
