"""--help of every command: no name cut, and an option for each setting, described as its field is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import typer
from rich.cells import cell_len

from tests.cli.test_commands import run_python
from twingpt import cli
from twingpt.commands.help import Command, Group
from twingpt.training.settings import FIELDS, default_text


def walk(command, names=()) -> Iterator[tuple[str, object]]:
    """A command and all within it, by their names in one line."""
    yield " ".join(names), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*names, name))


COMMANDS = dict(walk(typer.main.get_command(cli.app)))


@pytest.fixture
def help_of(gpt, monkeypatch):
    """The --help of a command, so many columns wide, in a pipe or as a terminal has it, less its colours."""

    def show(name: str, columns: int, *, terminal: bool) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        code, out, err = gpt(*name.split(), "--help")
        assert code == 0, err
        return re.sub("\x1b[^m]*m", "", out)

    return show


@pytest.mark.parametrize(("columns", "terminal"), [(80, True), (80, False), (40, True), (40, False)])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_name_is_cut(help_of, name, columns, terminal):
    command = COMMANDS[name]
    assert isinstance(command, (Command, Group))
    out = help_of(name, columns, terminal=terminal)
    context = command.make_context("gpt", [], resilient_parsing=True)
    words = [word for param in command.get_params(context) for word in (*param.opts, *param.secondary_opts)]
    for word in [word for word in words if word.startswith("-")] + [*getattr(command, "commands", {})]:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", out), word
    assert not re.search(r"-\w*…", out)
    text = f"{command.help}\n{command.epilog or ''}".replace("[bold]", "").replace("[/]", "").replace("\\[", "[")
    assert set(text.split()) <= set(out.split())
    panels = [line for line in out.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert {cell_len(line) for line in panels} <= {max(columns, 72)}
    if terminal and columns == 80:
        assert max(map(cell_len, out.splitlines())) <= 80


def test_an_example_is_one_line_in_a_pipe(help_of):
    example = 'gpt data prepare roneneldan/TinyStories --name stories     with pip install "twingpt[hf]"'
    assert example in help_of("data prepare", 80, terminal=False)
    assert example not in help_of("data prepare", 80, terminal=True)


def test_options_of_train_are_the_settings(help_of):
    lines = help_of("train", 400, terminal=False).splitlines()
    for key, about in FIELDS.items():
        flag = f"--{key.replace('_', '-')}"
        line = next((line for line in lines if line.startswith(f"│ {flag} ")), "")
        assert bool(line) == bool(about.flag), key
        if about.flag:
            assert about.sentence in line and default_text(about) in line and about.unit in line
        if isinstance(about.flag, str):
            assert about.flag.replace("/", " / ") in line


@pytest.mark.parametrize("flag", [True, False])
def test_a_switch_says_yes_no_or_nothing(flag):
    command = COMMANDS["train"]
    context = command.make_context("train", [f"--{'' if flag else 'no-'}compile", "--stop-nonfinite"])
    given = {key: value for key, value in context.params.items() if key in FIELDS and value not in (None, ())}
    assert given == {"compile": flag, "skip_nonfinite": False}


def test_the_help_of_all_reads_no_description():
    done = run_python(
        "import sys; sys.argv = ['gpt', '--help']\nfrom twingpt.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'twingpt.core.config', 'twingpt.training.settings'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
