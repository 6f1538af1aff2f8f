"""The held-out loss of models that are not being trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from twingpt.backends import registry
from twingpt.core.backend import Backend, Device
from twingpt.core.checkpoint.schema import Model
from twingpt.data.prepare import prepare
from twingpt.data.shards import TokenDataset

Array = np.ndarray

WINDOW, BATCH, BATCHES = 1024, 4, 100  # positions, windows, and how many batches of them at most


@dataclass(frozen=True)
class HeldOut:
    """Text that models with the same tokenizer are measured on, on a device."""

    data: TokenDataset
    engines: Backend
    device: Device

    @classmethod
    def of(cls, model: Model, source: str, backend: str, device: str | None) -> HeldOut:
        """The held-out part of `source` in a model's tokens; UserError where there is none, or no such device."""
        engines = registry.get(backend)
        target = registry.find_device(engines, device)
        tokenizer = model.tokenizer()
        data = prepare(source, tokenizer.kind, tokenizer.vocab_size, tokenizer)
        data.check(dataclasses.replace(model.config, block_size=min(WINDOW, model.config.block_size)))
        return cls(data, engines, target)

    def loss(self, model: Model) -> float:
        """Nats per token over the first held-out windows, in float32."""
        config = model.config
        if config.position != "learned":  # a table for each of a million positions would take gigabytes
            config = dataclasses.replace(config, block_size=min(WINDOW, config.block_size))
        engine = self.engines.TrainEngine(config, self.device)
        engine.load(model.parameters())
        handles, count = [], 0
        for tokens, targets in self.data.validation(BATCH, min(WINDOW, model.config.block_size), BATCHES):
            handles.append(engine.evaluate(tokens, targets))
            count += int((targets >= 0).sum())
        return float(engine.read(handles).sum()) / count
