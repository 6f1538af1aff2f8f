"""gpt tokenize on the terminal: the tokens of a text, and tokenizers compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

COLORS = ("blue", "dark_orange3", "dark_green", "purple4", "dark_red", "deep_sky_blue4")


def print_tokens(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a text with a colour for each token, and a table of the rows of `tokenizers.describe_tokens`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from twingpt.runs.units import visible

    text = Text()
    table = Table("", "id", "text", "bytes", box=box.SIMPLE_HEAD)
    for i, row in enumerate(rows):
        style = "bold reverse" if row["special"] else f"white on {COLORS[i % len(COLORS)]}"
        text.append(visible(row["text"]), style)
        text.append("\n" if row["text"].endswith("\n") and not row["special"] else "")
        table.add_row(str(i), str(row["id"]), Text(visible(row["text"]), style), row["bytes"])
    if console.color_system:  # without colours it would be the text as it was given
        console.print(text)
    console.print(table)
    console.print(f"{len(rows)} token{'s' * (len(rows) != 1)}")


def print_comparison(console: Console, result: Mapping[str, Any]) -> None:
    """Print the result of `learning.compare` as a table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from twingpt.commands.output import print_whole
    from twingpt.runs.units import human_documents, human_share

    table, unspelled = Table("tokenizer", box=box.SIMPLE_HEAD), any(row["unspelled"] for row in result["rows"])
    for name in ("vocabulary", "tokens", "bytes per token", "MB/s", *["can't spell"] * unspelled):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        figures = (f"{row['vocab_size']:,}", f"{row['tokens']:,}", f"{row['bytes_per_token']:.2f}")
        last = [human_share(row["unspelled"])] * unspelled
        table.add_row(Text(row["tokenizer"]), *figures, f"{row['mb_per_second']:.1f}", *last)
    documents = human_documents(result["documents"])
    console.print(f"{result['source']}: {result['bytes']:,} bytes in {documents}", markup=False, soft_wrap=True)
    print_whole(console, table)
