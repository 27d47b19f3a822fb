"""Shards, tokenizer and bytes."""

import collections
import copy
import io
import itertools
import json
import tempfile

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as golf

# Any string that a text can hold: no surrogates, and not SentencePiece's own space.
TEXT = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="session")
def tokenizer(data):
    """The tiny corpus's tokenizer."""
    return data[2].tokenizer


def test_round_trip_of_arbitrary_strings(tokenizer):
    @given(TEXT | st.text("ab \n\t<>/sunk0x41", max_size=60))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_bytes_of_any_text_balance(tokenizer, data):
    table = data[2].table

    @given(TEXT | st.text(" ab\n", max_size=60))
    def check(text):
        tokens = torch.tensor([golf.BOS, *tokenizer.encode(text)])
        assert int(table.target_bytes(tokens).sum()) == len(text.encode())

    check()


def model_of(**options):
    """A SentencePiece model of 330 pieces with these options beside TOKENIZER_OPTIONS."""
    lines = [f"Line {i} has two  spaces, {i * i} and a word{i % 7} (x)." for i in range(2000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=330,
        **golf.TOKENIZER_OPTIONS | options,
    )
    return model.getvalue()


# The protocol buffer's field of a piece that is the space sign alone, and of one that is not.
LONE_SPACE, RENAMED = b"\n\x03\xe2\x96\x81", b"\n\x03\xe2\x96\x82"
TOKENIZERS = {  # options, how the model is changed, what the refusal says; "": none
    "ours": ({}, (b"", b""), ""),
    "the challenge's": (
        dict(
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            remove_extra_whitespaces=True,
        ),
        (b"", b""),
        "",
    ),
    "no lone space": ({}, (LONE_SPACE, RENAMED), "U+2581"),
    "no dummy prefix": (dict(add_dummy_prefix=False), (b"", b""), "count"),
    "spaces at the end of pieces": (dict(treat_whitespace_as_suffix=True), (b"", b""), "comes"),
    "lower case": (dict(normalization_rule_name="nmt_nfkc_cf"), (b"", b""), "comes back as 'zebra"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_cannot_tell_bytes_is_refused_before_training(name):
    options, (before, after), words = TOKENIZERS[name]
    model = model_of(**options)
    assert before in model
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.replace(before, after))
    val = torch.tensor([golf.BOS, *tokenizer.encode("Line 7 has two spaces. \N{SNOWMAN} (x)")])
    check = (name, tokenizer, golf.ByteTable(tokenizer), val)
    if not words:
        golf.check_tokenizer(*check)
        return
    with pytest.raises(golf.RunError, match=f"^{name}: .* tokenizer: ") as error:
        golf.check_tokenizer(*check)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_documents_that_begin_with_a_space_are_tried(tokenizer, data):
    """Of a table that forgets the space of the dummy prefix: the probes alone would do, and so
    would the documents."""
    table = copy.copy(data[2].table)
    table.space = torch.zeros_like(table.space)
    with pytest.raises(golf.RunError, match="its pieces count"):
        golf.check_tokenizer("x", tokenizer, table, data[2].val)


def runs_of(tokens):
    """Every run of RUN_TOKENS tokens, as a tuple."""
    return [tuple(tokens[i : i + golf.RUN_TOKENS]) for i in range(len(tokens) - 63)]


@given(st.data())
def test_runs_that_are_in_the_training_text_are_counted(run, draw):
    """Against sets of tuples, over borders of blocks and shards."""
    rand = np.random.RandomState(draw.draw(st.integers(0, 2**31)))
    val = rand.randint(0, 5, draw.draw(st.integers(1, 300)))
    train = rand.randint(0, 5, draw.draw(st.integers(2, 900)))
    for _ in range(draw.draw(st.integers(0, 3))):  # copies of parts into either
        begin, size = rand.randint(0, len(val)), rand.randint(1, 200)
        part = val[begin : begin + size]
        train = np.insert(train, rand.randint(0, len(train)), part)
        val = np.concatenate([val, part])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(golf, "RUN_BLOCK", 100)
        paths = [golf.Path(folder, f"x_train_{k}.bin") for k in range(2)]
        for path, part in zip(paths, np.array_split(train, 2), strict=True):
            golf.write_shard(path, part)
        stream = golf.TokenStream([str(path) for path in paths], 500)
        found = golf.count_runs(torch.from_numpy(val), stream, run)
    own, known = runs_of(val.tolist()), set(runs_of(train.tolist()))
    assert found == (len(own), len(set(own)), sum(x in known for x in own))


def test_long_streams_are_sampled(run, monkeypatch, tmp_path):
    """As many runs as are wanted, and a share near that of all."""
    val = np.random.RandomState(0).randint(0, 500, 40_000)
    golf.write_shard(tmp_path / "x_train_0.bin", val[: len(val) // 4])
    stream = golf.TokenStream([str(tmp_path / "x_train_0.bin")], 500)
    monkeypatch.setattr(golf, "MOST_VAL_RUNS", 2000)
    found = golf.count_runs(torch.from_numpy(val), stream, run)
    assert 1000 <= found.sampled <= 4000 and found.distinct == found.sampled
    assert abs(found.in_train / found.sampled - 0.25) < 0.05
    monkeypatch.setattr(golf, "RUN_BLOCK", 1000)
    monkeypatch.setattr(golf, "MOST_TRAIN_TOKENS", 2000)  # of 10,000
    looked_at = sum(len(block) for block in golf.blocks_of_runs(stream, 0, 1))
    assert looked_at == 2000
    facts = golf.held_out_facts(torch.from_numpy(val[:10]), None, run)
    assert facts == {"val_distinct_share": 1.0}


def test_prepared_shards_hold_every_document_once(workplace, data, text_folder):
    cfg, _, corpus = data
    folder = golf.Path(corpus.corpus["tokenizer"]).parent
    texts = sorted(p.read_text("utf-8") for p in text_folder.glob("*.txt"))
    found = []
    for split in ("train", "val"):
        tokens = np.array(golf.open_shard(str(folder / f"text_{split}_000000.bin")))
        starts = np.flatnonzero(tokens == golf.BOS)
        assert starts[0] == 0
        for part in np.split(tokens, starts[1:]):
            found.append(corpus.tokenizer.decode(part[1:].tolist()))
    assert sorted(found) == [t for t in texts if t]
    sizes = sum(len(t.encode()) for t in texts)
    assert json.loads((folder / "corpus.json").read_text())["text_bytes"] == sizes


def test_bytes_of_each_document_of_the_validation_stream(data):
    """Document by document, against the decoded text, in one go over the whole stream."""
    _, _, corpus = data
    path = golf.Path(corpus.corpus["tokenizer"]).with_name("text_val_000000.bin")
    stream = golf.TokenStream([str(path)], 512)
    tokens = torch.from_numpy(stream.read(0, len(stream)))
    counted = corpus.table.target_bytes(torch.cat([tokens[:1], tokens]))
    starts = torch.cat([torch.nonzero(tokens == golf.BOS)[:, 0], torch.tensor([len(tokens)])])
    assert len(starts) >= 2 and int(counted.sum()) > 1000
    for start, end in itertools.pairwise(starts):
        text = corpus.tokenizer.decode(tokens[start + 1 : end].tolist())
        assert int(counted[start:end].sum()) == len(text.encode())


def test_an_unknown_token_breaks_the_balance(tokenizer, data):
    """<unk> stands for bytes that nobody knows: the count of bytes must not hide it."""
    tokens = torch.tensor([golf.BOS, tokenizer.unk_id(), *tokenizer.encode("a b")])
    assert int(data[2].table.target_bytes(tokens).sum()) < 1 + len("a b") + 1


def test_every_document_is_checked_when_it_is_encoded(tokenizer, data):
    table = data[2].table
    assert len(golf.encode_documents(tokenizer, [("x", "one two")], table)) > 1
    with pytest.raises(golf.RunError, match="^x: .* bytes"):
        golf.encode_documents(tokenizer, [("x", "one \u2581two")], table)


def test_prepared_text_is_reused_and_made_again_when_it_changes(data, workplace, tmp_path):
    cfg, run, _ = data
    sample = sorted(golf.glob.glob(workplace[1]["TEXT_FILES"]))[:12]
    for path in sample:
        (tmp_path / golf.Path(path).name).write_bytes(golf.Path(path).read_bytes())
    cfg = golf.replace(cfg, text_files=f"{tmp_path}/*.txt", prepared_path=str(tmp_path / "made"))
    first = golf.prepare_text(cfg, run)
    before = {p.name: p.stat().st_mtime_ns for p in first.iterdir()}
    assert golf.prepare_text(cfg, run) == first
    assert {p.name: p.stat().st_mtime_ns for p in first.iterdir()} == before
    assert set(before) == {
        "tokenizer.model",
        "corpus.json",
        "text_val.txt",
        "text_train_000000.bin",
        "text_val_000000.bin",
    }
    with open(tmp_path / golf.Path(sample[0]).name, "a") as file:
        file.write("# one more line\n")
    assert golf.prepare_text(cfg, run) != first
    assert golf.prepare_text(golf.replace(cfg, vocab_size=400), run) not in (None, first)


def test_documents_stay_whole_and_the_split_does_not_depend_on_order():
    documents = [(f"d{i}", f"{i} " + "x\n" * (50 + i)) for i in range(60)]
    train, val = golf.split_documents(documents)
    assert sorted(train + val) == sorted(documents) and not set(train) & set(val)
    share = sum(len(t) for _, t in val) / sum(len(t) for _, t in documents)
    assert 0.1 <= share < 0.15
    assert golf.split_documents(documents[::-1]) == (train, val)


@given(st.lists(st.integers(0, 12), min_size=21, max_size=80))
def test_equal_documents_are_on_one_side(kinds):
    texts = {k: f"{k} " + "x\n" * (50 + 9 * k) for k in range(13)}
    documents = [(f"d{i}", texts[k]) for i, k in enumerate(kinds)]
    if golf.are_few(documents):  # they are cut: equal parts then
        documents = [(f"d{i}", texts[k] + "y\n" * i) for i, k in enumerate(kinds)]
        documents += documents[:9]
    train, val = golf.split_documents(documents)
    assert train and val
    assert not {text for _, text in train} & {text for _, text in val}
    assert sorted(train + val) == sorted(documents)


def test_copies_of_one_document_are_cut_into_equal_parts(tmp_path):
    text = "".join(f"line {i} of a page\n" for i in range(300))
    train, val = golf.split_documents([(f"copy {i}", text) for i in range(200)])
    assert not {text for _, text in train} & {text for _, text in val}
    counts = collections.Counter(text for _, text in train + val)
    assert set(counts.values()) == {200} and len(counts) >= 15


def test_the_split_does_not_depend_on_where_the_files_lie():
    texts = [f"{i} " + "x\n" * (50 + i) for i in range(60)]
    splits = [
        golf.split_documents([(f"{folder}/{i}", t) for i, t in enumerate(texts)])
        for folder in ("/a", "/b/c")
    ]
    assert len({tuple(t for _, t in val) for _, val in splits}) == 1


def test_control_and_unknown_pieces_are_worth_no_bytes(tokenizer, data):
    table = data[2].table
    for i in range(tokenizer.get_piece_size()):
        if tokenizer.is_control(i) or tokenizer.is_unknown(i):
            assert table.boundary[i] and table.base[i] == 0 and not table.space[i]
        if tokenizer.is_byte(i):
            assert table.base[i] == 1 and not table.space[i]


def test_validation_is_cut_to_whole_windows(data):
    cfg, _, corpus = data
    assert (len(corpus.val) - 1) % cfg.eval_seq_len == 0 and len(corpus.val) - 1 <= cfg.val_tokens


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 99), st.integers(1, 99))
def test_a_stream_reads_cyclically_across_shards(sizes, start, count):
    with tempfile.TemporaryDirectory() as folder:
        paths, total = [], 0
        for k, size in enumerate(sizes):
            paths.append(f"{folder}/x_train_{k:06d}.bin")
            golf.write_shard(golf.Path(paths[-1]), np.arange(total, total + size) % 500)
            total += size
        stream = golf.TokenStream(paths, 500)
        want = [(start + i) % total % 500 for i in range(count)]
        assert len(stream) == total and stream.read(start, count).tolist() == want


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_ranks(data, world):
    cfg, run, corpus = data
    cfg = golf.replace(cfg, train_batch_tokens=8 * cfg.train_seq_len)

    def loader(rank, count):
        place = copy.copy(run)
        place.rank, place.world_size = rank, count
        return golf.TrainLoader(corpus.train, cfg, place)

    whole, parts = loader(0, 1), [loader(r, world) for r in range(world)]
    for _ in range(3):
        inputs, targets = whole.next_batch()
        shares = [p.next_batch() for p in parts]
        assert torch.equal(inputs, torch.cat([s[0] for s in shares]))
        assert torch.equal(targets, torch.cat([s[1] for s in shares]))
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_epoch_visits_every_block_once(data):
    cfg, run, corpus = data
    loader = golf.TrainLoader(corpus.train, cfg, run)
    seen = [i * loader.stride % loader.blocks for i in range(loader.blocks)]
    assert sorted(seen) == list(range(loader.blocks))


def shard(path, tokens=b"\x05\x00" * 10, magic=20240520, version=1, count=10):
    """Write a shard by hand."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    path.write_bytes(header.tobytes() + tokens)
    return str(path)


@pytest.mark.parametrize(
    "damage, words",
    [
        (dict(magic=7), ["magic 7", "20240520"]),
        (dict(version=2), ["version 2"]),
        (dict(count=11), ["11 tokens", "1046", "1044"]),
        (dict(count=9), ["9 tokens"]),
        (dict(count=-1), ["-1 tokens"]),
        (dict(tokens=b""), ["10 tokens"]),
    ],
)
def test_damaged_shards(tmp_path, damage, words):
    path = shard(tmp_path / "x_val_0.bin", **damage)
    with pytest.raises(golf.RunError) as error:
        golf.open_shard(path)
    assert all(word in str(error.value) for word in [path, *words])


def test_a_shard_without_a_header_and_a_missing_one(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    for name in ("short", "missing"):
        with pytest.raises((golf.RunError, OSError), match=name):
            golf.open_shard(str(tmp_path / name))


def test_a_token_outside_the_vocabulary_names_the_file(tmp_path):
    path = shard(tmp_path / "x_val_0.bin", tokens=b"\x05\x00" * 9 + b"\x00\x02")
    with pytest.raises(golf.RunError, match="token 512 at 9, not below 512"):
        golf.TokenStream([path], 512).read(0, 2)


@pytest.mark.parametrize(
    "tokens, words",
    [
        ([golf.BOS] + [0] * 99, "of 100 tokens 1 begin documents and 99 are"),
        ([golf.BOS] + [5] * 49 + [0] * 50, "and 50 are control"),
        ([golf.BOS] * 60 + [5] * 40, "60 begin documents and 0 are"),
        ([golf.BOS] + [3] * 10 + [5] * 89, "and 10 are control"),
    ],
)
def test_a_shard_whose_content_was_lost_is_refused(tmp_path, tokens, words):
    """Its size is right: tokens that stand for no text are counted."""
    golf.write_shard(tmp_path / "x_val_0.bin", np.array(tokens))
    textless = np.arange(500) < 4
    with pytest.raises(golf.RunError, match=words):
        golf.TokenStream([str(tmp_path / "x_val_0.bin")], 500, textless=textless)
    golf.write_shard(tmp_path / "y_val_0.bin", np.array([golf.BOS, 5, 2] + [5] * 97))
    golf.TokenStream([str(tmp_path / "y_val_0.bin")], 500, textless=textless)


@given(st.binary(max_size=3000))
def test_random_bytes_are_no_shard_and_no_tokenizer(blob):
    with tempfile.NamedTemporaryFile() as file:
        file.write(blob)
        file.flush()
        with pytest.raises(golf.RunError):
            golf.open_shard(file.name)
        with pytest.raises(golf.RunError):
            golf.load_tokenizer(file.name, 512)


def test_few_documents_are_cut_at_line_ends():
    text = "".join(f"line {i}\n" for i in range(1000))
    train, val = golf.split_documents([("a", text)])
    parts = sorted((t for _, t in train + val), key=text.index)
    assert "".join(parts) == text and len(parts) >= 15 and len(val) >= 2
    assert all(t.endswith("\n") for t in parts)


def test_text_with_the_space_sign_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one \u2581 two", "utf-8")
    with pytest.raises(golf.RunError, match="U\\+2581"):
        golf.user_documents(f"{tmp_path}/*.txt")


def test_python_brings_enough_text():
    documents = golf.python_documents()
    assert sum(len(t) for _, t in documents) > 3_000_000 and len(documents) > 200


def test_a_folder_of_text_is_enough(tmp_path, data, capsys):
    """What is no text in it is left out and told; a file that is named itself must be text."""
    cfg, run, _ = data
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    for i in range(25):
        (folder / f"{i:02}.md").write_text(f"Note {i} says this and that, {i * i} times.\n" * 40)
    (folder / "deep" / "crlf.txt").write_bytes(b"one\r\ntwo \xf0\x9f\x98\x80\r\n" * 40)
    (folder / "empty.txt").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    documents, facts = golf.user_documents(f"{folder}")
    assert len(documents) == 26 and [*facts.values()] == [28, 1, 1, 1]
    both, _ = golf.user_documents(f"{folder}:{folder}/*.md")
    assert sorted(both) == sorted(documents)
    with pytest.raises(golf.RunError, match="picture.png: no UTF-8 text .byte 0x89 at 0"):
        golf.user_documents(f"{folder}/*")
    own = golf.replace(cfg, text_files=str(folder), prepared_path=str(tmp_path), vocab_size=300)
    for _ in range(2):  # also when it is prepared already
        golf.prepare_text(own, run)
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("text: "))
        assert line.startswith(
            "text: 28 files, 1 left out, no UTF-8 text, 1 left out, empty, 1 with CRLF line ends, "
            "which stay; held out for validation: "
        )
        assert ".md" in line.split(": ")[-1]
    with pytest.raises(golf.RunError, match="^VOCAB_SIZE=4096: .*set a lower VOCAB_SIZE"):
        golf.prepare_text(golf.replace(own, vocab_size=4096), run)
    with pytest.raises(golf.RunError, match="^VOCAB_SIZE=261: .*need 2.., set a higher one"):
        golf.prepare_text(golf.replace(own, vocab_size=261), run)


def test_many_names_are_shortened():
    assert golf.shortened(["a", "a", "b"]) == "a, b"
    assert golf.shortened([*"abcdefg"]) == "a, b, c, d, e and 2 more"
