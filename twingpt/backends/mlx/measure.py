"""What `training/flops.py` and `checks/` run to measure or compare: the twin of `backends/torch/measure.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from twingpt.backends.mlx import model
from twingpt.backends.mlx.device import DTYPES, to_numpy
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig

Array = mx.array


def arrays_peak(device: Device, run: Callable[[], Any]) -> int:
    """Peak bytes of the arrays that `run` makes; on a CPU those of MLX's allocator, not of the process."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before


def matmul(device: Device, dtype: str, n: int) -> Callable[[], None]:
    """A function that multiplies two n x n matrices of `dtype` on the device and waits, to be timed."""
    stream = mx.cpu if device.kind == "cpu" else mx.gpu
    a, b = (mx.random.uniform(shape=(n, n), stream=stream).astype(DTYPES[dtype], stream=stream) for _ in range(2))
    mx.eval(a, b)

    def run() -> None:
        mx.eval(mx.matmul(a, b, stream=stream))

    return run


def loss_memory(config: GPTConfig, device: Device, dtype: str, tokens: int, *, chunked: bool) -> tuple[int, float]:
    """(peak bytes beside the inputs, seconds) of the loss of `tokens` positions and its gradients."""
    V, D = config.vocab_size, config.n_embd

    def loss(x: Array, head: Array) -> Array:
        p = {"model.embed_tokens.weight": head}
        if chunked:
            return model.chunked_cross_entropy(x, p, targets, config) / tokens
        return model.cross_entropy(model.logits(x, p, config), targets) / tokens

    with mx.stream(mx.cpu if device.kind == "cpu" else mx.gpu):
        x, head = (mx.random.normal(shape).astype(DTYPES[dtype]) for shape in ((1, tokens, D), (V, D)))
        targets = mx.random.randint(0, V, (1, tokens))
        mx.eval(x, head, targets)
        before, start = mx.get_active_memory(), time.perf_counter()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss, argnums=(0, 1))(x, head))
    return mx.get_peak_memory() - before, time.perf_counter() - start


def module_logits(module: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """(B, T) ids -> (B, T, V) float32 logits of an mlx-lm model, run in float32 on the CPU."""
    with mx.stream(mx.cpu):
        module.set_dtype(mx.float32)
        return to_numpy(module(mx.array(tokens)))
