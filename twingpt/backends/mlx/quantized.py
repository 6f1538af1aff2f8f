"""Matrices in MLX's affine quantization (`core/checkpoint/quantize.py`) in MLX: the twin of torch's, by MLX's kernels.

A quantized matrix `name` is `name.weight`, packed (out, in * bits / 32) uint32, with `name.scales` and
`name.biases` (out, in / group_size) in the compute dtype. Bits and group size follow from the shapes.
"""

from __future__ import annotations

import mlx.core as mx

Array = mx.array


def dequantize(w_q: Array, scales: Array, biases: Array, width: int) -> Array:
    """Dequantize (…, in * bits / 32) uint32 to (…, in) in the dtype of the scales; `width` is `in`."""
    bits, group_size = 32 * w_q.shape[-1] // width, width // scales.shape[-1]
    return mx.dequantize(w_q, scales, biases, group_size=group_size, bits=bits)


def quantized_matmul(x: Array, w_q: Array, scales: Array, biases: Array) -> Array:
    """x W^T by the kernel, (…, in) -> (…, out)."""
    width = x.shape[-1]
    bits, group_size = 32 * w_q.shape[-1] // width, width // scales.shape[-1]
    return mx.quantized_matmul(x, w_q, scales, biases, group_size=group_size, bits=bits)
