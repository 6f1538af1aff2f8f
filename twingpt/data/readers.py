"""Readers: files to documents, streamed in bounded memory: text, JSON lines, Parquet and Arrow; plain, .gz or .zst."""

from __future__ import annotations

import codecs
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from twingpt.core.errors import UserError
from twingpt.data.documents import DocumentPiece, Item, JsonLines, no_field, not_utf8, pieces, split_at

BLOCK = 2**20  # bytes read at a time
LONGEST_RECORD = 2**26  # bytes of a line of JSON
ROWS = 64  # of a table, held at once

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst")

Advance = Callable[[int], object]  # called with the number of bytes read since the last call


def is_data_file(path: Path) -> bool:
    """Whether a file with this name in a folder is one of its documents: of a known kind, and not hidden."""
    return not path.name.startswith(".") and kind_of(path) is not None


def kind_of(path: Path) -> str | None:
    """What a file holds by its suffix: text, jsonl, parquet or arrow; None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    kind = KINDS.get(suffixes[-1 - compressed]) if len(suffixes) > compressed else None
    return None if compressed and kind in TABLES else kind


@dataclass(frozen=True)
class DocumentFile:
    """A file of documents and how it is read; one of no known kind is text."""

    path: Path
    field: str = "text"  # the key of a JSON record, or the column of a table, with the text
    errors: str = "strict"  # or "replace", as bytes.decode takes them
    separator: str | None = None  # the line of a text file that ends a document; None: the file is one document
    name: str = ""  # what a message calls it, if not by its path

    @property
    def display_name(self) -> object:
        """What a message calls it."""
        return self.name or self.path

    @property
    def kind(self) -> str:
        """text, jsonl, parquet or arrow."""
        return kind_of(self.path) or "text"

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        with _readable(self.path):
            return self.path.stat().st_size

    def digest(self) -> str:
        """SHA-256 of the file's bytes, compressed or not."""
        sha = hashlib.sha256()
        with _readable(self.path), self.path.open("rb") as file:
            for block in _plain(file):
                sha.update(block)
        return sha.hexdigest()

    def items(self, advance: Advance = lambda count: None) -> Iterator[Item]:
        """The documents in order, long ones in pieces; UserError for what is not text."""
        if self.kind in TABLES:
            yield from self._table(advance)
            return
        with _readable(self.path), self.path.open("rb") as file:
            content: Any = _CountingReader(file, advance)
            decompress = DECOMPRESSORS.get(self.path.suffix.lower(), _plain)
            yield from STREAMS[self.kind](self, decompress(content))

    def _table(self, advance: Advance) -> Iterator[Item]:
        pyarrow = _pyarrow(self.path)
        try:
            with _readable(self.path):
                yield from TABLES[self.kind](self.path, advance, self.field, self.errors)
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.path} is damaged, or no {self.kind} file: {error}.") from None


@dataclass(frozen=True)
class InMemoryDocuments:
    """Documents that need no file, as those that come with Python."""

    texts: tuple[str, ...]
    kind = "memory"

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.texts))

    def digest(self) -> str:
        """SHA-256 over the documents in order, each after its length, so that their bounds count."""
        sha = hashlib.sha256()
        for text in self.texts:
            content = text.encode()
            sha.update(len(content).to_bytes(8, "little") + content)
        return sha.hexdigest()

    def items(self, advance: Advance = lambda count: None) -> Iterator[Item]:
        """The documents, in order."""
        for text in self.texts:
            advance(len(text))
            yield DocumentPiece(text)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the system or a decompressor raises within into a UserError that names the file."""
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short: {error}.") from None
    except OSError as error:  # gzip.BadGzipFile has no strerror
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None


# Compression -----------------------------------------------------------------------------------------------


def _plain(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    import gzip

    with gzip.open(file) as content:
        yield from _plain(content)  # type: ignore[arg-type]


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError('Reading .zst needs zstandard: pip install "twingpt[data]", or decompress it first.') from None
    try:
        yield from _joined(_zstd_frames(file, zstandard.ZstdDecompressor))
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None


def _zstd_frames(file: IO[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Decompressed a kilobyte at a time, as that may already hold 32 MB of a single letter."""
    frame, begun = decompressor().decompressobj(), False
    for block in _plain(file):
        for start in range(0, len(block), 1024):
            rest = block[start : start + 1024]
            while rest:
                yield frame.decompress(rest)
                rest, begun = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = decompressor().decompressobj()
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


