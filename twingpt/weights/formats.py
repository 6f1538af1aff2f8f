"""A model on disk, whatever wrote it: which format it is in, and opening it as one of ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from twingpt.core.checkpoint.config_json import model_type
from twingpt.core.checkpoint.safetensors_file import TensorFile
from twingpt.core.checkpoint.schema import Model, open_checkpoint
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_count, parameter_table
from twingpt.core.paths import expand
from twingpt.core.tokenizer import Tokenizer
from twingpt.runs.folder import RUNS, resolve
from twingpt.weights import mlx_lm, nanochat, nanogpt, torch_state
from twingpt.weights.huggingface import is_huggingface, open_huggingface

Array = np.ndarray

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = [
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
    "chat_template.jinja", "model_*.pt", "meta_*.json",
]  # fmt: skip

# What other trainers save: the module that reads it, how it is known, its name and its family, or None for ours.
OTHERS = (
    (torch_state, torch_state.is_torch_state, "torch", None),
    (nanogpt, nanogpt.is_nanogpt, "nanogpt", "gpt2"),
    (nanochat, nanochat.is_nanochat, "nanochat", "nanochat"),
)


@dataclass(frozen=True)
class OtherModel:
    """A model that another trainer saved, read by the functions of a module of this package."""

    module: ModuleType
    folder: Path
    config: GPTConfig
    quantization: None = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, where the format keeps or implies one."""
        found: Tokenizer | None = self.module.tokenizer(self.folder)
        if found is None:
            raise UserError(f"{self.folder} has no tokenizer: the model can be converted, but takes no text.")
        return found

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter."""
        found: Iterator[tuple[str, Array]] = self.module.tensors(self.folder, self.config)
        return found

    def stored(self) -> Iterator[tuple[str, Array]]:
        """As `parameters`."""
        return self.parameters()


@dataclass(frozen=True)
class Found:
    """A model, the format it is in, and the family of its architecture."""

    format: str
    family: str
    model: Model


def open_model(name: str | Path) -> Found:
    """Find out what `name` is, and open it: a checkpoint or run of ours, a folder or file of another's, a hub id.

    Raises UserError for what is none of these, or is damaged, and where the hub can't be reached.
    """
    path = expand(name)
    if not path.exists() and _is_hub_id(str(name)):
        path = _download(str(name))
    for module, is_one, format, family in OTHERS:
        if is_one(path):
            config = module.read_config(path)
            return Found(format, family or model_type(config), OtherModel(module, path, config))
    if mlx_lm.is_mlx_lm(path):
        model = mlx_lm.open_mlx_lm(path)
        return Found("mlx-lm", model.family, model)
    if is_huggingface(path):
        found = open_huggingface(path)
        return Found("huggingface", found.family, found)
    if path.exists() and not any((path / mark).exists() for mark in ("run.json", "config.json", "manifest.json")):
        raise UserError(_no_model(path))
    checkpoint = open_checkpoint(resolve(name))
    return Found("twingpt", model_type(checkpoint.config), checkpoint)


def _no_model(path: Path) -> str:
    """Why something that is there is no model."""
    if path.is_dir():
        return f"{path} holds no model that is known: it has no config.json, and isn't a run."
    if path.suffix == ".gguf":
        return f"{path} can't be read: GGUF files are only written. Give the model that it was made from."
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
            f"There is no folder {name}; to fetch it from the Hugging Face hub, pip install 'twingpt[hf]'."
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # of the hub, of its HTTP library, of the network
        reason = type(error).__name__
        raise UserError(
            f"There is no folder {name}, and the Hugging Face hub did not give it ({reason}): "
            "check the name and the network, or give a folder that has its files."
        ) from None


def describe(found: Found) -> dict[str, Any]:
    """What a model is, for people and scripts: format, family, parameters, dtypes, tokenizer, tensors."""
    model = found.model
    try:
        tokenizer = model.tokenizer()
        spoken: str | None = f"{tokenizer.kind}, {tokenizer.vocab_size} ids"
    except UserError as error:
        spoken = f"broken: {error}" if (model.folder / "tokenizer.json").exists() else None
    table = parameter_table(model.config)
    quantization = model.quantization
    return {
        "source_format": found.format,
        "family": found.family,
        "path": str(model.folder),
        "parameters": parameter_count(model.config),
        "dtypes": dtypes(model),
        "quantization": quantization.to_json() if quantization else None,
        "tokenizer": spoken,
        "config": model.config.to_dict(),
        "tensors": {name: list(row.shape) for name, row in table.items()},
    }


def dtypes(model: Model) -> dict[str, int]:
    """How many of a model's tensors are stored in each dtype, by the names of safetensors."""
    if isinstance(model, OtherModel):
        return dict(Counter(model.module.dtypes(model.folder)))
    files = [TensorFile(path) for path in sorted(model.folder.glob("model*.safetensors"))]
    return dict(Counter(entry.dtype for file in files for entry in file.entries.values()))
