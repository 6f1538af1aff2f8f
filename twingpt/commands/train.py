"""gpt train: from flags, files and the wizard to a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.options import MODEL, TOKENIZERS, option
from twingpt.commands.output import make_console, print_json
from twingpt.core.errors import UserError
from twingpt.core.paths import quote

if TYPE_CHECKING:
    from rich.console import Console

    from twingpt.training.state import RunState

app = typer.Typer()

FILE, DATA, OPTIMIZER, REPORT = "Settings from elsewhere", "Data", "Optimization", "Reports and checkpoints"
WHERE = "Where and how"


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
    config: Annotated[Path | None, option("A TOML file of settings, such as a run's config.toml.", FILE)] = None,
    set_: Annotated[
        list[str] | None, option("KEY=VALUE, any setting of a model or a run; repeatable.", FILE, "--set")
    ] = None,
    wizard: Annotated[bool, option("Ask for them, estimate, and write a file.", FILE, "--wizard")] = False,
    data: Annotated[
        list[str] | None,
        option("What gpt data sources or list names, or a file or folder; several as SOURCE:WEIGHT, repeated.", DATA),
    ] = None,
    tokenizer: Annotated[str | None, option(TOKENIZERS, DATA)] = None,
    vocab_size: Annotated[int | None, option("Ids of a BPE that is trained on the data.", DATA)] = None,
    preset: Annotated[str | None, option("micro, tiny, small, medium, gpt2 or large.", MODEL)] = None,
    depth: Annotated[int | None, option("1 to 48: size, batch, rates and length follow from it.", MODEL)] = None,
    shape: Annotated[str | None, option("qwen3, llama, gpt2 or nano: the kind of block.", MODEL)] = None,
    n_layer: Annotated[int | None, option("Blocks.", MODEL)] = None,
    n_head: Annotated[int | None, option("Query heads.", MODEL)] = None,
    n_kv_head: Annotated[int | None, option("Key-value heads; divides n_head.", MODEL)] = None,
    n_embd: Annotated[int | None, option("Width.", MODEL)] = None,
    block_size: Annotated[int | None, option("Context, in tokens.", MODEL)] = None,
    dropout: Annotated[float | None, option("On the embedding and each branch.", MODEL)] = None,
    batch_size: Annotated[int | None, option("Windows of a micro-batch.", OPTIMIZER)] = None,
    gradient_accumulation_steps: Annotated[int | None, option("Micro-batches of a step.", OPTIMIZER)] = None,
    max_iters: Annotated[int | None, option("Steps of the whole schedule.", OPTIMIZER)] = None,
    stop_after: Annotated[int | None, option("Stop, saved, when this many steps are done.", OPTIMIZER)] = None,
    optimizer: Annotated[str | None, option("adamw, or muon for the blocks' matrices.", OPTIMIZER)] = None,
    learning_rate: Annotated[float | None, option("AdamW's, at its highest.", OPTIMIZER)] = None,
    matrix_lr: Annotated[float | None, option("Muon's.", OPTIMIZER)] = None,
    embedding_lr: Annotated[float | None, option("The embedding's. (default: learning_rate)", OPTIMIZER)] = None,
    head_lr: Annotated[float | None, option("An untied head's. (default: learning_rate)", OPTIMIZER)] = None,
    min_lr: Annotated[float | None, option("At the end. (default: a tenth)", OPTIMIZER)] = None,
    warmup_iters: Annotated[int | None, option("Steps of linear warm-up.", OPTIMIZER)] = None,
    lr_schedule: Annotated[str | None, option("cosine, wsd or constant.", OPTIMIZER)] = None,
    warmdown_fraction: Annotated[float | None, option("Of the run, in which wsd falls.", OPTIMIZER)] = None,
    weight_decay: Annotated[float | None, option("On matrices and embeddings.", OPTIMIZER)] = None,
    momentum: Annotated[float | None, option("Muon's.", OPTIMIZER)] = None,
    beta1: Annotated[float | None, option("AdamW's.", OPTIMIZER)] = None,
    beta2: Annotated[float | None, option("AdamW's.", OPTIMIZER)] = None,
    grad_clip: Annotated[float | None, option("Largest norm of all gradients; 0 is off.", OPTIMIZER)] = None,
    seed: Annotated[int | None, option("Of initial weights, data order and dropout.", OPTIMIZER)] = None,
    eval_interval: Annotated[int | None, option("Steps between evaluations; 0 is off.", REPORT)] = None,
    eval_iters: Annotated[int | None, option("Batches of an evaluation; 0 is the whole split.", REPORT)] = None,
    log_interval: Annotated[int | None, option("Steps between reports.", REPORT)] = None,
    sample_interval: Annotated[int | None, option("Steps between samples; 0 is off.", REPORT)] = None,
    checkpoint_interval: Annotated[int | None, option("Steps between checkpoints; 0 is off.", REPORT)] = None,
    keep: Annotated[int | None, option("Latest checkpoints to keep, beside the best.", REPORT)] = None,
    report_to: Annotated[
        str | None, option("tensorboard, wandb, mlflow: one or several, with commas. (default: none)", REPORT)
    ] = None,
    out: Annotated[Path | None, option("The run's folder. (default: runs/DATA-DATE)", WHERE)] = None,
    init_from: Annotated[
        str | None, option("Fine-tune this model: a run, a checkpoint, or what gpt convert reads.", WHERE)
    ] = None,
    resume: Annotated[str | None, option("Go on with a run: its folder, name, RUN@STEP, or latest.", WHERE)] = None,
    backend: Annotated[str | None, option("auto, mlx or torch. (default: auto)", WHERE)] = None,
    device: Annotated[str | None, option("cpu, cuda, cuda:1, mps, gpu … (default: best)", WHERE)] = None,
    dtype: Annotated[
        str | None, option("Compute precision: float32, bfloat16 or float16. (default: the device's)", WHERE)
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
    json_: Annotated[bool, option("End with one JSON object on stdout; display on stderr.", WHERE, "--json")] = False,
) -> None:
    """Train a GPT, or go on training one, and keep it as checkpoints that other tools open.

    What is not given comes from a recipe for the kind of device, and the run's config.toml keeps all of it.
    """
    given = {key: value for key, value in locals().items() if value is not None}
    for key in ("json_", "wizard"):
        given.pop(key)
    if wizard:
        beside = [*(key for key in given if key != "report_to"), *["json"] * json_]
        config, given = _ask_wizard(beside), {key: given[key] for key in given.keys() & {"report_to"}}
    for key in ("config", "set_", "stop_after", "resume"):
        given.pop(key, None)
    from twingpt.runs.console import ConsoleReporter
    from twingpt.training import settings
    from twingpt.training.launch import new_run
    from twingpt.training.resume import resume_run
    from twingpt.training.trainer import Trainer
    from twingpt.weights.formats import open_model

    console = make_console(stderr=json_)
    options, names = settings.gather(config, given, set_ or [])
    where = {key: options.pop(key, None) for key in settings.TABLES["run"]}
    for key in ("out", "init_from"):
        if resume is not None and where[key]:
            raise UserError(f"--resume goes on in the run's own folder, with its own model: leave out {names[key]}.")
    if stop_after is not None and stop_after < 1:
        raise UserError(f"--stop-after must be at least 1, and is {stop_after}.")
    common = {"compile": where["compile"], "report_to": where["report_to"]}
    if resume is not None:
        place = (where["backend"], where["device"])
        state = resume_run(resume, options, *place, stop_after=stop_after, names=names, **common)
    else:
        init = open_model(where["init_from"]).model if where["init_from"] else None
        place = (where["backend"] or "auto", where["device"])
        state = new_run(options, Path(where["out"]) if where["out"] else None, *place, init=init, **common)
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
        names = ", ".join(f"--{key.rstrip('_').replace('_', '-')}" for key in beside)
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
