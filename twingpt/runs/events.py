"""Events of a run: typed, sent to any number of reporters, and kept in metrics.jsonl."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from twingpt.core.paths import naming, write_atomically

WAITING_EVENTS = 10_000  # at most kept in memory while they can't be written, the oldest dropped first
LARGEST = 1e100  # a number in an event that is drawn or printed


@dataclass(frozen=True)
class MixedSource:
    """A source of a mixture: its share of the windows trained on, and its tokens."""

    share: float
    train_tokens: int
    val_tokens: int


@dataclass(frozen=True)
class SourceLoss:
    """Held-out loss of one source of a mixture, in nats per token and in bits per byte of text."""

    val_loss: float
    val_bpb: float


@dataclass(frozen=True)
class RunStarted:
    """Training begins, or resumes, after `step` of `max_iters` steps; `sources` are a mixture's, by name.

    `dtype_why` is why the device trains in `dtype` by default, where that is its chip's.
    """

    step: int
    max_iters: int
    run: str
    backend: str
    device: str
    dtype: str
    parameters: int
    tokens_per_step: int
    data: str
    train_tokens: int
    val_tokens: int
    vocab_size: int
    sources: dict[str, MixedSource] = field(default_factory=dict)
    dtype_why: str = ""


@dataclass(frozen=True)
class Trained:
    """Training metrics after `step` steps; loss (nats per token) and gradient norm are means since the last report.

    `memory_bytes` are in use, and `cached_memory_bytes` are freed ones beside them that the framework keeps for reuse,
    None on a CPU. `skipped` counts the run's steps that were left out, because they were not finite.
    `seconds` is the run's time so far, over all its starts. `mfu` is the share of the device's
    peak that the model's own arithmetic makes up, None where no peak is known. `epoch` is how often the
    run has gone through its data so far, and `epochs` through each source of a mixture.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    memory_bytes: int
    peak_memory_bytes: int
    skipped: int
    seconds: float
    mfu: float | None = None
    epoch: float | None = None
    epochs: dict[str, float] = field(default_factory=dict)
    cached_memory_bytes: int | None = None


@dataclass(frozen=True)
class Evaluated:
    """Held-out loss after `step` steps and `seconds`, in nats per token and in bits per byte of text.

    Of a mixture these are the means over its sources by their shares of the tokens trained on, and
    `sources` has each one's own, by name.
    """

    step: int
    val_loss: float
    val_bpb: float
    best: bool
    seconds: float
    sources: dict[str, SourceLoss] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """Held-out loss of the best n-gram model, counted on the training tokens, over the `targets` of an evaluation.

    Of a mixture each source has n-grams of its own, and the loss is their mean as in `Evaluated`.
    Each start of a run says it once: before its first evaluation after a step, or at once when it goes on
    and it is known. metrics.jsonl keeps the last.
    """

    step: int
    n: int
    val_loss: float
    bits_per_byte: float
    targets: int


@dataclass(frozen=True)
class Sampled:
    """Text that the model wrote after `step` steps."""

    step: int
    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written and synced to the disk."""

    step: int
    checkpoint: str


@dataclass(frozen=True)
class SaveFailed:
    """Something of the run can't be written for now, as `message` says in a sentence; training goes on.

    It is reported once, and again only if it fails after having worked.
    """

    step: int
    message: str


@dataclass(frozen=True)
class RunEnded:
    """The run stopped after `step` steps and `seconds`; `reason` is finished, stop-after, interrupted or failed."""

    step: int
    reason: str
    seconds: float


@dataclass(frozen=True)
class ReporterFailed:
    """A reporter raised `error`, and hears no more of the run, which goes on."""

    step: int
    reporter: str
    error: str


@dataclass(frozen=True)
class MemoryPlanned:
    """How the run was changed to fit the device's free memory, or why it may not fit, as `message` says."""

    step: int
    message: str


@dataclass(frozen=True)
class MachineNoted:
    """What there is of the machine while the run trains, as `message` says: it is kept awake, or others use it."""

    step: int
    message: str


@dataclass(frozen=True)
class DataNoted:
    """What was noted of the run's data as they were prepared, as `message` says: what is left out or not spelled."""

    step: int
    message: str


@dataclass(frozen=True)
class DeviceNoted:
    """What was noted of the run's model on its device, as `message` says: heads without a fused kernel."""

    step: int
    message: str


