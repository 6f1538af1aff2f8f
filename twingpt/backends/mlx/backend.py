"""What the MLX backend exports: `core.backend.Backend`."""

from twingpt.backends.mlx.device import details, device_errors, devices, free_memory
from twingpt.backends.mlx.inference import InferenceEngine
from twingpt.backends.mlx.measure import arrays_peak, loss_memory, matmul, module_logits
from twingpt.backends.mlx.training import TrainEngine

NAME = "mlx"

__all__ = [
    "NAME",
    "InferenceEngine",
    "TrainEngine",
    "arrays_peak",
    "details",
    "device_errors",
    "devices",
    "free_memory",
    "loss_memory",
    "matmul",
    "module_logits",
]
