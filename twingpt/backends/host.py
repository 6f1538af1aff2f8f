"""The machine around a backend: its processor, which precisions that is fast at, and its memory."""

from __future__ import annotations

import platform
import re
import resource
import subprocess
from pathlib import Path

import psutil

from twingpt.core.backend import Memory

# The limit of a container and what it uses of it, as cgroups v2 and v1 show them from within.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)

# What /proc/cpuinfo calls matrix or dot-product instructions of a precision, on x86-64 and ARM. Without
# them a product is done in float32 after a conversion, or worse.
CPU_FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""


def cpu_name() -> str:
    """The processor's own name: "AMD EPYC", "Apple M3 Pro"."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    if found:
        return found[1]
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def cpu_fast_dtypes() -> tuple[str, ...]:
    """The precisions that the processor multiplies matrices in at full speed."""
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)).split())
    return ("float32", *(dtype for dtype, names in CPU_FLAGS.items() if names & flags))


def nvidia_fast_dtypes(capability: int) -> tuple[str, ...]:
    """float32, and what an NVIDIA GPU has tensor cores for; `capability` is the major number of its own."""
    fast = {"float16": capability >= 7, "bfloat16": capability >= 8}  # Volta, Ampere
    return ("float32", *(dtype for dtype, has in fast.items() if has))


def apple_fast_dtypes(chip: str) -> tuple[str, ...]:
    """The precisions that the GPU of an Apple chip ("Apple M3 Pro") computes in at full speed.

    Metal does bfloat16 by way of float32 on M1 and M2, and natively from M3 on
    (huggingface/transformers#40458, philipturner/metal-flash-attention#17).
    """
    generation = re.match(r"Apple M(\d+)", chip)
    native = generation is not None and int(generation[1]) >= 3
    return ("float32", "float16", "bfloat16") if native else ("float32", "float16")


def _container_memory() -> tuple[int, int] | None:
    """Bytes that this container may use, and that it uses; None outside one, and where nothing limits it."""
    for limit, used in CGROUPS:
        try:
            return int(Path(limit).read_text()), max(0, int(Path(used).read_text()) - _idle_cache(Path(used)))
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
    return None


def _idle_cache(used: Path) -> int:
    """Bytes of files that a container keeps in memory, and gives up when a process wants them; 0 if unknown."""
    try:
        stat = used.with_name("memory.stat").read_text()
    except OSError:
        return 0
    return max(map(int, re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)), default=0)


def total_memory() -> int:
    """Bytes of memory that this machine has, or that its container may use."""
    total, container = psutil.virtual_memory().total, _container_memory()
    return min(total, container[0]) if container else total


def free_memory() -> int:
    """Bytes that could be had without swapping."""
    free, container = psutil.virtual_memory().available, _container_memory()
    return min(free, max(0, container[0] - container[1])) if container else free


def process_memory() -> Memory:
    """Bytes resident in this process, now and at most so far."""
    now = psutil.Process().memory_info().rss
    if platform.system() == "Darwin":
        return Memory(now, max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    # On Linux that begins at the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return Memory(now, max(now, int(peak[1]) * 1024 if peak else 0))
