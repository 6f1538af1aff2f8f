"""Keyed random streams: the same key gives the same numbers, whatever was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


def digest(*key: object) -> int:
    """128 bits that depend on every part of `key` and on nothing else."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def generator(*key: object) -> np.random.Generator:
    """A NumPy generator over the Philox stream (Salmon et al. 2011) of `key`."""
    return np.random.Generator(np.random.Philox(key=digest(*key)))


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) that picks the token at `position` of a text sampled with `seed`."""
    return float(np.random.Philox(key=digest("sample", seed, position)).random_raw() >> 40) / (1 << 24)
