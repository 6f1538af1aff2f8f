"""gpt baseline: the held-out loss of n-grams."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.help import App
from twingpt.commands.options import Json
from twingpt.commands.output import make_console, print_json
from twingpt.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from twingpt.evaluation.baseline import NGramLoss, SourceNGrams

app = App()


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "gpt baseline python-docs                        n-grams of 1 to 5 tokens\n\n"
    "gpt baseline novel.txt --tokenizer char --n 5   on characters\n\n"
    "gpt baseline runs/novel --n 2,3 --sample 400    on the data of a run, with a longer text\n\n"
    "gpt baseline novel.txt:0.7 notes/:0.3           on a mixture, weighted as gpt train --data weighs it\n"
)
def baseline(
    names: Annotated[
        list[str], typer.Argument(metavar="DATA…|RUN", help="What gpt train --data takes, or a run: its data.")
    ],
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
    from twingpt.evaluation import baseline as baselines
    from twingpt.training.stored import open_named_data

    orders = baselines.parse_orders(n)
    if sample < 0:
        raise UserError(f"--sample must be at least 0, and is {sample}.")
    data, targets = open_named_data(names, tokenizer, vocab_size)
    rows, sources = baselines.measure_all(data, orders, targets)
    if json_:
        parts = [
            {"data": source.part.name, "share": source.part.share, "folder": str(source.part.data.folder)}
            | {"rows": _described(source.rows, source, sample, seed)}
            for source in sources
        ]
        if len(parts) == 1:
            print_json({key: value for key, value in parts[0].items() if key != "share"})
        else:
            print_json({"data": data.manifest["name"], "rows": _described(rows, None, 0, seed), "sources": parts})
        return
    _print_baselines(make_console(), data.manifest, _described(rows, None, 0, seed))
    for source in sources if len(sources) > 1 else ():
        make_console().print(f"{source.part.share:.0%} of the windows:")
        _print_baselines(make_console(), source.part.data.manifest, _described(source.rows, None, 0, seed))
    if sample:
        best = baselines.best(rows).n
        for source in sources:
            text = baselines.samples(source.part.data, source.model, [best], sample, seed)[0]
            _print_sample(make_console(), f"{best}-gram" + f" of {source.part.name}" * (len(sources) > 1), text)


def _described(
    rows: "Sequence[NGramLoss]", source: "SourceNGrams | None", sample: int, seed: int
) -> list[dict[str, Any]]:
    """The rows for people and scripts, with a text of `sample` tokens that each n-gram of a source writes."""
    from twingpt.evaluation.baseline import samples

    texts: list[str | None] = [None] * len(rows)
    if source and sample:
        texts = [*samples(source.part.data, source.model, [row.n for row in rows], sample, seed)]
    return [
        {**dataclasses.asdict(row), "perplexity": row.perplexity, "sample": text}
        for row, text in zip(rows, texts, strict=True)
    ]


def _print_baselines(console: "Console", manifest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
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


def _print_sample(console: "Console", writer: str, text: str) -> None:
    from rich.markup import escape
    from rich.panel import Panel

    from twingpt.runs.units import visible

    shown = "\n".join(map(visible, text.split("\n")))
    if not console.is_terminal:  # where a frame would be as wide as the longest line may be
        console.print(f"what the {writer} writes:\n{shown}", markup=False)
        return
    console.print(Panel(escape(shown), title=escape(f"what the {writer} writes"), border_style="dim"))
