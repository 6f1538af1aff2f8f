"""The host: its processor and who else uses it, the dtypes that chips are fast at, memory, and keeping it awake."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from twingpt.core.backend import Device, Memory

NATIVE_BFLOAT16 = 3  # the generation of Apple's M series from which on its GPU has instructions for bfloat16

# (limit, usage) of a container's memory, in cgroups v2 and v1 as seen from within.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)

# The flags in /proc/cpuinfo of matrix or dot-product instructions in a dtype, on x86-64 and ARM. Without them a
# matmul converts to float32 first, or worse.
CPU_FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def _read(path: str) -> str:
    """What Linux says in a file of /proc; nothing elsewhere."""
    try:
        return Path(path).read_text("utf-8")
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's own name: "AMD EPYC", "Apple M3 Pro"."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
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
    """The dtypes that the processor multiplies matrices in at full speed."""
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)).split())
    return ("float32", *(dtype for dtype, names in CPU_FLAGS.items() if names & flags))


def nvidia_fast_dtypes(capability: int) -> tuple[str, ...]:
    """float32, and the dtypes that an NVIDIA GPU of this major compute capability has tensor cores for."""
    fast = {"float16": capability >= 7, "bfloat16": capability >= 8}  # Volta, Ampere
    return ("float32", *(dtype for dtype, supported in fast.items() if supported))


def apple_fast_dtypes(chip: str) -> tuple[str, ...]:
    """The dtypes that the GPU of an Apple chip ("Apple M3 Pro") computes in at full speed, those of training last.

    Metal does bfloat16 by way of float32 on M1 and M2, and natively from M3 on
    (huggingface/transformers#40458, philipturner/metal-flash-attention#17). Of another chip, such as the
    "Apple Paravirtual device" of a virtual machine, nothing is known.
    """
    generation = apple_generation(chip)
    if generation == 0:
        return ("float32",)
    return ("float32", "float16", "bfloat16") if generation >= NATIVE_BFLOAT16 else ("float32", "float16")


def apple_generation(chip: str) -> int:
    """3 for an "Apple M3 Pro"; 0 for a chip that isn't one of Apple's M series."""
    found = re.match(r"Apple M(\d+)", chip)
    return int(found[1]) if found else 0


def dtype_reason(device: Device) -> str:
    """Why Metal trains in its default dtype, as part of a sentence; nothing for other kinds of devices."""
    if device.kind != "metal":
        return ""
    return {
        "bfloat16": f"from M{NATIVE_BFLOAT16} on the chip has instructions for bfloat16",
        "float16": "M1 and M2 have none for bfloat16; it has a loss scale",
        "float32": f"nothing is known of how fast {device.description} is in half precision",
    }[device.default_dtype]


def _container_memory() -> tuple[int, int] | None:
    """(limit, usage) in bytes of this container, less `_idle_cache`; None outside one or without a limit."""
    for limit, used in CGROUPS:
        try:
            usage = int(Path(used).read_text("utf-8")) - _idle_cache(Path(used))
            return int(Path(limit).read_text("utf-8")), max(0, usage)
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
    return None


def _idle_cache(used: Path) -> int:
    """Bytes of inactive page cache, which the kernel reclaims when a process wants them; 0 if unknown."""
    try:
        stat = used.with_name("memory.stat").read_text("utf-8")
    except OSError:
        return 0
    return max(map(int, re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)), default=0)


def total_memory() -> int:
    """Bytes of memory of this machine, or the limit of its container."""
    total, container = int(psutil.virtual_memory().total), _container_memory()
    return min(total, container[0]) if container else total


def free_memory() -> int:
    """Bytes that can be allocated without swapping, within the container's limit."""
    free, container = int(psutil.virtual_memory().available), _container_memory()
    return min(free, max(0, container[0] - container[1])) if container else free


def process_memory() -> Memory:
    """Resident bytes (RSS) of this process, now and at most so far."""
    used = psutil.Process().memory_info()
    return Memory(used.rss, max(used.rss, _peak_memory(used)))


def _peak_memory(used: Any) -> int:
    """The peak by what psutil says of this process, or by what the system does; 0 if unknown."""
    if hasattr(used, "peak_wset"):  # Windows
        return int(used.peak_wset)
    if status := _read("/proc/self/status"):  # Linux, whose ru_maxrss begins at the peak of the parent process
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0


@contextmanager
def awake() -> Iterator[bool]:
    """Keep a Mac from idle sleep within the block, by caffeinate(8); whether that is so, as it never is elsewhere."""
    command = shutil.which("caffeinate") if platform.system() == "Darwin" else None
    if command is None:
        yield False
        return
    # It ends with this process even where that is killed (-w), and Ctrl-C, which saves first, is not for it.
    arguments = [command, "-i", "-w", str(os.getpid())]
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    try:
        yield True
    finally:
        process.terminate()
        process.wait()


def cores() -> int:
    """The cores that this process may run on."""
    return len(_own_cores())


def _own_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class OtherLoad:
    """CPU load of other processes, in cores, among those that this process may run on."""

    INTERVAL = 1.0  # seconds that a reading is the mean of, at least: the system counts in hundredths

    def __init__(self) -> None:
        self.last = self._now()

    def read(self) -> float | None:
        """Mean cores in use by others since the last reading; None until it is an INTERVAL old."""
        if time.monotonic() < self.last[0] + self.INTERVAL:
            return None
        last, self.last = self.last, self._now()
        wall, busy, own = (now - before for now, before in zip(self.last, last, strict=True))
        return max(0.0, busy - own) / wall

    def _now(self) -> tuple[float, float, float]:
        """Seconds of the clock, of all cores while they worked, and of this process's threads."""
        every, busy = psutil.cpu_times(percpu=True), 0.0
        for core in _own_cores():
            if core >= len(every):  # some containers number the cores anew
                continue
            times = every[core]._asdict()
            guests = times.get("guest", 0) + times.get("guest_nice", 0)  # counted as user and nice too
            busy += sum(times.values()) - guests - times["idle"] - times.get("iowait", 0)
        return time.monotonic(), busy, time.process_time()


def limit_spinning() -> None:
    """Let OpenMP's threads sleep after a short wait at a barrier; to be called before its library is loaded.

    GNU's spin for milliseconds by default. Where another process keeps a core busy, they then take the time of the
    thread that they wait for: training fell to a thirtieth (docs/experiments.md). What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "100000"


def end_with_parent() -> None:
    """Let this child of multiprocessing leave Ctrl-C to its parent, and end when that has, killed or not."""
    from multiprocessing import parent_process

    def wait() -> None:
        if parent := parent_process():
            parent.join()  # a parent that is killed tells nobody
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()
