"""The model families of transformers in terms of GPTConfig and its parameter table, in both directions.

A family is data where it can be: which key of config.json is which field, and which of its tensors holds
which of ours. What is left (rotary embeddings, windows by layer, …) is a pair of small functions each.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twingpt.core.checkpoint.config_json import rope_fields
from twingpt.core.config import MAX_LAYERS, GPTConfig, check_type
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.reading import short

Array = np.ndarray
Values = dict[str, Any]

# Options that change what any family computes -> the values that leave it as it is here.
INERT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "quantization": (None,),
    "quantization_config": (None,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "text_config": (None,),
    "use_bidirectional_attention": (False, None),
    "vision_config": (None,),
}

# hidden_act -> our MLP with a gate, and without; the first of each is what is written.
ACTIVATIONS = {
    "silu": ("swiglu", None),
    "swish": ("swiglu", None),
    "gelu": ("geglu", "gelu"),
    "gelu_pytorch_tanh": ("geglu_tanh", "gelu_tanh"),
    "gelu_new": ("geglu_tanh", "gelu_tanh"),
    "gelu_fast": ("geglu_tanh", "gelu_tanh"),
    "relu2": (None, "relu2"),
}

DERIVED = ("n_kv_head", "head_dim", "n_inner")  # null leaves these to GPTConfig
UNWRITTEN = ("init_std", "zero_init", "dropout")  # of training, not of what is computed
# Buffers that old files have, and that follow from the configuration.
TENSORS_BESIDE = re.compile(r"(.*\.)?(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    `keys` maps config.json's keys to fields of the same values, `fixed` has the fields that all its
    models share, `defaults` what transformers takes for a key that is left out. `read` and `write`
    translate the rest. `sites` maps our parameters' sites, within a block or outside, to theirs where
    those differ; `block` is the name of a block, `prefix` what some files leave out or put before names.
    Queries, keys and values of one name are one tensor, and `by_head` says whether its heads come first;
    `transposed` that blocks keep matrices as (in, out).
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str | tuple[str, ...]]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    read: Callable[[Values], Values]
    write: Callable[[GPTConfig], Values]
    sites: Mapping[str, str] = field(default_factory=dict)
    block: str = "model.layers"
    prefix: str = "model."
    by_head: bool = False
    transposed: bool = False

    def config(self, content: Values) -> GPTConfig:
        """The configuration that a config.json describes; UserError names the key that can't be."""
        values = {**self.defaults, **content}
        for key, inert in INERT.items():
            if key in values and values[key] not in inert:
                raise UserError(f"{key} = {short(values[key])} is not supported.")
        fields: Values = dict(self.fixed)
        annotations = {field.name: str(field.type) for field in dataclasses.fields(GPTConfig)}
        for key, names in self.keys.items():
            for name in (names,) if isinstance(names, str) else names:
                if key not in values:
                    raise UserError(f"{key} is missing.")
                if values[key] is None and name in DERIVED:
                    continue
                check_type(key, annotations[name], values[key])
                fields[name] = values[key]
        for name in ("n_layer", "n_embd", "n_head"):
            values[name] = fields[name]
            _positive(values, name, "int")
        if fields["n_layer"] > MAX_LAYERS:
            raise UserError(f"{short(fields['n_layer'])} layers are more than the {MAX_LAYERS} that are read.")
        return GPTConfig.from_dict(fields | self.read(values))

    def content(self, config: GPTConfig) -> Values:
        """config.json for a model of this family, less what its tokenizer says."""
        first = {key: names if isinstance(names, str) else names[0] for key, names in self.keys.items()}
        written = {key: getattr(config, name) for key, name in first.items()}
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            **written,
            **self.write(config),
            "attention_dropout": 0.0,
            "initializer_range": config.init_std,
            "pad_token_id": None,  # some families' own is beyond a small vocabulary
            "dtype": "float32",
            "torch_dtype": "float32",
        }

    def computes(self, config: GPTConfig) -> bool:
        """Whether this family computes exactly this model: its config.json says all that the configuration does."""
        try:
            again = self.config(self.content(config))
        except UserError:
            return False
        return all(getattr(again, key) == value for key, value in vars(config).items() if key not in UNWRITTEN)

    def layout(self, config: GPTConfig) -> dict[str, tuple[str, ...]]:
        """Their tensors -> those of ours that each holds, in the order in which the last of these comes."""
        found: dict[str, tuple[str, ...]] = {}
        for name in parameter_table(config):
            theirs = self.rename(name)
            found[theirs] = (*found.pop(theirs, ()), name)  # the last place in the order
        return found

    def rename(self, name: str) -> str:
        """Their name for one of ours."""
        site, kind = name.rsplit(".", 1)
        inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", site)
        if inside is None:
            return f"{self.sites.get(site, site)}.{kind}"
        layer, part = inside.groups()
        return f"{self.block}.{layer}.{self.sites.get(part, part)}.{kind}"

    def canonical(self, name: str, layout: Mapping[str, Any]) -> str | None:
        """The name in `layout` for one in a file; None for a tensor that takes no part in the model."""
        if TENSORS_BESIDE.fullmatch(name):
            return None
        for candidate in (name, self.prefix + name, name.removeprefix(self.prefix)):
            if candidate in layout:
                return candidate
        if name == "lm_head.weight":  # as newer files of GPT-NeoX have it
            return self.rename(name)
        return name

    def joined(self, parts: Sequence[Array], name: str, config: GPTConfig) -> Array:
        """Our tensors as the one of theirs called `name`."""
        array = parts[0]
        if len(parts) > 1:
            heads = [part.reshape(config.n_head, config.head_dim, *part.shape[1:]) for part in parts]
            array = np.stack(heads, axis=1 if self.by_head else 0).reshape(-1, *array.shape[1:])
        return array.T if self._turns(array.shape, name) else array

    def part(self, array: Array, name: str, index: int, count: int, config: GPTConfig) -> Array:
        """The `index`th of our `count` tensors in the one of theirs called `name`."""
        array = array.T if self._turns(array.shape, name) else array
        if count == 1:
            return array
        shape = (config.n_head, count, config.head_dim) if self.by_head else (count, config.n_head, config.head_dim)
        heads = array.reshape(*shape, *array.shape[1:])
        return (heads[:, index] if self.by_head else heads[index]).reshape(-1, *array.shape[1:])

    def shape(self, name: str, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor of theirs that holds ours of these shapes."""
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        return shape[::-1] if self._turns(shape, name) else shape

    def _turns(self, shape: tuple[int, ...], name: str) -> bool:
        return self.transposed and len(shape) == 2 and name.startswith(f"{self.block}.")


def _typed(values: Values, key: str, annotation: str) -> Any:
    check_type(key, annotation, values.get(key))
    return values.get(key)


def _positive(values: Values, key: str, annotation: str) -> Any:
    number = _typed(values, key, annotation)
    if number <= 0:
        raise UserError(f"{key} must be positive, and is {short(number)}.")
    return number


# Rotary embeddings: transformers 5 has all of it in rope_parameters, older ones in rope_theta and rope_scaling.


def read_rope(values: Values) -> Values:
    """rope_theta and rope_scaling."""
    described = _mapping(values, "rope_scaling") or _mapping(values, "rope_parameters")
    partial = described.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"partial_rotary_factor = {short(partial)} is not supported in this family.")
    return _rope(described, values, values["rope_theta"])


def _mapping(values: Values, key: str) -> Values:
    described = values.get(key)
    if described is not None and not isinstance(described, dict):
        raise UserError(f"{key} must be a set of keys, and is {short(described)}.")
    return described or {}


def _rope(described: Values, values: Values, theta: float) -> Values:
    theta = described.get("rope_theta", theta)
    check_type("rope_theta", "float", theta)
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
    mscale, all_dim = (_typed(described, key, "float | None") for key in ("mscale", "mscale_all_dim"))
    if described.get("attention_factor") is not None or not (mscale and all_dim):
        return described.get("attention_factor")
    stretch = math.log(max(1.0, _typed(described, "factor", "float")))
    return (0.1 * mscale * stretch + 1) / (0.1 * all_dim * stretch + 1)


def write_rope(config: GPTConfig) -> Values:
    """RoPE as transformers 5 reads it, and as mlx-lm and older ones do."""
    return rope_fields(config)


# Activations.


def read_activation(values: Values, key: str, gated: bool) -> Values:
    """The kind of MLP."""
    name = values.get(key)
    mlp = ACTIVATIONS.get(name, (None, None))[0 if gated else 1] if isinstance(name, str) else None
    if mlp is None:
        known = [name for name, kinds in ACTIVATIONS.items() if kinds[0 if gated else 1]]
        raise UserError(f"{key} {short(name)} is not supported: only {', '.join(known)} are.")
    return {"mlp": mlp}


def write_activation(config: GPTConfig, key: str) -> Values:
    """The name of the MLP's nonlinearity."""
    return {key: next((name for name, kinds in ACTIVATIONS.items() if config.mlp in kinds), config.mlp)}


# Windows by layer.


def layer_kinds(values: Values, default: Sequence[str]) -> list[str]:
    """`layer_types`, or `default` where the configuration leaves it out."""
    kinds = values.get("layer_types")
    kinds = list(default) if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != values["n_layer"]:
        raise UserError(f"layer_types must name the kind of each of the {values['n_layer']} layers.")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"layer_types with {short(kind)} is not supported.")
    return kinds


