"""The `gpt` command: parse, call, print. What a command needs is imported when it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from twingpt.core.config import GPTConfig
    from twingpt.core.trainer import Trainer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run small GPTs, the same in MLX and in PyTorch.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
Backend = Annotated[str, typer.Option(help="auto, mlx or torch.")]
Device = Annotated[
    str | None, typer.Option(help="A device of the backend: cpu, cuda, cuda:1, mps, gpu … (default: best)")
]

MODEL, DATA, OPTIMIZER, REPORT, WHERE = "Model", "Data", "Optimization", "Reports and checkpoints", "Where and how"
FILE = "Settings from elsewhere"


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


@app.callback(epilog="--debug, anywhere, shows the traceback of an error.")
def options() -> None:
    """Train and run small GPTs, the same in MLX and in PyTorch."""


def _print_json(value: Any) -> None:
    """One line of JSON, in which a number that is not finite is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, list):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    print(json.dumps(finite(value), allow_nan=False))


@app.command(
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
    "What --set says wins over a flag, a flag over the --config file, and the file over the recipe.\n"
)
def train(
    config: Annotated[Path | None, _option("A TOML file of settings, such as a run's config.toml.", FILE)] = None,
    set_: Annotated[
        list[str] | None, _option("KEY=VALUE, any setting of a model or a run; repeatable.", FILE, "--set")
    ] = None,
    wizard: Annotated[bool, _option("Ask for them, estimate, and write a file.", FILE, "--wizard")] = False,
    data: Annotated[
        list[str] | None,
        _option("What gpt data sources or list names, or a file or folder; several as SOURCE:WEIGHT, repeated.", DATA),
    ] = None,
    tokenizer: Annotated[
        str | None,
        _option("bpe, char, byte, gpt2, cl100k_base, o200k_base, or a tokenizer.json, its folder, or a run.", DATA),
    ] = None,
    vocab_size: Annotated[int | None, _option("Ids of a BPE that is trained on the data.", DATA)] = None,
    preset: Annotated[str | None, _option("micro, tiny, small, medium, gpt2 or large.", MODEL)] = None,
    depth: Annotated[int | None, _option("1 to 48: size, batch, rates and length follow from it.", MODEL)] = None,
    shape: Annotated[str | None, _option("qwen3, llama, gpt2 or nano: the kind of block.", MODEL)] = None,
    n_layer: Annotated[int | None, _option("Blocks.", MODEL)] = None,
    n_head: Annotated[int | None, _option("Query heads.", MODEL)] = None,
    n_kv_head: Annotated[int | None, _option("Key-value heads; divides n_head.", MODEL)] = None,
    n_embd: Annotated[int | None, _option("Width.", MODEL)] = None,
    block_size: Annotated[int | None, _option("Context, in tokens.", MODEL)] = None,
    dropout: Annotated[float | None, _option("On the embedding and each branch.", MODEL)] = None,
    batch_size: Annotated[int | None, _option("Windows of a micro-batch.", OPTIMIZER)] = None,
    gradient_accumulation_steps: Annotated[int | None, _option("Micro-batches of a step.", OPTIMIZER)] = None,
    max_iters: Annotated[int | None, _option("Steps of the whole schedule.", OPTIMIZER)] = None,
    stop_after: Annotated[int | None, _option("Stop, saved, when this many steps are done.", OPTIMIZER)] = None,
    optimizer: Annotated[str | None, _option("adamw, or muon for the blocks' matrices.", OPTIMIZER)] = None,
    learning_rate: Annotated[float | None, _option("AdamW's, at its highest.", OPTIMIZER)] = None,
    matrix_lr: Annotated[float | None, _option("Muon's.", OPTIMIZER)] = None,
    embedding_lr: Annotated[float | None, _option("The embedding's. (default: learning_rate)", OPTIMIZER)] = None,
    head_lr: Annotated[float | None, _option("An untied head's. (default: learning_rate)", OPTIMIZER)] = None,
    min_lr: Annotated[float | None, _option("At the end. (default: a tenth)", OPTIMIZER)] = None,
    warmup_iters: Annotated[int | None, _option("Steps of linear warm-up.", OPTIMIZER)] = None,
    lr_schedule: Annotated[str | None, _option("cosine, wsd or constant.", OPTIMIZER)] = None,
    warmdown_fraction: Annotated[float | None, _option("Of the run, in which wsd falls.", OPTIMIZER)] = None,
    weight_decay: Annotated[float | None, _option("On matrices and embeddings.", OPTIMIZER)] = None,
    momentum: Annotated[float | None, _option("Muon's.", OPTIMIZER)] = None,
    beta1: Annotated[float | None, _option("AdamW's.", OPTIMIZER)] = None,
    beta2: Annotated[float | None, _option("AdamW's.", OPTIMIZER)] = None,
    grad_clip: Annotated[float | None, _option("Largest norm of all gradients; 0 is off.", OPTIMIZER)] = None,
    seed: Annotated[int | None, _option("Of initial weights, data order and dropout.", OPTIMIZER)] = None,
    eval_interval: Annotated[int | None, _option("Steps between evaluations; 0 is off.", REPORT)] = None,
    eval_iters: Annotated[int | None, _option("Batches of an evaluation; 0 is the whole split.", REPORT)] = None,
    log_interval: Annotated[int | None, _option("Steps between reports.", REPORT)] = None,
    sample_interval: Annotated[int | None, _option("Steps between samples; 0 is off.", REPORT)] = None,
    checkpoint_interval: Annotated[int | None, _option("Steps between checkpoints; 0 is off.", REPORT)] = None,
    keep: Annotated[int | None, _option("Latest checkpoints to keep, beside the best.", REPORT)] = None,
    report_to: Annotated[
        str, _option("tensorboard, wandb, mlflow: one or several, with commas. (default: none)", REPORT)
    ] = "",
    out: Annotated[Path | None, _option("The run's folder. (default: runs/DATA-DATE)", WHERE)] = None,
    init_from: Annotated[
        str | None, _option("Fine-tune this model: a run, a checkpoint, or what gpt convert reads.", WHERE)
    ] = None,
    resume: Annotated[str | None, _option("Go on with a run: its folder, name, RUN@STEP, or latest.", WHERE)] = None,
    backend: Annotated[str | None, _option("auto, mlx or torch. (default: auto)", WHERE)] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, mps, gpu … (default: best)", WHERE)] = None,
    dtype: Annotated[
        str | None, _option("Compute precision: float32, bfloat16 or float16. (default: the device's)", WHERE)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Less memory, a third more work. (default: not)", rich_help_panel=WHERE)
    ] = None,
    skip_nonfinite: Annotated[
        bool | None,
        typer.Option(
            "--skip-nonfinite/--stop-nonfinite",
            help="A step that is not finite is left out and counted. (default: stop)",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    compile: Annotated[
        bool | None, typer.Option(help="Compile the step. (default: not on a CPU)", rich_help_panel=WHERE)
    ] = None,
    json_: Annotated[bool, _option("End with one JSON object on stdout; display on stderr.", WHERE, "--json")] = False,
) -> None:
    """Train a GPT, or go on training one, and keep it as checkpoints that other tools open.

    What is not given comes from a recipe for the kind of device, and the run's config.toml keeps all of it.
    """
    given = {key: value for key, value in locals().items() if value is not None}
    for key in ("json_", "wizard", "report_to"):
        given.pop(key)
    if wizard:
        config, given = _ask_wizard([*given, *["json"] * json_]), {}
    for key in ("config", "set_", "stop_after", "resume"):
        given.pop(key, None)
    from rich.console import Console

    from twingpt.core import launch, settings, trackers
    from twingpt.core.console import ConsoleReporter
    from twingpt.weights.formats import open_model

    track = trackers.parse(report_to)
    console = Console(stderr=json_, highlight=False)
    options, names = settings.gather(config, given, set_ or [])
    where = {key: options.pop(key, None) for key in settings.TABLES["run"]}
    for key in ("out", "init_from"):
        if resume is not None and where[key]:
            raise UserError(f"--resume goes on in the run's own folder, with its own model: leave out {names[key]}.")
    if stop_after is not None and stop_after < 1:
        raise UserError(f"--stop-after must be at least 1, and is {stop_after}.")
    place = (where["backend"] or "auto", where["device"], where["compile"])
    if resume is not None:
        trainer = launch.resume_run(resume, options, *place, stop_after, names)
    else:
        init = open_model(where["init_from"]).model if where["init_from"] else None
        trainer = launch.new_run(options, Path(where["out"]) if where["out"] else None, *place, init)
    _print_settings(console, trainer, options)
    reporter = ConsoleReporter(console)
    trainer.reporters = [*trainer.reporters, *trackers.make(track, trainer.run), reporter]
    with reporter.live():
        summary = trainer.fit(stop_after)
    if json_:
        _print_json(summary | {"settings": settings.spelled_out(trainer.config, trainer.train)})
    else:
        _print_summary(console, summary)


def _ask_wizard(beside: list[str]) -> Path:
    """The file that the wizard wrote, if it is to be trained on now."""
    if beside:
        names = ", ".join(f"--{key.rstrip('_').replace('_', '-')}" for key in beside)
        raise UserError(f"--wizard asks for the settings itself: leave out {names}.")
    from twingpt.core.wizard import run

    answer = run(_console())
    if answer is None:
        raise typer.Exit(130)
    path, start = answer
    if not start:
        raise typer.Exit
    return path


def _print_settings(console: Console, trainer: Trainer, options: dict[str, Any]) -> None:
    """What the depth came to, and what is not as in the recipe."""
    from rich.markup import escape

    from twingpt.core import launch
    from twingpt.core.depth import describe
    from twingpt.core.settings import as_pairs

    if "depth" in options:
        console.print(describe(options["depth"], trainer.config, trainer.train))
    differences = launch.differences(trainer, options)
    if differences:
        console.print(f"[dim]Other than the recipe: {escape(as_pairs(differences))}[/]")


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    from rich.markup import escape

    run, word = escape(summary["run"]), escape(shlex.quote(summary["run"]))
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


@app.command(
    epilog="[bold]Examples[/]\n\n"
    'gpt generate runs/novel -p "It was a"\n\n'
    'gpt generate runs/novel@best -p "It was a" -m 400 --temp 0.7 --seed 7\n\n'
    "echo -n 'def ' | gpt generate runs/code -p - --json\n"
)
def generate(
    model: Annotated[str, typer.Argument(metavar="CKPT|RUN", help="A checkpoint, or a run: RUN@best, latest.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from; - reads it from stdin.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Tokens to generate at most.")] = 200,
    temp: Annotated[float, typer.Option(help="Temperature; 0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that make up this probability.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Drop those less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens seen before are less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text, on either backend.")] = 1337,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="Compute precision: float32 or bfloat16.")] = "float32",
    json_: Json = False,
) -> None:
    """Let a model go on from a prompt, streaming its text."""
    from twingpt.weights.formats import load

    text = _stdin() if prompt == "-" else prompt
    completion = load(model, backend, device, dtype).complete(
        text,
        max_tokens,
        temp=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if not json_:
        print(text, end="", flush=True)
    for piece in completion:
        if not json_:
            print(piece, end="", flush=True)
    if not json_:
        print()
        return
    names = ("text", "tokens", "prompt_tokens", "finish_reason", "tokens_per_second")
    _print_json({name: getattr(completion, name) for name in names})


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt convert runs/novel novel-hf\n\n"
    "gpt convert runs/novel@best novel-4bit --q-bits 4\n\n"
    "gpt convert path/to/Llama-3.2-1B llama --q-bits 4 --data tinystories\n\n"
    "gpt convert nanoGPT/out/ckpt.pt shakespeare\n\n"
    "gpt convert runs/novel novel.gguf --to gguf\n\n"
    "gpt convert path/to/Qwen3-0.6B --inspect\n"
)
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A run or checkpoint; a Hugging Face or mlx-lm folder; a ckpt.pt of nanoGPT; org/name on the hub.",
        ),
    ],
    folder: Annotated[Path | None, typer.Argument(metavar="DST", help="Where the result goes.")] = None,
    to: Annotated[
        str | None,
        typer.Option(help="twingpt, hf, mlx, torch or gguf. (default: hf from twingpt, and twingpt from others)"),
    ] = None,
    q_bits: Annotated[int | None, typer.Option(help="Quantize the matrices to 4 or 8 bits.")] = None,
    q_group_size: Annotated[int, typer.Option(help="Numbers that share a scale: 32, 64 or 128.")] = 64,
    data: Annotated[
        str | None, typer.Option(help="With --q-bits: measure the held-out loss before and after on these data.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is at DST.")] = False,
    inspect: Annotated[bool, typer.Option("--inspect", help="Print what SRC is, and write nothing.")] = False,
    backend: Backend = "auto",
    device: Device = None,
    json_: Json = False,
) -> None:
    """Convert a model between TwinGPT, Hugging Face, mlx-lm, PyTorch and GGUF, or quantize it."""
    from twingpt.weights import convert as conversion
    from twingpt.weights.formats import describe, open_model

    found = open_model(model)
    if inspect:
        _print_model(describe(found), json_)
        return
    if folder is None:
        raise UserError("Where should the result go? gpt convert SRC DST, or --inspect to see what SRC is.")
    if data and not q_bits:
        raise UserError("--data measures what quantization costs: give --q-bits too.")
    from twingpt.core.quantize import Quantization

    quantization = Quantization(q_bits, q_group_size) if q_bits is not None else None
    with _conversion_bar(found.model.config, json_) as progress:
        result = conversion.convert(found, folder, to, quantization, force, progress)
    if data:
        from twingpt.core.evaluate import held_out_losses

        result |= held_out_losses(found.model, open_model(folder).model, data, backend, device)
    if json_:
        _print_json(result)
    else:
        _print_conversion(result)


