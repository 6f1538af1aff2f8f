"""Qwen2 and Qwen2.5: Qwen3 with biases on queries, keys and values in place of QK-norm."""

from __future__ import annotations

from twingpt.weights.families.family import Family
from twingpt.weights.families.llama import SIZES, USUAL
from twingpt.weights.families.qwen3 import WINDOWS, read_qwen, write_qwen

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    keys=SIZES,
    fixed={"qk_norm": False, "qkv_bias": True},
    defaults=USUAL | WINDOWS | {"num_key_value_heads": 32},
    read=read_qwen,
    write=write_qwen,
)
