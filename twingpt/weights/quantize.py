"""Affine quantization, as MLX computes it: float32 matrices to 2 to 8 bits a number (`core/checkpoint/quantize.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from twingpt.core.checkpoint.quantize import MIN_SCALE, POSITIONS, Packing, Quantization, by_rows
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import VECTOR, parameter_table

Array = np.ndarray


def apply(
    quantization: Quantization, tensors: Iterable[tuple[str, Array]], config: GPTConfig
) -> Iterator[tuple[str, Array]]:
    """Float32 parameters in the order of the parameter table -> the tensors of `stored_shapes`."""
    packings = quantization.packings(config)
    for name, array in tensors:
        packing = packings.get(name.removesuffix(".weight"))
        yield from packed(packing, name, array) if packing else ((name, array),)


def packed(packing: Packing, name: str, array: Array) -> Iterator[tuple[str, Array]]:
    """A float32 matrix in an affine packing: its words, its scales and its biases, each with its name."""
    yield from zip(
        packing.tensors(name, array.shape)[0], quantize(array, packing.bits, packing.group_size), strict=True
    )


def unquantized(quantization: Quantization, config: GPTConfig) -> dict[str, str]:
    """Name -> why, of every matrix that stays in float32."""
    packings, kept = quantization.packings(config), {}
    for name, row in parameter_table(config).items():
        base = name.removesuffix(".weight")
        if row.group == VECTOR or base in packings:
            continue
        if name == POSITIONS:
            kept[name] = "it is only looked up and added"
        elif base in quantization.modules:
            kept[name] = "the model has it so"
        else:
            kept[name] = f"its width {row.shape[-1]} is not a multiple of {quantization.group_size}"
    return kept


def quantize(w: Array, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    """(…, in) float32 -> words (…, in bits / 32) uint32, scales and biases (…, in / group_size) float32.

    mx.quantize's own arithmetic, so that both give the same bits: the end of a group that is farther
    from 0 is met exactly, and 0 too where its step allows.
    """
    words, scales, biases = by_rows(lambda rows: _quantize(rows, bits, group_size), w.shape[-1], w)
    return words, scales, biases


def _quantize(w: Array, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    groups = np.ascontiguousarray(w, np.float32).reshape(*w.shape[:-1], -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    steps = np.float32(2**bits - 1)
    scale = np.maximum((high - low) / steps, np.float32(MIN_SCALE))
    from_low = np.abs(low) > np.abs(high)
    scale, edge = np.where(from_low, scale, -scale), np.where(from_low, low, high)
    zero = np.rint(edge / scale)
    exact = zero != 0
    scale = np.where(exact, edge / np.where(exact, zero, 1), scale)
    bias = np.where(exact, edge, np.float32(0))
    q = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, steps)
    return _pack(q.reshape(w.shape), bits), scale, bias


def _pack(q: Array, bits: int) -> Array:
    """The inverse of `unpack`: (…, in) whole numbers -> (…, in bits / 32) uint32."""
    if 32 % bits == 0:
        shifted = q.astype(np.uint32).reshape(*q.shape[:-1], -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
        return np.asarray(np.bitwise_or.reduce(shifted, axis=-1))
    stream = np.unpackbits(q.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(*q.shape[:-1], -1), axis=-1, bitorder="little").view("<u4").astype(np.uint32)