@contextmanager
def _conversion_bar(config: GPTConfig, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr, where that is a terminal and nobody wants JSON."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from twingpt.core.parameters import parameter_count

    console = Console(stderr=True)
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=4 * parameter_count(config))
        yield lambda size: bar.advance(task, size)


def _print_conversion(result: dict[str, Any]) -> None:
    from twingpt.core.console import human_bytes, human_count

    print(
        f"{result['target']}: {result['family']} as {result['target_format']}, "
        f"{human_count(result['parameters'])} parameters, {human_bytes(result['bytes'])}"
    )
    if result["unquantized"]:
        print(f"In float32 as before: {'; '.join(f'{name} ({why})' for name, why in result['unquantized'].items())}")
    if "val_loss" in result:
        change = result["val_loss_quantized"] - result["val_loss"]
        print(f"Held-out loss: {result['val_loss']:.4f} -> {result['val_loss_quantized']:.4f} ({change:+.4f})")


def _print_model(description: dict[str, Any], as_json: bool) -> None:
    from rich import box
    from rich.table import Table

    from twingpt.core.console import human_count

    if as_json:
        _print_json(description)
        return
    console, config = _console(), description["config"]
    dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in description["dtypes"].items())
    facts = {
        "format": description["source_format"],
        "family": description["family"],
        "parameters": f"{human_count(description['parameters'])} ({description['parameters']:,})",
        "tensors": dtypes,
        "shape": f"{config['n_layer']} layers, {config['n_head']} heads ({config['n_kv_head']} for keys and values) of "
        f"{config['head_dim']}, {config['n_embd']} wide, MLP {config['n_inner']} ({config['mlp']})",
        "context": f"{config['block_size']:,} tokens",
        "vocabulary": f"{config['vocab_size']:,}",
        "tokenizer": description["tokenizer"] or "none",
    }
    if description["quantization"]:
        facts["quantized"] = "{bits} bits in groups of {group_size}".format(**description["quantization"])
    for name, value in facts.items():
        console.print(f"[dim]{name:<12}[/]{value}", soft_wrap=True)
    table = Table("tensor", "shape", box=box.SIMPLE_HEAD)
    for name, shape in description["tensors"].items():
        if ".layers." not in name or ".layers.0." in name:
            table.add_row(name, " × ".join(map(str, shape)))
    console.print(table)
    if config["n_layer"] > 1:
        console.print(f"… and so for layers 1 to {config['n_layer'] - 1}")


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt plot runs/a runs/b             their losses over one another, in runs-plot.svg\n\n"
    "gpt plot latest --x time -o a.png  the last run, over the seconds it took\n\n"
    "gpt plot runs/* --json             the curves as numbers\n"
)
def plot(
    models: Annotated[list[str], typer.Argument(metavar="RUN…", help="Runs; latest is the last one written to.")],
    x: Annotated[str, typer.Option("--x", help="step, tokens or time (seconds of training).")] = "step",
    out: Annotated[Path, typer.Option("--out", "-o", help="An .svg, .png or .pdf file.")] = Path("runs-plot.svg"),
    json_: Annotated[bool, typer.Option("--json", help="Print the curves as one JSON object; draw nothing.")] = False,
) -> None:
    """Draw the training and held-out losses of runs over one another."""
    from twingpt.core import plot as plots

    plots.check_picture(out)
    curves = plots.read_curves(models, x)
    if json_:
        _print_json({"x": x, "runs": curves})
        return
    plots.plot_curves(curves, x, out)
    for run in curves:
        if not (run["train"]["x"] or run["val"]["x"]):
            print(f"gpt: {run['run']} has no losses over {x}, and is left out.", file=sys.stderr)
    print(out)


