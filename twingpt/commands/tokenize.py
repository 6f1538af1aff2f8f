"""gpt tokenize: learn, inspect and compare tokenizers."""

from pathlib import Path
from typing import Annotated

import typer

from twingpt.commands.help import App
from twingpt.commands.options import AsText, Errors, Field, Json, Separator, SkipBadLines, read_stdin
from twingpt.commands.output import make_console, print_json

app = App(
    name="tokenize",
    no_args_is_help=True,
    help="Learn a tokenizer, look at what one does, compare several.",
    epilog="[bold]Examples[/]\n\n"
    "gpt tokenize train novel.txt --vocab-size 4096 --out bpe4k\n\n"
    "gpt tokenize show 'Hello world' --tokenizer bpe4k\n\n"
    "gpt tokenize compare novel.txt -t bpe4k -t gpt2 -t byte\n",
)

TOKENIZER = "byte, gpt2, cl100k_base, o200k_base, a tokenizer.json, its folder, or a run or checkpoint."


@app.command(
    "train",
    epilog="[bold]Examples[/]\n\n"
    "gpt tokenize train python-docs --out bpe2k\n\n"
    "gpt tokenize train notes/ novel.txt --vocab-size 8192 --pattern llama3 --chat --out bpe8k\n\n"
    "gpt train --data novel.txt --tokenizer bpe8k\n",
)
def tokenize_train(
    data: Annotated[list[str], typer.Argument(metavar="SOURCE…", help="As of gpt data prepare, or prepared data.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for tokenizer.json and its settings.")],
    vocab_size: Annotated[int, typer.Option(help="Ids at most, special tokens included.")] = 2048,
    pattern: Annotated[str, typer.Option(help="gpt2, llama3 or qwen2: how text is split into words.")] = "gpt2",
    chat: Annotated[bool, typer.Option("--chat", help="Add <|im_start|>, <|im_end|> and a chat template.")] = False,
    field: Field = None,
    errors: Errors = "strict",
    skip_bad_lines: SkipBadLines = 0,
    as_text: AsText = False,
    separator: Separator = None,
    json_: Json = False,
) -> None:
    """Learn a byte-level BPE from texts, for gpt train --tokenizer, transformers and mlx-lm."""
    from rich.console import Console
    from rich.markup import escape

    from twingpt.data.learning import learn_to_folder
    from twingpt.data.sources import ReadOptions, printable
    from twingpt.runs.units import human_bytes

    options = ReadOptions(field, errors, skip_bad_lines=skip_bad_lines, as_text=as_text, separator=separator)
    with Console(stderr=True).status(f"Learning from {escape(printable(', '.join(data)))}"):
        result = learn_to_folder(data, vocab_size, pattern, out, options, chat=chat)
    if json_:
        print_json(result)
        return
    print(f"{out}: {result['vocab_size']:,} ids from {human_bytes(result['bytes'])} in {result['seconds']:.1f} s")
    for note in result["notes"]:
        print(note)
    if result["vocab_size"] < vocab_size:
        print(f"The text has no more pairs to join, so it is fewer than {vocab_size}.")


@app.command(
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
    from twingpt.commands.show_tokens import print_tokens
    from twingpt.data.tokenizers import describe_tokens, find

    found = find(tokenizer)
    rows = describe_tokens(found, read_stdin("text") if text == "-" else text, special=special)
    if json_:
        print_json({"tokenizer": tokenizer, "vocab_size": found.vocab_size, "tokens": rows})
    else:
        print_tokens(make_console(), rows)


@app.command(
    "compare",
    epilog="[bold]Examples[/]\n\n"
    "gpt tokenize compare novel.txt --tokenizer byte --tokenizer gpt2\n\n"
    "gpt tokenize compare python-docs -t char -t runs/first -t gpt2 --json\n",
)
def tokenize_compare(
    data: Annotated[str, typer.Argument(metavar="SOURCE", help="As of gpt data prepare, or prepared data.")],
    tokenizer: Annotated[list[str], typer.Option("--tokenizer", "-t", help=f"{TOKENIZER} Repeatable.")],
    field: Field = None,
    errors: Errors = "strict",
    skip_bad_lines: SkipBadLines = 0,
    as_text: AsText = False,
    separator: Separator = None,
    json_: Json = False,
) -> None:
    """Compare tokenizers on a text: tokens, bytes per token, vocabulary, speed on one core."""
    from twingpt.commands.show_tokens import print_comparison
    from twingpt.data.learning import compare
    from twingpt.data.sources import ReadOptions

    result = compare(
        tokenizer, data, ReadOptions(field, errors, skip_bad_lines=skip_bad_lines, as_text=as_text, separator=separator)
    )
    if json_:
        print_json(result)
    else:
        print_comparison(make_console(), result)