def read_windows(values: Values, kinds: Sequence[str], window: Any) -> Values:
    """The window, and which layers are without it."""
    if "sliding_attention" not in kinds or window is None:
        return {}
    check_type("sliding_window", "int", window)
    return {
        "sliding_window": window,
        "full_attention_layers": tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
    }


def write_windows(config: GPTConfig) -> Values:
    """`layer_types` and the window."""
    kinds = ["sliding_attention" if config.window(i) else "full_attention" for i in range(config.n_layer)]
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else config.n_layer
    return {
        "layer_types": kinds,
        "use_sliding_window": config.sliding_window > 0,
        "sliding_window": config.sliding_window or None,
        "max_window_layers": first,
    }


# The families. First what the ones like Llama share.

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


def _read_llama(values: Values) -> Values:
    return read_rope(values) | read_activation(values, "hidden_act", gated=True)


def _write_llama(config: GPTConfig) -> Values:
    return write_rope(config) | write_activation(config, "hidden_act")


def _read_qwen(values: Values) -> Values:
    first = _typed(values, "max_window_layers", "int")
    usual = ["full_attention" if i < first else "sliding_attention" for i in range(values["n_layer"])]
    window = values["sliding_window"] if _typed(values, "use_sliding_window", "bool") else None
    return _read_llama(values) | read_windows(values, layer_kinds(values, usual), window)


