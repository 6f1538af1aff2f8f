"""From any format that is read to any that is written, a tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.config_json import token_ids
from twingpt.core.checkpoint.quantize import POSITIONS, Quantization
from twingpt.core.checkpoint.schema import Model
from twingpt.core.config import GPTConfig, unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.parameters import VECTOR, parameter_count, parameter_table
from twingpt.core.paths import expand
from twingpt.core.tokenizer import Tokenizer
from twingpt.weights.dtypes import DTYPES
from twingpt.weights.export import Export
from twingpt.weights.families import family_for
from twingpt.weights.formats import QUANTIZED, WRITABLE, OpenedModel, has_tokenizer_files, open_model
from twingpt.weights.generation import GENERATION, generation_settings
from twingpt.weights.gguf import GGUF
from twingpt.weights.gguf.vocabulary import UnknownTokenizerError
from twingpt.weights.huggingface import HuggingFace
from twingpt.weights.twingpt import TwinGPT

Array = np.ndarray
Progress = Callable[[int], None]


def convert(
    source: OpenedModel | str | Path,
    folder: str | Path,
    to: str | None = None,
    quantization: Quantization | None = None,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Write a model in the format `to` at `folder`, atomically; what was written, as `gpt convert --json` prints it.

    `source` is a model that is open, or what `open_model` takes.
    Without `to`, a `folder` that ends in .gguf becomes a file of that format; else a model of ours becomes a
    Hugging Face directory, and any other one of ours. With a `dtype` the parameters are stored in it, those of a
    quantized model too; without one in float32. A `tokenizer` is for a model without one that can be read.
    `progress` is told the bytes of each parameter as it passes. Raises UserError, before anything is written, for a
    format that can't hold the model or the dtype, a tokenizer of more ids than it has, and for a `folder` that exists,
    unless it holds a model and `force` is given; UserError too for a number that the dtype has not.
    """
    opened, folder = source if isinstance(source, OpenedModel) else open_model(source), expand(folder)
    model = opened.model
    usual = HuggingFace.target if opened.format == TwinGPT.name and not quantization else TwinGPT.target
    to = to or (GGUF.target if folder.suffix == ".gguf" else usual)
    if to not in WRITABLE:
        raise unknown_choice("format", to, tuple(WRITABLE))
    if quantization:
        _check_quantization(quantization, model.config, to)
    if dtype:
        _check_dtype(dtype, quantization, to)
    check_place(folder, model.folder, force=force)
    place = folder.resolve() if folder.is_symlink() else folder  # the link stays
    if tokenizer:
        _check_tokenizer(tokenizer, model)
    export = _export(opened, to, quantization, dtype, tokenizer, progress)
    try:
        kept = WRITABLE[to].write(place, export)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror or error}.") from error
    family = family_for(model.config)
    return {
        "source_format": opened.format,
        "target_format": to,
        "family": family.model_type if family and to != TwinGPT.target else opened.family,
        "parameters": parameter_count(model.config),
        "bytes": _size(folder),
        "dtype": export.dtype,
        "quantization": export.quantization.to_json() if export.quantization else None,
        "unquantized": kept,
        "tokenizer": f"{export.tokenizer.kind}, {export.tokenizer.vocab_size} ids" if export.tokenizer else None,
        "source": str(model.folder),
        "target": str(folder),
    }


def _export(
    opened: OpenedModel,
    to: str,
    quantization: Quantization | None,
    dtype: str | None,
    given: Tokenizer | None,
    progress: Progress,
) -> Export:
    """What is written: the model's tensors, as they are stored where a quantized model is to stay as it is.

    The tokenizer is the one that is `given`, or else the model's.
    """
    model, tokenizer = opened.model, given or tokenizer_of(opened.model)
    quantized = dtype is None and _keeps_quantized(model, to, quantization)
    quantization = model.quantization if quantized else quantization
    settings = generation_settings(model.directory)
    if given:  # then null says that there was none
        settings = {key: value for key, value in settings.items() if value is not None}
    return Export(
        source=model.folder,
        config=model.config,
        tensors=_with_progress(model.stored() if quantized else model.parameters(), progress, model.config),
        tokenizer=tokenizer,
        quantization=quantization,
        quantized=quantized,
        dtype=dtype or "float32",
        ids=_ids(model, settings, tokenizer, was_given=given is not None),
        texts=_settings_text(model, settings) | {"README.md": card(opened, to, quantization, tokenizer)},
    )


