"""Records what a piece of code asks of MLX: calls with dtypes and shapes, and the primitives of the graph.

A call of `mx.fast` can be seen only where it is made: MLX's CPU build decomposes it as it builds the graph. Therefore
functions of `mx`, `mx.fast` and `mx.array` are wrapped, not ours, which may move. Nothing is computed meanwhile:
`mx.eval` and `mx.async_eval` only keep the arrays that they get, whose graph has the rest, the backward pass among it.
That costs no memory, so a model may have its true widths, vocabulary and lengths.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from tests.metal.rules import Array, Call

FAST = ("scaled_dot_product_attention", "rope", "rms_norm", "layer_norm")
FUNCTIONS = (
    *("matmul", "addmm", "quantized_matmul", "quantize", "dequantize"),
    *("softmax", "logsumexp", "argmax", "argsort", "cumsum"),
)
RECORDED = [(mx.fast, name) for name in FAST] + [(mx, name) for name in FUNCTIONS] + [(mx.array, "__matmul__")]
GRADIENTS = ("grad", "value_and_grad")  # of a function, of which they make another


@dataclass(repr=False)  # or a test that fails would show the arrays, and so compute them
class Recording:
    """The calls, each once, in their order, and the arrays that were to be computed."""

    calls: dict[Call, None] = field(default_factory=dict)
    outputs: list[mx.array] = field(default_factory=list)
    tracing: int = 0

    def primitives(self) -> set[str]:
        """The names of the primitives that MLX's CPU build would compute the outputs by."""
        graph = io.StringIO()
        mx.export_to_dot(graph, self.outputs)
        return set(re.findall(r'label ="(\w+)"', graph.getvalue()))

    def keep(self, *trees: Any) -> None:
        """Stands in for mx.eval and mx.async_eval."""
        for tree in trees:
            if isinstance(tree, mx.array):
                self.outputs.append(tree)
            elif isinstance(tree, (dict, list, tuple)):
                self.keep(*(tree.values() if isinstance(tree, dict) else tree))

    def recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that records each call of another."""

        def call(*arguments: Any, **options: Any) -> Any:
            by_name = tuple((key, _described(value)) for key, value in sorted(options.items()))
            self.calls[Call(name, tuple(map(_described, arguments)), by_name, self.tracing > 0)] = None
            return function(*arguments, **options)

        return call

    def traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls count as traced for a gradient, as in mlx/transforms.cpp, backward pass and all."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.tracing += 1
            try:
                return function(*arguments, **options)
            finally:
                self.tracing -= 1

        return call

    def differentiated(self, transform: Callable[..., Any]) -> Callable[..., Any]:
        """mx.grad or mx.value_and_grad, whose functions are `traced`."""
        return lambda *arguments, **options: self.traced(transform(*arguments, **options))


def _described(x: Any) -> Any:
    return Array(dtype_name(x.dtype), tuple(x.shape)) if isinstance(x, mx.array) else x


def dtype_name(dtype: mx.Dtype) -> str:
    """A dtype as MLX's `type_to_name` has it."""
    name = str(dtype).removeprefix("mlx.core.")
    return "bool_" if name == "bool" else name


@contextmanager
def record() -> Iterator[Recording]:
    """Record what the block asks of MLX on a Mac's GPU, whose stream is the CPU's here; nothing of it is computed."""
    recording = Recording()
    stand_ins: list[tuple[Any, str, Any]] = [(mx, name, recording.keep) for name in ("eval", "async_eval")]
    stand_ins += [(mx, "gpu", mx.cpu), (mx, "default_device", lambda: "gpu"), (mx.metal, "is_available", lambda: True)]
    stand_ins += [(owner, name, recording.recorded(name.strip("_"), getattr(owner, name))) for owner, name in RECORDED]
    stand_ins += [(mx, name, recording.differentiated(getattr(mx, name))) for name in GRADIENTS]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in stand_ins]
    try:
        for owner, name, function in stand_ins:
            setattr(owner, name, function)
        yield recording
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
