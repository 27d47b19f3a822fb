"""Bad input: one line that names what is wrong, a non-zero exit on every rank, no traceback."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

import train_gpt as golf
from conftest import ROOT, TINY


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory):
    """shards(split=tokens, ...) -> variables of a run on a folder of its own."""
    _, _, corpus = data

    def make(**tokens):
        folder = tmp_path_factory.mktemp("shards")
        for split, values in tokens.items():
            golf.write_shard(folder / f"x_{split}_000000.bin", np.asarray(values))
        return dict(TEXT_FILES="", DATA_PATH=str(folder), TOKENIZER_PATH=corpus.corpus["tokenizer"])

    return make


def refused(workplace, run, *words, **variables):
    """The run's one line, from its configuration and its data; it holds all the words."""
    with pytest.raises((golf.RunError, OSError)) as error:  # main prints both as one line
        cfg, _ = golf.load_config(workplace[1] | variables)
        golf.load_data(cfg, run)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def test_no_data(workplace, run, tmp_path):
    refused(workplace, run, "nowhere/*.txt", "matches no file", TEXT_FILES="nowhere/*.txt")
    for scale in ("full", "demo"):
        nowhere = dict(TEXT_FILES="", SCALE=scale, DATA_PATH="nowhere", RECIPE="golf")
        refused(workplace, run, "nowhere", "hf download", "TEXT_FILES", **nowhere)
    (tmp_path / "empty.txt").touch()
    refused(workplace, run, "text is empty", TEXT_FILES=f"{tmp_path}/*.txt")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    refused(workplace, run, "latin1.txt", "UTF-8", TEXT_FILES=f"{tmp_path}/*.txt")
    (tmp_path / "short.md").write_text("".join(f"hello {i}\n" for i in range(30)))
    short = dict(TEXT_FILES=f"{tmp_path}/*.md", PREPARED_PATH=str(tmp_path / "made"))
    refused(workplace, run, "more text", "512", **short)


def test_missing_splits(workplace, run, shards):
    refused(workplace, run, "*_val_*.bin", **shards(train=[1, 2, 3]))
    refused(workplace, run, "*_train_*.bin", **shards(val=[1, 2, 3]))


def test_too_little_data(workplace, run, shards):
    large = dict(TRAIN_BATCH_TOKENS="64000000")
    refused(workplace, run, "training tokens", "64000001", "TRAIN_BATCH_TOKENS", **large)
    short = shards(train=[5] * 1536, val=[5] * 999)
    refused(workplace, run, "1536 training tokens", "1537", **short)
    refused(workplace, run, "10 validation targets", "EVAL_SEQ_LEN=64", VAL_TOKENS="10")
    short = shards(train=[5] * 1537, val=[golf.BOS] + [5] * 63)
    refused(workplace, run, "63 validation targets", "EVAL_SEQ_LEN=64", **short)


def test_damaged_shards_and_foreign_tokens(workplace, run, shards, tmp_path):
    good = shards(train=[5] * 9999, val=[5] * 999)
    path = golf.Path(good["DATA_PATH"]) / "x_val_000000.bin"
    blob = path.read_bytes()
    for bad, word in [
        (blob[:-1], "999 tokens need 3022 bytes, the file has 3021"),
        (b"", "magic"),
        (blob + b"\0\0", "3024"),
        (b"\0" + blob[1:], "magic"),
        (blob[:4] + b"\7" + blob[5:], "version 7"),
    ]:
        path.write_bytes(bad)
        refused(workplace, run, str(path), word, **good)
    foreign = shards(train=[5] * 9999, val=[5] * 7 + [512] + [5] * 900)
    refused(workplace, run, "x_val_000000.bin", "token 512 at 7", "not below 512", **foreign)


def test_tokenizers(workplace, run, shards, tmp_path):
    good = shards(train=[5] * 9999, val=[5] * 999)
    foreign, nowhere = tmp_path / "foreign.model", dict(TOKENIZER_PATH="nowhere.model")
    for content in (b"", b"not a model", b"\x0a\x00" * 50):
        foreign.write_bytes(content)
        refused(workplace, run, "foreign.model", **good | dict(TOKENIZER_PATH=str(foreign)))
    refused(workplace, run, "nowhere.model", "No such file", **good | nowhere)
    refused(workplace, run, str(tmp_path), **good | dict(TOKENIZER_PATH=str(tmp_path)))
    refused(workplace, run, "512 pieces", "VOCAB_SIZE is 600", **good | dict(VOCAB_SIZE="600"))


