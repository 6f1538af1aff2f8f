"""Files to documents, streamed: text, JSON lines, Parquet and Arrow, plain or compressed, in bounded memory."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from twingpt.core.errors import UserError
from twingpt.data import named

BLOCK = 2**20  # bytes read at a time
PIECE = 2**20  # characters of a document that are held at once, at most
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

Advance = Callable[[int], object]  # told how many bytes of the file were read


@dataclass(frozen=True)
class Text:
    """A document, or a piece of one that is too long to be held at once.

    `split` is where a piece belongs: nobody who has only the piece can tell.
    """

    text: str
    begins: bool = True
    ends: bool = True
    split: str | None = None

    @property
    def whole(self) -> bool:
        """Whether this is all of the document."""
        return self.begins and self.ends

    def __len__(self) -> int:
        return len(self.text)

    def documents(self) -> Iterator[str]:
        """The one document."""
        yield self.text


@dataclass(frozen=True)
class Lines:
    """Lines of JSON as they are in `path`, from byte `offset` and line number `first` on: a document each."""

    content: bytes
    path: str
    offset: int
    first: int
    field: str
    errors: str

    whole = True

    def __len__(self) -> int:
        return len(self.content)

    def documents(self) -> Iterator[str]:
        """The documents, parsed; a UserError names the line that has none."""
        offset = self.offset
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if line.strip():
                yield self._document(line, f"{self.path}, line {number},", offset)
            offset += len(line) + 1

    def _record(self, line: bytes) -> Any:
        """The value of a line; the standard library reads what orjson refuses, or says what is wrong with it."""
        import orjson

        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:  # NaN, half characters, bytes that are no UTF-8, a byte order mark
            return json.loads(line.decode("utf-8", self.errors).lstrip("\ufeff"))

    def _document(self, line: bytes, where: str, offset: int) -> str:
        try:
            record = self._record(line)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path, offset + error.start, line[error.start]) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}.") from None
        if not isinstance(record, dict) or self.field not in record:
            raise _no_field(where, self.field, record if isinstance(record, dict) else ())
        text = record[self.field]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{where} has no text in {self.field!r}, but {json.dumps(text)[:40]}: choose another --field."
            )
        return _encodable(text or "", where, self.errors)


Item = Text | Lines


def _encodable(text: str, where: str, errors: str) -> str:
    """The text without half characters, which JSON can spell and UTF-8 can't."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise UserError(
            f"{where} has half a character (a lone surrogate) at position {error.start}: "
            "mend it, or give --errors replace."
        ) from None
    return text


def _not_utf8(path: object, offset: int, byte: int) -> UserError:
    # A UTF-16 file begins with its byte order mark: ff fe, or fe ff.
    coding = "utf-16" if offset == 0 and byte in (0xFE, 0xFF) else "latin1"
    return UserError(
        f"{path} is not UTF-8 text: byte {offset} is 0x{byte:02x}. Convert it (iconv -f {coding} -t utf-8), "
        "or give gpt data prepare --errors replace."
    )


def _no_field(where: object, field: str, names: Iterable[str]) -> UserError:
    known = f"its fields are {', '.join(names)}: choose one with gpt data prepare --field" if names else "no fields"
    return UserError(f"{where} has no field {field!r}, {known}.")


# Cutting a long document ------------------------------------------------------------------------------------

# Between these two no split pattern of a byte-level BPE (GPT-2, cl100k, o200k, Llama 3, Qwen2) joins anything,
# and none looks across: after a letter, before a space or a newline; after the only newline, before a letter.
SAFE = re.compile(r"[^\W\d_](?=[ \n])|(?<=\S)\n(?=[^\W\d_])")


def safe_cut(text: str) -> int:
    """Where to cut off at most PIECE characters, and at least half of that, so that both parts' ids are the whole's.

    A text without such a point, which nobody wrote, is cut after PIECE characters.
    """
    least, end, reach = PIECE // 2, PIECE + 1, 2**12  # a point needs the character after it
    start = end
    while start > least:
        start = max(least, end - reach)
        for found in reversed(list(SAFE.finditer(text, start, end))):
            if found[0] == "\n" or found[0].isalpha():  # \w has numbers that are no digits, as ²
                return found.end()
        reach *= 8
    return PIECE


