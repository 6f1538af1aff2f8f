"""The held-out loss of models that are not being trained."""

from __future__ import annotations

import dataclasses

import numpy as np

from twingpt.core import backend as backends
from twingpt.core.backend import Backend, Device
from twingpt.core.checkpoint import Model
from twingpt.core.data.prepare import prepare
from twingpt.core.data.shards import TokenDataset

Array = np.ndarray

WINDOW, BATCH, BATCHES = 1024, 4, 100  # positions, windows, and how many batches of them at most


def held_out_losses(before: Model, after: Model, source: str, backend: str, device: str | None) -> dict[str, float]:
    """The nats per held-out token of `source` for a model, `val_loss`, and for it quantized, `val_loss_quantized`."""
    engines = backends.get(backend)
    target = backends.find_device(engines, device)
    tokenizer = before.tokenizer()
    data = prepare(source, tokenizer.kind, tokenizer.vocab_size, tokenizer)
    data.check(dataclasses.replace(before.config, block_size=min(WINDOW, before.config.block_size)))
    return {
        "val_loss": held_out_loss(before, data, engines, target),
        "val_loss_quantized": held_out_loss(after, data, engines, target),
    }


def held_out_loss(model: Model, data: TokenDataset, engines: Backend, device: Device) -> float:
    """Nats per token over the first held-out windows, in float32."""
    engine = engines.TrainEngine(model.config, device, "adamw", "float32", False, False, False)
    engine.load(model.parameters())
    handles, count = [], 0
    for tokens, targets in data.validation(BATCH, min(WINDOW, model.config.block_size), BATCHES):
        handles.append(engine.evaluate(tokens, targets))
        count += int((targets >= 0).sum())
    return float(engine.read(handles).sum()) / count
