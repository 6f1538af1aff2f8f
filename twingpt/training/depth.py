"""One dial: from a depth, the model's width, heads and context, and the batch, rates and length of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_count
from twingpt.core.presets import shaped
from twingpt.runs.units import human_count
from twingpt.training.settings import DEEPEST

HEAD_DIM = 64  # what fused attention kernels want
MIN_HEADS = 4  # depths 1 to 4 have narrower heads for it: fewer were never tried, and micro has as many
MIN_BLOCK, MAX_BLOCK = 128, 2048
MICRO_TOKENS = 8192  # of a micro-batch; more are accumulated
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022
REFERENCE_WIDTH, REFERENCE_LR, MATRIX_LR = 768, 1.5e-3, 0.02


def width(depth: int) -> int:
    """The width for a depth, in multiples of 64: 48 a layer at depth 4, rising to 64 from depth 12 on."""
    return HEAD_DIM * max(1, round(depth * min(64, 40 + 2 * depth) / HEAD_DIM))


def tokens_per_step(tokens: float) -> int:
    """The best batch for a horizon, both in tokens: 0.58 x tokens^0.571 (Li et al. 2025), to a power of two."""
    return int(2 ** round(math.log2(max(1.0, 0.58 * tokens**0.571))))


def derive(options: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """What `options["depth"]` derives for a vocabulary, under `options`, each of which replaces one value.

    What follows from a replaced value follows from the new one: a given `batch_size` keeps the tokens
    per step by accumulation, a given width sets heads and learning rate.

    The idea is nanochat's (Karpathy 2025, scripts/base_train.py and nanochat/gpt.py): the width from the
    depth, AdamW's rates x (n_embd / 768)^-0.5, the same rate for Muon at every width, and the horizon
    from a ratio of tokens to parameters. Three things differ. Small models are narrower, so that depth 4 is
    the preset `micro`; depth 12 is as large as GPT-2 small, as there. The ratio is Chinchilla's, over all
    parameters. And nanochat's batch, tuned at depth 12 and carried down by tokens^0.383, would leave
    shallow models a hundred steps: the batch follows the Step Law (Li et al. 2025, arXiv 2503.04715).

    Raises UserError for a depth outside 1 to 48, and for a model that can't be.
    """
    depth = options["depth"]
    if not 1 <= depth <= DEEPEST:
        raise UserError(f"depth must be from 1 to {DEEPEST}, and is {depth}.")
    if "preset" in options:
        raise UserError("preset and depth both say how large the model is: give one of them.")
    schedule = {"optimizer": "muon", "matrix_lr": MATRIX_LR, "lr_schedule": "wsd"}
    values = {"shape": "qwen3", "n_layer": depth, "n_embd": width(depth), **schedule, **options}
    n_embd = max(1, values["n_embd"])
    if "head_dim" in values:
        values.setdefault("n_head", max(1, n_embd // max(1, values["head_dim"])))
    values.setdefault("n_head", max(MIN_HEADS, n_embd // HEAD_DIM))
    values.setdefault("block_size", min(MAX_BLOCK, max(MIN_BLOCK, 2 ** (n_embd - 1).bit_length())))
    values.setdefault("learning_rate", _short(REFERENCE_LR * (n_embd / REFERENCE_WIDTH) ** -0.5))
    values.setdefault("min_lr", _short(values["learning_rate"] / 10))
    return values | _horizon(values, parameter_count(_model(values, vocab_size)))


def _short(rate: float) -> float:
    """To three digits: no more are meant, and config.toml is read by people."""
    return float(f"{rate:.3g}")


def _model(values: Mapping[str, Any], vocab_size: int) -> GPTConfig:
    names = GPTConfig.__dataclass_fields__.keys() - {"vocab_size"}
    return shaped(values["shape"], vocab_size=vocab_size, **{name: values[name] for name in names & values.keys()})


def _horizon(values: Mapping[str, Any], parameters: int) -> dict[str, int]:
    """Batch size, accumulation and steps, as far as `values` don't give them."""
    tokens, block_size = TOKENS_PER_PARAMETER * parameters, values["block_size"]
    wanted = tokens_per_step(tokens)
    batch_size = values.get("batch_size", max(1, min(wanted, MICRO_TOKENS) // block_size))
    micro = max(1, batch_size * block_size)
    accumulation = values.get("gradient_accumulation_steps", max(1, round(wanted / micro)))
    max_iters = values.get("max_iters", max(1, round(tokens / (micro * max(1, accumulation)))))
    return {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_iters": max_iters}


def describe(depth: int, config: GPTConfig, train: TrainConfig) -> str:
    """One line on what a depth came to: parameters, tokens, steps."""
    steps = train.max_iters
    tokens = steps * train.batch_size * train.gradient_accumulation_steps * config.block_size
    parameters = human_count(parameter_count(config))
    return f"depth {depth}: {parameters} parameters, {human_count(tokens)} tokens, {steps:,} steps"
