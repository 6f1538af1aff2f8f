"""gpt data on the terminal: the bar of a preparation, data sets, and the named sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from twingpt.commands.output import print_whole
from twingpt.data.builder import Progress
from twingpt.data.library import DatasetSummary
from twingpt.runs.units import beginning, human_bytes, human_count, human_documents, human_time

WIDTH = 40  # of the histogram's longest bar
SAMPLE_LINES = 4


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar on `console` while the block runs, driven by the Progress that it yields."""
    bar = Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TextColumn("{task.fields[counts]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("reading", total=None, counts="")
    shown = ""

    def show(progress: Progress) -> None:
        nonlocal shown
        if progress.task != shown:
            shown = progress.task
            bar.reset(task, total=progress.total or None, description=shown)
        counts = human_documents(progress.documents) if progress.documents else ""
        counts += f", {human_count(progress.tokens)} tokens" if progress.tokens else ""
        bar.update(task, completed=progress.done, counts=counts)

    with bar:
        yield Progress(show)


def print_prepared(console: Console, result: dict[str, Any], word: str) -> None:
    """Print what a preparation made, and how to train on it; `word` is the name, quoted for a shell."""
    unseen = "" if result["val_tokens"] else " --eval-interval 0"  # as there is nothing to evaluate on
    console.print(
        f"[bold]{escape(result['name'])}[/]: {human_documents(result['documents'])}, "
        f"{human_bytes(result['bytes'])} of text; {human_count(result['tokens'])} tokens to train on, "
        f"{_held_out(human_count(result['val_tokens']))}; {human_time(result['seconds'])}, "
        f"{human_bytes(result['peak_rss_bytes'])} of memory at most"
    )
    for note in result["notes"]:
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    if any(what.startswith((".", "without")) for what in result["left_out"]):
        console.print("A glob takes files of any name: gpt data prepare 'FOLDER/**/*.py'", soft_wrap=True)
    console.print(
        f"{escape(result['path'])}\nTrain on it: [bold]gpt train --data {escape(word)}{unseen}[/]", soft_wrap=True
    )


def _held_out(tokens: str, how: str = "") -> str:
    """How many tokens are held out, and how, in words."""
    if tokens == "0":
        return "nothing held out"
    return f"{tokens} held out{f' ({escape(how)})' if how else ''}"


def print_list(console: Console, summaries: list[DatasetSummary]) -> None:
    """Print a line a data set, and the errors of broken ones."""
    table = Table("name", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))  # most fit 80 columns
    for title in ("documents", "text", "tokens", "held out", "tokenizer", "on disk"):
        table.add_column(title, justify="left" if title == "tokenizer" else "right")
    for row in summaries:
        facts = ("", "", "", "", "[red]broken[/]")
        if row.error is None:
            counts = (human_count(row.documents), human_bytes(row.bytes), human_count(row.tokens))
            facts = (*counts, human_count(row.val_tokens), f"{escape(row.tokenizer)} {row.vocab_size:,}")
        table.add_row(escape(row.name), *facts, human_bytes(row.size_bytes))
    print_whole(console, table)
    for row in summaries:
        if row.error:
            console.print(f"[red]{escape(row.name)}: {escape(row.error)}[/]", soft_wrap=True)


def print_info(console: Console, info: dict[str, Any]) -> None:
    """Print what `library.info` gives: figures, sources, a histogram of document lengths, and samples."""
    per_token = info["bytes"] / max(1, info["tokens"] + info["val_tokens"])
    console.print(
        f"[bold]{escape(info['name'])}[/]: {human_documents(info['documents'])}, {human_bytes(info['bytes'])} of text, "
        f"{human_bytes(info['size_bytes'])} on disk\n"
        f"{info['tokens']:,} tokens to train on, {_held_out(format(info['val_tokens'], ','), info['split'])}\n"
        f"tokenizer {escape(info['tokenizer'])} of {info['vocab_size']:,} ids, {per_token:.2f} bytes per token"
    )
    console.print(f"[dim]{escape(info['path'])}[/]", soft_wrap=True)
    for row in info["sources"]:
        licence = f", {row['licence']}" if row["licence"] else ""
        files = f"{row['files']} file{'s' * (row['files'] != 1)}, {human_bytes(row['bytes'])}"
        console.print(escape(f"from {row['source']}: {files}, SHA-256 {row['sha256']}{licence}"), soft_wrap=True)
    console.print("\n[bold]Tokens of a document[/]")
    most = max((row["documents"] for row in info["histogram"]), default=1)
    for row in info["histogram"]:
        bar = "█" * round(WIDTH * row["documents"] / most) or "▏" * bool(row["documents"])
        span = f"{row['least']:,}–{row['most']:,}"
        console.print(f"{span:>25}  [cyan]{bar:{WIDTH}}[/]  {row['documents']:,}")
    for text in info["samples"]:
        console.print("\n[bold]A document begins[/]")
        console.print(escape(beginning(text, SAMPLE_LINES)), overflow="ellipsis", no_wrap=True)


def print_sources(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    """Print two lines a named source, from the rows of `named.describe`."""
    found = list(rows)
    width = max(len(row["name"]) for row in found)
    for row in found:
        files, here = row["files"], sum(file["downloaded"] for file in row["files"])
        shards = f"{row['default']} of {len(files)} shards, unless {row['name']}@SHARDS" if row["default"] else ""
        state = f"{here} of {len(files)} files here" if 0 < here < len(files) else "downloaded" if here else ""
        state = state if files else "comes with Python"
        size = human_bytes(row["size"]) if row["size"] else "–"
        more = list(filter(None, [shards, state and f"[green]{state}[/]"]))
        licence = f"{row['licence']:16}" if more else row["licence"]
        console.print("  ".join([f"[bold]{row['name']:{width}}[/]  {size:>7}  {licence}", *more]), soft_wrap=True)
        pin = row["revision"] or f"SHA-256 {files[0]['sha256']}"
        console.print(f"{'':{width}}  [dim]{row['address']}, {pin}[/]", soft_wrap=True)
