"""Saving checkpoints, with retries: trouble with a run's folder neither stops the training nor loses one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.paths import write_atomically
from twingpt.core.tokenizer import Tokenizer
from twingpt.runs import folder as runs
from twingpt.runs.events import Event, Saved, SaveFailed
from twingpt.runs.shell import quote
from twingpt.training.state import Progress, RunState

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries while training goes on; each wait doubles the last
LAST_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds between those at the end of a run


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of a run on the host after `step` steps, to become a checkpoint; `best` if its held-out loss is.

    `tensors` are parameters and optimizer state by name, in float32, and `training` becomes training_state.json.
    """

    step: int
    tensors: Mapping[str, np.ndarray]
    training: Mapping[str, Any]
    best: bool


def take_snapshot(state: RunState, progress: Progress, *, best: bool) -> Snapshot:
    """Copy a run's parameters, optimizer state and progress to the host; waits for the device."""
    training = {
        **progress.to_dict(),
        "tokens": progress.step * state.tokens_per_step,
        "data": state.data.fingerprint,
        "train": state.train.to_dict(),
        "backend": state.backend.NAME,
    }
    return Snapshot(progress.step, dict(state.engine.state()), training, best)


class Saver:
    """Writes a run's checkpoints; one that can't be written waits in memory, and training goes on.

    At most two wait: the newest, and the best. `run_json` is the content of run.json, for a folder that somebody
    removed; `saved_at` is the step of the newest checkpoint on the disk, -1 before the first.
    """

    def __init__(
        self,
        run: Path,
        config: GPTConfig,
        tokenizer: Tokenizer,
        keep: int,
        report: Callable[[Event], None],
        run_json: str,
        saved_at: int = -1,
    ) -> None:
        self.run, self.config, self.tokenizer, self.keep, self.report = run, config, tokenizer, keep, report
        self.run_json, self.saved_at = run_json, saved_at
        self.waiting: list[Snapshot] = []
        self.wait, self.next_try = FIRST_WAIT, 0.0
        self.failing: set[str] = set()  # what was reported to fail, and has not worked since

    @property
    def kept(self) -> str:
        """What is left of a run that ends in an error, as part of a sentence."""
        return "the last checkpoint is good" if self.saved_at > 0 else "nothing was saved"

    def holds(self, step: int) -> bool:
        """Whether the run after `step` steps is on the disk, or waits to be."""
        return step == self.saved_at or any(step == snapshot.step for snapshot in self.waiting)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, or let it wait where that fails."""
        best = [] if snapshot.best else [waiting for waiting in self.waiting if waiting.best]
        self.waiting = [snapshot, *best]
        self.retry()

    def retry(self, *, now: bool = False) -> None:
        """Write what waits, unless the last try was a moment ago and it isn't to be `now`."""
        if not self.waiting or (time.monotonic() < self.next_try and not now):
            return
        error = self._write()
        if error is None:
            return
        self.next_try = time.monotonic() + self.wait
        self.wait = min(2 * self.wait, LONGEST_WAIT)
        self._report_failure(
            "save",
            self.waiting[0].step,
            f"the checkpoint can't be saved ({_reason(error)}): it waits in memory, and is tried again; "
            f"free some space or mend {self.run}",
        )

    def finish(self) -> None:
        """Write what waits, in several tries over some seconds, and leave the folder tidy; UserError if it can't be."""
        error = self._write()
        for seconds in LAST_WAITS:
            if error is None:
                break
            time.sleep(seconds)
            error = self._write()
        if error is not None:
            raise UserError(
                f"The checkpoint of step {self.waiting[0].step} can't be saved ({_reason(error)}): free some space or "
                f"mend {self.run}, then gpt train --resume {quote(self.run)} goes on; "
                "earlier checkpoints are untouched."
            ) from error
        self._prune()

    def mark_best(self, step: int) -> None:
        """Let `best` name a checkpoint that was saved before it was evaluated."""
        folder = runs.checkpoint_folder(self.run, step)
        if step == self.saved_at and runs.pointed(self.run, "best") != folder:
            try:
                runs.point(self.run, "best", folder)
            except OSError as error:
                self._report_failure("best", step, f"{self.run / 'best'} can't be written ({_reason(error)})")

    def _report_failure(self, what: str, step: int, message: str) -> None:
        """Report that `what` fails, unless it did the last time too."""
        if what not in self.failing:
            self.failing.add(what)
            self.report(SaveFailed(step, message))

    def _write(self) -> Exception | None:
        """Write each snapshot that waits, the newest first; the first failure."""
        failure: Exception | None = None
        for snapshot in list(self.waiting):
            try:
                self._write_one(snapshot)
            except (OSError, UserError) as error:
                failure = failure or error
            else:
                self.waiting.remove(snapshot)
        if failure is None:
            self.wait, self.next_try = FIRST_WAIT, 0.0
            self.failing.discard("save")
        return failure

    def _write_one(self, snapshot: Snapshot) -> None:
        run_json = self.run / "run.json"
        if not run_json.exists():
            self.run.mkdir(parents=True, exist_ok=True)
            write_atomically(run_json, self.run_json)
        runs.remove_leftovers(self.run)  # what a killed save left may be what fills the disk
        folder = runs.checkpoint_folder(self.run, snapshot.step)
        checkpoint.save(folder, self.config, self.tokenizer, snapshot.tensors, snapshot.training)
        try:
            if snapshot.best:
                runs.point(self.run, "best", folder)
            if snapshot.step > self.saved_at:  # pointed at last: where a run goes on from, all is done
                runs.point(self.run, "latest", folder)
                self.saved_at = snapshot.step
            self.report(Saved(snapshot.step, str(folder)))
        finally:
            self._prune()

    def _prune(self) -> None:
        try:
            runs.prune(self.run, self.keep)
            self.failing.discard("prune")
        except OSError as error:
            message = f"old checkpoints can't be removed ({_reason(error)}): they stay for now"
            self._report_failure("prune", self.saved_at, message)


def _reason(error: BaseException) -> str:
    """What the operating system said."""
    cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    return cause.strerror or str(cause) if isinstance(cause, OSError) else str(cause)
