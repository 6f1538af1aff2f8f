"""Matrices in MLX's quantized layout (`core/checkpoint/quantize.py`) in PyTorch: the twin of MLX's.

A quantized matrix `name` is `name.weight`, packed (out, in * bits / 8) uint8, with `name.scales` and
`name.biases` (out, in / group_size) in the compute dtype, and of 4 or 8 bits: `in_bytes` makes it so. In bfloat16 on a
CPU torch has a kernel for 4 bits, for which `prepack` packs the matrices again: `name.packed` and
`name.packed_scales`. MLX, whose own layout this is, has no twin of these and of what follows `dequantized_rows`:
`mx.quantize` and `mx.dequantize` are its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twingpt.core.checkpoint import quantize as layout
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import EMBEDDING, Parameter, parameter_table

Array = Tensor
Parameters = dict[str, Tensor]

CHUNK = 2**20  # entries dequantized at a time on a CPU, so that they stay in its cache
CHUNK_ON_GPU = 2**24  # where a kernel's launch costs more than the memory
INT4_ROWS = 16  # the int4 kernel wants a multiple of so many outputs


def is_quantized(p: Parameters, name: str) -> bool:
    """Whether the matrix `name` is a quantized one."""
    return f"{name}.scales" in p


def matrix_dtype(p: Parameters, name: str) -> torch.dtype:
    """The dtype in which the matrix `name` is multiplied: its own, or that of all else where it is quantized."""
    return p["model.norm.weight" if is_quantized(p, name) else f"{name}.weight"].dtype


def quantized_matmul(x: Array, p: Parameters, name: str) -> Array:
    """x W^T for the quantized matrix `name`, (…, in) -> (…, out), by the int4 kernel where it is packed for that."""
    scales = p[f"{name}.scales"]
    if f"{name}.packed" in p:
        return packed_matmul(x, p[f"{name}.packed"], p[f"{name}.packed_scales"])[..., : len(scales)]
    return dequantizing_matmul(x, p[f"{name}.weight"], scales, p[f"{name}.biases"])


def dequantized_rows(p: Parameters, name: str, index: Array, width: int) -> Array:
    """Rows of the quantized matrix `name` in the compute dtype: (…) indices -> (…, width)."""
    w_q, scales, biases = (p[f"{name}.{part}"][index] for part in ("weight", "scales", "biases"))
    return dequantize(w_q, scales, biases, width)


def in_bytes(tensors: Iterable[tuple[str, Any]], config: GPTConfig) -> Iterator[tuple[str, Any]]:
    """Stored tensors with every quantized matrix in 4 or 8 bits, of the same numbers, as uint8.

    2 and 3 bits become 4, 5 and 6 become 8; matrices in floating point (mxfp4, nvfp4, mxfp8) become float32.
    """
    table: Mapping[str, Parameter] = {}  # made where one is quantized, as a training engine's never are
    for name, parts in layout.grouped(tensors):
        if len(parts) == 1:
            yield name, parts[0]
            continue
        table = table or parameter_table(config)
        words, width, base = parts[0], table[name].shape[-1], name.removesuffix(".weight")
        if len(parts) == 2:
            yield name, layout.dequantize(width, *parts)
        else:
            yield name, _in_bytes(words, 32 * words.shape[-1] // width)
            yield from ((f"{base}.scales", parts[1]), (f"{base}.biases", parts[2]))


def _in_bytes(words: np.ndarray, bits: int) -> np.ndarray:
    """(out, in * bits / 32) uint32 -> the same numbers in 4 or 8 bits, (out, in * 4 or 8 / 8) uint8."""
    if bits in (4, 8):
        return np.ascontiguousarray(words).view(np.uint8)
    q = layout.unpack(words, bits)
    return q if bits > 4 else np.asarray(q[..., ::2] | q[..., 1::2] << 4)


def dequantize(w_q: Array, scales: Array, biases: Array, width: int) -> Array:
    """Dequantize (…, in * bits / 8) uint8 to (…, in) in the dtype of the scales; `width` is `in`."""
    if w_q.shape[-1] < width:
        w_q = torch.stack([w_q & 15, w_q >> 4], dim=-1).flatten(-2)
    groups = w_q.view(*scales.shape, -1).to(scales.dtype)
    return torch.addcmul(biases[..., None], groups, scales[..., None]).flatten(-2)


def quantize(x: Array, group_size: int, bits: int) -> tuple[Array, Array, Array]:
    """Quantize (…, width) to what `dequantize` takes, scales and biases in x's dtype: `mx.quantize`'s bits.

    The arithmetic is that of `weights.quantize`, in float32.
    """
    groups, steps = x.float().unflatten(-1, (-1, group_size)), 2**bits - 1
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / steps).clamp_min(layout.MIN_SCALE)
    from_low = low.abs() > high.abs()
    scale, edge = torch.where(from_low, scale, -scale), torch.where(from_low, low, high)
    zero = torch.round(edge / scale)
    exact = zero != 0
    scale = torch.where(exact, edge / zero.where(exact, 1.0), scale)
    bias = edge.where(exact, 0.0)
    q = torch.round((groups - bias[..., None]) / scale[..., None]).clamp(0, steps).to(torch.uint8).flatten(-2)
    if bits == 4:
        q = q[..., ::2] | q[..., 1::2] << 4
    return q, scale.to(x.dtype), bias.to(x.dtype)


def dequantizing_matmul(x: Array, w_q: Array, scales: Array, biases: Array) -> Array:
    """x W^T, (…, in) -> (…, out), dequantizing some rows of W at a time into one buffer."""
    (n_out, n_bytes), width = w_q.shape, x.shape[-1]
    per_byte = width // n_bytes  # entries: 2 of 4 bits, or 1 of 8
    n_rows = min(n_out, max(1, (CHUNK if x.is_cpu else CHUNK_ON_GPU) // width))
    if per_byte == 2:  # even columns, then odd ones: permuting x spares interleaving the two halves of W's bytes
        x = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    buffer = x.new_empty(n_rows, per_byte, *scales.shape[1:], n_bytes // scales.shape[1])
    y = x.new_empty(*x.shape[:-1], n_out)
    for start in range(0, n_out, n_rows):
        rows = slice(start, min(start + n_rows, n_out))
        w, packed = buffer[: rows.stop - start], w_q[rows].view(-1, *buffer.shape[2:])
        if per_byte == 2:
            w[:, 0], w[:, 1] = packed & 15, packed >> 4
        else:
            w[:, 0] = packed
        torch.addcmul(biases[rows, None, :, None], w, scales[rows, None, :, None], out=w)
        y[..., rows] = F.linear(x, w.flatten(1))
    return y


@functools.cache
def has_int4_kernel() -> bool:
    """Whether this torch has the CPU's int4 kernel, and its product of a small matrix is right."""
    try:
        w_q = torch.arange(16 * 32, dtype=torch.int32).to(torch.uint8).view(16, 32)
        scales, biases = torch.full((16, 2), 0.5), torch.arange(32.0).view(16, 2) - 16
        w = dequantize(w_q, scales, biases, 64)
        x = torch.eye(64, dtype=torch.bfloat16)
        return torch.equal(packed_matmul(x, *pack(w_q, scales, biases)), w.T.to(torch.bfloat16))
    except (AttributeError, RuntimeError):  # both operators are private: another torch may lack or change them
        return False


