"""Hugging Face directories: read as models of ours, and written from them, a tensor at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.safetensors_file import TensorFile, finite
from twingpt.core.checkpoint.schema import MODEL, Model, check_layers, described, model_texts, write_model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.paths import new_folder, write_synced
from twingpt.core.tokenizer import GIVE_ONE, Tokenizer
from twingpt.tokenizers.vocab_and_merges import has_vocab_and_merges, read_vocab_and_merges
from twingpt.weights.dtypes import DTYPES, rounded
from twingpt.weights.export import Export
from twingpt.weights.families import Family, family_of, require_family

Array = np.ndarray

INDEX = f"{MODEL}.index.json"
FLOATS = ("F32", "F16", "BF16", "F64")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What people take for a model's folder -> what it is.
INSTEAD = {
    "adapter*.safetensors": "{} are adapters to another model; merge them into that one (peft: merge_and_unload, "
    "mlx-lm: mlx_lm.fuse), and give the result",
    "*.gguf": "{} is GGUF; give that file itself",
    "*.bin": "{} is a pickle, which could run code; save it as safetensors first",
    "consolidated*": "{} is as Meta and Mistral name theirs; fetch the files that transformers reads",
    "*.safetensors": "{} has not the name that transformers reads",
    "snapshots/*/config.json": "it is of the hub's cache; give the folder of {}",
    "*/config.json": "a model is inside; give the folder of {}",
}

Layout = Mapping[str, tuple[str, ...]]  # a tensor of theirs -> those of ours that it holds
Places = dict[str, tuple[TensorFile, str]]  # a tensor of theirs -> where it is, and its name there


class HuggingFace:
    """A Hugging Face directory: config.json of a family of transformers, and safetensors."""

    name, target = "huggingface", "hf"

    def detect(self, directory: ModelDirectory) -> bool:
        """Whether it is a model directory of someone else's."""
        return is_huggingface(directory)

    def open(self, directory: ModelDirectory) -> HuggingFaceModel:
        """Read config.json; UserError, naming it, for a family or an option that isn't supported."""
        content = directory.json_object("config.json")
        return HuggingFaceModel(directory, *family_and_config(content, directory.path / "config.json"))

    def write(self, folder: Path, export: Export) -> dict[str, str]:
        """Write a directory with the tokenizer's files and the texts."""
        write(folder, export.config, export.tensors, export.ids, texts_beside(export), export.dtype)
        return {}


