"""What other people's programs stumbled over: terminals, signals, files, words of somebody else's.

Each test is of a kind of accident, by several of its inputs; most of them through functions that a
run calls, a few through the real command line, where that is what the accident is about.
"""

import contextlib
import io
import json
import os
import pickle
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as golf
from conftest import ROOT

# A run of seconds, most of which are imports.
LEAST = dict(
    SCALE="demo",
    RANKS="1",
    COMPILE="0",
    NUM_LAYERS="2",
    MODEL_DIM="16",
    NUM_HEADS="2",
    NUM_KV_HEADS="1",
    ROPE_DIMS="4",
    MLP_MULT="1",
    XSA_LAST_N="1",
    VE_ENABLED="0",
    BIGRAM_VOCAB_SIZE="0",
    ITERATIONS="2",
    WARMUP_STEPS="0",
    TRAIN_BATCH_TOKENS="128",
    TRAIN_SEQ_LEN="32",
    EVAL_SEQ_LEN="32",
    EVAL_STRIDE="32",
    VAL_TOKENS="2048",
    VAL_BATCH_SIZE="1024",
    GPTQ_SECONDS="0",
    NGRAM_ENABLED="0",
    SCORING="neural",
)
FORGED = "x\nfinal val_bpb:0.1 \x1b[2J\u202e\u2028"  # another line, a terminal's command, an order
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 2000000\n"
INFINITE = '{"config": {}, "final": [{"val_bpb": Infinity}]}'


def refusal(work, *values, **named):
    """The one line with which work(...) is refused."""
    with pytest.raises((golf.RunError, OSError)) as error:
        work(*values, **named)
    assert "\n" not in golf.printable(str(error.value))
    return str(error.value)


def full_device():
    """A stream onto a disk without space."""
    return io.TextIOWrapper(io.FileIO("/dev/full", "w"))


def configured(**variables):
    """The configuration that variables give at demo scale, where nothing else is said."""
    return golf.load_config(dict(SCALE="demo") | variables)[0]


@pytest.fixture(scope="module")
def made(job):
    """A finished run of the smallest network."""
    done = job(**LEAST)
    assert done.returncode == 0, done.stderr
    return done


# B. What was bought is lost.


def test_a_console_that_fails_and_a_picture_that_fails_end_no_run(workplace, tmp_path):
    """The log says so once; results and weights are there. The names are no ASCII, the console is
    full and can spell ASCII alone, and matplotlib is set up for a notebook."""
    folder, env = workplace
    logs = tmp_path / "\u5317\u4eac"
    env = env | LEAST | dict(LOGS_PATH=str(logs), RUN_ID="cost$\\q$ [1]", PICTURE="1")
    odd = dict(MPLBACKEND="module://no.such_backend", PYTHONIOENCODING="ascii")
    own = dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1", MPLCONFIGDIR=str(tmp_path))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train_gpt.py")],
            cwd=folder,
            env=own | env | odd,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=200,
        )
    assert done.returncode == 0 and not done.stderr
    log = (logs / "cost$\\q$ [1].txt").read_text()
    assert log.count("the console is gone (No space left on device): the run goes on") == 1
    assert log.splitlines()[-1].startswith("final ")
    suffixes = (".json", ".submission.json", ".png", ".safetensors", ".int6.ptz")
    assert all((logs / f"cost$\\q$ [1]{suffix}").exists() for suffix in suffixes)


def test_a_line_that_cannot_be_printed_is_no_error():
    closed = io.StringIO()
    closed.close()
    for stream in (full_device(), closed, None):
        assert bool(golf.tell("line", stream)) == (stream is not None)
        with contextlib.suppress(OSError, AttributeError):
            stream.close()
    assert not golf.tell(FORGED, said := io.StringIO()) and said.getvalue().count("\n") == 1


@pytest.mark.parametrize("error", [ImportError("no"), KeyError("x"), MemoryError(), ValueError])
def test_whatever_a_picture_raises_is_a_line(run, monkeypatch, capsys, error):
    def broken(_record):
        raise error

    monkeypatch.setattr(golf, "plot", broken)
    monkeypatch.setattr(run, "record", {"config": {"picture": True}})
    golf.save_picture(run)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no picture: ")


FINISHED = json.dumps({"final": [{}], "config": {}})
STOPPED = json.dumps({"final": [{}], "interrupted": [{"steps": 3}]})


