"""Diagnosis of a machine: hardware, libraries, what will be chosen and why, and a self-test."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from typing import Any

from twingpt.backends import host, registry
from twingpt.backends.mlx import wheel
from twingpt.checks import parity
from twingpt.checks.tolerances import TOLERANCES
from twingpt.core.backend import Backend, Device
from twingpt.core.errors import UserError
from twingpt.training import flops
from twingpt.version import __version__

LIBRARIES = ("torch", "mlx", "numpy", "safetensors", "tokenizers", "tiktoken", "transformers", "mlx-lm")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A backend's version and details, and its devices; no devices where it is missing or broken."""
    if not registry.installed(name):
        return {"installed": False, "install": registry.how_to_install(name)}, []
    try:
        engines = registry.get(name)
        devices = [{"backend": name, **_device(engines, device)} for device in engines.devices()]
        return {"installed": True, **engines.details()}, devices
    except (UserError, RuntimeError) as error:  # a broken installation is a finding, not a crash
        return {"installed": True, "broken": str(error)}, []


def _mac() -> dict[str, Any] | None:
    """A Mac's macOS and chip, and MLX's wheels on it, which are to be seen even where they don't load; else None."""
    if platform.system() != "Darwin":
        return None
    macos, chip = _macos(), host.cpu_name()
    return {"macos": macos, "chip": chip, **wheel.examine(macos, chip)}


def _macos() -> str:
    """macOS's version; a Python built for an older system hears 16 for 26 (cpython#135675)."""
    version = platform.mac_ver()[0]
    return f"26{version[2:]}" if version.startswith("16.") else version


def _device(engines: Backend, device: Device) -> dict[str, Any]:
    """A device's properties, and its peak FLOP/s in matrix products by dtype, as published and as measured now."""
    documented = {dtype: flops.documented_peak(device, dtype) for dtype in device.dtypes}
    measured = {dtype: flops.measured_peak(engines, device, dtype) for dtype in device.dtypes}
    return {
        **dataclasses.asdict(device),
        "free_memory_bytes": engines.free_memory(device),
        "documented_flops": {dtype: peak and peak.flops_per_second for dtype, peak in documented.items()},
        "measured_flops": {dtype: peak and peak.flops_per_second for dtype, peak in measured.items()},
    }


def _self_test(names: list[str], device: str | None) -> dict[str, Any]:
    """Parity of random models and of fused kernels: {"ok", "tolerance", "max_rel_diff", "failed", "left_out"}.

    `failed` says what differs, in a sentence each; `left_out` are devices that can't compute.
    """
    if not names:
        return {"ok": False, "tolerance": TOLERANCES["float32"], "max_rel_diff": None, "failed": [], "left_out": []}
    try:
        found = parity.measure(parity.random_models(seed=1337), names, device=device, fused=True)
    except UserError as error:  # such as logits that are not finite: a finding, too
        failed = [str(error)]
        return {"ok": False, "tolerance": TOLERANCES["float32"], "max_rel_diff": None, "failed": failed, "left_out": []}
    failed = [
        f"{pair['model']} by {pair['b']} ({pair['device_b']}) is off {pair['a']} ({pair['device_a']}) by "
        f"{pair['max_rel_diff']:.1e}"
        for pair in found["pairs"]
        if pair["max_rel_diff"] > pair["tolerance"]
    ]
    return {
        "ok": found["ok"],
        "tolerance": found["tolerance"],
        "max_rel_diff": max(pair["max_rel_diff"] for pair in found["pairs"]),
        "failed": failed + found["failed"],
        "left_out": found["left_out"],
    }


def examine(backend: str = "auto", device: str | None = None) -> dict[str, Any]:
    """Platform, Mac, libraries, backends, devices and their speed, the choice, and the self-test's worst parity figure.

    Raises UserError for a backend or a device that was asked for and isn't there.
    """
    # MLX first: its BLAS has to be opened before mlx is imported, and torch's import doesn't mind.
    found = {name: _backend(name) for name in registry.BACKENDS}
    working = [name for name, (_, devices) in found.items() if devices]
    choice: dict[str, str | None]
    try:
        chosen, why = registry.choose(backend)
        if broken := found[chosen][0].get("broken"):  # importing it once more may end the process
            raise UserError(broken)
        target = registry.find_device(registry.get(chosen), device)
        choice = {"backend": chosen, "device": target.name, "dtype": target.default_dtype, "why": why}
        choice["dtype_why"] = host.dtype_reason(target) or None
    except UserError as error:
        if backend != "auto" or device is not None:  # what was asked for can't be had
            raise
        choice = {"backend": None, "device": None, "dtype": None, "why": str(error), "dtype_why": None}
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "mac": _mac(),
        "libraries": {"twingpt": __version__, **{name: _version(name) for name in LIBRARIES}},
        "backends": {name: facts for name, (facts, _) in found.items()},
        "devices": [device for _, devices in found.values() for device in devices],
        "choice": choice,
        "self_test": _self_test(working, device),
    }
