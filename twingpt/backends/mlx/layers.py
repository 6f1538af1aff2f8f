"""Layers that attention, MLP and embedding share, in MLX: the twin of `backends/torch/layers.py`.

Shapes as in `model.py`.
"""

from __future__ import annotations

import mlx.core as mx

from twingpt.backends.mlx.gradients import add_gradient, constant
from twingpt.backends.mlx.quantized import dequantized_rows, is_quantized, quantized_matmul
from twingpt.core.config import GPTConfig
from twingpt.core.rope import rope_periods

Array = mx.array
Parameters = dict[str, mx.array]


class Rope:
    """Rotary position embedding (RoPE) with its tables: the periods, (rope_dim / 2,) float32.

    `tables[True]` is for the layers that rotate by `local_rope_theta`.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        kinds = (False, True)[: 1 + (config.local_rope_theta > 0)]
        self.tables = {local: self.table(local=local) for local in kinds}

    def table(self, *, local: bool) -> tuple[Array, float]:
        """The periods, and the factor on cos and sin (YaRN)."""
        periods, factor = rope_periods(self.config, local=local)
        return mx.array(periods), factor

    def __call__(self, x: Array, offset: int | Array, *, local: bool) -> Array:
        """Rotate (B, H, T, d) at the T positions of each row from `offset` on."""
        dim, (periods, factor) = self.config.rope_dim, self.tables[local]
        if factor != 1:
            x = mx.concatenate([x[..., :dim] * factor, x[..., dim:]], axis=-1)
        # MLX's `freqs` are periods: its kernel takes their reciprocal, as rope_frequencies does.
        return mx.fast.rope(x, dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods)


def matmul(x: Array, p: Parameters, name: str) -> Array:
    """x W^T for the matrix `name`, (…, in) -> (…, out); by the quantized kernel where it is quantized."""
    return quantized_matmul(x, p, name) if is_quantized(p, name) else x @ p[f"{name}.weight"].T


def linear(x: Array, p: Parameters, name: str) -> Array:
    """x W^T + b, (…, in) -> (…, out); without b where there is no parameter `name`.bias."""
    bias = p.get(f"{name}.bias")
    if bias is None:
        return matmul(x, p, name)
    if is_quantized(p, name):
        return matmul(x, p, name) + bias
    y = mx.addmm(constant(bias, x).astype(x.dtype), x, p[f"{name}.weight"].T)
    return add_gradient(y, bias)


def embedding_lookup(p: Parameters, name: str, index: Array, width: int) -> Array:
    """Rows of the embedding `name`, dequantized where it is quantized: (…) ids -> (…, width)."""
    return dequantized_rows(p, name, index, width) if is_quantized(p, name) else p[f"{name}.weight"][index]


def rms_norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """RMSNorm over the last axis, in float32; the result in x's dtype."""
    weight, eps = p[f"{name}.weight"], config.norm_eps
    y = mx.fast.rms_norm(x, norm_weight(constant(weight, x), config), eps).astype(x.dtype)
    return add_gradient(y, weight, lambda: mx.fast.rms_norm(x, None, eps))


def layer_norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """LayerNorm over the last axis, in float32; the result in x's dtype."""
    weight, bias, eps = p[f"{name}.weight"], p.get(f"{name}.bias"), config.norm_eps
    shift = None if bias is None else constant(bias, x)
    y = mx.fast.layer_norm(x, norm_weight(constant(weight, x), config), shift, eps).astype(x.dtype)
    y = y if bias is None else add_gradient(y, bias)
    return add_gradient(y, weight, lambda: mx.fast.layer_norm(x, None, None, eps))


def norm_weight(weight: Array, config: GPTConfig) -> Array:
    """What a norm multiplies by: its weight, or with `norm_offset` (Gemma) 1 + weight in float32."""
    return weight.astype(mx.float32) + 1 if config.norm_offset else weight


def norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """RMSNorm or LayerNorm as `config.norm` says, (B, T, D).

    x itself for a name that ends in a dot: `norm_placement` has no norm there (NORM_SITES).
    """
    if name.endswith("."):
        return x
    return (rms_norm if config.norm == "rmsnorm" else layer_norm)(x, p, name, config)


def scale(x: Array, factor: float) -> Array:
    """x * factor; x itself, without a pass over memory, where the factor is 1."""
    return x if factor == 1 else x * factor


def softcap(x: Array, cap: float) -> Array:
    """Softcap: cap * tanh(x / cap); x itself where `cap` is 0."""
    return cap * mx.tanh(x / cap) if cap else x


def positions(offset: int | Array, n: int) -> slice | Array:
    """The positions of `n` tokens a row, as an index: a slice for an `offset` that all rows have, (B, n) for a (B,)."""
    if isinstance(offset, int):
        return slice(offset, offset + n)
    return offset[:, None] + mx.arange(n)