@pytest.mark.parametrize(
    "suffixes, record, finished",
    [
        (["safetensors"], None, True),
        (["safetensors", "checkpoint"], FINISHED, True),
        (["checkpoint"], FINISHED, True),
        (["checkpoint", "safetensors"], STOPPED, False),
        (["checkpoint"], None, False),
        (["checkpoint"], "[" * 100_000, False),
        (["checkpoint"], '{"final": []}', False),
    ],
)
def test_only_an_unfinished_run_is_resumed(tmp_path, suffixes, record, finished):
    for suffix in suffixes:
        (tmp_path / f"r.{suffix}").touch()
    if record:
        (tmp_path / "r.json").write_text(record)
    cfg = configured(LOGS_PATH=str(tmp_path), RUN_ID="r", RESUME="1")
    if finished:
        assert "the training of r is finished" in refusal(golf.check_unfinished, cfg)
    else:
        golf.check_unfinished(cfg)


def test_a_closed_terminal_stops_the_training_and_a_second_signal_the_run(job, tmp_path):
    """SIGHUP as SIGTERM does; then what was trained is saved, and a signal ends the run at once."""
    variables = LEAST | dict(ITERATIONS="1000000", TRAIN_LOG_EVERY="1", LOGS_PATH=str(tmp_path))
    process = job(wait=False, **variables | dict(EVAL_STRIDE="1", VAL_TOKENS="0"))
    said = ""
    for line in iter(process.stdout.readline, ""):
        said += line
        if line.startswith("step:1/"):
            process.send_signal(signal.SIGHUP)
        if ".safetensors" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "stop requested: training ends after" in said
    assert err.startswith("error: ") and "Traceback" not in err
    assert [*tmp_path.glob("*.safetensors")] and [*tmp_path.glob("*.checkpoint")]


def test_what_is_ignored_stays_ignored_and_all_is_as_before():
    """nohup ignores SIGHUP, a shell's background job Ctrl-C: before, in and after the training."""
    before = {number: signal.getsignal(number) for number in golf.STOP_SIGNALS}
    called = []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with golf.heed_signals():
            with golf.stop_signals(lambda *_: called.append(1)):
                for number in golf.STOP_SIGNALS:
                    ignored = signal.getsignal(number) == signal.SIG_IGN
                    assert ignored == (number != signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            assert called == [1]
            assert signal.getsignal(signal.SIGTERM) is golf.interrupt
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "name",
    ["a" * 240, "\u5317" * 70, "\U0001f600" * 52, ".", "..", ".a", "a/b", "a\nb", "a\x1b[2J"]
    + ["\u202ea", "a\u2028", "\udcff", "\x00"],
)
def test_a_name_that_no_file_can_have_is_refused_before_training(name):
    assert refusal(configured, RUN_ID=name).startswith("RUN_ID=")


@pytest.mark.parametrize("name", ["a" * 205, "\u5317\u4eac", "cost$\\q$", "[a]*?", "-x", "a.json"])
def test_a_name_that_is_taken_can_have_every_suffix(tmp_path, name):
    longest = max(golf.SUFFIXES, key=len)
    golf.write_atomic(tmp_path / f"{configured(RUN_ID=name).run_id}-99{longest}", b"x")
    assert golf.is_plain_name(name)


NUMBERS = [name for name, f in golf.FIELDS.items() if f.type in ("int", "float")]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_without_end(name):
    """What is beyond any use is refused before a run begins, not met after its training."""
    for value in ("1e38", "inf", "-inf", "nan", "1" + "0" * 30, "1" + "0" * 5000, "-1"):
        with pytest.raises(golf.RunError, match=name.upper()):
            golf.parse_value(name, value)


def test_two_writers_of_one_name_leave_a_whole_file(tmp_path):
    """Readers find one of both at any moment; a link of the name is replaced, not followed."""
    path, outside = tmp_path / "file", tmp_path / "outside"
    outside.write_bytes(b"mine")
    for name in ("file", "file.tmp", ".file.tmp"):
        (tmp_path / name).symlink_to(outside)
    contents = [bytes([i]) * 300_000 for i in (1, 2)]
    failed, done = [], threading.Event()

    def write(content):
        try:
            for _ in range(25):
                golf.write_atomic(path, content)
        except golf.RunError as error:
            failed.append(error)

    def read():
        while not done.is_set():
            if path.read_bytes() not in (*contents, b"mine"):
                failed.append("torn")

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not failed and outside.read_bytes() == b"mine" and not path.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(".file.tmp", "file", "file.tmp", "outside")
    ]


