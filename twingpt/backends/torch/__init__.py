"""The PyTorch backend: CUDA, MPS and CPU."""

from twingpt.backends.torch.decoding import DecodeEngine, module_logits
from twingpt.backends.torch.device import arrays_peak, details, devices, free_memory, matmul, memory_errors
from twingpt.backends.torch.pickles import read_pickle, stored_tensors, write_state_dict
from twingpt.backends.torch.training import TrainEngine, loss_memory

NAME = "torch"

__all__ = [
    "NAME",
    "DecodeEngine",
    "TrainEngine",
    "arrays_peak",
    "details",
    "devices",
    "free_memory",
    "loss_memory",
    "matmul",
    "memory_errors",
    "module_logits",
    "read_pickle",
    "stored_tensors",
    "write_state_dict",
]
