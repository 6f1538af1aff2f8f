"""mlx-lm's directories: Hugging Face's names, matrices as mlx-lm's models keep them, maybe quantized."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.quantize import FLOATING, POSITIONS, Packing, Quantization, dequantize, from_config
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
from twingpt.weights.quantize import packed, unquantized

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
    """A file of mlx-lm's whose header was read, with quantized matrices that look like float32 ones.

    `width_of` gives the width of the matrix that a name in the file stands for, None where the model has none.
    """

    def __init__(self, file: TensorFile, quantization: Quantization, width_of: Callable[[str], int | None]) -> None:
        self.path, self.entries, self.metadata = file.path, file.entries, file.metadata
        self.packed: dict[str, Packing] = {}
        visible = dict(self.entries)
        for name, entry in self.entries.items():
            base, width = name.removesuffix(".weight"), width_of(name)
            if base == name or entry.dtype != "U32" or f"{base}.scales" not in self.entries or width is None:
                continue
            packing = quantization.modules.get(base) or self._inferred(base, width)
            shape = (*entry.shape[:-1], width)
            shapes, dtypes = packing.tensors(name, shape)
            if entry.shape != shapes.pop(name):
                raise UserError(
                    f"The tensor {name} in {self.path} has shape {entry.shape}, which does not fit {packing.bits} bits."
                )
            for part, groups in shapes.items():
                self._check_part(part, groups, ("U8",) if dtypes[part] == "U8" else ("F32", "F16", "BF16"), packing)
                del visible[part]
            self.packed[name] = packing
            visible[name] = dataclasses.replace(entry, dtype="F32", shape=shape)
        self.stored, self.entries = self.entries, visible

    def _inferred(self, base: str, width: int) -> Packing:
        """How a matrix is packed that config.json does not name, by its tensors' shapes and dtypes, as in mlx-lm."""
        words, scales = self.entries[f"{base}.weight"], self.entries[f"{base}.scales"]
        bits, group_size = words.shape[-1] * 32 // max(1, width), width // max(1, scales.shape[-1])
        modes = {packing: mode for mode, packing in FLOATING.items()}
        mode = modes.get((bits, group_size), "mxfp4") if scales.dtype == "U8" else "affine"
        try:
            return Packing(bits, group_size, mode)
        except UserError as error:
            raise UserError(f"The matrix {base} in {self.path} can't be read: {error}") from None

    def _check_part(self, part: str, shape: tuple[int, ...], dtypes: Sequence[str], packing: Packing) -> None:
        """Raise UserError unless the scales or biases of a matrix are as its packing has them."""
        entry = self.entries.get(part)
        if entry is None or entry.shape != shape or entry.dtype not in dtypes or len(shape) != 2:
            raise UserError(
                f"The tensor {part} in {self.path} does not fit the matrix that it belongs to, of {packing.bits} bits "
                f"in groups of {packing.group_size} ({packing.mode})."
            )

    def read(self, name: str) -> Array:
        """A tensor as its entry describes it."""
        if name not in self.packed:
            return super().read(name)
        return dequantize(self.entries[name].shape[-1], *self.parts(name))

    def pieces(self, name: str) -> Iterator[Array]:
        """Yield the numbers of `read_float` in flat pieces; a quantized matrix in one."""
        if name in self.packed:
            yield self.read(name).reshape(-1)
        else:
            yield from super().pieces(name)

    def parts(self, name: str) -> list[Array]:
        """A quantized matrix as it is stored: its words, its scales and maybe biases, in float32 or of bytes."""
        parts = self.packed[name].tensors(name, self.entries[name].shape)[0]
        entries = {part: self.stored[part] for part in parts}
        return [
            self._read(part, entry)
            if entry.dtype in ("U32", "U8")
            else self._in_float32(self._read(part, entry), part, entry)
            for part, entry in entries.items()
        ]


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
        described = from_config(content, path)
        plain = {key: value for key, value in content.items() if key not in QUANTIZATION}
        family, config = family_and_config(_with_defaults(plain), path)
        if _is_marked(directory):  # saved from its models, which transpose when they load
            family = dataclasses.replace(family, transposed=False, **RENAMED.get(family.model_type, {}))
        return MLXModel(directory, family, config, described)

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
        self, directory: ModelDirectory, architecture: Family, config: GPTConfig, described: Quantization | None
    ) -> None:
        self.described = described  # by config.json, under mlx-lm's names
        super().__init__(directory, architecture, config)

    def _with_head(self, config: GPTConfig) -> GPTConfig:
        """The configuration, which mlx-lm takes at its word but for Gemma, whose head is tied where there is none."""
        if self.family != "gemma3_text":
            return config
        return dataclasses.replace(config, tie_embeddings=len(self._embedding_and_head()) < 2)

    @cached_property
    def quantization(self) -> Quantization | None:  # type: ignore[override]
        """As in the files: the packing of most matrices, and those of the others."""
        packings = Counter(file.packed[name] for file, name, _, _ in self._homes.values())
        if not packings:
            return None
        usual = Quantization(**packings.most_common(1)[0][0].to_json())
        by_rule, modules = usual.packings(self.config), dict[str, Packing | None]()
        for name, row in parameter_table(self.config).items():
            base = name.removesuffix(".weight")
            packing = self._packing(base)
            if row.group != VECTOR and name != POSITIONS and packing != by_rule.get(base):
                modules[base] = packing
        return dataclasses.replace(usual, modules=modules)

    def _packing(self, base: str) -> Packing | None:
        if base not in self._homes:
            return None
        file, theirs, _, _ = self._homes[base]
        return file.packed[theirs]

    def stored(self) -> Iterator[tuple[str, Array]]:
        """Yield (name, array) of every tensor as `quantization` says; a quantized matrix keeps its very bits."""
        packings = self.quantization.packings(self.config) if self.quantization else {}
        for name, array in self.parameters():
            base = name.removesuffix(".weight")
            if base not in packings:
                yield name, array
                continue
            file, theirs, index, count = self._homes[base]
            for part, whole in zip(packings[base].tensors(name, array.shape)[0], file.parts(theirs), strict=True):
                yield part, self.architecture.part(whole, theirs, index, count, self.config)

    @cached_property
    def files(self) -> Sequence[TensorFile]:
        """The files that its tensors are in, dequantized."""
        files = tensor_files(self.directory)
        if self.described is None:
            return files
        config = dataclasses.replace(self.config, tie_embeddings=False)  # there may be a head
        table, layout = parameter_table(config), self.architecture.layout(config)

        def width_of(name: str) -> int | None:
            ours = layout.get(self.architecture.canonical(name, layout) or "")
            return table[ours[0]].shape[-1] if ours else None

        return [DequantizedFile(file, self.described, width_of) for file in files]

    @cached_property
    def _homes(self) -> dict[str, tuple[DequantizedFile, str, int, int]]:
        """Our name, without `.weight`, of every quantized matrix -> its file, its name there, and which part it is."""
        layout = self.architecture.layout(self.config)
        return {
            ours.removesuffix(".weight"): (file, name, index, len(layout[canonical]))
            for file in self.files
            if isinstance(file, DequantizedFile)
            for name in file.packed
            if (canonical := self.architecture.canonical(name, layout)) in layout
            for index, ours in enumerate(layout[canonical])
        }


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
    packings = _packings(config, family, quantization)
    table = parameter_table(config)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for name, parts in family.layout(config).items():
        shape = family.shape(name, [table[ours].shape for ours in parts])
        stored, kinds = packings[name].tensors(name, shape) if name in packings else ({name: shape}, {})
        shapes |= stored
        dtypes |= kinds

    def tensors() -> Iterator[tuple[str, Array]]:
        for name, array in arrays:
            yield from ((name, array),) if quantized or name not in packings else packed(packings[name], name, array)

    described = {**content, **dict.fromkeys(QUANTIZATION, _described(quantization, family))}
    with new_folder(folder) as temporary:
        write_model(temporary, shapes, tensors(), dtypes)
        for name, text in {**texts, "config.json": json.dumps(described, indent=2)}.items():
            write_synced(temporary / name, text.encode())
    return {family.rename(name): why for name, why in unquantized(quantization, config).items()}


def _packings(config: GPTConfig, family: Family, quantization: Quantization) -> dict[str, Packing]:
    """The packing of every matrix of theirs that is quantized; UserError where it would be several for one."""
    packings, found = quantization.packings(config), dict[str, Packing]()
    for name, parts in family.layout(config).items():
        ways = [packings.get(ours.removesuffix(".weight")) for ours in parts]
        if any(way != ways[0] for way in ways):
            raise UserError(f"{name} of {family.model_type} holds {' and '.join(parts)}, which are quantized in "
                            "different ways: write --to twingpt, or --dtype float32.")  # fmt: skip
        if ways[0] is not None:
            found[name] = ways[0]
    return found


def _described(quantization: Quantization, family: Family) -> dict[str, Any]:
    """A quantization for config.json, whose exceptions mlx-lm looks up by its modules' own names."""
    theirs = dataclasses.replace(family, **RENAMED.get(family.model_type, {}))
    named = {theirs.rename(f"{name}.weight"): way for name, way in quantization.modules.items()}
    modules = {name.removesuffix(".weight"): way for name, way in named.items()}
    return dataclasses.replace(quantization, modules=modules).to_json()
