"""Affine quantization in MLX's layout: float32 matrices to 4 or 8 bits a number, and back.

A matrix `X.weight` (out, in) becomes `X.weight` uint32 (out, in bits / 32), whose words hold the numbers q
of consecutive inputs from the lowest bits up, and `X.scales` and `X.biases` (out, in / group_size):
w = q scale + bias for each group of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twingpt.core.checkpoint.safetensors_file import PIECE, Shapes
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import VECTOR, Parameter, parameter_table
from twingpt.core.reading import short

Array = np.ndarray

BITS, GROUP_SIZES = (4, 8), (32, 64, 128)
MIN_SCALE = np.float32(1e-7)


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a model are stored: `bits` a number, with a scale and a bias for `group_size` of them."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        """Raise UserError for what MLX's layout is not read with here."""
        for name, allowed in (("bits", BITS), ("group_size", GROUP_SIZES)):
            if type(getattr(self, name)) is not int or getattr(self, name) not in allowed:
                choices = f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}"
                raise UserError(
                    f"Quantization with {name} {short(getattr(self, name))} is not known: choose {choices}."
                )

    def to_json(self) -> dict[str, Any]:
        """As config.json has it."""
        return {**asdict(self), "mode": "affine"}

    def matrices(self, config: GPTConfig) -> list[str]:
        """The names, without `.weight`, of what is quantized: matrices whose width is a multiple of the group's."""
        return [
            name.removesuffix(".weight")
            for name, row in parameter_table(config).items()
            if row.group != VECTOR and name != POSITIONS and not row.shape[-1] % self.group_size
        ]

    def kept(self, config: GPTConfig) -> dict[str, str]:
        """Name -> why, of every matrix that stays in float32."""
        table, quantized = parameter_table(config), set(self.matrices(config))
        matrices = {name: row for name, row in table.items() if row.group != VECTOR}
        return {
            name: "it is only looked up and added"
            if name == POSITIONS
            else f"its width {row.shape[-1]} is not a multiple of {self.group_size}"
            for name, row in matrices.items()
            if name.removesuffix(".weight") not in quantized
        }

    def table(self, config: GPTConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Every stored tensor's shape, and the dtype of those that are not float32, by name in order."""
        quantized = set(self.matrices(config))
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes = {}
        for name, row in parameter_table(config).items():
            base = name.removesuffix(".weight")
            if base not in quantized or base == name:
                shapes[name] = row.shape
                continue
            *rest, width = row.shape
            shapes[name] = (*rest, width * self.bits // 32)
            dtypes[name] = "U32"
            shapes |= {f"{base}.{part}": (*rest, width // self.group_size) for part in ("scales", "biases")}
        return shapes, dtypes

    def apply(self, tensors: Iterable[tuple[str, Array]], config: GPTConfig) -> Iterator[tuple[str, Array]]:
        """Float32 parameters in the order of the parameter table -> the tensors of `table`."""
        quantized = set(self.matrices(config))
        for name, array in tensors:
            base = name.removesuffix(".weight")
            if base in quantized and base != name:
                parts = quantize(array, self.bits, self.group_size)
                yield from zip((name, f"{base}.scales", f"{base}.biases"), parts, strict=True)
            else:
                yield name, array


POSITIONS = "model.embed_positions.weight"


def from_config(content: Mapping[str, Any], path: object) -> Quantization | None:
    """What a config.json says of quantization, if anything; UserError where that is of another kind."""
    described = content.get("quantization", content.get("quantization_config"))
    if described is None:
        return None
    known = {"bits", "group_size", "mode"}
    if not isinstance(described, Mapping) or described.get("mode", "affine") != "affine" or described.keys() - known:
        raise UserError(f"{path} has a quantization other than MLX's affine one for all matrices: {short(described)}.")
    return Quantization(described.get("bits", 4), described.get("group_size", 64))


def quantize(w: Array, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    """(…, in) float32 -> words (…, in bits / 32) uint32, scales and biases (…, in / group_size) float32.

    mx.quantize's own arithmetic, so that both give the same bits: the end of a group that is farther
    from 0 is met exactly, and 0 too where its step allows.
    """
    words, scales, biases = _by_rows(lambda rows: _quantize(rows, bits, group_size), w.shape[-1], w)
    return words, scales, biases


def _by_rows(function: Callable[..., tuple[Array, ...]], width: int, *arrays: Array) -> tuple[Array, ...]:
    """A function of matrices on (…, width) arrays, some rows at a time, as it takes many times their room."""
    *lead, _ = arrays[0].shape
    rows, step = math.prod(lead), max(1, PIECE // max(1, width))
    whole: tuple[Array, ...] = ()
    for start in range(0, max(1, rows), step):
        parts = function(*(array.reshape(rows, array.shape[-1])[start : start + step] for array in arrays))
        whole = whole or tuple(np.empty((rows, part.shape[-1]), part.dtype) for part in parts)
        for all_rows, part in zip(whole, parts, strict=True):
            all_rows[start : start + step] = part
    return tuple(all_rows.reshape(*lead, all_rows.shape[-1]) for all_rows in whole)


def _quantize(w: Array, bits: int, group_size: int) -> tuple[Array, Array, Array]:
    groups = np.ascontiguousarray(w, np.float32).reshape(*w.shape[:-1], -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    steps = np.float32(2**bits - 1)
    scale = np.maximum((high - low) / steps, MIN_SCALE)
    from_low = np.abs(low) > np.abs(high)
    scale, edge = np.where(from_low, scale, -scale), np.where(from_low, low, high)
    zero = np.rint(edge / scale)
    exact = zero != 0
    scale = np.where(exact, edge / np.where(exact, zero, 1), scale)
    bias = np.where(exact, edge, np.float32(0))
    q = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, steps).astype(np.uint32)
    q = q.reshape(*w.shape[:-1], -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(q << shifts, axis=-1), scale, bias


def dequantize(words: Array, scales: Array, biases: Array, width: int) -> Array:
    """The inverse of `quantize`, (…, width) float32; bits and group size follow from the shapes."""
    return _by_rows(lambda w, s, b: (_dequantize(w, s, b, width),), width, words, scales, biases)[0]


def _dequantize(words: Array, scales: Array, biases: Array, width: int) -> Array:
    bits = 32 * words.shape[-1] // width
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    q = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    groups = q.reshape(*scales.shape, -1).astype(np.float32)
    return np.asarray(groups * scales[..., None] + biases[..., None]).reshape(*words.shape[:-1], width)


def dequantized(tensors: Iterable[tuple[str, Array]], config: GPTConfig) -> Iterator[tuple[str, Array]]:
    """Stored tensors in the order of `Quantization.table`, or of the parameter table -> float32 parameters."""
    table: Mapping[str, Parameter] = {}  # made where one is quantized, after what the config says was checked
    words: tuple[str, Array] | None = None
    scales: Array | None = None
    for name, array in tensors:
        if array.dtype == np.uint32:
            words = name, array
        elif words is not None and scales is None:
            scales = array
        elif words is not None and scales is not None:
            table = table or parameter_table(config)
            yield words[0], dequantize(words[1], scales, array, table[words[0]].shape[-1])
            words = scales = None
        else:
            yield name, array


def stored_shapes(config: GPTConfig, quantization: Quantization | None) -> tuple[Shapes, dict[str, str]]:
    """Shape of every tensor of a model's files, and the dtype of those that are not float32."""
    if quantization:
        return quantization.table(config)
    return {name: row.shape for name, row in parameter_table(config).items()}, {}
