"""Products with matrices in MLX's affine layout (see `core.quantize`) in MLX: the twin of torch's, by MLX's kernels.

A quantized matrix called `name` is `name.weight`, its words (out, in * bits / 32) uint32, with `name.scales`
and `name.biases` (out, in / group_size) in the compute dtype. Bits and group size follow from the shapes.
"""

from __future__ import annotations

import mlx.core as mx

Array = mx.array


def dequantize(words: Array, scales: Array, biases: Array, width: int) -> Array:
    """(…, in * bits / 32) words -> (…, in) numbers in the dtype of the scales."""
    bits, group_size = 32 * words.shape[-1] // width, width // scales.shape[-1]
    return mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)


def quantized_matmul(x: Array, words: Array, scales: Array, biases: Array) -> Array:
    """x W^T, (…, out), by the kernel."""
    width = x.shape[-1]
    bits, group_size = 32 * words.shape[-1] // width, width // scales.shape[-1]
    return mx.quantized_matmul(x, words, scales, biases, group_size=group_size, bits=bits)