def _write_windowed(config: GPTConfig) -> Values:
    return _write_llama(config) | write_windows(config)


def _read_mistral(values: Values) -> Values:
    if set(layer_kinds(values, ["sliding_attention"] * values["n_layer"])) != {"sliding_attention"}:
        raise UserError("layer_types of several kinds is not supported in this family.")
    return _read_llama(values) | read_windows(values, ["sliding_attention"], values["sliding_window"])


def _write_mistral(config: GPTConfig) -> Values:
    return _write_llama(config) | {"sliding_window": config.sliding_window or None}


def _read_smollm3(values: Values) -> Values:
    every, n_layer = _positive(values, "no_rope_layer_interval", "int"), values["n_layer"]
    rope = values["no_rope_layers"]
    if rope is None:
        rope = [int((i + 1) % every != 0) for i in range(n_layer)]
    if not isinstance(rope, list) or len(rope) < n_layer or any(flag not in (0, 1) for flag in rope):
        raise UserError(f"no_rope_layers must have a 0 or 1 for each of the {n_layer} layers.")
    window = values["sliding_window"] if _typed(values, "use_sliding_window", "bool") else None
    usual = ["full_attention" if rope[i] or window is None else "sliding_attention" for i in range(n_layer)]
    windows = read_windows(values, layer_kinds(values, usual), window)
    return _read_llama(values) | windows | {"no_rope_layers": tuple(i for i in range(n_layer) if not rope[i])}


