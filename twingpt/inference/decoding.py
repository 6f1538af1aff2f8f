"""The decoding loop: it drives an inference engine, and reads each token while the next is being computed."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from twingpt.core import rng
from twingpt.core.backend import Handle, InferenceEngine
from twingpt.core.errors import UserError
from twingpt.core.kv_cache import KVCache
from twingpt.core.sampler import Sampling, SamplingRows
from twingpt.inference.prompt_cache import PromptCache

MAX_ROWS = 16  # texts that are decoded side by side at most: each has a KV cache
ROOM = 256  # positions beyond the prompt that a KV cache begins with; it grows as it fills


@dataclass(eq=False)
class Row:
    """A text that is being decoded: `tokens` are its prompt and the ids read so far.

    It leaves after `max_tokens`, or when whoever reads its tokens sets `done`. `n_sampled` ids are enqueued, and
    `started` is the time of its prefill, in seconds. Rows of one prompt and seed differ by their `choice`. `n_prompt`
    ids are the prompt, of which `n_prompt_held` are still in the KV cache.
    """

    tokens: list[int]
    sampling: Sampling
    max_tokens: int
    seed: int
    choice: int = 0
    done: bool = False
    n_sampled: int = 0
    started: float = 0.0

    def __post_init__(self) -> None:
        self.n_prompt = self.n_prompt_held = len(self.tokens)


@dataclass(frozen=True)
class Token:
    """A token that was sampled: its id, and where asked for its log-probability by the raw logits.

    `top` are the likeliest ids with theirs, the likeliest first.
    """

    id: int
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def decode(
    engine: InferenceEngine,
    rows: Iterable[Row],
    max_rows: int = MAX_ROWS,
    *,
    log_probs: int | None = 0,
    kv_bits: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[tuple[Row, Token]]:
    """Decode texts side by side, at most `max_rows` at a time; `log_probs` is as `InferenceEngine.step` takes it.

    The id at position i of a text is sampled with the uniform keyed by (seed, i, choice). When a row holds block_size
    positions, the last half of its text is prefilled anew: penalties are for what is held. `kv_bits` are the KV
    cache's, see `new_cache`, and the `prompt_cache`'s, which gives the beginnings of prompts and keeps them.
    Raises UserError where logits are not finite.
    """
    waiting, active = deque(rows), list[Row]()
    if not waiting:
        return
    block_size = engine.config.block_size
    first = [*waiting][:max_rows]  # one that joins later makes the cache grow if it has to
    longest = max(min(len(row.tokens), block_size) + min(row.max_tokens, ROOM) for row in first)
    cache = engine.new_cache(min(max_rows, len(waiting)), longest, kv_bits=kv_bits)
    settings: SamplingRows  # of the active rows
    settled = list[Row]()  # those that it is of
    unread: tuple[Handle, list[Row]] | None = None
    while True:
        _leave(cache, active)
        while waiting and len(active) < len(cache.lengths):
            _join(engine, cache, active, waiting.popleft(), prompt_cache)
        full = [number for number in range(len(active)) if cache.lengths[number] == block_size]
        if full and unread:
            yield from _read(engine, *unread)
            unread = None
            continue  # some may be done now
        for number in full:
            cache.trim(number, block_size)
            _prefill(engine, cache, number, active[number], max(1, block_size // 2))
        if active and (full or active != settled):
            settings = SamplingRows([row.sampling for row in active], [row.n_prompt_held for row in active])
            settled = list(active)
        ahead = _step(engine, cache, settings, active, log_probs=log_probs) if active else None
        if unread:
            yield from _read(engine, *unread)
        if ahead is None:
            return
        unread = ahead


def _leave(cache: KVCache, active: list[Row]) -> None:
    """Take out the rows that need no further step: the last one moves into the place of each."""
    for number in reversed(range(len(active))):
        if active[number].done or active[number].n_sampled == active[number].max_tokens:
            last = active.pop()
            if number < len(active):
                cache.copy(len(active), number)
                active[number] = last
            cache.trim(len(active), int(cache.lengths[len(active)]))


def _join(
    engine: InferenceEngine, cache: KVCache, active: list[Row], row: Row, prompt_cache: PromptCache | None
) -> None:
    """Prefill the end of a row's prompt behind the active ones, all that leaves a place for one token.

    Copied where one that just joined has the same prompt.
    """
    row.started = time.perf_counter()
    number, block_size = len(active), engine.config.block_size
    most = max(1, block_size - 1)
    twins = (other for other, joined in enumerate(active) if not joined.n_sampled and joined.tokens == row.tokens)
    if (twin := next(twins, None)) is None:
        _prefill(engine, cache, number, row, most, prompt_cache)
    else:
        cache.copy(twin, number)
        row.n_prompt_held = active[twin].n_prompt_held
    active.append(row)
    if prompt_cache:
        decoded = sum(min(block_size, one.n_prompt + one.max_tokens) for one in active)
        prompt_cache.keep(cache, number, row.tokens[-most:], decoded)


def _prefill(
    engine: InferenceEngine,
    cache: KVCache,
    number: int,
    row: Row,
    most: int,
    prompt_cache: PromptCache | None = None,
) -> None:
    """Prefill an empty row of the cache with at most so many of the last ids of a text, or what isn't known of them."""
    held = row.tokens[-most:]
    row.n_prompt_held = max(0, row.n_prompt - (len(row.tokens) - len(held)))
    known = prompt_cache.restore(cache, number, held) if prompt_cache else 0
    engine.prefill(cache, number, np.array(held[known:]))


def _step(
    engine: InferenceEngine, cache: KVCache, settings: SamplingRows, active: list[Row], *, log_probs: int | None
) -> tuple[Handle, list[Row]]:
    """Enqueue one step of the active rows: its handle, and whose tokens it samples."""
    u = [rng.uniform(row.seed, row.n_prompt + row.n_sampled, row.choice) for row in active]
    handle = engine.step(cache, settings, np.array(u), log_probs=log_probs)
    for row in active:
        row.n_sampled += 1
    return handle, list(active)


def _read(engine: InferenceEngine, handle: Handle, rows: list[Row]) -> Iterator[tuple[Row, Token]]:
    """What a step sampled for the rows that are not done."""
    sampled = engine.read(handle)
    for number, row in enumerate(rows):
        if row.done:
            continue
        log_prob = None if sampled.log_probs is None else float(sampled.log_probs[number])
        if sampled.tokens[number] < 0 or (log_prob is not None and math.isnan(log_prob)):
            raise UserError("The model's logits are not finite: compute in float32, or look at its weights.")
        pairs = () if sampled.top is None else zip(sampled.top_ids[number], sampled.top[number], strict=True)
        token = Token(int(sampled.tokens[number]), log_prob, tuple((int(id), float(value)) for id, value in pairs))
        row.tokens.append(token.id)
        yield row, token
