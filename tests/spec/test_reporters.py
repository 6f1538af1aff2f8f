"""Reporters that fail: an OSError is said once until it works again, anything else drops the reporter."""

from twingpt.runs.events import ReporterFailed, Sampled, SaveFailed
from twingpt.runs.reporters import Reporters


class Heard:
    """Notes each event; raises `error` instead while there is one."""

    def __init__(self):
        self.events, self.error = [], None

    def report(self, event):
        if self.error:
            raise self.error
        self.events.append(event)


def test_an_os_error_is_said_once_and_again_after_it_worked():
    breaks, hears = Heard(), Heard()
    reporters = Reporters([breaks, hears], lambda: 7)
    for step, broken in enumerate((True, True, False, True)):
        breaks.error = OSError(28, "No space left on device", "loss.svg") if broken else None
        reporters.report(Sampled(step, ""))
    said = SaveFailed(7, "loss.svg can't be written (No space left on device)")
    assert hears.events == [said, Sampled(0, ""), Sampled(1, ""), Sampled(2, ""), said, Sampled(3, "")]
    assert breaks.events == [Sampled(2, "")]


def test_another_error_drops_the_reporter():
    breaks, hears = Heard(), Heard()
    breaks.error = RuntimeError("the server\nis gone")
    reporters = Reporters([breaks, hears], lambda: 7)
    reporters.report(Sampled(1, ""))
    breaks.error = None
    reporters.report(Sampled(2, ""))
    failed = ReporterFailed(7, "Heard", "RuntimeError: the server")
    assert hears.events == [failed, Sampled(1, ""), Sampled(2, "")] and breaks.events == []
