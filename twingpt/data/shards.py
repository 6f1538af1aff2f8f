"""Token shards: a prepared data set on disk, with a memory-mapped file of tokens a split, tokenizer and manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.order import window_count, window_starts
from twingpt.core.paths import write_synced
from twingpt.core.reading import short
from twingpt.core.tokenizer import Tokenizer, files
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.version import __version__

Array = np.ndarray

SCHEMA = 2  # 1 had no account of its sources
SPLITS = ("train", "val")

# The keys that a manifest must and may have, and their JSON types.
REQUIRED = {"name": str, "dtype": str, "vocab_size": int, "tokenizer": str, "documents": dict, "splits": dict}
OPTIONAL = {"asked": dict, "split": str, "sources": list, "rules": int, "left_out": dict, "notes": list}
SOURCE = {"source": str, "files": int, "bytes": int, "sha256": str}


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless a manifest has every key that is read, of the right type."""
    _check_types(manifest, REQUIRED)
    _check_types({**{key: kind() for key, kind in OPTIONAL.items()}, **manifest}, OPTIONAL)
    if not all(isinstance(note, str) for note in manifest.get("notes", [])):
        raise ValueError(f"notes is {short(manifest['notes'])}")
    for split in SPLITS:
        facts = {"token_bytes": 0, **manifest["splits"][split], "documents": manifest["documents"][split]}
        _check_types(facts, {"tokens": int, "bytes": int, "token_bytes": int, "documents": int, "sha256": str})
    for row in manifest.get("sources", []):
        _check_types(row, SOURCE)
        if not isinstance(row["licence"], str | None):
            raise ValueError(f"a licence is {short(row['licence'])}")


