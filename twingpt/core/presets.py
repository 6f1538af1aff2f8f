"""Shapes (families of architectures) and presets (sizes): the configurations that have names."""

from __future__ import annotations

from typing import Any

from twingpt.core.config import GPTConfig, unknown_choice

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"qk_norm": False},
    "nano": {
        "mlp": "relu2", "tie_embeddings": False, "embed_norm": True, "smear": True, "logit_softcap": 15.0,
        "zero_init": True,
    },
    "gpt2": {
        "position": "learned", "norm": "layernorm", "norm_eps": 1e-5, "norm_bias": True, "mlp": "gelu_tanh",
        "mlp_bias": True, "qkv_bias": True, "attn_out_bias": True, "qk_norm": False,
    },
}  # fmt: skip

# In the comments: parameters, with a vocabulary of so many ids. Heads are 64 wide, for fused kernels, but micro's 48.
PRESETS: dict[str, dict[str, Any]] = {
    "micro": {"n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 192, "block_size": 128},  # 2M, 2k
    "tiny": {"n_layer": 6, "n_head": 6, "n_kv_head": 3, "n_embd": 384, "block_size": 256},  # 11M, 4k
    "small": {"n_layer": 8, "n_head": 8, "n_kv_head": 4, "n_embd": 512, "block_size": 512},  # 27M, 8k
    "medium": {"n_layer": 12, "n_head": 10, "n_kv_head": 5, "n_embd": 640, "block_size": 1024},  # 81M, 32k
    "gpt2": {"shape": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},  # 124M, 50k
    "large": {"n_layer": 24, "n_head": 16, "n_kv_head": 8, "n_embd": 1024, "block_size": 1024},  # 350M, 50k
}


def preset(name: str, vocab_size: int, shape: str | None = None, **overrides: Any) -> GPTConfig:
    """The configuration of a preset (a key of PRESETS) for a vocabulary, with fields replaced by `overrides`.

    `shape` (a key of SHAPES) replaces the preset's own. Raises UserError for an unknown name.
    """
    if name not in PRESETS:
        raise unknown_choice("preset", name, PRESETS)
    values = dict(PRESETS[name])
    own_shape = values.pop("shape", "qwen3")
    shape = shape or own_shape
    if "n_embd" in overrides or "n_head" in overrides:  # the preset's n_kv_head fits its own alone
        values.pop("n_kv_head", None)
    return shaped(shape, **(values | {"vocab_size": vocab_size} | overrides))


def shaped(shape: str, **values: Any) -> GPTConfig:
    """The configuration of a shape (a key of SHAPES), with its fields replaced by `values`."""
    if shape not in SHAPES:
        raise unknown_choice("shape", shape, SHAPES)
    return GPTConfig.from_dict(SHAPES[shape] | values)
