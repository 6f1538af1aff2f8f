"""config.json as transformers, mlx-lm and what reads their layout expect it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from twingpt.core.config import GPTConfig
from twingpt.core.tokenizer import Tokenizer

# What may differ between models of the qwen3 and llama shapes; everything else is as GPTConfig has it.
_FREE = {
    "vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner", "rope_theta",
    "rope_scaling", "norm_eps", "qkv_bias", "attn_out_bias", "mlp_bias", "qk_norm", "tie_embeddings", "dropout",
    "init_std", "zero_init",
}  # fmt: skip


def model_type(config: GPTConfig) -> str:
    """The transformers family that computes exactly this model: qwen3, llama, or twingpt for none."""
    plain = all(value == getattr(GPTConfig, key) for key, value in vars(config).items() if key not in _FREE)
    plain = plain and config.qkv_bias == config.attn_out_bias
    if plain and config.qk_norm and not config.mlp_bias:
        return "qwen3"
    return "llama" if plain and not config.qk_norm else "twingpt"


def portable_config(config: GPTConfig, ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: transformers' fields with the `ids` of special tokens, and our own configuration under "twingpt"."""
    family = model_type(config)
    architecture = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}.get(family, "TwinGPT")
    return {
        "model_type": family,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "hidden_act": "silu" if config.mlp == "swiglu" else config.mlp,
        "rms_norm_eps": config.norm_eps,
        **rope_fields(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        **ids,
        "dtype": "float32",
        "torch_dtype": "float32",
        "twingpt": config.to_dict(),
    }


def rope_fields(config: GPTConfig) -> dict[str, Any]:
    """RoPE, written twice: transformers 5 reads rope_parameters, mlx-lm and older ones the top level."""
    scaling = _portable_rope_scaling(config)
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
    }


def _portable_rope_scaling(config: GPTConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    fields: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        fields["original_max_position_embeddings"] = scaling.original_block_size
    if scaling.type == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
            if scaling.factor > 1:  # the same for mlx-lm, which reads no attention_factor
                fields["mscale"] = (scaling.attention_factor - 1) / (0.1 * math.log(scaling.factor))
    return fields


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """bos_token_id and eos_token_id for a config.json: the tokenizer's, and its end of text where it has no EOS."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    eos = tokenizer.roles.get("eos", tokenizer.end_of_text)
    return {"bos_token_id": tokenizer.roles.get("bos"), "eos_token_id": eos}
