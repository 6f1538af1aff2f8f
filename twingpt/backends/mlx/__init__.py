"""The MLX backend: Metal on Apple silicon, CUDA and CPU on Linux."""

from twingpt.backends.mlx.device import arrays_peak, details, devices, free_memory, matmul, memory_errors  # isort: skip  (opens a BLAS before mlx is imported)
from twingpt.backends.mlx.inference import InferenceEngine, module_logits
from twingpt.backends.mlx.training import TrainEngine, loss_memory

NAME = "mlx"

__all__ = [
    "NAME",
    "InferenceEngine",
    "TrainEngine",
    "arrays_peak",
    "details",
    "devices",
    "free_memory",
    "loss_memory",
    "matmul",
    "memory_errors",
    "module_logits",
]
