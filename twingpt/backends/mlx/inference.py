"""The inference engine in MLX: the twin of `backends/torch/inference.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from twingpt.backends.mlx import model
from twingpt.backends.mlx.device import DTYPES, on_device, to_device, to_numpy, wire_memory
from twingpt.core.backend import Device, LogProbs, check_tokens
from twingpt.core.config import GPTConfig
from twingpt.core.sampler import Sampling

Array = mx.array

PREFILL_CHUNK = 512  # positions of a prompt that are run at once: bounds the memory of its attention


@dataclass(frozen=True)
class Step:
    """Handle of a prefill or step, on the device: the last tokens that ran, (B,), and the logits after them, (B, V)."""

    tokens: Array
    logits: Array


def sample(logits: Array, sampling: Sampling, u: Array, seen: Array | None) -> Array:
    """`core.sampler.sample` without leaving the device: (B, V) logits, `u` (B,), `seen` (B, V) booleans -> (B,) ids."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temp == 0:
        return mx.argmax(logits, axis=-1)
    order = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, order, axis=-1) / sampling.temp
    if sampling.top_k:
        ranked[:, sampling.top_k :] = -mx.inf
    p = mx.softmax(ranked, axis=-1)
    keep = mx.cumsum(p, axis=-1) - p < sampling.top_p
    keep = keep & (p >= sampling.min_p * p[:, :1])
    cumulative = mx.cumsum(mx.where(keep, p, 0.0), axis=-1)
    index = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(axis=-1)
    index = mx.minimum(index, keep.sum(axis=-1) - 1)  # rounding may carry u past the last token kept
    return mx.take_along_axis(order, index[:, None], axis=-1)[:, 0]


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
        self.config, self.device, self.dtype = config, device, DTYPES[dtype]
        wire_memory(device)
        self._load(tensors)
        self.cache: model.KVCache
        self.seen: Array  # (B, V) booleans: the ids of the prompt and, under a repetition penalty, those sampled

    @on_device
    def _load(self, tensors: Iterable[tuple[str, np.ndarray | Array]]) -> None:
        self.params = {name: self._cast(value) for name, value in tensors}
        self.rope = model.Rope(self.config)
        mx.eval(self.params)

    def _cast(self, value: np.ndarray | Array) -> Array:
        """A parameter on the device in the compute dtype; a quantized matrix stays uint32."""
        array = to_device(value)
        return array if array.dtype == mx.uint32 else array.astype(self.dtype)

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
    def prefill(self, tokens: np.ndarray) -> Step:
        """Run (B, T) ids into a new KV cache; the handle holds the last position's logits, (B, V). Enqueues only."""
        ids = to_device(check_tokens(tokens, self.config))
        self.cache = model.KVCache(self.config, len(ids), self.dtype)
        self.seen = mx.zeros((len(ids), self.config.vocab_size), mx.bool_)
        self.seen = mx.put_along_axis(self.seen, ids, mx.array(1, mx.bool_), axis=1)
        for chunk in mx.split(ids, range(PREFILL_CHUNK, ids.shape[1], PREFILL_CHUNK), axis=1):
            x = model.hidden_states(self.params, chunk, self.config, self.rope, self.cache)
            mx.async_eval(x, self.cache.keys, self.cache.values)
        return Step(ids[:, -1], model.logits(x[:, -1:], self.params, self.config)[:, 0])

    @on_device
    def step(self, previous: Step, sampling: Sampling, u: np.ndarray) -> Step:
        """Decode one token a row: sample it from `previous` with the uniforms `u` (B,), run it. Enqueues only."""
        uniforms = to_device(u.astype(np.float32))
        penalise = sampling.repetition_penalty != 1
        ids = sample(previous.logits, sampling, uniforms, self.seen if penalise else None)
        if penalise:
            self.seen = mx.put_along_axis(self.seen, ids[:, None], mx.array(1, mx.bool_), axis=1)
        x = model.hidden_states(self.params, ids[:, None], self.config, self.rope, self.cache)
        step = Step(ids, model.logits(x, self.params, self.config)[:, 0])
        mx.async_eval(step.tokens, step.logits)
        return step

    def trim(self, n: int) -> None:
        """Forget the last `n` positions of the KV cache."""
        self.cache.offset -= n

    @on_device
    def logits(self, handle: Step) -> np.ndarray:
        """(B, V) float32 logits after a handle's tokens; waits."""
        return to_numpy(handle.logits)

    @on_device
    def read(self, handle: Step | LogProbs) -> Any:
        """(B,) ids that a step sampled, or what `log_probs` is to give, as NumPy arrays; waits."""
        if isinstance(handle, Step):
            return np.array(handle.tokens)
        return LogProbs(*(None if array is None else np.array(array) for array in vars(handle).values()))