runs_app = typer.Typer(rich_markup_mode="rich")
app.add_typer(runs_app, name="runs")


@runs_app.callback(
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
    from twingpt.core import inventory
    from twingpt.core.paths import expand

    if command := context.invoked_subcommand:
        for name in context.params:
            source = context.get_parameter_source(name)
            if source and source.name == "COMMANDLINE":
                raise UserError(f"An option before {command} is for the list: put it after, or leave it out.")
        return
    there = inventory.find_runs(expand(folder))
    found = inventory.select(there, best, latest, max_loss, min_step, search, sort)
    if json_:
        _print_json({"folder": str(folder), "runs": [dataclasses.asdict(run) for run in found]})
    elif found:
        from twingpt.core.console import print_runs

        print_runs(_console(), found)
    else:
        print(f"No run in {folder} matches." if there else f"There are no runs in {folder}: gpt train begins one.")


@runs_app.command(epilog="[bold]Examples[/]\n\ngpt runs show novel\n\ngpt runs show latest --json\n")
def show(
    model: Annotated[str, typer.Argument(metavar="RUN", help="Its folder or name, or latest.")], json_: Json = False
) -> None:
    """Show a run: its checkpoints, starts and configuration."""
    from twingpt.core import inventory

    run, described = inventory.describe(model)
    if json_:
        _print_json({**dataclasses.asdict(run), **described})
    else:
        from twingpt.core.console import print_run

        print_run(_console(), run, described)


@runs_app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt runs rm novel             all of the run\n\n"
    "gpt runs rm novel@1000 --yes  one checkpoint, without being asked\n"
)
def rm(
    model: Annotated[str, typer.Argument(metavar="RUN|RUN@STEP", help="A run, or one checkpoint of it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")] = False,
    json_: Json = False,
) -> None:
    """Remove a run, or one checkpoint of it; latest and best then name others that are left."""
    from twingpt.core import inventory
    from twingpt.core.console import human_bytes

    run, checkpoint = inventory.to_remove(model)
    doomed = checkpoint or run
    if not yes and not typer.confirm(f"Remove {doomed}, {human_bytes(inventory.size(doomed))}?", err=True):
        raise typer.Exit(1)
    kept: list[str] = []
    if checkpoint:
        inventory.remove_checkpoint(run, checkpoint)
    else:
        kept = inventory.remove_run(run)
    if json_:
        _print_json({"removed": str(doomed), "kept": kept})
        return
    print(f"Removed {doomed}.")
    if kept:
        print(f"The folder stays, with what training did not write: {', '.join(kept)}.")


