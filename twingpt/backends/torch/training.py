"""The training engine in PyTorch: the twin of `backends/mlx/training.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twingpt.backends.torch import model
from twingpt.backends.torch.device import DTYPES, memory, return_freed_memory, to_device, to_numpy
from twingpt.backends.torch.inference import InferenceEngine
from twingpt.backends.torch.layers import Rope
from twingpt.backends.torch.optimizer import optimizer_step
from twingpt.backends.torch.threads import adapt_threads
from twingpt.core.backend import Device, Memory
from twingpt.core.config import GPTConfig
from twingpt.core.dropout import dropout_keys, dropout_sites
from twingpt.core.parameters import optimizer_plan, parameter_table, state_table
from twingpt.core.schedule import LOSS_SCALE_START, Hyper

Array = Tensor
Parameters = dict[str, Tensor]


def summed_loss(
    params: Parameters,
    tokens: Array,
    targets: Array,
    keys: Array,
    config: GPTConfig,
    rope: Rope,
    dtype: torch.dtype,
    *,
    dropout_rate: float,
    gradient_checkpointing: bool,
) -> Array:
    """Cross-entropy of a (B, T) batch in nats, summed over its targets; a target below 0 is padding, counting nothing.

    Casts the parameters to `dtype` once, at the top: there is no autocast. `keys` (B, sites) are those of dropout.
    """
    p = model.cast(params, dtype, config)
    dropout = model.Dropout(dropout_rate, keys) if dropout_rate else model.no_dropout
    x = model.hidden_states(p, tokens, config, rope, dropout=dropout, gradient_checkpointing=gradient_checkpointing)
    return model.chunked_cross_entropy(x, p, targets, config)


def scaled_loss(params: Parameters, tokens: Array, targets: Array, keys: Array, scale: Array, **settings: Any) -> Array:
    """`summed_loss` (which takes `settings`) times `scale`: what the backward pass begins with."""
    return summed_loss(params, tokens, targets, keys, **settings) * scale


class TrainEngine:
    """Implements `core.backend.TrainEngine`: float32 masters and optimizer state, forward and backward in `dtype`."""

    def __init__(
        self,
        config: GPTConfig,
        device: Device,
        *,
        optimizer: str = "adamw",
        dtype: str = "float32",
        compile: bool = False,
        gradient_checkpointing: bool = False,
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        if gradient_checkpointing:
            return_freed_memory(device)
        self.config, self.device, self.optimizer, self.dtype = config, device, optimizer, dtype
        self.params: Parameters = {}
        self.optimizer_state: Parameters = {}
        self.losses: list[Array] = []  # of the micro-batches since the last step, as they were scaled
        self.counted = self.batch_targets = 0  # targets that count since then, and all of its first micro-batch
        self.seed = seed
        compiled = torch.compile if compile else lambda function: function
        rope = Rope(config, torch.device(device.name))
        settings: dict[str, Any] = {"config": config, "rope": rope, "dtype": DTYPES[dtype]}
        settings |= {"dropout_rate": config.dropout, "gradient_checkpointing": gradient_checkpointing}
        self.scaled_loss = compiled(partial(scaled_loss, **settings))
        plan = optimizer_plan(config, optimizer)
        skip_nonfinite = skip_nonfinite or dtype == "float16"  # whose loss scale is found by overflowing
        step = partial(optimizer_step, plan=plan, dtype=DTYPES[dtype], skip_nonfinite=skip_nonfinite)
        self.compiled_step = compiled(step)

    def load(self, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Replace all parameters, and the optimizer state that is among `tensors`; the rest of it starts at 0."""
        shapes = state_table(self.config, self.optimizer, self.dtype)
        arrays = {name: to_device(array, self.device).clone() for name, array in tensors}
        self.optimizer_state = {
            name: arrays[name] if name in arrays else torch.zeros(shape, device=self.device.name)
            for name, shape in shapes.items()
        }
        if "loss_scale" in shapes and "loss_scale" not in arrays:
            self.optimizer_state["loss_scale"] = torch.tensor(LOSS_SCALE_START, device=self.device.name)
        self.params = {name: arrays[name].requires_grad_() for name in parameter_table(self.config)}

    def forward_backward(self, tokens: np.ndarray, targets: np.ndarray, windows: np.ndarray) -> None:
        """Forward and backward of a (B, T) micro-batch; gradients accumulate. Enqueues only.

        `windows` (B,) are the rows' numbers among the run's training windows, which key their dropout.
        """
        x, y = to_device(tokens, self.device), to_device(targets.astype(np.int64), self.device)
        keys = dropout_keys(self.seed, windows, dropout_sites(self.config)).view(np.int32)
        self.batch_targets = self.batch_targets or targets.size
        # Divided by a constant of the step, so that float16 sees a mean times its loss scale and not a sum.
        scale = self.loss_scale / self.batch_targets
        loss = self.scaled_loss(self.params, x, y, to_device(keys, self.device), scale)
        loss.backward()
        self.losses.append(loss.detach())
        self.counted += int(np.count_nonzero(targets >= 0))

    @property
    def grads(self) -> Parameters:
        """The gradients since the last optimizer step, summed and scaled, where autograd keeps them."""
        return {name: p.grad for name, p in self.params.items() if p.grad is not None}

    @property
    def loss_scale(self) -> Array:
        """The loss scale of float16, else 1."""
        return self.optimizer_state.get("loss_scale", torch.ones((), device=self.device.name))

    @property
    def divisor(self) -> float:
        """What makes means of the sums: targets that count since the last step, over its first micro-batch's size."""
        return max(1, self.counted) / self.batch_targets

    def gradients(self) -> Parameters:
        """Gradients of the mean loss over the targets since the last optimizer step, unclipped."""
        divisor = self.divisor * self.loss_scale
        return {name: g / divisor for name, g in self.grads.items()}

    @torch.no_grad()
    def optimizer_step(self, hyper: Hyper) -> Array:
        """Clip, step, clear the gradients; enqueues only. Reads as (mean loss in nats, gradient norm, 1 if skipped)."""
        adapt_threads(self.device)
        numbers: list[Any] = list(to_device(np.array([*hyper, self.divisor], np.float32), self.device))
        divisor = numbers.pop()
        loss = torch.stack(self.losses).sum() / (divisor * self.loss_scale)
        self.params, self.optimizer_state, grad_norm, skipped = self.compiled_step(
            self.params, self.grads, self.optimizer_state, Hyper(*numbers), divisor
        )
        handle = torch.stack([loss, grad_norm, skipped])
        for p in self.params.values():
            p.grad = None
        self.losses, self.counted, self.batch_targets = [], 0, 0
        return handle

    def read(self, handles: Sequence[Array]) -> np.ndarray:
        """(handles, numbers) float64: what handles of one kind read as. The only call that waits."""
        return to_numpy(torch.stack(list(handles))).astype(np.float64)

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """Parameters, then optimizer state, as float32 under the names of `parameter_table` and `state_table`."""
        for name, value in (self.params | self.optimizer_state).items():
            yield name, to_numpy(value)

    def inference(self) -> InferenceEngine:
        """An inference engine on the present parameters, in the dtype of training."""
        return InferenceEngine(self.config, self.params.items(), self.device, dtype=self.dtype)

    def memory(self) -> Memory:
        """Bytes in use on the device, now and at most so far, and freed ones kept for reuse."""
        return memory(self.device)
