"""How the twins' KV caches lay out keys and values in memory."""

from __future__ import annotations

import math

from twingpt.core.checkpoint.quantize import Packing
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.reading import short

BUCKET = 256  # positions: a KV cache has this capacity, twice, four times, … as much, or the model's whole block_size


def kv_quantization(config: GPTConfig, bits: int | None) -> Packing | None:
    """KV-cache quantization with 8 or 4 `bits` a number, in groups of 64 along a head's width, or of 32; None for none.

    Raises UserError for other bits, and for a head width that neither group divides.
    """
    if bits is None:
        return None
    if bits not in (8, 4):
        raise UserError(f"kv_bits must be 8 or 4, and is {short(bits)}.")
    group_size = math.gcd(config.head_dim, 64)
    if group_size < 32:
        raise UserError(
            f"Keys and values are quantized in groups of 64 or 32, and the model's heads are {config.head_dim} wide: "
            "leave out kv_bits."
        )
    return Packing(bits, group_size)


def row_table(
    config: GPTConfig, dtype: str, quantization: Packing | None, n: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape and dtype, by safetensors' names, of the arrays of `KVCache.read_row` for `n` positions, in their order."""
    K, d = config.n_kv_head, config.head_dim
    parts = {"": (d, {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype])}
    if quantization:
        groups = d // quantization.group_size, parts[""][1]
        parts = {".words": (d * quantization.bits // 32, "U32"), ".scales": groups, ".biases": groups}
    shapes: dict[str, tuple[int, ...]] = {"tokens": (n,)}
    dtypes = {"tokens": "I32"}
    for kind in ("keys", "values"):
        for layer in range(config.n_layer):
            for part, (width, part_dtype) in parts.items():
                name = f"layers.{layer}.{kind}{part}"
                shapes[name], dtypes[name] = (K, n, width), part_dtype
    return shapes, dtypes


def bucket(n: int, block_size: int) -> int:
    """Positions a row that a KV cache has to hold `n`: BUCKET x a power of two, block_size at most.

    Few sizes occur, so that few shapes are compiled and buffers can be used again; growing copies O(n) in all.
    """
    return min(block_size, BUCKET << max(0, math.ceil(n / BUCKET) - 1).bit_length())
