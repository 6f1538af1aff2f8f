"""Storage dtypes of models that are written: float32 parameters rounded to what a file is to hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from twingpt.core.errors import UserError

Array = np.ndarray

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # --dtype -> the name that safetensors has for it


def rounded(tensors: Iterable[tuple[str, Array]], dtype: str) -> Iterator[tuple[str, Array]]:
    """Yield float32 tensors in a dtype of DTYPES; see `round_to`."""
    for name, array in tensors:
        yield name, round_to(dtype, array, name)


def round_to(dtype: str, array: Array, name: str) -> Array:
    """A finite float32 array in `dtype`, rounded to nearest even; bfloat16 as uint16, as NumPy has none.

    Raises UserError, naming the tensor, where a number would become infinite.
    """
    if dtype == "float32":
        return array
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        beyond = bool(np.isinf(half).any())
    else:
        bits = array.view(np.uint32)
        # Half a unit in the last place that stays, less one where that is even: what is exactly between goes there.
        half = ((bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16).astype(np.uint16)
        beyond = bool(((half & 0x7F80) == 0x7F80).any())
    if beyond:
        largest = np.abs(array).max()
        raise UserError(f"The tensor {name} has numbers up to {largest:.3g}, more than {dtype} holds: choose another.")
    return half
