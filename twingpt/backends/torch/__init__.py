"""The PyTorch backend: CUDA, MPS and CPU."""

from twingpt.backends.torch.decoding import DecodeEngine
from twingpt.backends.torch.device import details, devices
from twingpt.backends.torch.training import TrainEngine

NAME = "torch"

__all__ = ["NAME", "DecodeEngine", "TrainEngine", "details", "devices"]