def test_all_files_have_the_rights_that_the_user_wants(tmp_path, monkeypatch):
    """Bytes and tensors alike; a writing that fails leaves nothing."""
    for mask in (golf.UMASK, 0o077, 0o002):
        monkeypatch.setattr(golf, "UMASK", mask)
        for content in (b"x", {"a": torch.zeros(3)}):
            golf.write_atomic(tmp_path / "a", content)
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask
    (tmp_path / "folder" / "in it").mkdir(parents=True)
    refusal(golf.write_atomic, tmp_path / "folder", b"x")
    assert len([*tmp_path.iterdir()]) == 2


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """(Config, Run, Data, path) of a training whose checkpoint is there."""
    cfg, run, corpus = data
    folder = tmp_path_factory.mktemp("stopped")
    values = dict(iterations=4, warmup_steps=0, logs_path=str(folder), run_id="r")
    cfg = golf.replace(cfg, checkpoint_seconds=1e-9, **values)
    own = run.alone()
    own.base = str(folder / "r")
    golf.Trainer(golf.build_model(cfg, own), corpus, cfg, own).train()
    return golf.replace(cfg, resume=True), own, corpus, folder / "r.checkpoint"


def test_any_flipped_bit_of_a_checkpoint_is_told(stopped):
    cfg, run, corpus, path = stopped
    good, random = path.read_bytes(), np.random.default_rng(5)
    (size,) = struct.unpack_from("<Q", good)
    places = [*random.integers(8 + size, len(good), 12), len(good) - 1, *range(9, size, 999)]
    try:
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << random.integers(8)
            path.write_bytes(bad)
            line = refusal(golf.read_checkpoint, corpus, cfg, run)
            assert str(path) in line
    finally:
        path.write_bytes(good)


def test_a_checkpoint_knows_text_arithmetic_and_settings(stopped):
    """What differs is named; the steps' times are kept, by which the next is known to fit."""
    cfg, run, corpus, _ = stopped
    saved = golf.read_checkpoint(corpus, cfg, run)
    assert 1 <= len(saved["recent"]) <= 3 and float(saved["recent"].min()) > 0
    for changed, words in [
        (dict(compute="bfloat16"), "COMPUTE was float32, is bfloat16"),
        (dict(matrix_lr=0.5), "MATRIX_LR was 0.025, is 0.5"),
        (dict(seed=3, beta1=0.5), "SEED was 1337, is 3; BETA1 was 0.9, is 0.5"),
        (dict(max_wallclock_seconds=9.0), "MAX_WALLCLOCK_SECONDS was 0.0, is 9.0"),
    ]:
        other = golf.replace(cfg, **changed)
        assert words in refusal(golf.read_checkpoint, corpus, other, run)
    golf.read_checkpoint(corpus, golf.replace(cfg, train_log_every=9, picture=False), run)
    tokens = corpus.train.read(0, len(corpus.train))
    tokens[[5, 6]] = tokens[[6, 5]] + np.array([0, 1])
    other = types.SimpleNamespace(read=lambda a, n: tokens[a : a + n], __len__=None)
    digest = golf.TokenStream.digest
    with_length = type("Stream", (), {"__len__": lambda _: len(tokens), "digest": digest})()
    with_length.read = other.read
    shuffled = golf.replace(corpus, train=with_length)
    assert "training text was " in refusal(golf.read_checkpoint, shuffled, cfg, run)


def test_a_resumed_training_knows_how_long_steps_take(stopped):
    cfg, run, corpus, _ = stopped
    trainer = golf.Trainer(golf.build_model(cfg, run), corpus, cfg, run)
    trainer.average = golf.WeightAverage(trainer.model, cfg)
    trainer.optimizer = golf.Optimizer(trainer.model, cfg, run)
    golf.Checkpoint(trainer)
    assert trainer.steps == len(trainer.recent) >= 2


TWO_RANKS = dict(RANKS="2", OMP_NUM_THREADS="2", AUDIT="1")


