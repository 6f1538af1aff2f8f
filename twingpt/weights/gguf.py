"""A model of ours as a GGUF file, which llama.cpp runs: the llama, qwen3 and gpt2 shapes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twingpt.core.checkpoint.config_json import model_type
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.paths import rename, sync_folder
from twingpt.core.presets import shaped
from twingpt.core.rope import rope_periods
from twingpt.core.tokenizer import PATTERNS, Tokenizer
from twingpt.weights.dtypes import DTYPES, round_to
from twingpt.weights.export import Export

if TYPE_CHECKING:
    import gguf

Array = np.ndarray

FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # llama.cpp's numbers

# llama.cpp's names: gguf-py/gguf/constants.py there.
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
FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one tensor, attn_qkv, in gpt2
YARN_BETAS = (32.0, 1.0)  # llama.cpp takes others from few families' files
ROPE_FREQS, POSITIONS = "rope_freqs.weight", "position_embd.weight"

# What models of the gpt2 shape may differ in.
GPT2_FREE = (
    "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner", "norm_eps", "tie_embeddings", "dropout",
    "init_std", "zero_init",
)  # fmt: skip

# llama.cpp splits text into words by code that it knows by name, not by the pattern itself.
SPLITS = {PATTERNS["gpt2"]: "gpt-2", PATTERNS["llama3"]: "llama-bpe", PATTERNS["qwen2"]: "qwen2"}
NO_MERGE = "À À"  # of two bytes that UTF-8 has not: llama.cpp wants merges, and a tokenizer of bytes has none


class GGUF:
    """A GGUF file, which is only written."""

    target = "gguf"

    def write(self, folder: Path, export: Export) -> dict[str, str]:
        """Write the file `folder`; UserError for a model or a tokenizer that llama.cpp has not."""
        if export.tokenizer is None:
            raise UserError(f"{export.source} has no tokenizer, and a GGUF file needs one.")
        write(folder, export.config, export.tensors, export.tokenizer, export.source.name, export.dtype)
        return {}


def architecture(config: GPTConfig) -> str:
    """What llama.cpp calls the model: llama, qwen3 or gpt2; UserError where it computes no such model."""
    if config == shaped("gpt2", **{key: getattr(config, key) for key in GPT2_FREE}):
        return "gpt2"
    family = model_type(config)
    if family == "twingpt":
        raise UserError(
            "llama.cpp computes the llama, qwen3 and gpt2 shapes, and this model is none of them (see its config.json)."
        )
    scaling = config.rope_scaling
    if family == "qwen3" and config.qkv_bias:
        raise UserError("llama.cpp's qwen3 has no attention biases, and this model has.")
    if family == "qwen3" and scaling and scaling.type == "llama3":
        raise UserError("llama.cpp's qwen3 has no rope_scaling of type llama3, and this model has.")
    if scaling and scaling.type == "yarn" and (scaling.beta_fast, scaling.beta_slow) != YARN_BETAS:
        raise UserError(f"llama.cpp's yarn has beta_fast and beta_slow {YARN_BETAS}, and this model has others.")
    return family


def write(
    path: Path,
    config: GPTConfig,
    tensors: Iterable[tuple[str, Array]],
    tokenizer: Tokenizer,
    name: str,
    dtype: str = "float32",
) -> None:
    """Write a GGUF file in one atomic step, holding one tensor at a time.

    `tensors` are float32 parameters in the order of the parameter table, of which matrices are stored in `dtype`.
    A file that is there is replaced. Raises UserError for a model or a tokenizer that llama.cpp has not, for a
    number that `dtype` has not, and where the file can't be written.
    """
    shape = architecture(config)
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer = _writer(temporary, shape)
        from gguf import GGMLQuantizationType

        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[dtype])
        _add_model(writer, config, shape)
        _add_vocabulary(writer, vocabulary, tokenizer)
        sizes = _shapes(config, shape)
        dtypes = {stored: _kind(stored, size, dtype) for stored, size in sizes.items()}
        for stored, size in sizes.items():
            width = 4 if dtypes[stored] == "float32" else 2
            kind = GGMLQuantizationType[DTYPES[dtypes[stored]]]
            writer.add_tensor_info(stored, size, np.dtype("f4"), math.prod(size) * width, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored, array in _arrays(config, shape, tensors):
            writer.write_tensor_data(round_to(dtypes[stored], np.ascontiguousarray(array), stored))
        writer.close()
        with temporary.open("r+b") as file:  # Windows syncs no file that is open for reading alone
            os.fsync(file.fileno())
        rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}.") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _writer(path: Path, shape: str) -> gguf.GGUFWriter:
    try:
        import gguf
    except ImportError:
        raise UserError('Writing GGUF files needs the gguf package: pip install "twingpt[gguf]".') from None
    path.parent.mkdir(parents=True, exist_ok=True)
    return gguf.GGUFWriter(path, shape)


def _add_model(writer: gguf.GGUFWriter, config: GPTConfig, shape: str) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    if shape == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    _add_rope_scaling(writer, config)


def _add_rope_scaling(writer: gguf.GGUFWriter, config: GPTConfig) -> None:
    """Linear and yarn by their numbers; llama3 is in a tensor, ROPE_FREQS."""
    from gguf import RopeScalingType

    scaling = config.rope_scaling
    if scaling is None or scaling.type == "llama3":
        return
    writer.add_rope_scaling_type(RopeScalingType(scaling.type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_block_size)
        if scaling.attention_factor is not None:  # by which llama.cpp multiplies the usual one
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / (1 + 0.1 * float(np.log(scaling.factor))))


def _vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """A byte-level BPE as GGUF has it: tokens and their types by id, merges, and the name of the split."""
    content = tokenizer.to_json()
    model, added = content["model"], content["added_tokens"]
    split = _split(content["pre_tokenizer"])
    if model.get("type") != "BPE" or split is None or any(len(part) != 2 for part in _pairs(model)):
        raise UserError(
            f"GGUF has no form for a tokenizer of kind {tokenizer.kind}: llama.cpp knows byte-level BPE, split as by "
            "GPT-2, Llama 3 or Qwen 2."
        )
    tokens = {token: piece for piece, token in model["vocab"].items()}
    beside = {entry["id"]: entry for entry in added}
    if max(tokens.keys() | beside.keys()) >= size:
        raise UserError(f"The tokenizer has more ids than the model, whose vocabulary is of {size}.")
    spelled = [beside[i]["content"] if i in beside else tokens.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = [_token_type(i, tokens, beside) for i in range(size)]
    merges = [f"{left} {right}" for left, right in _pairs(model)] or [NO_MERGE]
    return {"tokens": spelled, "types": kinds, "merges": merges, "split": split}


def _pairs(model: Mapping[str, Any]) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]


def _token_type(token: int, tokens: Mapping[int, str], beside: Mapping[int, Mapping[str, Any]]) -> int:
    from gguf import TokenType

    if token in beside:  # those that are not special are taken from any text
        return TokenType.CONTROL if beside[token].get("special") else TokenType.USER_DEFINED
    return TokenType.NORMAL if token in tokens else TokenType.UNUSED


def _split(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text into words, or None where it has none."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:  # GPT-2's own, or single bytes, for which all splits are the same
        return "gpt-2"
    if len(steps) > 2 or steps[-1].get("use_regex", True):
        return None
    pattern = steps[0].get("pattern")
    return SPLITS.get(pattern.get("Regex", "")) if isinstance(pattern, dict) else None


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["split"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(tokenizer.roles.get("bos", tokenizer.end_of_text))
    writer.add_eos_token_id(tokenizer.roles.get("eos", tokenizer.end_of_text))
    if template := tokenizer.settings().get("chat_template"):
        writer.add_chat_template(template)
    writer.add_add_bos_token(tokenizer.roles.get("bos") in tokenizer.opening)


def _stored_name(name: str, shape: str) -> str:
    """llama.cpp's name for one of ours; three of ours have one name where it fuses them."""
    site, kind = name.rsplit(".", 1)
    block = re.match(r"model\.layers\.(\d+)\.(.+)", site)
    if block is None:
        return f"{NAMES[site]}.{kind}"
    layer, part = block.groups()
    fused = shape == "gpt2" and part in FUSED
    return f"blk.{layer}.{'attn_qkv' if fused else NAMES[part]}.{kind}"


