"""TwinGPT: one GPT, specified once, in MLX and PyTorch. Importing it loads no framework."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from twingpt.version import __version__

if TYPE_CHECKING:
    from twingpt.core.checkpoint.quantize import Quantization
    from twingpt.core.config import GPTConfig, TrainConfig
    from twingpt.core.errors import UserError
    from twingpt.core.presets import preset
    from twingpt.core.sampler import Sampling
    from twingpt.core.tokenizer import Tokenizer
    from twingpt.data.prepare import prepare
    from twingpt.inference.language_model import LanguageModel, Response
    from twingpt.inference.load import load
    from twingpt.training.api import train
    from twingpt.weights.convert import convert

_MODULES = {  # of the public names; imported on first use, so that `import twingpt` stays light
    "GPTConfig": "core.config",
    "TrainConfig": "core.config",
    "preset": "core.presets",
    "UserError": "core.errors",
    "Sampling": "core.sampler",
    "Tokenizer": "core.tokenizer",
    "LanguageModel": "inference.language_model",
    "Response": "inference.language_model",
    "load": "inference.load",
    "train": "training.api",
    "convert": "weights.convert",
    "prepare": "data.prepare",
    "Quantization": "core.checkpoint.quantize",
}

__all__ = [
    "GPTConfig",
    "LanguageModel",
    "Quantization",
    "Response",
    "Sampling",
    "Tokenizer",
    "TrainConfig",
    "UserError",
    "__version__",
    "convert",
    "load",
    "prepare",
    "preset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'twingpt' has no attribute {name!r}")
    return getattr(import_module(f"twingpt.{_MODULES[name]}"), name)
