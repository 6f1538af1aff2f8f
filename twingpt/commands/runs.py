"""gpt runs: list, show and remove runs."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from twingpt.commands.help import App
from twingpt.commands.options import Json, Yes
from twingpt.commands.output import ask_to_remove, make_console, print_json
from twingpt.core.errors import UserError

app = App(name="runs")


@app.callback(
    invoke_without_command=True,
    epilog="[bold]Examples[/]\n\n"
    "gpt runs                     the runs below runs/, with their checkpoints\n\n"
    "gpt runs --best --sort loss  each run's best checkpoint, the best run first\n\n"
    "gpt runs show latest         the last run: configuration, starts, checkpoints\n\n"
    "gpt runs rm novel@1000       one checkpoint; without @1000 the whole run\n",
)
def list_runs(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--dir", help="The folder that holds the runs.")] = Path("runs"),
    best: Annotated[bool, typer.Option("--best", help="Only the best checkpoint of each run.")] = False,
    latest: Annotated[bool, typer.Option("--latest", help="Only the latest checkpoint of each run.")] = False,
    max_loss: Annotated[float | None, typer.Option(help="Only checkpoints of at most this held-out loss.")] = None,
    min_step: Annotated[int | None, typer.Option(help="Only checkpoints of at least this step.")] = None,
    search: Annotated[str, typer.Option(help="Only runs with this in their name, path, data or backend.")] = "",
    sort: Annotated[str, typer.Option(help="loss, step, date, size or name.")] = "date",
    json_: Json = False,
) -> None:
    """List runs with their checkpoints, show one, or remove some."""
    from twingpt.core.paths import expand
    from twingpt.runs import inventory

    if command := context.invoked_subcommand:
        for name in context.params:
            source = context.get_parameter_source(name)
            if source and source.name == "COMMANDLINE":
                raise UserError(f"An option before {command} is for the list: put it after, or leave it out.")
        return
    there = inventory.find_runs(expand(folder))
    found = inventory.select(
        there, best=best, latest=latest, max_loss=max_loss, min_step=min_step, search=search, sort=sort
    )
    if json_:
        print_json({"folder": str(folder), "runs": [dataclasses.asdict(run) for run in found]})
    elif found:
        from twingpt.commands.show_runs import print_runs

        print_runs(make_console(), found)
    else:
        print(f"No run in {folder} matches." if there else f"There are no runs in {folder}: gpt train begins one.")


@app.command(epilog="[bold]Examples[/]\n\ngpt runs show novel\n\ngpt runs show latest --json\n")
def show(
    model: Annotated[str, typer.Argument(metavar="RUN", help="Its folder or name, or latest.")], json_: Json = False
) -> None:
    """Show a run: its checkpoints, starts and configuration."""
    from twingpt.runs import inventory

    run, described = inventory.describe(model)
    if json_:
        print_json({**dataclasses.asdict(run), **described})
    else:
        from twingpt.commands.show_runs import print_run

        print_run(make_console(), run, described)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt runs rm novel             all of the run\n\n"
    "gpt runs rm novel@1000 --yes  one checkpoint, without being asked\n"
)
def rm(
    model: Annotated[str, typer.Argument(metavar="RUN|RUN@STEP", help="A run, or one checkpoint of it.")],
    yes: Yes = False,
    json_: Json = False,
) -> None:
    """Remove a run, or one checkpoint of it; latest and best then name others that are left."""
    from twingpt.runs import inventory

    run, checkpoint = inventory.to_remove(model)
    doomed = checkpoint or run
    if not yes:
        ask_to_remove(doomed, inventory.size(doomed))
    kept: list[str] = []
    if checkpoint:
        inventory.remove_checkpoint(run, checkpoint)
    else:
        kept = inventory.remove_run(run)
    if json_:
        print_json({"removed": str(doomed), "kept": kept})
        return
    print(f"Removed {doomed}.")
    if kept:
        print(f"The folder stays, with what training did not write: {', '.join(kept)}.")
