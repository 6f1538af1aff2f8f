"""What MLX's errors mean, and the way out of each: those of Metal, with the messages that MLX's sources have.

It has no twin, and imports no mlx, which a metallib that doesn't fit the system keeps from being imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from twingpt.backends.errors import DeviceError, OutOfMemoryError

REINSTALL = "pip install --upgrade --force-reinstall --no-cache-dir mlx mlx-metal"


@dataclass(frozen=True)
class Trouble:
    """A kind of error: what its message contains, what it means, the way out, and the exception that says so."""

    pattern: re.Pattern[str]
    meaning: str
    way_out: str
    kind: type[DeviceError] = DeviceError


def _trouble(pattern: str, meaning: str, way_out: str, kind: type[DeviceError] = DeviceError) -> Trouble:
    return Trouble(re.compile(pattern, re.IGNORECASE), meaning, way_out, kind)


_SHORTER = "a smaller micro-batch (--batch-size, with more --gradient-accumulation-steps) or fewer texts at a time"

# The first that fits a message counts: a limit on buffers comes from the same allocator as want of memory. What
# Metal says of a command buffer is its own text, in parentheses the name that IOGPUFamily has for it.
TROUBLES = (
    _trouble(
        r"Resource limit \(\d+\) exceeded",
        "Metal's limit on how many buffers a process may hold is reached",
        "start again, in training with --no-compile, as each compiled shape keeps buffers of its own (mlx#4464), "
        "or with a smaller model",
    ),
    _trouble(
        r"Impacting ?Interactivity",
        "The GPU watchdog of macOS stopped work that kept the display waiting",
        f"{_SHORTER} makes each piece shorter, and while the display sleeps nothing is stopped (mlx#3267)",
    ),
    _trouble(
        r"GPU Timeout|GPU Hang|ErrorTimeout|ErrorHang",
        "A piece of work took the GPU longer than macOS allows",
        f"{_SHORTER} makes each piece shorter",
    ),
    _trouble(
        r"\[malloc\]|\[metal::malloc\]|Insufficient Memory|out of ?memory|bad_alloc",
        "MLX ran out of memory",
        "a smaller model, a shorter context, fewer texts at a time or quantized weights need less",
        OutOfMemoryError,
    ),
    _trouble(
        r"Unable to load (kernel|function)|Failed to load the (default )?metallib|libmlx\.dylib",
        "The wheel of mlx-metal doesn't fit this macOS, or this mlx",
        f"gpt doctor shows the three, and {REINSTALL} brings what fits",
    ),
    _trouble(
        r"There is no Stream\((gpu|cpu), \d+\) in current thread",
        "Work that one thread began was to be ended in another, and MLX's streams are a thread's own",
        "load a model and use it in one thread",
    ),
    _trouble(
        r"No Metal device available",
        "There is no GPU for this session of macOS",
        "run it as the user who is logged in at the screen, or with --backend torch --device cpu",
    ),
    _trouble(  # another program's error may have taken this one's work with it
        r"Command buffer execution failed",
        "The GPU gave up on a piece of work, and can't go on in this process",
        "start again, in training with --resume",
    ),
)


def explain(error: BaseException) -> DeviceError | None:
    """The error in one sentence, with the way out; None for one that isn't the device's."""
    message = "std::bad_alloc" if isinstance(error, MemoryError) else str(error)  # which is how that arrives
    for trouble in TROUBLES:
        if trouble.pattern.search(message):
            said = message.strip().splitlines()[0].rstrip(".")
            return trouble.kind(f"{trouble.meaning} ({said}): {trouble.way_out}.")
    return None
