"""Hugging Face directories: read as models of ours, and written from them, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from twingpt.core import reading
from twingpt.core.checkpoint.safetensors_file import TensorFile
from twingpt.core.checkpoint.schema import MODEL, check_layers, write_model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.paths import expand, new_folder, write_synced
from twingpt.core.reading import inside
from twingpt.core.tokenizer import Tokenizer
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.weights.families import Family, family_of, require_family

Array = np.ndarray

INDEX = f"{MODEL}.index.json"
FLOATS = ("F32", "F16", "BF16")
HEAD = "lm_head.weight"

Layout = Mapping[str, tuple[str, ...]]  # a tensor of theirs -> those of ours that it holds
Found = dict[str, tuple[TensorFile, str]]  # a tensor of theirs -> where it is, and its name there


def is_huggingface(path: str | Path) -> bool:
    """Whether `path` is a model directory of someone else's: a config.json, and nothing of ours in or beside it."""
    folder = expand(path)
    if not (folder / "config.json").is_file() or (folder / "manifest.json").exists():
        return False
    try:
        return "twingpt" not in read_json(folder, "config.json")
    except UserError:  # the one who opens it says what is wrong
        return True


def read_config(folder: Path) -> GPTConfig:
    """The configuration of a Hugging Face directory.

    Raises UserError, naming the file, for a family or an option that isn't supported.
    """
    content = read_json(folder, "config.json")
    try:
        return family_of(content).config(content)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    except OverflowError:
        raise UserError(f"{folder / 'config.json'}: a number in it is too large.") from None


def tensors(
    folder: Path, config: GPTConfig, family: Family | None = None, files: Sequence[TensorFile] = ()
) -> Iterator[tuple[str, Array]]:
    """(name, float32 array) of every parameter, in the order of the parameter table, one at a time.

    All names, shapes and dtypes are checked before the first is read; UserError names the tensor and the
    file. `family` and `files` are those of the folder, but where its format differs from Hugging Face's.
    """
    family = family or family_of(read_json(folder, "config.json"))
    files = files or tensor_files(folder)
    check_layers(config.n_layer, sum(len(file.entries) for file in files), folder)
    layout = family.layout(config)
    found = _by_canonical_name(files, family, layout)
    _check(found, family, layout, config, folder)
    return _read(found, family, layout, config)


@dataclass(frozen=True)
class HuggingFaceModel:
    """A Hugging Face directory whose config.json has been read; tensors are read when asked for."""

    folder: Path
    config: GPTConfig
    family: str
    quantization: None = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in tokenizer.json."""
        return tokenizer_of(self.folder)

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter."""
        return tensors(self.folder, self.config)

    def stored(self) -> Iterator[tuple[str, Array]]:
        """As `parameters`: quantized files are not read."""
        return self.parameters()


