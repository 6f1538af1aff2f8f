"""Files that `torch.save` writes: read without running anything in them, and written one tensor at a time."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from twingpt.core.errors import UserError

# What the pickles of models name. torch would allow more, of which some make objects of any size.
HARMLESS = {
    "collections OrderedDict", "_codecs encode", "torch Size", "torch device", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char",
                                          "Byte", "Bool")),
}  # fmt: skip

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_OPERATIONS = 200_000  # of pickle: those of 5,000 tensors, and less than a second's work
MAX_TUPLE = 1000  # tuples in one another; a tensor has four


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that is mapped into memory; its bytes are read when asked for."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """How it is stored, by the name that safetensors has for it."""
        return DTYPES.get(self.tensor.dtype, str(self.tensor.dtype))

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """A float32 copy, of some of its rows."""
        found = np.array(self.tensor.detach()[rows].to(torch.float32).numpy())
        _forget_pages(self.tensor)
        return found

    def same_memory(self, other: StoredTensor) -> bool:
        """Whether both are the same bytes of the file, as tied parameters are."""
        mine, theirs = self.tensor, other.tensor
        return mine.data_ptr() == theirs.data_ptr() and mine.shape == theirs.shape and mine.stride() == theirs.stride()


def _forget_pages(tensor: Tensor) -> None:
    """Let go of the memory that a tensor's part of the mapped file takes, or all of the file would be resident."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows, which takes back the pages of a mapped file by itself
        storage = tensor.untyped_storage()
        start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            advice = ctypes.c_int(mmap.MADV_DONTNEED)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def read_pickle(path: Path) -> Any:
    """The object in a file by `torch.save`, its tensors mapped into memory and not yet read.

    Raises UserError where the file is not whole and sound, or holds anything but plain values and
    tensors; nothing in it is run.
    """
    try:
        _check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storages and odd versions
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None
    except UserError:
        raise
    except Exception as error:  # whatever zipfile, pickletools and torch raise for bytes that make no sense
        text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)  # without its advice to run the code
        reason = text.strip().partition("\n")[0][:150].rstrip(".") or type(error).__name__
        raise UserError(f"{path} is not a whole file of torch.save: {reason}.") from None


def _check(path: Path) -> None:
    """Raise unless the file is what torch.save writes, and names nothing that isn't HARMLESS."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise UserError(f"{path} is not a file of torch.save: its records are compressed.")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise UserError(f"{path} is not a whole file of torch.save: its records are larger than the file.")
        pickles = [record for record in records if record.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is not a file of torch.save: it has {len(pickles)} pickles, and must have one.")
        content = archive.read(pickles[0])
    stack: list[int | None] = []
    memo: dict[Any, int | None] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if number == MAX_OPERATIONS or _weighed(operation.name, argument, stack, memo) > MAX_TUPLE:
            raise UserError(f"{path} has more objects, or deeper ones, than the tensors of a model need.")
        if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL") and argument not in HARMLESS:
            name = str(argument or "something").replace(" ", ".")[:80]
            raise UserError(
                f"{path} names {name}, which would run code: only plain values and tensors are read, and nothing ran."
            )


def _effect(operation: pickletools.OpcodeInfo) -> tuple[bool, int, list[bool], bool]:
    """What an operation does to the stack: whether it takes all down to a mark, and how many values then.

    And, for each that it puts there, whether that is a mark; and whether it makes a tuple.
    """
    before, after = operation.stack_before, operation.stack_after
    marked = pickletools.markobject in before
    taken = before.index(pickletools.markobject) if marked else len(before)
    return marked, taken, [kind is pickletools.markobject for kind in after], operation.name.startswith("TUPLE")


EFFECTS = {operation.name: _effect(operation) for operation in pickletools.opcodes}
PUTS, GETS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")


def _weighed(name: str, argument: Any, stack: list[int | None], memo: dict[Any, Any]) -> int:
    """Follow an operation of pickle; how many tuples are in the value on top, each counted as often as it is there.

    To hash a tuple, as the key of a dictionary, goes through all of these, on the C stack. None is a mark.
    """
    if name in PUTS:
        memo[len(memo) if argument is None else argument] = stack[-1]
    elif name in GETS:
        stack.append(memo[argument])
    else:
        marked, taken, put, is_tuple = EFFECTS[name]
        weight = 1
        if marked:
            while (value := stack.pop()) is not None:
                weight += value
        for _ in range(taken):
            weight += stack.pop() or 0
        if put:
            stack += [None if mark else weight if is_tuple else 0 for mark in put]
    return (stack[-1] if stack else 0) or 0


def stored_tensors(value: Any, what: str) -> dict[str, StoredTensor]:
    """The tensors of a state dict, by name; UserError where `value` is none. `what` it is, is for the message."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{what} is not a state dict: a dictionary of tensors by name.")
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise UserError(f"{name[:80]} of {what} is not a tensor of floating-point numbers.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # by a stride of 0
            raise UserError(f"The tensor {name[:80]} of {what} claims more numbers than are stored.")
    return {name: StoredTensor(tensor) for name, tensor in value.items()}


def write_state_dict(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str = "float32",
) -> None:
    """Write tensors of one dtype for `torch.load(weights_only=True)` as they come, in the order of `shapes`, and sync.

    bfloat16 comes as uint16. torch.save leaves room for the tensors, which are then put there one by one.
    """
    with torch.serialization.skip_data():
        # of memory that is never touched
        torch.save({name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, shape in shapes.items()}, path)
    with zipfile.ZipFile(path) as archive:
        directory, records = archive.start_dir, archive.infolist()
    checks = {}
    with path.open("r+b") as file:
        for number, ((name, shape), (given, array)) in enumerate(zip(shapes.items(), tensors, strict=True)):
            if given != name or array.shape != shape:
                raise ValueError(f"{given} {array.shape} came, where {name} {shape} is next")
            record = next(record for record in records if record.filename.endswith(f"/data/{number}"))
            data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
            file.seek(_begin(file, record))
            file.write(data)
            checks[record.filename] = zlib.crc32(data)
        _correct_checks(file, directory, records, checks)
        file.flush()
        os.fsync(file.fileno())


def _begin(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where a record's data begin: after a header of 30 bytes, its name and padding."""
    file.seek(record.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + int(name) + int(extra)


def _correct_checks(file: BinaryIO, at: int, records: list[zipfile.ZipInfo], checks: Mapping[str, int]) -> None:
    """Put CRC-32s into a zip file's directory, which begins at `at`: torch.save's are of the empty room."""
    for record in records:
        if record.filename in checks:
            file.seek(at + 16)
            file.write(struct.pack("<I", checks[record.filename]))
        file.seek(at + 28)
        at += 46 + sum(struct.unpack("<HHH", file.read(6)))  # name, extra field, comment
