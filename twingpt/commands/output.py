"""How commands answer: JSON, a console, and the question before something is removed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """One line of JSON, in which a number that is not finite is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, list):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    print(json.dumps(finite(value), allow_nan=False))


def make_console() -> Console:
    """A console on stdout that gives numbers and paths no colours of its own."""
    from rich.console import Console

    return Console(highlight=False)


def ask_to_remove(doomed: Path, size: int) -> None:
    """Ask on the terminal; exit 1 if the answer is no. The size is in bytes."""
    from twingpt.core.units import human_bytes

    if not typer.confirm(f"Remove {doomed}, {human_bytes(size)}?", err=True):
        raise typer.Exit(1)
