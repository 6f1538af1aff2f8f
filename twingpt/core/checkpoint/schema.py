"""The checkpoint schema: a model directory that the ecosystem opens, saved atomically and read with suspicion."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from twingpt.core.checkpoint.config_json import model_type, portable_config, token_ids
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.quantize import Quantization, dequantized, from_config, stored_shapes
from twingpt.core.checkpoint.safetensors_file import DTYPES, Entry, Shapes, TensorFile, finite, write_safetensors
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table, state_table
from twingpt.core.paths import new_folder, write_synced
from twingpt.core.reading import inside, short
from twingpt.core.tokenizer import Tokenizer, files

Array = np.ndarray

SCHEMA = 1
SHARD_BYTES = 5 * 10**9
MODEL, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
BESIDE = re.compile(r"\.\w.*|(README|LICENSE|NOTICE)(\..*)?")  # no part of a model: people and git put them there


class ManifestError(UserError):
    """A checkpoint has other files than its manifest says: it is damaged, or another tool saved it in place."""


def _shards(shapes: Shapes, dtypes: Mapping[str, str]) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in files of at most SHARD_BYTES, in order."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = _bytes(name, shape, dtypes)
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    return shards


def write_model(
    folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, Array]], dtypes: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """model.safetensors, or numbered shards and their index; the manifest entries of all but the index.

    The tensors come in the order of `shapes`, and are float32 but where `dtypes` says otherwise.
    """
    shards, source = _shards(shapes, dtypes), iter(tensors)
    if len(shards) == 1:
        return {MODEL: write_safetensors(folder / MODEL, shapes, source, dtypes)}
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = {
        "metadata": {"total_size": sum(_bytes(name, shape, dtypes) for name, shape in shapes.items())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    write_synced(folder / f"{MODEL}.index.json", json.dumps(index, indent=2).encode())
    return {
        file: write_safetensors(folder / file, shard, itertools.islice(source, len(shard)), dtypes)
        for file, shard in zip(names, shards, strict=True)
    }


def _bytes(name: str, shape: tuple[int, ...], dtypes: Mapping[str, str]) -> int:
    return math.prod(shape) * np.dtype(DTYPES[dtypes.get(name, "F32")]).itemsize


def save(
    folder: Path,
    config: GPTConfig,
    tokenizer: Tokenizer,
    tensors: Mapping[str, Array],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint in one atomic step: at `folder` there is all of it or what was there before.

    `tensors` holds the parameters and, with `training`, which becomes training_state.json, the state of
    the optimizer that it names: together what training can continue from. Raises UserError where it
    can't be written (a full disk, a folder without permission); nothing half-written stays.
    """
    parameters = {name: row.shape for name, row in parameter_table(config).items()}
    texts = model_texts(config, tokenizer, None)
    if training is not None:
        texts["training_state.json"] = json.dumps({"schema": SCHEMA, **training}, indent=2)
    try:
        with new_folder(folder) as temporary:
            entries = write_model(temporary, parameters, ((name, tensors[name]) for name in parameters))
            if training is not None:
                state = {name: array.shape for name, array in tensors.items() if name not in parameters}
                ordered = ((name, tensors[name]) for name in state)
                entries[OPTIMIZER] = write_safetensors(temporary / OPTIMIZER, state, ordered)
            write_texts(temporary, texts, entries)
    except OSError as error:
        raise UserError(
            f"The checkpoint can't be saved to {folder} ({error.strerror}): free some space or mend the folder; "
            "earlier checkpoints are untouched."
        ) from error


