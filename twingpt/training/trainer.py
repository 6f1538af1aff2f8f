"""The training loop: it drives an engine, knows no backend, and reads results only after the next step is under way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from twingpt.backends import host
from twingpt.backends.errors import DeviceError, OutOfMemoryError
from twingpt.core.errors import UserError
from twingpt.core.schedule import hyperparameters
from twingpt.data.prefetch import Prefetcher
from twingpt.evaluation.held_out import evaluate
from twingpt.inference.language_model import LanguageModel
from twingpt.runs import folder as runs
from twingpt.runs import trackers
from twingpt.runs.events import Evaluated, MachineNoted, Reporter, RunEnded, Sampled
from twingpt.runs.reporters import Reporters, folder_reporters
from twingpt.training import memory
from twingpt.training.describe import run_json
from twingpt.training.interrupt import Interrupt
from twingpt.training.meter import Meter, NotFiniteError
from twingpt.training.saving import Saver, take_snapshot
from twingpt.training.state import RunState
from twingpt.training.summary import start_events, summarise

Array = np.ndarray

SAMPLE_TOKENS = 120


class Trainer:
    """The training loop of one run: optimizer steps, and the evaluations, samples and checkpoints between them.

    Its events go to metrics.jsonl, loss.svg and report.html in the run's folder, its trackers, then to `reporters`.
    """

    def __init__(self, state: RunState, reporters: Sequence[Reporter] = ()) -> None:
        self.state, self.train, self.engine, self.baseline = state, state.train, state.engine, state.baseline
        self.progress = dataclasses.replace(state.progress)
        tracked = trackers.make(state.trackers, state.folder)
        everyone = [*folder_reporters(state.folder), *tracked, *reporters]
        self.report = Reporters(everyone, lambda: self.progress.step).report
        run, tokenizer = state.folder, state.data.tokenizer
        self.saver = Saver(run, state.config, tokenizer, self.train.keep, self.report, run_json(state), state.saved_at)
        self.meter = Meter(state, self.progress)
        self.interrupt = Interrupt()
        self.batches = Prefetcher(self._batch)

    def fit(self, stop_after: int | None = None) -> dict[str, Any]:
        """Train to the end of the schedule, or to `stop_after` steps, saving at the end; the run's summary.

        SIGINT and SIGTERM end it after what is under way, saved, and `interrupt.exit_code` tells which it was. A
        checkpoint that can't be saved waits while training goes on. Raises UserError for a loss that is not finite,
        for want of memory or another failure of the device, where the last checkpoint can't be saved in the end, or
        another process trains it.
        """
        with runs.training(self.state.folder), self.interrupt, self._device_errors(), self._on_machine():
            self.meter.start()
            try:
                self._train_and_save(min(self.train.max_iters, stop_after or self.train.max_iters))
            except BaseException:
                self.report(RunEnded(self.progress.step, "failed", self.meter.seconds))
                raise
            seconds, reason = self.meter.seconds, self._reason()
            self.report(RunEnded(self.progress.step, reason, seconds))
        return summarise(self.state, self.meter, self.baseline, reason, seconds - self.state.seconds_before)

    @contextmanager
    def _on_machine(self) -> Iterator[None]:
        """Report the start, and within the block keep the machine awake and the device's memory within its limits."""
        state = self.state
        cache = memory.cache_limit(state.config, state.train, state.backend.NAME, state.device.kind)
        limits = state.backend.memory_limits(state.device, cache=cache, wired=state.wired_bytes)
        with limits, host.awake() as awake:
            for event in start_events(state):
                self.report(event)
            if awake:
                what = "caffeinate keeps this Mac from idle sleep while it trains; a closed lid still puts it to sleep."
                self.report(MachineNoted(self.progress.step, what))
            yield

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Leave what comes between steps out of the training speed, and its arrays out of the memory kept for reuse.

        Only there: a step finds its own again, and without them would be slower (the review of mlx-lm#986).
        """
        with self.meter.stopped():
            yield
            self.state.backend.clear_cache(self.state.device)

    def _train_and_save(self, stop: int) -> None:
        """Train to `stop` steps or an interruption; whatever ends it, what is to be saved is tried once more."""
        try:
            if self.state.init_from and not self.progress.step:
                self._save()  # so that the run goes on without the model that it began with
            self._train(stop)
            self._conclude()
        except Exception:
            self.saver.retry(now=True)
            raise
        self.saver.finish()

    def _train(self, stop: int) -> None:
        """Steps, and what is due between them."""
        progress = self.progress
        while progress.step < stop and not self.interrupt.requested:
            self._milestones()
            if self.interrupt.requested:
                return
            self._step()
            if (progress.step - 1) % self.train.log_interval == 0:
                self._report_training(leave=1)
                with self.meter.stopped():
                    self.saver.retry()

    def _step(self) -> None:
        """Enqueue one optimizer step."""
        train, step = self.train, self.progress.step
        for micro in range(train.gradient_accumulation_steps):
            number = step * train.gradient_accumulation_steps + micro
            tokens, targets = self.batches(number)
            windows = np.arange(number * train.batch_size, (number + 1) * train.batch_size)
            self.engine.forward_backward(tokens, targets, windows)
        self.meter.unread.append(self.engine.optimizer_step(hyperparameters(train, step)))
        self.progress.step += 1

    def _batch(self, number: int) -> tuple[Array, Array]:
        """Micro-batch `number` of the run: tokens and targets, (B, T) int32."""
        train, block_size = self.train, self.state.config.block_size
        return self.state.data.batch(number * train.batch_size, train.batch_size, block_size, train.seed)

    def _milestones(self) -> None:
        """Evaluate, sample and save where the present step asks for it."""
        train, progress = self.train, self.progress
        step = progress.step
        if train.eval_interval and step % train.eval_interval == 0 and progress.evaluated_at != step:
            improved = self._evaluate()
            if improved and (step or self.saver.holds(0)):  # a fine-tuned model as it was may stay the best
                self._save()
        if step and train.sample_interval and step % train.sample_interval == 0 and progress.sampled_at != step:
            self._sample()
        if step and train.checkpoint_interval and step % train.checkpoint_interval == 0:
            self._save()

    def _conclude(self) -> None:
        """Leave the run saved where it stands; and evaluated, unless somebody waits for it to end."""
        progress = self.progress
        self._report_training(leave=0)
        if not self._evaluated and not self.interrupt.requested:
            self._evaluate()
        if self.train.sample_interval and progress.sampled_at != progress.step and not self.interrupt.requested:
            self._sample()
        self._save()

    def _reason(self) -> str:
        """Why the run stopped: finished (and evaluated at its end), interrupted, or stop-after."""
        if self._evaluated and self.progress.step >= self.train.max_iters:
            return "finished"
        return "interrupted" if self.interrupt.requested else "stop-after"

    @property
    def _evaluated(self) -> bool:
        """Whether no evaluation is left to do at this step, as where nothing is held out."""
        return self.progress.evaluated_at == self.progress.step or not self.state.data.holds_out

    def _evaluate(self) -> bool:
        """Report the held-out loss, after what n-grams reach where that is new; whether it is the best so far."""
        state, progress = self.state, self.progress
        sizes = self.train.batch_size, state.config.block_size, state.eval_windows
        with self._apart():
            found = evaluate(self.engine.inference(), state.data, *sizes)
        loss, bpb = found.mean.nats, found.mean.bits_per_byte
        if not math.isfinite(loss):
            self._report_training(leave=0)  # which names the step where that was not finite either
            raise self._diverged(f"The held-out loss after {progress.step} steps")
        improved = progress.note(found)
        with self.meter.stopped():
            baseline = found.ngram_baseline(progress.step, self.baseline)
        if baseline:
            self.baseline = baseline
            self.report(baseline)
        self.report(Evaluated(progress.step, loss, bpb, improved, self.meter.seconds, found.source_losses))
        return improved

    def _sample(self) -> None:
        """Let the model write from the start of a document."""
        with self._apart():
            model = LanguageModel(self.state.config, self.state.data.tokenizer, self.engine.inference())
            try:
                text = model.generate("", SAMPLE_TOKENS, seed=self.train.seed)
            except UserError:
                self._report_training(leave=0)  # which names the step where the loss was not finite either
                raise
            del model  # so that its arrays are free, and cleared
        self.progress.sampled_at = self.progress.step
        self.report(Sampled(self.progress.step, text))

    def _save(self) -> None:
        """Checkpoint the run, unless this step has one."""
        progress = self.progress
        best = progress.evaluated_at == progress.step and progress.val_loss == progress.best_val_loss
        if self.saver.holds(progress.step):
            if best:
                self.saver.mark_best(progress.step)
            return
        self._report_training(leave=0)  # never save what was not seen to be finite
        with self._apart():
            self.saver.save(take_snapshot(self.state, progress, best=best))

    def _report_training(self, *, leave: int) -> None:
        """Report the means of all steps since the last report but the last `leave`."""
        try:
            trained = self.meter.read(leave=leave)
        except NotFiniteError as error:
            raise self._diverged(str(error)) from error
        if trained:
            self.report(trained)
        if leave and (busy := self.meter.machine_busy()):
            self.report(busy)

    def _diverged(self, what: str) -> UserError:
        return UserError(f"{what} is not finite: lower the learning rate; {self.saver.kept}.")

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """Let a DeviceError within the block say after which step it came, and what is saved.

        Want of memory says which of the run's settings to change.
        """
        state = self.state
        try:
            with state.backend.device_errors():
                yield
        except OutOfMemoryError as error:
            advice = memory.advice(state.config, state.train, state.backend.NAME, state.device, None)
            raise OutOfMemoryError(
                f"{state.device.name} ran out of memory after {self.progress.step} steps; {self.saver.kept}. {advice}"
            ) from error
        except DeviceError as error:
            where = f"{state.device.name} failed after {self.progress.step} steps; {self.saver.kept}"
            raise DeviceError(f"{where}. {error}") from error
