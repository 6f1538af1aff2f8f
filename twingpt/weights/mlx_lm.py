"""mlx-lm's directories: Hugging Face's names, matrices as mlx-lm's models keep them, maybe quantized."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.quantize import BITS, Quantization, quantize
from twingpt.core.checkpoint.safetensors_file import TensorFile
from twingpt.core.checkpoint.schema import write_model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import VECTOR, parameter_table
from twingpt.core.paths import new_folder, write_synced
from twingpt.weights.export import Export
from twingpt.weights.families import FAMILIES, Family, family_for, require_family
from twingpt.weights.families.windows import window_pattern
from twingpt.weights.huggingface import (
    HuggingFace,
    HuggingFaceModel,
    family_and_config,
    is_huggingface,
    joined,
    tensor_files,
    texts_beside,
)
from twingpt.weights.mlx_quantized import Packing, Packings

Array = np.ndarray

MLPS = {"gpt2": "gelu_tanh", "gpt_neox": "gelu_tanh", "gemma3_text": "geglu_tanh"}  # of mlx-lm; the rest has SwiGLU
# What its models call otherwise than transformers' files, whose names they change when they load.
RENAMED: dict[str, dict[str, Any]] = {
    "gpt2": {"prefix": "model."},
    "gpt_neox": {
        "prefix": "model.",
        "block": "model.h",
        "sites": {
            **FAMILIES["gpt_neox"].sites,
            "model.embed_tokens": "model.embed_in",
            "model.norm": "model.final_layer_norm",
            "lm_head": "model.embed_out",
        },
    },
}
QUANTIZATION = ("quantization", "quantization_config")


class DequantizedFile(TensorFile):
    """A file of mlx-lm's whose header was read, with quantized matrices that look like float32 ones."""

    def __init__(self, file: TensorFile, packings: Packings) -> None:
        self.path, self.entries, self.metadata = file.path, file.entries, file.metadata
        self.packed: dict[str, Packing] = {}
        visible = dict(self.entries)
        for name, entry in self.entries.items():
            base = name.removesuffix(".weight")
            if base == name or entry.dtype != "U32" or f"{base}.scales" not in self.entries:
                continue
            packing = packings.of(base)
            if entry.shape[-1] * 32 % (packing.bits * packing.group_size):
                raise UserError(
                    f"{self.path}: the tensor {name} has {entry.shape[-1]} words a row, which are no whole groups of "
                    f"{packing.group_size} numbers of {packing.bits} bits."
                )
            shape = (*entry.shape[:-1], entry.shape[-1] * 32 // packing.bits)
            for part in packing.parts:
                self._check_part(f"{base}.{part}", shape, packing)
                del visible[f"{base}.{part}"]
            self.packed[name] = packing
            visible[name] = dataclasses.replace(entry, dtype="F32", shape=shape)
        self.stored, self.entries = self.entries, visible

    def _check_part(self, part: str, shape: tuple[int, ...], packing: Packing) -> None:
        """Raise UserError unless the scales or biases of a matrix (out, in) are as its packing has them."""
        dtypes = ("F32", "F16", "BF16") if packing.mode == "affine" else ("U8",)
        entry, groups = self.entries.get(part), (*shape[:-1], shape[-1] // packing.group_size)
        if entry is None or entry.shape != groups or entry.dtype not in dtypes or len(shape) != 2:
            raise UserError(
                f"The tensor {part} in {self.path} does not fit the matrix that it belongs to, of {packing.bits} bits "
                f"in groups of {packing.group_size} ({packing.mode})."
            )

    def read(self, name: str) -> Array:
        """A tensor as its entry describes it."""
        return self.packed[name].dequantize(*self.words(name)) if name in self.packed else super().read(name)

    def pieces(self, name: str) -> Iterator[Array]:
        """Yield the numbers of `read_float` in flat pieces; a quantized matrix in one."""
        if name in self.packed:
            yield self.read(name).reshape(-1)
        else:
            yield from super().pieces(name)

    def words(self, name: str) -> tuple[Array, ...]:
        """A quantized matrix as it is stored: its words, its scales and maybe biases, in float32 or of bytes."""
        parts = [f"{name.removesuffix('.weight')}.{part}" for part in self.packed[name].parts]
        arrays = [self._read(part, self.stored[part]) for part in parts]
        if self.packed[name].mode == "affine":
            arrays = [
                self._in_float32(array, part, self.stored[part]) for array, part in zip(arrays, parts, strict=True)
            ]
        return (self._read(name, self.stored[name]), *arrays)


class MLXLM:
    """A directory that mlx-lm wrote, or that it reads."""

    name, target = "mlx-lm", "mlx"

    def detect(self, directory: ModelDirectory) -> bool:
        """Whether mlx-lm wrote it: by the mark in its files, or their quantization."""
        if not is_huggingface(directory):
            return False
        try:
            quantized = isinstance(directory.json_object("config.json").get("quantization"), dict)
            return quantized or _is_marked(directory)
        except UserError:  # the one who opens it says what is wrong
            return False

    def open(self, directory: ModelDirectory) -> MLXModel:
        """Read config.json; UserError, naming it, for a family or an option that isn't supported."""
        path, content = directory.path / "config.json", directory.json_object("config.json")
        described = next((content[key] for key in QUANTIZATION if content.get(key) is not None), None)
        packings = None if described is None else Packings.read(described, path)
        plain = {key: value for key, value in content.items() if key not in QUANTIZATION}
        family, config = family_and_config(_with_defaults(plain), path)
        if _is_marked(directory):  # saved from its models, which transpose when they load
            family = dataclasses.replace(family, transposed=False, **RENAMED.get(family.model_type, {}))
        return MLXModel(directory, family, config, packings)

    def keeps_quantized(self, config: GPTConfig) -> bool:
        """Whether mlx-lm does not transpose the matrices when it loads them."""
        return not require_family(config).transposed

    def write(self, folder: Path, export: Export) -> dict[str, str]:
        """Write a directory for mlx-lm; the matrices that quantization leaves in float32, and why."""
        config, quantization = export.config, export.quantization
        check(config)
        if quantization is None:
            return HuggingFace().write(folder, export)
        family = require_family(config)
        content = {**family.content(config), **export.ids}
        arrays = joined(export.tensors, family, family.layout(config), config)
        texts = texts_beside(export)
        return write_quantized(folder, config, family, content, arrays, quantization, texts, quantized=export.quantized)


class MLXModel(HuggingFaceModel):
    """A directory that mlx-lm wrote; tensors are read when asked for."""

    def __init__(
        self, directory: ModelDirectory, architecture: Family, config: GPTConfig, packings: Packings | None
    ) -> None:
        self.packings = packings
        super().__init__(directory, architecture, config)

    def _with_head(self, config: GPTConfig) -> GPTConfig:
        """The configuration, which mlx-lm takes at its word but for Gemma, whose head is tied where there is none."""
        if self.family != "gemma3_text":
            return config
        return dataclasses.replace(config, tie_embeddings=len(self._embedding_and_head()) < 2)

    @cached_property
    def quantization(self) -> Quantization | None:
        """As in the file, where its matrices are ours one by one, those that we would quantize, and so; else None."""
        layout, used = self.architecture.layout(self.config), self._packings_used
        if len(used) != 1 or any(len(parts) > 1 for parts in layout.values()):
            return None
        packing = used.pop()
        if packing.mode != "affine" or packing.bits not in BITS:
            return None
        quantization = Quantization(packing.bits, packing.group_size)
        return quantization if self._homes.keys() == set(quantization.matrices(self.config)) else None

    @property
    def _packings_used(self) -> set[Packing]:
        return {file.packed[name] for file, name in self._homes.values()}

    def stored(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, array) of every tensor as `quantization` says; a quantized matrix keeps its very bits."""
        if self.quantization is None:
            yield from self.parameters()
            return
        for name, array in self.parameters():
            base = name.removesuffix(".weight")
            if base not in self._homes or base == name:
                yield name, array
                continue
            file, theirs = self._homes[base]
            yield from zip((name, f"{base}.scales", f"{base}.biases"), file.words(theirs), strict=True)

    @cached_property
    def files(self) -> Sequence[TensorFile]:
        """The files that its tensors are in, dequantized."""
        files = tensor_files(self.directory)
        return files if self.packings is None else [DequantizedFile(file, self.packings) for file in files]

    @cached_property
    def _homes(self) -> dict[str, tuple[DequantizedFile, str]]:
        """Our name, without `.weight`, of every quantized matrix -> its file, and its name there."""
        layout = self.architecture.layout(self.config)
        homes: dict[str, tuple[DequantizedFile, str]] = {}
        for file in self.files:
            if not isinstance(file, DequantizedFile):
                continue
            for name in file.packed:
                canonical = self.architecture.canonical(name, layout)
                if canonical not in layout:
                    raise UserError(f"{file.path} has a tensor {name}, which this model has not.")
                homes[layout[canonical][0].removesuffix(".weight")] = file, name
        return homes


def _with_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what mlx-lm takes for tie_word_embeddings, which is not what transformers does."""
    known = {"gpt2": True, "gpt_neox": False}.get(str(content.get("model_type")))
    if known is not None:
        return {**content, "tie_word_embeddings": known}
    return {"tie_word_embeddings": True, **content}


def _is_marked(directory: ModelDirectory) -> bool:
    """Whether the tensors' metadata say that MLX wrote them."""
    return tensor_files(directory)[0].metadata.get("format") == "mlx"


def check(config: GPTConfig) -> None:
    """Raise UserError for a model that mlx-lm would load and compute otherwise, or not load.

    It reads no hidden_act, no window and no bias that its models don't know, and says nothing.
    """
    family = family_for(config)
    if family is None:
        return
    lacking = lacks(config, family.model_type)
    if lacking:
        raise UserError(f"mlx-lm computes {family.model_type} models without {lacking}: write --to hf or twingpt.")


def lacks(config: GPTConfig, family: str) -> str | None:
    """What of a model of this family mlx-lm 0.32 leaves out when it computes it, or None."""
    mlp = MLPS.get(family, "swiglu")
    old = family in ("gpt2", "gpt_neox")
    problems = {
        f"the activation of {config.mlp}": config.mlp != mlp,
        "biases in attention": family in ("qwen3", "gemma3_text") and config.qkv_bias,
        "leaving out attention's biases": family == "gpt_neox" and not config.qkv_bias,
        "sliding windows": family in ("qwen2", "qwen3", "mistral") and config.sliding_window > 0,
        "layers without a window": family == "smollm3"
        and config.sliding_window > 0
        and not config.full_attention_layers,
        "such an order of windows": family == "gemma3_text"
        and (window_pattern(config) or 0) not in range(1, config.n_layer + 1),
        "a logit softcap": config.logit_softcap > 0,
        "a width of heads apart from the model's": family in ("qwen2", "granite")
        and config.head_dim * config.n_head != config.n_embd,
        "an MLP width of its own": old and config.n_inner != 4 * config.n_embd,
        "unscaled scores": family == "gpt2" and config.attn_scale > 0,
        "an untied head": family == "gpt2" and not config.tie_embeddings,
        "a tied head": family == "gpt_neox" and config.tie_embeddings,
        "a scaled RoPE": family == "gpt_neox" and config.rope_scaling is not None,
    }
    return next((problem for problem, there in problems.items() if there), None)


def differs(config: GPTConfig, family: str) -> str | None:
    """What of a model of this family keeps mlx-lm's logits from being ours, or None: what it `lacks`, and more.

    It rounds Gemma's factor on embeddings to bfloat16, as transformers does for weights in that. Such a
    model is still written for it, or there would be none of Gemma 3's.
    """
    rounded = (np.float32(config.embed_scale).view(np.uint32) & 0xFFFF) > 0
    if family == "gemma3_text" and rounded:
        return "the exact factor on embeddings, which it rounds to bfloat16"
    return lacks(config, family)


def write_quantized(
    folder: Path,
    config: GPTConfig,
    family: Family,
    content: Mapping[str, Any],
    arrays: Iterable[tuple[str, Array]],
    quantization: Quantization,
    texts: Mapping[str, str],
    *,
    quantized: bool = False,
) -> dict[str, str]:
    """Write a quantized directory for mlx-lm, atomically; the matrices that stayed in float32, and why.

    `content` is its config.json, `arrays` are the tensors under the family's names, in the order of its
    layout, with `quantized` as they are stored; `texts` are further files, by name. Raises UserError for a
    family whose files mlx-lm turns around when it loads them, which it can't do to a quantized matrix; OSError
    where it can't be written.
    """
    if family.transposed:
        raise UserError(f"mlx-lm transposes the matrices of {family.model_type} when it loads them, and can't those "
                        "that are quantized: write --to mlx without --q-bits, or --to twingpt.")  # fmt: skip
    shapes, dtypes, kept = _quantized_table(config, family, quantization)

    def stored() -> Iterator[tuple[str, Array]]:
        for name, array in arrays:
            if quantized or name not in dtypes:
                yield name, array
                continue
            base = name.removesuffix(".weight")
            parts = quantize(array, quantization.bits, quantization.group_size)
            yield from zip((name, f"{base}.scales", f"{base}.biases"), parts, strict=True)

    described = {**content, "quantization": quantization.to_json(), "quantization_config": quantization.to_json()}
    with new_folder(folder) as temporary:
        write_model(temporary, shapes, stored(), dtypes)
        for name, text in {**texts, "config.json": json.dumps(described, indent=2)}.items():
            write_synced(temporary / name, text.encode())
    return kept


def _quantized_table(
    config: GPTConfig, family: Family, quantization: Quantization
) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]:
    """Every stored tensor's shape; U32 for those that are quantized; and why the other matrices are not, by name."""
    table = parameter_table(config)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes, kept = {}, {}
    for name, parts in family.layout(config).items():
        *rest, width = shape = family.shape(name, [table[ours].shape for ours in parts])
        matrix = table[parts[0]].group != VECTOR and name.endswith(".weight")
        if not matrix or width % quantization.group_size:
            shapes[name] = shape
            if matrix:
                kept[name] = f"its width {width} is not a multiple of {quantization.group_size}"
            continue
        base = name.removesuffix(".weight")
        shapes[name], dtypes[name] = (*rest, width * quantization.bits // 32), "U32"
        shapes |= {f"{base}.{part}": (*rest, width // quantization.group_size) for part in ("scales", "biases")}
    return shapes, dtypes, kept