class _CountingReader:
    """A file that calls `advance` with what is read from it: compressed bytes, so that progress is that of the file."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self.file, self.advance = file, advance

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, reported to `advance`."""
        content = self.file.read(size)
        self.advance(len(content))
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


# Formats ---------------------------------------------------------------------------------------------------


def _decoded(path: object, blocks: Iterable[bytes], errors: str) -> Iterator[str]:
    """UTF-8 decoded, without a byte order mark; what is no text is a UserError with its offset, or U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    read = offset = 0  # `offset` is that of the first byte not decoded yet, which errors count from
    for block in chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset + error.start, error.object[error.start]) from None
        if "\0" in text:
            if errors == "strict":
                at = offset + len(text[: text.index("\0")].encode())
                raise UserError(
                    f"{path} is not text: byte {at} is NUL. Is it UTF-16 (iconv -f utf-16 -t utf-8)? "
                    "gpt data prepare --errors replace takes it as it is."
                )
            text = text.replace("\0", "\ufffd")
        yield text if offset else text.removeprefix("\ufeff")
        read += len(block)
        offset = read - len(decoder.getstate()[0])


def _text(file: DocumentFile, blocks: Iterable[bytes]) -> Iterator[Item]:
    decoded = _decoded(file.display_name, blocks, file.errors)
    if file.separator is not None:
        yield from map(DocumentPiece, split_at(decoded, file.separator))
        return
    begins = True
    for text, ends in pieces(decoded):
        yield DocumentPiece(text, begins, ends)
        begins = False


def _jsonl(file: DocumentFile, blocks: Iterable[bytes]) -> Iterator[Item]:
    """JSON lines by the block, not parsed here, because the workers do that in parallel."""
    path = str(file.path)
    rest, offset, number = b"", 0, 1
    for block in blocks:
        content, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            yield JsonLines(content, path, offset, number, file.field, file.errors)
            offset += len(content) + 1
            number += content.count(b"\n") + 1
        if len(rest) > LONGEST_RECORD:
            raise UserError(
                f"{path}, line {number}, is longer than {LONGEST_RECORD >> 20} MB: is it JSON lines? "
                "A document as long as that can be a text file of its own."
            )
    yield JsonLines(rest, path, offset, number, file.field, file.errors)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'Reading {path.name} needs pyarrow: pip install "twingpt[data]".') from None
    return pyarrow


def _text_column(path: Path, column: Any, first: int, errors: str) -> Iterator[Item]:
    """The documents of a column of strings or bytes, whose first row is number `first` in errors."""
    import pyarrow

    try:
        binary = column.cast(pyarrow.large_binary())
    except pyarrow.ArrowNotImplementedError:
        raise UserError(f"{path} has no text there, but {column.type}: choose another column with --field.") from None
    for row, content in enumerate(binary.to_pylist(), first):
        try:
            yield DocumentPiece((content or b"").decode("utf-8", errors))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, row {row}, is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}; "
                "gpt data prepare --errors replace takes it as it is."
            ) from None


def _parquet(path: Path, advance: Advance, field: str, errors: str) -> Iterator[Item]:
    parquet = _pyarrow(path).parquet.ParquetFile(path)
    with parquet:
        if field not in parquet.schema_arrow.names:
            raise no_field(path, field, parquet.schema_arrow.names)
        n_rows, rows = parquet.metadata.num_rows, 0
        size, reported = path.stat().st_size, 0
        for batch in parquet.iter_batches(ROWS, columns=[field], use_threads=False):
            yield from _text_column(path, batch.column(0), rows, errors)
            rows += batch.num_rows
            advance(size * rows // n_rows - reported)
            reported = size * rows // n_rows


def _arrow(path: Path, advance: Advance, field: str, errors: str) -> Iterator[Item]:
    """Arrow's IPC stream format, which `datasets` keeps its tables in."""
    pyarrow = _pyarrow(path)
    with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        if field not in stream.schema.names:
            raise no_field(path, field, stream.schema.names)
        rows = reported = 0
        for batch in stream:
            column = batch.column(field)
            for start in range(0, len(column), ROWS):
                yield from _text_column(path, column.slice(start, ROWS), rows + start, errors)
            rows += batch.num_rows
            advance(file.tell() - reported)
            reported = file.tell()


STREAMS = {"text": _text, "jsonl": _jsonl}
TABLES = {"parquet": _parquet, "arrow": _arrow}
DECOMPRESSORS = {".gz": _gunzip, ".zst": _unzstd}
