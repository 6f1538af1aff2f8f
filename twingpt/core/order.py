"""Which window of which source is trained on when: a keyed permutation of each epoch, in O(1) memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from twingpt.core import rng

Array = np.ndarray

ROUNDS = 6
STRETCH = 1024  # windows of an epoch that are permuted at once: a batch alone would be all overhead


def _mix(x: Array) -> Array:
    """The finalizer of splitmix64 (Steele et al. 2014), on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Array, n: int, *key: object) -> Array:
    """Where the permutation of range(n) called `key` sends each index, (k,) int64.

    A balanced Feistel network over the next power of four, walking on while it lands outside
    range(n) (Black & Rogaway 2002): less than four walks on average, and no table.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    seeds = rng.generator("order", *key).integers(0, 2**64, ROUNDS, np.uint64)
    result = np.asarray(index).astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        x = result[outside]
        left, right = x >> half, x & mask
        for seed in seeds:
            left, right = right, left ^ (_mix(right ^ seed) & mask)
        result[outside] = (left << half) | right
        outside = result >= n
    return result.astype(np.int64)


def window_count(n_tokens: int, block_size: int) -> int:
    """How many windows of block_size + 1 tokens an epoch has, overlapping by one token.

    One block is left over where possible, so that each epoch can begin at another offset.
    """
    return max(1, (n_tokens - block_size) // block_size)


def window_starts(sequence: Array, n_tokens: int, block_size: int, *key: object) -> Array:
    """Where in the tokens the windows number `sequence` of the order called `key` begin, (k,) int64.

    Windows tile the tokens from an offset keyed by the epoch, in an order keyed by the epoch.
    """
    sequence, n = np.asarray(sequence), window_count(n_tokens, block_size)
    epoch, place = np.divmod(sequence, n)
    stretch = epoch * (n // STRETCH + 1) + place // STRETCH
    starts = np.empty(sequence.shape, np.int64)
    for number in np.unique(stretch).tolist():
        here = stretch == number
        starts[here] = _stretch(*divmod(number, n // STRETCH + 1), n_tokens, block_size, key)[place[here] % STRETCH]
    return starts


@functools.lru_cache(maxsize=64)
def _stretch(epoch: int, number: int, n_tokens: int, block_size: int, key: tuple[object, ...]) -> Array:
    """Where the windows of stretch `number` of an epoch begin, kept for the batches that follow."""
    n = window_count(n_tokens, block_size)
    slack = min(n_tokens - 1 - n * block_size, block_size - 1)
    offset = int(rng.generator("offset", *key, epoch).integers(0, slack + 1))
    places = np.arange(number * STRETCH, min(n, (number + 1) * STRETCH))
    return permute(places, n, *key, epoch) * block_size + offset


def source_counts(numbers: Array, shares: Sequence[int], *key: object) -> Array:
    """How many of the first `numbers` windows of a mixture come from each source, (sources, k) int64.

    Of the windows that the sources before it leave, n of them, a source has floor((n share + phase) / rest),
    where `rest` sums the shares not yet given out: Bresenham's line (1965), nested as in hierarchical stride
    scheduling (Waldspurger & Weihl 1995). So any stretch of windows has each source's part of it to within as
    many windows as there are other sources, and the whole run has it exactly. The phases are keyed.
    """
    left, rest = np.asarray(numbers, np.int64), sum(shares)
    counts = []
    for share, phase in zip(shares[:-1], _phases(tuple(shares), key), strict=True):
        rounds, part = np.divmod(left, rest)  # apart, so that no product leaves int64 for shares below 2^31
        counts.append(rounds * share + (part * share + phase) // rest)
        left, rest = left - counts[-1], rest - share
    return np.stack([*counts, left])


@functools.lru_cache(maxsize=64)
def _phases(shares: tuple[int, ...], key: tuple[object, ...]) -> list[int]:
    """Where in its line each source but the last begins, below the sum of the shares from its own on."""
    return [int(rng.generator("mixture", *key, i).integers(sum(shares[i:]))) for i in range(len(shares) - 1)]


def interleave(numbers: Array, shares: Sequence[int], *key: object) -> tuple[Array, Array]:
    """From which source the windows `numbers` of a mixture come, and the how-many-th of that source each is, (k,)."""
    numbers = np.asarray(numbers, np.int64)
    before = source_counts(numbers, shares, *key)
    source = np.argmax(source_counts(numbers + 1, shares, *key) - before, axis=0)
    return source, before[source, np.arange(len(numbers))]
