"""GGUF files, which llama.cpp runs: read as models of ours, and written from them, a tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.safetensors_file import finite
from twingpt.core.checkpoint.schema import Model, check_layers
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.paths import rename, sync_folder
from twingpt.core.reading import short
from twingpt.core.tokenizer import Tokenizer
from twingpt.weights.dtypes import DTYPES, round_to
from twingpt.weights.export import Export
from twingpt.weights.gguf.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    HEAD,
    ROPE_FREQS,
    Architecture,
    architecture_for,
    rope_factors,
)
from twingpt.weights.gguf.file import MAGIC, PLAIN, GGUFFile, can_dequantize, require_gguf
from twingpt.weights.gguf.vocabulary import tokenizer_from, vocabulary

if TYPE_CHECKING:
    import gguf

Array = np.ndarray

FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # llama.cpp's numbers
POSITIONS = "position_embd.weight"
MAX_HEAD = 2**16  # numbers that a head rotates by


class GGUF:
    """A GGUF file of an architecture of llama.cpp's whose family is known, in any type that can be dequantized."""

    name = target = "gguf"

    def detect(self, directory: ModelDirectory) -> bool:
        """Whether it is a file that begins as one; reads four bytes."""
        if not directory.path.is_file():
            return False
        with directory.path.open("rb") as file:
            return file.read(4) == MAGIC

    def open(self, directory: ModelDirectory) -> GGUFModel:
        """Read the header; UserError for an architecture or an option that isn't supported."""
        file = directory.read_once(directory.path, GGUFFile)
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise UserError(
                f"{file.path} is of the architecture {short(name)}: only {', '.join(ARCHITECTURES)} are read."
            )
        if isinstance(parts := file.metadata.get("split.count"), int) and parts > 1:
            raise UserError(
                f"{file.path} is a part of a model: join them by llama-gguf-split --merge, and give the whole."
            )
        return GGUFModel(directory, file, ARCHITECTURES[name])

    def write(self, folder: Path, export: Export) -> dict[str, str]:
        """Write the file `folder`; UserError for a model or a tokenizer that llama.cpp has not."""
        if export.tokenizer is None:
            raise UserError(f"{export.source} has no tokenizer, and a GGUF file needs one.")
        write(folder, export.config, export.tensors, export.tokenizer, export.source.name, export.dtype)
        return {}


class GGUFModel(Model):
    """A GGUF file whose header was read; tensors are read when asked for."""

    def __init__(self, directory: ModelDirectory, file: GGUFFile, architecture: Architecture) -> None:
        self.file, self.architecture = file, architecture
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        few = ROPE_FREQS in shapes and math.prod(shapes[ROPE_FREQS]) <= MAX_HEAD and architecture.has_rope_freqs
        factors = finite(file.read(ROPE_FREQS), ROPE_FREQS, file.path).reshape(-1) if few else None
        try:
            config = architecture.config(file.metadata, shapes, factors)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from None
        super().__init__(directory, config)

    @property
    def family(self) -> str:
        """The `model_type` of the family that its architecture computes."""
        return self.architecture.model_type

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in its metadata; UserError where there is none, or none that computes the same here."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer_from(self.file.metadata, str(self.file.path))

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (type, by the names of GGUF, and shape) of every tensor."""
        return {name: (tensor.type, tensor.shape) for name, tensor in self.file.tensors.items()}

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter, dequantized where need be.

        All names, shapes and types are checked before the first is read, when this is called; UserError names the
        tensor and the file.
        """
        self.directory.check_unchanged()
        check_layers(self.config.n_layer, len(self.file.tensors), self.folder)
        layout = self.architecture.layout(self.config)
        self._check(layout)
        return self._read(layout)

    def _check(self, layout: Mapping[str, tuple[str, ...]]) -> None:
        shapes, path = _shapes(self.config, layout), self.folder
        for name, shape in shapes.items():
            if name not in self.file.tensors:
                raise UserError(f"The tensor {name} is missing from {path}.")
            tensor = self.file.tensors[name]
            if tensor.shape != shape:
                raise UserError(f"The tensor {name} in {path} has shape {tensor.shape}, and must have {shape}.")
            if tensor.type not in PLAIN and not can_dequantize(tensor.type):
                raise UserError(
                    f"The tensor {name} in {path} is {tensor.type}, which the gguf package can't dequantize."
                )
        scaled = {ROPE_FREQS} if self.architecture.has_rope_freqs else set()
        if beside := next((name for name in self.file.tensors if name not in shapes and name not in scaled), None):
            raise UserError(f"{path} has a tensor {beside}, which this model has not.")

    def _read(self, layout: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Array]]:
        table = parameter_table(self.config)
        homes = {ours: (theirs, i) for theirs, parts in layout.items() for i, ours in enumerate(parts)}
        whole: dict[str, Array] = {}  # of theirs, until the last part is taken
        for ours, row in table.items():
            theirs, i = homes[ours]
            if i == 0:
                whole[theirs] = finite(self.file.read(theirs), theirs, self.folder)
            start = sum(table[before].shape[0] for before in layout[theirs][:i])
            part = whole[theirs][start : start + row.shape[0]]
            yield ours, np.ascontiguousarray(self.architecture.from_stored(ours, part, self.config))
            if i == len(layout[theirs]) - 1:
                del whole[theirs]


