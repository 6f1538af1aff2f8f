"""A model of ours as a state dict for `torch.load(weights_only=True)`, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from twingpt.core.checkpoint.schema import check_layers, model_texts
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.paths import new_folder, write_synced
from twingpt.core.tokenizer import Tokenizer
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.weights.pickles import State, check_state, read_json, read_pickle, state_of, torch_files

Array = np.ndarray

FILE, CONFIG = "model.pt", "config.json"


def is_torch_state(path: Path) -> bool:
    """Whether `path` is a folder that `write` wrote."""
    return (path / FILE).is_file() and (path / CONFIG).is_file()


def write(
    folder: Path,
    config: GPTConfig,
    tensors: Iterable[tuple[str, Array]],
    tokenizer: Tokenizer | None = None,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write model.pt, config.json and the tokenizer's files, in one atomic step, holding one tensor at a time.

    `tensors` are float32 parameters in the order of the parameter table, whose names they keep; `texts` are
    further files, by name. A folder that is there is replaced. Raises UserError where it can't be written.
    """
    torch = torch_files(folder / FILE)
    shapes = {name: row.shape for name, row in parameter_table(config).items()}
    try:
        with new_folder(folder) as temporary:
            torch.write_state_dict(temporary / FILE, shapes, tensors)
            for name, text in {**model_texts(config, tokenizer, None), **texts}.items():
                write_synced(temporary / name, text.encode())
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}.") from error
    except RuntimeError as error:  # of torch.save, which knows no more
        raise UserError(f"{folder} can't be written: torch could not make {FILE}; is the disk full?") from error


def read_config(folder: Path) -> GPTConfig:
    """The model's configuration; UserError where config.json is not what `write` wrote."""
    content = read_json(folder / CONFIG).get("twingpt")
    if not isinstance(content, dict):
        raise UserError(f"{folder / CONFIG} has no twingpt section, which says what {FILE} is.")
    return GPTConfig.from_dict(content)


def tensors(folder: Path, config: GPTConfig) -> Iterator[tuple[str, Array]]:
    """Yield (name, float32 array) in the order of the parameter table; UserError where they don't fit the model."""
    path, state = folder / FILE, _state(folder)
    check_layers(config.n_layer, len(state), path)
    shapes = {name: row.shape for name, row in parameter_table(config).items()}
    check_state(state, shapes, path)
    for name in shapes:
        yield name, state[name].read()


def dtypes(folder: Path) -> list[str]:
    """How each tensor is stored, by the names of safetensors."""
    return [tensor.dtype for tensor in _state(folder).values()]


def tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that was written along, or None."""
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def _state(folder: Path) -> State:
    return state_of(read_pickle(folder / FILE), folder / FILE)
