"""The training loop: it drives an engine, knows no backend, and reads results only after the next step is under way."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from twingpt.core import rng
from twingpt.core.backend import Backend, Device, Handle, TrainEngine
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import OutOfMemoryError, UserError
from twingpt.core.parameters import parameter_count
from twingpt.core.schedule import hyperparameters, learning_rate_factor
from twingpt.data.mixture import Data, Mixture, parts
from twingpt.data.prefetch import Prefetcher
from twingpt.data.shards import TokenDataset
from twingpt.evaluation import baseline
from twingpt.inference.generator import LanguageModel
from twingpt.runs import folder as runs
from twingpt.runs.events import (
    Baseline,
    Evaluated,
    Event,
    MemoryPlanned,
    MixedSource,
    Reporter,
    ReporterFailed,
    RunEnded,
    RunStarted,
    Sampled,
    SourceLoss,
    Trained,
)
from twingpt.training import memory
from twingpt.training.flops import Peak, mfu
from twingpt.training.saving import Saver, Snapshot

Array = np.ndarray

SAMPLE_TOKENS = 120
MOST_SKIPPED = 100  # steps in a row: by then the loss scale is at its smallest, and the weights are lost


@dataclass
class Progress:
    """Where a run is: what training_state.json keeps beside the tensors."""

    step: int = 0
    train_loss: float = math.nan
    val_loss: float = math.nan
    val_bpb: float = math.nan
    best_val_loss: float = math.inf
    evaluated_at: int = -1  # the step of the last evaluation
    sampled_at: int = -1  # and of the last sample
    skipped: int = 0  # steps left out, because they were not finite
    sources: dict[str, dict[str, float]] = field(default_factory=dict)  # of a mixture, each SourceLoss

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a loss that is not known yet is None."""
        return {**vars(self), **{name: _finite(value) for name, value in vars(self).items() if name != "sources"}}


