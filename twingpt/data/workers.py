"""Documents to token ids on all cores: a few processes with some threads each, results in the order of the text."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from twingpt.core import rng
from twingpt.core.errors import UserError
from twingpt.core.tokenizer import Tokenizer
from twingpt.data import readers
from twingpt.data.readers import Item, Text, pieces

SPLITS = ("train", "val")
VAL_FRACTION = 0.1

SMALL = 16  # chunks of readers.PIECE characters; less is done before another process has started
PROCESSES = 4  # at most; each takes some 70 MB, and threads within make up for the cores left


def place(head: str) -> str:
    """The split of the document that begins with `head`: by its hash, so that adding others moves none."""
    key = rng.digest("val", head[: readers.PIECE // 2])
    return "val" if key % 10_000 < VAL_FRACTION * 10_000 else "train"


@dataclass
class Encoded:
    """Some documents' tokens, as the bytes of a shard, and what was counted on the way; all by split."""

    tokens: dict[str, bytes] = field(default_factory=lambda: dict.fromkeys(SPLITS, b""))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    characters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    empty: int = 0  # documents without text, which are left out
    n_tokens: int = 0

    def count(self, other: Encoded) -> None:
        """Add the counts of what comes next, not its tokens."""
        for mine, others in ((self.characters, other.characters), (self.documents, other.documents)):
            for split in SPLITS:
                mine[split] += others[split]
        self.empty += other.empty
        self.n_tokens += other.n_tokens


@dataclass(frozen=True)
class Work:
    """What is done to a chunk of documents: split, encode, count. Without a tokenizer it only counts.

    With `tails`, the last tenth of each document is held out; else whole documents are, by their hash.
    """

    tokenizer: Tokenizer | None
    dtype: str
    tails: bool

    def __call__(self, chunk: Iterable[Item]) -> Encoded:
        """The chunk's tokens and counts."""
        result = Encoded()
        parts: dict[str, list[Any]] = {split: [] for split in SPLITS}
        for item in chunk:
            for text, split, ends in self.parts(item, result):
                result.characters[split] += len(text)
                result.documents[split] += ends
                if self.tokenizer:
                    parts[split] += self._encode(text, ends, self.tokenizer)
        if self.tokenizer:
            for split in SPLITS:
                ids = np.concatenate([np.empty(0, np.int32), *parts[split]])
                result.n_tokens += len(ids)
                result.bytes[split] = int(self.tokenizer.byte_lengths[ids].sum())
                result.tokens[split] = ids.astype(self.dtype).tobytes()
        return result

    def parts(self, item: Item, result: Encoded) -> Iterator[tuple[str, str, bool]]:
        """The texts of an item, each with its split, and whether that is where its document ends there."""
        if isinstance(item, Text) and item.split:
            yield item.text, item.split, item.ends
            return
        for document in item.documents():
            if not document.strip():
                result.empty += 1
            elif self.tails:
                cut = tail(len(document))
                yield document[:cut], "train", True
                yield document[cut:], "val", True
            else:
                yield document, place(document), True

    @staticmethod
    def _encode(text: str, ends: bool, tokenizer: Tokenizer) -> Iterator[Any]:
        for piece, _ in pieces([text]):
            yield tokenizer.encode(piece)
        if ends:
            yield np.array([tokenizer.end_of_text], np.int32)


def tail(length: int) -> int:
    """Where the held-out tail of a document of `length` characters begins."""
    return int(length * (1 - VAL_FRACTION))


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items together, until they have readers.PIECE characters."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += len(item)
        if size >= readers.PIECE or len(chunk) >= 10_000:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def run(work: Work, items: Iterable[Item], n_cores: int) -> Iterator[Encoded]:
    """`work` done on the items in chunks, in order: here if they are few, else on so many cores.

    The result does not depend on the cores. At most some megabytes wait at any time.
    """
    todo = chunks(items)
    head = list(islice(todo, SMALL)) if n_cores > 1 else []
    if len(head) < SMALL:
        yield from map(work, chain(head, todo))
    else:
        yield from _run_in_pool(work, chain(head, todo), n_cores)


def _run_in_pool(work: Work, todo: Iterator[list[Item]], n_cores: int) -> Iterator[Encoded]:
    import multiprocessing

    processes = min(n_cores, PROCESSES)
    threads = -(-n_cores // processes)
    size = 1 if threads == 1 else 2 * threads  # so that no thread waits long for the slowest
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(work, threads)
    )
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        while True:
            while len(waiting) < 2 * processes and (batch := list(islice(todo, size))):
                waiting.append(pool.submit(_work_on, batch))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("A process that encodes text was killed, perhaps for want of memory: try again.") from None
    finally:
        pool.shutdown(cancel_futures=True)


_work: Work
_threads: ThreadPoolExecutor


def _start(work: Work, threads: int) -> None:
    """Make a worker ready; it leaves Ctrl-C to its parent, and ends when that is gone, killed or not."""
    import multiprocessing

    global _work, _threads
    _work, _threads = work, ThreadPoolExecutor(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work_on(batch: list[list[Item]]) -> list[Encoded]:
    return list(_threads.map(_work, batch))


class PeakMemory:
    """Resident bytes of this process and its children together, at their highest; looked at twice a second."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def watch(self) -> Iterator[PeakMemory]:
        """Look on while the block runs."""
        done = threading.Event()

        def look() -> None:
            self._look()
            while not done.wait(0.5):
                self._look()
            self._look()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()

    def _look(self) -> None:
        import psutil

        me = psutil.Process()
        total = 0
        for process in (me, *me.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:  # it has ended meanwhile
                continue
        self.bytes = max(self.bytes, total)
