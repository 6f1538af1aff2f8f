"""The PyTorch backend: CUDA, MPS and CPU."""

from twingpt.backends.torch.device import arrays_peak, details, devices, free_memory, matmul, memory_errors
from twingpt.backends.torch.inference import InferenceEngine, module_logits
from twingpt.backends.torch.training import TrainEngine, loss_memory

NAME = "torch"

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
