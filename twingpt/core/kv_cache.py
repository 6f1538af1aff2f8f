"""The KV cache as the host knows it: the base of the ones on the devices (`backends/*/kv_cache.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from twingpt.core.errors import UserError


class KVCache(ABC):
    """KV cache: rows of positions, each with a length of its own, and the logits after each row's last position.

    `lengths` (rows,) are the numbers of positions held. `has_logits` (rows,) tells which rows have logits: a new or a
    trimmed one has none before its next prefill. The rows in use come first, since `InferenceEngine.step` decodes the
    first B: one that leaves is replaced by a `copy` of the last.
    """

    def __init__(self, rows: int, block_size: int) -> None:
        self.block_size = block_size
        self.lengths = np.zeros(rows, np.int64)
        self.has_logits = np.zeros(rows, np.bool_)
        self.used = np.zeros(rows, np.bool_)  # rows that may hold what an earlier text left

    @abstractmethod
    def copy(self, source: int, row: int) -> None:
        """Make `row` what `source` is: its positions, and the logits after them. Enqueues only."""

    @abstractmethod
    def read_row(self, row: int) -> list[np.ndarray]:
        """The positions of a row as arrays of bytes: its token ids as int32, then keys and values by layer; waits."""

    @abstractmethod
    def write_row(self, row: int, arrays: Sequence[np.ndarray]) -> None:
        """Make a row hold what `read_row` gave, of its own or another cache; its next call has to be a prefill."""

    def trim(self, row: int, n: int) -> None:
        """Forget the last `n` positions of a row; UserError where it has fewer. Its next call has to be a prefill."""
        if not 0 <= n <= self.lengths[row]:
            raise UserError(f"Row {row} of the KV cache has {self.lengths[row]} positions: {n} can't be trimmed.")
        self.lengths[row] -= n
        self.has_logits[row] &= n == 0

    def check_room(self, rows: slice, n_new: int) -> None:
        """Raise UserError where `n_new` more positions a row would be more than the model's block_size."""
        end = self.lengths[rows].max() + n_new
        if end > self.block_size:
            raise UserError(f"{end} positions of the KV cache are more than the model's block_size {self.block_size}.")

    def check_logits(self, rows: slice) -> None:
        """Raise UserError for rows that have no logits to sample from, or that there are not."""
        if rows.stop > len(self.lengths):
            raise UserError(f"The KV cache has {len(self.lengths)} rows, and {rows.stop} are to be decoded.")
        if not self.has_logits[rows].all():
            row = int(np.argmin(self.has_logits[rows]))
            raise UserError(f"Row {row} of the KV cache has no logits to sample from: prefill it first.")

    def advance(self, rows: slice, n_new: int) -> None:
        """Count positions that were written as held; the logits after them are not known yet."""
        self.lengths[rows] += n_new
        self.has_logits[rows] = False
        self.used[rows] = True
