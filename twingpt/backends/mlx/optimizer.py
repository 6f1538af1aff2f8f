"""Gradient clipping and AdamW in MLX: the twin of `backends/torch/optimizer.py`."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx

from twingpt.core.schedule import Hyper

Array = mx.array
Parameters = dict[str, mx.array]


def clip_gradients(grads: Parameters, h: Hyper) -> tuple[Parameters, Array]:
    """Scale all gradients so that their joint norm is at most h.grad_clip; and that norm."""
    total = mx.sqrt(mx.stack([mx.square(g).sum() for g in grads.values()]).sum())
    scale = mx.minimum(h.grad_clip / (total + 1e-6), 1.0)
    return {name: g * scale for name, g in grads.items()}, total


def adamw(p: Array, g: Array, m: Array, v: Array, h: Hyper, decays: bool) -> tuple[Array, Array, Array]:
    """One step of AdamW (Loshchilov & Hutter 2019) in torch's formula, all in float32: new p, m and v."""
    if decays:
        p = p * (1 - h.learning_rate * h.weight_decay)
    m = m + (g - m) * h.one_minus_beta1
    v = v + (g * g - v) * h.one_minus_beta2
    p = p - h.learning_rate / h.bias_correction1 * m / (mx.sqrt(v / h.bias_correction2) + h.eps)
    return p, m, v


def adamw_step(
    params: Parameters, grads: Parameters, state: Parameters, h: Hyper, decays: Collection[str]
) -> tuple[Parameters, Parameters, Array]:
    """Clip, then step every parameter: (params, state, gradient norm).

    `state` holds adamw.m.NAME and adamw.v.NAME; `h` holds 0-D arrays on the device; `decays` names the
    parameters that weight decay applies to. The arrays given are left as they were.
    """
    grads, total = clip_gradients(grads, h)
    params, state = dict(params), dict(state)
    for name, p in params.items():
        m, v = f"adamw.m.{name}", f"adamw.v.{name}"
        params[name], state[m], state[v] = adamw(p, grads[name], state[m], state[v], h, name in decays)
    return params, state, total
