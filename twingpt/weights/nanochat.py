"""nanochat's models as our tensors: its own model_STEP.pt with meta_STEP.json, and transformers' nanochat family.

https://github.com/karpathy/nanochat. Its RoPE rotates by minus theta, which is ours once the halves of each
head's query and key rows change places. Its norms have no weights: ones. It normalises queries and keys
after rotating them, which leaves their lengths as they are, so that before is the same.

Models of 2026 scale the residual stream by layer, mix embeddings into values, and more; those are refused
by the name of the first tensor that has no place here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.safetensors_file import TensorFile, finite
from twingpt.core.checkpoint.schema import Model, check_layers
from twingpt.core.config import GPTConfig, unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.reading import short
from twingpt.core.tokenizer import Tokenizer
from twingpt.weights.huggingface import is_huggingface, tensor_files
from twingpt.weights.pickles import StoredTensor, check_state, is_torch_file, read_pickle, state_of, tokenizer_of

Array = np.ndarray

# model_config of meta_STEP.json -> GPTConfig
OPTIONS = {
    "sequence_len": "block_size",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_kv_head": "n_kv_head",
    "n_embd": "n_embd",
}
KEYS = {
    "max_position_embeddings": "block_size",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
}
# All models that are read: RoPE's theta in nanochat's own was 10,000 as long as it had no more tensors than these.
FIXED: dict[str, Any] = {
    "embed_norm": True, "mlp": "relu2", "qk_norm": True, "tie_embeddings": False, "logit_softcap": 15.0,
}  # fmt: skip
WINDOWS = "window_pattern"  # newer ones have it; all of it "L" is no window
PADDED = 64  # newer ones round the vocabulary up to a multiple, and leave the rest out of the logits


@dataclass(frozen=True)
class Layout:
    """Names of one way to store the model: of sites outside the blocks and within, and of a block."""

    sites: Mapping[str, str]
    block: str


OWN = Layout(
    {
        "model.embed_tokens": "transformer.wte",
        "lm_head": "lm_head",
        "self_attn.q_proj": "attn.c_q",
        "self_attn.k_proj": "attn.c_k",
        "self_attn.v_proj": "attn.c_v",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    "transformer.h",
)
TRANSFORMERS = Layout(
    {**{site: site for site in OWN.sites}, "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}, "model.layers"
)
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
VOCABULARIES = ("model.embed_tokens", "lm_head")


class Nanochat:
    """A model_STEP.pt of nanochat, a folder with one, or a folder of transformers' nanochat family."""

    name = "nanochat"

    def detect(self, directory: ModelDirectory) -> bool:
        """By the file's name and the meta_STEP.json beside it, or by the family in config.json."""
        file = _file(directory.path)
        if file is not None:
            return is_torch_file(file) and _meta(file).is_file()
        return is_huggingface(directory) and _model_type(directory) == "nanochat"

    def open(self, directory: ModelDirectory) -> NanochatModel:
        """Read all but the weights; UserError, by name, for what can't be expressed here."""
        path, file = directory.path, _file(directory.path)
        beside, layout = directory, TRANSFORMERS
        if file is None:
            config = _transformers_config(directory.json_object("config.json"), path)
            state: dict[str, StoredTensor] = {
                name: SafeTensor(source, name) for source in tensor_files(directory) for name in source.entries
            }
        else:
            beside, layout = directory if path.is_dir() else ModelDirectory(file.parent), OWN
            meta = _meta(file)
            config = _config(beside.json_object(meta.name).get("model_config"), meta)
            state = state_of(directory.read_once(file, read_pickle), file)
        check_layers(config.n_layer, len(state), path)
        check_state(state, _shapes(config, state, layout), path)
        return NanochatModel(directory, config, state, layout, beside)


