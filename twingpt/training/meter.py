"""Reading the losses of steps under way, and the speed at which they are done."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from twingpt.backends import host
from twingpt.core.backend import Handle
from twingpt.core.schedule import learning_rate_factor
from twingpt.runs.events import MachineNoted, Trained
from twingpt.training.flops import mfu
from twingpt.training.state import Progress, RunState

Array = np.ndarray

MOST_SKIPPED = 100  # steps in a row: by then the loss scale is at its smallest, and the weights are lost


class NotFiniteError(Exception):
    """A loss or gradient that is NaN or infinite; its text names it, as the subject of a sentence."""


class Meter:
    """Mean loss, speed and MFU between two reports, from the steps' unread handles and a clock that can be stopped.

    It keeps `progress` up to what was read: the training loss and how many steps were skipped.
    """

    def __init__(self, state: RunState, progress: Progress) -> None:
        self.state, self.progress = state, progress
        self.unread: list[Handle] = []  # of the steps since the last report, oldest first
        self.skipped_in_row = 0
        self.speeds: list[float] = []  # tokens per second, of each report
        self.peak_cached: int | None = None  # bytes of freed memory kept for reuse, at most in a report
        self.began = self.clock = 0.0  # speed is measured from `clock` and `clock_step` on
        self.clock_step = progress.step
        self.others = host.OtherLoad() if state.device.kind == "cpu" else None
        self.busy, self.told_busy = 0.0, False

    def start(self) -> None:
        """Let the run's time begin."""
        self.began = self.clock = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, over all its starts."""
        return self.state.seconds_before + time.perf_counter() - self.began

    @property
    def tokens_per_second(self) -> float | None:
        """The median speed of this start's reports; None before the first."""
        return statistics.median(self.speeds) if self.speeds else None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave the time of the block out of the training speed."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def read(self, *, leave: int) -> Trained | None:
        """Wait for all steps but the last `leave`, and report their means; None where none of them counts.

        Raises NotFiniteError for a loss or a gradient that is not finite and may not be skipped.
        """
        state, count = self.state, len(self.unread) - leave
        if count < 1:
            return None
        rows = state.engine.read(self.unread[:count])
        self.unread = self.unread[count:]
        step = self.progress.step - leave
        rows = self._finite_rows(rows, step - count)
        if not len(rows):
            return None
        loss, grad_norm, _ = rows.mean(axis=0)
        self.progress.train_loss = float(loss)
        speed, memory = self._measure_speed(), state.engine.memory()
        if memory.cached is not None:
            self.peak_cached = max(self.peak_cached or 0, memory.cached)
        return Trained(
            step=step,
            loss=float(loss),
            grad_norm=float(grad_norm),
            learning_rate=state.train.learning_rate * learning_rate_factor(state.train, step - 1),
            tokens=step * state.tokens_per_step,
            tokens_per_second=speed,
            memory_bytes=memory.now,
            peak_memory_bytes=memory.peak,
            skipped=self.progress.skipped,
            seconds=self.seconds,
            mfu=mfu(speed, state.config, state.peak),
            epoch=state.epoch(step),
            epochs=state.source_epochs(step),
            cached_memory_bytes=memory.cached,
        )

    def machine_busy(self) -> MachineNoted | None:
        """What to tell of other processes: once, after two readings in which they used half a core."""
        if self.others is None or self.told_busy or (now := self.others.read()) is None:
            return None
        before, self.busy = self.busy, now
        self.told_busy = min(before, now) >= 0.5
        if not self.told_busy:
            return None
        what = f"Other processes keep {now:.1f} of {host.cores()} cores busy, and the run goes slower for it."
        return MachineNoted(self.progress.step, what)

    def _measure_speed(self) -> float:
        """Tokens per second since the last report; that report's, where no step was enqueued since."""
        now, steps = time.perf_counter(), self.progress.step - self.clock_step
        if steps > 0:
            self.speeds.append(steps * self.state.tokens_per_step / (now - self.clock))
        self.clock, self.clock_step = now, self.progress.step
        return self.speeds[-1]

    def _finite_rows(self, rows: Array, step: int) -> Array:
        """The rows (loss, gradient norm, 1 if skipped) of the steps after `step`, less those that were skipped.

        In float16 a gradient may be too large for the present loss scale, and the step is skipped; a loss
        that is not finite may be skipped only with `skip_nonfinite`.
        """
        for i, (loss, norm, skipped) in enumerate(rows):
            fine = (math.isfinite(loss) or self.state.train.skip_nonfinite) and (math.isfinite(norm) or skipped)
            self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
            if not fine or self.skipped_in_row == MOST_SKIPPED:
                what = "gradient" if math.isfinite(loss) else "loss"
                row = f", as those of the {MOST_SKIPPED - 1} before it," if fine else ""
                raise NotFiniteError(f"The {what} of step {step + i + 1}{row}")
        self.progress.skipped += int(rows[:, 2].sum())
        kept: Array = rows[rows[:, 2] == 0]
        return kept
