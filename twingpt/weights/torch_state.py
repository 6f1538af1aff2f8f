"""A model of ours as a state dict for `torch.load(weights_only=True)`, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from twingpt.core.checkpoint.config_json import model_type
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.safetensors_file import finite
from twingpt.core.checkpoint.schema import Model, check_layers, model_texts
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.paths import new_folder, write_synced
from twingpt.core.tokenizer import Tokenizer
from twingpt.weights.dtypes import rounded
from twingpt.weights.export import Export
from twingpt.weights.pickles import State, check_state, read_pickle, state_of, tokenizer_of, torch_files

Array = np.ndarray

FILE, CONFIG = "model.pt", "config.json"


class TorchState:
    """A folder with a state dict of our parameters and the config.json that says what they are."""

    name = target = "torch"

    def detect(self, directory: ModelDirectory) -> bool:
        """Whether both files are there."""
        return (directory.path / FILE).is_file() and (directory.path / CONFIG).is_file()

    def open(self, directory: ModelDirectory) -> TorchStateModel:
        """Read the configuration; UserError where config.json is not what `write` wrote."""
        content = directory.json_object(CONFIG).get("twingpt")
        if not isinstance(content, dict):
            raise UserError(f"{directory.path / CONFIG} has no twingpt section, which says what {FILE} is.")
        return TorchStateModel(directory, GPTConfig.from_dict(content))

    def write(self, folder: Path, export: Export) -> dict[str, str]:
        """Write model.pt and the files beside it."""
        write(folder, export.config, export.tensors, export.tokenizer, export.texts, export.ids, export.dtype)
        return {}


class TorchStateModel(Model):
    """A folder of `write`'s whose config.json has been read."""

    @property
    def family(self) -> str:
        """The transformers family that computes it, or twingpt for none."""
        return model_type(self.config)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was written along."""
        return tokenizer_of(self.directory, self.folder)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor, as the file has them."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self._state().items()}

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter; UserError where the tensors don't fit the model."""
        self.directory.check_unchanged()
        path, state = self.folder / FILE, self._state()
        check_layers(self.config.n_layer, len(state), path)
        shapes = {name: row.shape for name, row in parameter_table(self.config).items()}
        check_state(state, shapes, path)
        for name in shapes:
            yield name, finite(state[name].read(), name, path)

    def _state(self) -> State:
        path = self.folder / FILE
        return state_of(self.directory.read_once(path, read_pickle), path)


def write(
    folder: Path,
    config: GPTConfig,
    tensors: Iterable[tuple[str, Array]],
    tokenizer: Tokenizer | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
    ids: Mapping[str, Any] = MappingProxyType({}),
    dtype: str = "float32",
) -> None:
    """Write model.pt, config.json and the tokenizer's files, in one atomic step, holding one tensor at a time.

    `tensors` are float32 parameters in the order of the parameter table, whose names they keep, and which are stored
    in `dtype`; `texts` are further files, by name, `ids` those of special tokens. A folder that is there is replaced.
    Raises UserError where it can't be written, and for a number that `dtype` has not.
    """
    torch = torch_files(folder / FILE)
    shapes = {name: row.shape for name, row in parameter_table(config).items()}
    beside = model_texts(config, tokenizer, None, ids)
    content = json.loads(beside[CONFIG]) | {"dtype": dtype, "torch_dtype": dtype}
    beside |= {CONFIG: json.dumps(content, indent=2), **texts}
    try:
        with new_folder(folder) as temporary:
            torch.write_state_dict(temporary / FILE, shapes, rounded(tensors, dtype), dtype)
            for name, text in beside.items():
                write_synced(temporary / name, text.encode())
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}.") from error
    except RuntimeError as error:  # of torch.save, which knows no more
        raise UserError(f"{folder} can't be written: torch could not make {FILE}; is the disk full?") from error