def save_model(
    folder: Path,
    config: GPTConfig,
    tokenizer: Tokenizer | None,
    tensors: Iterable[tuple[str, Array]],
    quantization: Quantization | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
    ids: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a model that isn't trained on here, in one atomic step, holding one tensor at a time.

    `tensors` are those of `stored_shapes`, `texts` further files, by name, `ids` those of special tokens. Raises
    OSError where it can't be written; nothing half-written stays.
    """
    shapes, dtypes = stored_shapes(config, quantization)
    with new_folder(folder) as temporary:
        entries = write_model(temporary, shapes, tensors, dtypes)
        write_texts(temporary, model_texts(config, tokenizer, quantization, ids) | dict(texts), entries)


def model_texts(
    config: GPTConfig,
    tokenizer: Tokenizer | None,
    quantization: Quantization | None,
    ids: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, str]:
    """The files of a model directory beside its tensors, by name; `ids` go before those of the tokenizer."""
    usual = token_ids(tokenizer)
    content = portable_config(config, {**usual, **ids})
    if quantization:  # MLX reads the first, transformers the second
        content |= {"quantization": quantization.to_json(), "quantization_config": quantization.to_json()}
    texts = {"config.json": json.dumps(content, indent=2)}
    if tokenizer:
        ends = [*dict.fromkeys((usual["eos_token_id"], tokenizer.end_of_text))]
        settings = {**usual, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        texts["generation_config.json"] = json.dumps(settings, indent=2)
        texts |= files(tokenizer, config.block_size)
    return texts


def write_texts(folder: Path, texts: Mapping[str, str], entries: Mapping[str, Any]) -> None:
    """Write the texts of a model directory, and last its manifest: `entries` of the tensors' files, and the rest's."""
    for name, text in texts.items():
        write_synced(folder / name, text.encode())
    described = dict(entries)
    for path in folder.iterdir():
        described.setdefault(path.name, {"size": path.stat().st_size, "sha256": _sha256(path)})
    manifest = {"schema": SCHEMA, "files": dict(sorted(described.items()))}
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=2).encode())


class Model(ABC):
    """A model on disk. Tensors are read when asked for, one at a time, in the order of the parameter table.

    `quantization` is how `stored` gives its matrices, if not in float32.
    """

    quantization: Quantization | None = None

    def __init__(self, directory: ModelDirectory, config: GPTConfig) -> None:
        self.directory = directory
        self.config = config

    @property
    def folder(self) -> Path:
        """Its folder, or its file."""
        return self.directory.path

    @property
    @abstractmethod
    def family(self) -> str:
        """The family of its architecture."""

    def tokenizer(self) -> Tokenizer:
        """What its ids mean; UserError where that isn't known."""
        return self.directory.tokenizer

    @abstractmethod
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, by the names of safetensors, and shape) of every tensor, as its files have them."""

    def dtypes(self) -> dict[str, int]:
        """How many of its tensors are stored in each dtype."""
        return dict(Counter(dtype for dtype, _ in self.tensors().values()))

    @abstractmethod
    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter."""

    def stored(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, array) of every tensor as `stored_shapes` has them."""
        return self.parameters()


class Checkpoint(Model):
    """A checkpoint on disk: `files` are those that its manifest vouches for, or those of a model without one.

    Tensors are read when asked for.
    """

    def __init__(
        self, directory: ModelDirectory, config: GPTConfig, quantization: Quantization | None, files: Collection[str]
    ) -> None:
        super().__init__(directory, config)
        self.files, self.quantization = files, quantization

    @property
    def family(self) -> str:
        """The transformers family that computes it, or twingpt for none."""
        return model_type(self.config)

    def training(self) -> dict[str, Any]:
        """training_state.json, or UserError where the checkpoint holds only a model."""
        if "training_state.json" not in self.files:
            raise UserError(f"{self.folder} holds a model without its training state: it can't be resumed.")
        state = self.directory.json("training_state.json", "checkpoint")
        if not _is_training_state(state):
            path = self.folder / "training_state.json"
            raise UserError(f"{path} is not what this version of twingpt writes: the run can't be resumed from it.")
        TrainConfig.from_dict(state["train"])
        return dict(state)

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter, dequantized where need be."""
        return dequantized(self.stored(), self.config)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of the model, as its files have them."""
        return described(self._model_files())

    def _model_files(self) -> list[TensorFile]:
        names = [name for name in self.files if name.startswith("model") and name.endswith(".safetensors")]
        return [self.directory.tensor_file(name) for name in names]

    def stored(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, array) of every tensor of the model as it is stored (see `Quantization`)."""
        files = self._model_files()
        check_layers(self.config.n_layer, sum(len(file.entries) for file in files), self.folder)
        yield from read_tensors(files, *stored_shapes(self.config, self.quantization))

    def optimizer_state(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of the optimizer's state."""
        train = self.training()["train"]
        table = state_table(self.config, train["optimizer"], train["dtype"])
        yield from read_tensors([self.directory.tensor_file(OPTIMIZER)], table)


def described(files: Iterable[TensorFile]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of `files`."""
    return {name: (entry.dtype, entry.shape) for file in files for name, entry in file.entries.items()}


def check_layers(n_layer: int, n_tensors: int, path: Path) -> None:
    """Raise UserError for more layers than there are tensors, before anything is made for each of them."""
    if n_layer > n_tensors:
        raise UserError(f"{path} says that the model has {n_layer} layers, and has {n_tensors} tensors.")


def _is_training_state(state: Any) -> bool:
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        return False
    step, train = state.get("step"), state.get("train")
    losses = [state.get(name, "missing") for name in ("train_loss", "val_loss", "val_bpb", "best_val_loss")]
    milestones = [state.get(name, -1) for name in ("evaluated_at", "sampled_at")]  # older checkpoints have none
    return (
        type(step) is int
        and step >= 0
        and all(loss is None or type(loss) in (int, float) for loss in losses)
        and all(type(milestone) is int for milestone in milestones)
        and isinstance(state.get("data"), str)
        and isinstance(train, dict)
        and {"optimizer", "dtype"} <= set(train) <= {field.name for field in dataclasses.fields(TrainConfig)}
    )


def read_tensors(
    files: Sequence[TensorFile], table: Shapes, dtypes: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) of safetensors files that together hold exactly the tensors of `table`.

    They are float32 but where `dtypes` says otherwise, and come in the order of `table`, one at a time.
    Every entry is checked before any tensor is read; UserError names the tensor and the file.
    """
    homes = {}
    for file in files:
        for name, entry in file.entries.items():
            _check_tensor(name, entry, table, dtypes.get(name, "F32"), file.path)
            homes[name] = file
    for name in table:
        if name not in homes:
            raise UserError(f"The tensor {name} is missing from {', '.join(file.path.name for file in files)}.")
    for name in table:
        yield name, finite(homes[name].read(name), name, homes[name].path)


def _check_tensor(name: str, entry: Entry, table: Shapes, dtype: str, path: Path) -> None:
    if name not in table:
        raise UserError(f"{path} has a tensor {name}, which this model has not.")
    if entry.shape != table[name]:
        raise UserError(f"The tensor {name} in {path} has shape {entry.shape}, and the model needs {table[name]}.")
    if entry.dtype != dtype:
        raise UserError(f"The tensor {name} in {path} is {entry.dtype}, and must be {dtype}.")


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**18):
            sha.update(chunk)
    return sha.hexdigest()


def _damaged_tensor(path: Path, checks: Mapping[str, str]) -> str | None:
    """The first tensor of a safetensors file whose bytes changed, if the header still leads to it."""
    with path.open("rb") as file:
        try:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, path.stat().st_size)))
            for name, check in checks.items():
                start, end = header[name]["data_offsets"]
                file.seek(8 + size + start)
                if f"{zlib.crc32(file.read(min(end - start, path.stat().st_size))):08x}" != check:
                    return name
        except (ValueError, KeyError, TypeError, OSError):
            return None
    return None


