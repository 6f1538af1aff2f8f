"""The sampler in PyTorch: the twin of `backends/mlx/sampler.py`, tested against `core/sampler.py`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twingpt.backends.torch.device import to_device
from twingpt.core.backend import Device
from twingpt.core.sampler import SamplingRows

Array = Tensor


def sample(logits: Array, sampling: SamplingRows, u: np.ndarray, seen: Array | None, device: Device) -> Array:
    """`core.sampler.sample` for each row, without leaving the device: (B, V) logits, `u` (B,) -> (B,) ids.

    `seen` (B, V) booleans are the ids that a repetition penalty counts as repeated; None where no row has one. An id
    is -1 where logits are not finite, as after an overflow in half precision.
    """
    s = sampling
    greedy = not s.temp.any()
    if greedy and seen is None:
        return greedy_ids(logits)
    numbers = np.stack([s.temp, s.top_k, s.top_p, s.min_p, s.repetition_penalty, u]).astype(np.float32)
    temp, top_k, top_p, min_p, penalty, uniform = to_device(numbers[..., None], device)
    if seen is not None:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if greedy:
        return greedy_ids(logits)
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    ranked = ranked / torch.where(temp == 0, 1.0, temp)
    if s.top_k.any():
        rank = torch.arange(logits.shape[-1], device=logits.device)
        ranked = ranked.masked_fill((rank >= top_k) & (top_k > 0), -torch.inf)
    p = torch.softmax(ranked, dim=-1)
    keep = p.cumsum(-1) - p < top_p
    keep &= p >= min_p * p[:, :1]
    cumulative = torch.where(keep, p, 0.0).cumsum(-1)
    index = (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = keep.sum(-1, keepdim=True) - 1  # rounding may carry u past it; NaN keeps none
    index = torch.minimum(index, last).clamp_min(0)
    ids = order.gather(-1, torch.where(temp == 0, 0, index))
    return torch.where(p[:, :1].isnan(), -1, ids)[:, 0]  # one NaN or infinity makes all of p NaN


def greedy_ids(logits: Array) -> Array:
    """The likeliest id of each row, (B, V) -> (B,), or -1 where its logit is not finite."""
    ids = logits.argmax(-1)
    top = logits.gather(-1, ids[:, None])[:, 0]
    return torch.where(top.isfinite(), ids, -1)


def log_prob(logits: Array, ids: Array) -> Array:
    """Log-probabilities of (B,) ids by (B, V) logits, before any setting of the sampler, (B,)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, None])[:, 0]