data_app = typer.Typer(no_args_is_help=True, help="Prepare text for training; list, describe, verify and remove it.")
app.add_typer(
    data_app,
    name="data",
    epilog="[bold]Examples[/]\n\n"
    "gpt data prepare notes/ --name notes       a folder of text, to token ids\n\n"
    "gpt train --data notes                     train on it\n\n"
    "gpt data list                              what is prepared, and how large it is\n\n"
    "gpt data sources                           what --data knows by name\n",
)

DataName = Annotated[str, typer.Argument(metavar="NAME", help="A prepared data set: gpt data list shows them.")]


@data_app.command(
    "prepare",
    epilog="[bold]Examples[/]\n\n"
    "gpt data prepare novel.txt --name novel\n\n"
    "gpt data prepare notes/ 'more/**/*.md' --tokenizer char --name notes\n\n"
    "gpt data prepare dump.jsonl.zst --field body --tokenizer gpt2 --name dump\n\n"
    "zcat books.gz | gpt data prepare - --errors replace --name books\n\n"
    "gpt data prepare roneneldan/TinyStories --name stories     with pip install 'twingpt\\[hf]'\n\n"
    "Files are .txt, .md, .rst and .jsonl, also as .gz or .zst, .parquet, and what save_to_disk of datasets wrote.\n",
)
def prepare_data(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE…", help="Files, folders, globs, - for stdin, a hub's org/name[:config]."),
    ],
    name: Annotated[str, typer.Option(help="What --data of gpt train will call it.")],
    tokenizer: Annotated[
        str,
        typer.Option(help="bpe, char, byte, gpt2, cl100k_base, o200k_base, or a tokenizer.json, its folder, or a run."),
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Ids of a BPE that is trained on the data.")] = 2048,
    field: Annotated[str, typer.Option(help="What has the text in JSON lines and tables.")] = "text",
    errors: Annotated[str, typer.Option(help="What is not UTF-8: strict stops, replace takes U+FFFD.")] = "strict",
    licence: Annotated[str | None, typer.Option(help="Noted of sources that have no licence of their own.")] = None,
    json_: Json = False,
) -> None:
    """Tokenize text of any size on all cores, and keep it under a name.

    A document is a file of text, a line of JSON, or a row of a table. A tenth of them is held out, by
    hash; of few documents the last tenth of each. For --data a NAME goes before a file or folder
    of that name, which ./NAME names.
    """
    import time

    from rich.console import Console

    from twingpt.core.data import console as show
    from twingpt.core.data import library
    from twingpt.core.data.prepare import How, Progress, Reading, prepare_named
    from twingpt.core.data.workers import PeakMemory

    how, reading = How.of(tokenizer, vocab_size), Reading(field, errors, licence)
    bar = contextlib.nullcontext(Progress()) if json_ else show.progress_bar(Console(stderr=True))
    start, memory = time.perf_counter(), PeakMemory()
    with memory.watch(), bar as progress:
        row = library.describe(prepare_named(sources, name, how, reading, progress))
    seconds = time.perf_counter() - start
    names = ("name", "path", "documents", "bytes", "tokens", "val_tokens")
    result = {key: getattr(row, key) for key in names} | {"seconds": seconds, "peak_rss_bytes": memory.bytes}
    if json_:
        _print_json(result)
    else:
        show.print_prepared(_console(), result, shlex.quote(name))


