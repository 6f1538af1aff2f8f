"""Held-out loss: the cross-entropy on a data set's validation windows, of a run's engine and of finished models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twingpt.backends import registry
from twingpt.core.backend import Backend, Device, InferenceEngine
from twingpt.core.checkpoint.schema import Model
from twingpt.core.errors import UserError
from twingpt.data.mixture import Data, MixturePart, parts
from twingpt.data.prepare import prepare
from twingpt.data.shards import TokenDataset
from twingpt.evaluation import baseline
from twingpt.runs.events import Baseline, SourceLoss

Array = np.ndarray

WINDOW, BATCH, BATCHES = 1024, 4, 100  # positions, windows, and how many batches of them at most


@dataclass(frozen=True)
class HeldOutLoss:
    """Cross-entropy on held-out tokens in nats per token, and the bytes of text per token, over `targets` tokens."""

    nats: float
    bytes_per_token: float
    targets: int

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text, which compares across tokenizers."""
        return self.nats / math.log(2) / self.bytes_per_token


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss on each source of a run's data, and `mean`, weighted by their shares of the windows."""

    sources: Sequence[tuple[MixturePart, HeldOutLoss]]
    mean: HeldOutLoss

    @property
    def source_losses(self) -> dict[str, SourceLoss]:
        """The loss on each source of a mixture, by name; empty for one data set."""
        if len(self.sources) == 1:
            return {}
        return {part.name: SourceLoss(loss.nats, loss.bits_per_byte) for part, loss in self.sources}

    def ngram_baseline(self, step: int, known: Baseline | None) -> Baseline | None:
        """What the best n-gram reaches on the same tokens, reported after `step` steps.

        None before the first step, where `known` is of these tokens already, and where counting would take more
        than about a second.
        """
        if step == 0 or (known and known.targets == self.mean.targets):
            return None
        row = baseline.for_run(
            [(part.data, part.share, loss.targets, loss.bytes_per_token) for part, loss in self.sources]
        )
        return Baseline(step, row.n, row.val_loss, row.bits_per_byte, row.targets) if row else None


def evaluate(engine: InferenceEngine, data: Data, batch_size: int, block_size: int, n_windows: int) -> Evaluation:
    """Evaluate an engine on the first `n_windows` held-out windows of each source of `data` (0: all); waits.

    `batch_size` is how many of them are computed at a time, and decides nothing else.
    """
    sources = parts(data)
    losses = [_source_loss(engine, part.data, batch_size, block_size, n_windows) for part in sources]
    means = [(loss.nats, loss.bytes_per_token) for loss in losses]
    nats, bytes_per_token = np.average(means, axis=0, weights=[part.share for part in sources]).tolist()
    mean = HeldOutLoss(nats, bytes_per_token, sum(loss.targets for loss in losses))
    return Evaluation(list(zip(sources, losses, strict=True)), mean)


def _source_loss(
    engine: InferenceEngine, data: TokenDataset, batch_size: int, block_size: int, n_windows: int
) -> HeldOutLoss:
    handles, count, size = [], 0, 0.0
    n_batches = -(-n_windows // batch_size)
    for i, (tokens, targets) in enumerate(data.validation(batch_size, block_size, n_batches)):
        if n_windows:
            targets[n_windows - i * batch_size :] = -1  # padding, so that every batch has one shape
        handles.append(engine.log_probs(tokens, targets))
        counted = targets[targets >= 0]
        count += counted.size
        size += data.text_bytes("val", counted)
    nats = -sum(float(engine.read(handle).targets.sum(dtype=np.float64)) for handle in handles)
    return HeldOutLoss(nats / count, max(1, size) / count, count)


@dataclass(frozen=True)
class HeldOut:
    """A data set whose val split models of one tokenizer are evaluated on, and the device."""

    data: TokenDataset
    engines: Backend
    device: Device

    @classmethod
    def of(cls, model: Model, source: str, backend: str, device: str | None) -> HeldOut:
        """`source` under the model's tokenizer; UserError where no text is held out, or there is no such device."""
        engines = registry.get(backend)
        target = registry.find_device(engines, device)
        tokenizer = model.tokenizer()
        data = prepare(source, tokenizer)
        if not data.holds_out:
            raise UserError(f"{source} holds out nothing to measure the loss on: give other text.")
        data.check(dataclasses.replace(model.config, block_size=min(WINDOW, model.config.block_size)))
        return cls(data, engines, target)

    def loss(self, model: Model) -> float:
        """Cross-entropy in nats per token over the first BATCHES batches, in float32."""
        config = model.config
        if config.position != "learned":  # RoPE's angles for a million positions would take gigabytes
            config = dataclasses.replace(config, block_size=min(WINDOW, config.block_size))
        engine = self.engines.InferenceEngine(config, model.stored(), self.device)
        return _source_loss(engine, self.data, BATCH, min(WINDOW, model.config.block_size), BATCH * BATCHES).nats
