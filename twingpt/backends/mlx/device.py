"""Devices, dtypes and memory in MLX: the twin of `backends/torch/device.py`.

Two public functions have no twin: `on_device`, since MLX places operations and not arrays, and `wire_memory`,
since only Metal wires memory. torch's `return_freed_memory` has none here.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from twingpt.backends import host
from twingpt.backends.mlx.errors import explain
from twingpt.backends.mlx.prepare import open_blas
from twingpt.core.backend import Device, Memory

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def _known(*dtypes: str) -> tuple[str, ...]:
    return tuple(dtype for dtype in dtypes if dtype in DTYPES)


def devices() -> list[Device]:
    """The devices that are present, the best first: Metal or CUDA, the CPU.

    Raises DeviceError where Metal is there and can't be had, as with a metallib that doesn't fit the system.
    """
    with device_errors():
        found = [_metal()] if mx.metal.is_available() else [_cuda()] if mx.cuda.is_available() else []
    cpu = f"{host.cpu_name()}, BLAS: {open_blas()}"  # which has float32 alone: bfloat16 and float16 are slow
    return [*found, Device("cpu", "cpu", cpu, tuple(DTYPES), ("float32",), "float32", host.total_memory())]


def _metal() -> Device:
    info = mx.device_info(mx.gpu)
    chip, memory_bytes = str(info["device_name"]), int(info["max_recommended_working_set_size"])
    fast = _known(*host.apple_fast_dtypes(chip))
    return Device("gpu", "metal", chip, tuple(DTYPES), fast, "bfloat16", memory_bytes)


def _cuda() -> Device:
    info = mx.device_info(mx.gpu)
    fast = _known(*host.nvidia_fast_dtypes(int(info["compute_capability_major"])))
    default = fast[-1]  # bfloat16 before float16, which needs a loss scale
    return Device("gpu", "cuda", str(info["device_name"]), tuple(DTYPES), fast, default, int(info["total_memory"]))


def on_device(method: F) -> F:
    """Decorator: run an engine's method on the default stream of its device, under `device_errors`.

    That is the thread's own stream, whatever MLX's default device is.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with device_errors(), mx.stream(mx.cpu if self.device.kind == "cpu" else mx.gpu):
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def details() -> dict[str, Any]:
    """The framework's version and build, as `gpt doctor` shows them."""
    return {
        "version": importlib.metadata.version("mlx"),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "blas": open_blas(),
    }


def memory(device: Device) -> Memory:
    """Bytes in use on the device, now and at most so far; on a CPU those of the process."""
    if device.kind == "cpu":
        return host.process_memory()
    return Memory(mx.get_active_memory(), mx.get_peak_memory())


def free_memory(device: Device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.kind == "cuda":
        return int(mx.device_info(mx.gpu)["free_memory"])
    free = host.free_memory()  # an Apple GPU has the same memory
    if device.kind == "metal" and device.memory_bytes:
        return min(free, max(0, device.memory_bytes - mx.get_active_memory()))
    return free


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise a DeviceError, with the way out, within the block for what MLX raises of a device (see `errors.TROUBLES`).

    Its CPU build on Linux raises nothing for want of memory: an allocation that fails ends the process (mlx 0.32).
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # C++'s bad_alloc arrives as the latter
        if told := explain(error):
            raise told from error
        raise


def wire_memory(device: Device) -> None:
    """On Metal, set the wired limit to the recommended working set: macOS pages large models out between steps else."""
    if device.kind == "metal" and device.memory_bytes:
        mx.set_wired_limit(device.memory_bytes)


def to_device(array: np.ndarray | mx.array) -> mx.array:
    """An MLX array; one that is one already is not copied."""
    return array if isinstance(array, mx.array) else mx.array(array)


def to_numpy(array: mx.array) -> np.ndarray:
    """A float32 copy on the host; waits for the device."""
    return np.array(array.astype(mx.float32))
