"""The sampler in MLX: the twin of `backends/torch/sampler.py`, tested against `core/sampler.py`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from twingpt.backends.mlx.device import to_device
from twingpt.core.sampler import SamplingRows

Array = mx.array


def sample(logits: Array, sampling: SamplingRows, u: np.ndarray, seen: Array | None) -> Array:
    """`core.sampler.sample` for each row, without leaving the device: (B, V) logits, `u` (B,) -> (B,) ids.

    `seen` (B, V) booleans are the ids that a repetition penalty counts as repeated; None where no row has one. An id
    is -1 where logits are not finite, as after an overflow in half precision.
    """
    s = sampling
    greedy = not s.temp.any()
    if greedy and seen is None:
        return greedy_ids(logits)
    numbers = np.stack([s.temp, s.top_k, s.top_p, s.min_p, s.repetition_penalty, u]).astype(np.float32)
    temp, top_k, top_p, min_p, penalty, uniform = to_device(numbers[..., None])
    if seen is not None:
        logits = mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    if greedy:
        return greedy_ids(logits)
    order = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    ranked = ranked / mx.where(temp == 0, 1.0, temp)
    if s.top_k.any():
        rank = mx.arange(logits.shape[-1])
        ranked = mx.where((rank >= top_k) & (top_k > 0), -mx.inf, ranked)
    p = mx.softmax(ranked, axis=-1)
    keep = mx.cumsum(p, axis=-1) - p < top_p
    keep = keep & (p >= min_p * p[:, :1])
    cumulative = mx.cumsum(mx.where(keep, p, 0.0), axis=-1)
    index = (cumulative <= uniform * cumulative[:, -1:]).sum(axis=-1, keepdims=True)
    last = keep.sum(axis=-1, keepdims=True) - 1  # rounding may carry u past it; NaN keeps none
    index = mx.maximum(mx.minimum(index, last), 0)
    ids = mx.take_along_axis(order, mx.where(temp == 0, 0, index), axis=-1).astype(mx.int32)
    return mx.where(mx.isnan(p[:, :1]), -1, ids)[:, 0]  # one NaN or infinity makes all of p NaN


def greedy_ids(logits: Array) -> Array:
    """The likeliest id of each row, (B, V) -> (B,), or -1 where its logit is not finite."""
    ids = mx.argmax(logits, axis=-1).astype(mx.int32)
    top = mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return mx.where(mx.isfinite(top), ids, -1)


def log_prob(logits: Array, ids: Array) -> Array:
    """Log-probabilities of (B,) ids by (B, V) logits, before any setting of the sampler, (B,)."""
    return mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
