"""Decompression: whatever gzip, zstd, bzip2 and xz write, streamed in bounded memory, known by how it begins."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from twingpt.core.errors import UserError

BLOCK = 2**20  # bytes read, and yielded, at a time

# A stream's first bytes, by the suffix of its format; those of bzip2 with a block's, as text may begin with BZh9.
MAGIC = (
    (b"\x1f\x8b", ".gz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"\xfd7zXZ\0", ".xz"),
    *((b"BZh%d" % level + block, ".bz2") for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
)
LONGEST_MAGIC = max(len(magic) for magic, _ in MAGIC)
SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lzma")


def decompress(file: Any, suffix: str) -> Iterator[bytes]:
    """The content of a buffered binary file in blocks, decompressed where it begins as a stream.

    It is one also where its `suffix` says so. Raises EOFError, OSError or zlib.error for a damaged stream, UserError
    where zstandard is not installed.
    """
    begins = file.peek(LONGEST_MAGIC)
    suffix = next((known for magic, known in MAGIC if begins.startswith(magic)), suffix)
    yield from DECOMPRESSORS.get(suffix, _plain)(file)


def _plain(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    """The members of a gzip file; after one, zeros and what is no member are ignored, as gzip does."""
    member, within, members = zlib.decompressobj(31), False, 0
    for block in _plain(file):
        rest = block
        while rest:
            if not within:
                if members and not (rest := rest.lstrip(b"\0")):
                    break
                if not rest.startswith(b"\x1f\x8b"[: len(rest)]):
                    if members:
                        return
                    raise OSError(f"Not a gzipped file ({rest[:2]!r})")
            within = True
            yield (content := member.decompress(rest, BLOCK))
            while len(content) == BLOCK and not member.eof and not member.unconsumed_tail:
                yield (content := member.decompress(b"", BLOCK))
            rest = member.unconsumed_tail
            if member.eof:
                rest = member.unused_data
                member, within, members = zlib.decompressobj(31), False, members + 1
    if within:
        raise EOFError("its compressed stream does not end")


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError('Reading .zst needs zstandard: pip install "twingpt[data]", or decompress it first.') from None

    def decompressor() -> Any:  # of the window that zstd --long=31 takes; by default a frame of 128 MB is refused
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    try:
        yield from _joined(_zstd_frames(file, decompressor))
    except zstandard.ZstdError as error:
        if "ictionary" in str(error):
            raise OSError(
                "it needs the dictionary that it was compressed with: decompress it first (zstd -D)"
            ) from None
        raise EOFError(str(error)) from None


def _zstd_frames(file: IO[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Decompressed a kilobyte at a time, as that may already hold 32 MB of a single letter; skippable frames too."""
    frame, begun = decompressor(), False
    for block in _plain(file):
        for start in range(0, len(block), 1024):
            rest = block[start : start + 1024]
            while rest:
                yield frame.decompress(rest)
                rest, begun = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = decompressor()
    if begun:
        raise EOFError("its compressed stream does not end")


def _bunzip2(file: IO[bytes]) -> Iterator[bytes]:
    import bz2

    with bz2.open(file) as content:
        yield from _plain(content)


def _unxz(file: IO[bytes]) -> Iterator[bytes]:
    import lzma

    try:
        with lzma.open(file) as content:
            yield from _plain(content)
    except lzma.LZMAError as error:
        raise EOFError(str(error)) from None


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
