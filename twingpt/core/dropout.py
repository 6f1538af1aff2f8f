"""Dropout masks from a keyed integer hash of (seed, window, site, position, channel).

A mask depends on the window that it falls on and not on the batch around it, so any split of a step into micro-batches
or ranks drops the same entries, on both backends, and the backward pass can make a mask again instead of keeping it.
"""

from __future__ import annotations

import numpy as np

from twingpt.core import rng
from twingpt.core.config import GPTConfig

Array = np.ndarray

GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: neighbouring indices become far apart (Knuth)
# The finalizer of MurmurHash3 (Appleby): every bit of the input flips each bit of the output half the time.
MIX = (0x85EBCA6B, 0xC2B2AE35)


def mix(h: Array) -> Array:
    """MurmurHash3's 32-bit finalizer, elementwise over uint32; products wrap."""
    h = (h ^ (h >> 16)) * np.uint32(MIX[0])
    h = (h ^ (h >> 13)) * np.uint32(MIX[1])
    return np.asarray(h ^ (h >> 16))


def dropout_sites(config: GPTConfig) -> int:
    """How many places drop entries: 0 is the embedding, 1 + 2 l the attention of layer l, 2 + 2 l its MLP."""
    return 1 + 2 * config.n_layer


def dropout_keys(seed: int, windows: Array, sites: int) -> Array:
    """(B,) numbers of training windows -> (B, sites) uint32, the key of each window's mask at each site."""
    start = np.uint32(rng.digest("dropout", seed) % 2**32)
    numbers = np.asarray(windows, np.uint64)
    low, high = (numbers & np.uint64(0xFFFFFFFF)).astype(np.uint32), (numbers >> np.uint64(32)).astype(np.uint32)
    by_window = mix(mix(start ^ low) ^ high)
    return mix(by_window[:, None] ^ mix(np.arange(1, sites + 1, dtype=np.uint32) * np.uint32(GOLDEN)))


def threshold(rate: float) -> int:
    """A hash below this is dropped: `rate` of the 2^32 there are."""
    return round(rate * 2**32)


def dropped(keys: Array, T: int, D: int, rate: float) -> Array:
    """(B,) keys of one site -> (B, T, D) booleans, true where an entry is dropped."""
    index = np.arange(T * D, dtype=np.uint32).reshape(T, D) * np.uint32(GOLDEN)
    return mix(index ^ keys[:, None, None]) < threshold(rate)
