"""gpt train: from flags, files and the wizard to a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.help import App
from twingpt.commands.options import FILE, OPTIMIZER, WHERE, SettingsCommand, option
from twingpt.commands.output import make_console, print_json
from twingpt.core.errors import UserError
from twingpt.runs.shell import quote

if TYPE_CHECKING:
    from rich.console import Console

    from twingpt.training.state import RunState

app = App()


@app.command(
    cls=SettingsCommand,
    epilog="[bold]Examples[/]\n\n"
    "gpt train                                    the Python documentation, offline\n\n"
    "gpt train --data novel.txt --out runs/novel  your own text\n\n"
    "gpt train --data shakespeare --tokenizer char --preset micro --max-iters 2000\n\n"
    "gpt train --data novel.txt:0.7 --data notes/:0.3    a mixture, and the loss on each\n\n"
    "gpt train --depth 6 --data novel.txt         one dial: size, batch, rates and length from the depth\n\n"
    "gpt train --wizard                           questions, an estimate measured here, and a train.toml\n\n"
    "gpt train --config train.toml --set norm=layernorm --set 'no_rope_layers=[3]'\n\n"
    "gpt train --resume runs/novel --backend mlx  go on, on the other backend\n\n"
    "gpt train --report-to tensorboard,wandb      follow the run there too\n\n"
    "What --set says wins over a flag, a flag over the --config file, and the file over the recipe.\n",
)
def train(
    ctx: typer.Context,
    config: Annotated[Path | None, option("A TOML file of settings, such as a run's config.toml.", FILE)] = None,
    set_: Annotated[
        list[str] | None, option("KEY=VALUE, any setting of a model or a run; repeatable.", FILE, "--set")
    ] = None,
    wizard: Annotated[bool, option("Ask for them, estimate, and write a file.", FILE, "--wizard")] = False,
    stop_after: Annotated[int | None, option("Stop, saved, when this many steps are done.", OPTIMIZER)] = None,
    resume: Annotated[str | None, option("Go on with a run: its folder, name, RUN@STEP, or latest.", WHERE)] = None,
    json_: Annotated[bool, option("End with one JSON object on stdout; display on stderr.", WHERE, "--json")] = False,
) -> None:
    """Train a GPT, or go on training one, and keep it as checkpoints that other tools open.

    What is not given comes from a recipe for the kind of device, and the run's config.toml keeps all of it.
    """
    given: dict[str, Any] = ctx.obj
    if wizard:
        others = {"config": config, "set": set_, "stop_after": stop_after, "resume": resume, "json": json_ or None}
        beside = [key for key, value in others.items() if value is not None]
        config = _ask_wizard([*(key for key in given if key != "report_to"), *beside])
        given = {key: given[key] for key in given.keys() & {"report_to"}}
    from twingpt.runs.console import ConsoleReporter
    from twingpt.training import settings
    from twingpt.training.launch import new_run
    from twingpt.training.resume import resume_run
    from twingpt.training.trainer import Trainer
    from twingpt.weights.formats import open_model

    console = make_console(stderr=json_)
    options, names = settings.gather(config, given, set_ or [])
    where = settings.RunSettings(**{key: options.pop(key) for key in settings.TABLES["run"].keys() & options.keys()})
    for key in ("out", "init_from"):
        if resume is not None and getattr(where, key):
            raise UserError(f"--resume goes on in the run's own folder, with its own model: leave out {names[key]}.")
    if stop_after is not None and stop_after < 1:
        raise UserError(f"--stop-after must be at least 1, and is {stop_after}.")
    common: dict[str, Any] = {"compile": where.compile, "report_to": where.report_to, "wired_limit": where.wired_limit}
    if resume is not None:
        state = resume_run(resume, options, where.backend, where.device, stop_after=stop_after, names=names, **common)
    else:
        init = open_model(where.init_from).model if where.init_from else None
        place = (where.backend or "auto", where.device)
        state = new_run(options, Path(where.out) if where.out else None, *place, init=init, **common)
    _print_settings(console, state, options)
    display = ConsoleReporter(console)
    trainer = Trainer(state, [display])
    with display.live():
        summary = trainer.fit(stop_after)
    if json_:
        print_json(summary | {"settings": settings.spelled_out(state.config, state.train)})
    else:
        _print_summary(console, summary)
    if summary["reason"] == "interrupted":
        raise typer.Exit(trainer.interrupt.exit_code)


def _ask_wizard(beside: list[str]) -> Path:
    """The file that the wizard wrote, if it is to be trained on now."""
    if beside:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in beside)
        raise UserError(f"--wizard asks for the settings itself: leave out {names}.")
    from twingpt.commands.wizard import run

    answer = run(make_console())
    if answer is None:
        raise typer.Exit(130)
    path, start = answer
    if not start:
        raise typer.Exit
    return path


def _print_settings(console: "Console", state: "RunState", options: dict[str, Any]) -> None:
    """What the depth came to, and what is not as in the recipe."""
    from rich.markup import escape

    from twingpt.training.depth import describe
    from twingpt.training.recipes import differences
    from twingpt.training.settings import as_pairs

    if "depth" in options:
        console.print(describe(options["depth"], state.config, state.train))
    changed = differences(state.config, state.train, state.device, options, fine_tuned=bool(state.init_from))
    if changed:
        console.print(f"[dim]Other than the recipe: {escape(as_pairs(changed))}[/]")


def _print_summary(console: "Console", summary: dict[str, Any]) -> None:
    from rich.markup import escape

    run, word = escape(summary["run"]), escape(quote(summary["run"]))
    lines = [f"\nCheckpoint: [bold]{escape(summary['checkpoint'])}[/]", f"Report:     {run}/report.html"]
    if known := summary["baseline"]:
        better = 1 - summary["val_bpb"] / known["bits_per_byte"]
        lines.insert(
            1,
            f"Baseline:   {known['n']}-gram, {known['bits_per_byte']:.3f} bits per byte; the model "
            f"{summary['val_bpb']:.3f}, {abs(better):.0%} {'less' if better > 0 else 'more'}",
        )
    if summary["reason"] != "finished":
        lines.append(f"Go on:      [bold]gpt train --resume {word}[/]")
    lines.append(f'Try it:     [bold]gpt generate {word} -p "…"[/]')
    console.print("\n".join(lines), soft_wrap=True)
