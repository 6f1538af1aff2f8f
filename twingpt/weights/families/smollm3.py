"""SmolLM3: Llama without RoPE in every few layers, and maybe with windows in the others."""

from __future__ import annotations

from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.weights.families.family import Family
from twingpt.weights.families.fields import Values, positive, typed
from twingpt.weights.families.llama import ATTENTION_BIAS, MLP_BIAS, NO_QK_NORM, SIZES, USUAL, read_llama
from twingpt.weights.families.qwen3 import write_qwen
from twingpt.weights.families.windows import layer_kinds, read_windows


def _read_smollm3(values: Values) -> Values:
    every, n_layer = positive(values, "no_rope_layer_interval", int), values["n_layer"]
    rope = values["no_rope_layers"]
    if rope is None:
        rope = [int((i + 1) % every != 0) for i in range(n_layer)]
    if not isinstance(rope, list) or len(rope) < n_layer or any(flag not in (0, 1) for flag in rope):
        raise UserError(f"no_rope_layers must have a 0 or 1 for each of the {n_layer} layers.")
    window = values["sliding_window"] if typed(values, "use_sliding_window", bool) else None
    usual = ["full_attention" if rope[i] or window is None else "sliding_attention" for i in range(n_layer)]
    windows = read_windows(values, layer_kinds(values, usual), window)
    return read_llama(values) | windows | {"no_rope_layers": tuple(i for i in range(n_layer) if not rope[i])}


def _write_smollm3(config: GPTConfig) -> Values:
    return write_qwen(config) | {"no_rope_layers": [int(config.uses_rope(i)) for i in range(config.n_layer)]}


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    keys=SIZES | ATTENTION_BIAS | MLP_BIAS,
    fixed=NO_QK_NORM,
    defaults={
        **USUAL,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    read=_read_smollm3,
    write=_write_smollm3,
)
