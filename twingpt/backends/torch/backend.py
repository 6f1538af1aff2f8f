"""What the PyTorch backend exports: `core.backend.Backend`."""

from twingpt.backends.torch.device import details, device_errors, devices, free_memory
from twingpt.backends.torch.inference import InferenceEngine
from twingpt.backends.torch.measure import arrays_peak, loss_memory, matmul, module_logits
from twingpt.backends.torch.training import TrainEngine

NAME = "torch"

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
