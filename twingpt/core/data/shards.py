"""A prepared data set on disk: memory-mapped tokens of each split, and the manifest that vouches for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.config import GPTConfig
from twingpt.core.data.order import window_count, window_starts
from twingpt.core.errors import UserError
from twingpt.core.paths import new_folder, write_synced
from twingpt.core.tokenizer import Tokenizer, files
from twingpt.core.tokenizer import load as load_tokenizer

Array = np.ndarray

SCHEMA = 1
SPLITS = ("train", "val")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Two bytes a token where the vocabulary allows it, else four, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write(folder: Path, name: str, tokenizer: Tokenizer, splits: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Write a data set in one atomic step; `facts` go into the manifest."""
    dtype = token_dtype(tokenizer.vocab_size)
    manifest: dict[str, Any] = {"schema": SCHEMA, "name": name, **facts}
    manifest |= {"dtype": dtype.str, "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.digest, "splits": {}}
    with new_folder(folder) as temporary:
        for split, tokens in splits.items():
            content = tokens.astype(dtype).tobytes()
            write_synced(temporary / f"{split}.bin", content)
            manifest["splits"][split] = {
                "tokens": len(tokens),
                "bytes": int(tokenizer.byte_lengths[tokens].sum()),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        for file, text in files(tokenizer, block_size=2**30).items():
            write_synced(temporary / file, text.encode())
        write_synced(temporary / "manifest.json", json.dumps(manifest, indent=2).encode())


class TokenDataset:
    """The tokens of a prepared data set, mapped and not read, and batches of them by step number.

    Raises UserError where the folder is not a whole data set.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            self.splits = {split: self._map(split) for split in SPLITS}
        except FileNotFoundError as error:
            raise UserError(f"{folder} is not a prepared data set: {Path(error.filename).name} is missing.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"The manifest of {folder} is broken ({error}): delete the folder.") from None
        self.tokenizer = load_tokenizer(folder)

    def _map(self, split: str) -> Array:
        path, facts = self.folder / f"{split}.bin", self.manifest["splits"][split]
        dtype = np.dtype(self.manifest["dtype"])
        size = path.stat().st_size
        if size != facts["tokens"] * dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes where its manifest says {facts['tokens'] * dtype.itemsize}: "
                "delete the folder to prepare again."
            )
        return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tokens and the tokenizer: what a resumed run must find again."""
        parts = [self.manifest["tokenizer"], *(self.manifest["splits"][s]["sha256"] for s in SPLITS)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def check(self, config: GPTConfig) -> None:
        """Raise UserError unless both splits hold at least one window, and the model knows every token."""
        for split, tokens in self.splits.items():
            if len(tokens) <= config.block_size:
                raise UserError(
                    f"The {split} split of {self.manifest['name']} has {len(tokens)} tokens, fewer than one block of "
                    f"{config.block_size} and its target: give more text, or a smaller --block-size."
                )
        if self.manifest["vocab_size"] > config.vocab_size:
            raise UserError(
                f"The data has token ids up to {self.manifest['vocab_size'] - 1}, outside the model's "
                f"vocabulary of {config.vocab_size}."
            )

    def batch(self, first: int, batch_size: int, block_size: int, seed: int) -> tuple[Array, Array]:
        """Training windows number `first` to `first + batch_size` of the run: tokens and targets, (B, T) int32.

        Both are views of one array.
        """
        windows = np.empty((batch_size, block_size + 1), np.int32)
        self.read(windows, slice(None), np.arange(first, first + batch_size), seed)
        return windows[:, :-1], windows[:, 1:]

    def read(self, windows: Array, rows: Array | slice, numbers: Array, *seed: object) -> None:
        """Copy the training windows `numbers` of the order called `seed` to these rows of `windows`, (B, T + 1) int32.

        NumPy gathers them from the mapped file in one pass.
        """
        tokens, length = np.asarray(self.splits["train"]), windows.shape[1]
        starts = window_starts(numbers, len(tokens), length - 1, *seed)
        found = np.lib.stride_tricks.sliding_window_view(tokens, length)[starts]
        self._check_ids(found)
        windows[rows] = found

    def epochs(self, windows: int, block_size: int) -> float:
        """How often so many training windows go through the data."""
        return windows / window_count(len(self.splits["train"]), block_size)

    def _check_ids(self, tokens: Array) -> None:
        """No device checks an id: one beyond the table reads garbage there."""
        if tokens.max() >= self.manifest["vocab_size"]:
            raise UserError(
                f"{self.folder} holds the token id {tokens.max()}, outside its vocabulary of "
                f"{self.manifest['vocab_size']}: its tokens are damaged, delete the folder to prepare again."
            )

    def validation(self, batch_size: int, block_size: int, n_batches: int) -> Iterator[tuple[Array, Array]]:
        """The first `n_batches` batches of the held-out tokens in order (0: all); what lacks has targets of -1."""
        tokens, size = self.splits["val"], batch_size * block_size
        starts = range(0, len(tokens) - 1, size)
        for start in starts[: n_batches or None]:
            found = np.asarray(tokens[start : start + size + 1])
            self._check_ids(found)
            row = np.full(size + 1, -1, np.int32)
            row[: len(found)] = found
            yield np.maximum(row[:-1], 0).reshape(batch_size, -1), row[1:].reshape(batch_size, -1)
