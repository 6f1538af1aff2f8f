"""Matrices in MLX's quantized layout (`core/checkpoint/quantize.py`) in MLX: the twin of torch's, by MLX's kernels.

A quantized matrix `name` is `name.weight`, packed (out, in * bits / 32) uint32, with `name.scales` and, where it is
affine, `name.biases` (out, in / group_size) in the compute dtype; other scales are bytes. Bits, group size and mode
follow from the shapes, and from whether there are biases.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from twingpt.core.checkpoint.quantize import FLOATING

Array = mx.array
Parameters = dict[str, mx.array]

MODES = {packing: mode for mode, packing in FLOATING.items()}  # of (bits, group size)


def is_quantized(p: Parameters, name: str) -> bool:
    """Whether the matrix `name` is a quantized one."""
    return f"{name}.scales" in p


def matrix_dtype(p: Parameters, name: str) -> mx.Dtype:
    """The dtype in which the matrix `name` is multiplied: its own, or that of all else where it is quantized."""
    return p["model.norm.weight" if is_quantized(p, name) else f"{name}.weight"].dtype


def quantized_matmul(x: Array, p: Parameters, name: str) -> Array:
    """x W^T for the quantized matrix `name`, (…, in) -> (…, out), by the kernel."""
    w_q, scales, biases = p[f"{name}.weight"], p[f"{name}.scales"], p.get(f"{name}.biases")
    return mx.quantized_matmul(x, w_q, scales, biases, **_packing(w_q, scales, biases, x.shape[-1]))


def dequantized_rows(p: Parameters, name: str, index: Array, width: int) -> Array:
    """Rows of the quantized matrix `name` in the compute dtype: (…) indices -> (…, width)."""
    w_q, scales, biases = p[f"{name}.weight"][index], p[f"{name}.scales"][index], p.get(f"{name}.biases")
    biases = None if biases is None else biases[index]
    return mx.dequantize(w_q, scales, biases, dtype=matrix_dtype(p, name), **_packing(w_q, scales, biases, width))


def _packing(w_q: Array, scales: Array, biases: Array | None, width: int) -> dict[str, Any]:
    """The group size, bits and mode of a matrix of `width` columns, as MLX's functions take them."""
    bits, group_size = 32 * w_q.shape[-1] // width, width // scales.shape[-1]
    mode = MODES[bits, group_size] if biases is None else "affine"
    return {"group_size": group_size, "bits": bits, "mode": mode}