def test_unwritable_folders(workplace, run):
    refused(workplace, run, "/proc/no", PREPARED_PATH="/proc/no")
    with pytest.raises((golf.RunError, OSError), match="/proc/no"):
        golf.write_atomic(golf.Path("/proc/no"), b"x")


def test_a_batch_that_ranks_cannot_share():
    cfg, _ = golf.load_config(dict(SCALE="demo", TRAIN_BATCH_TOKENS="1024"))
    for world in (1, 2, 4):
        assert golf.fit_micro_batch(cfg, world) == 1024 // world
    for world in (3, 5, 8):
        with pytest.raises(golf.RunError, match=f"=1024: .* {world} ranks"):
            golf.fit_micro_batch(cfg, world)


@pytest.mark.parametrize("back_end", ["flash2", "flash3"])
def test_attention_that_is_not_there(run, back_end):
    with pytest.raises(golf.RunError, match=f"ATTENTION={back_end}"):
        cfg = golf.replace(golf.Config(), attention=back_end)
        other = run.alone()
        other.attention = None
        golf.choose_attention(cfg, other)


# The same through the command line.


def check(done, *words):
    """One line, with these words, and no final line."""
    lines = done.stderr.splitlines()
    ours = [line for line in lines if line.startswith("error: ")]
    assert done.returncode != 0 and len(ours) == 1, done.stderr
    if "-m" in done.args:  # torchrun adds a report of its own
        assert 'train_gpt.py", line' not in done.stderr
    else:
        assert lines == ours
    assert "\nfinal " not in done.stdout
    for word in words:
        assert word in ours[0]


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(MODEL_DIMM="3"), ["MODEL_DIMM", "MODEL_DIM?"]),
        (dict(TEXT_FILES="nowhere/*.txt"), ["nowhere/*.txt", "matches no file"]),
        (dict(LOGS_PATH="/proc/no"), ["/proc/no"]),
        (dict(LOAD_ARTIFACT="nowhere.ptz"), ["LOAD_ARTIFACT=nowhere.ptz", "no such file"]),
        (dict(DEVICE="cuda", CUDA_VISIBLE_DEVICES=""), ["DEVICE=cuda", "DEVICE=cpu"]),
        (
            dict(MATRIX_LR="1e6", SCALAR_LR="1e6", TIED_EMBED_LR="1e6", GRAD_CLIP_NORM="0"),
            ["step 2: the loss is not finite", "last finite loss 6.", "MATRIX_LR"],
        ),
    ],
)
def test_one_line_that_helps(job, variables, words):
    check(job(**variables), *words)


def bad_input(kind, shards, tmp_path):
    """(variables, words) of a run on one kind of bad data."""
    good = shards(train=[5] * 9999, val=[5] * 999)
    path = golf.Path(good["DATA_PATH"]) / "x_val_000000.bin"
    blob, file = path.read_bytes(), tmp_path / "file"
    own = dict(
        no_shards=(None, dict(DATA_PATH=str(tmp_path)), ["hf download", "TEXT_FILES"]),
        magic=(b"\0" + blob[1:], {}, [str(path), "magic", "20240520"]),
        version=(blob[:4] + b"\7" + blob[5:], {}, [str(path), "version 7"]),
        short=(blob[:-1], {}, [str(path), "3022 bytes, the file has 3021"]),
        long=(blob + b"\0\0", {}, [str(path), "3022 bytes, the file has 3024"]),
        vocabulary=(None, shards(train=[5] * 9999, val=[5, 512] * 500), ["token 512", "512"]),
        no_tokenizer=(None, dict(TOKENIZER_PATH="none.model"), ["none.model", "No such file"]),
        foreign_tokenizer=(None, dict(TOKENIZER_PATH=str(file)), [str(file), "SentencePiece"]),
        empty_tokenizer=(None, dict(TOKENIZER_PATH=str(file)), [str(file), "SentencePiece"]),
        size_of_tokenizer=(None, dict(VOCAB_SIZE="600"), ["512 pieces", "VOCAB_SIZE is 600"]),
        short_validation=(
            None,
            shards(train=[5] * 9999, val=[1] + [5] * 63),
            ["63", "EVAL_SEQ_LEN=64"],
        ),
        short_training=(None, shards(train=[5] * 1536, val=[5] * 999), ["1536", "1537"]),
    )
    changed, variables, words = own[kind]
    file.write_bytes(b"" if kind == "empty_tokenizer" else b"not a model")
    path.write_bytes(changed or blob)
    return good | variables, words


