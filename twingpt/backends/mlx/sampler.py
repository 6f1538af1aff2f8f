"""The sampler in MLX: the twin of `backends/torch/sampler.py`, tested against `core/sampler.py`."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from twingpt.backends.mlx.device import to_device
from twingpt.core.backend import Device
from twingpt.core.sampler import SamplingRows

Array = mx.array

SHORTLIST = 256  # ids that a CPU ranks where they decide: sorting 50,000 takes longer than a small model's step
NEVER = np.finfo(np.float32).tiny  # of a min_p that is off: what has not even this probability is not drawn by rounding


def penalise(logits: Array, sampling: SamplingRows, counts: Callable[[np.ndarray], Array]) -> Array:
    """`core.sampler.penalise` for each row, without leaving the device: (B, V) logits -> (B, V).

    `counts` tells how often each id stands in the rows from (B,) positions on, (B, V).
    """
    s = sampling
    if len(s.logit_bias):
        row, token, number = to_device(s.logit_bias.T)
        logits = logits.at[row.astype(mx.int32), token.astype(mx.int32)].add(number)
    if (s.repetition_penalty != 1).any():
        penalty, held = to_device(s.repetition_penalty[:, None]), counts(np.zeros_like(s.n_prompt)) > 0
        logits = mx.where(held, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    if s.presence_penalty.any() or s.frequency_penalty.any():
        presence, frequency = to_device(np.stack([s.presence_penalty, s.frequency_penalty])[..., None])
        generated = counts(s.n_prompt)
        logits = logits - presence * (generated > 0) - frequency * generated
    return logits


def sample(logits: Array, sampling: SamplingRows, u: np.ndarray, device: Device) -> Array:
    """`core.sampler.sample` for each row of (B, V) logits that are penalised already, `u` (B,) -> (B,) ids.

    An id is -1 where logits are not finite, as after an overflow in half precision. Never waits for a GPU. A CPU,
    where nothing is to be waited for, looks whether the SHORTLIST decides, and ranks the others only where it doesn't:
    the ids are the same.
    """
    s, V = sampling, logits.shape[-1]
    if not s.temp.any():
        return greedy_ids(logits)
    temp, top_k = np.where(s.temp == 0, 1, s.temp), np.where(s.top_k == 0, V, s.top_k)
    top_p, min_p = np.where(s.top_p == 1, np.inf, s.top_p), np.maximum(s.min_p, NEVER)
    some, every = top_k < V, (top_k >= V) & (top_p > 1) & (min_p <= NEVER)
    numbers = to_device(np.stack([temp, top_k, top_p, min_p, u]).astype(np.float32)[..., None])
    kinds = to_device(np.stack([s.temp == 0, some, every])[..., None])
    mass = _mass((logits - logits.max(axis=-1, keepdims=True)) / numbers[0], device)
    if device.kind == "cpu" and V > 4 * SHORTLIST:
        ranked, order = largest(logits, SHORTLIST + 1)
        index, decided = _draw(ranked[:, :-1], mass, numbers, kinds)
        decided = decided & (mx.take_along_axis(ranked, index, axis=-1) > ranked[:, -1:])
        if decided.all():  # it would not be if it may have left out a lower, equal id
            return _finite(mx.take_along_axis(order, index, axis=-1), mass)
    order = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    return _finite(mx.take_along_axis(order, _draw(ranked, mass, numbers, kinds)[0], axis=-1), mass)


def greedy_ids(logits: Array) -> Array:
    """The likeliest id of each row, (B, V) -> (B,), or -1 where its logit is not finite."""
    ids = mx.argmax(logits, axis=-1).astype(mx.int32)
    top = mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return mx.where(mx.isfinite(top), ids, -1)


def _finite(ids: Array, mass: Array) -> Array:
    """(B, 1) ids as (B,), -1 where a logit of the row is NaN or infinite, which makes its `mass` NaN."""
    return mx.where(mx.isnan(mass), -1, ids.astype(mx.int32))[:, 0]


def _mass(x: Array, device: Device) -> Array:
    """The sum of exp(x) over each row, (B, V) -> (B, 1); on a CPU by NumPy, whose exp takes a tenth of MLX's time."""
    if device.kind == "cpu":
        return to_device(np.exp(np.array(x)).sum(-1, keepdims=True))
    return mx.exp(x).sum(axis=-1, keepdims=True)


def _draw(ranked: Array, mass: Array, numbers: Array, kinds: Array) -> tuple[Array, Array]:
    """Inverse CDF over a row's n largest logits, falling: (B, n) -> indices (B, 1), and whether the rest matters not.

    `mass` (B, 1) sums exp((logit - largest) / temp) over all. `kinds` tells the rows that are greedy, that draw from
    `some` ids by their number, and from `every` id. No number here depends on n where the rest doesn't matter.
    """
    temp, top_k, top_p, min_p, u = numbers
    greedy, some, every = kinds
    n = ranked.shape[-1]
    p = mx.exp((ranked - ranked[:, :1]) / temp)
    p = mx.where(mx.arange(n) >= top_k, 0.0, p)
    reached = mx.cumsum(p, axis=-1)
    mass = mx.where(some, reached[:, -1:], mass)
    below = (reached < top_p * mass).sum(axis=-1, keepdims=True)  # and the one that reaches it is kept
    n_kept = mx.minimum(below + 1, (p >= min_p).sum(axis=-1, keepdims=True))
    last = mx.maximum(n_kept - 1, 0)  # NaN keeps none
    end = u * mx.where(every, mass, mx.take_along_axis(reached, last, axis=-1))
    index = mx.minimum((reached <= end).sum(axis=-1, keepdims=True), last)  # rounding may carry u past it
    decided = mx.where(some, top_k <= n, mx.where(every, end < reached[:, -1:], n_kept < n))
    return mx.where(greedy, 0, index), decided | greedy


def largest(logits: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest of each row and their ids, falling, the lower id first among equals: (…, V) -> (…, k) each."""
    ids = mx.sort(mx.argpartition(-logits, k - 1, axis=-1)[..., :k], axis=-1)
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return mx.take_along_axis(values, order, axis=-1), mx.take_along_axis(ids, order, axis=-1)


def log_probs_of(logits: Array, ids: Array, k: int) -> tuple[Array, Array | None, Array | None]:
    """Log-probabilities of (B,) ids by (B, V) logits, before any setting of the sampler, (B,).

    And those of the `k` likeliest ids, and these ids, (B, k); None where k is 0.
    """
    log_z = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = (mx.take_along_axis(logits, ids[:, None], axis=-1) - log_z)[:, 0]
    if not k:
        return chosen, None, None
    values, top_ids = largest(logits, k)
    return chosen, values - log_z, top_ids
