"""The inference engine in MLX: the twin of `backends/torch/inference.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from twingpt.backends.mlx import model
from twingpt.backends.mlx.device import DTYPES, on_device, to_device, to_numpy
from twingpt.backends.mlx.kv_cache import CacheSlots, KVCache
from twingpt.backends.mlx.layers import Rope
from twingpt.backends.mlx.sampler import log_probs_of, penalise, sample
from twingpt.core.backend import Device, LogProbs, Sampled, check_tokens
from twingpt.core.config import GPTConfig
from twingpt.core.sampler import SamplingRows

Array = mx.array

PREFILL_CHUNK = 512  # positions of a prompt that are run at once: bounds the memory of its attention


@dataclass(frozen=True)
class Step:
    """Handle of a prefill or step of B rows, on the device: the logits after it, (B, V) float32, and what was sampled.

    A prefill samples nothing and has None.
    """

    logits: Array
    sampled: Sampled | None = None


class InferenceEngine:
    """Implements `core.backend.InferenceEngine`: the parameters, quantized or not, are cast once to `dtype`."""

    def __init__(
        self,
        config: GPTConfig,
        tensors: Iterable[tuple[str, np.ndarray | Array]],
        device: Device,
        *,
        dtype: str = "float32",
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._load(tensors)

    @on_device
    def _load(self, tensors: Iterable[tuple[str, np.ndarray | Array]]) -> None:
        self.params = {name: self._cast(value) for name, value in tensors}
        self.rope = Rope(self.config)
        mx.eval(self.params)

    def _cast(self, value: np.ndarray | Array) -> Array:
        """A parameter on the device in the compute dtype; a quantized matrix stays in words, and scales in bytes."""
        array = to_device(value)
        return array if array.dtype in (mx.uint32, mx.uint8) else array.astype(DTYPES[self.dtype])

    @on_device
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) ids -> (B, T, V) float32 logits, without the KV cache; waits."""
        ids = to_device(check_tokens(tokens, self.config))
        x = model.hidden_states(self.params, ids, self.config, self.rope)
        return to_numpy(model.logits(x, self.params, self.config))

    @on_device
    def log_probs(self, tokens: np.ndarray, targets: np.ndarray, top_k: int = 0) -> LogProbs:
        """Log-probabilities of (B, T) targets after (B, T) ids, and of the `top_k` likeliest ids. Enqueues only.

        Reads as LogProbs. Goes by chunks of positions: the (B, T, V) logits are never in memory.
        """
        ids = to_device(check_tokens(tokens, self.config))
        x = model.hidden_states(self.params, ids, self.config, self.rope)
        handle = model.log_probs(x, self.params, to_device(targets), self.config, top_k)
        mx.async_eval([array for array in vars(handle).values() if array is not None])
        return handle

    @on_device
    def new_cache(self, rows: int, capacity: int, *, kv_bits: int | None = None) -> KVCache:
        """An empty KV cache of so many rows, with room for `capacity` positions a row, which grows as it fills.

        With `kv_bits` 8 or 4 keys and values are quantized; UserError where they can't be.
        """
        return KVCache(self.config, rows, capacity, DTYPES[self.dtype], self.device, kv_bits)

    @on_device
    def prefill(self, cache: KVCache, row: int, tokens: np.ndarray) -> Step:
        """Run (T,) ids of a prompt, or of a part of it, behind what a row holds. Enqueues only."""
        ids, rows = to_device(check_tokens(tokens[None], self.config)), slice(row, row + 1)
        cache.check_room(rows, len(tokens))
        for chunk in mx.split(ids, range(PREFILL_CHUNK, ids.shape[1], PREFILL_CHUNK), axis=1):
            x = model.hidden_states(self.params, chunk, self.config, self.rope, CacheSlots(cache, rows, chunk))
            mx.async_eval(x, cache.keys, cache.values)
        logits = model.logits(x[:, -1:], self.params, self.config)[:, 0]
        cache.set_logits(rows, logits)
        mx.async_eval(logits)
        cache.async_eval()
        return Step(logits)

    @on_device
    def step(self, cache: KVCache, sampling: SamplingRows, u: np.ndarray, *, log_probs: int | None = 0) -> Step:
        """Decode one token in each of the first B rows: sample it from the row's logits, append it, run it.

        Each row has settings and a uniform `u` (B,) of its own. Enqueues; a CPU may compute the logits first. Reads as
        Sampled, with log-probabilities of the ids and of the `log_probs` likeliest; None leaves both out, and a pass.
        """
        rows = slice(0, len(u))
        cache.check_logits(rows)
        logits = cache.logits[rows]
        ids = sample(penalise(logits, sampling, partial(cache.counts, rows)), sampling, u, self.device)
        tokens = mx.maximum(ids, 0)  # any token goes on where there is none: whoever reads it stops
        sampled = Sampled(ids, *(() if log_probs is None else log_probs_of(logits, tokens, log_probs)))
        slots = CacheSlots(cache, rows, tokens[:, None])
        x = model.hidden_states(self.params, tokens[:, None], self.config, self.rope, slots)
        step = Step(model.logits(x, self.params, self.config)[:, 0], sampled)
        cache.set_logits(rows, step.logits)
        mx.async_eval(step.logits, [array for array in vars(sampled).values() if array is not None])
        cache.async_eval()
        return step

    @on_device
    def logits(self, handle: Step) -> np.ndarray:
        """(B, V) float32 logits after the last positions of a handle's rows; waits."""
        return to_numpy(handle.logits)

    @on_device
    def read(self, handle: Step | LogProbs) -> Any:
        """What a step sampled, as Sampled, or what `log_probs` is to give, as LogProbs, of NumPy arrays; waits."""
        if isinstance(handle, Step):
            assert handle.sampled is not None, "a prefill samples nothing"
            return Sampled(**_on_host(handle.sampled))
        return LogProbs(**_on_host(handle))


def _on_host(handle: Sampled | LogProbs) -> dict[str, np.ndarray | None]:
    """The arrays of a handle by name, with ids in int64; waits."""
    return {
        name: None if array is None else np.array(array, np.int64 if array.dtype == mx.uint32 else None)
        for name, array in vars(handle).items()
    }
