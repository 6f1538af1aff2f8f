"""Decompression: whatever gzip, zstd, bzip2 and xz write, streamed in bounded memory, known by how it begins."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import psutil

from twingpt.core.errors import UserError
from twingpt.runs.units import human_bytes

BLOCK = 2**20  # bytes read, and yielded, at a time
SMALL_STEP = 2**10  # compressed bytes that a decompressor is fed where they may hold many streams, or a bomb

GZIP, XZ, LZMA = b"\x1f\x8b", b"\xfd7zXZ\0", b"\x5d\0\0"
LONGEST_HEADER = 13  # of .lzma: properties, size of the dictionary, and of the content
# A stream's first bytes, by the suffix of its format; those of bzip2 with a block's, as text may begin with BZh9.
MAGIC = (
    (GZIP, ".gz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (XZ, ".xz"),
    *((b"BZh%d" % level + block, ".bz2") for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
)
LONGEST_MAGIC = max(len(magic) for magic, _ in MAGIC)
NOT_ZERO = re.compile(rb"[^\0]|\Z")
SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lzma")


def decompress(file: Any, suffix: str) -> Iterator[bytes]:
    """The content of a buffered binary file in blocks, decompressed where it begins as a stream.

    It is one also where its `suffix` says so. Raises EOFError, OSError or zlib.error for a damaged stream, and for one
    that takes more than `most_memory`; UserError where zstandard is not installed.
    """
    begins = file.peek(LONGEST_MAGIC)
    suffix = next((known for magic, known in MAGIC if begins.startswith(magic)), suffix)
    memory = most_memory()
    try:
        yield from DECOMPRESSORS.get(suffix, _plain)(file)
    except MemoryError:
        raise OSError(
            f"decompressing it takes more than {human_bytes(memory)} of memory; compress it anew with a smaller window"
        ) from None


def most_memory() -> int:
    """Bytes that a decompressor's window may take: those of zstd --long=31, as dumps have, where they are free."""
    return min(2**31, int(psutil.virtual_memory().available))


def _plain(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


class _Gunzip:
    """zlib's decompressor of one gzip member, as bz2's and lzma's are used."""

    def __init__(self) -> None:
        self.member, self.needs_input = zlib.decompressobj(31), True

    def decompress(self, content: bytes, most: int) -> bytes:
        """At most so many bytes; `needs_input` says whether those are all that there are now."""
        found = self.member.decompress(self.member.unconsumed_tail + content, most)
        self.needs_input = len(found) < most
        return found

    def __getattr__(self, name: str) -> Any:  # eof and unused_data
        return getattr(self.member, name)


def _streams(file: IO[bytes], new: Callable[[], Any], begins: Callable[[bytes], bool]) -> Iterator[bytes]:
    """The streams of a file one after another, each by a decompressor that `new` makes.

    After one, zeros are ignored, and all from where no other one `begins`, as gzip does.
    """
    stream, within, ended = new(), False, False
    for block in _plain(file):
        start, step = 0, BLOCK
        while start < len(block):
            if not within:
                start = NOT_ZERO.search(block, start).start() if ended else start  # type: ignore[union-attr]
                if start == len(block):
                    break
                if ended and not begins(block[start : start + LONGEST_HEADER]):
                    return
            within, fed = True, min(len(block), start + step)
            yield stream.decompress(block[start:fed], BLOCK)
            while not (stream.eof or stream.needs_input):
                yield stream.decompress(b"", BLOCK)
            start, step = fed - len(stream.unused_data), min(2 * step, BLOCK)
            if stream.eof:  # what is unused is copied, so that of tiny streams fed by the block time would be quadratic
                stream, within, ended, step = new(), False, True, SMALL_STEP
    if within:
        raise EOFError("its compressed stream does not end")


def _gunzip(file: Any) -> Iterator[bytes]:
    if not GZIP.startswith(begins := file.peek(len(GZIP))[: len(GZIP)]):
        raise OSError(f"Not a gzipped file ({begins!r})")
    yield from _streams(file, _Gunzip, lambda head: GZIP.startswith(head[: len(GZIP)]))


def _bunzip2(file: IO[bytes]) -> Iterator[bytes]:
    import bz2

    return _streams(file, bz2.BZ2Decompressor, lambda head: b"BZh".startswith(head[:3]))


def _begins_xz(head: bytes) -> bool:
    """Whether a stream of xz begins so, or one of .lzma, which has no magic bytes, but few sizes of a dictionary.

    Of what a block cuts off within the header of the latter, only its usual beginning is known.
    """
    if XZ.startswith(head[: len(XZ)]):
        return True
    if len(head) < LONGEST_HEADER:
        return head.startswith(LZMA[: len(head)])
    properties, dictionary, size = struct.unpack("<BIQ", head)
    powers = [2**n for n in range(32)]
    fits = dictionary in (*powers, *(3 * power for power in powers), 2**32 - 1)
    return fits and properties < 9 * 5 * 5 and (size < 2**38 or size == 2**64 - 1)


def _unxz(file: IO[bytes]) -> Iterator[bytes]:
    import lzma

    memory = most_memory()
    try:
        yield from _streams(file, lambda: lzma.LZMADecompressor(memlimit=memory), _begins_xz)
    except lzma.LZMAError as error:
        if "Memory usage limit" in str(error):
            raise MemoryError from None
        raise EOFError(str(error)) from None


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError('Reading .zst needs zstandard: pip install "twingpt[data]", or decompress it first.') from None

    decompressor = zstandard.ZstdDecompressor(max_window_size=most_memory())  # by default a frame of 128 MB is refused

    try:
        yield from _joined(_zstd_frames(file, decompressor.decompressobj))
    except zstandard.ZstdError as error:
        if "ictionary" in str(error):
            raise OSError(
                "it needs the dictionary that it was compressed with: decompress it first (zstd -D)"
            ) from None
        if "memory" in str(error):
            raise MemoryError from None
        raise EOFError(str(error)) from None


def _zstd_frames(file: IO[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Decompressed a kilobyte at a time, as that may already hold 32 MB of a single letter; skippable frames too."""
    frame, begun = decompressor(), False
    for block in _plain(file):
        for start in range(0, len(block), SMALL_STEP):
            rest = block[start : start + SMALL_STEP]
            while rest:
                yield frame.decompress(rest)
                rest, begun = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = decompressor()
    if begun:
        raise EOFError("its compressed stream does not end")


def _joined(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of BLOCK or more."""
    buffer: list[bytes] = []
    size = 0
    for part in parts:
        buffer.append(part)
        size += len(part)
        if size >= BLOCK:
            yield b"".join(buffer)
            buffer, size = [], 0
    yield b"".join(buffer)


DECOMPRESSORS = {".gz": _gunzip, ".zst": _unzstd, ".bz2": _bunzip2, ".xz": _unxz, ".lzma": _unxz}