@data_app.command(
    "list", epilog="[bold]Examples[/]\n\ngpt data list\n\ngpt data list --json | jq '.data_sets[].name'\n"
)
def list_data(json_: Json = False) -> None:
    """List the prepared data sets: by name, and those that gpt train made of its --data."""
    from twingpt.core.data import library

    rows = library.find_all()
    if json_:
        _print_json({"data_sets": [dataclasses.asdict(row) for row in rows]})
    elif rows:
        from twingpt.core.data.console import print_list

        print_list(_console(), rows)
    else:
        print("No data set is prepared yet: gpt data prepare does it.")


@data_app.command(epilog="[bold]Examples[/]\n\ngpt data info novel\n\ngpt data info novel --json\n")
def info(name: DataName, json_: Json = False) -> None:
    """Show a data set: size, tokens, sources, how long its documents are, and some of them."""
    from twingpt.core.data import library

    facts = library.info(name)
    if json_:
        _print_json(facts)
    else:
        from twingpt.core.data.console import print_info

        print_info(_console(), facts)


@data_app.command(epilog="[bold]Examples[/]\n\ngpt data verify novel && gpt train --data novel\n")
def verify(name: DataName, json_: Json = False) -> None:
    """Read a data set again, and compare digests, counts and ids with its manifest; exit 2 if one differs."""
    from twingpt.core.data import library

    result = library.verify(library.get(name))
    if json_:
        _print_json(result)
    else:
        print(f"{name} is as it was prepared.")


@data_app.command("rm", epilog="[bold]Examples[/]\n\ngpt data rm novel\n\ngpt data rm novel --yes\n")
def remove_data(
    name: DataName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")] = False,
    json_: Json = False,
) -> None:
    """Remove a prepared data set; its sources stay."""
    from twingpt.core.console import human_bytes
    from twingpt.core.data import library

    doomed = library.to_remove(name)
    if not yes and not typer.confirm(f"Remove {doomed}, {human_bytes(library.size(doomed))}?", err=True):
        raise typer.Exit(1)
    library.remove(name)
    if json_:
        _print_json({"removed": str(doomed)})
    else:
        print(f"Removed {doomed}.")


@data_app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt data sources\n\n"
    "gpt data sources --json | jq '.sources[] | {name, licence, files}'\n\n"
    "gpt train --data fineweb-edu@8  its first 8 shards\n"
)
def sources(json_: Json = False) -> None:
    """List the sources that --data knows by name: size, licence, address, and what is already here."""
    from twingpt.core.data import named

    rows = list(named.describe())
    if json_:
        _print_json({"sources": rows})
    else:
        from twingpt.core.console import print_sources

        print_sources(_console(), rows)


