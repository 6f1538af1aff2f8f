"""GPT-2: learned positions, LayerNorm, biases, one matrix for queries, keys and values; matrices as (in, out)."""

from __future__ import annotations

from twingpt.core.config import GPTConfig
from twingpt.weights.families.family import Family
from twingpt.weights.families.fields import Values, read_activation, typed, write_activation


def _read_gpt2(values: Values) -> Values:
    fields = read_activation(values, "activation_function", gated=False)
    return fields if typed(values, "scale_attn_weights", bool) else fields | {"attn_scale": 1.0}


def _write_gpt2(config: GPTConfig) -> Values:
    return {
        **write_activation(config, "activation_function"),
        "n_ctx": config.block_size,  # for mlx-lm
        "scale_attn_weights": config.attn_scale != 1,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    keys={
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_inner": "n_inner",
        "layer_norm_epsilon": "norm_eps",
        "resid_pdrop": "dropout",
        "tie_word_embeddings": "tie_embeddings",
    },
    fixed={
        "position": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "mlp_bias": True,
        "qkv_bias": True,
        "attn_out_bias": True,
        "qk_norm": False,
    },
    defaults={
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
    },
    read=_read_gpt2,
    write=_write_gpt2,
    sites={
        "model.embed_tokens": "wte",
        "model.embed_positions": "wpe",
        "model.norm": "ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.c_attn"),
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    block="h",
    prefix="transformer.",  # not written: mlx-lm reads none
    transposed=True,
)
