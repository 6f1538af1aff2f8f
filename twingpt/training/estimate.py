"""How long a run takes: a few of its steps measured, and a length that fits the time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from twingpt.backends import registry
from twingpt.core.backend import Backend, Device
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise, parameter_count, state_table
from twingpt.core.schedule import hyperparameters
from twingpt.data.shards import TokenDataset
from twingpt.training.engine import make_engine

EVALUATIONS = 10  # of a run, beside the one at its start

EVALUATION_SHARE = 0.1  # of a run's time, at most

MEASURED_SECONDS = 3.0

PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Place:
    """A device of a backend."""

    engines: Backend
    device: Device

    def __str__(self) -> str:
        return f"{self.engines.NAME} {self.device.name}"


@dataclass(frozen=True)
class Speed:
    """What a dry run measured: seconds of a step, of a batch of evaluation and of compiling."""

    step: float
    evaluation_batch: float
    start: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A run that fits the time: its length, its intervals, in steps, and what it will take."""

    steps: int
    seconds: float
    eval_interval: int
    eval_iters: int


def places() -> list[Place]:
    """Every device of every backend that works here, the one that would be chosen first."""
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
    """The engine of a run, timed on its first batches; nothing of it is kept."""

    def __init__(self, config: GPTConfig, train: TrainConfig, data: TokenDataset, place: Place) -> None:
        self.config, self.train, self.data = config, train, data
        self.engine = make_engine(config, train, place.engines, place.device, compile=None)
        self.engine.load(initialise(config, train.seed))

    def seconds(self, rows: int, micro_batches: int = 1, updates: int = 1) -> float:
        """Steps of some micro-batches of `rows` windows, from the call to the last number read."""
        tokens, targets = self.data.batch(0, rows, self.config.block_size, self.train.seed)
        start, handles = time.perf_counter(), []
        for _ in range(updates):
            for key in range(micro_batches):
                self.engine.forward_backward(tokens, targets, key)
            handles.append(self.engine.optimizer_step(hyperparameters(self.train, 0)))
        self.engine.read(handles)
        return time.perf_counter() - start

    def evaluation(self, rows: int) -> float:
        """One batch of evaluation, once the first has warmed up."""
        tokens, targets = next(self.data.validation(rows, self.config.block_size, 1))
        for _ in range(2):
            start = time.perf_counter()
            self.engine.read([self.engine.evaluate(tokens, targets)])
        return time.perf_counter() - start


def measure(config: GPTConfig, train: TrainConfig, data: TokenDataset, place: Place) -> Speed:
    """Train on real batches for a few seconds, and evaluate one.

    Where a step has more micro-batches than that time holds, some are measured and the rest is added.
    Where even one is too long for a CPU, one window and two are, and the rest is added.
    """
    dry, rows, micro_batches = _DryRun(config, train, data, place), train.batch_size, train.gradient_accumulation_steps
    cpu = place.device.kind == "cpu"  # elsewhere other shapes would compile again
    one = dry.seconds(1) if cpu else 0.0
    if one * rows > PATIENCE_SECONDS:
        row = max(0.0, dry.seconds(2) - one)
        return Speed(one + (rows * micro_batches - 1) * row, rows * dry.evaluation(1))
    first = step = dry.seconds(rows)  # compiles where that is on, and allocates
    if not cpu or first < MEASURED_SECONDS:
        step = dry.seconds(rows)
        measured = max(1, min(micro_batches, int(MEASURED_SECONDS / step)))
        updates = max(1, min(200, int(MEASURED_SECONDS / (step * measured))))
        step = dry.seconds(rows, measured, updates) / updates / measured
    return Speed(step * micro_batches, dry.evaluation(rows), max(0.0, first - step))


def plan(config: GPTConfig, train: TrainConfig, data: TokenDataset, speed: Speed, span: float | int) -> Plan:
    """Steps for a time (a float, in seconds), or the time for steps (an int), evaluations included."""
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


def checkpoint_bytes(config: GPTConfig, train: TrainConfig) -> int:
    """The size of a checkpoint's tensors: parameters and optimizer state, in float32."""
    state = state_table(config, train.optimizer, train.dtype)
    return 4 * (parameter_count(config) + sum(math.prod(shape) for shape in state.values()))
