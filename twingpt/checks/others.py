"""transformers and mlx-lm as further implementations of a model, for `gpt parity --against`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.backends.registry import get, how_to_install, installed
from twingpt.core.checkpoint.config_json import model_type
from twingpt.core.checkpoint.quantize import dequantized
from twingpt.core.config import GPTConfig, unknown_choice
from twingpt.core.errors import UserError
from twingpt.weights import mlx_lm
from twingpt.weights.families import FAMILIES, family_for
from twingpt.weights.formats import OpenedModel
from twingpt.weights.huggingface import write

Array = np.ndarray


def _open_in_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    safe = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager", **safe)


def _open_in_mlx_lm(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, model_config={"model_file": None})  # which would be code to run
    return model


def _ours_as_theirs(opened: OpenedModel) -> bool:
    return opened.format == "twingpt" and model_type(opened.model.config) != "twingpt"


def _opens_in_transformers(opened: OpenedModel) -> bool:
    return opened.format == "huggingface" or (_ours_as_theirs(opened) and opened.model.quantization is None)


def _opens_in_mlx_lm(opened: OpenedModel) -> bool:
    return opened.format in ("huggingface", "mlx-lm") or _ours_as_theirs(opened)


@dataclass(frozen=True)
class Library:
    """A library that has models of its own: how its module is called, on which backend's framework it runs.

    `opens` says whether it opens a model's folder as it stands, `open` does it. `lacks` names what of a
    model of a family it leaves out, or is None.
    """

    name: str
    module: str
    backend: str
    opens: Callable[[OpenedModel], bool]
    open: Callable[[Path], Any]
    lacks: Callable[[GPTConfig, str], str | None] = lambda config, family: None

    def problem(self, config: GPTConfig) -> str | None:
        """Why it does not compute such a model, in a clause; None where it does."""
        family = family_for(config)
        if family is None:
            return f"has no such model: only those of {', '.join(FAMILIES)}"
        lacking = self.lacks(config, family.model_type)
        return f"computes {family.model_type} models without {lacking}" if lacking else None


LIBRARIES = {
    "hf": Library("transformers", "transformers", "torch", _opens_in_transformers, _open_in_transformers),
    "mlx-lm": Library("mlx-lm", "mlx_lm", "mlx", _opens_in_mlx_lm, _open_in_mlx_lm, mlx_lm.differs),
}


@dataclass(frozen=True)
class Outside:
    """A library's implementation of a model: of the one in `folder`, or of any that is exported to it."""

    library: Library
    folder: Path | None = None
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The library's."""
        return self.library.name

    def computes(self, config: GPTConfig) -> bool:
        """Whether the library has such a model."""
        return self.library.problem(config) is None

    def forward(self, config: GPTConfig, params: Mapping[str, Array], tokens: Array) -> Array:
        """(B, T) ids -> (B, T, V) float32 logits; UserError where the library refuses the model."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.folder
            if folder is None:
                folder = Path(temporary) / "model"
                write(folder, config, dequantized(params.items(), config))
            engines = get(self.library.backend)  # before the library: MLX's opens a BLAS first
            try:
                return engines.module_logits(self.library.open(folder), tokens)
            except Exception as error:  # whatever the library raises for a model that it has not
                reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
                where = self.folder or "the model, as a Hugging Face directory"
                raise UserError(f"{self.name} can't run {where}: {reason or type(error).__name__}.") from error


def is_quantized(opened: OpenedModel) -> bool:
    """Whether some of the model's matrices are quantized."""
    return opened.model.quantization is not None


def outsiders(names: str, opened: OpenedModel | None) -> list[Outside]:
    """The libraries that `names` lists, by commas, to be compared on the model that was opened, or on random ones.

    Raises UserError for an unknown library, for one that isn't installed, and where it has no such model.
    """
    return [_outside(name.strip(), opened) for name in dict.fromkeys(names.split(","))]


def _outside(name: str, opened: OpenedModel | None) -> Outside:
    if name not in LIBRARIES:
        raise unknown_choice("library", name, tuple(LIBRARIES))
    library = LIBRARIES[name]
    if find_spec(library.module) is None:
        raise UserError(f"{library.name} is not installed: pip install {library.name}.")
    if not installed(library.backend):
        raise UserError(f"{library.name} needs {library.backend}: {how_to_install(library.backend)}.")
    if opened is None:
        return Outside(library)
    problem = library.problem(opened.model.config)
    if problem:
        raise UserError(f"{opened.model.folder} can't be compared with {library.name}: it {problem}.")
    return Outside(library, opened.model.folder if library.opens(opened) else None)
