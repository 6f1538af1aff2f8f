"""Qwen3: Llama with QK-norm, and maybe windows in the later layers."""

from __future__ import annotations

from twingpt.core.config import GPTConfig
from twingpt.weights.families.family import Family
from twingpt.weights.families.fields import Values, typed
from twingpt.weights.families.llama import ATTENTION_BIAS, SIZES, USUAL, read_llama, write_llama
from twingpt.weights.families.windows import layer_kinds, read_windows, write_windows

WINDOWS: Values = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def read_qwen(values: Values) -> Values:
    """As Llama's, with windows in the layers from max_window_layers on, unless layer_types says otherwise."""
    first = typed(values, "max_window_layers", int)
    usual = ["full_attention" if i < first else "sliding_attention" for i in range(values["n_layer"])]
    window = values["sliding_window"] if typed(values, "use_sliding_window", bool) else None
    return read_llama(values) | read_windows(values, layer_kinds(values, usual), window)


def write_qwen(config: GPTConfig) -> Values:
    """As Llama's, and the windows by layer."""
    return write_llama(config) | write_windows(config)


QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    keys=SIZES | ATTENTION_BIAS,
    fixed={"qk_norm": True},
    defaults=USUAL | WINDOWS | {"num_key_value_heads": 32, "head_dim": 128},
    read=read_qwen,
    write=write_qwen,
)
