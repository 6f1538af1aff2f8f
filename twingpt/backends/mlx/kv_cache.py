"""The KV cache in MLX: the twin of `backends/torch/kv_cache.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import mlx.core as mx
import numpy as np

from twingpt.backends.kv_layout import bucket, kv_quantization
from twingpt.backends.mlx.device import on_device, to_device
from twingpt.core import kv_cache
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig

Array = mx.array


class KVCache(kv_cache.KVCache):
    """Implements `core.kv_cache.KVCache`: keys and values (rows, K, capacity, d) a layer, token ids (rows, capacity).

    `keys[layer]` and `values[layer]` are the arrays that hold them: one in `dtype`, or with `kv_bits` the packed words,
    scales and biases of MLX's affine quantization (`kv_quantization`). `logits` (rows, V) float32 are those after each
    row's last position. All rows have one capacity: it grows by buckets (`kv_layout.bucket`) as the longest row fills
    it, and a short row's memory grows with it.
    """

    def __init__(
        self, config: GPTConfig, rows: int, capacity: int, dtype: mx.Dtype, device: Device, kv_bits: int | None
    ) -> None:
        super().__init__(rows, config.block_size)
        self.device, self.quantization = device, kv_quantization(config, kv_bits)
        shape = (rows, config.n_kv_head, bucket(capacity, config.block_size), config.head_dim)
        empty = self.quantized(mx.zeros(shape, dtype))
        self.keys = [[mx.zeros_like(part) for part in empty] for _ in range(config.n_layer)]
        self.values = [[mx.zeros_like(part) for part in empty] for _ in range(config.n_layer)]
        self.tokens = mx.zeros((rows, shape[2]), mx.int32)
        self.logits = mx.zeros((rows, config.vocab_size))
        self.async_eval()

    def quantized(self, x: Array) -> Sequence[Array]:
        """Keys or values (…, d) as they are held: quantized, or as they are."""
        if self.quantization is None:
            return (x,)
        group_size, bits = self.quantization.group_size, self.quantization.bits
        parts: Sequence[Array] = mx.quantize(x, group_size=group_size, bits=bits)
        return parts

    def dequantized(self, parts: Sequence[Array]) -> Array:
        """The inverse of `quantized`."""
        if self.quantization is None:
            return parts[0]
        (words, scales, biases), group_size, bits = parts, self.quantization.group_size, self.quantization.bits
        return mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)

    def buffers(self) -> Iterator[Array]:
        """Every array of keys and values, (rows, K, capacity, …)."""
        return chain(*self.keys, *self.values)

    @on_device
    def copy(self, source: int, row: int) -> None:
        """Make `row` what `source` is: its positions, and the logits after them. Enqueues only."""
        for buffer in (*self.buffers(), self.tokens, self.logits):
            buffer[row] = buffer[source]
        for known in (self.lengths, self.has_logits, self.used):
            known[row] = known[source]
        self.async_eval()

    @on_device
    def read_row(self, row: int) -> list[np.ndarray]:
        """The positions of a row as arrays of bytes: its token ids as int32, then keys and values by layer; waits."""
        n = int(self.lengths[row])
        held = (self.tokens[row, :n], *(buffer[row, :, :n] for buffer in self.buffers()))
        return [np.array(array.view(mx.uint8)) for array in held]

    @on_device
    def write_row(self, row: int, arrays: Sequence[np.ndarray]) -> None:
        """Make a row hold what `read_row` gave, of its own or another cache; its next call has to be a prefill."""
        tokens, n = arrays[0].view(np.int32), arrays[0].size // 4
        self.reserve(n)
        self.clear(slice(row, row + 1))
        self.tokens[row, :n] = mx.array(tokens)
        for buffer, array in zip(self.buffers(), arrays[1:], strict=True):
            buffer[row, :, :n] = mx.array(array).view(buffer.dtype)
        self.lengths[row] = 0
        self.advance(slice(row, row + 1), n)
        self.async_eval()

    def set_logits(self, rows: slice, logits: Array) -> None:
        """Keep the logits (B, V) after the last positions of `rows`."""
        self.logits[rows] = logits  # a copy: a handle's logits stay as they are
        self.has_logits[rows] = True

    def counts(self, rows: slice, start: np.ndarray) -> Array:
        """How often each id stands among the positions of `rows`, from (B,) `start` on, (B, V)."""
        vocab_size, end = self.logits.shape[1], int(self.lengths[rows].max())
        first, lengths = to_device(np.stack([start, self.lengths[rows]])[..., None])
        position = mx.arange(end)
        others = (position < first) | (position >= lengths)
        ids = mx.where(others, vocab_size, self.tokens[rows, :end])  # beyond the last id
        counts = mx.zeros((len(ids), vocab_size + 1))
        return counts.at[mx.arange(len(ids))[:, None], ids].add(1)[:, :vocab_size]

    def clear(self, rows: slice) -> None:
        """Forget what an earlier text left: an infinity of it would be NaN under a mask that only multiplies by 0."""
        for buffer in self.buffers():
            buffer[rows] = 0
        self.used[rows] = False

    def reserve(self, end: int) -> None:
        """Have room for `end` positions a row."""
        more = bucket(end, self.block_size) - self.tokens.shape[1]
        if more > 0:
            for buffers in (self.keys, self.values):
                for layer, parts in enumerate(buffers):
                    buffers[layer] = [
                        mx.concatenate([x, mx.zeros((*x.shape[:2], more, x.shape[3]), x.dtype)], axis=2) for x in parts
                    ]
            self.tokens = mx.concatenate([self.tokens, mx.zeros((len(self.tokens), more), mx.int32)], axis=1)

    def async_eval(self) -> None:
        """Start to compute what is still lazy, in this thread: no other one could."""
        mx.async_eval(self.keys, self.values, self.tokens, self.logits)


class CacheSlots:
    """Where the (B, T) `tokens` of one call of the model go: behind the positions that some rows of a cache hold.

    `offset` is the position of each row's first token: one int where all rows have the same, else (B,). `end` is the
    number of positions that the longest row then has.
    """

    def __init__(self, cache: KVCache, rows: slice, tokens: Array) -> None:
        T, lengths = tokens.shape[1], cache.lengths[rows]
        cache.check_room(rows, T)
        self.cache, self.rows, self.n_new, self.end = cache, rows, T, int(lengths.max()) + T
        self.shortest = int(lengths.min())
        cache.reserve(self.end)
        if self.end == T and cache.used[rows].any():
            cache.clear(rows)
        self.masks: dict[int, str | Array | None] = {}  # by window: the same for every layer
        self.even = self.shortest + T == self.end
        self.offset: int | Array = self.end - T
        self.index: tuple[slice | Array, slice | Array] = (rows, slice(self.end - T, self.end))
        if not self.even:
            self.offset = mx.array(lengths.astype("int32"))
            row = mx.arange(rows.start, rows.stop)[:, None]
            self.index = row, self.offset[:, None] + mx.arange(T)
        cache.tokens[self.index] = tokens

    def start(self, window: int) -> int:
        """The first position that any of the new tokens sees through a sliding window; 0 where `window` is 0, for all.

        Where all rows have one length, the only token of a step sees every position from there on, and needs no mask.
        """
        return max(0, self.shortest - window + 1) if window else 0

    def update(self, layer: int, k: Array, v: Array, window: int) -> tuple[Array, Array]:
        """Append (B, K, T, d) keys and values to a layer; returns those that `window` shows, (B, K, end - start, d).

        They are as the cache holds them: with `kv_bits` the new ones too have been quantized.
        """
        seen = slice(self.start(window), self.end)
        return self._append(self.cache.keys[layer], k, seen), self._append(self.cache.values[layer], v, seen)

    def _append(self, buffers: Sequence[Array], x: Array, seen: slice) -> Array:
        row, position = self.index
        for buffer, new in zip(buffers, self.cache.quantized(x), strict=True):
            # Two index arrays come first: (B, T, K, …).
            buffer[row, :, position] = new if self.even else new.swapaxes(1, 2)
        return self.cache.dequantized([buffer[self.rows, :, seen] for buffer in buffers])

    def previous_tokens(self) -> Array | None:
        """The ids before the first tokens, (B, 1); None where nothing stands there. Rows of a batch have all some."""
        if isinstance(self.offset, int):
            return self.cache.tokens[self.rows, self.offset - 1 : self.offset] if self.offset else None
        return self.cache.tokens[self.index[0], self.offset[:, None] - 1]

    def advance(self) -> None:
        """Count the new positions as held."""
        self.cache.advance(self.rows, self.n_new)