def _check_types(facts: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        if type(facts[key]) is not kind or (kind is int and facts[key] < 0):
            raise ValueError(f"{key} is {short(facts[key])}")
        if kind is str:
            facts[key].encode()  # half a surrogate pair is a ValueError


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of a shard: little-endian uint16 where every id fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Appends one split's tokens to its shard and counts them; the file is fsynced when the block ends."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.file = path.open("wb")
        self.itemsize = dtype.itemsize
        self.sha = hashlib.sha256()
        self.tokens = self.bytes = self.token_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with self.file:
            if not any(error):
                self.file.flush()
                os.fsync(self.file.fileno())

    def append(self, content: bytes, n_bytes: int, token_bytes: int) -> None:
        """Append `content`, tokens in the shard's dtype, of `n_bytes` of text, of which they have `token_bytes`."""
        self.file.write(content)
        self.sha.update(content)
        self.tokens += len(content) // self.itemsize
        self.bytes += n_bytes
        self.token_bytes += token_bytes

    def facts(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        facts = {"tokens": self.tokens, "bytes": self.bytes, "sha256": self.sha.hexdigest()}
        return facts if self.token_bytes == self.bytes else {**facts, "token_bytes": self.token_bytes}


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and its settings, without the longest text that those of a model have."""
    for file, text in files(tokenizer, block_size=2**30).items():
        write_synced(folder / file, text.encode())


def finish_dataset(
    folder: Path, tokenizer: Tokenizer, facts: Mapping[str, Any], writers: Mapping[str, ShardWriter]
) -> None:
    """Write the tokenizer and, last, the manifest, without which a folder is no data set, beside finished shards."""
    manifest = {"schema": SCHEMA, **facts, "twingpt": __version__}
    manifest |= {"dtype": token_dtype(tokenizer.vocab_size).str, "vocab_size": tokenizer.vocab_size}
    manifest |= {"tokenizer": tokenizer.digest, "splits": {split: writer.facts() for split, writer in writers.items()}}
    write_tokenizer(folder, tokenizer)
    write_synced(folder / "manifest.json", json.dumps(manifest, indent=2).encode())


class TokenDataset:
    """A prepared data set: memory-mapped tokens of both splits, and batches of them by number.

    Raises UserError where the folder is not a whole data set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            if self.manifest["schema"] > SCHEMA:
                raise UserError(f"{folder} was prepared by a newer version of twingpt: install that.")
            _check_manifest(self.manifest)
            self.splits = {split: self._memory_map(split) for split in SPLITS}
        except FileNotFoundError as error:
            raise UserError(f"{folder} is not a prepared data set: {Path(error.filename).name} is missing.") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"The manifest of {folder} is broken ({error}): delete the folder.") from None
        self.tokenizer = load_tokenizer(folder)

    def _memory_map(self, split: str) -> Array:
        path, facts = self.folder / f"{split}.bin", self.manifest["splits"][split]
        if self.manifest["dtype"] not in (token_dtype(0).str, token_dtype(2**32).str):
            raise ValueError(f"dtype is {short(self.manifest['dtype'])}")
        dtype, size = np.dtype(self.manifest["dtype"]), path.stat().st_size
        if size != facts["tokens"] * dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes where its manifest says {facts['tokens'] * dtype.itemsize}: "
                "delete the folder to prepare again."
            )
        return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the digests of the tokenizer and both shards, which a resumed run must find unchanged."""
        parts = [self.manifest["tokenizer"], *(self.manifest["splits"][s]["sha256"] for s in SPLITS)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def check(self, config: GPTConfig, *, evaluated: bool = True) -> None:
        """Raise UserError unless both splits hold at least one window, and the model knows every token.

        Of a run that is not `evaluated` but at its end, what is held out may be shorter, or nothing.
        """
        if evaluated and not len(self.splits["val"]):
            raise UserError(
                f"{self.manifest['name']} holds out nothing to evaluate on: give --eval-interval 0, or prepare the "
                "text again and hold out a share."
            )
        for split, tokens in self.splits.items():
            if len(tokens) <= config.block_size and (evaluated or split == "train"):
                raise UserError(
                    f"The {split} split of {self.manifest['name']} has {len(tokens)} tokens, fewer than one block of "
                    f"{config.block_size} and its target: give more text, or a smaller --block-size."
                )
        if self.manifest["vocab_size"] > config.vocab_size:
            raise UserError(
                f"The data has token ids up to {self.manifest['vocab_size'] - 1}, outside the model's "
                f"vocabulary of {config.vocab_size}."
            )

    @property
    def holds_out(self) -> bool:
        """Whether there is held-out text to evaluate on: at least a token and its target."""
        return len(self.splits["val"]) > 1

    def batch(self, first: int, batch_size: int, block_size: int, seed: int) -> tuple[Array, Array]:
        """Tokens and targets, (B, T) int32, of the run's training windows `first` to `first + batch_size`.

        Both are views of one array.
        """
        windows = np.empty((batch_size, block_size + 1), np.int32)
        self.gather(windows, slice(None), np.arange(first, first + batch_size), seed)
        return windows[:, :-1], windows[:, 1:]

    def gather(self, windows: Array, rows: Array | slice, numbers: Array, *seed: object) -> None:
        """Gather training windows by number, in the order keyed by `seed`, into rows of `windows`, (B, T + 1) int32.

        NumPy copies them from the mapped file in one pass.
        """
        tokens, length = np.asarray(self.splits["train"]), windows.shape[1]
        starts = window_starts(numbers, len(tokens), length - 1, *seed)
        found = np.lib.stride_tricks.sliding_window_view(tokens, length)[starts]
        self._check_ids(found)
        windows[rows] = found

    def text_bytes(self, split: str, tokens: Array) -> float:
        """The bytes of text that some tokens of a split are.

        Where the tokenizer can't spell all of it, so that these have more bytes or fewer, each is an average token.
        """
        facts = self.manifest["splits"][split]
        if "token_bytes" not in facts:
            return float(self.tokenizer.byte_lengths[tokens].sum())
        return float(len(tokens) * facts["bytes"] / facts["tokens"])

    def epochs(self, windows: int, block_size: int) -> float:
        """Epochs that so many training windows are."""
        return windows / window_count(len(self.splits["train"]), block_size)

    def _check_ids(self, tokens: Array) -> None:
        """UserError for an id outside the vocabulary: no device checks, and the embedding would read other memory."""
        if tokens.max() >= self.manifest["vocab_size"]:
            raise UserError(
                f"{self.folder} holds the token id {tokens.max()}, outside its vocabulary of "
                f"{self.manifest['vocab_size']}: its tokens are damaged, delete the folder to prepare again."
            )

    def validation(self, batch_size: int, block_size: int, n_batches: int) -> Iterator[tuple[Array, Array]]:
        """The first `n_batches` (B, T) batches of the held-out tokens in order (0: all); a target of -1 is padding."""
        tokens, size = self.splits["val"], batch_size * block_size
        starts = range(0, len(tokens) - 1, size)
        for start in starts[: n_batches or None]:
            found = np.asarray(tokens[start : start + size + 1])
            self._check_ids(found)
            row = np.full(size + 1, -1, np.int32)
            row[: len(found)] = found
            yield np.maximum(row[:-1], 0).reshape(batch_size, -1), row[1:].reshape(batch_size, -1)