def pieces(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A document given in blocks, in pieces of at most PIECE characters, each with whether it is the last.

    The pieces do not depend on the blocks.
    """
    buffer = ""
    for block in blocks:
        buffer += block
        while len(buffer) > PIECE:
            cut = safe_cut(buffer)
            yield buffer[:cut], False
            buffer = buffer[cut:]
    yield buffer, True


# Reading a file ---------------------------------------------------------------------------------------------


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Let an error of the file within be a UserError."""
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short: {error}.") from None
    except OSError as error:  # gzip.BadGzipFile has no strerror
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None


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
        raise UserError("Reading .zst needs zstandard: pip install 'twingpt[data]', or decompress it first.") from None
    try:
        yield from _joined(_zstd_frames(file, zstandard.ZstdDecompressor))
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None


def _zstd_frames(file: IO[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """What each kilobyte holds, which may be 32 MB of a single letter."""
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
    """The same bytes, in blocks of BLOCK and more."""
    waiting: list[bytes] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= BLOCK:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


class _Counted:
    """A file that tells how many bytes were read from it."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self.file, self.advance = file, advance

    def read(self, size: int = -1) -> bytes:
        """Read, and tell."""
        content = self.file.read(size)
        self.advance(len(content))
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _decoded(path: object, blocks: Iterable[bytes], errors: str) -> Iterator[str]:
    """The text in `blocks`, less a byte order mark; what is none is a UserError with its offset, or becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    read = offset = 0  # the latter of the first byte that is not decoded yet
    for block, last in _and_last(blocks):
        try:
            text = decoder.decode(block, last)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start, error.object[error.start]) from None
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


def _and_last(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for block in blocks:
        yield block, False
    yield b"", True


def _text(file: File, blocks: Iterable[bytes]) -> Iterator[Item]:
    decoded = _decoded(file.title, blocks, file.errors)
    if file.separator is not None:
        yield from map(Text, named.documents(decoded, file.separator))
        return
    begins = True
    for text, ends in pieces(decoded):
        yield Text(text, begins, ends)
        begins = False


def _jsonl(file: File, blocks: Iterable[bytes]) -> Iterator[Item]:
    """Lines by the block, for whoever parses them in parallel."""
    path, how = str(file.path), (file.field, file.errors)
    rest, offset, number = b"", 0, 1
    for block in blocks:
        content, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            yield Lines(content, path, offset, number, *how)
            offset += len(content) + 1
            number += content.count(b"\n") + 1
        if len(rest) > LONGEST_RECORD:
            raise UserError(
                f"{path}, line {number}, is longer than {LONGEST_RECORD >> 20} MB: is it JSON lines? "
                "A document as long as that can be a text file of its own."
            )
    yield Lines(rest, path, offset, number, *how)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"Reading {path.name} needs pyarrow: pip install 'twingpt[data]'.") from None
    return pyarrow


def _rows(path: Path, column: Any, first: int, errors: str) -> Iterator[Item]:
    """The texts of a column of strings; rows are counted from `first`."""
    import pyarrow

    try:
        binary = column.cast(pyarrow.large_binary())
    except pyarrow.ArrowNotImplementedError:
        raise UserError(f"{path} has no text there, but {column.type}: choose another column with --field.") from None
    for row, content in enumerate(binary.to_pylist(), first):
        try:
            yield Text((content or b"").decode("utf-8", errors))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, row {row}, is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}; "
                "gpt data prepare --errors replace takes it as it is."
            ) from None


def _parquet(path: Path, advance: Advance, field: str, errors: str) -> Iterator[Item]:
    parquet = _pyarrow(path).parquet.ParquetFile(path)
    with parquet:
        if field not in parquet.schema_arrow.names:
            raise _no_field(path, field, parquet.schema_arrow.names)
        total, done = max(1, parquet.metadata.num_rows), 0
        size, told = path.stat().st_size, 0
        for batch in parquet.iter_batches(ROWS, columns=[field], use_threads=False):
            yield from _rows(path, batch.column(0), done, errors)
            done += batch.num_rows
            advance(size * done // total - told)
            told = size * done // total


def _arrow(path: Path, advance: Advance, field: str, errors: str) -> Iterator[Item]:
    """The stream format, which `datasets` keeps its tables in."""
    pyarrow = _pyarrow(path)
    with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        if field not in stream.schema.names:
            raise _no_field(path, field, stream.schema.names)
        done = told = 0
        for batch in stream:
            column = batch.column(field)
            for start in range(0, len(column), ROWS):
                yield from _rows(path, column.slice(start, ROWS), done + start, errors)
            done += batch.num_rows
            advance(file.tell() - told)
            told = file.tell()


STREAMS = {"text": _text, "jsonl": _jsonl}
TABLES = {"parquet": _parquet, "arrow": _arrow}
DECOMPRESSORS = {".gz": _gunzip, ".zst": _unzstd}


def known(path: Path) -> bool:
    """Whether a folder's file of this name is read as data."""
    return not path.name.startswith(".") and kind_of(path) is not None


def kind_of(path: Path) -> str | None:
    """What a file holds by its name: text, jsonl, parquet or arrow; None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    kind = KINDS.get(suffixes[-1 - compressed]) if len(suffixes) > compressed else None
    return None if compressed and kind in TABLES else kind


@dataclass(frozen=True)
class File:
    """A file of documents; one of no known kind is text."""

    path: Path
    field: str = "text"
    errors: str = "strict"
    separator: str | None = None  # a line of a text that ends a document
    name: str = ""  # what a message calls it, if not by its path

    @property
    def title(self) -> object:
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
        """SHA-256 of the file as it lies there."""
        sha = hashlib.sha256()
        with _readable(self.path), self.path.open("rb") as file:
            for block in _plain(file):
                sha.update(block)
        return sha.hexdigest()

    def items(self, advance: Advance = lambda count: None) -> Iterator[Item]:
        """The documents, in order; UserError for what is not text."""
        if self.kind in TABLES:
            yield from self._table(advance)
            return
        with _readable(self.path), self.path.open("rb") as file:
            content: Any = _Counted(file, advance)
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
class Given:
    """Documents that are in memory already."""

    texts: tuple[str, ...]
    kind = "memory"

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.texts))

    def digest(self) -> str:
        """SHA-256 over the documents, in order."""
        sha = hashlib.sha256()
        for text in self.texts:
            content = text.encode()
            sha.update(len(content).to_bytes(8, "little") + content)
        return sha.hexdigest()

    def items(self, advance: Advance = lambda count: None) -> Iterator[Item]:
        """The documents, in order."""
        for text in self.texts:
            advance(len(text))
            yield Text(text)
