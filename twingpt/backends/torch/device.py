"""Devices, dtypes and memory in PyTorch: the twin of `backends/mlx/device.py`."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from twingpt.backends import host
from twingpt.backends.errors import DeviceError, OutOfMemoryError
from twingpt.core.backend import Device, Memory

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# AMD's architectures with matrix instructions in bfloat16: CDNA 1 to 4, RDNA 3 and 4.
MATRIX_ARCHITECTURES = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


# What the message of a RuntimeError contains when memory ran out: on the CPU, on MPS and in CUDA's libraries.
OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE)


def _known(*dtypes: str) -> tuple[str, ...]:
    return tuple(dtype for dtype in dtypes if dtype in DTYPES)


def devices() -> list[Device]:
    """The devices that are present, the best first: CUDA (or ROCm) and XPU GPUs, MPS, the CPU."""
    found = [_cuda(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found += [_xpu(i) for i in range(torch.xpu.device_count())] if torch.xpu.is_available() else []
    if torch.backends.mps.is_available():
        chip, memory_bytes = host.cpu_name(), torch.mps.recommended_max_memory()
        fast = _known(*host.apple_fast_dtypes(chip))
        found.append(Device("mps", "mps", chip, tuple(DTYPES), fast, "float32", memory_bytes))
    cpu, fast = f"{host.cpu_name()}, {torch.get_num_threads()} threads", _known(*host.cpu_fast_dtypes())
    return [*found, Device("cpu", "cpu", cpu, tuple(DTYPES), fast, "float32", host.total_memory())]


def _cuda(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        fast = _known(*host.nvidia_fast_dtypes(properties.major))
    elif properties.gcnArchName.startswith(MATRIX_ARCHITECTURES):
        fast = _known("float32", "float16", "bfloat16")
    else:
        fast = _known("float32", "float16")
    default = fast[-1]  # bfloat16 before float16, which needs a loss scale
    return Device(f"cuda:{index}", "cuda", properties.name, fast, fast, default, properties.total_memory)


def _xpu(index: int) -> Device:
    properties = torch.xpu.get_device_properties(index)
    systolic = properties.has_subgroup_matrix_multiply_accumulate
    fast = _known("float32", "float16", "bfloat16") if systolic else ("float32",)
    default = "bfloat16" if systolic else "float32"
    return Device(f"xpu:{index}", "xpu", properties.name, tuple(DTYPES), fast, default, properties.total_memory)


def on_device(method: F) -> F:
    """Decorator: run a method of an inference engine or its KV cache without autograd, under `device_errors`."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with device_errors(), torch.inference_mode():
            return method(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def details() -> dict[str, Any]:
    """The framework's version and build, as `gpt doctor` shows them."""
    built_for = {"cuda": torch.version.cuda, "hip": torch.version.hip, "xpu": torch.version.xpu}
    return {"version": torch.__version__, **built_for, "threads": torch.get_num_threads()}


def memory(device: Device) -> Memory:
    """Bytes in use on the device, now and at most so far, and freed ones kept for reuse; on a CPU the process's two."""
    if device.kind in ("cuda", "xpu"):
        gpus, name = getattr(torch, device.kind), device.name
        allocated = gpus.memory_allocated(name)
        return Memory(allocated, gpus.max_memory_allocated(name), gpus.memory_reserved(name) - allocated)
    if device.kind == "mps":  # has no peak counter, but the driver's pool shrinks only where the cache is cleared
        allocated, driver = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        return Memory(allocated, driver, max(0, driver - allocated))
    return host.process_memory()


def free_memory(device: Device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.kind == "cuda":
        return torch.cuda.mem_get_info(device.name)[0]
    if device.kind == "xpu":
        return torch.xpu.mem_get_info(device.name)[0]
    free = host.free_memory()  # an Apple GPU has the same memory
    if device.kind == "mps":
        return min(free, max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return free


@contextmanager
def memory_limits(device: Device, *, cache: int, wired: int) -> Iterator[None]:
    """Within the block hold Metal to limits that PyTorch has none of: its allocator sets its own for MPS."""
    yield


def clear_cache(device: Device) -> None:
    """Give freed memory that is kept for reuse back to the system, on MPS, where it is the system's memory too."""
    if device.kind == "mps":
        torch.mps.empty_cache()


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise a DeviceError, with the way out, within the block for what PyTorch raises of a device or its memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one, and NumPy raises the other
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or OUT_OF_MEMORY.search(str(error)):
            raise OutOfMemoryError(
                "PyTorch ran out of memory: a smaller model, a shorter context, fewer texts at a time or quantized "
                "weights need less."
            ) from error
        if isinstance(error, torch.AcceleratorError) or str(error).startswith(("CUDA error", "HIP error")):
            said = str(error).splitlines()[0].rstrip(".")
            raise DeviceError(f"The GPU failed ({said}): start again, in training with --resume.") from error
        raise


def return_freed_memory(device: Device) -> None:
    """On a Linux CPU, make glibc return large freed arrays to the system at once; that costs some time.

    By default the heap keeps them, and its gaps rarely fit torch's aligned tensors: gradient checkpointing would
    save no memory.
    """
    if device.kind == "cpu" and platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        M_MMAP_THRESHOLD = -3  # malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def to_device(array: np.ndarray | Tensor, device: Device) -> Tensor:
    """A tensor on the device, not copied if it is there already; to CUDA from pinned memory, without waiting."""
    tensor = array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.asarray(array, order="C"))
    if device.kind == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device.name, non_blocking=True)
    return tensor.to(device.name)


def to_numpy(array: Tensor) -> np.ndarray:
    """A float32 copy on the host; waits for the device."""
    return np.array(array.detach().float().cpu().numpy())
