"""What a run reports: typed events, sent to any number of reporters."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twingpt.core.paths import write_atomically


@dataclass(frozen=True)
class RunStarted:
    """The run begins, or goes on, after `step` of `max_iters` steps."""

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


@dataclass(frozen=True)
class Trained:
    """`step` steps are done. The loss (nats per token) and gradient norm are means since the last report.

    `seconds` is the run's time so far, over all its starts.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    memory_bytes: int
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """Held-out loss after `step` steps and `seconds`, in nats per token and in bits per byte of text."""

    step: int
    val_loss: float
    val_bpb: float
    best: bool
    seconds: float


@dataclass(frozen=True)
class Sampled:
    """Text that the model wrote after `step` steps."""

    step: int
    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint is safe on the disk."""

    step: int
    checkpoint: str


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


Event = RunStarted | Trained | Evaluated | Sampled | Saved | RunEnded | ReporterFailed


class Reporter(Protocol):
    """Anything that wants to hear of a run."""

    def report(self, event: Event) -> None:
        """Take note of an event."""


def to_dict(event: Event) -> dict[str, Any]:
    """An event as JSON values, its type's name in snake case under "event"."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    return {"event": name, **dataclasses.asdict(event)}


class JSONLReporter:
    """metrics.jsonl: one event a line, flushed as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def report(self, event: Event) -> None:
        """Append an event."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_dict(event)) + "\n")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a metrics.jsonl; what is none, as a last line cut short by a crash, is left out."""
    if not path.is_file():
        return
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and isinstance(event.get("step"), int):
            yield event


def forget_after(path: Path, step: int) -> None:
    """Drop the events past `step`, which a run resumed from there will report again."""
    kept = [event for event in read_events(path) if event["step"] <= step and event["event"] != "run_ended"]
    write_atomically(path, "".join(json.dumps(event) + "\n" for event in kept))


def seconds_so_far(path: Path) -> float:
    """How long the run of a metrics.jsonl had taken at its last event that says so."""
    return max((event["seconds"] for event in read_events(path) if _is_number(event.get("seconds"))), default=0.0)


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
    return next((count for count in counts if isinstance(count, int)), 0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
