"""`gpt tokenize`: learn a tokenizer, look at what one does to a text, compare several."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twingpt.core.data import sources
from twingpt.core.data.readers import Text
from twingpt.core.errors import UserError
from twingpt.core.paths import expand, new_folder, write_synced
from twingpt.core.tokenizer.base import Tokenizer
from twingpt.core.tokenizer.bpe import train_bpe
from twingpt.core.tokenizer.kept import files, find
from twingpt.core.tokenizer.plain import CharTokenizer

if TYPE_CHECKING:
    from rich.console import Console

UNLIMITED = 2**30  # a tokenizer alone knows no longest text
COLORS = ("blue", "dark_orange3", "dark_green", "purple4", "dark_red", "deep_sky_blue4")


def learn(specs: Sequence[str], vocab_size: int, pattern: str, chat: bool, out: Path) -> dict[str, Any]:
    """Learn a BPE from data sources and write it to the new folder `out`; what was learned, with the seconds it took.

    Raises UserError where `out` exists or can't be written, without text, or for what `train_bpe` refuses.
    """
    folder = expand(out)
    if folder.exists():
        raise UserError(f"{out} exists already: choose another folder, or remove it.")
    start, counts = time.perf_counter(), {"documents": 0, "bytes": 0}

    def texts() -> Iterator[str]:
        for text, begins in (part for spec in specs for part in parts(sources.load(spec))):
            counts["documents"] += begins
            counts["bytes"] += len(text.encode())
            yield text

    tokenizer = train_bpe(texts(), vocab_size, pattern, chat)
    if not counts["bytes"]:
        raise sources.empty(", ".join(specs))
    try:
        with new_folder(folder) as temporary:
            for name, text in files(tokenizer, UNLIMITED).items():
                write_synced(temporary / name, text.encode())
    except OSError as error:
        raise UserError(f"The tokenizer can't be written to {out}: {error.strerror}.") from error
    seconds = time.perf_counter() - start
    return {"path": str(out), "vocab_size": tokenizer.vocab_size, "pattern": pattern, **counts, "seconds": seconds}


def parts(source: sources.Source) -> Iterator[tuple[str, bool]]:
    """The documents of a source, long ones in pieces, each with whether a document begins there."""
    for item in source.items():
        for text in item.documents():
            yield text, not isinstance(item, Text) or item.begins


def tokens(tokenizer: Tokenizer, text: str, special: bool = False) -> list[dict[str, Any]]:
    """A row for each token of `text`: its id, its text, its bytes in hexadecimal, and whether it is special."""
    spelled = {token: spelling for spelling, token in tokenizer.specials.items()}
    rows = []
    for token in map(int, tokenizer.encode(text, special)):
        content = tokenizer.token_bytes(token)
        shown = spelled.get(token) or content.decode("utf-8", errors="backslashreplace")
        rows.append({"id": token, "text": shown, "bytes": content.hex(" "), "special": token in spelled})
    return rows


def compare(names: Sequence[str], spec: str) -> dict[str, Any]:
    """What tokenizers make of a data source: a row for each with tokens, bytes per token, and MB encoded a second.

    `char` knows the characters of the source itself. Raises UserError for a source without text.
    """
    source, rows = sources.load(spec), []
    for name in names:
        tokenizer = (
            CharTokenizer(set().union(*(set(text) for text, _ in parts(source)))) if name == "char" else find(name)
        )
        tokenizer.encode("")  # what is set up at the first use
        documents = size = count = 0
        seconds = 1e-9
        for text, begins in parts(source):
            start = time.perf_counter()
            count += len(tokenizer.encode(text))
            seconds += time.perf_counter() - start
            documents, size = documents + begins, size + len(text.encode())
        if not size:
            raise sources.empty(spec)
        row = {"tokenizer": name, "vocab_size": tokenizer.vocab_size, "tokens": count}
        rows.append({**row, "bytes_per_token": size / max(1, count), "mb_per_second": size / 1e6 / seconds})
    return {"source": spec, "documents": documents, "bytes": size, "rows": rows}


def print_tokens(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """The text with a colour for each token, then a table of them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text as Line

    from twingpt.core.console import visible

    line = Line()
    table = Table("", "id", "text", "bytes", box=box.SIMPLE_HEAD)
    for i, row in enumerate(rows):
        style = "bold reverse" if row["special"] else f"white on {COLORS[i % len(COLORS)]}"
        line.append(visible(row["text"]), style)
        line.append("\n" if row["text"].endswith("\n") and not row["special"] else "")
        table.add_row(str(i), str(row["id"]), Line(visible(row["text"]), style), row["bytes"])
    if console.color_system:  # without colours it would be the text as it was given
        console.print(line)
    console.print(table)
    console.print(f"{len(rows)} token{'s' * (len(rows) != 1)}")


def print_comparison(console: Console, result: Mapping[str, Any]) -> None:
    """A table of the tokenizers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text as Line

    from twingpt.core.console import human_documents

    table = Table("tokenizer", box=box.SIMPLE_HEAD)
    for name in ("vocabulary", "tokens", "bytes per token", "MB/s"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        figures = (f"{row['vocab_size']:,}", f"{row['tokens']:,}", f"{row['bytes_per_token']:.2f}")
        table.add_row(Line(row["tokenizer"]), *figures, f"{row['mb_per_second']:.1f}")
    documents = human_documents(result["documents"])
    console.print(f"{result['source']}: {result['bytes']:,} bytes in {documents}", markup=False)
    console.print(table)