def _stdin(what: str = "prompt") -> str:
    if sys.stdin is None:
        raise UserError(f"There is no stdin to read the {what} from.")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} on stdin is not UTF-8 text: byte {error.start}.") from None


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt baseline python-docs                        n-grams of 1 to 5 tokens\n\n"
    "gpt baseline novel.txt --tokenizer char --n 5   on characters\n\n"
    "gpt baseline runs/novel --n 2,3 --sample 400    on the data of a run, with a longer text\n"
)
def baseline(
    name: Annotated[str, typer.Argument(metavar="DATA|RUN", help="What gpt train --data takes, or a run: its data.")],
    n: Annotated[str, typer.Option("--n", help="Tokens of a gram: 3, 1..5 or 1,3.")] = "1..5",
    sample: Annotated[int, typer.Option(help="Tokens of a text that the n-gram writes; 0 is none.")] = 200,
    tokenizer: Annotated[str | None, typer.Option(help="As of gpt train. (default: bpe)")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="As of gpt train. (default: 2048)")] = None,
    seed: Annotated[int, typer.Option(help="Of the text.")] = 1337,
    json_: Json = False,
) -> None:
    """Measure what n-grams reach on held-out text by counting alone (modified Kneser-Ney), for a model to beat.

    gpt train shows the best of them beside the model's loss.
    """
    from twingpt.core import baseline as baselines
    from twingpt.core.launch import data_of

    orders = baselines.parse_orders(n)
    if sample < 0:
        raise UserError(f"--sample must be at least 0, and is {sample}.")
    data, targets = data_of(name, tokenizer, vocab_size)
    rows, model = baselines.measure(data, orders, targets)
    result = [{**dataclasses.asdict(row), "perplexity": row.perplexity} for row in rows]
    if json_:
        texts = baselines.samples(data, model, orders, sample, seed)
        for entry, text in zip(result, texts, strict=True):
            entry["sample"] = text if sample else None
        _print_json({"data": data.manifest["name"], "folder": str(data.folder), "rows": result})
        return
    _print_baselines(_console(), data.manifest, result)
    if sample:
        best = baselines.best(rows).n
        _print_sample(_console(), best, baselines.samples(data, model, [best], sample, seed)[0])


