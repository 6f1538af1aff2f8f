"""The errors of devices: what a backend's `device_errors` makes of its framework's own."""

from __future__ import annotations

from twingpt.core.errors import UserError


class DeviceError(UserError):
    """A device, its driver or its memory failed: which way, and the way out. The process can't go on with it."""


class OutOfMemoryError(DeviceError):
    """Out of memory on a device."""
