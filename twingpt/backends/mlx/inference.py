"""The decoding engine in MLX: the twin of `backends/torch/inference.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from twingpt.backends.mlx import model
from twingpt.backends.mlx.device import DTYPES, keep_resident, on_device, to_device, to_numpy
from twingpt.core.backend import Device, check_tokens
from twingpt.core.config import GPTConfig
from twingpt.core.sampler import Sampling

Array = mx.array

PREFILL_CHUNK = 512  # positions; bounds the memory of a long prompt's attention


@dataclass(frozen=True)
class Step:
    """A step's result on the device: the token it sampled, (B,), and the logits that follow, (B, V)."""

    tokens: Array
    logits: Array


def sample(scores: Array, sampling: Sampling, u: Array, seen: Array | None) -> Array:
    """One token id for each row of (B, V) logits: `core.sampler.sample` as one graph, (B,)."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        scores = mx.where(seen, mx.where(scores > 0, scores / penalty, scores * penalty), scores)
    if sampling.temp == 0:
        return mx.argmax(scores, axis=-1)
    order = mx.argsort(-scores, axis=-1)
    ranked = mx.take_along_axis(scores, order, axis=-1) / sampling.temp
    if sampling.top_k:
        ranked[:, sampling.top_k :] = -mx.inf
    p = mx.softmax(ranked, axis=-1)
    keep = mx.cumsum(p, axis=-1) - p < sampling.top_p
    keep = keep & (p >= sampling.min_p * p[:, :1])
    cumulative = mx.cumsum(mx.where(keep, p, 0.0), axis=-1)
    index = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(axis=-1)
    index = mx.minimum(index, keep.sum(axis=-1) - 1)  # rounding may carry the draw past the last one kept
    return mx.take_along_axis(order, index[:, None], axis=-1)[:, 0]


class InferenceEngine:
    """Logits and sampled tokens from one set of parameters, maybe quantized, cast once to `dtype`."""

    def __init__(
        self,
        config: GPTConfig,
        tensors: Iterable[tuple[str, np.ndarray | mx.array]],
        device: Device,
        dtype: str = "float32",
    ) -> None:
        self.config, self.device, self.dtype = config, device, DTYPES[dtype]
        keep_resident(device)
        self._load(tensors)
        self.cache: model.KVCache
        self.seen: Array

    @on_device
    def _load(self, tensors: Iterable[tuple[str, np.ndarray | mx.array]]) -> None:
        self.params = {name: self._cast(to_device(value)) for name, value in tensors}
        self.rope = model.Rope(self.config)
        mx.eval(self.params)

    def _cast(self, value: Array) -> Array:
        """The compute dtype; a quantized matrix's words stay."""
        return value if value.dtype == mx.uint32 else value.astype(self.dtype)

    @on_device
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) ids -> (B, T, V) float32 logits, without the cache."""
        ids = to_device(check_tokens(tokens, self.config))
        x = model.hidden_states(self.params, ids, self.config, self.rope)
        return to_numpy(model.logits(x, self.params, self.config))

    @on_device
    def prefill(self, tokens: np.ndarray) -> Step:
        """Start again with (B, T) ids in the cache; the last position's logits stay on the device."""
        ids = to_device(check_tokens(tokens, self.config))
        self.cache = model.KVCache(self.config, len(ids), self.dtype)
        self.seen = mx.zeros((len(ids), self.config.vocab_size), mx.bool_)
        self.seen = mx.put_along_axis(self.seen, ids, mx.array(True), axis=1)
        for chunk in mx.split(ids, range(PREFILL_CHUNK, ids.shape[1], PREFILL_CHUNK), axis=1):
            x = model.hidden_states(self.params, chunk, self.config, self.rope, self.cache)
            mx.async_eval(x, self.cache.keys, self.cache.values)
        return Step(ids[:, -1], model.logits(x[:, -1:], self.params, self.config)[:, 0])

    @on_device
    def step(self, previous: Step, sampling: Sampling, u: np.ndarray) -> Step:
        """Sample a token for each row with the uniforms `u` (B,) and run it through the model; enqueue only."""
        draws = to_device(u.astype(np.float32))
        penalise = sampling.repetition_penalty != 1
        ids = sample(previous.logits, sampling, draws, self.seen if penalise else None)
        if penalise:
            self.seen = mx.put_along_axis(self.seen, ids[:, None], mx.array(True), axis=1)
        x = model.hidden_states(self.params, ids[:, None], self.config, self.rope, self.cache)
        step = Step(ids, model.logits(x, self.params, self.config)[:, 0])
        mx.async_eval(step.tokens, step.logits)
        return step

    def trim(self, n: int) -> None:
        """Forget the last `n` positions of the cache."""
        self.cache.offset -= n

    @on_device
    def logits(self, handle: Step) -> np.ndarray:
        """(B, V) float32 logits that follow a handle's token; waits."""
        return to_numpy(handle.logits)

    @on_device
    def read(self, handle: Step) -> np.ndarray:
        """(B,) token ids that a step sampled; waits."""
        return np.array(handle.tokens)


def module_logits(module: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """(B, T) ids -> (B, T, V) float32 logits of a model of mlx-lm's, computed in float32 on the CPU."""
    with mx.stream(mx.cpu):
        module.set_dtype(mx.float32)
        return to_numpy(module(mx.array(tokens)))
