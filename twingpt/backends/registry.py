"""The registry of backends: which are installed, which to choose, its device and dtype. Imports one only in `get`."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from typing import cast

from twingpt.backends.host import limit_spinning
from twingpt.backends.mlx.errors import explain
from twingpt.core.backend import Backend, Device
from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError

BACKENDS = ("mlx", "torch")

REQUIRED_MODULE = {"mlx": "mlx.core", "torch": "torch"}


def installed(name: str) -> bool:
    """Whether a backend's framework is there to be imported; does not import it."""
    try:
        return importlib.util.find_spec(REQUIRED_MODULE[name]) is not None
    except ModuleNotFoundError:  # the parent package of mlx.core
        return False
    except (ImportError, OSError):  # that package is there and broken: `get` says how
        return True


def how_to_install(name: str) -> str:
    """The command that installs a backend on this machine, in quotes that every shell takes, cmd.exe too."""
    if name == "torch":
        return 'pip install "torch>=2.8,<2.14"'
    if platform.system() == "Windows":
        return "MLX has no build for Windows, --backend torch runs here"
    if platform.system() == "Darwin":
        return "pip install mlx"
    return 'pip install "twingpt[mlx-cpu]" (or [mlx-cuda12], [mlx-cuda13] for a GPU)'


def compiles(backend: str, kind: str) -> bool:
    """Whether training steps are compiled by default, on a device of a `kind`.

    Not on a CPU, where that takes longer than the run that it would speed up; nor for a GPU whose code torch makes
    with Triton where that is missing, as on Windows.
    """
    if backend == "torch" and kind in ("cuda", "xpu"):
        return importlib.util.find_spec("triton") is not None
    return kind != "cpu"


def choose(name: str = "auto") -> tuple[str, str]:
    """A backend's name and why: MLX on Apple silicon, else PyTorch, else what is installed.

    Raises UserError for an unknown backend, one that isn't installed, or none at all.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise unknown_choice("backend", name, (*BACKENDS, "auto"))
        if not installed(name):
            raise UserError(f"The {name} backend is not installed: {how_to_install(name)}.")
        return name, "asked for"
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if apple and installed("mlx"):
        return "mlx", "Apple silicon: MLX runs on Metal"
    if installed("torch"):
        return "torch", "PyTorch is the faster backend on this machine"
    if installed("mlx"):
        return "mlx", "PyTorch is not installed"
    raise UserError(f"No backend is installed: {how_to_install('torch')}, or {how_to_install('mlx')}.")


def get(name: str = "auto") -> Backend:
    """Import the backend that `choose` names, with its process prepared; UserError where its framework is broken."""
    chosen, _ = choose(name)
    limit_spinning()
    try:
        importlib.import_module(f"twingpt.backends.{chosen}.prepare").prepare()
        return cast(Backend, importlib.import_module(f"twingpt.backends.{chosen}.backend"))
    except (ImportError, OSError, RuntimeError) as error:
        if chosen == "mlx" and (told := explain(error)):
            raise told from error
        raise UserError(f"The {chosen} backend can't be imported ({error}): {how_to_install(chosen)}.") from error


def find_device(backend: Backend, name: str | None) -> Device:
    """The device called `name` ("cuda" also finds "cuda:0"), or the backend's best for None; else UserError."""
    devices = backend.devices()
    if name is None:
        return devices[0]
    for device in devices:
        if name in (device.name, device.kind):
            return device
    raise unknown_choice(f"{backend.NAME} device", name, [device.name for device in devices])


def device_failure(backend: Backend, device: Device) -> str | None:
    """What a small matrix product raises on a device, in a line; None where it works.

    MPS is there on hosted virtual machines, and can't allocate.
    """
    try:
        with backend.device_errors():
            backend.matmul(device, "float32", 16)()
    except (RuntimeError, UserError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def find_dtype(device: Device, name: str | None) -> str:
    """`name` if the device computes in it, or the device's default for None; else UserError."""
    if name is None:
        return device.default_dtype
    if name not in device.dtypes:
        raise unknown_choice(f"dtype on {device.name}", name, device.dtypes)
    return name
