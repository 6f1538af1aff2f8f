"""Devices, dtypes and memory in MLX: the twin of `backends/torch/device.py`. Opens a fast BLAS first.

Two public functions have no twin: `on_device`, since MLX places operations and not arrays, and `wire_memory`,
since only Metal wires memory. torch's `return_freed_memory` has none here.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from twingpt.backends import host
from twingpt.core.backend import Device, Memory
from twingpt.core.errors import OutOfMemoryError

F = TypeVar("F", bound=Callable[..., Any])


def _open_blas() -> str:
    """Open a fast BLAS for MLX's Linux CPU build and say which.

    That build links the reference BLAS (5 GFLOP/s on two cores). The symbols of a library opened with
    RTLD_GLOBAL before mlx.core is imported win over it: a system OpenBLAS, else the one inside torch's
    own library, which make matrix products 40 times faster.
    """
    if platform.system() != "Linux":
        return "Accelerate"
    if not any(importlib.metadata.distributions(name="mlx-cpu")):  # a GPU build: torch's library would load its own
        return "MLX's own"  # CUDA libraries before MLX's
    if "mlx.core" in sys.modules:
        return "MLX's own (mlx was imported before twingpt: import twingpt.backends.mlx first)"
    torch = importlib.util.find_spec("torch")
    in_torch = Path(torch.origin).parent / "lib" / "libtorch_cpu.so" if torch and torch.origin else None
    for what, path in (("OpenBLAS", ctypes.util.find_library("openblas")), ("torch", in_torch)):
        try:
            if path:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                return f"{what} ({Path(path).name})"
        except OSError:
            continue
    return "MLX's own, which is slow: install libopenblas0 or torch"


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next array, where MLX runs on a Linux CPU.

    MLX allocates the result of each operation anew there. By default glibc maps and unmaps a large one,
    and the kernel clears its pages each time, which doubles the time of a matrix product. Elsewhere
    MLX caches by itself; another libc than glibc is left as it is.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)


BLAS = _open_blas()
_keep_freed_memory()
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # or float32 products are rounded to 10 bits on some GPUs

import mlx.core as mx  # noqa: E402  (the BLAS has to be open by now)

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


# What the message of a RuntimeError contains when memory ran out: of MLX's allocators, Metal and CUDA.
OUT_OF_MEMORY = re.compile(r"\[malloc\]|\[metal::malloc\]|Insufficient Memory|out of memory", re.IGNORECASE)


def _known(*dtypes: str) -> tuple[str, ...]:
    return tuple(dtype for dtype in dtypes if dtype in DTYPES)


def devices() -> list[Device]:
    """The devices that are present, the best first: Metal or CUDA, the CPU."""
    found = [_metal()] if mx.metal.is_available() else [_cuda()] if mx.cuda.is_available() else []
    cpu = f"{host.cpu_name()}, BLAS: {BLAS}"  # BLAS has float32 alone: bfloat16 and float16 are slow
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
    """Decorator: run an engine's method on the default stream of the engine's device, whatever MLX's default is."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mx.stream(mx.cpu if self.device.kind == "cpu" else mx.gpu):
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def details() -> dict[str, Any]:
    """The framework's version and build, as `gpt doctor` shows them."""
    return {
        "version": importlib.metadata.version("mlx"),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
        "blas": BLAS,
    }


def memory(device: Device) -> Memory:
    """Bytes in use on the device, now and at most so far; on a CPU those of the process."""
    if device.kind == "cpu":
        return host.process_memory()
    return Memory(mx.get_active_memory(), mx.get_peak_memory())


def arrays_peak(device: Device, run: Callable[[], Any]) -> int:
    """Peak bytes of the arrays that `run` makes; on a CPU those of MLX's allocator, not of the process."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before


def free_memory(device: Device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.kind == "cuda":
        return int(mx.device_info(mx.gpu)["free_memory"])
    free = host.free_memory()  # an Apple GPU has the same memory
    if device.kind == "metal" and device.memory_bytes:
        return min(free, max(0, device.memory_bytes - mx.get_active_memory()))
    return free


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise OutOfMemoryError within the block for whatever MLX raises where memory is short.

    Its CPU build on Linux raises nothing there: an allocation that fails ends the process (mlx 0.32).
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # C++'s bad_alloc arrives as the latter
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise OutOfMemoryError("MLX ran out of memory.") from error
        raise


def matmul(device: Device, dtype: str, n: int) -> Callable[[], None]:
    """A function that multiplies two n x n matrices of `dtype` on the device and waits, to be timed."""
    stream = mx.cpu if device.kind == "cpu" else mx.gpu
    a, b = (mx.random.uniform(shape=(n, n), stream=stream).astype(DTYPES[dtype], stream=stream) for _ in range(2))
    mx.eval(a, b)

    def run() -> None:
        mx.eval(mx.matmul(a, b, stream=stream))

    return run


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
