"""Prefetching: the next batch is gathered on a thread while the device computes this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Gathers the next batch on a thread while the device computes this one (NumPy only, so no MLX stream crosses it).

    `gather(number)` makes a batch. Numbers asked for in order are prefetched, any other is gathered when asked for;
    what `gather` raises is raised where its number is asked for.
    """

    def __init__(self, gather: Callable[[int], T]) -> None:
        self.gather = gather
        self.thread = ThreadPoolExecutor(1, "prefetch")
        self.next: tuple[int, Future[T]] | None = None

    def __call__(self, number: int) -> T:
        """Batch `number`; that of `number + 1` begins to be gathered."""
        batch = self.next[1].result() if self.next and self.next[0] == number else self.gather(number)
        self.next = number + 1, self.thread.submit(self.gather, number + 1)
        return batch