def open_huggingface(path: str | Path) -> HuggingFaceModel:
    """Open a Hugging Face directory; UserError for one that can't be read as a model of ours."""
    folder = expand(path)
    return HuggingFaceModel(folder, read_config(folder), family_of(read_json(folder, "config.json")).model_type)


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer in a directory's tokenizer.json."""
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json: the model can be converted, but takes no text.")
    return load_tokenizer(folder)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the directory; UserError where there is none."""
    path = inside(folder, name)
    content = reading.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content


def tensor_files(folder: Path) -> list[TensorFile]:
    """model.safetensors, or the files that its index names."""
    if (folder / MODEL).exists():
        return [TensorFile(inside(folder, MODEL))]
    if not (folder / INDEX).exists():
        found = next((path.name for path in folder.glob("*.bin")), None)
        hint = f": {found} is a pickle, which could run code; save it as safetensors first." if found else "."
        raise UserError(f"{folder} has no {MODEL}{hint}")
    places = read_json(folder, INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files.")
    files = {name: TensorFile(inside(folder, name)) for name in sorted(set(places.values()))}
    for tensor, place in places.items():
        if tensor not in files[place].entries:
            raise UserError(f"The tensor {tensor[:80]} is missing from {folder / place}, where the index has it.")
    return list(files.values())


def _by_canonical_name(files: Iterable[TensorFile], family: Family, layout: Layout) -> Found:
    """Every tensor that takes part in the model -> its file, and its name there."""
    found: Found = {}
    for file in files:
        for name in file.entries:
            canonical = family.canonical(name, layout)
            if canonical in found:
                raise UserError(f"The tensor {canonical} is there twice, the second time in {file.path}.")
            if canonical is not None:
                found[canonical] = (file, name)
    return found


def _equal(file: TensorFile, name: str, other_file: TensorFile, other: str) -> bool:
    """Whether two tensors have the same numbers; holds a piece of each."""
    if file.entries[name].shape != other_file.entries[other].shape:
        return False
    return all(np.array_equal(a, b) for a, b in zip(file.pieces(name), other_file.pieces(other), strict=True))


def _check(found: Found, family: Family, layout: Layout, config: GPTConfig, folder: Path) -> None:
    """Names, shapes and dtypes against the parameter table; takes a tied head that is there out of `found`."""
    table = parameter_table(config)
    head = family.rename(HEAD)
    if config.tie_embeddings and head in found and not _equal(*found.pop(head), *found[next(iter(layout))]):
        raise UserError(f"{folder} has a tensor {head} beside the embedding that config.json says it is tied to.")
    for name in layout:
        if name not in found:
            raise UserError(f"The tensor {name} is missing from {folder}.")
    for name, (file, stored) in found.items():
        if name not in layout:
            raise UserError(f"{file.path} has a tensor {stored}, which this model has not.")
        entry, shape = file.entries[stored], family.shape(name, [table[ours].shape for ours in layout[name]])
        if entry.shape != shape:
            raise UserError(f"The tensor {stored} in {file.path} has shape {entry.shape}, and must have {shape}.")
        if entry.dtype not in FLOATS:
            raise UserError(f"The tensor {stored} in {file.path} is {entry.dtype}, and must be {' or '.join(FLOATS)}.")


def _read(found: Found, family: Family, layout: Layout, config: GPTConfig) -> Iterator[tuple[str, Array]]:
    homes = {ours: (theirs, i) for theirs, parts in layout.items() for i, ours in enumerate(parts)}
    whole: dict[str, Array] = {}  # of theirs, until the last part is taken
    for ours in parameter_table(config):
        theirs, i = homes[ours]
        if i == 0:
            file, stored = found[theirs]
            whole[theirs] = file.read_float(stored)
        count = len(layout[theirs])
        yield ours, np.ascontiguousarray(family.part(whole[theirs], theirs, i, count, config))
        if i == count - 1:
            del whole[theirs]


def write(
    folder: Path,
    config: GPTConfig,
    parameters: Iterable[tuple[str, Array]],
    ids: Mapping[str, Any] = MappingProxyType({}),
    texts: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Write a model as a Hugging Face directory, atomically, holding one tensor at a time; the family's name.

    `parameters` come in the order of the parameter table; `ids` are bos_token_id and eos_token_id for
    config.json, `texts` further files, by name. What was at `folder` is replaced. Raises UserError where no
    family in transformers computes this model.
    """
    family = require_family(config)
    table, layout = parameter_table(config), family.layout(config)
    shapes = {name: family.shape(name, [table[ours].shape for ours in parts]) for name, parts in layout.items()}
    content = {**family.content(config), "bos_token_id": None, "eos_token_id": None, **ids}
    try:
        with new_folder(folder) as temporary:
            write_model(temporary, shapes, joined(parameters, family, layout, config))
            write_synced(temporary / "config.json", json.dumps(content, indent=2).encode())
            for name, text in texts.items():
                write_synced(temporary / name, text.encode())
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}.") from error
    return family.model_type


def joined(
    parameters: Iterable[tuple[str, Array]], family: Family, layout: Layout, config: GPTConfig
) -> Iterator[tuple[str, Array]]:
    """Our parameters, in the order of the parameter table -> theirs, in the order of the family's layout.

    Quantized matrices may come as they are stored, as words, scales and biases, but for a `transposed` family.
    """
    homes = {ours: theirs for theirs, parts in layout.items() for ours in parts}
    waiting: dict[str, list[Array]] = {}
    for ours, array in parameters:
        site, kind = ours.rsplit(".", 1)
        theirs = homes.get(ours) or homes[f"{site}.weight"]  # of scales and biases
        name = f"{theirs.rsplit('.', 1)[0]}.{kind}"
        parts = waiting.setdefault(name, [])
        parts.append(array)
        if len(parts) == len(layout[theirs]):
            yield name, family.joined(waiting.pop(name), name, config)
