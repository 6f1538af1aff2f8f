"""The inference engine in PyTorch: the twin of `backends/mlx/inference.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twingpt.backends.torch import model
from twingpt.backends.torch.device import DTYPES, to_device, to_numpy
from twingpt.backends.torch.quantized import prepack
from twingpt.core.backend import Device, LogProbs, check_tokens
from twingpt.core.config import GPTConfig
from twingpt.core.sampler import Sampling

Array = Tensor

PREFILL_CHUNK = 512  # positions of a prompt that are run at once: bounds the memory of its attention
ROPE_POSITIONS = 4096  # of the first RoPE tables, which grow: a block_size may be far more than is ever asked for


@dataclass(frozen=True)
class Step:
    """Handle of a prefill or step, on the device: the last tokens that ran, (B,), and the logits after them, (B, V)."""

    tokens: Array
    logits: Array


def sample(logits: Array, sampling: Sampling, u: Array, seen: Array | None) -> Array:
    """`core.sampler.sample` without leaving the device: (B, V) logits, `u` (B,), `seen` (B, V) booleans -> (B,) ids."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temp == 0:
        return logits.argmax(-1)
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    ranked = ranked / sampling.temp
    if sampling.top_k:
        ranked[:, sampling.top_k :] = -torch.inf
    p = torch.softmax(ranked, dim=-1)
    keep = p.cumsum(-1) - p < sampling.top_p
    keep &= p >= sampling.min_p * p[:, :1]
    cumulative = torch.where(keep, p, 0.0).cumsum(-1)
    index = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)
    index = torch.minimum(index, keep.sum(-1) - 1)  # rounding may carry u past the last token kept
    return order.gather(-1, index[:, None])[:, 0]


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
        self.config, self.device, self.dtype = config, device, DTYPES[dtype]
        self._load(tensors)
        self.cache: model.KVCache
        self.seen: Array  # (B, V) booleans: the ids of the prompt and, under a repetition penalty, those sampled

    def _load(self, tensors: Iterable[tuple[str, np.ndarray | Array]]) -> None:
        self.params = {name: self._cast(value) for name, value in tensors}
        prepack(self.params, self.config, self.dtype)
        self.rope = model.Rope(self.config, torch.device(self.device.name), ROPE_POSITIONS)

    def _cast(self, value: np.ndarray | Array) -> Array:
        """A parameter on the device in the compute dtype; a quantized matrix becomes uint8."""
        if isinstance(value, np.ndarray) and value.dtype == np.uint32:
            return to_device(np.ascontiguousarray(value).view(np.uint8), self.device)
        return to_device(value, self.device).to(self.dtype)

    @torch.inference_mode()
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) ids -> (B, T, V) float32 logits, without the KV cache; waits."""
        ids = to_device(check_tokens(tokens, self.config), self.device)
        x = model.hidden_states(self.params, ids, self.config, self.rope)
        return to_numpy(model.logits(x, self.params, self.config))

    @torch.inference_mode()
    def log_probs(self, tokens: np.ndarray, targets: np.ndarray, top_k: int = 0) -> LogProbs:
        """Log-probabilities of (B, T) targets after (B, T) ids, and of the `top_k` likeliest ids. Enqueues only.

        Reads as LogProbs. Goes by chunks of positions: the (B, T, V) logits are never in memory.
        """
        ids = to_device(check_tokens(tokens, self.config), self.device)
        x = model.hidden_states(self.params, ids, self.config, self.rope)
        return model.log_probs(x, self.params, to_device(targets.astype(np.int64), self.device), self.config, top_k)

    @torch.inference_mode()
    def prefill(self, tokens: np.ndarray) -> Step:
        """Run (B, T) ids into a new KV cache; the handle holds the last position's logits, (B, V). Enqueues only."""
        ids = to_device(check_tokens(tokens, self.config).astype(np.int64), self.device)
        self.cache = model.KVCache(self.config, len(ids), self.dtype, ids.device)
        self.seen = torch.zeros(len(ids), self.config.vocab_size, dtype=torch.bool, device=ids.device)
        self.seen.scatter_(1, ids, value=True)
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            x = model.hidden_states(self.params, chunk, self.config, self.rope, self.cache)
        return Step(ids[:, -1], model.logits(x[:, -1:], self.params, self.config)[:, 0])

    @torch.inference_mode()
    def step(self, previous: Step, sampling: Sampling, u: np.ndarray) -> Step:
        """Decode one token a row: sample it from `previous` with the uniforms `u` (B,), run it. Enqueues only."""
        uniforms = to_device(u.astype(np.float32), self.device)
        penalise = sampling.repetition_penalty != 1
        ids = sample(previous.logits, sampling, uniforms, self.seen if penalise else None)
        if penalise:
            self.seen.scatter_(1, ids[:, None], value=True)
        x = model.hidden_states(self.params, ids[:, None], self.config, self.rope, self.cache)
        return Step(ids, model.logits(x, self.params, self.config)[:, 0])

    def trim(self, n: int) -> None:
        """Forget the last `n` positions of the KV cache."""
        self.cache.offset -= n

    def logits(self, handle: Step) -> np.ndarray:
        """(B, V) float32 logits after a handle's tokens; waits."""
        return to_numpy(handle.logits)

    def read(self, handle: Step | LogProbs) -> Any:
        """(B,) ids that a step sampled, or what `log_probs` is to give, as NumPy arrays; waits."""
        if isinstance(handle, Step):
            return handle.tokens.cpu().numpy()
        return LogProbs(*(None if array is None else array.cpu().numpy() for array in vars(handle).values()))
