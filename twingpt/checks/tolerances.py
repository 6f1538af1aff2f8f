"""How far apart two implementations may be: by precision, device and length."""

from __future__ import annotations

from twingpt.core.backend import Device

# Of the largest |logit|. bfloat16 keeps 8 bits, and a model of a few layers loses about two of them.
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}
QUANTIZED_TOLERANCE = 1e-4  # in float32: kernels round sums of whole numbers times scales in other places
PARAVIRTUAL_TOLERANCE = 1e-3  # in float32 on the GPU that macOS gives a virtual machine: 1e-4 failed on some
METAL_ANGLE = 1e-7  # by position: MLX's RoPE on Metal takes fast sines of float32 angles, 3 to 6e-5 off near 1,000


def is_paravirtual(device: Device) -> bool:
    """Whether a GPU is the one that macOS shows to a virtual machine."""
    return device.kind in ("metal", "mps") and ("Paravirtual" in device.description or "Virtual" in device.description)


def float32_tolerance(device: Device, length: int) -> float:
    """Largest relative difference in float32 on a device, over `length` positions."""
    least = PARAVIRTUAL_TOLERANCE if is_paravirtual(device) else TOLERANCES["float32"]
    return max(least, METAL_ANGLE * length) if device.kind == "metal" else least


def tolerance_of(device: Device, dtype: str, length: int) -> float:
    """Largest relative difference in `dtype` on a device, over `length` positions."""
    return float32_tolerance(device, length) if dtype == "float32" else TOLERANCES[dtype]
