"""GPT-NeoX, as Pythia: RoPE on a part of each head, attention and MLP side by side."""

from __future__ import annotations

from twingpt.core.checkpoint.config_json import rope_fields
from twingpt.core.config import GPTConfig
from twingpt.weights.families.family import Family
from twingpt.weights.families.fields import Values, mapping, read_activation, write_activation
from twingpt.weights.families.llama import ATTENTION_BIAS
from twingpt.weights.families.rope import rope_from


def _read_neox(values: Values) -> Values:
    described = mapping(values, "rope_scaling") or mapping(values, "rope_parameters")
    fraction = described.get("partial_rotary_factor", values["rotary_pct"])
    rope = rope_from(described, values, values["rotary_emb_base"])
    return rope | {"rope_fraction": fraction} | read_activation(values, "hidden_act", gated=False)


def _write_neox(config: GPTConfig) -> Values:
    rope = rope_fields(config)
    scaling = rope["rope_scaling"]
    if scaling:  # GPT-NeoX looks for all of it there
        scaling |= {"partial_rotary_factor": config.rope_fraction, "rope_theta": config.rope_theta}
    return {
        **write_activation(config, "hidden_act"),
        "rope_parameters": rope["rope_parameters"] | {"partial_rotary_factor": config.rope_fraction},
        "rope_scaling": scaling,
        "rotary_pct": config.rope_fraction,
        "rotary_emb_base": config.rope_theta,
    }


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    keys={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "block_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout": "dropout",
        "tie_word_embeddings": "tie_embeddings",
        "use_parallel_residual": "parallel_residual",
        **ATTENTION_BIAS,
    },
    fixed={"norm": "layernorm", "norm_bias": True, "mlp_bias": True, "qk_norm": False},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
    },
    read=_read_neox,
    write=_write_neox,
    sites={
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.query_key_value"),
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    block="gpt_neox.layers",
    prefix="gpt_neox.",
    by_head=True,
)
