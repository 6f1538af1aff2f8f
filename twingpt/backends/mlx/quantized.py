"""Matrices in MLX's affine quantization (`core/checkpoint/quantize.py`) in MLX: the twin of torch's, by MLX's kernels.

A quantized matrix `name` is `name.weight`, packed (out, in * bits / 32) uint32, with `name.scales` and
`name.biases` (out, in / group_size) in the compute dtype. Bits and group size follow from the shapes.
"""

from __future__ import annotations

import mlx.core as mx

Array = mx.array
Parameters = dict[str, mx.array]


def is_quantized(p: Parameters, name: str) -> bool:
    """Whether the matrix `name` is a quantized one."""
    return f"{name}.scales" in p


def matrix_dtype(p: Parameters, name: str) -> mx.Dtype:
    """The dtype in which the matrix `name` is multiplied: its own, or that of its scales."""
    return p[f"{name}.{'scales' if is_quantized(p, name) else 'weight'}"].dtype


def quantized_matmul(x: Array, p: Parameters, name: str) -> Array:
    """x W^T for the quantized matrix `name`, (…, in) -> (…, out), by the kernel."""
    w_q, scales, biases = (p[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    group_size, bits = _layout(w_q, scales, x.shape[-1])
    return mx.quantized_matmul(x, w_q, scales, biases, group_size=group_size, bits=bits)


def dequantized_rows(p: Parameters, name: str, index: Array, width: int) -> Array:
    """Rows of the quantized matrix `name` in the dtype of its scales: (…) indices -> (…, width)."""
    w_q, scales, biases = (p[f"{name}.{part}"][index] for part in ("weight", "scales", "biases"))
    group_size, bits = _layout(w_q, scales, width)
    return mx.dequantize(w_q, scales, biases, group_size=group_size, bits=bits)


def _layout(w_q: Array, scales: Array, width: int) -> tuple[int, int]:
    """(group_size, bits) of a matrix of `width` columns."""
    return width // scales.shape[-1], 32 * w_q.shape[-1] // width
