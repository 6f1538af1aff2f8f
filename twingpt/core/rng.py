"""Keyed random streams: a key alone decides the numbers, whatever was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


def digest(*key: object) -> int:
    """The 128-bit BLAKE2b hash of the parts of `key`, as strings."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def generator(*key: object) -> np.random.Generator:
    """A NumPy generator over the Philox stream (Salmon et al. 2011) of that key."""
    return np.random.Generator(np.random.Philox(key=digest(*key)))


def uniform(seed: int, position: int, choice: int = 0) -> float:
    """The uniform in [0, 1), a multiple of 2^-24, for the token at `position` of a text, or of its further `choice`."""
    key = digest("sample", seed, position, *[choice] * (choice > 0))
    return float(np.random.Philox(key=key).random_raw() >> 40) / (1 << 24)
