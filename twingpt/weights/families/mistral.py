"""Mistral: Llama with one window in all layers."""

from __future__ import annotations

from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.weights.families.family import Family
from twingpt.weights.families.fields import Values
from twingpt.weights.families.llama import NO_QK_NORM, SIZES, USUAL, read_llama, write_llama
from twingpt.weights.families.windows import layer_kinds, read_windows


def _read_mistral(values: Values) -> Values:
    if set(layer_kinds(values, ["sliding_attention"] * values["n_layer"])) != {"sliding_attention"}:
        raise UserError("layer_types of several kinds is not supported in this family.")
    return read_llama(values) | read_windows(values, ["sliding_attention"], values["sliding_window"])


def _write_mistral(config: GPTConfig) -> Values:
    return write_llama(config) | {"sliding_window": config.sliding_window or None}


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    keys=SIZES,
    fixed=NO_QK_NORM,
    defaults=USUAL | {"num_key_value_heads": 8, "sliding_window": 4096},
    read=_read_mistral,
    write=_write_mistral,
)
