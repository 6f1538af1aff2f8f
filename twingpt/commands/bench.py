"""gpt bench: speed and memory."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.help import App
from twingpt.commands.options import MODEL, Backends, Device, Json, SettingsCommand, installed_backends, option
from twingpt.commands.output import make_console, print_json

if TYPE_CHECKING:
    from rich.console import Console

app = App(
    name="bench",
    no_args_is_help=True,
    help="Measure speed and memory, both backends side by side.",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench train                      the default run on each backend\n\n"
    "gpt bench forward --preset small --batch-size 4\n\n"
    "gpt bench memory                     the loss, plain and chunked\n",
)

SIZES = ("preset", "shape", "n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "batch_size")

VocabSize = Annotated[int | None, option("Ids of the vocabulary. (default: 2048)", MODEL)]
Repeats = Annotated[int, typer.Option(help="Measurements; the median and their spread are shown.")]
Steps = Annotated[int, typer.Option(help="Steps of a measurement.")]


class BenchForward(SettingsCommand):
    """A command with the settings that matter to a forward pass."""

    keys = ("dtype", "compile", *SIZES)


class BenchTrain(SettingsCommand):
    """A command with those that matter to a training step."""

    keys = (*BenchForward.keys, "gradient_accumulation_steps", "gradient_checkpointing", "optimizer")


@app.command(
    "train",
    cls=BenchTrain,
    epilog="[bold]Examples[/]\n\n"
    "gpt bench train\n\n"
    "gpt bench train --preset small --batch-size 8 --optimizer adamw --dtype bfloat16\n\n"
    "gpt bench train --json | jq '.rows[] | {backend, tokens_per_second, mfu}'\n",
)
def bench_train(
    ctx: typer.Context,
    backend: Backends = "auto",
    device: Device = None,
    vocab_size: VocabSize = None,
    repeats: Repeats = 5,
    steps: Steps = 5,
    json_: Json = False,
) -> None:
    """Time training steps: forward, backward and update, on random tokens."""
    _bench("train", backend, device, ctx.obj | {"vocab_size": vocab_size}, repeats, steps, json_)


@app.command(
    "forward",
    cls=BenchForward,
    epilog="[bold]Examples[/]\n\n"
    "gpt bench forward\n\n"
    "gpt bench forward --preset gpt2 --vocab-size 50304 --batch-size 2 --backend torch\n",
)
def bench_forward(
    ctx: typer.Context,
    backend: Backends = "auto",
    device: Device = None,
    vocab_size: VocabSize = None,
    repeats: Repeats = 5,
    steps: Steps = 5,
    json_: Json = False,
) -> None:
    """Time the forward pass and the loss, as a run's evaluations compute them."""
    _bench("forward", backend, device, ctx.obj | {"vocab_size": vocab_size}, repeats, steps, json_)


@app.command(
    "memory",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench memory                                GPT-2's vocabulary and width, 16,384 tokens\n\n"
    "gpt bench memory --tokens 2048 --backend torch  less, on a small machine\n",
)
def bench_memory(
    backend: Backends = "auto",
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="Compute precision. (default: the device's)")] = None,
    vocab_size: Annotated[int, typer.Option(help="Ids.")] = 50304,
    n_embd: Annotated[int, typer.Option(help="Width.")] = 768,
    tokens: Annotated[int, typer.Option(help="Positions of a batch.")] = 16384,
    json_: Json = False,
) -> None:
    """Measure the memory of the loss and its gradients: all logits at once, and a chunk at a time as in training."""
    from rich import box
    from rich.table import Table

    from twingpt.checks.bench import measure_loss
    from twingpt.runs.units import human_bytes

    result = measure_loss(installed_backends(backend), vocab_size, n_embd, tokens, device, dtype)
    if json_:
        print_json(result)
        return
    console = make_console()
    table = Table("backend", "device", "dtype", "loss", "memory", "plain / this", "seconds", box=box.SIMPLE_HEAD)
    for row in result["rows"]:
        memory, ratio = human_bytes(row["peak_memory_bytes"]), f"{row['ratio']:.1f}" if row["ratio"] else "–"
        facts = (row["backend"], row["device"], row["dtype"], row["way"], memory, ratio)
        table.add_row(*facts, f"{row['seconds_per_step']:.1f}")
    console.print(table)
    _print_skipped(console, result)


def _bench(
    mode: str, backend: str, device: str | None, given: dict[str, Any], repeats: int, steps: int, json_: bool
) -> None:
    from rich.console import Console

    from twingpt.checks.bench import measure

    names = installed_backends(backend)
    how = {key: given.pop(key, None) for key in ("dtype", "compile")}
    options = {key: value for key, value in given.items() if value is not None}
    with Console(stderr=True).status(f"Measuring on {' and '.join(names)}"):
        result = measure(mode, names, options, device=device, repeats=repeats, steps=steps, **how)
    if json_:
        print_json(result)
    else:
        _print_bench(make_console(), result)


def _print_bench(console: "Console", result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from twingpt.runs.units import human_bytes, human_count, human_flops, human_share

    row = result["rows"][0]
    accumulated = f" x {row['gradient_accumulation_steps']}" if row["gradient_accumulation_steps"] > 1 else ""
    console.print(
        f"{human_count(row['parameters'])} parameters, {row['batch_size']}{accumulated} windows of "
        f"{row['config']['block_size']} tokens a step{', ' + row['optimizer'] if row['optimizer'] else ''}; "
        f"medians of {row['repeats']} times {row['steps']} steps"
    )
    table = Table("backend", "device", "dtype", "tok/s", "s/step", "spread", "MFU", "peak memory", box=box.SIMPLE_HEAD)
    for row in result["rows"]:
        table.add_row(
            row["backend"] + (" compiled" if row["compile"] else ""),
            row["device"],
            row["dtype"],
            human_count(row["tokens_per_second"]),
            f"{row['seconds_per_step']:.3g}",
            human_share(row["spread"]),
            human_share(row["mfu"]),
            human_bytes(row["peak_memory_bytes"]),
        )
    console.print(table)
    for row in result["rows"]:
        if row["peak_flops"]:
            peak = f"{human_flops(row['peak_flops'])} in matrix products, {row['peak_source']}"
            console.print(f"MFU of {row['backend']} is the share of {peak}.")
    for row in result["rows"]:
        if row["estimated_memory_bytes"]:
            arrays = [human_bytes(row[f"{name}_memory_bytes"]) for name in ("array", "estimated")]
            console.print(f"Of the memory of {row['backend']}, {arrays[0]} are arrays; {arrays[1]} were estimated.")
    _print_skipped(console, result)


def _print_skipped(console: "Console", result: dict[str, Any]) -> None:
    for entry in result["skipped"]:
        console.print(f"Not measured: {entry['reason']}", markup=False)
