"""RoPE (Su et al. 2021): the frequencies and their scaling, for the reference and both twins."""

from __future__ import annotations

import math

import numpy as np

from twingpt.core.config import GPTConfig, RopeScaling

Array = np.ndarray


def rope_periods(config: GPTConfig, *, local: bool = False) -> tuple[Array, float]:
    """(periods, factor): 1 / frequency of each rotated pair, (rope_dim / 2,) float32, and the factor on cos and sin.

    `local` is for the layers that rotate by `local_rope_theta`. The angle at position p is
    float32(p) * float32(1 / period). Periods, because `mx.fast.rope` takes them: the reference and both twins then
    take one float32 reciprocal, and have the same bits.
    """
    dim = config.rope_dim
    theta = config.local_rope_theta if local else config.rope_theta
    periods = np.float64(theta) ** (np.arange(0, dim, 2) / dim)
    factor = 1.0
    scaling = None if local else config.rope_scaling
    if scaling is not None and scaling.type == "linear":
        periods = periods * scaling.factor
    elif scaling is not None and scaling.type == "llama3":
        periods = _llama3(periods, scaling)
    elif scaling is not None:
        periods = _yarn(periods, scaling, theta, dim)
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return periods.astype(np.float32), factor


def rope_frequencies(config: GPTConfig, *, local: bool = False) -> tuple[Array, float]:
    """(frequencies, factor): radians per position of each rotated pair, (rope_dim / 2,) float32; see `rope_periods`."""
    periods, factor = rope_periods(config, local=local)
    return np.float32(1) / periods, factor


def _llama3(periods: Array, scaling: RopeScaling) -> Array:
    """Llama 3.1's scaling: long wavelengths times `factor`, short ones as they are, a blend between."""
    rotations = scaling.original_block_size / (2 * math.pi * periods)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - keep) / (periods * scaling.factor) + keep / periods))


def _yarn(periods: Array, scaling: RopeScaling, theta: float, dim: int) -> Array:
    """NTK-by-parts interpolation (YaRN, Peng et al. 2023, section 3.2), with transformers' rounding."""

    def pair_with(rotations: float) -> float:  # index of the pair that rotates so often over the original context
        return dim * math.log(scaling.original_block_size / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return np.asarray(1 / (ramp / (periods * scaling.factor) + (1 - ramp) / periods))
