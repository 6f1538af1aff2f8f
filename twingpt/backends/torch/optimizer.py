"""Gradient clipping, AdamW and Muon in PyTorch: the twin of `backends/mlx/optimizer.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from twingpt.core.parameters import OptimizerPlan
from twingpt.core.schedule import LOSS_SCALE_INTERVAL, LOSS_SCALE_LARGEST, RATES, Hyper

Array = Tensor
Parameters = dict[str, Tensor]

# The quintic a x + b x^3 + c x^5 whose iteration drives singular values to about 1 (Jordan et al. 2024).
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5


def clip_gradients(grads: Parameters, h: Hyper, divisor: Array) -> tuple[Parameters, Array]:
    """Gradients over `divisor`, scaled so that their joint norm is at most h.grad_clip; and that norm before."""
    norms = torch.stack([torch.linalg.vector_norm(g) for g in grads.values()])  # one pass over each
    total = torch.linalg.vector_norm(norms) / divisor
    scale = torch.clamp(h.grad_clip / (total + 1e-6), max=1.0) / divisor
    return {name: g * scale for name, g in grads.items()}, total


def skip_unless(finite: Array, grads: Parameters, h: Hyper) -> tuple[Parameters, Hyper]:
    """The gradients and hyperparameters as they are, or, unless `finite`, such that a step moves nothing."""
    grads = {name: torch.where(finite, g, 0.0) for name, g in grads.items()}
    return grads, h._replace(**{rate: getattr(h, rate) * finite for rate in RATES})


def rescale(scale: Array, steps: Array, finite: Array) -> tuple[Array, Array]:
    """The loss scale after a step, and how many it has fitted: halved when it was too large, else doubled in time."""
    steps = torch.where(finite, steps + 1, 0.0)
    grown = torch.where(steps >= LOSS_SCALE_INTERVAL, torch.clamp(scale * 2, max=LOSS_SCALE_LARGEST), scale)
    return torch.where(finite, grown, scale / 2), torch.where(steps >= LOSS_SCALE_INTERVAL, 0.0, steps)


def adamw(p: Array, g: Array, m: Array, v: Array, h: Hyper, rate: Array, decays: bool) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019) in torch's formula, all in float32, in place."""
    if decays:
        p.mul_(1 - rate * h.weight_decay)
    m.lerp_(g, h.one_minus_beta1)
    v.lerp_(g * g, h.one_minus_beta2)
    p.addcdiv_(m * (-rate / h.bias_correction1), (v / h.bias_correction2).sqrt_().add_(h.eps))


def orthogonalise(x: Array, dtype: torch.dtype) -> Array:
    """The nearest matrices with singular values of about 1, by Newton-Schulz steps in `dtype`; (n, r, c), r <= c.

    The norm is taken in float32: in bfloat16 it can overflow.
    """
    a, b, c = NEWTON_SCHULZ
    x = (x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)  # a x + (b s + c s^2) x
    return x.float()


def muon(
    names: tuple[str, ...], params: Parameters, grads: Parameters, state: Parameters, h: Hyper, dtype: torch.dtype
) -> None:
    """One step of Muon (Jordan et al. 2024) with Nesterov momentum on matrices of one shape up to turning, in place."""
    updates = []
    for name in names:
        g, m = grads[name], state[f"muon.momentum.{name}"]
        m.add_((g - m) * h.one_minus_momentum)
        update = g + (m - g) * h.momentum
        updates.append(update.mT if update.shape[0] > update.shape[1] else update)
    for name, update in zip(names, orthogonalise(torch.stack(updates), dtype).unbind(), strict=True):
        p = params[name]
        rows, columns = p.shape
        p.mul_(1 - h.matrix_lr * h.weight_decay)
        p.sub_(h.matrix_lr * max(1.0, rows / columns) ** 0.5 * (update.mT if rows > columns else update))


def optimizer_step(
    params: Parameters,
    grads: Parameters,
    state: Parameters,
    h: Hyper,
    count: Array,
    plan: OptimizerPlan,
    dtype: torch.dtype,
    guarded: bool,
) -> tuple[Parameters, Parameters, Array, Array]:
    """Clip, then step every parameter as `plan` says: (params, state, gradient norm, 1 if skipped).

    `grads` are sums over `count` micro-batches, times the loss scale where `state` has one. `state` holds
    adamw.m.NAME, adamw.v.NAME and muon.momentum.NAME; `h` and `count` hold 0-D arrays on the device; Muon
    orthogonalises in `dtype`. `guarded` leaves all as it was when the norm is not finite.
    The arrays are updated in place and returned.
    """
    scale = state.get("loss_scale")
    grads, total = clip_gradients(grads, h, count if scale is None else count * scale)
    finite = torch.isfinite(total)
    if guarded:
        grads, h = skip_unless(finite, grads, h)
    if scale is not None:
        state["loss_scale"], state["loss_scale.steps"] = rescale(scale, state["loss_scale.steps"], finite)
    for name, group in plan.adamw.items():
        m, v = state[f"adamw.m.{name}"], state[f"adamw.v.{name}"]
        adamw(params[name], grads[name], m, v, h, getattr(h, f"{group}_lr"), name in plan.decays)
    for names in plan.muon:
        muon(names, params, grads, state, h, dtype)
    return params, state, total, 1.0 - finite.float()