def prepack(params: Parameters, config: GPTConfig, dtype: torch.dtype) -> None:
    """Pack every 4-bit matrix for the int4 kernel, in place, where `dtype` and device have one.

    Drops `name.weight`, but for embeddings' row look-ups.
    """
    if not (dtype == torch.bfloat16 and params["model.norm.weight"].is_cpu and has_int4_kernel()):
        return
    for name, row in parameter_table(config).items():
        base = name.removesuffix(".weight")
        if f"{base}.scales" not in params or 2 * params[name].shape[-1] != row.shape[-1]:
            continue
        packed = pack(params[name], params[f"{base}.scales"], params[f"{base}.biases"])
        params[f"{base}.packed"], params[f"{base}.packed_scales"] = packed
        if row.group != EMBEDDING:
            del params[name], params[f"{base}.biases"]


def pack(w_q: Array, scales: Array, biases: Array) -> tuple[Array, Array]:
    """A 4-bit matrix in the int4 kernel's layout, and its scales and zeros, bfloat16 (in / group_size, out, 2)."""
    padding = -len(w_q) % INT4_ROWS
    w_q = F.pad(w_q, (0, 0, 0, padding))
    n_rows = 64 * max(1, CHUNK // (64 * w_q.shape[-1]))  # the layout's blocks have at most 64 rows
    packed = [_pack_int4(w_q[start : start + n_rows]) for start in range(0, len(w_q), n_rows)]
    # The kernel's zeros are the values of 8, the middle of 0 to 15: w = (q - 8) * scale + zero.
    scales_and_zeros = torch.stack([scales, biases + 8 * scales], dim=-1)
    scales_and_zeros = F.pad(scales_and_zeros, (0, 0, 0, 0, 0, padding)).transpose(0, 1)
    return torch.cat(packed), scales_and_zeros.to(torch.bfloat16).contiguous()


def _pack_int4(w_q: Array) -> Array:
    q = torch.stack([w_q & 15, w_q >> 4], dim=-1).flatten(-2).to(torch.int32)
    packed: Array = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return packed


def packed_matmul(x: Array, packed: Array, packed_scales: Array) -> Array:
    """x W^T for bfloat16 by the int4 kernel, (…, in) -> (…, out rounded up to INT4_ROWS)."""
    rows = x.reshape(-1, x.shape[-1])
    group_size = x.shape[-1] // len(packed_scales)
    y: Array = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, packed_scales)
    return y.view(*x.shape[:-1], -1)
