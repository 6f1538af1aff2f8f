"""The wheels of MLX on a Mac: their versions, the macOS that they were made for, and whether all of it fits together.

It has no twin, and imports no mlx: where the wheels don't fit, that fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import struct
from pathlib import Path
from typing import Any

from twingpt.backends import host
from twingpt.backends.mlx.errors import REINSTALL

Version = tuple[int, ...]

# The macOS that MLX must be built for to have kernels for the neural accelerators of M5's GPU (mlx 0.32,
# mlx/backend/metal/kernels/CMakeLists.txt:161); 1,510 of the macOS 26 wheel's kernels are such, none of macOS 15's.
ACCELERATED: Version = (26, 2)
M5 = 5  # the generation that has them, and the first that rounds float32 products to TF32


def examine(macos: str, chip: str) -> dict[str, Any]:
    """Versions of mlx and mlx-metal, the wheel's platform tag, the macOS of its kernels; None for what isn't known.

    `notes` are sentences on what of it doesn't fit this macOS or chip, with the way out, and on an M5's float32.
    """
    mlx, metal = _distribution("mlx"), _distribution("mlx-metal")
    built_for = _built_for(metal)
    versions = {"mlx": mlx.version if mlx else None, "mlx_metal": metal.version if metal else None}
    notes = _misfits(versions, built_for, macos)
    if host.apple_generation(chip) >= M5:
        notes += _m5_notes(built_for)
    return {**versions, "wheel": _platform_tag(metal), "built_for": built_for and _text(built_for), "notes": notes}


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _platform_tag(wheel: importlib.metadata.Distribution | None) -> str | None:
    """The last part of the tag in a wheel's WHEEL file: "macosx_15_0_arm64"."""
    found = wheel and re.search(r"^Tag: \S+-(\S+)$", wheel.read_text("WHEEL") or "", re.MULTILINE)
    return found[1] if found else None


def _built_for(wheel: importlib.metadata.Distribution | None) -> Version | None:
    """The macOS that a wheel's compiled kernels ask for, by the header of its metallib.

    After "MTLB" come uint16 numbers, of which the fifth and sixth are the system's version; the wheel that is tagged
    macosx_26_0 has 26.2 there.
    """
    if wheel is None:
        return None
    try:
        with Path(str(wheel.locate_file("mlx/lib/mlx.metallib"))).open("rb") as file:
            magic, major, minor = struct.unpack("<4s8xHH", file.read(16))
    except (OSError, struct.error):
        return None
    return (major, minor) if magic == b"MTLB" else None


def _misfits(versions: dict[str, str | None], built_for: Version | None, macos: str) -> list[str]:
    notes = []
    if versions["mlx"] != versions["mlx_metal"]:
        pair = " and ".join(f"{name.replace('_', '-')} {version or 'missing'}" for name, version in versions.items())
        notes.append(f"{pair} don't fit each other: {REINSTALL}.")
    system = tuple(map(int, re.findall(r"\d+", macos)[:2]))
    if built_for and system < built_for:
        # Of one major version pip takes the same wheel again.
        other = f", or {REINSTALL}" if system[:1] < built_for[:1] else ""
        notes.append(f"mlx-metal's kernels are for macOS {_text(built_for)}, and this is {macos}: update it{other}.")
    return notes


def _m5_notes(built_for: Version | None) -> list[str]:
    notes = []
    if built_for and built_for < ACCELERATED:
        notes.append(
            "Only the macOS 26 wheel of mlx-metal has the kernels for this chip's neural accelerators: on macOS "
            f"{_text(ACCELERATED)} or later, {REINSTALL} brings it."
        )
    if os.environ.get("MLX_ENABLE_TF32", "0") == "0":  # which `prepare` sets where nobody else has
        notes.append("Products in float32 are exact; MLX_ENABLE_TF32=1 rounds them to 10 bits, and is faster.")
    else:
        notes.append("Products in float32 are rounded to 10 bits; MLX_ENABLE_TF32=0 makes them exact.")
    return notes


def _text(version: Version) -> str:
    return ".".join(map(str, version))
