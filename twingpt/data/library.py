"""The library of prepared data sets: list, describe, verify, remove."""

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
from twingpt.data.shards import SPLITS, TokenDataset
from twingpt.data.split import BY_HASH

Array = np.ndarray

CHUNK = 2**22  # tokens read at a time
SAMPLES, SAMPLE_TOKENS = 3, 80  # how many documents are shown, and how much of each


@dataclass(frozen=True)
class DatasetSummary:
    """A prepared data set in figures, or the error of a broken one."""

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


def summarize(data: TokenDataset) -> DatasetSummary:
    """A data set's figures, from its manifest."""
    splits, counts = data.manifest["splits"], data.manifest["documents"]
    return DatasetSummary(
        data.folder.name,
        str(data.folder),
        counts["train"] if _holds_out_tails(data) else sum(counts.values()),
        sum(split["bytes"] for split in splits.values()),
        splits["train"]["tokens"],
        splits["val"]["tokens"],
        data.tokenizer.kind,
        data.tokenizer.vocab_size,
        folder_size(data.folder),
    )


def _holds_out_tails(data: TokenDataset) -> bool:
    """Whether the tail of each document is held out, so that each is in both splits."""
    return str(data.manifest.get("split", BY_HASH)).startswith("the last ")


def folder_size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def list_datasets() -> list[DatasetSummary]:
    """Every data set in `paths.home()/data`, by name; a broken one has an error."""
    summaries = []
    for folder in sorted((paths.home() / "data").glob("*")):
        if folder.is_dir() and not folder.name.startswith("."):
            try:
                summaries.append(summarize(TokenDataset(folder)))
            except UserError as error:
                summaries.append(
                    DatasetSummary(folder.name, str(folder), size_bytes=folder_size(folder), error=str(error))
                )
    return summaries


def open_dataset(name: str) -> TokenDataset:
    """The data set of that name, or at that path."""
    if (folder := find(name)) is None:
        raise _unknown(name)
    return TokenDataset(folder)


def _unknown(name: str) -> UserError:
    return UserError(f"There is no prepared data set {name}: gpt data list shows those there are.")


def info(name: str) -> dict[str, Any]:
    """Everything about a data set, for JSON: its summary, split, sources, lengths of documents and samples."""
    data = open_dataset(name)
    more = {"split": data.manifest.get("split", "not noted"), "sources": data.manifest.get("sources", [])}
    return {**asdict(summarize(data)), **more, "histogram": histogram(data), "samples": samples(data)}


def _chunks(data: TokenDataset, split: str) -> Iterator[Array]:
    """A split's tokens, CHUNK at a time: read and not memory-mapped, so that they leave memory again."""
    with (data.folder / f"{split}.bin").open("rb") as file:
        while content := file.read(CHUNK * data.splits[split].itemsize):
            yield np.frombuffer(content, data.splits[split].dtype)


def lengths(data: TokenDataset, split: str) -> Iterator[Array]:
    """Tokens of each document of a split, its end-of-text included, in arrays of some documents."""
    before = 0  # tokens in earlier chunks of the document that a chunk begins in
    for tokens in _chunks(data, split):
        ends = np.flatnonzero(tokens == data.tokenizer.end_of_text) + 1
        if len(ends):
            found = np.diff(ends, prepend=0)
            found[0] += before
            before = 0
            yield found
        before += len(tokens) - (int(ends[-1]) if len(ends) else 0)


def _document_lengths(data: TokenDataset) -> Iterator[Array]:
    """Tokens of each document, in arrays of some; one whose tail is held out is in both splits, and counts once."""
    if not _holds_out_tails(data):
        yield from chain.from_iterable(lengths(data, split) for split in SPLITS)
        return
    heads, tails = (np.concatenate([np.empty(0, np.int64), *lengths(data, split)]) for split in SPLITS)
    yield heads + tails - 1 if len(heads) == len(tails) else heads  # less one of its two end-of-texts


def histogram(data: TokenDataset) -> list[dict[str, int]]:
    """Documents of `least` to `most` tokens, by powers of two, gaps included."""
    counts = np.zeros(64, np.int64)
    for found in _document_lengths(data):
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
    """Check every token and digest of a data set against its manifest; UserError for the first difference."""
    manifest, tokenizer = data.manifest, data.tokenizer
    if tokenizer.digest != manifest["tokenizer"] or tokenizer.vocab_size != manifest["vocab_size"]:
        raise _damaged(data, "its tokenizer is another than its manifest says")
    for split in SPLITS:
        sha, n_bytes, documents = hashlib.sha256(), 0, 0
        for tokens in _chunks(data, split):
            if tokens.max() >= tokenizer.vocab_size:
                raise _damaged(data, f"{split}.bin holds the token id {tokens.max()}, outside its vocabulary")
            sha.update(tokens.tobytes())
            n_bytes += int(tokenizer.byte_lengths[tokens].sum())
            documents += int((tokens == tokenizer.end_of_text).sum())
        facts = manifest["splits"][split]
        if sha.hexdigest() != facts["sha256"]:
            raise _damaged(data, f"{split}.bin is not what was written (its SHA-256 differs)")
        for what, count, expected in (
            ("bytes of text", n_bytes, facts.get("token_bytes", facts["bytes"])),
            ("documents", documents, manifest["documents"][split]),
        ):
            if count != expected:
                raise _damaged(data, f"{split}.bin holds {count:,} {what} where its manifest says {expected:,}")
    return {"name": data.folder.name, "path": str(data.folder), "ok": True}


def _damaged(data: TokenDataset, what: str) -> UserError:
    return UserError(f"{data.folder} is damaged: {what}. Remove it (gpt data rm {data.folder.name}) and prepare again.")


def remove(name: str) -> Path:
    """Remove a data set, whole or broken, by name: renamed first, so that a crash leaves no half one in sight."""
    folder = removable_folder(name)
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
    return folder


def removable_folder(name: str) -> Path:
    """The folder that `remove` removes; only one that `list_datasets` lists."""
    folders = {summary.name: Path(summary.path) for summary in list_datasets()}
    if name not in folders:
        raise _unknown(name)
    return folders[name]
