"""The prepared data sets there are: listed, described, verified, removed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core import paths
from twingpt.core.errors import UserError
from twingpt.data.prepare import find
from twingpt.data.shards import BY_HASH, SPLITS, TokenDataset

Array = np.ndarray

CHUNK = 2**22  # tokens looked at together
SAMPLES, SAMPLE_TOKENS = 3, 80


@dataclass(frozen=True)
class Row:
    """A prepared data set, or what is wrong with one."""

    name: str
    path: str
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    val_tokens: int = 0
    tokenizer: str = ""
    vocab_size: int = 0
    size_bytes: int = 0
    error: str | None = None


def describe(data: TokenDataset) -> Row:
    """The facts of a data set, from its manifest."""
    splits, counts = data.manifest["splits"], data.manifest["documents"]
    return Row(
        data.folder.name,
        str(data.folder),
        counts["train"] if _tails(data) else sum(counts.values()),
        sum(split["bytes"] for split in splits.values()),
        splits["train"]["tokens"],
        splits["val"]["tokens"],
        data.tokenizer.kind,
        data.tokenizer.vocab_size,
        size(data.folder),
    )


def _tails(data: TokenDataset) -> bool:
    """Whether each document's end is held out, so that both splits have a part of it."""
    return bool(data.manifest.get("split", BY_HASH) != BY_HASH)


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def find_all() -> list[Row]:
    """Every data set in `paths.home()/data`, by name; a broken one is a row with an error."""
    rows = []
    for folder in sorted((paths.home() / "data").glob("*")):
        if folder.is_dir() and not folder.name.startswith("."):
            try:
                rows.append(describe(TokenDataset(folder)))
            except UserError as error:
                rows.append(Row(folder.name, str(folder), size_bytes=size(folder), error=str(error)))
    return rows


def get(name: str) -> TokenDataset:
    """The data set of that name, or at that path."""
    return TokenDataset(_folder(name))


def _folder(name: str) -> Path:
    folder = find(name)
    if folder is None:
        raise UserError(f"There is no prepared data set {name}: gpt data list shows those there are.")
    return folder


def info(name: str) -> dict[str, Any]:
    """Everything about a data set: its row, sources, split, lengths of documents and samples."""
    data = get(name)
    more = {"split": data.manifest.get("split", "not noted"), "sources": data.manifest.get("sources", [])}
    return {**asdict(describe(data)), **more, "histogram": histogram(data), "samples": samples(data)}


def _chunks(data: TokenDataset, split: str) -> Iterator[Array]:
    """A split's tokens, read and not mapped, so that they leave memory again."""
    with (data.folder / f"{split}.bin").open("rb") as file:
        while content := file.read(CHUNK * data.splits[split].itemsize):
            yield np.frombuffer(content, data.splits[split].dtype)


def lengths(data: TokenDataset, split: str) -> Iterator[Array]:
    """How many tokens each document of a split has, its end-of-text included, some documents at a time."""
    before = 0  # of a document that goes on
    for tokens in _chunks(data, split):
        ends = np.flatnonzero(tokens == data.tokenizer.end_of_text) + 1
        if len(ends):
            found = np.diff(ends, prepend=0)
            found[0] += before
            before = 0
            yield found
        before += len(tokens) - (int(ends[-1]) if len(ends) else 0)


def _whole_lengths(data: TokenDataset) -> Iterator[Array]:
    """How many tokens each document has whose end is held out, with one end-of-text; such data have few documents."""
    heads, ends = (np.concatenate([np.empty(0, np.int64), *lengths(data, split)]) for split in SPLITS)
    yield heads + ends - 1 if len(heads) == len(ends) else heads


def histogram(data: TokenDataset) -> list[dict[str, int]]:
    """How many documents have from `least` to `most` tokens, by powers of two, gaps included."""
    counts = np.zeros(64, np.int64)
    for found in _whole_lengths(data) if _tails(data) else chain.from_iterable(lengths(data, s) for s in SPLITS):
        counts += np.bincount(np.frexp(found.astype(np.float64))[1], minlength=64)
    there = np.flatnonzero(counts)
    span = range(there[0], there[-1] + 1) if len(there) else range(0)
    return [{"least": 2 ** (i - 1), "most": 2**i - 1, "documents": int(counts[i])} for i in span]


def samples(data: TokenDataset) -> list[str]:
    """The beginnings of some documents, evenly spread over the training tokens."""
    tokens, end = data.splits["train"], data.tokenizer.end_of_text
    found = []
    for start in range(0, len(tokens), -(-len(tokens) // SAMPLES) or 1):
        if start:  # to where the next document begins, if that is near
            ends = np.flatnonzero(tokens[start : start + CHUNK] == end)
            start += int(ends[0]) + 1 if len(ends) else 0
        text = np.asarray(tokens[start : start + SAMPLE_TOKENS])
        ends = np.flatnonzero(text == end)
        text = text[: ends[0]] if len(ends) else text
        if len(text):
            found.append(data.tokenizer.decode(text))
    return found


def verify(data: TokenDataset) -> dict[str, Any]:
    """Read all of a data set again; UserError for the first thing that is not as its manifest says."""
    manifest, tokenizer = data.manifest, data.tokenizer
    if tokenizer.digest != manifest["tokenizer"] or tokenizer.vocab_size != manifest["vocab_size"]:
        raise _lies(data, "its tokenizer is another than its manifest says")
    for split in SPLITS:
        sha, n_bytes, documents = hashlib.sha256(), 0, 0
        for tokens in _chunks(data, split):
            if tokens.max() >= tokenizer.vocab_size:
                raise _lies(data, f"{split}.bin holds the token id {tokens.max()}, outside its vocabulary")
            sha.update(tokens.tobytes())
            n_bytes += int(tokenizer.byte_lengths[tokens].sum())
            documents += int((tokens == tokenizer.end_of_text).sum())
        facts = manifest["splits"][split]
        if sha.hexdigest() != facts["sha256"]:
            raise _lies(data, f"{split}.bin is not what was written (its SHA-256 differs)")
        for what, real, said in (
            ("bytes of text", n_bytes, facts["bytes"]),
            ("documents", documents, manifest["documents"][split]),
        ):
            if real != said:
                raise _lies(data, f"{split}.bin holds {real:,} {what} where its manifest says {said:,}")
    return {"name": data.folder.name, "path": str(data.folder), "ok": True}


def _lies(data: TokenDataset, what: str) -> UserError:
    return UserError(f"{data.folder} is damaged: {what}. Remove it (gpt data rm {data.folder.name}) and prepare again.")


def remove(name: str) -> Path:
    """Remove a data set, whole or broken, by name; a crash leaves no half one in sight."""
    folder = to_remove(name)
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
    return folder


def to_remove(name: str) -> Path:
    """The folder that `remove` removes; only one that `find_all` lists."""
    rows = {row.name: Path(row.path) for row in find_all()}
    if name not in rows:
        raise UserError(f"There is no prepared data set {name}: gpt data list shows those there are.")
    return rows[name]
