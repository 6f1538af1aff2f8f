"""The `gpt` command: the Typer app, its commands, and the error policy with its exit codes, which --help lists.

`gpt X` is in commands/X.py, which imports what X needs when it runs, so that `gpt --help` is quick. Those modules do
without `from __future__ import annotations`: Typer would evaluate those of every command, as text, at each start.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer

from twingpt.commands import baseline, bench, convert, data, doctor, generate, parity, plot, runs, tokenize, train
from twingpt.commands.help import App
from twingpt.core.errors import UserError
from twingpt.version import __version__

UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that Typer uses, which may be a copy of its own

app = App(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run small GPTs, the same in MLX and in PyTorch.",
    epilog="--debug, anywhere, shows the traceback of an error.\n\n"
    "Exit codes: 0 done; 1 a check that failed, or a question answered with no; 2 a mistake or trouble, in one line; "
    "130 ended by Ctrl-C and 143 by SIGTERM, training saved before.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"twingpt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take what stands before a command."""


for command in (train, generate, convert, plot, baseline, parity, doctor, runs, data, bench, tokenize):
    app.add_typer(command.app)  # in the order of gpt --help


def main() -> None:
    """Run a command; a user's mistake gets one line on stderr and exit code 2."""
    debug = "--debug" in sys.argv[1:]
    sys.argv = [sys.argv[0], *(argument for argument in sys.argv[1:] if argument != "--debug")]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # or a character that the terminal lacks would be an error
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)  # standalone, it would print a box of several lines for a mistake
    except UsageError as error:
        sys.exit(_report_usage(error))
    except typer.Abort:
        print("Aborted.", file=sys.stderr)
        sys.exit(1)
    except (UserError, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"gpt: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _report_usage(error: Any) -> int:
    """Print what is wrong with a command line, a UsageError, and return the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: its help
        error.show()
    else:
        message = str(error.format_message())
        command = error.ctx.command_path if error.ctx else "gpt"
        print(f"gpt: {message}{'' if message[-1:] in '.?' else '.'} See {command} --help.", file=sys.stderr)
    return int(error.exit_code)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'while writing or reading'}."
    if isinstance(error, MemoryError):
        return f"There is not enough memory: a smaller model, --batch-size or --block-size needs less. {error}".strip()
    return str(error)
