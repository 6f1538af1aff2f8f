"""Sending a run's events to all of its reporters, whatever becomes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from twingpt.runs.events import Event, JSONLReporter, Reporter, ReporterFailed, SaveFailed
from twingpt.runs.plot import PlotReporter
from twingpt.runs.report import HTMLReporter


def folder_reporters(run: Path) -> list[Reporter]:
    """The reporters that write metrics.jsonl, loss.svg and report.html into a run's folder."""
    return [JSONLReporter(run / "metrics.jsonl"), PlotReporter(run), HTMLReporter(run)]


class Reporters:
    """Sends each event to every reporter, and to the rest where one fails: no report is worth the run.

    An OSError is reported as SaveFailed, once until the reporter works again; any other exception as
    ReporterFailed, and that reporter is dropped. Both are of the step that `step()` gives.
    """

    def __init__(self, reporters: Iterable[Reporter], step: Callable[[], int]) -> None:
        self.reporters, self.step = list(reporters), step
        self.failing: set[Reporter] = set()  # whose last event failed with an OSError

    def report(self, event: Event) -> None:
        """Send an event to every reporter."""
        for reporter in tuple(self.reporters):
            try:
                reporter.report(event)
                self.failing.discard(reporter)
            except OSError as error:
                if reporter not in self.failing:
                    self.failing.add(reporter)
                    what = error.filename or type(reporter).__name__
                    self.report(SaveFailed(self.step(), f"{what} can't be written ({error.strerror})"))
            except Exception as error:
                self.reporters = [other for other in self.reporters if other is not reporter]
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                self.report(ReporterFailed(self.step(), type(reporter).__name__, why))
