"""nanoGPT's ckpt.pt as our tensors: https://github.com/karpathy/nanoGPT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.schema import check_layers
from twingpt.core.config import GPTConfig, unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.reading import short
from twingpt.core.tokenizer import CharTokenizer, Tokenizer, tiktoken_gpt2
from twingpt.weights.pickles import (
    State,
    check_state,
    is_torch_file,
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


def is_nanogpt(path: Path) -> bool:
    """Whether `path` is a checkpoint of nanoGPT, or a folder with one. UserError for an unsound ckpt.pt."""
    file = _file(path)
    return is_torch_file(file) and _is_checkpoint(read_pickle(file))


def read_config(path: Path) -> GPTConfig:
    """The model's configuration; its vocabulary keeps its padding, so that the logits are the same.

    Raises UserError for an option or a tensor that nanoGPT's model has not; reads no weights.
    """
    return _open(path)[0]


def tensors(path: Path, config: GPTConfig) -> Iterator[tuple[str, Array]]:
    """Yield (our name, float32 array) in the order of the parameter table."""
    state = _open(path)[1]
    for name, row in parameter_table(config).items():
        theirs, third = _source(name)
        rows = slice(None) if third is None else slice(third * row.shape[0], (third + 1) * row.shape[0])
        yield name, state[theirs].read(rows)


def dtypes(path: Path) -> list[str]:
    """How each tensor is stored, by the names of safetensors."""
    return [tensor.dtype for tensor in _open(path)[1].values()]


def tokenizer(path: Path, meta: Path | None = None) -> Tokenizer | None:
    """The tokenizer of the model's data, which the checkpoint does not keep; None where it can't be known.

    A meta.pkl with the characters is looked for at `meta`, beside the checkpoint, and where nanoGPT has
    it, in data/DATASET. Else a vocabulary of GPT-2's size is GPT-2's. A character tokenizer has
    one id more than the model: our end of text.
    """
    file = _file(path)
    checkpoint = _checkpoint(file)
    size = checkpoint["model_args"].get("vocab_size")
    for place in [meta] if meta else _places(file, checkpoint.get("config")):
        if place.is_file():
            characters = _characters(place)
            if len(characters) == size:
                return CharTokenizer(characters)
            if meta:
                raise UserError(f"{place} has {len(characters)} characters, and the model in {file} {size} tokens.")
    if meta:
        raise UserError(f"There is no {meta}.")
    return tiktoken_gpt2() if size in GPT2_VOCABULARIES else None


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _is_checkpoint(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("model_args"), dict) and "model" in content


def _checkpoint(file: Path) -> dict[str, Any]:
    content = read_pickle(file)
    if not _is_checkpoint(content):
        raise UserError(f"{file} is not a checkpoint of nanoGPT: it has no model and model_args.")
    return dict(content)


def _open(path: Path) -> tuple[GPTConfig, State]:
    """The configuration and the tensors, which fit each other."""
    file = _file(path)
    content = _checkpoint(file)
    state = state_of(_without_masks(content["model"]), file)
    tied = HEAD not in state or _equal(state)
    if tied:
        state.pop(HEAD, None)
    config = _config(content["model_args"], tied, file)
    check_layers(config.n_layer, len(state), file)
    check_state(state, _shapes(config), file)
    return config, state


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


def _config(arguments: Mapping[str, Any], tied: bool, file: Path) -> GPTConfig:
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


def _characters(file: Path) -> list[str]:
    """The characters of a meta.pkl, which are in code point order, as nanoGPT sorts them."""
    content = read_plain_pickle(file)
    table = content.get("itos") if isinstance(content, dict) else None
    if isinstance(table, dict) and table:
        characters = [c for c in map(table.get, range(len(table))) if isinstance(c, str) and len(c) == 1]
        if len(characters) == len(table) and characters == sorted(set(characters)):
            return characters
    raise UserError(f"{file} is not a table of characters in order, as nanoGPT's prepare.py writes.")
