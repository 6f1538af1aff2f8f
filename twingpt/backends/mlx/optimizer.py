"""Gradient clipping, AdamW and Muon in MLX: the twin of `backends/torch/optimizer.py`."""

from __future__ import annotations

import mlx.core as mx

from twingpt.core.parameters import OptimizerPlan
from twingpt.core.schedule import LOSS_SCALE_INTERVAL, LOSS_SCALE_LARGEST, RATES, Hyper

Array = mx.array
Parameters = dict[str, mx.array]

# The quintic a x + b x^3 + c x^5 whose iteration drives singular values to about 1 (Jordan et al. 2024).
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5


def clip_gradients(grads: Parameters, h: Hyper, divisor: Array) -> tuple[Parameters, Array]:
    """Gradients over `divisor`, scaled so that their joint norm is at most h.grad_clip; and that norm before."""
    total = mx.sqrt(mx.stack([mx.square(g).sum() for g in grads.values()]).sum()) / divisor
    scale = mx.minimum(h.grad_clip / (total + 1e-6), 1.0) / divisor
    return {name: g * scale for name, g in grads.items()}, total


def skip_unless(finite: Array, grads: Parameters, h: Hyper) -> tuple[Parameters, Hyper]:
    """The gradients and hyperparameters as they are, or, unless `finite`, such that a step moves nothing."""
    grads = {name: mx.where(finite, g, 0.0) for name, g in grads.items()}
    return grads, h._replace(**{rate: getattr(h, rate) * finite for rate in RATES})


def rescale(scale: Array, steps: Array, finite: Array) -> tuple[Array, Array]:
    """The loss scale after a step, and how many it has fitted: halved when it was too large, else doubled in time."""
    steps = mx.where(finite, steps + 1, 0.0)
    grown = mx.where(steps >= LOSS_SCALE_INTERVAL, mx.minimum(scale * 2, LOSS_SCALE_LARGEST), scale)
    return mx.where(finite, grown, scale / 2), mx.where(steps >= LOSS_SCALE_INTERVAL, 0.0, steps)


def adamw(p: Array, g: Array, m: Array, v: Array, h: Hyper, rate: Array, decays: bool) -> tuple[Array, Array, Array]:
    """One step of AdamW (Loshchilov & Hutter 2019) in torch's formula, all in float32: new p, m and v."""
    if decays:
        p = p * (1 - rate * h.weight_decay)
    m = m + (g - m) * h.one_minus_beta1
    v = v + (g * g - v) * h.one_minus_beta2
    p = p - rate / h.bias_correction1 * m / (mx.sqrt(v / h.bias_correction2) + h.eps)
    return p, m, v


def orthogonalise(x: Array, dtype: mx.Dtype) -> Array:
    """The nearest matrices with singular values of about 1, by Newton-Schulz steps in `dtype`; (n, r, c), r <= c.

    The norm is taken in float32: in bfloat16 it can overflow.
    """
    a, b, c = NEWTON_SCHULZ
    x = (x / (mx.sqrt(mx.square(x).sum((-2, -1), keepdims=True)) + 1e-7)).astype(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = x @ x.swapaxes(-2, -1)
        x = mx.addmm(x, mx.addmm(s, s, s, alpha=c, beta=b), x, beta=a)  # a x + (b s + c s^2) x
    return x.astype(mx.float32)


def muon(
    names: tuple[str, ...], params: Parameters, grads: Parameters, state: Parameters, h: Hyper, dtype: mx.Dtype
) -> None:
    """One step of Muon (Jordan et al. 2024) with Nesterov momentum on matrices of one shape up to turning.

    Replaces the entries of `params` and `state`.
    """
    updates = []
    for name in names:
        g, m = grads[name], state[f"muon.momentum.{name}"]
        m = m + (g - m) * h.one_minus_momentum
        state[f"muon.momentum.{name}"] = m
        update = g + (m - g) * h.momentum
        updates.append(update.T if update.shape[0] > update.shape[1] else update)
    for name, update in zip(names, orthogonalise(mx.stack(updates), dtype), strict=True):
        p = params[name]
        rows, columns = p.shape
        p = p * (1 - h.matrix_lr * h.weight_decay)
        p = p - h.matrix_lr * max(1.0, rows / columns) ** 0.5 * (update.T if rows > columns else update)
        params[name] = p


def optimizer_step(
    params: Parameters,
    grads: Parameters,
    state: Parameters,
    h: Hyper,
    count: Array,
    plan: OptimizerPlan,
    dtype: mx.Dtype,
    guarded: bool,
) -> tuple[Parameters, Parameters, Array, Array]:
    """Clip, then step every parameter as `plan` says: (params, state, gradient norm, 1 if skipped).

    `grads` are sums over `count` micro-batches, times the loss scale where `state` has one. `state` holds
    adamw.m.NAME, adamw.v.NAME and muon.momentum.NAME; `h` and `count` hold 0-D arrays on the device; Muon
    orthogonalises in `dtype`. `guarded` leaves all as it was when the norm is not finite.
    The dictionaries given are left as they were.
    """
    params, state = dict(params), dict(state)
    scale = state.get("loss_scale")
    grads, total = clip_gradients(grads, h, count if scale is None else count * scale)
    finite = mx.isfinite(total)
    if guarded:
        grads, h = skip_unless(finite, grads, h)
    if scale is not None:
        state["loss_scale"], state["loss_scale.steps"] = rescale(scale, state["loss_scale.steps"], finite)
    for name, group in plan.adamw.items():
        m, v, rate = f"adamw.m.{name}", f"adamw.v.{name}", getattr(h, f"{group}_lr")
        step = adamw(params[name], grads[name], state[m], state[v], h, rate, name in plan.decays)
        params[name], state[m], state[v] = step
    for names in plan.muon:
        muon(names, params, grads, state, h, dtype)
    return params, state, total, 1.0 - finite
