"""A model family of transformers in terms of GPTConfig and its parameter table, in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twingpt.core.config import MAX_LAYERS, GPTConfig, coerce, settings_of
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.reading import short
from twingpt.weights.families.fields import Values, positive

Array = np.ndarray

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

DERIVED = ("n_kv_head", "head_dim", "n_inner")  # null leaves these to GPTConfig
UNWRITTEN = ("init_std", "zero_init", "dropout")  # of training, not of what is computed
# What torch.compile, FSDP, gradient checkpointing and, at the beginning, DataParallel put into names of parameters.
WRAPPERS = re.compile(r"(?:\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)|^module)\.")
# Buffers that old files have, and that follow from the configuration.
TENSORS_BESIDE = re.compile(r"(.*\.)?(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")


def unwrapped(name: str) -> str:
    """A parameter's name without what wrappers of its modules put into it."""
    while (inner := WRAPPERS.sub("", name)) != name:
        name = inner
    return name


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
        known = settings_of(GPTConfig)
        for key, names in self.keys.items():
            for name in (names,) if isinstance(names, str) else names:
                if key not in values:
                    raise UserError(f"{key} is missing.")
                if values[key] is None and name in DERIVED:
                    continue
                coerce(key, known[name].hint, values[key])
                fields[name] = values[key]
        for name in ("n_layer", "n_embd", "n_head"):
            values[name] = fields[name]
            positive(values, name, int)
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
        name = unwrapped(name)
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