def _write_smollm3(config: GPTConfig) -> Values:
    return _write_windowed(config) | {"no_rope_layers": [int(config.uses_rope(i)) for i in range(config.n_layer)]}


def _read_scale(values: Values, scale: float) -> Values:
    """`attn_scale`, where it isn't the one that follows from head_dim."""
    usual = (values["head_dim"] or values["n_embd"] / values["n_head"]) ** -0.5
    return {} if scale == usual else {"attn_scale": scale}


def _read_granite(values: Values) -> Values:
    return _read_llama(values) | _read_scale(values, _positive(values, "attention_multiplier", "float"))


def _write_granite(config: GPTConfig) -> Values:
    return _write_llama(config) | {"attention_multiplier": config.score_scale}


def _read_gemma(values: Values) -> Values:
    if "sliding_window_pattern" in values:  # as it was called once
        values = values | {"_sliding_window_pattern": values["sliding_window_pattern"]}
    nested, old = _mapping(values, "rope_parameters"), _mapping(values, "rope_scaling")
    if nested and not {"full_attention", "sliding_attention"} & nested.keys():
        raise UserError("rope_parameters must have full_attention and sliding_attention.")
    local = _rope(_mapping(nested, "sliding_attention"), values, values["rope_local_base_freq"])
    if "rope_scaling" in local:
        raise UserError("A scaled rope_type of sliding_attention is not supported.")
    every = _positive({"_sliding_window_pattern": 6, **values}, "_sliding_window_pattern", "int")
    usual = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(values["n_layer"])]
    windows = read_windows(values, layer_kinds(values, usual), values["sliding_window"])
    return {
        **_rope({**_mapping(nested, "full_attention"), **old}, values, values["rope_theta"]),
        **windows,
        **read_activation(values, "hidden_activation", gated=True),
        "local_rope_theta": local["rope_theta"] if windows else 0.0,
        "embed_scale": math.sqrt(values["n_embd"]),
        **_read_scale(values, _positive(values, "query_pre_attn_scalar", "int") ** -0.5),
        "logit_softcap": _typed(values, "final_logit_softcapping", "float | None") or 0.0,
    }


def window_pattern(config: GPTConfig) -> int | None:
    """The n of which each nth layer is without the window and no other is, or None where there is no such n."""
    windows = [config.window(i) > 0 for i in range(config.n_layer)]
    every = windows.index(False) + 1 if False in windows else config.n_layer + 1
    return every if windows == [(i + 1) % every != 0 for i in range(config.n_layer)] else None


