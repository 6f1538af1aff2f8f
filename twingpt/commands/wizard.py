"""gpt train --wizard: a few questions, an estimate measured on the device, and a TOML file that trains so."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.prompt import Confirm, Prompt
from rich.table import Table

from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig, TrainConfig, unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_count
from twingpt.core.paths import expand
from twingpt.core.presets import PRESETS
from twingpt.data.named import NAMES
from twingpt.data.prepare import prepare
from twingpt.data.shards import TokenDataset
from twingpt.runs.shell import quote
from twingpt.runs.units import human_bytes, human_count, human_time
from twingpt.training import depth, memory, recipes
from twingpt.training.estimate import Place, Plan, Speed, measure, places, plan
from twingpt.training.settings import DEEPEST, Settings, write

DEPTHS = (2, 4, 6, 8, 12, 16, 20, 24)  # shown; any is accepted
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

T = TypeVar("T")


def run(console: Console) -> tuple[Path, bool] | None:
    """Ask, measure and write a file: its path, and whether to start now; None where the user left.

    Raises UserError where there is no terminal to ask on.
    """
    if not (sys.stdin and sys.stdin.isatty() and console.is_terminal):
        raise UserError("--wizard asks questions, so it needs a terminal: give flags, or a file with --config.")
    try:
        return _conversation(console)
    except (KeyboardInterrupt, EOFError):
        console.print("\nNo file was written.")
        return None


def _conversation(console: Console) -> tuple[Path, bool]:
    place = _ask_place(console)
    spec, data = _ask_data(console, place.device)
    while True:
        size, planned = _ask_length(console, place, spec, data)
        if Confirm.ask("Go on with this? [dim](n asks for size and time again)[/]", console=console, default=True):
            break
    settings: Settings = {
        **size,
        "data": spec,
        "max_iters": planned.steps,
        "eval_interval": planned.eval_interval,
        "eval_iters": planned.eval_iters,
        "checkpoint_interval": planned.eval_interval,
        "sample_interval": math.ceil(planned.steps / 2),
        "backend": place.engines.NAME,
        "device": place.device.name,
    }
    path = _ask_file(console, settings, f"About {human_time(planned.seconds)} on {place}, as measured there.")
    command = f"gpt train --config {quote(path)}"
    console.print(f"Wrote {escape(str(path))}. To train: [bold]{escape(command)}[/]", soft_wrap=True)
    return path, Confirm.ask("Start now?", console=console, default=True)


def _ask(console: Console, question: str, default: str, parse: Callable[[str], T]) -> T:
    """The answer as `parse` has it; what that refuses with a UserError is asked again."""
    while True:
        try:
            return parse(Prompt.ask(f"[bold]{question}[/]", console=console, default=default))
        except UserError as error:
            console.print(f"[red]{escape(str(error))}[/]")


# Hardware and data ------------------------------------------------------------------------------------------


def _ask_place(console: Console) -> Place:
    with console.status("Looking for devices …"):
        found = places()
    if not found:
        raise UserError("No backend works on this machine: gpt doctor says why.")
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    for number, place in enumerate(found, 1):
        size = human_bytes(place.device.memory_bytes) if place.device.memory_bytes else "memory unknown"
        table.add_row(f"[bold]{number}[/]", str(place), escape(place.device.description), size)
    console.print(table)

    def parse(text: str) -> Place:
        if text.isdecimal() and 1 <= int(text) <= len(found):
            return found[int(text) - 1]
        raise UserError(f"Answer with a number from 1 to {len(found)}.")

    return _ask(console, "Which device?", "1", parse) if len(found) > 1 else found[0]


def _ask_data(console: Console, device: Device) -> tuple[str, TokenDataset]:
    """What was answered, and the data set that it names, prepared."""

    def parse(text: str) -> tuple[str, TokenDataset]:
        spec = text.strip("'\"")  # as a terminal quotes a file dropped on it
        _, train = recipes.resolve({"data": spec}, device, 256)
        with console.status("Reading and tokenizing …"):
            return spec, prepare(spec, train.tokenizer, train.vocab_size)

    spec, data = _ask(console, f"Which data? [dim]({', '.join(NAMES)}, a text file or a folder)[/]", NAMES[0], parse)
    splits = data.manifest["splits"]
    size = human_bytes(sum(split["bytes"] for split in splits.values()))
    tokens = [human_count(splits[split]["tokens"]) for split in ("train", "val")]
    console.print(
        f"  {size} of text: {tokens[0]} tokens to train on, {tokens[1]} held out, "
        f"vocabulary {data.tokenizer.vocab_size:,}\n"
    )
    return spec, data


# Size and time ----------------------------------------------------------------------------------------------


def _ask_length(console: Console, place: Place, spec: str, data: TokenDataset) -> tuple[Settings, Plan]:
    """Size and time, with the estimate shown; asks again where the size doesn't train on the device."""
    while True:
        size = _ask_size(console, place.device, data)
        config, train = recipes.resolve({**size, "data": spec}, place.device, data.tokenizer.vocab_size)
        if "depth" in size:
            console.print(f"  In full, {depth.describe(size['depth'], config, train)}")
        span = _ask(console, "How long? [dim](5m, 1h30m, or a number of steps)[/]", "10m", parse_span)
        try:
            train, notes = memory.plan(
                config, train, place.engines.NAME, place.device, place.engines.free_memory(place.device), size.keys()
            )
            for note in notes:
                console.print(f"  {escape(note)}")
            with console.status(f"Training a few steps on {place} to measure them … (Ctrl-C leaves)"):
                speed = measure(config, train, data, place)
        except (RuntimeError, MemoryError, UserError) as error:
            reason = (str(error).splitlines() or ["out of memory"])[0]
            console.print(f"[red]This size does not train on {place}: {escape(reason)}[/]")
            continue
        planned = plan(config, train, data, speed, span)
        console.print(_estimate(config, train, data, speed, planned, place))
        return size, planned


