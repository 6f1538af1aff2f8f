"""What a run trains with and how far it is: what a new run and a resumed one hand to the Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twingpt.core.backend import Backend, Device, TrainEngine
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.data.mixture import Data, Mixture
from twingpt.evaluation.held_out import Evaluation
from twingpt.runs.events import Baseline
from twingpt.training.flops import Peak


@dataclass
class Progress:
    """How far a run is: what training_state.json keeps beside the tensors. Losses are in nats per token."""

    step: int = 0  # optimizer steps enqueued
    train_loss: float = math.nan
    val_loss: float = math.nan
    val_bpb: float = math.nan  # bits per byte of text
    best_val_loss: float = math.inf
    evaluated_at: int = -1  # the step of the last evaluation
    sampled_at: int = -1  # and of the last sample
    skipped: int = 0  # steps left out, because they were not finite
    sources: dict[str, dict[str, float]] = field(default_factory=dict)  # of a mixture, each SourceLoss

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a loss that is not known yet is None."""
        return {name: value if name == "sources" else finite(value) for name, value in vars(self).items()}

    def note(self, evaluation: Evaluation) -> bool:
        """Take over the losses of an evaluation at this step; whether it is the best so far."""
        self.evaluated_at = self.step
        self.val_loss, self.val_bpb = evaluation.mean.nats, evaluation.mean.bits_per_byte
        self.sources = {name: asdict(loss) for name, loss in evaluation.source_losses.items()}
        improved = self.val_loss < self.best_val_loss
        self.best_val_loss = min(self.val_loss, self.best_val_loss)
        return improved

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Progress:
        """The progress that `to_dict` wrote, from among other keys; one that an older version lacks has its default."""
        values = {name: state.get(name, usual) for name, usual in vars(cls()).items()}
        values = {name: math.nan if value is None else value for name, value in values.items()}
        if math.isnan(values["best_val_loss"]):
            values["best_val_loss"] = math.inf
        return cls(**values)


@dataclass(frozen=True)
class Setup:
    """Where and how a run trains beside its configurations, as it was asked for: `setup` in run.json.

    `backend` is the one that was chosen, and `device` None for that backend's best; `compile` None leaves it to the
    device. `report_to` are trackers' names, with commas. Of what a command asks for, None is as the run has it.
    """

    backend: str | None = None
    device: str | None = None
    compile: bool | None = None
    report_to: str | None = None
    wired_limit: float | None = None


@dataclass(frozen=True, eq=False)
class RunState:
    """A run that is ready to train, new or resumed: its engine holds the parameters and optimizer state.

    `setup` is kept for the next start, and `trackers` and `wired_bytes` are what of it can be had now.
    `eval_batch_size` is the batch size asked for, of which an evaluation has `eval_iters`. `starts` describe each start
    of the run for run.json, this one last. `notes` say what was changed to fit the device's memory, and `replaced` what
    the run was started with and isn't available now; `set_aside` is where what lay after the step went. `init_from`
    names the model that the run was fine-tuned from. `saved_at` is the step of the checkpoint that it goes on from, -1
    for none, and `seconds_before` is the time that earlier starts took.
    """

    folder: Path
    config: GPTConfig
    train: TrainConfig
    data: Data
    backend: Backend
    device: Device
    engine: TrainEngine
    peak: Peak | None
    setup: Setup
    trackers: Sequence[str]
    wired_bytes: int
    eval_batch_size: int
    starts: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    replaced: Sequence[str] = ()
    set_aside: Path | None = None
    init_from: str | None = None
    progress: Progress = field(default_factory=Progress)
    baseline: Baseline | None = None
    saved_at: int = -1
    seconds_before: float = 0.0

    @property
    def windows_per_step(self) -> int:
        """Windows of `block_size` tokens in an optimizer step, over its micro-batches."""
        return self.train.batch_size * self.train.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        return self.windows_per_step * self.config.block_size

    @property
    def eval_windows(self) -> int:
        """Held-out windows of each source that an evaluation sees, whatever the micro-batch; 0 for the whole split."""
        return self.train.eval_iters * self.eval_batch_size

    def epoch(self, step: int) -> float:
        """Passes through the training data in the first `step` steps."""
        return self.data.epochs(step * self.windows_per_step, self.config.block_size)

    def source_epochs(self, step: int) -> dict[str, float]:
        """Passes through each source of a mixture in the first `step` steps, by name; empty for one data set."""
        if not isinstance(self.data, Mixture):
            return {}
        return self.data.source_epochs(step * self.windows_per_step, self.config.block_size, self.train.seed)


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON has no word for."""
    return value if math.isfinite(value) else None
