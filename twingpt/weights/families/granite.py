"""Granite: Llama with factors on embeddings, residuals, scores and logits."""

from __future__ import annotations

from twingpt.core.config import GPTConfig
from twingpt.weights.families.family import Family
from twingpt.weights.families.fields import Values, positive, read_scale
from twingpt.weights.families.llama import ATTENTION_BIAS, MLP_BIAS, NO_QK_NORM, SIZES, USUAL, read_llama, write_llama


def _read_granite(values: Values) -> Values:
    return read_llama(values) | read_scale(values, positive(values, "attention_multiplier", float))


def _write_granite(config: GPTConfig) -> Values:
    return write_llama(config) | {"attention_multiplier": config.score_scale}


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    keys={
        **SIZES,
        **ATTENTION_BIAS,
        **MLP_BIAS,
        "embedding_multiplier": "embed_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_divisor",
    },
    fixed=NO_QK_NORM,
    defaults={
        **USUAL,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    read=_read_granite,
    write=_write_granite,
)
