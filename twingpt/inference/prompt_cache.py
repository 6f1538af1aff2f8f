"""Prefix cache: keys and values of prompts, so that one that begins alike needs no prefill of its beginning."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from twingpt.backends.kv_layout import kv_quantization, row_table
from twingpt.core.backend import InferenceEngine
from twingpt.core.checkpoint.safetensors_file import DTYPES, Entry, Shapes, TensorFile, write_safetensors
from twingpt.core.checkpoint.schema import Model
from twingpt.core.errors import UserError
from twingpt.core.kv_cache import KVCache
from twingpt.core.paths import naming, rename
from twingpt.core.reading import short

Array = np.ndarray

MAX_BYTES = 2**32
MAX_ROWS = 64  # each is compared with each prompt, and a file's header grows with them
FORMAT = "twingpt prompt cache 1"


class PromptCache:
    """Prefix cache of one engine: KV-cache rows in host memory, found by the longest common prefix of token ids.

    Rows are in the engine's dtype, or quantized to `kv_bits`. There are at most MAX_ROWS, and they and those that are
    being decoded have at most `max_bytes`: the least recently used go first. `reused` counts the positions that were
    found here, and `refused` the prompts that had no room. Not for several threads at once. Raises UserError for
    `kv_bits` that the engine's KV cache can't have.
    """

    def __init__(self, engine: InferenceEngine, *, kv_bits: int | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.engine, self.kv_bits, self.max_bytes = engine, kv_bits, max_bytes
        self.quantization = kv_quantization(engine.config, kv_bits)
        shapes, dtypes = self._table(1)
        self.position_bytes = sum(math.prod(shapes[name]) * np.dtype(DTYPES[dtypes[name]]).itemsize for name in shapes)
        self.rows: list[tuple[Array, list[Array]]] = []  # ids, and the arrays of `read_row`; the last used one first
        self.reused = self.refused = 0
        self.changed = False  # since it was saved

    def restore(self, cache: KVCache, row: int, tokens: Sequence[int]) -> int:
        """Make a row hold the longest beginning of a prompt that is known, all but its last id; its length."""
        number, n = self._find(tokens[:-1])
        if n:
            ids, arrays = self.rows[number]
            self.rows.insert(0, self.rows.pop(number))
            held = [array.view(np.uint8)[..., :n, :] for array in arrays[1:]]
            cache.write_row(row, [ids[:n].view(np.uint8), *map(np.ascontiguousarray, held)])
            self.reused += n
        return n

    def keep(self, cache: KVCache, row: int, tokens: Sequence[int], decoded: int) -> None:
        """Keep a row that holds `tokens`, where there is room beside the `decoded` positions of active rows; waits."""
        ids, room = np.array(tokens, np.int32), self.max_bytes // self.position_bytes - decoded
        known = self._find(tokens)[1] == len(ids)
        if not known and len(ids) > room:
            self.refused += 1
        elif not known:
            others = [kept for kept in self.rows if _common(kept[0], ids) < len(kept[0])]  # no beginnings of it
            self.rows, self.changed = [(ids, cache.read_row(row)), *others], True
        held = np.cumsum([len(kept) for kept, _ in self.rows])
        self.rows = self.rows[: min(MAX_ROWS, int(np.searchsorted(held, room, side="right")))]

    def _find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """(number, length) of the row with the longest beginning of `tokens`; (0, 0) for none."""
        ids = np.array(tokens, np.int32)
        lengths = [_common(known, ids) for known, _ in self.rows]
        number = int(np.argmax(lengths)) if lengths else 0
        return number, lengths[number] if lengths else 0

    def _table(self, n: int) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        return row_table(self.engine.config, self.engine.dtype, self.quantization, n)

    def save(self, path: Path, digest: str) -> None:
        """Write the rows to a safetensors file, which replaces one that is there; `digest` is `model_digest`'s."""
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for number, (ids, _) in enumerate(self.rows):
            row_shapes, row_dtypes = self._table(len(ids))
            shapes |= {f"{number}.{name}": shape for name, shape in row_shapes.items()}
            dtypes |= {f"{number}.{name}": dtype for name, dtype in row_dtypes.items()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with naming(path):
            try:
                write_safetensors(temporary, shapes, self._tensors(shapes, dtypes), dtypes, self._described(digest))
                rename(temporary, path)
                self.changed = False
            finally:
                temporary.unlink(missing_ok=True)

    def _described(self, digest: str) -> dict[str, str]:
        return {"format": FORMAT, "model": digest, "dtype": self.engine.dtype, "kv_bits": str(self.kv_bits or "none")}

    def _tensors(self, shapes: Shapes, dtypes: Mapping[str, str]) -> Iterator[tuple[str, Array]]:
        arrays = chain.from_iterable(arrays for _, arrays in self.rows)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            yield name, array.view(DTYPES[dtypes[name]]).reshape(shape)

    def load(self, path: Path, digest: str) -> None:
        """Take the rows of a file that `save` wrote, the last used ones where they have more than `max_bytes`.

        Raises UserError for a file of another model, dtype or number of bits, and for one that is damaged.
        """
        file, described = TensorFile(path), self._described(digest)
        if file.metadata.get("format") != FORMAT:
            raise UserError(f"{path} is not a prompt cache: give another file.")
        if file.metadata.get("model") != digest:
            raise UserError(f"{path} is the prompt cache of another model: give each model a file of its own.")
        for name in ("dtype", "kv_bits"):
            if file.metadata.get(name) != described[name]:
                raise UserError(
                    f"{path} was made with {name} {short(file.metadata.get(name))}, and this is {described[name]}: "
                    "give the same, or another file."
                )
        self.rows, left, room = [], dict(file.entries), self.max_bytes // self.position_bytes
        for number in range(MAX_ROWS):
            tokens = left.get(f"{number}.tokens")
            if tokens is not None:
                names, room = self._claim(number, left, path), room - tokens.size
                if room >= 0:
                    arrays = [file.read(name) for name in names]
                    self._check_ids(arrays[0], path)
                    self.rows.append((arrays[0], arrays))
        if left:
            raise UserError(f"{path} is damaged: its tensor {min(left)} is not one of this model's cache.")

    def _claim(self, number: int, left: dict[str, Entry], path: Path) -> list[str]:
        """Take a row's tensors out of `left`; their names, or UserError where they are not this model's."""
        shapes, dtypes = self._table(left[f"{number}.tokens"].size)
        for name, shape in shapes.items():
            entry = left.pop(f"{number}.{name}", None)
            if entry is None or (entry.dtype, entry.shape) != (dtypes[name], shape):
                raise UserError(f"{path} is damaged: its tensor {number}.{name} is not one of this model's cache.")
        return [f"{number}.{name}" for name in shapes]

    def _check_ids(self, ids: Array, path: Path) -> None:
        config = self.engine.config
        if not 0 < len(ids) <= config.block_size or not 0 <= ids.min() <= ids.max() < config.vocab_size:
            raise UserError(f"{path} is damaged: it has ids, or more of them, than this model can take.")


def _common(a: Array, b: Array) -> int:
    """How many ids two texts have in common at their beginning."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def model_digest(model: Model) -> str:
    """SHA-256 of a model's configuration and of its parameters as they are stored, whatever format holds them."""
    sha = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, array in model.stored():
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
