"""LanguageModel: a model that is ready to run, as the Python API has it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, overload

import numpy as np

from twingpt.core.backend import InferenceEngine, LogProbs, check_tokens
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.sampler import Sampling
from twingpt.core.tokenizer import Tokenizer
from twingpt.inference.decoding import Row, Token, decode
from twingpt.inference.prompt_cache import PromptCache
from twingpt.inference.text import TextStream

Array = np.ndarray
Prompt = str | Sequence[int] | Array  # text, or ids


@dataclass(frozen=True)
class Response:
    """One generated token: what `LanguageModel.stream` yields.

    Attributes:
        text: The text that has become certain, maybe empty: whole characters, nothing of a stop string or of an end
            of text. Joined, the texts are the whole text. Empty without a tokenizer.
        token: The id of the token; the last one may be an end of text.
        log_prob: Its log-probability in nats by the model's raw logits, before temperature and the like; None where
            that isn't asked for.
        top: (id, log-probability) of the likeliest ids, the likeliest first; as many as `top_log_probs` asks for.
        index: Which of the prompts it goes on from; 0 where there is one.
        choice: Which of the prompt's samples it is of; 0 where there is one.
        prompt_tokens: Ids of the prompt.
        generation_tokens: Ids generated so far, this one included.
        prompt_tps: Prompt tokens per second, until the first token was there.
        generation_tps: Generated tokens per second since the first; 0 for that.
        finish_reason: None but for the last one of a text: "stop" for an end of text or a stop string, "length"
            for max_tokens.
    """

    text: str
    token: int
    log_prob: float | None
    top: tuple[tuple[int, float], ...]
    index: int
    choice: int
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    finish_reason: str | None


class LanguageModel:
    """A model ready to run: text or ids in, text, log-probabilities or logits out.

    Generation stops at the tokenizer's end of text, at its EOS, and at any id of `ends`. Texts may be generated side
    by side, in turns or in threads. Without a tokenizer it takes ids alone.
    """

    def __init__(
        self, config: GPTConfig, tokenizer: Tokenizer | None, engine: InferenceEngine, ends: Collection[int] = ()
    ) -> None:
        self.config, self.tokenizer, self.engine, self.ends = config, tokenizer, engine, set(ends)
        if tokenizer is None:
            return
        # Special tokens beyond the model's vocabulary are allowed, an end of text too: it never samples them.
        if tokenizer.byte_lengths[config.vocab_size :].any():
            raise UserError(
                f"The tokenizer has {tokenizer.vocab_size} ids and the model knows only {config.vocab_size}."
            )
        self.ends |= {tokenizer.end_of_text, tokenizer.roles.get("eos", tokenizer.end_of_text)}

    def logits(self, tokens: Any) -> Array:
        """(B, T) ids -> (B, T, V) float32 logits; UserError for an id or a length that the model can't take."""
        return self.engine.forward(tokens)

    def log_probs(self, tokens: Any, targets: Any = None, *, top_k: int = 0) -> LogProbs:
        """Log-probabilities in nats of (B, T) targets, each after its ids, and of the `top_k` likeliest ids.

        Without targets those of the ids themselves, each after the ones before it: (B, T - 1). A target below 0 is
        padding, and has 0. Raises UserError for ids, targets or a `top_k` that the model can't take.
        """
        tokens = check_tokens(tokens, self.config)
        if targets is None:
            tokens, targets = tokens[..., :-1], tokens[..., 1:]
        targets = np.asarray(targets)
        if targets.shape != tokens.shape or not np.issubdtype(targets.dtype, np.integer):
            raise UserError(
                f"Targets must be integers of shape {tokens.shape}, and are {targets.dtype} {targets.shape}."
            )
        if targets.size and targets.max() >= self.config.vocab_size:
            raise UserError(f"Target {targets.max()} is outside the vocabulary, 0 to {self.config.vocab_size - 1}.")
        if not _is_whole(top_k) or not 0 <= top_k <= self.config.vocab_size:
            raise UserError(f"top_k must be from 0 to {self.config.vocab_size}, and is {top_k}.")
        found: LogProbs = self.engine.read(self.engine.log_probs(tokens, targets, int(top_k)))
        return found

    def encode(self, prompt: Prompt, *, special: bool = False) -> list[int]:
        """The ids of a prompt: of a text behind what the tokenizer puts before it (BOS), or the ids that are given.

        With `special` the spelling of a special token in the text is that token, as in a rendered chat template; a
        BOS that it has stays the only one. Raises UserError for a text that the tokenizer can't encode, ids that the
        model hasn't, and a text where there is no tokenizer.
        """
        if not isinstance(prompt, str):
            given = np.asarray(prompt)
            if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
                raise UserError(f"A prompt must be a text or a list of ids, and is {prompt!r:.60}.")
            if given.size and not 0 <= given.min() <= given.max() < self.config.vocab_size:
                raise UserError(f"The prompt has an id outside the vocabulary, 0 to {self.config.vocab_size - 1}.")
            return [int(token) for token in given]
        if self.tokenizer is None:
            raise UserError(
                "This model has no tokenizer, so it takes ids and no text: save one with it by gpt convert --tokenizer."
            )
        if not prompt.isascii() and prompt.encode(errors="ignore").decode() != prompt:
            raise UserError("The prompt is not valid UTF-8 text: some of its bytes stand for no character.")
        ids = [int(token) for token in self.tokenizer.encode(prompt, special=special)]
        opening = [token for token in self.tokenizer.opening if token < self.config.vocab_size]
        return ids if opening and ids[: len(opening)] == opening else opening + ids

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int = 200,
        *,
        temp: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | Sequence[int] = 1337,
        stop: str | Sequence[str] | None = None,
        special: bool = False,
        log_probs: bool = True,
        top_log_probs: int = 0,
        num_samples: int = 1,
        kv_bits: int | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> Iterator[Response]:
        """Go on from a prompt, or from several side by side: yields a Response for each token as it is generated.

        A prompt is a text or ids, see `encode`; an empty one begins a new document. The same seed gives the same text,
        alone or beside others, on either backend in one precision; several seeds are one for each prompt, so that a
        prompt given several times has several texts. `num_samples` are texts of each prompt with one seed, the first of
        which is the one without it. A text ends before the first of the `stop` strings. The `repetition_penalty` is for
        ids of prompt and text, the other penalties for those of the text.
        With `kv_bits` 8 or 4 the KV cache is quantized: it takes less memory, and rounds what attention sees. A
        `prompt_cache` of this engine, with the same `kv_bits`, gives the beginnings of prompts, and keeps them.
        Raises UserError for a setting out of range, or a prompt that can't be encoded, before the first token.
        """
        penalties = (repetition_penalty, presence_penalty, frequency_penalty)
        sampling = Sampling(temp, top_k, top_p, min_p, *penalties, logit_bias or {})
        self._check_settings(sampling, max_tokens, num_samples, top_log_probs)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(isinstance(one, str) and one for one in stops):
            raise UserError(f"A stop string must be a text that isn't empty, and these are {stops!r:.60}.")
        prompts: Any = prompt if _are_many(prompt) else [prompt]
        encoded = [self.encode(one, special=special) for one in prompts]
        seeds: list[Any] = [seed] * len(encoded) if np.ndim(seed) == 0 else list(seed)  # type: ignore[arg-type]
        if wrong := [one for one in seeds if not _is_whole(one)]:
            raise UserError(f"A seed must be a whole number, and is {wrong[0]!r:.60}.")
        if len(seeds) != len(encoded):
            raise UserError(f"There are {len(encoded)} prompts and {len(seeds)} seeds: give one seed, or one for each.")
        if prompt_cache and (prompt_cache.engine is not self.engine or prompt_cache.kv_bits != kv_bits):
            raise UserError("The prompt cache is that of another engine, or of other kv_bits.")
        rows = {
            Row(self._context(ids), sampling, int(max_tokens), int(one), choice): number
            for number, (ids, one) in enumerate(zip(encoded, seeds, strict=True))
            for choice in range(num_samples)
        }
        asked = int(top_log_probs) if log_probs or top_log_probs else None
        sampled = decode(self.engine, rows, log_probs=asked, kv_bits=kv_bits, prompt_cache=prompt_cache)
        return self._responses(sampled, rows, encoded, stops)

    def _check_settings(self, sampling: Sampling, max_tokens: Any, num_samples: Any, top_log_probs: Any) -> None:
        """Raise UserError for a setting that `Sampling` does not know to be impossible."""
        V, wrong = self.config.vocab_size, [token for token in sampling.logit_bias if token >= self.config.vocab_size]
        if wrong:
            raise UserError(f"logit_bias has the id {wrong[0]}, which is outside the vocabulary, 0 to {V - 1}.")
        for name, count, least in (
            ("max_tokens", max_tokens, 1),
            ("num_samples", num_samples, 1),
            ("top_log_probs", top_log_probs, 0),
        ):
            if not _is_whole(count) or count < least:
                raise UserError(f"{name} must be a whole number of at least {least}, and is {count}.")
        if top_log_probs > V:
            raise UserError(f"top_log_probs must be from 0 to {V}, the model's vocabulary, and is {top_log_probs}.")

    def _context(self, ids: list[int]) -> list[int]:
        """The ids to go on from: those of the prompt, or where it is empty the end of the document before."""
        if ids:
            return list(ids)
        if self.tokenizer is None or self.tokenizer.end_of_text >= self.config.vocab_size:
            raise UserError("This model knows no end of text to begin a document after: give a prompt.")
        return [self.tokenizer.end_of_text]

    def _responses(
        self,
        sampled: Iterator[tuple[Row, Token]],
        rows: Mapping[Row, int],
        prompts: list[list[int]],
        stop: tuple[str, ...],
    ) -> Iterator[Response]:
        """`rows` with the numbers of their prompts."""
        texts = {
            row: TextStream(self.tokenizer, prompts[n], stop) if self.tokenizer else None for row, n in rows.items()
        }
        first = dict.fromkeys(rows, 0.0)
        for row, token in sampled:
            now, text_stream, n_prompt = time.perf_counter(), texts[row], len(prompts[rows[row]])
            n, ended = len(row.tokens) - row.n_prompt, token.id in self.ends
            first[row] = first[row] or now
            text = text_stream.push(token.id) if text_stream and not ended else ""
            stopped = ended or (text_stream is not None and text_stream.stopped)
            row.done = stopped or n == row.max_tokens
            if row.done and text_stream:
                text += text_stream.finish()
                stopped = stopped or text_stream.stopped
            reason = None if not row.done else "stop" if stopped else "length"
            yield Response(
                text=text,
                token=token.id,
                log_prob=token.log_prob,
                top=token.top,
                index=rows[row],
                choice=row.choice,
                prompt_tokens=n_prompt,
                generation_tokens=n,
                prompt_tps=n_prompt / (first[row] - row.started),
                generation_tps=(n - 1) / (now - first[row]) if n > 1 else 0.0,
                finish_reason=reason,
            )

    @overload
    def generate(self, prompt: Prompt, max_tokens: int = 200, *, num_samples: int, **settings: Any) -> list[str]: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        max_tokens: int = 200,
        *,
        num_samples: int,
        **settings: Any,
    ) -> list[list[str]]: ...
    @overload
    def generate(self, prompt: str | Array, max_tokens: int = 200, **settings: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[int], max_tokens: int = 200, **settings: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], max_tokens: int = 200, **settings: Any
    ) -> list[str]: ...
    def generate(
        self, prompt: Any, max_tokens: int = 200, *, num_samples: int | None = None, **settings: Any
    ) -> str | list[str] | list[list[str]]:
        """The text that goes on from a prompt, or a list of those of several; takes the settings of `stream`.

        With `num_samples` there is a list of so many texts for each prompt. Raises UserError as `stream` does, and
        where the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("This model has no tokenizer, so its tokens have no text: stream() gives their ids.")
        many, n = _are_many(prompt), 1 if num_samples is None else num_samples
        responses = self.stream(prompt, max_tokens, num_samples=n, **{"log_probs": False} | settings)
        texts = [[""] * n for _ in range(len(prompt) if many else 1)]
        for response in responses:
            texts[response.index][response.choice] += response.text
        found = texts if num_samples is not None else [text for (text,) in texts]
        return found if many else found[0]


def _are_many(prompt: Any) -> bool:
    """Whether these are several prompts: neither a text nor a row of ids; UserError for what is no prompt at all."""
    if not isinstance(prompt, Sequence) and np.ndim(prompt) == 0:
        raise UserError(f"A prompt must be a text or a list of ids, and is {prompt!r:.60}.")
    return not isinstance(prompt, str) and len(prompt) > 0 and (isinstance(prompt[0], str) or np.ndim(prompt[0]) > 0)


def _is_whole(value: Any) -> bool:
    """Whether a setting is a whole number, one of NumPy too."""
    return isinstance(value, Integral) and not isinstance(value, bool)