def test_ranks_meet_where_nobody_else_can_and_leave_before_the_audit(job, tmp_path):
    """The store is a file in a folder of rights 0700; no rank is there that could die in vain."""
    process = job(wait=False, **LEAST | TWO_RANKS | dict(TMPDIR=str(tmp_path)))
    (folder,), others = [None], None
    for line in iter(process.stdout.readline, ""):
        if line.startswith("facts "):
            (folder,) = tmp_path.glob("train_gpt.*")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and "world_size:2" in line
        if line.startswith("audit "):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            statuses = [Path(f"/proc/{pid}/status") for pid in children.split()]
            others = [s for s in statuses if s.exists() and "State:\tZ" not in s.read_text()]
            others = [s for s in others if b"spawn_main" in s.with_name("cmdline").read_bytes()]
            break
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and others == [] and not err
    assert out.strip().splitlines()[-1].startswith("final ") and not folder.exists()


# C. Somebody gets in.

WATCHED = """
import os, sys
def watch(event, args):
    path = args[0] if args and isinstance(args[0], (str, bytes)) else ""
    if event in ("open", "import", "exec", "os.mkdir", "os.rename") and "evil" in os.fsdecode(path):
        with WRITE as file:
            file.write(f"{event} {os.fsdecode(path)}\\n")
sys.addaudithook(watch)
"""


class Opened:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_record_beside_an_artifact_leads_nowhere(job, made, tmp_path):
    """It names folders to write into, a cache of graphs that are programs, weights, and a module.
    Nothing of the folder is opened but the artifact and the record, and nothing is left in it."""
    evil, caught, seen = tmp_path / "evil", tmp_path / "caught", tmp_path / "seen"
    graphs = evil / "cache" / golf.kept_graphs().name
    for name in ("fxgraph/ab/key", "aotautograd/key"):
        (graphs / name).mkdir(parents=True)
        (graphs / name / "0").write_bytes(pickle.dumps(Opened(str(caught))))
    (evil / "matplotlib.py").write_text(f"open({str(caught)!r}, 'w')")
    (evil / "x.int6.ptz").write_bytes(next(made.logs.glob("*.ptz")).read_bytes())
    paths = ("prepared_path", "logs_path", "load_weights", "load_artifact", "sample", "author")
    config = made.record["config"] | {name: f"{evil}/cache" for name in paths}
    config |= dict(run_id="evil", save_pass=True, compile="1", debug=True)
    (evil / "x.json").write_text(json.dumps(made.record | {"config": config}))
    artifact = dict(LOAD_ARTIFACT=str(evil / "x.int6.ptz"))
    plain = dict(EVAL_STRIDE="32", TEXT_FILES=config["text_files"])
    cfg, honest = configured(**plain | artifact), configured(**plain)
    taken = {n for n in golf.FIELDS if getattr(cfg, n) != getattr(honest, n)} - {"load_artifact"}
    assert taken <= {"vocab_size", "val_tokens", "eval_seq_len", "seed", "run_id"}
    assert cfg.run_id == f"golf-demo-{cfg.seed}"
    (tmp_path / "watch").mkdir()
    write = f"open(os.open({str(seen)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 'w')"
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCHED.replace("WRITE", write))
    before = {path: path.lstat().st_mtime_ns for path in evil.rglob("*")}
    odd = dict(PICTURE="1", PYTHONPATH=str(tmp_path / "watch"), MPLCONFIGDIR=str(tmp_path))
    done = job(**LEAST | odd | artifact)
    assert done.returncode == 0 and not done.stderr
    assert done.final.split()[:3] == made.final.split()[:3]
    assert {path: path.lstat().st_mtime_ns for path in evil.rglob("*")} == before
    assert not caught.exists()
    opened = {line.split(" ", 1)[1] for line in seen.read_text().splitlines()}
    assert opened == {str(evil / "x.int6.ptz"), str(evil / "x.json")}


@given(st.text() | st.text("\n\r\x1b\x00\x85\u2028\u202e\udcffab", max_size=40))
def test_whatever_comes_from_outside_is_one_printable_line(text):
    for shown in (golf.printable(text), golf.printable(text * 3000)):
        assert shown.isprintable() and len(shown) < golf.LONGEST_LINE + 60
        shown.encode()


