"""Layers that attention, MLP and embedding share, in PyTorch: the twin of `backends/mlx/layers.py`.

Shapes as in `model.py`.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twingpt.backends.torch.quantized import dequantized_rows, is_quantized, quantized_matmul
from twingpt.core.config import GPTConfig
from twingpt.core.rope import rope_frequencies

Array = Tensor
Parameters = dict[str, Tensor]


class Rope:
    """Rotary position embedding (RoPE) with its tables: cos and signed sin, (length, rope_dim) float32.

    They begin with `length` positions (0 for block_size) and grow with the positions asked for.
    `tables[True]` is for the layers that rotate by `local_rope_theta`.
    """

    def __init__(self, config: GPTConfig, device: torch.device, length: int = 0) -> None:
        self.config, self.device = config, device
        self.length, self.tables = 0, dict[bool, tuple[Array, Array]]()
        self.extending = threading.Lock()  # threads may decode by the tables of before, and never by shorter ones
        self.extend(length or config.block_size)

    def extend(self, length: int) -> None:
        """Have tables for `length` positions, at most block_size; more than that many, so that it happens seldom."""
        if length <= self.length:
            return
        with self.extending:
            length = max(self.length, min(max(length, 2 * self.length), self.config.block_size))
            kinds = (False, True)[: 1 + (self.config.local_rope_theta > 0)]
            self.tables = {local: self.table(length, local=local) for local in kinds}
            self.length = length

    def table(self, length: int, *, local: bool) -> tuple[Array, Array]:
        """cos and signed sin of every position: sin is negated in the first half, for the roll of `__call__`."""
        frequencies, factor = rope_frequencies(self.config, local=local)
        angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
        # cos and sin of the float32 angle, in float64 on the host: a device's own may be off in the last bits.
        cos, sin = (f(angles, dtype=np.float64) * factor for f in (np.cos, np.sin))
        pairs = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        cos, sin = (torch.from_numpy(pair.astype(np.float32)).to(self.device) for pair in pairs)
        return cos, sin

    def __call__(self, x: Array, offset: int | Array, *, local: bool) -> Array:
        """Rotate (B, H, T, d) at the T positions of each row from `offset` on."""
        index = positions(offset, x.shape[2])
        cos, sin = (table[index].unsqueeze(-3) for table in self.tables[local])  # the same for every head
        dim, x32 = self.config.rope_dim, x.float()
        rotary, rest = x32[..., :dim], x32[..., dim:]
        y = rotary * cos + rotary.roll(dim // 2, -1) * sin  # the roll swaps the halves
        return (torch.cat([y, rest], dim=-1) if rest.shape[-1] else y).to(x.dtype)


def matmul(x: Array, p: Parameters, name: str) -> Array:
    """x W^T for the matrix `name`, (…, in) -> (…, out); by the quantized kernel where it is quantized."""
    return quantized_matmul(x, p, name) if is_quantized(p, name) else F.linear(x, p[f"{name}.weight"])


def linear(x: Array, p: Parameters, name: str) -> Array:
    """x W^T + b, (…, in) -> (…, out); without b where there is no parameter `name`.bias."""
    bias = p.get(f"{name}.bias")
    if bias is None:
        return matmul(x, p, name)
    if is_quantized(p, name):
        return matmul(x, p, name) + bias
    return F.linear(x, p[f"{name}.weight"], bias.to(x.dtype))


def embedding_lookup(p: Parameters, name: str, index: Array, width: int) -> Array:
    """Rows of the embedding `name`, dequantized where it is quantized: (…) ids -> (…, width)."""
    return dequantized_rows(p, name, index, width) if is_quantized(p, name) else F.embedding(index, p[f"{name}.weight"])


def rms_norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """RMSNorm over the last axis, in float32; the result in x's dtype."""
    weight, eps, x32 = norm_weight(p[f"{name}.weight"], config).float(), config.norm_eps, x.float()
    if x.is_cpu:  # F.rms_norm is a chain of slow pow there
        mean_square = torch.linalg.vecdot(x32, x32).unsqueeze(-1) / x.shape[-1]
        return (x32 * torch.rsqrt(mean_square + eps) * weight).to(x.dtype)
    return F.rms_norm(x32, weight.shape, weight, eps).to(x.dtype)


def layer_norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """LayerNorm over the last axis, in float32; the result in x's dtype."""
    weight, bias, eps = norm_weight(p[f"{name}.weight"], config).float(), p.get(f"{name}.bias"), config.norm_eps
    shift = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, weight, shift, eps).to(x.dtype)


def norm_weight(weight: Array, config: GPTConfig) -> Array:
    """What a norm multiplies by: its weight, or with `norm_offset` (Gemma) 1 + weight in float32."""
    return weight.float() + 1 if config.norm_offset else weight


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
    return cap * torch.tanh(x / cap) if cap else x


def positions(offset: int | Array, n: int) -> slice | Array:
    """The positions of `n` tokens a row, as an index: a slice for an `offset` that all rows have, (B, n) for a (B,)."""
    if isinstance(offset, int):
        return slice(offset, offset + n)
    return offset[:, None] + torch.arange(n, device=offset.device)
