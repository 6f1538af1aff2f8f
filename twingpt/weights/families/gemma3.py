"""Gemma 3, its text models: two RoPEs, windows in most layers, norms before and after, a factor on embeddings."""

from __future__ import annotations

import math

from twingpt.core.checkpoint.config_json import rope_fields
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.weights.families.family import Family
from twingpt.weights.families.fields import (
    Values,
    mapping,
    positive,
    read_activation,
    read_scale,
    typed,
    write_activation,
)
from twingpt.weights.families.llama import ATTENTION_BIAS, SIZES, USUAL
from twingpt.weights.families.rope import rope_from
from twingpt.weights.families.windows import layer_kinds, read_windows, window_pattern, write_windows


def _read_gemma(values: Values) -> Values:
    if "sliding_window_pattern" in values:  # as it was called once
        values = values | {"_sliding_window_pattern": values["sliding_window_pattern"]}
    nested, old = mapping(values, "rope_parameters"), mapping(values, "rope_scaling")
    if nested and not {"full_attention", "sliding_attention"} & nested.keys():
        raise UserError("rope_parameters must have full_attention and sliding_attention.")
    local = rope_from(mapping(nested, "sliding_attention"), values, values["rope_local_base_freq"])
    if "rope_scaling" in local:
        raise UserError("A scaled rope_type of sliding_attention is not supported.")
    every = positive({"_sliding_window_pattern": 6, **values}, "_sliding_window_pattern", int)
    usual = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(values["n_layer"])]
    windows = read_windows(values, layer_kinds(values, usual), values["sliding_window"])
    return {
        **rope_from({**mapping(nested, "full_attention"), **old}, values, values["rope_theta"]),
        **windows,
        **read_activation(values, "hidden_activation", gated=True),
        "local_rope_theta": local["rope_theta"] if windows else 0.0,
        "embed_scale": math.sqrt(values["n_embd"]),
        **read_scale(values, positive(values, "query_pre_attn_scalar", int) ** -0.5),
        "logit_softcap": typed(values, "final_logit_softcapping", float | None) or 0.0,
    }


def _write_gemma(config: GPTConfig) -> Values:
    rope, local = rope_fields(config), config.local_rope_theta or 10000.0
    nested = {
        "full_attention": rope["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return {
        **rope,
        **write_windows(config),
        **write_activation(config, "hidden_activation"),
        "rope_parameters": nested,
        "rope_local_base_freq": local,
        "sliding_window_pattern": window_pattern(config) or 6,  # for mlx-lm, which knows no layer_types here
        "sliding_window": config.sliding_window or 4096,  # it must have one, even where no layer uses it
        "query_pre_attn_scalar": round(config.score_scale**-2),
        "final_logit_softcapping": config.logit_softcap or None,
    }


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    keys=SIZES | ATTENTION_BIAS,
    fixed={"qk_norm": True, "norm_placement": "both", "norm_offset": True},
    defaults={
        **USUAL,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    read=_read_gemma,
    write=_write_gemma,
)
