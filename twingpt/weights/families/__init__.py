"""The model families of transformers in terms of GPTConfig and its parameter table, in both directions.

A family is data where it can be: which key of config.json is which field, and which of its tensors holds
which of ours. What is left (rotary embeddings, windows by layer, …) is a pair of small functions each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.reading import short
from twingpt.weights.families.family import Family
from twingpt.weights.families.gemma3 import GEMMA3
from twingpt.weights.families.gpt2 import GPT2
from twingpt.weights.families.gpt_neox import GPT_NEOX
from twingpt.weights.families.granite import GRANITE
from twingpt.weights.families.llama import LLAMA
from twingpt.weights.families.mistral import MISTRAL
from twingpt.weights.families.olmo2 import OLMO2
from twingpt.weights.families.qwen2 import QWEN2
from twingpt.weights.families.qwen3 import QWEN3
from twingpt.weights.families.smollm3 import SMOLLM3

__all__ = ["FAMILIES", "Family", "family_for", "family_of", "require_family"]

# By model_type. Of several that compute a model, it is written as the first.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAMA, QWEN3, QWEN2, MISTRAL, SMOLLM3, GRANITE, OLMO2, GEMMA3, GPT2, GPT_NEOX)
}


def family_of(content: Mapping[str, Any]) -> Family:
    """The family that a config.json is of; UserError names one that isn't supported."""
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise UserError("model_type is missing.")
    if model_type not in FAMILIES:
        raise UserError(f"The family {short(model_type)} is not supported: only {', '.join(FAMILIES)} are.")
    return FAMILIES[model_type]


def family_for(config: GPTConfig) -> Family | None:
    """The first family that computes exactly this model, if one does."""
    return next((family for family in FAMILIES.values() if family.computes(config)), None)


def require_family(config: GPTConfig) -> Family:
    """The first family that computes exactly this model; UserError where none does."""
    family = family_for(config)
    if family is None:
        raise UserError(
            "No transformers family computes this model (see gpt convert --inspect): "
            f"only those of {', '.join(FAMILIES)} do."
        )
    return family