class Trainer:
    """One run: its folder, configuration, data and engine, and how far it is."""

    def __init__(
        self,
        run: Path,
        config: GPTConfig,
        train: TrainConfig,
        data: Data,
        backend: Backend,
        device: Device,
        engine: TrainEngine,
        reporters: Sequence[Reporter],
        progress: Progress,
        peak: Peak | None = None,
    ) -> None:
        self.run, self.config, self.train, self.data = run, config, train, data
        self.backend, self.device, self.engine = backend, device, engine
        self.reporters, self.progress, self.peak = reporters, progress, peak
        self.batches = Prefetcher(self._batch)
        self.unread: list[Handle] = []  # updates since the last report, oldest first
        self.skipped_in_row = 0
        self.baseline: Baseline | None = None  # what an n-gram reaches, once it is known
        self.saver = Saver(run, config, data.tokenizer, train.keep, self._report)
        self.interrupted = False
        self.init_from: str | None = None  # where the model came from that the run began with
        self.clock, self.clock_step = 0.0, progress.step  # speed is measured from here
        self.speeds: list[float] = []  # tokens per second, of each report
        self.seconds_before = 0.0  # of earlier starts of the run
        self.notes: list[str] = []  # about memory, told at the start
        self.began = 0.0

    def fit(self, stop_after: int | None = None) -> dict[str, Any]:
        """Train to the end of the schedule, or to `stop_after` steps, saving at the end; the run's summary.

        SIGINT and SIGTERM end it after what is under way, saved. A checkpoint that can't be saved waits
        while training goes on. Raises UserError for a loss that is not finite, for want of memory, where the
        last checkpoint can't be saved in the end, or where another process trains the run.
        """
        with runs.training(self.run), self._interruptible(), self._memory_errors():
            self._started()
            self.began = self.clock = time.perf_counter()
            try:
                self._train_and_save(min(self.train.max_iters, stop_after or self.train.max_iters))
            except BaseException:
                self._report(RunEnded(self.progress.step, "failed", self._seconds))
                raise
            seconds, reason = self._seconds, self._reason()
            self._report(RunEnded(self.progress.step, reason, seconds))
        return self._summary(reason, seconds - self.seconds_before)

    def _train_and_save(self, stop: int) -> None:
        """Train to `stop` steps or an interruption; whatever ends it, what is to be saved is tried once more."""
        try:
            if self.init_from and not self.progress.step:
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
        while progress.step < stop and not self.interrupted:
            self._milestones()
            if self.interrupted:
                return
            self._step()
            if (progress.step - 1) % self.train.log_interval == 0:
                self._report_training(unread=1)
                with self._stopped_clock():
                    self.saver.retry()

    def _reason(self) -> str:
        """Why the run stopped: finished (and evaluated at its end), interrupted, or stop-after."""
        if self.progress.evaluated_at == self.progress.step >= self.train.max_iters:
            return "finished"
        return "interrupted" if self.interrupted else "stop-after"

    def _step(self) -> None:
        """Enqueue one optimizer step."""
        train, step = self.train, self.progress.step
        for micro in range(train.gradient_accumulation_steps):
            number = step * train.gradient_accumulation_steps + micro
            tokens, targets = self.batches(number)
            self.engine.forward_backward(tokens, targets, rng.digest("dropout", train.seed, number) % 2**32)
        self.unread.append(self.engine.optimizer_step(hyperparameters(train, step)))
        self.progress.step += 1

    def _batch(self, number: int) -> tuple[Array, Array]:
        """Micro-batch `number` of the run."""
        train = self.train
        return self.data.batch(number * train.batch_size, train.batch_size, self.config.block_size, train.seed)

    def _milestones(self) -> None:
        """Evaluate, sample and save where the present step asks for it."""
        train, progress = self.train, self.progress
        step = progress.step
        if train.eval_interval and step % train.eval_interval == 0 and progress.evaluated_at != step:
            improved = self._evaluate()
            if improved and step:
                self._save()
        if step and train.sample_interval and step % train.sample_interval == 0 and progress.sampled_at != step:
            self._sample()
        if step and train.checkpoint_interval and step % train.checkpoint_interval == 0:
            self._save()

    def _conclude(self) -> None:
        """Leave the run saved where it stands; and evaluated, unless somebody waits for it to end."""
        progress = self.progress
        if self.unread:
            self._report_training(unread=0)
        if progress.evaluated_at != progress.step and not self.interrupted:
            self._evaluate()
        if self.train.sample_interval and progress.sampled_at != progress.step and not self.interrupted:
            self._sample()
        self._save()

    def _report_training(self, unread: int) -> None:
        """Read all but the last `unread` updates, and report their means."""
        train, count = self.train, len(self.unread) - unread
        if count < 1:
            return
        rows = self.engine.read(self.unread[:count])
        self.unread = self.unread[count:]
        step = self.progress.step - unread
        rows = self._finite_rows(rows, step - count)
        if not len(rows):
            return
        loss, grad_norm, _ = rows.mean(axis=0)
        self.progress.train_loss = float(loss)
        now, used = time.perf_counter(), self.engine.memory()
        if self.progress.step > self.clock_step:
            self.speeds.append((self.progress.step - self.clock_step) * self._tokens_per_step / (now - self.clock))
        self.clock, self.clock_step = now, self.progress.step
        rate = train.learning_rate * learning_rate_factor(train, step - 1)
        self._report(
            Trained(
                step=step,
                loss=float(loss),
                grad_norm=float(grad_norm),
                learning_rate=rate,
                tokens=step * self._tokens_per_step,
                tokens_per_second=self.speeds[-1],
                memory_bytes=used.now,
                peak_memory_bytes=used.peak,
                skipped=self.progress.skipped,
                seconds=self._seconds,
                mfu=mfu(self.speeds[-1], self.config, self.peak),
                epoch=self._epoch(step),
                epochs=self._source_epochs(step),
            )
        )

    def _finite_rows(self, rows: Array, step: int) -> Array:
        """The rows (loss, gradient norm, 1 if skipped) of the steps after `step`, less those that were skipped.

        In float16 a gradient may be too large for the present loss scale, and the step is skipped; a loss
        that is not finite may be skipped only with `skip_nonfinite`.
        """
        for i, (loss, norm, skipped) in enumerate(rows):
            fine = (math.isfinite(loss) or self.train.skip_nonfinite) and (math.isfinite(norm) or skipped)
            self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
            if not fine or self.skipped_in_row == MOST_SKIPPED:
                what = "gradient" if math.isfinite(loss) else "loss"
                row = f", as those of the {MOST_SKIPPED - 1} before it," if fine else ""
                raise self._diverged(f"The {what} of step {step + i + 1}{row}")
        self.progress.skipped += int(rows[:, 2].sum())
        kept: Array = rows[rows[:, 2] == 0]
        return kept

    def _diverged(self, what: str) -> UserError:
        return UserError(f"{what} is not finite: lower the learning rate; {self._kept}.")

    @property
    def _kept(self) -> str:
        return "the last checkpoint is good" if self.saver.saved_at > 0 else "nothing was saved"

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """Where the device runs out of memory within the block, raise OutOfMemoryError that says what to change."""
        try:
            with self.backend.memory_errors():
                yield
        except OutOfMemoryError as error:
            advice = memory.advice(self.config, self.train, self.backend.NAME, self.device, None)
            raise OutOfMemoryError(
                f"{self.device.name} ran out of memory after {self.progress.step} steps; {self._kept}. {advice}"
            ) from error

    def _evaluate(self) -> bool:
        """Held-out loss; whether it is the best so far."""
        progress, sources = self.progress, parts(self.data)
        with self._stopped_clock():
            measured = [self._held_out(part.data) for part in sources]
        loss, size, _ = np.average(measured, axis=0, weights=[part.share for part in sources]).tolist()
        if not math.isfinite(loss):
            self._report_training(unread=0)  # which names the step where that was not finite either
            raise self._diverged(f"The held-out loss after {progress.step} steps")
        each: dict[str, SourceLoss] = {}
        if isinstance(self.data, Mixture):
            each = {part.name: SourceLoss(*_losses(*row[:2])) for part, row in zip(sources, measured, strict=True)}
        progress.evaluated_at = progress.step
        progress.val_loss, progress.val_bpb = _losses(loss, size)
        progress.sources = {name: asdict(losses) for name, losses in each.items()}
        self._compare([(part.data, part.share, row[2], row[1]) for part, row in zip(sources, measured, strict=True)])
        improved = progress.val_loss < progress.best_val_loss
        progress.best_val_loss = min(progress.val_loss, progress.best_val_loss)
        self._report(Evaluated(progress.step, progress.val_loss, progress.val_bpb, improved, self._seconds, each))
        return improved

    def _held_out(self, data: TokenDataset) -> tuple[float, float, int]:
        """Nats and bytes of text per held-out token of a source, and how many those are."""
        handles, count, size = [], 0, 0
        for tokens, targets in data.validation(self.train.batch_size, self.config.block_size, self.train.eval_iters):
            handles.append(self.engine.evaluate(tokens, targets))
            counted = targets[targets >= 0]
            count += counted.size
            size += int(data.tokenizer.byte_lengths[counted].sum())
        return float(self.engine.read(handles).sum()) / count, max(1, size) / count, count

    def _compare(self, sources: Sequence[baseline.Evaluation]) -> None:
        """Say what an n-gram reaches on the held-out tokens of an evaluation, once and not before the first step."""
        known, step = self.baseline, self.progress.step
        if step == 0 or (known and known.targets == sum(targets for _, _, targets, _ in sources)):
            return
        with self._stopped_clock():
            row = baseline.for_run(sources)
        if row:
            self.baseline = Baseline(step, row.n, row.val_loss, row.bits_per_byte, row.targets)
            self._report(self.baseline)

    def _sample(self) -> None:
        """Let the model write from the start of a document."""
        with self._stopped_clock():
            model = LanguageModel(self.config, self.data.tokenizer, self.engine.inference())
            text = model.generate("", SAMPLE_TOKENS, seed=self.train.seed)
        self.progress.sampled_at = self.progress.step
        self._report(Sampled(self.progress.step, text))

    def _save(self) -> None:
        """Checkpoint the run, unless this step has one."""
        progress = self.progress
        best = progress.evaluated_at == progress.step and progress.val_loss == progress.best_val_loss
        if self.saver.holds(progress.step):
            if best:
                self.saver.mark_best(progress.step)
            return
        self._report_training(unread=0)  # never save what was not seen to be finite
        with self._stopped_clock():
            training = {
                **progress.to_dict(),
                "tokens": progress.step * self._tokens_per_step,
                "data": self.data.fingerprint,
                "train": self.train.to_dict(),
                "backend": self.backend.NAME,
            }
            self.saver.save(Snapshot(progress.step, dict(self.engine.state()), training, best))

    def _started(self) -> None:
        train, manifest = self.train, self.data.manifest
        self._report(
            RunStarted(
                step=self.progress.step,
                max_iters=train.max_iters,
                run=str(self.run),
                backend=self.backend.NAME,
                device=self.device.name,
                dtype=train.dtype,
                parameters=parameter_count(self.config),
                tokens_per_step=self._tokens_per_step,
                data=manifest["name"],
                train_tokens=manifest["splits"]["train"]["tokens"],
                val_tokens=manifest["splits"]["val"]["tokens"],
                vocab_size=self.config.vocab_size,
                sources=self._sources(),
            )
        )
        for note in self.notes:
            self._report(MemoryPlanned(self.progress.step, note))
        if self.baseline:
            self._report(dataclasses.replace(self.baseline, step=self.progress.step))

    def _sources(self) -> dict[str, MixedSource]:
        """What a mixture is made of, by name."""
        found = {}
        for part in parts(self.data) if isinstance(self.data, Mixture) else []:
            splits = part.data.manifest["splits"]
            found[part.name] = MixedSource(part.share, splits["train"]["tokens"], splits["val"]["tokens"])
        return found

    def _epoch(self, step: int) -> float:
        """How often `step` steps go through the data."""
        return self.data.epochs(step * self._windows_per_step, self.config.block_size)

    def _source_epochs(self, step: int) -> dict[str, float]:
        """How often they go through each source of a mixture."""
        if not isinstance(self.data, Mixture):
            return {}
        return self.data.source_epochs(step * self._windows_per_step, self.config.block_size, self.train.seed)

    def _summary(self, reason: str, seconds: float) -> dict[str, Any]:
        progress, speed = self.progress, float(np.median(self.speeds)) if self.speeds else None
        return {
            "run": str(self.run),
            "checkpoint": str(runs.checkpoint_folder(self.run, progress.step)),
            "backend": self.backend.NAME,
            "device": self.device.name,
            "dtype": self.train.dtype,
            "step": progress.step,
            "max_iters": self.train.max_iters,
            "reason": reason,
            "train_loss": _finite(progress.train_loss),
            "val_loss": progress.val_loss,
            "val_bpb": progress.val_bpb,
            "best_val_loss": progress.best_val_loss,
            "baseline": self.baseline
            and {key: getattr(self.baseline, key) for key in ("n", "val_loss", "bits_per_byte")},
            "tokens_per_second": speed,
            "mfu": mfu(speed, self.config, self.peak) if speed else None,
            "peak_memory_bytes": self.engine.memory().peak,
            "skipped": progress.skipped,
            "epoch": self._epoch(progress.step),
            "sources": self._source_summary(),
            "seconds": seconds,
        }

    def _source_summary(self) -> dict[str, dict[str, float]]:
        """Share, epochs and held-out loss of each source of a mixture."""
        epochs, losses = self._source_epochs(self.progress.step), self.progress.sources
        return {
            name: {"share": source.share, "epoch": epochs[name], **losses.get(name, {})}
            for name, source in self._sources().items()
        }

    @property
    def _windows_per_step(self) -> int:
        return self.train.batch_size * self.train.gradient_accumulation_steps

    @property
    def _tokens_per_step(self) -> int:
        return self._windows_per_step * self.config.block_size

    @property
    def _seconds(self) -> float:
        """How long the run has taken, over all its starts."""
        return self.seconds_before + time.perf_counter() - self.began

    def _report(self, event: Event) -> None:
        """Send an event to every reporter, and to the rest where one fails: no report is worth the run."""
        for reporter in tuple(self.reporters):
            try:
                reporter.report(event)
                self.saver.troubles.discard(reporter)
            except OSError as error:
                what = error.filename or type(reporter).__name__
                self.saver.trouble(reporter, self.progress.step, f"{what} can't be written ({error.strerror})")
            except Exception as error:
                self.reporters = [other for other in self.reporters if other is not reporter]
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                self._report(ReporterFailed(self.progress.step, type(reporter).__name__, why))

    @contextmanager
    def _stopped_clock(self) -> Iterator[None]:
        """Leave the time of the block out of the training speed."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks to stop after what is under way; the next one acts as usual."""
        previous: dict[int, Any] = {}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def stop(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            restore()

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                previous[number] = signal.signal(number, stop)
            except ValueError:  # not in the main thread: whoever runs the thread stops it
                break
        try:
            yield
        finally:
            restore()


def _losses(nats: float, size: float) -> tuple[float, float]:
    """Nats per token, and bits per byte, of nats and bytes per token."""
    return nats, nats / math.log(2) / size


def _finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
