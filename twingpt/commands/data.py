"""gpt data: prepare data sets; list, describe, verify and remove them."""

import contextlib
import dataclasses
from typing import Annotated

import typer

from twingpt.commands.help import App
from twingpt.commands.options import AsText, Errors, Field, Json, Separator, SettingsCommand, SkipBadLines, Yes
from twingpt.commands.output import ask_to_remove, make_console, print_json
from twingpt.runs.shell import quote

app = App(
    name="data",
    no_args_is_help=True,
    help="Prepare text for training; list, describe, verify and remove it.",
    epilog="[bold]Examples[/]\n\n"
    "gpt data prepare notes/ --name notes       a folder of text, to token ids\n\n"
    "gpt train --data notes                     train on it\n\n"
    "gpt data list                              what is prepared, and its size\n\n"
    "gpt data sources                           what --data knows by name\n",
)

DataName = Annotated[str, typer.Argument(metavar="NAME", help="A prepared data set: gpt data list shows them.")]


class PrepareCommand(SettingsCommand):
    """A command with the tokenizer's settings."""

    keys = ("tokenizer", "vocab_size")


@app.command(
    "prepare",
    cls=PrepareCommand,
    epilog="[bold]Examples[/]\n\n"
    "gpt data prepare novel.txt --name novel\n\n"
    "gpt data prepare notes/ 'more/**/*.md' --tokenizer char --name notes\n\n"
    "gpt data prepare dump.jsonl.zst --field body --tokenizer gpt2 --name dump\n\n"
    "zcat books.gz | gpt data prepare - --errors replace --name books\n\n"
    'gpt data prepare roneneldan/TinyStories --name stories     with pip install "twingpt\\[hf]"\n\n'
    "gpt data prepare 'code/**/*.py' --name code               a glob takes files of any name\n\n"
    "gpt data prepare train.jsonl --val test.jsonl --name mine\n\n"
    "Files are text, JSON (lines or an array), also as .gz, .zst, .xz or .bz2, .parquet, .arrow, and what save_to_disk "
    "of datasets wrote.\n",
)
def prepare_data(
    ctx: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE…", help="Files, folders, globs, - for stdin, a hub's org/name[:config]."),
    ],
    name: Annotated[str, typer.Option(help="What --data of gpt train will call it.")],
    field: Field = None,
    errors: Errors = "strict",
    skip_bad_lines: SkipBadLines = 0,
    as_text: AsText = False,
    separator: Separator = None,
    val: Annotated[str | None, typer.Option(help="What is held out: a share, or a source. (default: 0.1)")] = None,
    licence: Annotated[str | None, typer.Option(help="Noted of sources that have no licence of their own.")] = None,
    json_: Json = False,
) -> None:
    """Tokenize text of any size on all cores, and keep it under a name.

    A document is a file of text, a line of JSON, or a row of a table. A tenth of them is held out, by
    hash; of few documents the last tenth of each; of a hub's data set its validation split, if it has
    one. For --data a NAME goes before a file or folder of that name, which ./NAME names.
    """
    import time

    from rich.console import Console

    from twingpt.commands import show_data as show
    from twingpt.core.config import TrainConfig
    from twingpt.data import library
    from twingpt.data.builder import Progress, TokenizerChoice
    from twingpt.data.prepare import prepare_named
    from twingpt.data.sources import ReadOptions
    from twingpt.data.workers import PeakMemory

    choice = TokenizerChoice(*(ctx.obj.get(key, getattr(TrainConfig, key)) for key in PrepareCommand.keys))
    options = ReadOptions(field, errors, licence, skip_bad_lines, as_text, separator)
    bar = contextlib.nullcontext(Progress()) if json_ else show.progress_bar(Console(stderr=True))
    start, memory = time.perf_counter(), PeakMemory()
    with memory.watch(), bar as progress:
        data = prepare_named(sources, name, choice, options, progress, val)
    summary = library.summarize(data)
    seconds = time.perf_counter() - start
    names = ("name", "path", "documents", "bytes", "tokens", "val_tokens")
    result = {key: getattr(summary, key) for key in names} | {"seconds": seconds, "peak_rss_bytes": memory.bytes}
    result |= {"left_out": data.manifest.get("left_out", {}), "notes": data.manifest.get("notes", [])}
    if json_:
        print_json(result)
    else:
        show.print_prepared(make_console(), result, quote(name))


@app.command("list", epilog="[bold]Examples[/]\n\ngpt data list\n\ngpt data list --json | jq '.data_sets[].name'\n")
def list_data(json_: Json = False) -> None:
    """List the prepared data sets: by name, and those that gpt train made of its --data."""
    from twingpt.data import library

    summaries = library.list_datasets()
    if json_:
        print_json({"data_sets": [dataclasses.asdict(summary) for summary in summaries]})
    elif summaries:
        from twingpt.commands.show_data import print_list

        print_list(make_console(), summaries)
    else:
        print("No data set is prepared yet: gpt data prepare does it.")


@app.command(epilog="[bold]Examples[/]\n\ngpt data info novel\n\ngpt data info novel --json\n")
def info(name: DataName, json_: Json = False) -> None:
    """Show a data set: size, tokens, sources, how long its documents are, and some of them."""
    from twingpt.data import library

    facts = library.info(name)
    if json_:
        print_json(facts)
    else:
        from twingpt.commands.show_data import print_info

        print_info(make_console(), facts)


@app.command(epilog="[bold]Examples[/]\n\ngpt data verify novel && gpt train --data novel\n")
def verify(name: DataName, json_: Json = False) -> None:
    """Read a data set again, and compare digests, counts and ids with its manifest; exit 2 if one differs."""
    from twingpt.data import library

    result = library.verify(library.open_dataset(name))
    if json_:
        print_json(result)
    else:
        print(f"{name} is as it was prepared.")


@app.command("rm", epilog="[bold]Examples[/]\n\ngpt data rm novel\n\ngpt data rm novel --yes\n")
def remove_data(name: DataName, yes: Yes = False, json_: Json = False) -> None:
    """Remove a prepared data set; its sources stay."""
    from twingpt.data import library

    doomed = library.removable_folder(name)
    if not yes:
        ask_to_remove(doomed, library.folder_size(doomed))
    library.remove(name)
    if json_:
        print_json({"removed": str(doomed)})
    else:
        print(f"Removed {doomed}.")


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt data sources\n\n"
    "gpt data sources --json | jq '.sources[] | {name, licence, files}'\n\n"
    "gpt train --data fineweb-edu@8  its first 8 shards\n"
)
def sources(json_: Json = False) -> None:
    """List the sources that --data knows by name: size, licence, address, and what is already here."""
    from twingpt.data import named

    rows = list(named.describe())
    if json_:
        print_json({"sources": rows})
    else:
        from twingpt.commands.show_data import print_sources

        print_sources(make_console(), rows)
