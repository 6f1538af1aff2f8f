"""Matrices in MLX's quantized layout: affine of 2 to 8 bits, mxfp4, nvfp4 and mxfp8, each matrix in a way of its own.

A matrix `X.weight` (out, in) becomes `X.weight` uint32 (out, in bits / 32), whose words hold the numbers q of a row as
one stream of bits from the lowest up, and `X.scales` (out, in / group_size). Affine ones have `X.biases` too, as
float32 as the scales: w = q scale + bias for each group of inputs. In the others q is a number in floating point
(e2m1, e4m3), and the scale of a group is one in a byte (e8m0, in nvfp4 e4m3): OCP Microscaling Formats MX 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twingpt.core.checkpoint.safetensors_file import PIECE, Shapes
from twingpt.core.config import GPTConfig, unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.parameters import VECTOR, Parameter, parameter_table
from twingpt.core.reading import short

Array = np.ndarray

BITS, GROUP_SIZES, MIN_SCALE = (2, 3, 4, 5, 6, 8), (32, 64, 128), 1e-7  # of affine ones
FLOATING = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # mode -> bits and group size, as there is no other
POSITIONS = "model.embed_positions.weight"  # only looked up and added, so never quantized

_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
_E4M3 = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
E2M1, E4M3 = (np.array([*half, *(-x for x in half)], np.float32) for half in (_E2M1, _E4M3))
E8M0 = np.array([*(2.0 ** (e - 127) for e in range(255)), np.nan], np.float32)


@dataclass(frozen=True)
class Packing:
    """How a matrix is stored: `bits` a number, with a scale, and in mode affine a bias, for `group_size` of them."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        """Raise UserError for what MLX has not."""
        if self.mode not in ("affine", *FLOATING):
            raise unknown_choice("mode of quantization", self.mode, ("affine", *FLOATING))
        allowed = {mode: ((bits,), (group_size,)) for mode, (bits, group_size) in FLOATING.items()}
        for name, choices in zip(("bits", "group_size"), allowed.get(self.mode, (BITS, GROUP_SIZES)), strict=True):
            if type(getattr(self, name)) is not int or getattr(self, name) not in choices:
                *most, last = map(str, choices)
                raise UserError(
                    f"Quantization with {name} {short(getattr(self, name))} is not known: choose "
                    f"{', '.join(most)}{' or ' if most else ''}{last}."
                )

    def to_json(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"bits": self.bits, "group_size": self.group_size, "mode": self.mode}

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Shapes and dtypes of what a matrix `name` of this shape is stored as, by name in order."""
        base, (*rest, width) = name.removesuffix(".weight"), shape
        parts = dict.fromkeys(("scales", "biases"), "F32") if self.mode == "affine" else {"scales": "U8"}
        shapes = {f"{base}.{part}": (*rest, width // self.group_size) for part in parts}
        dtypes = {f"{base}.{part}": dtype for part, dtype in parts.items()}
        return {name: (*rest, width * self.bits // 32), **shapes}, {name: "U32", **dtypes}


@dataclass(frozen=True)
class Quantization(Packing):
    """How the matrices of a model are stored: all in one way, but for those that `modules` names, without `.weight`.

    Those are in a way of their own, or with None in float32; so are others whose width is no multiple of group_size.
    """

    modules: Mapping[str, Packing | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As config.json has it."""
        return super().to_json() | {name: way.to_json() if way else False for name, way in self.modules.items()}

    def packings(self, config: GPTConfig) -> dict[str, Packing]:
        """Name, without `.weight`, of every matrix that is quantized -> how."""
        found, usual = {}, Packing(self.bits, self.group_size, self.mode)
        for name, row in parameter_table(config).items():
            base = name.removesuffix(".weight")
            packing = None if row.group == VECTOR or name == POSITIONS else self.modules.get(base, usual)
            if packing is not None and not row.shape[-1] % packing.group_size:
                found[base] = packing
            elif packing is not None and base in self.modules:
                raise UserError(f"{base} can't be in groups of {packing.group_size}, as its width is {row.shape[-1]}.")
        return found


def from_config(content: Mapping[str, Any], path: object) -> Quantization | None:
    """What a config.json says of quantization, if anything, as mlx-lm has it; UserError where that isn't known."""
    described = next(
        (v for key in ("quantization", "quantization_config") if (v := content.get(key)) is not None), None
    )
    if described is None:
        return None
    if not isinstance(described, Mapping):
        raise UserError(f"{path} has a quantization {short(described)}, which is not read.")
    ways = {k: v for k, v in described.items() if k in Packing.__annotations__ or not isinstance(v, (Mapping, bool))}
    named = {name: value for name, value in described.items() if name not in ways and value is not True}
    usual = _packing(ways, path)
    modules = {name: _packing(entry, path) if entry else None for name, entry in named.items()}
    return Quantization(**usual.to_json(), modules=modules)


def _packing(described: Mapping[str, Any], path: object) -> Packing:
    mode = described.get("mode", "affine")
    bits, group_size = (FLOATING.get(mode) if isinstance(mode, str) else None) or (4, 64)
    try:
        return Packing(**{"bits": bits, "group_size": group_size, **described})
    except (UserError, TypeError):  # TypeError for a key beside these
        raise UserError(
            f"{path} has a quantization {short(dict(described))}, which is not read: only affine ones of "
            f"{', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUP_SIZES))}, and "
            f"{', '.join(FLOATING)} are."
        ) from None


def by_rows(function: Callable[..., tuple[Array, ...]], width: int, *arrays: Array) -> tuple[Array, ...]:
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


def unpack(words: Array, bits: int) -> Array:
    """(…, in bits / 32) uint32 -> the numbers q, (…, in) uint8."""
    if 32 % bits == 0:
        q = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32(2**bits - 1)
        return np.asarray(q.astype(np.uint8).reshape(*words.shape[:-1], -1))
    stream = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=-1, bitorder="little")
    stream = stream.reshape(*words.shape[:-1], -1, bits)
    return np.asarray(np.packbits(stream, axis=-1, bitorder="little")[..., 0])


def dequantize(width: int, words: Array, scales: Array, *biases: Array) -> Array:
    """A quantized matrix, (…, width) float32; how it is packed follows from the shapes and whether it has biases."""
    bits, group_size = 32 * words.shape[-1] // width, width // scales.shape[-1]

    def numbers(words: Array, scales: Array, *biases: Array) -> tuple[Array]:
        q = unpack(words, bits).reshape(*scales.shape, group_size)
        if biases:
            w = q.astype(np.float32) * scales[..., None] + biases[0][..., None]
        else:
            w = (E2M1 if bits == 4 else E4M3)[q] * (E4M3 if group_size == 16 else E8M0)[scales][..., None]
        return (w.reshape(len(words), width),)

    return by_rows(numbers, width, words, scales, *biases)[0]


def grouped(tensors: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, list[Array]]]:
    """Stored tensors in order -> each parameter's name, with its array, or its words, scales and maybe biases."""
    matrix, parts = "", list[Array]()
    for name, array in tensors:
        if not parts and array.dtype != np.uint32:
            yield name, [array]
            continue
        matrix = matrix if parts else name
        parts.append(array)
        if len(parts) == 3 or array.dtype == np.uint8:  # scales in a byte have no biases
            yield matrix, parts
            parts = []


def dequantized(tensors: Iterable[tuple[str, Array]], config: GPTConfig) -> Iterator[tuple[str, Array]]:
    """Stored tensors in the order of `stored_shapes` -> float32 parameters."""
    table: Mapping[str, Parameter] = {}  # made where one is quantized, after what the config says was checked
    for name, parts in grouped(tensors):
        table = table if len(parts) == 1 else table or parameter_table(config)
        yield name, parts[0] if len(parts) == 1 else dequantize(table[name].shape[-1], *parts)


def stored_shapes(config: GPTConfig, quantization: Quantization | None) -> tuple[Shapes, dict[str, str]]:
    """Shape of every tensor of a model's files, and the dtype of those that are not float32, by name in order."""
    packings = quantization.packings(config) if quantization else {}
    shapes, dtypes = dict[str, tuple[int, ...]](), dict[str, str]()
    for name, row in parameter_table(config).items():
        packing = packings.get(name.removesuffix(".weight"))
        stored, kinds = packing.tensors(name, row.shape) if packing else ({name: row.shape}, {})
        shapes |= stored
        dtypes |= kinds
    return shapes, dtypes
