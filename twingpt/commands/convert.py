"""gpt convert: models between formats, and what a model is."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.help import App
from twingpt.commands.options import Backend, Device, Json
from twingpt.commands.output import make_console, print_json, print_whole
from twingpt.core.errors import UserError

if TYPE_CHECKING:
    from twingpt.core.config import GPTConfig
    from twingpt.core.tokenizer import Tokenizer

app = App()


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt convert runs/novel novel-hf\n\n"
    "gpt convert runs/novel@best novel-4bit --q-bits 4\n\n"
    "gpt convert path/to/Llama-3.2-1B llama --q-bits 4 --data tinystories\n\n"
    "gpt convert nanoGPT/out/ckpt.pt shakespeare --tokenizer meta.pkl\n\n"
    "gpt convert runs/novel novel.gguf\n\n"
    "gpt convert runs/novel novel-hf --dtype bfloat16\n\n"
    "gpt convert path/to/Qwen3-0.6B --inspect\n"
)
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A run or checkpoint; a Hugging Face or mlx-lm folder; a GGUF file; nanoGPT's ckpt.pt; "
            "org/name on the hub.",
        ),
    ],
    folder: Annotated[Path | None, typer.Argument(metavar="DST", help="Where the result goes.")] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="twingpt, hf, mlx, torch or gguf. (default: gguf for DST.gguf, hf from twingpt, twingpt from others)"
        ),
    ] = None,
    q_bits: Annotated[int | None, typer.Option(help="Quantize the matrices to 2, 3, 4, 5, 6 or 8 bits.")] = None,
    q_group_size: Annotated[int, typer.Option(help="Numbers that share a scale: 32, 64 or 128.")] = 64,
    dtype: Annotated[
        str | None,
        typer.Option(help="What hf, mlx, torch and gguf hold: float32, bfloat16 or float16. (default: float32)"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="With --q-bits: measure the held-out loss before and after on these data.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Give a model without one its tokenizer: gpt2 …, a tokenizer.json, a tokenizer's folder, a meta.pkl."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is at DST.")] = False,
    ignore_manifest: Annotated[
        bool, typer.Option("--ignore-manifest", help="Read SRC as it is, after another tool saved it in place.")
    ] = False,
    inspect: Annotated[bool, typer.Option("--inspect", help="Print what SRC is, and write nothing.")] = False,
    backend: Backend = "auto",
    device: Device = None,
    json_: Json = False,
) -> None:
    """Convert a model between TwinGPT, Hugging Face, mlx-lm, PyTorch and GGUF, or quantize it."""
    from twingpt.weights import convert as conversion
    from twingpt.weights.formats import describe, open_model

    opened = open_model(model, ignore_manifest=ignore_manifest)
    if inspect:
        _print_model(describe(opened), json_)
        return
    if folder is None:
        raise UserError("Where should the result go? gpt convert SRC DST, or --inspect to see what SRC is.")
    if data and not q_bits:
        raise UserError("--data measures what quantization costs: give --q-bits too.")
    from twingpt.core.checkpoint.quantize import Quantization
    from twingpt.evaluation.held_out import HeldOut

    quantization = Quantization(q_bits, q_group_size) if q_bits is not None else None
    held_out = HeldOut.of(opened.model, data, backend, device) if data else None
    given = _find_tokenizer(tokenizer) if tokenizer else None
    if given is None and conversion.tokenizer_of(opened.model) is None:
        hint = "the result takes no text; give it one by --tokenizer, of nanoGPT the meta.pkl of its data."
        print(
            f"gpt: {conversion.why_no_tokenizer(opened.model) or f'{model} has no tokenizer'}: {hint}", file=sys.stderr
        )
    with _conversion_bar(opened.model.config, json_) as progress:
        result = conversion.convert(
            opened, folder, to, quantization, dtype=dtype, tokenizer=given, force=force, progress=progress
        )
    if "U32" in opened.model.dtypes() and result["quantization"] is None:
        print(f"gpt: {model} is quantized in a way that is not kept here: {folder} has float32.", file=sys.stderr)
    if held_out:
        before, after = (held_out.loss(model) for model in (opened.model, open_model(folder).model))
        result |= {"val_loss": before, "val_loss_quantized": after}
    if json_:
        print_json(result)
    else:
        _print_conversion(result)


def _find_tokenizer(name: str) -> "Tokenizer":
    """The tokenizer that --tokenizer names; UserError where there is none."""
    from twingpt.core.paths import expand
    from twingpt.core.tokenizer import CharTokenizer
    from twingpt.data.tokenizers import find
    from twingpt.weights.nanogpt import characters

    path = expand(name)
    if path.suffix == ".pkl":
        return CharTokenizer(characters(path))
    return find(name)


@contextmanager
def _conversion_bar(config: "GPTConfig", quiet: bool) -> Iterator[Callable[[int], None]]:
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
    from twingpt.runs.units import human_bytes, human_count
    from twingpt.weights.convert import bits_in_words

    numbers = bits_in_words(result["quantization"]) if result["quantization"] else result["dtype"]
    print(
        f"{result['target']}: {result['family']} as {result['target_format']}, "
        f"{human_count(result['parameters'])} parameters in {numbers}, "
        f"{human_bytes(result['bytes'])}"
    )
    reasons: dict[str, list[str]] = {}
    for name, why in result["unquantized"].items():
        reasons.setdefault(why, []).append(re.sub(r"\.\d+\.", ".*.", name))
    for why, names in reasons.items():
        print(f"Not quantized, as {why}: {', '.join(dict.fromkeys(names))}")
    if "val_loss" in result:
        change = result["val_loss_quantized"] - result["val_loss"]
        print(f"Held-out loss: {result['val_loss']:.4f} -> {result['val_loss_quantized']:.4f} ({change:+.4f})")


def _print_model(description: dict[str, Any], as_json: bool) -> None:
    from rich import box
    from rich.table import Table

    from twingpt.runs.units import human_count
    from twingpt.weights.convert import bits_in_words

    if as_json:
        print_json(description)
        return
    console, config = make_console(), description["config"]
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
    if quantization := description["quantization"]:
        facts["quantized"] = f"{bits_in_words(quantization)} in groups of {quantization['group_size']}"
    for name, value in facts.items():
        console.print(f"[dim]{name:<12}[/]{value}", soft_wrap=True)
    table = Table("tensor", "shape", box=box.SIMPLE_HEAD)
    for name, shape in description["tensors"].items():
        layer = re.search(r"\b(?:layers|h|blk)\.(\d+)\.", name)
        if layer is None or layer[1] == "0":
            table.add_row(name, " × ".join(map(str, shape)))
    print_whole(console, table)
    if config["n_layer"] > 1:
        layers = f"layers 1 to {config['n_layer'] - 1}" if config["n_layer"] > 2 else "layer 1"
        console.print(f"… and so for {layers}")
