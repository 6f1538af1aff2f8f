"""What the PyTorch backend exports: `core.backend.Backend`."""

from twingpt.backends.torch.device import (
    clear_cache,
    details,
    device_errors,
    devices,
    free_memory,
    memory_limits,
)
from twingpt.backends.torch.inference import InferenceEngine
from twingpt.backends.torch.measure import arrays_peak, loss_memory, matmul, module_logits
from twingpt.backends.torch.training import TrainEngine

NAME = "torch"

__all__ = [
    "NAME",
    "InferenceEngine",
    "TrainEngine",
    "arrays_peak",
    "clear_cache",
    "details",
    "device_errors",
    "devices",
    "free_memory",
    "loss_memory",
    "matmul",
    "memory_limits",
    "module_logits",
]
