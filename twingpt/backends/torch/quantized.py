"""Products with matrices in MLX's affine layout (see `core.quantize`) in PyTorch.

A quantized matrix called `name` is `name.weight`, its words as bytes (out, in * bits / 8) uint8, with
`name.scales` and `name.biases` (out, in / group_size) in the compute dtype. In bfloat16 on a CPU torch has
a kernel for 4 bits, for which `pack_all` packs matrices again: `name.packed` and `name.packed_scales`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from twingpt.core.config import GPTConfig
from twingpt.core.parameters import EMBEDDING, parameter_table

Array = Tensor

PIECE = 2**20  # numbers dequantized at a time on a CPU, so that they stay in its cache
PIECE_ELSEWHERE = 2**24  # where starting a kernel costs more than the room
ROWS = 16  # the kernel's outputs come in so many


def dequantize(octets: Array, scales: Array, biases: Array, width: int) -> Array:
    """(…, in * bits / 8) bytes -> (…, in) numbers in the dtype of the scales."""
    if octets.shape[-1] < width:
        octets = torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)
    groups = octets.view(*scales.shape, -1).to(scales.dtype)
    return torch.addcmul(biases[..., None], groups, scales[..., None]).flatten(-2)


def quantized_matmul(x: Array, octets: Array, scales: Array, biases: Array) -> Array:
    """x W^T, (…, out), for a matrix that is dequantized some rows at a time, in room that is used again."""
    (n_out, n_bytes), width = octets.shape, x.shape[-1]
    per_byte = width // n_bytes  # numbers: 2 of 4 bits, or 1 of 8
    n_rows = min(n_out, max(1, (PIECE if x.is_cpu else PIECE_ELSEWHERE) // width))
    if per_byte == 2:  # the even columns and then the odd ones, which spares interleaving a byte's two halves
        x = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    room = x.new_empty(n_rows, per_byte, *scales.shape[1:], n_bytes // scales.shape[1])
    y = x.new_empty(*x.shape[:-1], n_out)
    for start in range(0, n_out, n_rows):
        rows = slice(start, min(start + n_rows, n_out))
        w, piece = room[: rows.stop - start], octets[rows].view(-1, *room.shape[2:])
        if per_byte == 2:
            w[:, 0], w[:, 1] = piece & 15, piece >> 4
        else:
            w[:, 0] = piece
        torch.addcmul(biases[rows, None, :, None], w, scales[rows, None, :, None], out=w)
        y[..., rows] = F.linear(x, w.flatten(1))
    return y


@functools.cache
def has_kernel() -> bool:
    """Whether this torch has the kernel for 4 bits on a CPU, and it multiplies as it should."""
    try:
        octets = torch.arange(16 * 32, dtype=torch.int32).to(torch.uint8).view(16, 32)
        scales, biases = torch.full((16, 2), 0.5), torch.arange(32.0).view(16, 2) - 16
        w = dequantize(octets, scales, biases, 64)
        x = torch.eye(64, dtype=torch.bfloat16)
        return torch.equal(packed_matmul(x, *pack(octets, scales, biases)), w.T.to(torch.bfloat16))
    except (AttributeError, RuntimeError):  # neither part is of torch's public interface
        return False


def pack_all(params: dict[str, Tensor], config: GPTConfig) -> None:
    """Pack every 4-bit matrix for the kernel, and forget the bytes of all but the embedding, whose rows are read."""
    for name, row in parameter_table(config).items():
        base = name.removesuffix(".weight")
        if f"{base}.scales" not in params or 2 * params[name].shape[-1] != row.shape[-1]:
            continue
        packed = pack(params[name], params[f"{base}.scales"], params[f"{base}.biases"])
        params[f"{base}.packed"], params[f"{base}.packed_scales"] = packed
        if row.group != EMBEDDING:
            del params[name], params[f"{base}.biases"]


def pack(octets: Array, scales: Array, biases: Array) -> tuple[Array, Array]:
    """4-bit numbers in the kernel's layout, and its scales with what it adds, bfloat16 (in / group_size, out, 2)."""
    more = -len(octets) % ROWS
    octets = F.pad(octets, (0, 0, 0, more))
    n_rows = 64 * max(1, PIECE // (64 * octets.shape[-1]))  # the layout's blocks have at most 64 rows
    packed = [_packed(octets[start : start + n_rows]) for start in range(0, len(octets), n_rows)]
    both = torch.stack([scales, biases + 8 * scales], dim=-1)  # to the kernel a 4-bit number is one of -8 to 7
    both = F.pad(both, (0, 0, 0, 0, 0, more)).transpose(0, 1)
    return torch.cat(packed), both.to(torch.bfloat16).contiguous()


def _packed(octets: Array) -> Array:
    q = torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2).to(torch.int32)
    packed: Array = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return packed


def packed_matmul(x: Array, packed: Array, packed_scales: Array) -> Array:
    """x W^T for bfloat16 (…, in) by the kernel, (…, out rounded up to 16)."""
    rows = x.reshape(-1, x.shape[-1])
    group_size = x.shape[-1] // len(packed_scales)
    y: Array = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, packed_scales)
    return y.view(*x.shape[:-1], -1)
