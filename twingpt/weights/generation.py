"""A model's settings for generation, and the ids that end its text, as transformers and mlx-lm resolve them."""

from __future__ import annotations

from typing import Any

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.schema import Model
from twingpt.core.errors import UserError
from twingpt.core.reading import parse_json, short
from twingpt.weights.mlx_lm import MLXModel

GENERATION = "generation_config.json"


def generation_settings(directory: ModelDirectory) -> dict[str, Any]:
    """Settings for generation, as transformers resolves them: generation_config.json, or without it config.json's ids.

    Nothing for what is no folder, or has neither file; UserError where one of them can't be read.
    """
    path = directory.path / GENERATION
    if path.is_file():
        own = parse_json(directory.text(GENERATION), path)
        if not isinstance(own, dict):
            raise UserError(f"{path} is not a JSON object.")
        return own
    config = directory.json_object("config.json") if (directory.path / "config.json").is_file() else {}
    return {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}


def end_ids(model: Model) -> list[int]:
    """The ids that end a model's text by its settings for generation; UserError where they are none.

    In a directory of mlx-lm's, config.json names them where the settings name none.
    """
    ids = generation_settings(model.directory).get("eos_token_id")
    if isinstance(model, MLXModel) and not ids:
        ids = model.directory.json_object("config.json").get("eos_token_id")
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int for token in listed):
        raise UserError(f"eos_token_id in {model.folder} must be a token's id or a list of them, and is {short(ids)}.")
    return listed
