"""Gradient clipping and AdamW in PyTorch: the twin of `backends/mlx/optimizer.py`."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from twingpt.core.schedule import Hyper

Array = Tensor
Parameters = dict[str, Tensor]


def clip_gradients(grads: Parameters, h: Hyper) -> tuple[Parameters, Array]:
    """Scale all gradients so that their joint norm is at most h.grad_clip; and that norm."""
    total = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    scale = torch.clamp(h.grad_clip / (total + 1e-6), max=1.0)
    return {name: g * scale for name, g in grads.items()}, total


def adamw(p: Array, g: Array, m: Array, v: Array, h: Hyper, decays: bool) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019) in torch's formula, all in float32, in place."""
    if decays:
        p.mul_(1 - h.learning_rate * h.weight_decay)
    m.add_((g - m) * h.one_minus_beta1)
    v.add_((g * g - v) * h.one_minus_beta2)
    p.sub_(h.learning_rate / h.bias_correction1 * m / ((v / h.bias_correction2).sqrt_().add_(h.eps)))


def adamw_step(
    params: Parameters, grads: Parameters, state: Parameters, h: Hyper, decays: Collection[str]
) -> tuple[Parameters, Parameters, Array]:
    """Clip, then step every parameter: (params, state, gradient norm).

    `state` holds adamw.m.NAME and adamw.v.NAME; `h` holds 0-D arrays on the device; `decays` names the
    parameters that weight decay applies to. The arrays are updated in place and returned.
    """
    grads, total = clip_gradients(grads, h)
    for name, p in params.items():
        adamw(p, grads[name], state[f"adamw.m.{name}"], state[f"adamw.v.{name}"], h, name in decays)
    return params, state, total
