"""Batches made by a thread, one ahead of the one asked for, so that no step waits for its input."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(number)` for numbers asked for in order: while one is used, the next one is made.

    What `make` raises is raised where that number is asked for. Any other number is made when asked for.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self.make = make
        self.thread = ThreadPoolExecutor(1, "batches")
        self.next: tuple[int, Future[T]] | None = None

    def __call__(self, number: int) -> T:
        """The result for `number`."""
        made = self.next[1].result() if self.next and self.next[0] == number else self.make(number)
        self.next = number + 1, self.thread.submit(self.make, number + 1)
        return made
