"""Rotary embeddings: transformers 5 has all of it in rope_parameters, older ones in rope_theta and rope_scaling."""

from __future__ import annotations

import math

from twingpt.core.config import coerce
from twingpt.core.errors import UserError
from twingpt.core.reading import short
from twingpt.weights.families.fields import Values, mapping, typed


def read_rope(values: Values) -> Values:
    """The fields rope_theta and rope_scaling, of a family that rotates whole heads by one theta."""
    described = mapping(values, "rope_scaling") or mapping(values, "rope_parameters")
    partial = described.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"partial_rotary_factor = {short(partial)} is not supported in this family.")
    return rope_from(described, values, values["rope_theta"])


def rope_from(described: Values, values: Values, theta: float) -> Values:
    """The fields rope_theta, or `theta` where it is left out, and rope_scaling of an object that describes RoPE.

    `values` is the whole config.json, for what older ones have outside of that object.
    """
    theta = described.get("rope_theta", theta)
    coerce("rope_theta", float, theta)
    kind = described.get("rope_type", described.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"rope_type {short(kind)} is not supported: only default, linear, llama3 and yarn are.")
    scaling = {"type": kind, "factor": described.get("factor")}
    if kind == "linear":
        return {"rope_theta": theta, "rope_scaling": scaling}
    outside = values.get("original_max_position_embeddings", values.get("max_position_embeddings"))
    scaling["original_block_size"] = described.get("original_max_position_embeddings", outside)
    names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_fast", "beta_slow")
    scaling |= {name: described[name] for name in names if described.get(name) is not None}
    if kind == "yarn":
        scaling["attention_factor"] = _attention_factor(described)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _attention_factor(described: Values) -> float | None:
    """YaRN's factor on cos and sin; None is the usual one of its stretching factor."""
    if described.get("truncate", True) is not True:
        raise UserError("truncate = False of rope_type 'yarn' is not supported.")
    mscale, all_dim = (typed(described, key, float | None) for key in ("mscale", "mscale_all_dim"))
    factor: float | None = described.get("attention_factor")
    if factor is not None or not (mscale and all_dim):
        return factor
    stretch = math.log(max(1.0, typed(described, "factor", float)))
    return float((0.1 * mscale * stretch + 1) / (0.1 * all_dim * stretch + 1))
