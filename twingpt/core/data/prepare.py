"""A source and a tokenizer's name to a prepared data set, made once and found again."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from twingpt.core import paths, rng
from twingpt.core.data import shards
from twingpt.core.data.shards import TokenDataset
from twingpt.core.data.sources import Source, load
from twingpt.core.errors import UserError
from twingpt.core.tokenizer import TOKENIZERS, Tokenizer, files, find, make
from twingpt.core.tokenizer import load as load_tokenizer

Array = np.ndarray

VAL_FRACTION = 0.1


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents.

    A document is held out by its hash, so that adding others moves none. Where that is far from a
    tenth of the text, as with few documents, the last tenth of each document is held out instead.
    """
    held = [rng.digest("val", document) % 10_000 < VAL_FRACTION * 10_000 for document in documents]
    share = sum(len(d) for d, out in zip(documents, held, strict=True) if out) / sum(map(len, documents))
    if VAL_FRACTION / 2 < share < VAL_FRACTION * 2:
        train = [document for document, out in zip(documents, held, strict=True) if not out]
        return train, [document for document, out in zip(documents, held, strict=True) if out]
    pairs = [(document, int(len(document) * (1 - VAL_FRACTION))) for document in documents]
    return [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]


def tokenize(documents: Sequence[str], tokenizer: Tokenizer) -> Array:
    """All documents, each followed by the end-of-text token, (n,) int32."""
    end = np.array([tokenizer.end_of_text], np.int32)
    return np.concatenate([part for document in documents for part in (tokenizer.encode(document), end)])


def prepare(spec: str, kind: str, vocab_size: int, tokenizer: Tokenizer | None = None) -> TokenDataset:
    """The data set of source `spec` under the tokenizer called `kind` (see `make`), or under the one given.

    It is found again by the digest of all it depends on, in `paths.home()/data`.
    """
    source = load(spec)
    if tokenizer is None and kind not in TOKENIZERS:
        tokenizer = find(kind)
    folder = paths.home() / "data" / f"{source.name[:40]}-{_key(source, kind, vocab_size, tokenizer)}"
    if not folder.exists():
        _write(folder, source, kind, vocab_size, tokenizer)
    return TokenDataset(folder)


def learn(specs: Sequence[str], kind: str, vocab_size: int) -> Tokenizer:
    """The tokenizer called `kind` for several sources: where it learns, from the training texts of them all.

    It is kept in `paths.home()/tokenizers`, under the digest of all it depends on.
    """
    if kind not in TOKENIZERS:
        return find(kind)
    sources = [load(spec) for spec in specs]
    key = "/".join([str(shards.SCHEMA), kind, str(vocab_size), *(source.digest for source in sources)])
    folder = paths.home() / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:12]
    if not folder.exists():
        train = [document for source in sources for document in split(source.documents)[0]]
        tokenizer = make(kind, train, (document for source in sources for document in source.documents), vocab_size)
        _remove_leftovers(folder.parent)
        with _unless_there(folder), paths.new_folder(folder) as temporary:
            for file, text in files(tokenizer, block_size=2**30).items():
                paths.write_synced(temporary / file, text.encode())
    return load_tokenizer(folder)


@contextmanager
def _unless_there(folder: Path) -> Iterator[None]:
    """Write a folder, unless another process is faster with the same content; UserError where that can't be."""
    try:
        yield
    except OSError as error:
        if not folder.exists():
            raise UserError(f"The prepared data can't be written to {folder}: {error.strerror}.") from error


def _key(source: Source, kind: str, vocab_size: int, tokenizer: Tokenizer | None) -> str:
    how = tokenizer.digest if tokenizer else f"{kind}-{vocab_size if kind == 'bpe' else ''}"
    parts = [str(shards.SCHEMA), source.digest, how]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed preparations left; what is younger than a day may be another process's work."""
    for leftover in folder.glob(".*.tmp"):
        with suppress(OSError):  # it has become the other's result meanwhile
            if time.time() - leftover.stat().st_mtime > 24 * 3600:
                shutil.rmtree(leftover)


def _write(folder: Path, source: Source, kind: str, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    train, val = split(source.documents)
    tokenizer = tokenizer or make(kind, train, source.documents, vocab_size)
    splits = {"train": tokenize(train, tokenizer), "val": tokenize(val, tokenizer)}
    facts = {"source": source.digest, "documents": {"train": len(train), "val": len(val)}}
    _remove_leftovers(folder.parent)
    with _unless_there(folder):
        shards.write(folder, source.name, tokenizer, splits, facts)