@dataclass(frozen=True)
class SettingReplaced:
    """What the run was started with isn't available now, and what takes its place, as `message` says."""

    step: int
    message: str


@dataclass(frozen=True)
class SetAside:
    """The run goes on from an earlier `step`, and what lay after it is now a run of its own in `folder`."""

    step: int
    folder: str


Event = (
    RunStarted
    | MemoryPlanned
    | MachineNoted
    | DataNoted
    | DeviceNoted
    | SettingReplaced
    | SetAside
    | Trained
    | Evaluated
    | Baseline
    | Sampled
    | Saved
    | SaveFailed
    | RunEnded
    | ReporterFailed
)


class Reporter(Protocol):
    """Receives the events of a run."""

    def report(self, event: Event) -> None:
        """Receive an event.

        An OSError is told to the user, and the next event tried; after any other exception the reporter
        hears no more. Neither stops anything.
        """


def to_dict(event: Event) -> dict[str, Any]:
    """An event as JSON values, its type's name in snake case under "event"."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    return {"event": name, **dataclasses.asdict(event)}


class JSONLReporter:
    """metrics.jsonl: one event a line, written as it comes; what can't be written waits for a later event."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: deque[bytes] = deque(maxlen=WAITING_EVENTS)
        self.whole: int | None = None  # how much of the file is whole lines, after a write that failed

    def report(self, event: Event) -> None:
        """Append an event after those that wait, or keep it with them and raise OSError."""
        self.waiting.append((json.dumps(to_dict(event)) + "\n").encode())
        with naming(self.path), self.path.open("ab") as file:
            if self.whole is not None:
                file.truncate(min(self.whole, file.tell()))
            self.whole = file.seek(0, os.SEEK_END)
            file.write(b"".join(self.waiting))
            file.flush()
            if isinstance(event, Saved):  # a checkpoint that outlives a power cut has its events with it
                os.fsync(file.fileno())
        self.whole = None
        self.waiting.clear()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a metrics.jsonl; what is none, as a last line cut short by a crash, is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str) and _is_step(event.get("step")):
                yield event


def rewind(path: Path, saved: Saved, again: Collection[str]) -> None:
    """Make a metrics.jsonl what it was when `saved` happened: drop what a run resumed from there will report again.

    Those are the later events, each end and baseline, and of the same step those called as `again` says.
    `saved` itself is added where a crash came between the checkpoint and its event.
    """
    dropped = ("run_ended", "baseline")
    events = [event for event in read_events(path) if event["step"] <= saved.step and event["event"] not in dropped]
    kept = [event for event in events if event["step"] < saved.step or event["event"] not in again]
    if not any(event["event"] == "saved" and event["step"] == saved.step for event in kept):
        kept.append(to_dict(saved))
    write_atomically(path, "".join(json.dumps(event) + "\n" for event in kept))


def seconds_so_far(path: Path) -> float:
    """How long the run of a metrics.jsonl had taken at its last event that says so."""
    return max((event["seconds"] for event in read_events(path) if _is_number(event.get("seconds"))), default=0.0)


def last_baseline(events: Iterable[dict[str, Any]]) -> Baseline | None:
    """The last baseline among a run's events, where one is whole."""
    for event in reversed([event for event in events if event["event"] == "baseline"]):
        values = {field.name: event.get(field.name) for field in dataclasses.fields(Baseline)}
        if all(_is_number(value) for value in values.values()):
            return Baseline(**values)
    return None


def points(events: Iterable[dict[str, Any]], kind: str, field: str, x: str = "step") -> list[tuple[float, float]]:
    """The curve of `field` in the events of a kind, over "step", "tokens" or "time" (seconds).

    An event that lacks either number is left out.
    """
    events = list(events)
    scale = tokens_per_step(events) if x == "tokens" else 1
    key = "seconds" if x == "time" else "step"
    found = [(event.get(key), event.get(field)) for event in events if event["event"] == kind]
    return [(a * scale, b) for a, b in found if scale and _is_number(a) and _is_number(b)]  # type: ignore[operator,misc]


def tokens_per_step(events: Iterable[dict[str, Any]]) -> int:
    """The tokens of each step of a run, or 0 where no event says it."""
    counts = (event.get("tokens_per_step") for event in events if event["event"] == "run_started")
    return next((count for count in counts if isinstance(count, int) and _is_number(count) and count > 0), 0)


def _is_number(value: object) -> bool:
    """Whether it is a number that can be drawn, as one of hundreds of digits can't."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_step(value: object) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 0