def check_place(folder: Path, source: Path, *, force: bool) -> None:
    """Raise UserError where nothing may be written at `folder`: there is something else, or the source itself."""
    if folder.resolve() == source.resolve() or folder.resolve() in source.resolve().parents:
        raise UserError(f"{folder} holds the model that is to be converted: choose another place.")
    if source.resolve() in folder.resolve().parents and (source / "manifest.json").exists():  # which lists all files
        raise UserError(f"{folder} is within the checkpoint that is to be converted: choose another place.")
    if not folder.exists() and not folder.is_symlink():
        return
    if not (_is_model(folder) if folder.is_dir() else folder.suffix == ".gguf"):
        raise UserError(f"{folder} exists and is no model: choose another place.")
    if not force:
        raise UserError(f"{folder} exists already: choose another place, or replace it with --force.")


def _is_model(folder: Path) -> bool:
    """Whether a folder is a model's: projects of all kinds have a config.json too."""
    tensors = (file for pattern in ("*.safetensors", "*.pt", "*.bin") for file in folder.glob(pattern))
    return (folder / "config.json").is_file() and any(file.is_file() for file in tensors)


def _check_tokenizer(tokenizer: Tokenizer, model: Model) -> None:
    """Raise UserError where a model has a tokenizer that can be read, or fewer ids than the one that it is given."""
    try:
        own = model.tokenizer()
    except UserError:  # there is none, or it is broken
        own = None
    if own is not None:
        raise UserError(f"{model.folder} has a tokenizer of its own: leave out --tokenizer.")
    if tokenizer.byte_lengths[model.config.vocab_size :].any():  # special tokens may be beyond
        size = model.config.vocab_size
        raise UserError(f"The tokenizer has {tokenizer.vocab_size} ids and the model knows only {size}.")


def _check_quantization(quantization: Quantization, config: GPTConfig, to: str) -> None:
    """Raise UserError where a format has no quantized matrices, or the model none that can be, or none of a name."""
    if to not in QUANTIZED:
        raise UserError(f"--q-bits is for --to {' or '.join(QUANTIZED)}: {to} has no such matrices.")
    packings = quantization.packings(config)
    table = parameter_table(config).items()
    matrices = [name.removesuffix(".weight") for name, row in table if row.group != VECTOR and name != POSITIONS]
    for name in quantization.modules:
        if name not in matrices:
            raise unknown_choice("matrix to quantize", name, matrices)
    if any(packing.mode != "affine" for packing in packings.values()):
        raise UserError(f"Matrices are quantized here in the mode affine alone, not in {quantization.mode}.")
    if not packings:
        size = quantization.group_size
        raise UserError(f"No matrix of the model can be quantized: no width is a multiple of --q-group-size {size}.")


def _check_dtype(dtype: str, quantization: Quantization | None, to: str) -> None:
    """Raise UserError for a dtype that isn't known, that a format has not, or beside quantized matrices."""
    if dtype not in DTYPES:
        raise unknown_choice("dtype", dtype, tuple(DTYPES))
    if quantization:
        raise UserError("--dtype is for matrices that aren't quantized, and --q-bits quantizes them: give one of them.")
    if to == TwinGPT.target and dtype != "float32":
        others = ", ".join(target for target in WRITABLE if target != to)
        raise UserError(f"A checkpoint of twingpt is in float32, from which training goes on: --dtype {dtype} is for "
                        f"--to {others}.")  # fmt: skip


def _keeps_quantized(model: Model, to: str, quantization: Quantization | None) -> bool:
    """Whether a quantized model passes as it is stored, since it is to stay as it is: again would be a bit worse."""
    if model.quantization is None or to not in QUANTIZED or quantization not in (None, model.quantization):
        return False
    return QUANTIZED[to].keeps_quantized(model.config)


def _with_progress(
    tensors: Iterable[tuple[str, Array]], progress: Progress, config: GPTConfig
) -> Iterator[tuple[str, Array]]:
    """Pass the tensors on; `progress` is told the bytes of each parameter in float32."""
    table = parameter_table(config)
    for name, array in tensors:
        yield name, array
        if name in table:  # not the scales and biases of a quantized one
            progress(4 * math.prod(table[name].shape))


def tokenizer_of(model: Model) -> Tokenizer | None:
    """The model's tokenizer, or None where it has none; UserError where it has one that can't be read."""
    try:
        return model.tokenizer()
    except UserError:
        if has_tokenizer_files(model.folder):
            raise
        return None


