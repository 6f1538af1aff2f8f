"""Readers: files to documents, streamed in bounded memory: text, JSON, Parquet and Arrow, plain or compressed."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any

from twingpt.core.errors import UserError
from twingpt.data import compression
from twingpt.data.documents import (
    AS_TEXT,
    DocumentPiece,
    Item,
    JsonLines,
    JsonValues,
    RecordText,
    any_integer,
    find_field,
    guess_encoding,
    no_field,
    not_utf8,
    pieces,
    split_at,
)

BLOCK = 2**20  # bytes read at a time
LONGEST_RECORD = 2**26  # bytes of a line of JSON
ROWS = 64  # of a table, held at once

# What a name says that a file holds. Only of text it is believed: JSON is lines, or any other layout.
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
KINDS = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
TABLE_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}

Advance = Callable[[int], object]  # called with the number of bytes read since the last call


def is_data_file(path: Path) -> bool:
    """Whether a file with this name in a folder is one of its documents: of a known kind, and not hidden."""
    return not path.name.startswith(".") and kind_of(path) is not None


def kind_of(
    path: Path, kinds: Mapping[str, str] = KINDS, compressions: Sequence[str] = compression.SUFFIXES
) -> str | None:
    """What a file holds by its suffix: text, jsonl, json, parquet or arrow; None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in compressions
    kind = kinds.get(suffixes[-1 - compressed]) if len(suffixes) > compressed else None
    return None if compressed and kind in TABLES else kind


def kind_by_name(path: Path) -> str | None:
    """`kind_of` under the first rules of reading, which went by it alone and knew fewer suffixes."""
    kinds = {suffix: kind for suffix, kind in KINDS.items() if suffix not in (".json", ".feather")}
    return kind_of(path, kinds, (".gz", ".zst"))


@dataclass(frozen=True)
class DocumentFile:
    """A file of documents and how it is read: by what it holds, and as text where that is nothing else."""

    path: Path
    field: str = "text"  # of a JSON record or a table: the key or column with the text, `a.b` within another
    errors: str = "strict"  # or "replace", as bytes.decode takes them
    separator: str | None = None  # the line of a text file that ends a document; None: the file is one document
    name: str = ""  # what a message calls it, if not by its path
    skip_bad: bool = False  # whether records without text are left out, and counted
    as_text: bool = False  # whether JSON is plain text, as in a file that is named so
    by_name: bool = False  # whether its name alone decides what it holds

    @property
    def display_name(self) -> object:
        """What a message calls it."""
        return self.name or self.path

    @cached_property
    def kind(self) -> str:
        """text, jsonl, json (any other layout), parquet or arrow, by what the file holds."""
        if self.by_name:
            return kind_by_name(self.path) or "text"
        with _readable(self.path):
            with self.path.open("rb") as file:
                begins = file.read(6)
            for magic, kind in TABLE_MAGIC.items():
                if begins.startswith(magic):
                    return kind
            named = kind_of(self.path)
            if named in TABLES:
                return str(named)
            return "text" if self.as_text or named == "text" else json_layout(self._head(), named) or "text"

    def _head(self) -> str:
        """What the file's text begins with, as far as it is UTF-8."""
        content = b""
        with self.path.open("rb") as file:
            for block in compression.decompress(file, self.path.suffix.lower()):
                content += block
                if len(content) >= BLOCK:
                    break
        if content.startswith((b"PAR1", b"ARROW1")):
            raise UserError(f"{self.display_name} is a compressed table: decompress it first.")
        return content[:BLOCK].decode("utf-8-sig", "replace")

    def holds_field(self) -> bool:
        """Whether the first JSON record of the file is a text or has one in `field`, or none is looked for."""
        if self.as_text:
            return True
        with _readable(self.path):
            record = first_record(self._head())
        try:
            return isinstance(record, str) or isinstance(find_field(record, self.field), str | None)
        except KeyError:
            return False

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        with _readable(self.path):
            return self.path.stat().st_size

    def digest(self) -> str:
        """SHA-256 of the file's bytes, compressed or not."""
        sha = hashlib.sha256()
        with _readable(self.path), self.path.open("rb") as file:
            while block := file.read(BLOCK):
                sha.update(block)
        return sha.hexdigest()

    def items(self, advance: Advance = lambda count: None) -> Iterator[Item]:
        """The documents in order, long ones in pieces; UserError for what is not text."""
        if self.kind in TABLES:
            yield from self._table(advance)
            return
        with _readable(self.path), self.path.open("rb") as file:
            content: Any = _CountingReader(file, advance)
            yield from STREAMS[self.kind](self, compression.decompress(content, self.path.suffix.lower()))

    @property
    def record_text(self) -> RecordText:
        """Where the text of its JSON records is."""
        guessed = kind_of(self.path) is None
        return RecordText(str(self.display_name), self.field, self.errors, self.skip_bad, guessed)

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