@pytest.mark.parametrize("where", ["text", "shard", "header", "setting", "argument"])
def test_foreign_names_forge_no_line(data, tmp_path, capsys, where):
    """In the log, on the console, and in the error."""
    cfg, run, _ = data
    name = FORGED.replace("/", "")
    if where == "setting":
        line = refusal(golf.load_config, {"ITERATIONS": f"7{name}", "MODEL_DIMM\n": "1"})
    elif where == "argument":
        line = refusal(golf.check_arguments, [f"--seed={name}", "y" * 10**6])
    elif where == "header":
        told = [[name, [1], 0], ["z" * 10**6, [1], 0]]
        line = golf.other_tensor(told, golf.tensor_table(cfg))
    else:
        path = tmp_path / f"{name}_val_0.bin"
        path.write_bytes(LFS + b"\xff")
        work = golf.open_shard if where == "shard" else golf.user_documents
        line = refusal(work, str(path))
    golf.tell(f"error: {line}", sys.stderr)
    run.log(line)
    caught = capsys.readouterr()
    log = Path(f"{run.base}.txt").read_text()
    for shown in (caught.err, caught.out, log):
        assert not any(x.startswith("final ") for x in shown.splitlines())
    assert caught.err.count("\n") == caught.out.count("\n") == 1 and len(caught.err) < 5000


@pytest.fixture(params=["pipe", "/dev/zero", "folder", "socket", "dangling"])
def special(request, tmp_path):
    """Something that is no regular file."""
    path = tmp_path / "special"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path):
            server.bind("special")
    else:
        path.symlink_to(request.param)
    return path


def test_nothing_waits_for_what_is_no_file(special, made, tmp_path):
    """Neither as a shard, a tokenizer, weights, an artifact or a text, nor beside them."""
    for work in (golf.read_regular, golf.read_tensors, golf.open_shard, golf.user_documents):
        assert "special" in refusal(work, str(special))
    assert "special" in refusal(golf.load_tokenizer, str(special), 512)
    artifact = tmp_path / "x.int6.ptz"
    artifact.write_bytes(next(made.logs.glob("*.ptz")).read_bytes())
    for name in ("x.json", "x.checkpoint", "corpus.json"):
        (tmp_path / name).symlink_to(special)
    config = golf.record_of_artifact(artifact)["config"]
    assert config in ({}, {"vocab_size": 512})
    cfg = configured(LOGS_PATH=str(tmp_path), RUN_ID="x", RESUME="1")
    golf.check_unfinished(cfg)
    refusal(golf.read_checkpoint, None, cfg, None)
    assert not golf.is_prepared(tmp_path)


def test_a_folder_of_text_with_special_files_is_its_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    for name, to in dict(zero="/dev/zero", log="/proc/kmsg", loop="loop", me=tmp_path).items():
        (tmp_path / name).symlink_to(to)
    documents, facts = golf.user_documents(str(tmp_path))
    assert [text for _, text in documents] == ["text"] and facts["files"] >= 4


# D. Refused wrongly, or with an untrue reason.

DRAW = np.random.default_rng(7)


def letters(alphabet, count):
    """A text of random letters."""
    return "".join(DRAW.choice([*alphabet], count))


@pytest.mark.parametrize(
    "texts",
    [
        [letters("ACGT", 4000) + "\n" for _ in range(30)],
        [letters("ACGT", 120_000)],
        [letters("\u5317\u4eac\u6587\u5b57", 1500) for _ in range(30)],
        [letters("ACGT\t", 4000) for _ in range(30)],
        ["  " + letters("AC\u3000\xa0\x85\x00", 4000) + " " for _ in range(30)],
        ["\ufeff" + letters("ACGT\r", 4000) for _ in range(30)],
        [letters("ACGT ", 200_000)],
    ],
    ids=["dna", "one line", "no alphabet", "tabs", "odd spaces", "marks", "one line of words"],
)
def test_text_of_few_spaces_or_lines_is_text(run, tmp_path, texts):
    """Bytes balance, and there is text on both sides."""
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    paths = dict(TEXT_FILES=str(tmp_path), PREPARED_PATH=str(tmp_path / "made"))
    cfg = configured(**LEAST | paths | dict(VOCAB_SIZE="300", VAL_TOKENS="0"))
    data = golf.load_data(cfg, run)
    size = int(data.val_bytes.sum())
    assert size > 0.05 * data.corpus["text_bytes"] and len(data.train) > 1000


@given(st.text("ab \n\r\u5317", max_size=300), st.integers(0, 40))
def test_parts_of_a_text_are_the_text(text, size):
    parts = [*golf.cut_text(text, size)]
    assert "".join(parts) == text and all(parts)
    assert all(len(part) >= size for part in parts[:-1])


