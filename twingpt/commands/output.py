"""Output of commands: JSON, a Rich console, and the question before something is removed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """Print one line of JSON, with null for numbers that are not finite."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, list):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    print(json.dumps(finite(value), allow_nan=False))


def make_console() -> Console:
    """A Rich console on stdout, without Rich's own colours for numbers and paths."""
    from rich.console import Console

    return Console(highlight=False)


def ask_to_remove(doomed: Path, size: int) -> None:
    """Ask whether to remove a folder of `size` bytes; exit 1 if the answer is no."""
    from twingpt.runs.units import human_bytes

    if not typer.confirm(f"Remove {doomed}, {human_bytes(size)}?", err=True):
        raise typer.Exit(1)