def why_no_tokenizer(model: Model) -> str | None:
    """Why a tokenizer that is there, in a file with the model, is none of ours; None where there isn't any."""
    try:
        model.tokenizer()
    except UserError as error:
        return str(error).rstrip(".") if isinstance(error, UnknownTokenizerError) else None
    return None


def _settings_text(model: Model, settings: Mapping[str, Any]) -> dict[str, str]:
    """generation_config.json as it lies beside the model; or what the model's config.json says, which had it once."""
    if (model.folder / GENERATION).is_file():
        return {GENERATION: model.directory.text(GENERATION)}
    return {GENERATION: json.dumps(settings, indent=2)} if settings else {}


def _ids(model: Model, settings: Mapping[str, Any], tokenizer: Tokenizer | None, *, was_given: bool) -> dict[str, Any]:
    """The ids of special tokens for config.json: of the settings for generation, of the model's config.json, or usual.

    An id that was null, for none, stays null, but for a model whose tokenizer `was_given` to it.
    """
    there = (model.folder / "config.json").is_file()
    config = model.directory.json_object("config.json") if there else {}
    named = {**config, **{key: settings[key] for key in ("bos_token_id", "eos_token_id") if key in settings}}
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    return token_ids(tokenizer) | {
        key: named[key] for key in kept if key in named and not (was_given and named[key] is None)
    }


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def card(opened: OpenedModel, to: str, quantization: Quantization | None, tokenizer: Tokenizer | None) -> str:
    """A model card: what the model is, where it came from, and how it is used."""
    config = opened.model.config
    library = {"hf": "transformers", "mlx": "mlx"}.get(to, "twingpt")
    bits = f", {bits_in_words(quantization.to_json())} in groups of {quantization.group_size}" if quantization else ""
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- twingpt\n- {opened.family}\n---\n\n"
        f"# {_title(opened.model.folder)}\n\n"
        f"A language model of the {opened.family} family: {parameter_count(config):,} parameters, "
        f"{config.n_layer} layers, {config.n_embd} wide, a context of {config.block_size:,} tokens, "
        f"a vocabulary of {config.vocab_size:,}{bits}.\n\n"
        f"Converted from the {opened.format} format by TwinGPT's `gpt convert`. In this folder it runs as\n\n"
        f"```python\n{_example(library, tokenizer)}\n```\n"
    )


def bits_in_words(quantization: Mapping[str, Any]) -> str:
    """The bits of a quantization, as config.json has it: 4 bits, or 2 and 6 bits where matrices differ."""
    others = [way["bits"] for way in quantization.values() if isinstance(way, Mapping)]
    *most, last = map(str, sorted({quantization["bits"], *others}))
    return f"{', '.join(most)}{' and ' if most else ''}{last} bits"


def _title(folder: Path) -> str:
    """A model's name: that of the run whose checkpoint it is, or of its folder."""
    whole = folder.resolve()
    return (whole.parent.parent if whole.parent.name == "checkpoints" else whole).name


def _example(library: str, tokenizer: Tokenizer | None) -> str:
    """Python that generates with the model in the present folder, from a text or, without a tokenizer, from an id."""
    prompt = repr(_first_words(tokenizer)) if tokenizer else "[0]"
    if library == "mlx":
        rest = f"print(mlx_lm.generate(model, tokenizer, prompt={prompt}, max_tokens=20))"
        return f'import mlx_lm\n\nmodel, tokenizer = mlx_lm.load(".")\n{rest}'
    if library == "twingpt":
        rest = f"print(model.generate({prompt}, 20))" if tokenizer else "print(model.logits([[0]]).shape)"
        return f'import twingpt\n\nmodel = twingpt.load(".")\n{rest}'
    load = 'model = AutoModelForCausalLM.from_pretrained(".")'
    if not tokenizer:
        return (
            f"import torch\nfrom transformers import AutoModelForCausalLM\n\n{load}\n"
            "print(model.generate(torch.tensor([[0]]), max_new_tokens=20))"
        )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'{load}\ntokenizer = AutoTokenizer.from_pretrained(".")\n'
        f'inputs = tokenizer({prompt}, return_tensors="pt", return_token_type_ids=False)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
    )


def _first_words(tokenizer: Tokenizer) -> str:
    """A prompt that the tokenizer can encode."""
    try:
        tokenizer.encode("Once")
    except UserError:  # an alphabet without those letters
        return next(text for token in range(tokenizer.vocab_size) if (text := tokenizer.decode([token]).strip()))
    return "Once"
