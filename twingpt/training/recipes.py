"""Recipes: default settings by kind of device and for fine-tuning, and options resolved on top of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from twingpt.backends import registry
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig, TrainConfig, coerce, unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.presets import preset, shaped
from twingpt.core.tokenizer import Tokenizer
from twingpt.training import depth
from twingpt.training.settings import FIELDS, MODEL_FIELDS, SIZE_KEYS, TRAIN_FIELDS, spelled_out

Array = np.ndarray

# The default settings of a run, by kind of device: on two CPU cores text worth reading in minutes, on a GPU a
# larger model. docs/experiments.md has the figures behind them.
RECIPES: dict[str, dict[str, Any]] = {
    "cpu": {
        "preset": "micro",
        "batch_size": 16,
        "max_iters": 640,
        "optimizer": "muon",
        "matrix_lr": 0.02,
        "lr_schedule": "wsd",
        "learning_rate": 3e-3,
        "min_lr": 3e-4,
        "eval_interval": 320,
        "sample_interval": 320,
        "checkpoint_interval": 320,
    },
    "gpu": {"preset": "tiny", "batch_size": 32, "max_iters": 2000, "dropout": 0.1},
}

# The default settings of fine-tuning; docs/experiments.md has what other rates gave.
FINE_TUNING: dict[str, Any] = {
    "optimizer": "adamw",
    "lr_schedule": "cosine",
    "learning_rate": 3e-4,
    "min_lr": 3e-5,
    "batch_size": 8,
    "max_iters": 200,
    "eval_interval": 50,
    "sample_interval": 100,
    "checkpoint_interval": 50,
}

LONGEST_WINDOW = 1024  # tokens that a model is fine-tuned on by default, however long its context is

Options = Mapping[str, Any]


def recipe(device: Device) -> dict[str, Any]:
    """The default settings of a run on a device."""
    return RECIPES["cpu" if device.kind == "cpu" else "gpu"]


def resolve(options: Options, device: Device, vocab_size: int) -> tuple[GPTConfig, TrainConfig]:
    """The model and training configurations of a run with `options`, on a device and for a vocabulary.

    `options` are fields of GPTConfig and TrainConfig, `preset` or `depth`, and `shape`; what is not
    given comes from the depth, or else from the recipe of the device's kind. Raises UserError for
    anything that can't be.
    """
    known = MODEL_FIELDS.keys() | TRAIN_FIELDS.keys() | SIZE_KEYS
    for key, value in options.items():
        if key not in known:
            raise unknown_choice("option", key, known)
        coerce(key, FIELDS[key].hint, value)
    values = depth.derive(options, vocab_size) if "depth" in options else recipe(device) | dict(options)
    values["dtype"] = registry.find_dtype(device, options.get("dtype"))
    if "min_lr" not in options and "learning_rate" in options:
        values["min_lr"] = options["learning_rate"] / 10
    if "max_iters" in values:  # a short run warms up for a tenth of it
        values.setdefault("warmup_iters", min(TrainConfig.warmup_iters, values["max_iters"] // 10))
    train = TrainConfig.from_dict({key: value for key, value in values.items() if key in TRAIN_FIELDS})
    model = {key: value for key, value in values.items() if key in MODEL_FIELDS}
    if "depth" in options:
        return shaped(values["shape"], vocab_size=vocab_size, **model), train
    return preset(values["preset"], vocab_size, values.get("shape"), **model), train


def adapted(config: GPTConfig, options: Options) -> GPTConfig:
    """A model's configuration for fine-tuning: its own, with another dropout or block_size at most.

    A context beyond LONGEST_WINDOW is cut to it, unless `options` say otherwise; learned positions can't
    become more. Raises UserError for anything else of a model among `options` that isn't as it has it.
    """
    for key in SIZE_KEYS & options.keys():
        raise UserError(f"--{key} can't be given with --init-from: the model has its own.")
    for key in ("tokenizer", "vocab_size"):  # a run's config.toml has them as they are when nobody asks
        if options.get(key, getattr(TrainConfig, key)) != getattr(TrainConfig, key):
            raise UserError(f"--{key.replace('_', '-')} can't be given with --init-from: the model has its own.")
    own = config.to_dict()
    for key, value in options.items():
        fixed = key in MODEL_FIELDS and key not in ("dropout", "block_size")
        if fixed and GPTConfig.from_dict({**own, key: value}) != config:
            raise UserError(f"{key} {value} can't be had with --init-from: the model has {own[key]}.")
    block_size = options.get("block_size", min(config.block_size, LONGEST_WINDOW))
    if config.position == "learned" and block_size > config.block_size:
        raise UserError(
            f"--block-size {block_size} is more than the {config.block_size} positions that the model has learned."
        )
    return dataclasses.replace(config, block_size=block_size, dropout=options.get("dropout", config.dropout))


def with_end_of_text(config: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    """The configuration with one id more where the tokenizer's end of text is just beyond the model's vocabulary."""
    beyond = tokenizer.end_of_text == config.vocab_size == tokenizer.vocab_size - 1
    return dataclasses.replace(config, vocab_size=tokenizer.vocab_size) if beyond else config


def cropped(tensors: Iterable[tuple[str, Array]], config: GPTConfig) -> Iterator[tuple[str, Array]]:
    """Parameters resized to `config`: learned positions cropped, and the row of an added token the mean of the rest."""
    for name, array in tensors:
        if name == "model.embed_positions.weight":
            array = array[: config.block_size]
        elif name in ("model.embed_tokens.weight", "lm_head.weight") and len(array) == config.vocab_size - 1:
            array = np.concatenate([array, array.mean(0, keepdims=True)])
        yield name, array


def differences(
    config: GPTConfig, train: TrainConfig, device: Device, options: Options, *, fine_tuned: bool
) -> dict[str, Any]:
    """The settings of a run on a device that are not as in its recipe: FINE_TUNING's where it is `fine_tuned`.

    Otherwise that of the preset, depth and shape among the run's `options`.
    """
    size = {key: options[key] for key in SIZE_KEYS & options.keys()}
    model, usual_train = resolve(FINE_TUNING if fine_tuned else size, device, config.vocab_size)
    usual = spelled_out(config if fine_tuned else model, usual_train)
    now = spelled_out(config, train)
    return {key: value for key, value in now.items() if key not in usual or value != usual[key]}