class HuggingFaceModel(Model):
    """A Hugging Face directory whose config.json has been read; tensors are read when asked for."""

    def __init__(self, directory: ModelDirectory, architecture: Family, config: GPTConfig) -> None:
        super().__init__(directory, config)
        self.architecture = architecture
        self.config = self._with_head(config)

    def _with_head(self, config: GPTConfig) -> GPTConfig:
        """The configuration, untied where a head of other numbers lies beside the embedding, as transformers has it."""
        places = self._embedding_and_head() if config.tie_embeddings else ()
        if len(places) < 2 or _shape(*places[0]) != _shape(*places[1]) or _equal(*places[0], *places[1]):
            return config
        return dataclasses.replace(config, tie_embeddings=False)

    def _embedding_and_head(self) -> list[tuple[TensorFile, str]]:
        """Where they are, by whichever names the files have; none where the files can't be read."""
        names = [self.architecture.rename(name) for name in (EMBEDDING, HEAD)]
        try:
            places = _by_canonical_name(self.files, self.architecture, dict.fromkeys(names, ()))
        except UserError:  # whoever reads the tensors says what is wrong
            return []
        return [places[name] for name in names if name in places]

    @property
    def family(self) -> str:
        """Its `model_type`."""
        return self.architecture.model_type

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in tokenizer.json, or else in vocab.json and merges.txt."""
        if (self.folder / "tokenizer.json").exists():
            return self.directory.tokenizer
        if has_vocab_and_merges(self.folder):
            return self._vocab_and_merges
        raise UserError(
            f"{self.folder} has no tokenizer.json: the model can be converted, but takes no text until {GIVE_ONE}."
        )

    @cached_property
    def _vocab_and_merges(self) -> Tokenizer:
        return read_vocab_and_merges(self.folder)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor, as the files have them."""
        return described(tensor_files(self.directory))

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter.

        All names, shapes and dtypes are checked before the first is read, when this is called; UserError
        names the tensor and the file.
        """
        config, family = self.config, self.architecture
        self.directory.check_unchanged()
        check_layers(config.n_layer, sum(len(file.entries) for file in self.files), self.folder)
        layout = family.layout(config)
        places = _by_canonical_name(self.files, family, layout)
        _check(places, family, layout, config, self.folder)
        return _read(places, family, layout, config)

    @cached_property
    def files(self) -> Sequence[TensorFile]:
        """The files that its tensors are in."""
        return tensor_files(self.directory)


def is_huggingface(directory: ModelDirectory) -> bool:
    """Whether it is a model directory of someone else's: no manifest, and a config.json whose fields say all of it.

    Ours is one too, after another tool saved it or fetched it without its manifest: the fields go before our section.
    """
    if not (directory.path / "config.json").is_file() or directory.has_manifest:
        return False
    try:
        content = directory.json_object("config.json")
        return "twingpt" not in content or content.get("model_type") != "twingpt"
    except UserError:  # the one who opens it says what is wrong
        return True


def family_and_config(content: Mapping[str, Any], path: Path) -> tuple[Family, GPTConfig]:
    """The family and the configuration that the config.json at `path` describes; UserError names it and the key."""
    try:
        family = family_of(content)
        return family, family.config(dict(content))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OverflowError:
        raise UserError(f"{path}: a number in it is too large.") from None


def tensor_files(directory: ModelDirectory) -> list[TensorFile]:
    """model.safetensors, or the files that its index names."""
    folder = directory.path
    if (folder / MODEL).exists():
        return [directory.tensor_file(MODEL)]
    if not (folder / INDEX).exists():
        digits = "[0-9]" * 5
        if shards := sorted(folder.glob(f"model-{digits}-of-{digits}.safetensors")):  # as mlx-lm reads them
            count = max(1, int(shards[0].stem[-5:]))
            return [directory.tensor_file(f"model-{i + 1:05d}-of-{count:05d}.safetensors") for i in range(count)]
        found = instead(folder)
        raise UserError(f"{folder} has no {MODEL}{f': {found}' if found else ''}.")
    places = directory.json_object(INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files.")
    files = {name: directory.tensor_file(name) for name in sorted(set(places.values()))}
    for tensor, place in places.items():
        if tensor not in files[place].entries:
            raise UserError(f"The tensor {tensor[:80]} is missing from {folder / place}, where the index has it.")
    return list(files.values())


def instead(folder: Path) -> str | None:
    """What is in a folder in place of a model's tensors, and what to do about it, in a clause."""
    for pattern, what in INSTEAD.items():
        if found := next(iter(sorted(folder.glob(pattern))), None):
            return what.format(found.relative_to(folder))
    return None


def _by_canonical_name(files: Iterable[TensorFile], family: Family, layout: Layout) -> Places:
    """Every tensor that takes part in the model -> its file, and its name there."""
    places: Places = {}
    for file in files:
        for name in file.entries:
            canonical = family.canonical(name, layout)
            if canonical in places:
                raise UserError(f"The tensor {canonical} is there twice, the second time in {file.path}.")
            if canonical is not None:
                places[canonical] = (file, name)
    return places


def _shape(file: TensorFile, name: str) -> tuple[int, ...]:
    return file.entries[name].shape