# What a file that is no text begins with.
NOT_TEXT = {
    b"PK\x03\x04": "a zip archive, as .docx, .epub and .odt are",
    b"%PDF-": "a PDF",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\x1f\x9d": "compressed by compress",
    b"\x1f\x8b": "compressed twice",
    b"\x28\xb5\x2f\xfd": "compressed twice",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"SQLite format 3\0": "a database of SQLite",
    b"\x7fELF": "a program",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x93NUMPY": "an array of NumPy",
    b"\xd0\xcf\x11\xe0": "a document of an old Office",
}


def _check_text(path: object, head: bytes) -> None:
    """Raise UserError for a file that begins as no text does."""
    what = "a tar archive" if head[257:262] == b"ustar" else ""
    what = next((known for magic, known in NOT_TEXT.items() if head.startswith(magic)), what)
    if what:
        raise UserError(f"{path} is {what}, and not text: take the text out of it first.")


def _decoded(path: object, blocks: Iterable[bytes], errors: str) -> Iterator[str]:
    """UTF-8 decoded, without a byte order mark; what is no text is a UserError with its offset, or U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    read = offset = 0  # `offset` is that of the first byte not decoded yet, which errors count from
    for block in chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            if not offset:
                _check_text(path, error.object)
            raise not_utf8(path, offset + error.start, error.object, offset) from None
        if "\0" in text:
            if errors == "strict":
                if not offset:
                    _check_text(path, block)
                at = offset + len(text[: text.index("\0")].encode())
                coding = guess_encoding(block, read)
                raise UserError(
                    f"{path} is not text: byte {at} is NUL. "
                    + (f"Convert it (iconv -f {coding} -t utf-8), or give " if coding else "")
                    + f"gpt data prepare --errors replace{'' if coding else ' takes it as it is'}."
                )
            text = text.replace("\0", "\ufffd")
        yield text if offset else text.removeprefix("\ufeff")
        read += len(block)
        offset = read - len(decoder.getstate()[0])


def _text(file: DocumentFile, blocks: Iterable[bytes]) -> Iterator[Item]:
    decoded = _decoded(file.display_name, blocks, file.errors)
    if file.separator is not None:
        yield from (DocumentPiece(text, separated=found) for text, found in split_at(decoded, file.separator))
        return
    begins = True
    for text, ends in pieces(decoded):
        yield DocumentPiece(text, begins, ends)
        begins = False


def _jsonl(file: DocumentFile, blocks: Iterable[bytes]) -> Iterator[Item]:
    """JSON lines by the block, not parsed here, because the workers do that in parallel."""
    how = file.record_text
    rest, offset, number = b"", 0, 1
    for block in blocks:
        content, newline, rest = _with_newlines(rest + block).rpartition(b"\n")
        if newline:
            yield JsonLines(content, offset, number, how)
            offset += len(content) + 1
            number += content.count(b"\n") + 1
        if len(rest) > LONGEST_RECORD:
            raise too_long(how.path, number)
    yield JsonLines(rest, offset, number, how)


def _with_newlines(content: bytes) -> bytes:
    """JSON lines where those that end with a CR alone, which no JSON text has within, end with a newline."""
    return re.sub(rb"\r(?!\n|\Z)", b"\n", content) if b"\r" in content else content


def too_long(path: object, line: int) -> UserError:
    """The error of a record that does not end within LONGEST_RECORD bytes."""
    return UserError(
        f"{path}, line {line}, is longer than {LONGEST_RECORD >> 20} MB: is it JSON lines? "
        "A document as long as that can be a text file of its own."
    )


DECODER = json.JSONDecoder(parse_int=any_integer)
LINE_END = re.compile(r"[\r\n]")  # and not those of str.splitlines(), which JSON may have within a text
EMPTY_OBJECT = re.compile(r"\{\s*\}")
BETWEEN_VALUES = re.compile(r"[\s,]*")
AFTER_ELEMENT, AFTER_RECORD = re.compile(r"\s*[,\]]"), re.compile(r"\s*(?:,\s*[\[{]|[\[{]|\Z)")


def json_layout(head: str, named: str | None) -> str | None:
    """How a file that begins with `head` is read: as "jsonl", or as "json" of any other layout; None: it is no JSON.

    Of a file that is `named` .jsonl or .json no doubt is left, but how it is laid out. Of another, {} says nothing: a
    program or a template may begin so.
    """
    lines = list(filter(None, map(str.strip, LINE_END.split(head))))
    if named == "jsonl":
        return "json" if lines and (lines[0].startswith("[") or lines[0] == "{") else "jsonl"
    first = next((line for line in lines if not EMPTY_OBJECT.fullmatch(line)), "")
    try:
        if isinstance(DECODER.decode(first), dict):
            return "jsonl"
    except (ValueError, RecursionError):
        pass
    return "json" if named or first_record(head) not in (None, {}) else None


def first_record(head: str) -> Any:
    """The first record of a JSON file that begins with `head`, or of its array; None where it begins with none."""
    head = head.lstrip()
    start = BETWEEN_VALUES.match(head, 1).end() if head.startswith("[") else 0  # type: ignore[union-attr]
    try:
        record, end = DECODER.raw_decode(head, start)
    except (ValueError, RecursionError):
        return None
    if not (AFTER_ELEMENT if start else AFTER_RECORD).match(head, end):
        return None
    return record if isinstance(record, dict) or (isinstance(record, str) and start) else None


def _json(file: DocumentFile, blocks: Iterable[bytes]) -> Iterator[Item]:
    """JSON that is no lines: an array of records or texts, or one record after another, over as many lines."""
    how = file.record_text
    scanner = JsonScanner(how.path, f" (or {AS_TEXT})" if how.guessed else "")
    for block in chain(filter(None, _decoded(how.path, blocks, file.errors)), [""]):
        if values := list(scanner.feed(block)):
            yield JsonValues(values, len(block), how)


class JsonScanner:
    """Parses a text of JSON values, given in blocks: those of an array, or one after another.

    `otherwise` ends the sentence of an error: what to do.
    """

    def __init__(self, path: str, otherwise: str = "") -> None:
        self.path, self.otherwise, self.line, self.in_array = path, otherwise, 1, False
        self._rest, self._wanted = "", 0  # characters to wait for, so that a long value is not parsed with every block

    def feed(self, block: str) -> Iterator[tuple[Any, int]]:
        """The values that end in a block, each with its line; the last block is empty. Raises UserError."""
        text = self._rest = self._rest + block
        if block and len(text) < self._wanted:
            return
        position = self._next(text, 0)
        while position < len(text):
            if text[position] == ("]" if self.in_array else "["):
                self.in_array, end = not self.in_array, position + 1
            else:
                try:
                    value, end = DECODER.raw_decode(text, position)
                except json.JSONDecodeError as error:
                    if block:  # it may end in the next one
                        break
                    raise self._bad(f"is not JSON: {error.msg}", text.count("\n", position, error.pos)) from None
                except (ValueError, RecursionError) as error:
                    raise self._bad(f"is not JSON: {error}") from None
                yield value, self.line
            self.line += text.count("\n", position, end)
            position = self._next(text, end)
        self._rest, self._wanted = text[position:], 2 * (len(text) - position)
        if len(self._rest) > LONGEST_RECORD:
            raise too_long(self.path, self.line)
        if self.in_array and not block:
            raise self._bad("is within an array that does not end: the file is damaged or cut short")

    def _next(self, text: str, position: int) -> int:
        """Where the next value begins."""
        start = BETWEEN_VALUES.match(text, position).end()  # type: ignore[union-attr]
        self.line += text.count("\n", position, start)
        return start

    def _bad(self, what: str, lines: int = 0) -> UserError:
        return UserError(f"{self.path}, line {self.line + lines}, {what}{self.otherwise}.")


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


def _columns(fields: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of the columns of a schema, those within structs after the structs themselves."""
    import pyarrow

    for field in fields:
        path = (*prefix, field.name)
        yield path
        if pyarrow.types.is_struct(field.type):
            yield from _columns([field.type.field(i) for i in range(field.type.num_fields)], path)


