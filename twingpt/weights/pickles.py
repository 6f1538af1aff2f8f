"""PyTorch's files, by way of torch_file.py, as nothing else here imports torch; and the plain files beside them."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from twingpt.backends.registry import how_to_install, installed
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.errors import UserError
from twingpt.core.tokenizer import GIVE_ONE, Tokenizer
from twingpt.weights.families.family import unwrapped

Array = np.ndarray

SUFFIXES = (".pt", ".pth")
MAX_PLAIN, MAX_OPERATIONS = 2**24, 2**18  # bytes and operations of pickle: less than a second's work

# What numbers, texts, lists and dictionaries need of pickle's operations; the others make objects or call something,
# or tuples, which as keys take for ever, or the stack, where they are nested deeply.
PLAIN_OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2",
    "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET",
    "LONG_BINGET",
}  # fmt: skip


class StoredTensor(Protocol):
    """A tensor of a file, read when asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> str:
        """How it is stored, by the name that safetensors has for it."""

    def read(self, rows: slice = slice(None)) -> Array:
        """A float32 copy, of some of its rows."""

    def same_memory(self, other: Any) -> bool:
        """Whether both are the same bytes of the file."""


State = dict[str, StoredTensor]  # a state dict


def torch_files(path: Path) -> Any:
    """torch_file.py, which imports torch, or UserError where PyTorch is not there to read `path` by."""
    if not installed("torch"):
        raise UserError(f"{path} is a file of PyTorch, which is not installed: {how_to_install('torch')}.")
    from twingpt.weights import torch_file

    return torch_file


def is_torch_file(path: Path) -> bool:
    """Whether `path` is named and begins as a file by torch.save does; reads four bytes."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_pickle(path: Path) -> Any:
    """The object in a file by `torch.save`; raises UserError for anything but plain values and tensors."""
    return torch_files(path).read_pickle(path)


def state_of(value: Any, path: Path) -> State:
    """The tensors of a state dict that was read from `path`, without what torch.compile and the like put in names."""
    found: State = torch_files(path).stored_tensors(value, f"the model in {path}")
    state = {unwrapped(name): tensor for name, tensor in found.items()}
    if len(state) < len(found):
        raise UserError(f"{path} has a tensor twice, with and without a prefix as _orig_mod.")
    return state


def check_state(state: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise UserError unless the state has exactly the wanted tensors in their shapes; reads none."""
    for name, shape in wanted.items():
        if name not in state:
            raise UserError(f"The tensor {name} is missing from {path}.")
        if state[name].shape != shape:
            raise UserError(f"The tensor {name} in {path} has shape {state[name].shape}, and the model needs {shape}.")
    for name in state:
        if name not in wanted:
            raise UserError(f"{path} has a tensor {name[:80]}, for which this model has no place.")


def tokenizer_of(directory: ModelDirectory, model: Path) -> Tokenizer:
    """The tokenizer of the tokenizer.json in the folder of a `model`; UserError where there is none."""
    if not (directory.path / "tokenizer.json").is_file():
        raise no_tokenizer(model)
    return directory.tokenizer


def no_tokenizer(path: Path) -> UserError:
    """The error that says that the model at `path` has no tokenizer."""
    return UserError(f"{path} has no tokenizer: the model can be converted, but takes no text until {GIVE_ONE}.")


def read_plain_pickle(path: Path) -> Any:
    """The object in a pickle of numbers, texts, lists and dictionaries.

    Raises UserError for any other pickle before it is read: no operation that could make or call
    something is among PLAIN_OPERATIONS.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PLAIN + 1)
        if len(content) > MAX_PLAIN:
            raise UserError(f"{path} is too large for a table of characters.")
        for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
            if number == MAX_OPERATIONS:
                raise UserError(f"{path} is too large for a table of characters.")
            if operation.name not in PLAIN_OPERATIONS:
                raise UserError(f"{path} is a pickle with more than plain values in it, and was not read.")
            if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
                raise UserError(f"{path} is not a sound pickle.")  # its reader would make a table of that length
        return pickle.loads(content)  # noqa: S301  (nothing but plain operations)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    except UserError:
        raise
    except Exception as error:  # whatever pickle and pickletools raise for bytes that make no sense
        raise UserError(f"{path} is not a sound pickle: {str(error)[:100]}.") from None
