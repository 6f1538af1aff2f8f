"""Options that several commands have, and what some of them stand for: backends, the text on stdin."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from twingpt.core.errors import UserError

MODEL = "Model"  # a panel of --help
TOKENIZERS = "bpe, char, byte, gpt2, cl100k_base, o200k_base, or a tokenizer.json, its folder, or a run."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
Backend = Annotated[str, typer.Option(help="auto, mlx or torch.")]
Device = Annotated[
    str | None, typer.Option(help="A device of the backend: cpu, cuda, cuda:1, mps, gpu … (default: best)")
]
Backends = Annotated[str, typer.Option("--backend", help="mlx, torch, or auto for all that are installed.")]
Field = Annotated[
    str | None, typer.Option(help="What has the text in JSON and tables, a.b within another. (default: text)")
]
Errors = Annotated[str, typer.Option(help="What is not UTF-8: strict stops, replace takes U+FFFD.")]
SkipBadLines = Annotated[int, typer.Option(help="Leave out so many JSON records that have no text.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


def option(help: str, panel: str, *names: str) -> Any:
    """An option in a panel of --help; its help text states the default."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def installed_backends(backend: str) -> list[str]:
    """The backend of that name, or for auto all that are installed."""
    from twingpt.backends import registry

    if backend != "auto":
        return [registry.choose(backend)[0]]
    return [name for name in registry.BACKENDS if registry.installed(name)] or [registry.choose()[0]]


def read_stdin(what: str = "prompt") -> str:
    """The text on stdin; `what` it is stands in the error if it is not UTF-8."""
    if sys.stdin is None:
        raise UserError(f"There is no stdin to read the {what} from.")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} on stdin is not UTF-8 text: byte {error.start}.") from None
