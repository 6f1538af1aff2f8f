"""Gradient clipping, AdamW and Muon in MLX: the twin of `backends/torch/optimizer.py`."""

from __future__ import annotations

import mlx.core as mx

from twingpt.core.parameters import OptimizerPlan
from twingpt.core.schedule import LOSS_SCALE_INTERVAL, LOSS_SCALE_LARGEST, RATES, Hyper

Array = mx.array
Parameters = dict[str, mx.array]

# The quintic a x + b x^3 + c x^5, whose iteration drives all singular values to about 1 (Jordan et al. 2024).
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5


def clip_gradients(grads: Parameters, h: Hyper, divisor: Array) -> tuple[Parameters, Array]:
    """Global-norm clipping of gradients / `divisor` to h.grad_clip; returns their norm before it too."""
    norm = mx.sqrt(mx.stack([mx.square(g).sum() for g in grads.values()]).sum()) / divisor
    scale = mx.minimum(h.grad_clip / (norm + 1e-6), 1.0) / divisor
    return {name: g * scale for name, g in grads.items()}, norm


def skip_unless(finite: Array, grads: Parameters, h: Hyper) -> tuple[Parameters, Hyper]:
    """Unless `finite`, zero the gradients and the rates, so that the step changes nothing; without a host sync."""
    grads = {name: mx.where(finite, g, 0.0) for name, g in grads.items()}
    return grads, h._replace(**{rate: getattr(h, rate) * finite for rate in RATES})


def update_loss_scale(scale: Array, steps: Array, finite: Array) -> tuple[Array, Array]:
    """Dynamic loss scaling, as torch's GradScaler: halved after an overflow, doubled after LOSS_SCALE_INTERVAL steps.

    `steps` are those since the last change; returns both, updated.
    """
    steps = mx.where(finite, steps + 1, 0.0)
    grown = mx.where(steps >= LOSS_SCALE_INTERVAL, mx.minimum(scale * 2, LOSS_SCALE_LARGEST), scale)
    return mx.where(finite, grown, scale / 2), mx.where(steps >= LOSS_SCALE_INTERVAL, 0.0, steps)


def adamw(p: Array, g: Array, m: Array, v: Array, h: Hyper, lr: Array, *, decay: bool) -> tuple[Array, Array, Array]:
    """One step of AdamW (Loshchilov & Hutter 2019) in torch's formula, all in float32: new p, m and v."""
    if decay:
        p = p * (1 - lr * h.weight_decay)
    m = m + (g - m) * h.one_minus_beta1
    v = v + (g * g - v) * h.one_minus_beta2
    p = p - lr / h.bias_correction1 * m / (mx.sqrt(v / h.bias_correction2) + h.eps)
    return p, m, v


def orthogonalise(x: Array, dtype: mx.Dtype) -> Array:
    """Newton-Schulz: (n, r, c) matrices, r <= c, to their nearest with singular values of about 1; steps in `dtype`.

    The norm is taken in float32: in float16 its squares can overflow.
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
    """One step of Muon (Jordan et al. 2024) with Nesterov momentum on matrices of one shape up to transposition.

    Updates the entries of `params` and `state`.
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
    divisor: Array,
    *,
    plan: OptimizerPlan,
    dtype: mx.Dtype,
    skip_nonfinite: bool,
) -> tuple[Parameters, Parameters, Array, Array]:
    """Clip, then step every parameter by AdamW or Muon as `plan` says: (params, state, gradient norm, 1 if skipped).

    `grads` are means times `divisor`, and times the loss scale where `state` has one. `state` has the names of
    `core.parameters.state_table`. `h` and `divisor` hold 0-D arrays on the device, so that a compiled step
    serves every step. `skip_nonfinite` skips the step when the norm is not finite. Muon orthogonalises in `dtype`.
    The dictionaries passed in are not changed, nor are their arrays.
    """
    params, state = dict(params), dict(state)
    scale = state.get("loss_scale")
    grads, grad_norm = clip_gradients(grads, h, divisor if scale is None else divisor * scale)
    finite = mx.isfinite(grad_norm)
    if skip_nonfinite:
        grads, h = skip_unless(finite, grads, h)
    if scale is not None:
        state["loss_scale"], state["loss_scale.steps"] = update_loss_scale(scale, state["loss_scale.steps"], finite)
    for name, group in plan.adamw.items():
        m, v, lr = f"adamw.m.{name}", f"adamw.v.{name}", getattr(h, f"{group}_lr")
        params[name], state[m], state[v] = adamw(
            params[name], grads[name], state[m], state[v], h, lr, decay=name in plan.decays
        )
    for names in plan.muon:
        muon(names, params, grads, state, h, dtype)
    return params, state, grad_norm, 1.0 - finite
