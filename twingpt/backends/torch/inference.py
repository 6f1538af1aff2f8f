"""The inference engine in PyTorch: the twin of `backends/mlx/inference.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twingpt.backends.torch import model
from twingpt.backends.torch.device import DTYPES, device_errors, on_device, to_device, to_numpy
from twingpt.backends.torch.kv_cache import CacheSlots, KVCache
from twingpt.backends.torch.layers import Rope
from twingpt.backends.torch.quantized import in_bytes, prepack
from twingpt.backends.torch.sampler import log_probs_of, penalise, sample
from twingpt.backends.torch.threads import adapt_threads
from twingpt.core.backend import Device, LogProbs, Sampled, check_tokens
from twingpt.core.config import GPTConfig
from twingpt.core.sampler import SamplingRows

Array = Tensor

PREFILL_CHUNK = 512  # positions of a prompt that are run at once: bounds the memory of its attention
ROPE_POSITIONS = 4096  # of the first RoPE tables, which grow: a block_size may be far more than is ever asked for


@dataclass(frozen=True)
class Step:
    """Handle of a prefill or step of B rows, on the device: the logits after it, (B, V) float32, and what was sampled.

    A prefill samples nothing and has None. On CUDA what was sampled is copies on the host, which are there once
    `copied` has happened.
    """

    logits: Array
    sampled: Sampled | None = None
    copied: torch.cuda.Event | None = None


class InferenceEngine:
    """Implements `core.backend.InferenceEngine`: the parameters, quantized or not, are cast once to `dtype`."""

    def __init__(
        self,
        config: GPTConfig,
        tensors: Iterable[tuple[str, np.ndarray | Array]],
        device: Device,
        *,
        dtype: str = "float32",
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        with device_errors():
            self._load(tensors)

    def _load(self, tensors: Iterable[tuple[str, np.ndarray | Array]]) -> None:
        self.params = {name: self._cast(value) for name, value in in_bytes(tensors, self.config)}
        prepack(self.params, self.config, DTYPES[self.dtype])
        self.rope = Rope(self.config, torch.device(self.device.name), ROPE_POSITIONS)

    def _cast(self, value: np.ndarray | Array) -> Array:
        """A parameter on the device in the compute dtype; a quantized matrix stays in bytes."""
        tensor = to_device(value, self.device)
        return tensor if tensor.dtype == torch.uint8 else tensor.to(DTYPES[self.dtype])

    @on_device
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) ids -> (B, T, V) float32 logits, without the KV cache; waits."""
        ids = to_device(check_tokens(tokens, self.config), self.device)
        x = model.hidden_states(self.params, ids, self.config, self.rope)
        return to_numpy(model.logits(x, self.params, self.config))

    @on_device
    def log_probs(self, tokens: np.ndarray, targets: np.ndarray, top_k: int = 0) -> LogProbs:
        """Log-probabilities of (B, T) targets after (B, T) ids, and of the `top_k` likeliest ids. Enqueues only.

        Reads as LogProbs. Goes by chunks of positions: the (B, T, V) logits are never in memory.
        """
        adapt_threads(self.device)
        ids = to_device(check_tokens(tokens, self.config), self.device)
        x = model.hidden_states(self.params, ids, self.config, self.rope)
        return model.log_probs(x, self.params, to_device(targets.astype(np.int64), self.device), self.config, top_k)

    @on_device
    def new_cache(self, rows: int, capacity: int, *, kv_bits: int | None = None) -> KVCache:
        """An empty KV cache of so many rows, with room for `capacity` positions a row, which grows as it fills.

        With `kv_bits` 8 or 4 keys and values are quantized; UserError where they can't be.
        """
        return KVCache(self.config, rows, capacity, DTYPES[self.dtype], self.device, kv_bits)

    @on_device
    def prefill(self, cache: KVCache, row: int, tokens: np.ndarray) -> Step:
        """Run (T,) ids of a prompt, or of a part of it, behind what a row holds. Enqueues only."""
        ids, rows = to_device(check_tokens(tokens[None], self.config), self.device).long(), slice(row, row + 1)
        cache.check_room(rows, len(tokens))
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            x = model.hidden_states(self.params, chunk, self.config, self.rope, CacheSlots(cache, rows, chunk))
        logits = model.logits(x[:, -1:], self.params, self.config)[:, 0]
        cache.set_logits(rows, logits)
        return Step(logits)

    @on_device
    def step(self, cache: KVCache, sampling: SamplingRows, u: np.ndarray, *, log_probs: int | None = 0) -> Step:
        """Decode one token in each of the first B rows: sample it from the row's logits, append it, run it.

        Each row has settings and a uniform `u` (B,) of its own. Enqueues; a CPU may compute the logits first. Reads as
        Sampled, with log-probabilities of the ids and of the `log_probs` likeliest; None leaves both out, and a pass.
        """
        adapt_threads(self.device)
        rows = slice(0, len(u))
        cache.check_logits(rows)
        logits = cache.logits[rows]
        penalised = penalise(logits, sampling, partial(cache.counts, rows), self.device)
        ids = sample(penalised, sampling, u, self.device)
        tokens = ids.clamp_min(0)  # any token goes on where there is none: whoever reads it stops
        sampled = Sampled(ids, *(() if log_probs is None else log_probs_of(logits, tokens, log_probs)))
        copies = self._copy_to_host(sampled)  # before the forward pass, for which `read` then need not wait
        slots = CacheSlots(cache, rows, tokens[:, None])
        x = model.hidden_states(self.params, tokens[:, None], self.config, self.rope, slots)
        step = Step(model.logits(x, self.params, self.config)[:, 0], *copies)
        cache.set_logits(rows, step.logits)
        return step

    def _copy_to_host(self, sampled: Sampled) -> tuple[Sampled, torch.cuda.Event | None]:
        """On CUDA, copies in pinned memory, enqueued, and the event after them; elsewhere the arrays, and None.

        `Tensor.cpu` waits for all that is enqueued when it is called: for the next step too, while the device would
        have nothing to do after it.
        """
        if self.device.kind != "cuda":
            return sampled, None
        arrays = vars(sampled).values()
        copies = Sampled(*(None if array is None else array.to("cpu", non_blocking=True) for array in arrays))
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device.name))
        return copies, copied

    @on_device
    def logits(self, handle: Step) -> np.ndarray:
        """(B, V) float32 logits after the last positions of a handle's rows; waits."""
        return to_numpy(handle.logits)

    @on_device
    def read(self, handle: Step | LogProbs) -> Any:
        """What a step sampled, as Sampled, or what `log_probs` is to give, as LogProbs, of NumPy arrays; waits."""
        if isinstance(handle, Step):
            assert handle.sampled is not None, "a prefill samples nothing"
            if handle.copied:
                handle.copied.synchronize()
            return Sampled(**_on_host(handle.sampled))
        return LogProbs(**_on_host(handle))


def _on_host(handle: Sampled | LogProbs) -> dict[str, np.ndarray | None]:
    """The arrays of a handle by name; waits."""
    return {name: None if array is None else array.cpu().numpy() for name, array in vars(handle).items()}
