"""The contract of a backend: the protocols of its engines, and what it says of its devices.

`backends/mlx/backend.py` and `backends/torch/backend.py` implement `Backend` as modules. Engines enqueue work on the
device and return handles; only a method that says so waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.kv_cache import KVCache
from twingpt.core.sampler import SamplingRows
from twingpt.core.schedule import Hyper

Array = np.ndarray
Tensors = Iterable[tuple[str, Array]]
Handle = Any  # a result on the device, or on its way there; `read` waits for it


@dataclass(frozen=True)
class Device:
    """A device of a backend. `kind` is cpu, cuda (ROCm too), xpu, mps or metal.

    `dtypes` are those it computes in, `fast_dtypes` those of them that it has matrix instructions for, and
    `default_dtype` is the fastest that trains well there. `memory_bytes` is its memory in all.
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
    """Bytes in use on the device, now and at most so far, and freed ones kept for reuse; on a CPU the process's two."""

    now: int
    peak: int
    cached: int | None = None


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities in nats: of (B, T) targets, where padding has 0, and of the k likeliest ids, (B, T, k).

    `top_ids` (B, T, k) are those ids, the likeliest first; None with `top` where k is 0.
    """

    targets: Any
    top: Any
    top_ids: Any


@dataclass(frozen=True)
class Sampled:
    """What a step sampled in its rows: ids (B,), -1 where logits aren't finite; maybe raw log-probabilities (nats).

    `log_probs` (B,) are those of the ids, `top` and `top_ids` (B, k) as in LogProbs; None where not asked for.
    """

    tokens: Any
    log_probs: Any = None
    top: Any = None
    top_ids: Any = None


class InferenceEngine(Protocol):
    """Prefill and decode with one set of parameters; what differs from text to text is in the caches.

    Texts may take turns, each with rows or a cache of its own, and threads may, each with a cache of its own. Raises
    UserError for tokens that `check_tokens` refuses, for more than block_size positions a row, and for a step from a
    row without logits.
    """

    config: GPTConfig
    device: Device
    dtype: str

    def forward(self, tokens: Array) -> Array:
        """(B, T) ids -> (B, T, V) float32 logits, without the KV cache; waits."""

    def log_probs(self, tokens: Array, targets: Array, top_k: int = 0) -> Handle:
        """Log-probabilities of (B, T) targets after (B, T) ids, and of the `top_k` likeliest ids. Enqueues only.

        Reads as LogProbs. Goes by chunks of positions: the (B, T, V) logits are never in memory.
        """

    def new_cache(self, rows: int, capacity: int, *, kv_bits: int | None = None) -> KVCache:
        """An empty KV cache of so many rows, with room for `capacity` positions a row, which grows as it fills.

        With `kv_bits` 8 or 4 keys and values are quantized; UserError where they can't be.
        """

    def prefill(self, cache: Any, row: int, tokens: Array) -> Handle:
        """Run (T,) ids of a prompt, or of a part of it, behind what a row holds. Enqueues only."""

    def step(self, cache: Any, sampling: SamplingRows, u: Array, *, log_probs: int | None = 0) -> Handle:
        """Decode one token in each of the first B rows: sample it from the row's logits, append it, run it.

        Each row has settings and a uniform `u` (B,) of its own. Enqueues; a CPU may compute the logits first. Reads as
        Sampled, with log-probabilities of the ids and of the `log_probs` likeliest; None leaves both out, and a pass.
        """

    def logits(self, handle: Handle) -> Array:
        """(B, V) float32 logits after the last positions of a handle's rows; waits."""

    def read(self, handle: Handle) -> Any:
        """What a step sampled, as Sampled, or what `log_probs` is to give, as LogProbs, of NumPy arrays; waits."""


