"""gpt generate: sample text from a model."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from twingpt.commands.help import App
from twingpt.commands.options import Backend, Device, Json, read_stdin
from twingpt.commands.output import print_json
from twingpt.core.errors import UserError
from twingpt.core.paths import expand

app = App()


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
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. (default: as stored, where the device is fast at it)"),
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="Quantize the KV cache to 8 or 4 bits: less memory, less exact.")
    ] = None,
    prompt_cache_file: Annotated[
        Path | None, typer.Option(help="Keep prompts' keys and values here: one that begins alike starts sooner.")
    ] = None,
    prompt_cache_bytes: Annotated[
        int | None, typer.Option(help="Bytes that they and this text may take. (default: 4 GiB)")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before; repeatable.")] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Spellings of special tokens in the prompt are those tokens.")
    ] = False,
    json_: Json = False,
) -> None:
    """Let a model go on from a prompt, streaming its text."""
    from twingpt.backends import registry
    from twingpt.inference.load import language_model
    from twingpt.inference.prompt_cache import MAX_BYTES, PromptCache, model_digest
    from twingpt.weights.formats import open_model

    start = read_stdin() if prompt == "-" else prompt
    opened = open_model(model).model
    loaded = language_model(opened, backend, device, dtype)
    ids = loaded.encode(start, special=special)
    prompt_cache = None
    if prompt_cache_file:
        file, digest = expand(prompt_cache_file), model_digest(opened)
        limit = MAX_BYTES if prompt_cache_bytes is None else prompt_cache_bytes
        prompt_cache = PromptCache(loaded.engine, kv_bits=kv_bits, max_bytes=limit)
        if file.exists():
            prompt_cache.load(file, digest)
        elif not file.parent.is_dir():
            raise UserError(f"There is no folder {file.parent} for the prompt cache: make it, or give another file.")
    name, engine = registry.choose(backend)[0], loaded.engine
    responses = loaded.stream(
        ids,
        max_tokens,
        temp=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        kv_bits=kv_bits,
        prompt_cache=prompt_cache,
        log_probs=False,
    )
    if not json_:
        print(f"{name} on {engine.device.name}, in {engine.dtype}", file=sys.stderr)
        print(start, end="", flush=True)
    text, tokens, finish_reason = "", list[int](), None
    began = time.perf_counter()
    for response in responses:
        text, finish_reason = text + response.text, response.finish_reason
        tokens += [response.token] * (response.token not in loaded.ends)
        if not json_:
            print(response.text, end="", flush=True)
    if prompt_cache and prompt_cache.changed:
        prompt_cache.save(file, digest)
    if not json_:
        print()
        if prompt_cache:
            kept = "" if not prompt_cache.refused else ", and it is too long to be kept in --prompt-cache-bytes"
            print(f"{prompt_cache.reused} of the prompt's tokens were in {file}{kept}", file=sys.stderr)
        return
    print_json(
        {
            "text": text,
            "tokens": tokens,
            "prompt_tokens": ids,
            "finish_reason": finish_reason,
            "tokens_per_second": len(tokens) / (time.perf_counter() - began),
            "backend": name,
            "device": engine.device.name,
            "dtype": engine.dtype,
        }
    )
