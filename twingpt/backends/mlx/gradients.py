"""Gradients of biases and norm weights, summed in float32 beside half-precision activations.

MLX sums an array of bfloat16 in bfloat16, on GPUs and before 0.32.4 on CPUs: over 16,384 tokens a bias's gradient was
80 % off. PyTorch sums in float32, and needs no twin of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx

Array = mx.array


def constant(vector: Array, x: Array) -> Array:
    """`vector`; where x has another dtype it is a constant, whose gradient `add_gradient` gives."""
    return vector if vector.dtype == x.dtype else mx.stop_gradient(vector)


def add_gradient(y: Array, vector: Array, factor: Callable[[], Array] | None = None) -> Array:
    """y (…, n) itself, made by `constant(vector, y)`; gives `vector` (n,) the gradient of factor() * vector, by rows.

    A factor of None is 1.
    """
    if vector.dtype == y.dtype:
        return y

    @mx.custom_function
    def same(y: Array, vector: Array) -> Array:
        return y

    @same.vjp
    def _vjp(primals: tuple[Array, Array], dy: Array, _: Array) -> tuple[Array, Array]:
        gradient = column_sums(dy if factor is None else dy * factor()).astype(primals[1].dtype)
        return mx.depends([dy], [gradient])[0], gradient  # first this sum, or dy would be held for it

    return cast(Array, same(y, vector))


def column_sums(x: Array) -> Array:
    """(…, n) -> (n,): the sum of all rows, as a product with ones, which every device accumulates in float32."""
    rows = x.reshape(-1, x.shape[-1])
    return (mx.ones((1, len(rows)), x.dtype) @ rows)[0]