def _ask_size(console: Console, device: Device, data: TokenDataset) -> Settings:
    vocab_size = data.tokenizer.vocab_size
    table = Table("answer", "layers x width", "context", "parameters", box=box.SIMPLE_HEAD, padding=(0, 1))
    options: list[Settings] = [{"preset": name} for name in PRESETS] + [{"depth": n} for n in DEPTHS]
    for option in options:
        config, _ = recipes.resolve(option, device, vocab_size)
        answer = str(option.get("depth", option.get("preset")))
        shape = f"{config.n_layer} x {config.n_embd}"
        table.add_row(answer, shape, str(config.block_size), human_count(parameter_count(config)))
    console.print(table)

    def parse(text: str) -> Settings:
        size: Settings = {"depth": int(text)} if text.isdecimal() else {"preset": text}
        if not text.isdecimal() and text not in PRESETS:
            raise unknown_choice("size", text, [*PRESETS, f"a depth from 1 to {DEEPEST}"])
        data.check(recipes.resolve(size, device, vocab_size)[0])
        return size

    default = recipes.recipe(device)["preset"]
    return _ask(console, f"Which size? [dim](a preset, or a depth from 1 to {DEEPEST})[/]", default, parse)


def parse_span(text: str) -> float | int:
    """Seconds, as a float, for 90s, 5m, 1h30m or 1.5h; steps, as an int, for a bare number."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[smhd])\s*", text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if not re.fullmatch(r"(\d+(\.\d+)?\s*(min|[smhd])\s*)+", text) or seconds <= 0:
        raise UserError("Answer with a time such as 90s, 5m or 1h30m, or with a number of steps.")
    return seconds


# The estimate -----------------------------------------------------------------------------------------------


def _estimate(
    config: GPTConfig, train: TrainConfig, data: TokenDataset, speed: Speed, planned: Plan, place: Place
) -> Table:
    tokens = train.batch_size * train.gradient_accumulation_steps * config.block_size
    disk = memory.checkpoint_bytes(config, train)
    rows: list[tuple[str, Any]] = [
        ("parameters", human_count(parameter_count(config))),
        ("speed, measured", f"{human_count(tokens / speed.step)} tokens/s"),
        ("steps", f"{planned.steps:,} of {tokens:,} tokens"),
        ("epochs over the data", f"{planned.steps * tokens / len(data.splits['train']):.2f}"),
        ("total time", human_time(planned.seconds)),
        ("memory", human_bytes(memory.needed(config, train, place.engines.NAME, place.device.kind))),
        ("a checkpoint on disk", f"{human_bytes(disk)}, the {train.keep} latest and the best are kept"),
    ]
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1), title="Estimate", title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _ask_file(console: Console, settings: Settings, comment: str) -> Path:
    """Where the settings were written: a new file, or one that may be replaced."""

    def parse(text: str) -> Path:
        path = expand(text)
        if path.is_dir():
            raise UserError(f"{text} is a folder: give the name of a file.")
        if not path.parent.is_dir():
            raise UserError(f"There is no folder {path.parent}: make it first, or choose another.")
        if path.exists() and not Confirm.ask(f"{escape(text)} exists: replace it?", console=console, default=False):
            raise UserError("Choose another name.")
        write(path, settings, comment)
        return path

    return _ask(console, "Write to which file?", "train.toml", parse)