class TrainEngine(Protocol):
    """Parameters and optimizer state on a device, and the training step.

    An optimizer step is any number of `forward_backward` micro-batches of one size, then `optimizer_step`.
    """

    def forward_backward(self, tokens: Array, targets: Array, windows: Array) -> None:
        """Forward and backward of a (B, T) micro-batch; gradients accumulate. Enqueues only.

        `windows` (B,) are the rows' numbers among the run's training windows, which key their dropout.
        """

    def optimizer_step(self, hyper: Hyper) -> Handle:
        """Clip, step, clear the gradients; enqueues only. Reads as (mean loss in nats, gradient norm, 1 if skipped)."""

    def read(self, handles: Sequence[Handle]) -> Array:
        """(handles, numbers) float64: what handles of one kind read as. The only call that waits."""

    def state(self) -> Iterator[tuple[str, Array]]:
        """Parameters, then optimizer state, as float32 under the names of `parameter_table` and `state_table`."""

    def load(self, tensors: Tensors) -> None:
        """Replace all parameters, and the optimizer state that is among `tensors`; the rest of it starts at 0."""

    def inference(self) -> InferenceEngine:
        """An inference engine on the present parameters, in the dtype of training."""

    def memory(self) -> Memory:
        """Bytes in use on the device, now and at most so far, and freed ones kept for reuse."""


class NewTrainEngine(Protocol):
    """Constructor of a training engine, which has no parameters before `load`.

    `dtype` is that of the forward and backward pass; parameters and optimizer state are float32. float16 has a
    loss scale, and skips steps whose gradient norm is not finite; `skip_nonfinite` does so in any dtype. `seed` is
    that of dropout.
    """

    def __call__(
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
    ) -> TrainEngine:
        """Allocates nothing but the RoPE tables."""


class NewInferenceEngine(Protocol):
    """Constructor of an inference engine; `tensors` are parameters, quantized ones in MLX's affine layout."""

    def __call__(
        self, config: GPTConfig, tensors: Tensors, device: Device, *, dtype: str = "float32"
    ) -> InferenceEngine:
        """Casts the parameters to `dtype` once."""


class Backend(Protocol):
    """What `twingpt.backends.NAME.backend` exports, no more and no less."""

    NAME: str
    TrainEngine: NewTrainEngine
    InferenceEngine: NewInferenceEngine

    def devices(self) -> list[Device]:
        """The devices that are present and work, the best first."""

    def free_memory(self, device: Device) -> int:
        """Bytes that can still be allocated on the device."""

    def memory_limits(self, device: Device, *, cache: int, wired: int) -> AbstractContextManager[None]:
        """Within the block hold Metal to so many bytes of freed memory kept for reuse, and of memory kept wired."""

    def clear_cache(self, device: Device) -> None:
        """Give freed memory that is kept for reuse back to the system, where it is the system's memory too."""

    def arrays_peak(self, device: Device, run: Callable[[], Any]) -> int:
        """Peak bytes of the arrays that `run` makes on the device; `run` waits for them."""

    def matmul(self, device: Device, dtype: str, n: int) -> Callable[[], None]:
        """A function that multiplies two n x n matrices of `dtype` on the device and waits, to be timed."""

    def loss_memory(
        self, config: GPTConfig, device: Device, dtype: str, tokens: int, *, chunked: bool
    ) -> tuple[int, float]:
        """(peak bytes beside the inputs, seconds) of the loss of `tokens` positions and its gradients."""

    def module_logits(self, module: Any, tokens: Array) -> Array:
        """(B, T) ids -> (B, T, V) float32 logits of a library's model in this framework, run in float32 on the CPU."""

    def device_errors(self) -> AbstractContextManager[None]:
        """Raise DeviceError, with the way out, within the block for what the framework raises of a device."""

    def details(self) -> dict[str, Any]:
        """The framework's version and build, as `gpt doctor` shows them."""


def check_tokens(tokens: Array, config: GPTConfig) -> Array:
    """(B, T) ids as int32; UserError for a shape, an id or a length (above block_size) that the model can't take.

    Checked on the host, because on a GPU a look-up beyond the embedding reads garbage.
    """
    try:
        tokens = np.asarray(tokens)
    except ValueError:
        raise UserError("Tokens must be rows of one length, of shape (batch, time).") from None
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"Tokens must be integers of shape (batch, time), not {tokens.dtype} of shape {tokens.shape}.")
    if tokens.shape[1] > config.block_size:
        raise UserError(f"{tokens.shape[1]} tokens are more than the model's block_size {config.block_size}.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise UserError(f"Token id {low if low < 0 else high} is outside the vocabulary, 0 to {config.vocab_size - 1}.")
    return tokens.astype(np.int32)
