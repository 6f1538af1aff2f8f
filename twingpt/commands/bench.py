"""gpt bench: speed and memory."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.options import MODEL, Backends, Device, Json, installed_backends, option
from twingpt.commands.output import make_console, print_json

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure speed and memory, both backends side by side.",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench train                      the default run on each backend\n\n"
    "gpt bench forward --preset small --batch-size 4\n\n"
    "gpt bench memory                     the loss, plain and chunked\n",
)

Dtype = Annotated[str | None, typer.Option(help="Compute precision. (default: the device's)")]
Compile = Annotated[bool | None, typer.Option(help="Compile the step. (default: not on a CPU)")]
Preset = Annotated[str | None, option("micro, tiny, small, medium, gpt2 or large. (default: as gpt train)", MODEL)]
Shape = Annotated[str | None, option("qwen3, llama, gpt2 or nano.", MODEL)]
VocabSize = Annotated[int | None, option("Tokens.", MODEL)]
Layers = Annotated[int | None, option("Blocks.", MODEL)]
Heads = Annotated[int | None, option("Query heads.", MODEL)]
KVHeads = Annotated[int | None, option("Key-value heads.", MODEL)]
Width = Annotated[int | None, option("Width.", MODEL)]
Context = Annotated[int | None, option("Context, in tokens.", MODEL)]
BatchSize = Annotated[int | None, typer.Option(help="Windows of a micro-batch. (default: as gpt train)")]
Repeats = Annotated[int, typer.Option(help="Measurements; the median and their spread are shown.")]
Steps = Annotated[int, typer.Option(help="Steps of a measurement.")]


@app.command(
    "train",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench train\n\n"
    "gpt bench train --preset small --batch-size 8 --optimizer adamw --dtype bfloat16\n\n"
    "gpt bench train --json | jq '.rows[] | {backend, tokens_per_second, mfu}'\n",
)
def bench_train(
    backend: Backends = "auto",
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = None,
    preset: Preset = None,
    shape: Shape = None,
    vocab_size: VocabSize = None,
    n_layer: Layers = None,
    n_head: Heads = None,
    n_kv_head: KVHeads = None,
    n_embd: Width = None,
    block_size: Context = None,
    batch_size: BatchSize = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Micro-batches of a step.")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations again.")] = False,
    optimizer: Annotated[str | None, typer.Option(help="adamw or muon. (default: as gpt train)")] = None,
    repeats: Repeats = 5,
    steps: Steps = 5,
    json_: Json = False,
) -> None:
    """Time training steps: forward, backward and update, on random tokens."""
    _bench("train", locals())


@app.command(
    "forward",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench forward\n\n"
    "gpt bench forward --preset gpt2 --vocab-size 50304 --batch-size 2 --backend torch\n",
)
def bench_forward(
    backend: Backends = "auto",
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = None,
    preset: Preset = None,
    shape: Shape = None,
    vocab_size: VocabSize = None,
    n_layer: Layers = None,
    n_head: Heads = None,
    n_kv_head: KVHeads = None,
    n_embd: Width = None,
    block_size: Context = None,
    batch_size: BatchSize = None,
    repeats: Repeats = 5,
    steps: Steps = 5,
    json_: Json = False,
) -> None:
    """Time the forward pass and the loss, as a run's evaluations compute them."""
    _bench("forward", locals())


@app.command(
    "memory",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench memory                                GPT-2's vocabulary and width, 16,384 tokens\n\n"
    "gpt bench memory --tokens 2048 --backend torch  less, on a small machine\n",
)
def bench_memory(
    backend: Backends = "auto",
    device: Device = None,
    dtype: Dtype = None,
    vocab_size: Annotated[int, typer.Option(help="Ids.")] = 50304,
    n_embd: Annotated[int, typer.Option(help="Width.")] = 768,
    tokens: Annotated[int, typer.Option(help="Positions of a batch.")] = 16384,
    json_: Json = False,
) -> None:
    """Measure the memory of the loss and its gradients: all logits at once, and a chunk at a time as in training."""
    from rich import box
    from rich.table import Table

    from twingpt.checks.bench import measure_loss
    from twingpt.core.units import human_bytes

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


def _bench(mode: str, values: dict[str, Any]) -> None:
    from rich.console import Console

    from twingpt.checks.bench import measure

    json_, names = values.pop("json_"), installed_backends(values.pop("backend"))
    settings = {key: values.pop(key) for key in ("device", "dtype", "compile", "repeats", "steps")}
    options = {key: value for key, value in values.items() if value is not None}
    with Console(stderr=True).status(f"Measuring on {' and '.join(names)}"):
        result = measure(mode, names, options, **settings)
    if json_:
        print_json(result)
    else:
        _print_bench(make_console(), result)


def _print_bench(console: "Console", result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from twingpt.core.units import human_bytes, human_count, human_flops, human_share

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
