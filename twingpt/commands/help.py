"""--help of every command: panels as Typer has them, in which no option's name is cut."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

NARROWEST = 72  # columns: a narrower terminal breaks the lines itself, so that it too has every word
NAMES = 36  # columns: a switch whose two names need more has them in two lines

F = TypeVar("F", bound=Callable[..., Any])
Panels = dict[str, list[tuple[str, str]]]  # title -> names, and what they are


class Command(TyperCommand):
    """A command whose --help is `print_help`'s."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, as Typer does: the formatter stays empty."""
        print_help(self, ctx, {})


class Group(TyperGroup):
    """A group of commands whose --help is `print_help`'s."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, as Typer does: the formatter stays empty."""
        commands = [(name, self.commands[name].help or "") for name in self.list_commands(ctx)]
        print_help(self, ctx, {"Commands": [(name, help.split("\n\n")[0]) for name, help in commands]})


class App(typer.Typer):
    """A Typer app whose commands, and itself, have the --help of this module."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(cls=Group, **attributes)

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = Command, **attributes: Any
    ) -> Callable[[F], F]:
        """Typer's decorator, which makes a function a command."""
        return super().command(name, cls=cls, **attributes)


def print_help(command: Any, ctx: Any, commands: Panels) -> None:
    """Print usage, description, a panel for each group of options, `commands` and the epilog."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.width = max(console.width, NARROWEST)
    console.print(f"\n {command.get_usage(ctx)}\n", style="bold", markup=False)
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        console.print(Padding(Text.from_markup(paragraph.replace("\n", " ")), (0, 0, 1, 1)))
    for title, rows in (_option_panels(command, ctx) | commands).items():
        _print_panel(console, title, rows)
    console.print()
    for line in (command.epilog or "").strip().split("\n\n"):
        text = Text.from_markup(line)
        if console.is_terminal:
            console.print(Padding.indent(text, 1))
        else:  # in a pipe an example is one line, to be copied
            console.print(Text(" ") + text, soft_wrap=True)


def _option_panels(command: Any, ctx: Any) -> Panels:
    """The arguments and options of a command, by panel; those that name none come first."""
    panels: Panels = {"Arguments": [], "Options": []}
    for param in command.get_params(ctx):
        usual = "Arguments" if param.param_type_name == "argument" else "Options"
        names, help = param.get_help_record(ctx)
        if len(names) > NAMES:
            names = names.replace(" / ", " /\n")
        panels.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append((names, help))
    return {title: rows for title, rows in panels.items() if rows}


def _print_panel(console: "Console", title: str, rows: list[tuple[str, str]]) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for names, help in rows:
        first, second = Text(names, "cyan"), Text(help)
        first.highlight_regex(r"<.*?>", "yellow")
        second.highlight_regex(r"\[.*\]$", "dim")
        table.add_row(first, second)
    console.print(Panel(table, title=title, title_align="left", border_style="dim"))
