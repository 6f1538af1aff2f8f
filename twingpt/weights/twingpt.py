"""Our own checkpoints, as a format beside the others."""

from __future__ import annotations

from pathlib import Path

from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.schema import MANIFEST, Checkpoint, ManifestError, own_config, read_checkpoint, save_model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.weights.export import Export
from twingpt.weights.families.llama import SIZES
from twingpt.weights.huggingface import tensor_files
from twingpt.weights.quantize import apply, unquantized

BY_ANOTHER = f"if another tool saved it, remove {MANIFEST}, or give a copy made by gpt convert --ignore-manifest"


class TwinGPT:
    """A checkpoint of ours; in a model directory that no other format claims, a damaged one."""

    name = target = "twingpt"

    def detect(self, directory: ModelDirectory) -> bool:
        """Whether it is a model directory."""
        return any((directory.path / name).exists() for name in ("config.json", "manifest.json"))

    def open(self, directory: ModelDirectory) -> Checkpoint:
        """Read and verify it; one without a manifest, as other tools leave it, is read as it is."""
        if directory.has_manifest:
            try:
                return read_checkpoint(directory)
            except ManifestError as error:
                raise UserError(f"{str(error).rstrip('.')}; {BY_ANOTHER}.") from None
        content = directory.json_object("config.json")
        config, quantization = own_config(directory)
        fields = {str(ours): content[theirs] for theirs, ours in SIZES.items() if theirs in content}
        config = GPTConfig.from_dict(config.to_dict() | fields)  # others change the fields that they know
        return Checkpoint(directory, config, quantization, [file.path.name for file in tensor_files(directory)])

    def keeps_quantized(self, config: GPTConfig) -> bool:
        """Always: the words are those of `stored_shapes`."""
        return True

    def write(self, folder: Path, export: Export) -> dict[str, str]:
        """Write a checkpoint of the model alone; the matrices that quantization leaves in float32, and why."""
        config, quantization, tensors = export.config, export.quantization, export.tensors
        if quantization and not export.quantized:
            tensors = apply(quantization, tensors, config)
        save_model(folder, config, export.tokenizer, tensors, quantization, export.texts, export.ids)
        return unquantized(quantization, config) if quantization else {}