def _equal(file: TensorFile, name: str, other_file: TensorFile, other: str) -> bool:
    """Whether two tensors of one shape have the same numbers; holds a piece of each."""
    return all(np.array_equal(a, b) for a, b in zip(file.pieces(name), other_file.pieces(other), strict=True))


def _check(places: Places, family: Family, layout: Layout, config: GPTConfig, folder: Path) -> None:
    """Names, shapes and dtypes against the parameter table; takes a tied head that is there out of `places`."""
    table = parameter_table(config)
    embedding, head = family.rename(EMBEDDING), family.rename(HEAD)
    if config.tie_embeddings and head in places:  # of the same numbers, or the model would not be tied
        place = places.pop(head)
        if _shape(*place) != _shape(*places.setdefault(embedding, place)):
            raise UserError(f"{folder} has a tensor {head} beside the embedding that config.json says it is tied to.")
    for name in layout:
        if name not in places:
            if lora := next((stored for file, stored in places.values() if ".lora_" in stored), None):
                raise UserError(f"{folder} has adapters beside its weights ({lora[:80]}): merge them into those (peft: "
                                "merge_and_unload), save the result, and give that.")  # fmt: skip
            raise UserError(f"The tensor {name} is missing from {folder}.")
    for name, (file, stored) in places.items():
        if name not in layout:
            raise UserError(f"{file.path} has a tensor {stored}, which this model has not.")
        entry, shape = file.entries[stored], family.shape(name, [table[ours].shape for ours in layout[name]])
        if entry.shape != shape:
            raise UserError(f"The tensor {stored} in {file.path} has shape {entry.shape}, and must have {shape}.")
        if entry.dtype not in FLOATS:
            raise UserError(f"The tensor {stored} in {file.path} is {entry.dtype}, and must be {' or '.join(FLOATS)}.")


def _read(places: Places, family: Family, layout: Layout, config: GPTConfig) -> Iterator[tuple[str, Array]]:
    homes = {ours: (theirs, i) for theirs, parts in layout.items() for i, ours in enumerate(parts)}
    whole: dict[str, Array] = {}  # of theirs, until the last part is taken
    for ours in parameter_table(config):
        theirs, i = homes[ours]
        if i == 0:
            file, stored = places[theirs]
            whole[theirs] = finite(file.read_float(stored), stored, file.path)
        count = len(layout[theirs])
        yield ours, np.ascontiguousarray(family.part(whole[theirs], theirs, i, count, config))
        if i == count - 1:
            del whole[theirs]


def texts_beside(export: Export) -> dict[str, str]:
    """The files of a directory beside its config.json and its tensors, by name."""
    texts = model_texts(export.config, export.tokenizer, None) | dict(export.texts)
    del texts["config.json"]
    return texts


def write(
    folder: Path,
    config: GPTConfig,
    parameters: Iterable[tuple[str, Array]],
    ids: Mapping[str, Any] = MappingProxyType({}),
    texts: Mapping[str, str] = MappingProxyType({}),
    dtype: str = "float32",
) -> str:
    """Write a model as a Hugging Face directory, atomically, holding one tensor at a time; the family's name.

    `parameters` come in the order of the parameter table, and are stored in `dtype`; `ids` are bos_token_id and
    eos_token_id for config.json, `texts` further files, by name. What was at `folder` is replaced. Raises UserError
    where no family in transformers computes this model, and for a number that `dtype` has not.
    """
    family = require_family(config)
    table, layout = parameter_table(config), family.layout(config)
    shapes = {name: family.shape(name, [table[ours].shape for ours in parts]) for name, parts in layout.items()}
    content = {**family.content(config), "bos_token_id": None, "eos_token_id": None, **ids}
    content |= {"dtype": dtype, "torch_dtype": dtype}
    stored = rounded(parameters, dtype)
    try:
        with new_folder(folder) as temporary:
            write_model(temporary, shapes, joined(stored, family, layout, config), dict.fromkeys(shapes, DTYPES[dtype]))
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