@pytest.mark.parametrize(
    "kind",
    [
        "no_shards",
        "magic",
        "version",
        "short",
        "long",
        "vocabulary",
        "no_tokenizer",
        "foreign_tokenizer",
        "empty_tokenizer",
        "size_of_tokenizer",
        "short_validation",
        "short_training",
    ],
)
def test_bad_data_is_one_line_before_training(job, shards, tmp_path, kind):
    variables, words = bad_input(kind, shards, tmp_path)
    done = job(**variables)
    check(done, *words)
    assert "warmup" not in done.stdout and "model parameters" not in done.stdout


def test_bad_data_is_one_line_on_several_ranks(job, shards, tmp_path):
    variables, words = bad_input("magic", shards, tmp_path)
    check(job(2, **variables), *words)


OUT_OF_MEMORY = """
import os
import train_gpt as golf
def full(*_):
    raise golf.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
{where} = full
os._exit(golf.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, stage, saved, lower",
    [
        ("golf.Trainer.gradients", "training", "saved so far: nothing", "MICRO_BATCH_TOKENS"),
        ("golf.calibrate", "export", "golf-demo-1337.safetensors", "MODEL_DIM"),
        ("golf.stream_hints", "evaluation", "golf-demo-1337.int6.ptz", "EVAL_BATCH_WINDOWS"),
        ("golf.scan_ngrams", "evaluation", "neural-", "EVAL_BATCH_WINDOWS"),
    ],
)
def test_out_of_memory_names_the_stage_and_what_was_saved(
    workplace, tmp_path, where, stage, saved, lower
):
    """A CUDA device's lack of memory, raised where it would be."""
    code = OUT_OF_MEMORY.format(where=where)
    env = dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | workplace[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workplace[0],
        text=True,
        capture_output=True,
        env=env | dict(LOGS_PATH=str(tmp_path), MICRO_BATCH_TOKENS="1536", SAVE_PASS="1"),
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(
        f"error: out of memory of the cpu during {stage}: "
    )
    assert lower in line and saved in line


def test_debug_shows_the_traceback(job):
    done = job(NUM_HEADS="5", DEBUG="1")
    assert done.returncode != 0 and "Traceback" in done.stderr and "RunError" in done.stderr


def test_on_several_ranks_only_the_first_speaks(job):
    check(job(2, TRAIN_BATCH_TOKENS="64"), "do not divide among 2 ranks")


def test_an_error_on_another_rank_is_told_by_the_first(job, shards):
    """Only rank 1 reads the shard with the foreign token, in its first batch."""
    variables = shards(train=[5] * 6400, val=[golf.BOS] + [5] * 998)
    path = golf.Path(variables["DATA_PATH"]) / "x_train_000001.bin"
    golf.write_shard(path, np.array([5] * 3000 + [600]))
    check(job(2, TRAIN_BATCH_TOKENS="128", **variables), "x_train_000001.bin", "token 600")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda blob: blob[:-7], ["truncated or damaged"]),
        (lambda blob: b"", ["not one of ours"]),
        (lambda blob: b"PK\3\4" + blob, ["not one of ours"]),
        (lambda blob: blob[:8] + b"\1" + blob[9:], ["format version 1"]),
    ],
)
def test_artifacts_that_are_none(job, trained, tmp_path, change, words):
    blob = (trained.logs / "golf-demo-1337.int6.ptz").read_bytes()
    (tmp_path / "bad.ptz").write_bytes(change(blob))
    check(job(LOAD_ARTIFACT=str(tmp_path / "bad.ptz")), "artifact", *words)


