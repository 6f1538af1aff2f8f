"""Keys of config.json that any family may have: checking them, the activation, the scale of attention."""

from __future__ import annotations

from typing import Any

from twingpt.core.config import GPTConfig, coerce
from twingpt.core.errors import UserError
from twingpt.core.reading import short

Values = dict[str, Any]  # of a config.json, by key

# hidden_act -> our MLP with a gate, and without; the first of each is what is written.
ACTIVATIONS = {
    "silu": ("swiglu", None),
    "swish": ("swiglu", None),
    "gelu": ("geglu", "gelu"),
    "gelu_pytorch_tanh": ("geglu_tanh", "gelu_tanh"),
    "gelu_new": ("geglu_tanh", "gelu_tanh"),
    "gelu_fast": ("geglu_tanh", "gelu_tanh"),
    "relu2": (None, "relu2"),
}


def typed(values: Values, key: str, hint: Any) -> Any:
    """The value of a key as it stands; UserError unless it is of the type `hint`."""
    coerce(key, hint, values.get(key))
    return values.get(key)


def positive(values: Values, key: str, hint: type) -> Any:
    """The number of a key; UserError unless it is of the type and above 0."""
    number = typed(values, key, hint)
    if number <= 0:
        raise UserError(f"{key} must be positive, and is {short(number)}.")
    return number


def mapping(values: Values, key: str) -> Values:
    """The object of a key, empty where that is left out or null; UserError for anything else."""
    described = values.get(key)
    if described is not None and not isinstance(described, dict):
        raise UserError(f"{key} must be a set of keys, and is {short(described)}.")
    return described or {}


def read_activation(values: Values, key: str, *, gated: bool) -> Values:
    """The field `mlp` for the activation that a key names, `gated` or not; UserError for one that isn't known."""
    name = values.get(key)
    mlp = ACTIVATIONS.get(name, (None, None))[0 if gated else 1] if isinstance(name, str) else None
    if mlp is None:
        known = [name for name, kinds in ACTIVATIONS.items() if kinds[0 if gated else 1]]
        raise UserError(f"{key} {short(name)} is not supported: only {', '.join(known)} are.")
    return {"mlp": mlp}


def write_activation(config: GPTConfig, key: str) -> Values:
    """The key with the name of the activation of the MLP."""
    return {key: next((name for name, kinds in ACTIVATIONS.items() if config.mlp in kinds), config.mlp)}


def read_scale(values: Values, scale: float) -> Values:
    """`attn_scale`, where it isn't the one that follows from head_dim."""
    usual = (values["head_dim"] or values["n_embd"] / values["n_head"]) ** -0.5
    return {} if scale == usual else {"attn_scale": scale}