def verify(folder: Path, files: Mapping[str, Any]) -> None:
    """Raise ManifestError unless every file of the manifest is there, of its size and of its SHA-256, and no other.

    What is `BESIDE` the model may be missing, altered or new.
    """
    for name, entry in files.items():
        if BESIDE.fullmatch(name):
            continue
        path = inside(folder, name, "checkpoint")
        size = path.stat().st_size
        if size != entry["size"]:
            raise ManifestError(
                f"{path} has {size} bytes, and its manifest says {short(entry['size'])}: it was cut or altered."
            )
        if _sha256(path) != entry["sha256"]:
            tensor = _damaged_tensor(path, entry.get("crc32", {}))
            where = f"the tensor {tensor} in {path}" if tensor else str(path)
            raise ManifestError(f"The bytes of {where} do not match the manifest's SHA-256: the file is damaged.")
    known = {*files, MANIFEST}
    extra = sorted(path.name for path in folder.iterdir() if path.name not in known and not BESIDE.fullmatch(path.name))
    if extra:
        raise ManifestError(f"{folder} has a file {extra[0]} that its manifest does not list: remove it.")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify the checkpoint in `folder`; UserError says what is wrong with which file."""
    return read_checkpoint(ModelDirectory(folder))


def read_checkpoint(directory: ModelDirectory) -> Checkpoint:
    """As `open_checkpoint`, of a directory of which something may have been read."""
    folder, manifest = directory.path, directory.json(MANIFEST, "checkpoint")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{folder / MANIFEST} is not a manifest.")
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{folder} has checkpoint schema {short(manifest.get('schema'))}, and this version reads {SCHEMA}."
        )
    try:
        verify(folder, manifest["files"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / MANIFEST} is not a manifest.") from None
    return Checkpoint(directory, *own_config(directory), manifest["files"])


def own_config(directory: ModelDirectory) -> tuple[GPTConfig, Quantization | None]:
    """The configuration and the quantization in a config.json of ours; UserError where it is none."""
    content = directory.json("config.json", "checkpoint")
    if not isinstance(content, dict) or not isinstance(content.get("twingpt"), dict):
        raise UserError(f"{directory.path / 'config.json'} has no twingpt section.")
    return GPTConfig.from_dict(content["twingpt"]), from_config(content, directory.path / "config.json")
