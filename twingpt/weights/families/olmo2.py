"""OLMo 2: Llama with its norms after attention and MLP, and QK-norm over all heads at once."""

from __future__ import annotations

from twingpt.weights.families.family import Family
from twingpt.weights.families.llama import ATTENTION_BIAS, SIZES, USUAL, read_llama, write_llama

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    keys=SIZES | ATTENTION_BIAS,
    fixed={"qk_norm": True, "qk_norm_whole": True, "norm_placement": "post"},
    defaults=USUAL | {"rms_norm_eps": 1e-5},
    read=read_llama,
    write=write_llama,
)
