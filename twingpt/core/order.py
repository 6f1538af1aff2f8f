"""Data order: a keyed permutation of the windows of each epoch, and the interleaving of sources, in O(1) memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from twingpt.core import rng

Array = np.ndarray

ROUNDS = 6  # of the Feistel network
CHUNK = 1024  # windows of an epoch that are permuted at once and cached: permuting a batch alone is all overhead


def _mix(x: Array) -> Array:
    """The finalizer of splitmix64 (Steele et al. 2014), on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def permute(index: Array, n: int, *key: object) -> Array:
    """The keyed permutation of range(n) at each `index`, (k,) -> (k,) int64.

    A balanced Feistel network over the next power of four, with cycle walking while the result is outside range(n)
    (Black & Rogaway 2002): less than four walks on average, and no table.
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
    """Windows of an epoch: block_size + 1 tokens each, overlapping by one.

    Leaves one block over where there are enough tokens, so that each epoch can begin at another offset.
    """
    return max(1, (n_tokens - block_size) // block_size)


def window_starts(sequence: Array, n_tokens: int, block_size: int, *key: object) -> Array:
    """First token of each window: numbers `sequence` (k,), counted over all epochs -> (k,) int64 token indices.

    In each epoch the windows tile the tokens from a keyed offset, in a keyed order.
    """
    sequence, n = np.asarray(sequence), window_count(n_tokens, block_size)
    epoch, place = np.divmod(sequence, n)
    chunks = epoch * (n // CHUNK + 1) + place // CHUNK
    starts = np.empty(sequence.shape, np.int64)
    for number in np.unique(chunks).tolist():
        here = chunks == number
        starts[here] = _chunk_starts(*divmod(number, n // CHUNK + 1), n_tokens, block_size, key)[place[here] % CHUNK]
    return starts


@functools.lru_cache(maxsize=64)
def _chunk_starts(epoch: int, number: int, n_tokens: int, block_size: int, key: tuple[object, ...]) -> Array:
    """`window_starts` of an epoch's windows from number * CHUNK on, CHUNK of them; cached for the next batches."""
    n = window_count(n_tokens, block_size)
    slack = min(n_tokens - 1 - n * block_size, block_size - 1)
    offset = int(rng.generator("offset", *key, epoch).integers(0, slack + 1))
    places = np.arange(number * CHUNK, min(n, (number + 1) * CHUNK))
    return permute(places, n, *key, epoch) * block_size + offset


def source_counts(numbers: Array, shares: Sequence[int], *key: object) -> Array:
    """Of the first `numbers` (k,) windows of a mixture, how many come from each source, (sources, k) int64.

    A source has floor((n share + phase) / rest) of the n windows that the sources before it leave, where `rest` sums
    its share and the later ones: Bresenham's line (1965), nested as in hierarchical stride scheduling (Waldspurger &
    Weihl 1995). So any run of windows has each source's share of it to within as many windows as there are other
    sources, and a whole run exactly. The phases are keyed.
    """
    left, rest = np.asarray(numbers, np.int64), sum(shares)
    counts = []
    for share, phase in zip(shares[:-1], _phases(tuple(shares), key), strict=True):
        rounds, part = np.divmod(left, rest)  # divided first: the products fit int64 for shares below 2^31
        counts.append(rounds * share + (part * share + phase) // rest)
        left, rest = left - counts[-1], rest - share
    return np.stack([*counts, left])


@functools.lru_cache(maxsize=64)
def _phases(shares: tuple[int, ...], key: tuple[object, ...]) -> list[int]:
    """The keyed phase of each source but the last, from 0 to below `rest`."""
    return [int(rng.generator("mixture", *key, i).integers(sum(shares[i:]))) for i in range(len(shares) - 1)]


def interleave(numbers: Array, shares: Sequence[int], *key: object) -> tuple[Array, Array]:
    """(source, number within that source) of each of the windows `numbers` of a mixture, (k,) each."""
    numbers = np.asarray(numbers, np.int64)
    before = source_counts(numbers, shares, *key)
    source = np.argmax(source_counts(numbers + 1, shares, *key) - before, axis=0)
    return source, before[source, np.arange(len(numbers))]