def _find_column(path: Path, schema: Any, field: str) -> tuple[str, ...]:
    """The path of the column called `field`, of names joined by dots; a UserError names those there are."""
    columns = {".".join(names): names for names in reversed([*_columns(schema)])}
    if field not in columns:
        raise no_field(path, field, [*reversed(columns)])
    return columns[field]


def _within(batch: Any, names: tuple[str, ...]) -> Any:
    """A column of a batch, which may be a field of a struct."""
    from pyarrow import compute

    column = batch.column(names[0])
    return compute.struct_field(column, list(names[1:])) if names[1:] else column


def _parquet(path: Path, advance: Advance, field: str, errors: str) -> Iterator[Item]:
    parquet = _pyarrow(path).parquet.ParquetFile(path)
    with parquet:
        names = _find_column(path, parquet.schema_arrow, field)
        n_rows, rows = parquet.metadata.num_rows, 0
        size, reported = path.stat().st_size, 0
        for batch in parquet.iter_batches(ROWS, columns=[".".join(names)], use_threads=False):
            yield from _text_column(path, _within(batch, names), rows, errors)
            rows += batch.num_rows
            advance(size * rows // n_rows - reported)
            reported = size * rows // n_rows


def _arrow(path: Path, advance: Advance, field: str, errors: str) -> Iterator[Item]:
    """Arrow's IPC formats: the stream, which `datasets` keeps its tables in, and the file, as Feather is."""
    pyarrow = _pyarrow(path)
    with pyarrow.OSFile(str(path)) as file, _open_arrow(pyarrow, file) as opened:
        names = _find_column(path, opened.schema, field)
        rows = reported = 0
        stream = (
            opened if hasattr(opened, "read_next_batch") else map(opened.get_batch, range(opened.num_record_batches))
        )
        for batch in stream:
            column = _within(batch, names)
            for start in range(0, len(column), ROWS):
                yield from _text_column(path, column.slice(start, ROWS), rows + start, errors)
            rows += batch.num_rows
            advance(file.tell() - reported)
            reported = file.tell()


def _open_arrow(pyarrow: Any, file: Any) -> Any:
    begins = file.read(6)
    file.seek(0)
    return (pyarrow.ipc.open_file if begins == b"ARROW1" else pyarrow.ipc.open_stream)(file)


STREAMS = {"text": _text, "jsonl": _jsonl, "json": _json}
TABLES = {"parquet": _parquet, "arrow": _arrow}
