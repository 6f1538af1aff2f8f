"""Documents on their way to a tokenizer: whole, in pieces where they are long, or as JSON lines still to be parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from twingpt.core.errors import UserError

PIECE = 2**20  # characters of a document that are held at once, at most


@dataclass(frozen=True)
class DocumentPiece:
    """A document, or one piece of a document that is too long to be held at once.

    `split` is "train" or "val" for a piece, which does not show by itself where its document belongs.
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
class JsonLines:
    """A block of JSON lines, a document each, to be parsed by whoever encodes it, in parallel.

    It begins at byte `offset` and line `first` of `path`, which errors name; the text of a document is in `field`.
    """

    content: bytes
    path: str
    offset: int
    first: int
    field: str
    errors: str

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
        except orjson.JSONDecodeError:  # NaN, lone surrogates, bytes that are no UTF-8, a byte order mark
            return json.loads(line.decode("utf-8", self.errors).lstrip("\ufeff"))

    def _document(self, line: bytes, where: str, offset: int) -> str:
        try:
            record = self._record(line)
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, offset + error.start, line[error.start]) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}.") from None
        if not isinstance(record, dict) or self.field not in record:
            raise no_field(where, self.field, record if isinstance(record, dict) else ())
        text = record[self.field]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{where} has no text in {self.field!r}, but {json.dumps(text)[:40]}: choose another --field."
            )
        return _without_surrogates(text or "", where, self.errors)


Item = DocumentPiece | JsonLines


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


def not_utf8(path: object, offset: int, byte: int) -> UserError:
    """The error of a byte that UTF-8 does not have there."""
    # A UTF-16 file begins with its byte order mark: ff fe, or fe ff.
    coding = "utf-16" if offset == 0 and byte in (0xFE, 0xFF) else "latin1"
    return UserError(
        f"{path} is not UTF-8 text: byte {offset} is 0x{byte:02x}. Convert it (iconv -f {coding} -t utf-8), "
        "or give gpt data prepare --errors replace."
    )


def no_field(where: object, field: str, names: Iterable[str]) -> UserError:
    """The error of a record or table without `field`, which has `names`."""
    known = f"its fields are {', '.join(names)}: choose one with gpt data prepare --field" if names else "no fields"
    return UserError(f"{where} has no field {field!r}, {known}.")


def split_at(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """The documents of a text given in blocks, cut anywhere: what stands between lines of `separator` alone."""
    lines: list[str] = []
    rest = ""
    for block in chain(blocks, [f"\n{separator}\n"]):
        *whole, rest = (rest + block).split("\n")
        for line in whole:
            if line.strip() != separator:
                lines.append(line)
                continue
            if text := "\n".join(lines).strip():
                yield text
            lines = []


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
