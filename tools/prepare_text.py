"""Tokenizer and shards from text, for runs without the challenge's: train_gpt.py calls this.

    TEXT_FILES='notes/**/*.md' python train_gpt.py      shards of your text, made once
    python train_gpt.py                                 of the text that comes with Python

Like the challenge's own preparation it is a step before training and no part of what is shipped: a
run on shards never imports it. Shards and tokenizer have the challenge's formats and options.
"""

import contextlib
import glob
import hashlib
import importlib
import io
import json
import os
import struct
import sysconfig
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from train_gpt import (BOS, HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, SPACE, ByteTable, Config, Run,
                       RunError, load_tokenizer, write_atomic)

TOKENIZER_TEXT_BYTES = 4_000_000  # more text changes the 1,024 pieces little and costs seconds
RECIPE = "v2: BPE, byte fallback, identity normalization, dummy prefix"  # part of the hash
VAL_SHARE, VAL_MOST_BYTES = 0.1, 8_000_000  # of a text corpus, in whole documents
LEAST_DOCUMENTS = 20  # fewer are cut: validation takes whole documents

def python_documents() -> list[tuple[str, str]]:
    """(name, text) of the text that comes with Python: the topics of its documentation, and the
    sources of the standard library (without tests, tools and character tables)."""
    documents, root = [], Path(sysconfig.get_paths()["stdlib"])
    with contextlib.suppress(ImportError):  # minimal installations leave pydoc out
        documents += sorted(importlib.import_module("pydoc_data.topics").topics.items())
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings",
               "pydoc_data", "idle_test"}
    documents += [(str(path.relative_to(root)), path.read_text("utf-8", errors="ignore"))
                  for path in sorted(root.rglob("*.py"))
                  if not skipped.intersection(path.relative_to(root).parts)]
    return [(name, text) for name, text in documents if text and SPACE not in text]

def user_documents(patterns: str) -> list[tuple[str, str]]:
    """(name, text) of the globs' files; RunError if there are none or one is unfit."""
    paths = {p for pattern in patterns.split(":") if pattern
             for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)}
    if not paths:
        raise RunError(f"TEXT_FILES={patterns!r} matches no file; give globs separated by ':'")
    documents = []
    for path in sorted(paths):
        try:
            documents.append((path, Path(path).read_bytes().decode("utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        if SPACE in documents[-1][1]:
            raise RunError(f"{path}: has the character U+2581, SentencePiece's space: replace it")
    return [(name, text) for name, text in documents if text]

def split_documents(documents: list[tuple[str, str]]) -> tuple[list, list]:
    """(train, validation) documents, ordered by their text's hash, so that the split depends on
    nothing else. Few documents are first cut at line ends into about LEAST_DOCUMENTS parts."""
    sizes, parts = [len(text) for _, text in documents], []
    size = sum(sizes) if len(documents) >= LEAST_DOCUMENTS else sum(sizes) // LEAST_DOCUMENTS
    for name, text in documents:
        while text:
            end = text.find("\n", max(0, size)) + 1 or len(text)
            parts.append((name, text[:end]))
            text = text[end:]
    parts.sort(key=lambda part: hashlib.sha256(part[1].encode()).digest())
    ends = np.cumsum([len(text) for _, text in parts])
    wanted = min(VAL_SHARE * ends[-1], VAL_MOST_BYTES) if parts else 0
    count = min(int(np.searchsorted(ends, wanted)) + 1, len(parts) - 1)
    if count < 1:
        raise RunError("the text has one document that cannot be split: give more text")
    return parts[count:], parts[:count]

def train_tokenizer(documents: list[tuple[str, str]], vocab_size: int) -> bytes:
    """A serialized BPE model with the challenge's options and identity normalization:
    decode(encode(s)) == s for every s without U+2581."""
    every = max(1, sum(len(text) for _, text in documents) // TOKENIZER_TEXT_BYTES)
    lines = [line for _, text in documents for line in text.splitlines() if line.strip()][::every]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size,
            model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=True, pad_id=0, bos_id=BOS, eos_id=2,
            unk_id=3, character_coverage=0.999, split_digits=True, max_sentence_length=1 << 20,
            minloglevel=2)
    except RuntimeError as error:
        raise RunError(f"the text is too small or too uniform for a tokenizer of {vocab_size} "
                       f"pieces; give more text ({str(error).splitlines()[-1]})") from None
    return model.getvalue()

def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (n,) in the challenge's format."""
    header = struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, len(tokens))
    write_atomic(path, header.ljust(4 * HEADER_INTS, b"\0") + tokens.astype("<u2").tobytes())

def encode_documents(tokenizer, documents: list[tuple[str, str]], table: ByteTable) -> np.ndarray:
    """Tokens (uint16) of the documents, each after a BOS; every document's bytes must balance."""
    encoded = []
    for name, text in tqdm(documents, desc="tokenizing", unit="doc", disable=None):
        encoded.append(np.array([BOS, *tokenizer.encode(text)]))
        counted = int(table.target_bytes(torch.from_numpy(encoded[-1])).sum())
        if counted != (size := len(text.encode())):
            raise RunError(f"{name}: its tokens stand for {counted} bytes, its text has {size}")
    return np.concatenate(encoded)

def prepare_text(cfg: Config, run: Run) -> Path:
    """Tokenizer and shards of the text, made once; the folder, named by the text's hash."""
    started = time.perf_counter()
    documents = user_documents(cfg.text_files) if cfg.text_files else python_documents()
    digest = hashlib.sha256(repr((RECIPE, cfg.vocab_size, documents)).encode()).hexdigest()
    folder = Path(cfg.prepared_path) / f"text_{digest[:16]}"
    if (folder / "corpus.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train, val = split_documents(documents)
    model = folder / "tokenizer.model"
    write_atomic(model, train_tokenizer(train, cfg.vocab_size))
    tokenizer = load_tokenizer(str(model), cfg.vocab_size)
    for split, part in (("train", train), ("val", val)):
        write_shard(folder / f"text_{split}_000000.bin",
                    encode_documents(tokenizer, part, ByteTable(tokenizer)))
    corpus = dict(source=cfg.text_files or "python", sha256=digest, documents=len(documents),
                  text_bytes=sum(len(t.encode()) for _, t in documents))
    write_atomic(folder / "corpus.json", json.dumps(corpus, indent=1).encode())
    run.log(f"prepared {len(documents)} documents in {folder} "
            f"({time.perf_counter() - started:.1f} s)")
    return folder
