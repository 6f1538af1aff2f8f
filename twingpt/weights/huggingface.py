"""Our checkpoints as Hugging Face directories, for the shape whose names and layout differ there: GPT-2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint import MODEL, Checkpoint
from twingpt.core.config import SHAPES, GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.paths import new_folder, write_synced
from twingpt.core.portable import model_type
from twingpt.core.tensors import write_safetensors

Array = np.ndarray

COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

# transformers' GPT-2 names, unprefixed: mlx-lm reads no others.
GPT2_NAMES = {
    "model.embed_tokens": "wte",
    "model.embed_positions": "wpe",
    "model.norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def is_gpt2(config: GPTConfig) -> bool:
    """Whether transformers' GPT-2 computes exactly this model."""
    return (
        all(getattr(config, key) == value for key, value in SHAPES["gpt2"].items() if key != "norm_eps")
        and config.tie_embeddings
        and config.n_kv_head == config.n_head
        and config.head_dim * config.n_head == config.n_embd
        and not (config.embed_norm or config.smear)
        and not (config.attn_softcap or config.logit_softcap or config.sliding_window)
    )


def gpt2_config(config: GPTConfig, end_of_text: int) -> dict[str, Any]:
    """config.json of transformers' GPT2LMHeadModel; `n_ctx` is for mlx-lm."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def gpt2_tensors(tensors: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
    """Our (name, array) pairs under GPT-2's names: q, k and v fused, matrices transposed as Conv1D keeps them."""
    qkv: dict[str, Array] = {}
    for name, array in tensors:
        site, kind = name.rsplit(".", 1)
        block = re.match(r"model\.layers\.(\d+)\.(.+)", site)
        if block is None:
            yield f"{GPT2_NAMES[site]}.{kind}", array
            continue
        layer, part = block.groups()
        if part in GPT2_NAMES:
            yield f"h.{layer}.{GPT2_NAMES[part]}.{kind}", array.T if array.ndim == 2 else array
            continue
        qkv[f"{part[-6]}.{kind}"] = array  # q, k or v of self_attn.q_proj, …
        if len(qkv) == 6:
            for kind in ("weight", "bias"):
                fused = np.concatenate([qkv[f"{letter}.{kind}"] for letter in "qkv"])
                yield f"h.{layer}.attn.c_attn.{kind}", fused.T
            qkv = {}


def export(checkpoint: Checkpoint, folder: Path) -> str:
    """Write a checkpoint as a Hugging Face directory, atomically; the family's name.

    Raises UserError where `folder` exists, or no family in transformers computes this model.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another folder, or remove it.")
    config, family = checkpoint.config, model_type(checkpoint.config)
    if is_gpt2(config):
        family = "gpt2"
        content = gpt2_config(config, checkpoint.tokenizer().end_of_text)
    elif family == "twingpt":
        raise UserError(
            "No transformers family computes this model (see its config.json): only the qwen3, llama and gpt2 "
            "shapes can be exported."
        )
    else:
        content = json.loads((checkpoint.folder / "config.json").read_text())
        del content["twingpt"]
    tensors = dict(gpt2_tensors(checkpoint.parameters()) if family == "gpt2" else checkpoint.parameters())
    shapes = {name: array.shape for name, array in tensors.items()}
    try:
        with new_folder(folder) as temporary:
            write_safetensors(temporary / MODEL, shapes, tensors.items())
            write_synced(temporary / "config.json", json.dumps(content, indent=2).encode())
            for name in COPIED:
                shutil.copyfile(checkpoint.folder / name, temporary / name)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}.") from error
    return family