def test_artifacts_of_another_vocabulary_and_damaged(job, trained, text_folder, tmp_path):
    artifact = trained.logs / "golf-demo-1337.int6.ptz"
    done = job(LOAD_ARTIFACT=str(artifact), TEXT_FILES=f"{text_folder}/[a-f]*.txt")
    check(done, "artifact", "another vocabulary")
    blob = bytearray(artifact.read_bytes())
    blob[len(blob) // 2] ^= 4
    (tmp_path / "bad.ptz").write_bytes(blob)
    check(job(LOAD_ARTIFACT=str(tmp_path / "bad.ptz")), "artifact", "damaged", "SHA-256")


@pytest.mark.slow
def test_a_lone_file_does_everything(text_folder, tmp_path):
    """In an empty folder, beside no other file of ours, with another package named tools around."""
    shutil.copy(golf.__file__, tmp_path)
    (tmp_path / "elsewhere" / "tools").mkdir(parents=True)
    (tmp_path / "elsewhere" / "tools" / "__init__.py").write_text("raise SystemExit('not ours')")

    def run(*args, **variables):
        env = {k: v for k, v in TINY.items() if k != "AUTHOR"} | variables
        env |= dict(PATH="/usr/bin:/bin", OMP_NUM_THREADS="1", PYTHONPATH=f"{tmp_path}/elsewhere")
        return subprocess.run(
            [sys.executable, "train_gpt.py", *args],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            env=env | dict(TEXT_FILES=f"{text_folder}/*.txt", VAL_TOKENS="2048"),
        )

    done = run(AUDIT="strict", CHECKPOINT_SECONDS="1e-6", ITERATIONS="3")
    assert done.returncode == 0 and done.stdout.count(" PASS ") == 5, done.stderr
    assert done.stdout.splitlines()[-1].startswith("final val_loss:")
    size = (tmp_path / "train_gpt.py").stat().st_size
    assert f" code_bytes:{size} " in done.stdout
    again = run(RESUME="1", ITERATIONS="3")
    assert again.returncode == 2 and "golf-demo-1337 is finished" in again.stderr
    assert "RECIPE=pr1094" in run("--help").stdout
    misspelled = run(MODEL_DIMM="32")
    assert misspelled.returncode == 2 and "did you mean MODEL_DIM?" in misspelled.stderr


def test_any_error_of_one_rank_reaches_all(run, monkeypatch):
    """The own error stays what it is; another rank's arrives as a line."""
    two = run.alone()
    two.world_size = 2
    said = []

    def exchange(messages, own):
        said.append(own)
        messages[:] = [own, "the other is out of memory" if own is None else None]

    monkeypatch.setattr(golf.dist, "all_gather_object", exchange)
    with pytest.raises(golf.RunError, match="the other is out of memory"):
        two.on_all(lambda: 5)
    with pytest.raises(ZeroDivisionError):
        two.on_all(lambda: 1 / 0)
    assert said == [None, "division by zero"]


def test_a_start_is_sent_to_every_rank(data, monkeypatch):
    """Two CPU models may round the initialization otherwise."""
    cfg, run, _ = data
    sent = []
    monkeypatch.setattr(golf.dist, "broadcast", lambda tensor, src: sent.append((tensor, src)))
    assert golf.build_model(cfg, run) and sent == []  # one rank needs nobody
    two = run.alone()
    two.world_size, two.attention = 2, run.attention
    model = golf.build_model(cfg, two)
    assert {src for _, src in sent} == {0}
    assert {t.data_ptr() for t, _ in sent} == {p.data_ptr() for p in model.parameters()}


def test_ctrl_c_outside_of_training_is_one_line(job, trained):
    artifact = trained.logs / "golf-demo-1337.int6.ptz"
    process = job(wait=False, LOAD_ARTIFACT=str(artifact), VAL_TOKENS="0", EVAL_STRIDE="2")
    for line in iter(process.stdout.readline, ""):
        if line.startswith("eval ["):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: interrupted during evaluation; saved so far: nothing")
    assert len(err.splitlines()) == 1


def test_a_tokenizer_whose_documents_begin_otherwise(tmp_path):
    """BOS counts in documents, bytes and shards; another number would break them in silence."""
    text = (f"line {i} of a text of many words and some numbers {i * i}" for i in range(400))
    options = golf.TOKENIZER_OPTIONS | dict(bos_id=2, eos_id=1)
    with open(tmp_path / "other.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=text, model_writer=file, vocab_size=300, **options
        )
    with pytest.raises(golf.RunError, match="its BOS is 2, the challenge's shards have 1"):
        golf.load_tokenizer(str(tmp_path / "other.model"), 300)
