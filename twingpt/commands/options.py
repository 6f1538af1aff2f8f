"""Options that several commands have, and what some of them stand for: backends, the text on stdin."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.help import Command
from twingpt.core.errors import UserError

if TYPE_CHECKING:
    from twingpt.core.config import Setting

# Panels of --help, in their order.
FILE, DATA, MODEL = "Settings from elsewhere", "Data", "Model"
OPTIMIZER, REPORT, WHERE = "Optimization", "Reports and checkpoints", "Where and how"
PANELS = ("Options", FILE, DATA, MODEL, OPTIMIZER, REPORT, WHERE)

# The panel of a setting, where it isn't that of its table.
TABLE_PANELS = {"model": MODEL, "train": OPTIMIZER, "run": WHERE}
OTHER_PANELS = {
    **dict.fromkeys(("data", "val_data", "tokenizer", "vocab_size"), DATA),
    **dict.fromkeys(("eval_interval", "eval_iters", "log_interval", "sample_interval"), REPORT),
    **dict.fromkeys(("checkpoint_interval", "keep", "report_to"), REPORT),
    **dict.fromkeys(("dtype", "gradient_checkpointing"), WHERE),
}


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
Separator = Annotated[str | None, typer.Option(metavar="LINE", help="A line of text files that ends a document.")]
AsText = Annotated[bool, typer.Option("--as-text", help="Take JSON as plain text, a document a file.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


def option(help: str, panel: str, *names: str) -> Any:
    """An option in a panel of --help; its help text states the default."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


class SettingsCommand(Command):
    """A command with an option for each of `keys`, or for every setting that has a flag; ctx.obj has those given.

    The options are made when the command is resolved: `gpt --help` does without them.
    """

    keys: tuple[str, ...] = ()
    options: tuple[Any, ...] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        """Those of the function and of the settings, panel by panel."""
        if not self.options:
            from twingpt.training.settings import FIELDS

            chosen = [about for key, about in FIELDS.items() if (key in self.keys if self.keys else about.flag)]
            self.options = tuple(setting_options(chosen))
        params = [*self.options, *super().get_params(ctx)]
        return sorted(params, key=lambda param: PANELS.index(getattr(param, "rich_help_panel", None) or "Options"))

    def invoke(self, ctx: Any) -> Any:
        """Run the function; Typer would refuse parameters that are not its own."""
        given = {option.name: ctx.params.pop(option.name) for option in self.options}
        ctx.obj = {key: value for key, value in given.items() if value not in (None, ())}
        return super().invoke(ctx)


def setting_options(settings: Iterable[Setting]) -> list[Any]:
    """An option for each setting, as Typer makes it of a parameter."""
    from twingpt.training.settings import TABLES, default_text

    def accept() -> None: ...

    parameters = []
    for about in settings:
        table = next(table for table, fields in TABLES.items() if about.name in fields)
        panel = OTHER_PANELS.get(about.name, TABLE_PANELS[table])
        names = [about.flag] if isinstance(about.flag, str) else []
        default, unit = default_text(about), f" [{about.unit}]" if about.unit else ""
        help = f"{about.sentence}{f' (default: {default})' if default else ''}{unit}"
        described = option(help, panel, *names)
        hint = Annotated[_option_type(about), described]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(about.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    accept.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(accept)
    return list(typer.main.get_command(app).params)


def _option_type(about: Setting) -> Any:
    """A setting's type as Typer has it: a list is a repeated option, and of a path a shell knows how it goes on."""
    from twingpt.core.config import without_none

    kind = Path if about.name == "out" else without_none(about.hint)
    return (list[str] if kind == str | tuple[str, ...] else kind) | None


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
