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
    `started` is the time of its prefill, in seconds.
    """

    tokens: list[int]
    sampling: Sampling
    max_tokens: int
    seed: int
    done: bool = False
    n_sampled: int = 0
    started: float = 0.0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)


def decode(
    engine: InferenceEngine,
    rows: Iterable[Row],
    max_rows: int = MAX_ROWS,
    *,
    log_probs: bool = True,
    kv_bits: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[tuple[Row, int, float | None]]:
    """Decode texts side by side, at most `max_rows` at a time: yield (row, id, log-probability by the raw logits).

    The id at position i of a text is sampled with the uniform keyed by (seed, i). When a row holds block_size
    positions, the last half of its text is prefilled anew. `kv_bits` are the KV cache's, see `new_cache`, and the
    `prompt_cache`'s, which gives the beginnings of prompts and keeps them.
    """
    waiting, active = deque(rows), list[Row]()
    if not waiting:
        return
    block_size = engine.config.block_size
    first = [*waiting][:max_rows]  # one that joins later makes the cache grow if it has to
    longest = max(min(len(row.tokens), block_size) + min(row.max_tokens, ROOM) for row in first)
    cache = engine.new_cache(min(max_rows, len(waiting)), longest, kv_bits=kv_bits)
    settings: SamplingRows  # of the active rows
    unread: tuple[Handle, list[Row]] | None = None
    while True:
        before = list(active)
        _leave(cache, active)
        while waiting and len(active) < len(cache.lengths):
            _join(engine, cache, active, waiting.popleft(), prompt_cache)
        if active and active != before:
            settings = SamplingRows([row.sampling for row in active])
        full = [number for number in range(len(active)) if cache.lengths[number] == block_size]
        if full and unread:
            yield from _read(engine, *unread)
            unread = None
            continue  # some may be done now
        for number in full:
            cache.trim(number, block_size)
            engine.prefill(cache, number, np.array(active[number].tokens[-max(1, block_size // 2) :]))
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
    """Prefill the end of a row's prompt behind the active ones: all that leaves a place for one token."""
    row.started = time.perf_counter()
    number, block_size = len(active), engine.config.block_size
    tokens = row.tokens[-max(1, block_size - 1) :]
    known = prompt_cache.restore(cache, number, tokens) if prompt_cache else 0
    engine.prefill(cache, number, np.array(tokens[known:]))
    active.append(row)
    if prompt_cache:
        decoded = sum(min(block_size, one.n_prompt + one.max_tokens) for one in active)
        prompt_cache.keep(cache, number, tokens, decoded)


def _step(
    engine: InferenceEngine, cache: KVCache, settings: SamplingRows, active: list[Row], *, log_probs: bool
) -> tuple[Handle, list[Row]]:
    """Enqueue one step of the active rows: its handle, and whose tokens it samples."""
    u = [rng.uniform(row.seed, row.n_prompt + row.n_sampled) for row in active]
    handle = engine.step(cache, settings, np.array(u), log_probs=log_probs)
    for row in active:
        row.n_sampled += 1
    return handle, list(active)


def _read(engine: InferenceEngine, handle: Handle, rows: list[Row]) -> Iterator[tuple[Row, int, float | None]]:
    """What a step sampled for the rows that are not done."""
    sampled = engine.read(handle)
    log_probs = [None] * len(rows) if sampled.log_probs is None else sampled.log_probs.tolist()
    for row, token, log_prob in zip(rows, sampled.tokens.tolist(), log_probs, strict=True):
        if not row.done:
            if log_prob is not None and math.isnan(log_prob):
                raise UserError("The model's logits are not finite: compute in float32, or look at its weights.")
            row.tokens.append(token)
            yield row, token, log_prob
