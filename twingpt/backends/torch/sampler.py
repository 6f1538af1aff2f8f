"""The sampler in PyTorch: the twin of `backends/mlx/sampler.py`, tested against `core/sampler.py`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from twingpt.backends.torch.device import to_device
from twingpt.core.backend import Device
from twingpt.core.sampler import SamplingRows

Array = Tensor

SHORTLIST = 256  # ids that a CPU ranks where they decide: sorting 50,000 takes longer than a small model's step
NEVER = np.finfo(np.float32).tiny  # of a min_p that is off: what has not even this probability is not drawn by rounding


def penalise(logits: Array, sampling: SamplingRows, counts: Callable[[np.ndarray], Array], device: Device) -> Array:
    """`core.sampler.penalise` for each row, without leaving the device: (B, V) logits -> (B, V).

    `counts` tells how often each id stands in the rows from (B,) positions on, (B, V).
    """
    s = sampling
    if len(s.logit_bias):
        row, token, number = to_device(s.logit_bias.T, device)
        logits = logits.index_put((row.long(), token.long()), number.to(logits.dtype), accumulate=True)
    if (s.repetition_penalty != 1).any():
        penalty, held = to_device(s.repetition_penalty[:, None], device), counts(np.zeros_like(s.n_prompt)) > 0
        logits = torch.where(held, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if s.presence_penalty.any() or s.frequency_penalty.any():
        presence, frequency = to_device(np.stack([s.presence_penalty, s.frequency_penalty])[..., None], device)
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
    numbers = to_device(np.stack([temp, top_k, top_p, min_p, u]).astype(np.float32)[..., None], device)
    kinds = to_device(np.stack([s.temp == 0, some, every])[..., None], device)
    mass = (logits - logits.amax(-1, keepdim=True)).div_(numbers[0]).exp_().sum(-1, keepdim=True)
    if device.kind == "cpu" and V > 4 * SHORTLIST:
        ranked, order = largest(logits, SHORTLIST + 1)
        index, decided = _draw(ranked[:, :-1], mass, numbers, kinds)
        if (decided & (ranked.gather(-1, index) > ranked[:, -1:])).all():  # or it may have left out a lower, equal id
            return _finite(order.gather(-1, index), mass)
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return _finite(order.gather(-1, _draw(ranked, mass, numbers, kinds)[0]), mass)


def greedy_ids(logits: Array) -> Array:
    """The likeliest id of each row, (B, V) -> (B,), or -1 where its logit is not finite."""
    ids = logits.argmax(-1)
    top = logits.gather(-1, ids[:, None])[:, 0]
    return torch.where(top.isfinite(), ids, -1)


def _finite(ids: Array, mass: Array) -> Array:
    """(B, 1) ids as (B,), -1 where a logit of the row is NaN or infinite, which makes its `mass` NaN."""
    return torch.where(mass.isnan(), -1, ids)[:, 0]


def _draw(ranked: Array, mass: Array, numbers: Array, kinds: Array) -> tuple[Array, Array]:
    """Inverse CDF over a row's n largest logits, falling: (B, n) -> indices (B, 1), and whether the rest matters not.

    `mass` (B, 1) sums exp((logit - largest) / temp) over all. `kinds` tells the rows that are greedy, that draw from
    `some` ids by their number, and from `every` id. No number here depends on n where the rest doesn't matter.
    """
    temp, top_k, top_p, min_p, u = numbers
    greedy, some, every = kinds
    n = ranked.shape[-1]
    p = (ranked - ranked[:, :1]).div_(temp).exp_()
    p.masked_fill_(torch.arange(n, device=p.device) >= top_k, 0.0)
    reached = p.cumsum(-1)
    mass = torch.where(some, reached[:, -1:], mass)
    below = (reached < top_p * mass).sum(-1, keepdim=True)  # and the one that reaches it is kept
    n_kept = torch.minimum(below + 1, (p >= min_p).sum(-1, keepdim=True))
    last = (n_kept - 1).clamp_min(0)  # NaN keeps none
    end = u * torch.where(every, mass, reached.gather(-1, last))
    index = torch.minimum((reached <= end).sum(-1, keepdim=True), last)  # rounding may carry u past it
    decided = torch.where(some, top_k <= n, torch.where(every, end < reached[:, -1:], n_kept < n))
    return torch.where(greedy, 0, index), decided | greedy


def largest(logits: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest of each row and their ids, falling, the lower id first among equals: (…, V) -> (…, k) each."""
    ids = logits.topk(k, sorted=False).indices.sort(-1).values
    values, order = logits.gather(-1, ids).sort(stable=True, descending=True)
    return values, ids.gather(-1, order)


def log_probs_of(logits: Array, ids: Array, k: int) -> tuple[Array, Array | None, Array | None]:
    """Log-probabilities of (B,) ids by (B, V) logits, before any setting of the sampler, (B,).

    And those of the `k` likeliest ids, and these ids, (B, k); None where k is 0.
    """
    log_z = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, ids[:, None]) - log_z)[:, 0]
    if not k:
        return chosen, None, None
    values, top_ids = largest(logits, k)
    return chosen, values - log_z, top_ids
