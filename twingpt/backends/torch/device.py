"""Devices, dtypes and memory in PyTorch: the twin of `backends/mlx/device.py`."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twingpt.core.backend import Device, Memory, process_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def devices() -> list[Device]:
    """The devices that are present, the best first: CUDA (or ROCm) GPUs, MPS, the CPU."""
    found = [_cuda(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        memory_bytes = torch.mps.recommended_max_memory()
        found.append(Device("mps", "mps", "Apple GPU", ("float32", "bfloat16"), "float32", memory_bytes))
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [*found, Device("cpu", "cpu", cpu, tuple(DTYPES), "float32", physical)]


def _cuda(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    fast_bf16 = properties.major >= 8 or torch.version.hip is not None
    default = "bfloat16" if fast_bf16 else "float32"
    dtypes = ("float32", "bfloat16") if fast_bf16 else ("float32",)
    return Device(f"cuda:{index}", "cuda", properties.name, dtypes, default, properties.total_memory)


def details() -> dict[str, Any]:
    """What `gpt doctor` should say about this backend."""
    return {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def memory(device: Device) -> Memory:
    """Bytes in use on the device; on a CPU those of the process."""
    if device.kind == "cuda":
        return Memory(torch.cuda.memory_allocated(device.name), torch.cuda.max_memory_allocated(device.name))
    if device.kind == "mps":  # keeps no peak of its own; the driver's pool only grows
        return Memory(torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory())
    return process_memory()


def to_device(array: np.ndarray | Tensor, device: Device) -> Tensor:
    """An array on the device; what is there already is not copied. From a GPU's host, without waiting."""
    tensor = array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.asarray(array, order="C"))
    if device.kind == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device.name, non_blocking=True)
    return tensor.to(device.name)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A float32 copy on the host; waits."""
    return np.array(tensor.detach().float().cpu().numpy())