@pytest.mark.parametrize(
    "variables, name, value",
    [
        (dict(COMPILE="False"), "compile", "0"),
        (dict(COMPILE="on"), "compile", "1"),
        (dict(COMPILE=" TRUE "), "compile", "1"),
        (dict(AUDIT="no"), "audit", "0"),
        (dict(SMOKE="off"), "smoke", False),
        (dict(DEVICE="/dev/sda"), "device", "auto"),
        (dict(LOGS_PATH="~/l"), "logs_path", os.path.expanduser("~/l")),
    ],
)
def test_words_that_mean_something_mean_it(variables, name, value):
    assert getattr(configured(**variables), name) == value


@pytest.mark.parametrize(
    "variables",
    [dict(DEVICE=d) for d in ("mps", "XPU:1", "cuda:0", "tpu", "CPU")]
    + [dict(COMPILE="inductor"), dict(RANKS="two"), dict(PICTURE="maybe"), dict(AUDIT="2")]
    + [dict(MAX_WALLCLOCK_SECONDS="inf"), dict(DIST_TIMEOUT_SECONDS="inf"), dict(BETA2="1")],
    ids=str,
)
def test_a_value_that_is_meant_and_not_known_is_an_error(variables):
    (name,) = variables
    assert refusal(configured, **variables).startswith(f"{name}=")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seed=7"], "SEED=7 python"),
        (["--val-tokens", "9"], "VAL_TOKENS=... python"),
        (["-seed=7", "--iterations=3"], "SEED=7 ITERATIONS=3 python"),
        (["config.yaml"], "--help"),
        ([""], "--help"),
    ],
)
def test_arguments_are_told_as_variables(arguments, words):
    assert words in refusal(golf.check_arguments, arguments)


TORCHRUN = dict(
    RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
)


