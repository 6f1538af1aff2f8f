"""What the process needs before mlx.core is imported: a fast BLAS, and a malloc that keeps freed memory.

PyTorch's wheels bring what they need; its twin only has float32 products in float32.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path


def prepare() -> None:
    """Make this process fit for MLX; to be called before mlx.core is imported. Once more does nothing."""
    open_blas()
    keep_freed_memory()
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # or float32 products are rounded to 10 bits on some GPUs


@functools.cache
def open_blas() -> str:
    """Open a fast BLAS for MLX's Linux CPU build; returns which, as `gpt doctor` shows it.

    That build links the reference BLAS (5 GFLOP/s on two cores). The symbols of a library opened with
    RTLD_GLOBAL before mlx.core is imported win over it: a system OpenBLAS, else the one inside torch's
    own library, which make matrix products 40 times faster.
    """
    if platform.system() != "Linux":
        return "Accelerate"
    if not any(importlib.metadata.distributions(name="mlx-cpu")):  # a GPU build: torch's library would load its own
        return "MLX's own"  # CUDA libraries before MLX's
    if "mlx.core" in sys.modules:
        return "MLX's own (mlx was imported before twingpt.backends.mlx.prepare.prepare() was called)"
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


@functools.cache
def keep_freed_memory() -> None:
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