def _shapes(config: GPTConfig, shape: str) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape, in the order in which the last part of each comes."""
    shapes: dict[str, tuple[int, ...]] = {}
    if _rope_factors(config) is not None:
        shapes[ROPE_FREQS] = (config.rope_dim // 2,)
    for name, row in parameter_table(config).items():
        stored = _stored_name(name, shape)
        before = shapes.pop(stored, (0,))
        shapes[stored] = (before[0] + row.shape[0], *row.shape[1:])
    return shapes


def _kind(stored: str, size: tuple[int, ...], dtype: str) -> str:
    """Vectors and positions, which are added to, stay in float32."""
    return "float32" if len(size) == 1 or stored == POSITIONS else dtype


def _arrays(config: GPTConfig, shape: str, tensors: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
    factors = _rope_factors(config)
    if factors is not None:
        yield ROPE_FREQS, factors
    waiting: dict[str, list[Array]] = {}
    for name, array in tensors:
        stored = _stored_name(name, shape)
        if not stored.startswith("blk.") or ".attn_qkv." not in stored:
            rotated = shape == "llama" and re.search(r"\.attn_[qk]\.", stored)
            yield stored, _interleaved(array, config.head_dim) if rotated else array
            continue
        parts = waiting.setdefault(stored, [])
        parts.append(array)
        if len(parts) == len(FUSED):
            yield stored, np.concatenate(waiting.pop(stored))


def _interleaved(array: Array, head_dim: int) -> Array:
    """The rows of each head reordered: its llama rotates neighbours, where ours rotates the two halves."""
    interleaved: Array = array.reshape(-1, 2, head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return interleaved


def _rope_factors(config: GPTConfig) -> Array | None:
    """By how much each rotated pair's period is stretched, where only a tensor can say it."""
    if config.position != "rope" or config.rope_scaling is None or config.rope_scaling.type != "llama3":
        return None
    plain = np.float64(config.rope_theta) ** (np.arange(0, config.rope_dim, 2) / config.rope_dim)
    factors: Array = rope_periods(config)[0] / plain
    return factors.astype(np.float32)