@pytest.mark.parametrize(
    "env, words",
    [
        (dict(WORLD_SIZE="2"), "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        (dict(RANK="0"), "WORLD_SIZE, LOCAL_RANK"),
        *(({k: v for k, v in TORCHRUN.items() if k != n}, f"{n} not set") for n in TORCHRUN),
        (TORCHRUN | dict(RANK="2"), "RANK=2 WORLD_SIZE=2"),
        (TORCHRUN | dict(RANK="-1"), "no rank of a launcher"),
        (TORCHRUN | dict(WORLD_SIZE=""), "no rank of a launcher"),
        (TORCHRUN | dict(LOCAL_RANK="x"), "no rank of a launcher"),
        (TORCHRUN | dict(MASTER_PORT="http"), "no rank of a launcher"),
        (dict(SLURM_STEP_NUM_TASKS="4"), "srun started 4 tasks"),
    ],
    ids=str,
)
def test_half_of_a_launchers_variables_is_one_line(env, words):
    assert words in refusal(golf.launched_rank, env)


def test_whole_launchers_are_known():
    assert golf.launched_rank(TORCHRUN | dict(RANK="1")) == (1, 2)
    assert golf.launched_rank({}) == golf.launched_rank(dict(SLURM_STEP_NUM_TASKS="1")) == (0, 1)
    assert golf.launched_rank(dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")) == (0, 1)
    assert golf.launched_rank(TORCHRUN | dict(SLURM_STEP_NUM_TASKS="2")) == (0, 2)


@pytest.mark.parametrize("name", ["notes [2024]", "a*b?", "[x", "a:b", "**", "a b\n", b"caf\xe9"])
def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path, name):
    """A folder, a file in it, and a shard's folder."""
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    for text in ("one", "two"):
        (folder / f"{text} [1].txt").write_text(text)
    for names in (folder, f"{folder}/one [1].txt:{folder}/two [1].txt", f"{folder}:{folder}"):
        documents, _ = golf.user_documents(str(names))
        assert [text for _, text in documents] == ["one", "two"]
    golf.write_shard(folder / "x_val_0.bin", np.array([1, 5]))
    assert len(golf.find_shards(str(folder), "val")) == 1


def test_a_pattern_that_matches_nothing_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for pattern in (f"{tmp_path}/b*", f"{tmp_path}/[b]", f"{tmp_path}/none"):
        assert f"{pattern} matches no" in refusal(golf.user_documents, f"{tmp_path}:{pattern}")
    assert golf.named_paths(f":{tmp_path}::") == [str(tmp_path)]
    assert "no file of text" in refusal(golf.user_documents, ":::")


RECORDS = {
    "deep": "[" * 200_000,
    "empty": "",
    "pairs": '{"config": [["a"]], "final": [{"val_bpb": 1}]}',
    "no score": '{"config": {}, "final": {"val_bpb": 1}}',
    "words": '{"config": {"seed": "x", "vocab_size": {"a": 1}, "scale": 1e999}, "final": []}',
    "long": '{"config": {"seed": 1%s}}' % ("0" * 6000),
    "infinite": INFINITE,
    "surrogates": '{"config": {"seed": "\\udcff", "eval_seq_len": null}}',
    "binary": b"\xff\xfe\x00\x01",
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_makes_no_sense_says_nothing(made, tmp_path, kind):
    content = RECORDS[kind]
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    artifact = tmp_path / "x.int6.ptz"
    artifact.write_bytes(next(made.logs.glob("*.ptz")).read_bytes())
    cfg, notes = golf.load_config(dict(SCALE="demo", LOAD_ARTIFACT=str(artifact)))
    plain = configured()
    assert (cfg.seed, cfg.vocab_size, cfg.text_files) == (plain.seed, plain.vocab_size, "")
    assert len(notes) == 1


def test_an_artifacts_record_is_its_own(made, tmp_path):
    """Not that of a run whose name is the beginning of its name."""
    for name in ("a.internal", "a.int6", "a"):
        (tmp_path / f"{name}.int6.ptz").write_bytes(next(made.logs.glob("*.ptz")).read_bytes())
    (tmp_path / "a.json").write_text('{"config": {"seed": 99}}')
    seeds = {p.name: golf.record_of_artifact(p)["config"].get("seed") for p in tmp_path.glob("*z")}
    assert seeds == {"a.int6.ptz": 99, "a.internal.int6.ptz": None, "a.int6.int6.ptz": None}


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", "5", "{", '{"documents": 0}', "\x00"])
def test_prepared_text_that_was_not_finished_is_made_again(tmp_path, content):
    (tmp_path / "corpus.json").write_text(content)
    assert not golf.is_prepared(tmp_path)
    assert not golf.is_prepared(tmp_path / "nowhere")


def test_a_folders_own_output_is_no_input(tmp_path, monkeypatch):
    """Nor are hidden files and folders, however the folder is named."""
    made = f"data/text_{'0' * 16}"
    names = ("a.txt", "logs/r.txt", ".git/x", ".b", "c/logs/d.txt", "data/mine.txt")
    names += (f"{made}/text_val.txt", f"{made}/corpus.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for names in (".", str(tmp_path), "./", "c/..", f"{tmp_path}:."):
        documents, _ = golf.user_documents(names, "logs")
        assert {text for _, text in documents} == {"a.txt", "c/logs/d.txt", "data/mine.txt"}
    documents, _ = golf.user_documents("logs/r.txt", "logs")  # by its name
    assert [text for _, text in documents] == ["logs/r.txt"]


@pytest.mark.parametrize("names", [".", "*", "*.*", "**/*.txt"])
def test_runs_in_the_texts_own_folder_do_not_read_what_runs_left(tmp_path, monkeypatch, names):
    """Patterns match it, and LOGS_PATH and PREPARED_PATH may be the folder itself."""
    made = tmp_path / f"text_{'a' * 16}"
    made.mkdir()
    for name in ("corpus.json", "text_val.txt"):
        (made / name).write_text("made")
    for suffix in (".txt", ".json", ".submission.json", ".clock"):
        (tmp_path / f"run.1-2{suffix}").write_text("left")
    (tmp_path / "runes.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    documents, _ = golf.user_documents(names, ".")
    assert [text for _, text in documents] == ["text"]


@pytest.mark.parametrize(
    "work", [lambda: torch.empty(2**60), lambda: torch.zeros(2**50).numpy(), lambda: np.ones(2**58)]
)
def test_a_cpu_without_memory_is_told_as_a_gpu_is(work):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        work()
    line = golf.explain(error.value, None)
    assert line.startswith("out of memory of the cpu during start: lower MODEL_DIM")
    assert golf.explain(RuntimeError("a fault"), None) is None


def header(*numbers):
    """The beginning of a shard's file."""
    return struct.pack(f"<{len(numbers)}i", *numbers).ljust(1024, b"\0")


@pytest.mark.parametrize(
    "content, words",
    [
        (LFS, "Git LFS"),
        (np.arange(5000, 9000).astype("<u2").tobytes(), "nanoGPT's .bin files have none"),
        (header(20240801, 7, 300) + bytes(1200), "llm.c's for Llama 3"),
        (header(20240520, 1, 600) + np.full(600, 50_000, "<u2").tobytes(), "GPT-2's"),
        (bytes(5000), "zeros"),
        (b"", "empty"),
        (b"<!DOCTYPE html>", "no shard of the challenge's format"),
        (header(20240520, 1, 0), "0 tokens"),
    ],
)
def test_a_shard_that_is_something_else_is_told_what_it_is(tmp_path, content, words):
    path = tmp_path / "x_train_0.bin"
    path.write_bytes(content)
    line = refusal(lambda: golf.TokenStream([str(path)], 512))
    assert words in line and str(path) in line


@pytest.mark.parametrize("content", [LFS, b"<html>", b'{"model": {}}', b"", b"\x00" * 99])
def test_a_tokenizer_that_is_something_else_is_none(tmp_path, content):
    path = tmp_path / "t.model"
    path.write_bytes(content)
    assert "not a SentencePiece model" in refusal(golf.load_tokenizer, str(path), 512)


@pytest.mark.parametrize(
    "content, words",
    [
        ("caf\xe9 at noon".encode("latin-1"), "no UTF-8 text (byte 0xe9 at 3)"),
        ("text".encode("utf-16"), "no UTF-8 text (byte 0xff at 0)"),
        (b"\x1f\x8b\x08text", "no UTF-8 text (byte 0x8b at 1)"),
        ("a\u2581b".encode(), "has U+2581"),
    ],
)
def test_a_text_that_is_none_is_told_why(tmp_path, content, words):
    """Named, and as all that a folder has; in a folder with others it is left out and counted."""
    (tmp_path / "bad.txt").write_bytes(content)
    for names in (tmp_path / "bad.txt", tmp_path):
        line = refusal(golf.user_documents, str(names))
        assert words in line and "bad.txt" in line
    (tmp_path / "good.txt").write_text("good")
    documents, facts = golf.user_documents(str(tmp_path))
    assert len(documents) == 1 and facts["files"] == 2
    assert [count for what, count in facts.items() if what.startswith("left out, ")][0] == 1


def test_a_shard_that_becomes_shorter_is_an_error_and_no_end(tmp_path):
    path = tmp_path / "x_val_0.bin"
    golf.write_shard(path, np.arange(9000))
    shard = golf.open_shard(str(path))
    assert shard[8000:8002].tolist() == [8000, 8001]
    os.truncate(path, 3000)
    assert "became shorter" in refusal(lambda: shard[8000:8002])
    path.unlink()
    assert shard[5:6].tolist() == [5]


@pytest.mark.parametrize("target, status", [("/dev/full", 2), ("closed", 0), ("gone", 0)])
def test_help_that_cannot_be_printed_is_one_line(monkeypatch, capsys, target, status):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    streams = {"closed": None, "gone": Gone()}
    stream = streams[target] if target in streams else full_device()
    with monkeypatch.context() as changed:
        changed.setattr(sys, "stdout", stream)
        assert golf.print_help() == status
    assert capsys.readouterr().err.count("\n") == (status == 2)
    with contextlib.suppress(OSError, AttributeError):
        stream.close()


@given(st.recursive(st.floats() | st.none() | st.text(), lambda x: st.lists(x) | st.tuples(x)))
def test_json_has_no_numbers_that_json_has_not(value):
    def refuse(word):
        raise AssertionError(word)

    text = golf.as_json({"a": value}).decode()
    json.loads(text, parse_constant=refuse)
    assert not re.search(r"(?<![\w\"])(NaN|-?Infinity)(?![\w\"])", re.sub(r'"[^"]*"', "", text))


def test_a_run_of_no_end_is_still_json():
    assert json.loads(golf.as_json({"cap": float("inf"), "of": [float("nan"), -0.5]})) == {
        "cap": "inf",
        "of": ["nan", -0.5],
    }


def test_progress_is_shown_on_terminals_alone(data, monkeypatch):
    """Neither a closed nor a missing stream of errors is asked."""
    _, _, corpus = data
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        tokens = golf.encode_documents(corpus.tokenizer, [("a", "text")], corpus.table)
        assert tokens[0] == golf.BOS


def test_a_compilation_that_fails_is_a_line():
    """As on a full disk, where it was asked for and nothing else can be done."""
    failed = torch._dynamo.exc.TorchDynamoException("OSError: no space\n\nSet TORCH_LOGS")
    line = golf.explain(failed, None)
    assert line == "compilation failed during start: OSError: no space; see COMPILE=0"
