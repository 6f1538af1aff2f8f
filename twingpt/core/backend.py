"""What a backend implements: the protocols of its engines, and the device that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.sampler import Sampling
from twingpt.core.schedule import Hyper

Array = np.ndarray
Tensors = Iterable[tuple[str, Array]]
Handle = Any  # something on the device, or on its way there; only `read` waits for it


@dataclass(frozen=True)
class Device:
    """A device that a backend can run on. `kind` is cpu, cuda (ROCm too), xpu, mps or metal.

    `dtypes` are those it computes in, `fast_dtypes` those of them that it has instructions for, and
    `default_dtype` is the fastest that trains well there. `memory_bytes` is all that it has.
    """

    name: str
    kind: str
    description: str
    dtypes: tuple[str, ...]
    fast_dtypes: tuple[str, ...]
    default_dtype: str
    memory_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes in use on the device now, and at most so far; on a CPU those of the process."""

    now: int
    peak: int


class InferenceEngine(Protocol):
    """Logits and sampled tokens from one set of parameters. B rows advance together."""

    config: GPTConfig

    def forward(self, tokens: Array) -> Array:
        """(B, T) ids -> (B, T, V) float32 logits, without the cache."""

    def prefill(self, tokens: Array) -> Handle:
        """Start again with (B, T) ids in the cache; the last position's logits stay on the device."""

    def step(self, previous: Handle, sampling: Sampling, u: Array) -> Handle:
        """Sample a token for each row with the uniforms `u` (B,) and run it through the model; enqueue only."""

    def trim(self, n: int) -> None:
        """Forget the last `n` positions of the cache."""

    def logits(self, handle: Handle) -> Array:
        """(B, V) float32 logits that follow a handle's token; waits."""

    def read(self, handle: Handle) -> Array:
        """(B,) token ids that a step sampled; waits."""


class TrainEngine(Protocol):
    """Parameters and optimizer state on a device, and the training step. Calls enqueue; `read` waits."""

    def forward_backward(self, tokens: Array, targets: Array, key: int) -> None:
        """Forward and backward of a (B, T) batch, adding to the gradients; `key` seeds dropout."""

    def optimizer_step(self, hyper: Hyper) -> Handle:
        """Clip, step, clear the gradients. The handle reads as (mean loss in nats, gradient norm, 1 if skipped)."""

    def evaluate(self, tokens: Array, targets: Array) -> Handle:
        """Without dropout; the handle reads as (summed nats,). Targets below 0 count nothing."""

    def read(self, handles: Sequence[Handle]) -> Array:
        """The numbers of some handles of one kind, a row each, in float64. The only call that waits."""

    def state(self) -> Iterator[tuple[str, Array]]:
        """Parameters, then optimizer state, under canonical names, as float32."""

    def load(self, tensors: Tensors) -> None:
        """Replace parameters, and whatever optimizer state is given; the rest of the state is zeroed."""

    def inference(self) -> InferenceEngine:
        """A decode engine on the present parameters."""

    def memory(self) -> Memory:
        """Bytes in use."""


class Backend(Protocol):
    """The names that `twingpt.backends.NAME` exports."""

    NAME: str
    TrainEngine: Callable[..., TrainEngine]  # (config, device, optimizer, dtype, compile, …)
    InferenceEngine: Callable[..., InferenceEngine]  # (config, tensors, device, dtype)

    def devices(self) -> list[Device]:
        """The devices that are present and work, the best first."""

    def free_memory(self, device: Device) -> int:
        """Bytes that could still be allocated on a device."""

    def arrays_peak(self, device: Device, run: Callable[[], Any]) -> int:
        """Bytes at most of the arrays that `run`, which waits for them, makes on a device."""

    def matmul(self, device: Device, dtype: str, n: int) -> Callable[[], None]:
        """A function that multiplies two n x n matrices of `dtype` on a device, and waits for the product."""

    def loss_memory(
        self, config: GPTConfig, device: Device, dtype: str, tokens: int, chunked: bool
    ) -> tuple[int, float]:
        """Bytes that the loss of so many tokens and its gradients take beside their inputs, and the seconds."""

    def module_logits(self, module: Any, tokens: Array) -> Array:
        """(B, T) ids -> (B, T, V) float32 logits of a library's model in this framework, in float32 on the CPU."""

    def memory_errors(self) -> AbstractContextManager[None]:
        """Raise OutOfMemoryError within the block for whatever the framework raises where memory is short."""

    def details(self) -> dict[str, Any]:
        """What `gpt doctor` should say about this backend."""


def check_tokens(tokens: Array, config: GPTConfig) -> Array:
    """(B, T) ids as int32, or UserError for a shape, an id or a length that the model can't take.

    The devices don't check: an id beyond the table reads garbage there.
    """
    try:
        tokens = np.asarray(tokens)
    except ValueError:
        raise UserError("Tokens must be rows of one length, of shape (batch, time).") from None
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"Tokens must be integers of shape (batch, time), and are {tokens.dtype} of shape {tokens.shape}."
        )
    if tokens.shape[1] > config.block_size:
        raise UserError(f"{tokens.shape[1]} tokens are more than the model's block_size {config.block_size}.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise UserError(f"Token id {bad} is outside the vocabulary, 0 to {config.vocab_size - 1}.")
    return tokens.astype(np.int32)
