"""gpt generate: sample text from a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twingpt.commands.help import App
from twingpt.commands.options import Backend, Device, Json, read_stdin
from twingpt.commands.output import print_json
from twingpt.core.errors import UserError
from twingpt.core.paths import expand

if TYPE_CHECKING:
    from twingpt.core.backend import InferenceEngine
    from twingpt.inference.language_model import Response
    from twingpt.inference.prompt_cache import PromptCache

app = App()


@app.command(
    epilog="[bold]Examples[/]\n\n"
    'gpt generate runs/novel -p "It was a"\n\n'
    'gpt generate runs/novel@best -p "It was a" -m 400 --temp 0.7 --seed 7\n\n'
    "echo -n 'def ' | gpt generate runs/code -p - --json --num-samples 4 --logprobs 5\n"
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
    presence_penalty: Annotated[float, typer.Option(help="Taken from logits of tokens generated before.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that one was generated.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=NUMBER", help="Added to the logit of a token; repeatable.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Texts to generate side by side.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json, log-probabilities of the tokens and of so many likeliest.")
    ] = None,
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
    from twingpt.inference.prompt_cache import model_digest
    from twingpt.weights.formats import open_model

    if logprobs is not None and not json_:
        raise UserError("--logprobs shows nothing without --json: add it.")
    biases = dict(map(_bias, logit_bias or []))
    start = read_stdin() if prompt == "-" else prompt
    opened = open_model(model).model
    loaded = language_model(opened, backend, device, dtype)
    ids = loaded.encode(start, special=special)
    prompt_cache = None
    if prompt_cache_file:
        file, digest = expand(prompt_cache_file), model_digest(opened)
        prompt_cache = _prompt_cache(file, digest, loaded.engine, kv_bits, prompt_cache_bytes)
    name, engine = registry.choose(backend)[0], loaded.engine
    responses = loaded.stream(
        ids,
        max_tokens,
        temp=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=biases,
        seed=seed,
        stop=stop,
        log_probs=logprobs is not None,
        top_log_probs=logprobs or 0,
        num_samples=num_samples,
        kv_bits=kv_bits,
        prompt_cache=prompt_cache,
    )
    if not json_:
        print(f"{name} on {engine.device.name}, in {engine.dtype}", file=sys.stderr)
        print(start, end="", flush=True)
    samples: list[dict[str, Any]] = [{"text": "", "tokens": [], "finish_reason": None} for _ in range(num_samples)]
    began = time.perf_counter()
    for response in responses:
        _add(samples[response.choice], response, loaded.ends)
        if not json_ and response.choice == 0:  # the others would come between
            print(response.text, end="", flush=True)
    seconds = time.perf_counter() - began
    if prompt_cache and prompt_cache.changed:
        prompt_cache.save(file, digest)
    if not json_:
        print(*("", *(f"\n{start}{sample['text']}" for sample in samples[1:])), sep="\n")
        if prompt_cache:
            kept = "" if not prompt_cache.refused else ", and it is too long to be kept in --prompt-cache-bytes"
            print(f"{prompt_cache.reused} of the prompt's tokens were in {file}{kept}", file=sys.stderr)
        return
    print_json(
        {
            **samples[0],
            "prompt_tokens": ids,
            "tokens_per_second": sum(len(sample["tokens"]) for sample in samples) / seconds,
            "backend": name,
            "device": engine.device.name,
            "dtype": engine.dtype,
            **({"samples": samples} if num_samples > 1 else {}),
        }
    )


def _bias(text: str) -> tuple[int, float]:
    """The id and the number of ID=NUMBER."""
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise UserError(f"--logit-bias must be ID=NUMBER, as in 50=-100, and is {text!r:.60}.") from None


def _prompt_cache(
    file: Path, digest: str, engine: InferenceEngine, kv_bits: int | None, max_bytes: int | None
) -> PromptCache:
    """The prompt cache that a file has, or is to have."""
    from twingpt.inference.prompt_cache import MAX_BYTES, PromptCache

    cache = PromptCache(engine, kv_bits=kv_bits, max_bytes=MAX_BYTES if max_bytes is None else max_bytes)
    if file.exists():
        cache.load(file, digest)
    elif not file.parent.is_dir():
        raise UserError(f"There is no folder {file.parent} for the prompt cache: make it, or give another file.")
    return cache


def _add(sample: dict[str, Any], response: Response, ends: Collection[int]) -> None:
    """Add what a response says to the sample that it is of; an end of text is no token of it."""
    sample["text"] += response.text
    sample["finish_reason"] = response.finish_reason
    if response.token in ends:
        return
    sample["tokens"].append(response.token)
    if response.log_prob is not None:
        top = [{"token": token, "log_prob": log_prob} for token, log_prob in response.top]
        sample.setdefault("log_probs", []).append({"log_prob": response.log_prob, "top": top})
