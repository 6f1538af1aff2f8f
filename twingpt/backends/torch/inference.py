"""The decoding engine in PyTorch: the twin of `backends/mlx/inference.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twingpt.backends.torch import model, quantized
from twingpt.backends.torch.device import DTYPES, to_device, to_numpy
from twingpt.core.backend import Device, check_tokens
from twingpt.core.config import GPTConfig
from twingpt.core.sampler import Sampling

Array = Tensor

PREFILL_CHUNK = 512  # positions; bounds the memory of a long prompt's attention
ROPE_POSITIONS = 4096  # at first: a model may know many more than anybody asks for


@dataclass(frozen=True)
class Step:
    """A step's result on the device: the token it sampled, (B,), and the logits that follow, (B, V)."""

    tokens: Array
    logits: Array


def sample(scores: Array, sampling: Sampling, u: Array, seen: Array | None) -> Array:
    """One token id for each row of (B, V) logits: `core.sampler.sample` as one graph, (B,)."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if sampling.temp == 0:
        return scores.argmax(-1)
    ranked, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    ranked = ranked / sampling.temp
    if sampling.top_k:
        ranked[:, sampling.top_k :] = -torch.inf
    p = torch.softmax(ranked, dim=-1)
    keep = p.cumsum(-1) - p < sampling.top_p
    keep &= p >= sampling.min_p * p[:, :1]
    cumulative = torch.where(keep, p, 0.0).cumsum(-1)
    index = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)
    index = torch.minimum(index, keep.sum(-1) - 1)  # rounding may carry the draw past the last one kept
    return order.gather(-1, index[:, None])[:, 0]


class InferenceEngine:
    """Logits and sampled tokens from one set of parameters, maybe quantized, cast once to `dtype`."""

    def __init__(
        self,
        config: GPTConfig,
        tensors: Iterable[tuple[str, np.ndarray | Tensor]],
        device: Device,
        dtype: str = "float32",
    ) -> None:
        self.config, self.device, self.dtype = config, device, DTYPES[dtype]
        self.params = {name: self._put(value) for name, value in tensors}
        if self.dtype == torch.bfloat16 and device.name == "cpu" and quantized.has_kernel():
            quantized.pack_all(self.params, config)
        self.rope = model.Rope(config, torch.device(device.name), ROPE_POSITIONS)
        self.cache: model.KVCache
        self.seen: Array

    def _put(self, value: np.ndarray | Tensor) -> Array:
        """A tensor on the device in the compute dtype; the words of a quantized matrix as bytes."""
        if isinstance(value, np.ndarray) and value.dtype == np.uint32:
            return to_device(np.ascontiguousarray(value).view(np.uint8), self.device)
        return to_device(value, self.device).to(self.dtype)

    @torch.inference_mode()
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) ids -> (B, T, V) float32 logits, without the cache."""
        ids = to_device(check_tokens(tokens, self.config), self.device)
        x = model.hidden_states(self.params, ids, self.config, self.rope)
        return to_numpy(model.logits(x, self.params, self.config))

    @torch.inference_mode()
    def prefill(self, tokens: np.ndarray) -> Step:
        """Start again with (B, T) ids in the cache; the last position's logits stay on the device."""
        ids = to_device(check_tokens(tokens, self.config).astype(np.int64), self.device)
        self.cache = model.KVCache(self.config, len(ids), self.dtype, ids.device)
        self.seen = torch.zeros(len(ids), self.config.vocab_size, dtype=torch.bool, device=ids.device)
        self.seen.scatter_(1, ids, True)
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            x = model.hidden_states(self.params, chunk, self.config, self.rope, self.cache)
        return Step(ids[:, -1], model.logits(x[:, -1:], self.params, self.config)[:, 0])

    @torch.inference_mode()
    def step(self, previous: Step, sampling: Sampling, u: np.ndarray) -> Step:
        """Sample a token for each row with the uniforms `u` (B,) and run it through the model; enqueue only."""
        draws = to_device(u.astype(np.float32), self.device)
        penalise = sampling.repetition_penalty != 1
        ids = sample(previous.logits, sampling, draws, self.seen if penalise else None)
        if penalise:
            self.seen.scatter_(1, ids[:, None], True)
        x = model.hidden_states(self.params, ids[:, None], self.config, self.rope, self.cache)
        return Step(ids, model.logits(x, self.params, self.config)[:, 0])

    def trim(self, n: int) -> None:
        """Forget the last `n` positions of the cache."""
        self.cache.offset -= n

    def logits(self, handle: Step) -> np.ndarray:
        """(B, V) float32 logits that follow a handle's token; waits."""
        return to_numpy(handle.logits)

    def read(self, handle: Step) -> np.ndarray:
        """(B,) token ids that a step sampled; waits."""
        return handle.tokens.cpu().numpy()


def module_logits(module: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """(B, T) ids -> (B, T, V) float32 logits of a model of transformers', computed in float32 on the CPU."""
    with torch.inference_mode():
        return to_numpy(module.to("cpu", torch.float32)(torch.from_numpy(tokens.astype(np.int64))).logits)
