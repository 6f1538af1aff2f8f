"""From a model on disk to one that generates."""

from __future__ import annotations

from pathlib import Path

from twingpt.backends import registry
from twingpt.core.checkpoint.schema import Model
from twingpt.inference.generator import LanguageModel
from twingpt.weights.formats import open_model
from twingpt.weights.generation import end_ids


def load(path: str | Path, backend: str = "auto", device: str | None = None, dtype: str | None = None) -> LanguageModel:
    """Open a model for generation: a checkpoint, a run (RUN@best, RUN@STEP), or anything that `gpt convert` reads.

    Raises UserError for a damaged model, or a backend, device or dtype that isn't there.
    """
    return language_model(open_model(path).model, backend, device, dtype)


def language_model(model: Model, backend: str, device: str | None, dtype: str | None) -> LanguageModel:
    """A model on a backend; UserError for a backend, device or dtype that isn't there."""
    engines = registry.get(backend)
    target = registry.find_device(engines, device)
    compute = registry.find_dtype(target, dtype or "float32")
    engine = engines.InferenceEngine(model.config, model.stored(), target, dtype=compute)
    return LanguageModel(model.config, model.tokenizer(), engine, end_ids(model))
