"""Output of commands: JSON, a Rich console, and the question before something is removed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 100_000  # columns: where nothing is to be wrapped


def print_json(value: Any) -> None:
    """Print one line of JSON, with null for numbers that are not finite."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, list):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    print(json.dumps(finite(value), allow_nan=False))


def make_console(*, stderr: bool = False) -> Console:
    """A Rich console, without Rich's own colours for numbers and paths; in a pipe it wraps and cuts nothing."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=WIDE, soft_wrap=True)
    return console


def print_whole(console: Console, table: Table) -> None:
    """Print a table that has names for other commands at its own width: a narrower terminal wraps, and cuts nothing."""
    from rich.segment import Segments

    segments = console.render(table, console.options.update(width=WIDE))
    console.print(Segments(segments), soft_wrap=True, end="")


def ask_to_remove(doomed: Path, size: int) -> None:
    """Ask whether to remove a folder of `size` bytes; exit 1 if the answer is no."""
    from twingpt.runs.units import human_bytes

    if not typer.confirm(f"Remove {doomed}, {human_bytes(size)}?", err=True):
        raise typer.Exit(1)
