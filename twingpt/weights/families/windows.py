"""Sliding windows by layer: `layer_types` and the window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twingpt.core.config import GPTConfig, coerce
from twingpt.core.errors import UserError
from twingpt.core.reading import short
from twingpt.weights.families.fields import Values


def layer_kinds(values: Values, default: Sequence[str]) -> list[str]:
    """`layer_types`, or `default` where the configuration leaves it out."""
    kinds = values.get("layer_types")
    kinds = list(default) if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != values["n_layer"]:
        raise UserError(f"layer_types must name the kind of each of the {values['n_layer']} layers.")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"layer_types with {short(kind)} is not supported.")
    return kinds


def read_windows(values: Values, kinds: Sequence[str], window: Any) -> Values:
    """The fields sliding_window and full_attention_layers; none where no layer has a window."""
    if "sliding_attention" not in kinds or window is None:
        return {}
    coerce("sliding_window", int, window)
    return {
        "sliding_window": window,
        "full_attention_layers": tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
    }


def write_windows(config: GPTConfig) -> Values:
    """The keys for the window and which layers have it."""
    kinds = ["sliding_attention" if config.window(i) else "full_attention" for i in range(config.n_layer)]
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else config.n_layer
    return {
        "layer_types": kinds,
        "use_sliding_window": config.sliding_window > 0,
        "sliding_window": config.sliding_window or None,
        "max_window_layers": first,
    }


def window_pattern(config: GPTConfig) -> int | None:
    """The n of which each nth layer is without the window and no other is, or None where there is no such n."""
    windows = [config.window(i) > 0 for i in range(config.n_layer)]
    every = windows.index(False) + 1 if False in windows else config.n_layer + 1
    return every if windows == [(i + 1) % every != 0 for i in range(config.n_layer)] else None
