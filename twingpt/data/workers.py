"""Worker processes: documents to token ids on all cores, with results in the order of the documents."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice

import numpy as np
import psutil

from twingpt.backends.host import end_with_parent
from twingpt.core.errors import UserError
from twingpt.core.tokenizer import Tokenizer
from twingpt.core.tokenizer.base import END_OF_TEXT
from twingpt.data import documents
from twingpt.data.documents import DocumentPiece, Item, pieces
from twingpt.data.shards import SPLITS
from twingpt.data.spelling import Spelling, Unspelled
from twingpt.data.split import DEFAULT, Split

Array = np.ndarray

SMALL = 16  # chunks of documents.PIECE characters; fewer are encoded before another process has started
PROCESSES = 4  # at most; each takes some 70 MB, and threads within use the cores left


@dataclass
class EncodedChunk:
    """The tokens of a chunk of documents, as bytes in the shard's dtype, and counts; all by split.

    `bytes` are those of the text, `token_bytes` those that its tokens have: others where a tokenizer can't spell it.
    """

    tokens: dict[str, bytes] = field(default_factory=lambda: dict.fromkeys(SPLITS, b""))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    characters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    token_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    empty: int = 0  # documents without text, which are left out
    bad: list[str] = field(default_factory=list)  # what is wrong with records that are left out
    n_tokens: int = 0
    unspelled: Unspelled = field(default_factory=Unspelled)
    ends: int = 0  # spellings of END_OF_TEXT, which are text
    separated: bool = False  # whether a line that ends documents was found

    def count(self, other: EncodedChunk) -> None:
        """Add another chunk's counts, not its tokens."""
        for split in SPLITS:
            self.characters[split] += other.characters[split]
            self.documents[split] += other.documents[split]
        self.empty += other.empty
        self.bad += other.bad
        self.unspelled += other.unspelled
        self.n_tokens += other.n_tokens
        self.ends += other.ends
        self.separated |= other.separated


@dataclass(frozen=True)
class ChunkEncoder:
    """Splits, encodes and counts a chunk of documents; without a tokenizer it only counts.

    `held_out` says which of them are, or which part of each.
    """

    tokenizer: Tokenizer | None
    dtype: str
    held_out: Split = DEFAULT

    def __call__(self, chunk: Iterable[Item]) -> EncodedChunk:
        """The chunk's tokens and counts."""
        result = EncodedChunk()
        arrays: dict[str, list[Array]] = {split: [np.empty(0, np.int32)] for split in SPLITS}
        for item in chunk:
            result.separated |= isinstance(item, DocumentPiece) and item.separated
            for text, split, ends in self.split(item, result):
                result.characters[split] += len(text)
                result.documents[split] += ends
                if self.tokenizer:
                    result.bytes[split] += len(text.encode())
                    result.ends += text.count(END_OF_TEXT)
                    arrays[split] += [self._encode(piece, result) for piece, _ in pieces([text])]
                    arrays[split] += [np.array([self.tokenizer.end_of_text], np.int32)] * ends
        if self.tokenizer:
            for split in SPLITS:
                ids = np.concatenate(arrays[split])
                result.n_tokens += len(ids)
                result.token_bytes[split] = int(self.tokenizer.byte_lengths[ids].sum())
                result.tokens[split] = ids.astype(self.dtype).tobytes()
        return result

    def _encode(self, text: str, result: EncodedChunk) -> Array:
        assert self.tokenizer
        ids = self.tokenizer.encode(text)
        if self._spelling:
            result.unspelled += self._spelling.count(text, ids)
        return ids

    @cached_property
    def _spelling(self) -> Spelling | None:
        return Spelling.of(self.tokenizer) if self.tokenizer else None

    def split(self, item: Item, result: EncodedChunk) -> Iterator[tuple[str, str, bool]]:
        """The texts of an item, each with its split and whether its document ends there; empty ones are counted."""
        if isinstance(item, DocumentPiece) and item.split:
            yield item.text, item.split, item.ends
            return
        for document in item.documents(result.bad):
            if not document.strip():
                result.empty += 1
            elif self.held_out.tails:
                cut = self.held_out.tail_start(len(document))
                yield document[:cut], "train", True
                yield document[cut:], "val", True
            else:
                yield document, self.held_out.of(document), True


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in chunks of some documents.PIECE characters, each of which is one task."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += len(item)
        if size >= documents.PIECE or len(chunk) >= 10_000:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def cores() -> int:
    """The cores that this process may use."""
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def run(encode: ChunkEncoder, items: Iterable[Item], n_cores: int) -> Iterator[EncodedChunk]:
    """Encode the items in chunks, in order: in this process if they are few, else on so many cores.

    The result does not depend on the cores. At most some megabytes wait at any time.
    """
    todo = chunks(items)
    head = list(islice(todo, SMALL)) if n_cores > 1 else []
    if len(head) < SMALL:
        yield from map(encode, chain(head, todo))
    else:
        yield from _run_in_pool(encode, chain(head, todo), n_cores)


def _run_in_pool(encode: ChunkEncoder, todo: Iterator[list[Item]], n_cores: int) -> Iterator[EncodedChunk]:
    import multiprocessing

    processes = min(n_cores, PROCESSES)
    threads = -(-n_cores // processes)
    size = 1 if threads == 1 else 2 * threads  # so that no thread waits long for the slowest
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encode, threads)
    )
    waiting: deque[Future[list[EncodedChunk]]] = deque()
    try:
        while True:
            while len(waiting) < 2 * processes and (batch := list(islice(todo, size))):
                waiting.append(pool.submit(_encode_batch, batch))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("A process that encodes text was killed, perhaps for want of memory: try again.") from None
    finally:
        pool.shutdown(cancel_futures=True)


# Of a worker process, set when it starts.
_encode: ChunkEncoder
_threads: ThreadPoolExecutor


def _start_worker(encode: ChunkEncoder, threads: int) -> None:
    """Make a worker ready; it leaves Ctrl-C to its parent, and exits when that has, killed or not."""
    global _encode, _threads
    _encode, _threads = encode, ThreadPoolExecutor(threads)
    end_with_parent()


def _encode_batch(batch: list[list[Item]]) -> list[EncodedChunk]:
    return list(_threads.map(_encode, batch))


class PeakMemory:
    """Peak resident bytes of this process and its children together, sampled twice a second."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def watch(self) -> Iterator[PeakMemory]:
        """Sample while the block runs, and once when it ends."""
        done = threading.Event()

        def sample() -> None:
            self._sample()
            while not done.wait(0.5):
                self._sample()
            self._sample()

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        total = 0
        for process in (me, *me.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:  # it has ended meanwhile
                continue
        self.bytes = max(self.bytes, total)
