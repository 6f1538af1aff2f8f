"""What the optimizer uses at each step, as pure functions of the step number."""

from __future__ import annotations

import math
from typing import NamedTuple

from twingpt.core.config import TrainConfig


class Hyper(NamedTuple):
    """The numbers of one AdamW step; a backend gets them as one float32 array, in this order.

    The complements and bias corrections come ready, because 1 - beta taken in float32 would be
    off in the fifth digit.
    """

    learning_rate: float
    weight_decay: float
    one_minus_beta1: float
    one_minus_beta2: float
    bias_correction1: float
    bias_correction2: float
    eps: float
    grad_clip: float


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup_iters` steps, then cosine to `min_lr` at `max_iters`, or constant."""
    if step < train.warmup_iters:
        return train.learning_rate * (step + 1) / (train.warmup_iters + 1)
    if train.lr_schedule == "constant":
        return train.learning_rate
    span = max(1, train.max_iters - train.warmup_iters)
    progress = min(1.0, (step - train.warmup_iters) / span)
    return train.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (train.learning_rate - train.min_lr)


def hyperparameters(train: TrainConfig, step: int) -> Hyper:
    """The hyperparameters of step number `step`, counted from 0."""
    return Hyper(
        learning_rate=learning_rate(train, step),
        weight_decay=train.weight_decay,
        one_minus_beta1=1 - train.beta1,
        one_minus_beta2=1 - train.beta2,
        bias_correction1=1 - train.beta1 ** (step + 1),
        bias_correction2=1 - train.beta2 ** (step + 1),
        eps=train.adam_eps,
        grad_clip=train.grad_clip or math.inf,
    )
