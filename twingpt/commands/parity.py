"""gpt parity: how far the backends are apart."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.help import App
from twingpt.commands.options import Backends, Json, installed_backends
from twingpt.commands.output import make_console, print_json, print_whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = App()


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt parity                  small random models of every shape, and what GPUs have fused kernels for\n\n"
    "gpt parity --backend mlx --device gpu   one device\n\n"
    "gpt parity runs/novel       a run, a checkpoint, or anything that gpt convert reads\n\n"
    "gpt parity path/to/Qwen3-0.6B --against hf,mlx-lm    with transformers and mlx-lm too\n\n"
    "gpt parity --json | jq .ok  in a script; the exit code says it too\n"
)
def parity(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A run, a checkpoint, what gpt convert reads. (default: random models)"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="hf and mlx-lm, by commas: compare with transformers and mlx-lm, in float32 on the CPU."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference, of the largest logit. (default: 1e-5, quantized 1e-4, in bfloat16 3e-2)"
        ),
    ] = None,
    backend: Backends = "auto",
    device: Annotated[str | None, typer.Option(help="One device: cpu, cuda, cuda:1, mps, gpu … (default: all)")] = None,
    seed: Annotated[int, typer.Option(help="Of the tokens and the random weights.")] = 1337,
    json_: Json = False,
) -> None:
    """Compare both backends and the float64 reference, on every device here; exit 1 if they differ."""
    from twingpt.checks import parity as measurement
    from twingpt.checks.others import is_quantized, outsiders
    from twingpt.checks.tolerances import QUANTIZED_TOLERANCE
    from twingpt.weights.formats import open_model

    names = installed_backends(backend)
    opened = open_model(model) if model else None
    others = outsiders(against, opened) if against else []
    if opened is None:
        models = measurement.random_models(seed)
    else:
        models = iter([(Path(str(model)).name, opened.model.config, dict(opened.model.stored()))])
        if tolerance is None and dtype == "float32" and is_quantized(opened):
            tolerance = QUANTIZED_TOLERANCE
    result = measurement.measure(models, names, dtype, tolerance, seed, others, device, fused=opened is None)
    if json_:
        print_json(result)
    else:
        _print_parity(make_console(), result)
    if not result["ok"]:
        raise typer.Exit(1)


def _print_parity(console: "Console", result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table("model", "a", "b", "max diff", "relative", "top-1", "KL", box=box.SIMPLE_HEAD)
    for pair in result["pairs"]:
        fine = pair["max_rel_diff"] <= pair["tolerance"]
        table.add_row(
            pair["model"],
            *(f"{pair[side]} ({pair[f'device_{side}']})" for side in "ab"),
            f"{pair['max_abs_diff']:.1e}",
            f"[{'green' if fine else 'bold red'}]{pair['max_rel_diff']:.1e}[/]",
            f"{pair['top1_agreement']:.1%}",
            f"{pair['kl']:.1e}",
        )
    print_whole(console, table)
    if result["kernels"]:
        print_whole(console, _kernel_table(result["kernels"]))
    for failure in result["failed"]:
        console.print(f"Failed: {failure}.", markup=False)
    for entry in result["left_out"]:
        console.print(f"Left out: {entry['backend']} ({entry['device']}): {entry['reason']}", markup=False)
    verdict = "[green]They agree[/]" if result["ok"] else "[bold red]They differ[/]"
    dtype, limit = result["pairs"][0]["dtype"], f"{result['tolerance']:.0e}"
    console.print(f"{verdict}: in {dtype} a difference may be {limit} of the largest logit.")
    if skipped := ", ".join(f"{entry['model']} with {entry['against']}" for entry in result["skipped"]):
        console.print(f"Not compared, as no family of theirs computes it: {skipped}.", markup=False)


def _kernel_table(checks: list[dict[str, Any]]) -> "Table":
    """A row for each size on each device, with the relative difference of each part."""
    from rich import box
    from rich.table import Table

    parts = list(dict.fromkeys(check["part"] for check in checks))
    table = Table("head", "T", "vocabulary", "by", *parts, box=box.SIMPLE_HEAD)
    rows: dict[tuple[str, ...], list[str]] = {}
    for check in checks:
        by = f"{check['backend']} ({check['device']})"
        row = rows.setdefault((str(check["head_dim"]), str(check["T"]), f"{check['vocab_size']:,}", by), [])
        found = "failed" if check["max_rel_diff"] is None else f"{check['max_rel_diff']:.1e}"
        row.append(f"[{'green' if check['ok'] else 'bold red'}]{found}[/]")
    for size, differences in rows.items():
        table.add_row(*size, *differences)
    return table
