"""GGUF files read with suspicion, one tensor at a time.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package has a reader too, which trusts
the file's own counts and keeps an array for each part of each value; of it are the types and their dequantization.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.reading import short

Array = np.ndarray

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
# By the format's numbers: how a value is stored.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
FLOAT32, BOOL, STRING, LIST = 6, 7, 8, 9
PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}

MAX_KEYS, MAX_TENSORS, MAX_LIST = (
    10_000,
    100_000,
    2**21,
)  # of a list of tokens or merges, the largest known have 600,000
MAX_TEXT = 2**24  # bytes of a string
MAX_HEADER = 2**26  # bytes
PIECE = 2**20  # numbers that are dequantized at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its type by the format's name, its shape, rows first, where its bytes begin, how many."""

    type: str
    shape: tuple[int, ...]
    offset: int
    size: int


class GGUFFile:
    """The metadata of a GGUF file and its tensors by name; these are read when asked for.

    Raises UserError where the file is not whole and sound: lengths beyond the file, a name twice, bytes that belong to
    two tensors. A float32 among the metadata is the number of the fewest digits that it is nearest to: 1e-06.
    """

    def __init__(self, path: Path) -> None:
        require_gguf("Reading")
        self.path = path
        try:
            with path.open("rb") as file:
                header = _Header(file, path.stat().st_size)
                self.metadata, self.tensors = header.metadata, header.tensors
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}.") from None
        except ValueError as error:
            raise UserError(f"{path} is not a readable GGUF file: {error}.") from None

    def read(self, name: str) -> Array:
        """The tensor called `name` in float32, dequantized a piece at a time; UserError for a type that can't be."""
        tensor = self.tensors[name]
        if tensor.type not in PLAIN and not can_dequantize(tensor.type):
            raise UserError(
                f"The tensor {name} in {self.path} is {tensor.type}, which the gguf package can't dequantize."
            )
        data = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.offset)
        if data.size != tensor.size:
            raise UserError(f"{self.path} was cut while it was read: the tensor {name} is not whole.")
        with np.errstate(all="ignore"):
            if tensor.type in PLAIN:
                plain: Array = data.view(PLAIN[tensor.type]).astype(np.float32, copy=False)
                return plain.reshape(tensor.shape)
            return _dequantized(data, tensor.type).reshape(tensor.shape)


def require_gguf(doing: str) -> None:
    """Raise UserError where the gguf package is not installed; `doing` begins the sentence."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f'{doing} GGUF files needs the gguf package: pip install "twingpt[gguf]".') from None


@cache
def can_dequantize(type: str) -> bool:
    """Whether the gguf package knows what the numbers of a type are; of integers and unfinished types it doesn't."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[type]
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantized(data: Array, type: str) -> Array:
    """The numbers of whole blocks, flat."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[type]
    numbers, width = GGML_QUANT_SIZES[kind]
    blocks, whole = data.reshape(-1, width), np.empty((data.size // width, numbers), np.float32)
    for start in range(0, len(blocks), max(1, PIECE // numbers)):
        end = start + max(1, PIECE // numbers)
        whole[start:end] = dequantize(blocks[start:end], kind)
    return whole.reshape(-1)


class _Header:
    """Reads a header from its beginning; ValueError says what is wrong with it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._integer("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "it is for computers of the other byte order" if swapped else f"it is of version {version}"
            raise ValueError(f"{what}, and versions {' and '.join(map(str, VERSIONS))} are read")
        tensors, keys = self._count(MAX_TENSORS, "tensors"), self._count(MAX_KEYS, "keys")
        self.metadata = self._table(keys, self._value)
        described = self._table(tensors, self._tensor)
        self.tensors = self._placed(described)

    def _take(self, count: int) -> bytes:
        if self.at + count > min(self.size, MAX_HEADER):
            why = f"the file at {self.size}" if self.size <= MAX_HEADER else f"at most {MAX_HEADER} are read"
            raise ValueError(f"its header goes on to byte {self.at + count}, and {why}")
        self.at += count
        return self.file.read(count)

    def _integer(self, format: str) -> int:
        return int(struct.unpack(format, self._take(struct.calcsize(format)))[0])

    def _count(self, most: int, what: str) -> int:
        count = self._integer("<Q")
        if count > most:
            raise ValueError(f"it has {count} {what}, and at most {most} are read")
        return count

    def _text(self) -> str:
        return self._take(self._count(MAX_TEXT, "bytes in a text")).decode("utf-8")

    def _table(self, count: int, read: Callable[[str], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self._text()
            if len(name) > 500 or not name.isprintable():
                raise ValueError(f"a name is too long, or can't be printed: {short(name)}")
            if name in found:
                raise ValueError(f"its header has the name {name} twice")
            found[name] = read(name)
        return found

    def _value(self, name: str) -> Any:
        """A text, a number, a list of texts or an array of numbers; lists of lists, which no model has, are refused."""
        kind = self._integer("<I")
        if kind == STRING:
            return self._text()
        if kind != LIST:
            return self._scalar(name, kind)
        kind, count = self._integer("<I"), self._count(MAX_LIST, f"values in {name}")
        if kind == STRING:
            return [self._text() for _ in range(count)]
        return self._numbers(name, kind, count)

    def _scalar(self, name: str, kind: int) -> int | float | bool:
        number = self._numbers(name, kind, 1)[0]
        value: int | float | bool = float(str(number)) if kind == FLOAT32 else number.item()
        return value

    def _numbers(self, name: str, kind: int, count: int) -> Array:
        if kind not in SCALARS:
            raise ValueError(f"the value of {name} is of a type {kind}, which is not known")
        dtype = np.dtype(SCALARS[kind])
        data = self._take(count * dtype.itemsize)
        return np.frombuffer(data, np.uint8) != 0 if kind == BOOL else np.frombuffer(data, dtype)

    def _tensor(self, name: str) -> StoredTensor:
        """A tensor whose offset is from where the data begin."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        dimensions = self._integer("<I")
        if dimensions > 4:
            raise ValueError(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(self._integer("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._integer("<I"), self._integer("<Q")
        try:
            type = GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"the tensor {name} is of a type {kind}, which the gguf package does not know") from None
        numbers, width = GGML_QUANT_SIZES[type]
        if not shape or not all(shape) or math.prod(shape) >= 2**60 or shape[-1] % numbers:
            raise ValueError(f"the tensor {name} has a shape that {type.name} can't be in, {short(shape)}")
        return StoredTensor(type.name, shape, offset, math.prod(shape) // numbers * width)

    def _placed(self, described: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors with offsets from the beginning of the file, in which they lie one after another."""
        unit = self.metadata.get(ALIGNMENT, 32)
        if type(unit) is not int or not 0 < unit <= 2**16:
            raise ValueError(f"{ALIGNMENT} is {short(unit)}")
        start = end = -(-self.at // unit) * unit
        placed = {}
        for name, tensor in sorted(described.items(), key=lambda item: item[1].offset):
            offset = start + tensor.offset
            if offset != -(-end // unit) * unit:
                raise ValueError(f"the tensor {name} begins at byte {offset}, where {-(-end // unit) * unit} is next")
            placed[name] = StoredTensor(tensor.type, tensor.shape, offset, tensor.size)
            end = offset + tensor.size
        if end > self.size:
            raise ValueError(f"its tensors end at byte {end}, and the file at {self.size}")
        return placed