def _print_baselines(console: Console, manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    used, of = rows[0]["tokens"], manifest["splits"]["train"]["tokens"]
    counted = f"{used:,} training tokens" if used == of else f"the first {used:,} of {of:,} training tokens"
    console.print(
        f"{escape(manifest['name'])}: {counted} counted, {rows[0]['targets']:,} held-out tokens predicted, "
        f"vocabulary {manifest['vocab_size']:,}"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("n", "nats per token", "bits per byte", "perplexity", "seconds"):
        table.add_column(title, justify="right")
    least = min(row["val_loss"] for row in rows)
    for row in rows:
        figures = (f"{row['val_loss']:.4f}", f"{row['bits_per_byte']:.4f}", f"{row['perplexity']:,.2f}")
        style = "bold green" if row["val_loss"] == least and len(rows) > 1 else None
        table.add_row(str(row["n"]), *figures, f"{row['seconds']:.2f}", style=style)
    console.print(table)


def _print_sample(console: Console, n: int, text: str) -> None:
    from rich.markup import escape
    from rich.panel import Panel

    console.print(Panel(escape(text), title=f"what the {n}-gram writes", border_style="dim"))


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt parity                  small random models of every shape\n\n"
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
    backend: Annotated[str, typer.Option(help="mlx, torch, or auto for all that are installed.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the tokens and the random weights.")] = 1337,
    json_: Json = False,
) -> None:
    """Compare both backends and the float64 reference, on every device here; exit 1 if they differ."""
    from twingpt.core import parity as measurement
    from twingpt.weights.against import is_quantized, outsiders
    from twingpt.weights.formats import open_model

    names = _installed(backend)
    found = open_model(model) if model else None
    others = outsiders(against, found) if against else []
    if found is None:
        models = measurement.random_models(seed)
    else:
        models = iter([(Path(str(model)).name, found.model.config, dict(found.model.stored()))])
        if tolerance is None and dtype == "float32" and is_quantized(found):
            tolerance = measurement.QUANTIZED_TOLERANCE
    result = measurement.measure(models, names, dtype, tolerance, seed, others)
    if json_:
        _print_json(result)
    else:
        _print_parity(_console(), result)
    if not result["ok"]:
        raise typer.Exit(1)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _print_parity(console: Console, result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table("model", "a", "b", "max diff", "relative", "top-1", "KL", box=box.SIMPLE_HEAD)
    for pair in result["pairs"]:
        fine = pair["max_rel_diff"] <= result["tolerance"]
        table.add_row(
            pair["model"],
            *(f"{pair[side]} ({pair[f'device_{side}']})" for side in "ab"),
            f"{pair['max_abs_diff']:.1e}",
            f"[{'green' if fine else 'bold red'}]{pair['max_rel_diff']:.1e}[/]",
            f"{pair['top1_agreement']:.1%}",
            f"{pair['kl']:.1e}",
        )
    console.print(table)
    verdict = "[green]They agree[/]" if result["ok"] else "[bold red]They differ[/]"
    dtype, limit = result["pairs"][0]["dtype"], f"{result['tolerance']:.0e}"
    console.print(f"{verdict}: in {dtype} a difference may be {limit} of the largest logit.")
    if skipped := ", ".join(f"{entry['model']} with {entry['against']}" for entry in result["skipped"]):
        console.print(f"Not compared, as no family of theirs computes it: {skipped}.", markup=False)


@app.command(epilog="[bold]Examples[/]\n\ngpt doctor\n\ngpt doctor --json | jq .choice\n")
def doctor(backend: Backend = "auto", device: Device = None, json_: Json = False) -> None:
    """Show what this machine has, what will be chosen and why, and test it; exit 1 if the test fails."""
    from twingpt.core.doctor import examine

    report = examine(backend, device)
    if json_:
        _print_json(report)
    else:
        _print_doctor(_console(), report)
    if not report["self_test"]["ok"]:
        raise typer.Exit(1)


def _print_doctor(console: Console, report: dict[str, Any]) -> None:
    console.print(f"[bold]{report['platform']}[/], Python {report['python']}")
    versions = [f"{name} {version}" for name, version in report["libraries"].items() if version]
    console.print(", ".join(versions) + "\n")
    for name, facts in report["backends"].items():
        if "version" not in facts:
            console.print(f"{name}: {facts.get('broken') or 'not installed: ' + facts['install']}", markup=False)
            continue
        rest = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "installed" and value is not None)
        console.print(f"[bold]{name}[/]: {rest}")
        for device in (device for device in report["devices"] if device["backend"] == name):
            _print_device(console, device)
    choice, test = report["choice"], report["self_test"]
    chosen = (
        f"{choice['backend']} on {choice['device']} in {choice['dtype']}, because" if choice["backend"] else "none:"
    )
    console.print(f"\nChoice: [bold]{chosen}[/] {choice['why']}.")
    verdict = "[green]passed[/]" if test["ok"] else "[bold red]failed[/]"
    worst = f", at worst {test['max_rel_diff']:.1e}" if test["max_rel_diff"] is not None else ""
    limit = f"{test['tolerance']:.0e}"
    console.print(f"Self-test: {verdict}. The largest difference may be {limit} of the largest logit{worst}.")


def _print_device(console: Console, device: dict[str, Any]) -> None:
    from twingpt.core.console import human_bytes, human_flops

    memory = human_bytes(device["memory_bytes"]) if device["memory_bytes"] else "memory unknown"
    free = human_bytes(device["free_memory_bytes"])
    console.print(f"  [bold]{device['name']}[/]: {device['description']}, {memory}, {free} free")
    for dtype in device["dtypes"]:
        fast = "fast" if dtype in device["fast_dtypes"] else "slow"
        measured, published = device["measured_flops"][dtype], device["documented_flops"][dtype]
        speed = f"{human_flops(measured)} measured" if measured else "can't be measured"
        beside = f", {human_flops(published)} published" if published else ""
        console.print(f"    {dtype:8}  {fast}  matrix products: {speed}{beside}")


bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory, both backends side by side.")
app.add_typer(
    bench,
    name="bench",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench train                      the default run on each backend\n\n"
    "gpt bench forward --preset small --batch-size 4\n\n"
    "gpt bench memory                     the loss, plain and chunked\n",
)

BenchBackend = Annotated[str, typer.Option("--backend", help="mlx, torch, or auto for all that are installed.")]
Dtype = Annotated[str | None, typer.Option(help="Compute precision. (default: the device's)")]
Compile = Annotated[bool | None, typer.Option(help="Compile the step. (default: not on a CPU)")]
Preset = Annotated[str | None, _option("micro, tiny, small, medium, gpt2 or large. (default: as gpt train)", MODEL)]
Shape = Annotated[str | None, _option("qwen3, llama, gpt2 or nano.", MODEL)]
VocabSize = Annotated[int | None, _option("Tokens.", MODEL)]
Layers = Annotated[int | None, _option("Blocks.", MODEL)]
Heads = Annotated[int | None, _option("Query heads.", MODEL)]
KVHeads = Annotated[int | None, _option("Key-value heads.", MODEL)]
Width = Annotated[int | None, _option("Width.", MODEL)]
Context = Annotated[int | None, _option("Context, in tokens.", MODEL)]
BatchSize = Annotated[int | None, typer.Option(help="Windows of a micro-batch. (default: as gpt train)")]
Repeats = Annotated[int, typer.Option(help="Measurements; the median and their spread are shown.")]
Steps = Annotated[int, typer.Option(help="Steps of a measurement.")]


@bench.command(
    "train",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench train\n\n"
    "gpt bench train --preset small --batch-size 8 --optimizer adamw --dtype bfloat16\n\n"
    "gpt bench train --json | jq '.rows[] | {backend, tokens_per_second, mfu}'\n",
)
def bench_train(
    backend: BenchBackend = "auto",
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


@bench.command(
    "forward",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench forward\n\n"
    "gpt bench forward --preset gpt2 --vocab-size 50304 --batch-size 2 --backend torch\n",
)
def bench_forward(
    backend: BenchBackend = "auto",
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


@bench.command(
    "memory",
    epilog="[bold]Examples[/]\n\n"
    "gpt bench memory                                GPT-2's vocabulary and width, 16,384 tokens\n\n"
    "gpt bench memory --tokens 2048 --backend torch  less, on a small machine\n",
)
def bench_memory(
    backend: BenchBackend = "auto",
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

    from twingpt.core.bench import measure_loss
    from twingpt.core.console import human_bytes

    result = measure_loss(_installed(backend), vocab_size, n_embd, tokens, device, dtype)
    if json_:
        _print_json(result)
        return
    console = _console()
    table = Table("backend", "device", "dtype", "loss", "memory", "plain / this", "seconds", box=box.SIMPLE_HEAD)
    for row in result["rows"]:
        memory, ratio = human_bytes(row["peak_memory_bytes"]), f"{row['ratio']:.1f}" if row["ratio"] else "–"
        facts = (row["backend"], row["device"], row["dtype"], row["way"], memory, ratio)
        table.add_row(*facts, f"{row['seconds_per_step']:.1f}")
    console.print(table)
    for entry in result["skipped"]:
        console.print(f"Not measured: {entry['reason']}", markup=False)


def _installed(backend: str) -> list[str]:
    """The backend that is named, or all that are installed for auto."""
    from twingpt.core import backend as backends

    if backend != "auto":
        return [backends.choose(backend)[0]]
    return [name for name in backends.BACKENDS if backends.installed(name)] or [backends.choose()[0]]


def _bench(mode: str, values: dict[str, Any]) -> None:
    from rich.console import Console

    from twingpt.core.bench import measure

    json_, names = values.pop("json_"), _installed(values.pop("backend"))
    settings = {key: values.pop(key) for key in ("device", "dtype", "compile", "repeats", "steps")}
    options = {key: value for key, value in values.items() if value is not None}
    with Console(stderr=True).status(f"Measuring on {' and '.join(names)}"):
        result = measure(mode, names, options, **settings)
    if json_:
        _print_json(result)
    else:
        _print_bench(_console(), result)


def _print_bench(console: Console, result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from twingpt.core.console import human_bytes, human_count, human_flops, human_share

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
    for entry in result["skipped"]:
        console.print(f"Not measured: {entry['reason']}", markup=False)


tokenize = typer.Typer(no_args_is_help=True, help="Learn a tokenizer, look at what one does, compare several.")
app.add_typer(
    tokenize,
    name="tokenize",
    epilog="[bold]Examples[/]\n\n"
    "gpt tokenize train novel.txt --vocab-size 4096 --out bpe4k\n\n"
    "gpt tokenize show 'Hello world' --tokenizer bpe4k\n\n"
    "gpt tokenize compare novel.txt --tokenizer bpe4k --tokenizer gpt2 --tokenizer byte\n",
)

TOKENIZER = "byte, gpt2, cl100k_base, o200k_base, a tokenizer.json, its folder, or a run or checkpoint."


@tokenize.command(
    "train",
    epilog="[bold]Examples[/]\n\n"
    "gpt tokenize train python-docs --out bpe2k\n\n"
    "gpt tokenize train notes/ novel.txt --vocab-size 8192 --pattern llama3 --chat --out bpe8k\n\n"
    "gpt train --data novel.txt --tokenizer bpe8k\n",
)
def tokenize_train(
    data: Annotated[list[str], typer.Argument(metavar="SOURCE…", help="Text files, folders or named sources.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for tokenizer.json and its settings.")],
    vocab_size: Annotated[int, typer.Option(help="Ids at most, special tokens included.")] = 2048,
    pattern: Annotated[str, typer.Option(help="gpt2, llama3 or qwen2: how text is split into words.")] = "gpt2",
    chat: Annotated[bool, typer.Option("--chat", help="Add <|im_start|>, <|im_end|> and a chat template.")] = False,
    json_: Json = False,
) -> None:
    """Learn a byte-level BPE from texts, for gpt train --tokenizer, transformers and mlx-lm."""
    from rich.console import Console

    from twingpt.core.tokenizer.examine import learn

    with Console(stderr=True).status(f"Learning from {', '.join(data)}"):
        result = learn(data, vocab_size, pattern, chat, out)
    if json_:
        _print_json(result)
        return
    print(f"{out}: {result['vocab_size']} ids from {result['bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s")
    if result["vocab_size"] < vocab_size:
        print(f"The text has no more pairs to join, so it is fewer than {vocab_size}.")


@tokenize.command(
    "show",
    epilog="[bold]Examples[/]\n\n"
    "gpt tokenize show 'naïve café' --tokenizer gpt2\n\n"
    "gpt tokenize show '<|endoftext|>' -t runs/novel --special   the token, and not its spelling\n\n"
    "gpt tokenize show - -t tokenizer.json --json < page.txt\n",
)
def tokenize_show(
    text: Annotated[str, typer.Argument(help="The text; - reads it from stdin.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help=TOKENIZER)],
    special: Annotated[bool, typer.Option("--special", help="Read special tokens where they are spelled.")] = False,
    json_: Json = False,
) -> None:
    """Show the tokens of a text: a colour for each, ids and bytes."""
    from twingpt.core.tokenizer import find
    from twingpt.core.tokenizer.examine import print_tokens, tokens

    found = find(tokenizer)
    rows = tokens(found, _stdin("text") if text == "-" else text, special)
    if json_:
        _print_json({"tokenizer": tokenizer, "vocab_size": found.vocab_size, "tokens": rows})
    else:
        print_tokens(_console(), rows)


@tokenize.command(
    "compare",
    epilog="[bold]Examples[/]\n\n"
    "gpt tokenize compare novel.txt --tokenizer byte --tokenizer gpt2\n\n"
    "gpt tokenize compare python-docs -t char -t runs/first -t gpt2 --json\n",
)
def tokenize_compare(
    data: Annotated[str, typer.Argument(metavar="SOURCE", help="A text file, a folder or a named source.")],
    tokenizer: Annotated[list[str], typer.Option("--tokenizer", "-t", help=f"{TOKENIZER} Repeatable.")],
    json_: Json = False,
) -> None:
    """Compare tokenizers on a text: tokens, bytes per token, vocabulary, speed on one core."""
    from twingpt.core.tokenizer.examine import compare, print_comparison

    result = compare(tokenizer, data)
    if json_:
        _print_json(result)
    else:
        print_comparison(_console(), result)


def main() -> None:
    """Run the command; a user's mistake ends in one line on stderr and exit code 2."""
    debug = "--debug" in sys.argv[1:]
    sys.argv = [sys.argv[0], *(argument for argument in sys.argv[1:] if argument != "--debug")]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows what it can
            stream.reconfigure(errors="replace")
    try:
        app()
    except (UserError, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"gpt: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'while writing or reading'}."
    if isinstance(error, MemoryError):
        return f"There is not enough memory: a smaller model, --batch-size or --block-size needs less. {error}".strip()
    return str(error)