def _write_gemma(config: GPTConfig) -> Values:
    rope, local = rope_fields(config), config.local_rope_theta or 10000.0
    nested = {
        "full_attention": rope["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return {
        **rope,
        **write_windows(config),
        **write_activation(config, "hidden_activation"),
        "rope_parameters": nested,
        "rope_local_base_freq": local,
        "sliding_window_pattern": window_pattern(config) or 6,  # for mlx-lm, which knows no layer_types here
        "sliding_window": config.sliding_window or 4096,  # it must have one, even where no layer uses it
        "query_pre_attn_scalar": round(config.score_scale**-2),
        "final_logit_softcapping": config.logit_softcap or None,
    }


def _read_gpt2(values: Values) -> Values:
    fields = read_activation(values, "activation_function", gated=False)
    return fields if _typed(values, "scale_attn_weights", "bool") else fields | {"attn_scale": 1.0}


def _write_gpt2(config: GPTConfig) -> Values:
    return {
        **write_activation(config, "activation_function"),
        "n_ctx": config.block_size,  # for mlx-lm
        "scale_attn_weights": config.attn_scale != 1,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _read_neox(values: Values) -> Values:
    described = _mapping(values, "rope_scaling") or _mapping(values, "rope_parameters")
    fraction = described.get("partial_rotary_factor", values["rotary_pct"])
    rope = _rope(described, values, values["rotary_emb_base"])
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


_NO_QK_NORM = {"qk_norm": False}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            SIZES | ATTENTION_BIAS | MLP_BIAS,
            _NO_QK_NORM,
            USUAL,
            _read_llama,
            _write_llama,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            SIZES | ATTENTION_BIAS,
            {"qk_norm": True},
            USUAL
            | {
                "num_key_value_heads": 32,
                "head_dim": 128,
                "use_sliding_window": False,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
            _read_qwen,
            _write_windowed,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            SIZES,
            {"qk_norm": False, "qkv_bias": True},
            USUAL
            | {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
            _read_qwen,
            _write_windowed,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            SIZES,
            _NO_QK_NORM,
            USUAL | {"num_key_value_heads": 8, "sliding_window": 4096},
            _read_mistral,
            _write_mistral,
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            SIZES | ATTENTION_BIAS | MLP_BIAS,
            _NO_QK_NORM,
            USUAL
            | {
                "tie_word_embeddings": True,
                "num_key_value_heads": 4,
                "rope_theta": 2000000.0,
                "no_rope_layers": None,
                "no_rope_layer_interval": 4,
                "use_sliding_window": False,
                "sliding_window": None,
            },
            _read_smollm3,
            _write_smollm3,
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            SIZES
            | ATTENTION_BIAS
            | MLP_BIAS
            | {
                "embedding_multiplier": "embed_scale",
                "residual_multiplier": "residual_scale",
                "logits_scaling": "logit_divisor",
            },
            _NO_QK_NORM,
            USUAL
            | {
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "attention_multiplier": 1.0,
                "logits_scaling": 1.0,
            },
            _read_granite,
            _write_granite,
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            SIZES | ATTENTION_BIAS,
            {"qk_norm": True, "qk_norm_whole": True, "norm_placement": "post"},
            USUAL | {"rms_norm_eps": 1e-5},
            _read_llama,
            _write_llama,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            SIZES | ATTENTION_BIAS,
            {"qk_norm": True, "norm_placement": "both", "norm_offset": True},
            USUAL
            | {
                "tie_word_embeddings": True,
                "head_dim": 256,
                "num_key_value_heads": 4,
                "hidden_activation": "gelu_pytorch_tanh",
                "rope_theta": 1000000.0,
                "rope_local_base_freq": 10000.0,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
            },
            _read_gemma,
            _write_gemma,
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            {
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
            {
                "position": "learned",
                "norm": "layernorm",
                "norm_bias": True,
                "mlp_bias": True,
                "qkv_bias": True,
                "attn_out_bias": True,
                "qk_norm": False,
            },
            {
                "n_inner": None,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "resid_pdrop": 0.1,
                "tie_word_embeddings": True,
                "scale_attn_weights": True,
            },
            _read_gpt2,
            _write_gpt2,
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
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            {
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
            {"norm": "layernorm", "norm_bias": True, "mlp_bias": True, "qk_norm": False},
            {
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,
                "hidden_dropout": 0.0,
                "tie_word_embeddings": False,
                "use_parallel_residual": True,
                "attention_bias": True,
                "rotary_pct": 0.25,
                "rotary_emb_base": 10000.0,
            },
            _read_neox,
            _write_neox,
            sites={
                "model.embed_tokens": "gpt_neox.embed_in",
                "model.norm": "gpt_neox.final_layer_norm",
                "lm_head": "embed_out",
                **dict.fromkeys(
                    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.query_key_value"
                ),
                "self_attn.o_proj": "attention.dense",
                "mlp.up_proj": "mlp.dense_h_to_4h",
                "mlp.down_proj": "mlp.dense_4h_to_h",
            },
            block="gpt_neox.layers",
            prefix="gpt_neox.",
            by_head=True,
        ),
    )
}


def family_of(content: Values) -> Family:
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
