"""How long a run will take: its steps timed on the device, and a length and intervals that fit a given time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from twingpt.backends import registry
from twingpt.core.backend import Backend, Device
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.schedule import hyperparameters
from twingpt.data.shards import TokenDataset
from twingpt.training.engine import make_engine

EVALUATIONS = 10  # of a run, beside the one at its start
EVALUATION_SHARE = 0.1  # of a run's time, at most
MEASURED_SECONDS = 3.0  # of steps, once the engine is warm
MOST_UPDATES = 200  # steps that are measured, at most
PATIENCE_SECONDS = 20.0  # for a whole micro-batch; a slower one is measured by its windows


@dataclass(frozen=True)
class Place:
    """A backend, and one of its devices."""

    engines: Backend
    device: Device

    def __str__(self) -> str:
        return f"{self.engines.NAME} {self.device.name}"


@dataclass(frozen=True)
class Speed:
    """Seconds, as measured, of an optimizer step and of a batch of evaluation, and of compiling at the start."""

    step: float
    evaluation_batch: float
    start: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The length of a run: in steps, and in seconds with its evaluations, which come every `eval_interval` steps.

    `eval_iters` is as in TrainConfig: batches of an evaluation, 0 for the whole validation split.
    """

    steps: int
    seconds: float
    eval_interval: int
    eval_iters: int


def places() -> list[Place]:
    """Every device of every backend that works here, those of the backend that `auto` chooses first."""
    found = []
    for name in filter(registry.installed, registry.BACKENDS):  # MLX first, as in `gpt doctor`
        try:
            engines = registry.get(name)
            found += [Place(engines, device) for device in engines.devices()]
        except (UserError, RuntimeError):  # a broken one; `gpt doctor` says how
            continue
    chosen, _ = registry.choose()
    return sorted(found, key=lambda place: chosen != place.engines.NAME)


class _DryRun:
    """A run's engine, timed on the first batch of its data; its parameters are thrown away."""

    def __init__(self, config: GPTConfig, train: TrainConfig, data: TokenDataset, place: Place) -> None:
        self.config, self.train, self.data = config, train, data
        self.engine = make_engine(config, train, place.engines, place.device, compile=None)
        self.engine.load(initialise(config, train.seed))

    def seconds(self, rows: int, micro_batches: int = 1, updates: int = 1) -> float:
        """Seconds of `updates` steps of `micro_batches` of `rows` windows each, until their losses are read."""
        tokens, targets = self.data.batch(0, rows, self.config.block_size, self.train.seed)
        start, handles = time.perf_counter(), []
        for _ in range(updates):
            for _ in range(micro_batches):
                self.engine.forward_backward(tokens, targets, np.arange(rows))
            handles.append(self.engine.optimizer_step(hyperparameters(self.train, 0)))
        self.engine.read(handles)
        return time.perf_counter() - start

    def evaluation(self, rows: int) -> float:
        """Seconds of the second of two batches of evaluation; the first one warms up."""
        tokens, targets = next(self.data.validation(rows, self.config.block_size, 1))
        for _ in range(2):
            start = time.perf_counter()
            engine = self.engine.inference()
            engine.read(engine.log_probs(tokens, targets))
        return time.perf_counter() - start


def measure(config: GPTConfig, train: TrainConfig, data: TokenDataset, place: Place) -> Speed:
    """Time a run on a device: some seconds of steps on its first batch, and an evaluation of one batch.

    Where a step has more micro-batches than MEASURED_SECONDS hold, it is extrapolated from fewer; where a
    micro-batch takes a CPU longer than PATIENCE_SECONDS, from one window and two.
    """
    dry, rows, micro_batches = _DryRun(config, train, data, place), train.batch_size, train.gradient_accumulation_steps
    cpu = place.device.kind == "cpu"  # elsewhere other shapes would compile again
    one = dry.seconds(1) if cpu else 0.0
    if one * rows > PATIENCE_SECONDS:
        row = max(0.0, dry.seconds(2) - one)
        return Speed(one + (rows * micro_batches - 1) * row, rows * dry.evaluation(1))
    first = each = dry.seconds(rows)  # compiles where that is on, and allocates
    if not cpu or first < MEASURED_SECONDS:
        each = dry.seconds(rows)
        measured = max(1, min(micro_batches, int(MEASURED_SECONDS / each)))
        updates = max(1, min(MOST_UPDATES, int(MEASURED_SECONDS / (each * measured))))
        each = dry.seconds(rows, measured, updates) / updates / measured
    return Speed(each * micro_batches, dry.evaluation(rows), max(0.0, first - each))


def plan(config: GPTConfig, train: TrainConfig, data: TokenDataset, speed: Speed, span: float | int) -> Plan:
    """The run that fills `span`: seconds, evaluations included, as a float, or a number of steps as an int.

    It is evaluated EVALUATIONS times beside its start, on as much of the validation split as EVALUATION_SHARE allows.
    """
    windows = math.ceil((len(data.splits["val"]) - 1) / config.block_size)
    whole = math.ceil(windows / train.batch_size)
    seconds = span if isinstance(span, float) else span * speed.step
    allowed = int(EVALUATION_SHARE * seconds / (EVALUATIONS + 1) / speed.evaluation_batch)
    eval_iters = 0 if allowed >= whole else max(1, allowed)  # 0 is all of them
    evaluation = (eval_iters or whole) * speed.evaluation_batch
    fits = int((seconds - speed.start - (EVALUATIONS + 1) * evaluation) / speed.step)
    steps = max(1, fits) if isinstance(span, float) else span
    interval = math.ceil(steps / EVALUATIONS)
    evaluations = 1 + math.ceil(steps / interval)
    total = speed.start + steps * speed.step + evaluations * evaluation
    return Plan(steps, total, interval, eval_iters)
