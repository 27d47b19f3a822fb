"""Shards, tokenizer and bytes."""

import copy
import itertools
import json
import tempfile

import numpy as np
import pytest
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
    with pytest.raises(golf.RunError, match="picture.png: cannot be read as UTF-8"):
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
