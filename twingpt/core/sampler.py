"""The sampler in NumPy: the spec of the ones that run on the devices (`backends/*/sampler.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.reference import softmax

Array = np.ndarray


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, in transformers' order; the names are mlx-lm's. Raises UserError for one out of range.

    `temp` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    """

    temp: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int if name == "top_k" else (int, float)):
                raise UserError(f"{name} must be a {'whole ' * (name == 'top_k')}number, and is {value!r:.60}.")
        checks = (
            (self.temp == 0 or 1e-3 <= self.temp <= 1e3, "temp", "0 (greedy) or from 0.001 to 1000"),
            (0 <= self.top_k < 2**31, "top_k", "at least 0 (0 is off)"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1] (1 is off)"),
            (0 <= self.min_p <= 1, "min_p", "in [0, 1] (0 is off)"),
            (0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "from 0.01 to 100 (1 is off)"),
        )
        for fine, name, rule in checks:
            if not fine:
                raise UserError(f"{name} must be {rule}, and is {getattr(self, name)}.")


class SamplingRows:
    """Sampling settings of a batch's rows: (rows,) float32 arrays under the names of `Sampling`."""

    def __init__(self, settings: Sequence[Sampling]) -> None:
        numbers = np.array([astuple(setting) for setting in settings], np.float32).T
        self.temp, self.top_k, self.top_p, self.min_p, self.repetition_penalty = numbers


def sample(logits: Array, sampling: Sampling, u: float, seen: Array | None = None) -> int:
    """Sample an id from `logits` (V,) with the uniform `u` in [0, 1); `seen` (V,) booleans are the tokens so far.

    Repetition penalty (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al.
    2024), then the inverse CDF over ids sorted by falling probability, the lower id first among equals.
    """
    logits = np.asarray(logits, np.float64)
    if sampling.repetition_penalty != 1 and seen is not None:
        penalised = np.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = np.where(seen, penalised, logits)
    if sampling.temp == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order] / sampling.temp
    keep = np.arange(len(ranked)) < (sampling.top_k or len(ranked))
    p = softmax(np.where(keep, ranked, -np.inf))
    keep &= p.cumsum() - p < sampling.top_p
    keep &= p >= sampling.min_p * p[0]
    cumulative = np.where(keep, p, 0.0).cumsum()
    return int(order[np.searchsorted(cumulative, u * cumulative[-1], side="right")])
