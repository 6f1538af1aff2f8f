"""From a model on disk to one that generates."""

from __future__ import annotations

from pathlib import Path

from twingpt.backends import registry
from twingpt.core.backend import Device
from twingpt.core.checkpoint.schema import Model
from twingpt.inference.language_model import LanguageModel
from twingpt.weights.convert import tokenizer_of
from twingpt.weights.formats import open_model
from twingpt.weights.generation import end_ids

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names


def load(path: str | Path, backend: str = "auto", device: str | None = None, dtype: str | None = None) -> LanguageModel:
    """Open a model for generation: a checkpoint, a run (RUN@best, RUN@STEP), or anything that `gpt convert` reads.

    `dtype` is the precision of its products, `stored_dtype` where None. Raises UserError for a damaged model, or a
    backend, device or dtype that isn't there.
    """
    return language_model(open_model(path).model, backend, device, dtype)


def language_model(model: Model, backend: str, device: str | None, dtype: str | None) -> LanguageModel:
    """A model on a backend; UserError for a backend, device or dtype that isn't there."""
    engines = registry.get(backend)
    target = registry.find_device(engines, device)
    compute = registry.find_dtype(target, dtype or stored_dtype(model, target))
    engine = engines.InferenceEngine(model.config, model.stored(), target, dtype=compute)
    return LanguageModel(model.config, tokenizer_of(model), engine, end_ids(model))


def stored_dtype(model: Model, device: Device) -> str:
    """The dtype of most of a model's floating-point tensors where the device is fast at it, else float32."""
    counts = {FLOATS[name]: n for name, n in model.dtypes().items() if name in FLOATS}
    stored = max(counts, key=lambda name: counts[name], default="float32")
    return stored if stored in device.fast_dtypes else "float32"
