"""Devices, dtypes and memory in MLX: the twin of `backends/torch/device.py`.

torch's `return_freed_memory` has no twin here.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    # As for CUDA: in bfloat16 where the chip has instructions for it, else in float16 with a loss scale.
    return Device("gpu", "metal", chip, tuple(DTYPES), fast, fast[-1], memory_bytes)


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
    """The framework's version and build, and on Metal its working set and limits, as `gpt doctor` shows them."""
    metal = mx.metal.is_available()
    return {
        "version": importlib.metadata.version("mlx"),
        "metal": metal,
        "cuda": mx.cuda.is_available(),
        "blas": open_blas(),
        **(_limits() if metal else {}),
    }


def _limits() -> dict[str, Any]:
    """Metal's recommended working set, and MLX's limits in bytes: two can be read only by setting them."""
    wired, cache = mx.set_wired_limit(0), mx.set_cache_limit(0)
    mx.set_wired_limit(wired)
    mx.set_cache_limit(cache)
    return {
        "working_set_bytes": int(mx.device_info(mx.gpu)["max_recommended_working_set_size"]),
        "limits": {"wired": wired, "cache": cache, "memory": mx.get_memory_limit()},
    }


def memory(device: Device) -> Memory:
    """Bytes in use on the device, now and at most so far, and freed ones kept for reuse; on a CPU the process's two.

    MLX counts its cache in neither of the first two: a run that seemed to take 7 GB had 51 (mlx-lm#986).
    """
    if device.kind == "cpu":
        return host.process_memory()
    return Memory(mx.get_active_memory(), mx.get_peak_memory(), mx.get_cache_memory())


def free_memory(device: Device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.kind == "cuda":
        return int(mx.device_info(mx.gpu)["free_memory"])
    free = host.free_memory()  # an Apple GPU has the same memory
    if device.kind == "metal" and device.memory_bytes:
        return min(free, max(0, device.memory_bytes - mx.get_active_memory()))
    return free


@contextmanager
def memory_limits(device: Device, *, cache: int, wired: int) -> Iterator[None]:
    """Within the block hold Metal to so many bytes of freed memory kept for reuse, and of memory kept wired.

    MLX's own limit of its cache is nearly all memory, and macOS swaps for it (mlx#3129: a terabyte a day). Nothing is
    wired but for `wired` bytes: with a wired limit macOS panicked in 3 of 3 runs, and in none of 10 without (mlx#3186).
    However the block ends, both limits are what they were, and the cache is empty. Unmeasured on a Mac.
    """
    if device.kind != "metal":
        yield
        return
    cache_before, wired_before = mx.set_cache_limit(cache), mx.set_wired_limit(wired)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # of a stream that an error has ended: nothing is under way there
            mx.synchronize()  # the wired limit may not change under work that is
        mx.set_wired_limit(wired_before)
        mx.set_cache_limit(cache_before)
        mx.clear_cache()


def clear_cache(device: Device) -> None:
    """Give freed memory that is kept for reuse back to the system, on Metal, where it is the system's memory too."""
    if device.kind == "metal":
        mx.clear_cache()


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


def to_device(array: np.ndarray | mx.array) -> mx.array:
    """An MLX array; one that is one already is not copied."""
    return array if isinstance(array, mx.array) else mx.array(array)


def to_numpy(array: mx.array) -> np.ndarray:
    """A float32 copy on the host; waits for the device."""
    return np.array(array.astype(mx.float32))
