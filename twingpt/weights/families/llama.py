"""Llama, and what the families that are built like it share."""

from __future__ import annotations

from twingpt.core.checkpoint.config_json import rope_fields
from twingpt.core.config import GPTConfig
from twingpt.weights.families.family import Family
from twingpt.weights.families.fields import Values, read_activation, write_activation
from twingpt.weights.families.rope import read_rope

SIZES: dict[str, str | tuple[str, ...]] = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
ATTENTION_BIAS: dict[str, str | tuple[str, ...]] = {"attention_bias": ("qkv_bias", "attn_out_bias")}
MLP_BIAS: dict[str, str | tuple[str, ...]] = {"mlp_bias": "mlp_bias"}
USUAL: Values = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
}

NO_QK_NORM = {"qk_norm": False}


def read_llama(values: Values) -> Values:
    """RoPE and the activation of a gated MLP."""
    return read_rope(values) | read_activation(values, "hidden_act", gated=True)


def write_llama(config: GPTConfig) -> Values:
    """The keys of RoPE and of the activation."""
    return rope_fields(config) | write_activation(config, "hidden_act")


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    keys=SIZES | ATTENTION_BIAS | MLP_BIAS,
    fixed=NO_QK_NORM,
    defaults=USUAL,
    read=read_llama,
    write=write_llama,
)
