"""What the MLX backend exports: `core.backend.Backend`."""

from twingpt.backends.mlx.device import (
    clear_cache,
    details,
    device_errors,
    devices,
    free_memory,
    memory_limits,
)
from twingpt.backends.mlx.inference import InferenceEngine
from twingpt.backends.mlx.measure import arrays_peak, loss_memory, matmul, module_logits
from twingpt.backends.mlx.training import TrainEngine

NAME = "mlx"

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
