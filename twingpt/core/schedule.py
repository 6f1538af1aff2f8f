"""The schedules: learning rate, momentum and weight decay as pure functions of the step number."""

from __future__ import annotations

import math
from typing import NamedTuple

from twingpt.core.config import TrainConfig

MOMENTUM_AT_START = 0.85


class Hyper(NamedTuple):
    """Hyperparameters of one optimizer step; a backend puts them on the device as one float32 array, in this order.

    1 - beta and the bias corrections are computed here, in float64: in float32 they would be off in the fifth digit.
    The `_lr` are those of the parameter groups (`core/parameters.py`); norms and biases are vectors.
    """

    matrix_lr: float
    embedding_lr: float
    head_lr: float
    vector_lr: float
    weight_decay: float
    one_minus_beta1: float
    one_minus_beta2: float
    bias_correction1: float
    bias_correction2: float
    eps: float
    momentum: float
    one_minus_momentum: float
    grad_clip: float


# With these at 0 an optimizer step changes no parameter and no state: how a step is skipped without a host sync.
RATES = (
    "matrix_lr", "embedding_lr", "head_lr", "vector_lr", "one_minus_beta1", "one_minus_beta2", "one_minus_momentum",
)  # fmt: skip
# Dynamic loss scaling in float16, with the defaults of torch's GradScaler but a largest scale.
LOSS_SCALE_START, LOSS_SCALE_LARGEST, LOSS_SCALE_INTERVAL = 2.0**16, 2.0**24, 2000


def learning_rate_factor(train: TrainConfig, step: int) -> float:
    """The factor on every learning rate at `step`: linear warmup over `warmup_iters`, then `lr_schedule`.

    `cosine` over the rest of the run, or `wsd` (warmup-stable-decay, Hu et al. 2024) over its last
    `warmdown_fraction`, decay to min_lr / learning_rate.
    """
    if step < train.warmup_iters:
        return (step + 1) / (train.warmup_iters + 1)
    floor = train.min_lr / train.learning_rate if train.learning_rate else 0.0
    if train.lr_schedule == "cosine":
        span = max(1.0, train.max_iters - train.warmup_iters)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - train.warmup_iters) / span)))
    elif train.lr_schedule == "wsd":
        span = max(1.0, train.warmdown_fraction * train.max_iters)
        left = min(1.0, max(0.0, (train.max_iters - step) / span))
    else:
        return 1.0
    return floor + left * (1 - floor)


def momentum(train: TrainConfig, step: int) -> float:
    """Muon's momentum: linear warmup from 0.85 to `momentum` over `momentum_warmup_iters` (modded-nanogpt)."""
    share = min(1.0, step / train.momentum_warmup_iters) if train.momentum_warmup_iters else 1.0
    start = min(MOMENTUM_AT_START, train.momentum)
    return start + share * (train.momentum - start)


def weight_decay(train: TrainConfig, step: int) -> float:
    """Weight decay at `step`: constant, or linear to 0 at `max_iters` with `decay_weight_decay`."""
    left = max(0.0, 1 - step / train.max_iters) if train.decay_weight_decay else 1.0
    return train.weight_decay * left


def hyperparameters(train: TrainConfig, step: int) -> Hyper:
    """The hyperparameters of optimizer step `step`, counted from 0."""
    factor, rate, mu = learning_rate_factor(train, step), train.learning_rate, momentum(train, step)
    return Hyper(
        matrix_lr=factor * (train.matrix_lr if train.optimizer == "muon" else rate),
        embedding_lr=factor * (rate if train.embedding_lr is None else train.embedding_lr),
        head_lr=factor * (rate if train.head_lr is None else train.head_lr),
        vector_lr=factor * rate,
        weight_decay=weight_decay(train, step),
        one_minus_beta1=1 - train.beta1,
        one_minus_beta2=1 - train.beta2,
        bias_correction1=1 - train.beta1 ** (step + 1),
        bias_correction2=1 - train.beta2 ** (step + 1),
        eps=train.adam_eps,
        momentum=mu,
        one_minus_momentum=1 - mu,
        grad_clip=train.grad_clip or math.inf,
    )
