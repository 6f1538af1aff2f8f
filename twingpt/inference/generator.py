"""The generation loop: it drives an inference engine, and reads each token while the next is being computed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

import numpy as np

from twingpt.core import rng
from twingpt.core.backend import InferenceEngine
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.sampler import Sampling, SamplingRows
from twingpt.core.tokenizer import Tokenizer

Array = np.ndarray

ROOM = 256  # positions beyond the prompt that a KV cache begins with; it grows as it fills


def generate_tokens(
    engine: InferenceEngine, prompt: Array, sampling: Sampling, max_tokens: int, seed: int
) -> Iterator[int]:
    """Prefill `prompt` (n,), then decode and yield up to `max_tokens` ids, each read while the next is being computed.

    The token at position i of the text is sampled with the uniform keyed by (seed, i). When the KV cache holds
    block_size positions, the last half of the text is prefilled anew.
    """
    block_size = engine.config.block_size
    text = [int(token) for token in prompt]
    context = text[-block_size:]
    cache = engine.new_cache(1, len(context) + min(max_tokens, ROOM))
    engine.prefill(cache, 0, np.array(context))
    settings, unread = SamplingRows([sampling]), None
    for position in range(len(text), len(text) + max_tokens):
        if cache.lengths[0] == block_size:
            if unread is not None:
                text.append(int(engine.read(unread).tokens[0]))
                unread = None
                yield text[-1]
            cache.trim(0, block_size)
            engine.prefill(cache, 0, np.array(text[-max(1, block_size // 2) :]))
        handle = engine.step(cache, settings, np.array([rng.uniform(seed, position)]))
        if unread is not None:
            text.append(int(engine.read(unread).tokens[0]))
            yield text[-1]
        unread = handle
    if unread is not None:
        yield int(engine.read(unread).tokens[0])


class Completion:
    """Streamed generation: iterate for pieces of text; then `text`, `tokens` and `finish_reason` are whole."""

    def __init__(
        self, tokens: Iterator[int], tokenizer: Tokenizer, prompt_tokens: Array, ends: Collection[int]
    ) -> None:
        self._source = tokens
        self._tokenizer = tokenizer
        self._ends = ends
        self.prompt_tokens = [int(token) for token in prompt_tokens]
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = "length"
        self.seconds = 0.0

    def _until_the_end(self) -> Iterator[int]:
        for token in self._source:
            if token in self._ends:
                self.finish_reason = "stop"
                return
            self.tokens.append(token)
            if token < self._tokenizer.vocab_size:  # ids that pad the model's vocabulary have no text
                yield token

    def __iter__(self) -> Iterator[str]:
        start = time.perf_counter()
        for piece in self._tokenizer.stream(self._until_the_end(), self.prompt_tokens):
            self.text += piece
            self.seconds = time.perf_counter() - start
            if piece:
                yield piece

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall-clock time, prefill included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


class LanguageModel:
    """A model ready to run: text or tokens in, text or logits out.

    Generation stops at the tokenizer's end of text, at its EOS, and at any of `ends`.
    """

    def __init__(
        self, config: GPTConfig, tokenizer: Tokenizer, engine: InferenceEngine, ends: Collection[int] = ()
    ) -> None:
        # Special tokens beyond the model's vocabulary are allowed, an end of text too: it never samples them.
        if tokenizer.byte_lengths[config.vocab_size :].any():
            raise UserError(
                f"The tokenizer has {tokenizer.vocab_size} ids and the model knows only {config.vocab_size}."
            )
        self.config, self.tokenizer, self.engine = config, tokenizer, engine
        self.ends = {tokenizer.end_of_text, tokenizer.roles.get("eos", tokenizer.end_of_text), *ends}

    def logits(self, tokens: Array) -> Array:
        """(B, T) ids -> (B, T, V) float32 logits; UserError for an id or a length that the model can't take."""
        return self.engine.forward(tokens)

    def complete(
        self,
        prompt: str,
        max_tokens: int = 200,
        *,
        temp: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 1337,
    ) -> Completion:
        """A completion of `prompt`, generated as it is iterated over.

        The tokenizer's BOS or the like is put before the prompt; an empty prompt begins a new document. Raises
        UserError for a sampling setting out of range, or a prompt that the tokenizer can't encode.
        """
        sampling = Sampling(temp, top_k, top_p, min_p, repetition_penalty)
        if max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, and is {max_tokens}.")
        if not prompt.isascii() and prompt.encode(errors="ignore").decode() != prompt:
            raise UserError("The prompt is not valid UTF-8 text: some of its bytes stand for no character.")
        opening = [token for token in self.tokenizer.opening if token < self.config.vocab_size]
        ids = np.array([*opening, *self.tokenizer.encode(prompt)], np.int32)
        if not len(ids) and self.tokenizer.end_of_text >= self.config.vocab_size:
            raise UserError("This model knows no end of text to begin a document after: give a prompt.")
        context = ids if len(ids) else np.array([self.tokenizer.end_of_text])
        tokens = generate_tokens(self.engine, context, sampling, max_tokens, seed)
        return Completion(tokens, self.tokenizer, ids, self.ends)

    def generate(self, prompt: str, max_tokens: int = 200, **settings: float) -> str:
        """The text that `complete` yields, whole; takes the same settings."""
        return "".join(self.complete(prompt, max_tokens, **settings))  # type: ignore[arg-type]
