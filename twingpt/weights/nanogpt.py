"""nanoGPT's ckpt.pt as our tensors: https://github.com/karpathy/nanoGPT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.safetensors_file import finite
from twingpt.core.checkpoint.schema import Model, check_layers
from twingpt.core.config import GPTConfig, unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.reading import short
from twingpt.core.tokenizer import CharTokenizer, Tokenizer, tiktoken_named
from twingpt.weights.pickles import (
    State,
    check_state,
    is_torch_file,
    no_tokenizer,
    read_pickle,
    read_plain_pickle,
    state_of,
)

Array = np.ndarray

FILE, META = "ckpt.pt", "meta.pkl"
GPT2_VOCABULARIES = (50257, 50304)  # GPT-2's own, and padded to a multiple of 64

NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}

# model_args -> GPTConfig; `bias` becomes four switches.
ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


class NanoGPT:
    """A checkpoint of nanoGPT: a ckpt.pt, or a folder with one."""

    name = "nanogpt"

    def detect(self, directory: ModelDirectory) -> bool:
        """Whether it has a model and its model_args; UserError for an unsound ckpt.pt."""
        file = _file(directory.path)
        return is_torch_file(file) and _is_checkpoint(directory.read_once(file, read_pickle))

    def open(self, directory: ModelDirectory) -> NanoGPTModel:
        """Read all but the weights; the vocabulary keeps its padding, so that the logits are the same.

        Raises UserError for an option or a tensor that nanoGPT's model has not.
        """
        file = _file(directory.path)
        checkpoint = directory.read_once(file, read_pickle)
        if not _is_checkpoint(checkpoint):
            raise UserError(f"{file} is not a checkpoint of nanoGPT: it has no model and model_args.")
        state = state_of(_without_masks(checkpoint["model"]), file)
        tied = HEAD not in state or _equal(state)
        if tied:
            state.pop(HEAD, None)
        config = _config(checkpoint["model_args"], file, tied=tied)
        check_layers(config.n_layer, len(state), file)
        check_state(state, _shapes(config), file)
        return NanoGPTModel(directory, config, state, checkpoint)


class NanoGPTModel(Model):
    """A checkpoint of nanoGPT whose tensors fit its model_args; they are read when asked for."""

    family = "gpt2"

    def __init__(
        self, directory: ModelDirectory, config: GPTConfig, state: State, checkpoint: Mapping[str, Any]
    ) -> None:
        super().__init__(directory, config)
        self.state = state
        self.checkpoint = checkpoint

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model's data, which the checkpoint does not keep; UserError where it can't be known.

        A meta.pkl with the characters is looked for beside the checkpoint, and where nanoGPT has it, in
        data/DATASET. Else a vocabulary of GPT-2's size is GPT-2's. A character tokenizer has one id more than
        the model: our end of text.
        """
        size = self.checkpoint["model_args"].get("vocab_size")
        for place in _places(_file(self.folder), self.checkpoint.get("config")):
            if place.is_file():
                letters = self.directory.read_once(place, characters)
                if len(letters) == size:
                    return CharTokenizer(letters)
        if size not in GPT2_VOCABULARIES:
            raise no_tokenizer(self.folder)
        return tiktoken_named("gpt2")

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor, as the file has them."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.state.items()}

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, float32 array) of every parameter."""
        self.directory.check_unchanged()
        for name, row in parameter_table(self.config).items():
            theirs, third = _source(name)
            rows = slice(None) if third is None else slice(third * row.shape[0], (third + 1) * row.shape[0])
            yield name, finite(self.state[theirs].read(rows), theirs, self.folder)


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _is_checkpoint(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("model_args"), dict) and "model" in content


def _without_masks(model: Any) -> Any:
    """The state dict without the causal masks that old versions keep in it."""
    if not isinstance(model, dict):
        return model
    return {name: value for name, value in model.items() if not re.search(r"\.attn\.bias$", str(name))}


def _equal(state: State) -> bool:
    """Whether the head is the embedding, as nanoGPT ties them."""
    head, embedding = state[HEAD], state.get(EMBEDDING)
    if embedding is None or head.shape != embedding.shape:
        return False
    return head.same_memory(embedding) or np.array_equal(head.read(), embedding.read())


def _config(arguments: Mapping[str, Any], file: Path, *, tied: bool) -> GPTConfig:
    for key in arguments:
        if key not in (*ARGUMENTS, "bias"):
            raise unknown_choice(f"option of nanoGPT in {file}", key, (*ARGUMENTS, "bias"))
    missing = [key for key in ARGUMENTS if key not in arguments and key != "dropout"]
    if missing:
        raise UserError(f"The model_args of {file} have no {missing[0]}.")
    bias = arguments.get("bias", True)
    if not isinstance(bias, bool):
        raise UserError(f"bias in the model_args of {file} must be true or false, and is {short(bias)}.")
    return GPTConfig(
        **{key: arguments[key] for key in ARGUMENTS if key in arguments},
        position="learned", norm="layernorm", norm_eps=1e-5, mlp="gelu", qk_norm=False,
        norm_bias=bias, mlp_bias=bias, qkv_bias=bias, attn_out_bias=bias, tie_embeddings=tied,
    )  # fmt: skip


def _source(name: str) -> tuple[str, int | None]:
    """Where one of our parameters is: the name there, and which third of its rows, or None for all."""
    site, kind = name.rsplit(".", 1)
    block = re.match(r"model\.layers\.(\d+)\.(.+)", site)
    if block is None:
        return f"{NAMES[site]}.{kind}", None
    layer, part = block.groups()
    return f"transformer.h.{layer}.{NAMES[part]}.{kind}", THIRDS.get(part)


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """nanoGPT's name -> shape of every parameter."""
    shapes = {}
    for name, row in parameter_table(config).items():
        theirs, third = _source(name)
        shapes[theirs] = row.shape if third is None else (3 * row.shape[0], *row.shape[1:])
    return shapes


def _places(file: Path, settings: Any) -> list[Path]:
    """Where the characters may be: beside the checkpoint, and in the folder of its data."""
    places = [file.with_name(META)]
    name = settings.get("dataset") if isinstance(settings, dict) else None
    if isinstance(name, str) and re.fullmatch(r"[\w-]{1,80}", name):
        places.append(file.absolute().parent.parent / "data" / name / META)
    return places


def characters(file: Path) -> list[str]:
    """The characters of a meta.pkl, which are in code point order, as nanoGPT sorts them."""
    content = read_plain_pickle(file)
    table = content.get("itos") if isinstance(content, dict) else None
    if isinstance(table, dict) and table:
        letters = [c for c in map(table.get, range(len(table))) if isinstance(c, str) and len(c) == 1]
        if len(letters) == len(table) and letters == sorted(set(letters)):
            return letters
    raise UserError(f"{file} is not a table of characters in order, as nanoGPT's prepare.py writes.")
