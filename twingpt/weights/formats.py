"""The formats that models are read from and written in, and opening a model of any of them.

A format is a class with what it can do: most are read and written, nanoGPT's and nanochat's are only read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.schema import Model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_count
from twingpt.core.paths import expand
from twingpt.runs.folder import RUNS, resolve
from twingpt.tokenizers.vocab_and_merges import has_vocab_and_merges
from twingpt.weights.export import Export
from twingpt.weights.gguf import GGUF
from twingpt.weights.gguf.vocabulary import UnknownTokenizerError
from twingpt.weights.huggingface import HuggingFace, instead
from twingpt.weights.mlx_lm import MLXLM
from twingpt.weights.nanochat import Nanochat
from twingpt.weights.nanogpt import NanoGPT
from twingpt.weights.torch_state import TorchState
from twingpt.weights.twingpt import TwinGPT

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = [
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "model_*.pt", "meta_*.json",
]  # fmt: skip


class ReadableFormat(Protocol):
    """A format that models are read from; `name` is what `gpt convert --json` calls it."""

    @property
    def name(self) -> str:
        """As "source_format"."""

    def detect(self, directory: ModelDirectory) -> bool:
        """Whether a model is in this format, by its files and what they begin with; no format before claimed it."""

    def open(self, directory: ModelDirectory) -> Model:
        """Open a model in this format; UserError where it is damaged, or can't be expressed here."""


class WritableFormat(Protocol):
    """A format that models are written in; `target` is what `gpt convert --to` calls it."""

    @property
    def target(self) -> str:
        """As "target_format"."""

    def write(self, folder: Path, export: Export) -> Mapping[str, str]:
        """Write a model in one atomic step; the matrices that its quantization leaves in float32, each with why.

        What is at `folder`, which for some is a file, is replaced. Raises UserError, before anything is
        written, for a model that the format can't hold, and UserError or OSError where it can't be written.
        """


class QuantizedFormat(WritableFormat, Protocol):
    """A format with quantized matrices."""

    def keeps_quantized(self, config: GPTConfig) -> bool:
        """Whether a quantized model passes as it is stored, word for word."""


# In this order a model is asked for its format: later ones take what is left.
READABLE: tuple[ReadableFormat, ...] = (GGUF(), TorchState(), NanoGPT(), Nanochat(), MLXLM(), HuggingFace(), TwinGPT())
QUANTIZED: dict[str, QuantizedFormat] = {format.target: format for format in (TwinGPT(), MLXLM())}
WRITABLE: dict[str, WritableFormat] = {
    format.target: format for format in (TwinGPT(), HuggingFace(), MLXLM(), TorchState(), GGUF())
}


@dataclass(frozen=True)
class OpenedModel:
    """A model, and the name of the format that it is in."""

    format: str
    model: Model

    @property
    def family(self) -> str:
        """The family of its architecture."""
        return self.model.family


def open_model(name: str | Path, *, ignore_manifest: bool = False) -> OpenedModel:
    """Find out what `name` is, and open it: a checkpoint or run of ours, a folder or file of another's, a hub id.

    With `ignore_manifest` a checkpoint is read as the directory that it is. Raises UserError for what is none
    of these, or is damaged, and where the hub can't be reached.
    """
    path = expand(name)
    if not path.exists() and _is_hub_id(str(name)):
        path = _download(str(name))
    if (opened := _open(ModelDirectory(path, ignore_manifest=ignore_manifest))) is not None:
        return opened
    if path.exists() and not (path / "run.json").exists():
        raise UserError(_no_model(path))
    directory = ModelDirectory(resolve(name), ignore_manifest=ignore_manifest)
    if (opened := _open(directory)) is None:  # it has neither of the files that say what it is
        raise UserError(f"{directory.path} is not a whole checkpoint: config.json is missing.")
    return opened


def _open(directory: ModelDirectory) -> OpenedModel | None:
    """The model in the first format that claims it, if one does."""
    for format in READABLE:
        if format.detect(directory):
            return OpenedModel(format.name, format.open(directory))
    return None


def _no_model(path: Path) -> str:
    """Why something that is there is no model."""
    if path.is_dir():
        usual = "it has no config.json, and isn't a run"
        return f"{path} holds no model that is known: {instead(path) or usual}."
    if path.suffix == ".gguf":
        return f"{path} is not a GGUF file: it does not begin as one."
    if (path.parent / "config.json").is_file():
        return f"{path} is a part of a model: give the folder that it is in."
    if path.suffix == ".safetensors":
        return f"{path} has tensors alone: give the folder that has it and its config.json."
    return f"{path} is no model that is known: give a run, a model's folder, or a checkpoint of nanoGPT or nanochat."


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not (RUNS / name).exists() and not name.startswith("runs/")


def _download(name: str) -> Path:
    """A hub repository's folder in its cache, downloaded where it isn't there yet."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f'There is no folder {name}; to fetch it from the Hugging Face hub, pip install "twingpt[hf]".'
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # of the hub, of its HTTP library, of the network
        reason = type(error).__name__
        raise UserError(
            f"There is no folder {name}, and the Hugging Face hub did not give it ({reason}): "
            "check the name and the network, or give a folder that has its files."
        ) from None


def has_tokenizer_files(folder: Path) -> bool:
    """Whether a tokenizer that can't be read is broken, and not missing."""
    return (folder / "tokenizer.json").exists() or has_vocab_and_merges(folder)


def describe(opened: OpenedModel) -> dict[str, Any]:
    """What a model is, for people and scripts: format, family, parameters, dtypes, tokenizer, tensors."""
    model = opened.model
    try:
        tokenizer = model.tokenizer()
        spoken: str | None = f"{tokenizer.kind}, {tokenizer.vocab_size} ids"
    except UserError as error:
        broken = has_tokenizer_files(model.folder) or isinstance(error, UnknownTokenizerError)
        spoken = f"broken: {error}" if broken else None
    model.parameters()  # which checks names and shapes, where the format can without reading tensors
    quantization = model.quantization
    return {
        "source_format": opened.format,
        "family": opened.family,
        "path": str(model.folder),
        "parameters": parameter_count(model.config),
        "dtypes": model.dtypes(),
        "quantization": quantization.to_json() if quantization else None,
        "tokenizer": spoken,
        "config": model.config.to_dict(),
        "tensors": {name: list(shape) for name, (_, shape) in model.tensors().items()},
    }
