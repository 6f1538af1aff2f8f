"""The sampler in NumPy: the spec of the ones that run on the devices (`backends/*/sampler.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.reference import softmax

Array = np.ndarray


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, in transformers' order; the names are mlx-lm's. Raises UserError for one out of range.

    `temp` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1 and the other penalties at 0 are off.
    `logit_bias` is added to the logits of ids.
    """

    temp: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in [*vars(self).items()][:-1]:
            if isinstance(value, bool) or not isinstance(value, Integral if name == "top_k" else Real):
                raise UserError(f"{name} must be a {'whole ' * (name == 'top_k')}number, and is {value!r:.60}.")
        biases = self.logit_bias if isinstance(self.logit_bias, Mapping) else {-1: 0}
        are_biases = bool not in map(type, [*biases, *biases.values()]) and all(
            isinstance(token, Integral) and token >= 0 and isinstance(number, Real) and abs(number) <= 100
            for token, number in biases.items()
        )
        checks = (
            (self.temp == 0 or 1e-3 <= self.temp <= 1e3, "temp", "0 (greedy) or from 0.001 to 1000"),
            (0 <= self.top_k < 2**31, "top_k", "at least 0 (0 is off)"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1] (1 is off)"),
            (0 <= self.min_p <= 1, "min_p", "in [0, 1] (0 is off)"),
            (0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "from 0.01 to 100 (1 is off)"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty", "from -2 to 2 (0 is off)"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty", "from -2 to 2 (0 is off)"),
            (are_biases, "logit_bias", "numbers from -100 to 100 by token id"),
        )
        for fine, name, rule in checks:
            if not fine:
                raise UserError(f"{name} must be {rule}, and is {getattr(self, name)!r:.60}.")


class SamplingRows:
    """Sampling settings of a batch's rows: (rows,) float32 arrays under the names of `Sampling`.

    `logit_bias` (n, 3) has the row, the id and the number of each bias. `n_prompt` (rows,) are the positions in front
    that count as prompt, of those that a row of the KV cache holds: what stands behind them is generated.
    """

    def __init__(self, settings: Sequence[Sampling], n_prompt: Sequence[int] | None = None) -> None:
        numbers = np.array([[*vars(setting).values()][:-1] for setting in settings], np.float32).T
        self.temp, self.top_k, self.top_p, self.min_p, self.repetition_penalty, *others = numbers
        self.presence_penalty, self.frequency_penalty = others
        bias = [(row, *item) for row, setting in enumerate(settings) for item in setting.logit_bias.items()]
        self.logit_bias = np.array(bias, np.float32).reshape(-1, 3)
        self.n_prompt = np.array(n_prompt or [0] * len(settings), np.int64)


def penalise(logits: Array, sampling: Sampling, tokens: Sequence[int], n_prompt: int) -> Array:
    """Add the logit bias, then penalise the ids of a text: (V,) logits after `tokens`, the first of them a prompt.

    The repetition penalty (Keskar et al. 2019) is for every id of the text, presence and frequency penalty (OpenAI's)
    for those that were generated: all but the first `n_prompt`.
    """
    logits = np.array(logits, np.float64)
    for token, number in sampling.logit_bias.items():
        logits[token] += number
    ids, penalty = np.asarray(tokens, np.int64), sampling.repetition_penalty
    held, generated = (np.bincount(part, minlength=len(logits)) for part in (ids, ids[n_prompt:]))
    logits = np.where(held > 0, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits - (sampling.presence_penalty * (generated > 0) + sampling.frequency_penalty * generated)


def sample(logits: Array, sampling: Sampling, u: float, tokens: Sequence[int] = (), n_prompt: int = 0) -> int:
    """Sample an id from `logits` (V,) with the uniform `u` in [0, 1); `tokens` and `n_prompt` are as in `penalise`.

    Logit bias and penalties, temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024), then the
    inverse CDF over ids sorted by falling probability, the lower id first among equals.
    """
    logits = penalise(logits, sampling, tokens, n_prompt)
    if sampling.temp == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order] / sampling.temp
    keep = np.arange(len(ranked)) < (sampling.top_k or len(ranked))
    p = softmax(np.where(keep, ranked, -np.inf))
    keep &= (p.cumsum() - p < sampling.top_p) & (p >= sampling.min_p * p[0])
    cumulative = np.where(keep, p, 0.0).cumsum()
    return int(order[np.searchsorted(cumulative, u * cumulative[-1], side="right")])
