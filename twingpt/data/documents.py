"""Documents on their way to a tokenizer: whole, in pieces where they are long, or as JSON lines still to be parsed."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from twingpt.core.errors import UserError

PIECE = 2**20  # characters of a document that are held at once, at most
AS_TEXT = "take the file as plain text with gpt data prepare --as-text"


@dataclass(frozen=True)
class DocumentPiece:
    """A document, or one piece of a document that is too long to be held at once.

    `split` is "train" or "val" for a piece, which does not show by itself where its document belongs. `separated` is
    whether a line that ends documents was found in its file, where one is looked for.
    """

    text: str
    begins: bool = True
    ends: bool = True
    split: str | None = None
    separated: bool = False

    @property
    def whole(self) -> bool:
        """Whether this is all of the document."""
        return self.begins and self.ends

    def __len__(self) -> int:
        return len(self.text)

    def documents(self, bad: list[str] | None = None) -> Iterator[str]:
        """The one document."""
        yield self.text


@dataclass(frozen=True)
class RecordText:
    """Where the text of a JSON record is: in `field`, a key or a path of keys `a.b`; `path` is for messages.

    With `skip_bad`, a record without text is left out and reported, and does not end the reading. `guessed` is whether
    the file is JSON by what it holds alone, and not by its name.
    """

    path: str
    field: str
    errors: str
    skip_bad: bool = False
    guessed: bool = False

    def text(self, record: Any, where: str) -> str:
        """The text of a record; a UserError says what it has instead."""
        try:
            text = find_field(record, self.field)
        except KeyError:
            raise no_field(where, self.field, field_names(record), AS_TEXT) from None
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{where} has no text in {self.field!r}, but {json.dumps(text)[:40]}: choose another --field."
            )
        return _without_surrogates(text or "", where, self.errors)


@dataclass(frozen=True)
class JsonLines:
    """A block of JSON lines, a document each, to be parsed by whoever encodes it, in parallel.

    It begins at byte `offset` and line `first` of its file, which errors name.
    """

    content: bytes
    offset: int
    first: int
    how: RecordText

    def __len__(self) -> int:
        return len(self.content)

    def documents(self, bad: list[str] | None = None) -> Iterator[str]:
        """The documents, parsed; a UserError names the line that has none, or is added to `bad`."""
        offset = self.offset
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if line.strip():
                yield from _kept(lambda: self._document(line, number, offset), self.how, bad)  # noqa: B023, called here
            offset += len(line) + 1

    def _document(self, line: bytes, number: int, offset: int) -> str:
        where = f"{self.how.path}, line {number},"
        try:
            record = self._record(line)
        except UnicodeDecodeError as error:
            raise not_utf8(self.how.path, offset + error.start, line, offset) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}{f' (or {AS_TEXT})' if self.how.guessed else ''}.") from None
        return self.how.text(record, where)

    def _record(self, line: bytes) -> Any:
        """The value of a line; the standard library reads what orjson refuses, or says what is wrong with it."""
        import orjson

        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:  # NaN, long integers, lone surrogates, bytes that are no UTF-8, a BOM
            text = line.decode("utf-8", self.how.errors).lstrip("\ufeff")
            return json.loads(text, parse_int=any_integer)


@dataclass(frozen=True)
class JsonValues:
    """Values of a JSON file that is no JSON lines, parsed: records, or documents themselves; each with its line."""

    values: list[tuple[Any, int]]
    size: int
    how: RecordText

    def __len__(self) -> int:
        return self.size

    def documents(self, bad: list[str] | None = None) -> Iterator[str]:
        """The documents; a UserError names the line of a value that has none, or is added to `bad`."""
        for value, line in self.values:
            where = f"{self.how.path}, line {line},"
            record = {self.how.field: value} if isinstance(value, str) else value
            yield from _kept(lambda: self.how.text(record, where), self.how, bad)  # noqa: B023, called here


Item = DocumentPiece | JsonLines | JsonValues


def _kept(read: Callable[[], str], how: RecordText, bad: list[str] | None) -> Iterator[str]:
    """What `read` returns; nothing where it raises and bad records are left out, which are added to `bad`."""
    try:
        document = read()
    except UserError as error:
        if not how.skip_bad:
            raise
        if bad is not None:
            bad.append(str(error))
    else:
        yield document


def any_integer(digits: str) -> int | float:
    """An integer of any length; Python refuses to convert more than 4300 digits, which no text is."""
    return int(digits) if len(digits) < 4000 else float(digits)


def find_field(record: Any, field: str) -> Any:
    """The value of a record under a key, or under keys joined by dots; None within a null; KeyError for no such key."""
    if record is None:
        return None
    if isinstance(record, dict):
        if field in record:
            return record[field]
        for i in (i for i, character in enumerate(field) if character == "."):
            if field[:i] in record:
                return find_field(record[field[:i]], field[i + 1 :])
    raise KeyError(field)


def field_names(record: Any, prefix: str = "") -> list[str]:
    """The fields that may be chosen of a record, those within others by their paths."""
    if not isinstance(record, dict):
        return []
    return [
        name
        for key, value in record.items()
        for name in ([*field_names(value, f"{prefix}{key}.")] or [f"{prefix}{key}"])
    ]


def _without_surrogates(text: str, where: str, errors: str) -> str:
    """The text, in which a lone surrogate, which JSON can spell and UTF-8 can't, is an error or U+FFFD."""
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


