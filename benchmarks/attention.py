"""Attention by blocks of queries, and MLX's loss: time and memory of what there is to choose from.

    python benchmarks/attention.py [--backend mlx] [--device cpu] [--dtypes float32 bfloat16] [--rounds 7]
                                   [--shapes 12x6x256x64] [--json]

`attention` is the forward and backward pass of attention alone, a shape being windows x heads x positions x head
width; `step` is a whole training step of a model of 4 layers of that width. `plain` is the framework's own attention,
a number the queries in a block, whose probabilities the backward pass computes again; `kept` blocks of MLX are those
that autograd differentiates, so that they are kept, as a `step` on MLX's CPU device does. `dlogits` is the loss's
gradient by the logits in MLX, by put_along_axis or by a comparison of each id with the target, for tokens x vocabulary.
What is compared takes turns: `ratio` is that of the first one's median time to this one's, so more than 1 is faster.
`peak` is the bytes of arrays at most beside the inputs, which do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from twingpt.backends import registry
from twingpt.backends.registry import BACKENDS
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.parameters import initialise
from twingpt.core.schedule import hyperparameters

SHAPES = ((12, 6, 256, 64), (16, 4, 128, 48), (4, 8, 1024, 64))
BLOCKS = (64, 128, 256, 512)
LAYERS = 4
LOSSES = ((1024, 65), (1024, 2048), (512, 16384))

Runs = dict[str, Callable[[], Any]]


def attention_runs(backend: str, device: Device, shape: tuple[int, ...], dtype: str) -> Runs:
    """Forward and backward passes of attention, by name."""
    B, H, T, d = shape
    config = GPTConfig(vocab_size=2, block_size=T, n_head=H, n_embd=H * d)
    attention = import_module(f"twingpt.backends.{backend}.attention")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, T, H, d), np.float32) for _ in range(4)]
    contiguous = import_module("mlx.core").contiguous if backend == "mlx" else import_module("torch").Tensor.contiguous
    ways: dict[str, Callable[..., Any]] = {
        "plain": lambda q, k, v: attention.dot_product_attention(q, k, v, "causal", config).swapaxes(1, 2)
    }

    def by_blocks(function: Callable[..., Any], size: int) -> Callable[..., Any]:
        return lambda q, k, v: function(q, contiguous(k), contiguous(v), 0, size, config)  # as the model does

    for size in (size for size in BLOCKS if size <= T):
        ways[f"{size}"] = by_blocks(attention.attention_by_blocks, size)
        if backend == "mlx":
            ways[f"{size} kept"] = by_blocks(attention.forward_by_blocks, size)
    differentiate = mlx_gradients if backend == "mlx" else torch_gradients
    return differentiate(ways, arrays, device, dtype)


def mlx_gradients(ways: dict[str, Callable[..., Any]], arrays: list[np.ndarray], device: Device, dtype: str) -> Runs:
    """What runs each of `ways` of (q, k, v) forward, and backward from the last array, in MLX."""
    import mlx.core as mx

    stream = mx.cpu if device.kind == "cpu" else mx.gpu
    with mx.stream(stream):
        *inputs, dy = (mx.array(array).astype(getattr(mx, dtype)) for array in arrays)
        inputs = [x.swapaxes(1, 2) for x in inputs]
        mx.eval(inputs, dy)

    def run(way: Callable[..., Any]) -> None:
        with mx.stream(stream):
            mx.eval(mx.vjp(way, inputs, [dy]))

    return {name: lambda way=way: run(way) for name, way in ways.items()}


def torch_gradients(ways: dict[str, Callable[..., Any]], arrays: list[np.ndarray], device: Device, dtype: str) -> Runs:
    """The same in PyTorch."""
    import torch

    *inputs, dy = (torch.from_numpy(array).to(device.name, getattr(torch, dtype)) for array in arrays)
    inputs = [x.transpose(1, 2).requires_grad_() for x in inputs]

    def run(way: Callable[..., Any]) -> None:
        torch.autograd.grad(way(*inputs), inputs, dy)
        if device.kind != "cpu":
            torch.accelerator.synchronize(torch.device(device.name))

    return {name: lambda way=way: run(way) for name, way in ways.items()}


def step_runs(backend: str, device: Device, shape: tuple[int, ...], dtype: str) -> Runs:
    """Training steps of a model with each size of block, by name."""
    B, H, T, d = shape
    config = GPTConfig(vocab_size=512, block_size=T, n_layer=LAYERS, n_head=H, n_embd=H * d)
    attention = import_module(f"twingpt.backends.{backend}.attention")
    engine = registry.get(backend).TrainEngine(config, device, dtype=dtype)
    engine.load(initialise(config, 1))
    tokens = np.random.default_rng(0).integers(0, 512, (B, T + 1), np.int32)
    inputs, targets, hyper = tokens[:, :-1].copy(), tokens[:, 1:].copy(), hyperparameters(TrainConfig(), 1)

    def run(size: int) -> None:
        attention.block_size = lambda *_, **__: size
        engine.forward_backward(inputs, targets, np.arange(B))
        engine.read([engine.optimizer_step(hyper)])

    sizes = {"plain": 0} | {f"{size}": size for size in BLOCKS if size <= T}
    return {name: lambda size=size: run(size) for name, size in sizes.items()}


def loss_runs(device: Device, tokens: int, vocab_size: int) -> Runs:
    """The gradient of cross-entropy by float32 logits in MLX, by name."""
    import mlx.core as mx

    stream = mx.cpu if device.kind == "cpu" else mx.gpu
    with mx.stream(stream):
        logits, targets = mx.random.normal((tokens, vocab_size)), mx.random.randint(0, vocab_size, (tokens, 1))
        mx.eval(logits, targets)

    def put_along_axis(p: Any) -> Any:
        return mx.put_along_axis(p, targets, mx.take_along_axis(p, targets, axis=-1) - 1, axis=-1)

    def comparison(p: Any) -> Any:
        return p - (mx.arange(vocab_size) == targets)

    def run(less_one: Callable[..., Any]) -> None:
        with mx.stream(stream):
            mx.eval(less_one(mx.exp(logits - mx.logsumexp(logits, axis=-1, keepdims=True))))

    return {function.__name__: lambda function=function: run(function) for function in (put_along_axis, comparison)}


def compared(runs: Runs, engines: Any, device: Device, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each of `runs`, which take turns: median milliseconds, the ratio to the first, the peak in bytes."""
    peaks = {name: engines.arrays_peak(device, run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        yield {"way": name, "milliseconds": median, "ratio": first / median, "peak": peaks[name]}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of all that is measured."""
    for backend in filter(registry.installed, [args.backend] if args.backend else BACKENDS):
        engines = registry.get(backend)
        device = registry.find_device(engines, args.device)
        for shape in args.shapes:
            for dtype in args.dtypes:
                for what, runs in (("attention", attention_runs), ("step", step_runs)):
                    about = {"backend": backend, "device": device.name, "what": what, "dtype": dtype, "shape": shape}
                    for row in compared(runs(backend, device, shape, dtype), engines, device, args.rounds):
                        yield {**about, **row}
        for tokens, vocab_size in LOSSES if backend == "mlx" else ():
            about = {"backend": backend, "device": device.name, "what": "dlogits", "dtype": "float32"}
            for row in compared(loss_runs(device, tokens, vocab_size), engines, device, args.rounds):
                yield {**about, "shape": (tokens, vocab_size), **row}


def shape_of(text: str) -> tuple[int, ...]:
    """Windows, heads, positions and head width from text like 12x6x256x64."""
    windows, heads, positions, width = map(int, text.split("x"))
    return windows, heads, positions, width


def main() -> None:
    """Measure, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--device")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    args = parser.parse_args()
    for row in rows(args):
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            shape = "x".join(map(str, row["shape"]))
            print(
                f"{row['backend']:6}{row['device']:6}{row['what']:10}{row['dtype']:9} {shape:14}{row['way']:15}"
                f"{row['milliseconds']:9.1f} ms {row['ratio']:6.2f}x {row['peak'] / 2**20:8.1f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
