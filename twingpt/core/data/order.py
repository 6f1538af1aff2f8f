"""Which window of the data is trained on when: a keyed permutation of each epoch, in O(1) memory."""

from __future__ import annotations

import numpy as np

from twingpt.core import rng

Array = np.ndarray

ROUNDS = 6


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


def window_starts(sequence: Array, n_tokens: int, block_size: int, seed: int) -> Array:
    """Where in the tokens the windows number `sequence` of the run begin, (k,) int64.

    Windows tile the tokens from an offset keyed by the epoch, in an order keyed by the epoch.
    """
    sequence = np.asarray(sequence)
    n = window_count(n_tokens, block_size)
    slack = min(n_tokens - 1 - n * block_size, block_size - 1)
    starts = np.empty(sequence.shape, np.int64)
    for epoch in np.unique(sequence // n):
        here = sequence // n == epoch
        offset = int(rng.generator("offset", seed, epoch).integers(0, slack + 1))
        starts[here] = permute(sequence[here] % n, n, seed, epoch) * block_size + offset
    return starts
