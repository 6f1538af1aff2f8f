"""Ctrl-C and SIGTERM, or Windows' Ctrl-Break: a wish to stop that the training loop asks for between steps."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform == "win32":
    SIGNALS.append(signal.SIGBREAK)


class Interrupt:
    """A context in which the first of SIGNALS sets `requested`; the next one acts as usual."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal that came
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM; 0 if none came."""
        return 0 if self.number is None else 128 + self.number

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:  # not in the main thread: whoever runs the thread stops it
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