class NanochatModel(Model):
    """A model of nanochat whose tensors fit its configuration; `beside` is the folder that its other files are in."""

    family = "nanochat"

    def __init__(
        self,
        directory: ModelDirectory,
        config: GPTConfig,
        state: Mapping[str, StoredTensor],
        layout: Layout,
        beside: ModelDirectory,
    ) -> None:
        super().__init__(directory, config)
        self.state = state
        self.layout = layout
        self.beside = beside

    def tokenizer(self) -> Tokenizer:
        """The tokenizer.json beside the checkpoint, if there is one: nanochat's own, tokenizer.pkl, is code."""
        return tokenizer_of(self.beside, self.folder)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor, as the file has them."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.state.items()}

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter."""
        self.directory.check_unchanged()
        for name, row in parameter_table(self.config).items():
            theirs, part = _source(name, self.layout)
            if theirs is None:
                yield name, np.ones(row.shape, np.float32)
                continue
            array = finite(self.state[theirs].read(slice(row.shape[0])), theirs, self.folder)
            yield name, _halves_exchanged(array, self.config.head_dim) if part in ROTATED else array


def _file(path: Path) -> Path | None:
    """The checkpoint at `path`; of those in a folder the last."""
    if not path.is_dir():
        return path if _step(path) is not None else None
    found = [file for file in path.iterdir() if _step(file) is not None]
    return max(found, key=lambda file: int(_step(file) or 0), default=None)


def _step(file: Path) -> str | None:
    match = re.fullmatch(r"model_(\d{1,12})\.pt", file.name)
    return match[1] if match else None


def _meta(file: Path) -> Path:
    return file.with_name(f"meta_{_step(file)}.json")


def _model_type(directory: ModelDirectory) -> Any:
    try:
        return directory.json_object("config.json").get("model_type")
    except UserError:  # the one who opens it says what is wrong
        return None


@dataclass(frozen=True)
class SafeTensor:
    """A tensor of a safetensors file, as those of torch's files are."""

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> str:
        """How it is stored."""
        return self.file.entries[self.name].dtype

    def read(self, rows: slice = slice(None)) -> Array:
        """A float32 copy, of some of its rows."""
        return self.file.read_float(self.name)[rows]

    def same_memory(self, other: Any) -> bool:
        """Whether both are one."""
        return bool(self == other)


def _config(options: Any, meta: Path) -> GPTConfig:
    if not isinstance(options, dict):
        raise UserError(f"{meta} has no model_config.")
    for key in options:
        if key not in (*OPTIONS, WINDOWS):
            raise unknown_choice(f"option of nanochat in {meta}", key, (*OPTIONS, WINDOWS))
    missing = [key for key in OPTIONS if key not in options]
    if missing:
        raise UserError(f"The model_config of {meta} has no {missing[0]}.")
    windows = options.get(WINDOWS, "L")
    if not isinstance(windows, str) or set(windows.upper()) != {"L"}:
        raise UserError(f"{WINDOWS} {short(windows)} in {meta}: sliding windows by layer are not read.")
    eps = float(np.finfo(np.float32).eps)  # what torch takes where none is given
    return GPTConfig(**{ours: options[theirs] for theirs, ours in OPTIONS.items()}, **FIXED, norm_eps=eps)


def _transformers_config(content: Mapping[str, Any], folder: Path) -> GPTConfig:
    """What a config.json of the nanochat family describes."""
    rope = content.get("rope_parameters") or {"rope_theta": content.get("rope_theta", 10000.0)}
    scaling = content.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError(f"rope_parameters and rope_scaling in {folder / 'config.json'} must be objects.")
    fixed = {
        "hidden_act": (content.get("hidden_act", "relu2"), "relu2"),
        "attention_bias": (content.get("attention_bias", False), False),
        "tie_word_embeddings": (content.get("tie_word_embeddings", False), False),
        "rope_type": (scaling.get("rope_type", "default"), "default"),
    }
    for key, (value, wanted) in fixed.items():
        if value != wanted:
            raise UserError(f"{key} = {short(value)} in {folder / 'config.json'} is not read: only {wanted!r} is.")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise UserError(f"{folder / 'config.json'} has no {missing[0]}.")
    return GPTConfig(
        **{ours: content[theirs] for theirs, ours in KEYS.items()},
        **FIXED | {"logit_softcap": content.get("final_logit_softcapping", 15.0) or 0.0},
        n_kv_head=content.get("num_key_value_heads") or 0,
        head_dim=content.get("head_dim") or 0,
        norm_eps=content.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", 10000.0),
    )


def _source(name: str, layout: Layout) -> tuple[str | None, str]:
    """Where one of our parameters is, None for a norm's weights; and its site."""
    site, kind = name.rsplit(".", 1)
    block = re.match(r"model\.layers\.(\d+)\.(.+)", site)
    part = block[2] if block else site
    if part not in layout.sites:
        return None, part
    theirs = f"{layout.sites[part]}.{kind}"
    return f"{layout.block}.{block[1]}.{theirs}" if block else theirs, part


def _shapes(config: GPTConfig, state: Mapping[str, StoredTensor], layout: Layout) -> dict[str, tuple[int, ...]]:
    """Their name -> shape of every tensor; the vocabulary's with its padding, if it has one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, row in parameter_table(config).items():
        theirs, part = _source(name, layout)
        if theirs is not None:
            padded = part in VOCABULARIES and _padded(state, theirs, row.shape)
            shapes[theirs] = state[theirs].shape if padded else row.shape
    return shapes


def _padded(state: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]) -> bool:
    return name in state and state[name].shape == (-(-shape[0] // PADDED) * PADDED, *shape[1:])


def _halves_exchanged(array: Array, head_dim: int) -> Array:
    """The two halves of each head's rows in each other's place."""
    return array.reshape(-1, 2, head_dim // 2, *array.shape[1:])[:, ::-1].reshape(array.shape)
