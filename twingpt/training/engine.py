"""Training engines from a run's configuration."""

from __future__ import annotations

from twingpt.backends import registry
from twingpt.core.backend import Backend, Device, TrainEngine
from twingpt.core.config import GPTConfig, TrainConfig


def make_engine(
    config: GPTConfig, train: TrainConfig, backend: Backend, device: Device, *, compile: bool | None
) -> TrainEngine:
    """A TrainEngine without parameters yet; `compile` None compiles the step where `registry.compiles` says so."""
    if compile is None:
        compile = registry.compiles(backend.NAME, device.kind)
    return backend.TrainEngine(
        config,
        device,
        optimizer=train.optimizer,
        dtype=train.dtype,
        compile=compile,
        gradient_checkpointing=train.gradient_checkpointing,
        skip_nonfinite=train.skip_nonfinite,
        seed=train.seed,
    )