def not_utf8(path: object, at: int, sample: bytes, sample_at: int) -> UserError:
    """The error of what UTF-8 does not have, at byte `at` of a file, within `sample`, the bytes at `sample_at`."""
    byte, coding = sample[at - sample_at], guess_encoding(sample, sample_at)
    convert = f"Convert it (iconv -f {coding} -t utf-8)" if coding else "Convert it (file -i may name its encoding)"
    return UserError(
        f"{path} is not UTF-8 text: byte {at} is 0x{byte:02x}. {convert}, or give gpt data prepare --errors replace."
    )


# Byte order marks, the longest first, as UTF-32's begins with UTF-16's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def guess_encoding(sample: bytes, offset: int) -> str | None:
    """What iconv calls the encoding of bytes that are no UTF-8, which stand at `offset` of a file; None: unknown.

    UTF-16 and UTF-32 have NULs at every second, or three of four places; Western letters are rare among ASCII.
    """
    for mark, coding in BYTE_ORDER_MARKS:
        if offset == 0 and sample.startswith(mark):
            return coding
    sample = sample[-offset % 4 :][: 2**16]
    nuls = [sample[i::4].count(0) for i in range(4)]
    most = len(sample) / 4 * 0.9
    if any(nuls):
        for coding, zeros, others in (("utf-32le", (2, 3), (0,)), ("utf-32be", (0, 1), (3,)),
                                      ("utf-16le", (1, 3), (0, 2)), ("utf-16be", (0, 2), (1, 3))):  # fmt: skip
            least = most if "32" in coding else 0
            if min(nuls[i] for i in zeros) > least and 9 * sum(nuls[i] for i in others) < sum(nuls[i] for i in zeros):
                return coding
        return None
    high = sum(byte >= 0x80 for byte in sample)
    with contextlib.suppress(UnicodeDecodeError):
        sample.decode("cp1252")
        return "cp1252" if high <= len(sample) / 4 + 1 else None
    return None


def no_field(where: object, field: str, names: Sequence[str], otherwise: str = "") -> UserError:
    """The error of a record or table without `field`, which has `names`, and what to do `otherwise`."""
    known = f"its fields are {', '.join(names)}: choose one with gpt data prepare --field" if names else "no fields"
    return UserError(
        f"{where} has no field {field!r}, {known}{(', or ' if names else ': ') * bool(otherwise)}{otherwise}."
    )


def split_at(blocks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """The documents of a text given in blocks, cut anywhere: what stands between lines of `separator` alone.

    Each has whether such a line was found, before it or where it ends.
    """
    lines, found = list[str](), False
    for line in chain(_lines(blocks), [None]):
        if line is not None and line.strip() != separator:
            lines.append(line)
            continue
        found = found or line is not None
        if text := "\n".join(lines).strip():
            yield text, found
        lines = []


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split("\n")
        yield from whole
    if rest:
        yield rest


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