def write(
    path: Path,
    config: GPTConfig,
    tensors: Iterable[tuple[str, Array]],
    tokenizer: Tokenizer,
    name: str,
    dtype: str = "float32",
) -> None:
    """Write a GGUF file in one atomic step, holding one tensor at a time, or one and a tied head.

    `tensors` are float32 parameters in the order of the parameter table, of which matrices are stored in `dtype`.
    A file that is there is replaced. Raises UserError for a model or a tokenizer that llama.cpp has not, for a
    number that `dtype` has not, and where the file can't be written.
    """
    architecture = architecture_for(config)
    metadata = architecture.metadata(config) | vocabulary(tokenizer, config.vocab_size)
    require_gguf("Writing")
    import gguf

    sizes = _stored_shapes(config, architecture)
    dtypes = {stored: _dtype(stored, size, dtype) for stored, size in sizes.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(temporary, architecture.name)
        for key, value in {"general.name": name, "general.file_type": FILE_TYPES[dtype], **metadata}.items():
            _add(writer, key, value)
        for stored, size in sizes.items():
            width = 4 if dtypes[stored] == "float32" else 2
            kind = gguf.GGMLQuantizationType[DTYPES[dtypes[stored]]]
            writer.add_tensor_info(stored, size, np.dtype(np.float32), math.prod(size) * width, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored, array in _stored_tensors(config, architecture, tensors):
            writer.write_tensor_data(round_to(dtypes[stored], np.ascontiguousarray(array), stored))
        writer.close()
        with temporary.open("r+b") as file:  # Windows syncs no file that is open for reading alone
            os.fsync(file.fileno())
        rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}.") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A piece of metadata, of the type that llama.cpp reads it as."""
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _shapes(config: GPTConfig, layout: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape of the tensors that hold ours."""
    table = parameter_table(config)
    return {
        name: (sum(table[ours].shape[0] for ours in parts), *table[parts[0]].shape[1:])
        for name, parts in layout.items()
    }


def _stored_shapes(config: GPTConfig, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape of all that is written, in the order of `_stored_tensors`."""
    shapes: dict[str, tuple[int, ...]] = {}
    if rope_factors(config) is not None:
        shapes[ROPE_FREQS] = (config.rope_dim // 2,)
    for name, shape in _shapes(config, architecture.layout(config)).items():
        shapes[name] = shape
        if name == EMBEDDING and _copies_head(config, architecture):
            shapes[HEAD] = shape
    return shapes


def _stored_tensors(
    config: GPTConfig, architecture: Architecture, tensors: Iterable[tuple[str, Array]]
) -> Iterator[tuple[str, Array]]:
    factors, layout = rope_factors(config), architecture.layout(config)
    if factors is not None:
        yield ROPE_FREQS, factors
    homes = {ours: theirs for theirs, parts in layout.items() for ours in parts}
    waiting: dict[str, list[Array]] = {}
    for ours, array in tensors:
        stored = homes[ours]
        parts = waiting.setdefault(stored, [])
        parts.append(architecture.to_stored(ours, array, config))
        if len(parts) == len(layout[stored]):
            del waiting[stored]
            yield stored, parts[0] if len(parts) == 1 else np.concatenate(parts)
            if stored == EMBEDDING and _copies_head(config, architecture):
                yield HEAD, parts[0]


def _copies_head(config: GPTConfig, architecture: Architecture) -> bool:
    return config.tie_embeddings and architecture.head


def _dtype(stored: str, size: tuple[int, ...], dtype: str) -> str:
    """Vectors and positions, which are added to, stay in float32."""
    return "float32" if len(size) == 1 or stored == POSITIONS else dtype
