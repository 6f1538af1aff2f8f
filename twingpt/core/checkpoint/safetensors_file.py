"""Safetensors files: written one tensor at a time, and read with suspicion, one tensor at a time.

The format: https://github.com/huggingface/safetensors#format. The `safetensors` library maps files into
memory, where they count as resident and change with the file; here each tensor is read by itself. Others
read what is written here with that library, so it opens each file before the file is published.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.reading import short

Array = np.ndarray
Shapes = Mapping[str, tuple[int, ...]]

# By the format's names; NumPy has no bfloat16, so its bits come as integers.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
PIECE = 2**22  # numbers that are converted at once
MAX_HEADER = 2**24  # bytes: 100,000 tensors; a longer one would take seconds to read


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype by the format's name, its shape, and where its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class TensorFile:
    """The tensors of a safetensors file by name, in the order of its header; read when asked for.

    Nothing larger than the header is read before `read`. Raises UserError where the file is not whole and
    sound: a header beyond the file, one name twice, bytes that belong to two tensors or to none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries, self.metadata = _entries(path)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}.") from None
        except RecursionError:
            raise UserError(f"{path} is not a readable safetensors file: its header is nested too deeply.") from None
        except ValueError as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}.") from None

    def read(self, name: str) -> Array:
        """The tensor called `name` as it is stored; bfloat16 as uint16."""
        return self._read(name, self.entries[name])

    def _read(self, name: str, entry: Entry) -> Array:
        array = np.fromfile(self.path, DTYPES[entry.dtype], entry.size, offset=entry.offset)
        if array.size != entry.size:
            raise UserError(f"{self.path} was cut while it was read: the tensor {name} is not whole.")
        return array.reshape(entry.shape)

    def read_float(self, name: str) -> Array:
        """The tensor called `name`, of a floating-point dtype, in float32."""
        entry = self.entries[name]
        if entry.dtype in ("F32", "F64"):
            return self._in_float32(self.read(name), name, entry)
        whole, done = np.empty(entry.size, np.float32), 0
        for piece in self.pieces(name):
            whole[done : done + piece.size] = piece
            done += piece.size
        return whole.reshape(entry.shape)

    def pieces(self, name: str) -> Iterator[Array]:
        """Yield the numbers of `read_float` in order, in flat pieces, of which one is in memory at a time."""
        entry = self.entries[name]
        size = np.dtype(DTYPES[entry.dtype]).itemsize
        for start in range(0, entry.size, PIECE):
            piece = Entry(entry.dtype, (min(PIECE, entry.size - start),), entry.offset + start * size)
            yield self._in_float32(self._read(name, piece), name, entry)

    def _in_float32(self, array: Array, name: str, entry: Entry) -> Array:
        if entry.dtype == "BF16":
            bits = array.astype(np.uint32)
            bits <<= 16  # in place: a piece is in memory twice as it is
            return bits.view(np.float32)
        if entry.dtype not in ("F64", "F32", "F16"):
            raise UserError(f"The tensor {name} in {self.path} is {entry.dtype}, and must be of floating point.")
        with np.errstate(over="ignore"):  # of float64
            return array.astype(np.float32, copy=False)


def finite(array: Array, name: str, path: Path) -> Array:
    """`array`, the tensor called `name` in the file at `path`; UserError where it has NaN or infinities.

    Its sum tells, as one such number makes that one too: it is read once, and nothing of its size is made.
    """
    with np.errstate(all="ignore"):
        sound = np.isfinite(array.sum()) or np.isfinite(array).all()  # a sum may also be too large
    if not sound:
        raise UserError(
            f"The tensor {name} in {path} has numbers that are not finite (NaN or infinity): the model is broken, "
            "as after training that diverged; take an earlier checkpoint, or fetch it again."
        )
    return array


def _entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The checked table of a file, and its metadata; ValueError says what is wrong with it."""
    with path.open("rb") as file:
        size = path.stat().st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError(f"its header ends at byte {start}, and the file at {size}")
        if start - 8 > MAX_HEADER:
            raise ValueError(f"its header has {start - 8} bytes, and at most {MAX_HEADER} are read")
        header = json.loads(file.read(start - 8).decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # MLX writes null
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    for text in (*header, *metadata.values()):
        text.encode()  # half a surrogate pair is a ValueError
    _check_names(header)
    entries = {name: _entry(name, described, start) for name, described in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            raise ValueError(f"the tensor {name} begins at byte {entry.offset}, where {end} is next")
        end += entry.size * np.dtype(DTYPES[entry.dtype]).itemsize
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, and the file at {size}")
    return entries, metadata


def _check_names(names: Iterable[str]) -> None:
    """Refuse names that no message could show."""
    if bad := [name for name in names if len(name) > 500 or not name.isprintable()]:
        raise ValueError(f"a tensor's name is too long, or can't be printed: {short(bad[0])}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _entry(name: str, described: Any, start: int) -> Entry:
    if not isinstance(described, dict) or not {"dtype", "shape", "data_offsets"} <= described.keys():
        raise ValueError(f"the tensor {name} is not described")
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"the tensor {name} is of dtype {short(dtype)}, which is not one of {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"the tensor {name} has a shape or offsets that are not whole numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"the tensor {name} has other bytes than its shape {short(shape)} needs in {dtype}")
    if len(shape) > 8 or math.prod(max(1, number) for number in shape) >= 2**60:  # also where one of them is 0
        raise ValueError(f"the tensor {name} has a shape that can't be, {short(shape)}")
    return Entry(dtype, tuple(shape), start + offsets[0])


def write_safetensors(
    path: Path,
    shapes: Shapes,
    tensors: Iterable[tuple[str, Array]],
    dtypes: Mapping[str, str] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> dict[str, Any]:
    """Write tensors as they come, in the order of `shapes`, sync, and open the file; its manifest entry.

    They are float32 but where `dtypes` says otherwise. The entry has the file's size, its SHA-256, and
    each tensor's CRC-32, which finds a damaged one later. Raises ValueError where the tensors are not
    those of `shapes`, and RuntimeError where `safetensors` would not read the file as it was meant.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        dtype = dtypes.get(name, "F32")
        end = offset + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha, checks = hashlib.sha256(), {}
    with path.open("wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            file.write(chunk)
            sha.update(chunk)
        for (name, shape), (given, array) in zip(shapes.items(), tensors, strict=True):
            if given != name or array.shape != shape:
                raise ValueError(f"{given} {array.shape} came, where {name} {shape} is next")
            data = np.ascontiguousarray(array, DTYPES[dtypes.get(name, "F32")]).reshape(-1).view(np.uint8).data
            file.write(data)
            sha.update(data)
            checks[name] = f"{zlib.crc32(data):08x}"
        file.flush()
        os.fsync(file.fileno())
    _check_opens(path, {name: (dtypes.get(name, "F32"), list(shape)) for name, shape in shapes.items()})
    return {"size": 8 + len(text) + offset, "sha256": sha.hexdigest(), "crc32": checks}


def _check_opens(path: Path, wanted: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raise RuntimeError unless `safetensors` finds these dtypes and shapes; it reads the header, and no tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            found = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices.items()}
    except (OSError, MemoryError):  # it maps the whole file, which not every file system and machine has room for
        return
    except SafetensorError as error:
        raise RuntimeError(f"{path} was written so that safetensors does not open it: {error}") from error
    if found != wanted:
        raise RuntimeError(f"{path} was written so that safetensors finds other tensors in it")
