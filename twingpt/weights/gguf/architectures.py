"""llama.cpp's architectures in terms of the families: their metadata, their tensors, and what they don't compute.

llama.cpp's names are in gguf-py/gguf/constants.py there, what it computes in src/models/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args

import numpy as np

from twingpt.core.config import GPTConfig, coerce
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.reading import short
from twingpt.core.rope import rope_periods
from twingpt.weights.families import FAMILIES, family_for
from twingpt.weights.families.fields import ACTIVATIONS, write_activation
from twingpt.weights.families.windows import window_pattern

Array = np.ndarray
Values = dict[str, Any]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS_AFTER = {  # in models that have norms after attention and MLP
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FUSED = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn_qkv")
ROTATED = re.compile(r".*\.self_attn\.[qk]_proj\.(weight|bias)")
EMBEDDING, HEAD, ROPE_FREQS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# Our field -> its key, less the name of the architecture.
SIZES = {
    "block_size": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
}
LAYERNORM_EPS, RMS_EPS = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
YARN_BETAS = (32.0, 1.0)  # llama.cpp takes others from few families' files
GEMMA_27B = 62  # layers: by them llama.cpp knows the one Gemma 3 whose scores are scaled by another width
SMOLLM3_EVERY = 4  # llama.cpp has RoPE in all but each fourth layer, whatever a file says


@dataclass(frozen=True)
class Facts:
    """The metadata of an architecture, by their keys less its name, with the types checked."""

    values: Mapping[str, Any]
    architecture: str

    def get(self, key: str, hint: Any, default: Any = None) -> Any:
        """The value of a key; UserError, naming it, where it is of another type, or left out without a `default`."""
        name = f"{self.architecture}.{key}"
        if name not in self.values and default is None and NoneType not in get_args(hint):
            raise UserError(f"{name} is missing.")
        return coerce(name, hint, self.values.get(name, default))

    def positive(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        number: int = self.get(key, int, default)
        if number <= 0:
            raise UserError(f"{self.architecture}.{key} must be positive, and is {short(number)}.")
        return number


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: it computes the models of a family of transformers, less what it `lacks`.

    `names` are of the sites within a block that are called otherwise than in NAMES; several of one name are one
    tensor. `mlps` it has, and `can` names what of `problems` it has too. With `neighbours` it rotates pairs of
    neighbours, where ours are of a head's two halves; with `head` it wants a tied head as a tensor of its own. `write`
    has further metadata of a model, `read` makes of them keys of the family's config.json, given the fields that are
    known.
    """

    name: str
    model_type: str
    mlps: tuple[str, ...] = ("swiglu",)
    can: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    neighbours: bool = False
    head: bool = False
    write: Callable[[GPTConfig], Values] = lambda _: {}
    read: Callable[[Facts, Values], Values] = lambda *_: {}

    def lacks(self, config: GPTConfig) -> str | None:
        """What of a model of the family llama.cpp would leave out when it computes it, or None."""
        if config.mlp not in self.mlps:
            return f"the activation of {config.mlp}"
        return next((what for what, there in problems(config).items() if there and what not in self.can), None)

    @property
    def has_rope_freqs(self) -> bool:
        """Whether it takes RoPE's scaling from a tensor."""
        return LLAMA3 in self.can

    def layout(self, config: GPTConfig) -> dict[str, tuple[str, ...]]:
        """Their tensors -> those of ours that each holds, in the order in which the last of these comes."""
        found: dict[str, tuple[str, ...]] = {}
        for name in parameter_table(config):
            theirs = self._stored_name(name)
            found[theirs] = (*found.pop(theirs, ()), name)
        return found

    def _stored_name(self, name: str) -> str:
        site, kind = name.rsplit(".", 1)
        block = re.match(r"model\.layers\.(\d+)\.(.+)", site)
        if block is None:
            return f"{NAMES[site]}.{kind}"
        return f"blk.{block[1]}.{(NAMES | dict(self.names))[block[2]]}.{kind}"

    def to_stored(self, name: str, array: Array, config: GPTConfig) -> Array:
        """One of our parameters as llama.cpp keeps it: rows in another order, norms with Gemma's 1 added."""
        if self.neighbours and ROTATED.fullmatch(name):
            return _reordered(array, (2, config.head_dim // 2))
        return array + np.float32(1) if config.norm_offset and name.endswith("norm.weight") else array

    def from_stored(self, name: str, array: Array, config: GPTConfig) -> Array:
        """The inverse of `to_stored`, but for what adding 1 rounds."""
        if self.neighbours and ROTATED.fullmatch(name):
            return _reordered(array, (config.head_dim // 2, 2))
        return array - np.float32(1) if config.norm_offset and name.endswith("norm.weight") else array

    def metadata(self, config: GPTConfig) -> Values:
        """What a file says of a model, by keys."""
        found: Values = {"vocab_size": config.vocab_size}
        found |= {key: getattr(config, name) for name, key in SIZES.items()}
        found[LAYERNORM_EPS if config.norm == "layernorm" else RMS_EPS] = config.norm_eps
        if config.position == "rope":
            found |= {
                "attention.head_count_kv": config.n_kv_head,
                "attention.key_length": config.head_dim,
                "attention.value_length": config.head_dim,
                "rope.dimension_count": config.rope_dim,
                "rope.freq_base": config.rope_theta,
                **_write_scaling(config),
            }
        return {f"{self.name}.{key}": value for key, value in {**found, **self.write(config)}.items()}

    def config(
        self, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_freqs: Array | None
    ) -> GPTConfig:
        """The model that a file describes; UserError, naming the key, for what this family or ours has not.

        `shapes` are of its tensors, which tell of biases, a tied head and the vocabulary; `rope_freqs` is the one of
        Llama 3's scaling of RoPE, if it is there.
        """
        facts = Facts(metadata, self.name)
        family = FAMILIES[self.model_type]
        layernorm = family.fixed.get("norm") == "layernorm" or self.model_type == "gpt2"
        fields: Values = {name: facts.positive(key) for name, key in SIZES.items()}
        head_dim = facts.positive("attention.key_length", fields["n_embd"] // fields["n_head"])
        fields |= {
            "vocab_size": (shapes.get(EMBEDDING) or (0,))[0],
            "n_kv_head": facts.get("attention.head_count_kv", int, fields["n_head"]),
            "head_dim": head_dim,
            "norm_eps": facts.get(LAYERNORM_EPS if layernorm else RMS_EPS, float),
            "tie_embeddings": HEAD not in shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in shapes,
            "qkv_bias": any(f"blk.0.{part}.bias" in shapes for part in ("attn_q", "attn_qkv")),
            "dropout": 0.0,
        }
        if facts.get("attention.value_length", int, head_dim) != head_dim or facts.get("expert_count", int, 0):
            raise UserError("values of another width than keys, and mixtures of experts, are not supported.")
        first = {names if isinstance(names, str) else names[0]: key for key, names in family.keys.items()}
        content = {key: fields[name] for name, key in first.items() if name in fields}
        content |= _read_rope(facts, fields, rope_freqs, partial=self.model_type == "gpt_neox")
        return family.config(content | self.read(facts, fields))


def problems(config: GPTConfig) -> dict[str, bool]:
    """What some of llama.cpp's architectures leave out -> whether a model has it."""
    scaling = config.rope_scaling
    betas = (scaling.beta_fast, scaling.beta_slow) if scaling and scaling.type == "yarn" else YARN_BETAS
    unrotated = tuple(i for i in range(config.n_layer) if (i + 1) % SMOLLM3_EVERY == 0)
    width = config.n_embd / config.n_head if config.norm_offset and config.n_layer == GEMMA_27B else config.head_dim
    scale = np.float32(width**-0.5)
    return {
        "biases in attention": config.qkv_bias or config.attn_out_bias,
        "leaving out attention's biases": not config.qkv_bias,
        "biases in the MLP": config.mlp_bias,
        "rope_scaling of type llama3": scaling is not None and scaling.type == "llama3",
        f"yarn of other beta_fast and beta_slow than {YARN_BETAS}": betas != YARN_BETAS,
        "sliding windows": config.sliding_window > 0,
        "such an order of windows": config.sliding_window > 0 and window_pattern(config) is None,
        "other layers without RoPE than each fourth": config.no_rope_layers not in ((), unrotated),
        "such a scale of attention's scores": np.float32(config.score_scale) != scale,
        "a width of heads apart from the model's": config.head_dim * config.n_head != config.n_embd,
    }


def architecture_for(config: GPTConfig) -> Architecture:
    """The architecture that computes exactly this model, as far as llama.cpp does; UserError, saying why, for none."""
    family = family_for(config)
    found = ARCHITECTURES.get(FAMILIES_AS.get(family.model_type, "")) if family else None
    if found is None:
        raise UserError(
            f"llama.cpp computes models of the families {', '.join(FAMILIES_AS)}, and this model is of none of them "
            "(see gpt convert --inspect)."
        )
    if lacking := found.lacks(config):
        raise UserError(f"llama.cpp computes {found.name} models without {lacking}: write --to hf or twingpt.")
    return found


def rope_factors(config: GPTConfig) -> Array | None:
    """By how much each rotated pair's period is stretched, (rope_dim / 2,), where only a tensor can say it."""
    if config.position != "rope" or config.rope_scaling is None or config.rope_scaling.type != "llama3":
        return None
    plain = np.float64(config.rope_theta) ** (np.arange(0, config.rope_dim, 2) / config.rope_dim)
    factors: Array = rope_periods(config)[0] / plain
    return factors.astype(np.float32)


def _reordered(array: Array, shape: tuple[int, int]) -> Array:
    """The rows of each head, as a table of this shape, column by column."""
    reordered: Array = array.reshape(-1, *shape, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return reordered


def _write_scaling(config: GPTConfig) -> Values:
    """Linear and yarn by their numbers; llama3 is in a tensor, ROPE_FREQS."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type == "llama3":
        return {}
    found: Values = {"rope.scaling.type": scaling.type, "rope.scaling.factor": scaling.factor}
    if scaling.type == "yarn":
        found["rope.scaling.original_context_length"] = scaling.original_block_size
        if scaling.attention_factor is not None:  # by which llama.cpp multiplies the usual one
            found["rope.scaling.attn_factor"] = scaling.attention_factor / (1 + 0.1 * math.log(scaling.factor))
    return found


def _read_rope(facts: Facts, fields: Values, factors: Array | None, *, partial: bool) -> Values:
    """The keys of RoPE of a config.json."""
    theta = facts.get("rope.freq_base", float, 10000.0)
    rotated = facts.get("rope.dimension_count", int, fields["head_dim"])
    if rotated != fields["head_dim"] and not partial:
        raise UserError(f"rope.dimension_count {short(rotated)}, a part of each head, is not supported in this family.")
    found: Values = {"rope_theta": theta, "rope_scaling": _read_scaling(facts, fields)}
    if partial:
        found |= {"rotary_emb_base": theta, "rotary_pct": rotated / fields["head_dim"]}
    if factors is not None and not np.all(factors == 1):
        if found["rope_scaling"]:
            raise UserError(f"{ROPE_FREQS} beside rope.scaling is not supported.")
        found["rope_scaling"] = _llama3(factors, theta, fields)
    return found


def _read_scaling(facts: Facts, fields: Values) -> Values | None:
    kind = facts.get("rope.scaling.type", str, "none")
    factor = facts.get("rope.scaling.factor", float, facts.get("rope.scale_linear", float, 1.0))
    if kind == "none" and factor != 1 and f"{facts.architecture}.rope.scaling.type" not in facts.values:
        kind = "linear"  # as it was before there were types
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    found = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = facts.get("rope.scaling.original_context_length", int, fields["block_size"])
        found["original_max_position_embeddings"] = original
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            found[ours] = facts.get(f"rope.scaling.{theirs}", float, YARN_BETAS[ours == "beta_slow"])
        share = facts.get("rope.scaling.attn_factor", float, 1.0)
        if share != 1 and factor > 0:
            found["attention_factor"] = _shortest(share * (1 + 0.1 * math.log(factor)))
    return found


def _llama3(factors: Array, theta: float, fields: Values) -> Values:
    """Llama 3's scaling of which these are the factors; a file has no more of it. UserError where they are none.

    Its low_freq_factor and high_freq_factor are 1 and 4 in all models. The longest waves have the whole factor, and
    one between the two tells the original context.
    """
    factor = float(factors.max())
    waves = 2 * math.pi * np.float64(theta) ** (np.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    between = [(f, wave) for f, wave in zip(factors, waves, strict=True) if 1.001 < f < factor * 0.999]
    contexts = [2**i for i in range(24)]
    if between:
        keep = (1 / float(between[0][0]) - 1 / factor) / (1 - 1 / factor)
        contexts.insert(0, round(between[0][1] * (1 + 3 * keep)))
    for context in contexts:
        scaling = {"type": "llama3", "factor": _shortest(factor), "original_block_size": context}
        try:
            config = GPTConfig(1, head_dim=2 * len(factors), rope_theta=theta, rope_scaling=scaling)  # type: ignore[arg-type]
        except UserError:
            break
        expected = rope_factors(config)
        if expected is not None and np.allclose(expected, factors, rtol=1e-5, atol=0):
            scaling["rope_type"] = scaling.pop("type")
            return scaling | {"original_max_position_embeddings": context}
    raise UserError(f"{ROPE_FREQS} is not Llama 3's scaling of RoPE, and no other is supported.")


def _shortest(number: float) -> float:
    """The number with the fewest digits that is the same in float32, as which files keep it."""
    return float(str(np.float32(number)))


def _write_granite(config: GPTConfig) -> Values:
    return {
        "attention.scale": config.score_scale,
        "embedding_scale": config.embed_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_divisor,
    }


def _read_granite(facts: Facts, fields: Values) -> Values:
    usual = fields["head_dim"] ** -0.5
    scale = facts.get("attention.scale", float, usual) or usual  # 0 is llama.cpp's own default
    return {
        "attention_multiplier": usual if np.float32(scale) == np.float32(usual) else scale,
        "embedding_multiplier": facts.get("embedding_scale", float, 1.0),
        "residual_multiplier": facts.get("residual_scale", float, 1.0),
        "logits_scaling": facts.get("logit_scale", float),
    }


def _write_gemma(config: GPTConfig) -> Values:
    found: Values = {"final_logit_softcapping": config.logit_softcap} if config.logit_softcap else {}
    if config.sliding_window:
        found["attention.sliding_window"] = config.sliding_window
        found["attention.sliding_window_pattern"] = window_pattern(config)
        found["rope.freq_base_swa"] = config.local_rope_theta
    return found


def _read_gemma(facts: Facts, fields: Values) -> Values:
    layers, window = fields["n_layer"], facts.get("attention.sliding_window", int, 0)
    every = facts.get("attention.sliding_window_pattern", int, 6) or layers + 1
    other = fields["n_embd"] // fields["n_head"] if layers == GEMMA_27B else fields["head_dim"]
    return {
        "sliding_window": window or None,
        "_sliding_window_pattern": every if window else 1,
        "rope_local_base_freq": facts.get("rope.freq_base_swa", float, 10000.0),
        "query_pre_attn_scalar": other,
        "final_logit_softcapping": facts.get("final_logit_softcapping", float | None),
    }


def _write_neox(config: GPTConfig) -> Values:
    # llama.cpp computes GELU by its tanh, whatever a file says: of Pythia, which has the exact one, too
    activation = write_activation(config, "hidden_activation")
    return {"use_parallel_residual": config.parallel_residual, **activation}


def _read_neox(facts: Facts, fields: Values) -> Values:
    if fields["n_kv_head"] != fields["n_head"]:
        raise UserError("attention.head_count_kv other than attention.head_count is not supported in this family.")
    activation = facts.get("hidden_activation", str, "gelu")
    return {
        "use_parallel_residual": facts.get("use_parallel_residual", bool),
        "hidden_act": activation if activation in ACTIVATIONS else "gelu",
    }


BIASES, NO_BIASES = ("biases in attention", "biases in the MLP"), "leaving out attention's biases"
HEADS, WINDOWS = "a width of heads apart from the model's", "sliding windows"
LLAMA3, SCALE = "rope_scaling of type llama3", "such a scale of attention's scores"

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "llama", can=(*BIASES, NO_BIASES, HEADS, LLAMA3), neighbours=True),
        Architecture("qwen3", "qwen3", can=(NO_BIASES, HEADS)),
        Architecture("qwen2", "qwen2", can=BIASES),
        Architecture("smollm3", "smollm3", can=(NO_BIASES, HEADS), neighbours=True),
        Architecture(
            "granite",
            "granite",
            can=(*BIASES, NO_BIASES, HEADS, LLAMA3, SCALE),
            neighbours=True,
            write=_write_granite,
            read=_read_granite,
        ),
        Architecture("olmo2", "olmo2", can=(NO_BIASES,), names=NORMS_AFTER, head=True),
        Architecture(
            "gemma3",
            "gemma3_text",
            mlps=("geglu_tanh",),
            can=(NO_BIASES, HEADS, WINDOWS),
            names=NORMS_AFTER,
            write=_write_gemma,
            read=_read_gemma,
        ),
        Architecture("gpt2", "gpt2", mlps=("gelu_tanh",), can=BIASES, names=FUSED),
        Architecture(
            "gptneox",
            "gpt_neox",
            mlps=("gelu_tanh", "gelu"),
            can=BIASES,
            names=FUSED,
            head=True,
            write=_write_neox,
            read=_read_neox,
        ),
    )
}
# model_type -> llama.cpp's name for it; Mistral's models are its llama where they have no windows.
FAMILIES_AS = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()} | {"mistral": "llama"}
