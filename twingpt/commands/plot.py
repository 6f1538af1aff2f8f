"""gpt plot: runs' losses over one another."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from twingpt.commands.help import App
from twingpt.commands.output import print_json

app = App()


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt plot runs/a runs/b             their losses over one another, in runs-plot.svg\n\n"
    "gpt plot latest --x time -o a.png  the last run, over the seconds it took\n\n"
    "gpt plot runs/a runs/b --y bpb     in bits per byte, which compares tokenizers\n\n"
    "gpt plot runs/* --json             the curves as numbers\n"
)
def plot(
    models: Annotated[list[str], typer.Argument(metavar="RUN…", help="Runs; latest is the last one written to.")],
    x: Annotated[str, typer.Option("--x", help="step, tokens or time (seconds of training).")] = "step",
    y: Annotated[
        str | None, typer.Option("--y", help="loss or bpb (bits per byte). (default: bpb where tokenizers differ)")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="An .svg, .png or .pdf file.")] = Path("runs-plot.svg"),
    json_: Annotated[bool, typer.Option("--json", help="Print the curves as one JSON object; draw nothing.")] = False,
) -> None:
    """Draw the training and held-out losses of runs over one another."""
    from twingpt.runs import plot as plots

    plots.check_picture(out)
    curves = plots.read_curves(models, x, y)
    if json_:
        print_json({"x": x, "y": curves.y, "runs": curves.runs})
        return
    plots.plot_curves(curves, out)
    if curves.converted:
        print("gpt: The tokenizers differ, so the losses are in bits per byte; --y loss has nats.", file=sys.stderr)
    for run in curves.runs:
        if not (run["train"]["x"] or run["val"]["x"]):
            print(f"gpt: {run['run']} has no losses over {x}, and is left out.", file=sys.stderr)
    print(out)
