"""Matrices as mlx-lm quantizes them: affine of 2 to 8 bits, mxfp4, nvfp4 and mxfp8, each matrix in a way of its own.

A matrix (out, in) is `X.weight`, uint32 words that hold the numbers of a row as one stream of bits from the lowest up,
and `X.scales`, one for each group of inputs. Affine ones have `X.biases` too: w = q scale + bias. The others hold
numbers in floating point (e2m1, e4m3), and the scale of a group in a byte (e8m0, in nvfp4 e4m3): OCP Microscaling
Formats 1.0, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.quantize import BITS, GROUP_SIZES, dequantize
from twingpt.core.checkpoint.safetensors_file import PIECE
from twingpt.core.errors import UserError
from twingpt.core.reading import short

Array = np.ndarray

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
FLOATING = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # mode -> bits and group size, as there is no other

_CODES = np.arange(256)
_EXPONENT, _MANTISSA = (_CODES >> 3) & 15, _CODES & 7
_E4M3 = np.where(_EXPONENT == 0, _MANTISSA * 2.0**-9, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7.0))
E4M3 = (np.where(_CODES >> 7, -1, 1) * _E4M3).astype(np.float32)
E8M0 = np.where(_CODES < 255, np.ldexp(1.0, np.minimum(_CODES, 254) - 127), np.nan).astype(np.float32)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([_E2M1, -_E2M1])


@dataclass(frozen=True)
class Packing:
    """How a matrix is stored."""

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    @classmethod
    def read(cls, described: Mapping[str, Any], path: Path) -> Packing:
        """That of an entry of config.json's "quantization"; UserError, naming the file, for one that isn't known."""
        mode = described.get("mode", "affine")
        usual = FLOATING.get(mode, (4, 64)) if isinstance(mode, str) else (4, 64)
        packing = cls(described.get("bits", usual[0]), described.get("group_size", usual[1]), mode)
        affine = mode == "affine" and packing.bits in AFFINE_BITS and packing.group_size in GROUP_SIZES
        floating = isinstance(mode, str) and FLOATING.get(mode) == (packing.bits, packing.group_size)
        whole = type(packing.bits) is int and type(packing.group_size) is int
        if not whole or not (affine or floating) or described.keys() - {"bits", "group_size", "mode"}:
            raise UserError(
                f"{path} has a quantization {short(dict(described))}, which is not read: only affine ones of "
                f"{', '.join(map(str, AFFINE_BITS))} bits in groups of {', '.join(map(str, GROUP_SIZES))}, and "
                f"{', '.join(FLOATING)} are."
            )
        return packing

    @property
    def parts(self) -> tuple[str, ...]:
        """What stands beside the words."""
        return ("scales", "biases") if self.mode == "affine" else ("scales",)

    def dequantize(self, words: Array, *parts: Array) -> Array:
        """(out, words) uint32 and its parts -> (out, in) float32, some rows at a time."""
        width = words.shape[-1] * 32 // self.bits
        if self.mode == "affine" and self.bits in BITS:
            scales, biases = parts
            return dequantize(words, scales, biases, width)
        whole, step = np.empty((len(words), width), np.float32), max(1, PIECE // max(1, width))
        for start in range(0, len(words), step):
            rows = slice(start, start + step)
            whole[rows] = self._dequantize(words[rows], *(part[rows, :, None] for part in parts)).reshape(-1, width)
        return whole

    def _dequantize(self, words: Array, scales: Array, biases: Array | None = None) -> Array:
        stream = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=-1, bitorder="little")
        bits = stream.reshape(len(words), -1, self.group_size, self.bits)
        codes = np.packbits(bits, axis=-1, bitorder="little")[..., 0]
        if biases is not None:
            return np.asarray(codes.astype(np.float32) * scales + biases)
        numbers = E2M1[codes] if self.bits == 4 else E4M3[codes]
        return np.asarray(numbers * (E4M3 if self.mode == "nvfp4" else E8M0)[scales])


@dataclass(frozen=True)
class Packings:
    """The packing of every matrix: the usual one, and those of matrices by their names without `.weight`."""

    usual: Packing
    named: Mapping[str, Packing]

    @classmethod
    def read(cls, described: Any, path: Path) -> Packings:
        """Those of config.json's "quantization"; UserError, naming the file, for what isn't known."""
        if not isinstance(described, Mapping):
            raise UserError(f"{path} has a quantization {short(described)}, which is not read.")
        named = {key: value for key, value in described.items() if isinstance(value, Mapping)}
        usual = {key: value for key, value in described.items() if key not in named and not isinstance(value, bool)}
        return cls(Packing.read(usual, path), {name: Packing.read(entry, path) for name, entry in named.items()})

    def of(self, matrix: str) -> Packing:
        """That of one."""
        return self.named.get(matrix, self.usual)
