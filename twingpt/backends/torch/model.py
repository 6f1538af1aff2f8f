"""The model in PyTorch: the twin of `backends/mlx/model.py`, tested against `core/reference.py`.

Pure functions over a flat dict of parameters under their canonical names (`core/parameters.py`), quantized
ones beside plain ones. Shapes: B batch, T time, D n_embd, H heads, K key-value heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twingpt.backends.torch.attention import attention
from twingpt.backends.torch.kv_cache import CacheSlots
from twingpt.backends.torch.layers import Rope, embedding_lookup, linear, matmul, norm, positions, scale, softcap
from twingpt.backends.torch.quantized import matrix_dtype
from twingpt.core.backend import LogProbs
from twingpt.core.config import LOSS_LOGITS, LOSS_ROWS, NORM_SITES, GPTConfig
from twingpt.core.dropout import GOLDEN, MIX, threshold

Array = Tensor
Parameters = dict[str, Tensor]

EMBEDDINGS = ("model.embed_tokens.weight", "model.embed_positions.weight")


class Dropout:
    """Inverted dropout by the masks of `core.dropout`: entries are 0 with probability `rate`, the rest over 1 - rate.

    `keys` (B, sites) are those of the batch's windows, as int32, which wraps as uint32 does.
    """

    def __init__(self, rate: float, keys: Array) -> None:
        self.rate, self.keys = rate, keys

    def __call__(self, x: Array, site: int) -> Array:
        """Drop out entries of (B, T, D) activations at a site."""
        _, T, D = x.shape
        h = torch.arange(T * D, dtype=torch.int32, device=x.device).mul_(uint32(GOLDEN)).view(T, D)
        h = h ^ self.keys[:, site, None, None]
        for shift, factor in zip((16, 13), MIX, strict=True):
            h ^= (h >> shift) & ((1 << 32 - shift) - 1)  # an int32 shifts copies of its sign in
            h *= uint32(factor)
        h ^= (h >> 16) & 0xFFFF
        dropped = (h ^ uint32(1 << 31)) < threshold(self.rate) - (1 << 31)  # as if unsigned
        return (x * (1 / (1 - self.rate))).masked_fill(dropped, 0.0)


def uint32(number: int) -> int:
    """The int32 of the same bits as a uint32, on which torch has no arithmetic."""
    return number - (1 << 32) if number >= 1 << 31 else number


def no_dropout(x: Array, site: int) -> Array:
    """`Dropout` with a rate of 0."""
    return x


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) * x,  # the backward of a square is a slow pow on a CPU
}


def mlp(x: Array, p: Parameters, layer: int, config: GPTConfig) -> Array:
    """The MLP, gated or not, (B, T, D) -> (B, T, D)."""
    name, activation = f"model.layers.{layer}.mlp", ACTIVATIONS[config.mlp]
    up = linear(x, p, f"{name}.up_proj")
    hidden = activation(linear(x, p, f"{name}.gate_proj")) * up if config.gated_mlp else activation(up)
    return linear(hidden, p, f"{name}.down_proj")


def block(
    x: Array,
    p: Parameters,
    layer: int,
    config: GPTConfig,
    rope: Rope,
    cache: CacheSlots | None,
    dropout: Callable[[Array, int], Array],
) -> Array:
    """Transformer block: attention and MLP, each added to the residual stream, (B, T, D) -> (B, T, D)."""
    name = f"model.layers.{layer}"
    (before_attn, after_attn), (before_mlp, after_mlp) = NORM_SITES[config.norm_placement]
    y = attention(norm(x, p, f"{name}.{before_attn}", config), p, layer, config, rope, cache)
    attended = x + scale(dropout(norm(y, p, f"{name}.{after_attn}", config), 1 + 2 * layer), config.residual_scale)
    x = x if config.parallel_residual else attended
    y = mlp(norm(x, p, f"{name}.{before_mlp}", config), p, layer, config)
    return attended + scale(dropout(norm(y, p, f"{name}.{after_mlp}", config), 2 + 2 * layer), config.residual_scale)


def checkpointed_block(
    x: Array, p: Parameters, layer: int, config: GPTConfig, rope: Rope, dropout: Callable[[Array, int], Array]
) -> Array:
    """`block` with gradient checkpointing (Chen et al. 2016): keeps its input, recomputes the rest in the backward."""
    y: Array = checkpoint(block, x, p, layer, config, rope, None, dropout, use_reentrant=False)
    return y


def cast(params: Parameters, dtype: torch.dtype, config: GPTConfig) -> Parameters:
    """The matrices in the compute dtype, cast once; a tied head becomes a matrix of its own.

    Embeddings, biases and norms stay float32, and their gradients are summed so. A gather's gradient is summed in the
    dtype of what it gathers from: in bfloat16 the row of a frequent token would stop growing.
    """
    kept = {name for name, value in params.items() if value.ndim == 1}.union(EMBEDDINGS)
    p = {name: value if name in kept else value.to(dtype) for name, value in params.items()}
    if config.tie_embeddings:
        p["lm_head.weight"] = params["model.embed_tokens.weight"].to(dtype)
    return p


def head(p: Parameters, config: GPTConfig) -> str:
    """The name of the matrix that makes logits: the embedding where it is tied, but for the copy that `cast` makes."""
    return "model.embed_tokens" if config.tie_embeddings and "lm_head.weight" not in p else "lm_head"


def embed(p: Parameters, tokens: Array, config: GPTConfig, offset: int | Array) -> Array:
    """Token, position and norm of the embedding: (B, T) ids at the positions from `offset` on -> (B, T, D)."""
    x = scale(embedding_lookup(p, "model.embed_tokens", tokens, config.n_embd), config.embed_scale)
    if config.position == "learned":
        x = x + p["model.embed_positions.weight"][positions(offset, tokens.shape[1])]
    x = x.to(matrix_dtype(p, "model.layers.0.self_attn.o_proj"))
    return norm(x, p, "model.embed_norm", config) if config.embed_norm else x


def smear(x: Array, previous: Array, p: Parameters) -> Array:
    """x[t] + weight * x[t - 1] by channel (modded-nanogpt), (B, T, D); `previous` (B, 1, D) stands before the first."""
    return x + p["model.smear.weight"].to(x.dtype) * torch.cat([previous, x[:, :-1]], dim=1)


def hidden_states(
    p: Parameters,
    tokens: Array,
    config: GPTConfig,
    rope: Rope,
    cache: CacheSlots | None = None,
    *,
    dropout: Callable[[Array, int], Array] = no_dropout,
    gradient_checkpointing: bool = False,
) -> Array:
    """All but the head: (B, T) ids -> (B, T, D) hidden states after the final norm; `logits` takes them on.

    With a `cache` the ids go where it says, and attention sees what its rows hold.
    """
    offset = cache.offset if cache else 0
    rope.extend(cache.end if cache else tokens.shape[1])
    x = embed(p, tokens, config, offset)
    if config.smear:
        before = cache.previous_tokens() if cache else None
        previous = torch.zeros_like(x[:, :1]) if before is None else embed(p, before, config, offset - 1)
        x = smear(x, previous, p)
    x = dropout(x, 0)
    for layer in range(config.n_layer):
        if gradient_checkpointing:
            x = checkpointed_block(x, p, layer, config, rope, dropout)
        else:
            x = block(x, p, layer, config, rope, cache, dropout)
    if cache:
        cache.advance()
    return scale(norm(x, p, "model.norm", config), 1 / config.logit_divisor)


def logits(x: Array, p: Parameters, config: GPTConfig) -> Array:
    """The head: (B, T, D) hidden states -> (B, T, V) float32 logits, softcapped."""
    return softcap(matmul(x, p, head(p, config)).float(), config.logit_softcap)


def log_probs(x: Array, p: Parameters, targets: Array, config: GPTConfig, top_k: int) -> LogProbs:
    """Log-probabilities of (B, T) targets, and of the `top_k` likeliest ids, after (B, T, D) hidden states.

    Goes by chunks of positions, as `chunked_cross_entropy` does.
    """
    chosen, top, top_ids = list[Array](), list[Array](), list[Array]()
    for chunk, wanted in loss_chunks(x.flatten(0, 1), targets.flatten(), config.vocab_size):
        log_p = torch.log_softmax(logits(chunk[None], p, config)[0], dim=-1)
        picked = log_p.gather(-1, wanted.clamp_min(0)[:, None])[:, 0]
        chosen.append(picked.masked_fill(wanted < 0, 0.0))
        if top_k:
            likeliest = torch.topk(log_p, top_k)
            top.append(likeliest.values)
            top_ids.append(likeliest.indices)
    by_position = torch.cat(chosen).view(targets.shape)
    if not top_k:
        return LogProbs(by_position, None, None)
    shape = (*targets.shape, top_k)
    return LogProbs(by_position, torch.cat(top).view(shape), torch.cat(top_ids).view(shape))


def loss_chunks(x: Array, targets: Array, vocab_size: int) -> Iterator[tuple[Array, Array]]:
    """(N, D) hidden states and (N,) targets in chunks of at most LOSS_ROWS positions and LOSS_LOGITS logits."""
    chunk_size = max(1, min(LOSS_ROWS, LOSS_LOGITS // vocab_size))
    return zip(x.split(chunk_size), targets.split(chunk_size), strict=True)


def cross_entropy_and_dlogits(x: Array, head: Array, targets: Array, cap: float) -> tuple[Array, Array]:
    """Cross-entropy in nats, summed, and its gradient by the logits before the softcap (dlogits), (n, V) in x's dtype.

    (n, D) hidden states, (V, D) head, (n,) targets; a target below 0 is padding: it counts nothing, its row is 0.
    """
    logits = softcap(F.linear(x, head).float(), cap)
    counted, index = (targets >= 0)[:, None], targets.clamp_min(0)[:, None]
    log_p = torch.log_softmax(logits, dim=-1)
    nats = -(log_p.gather(-1, index) * counted).sum()
    dlogits = log_p.exp_()  # softmax, in the memory of log_p
    dlogits.scatter_add_(-1, index, torch.full_like(index, -1.0, dtype=dlogits.dtype)).mul_(counted)
    if cap:
        dlogits *= 1 - (logits / cap).square()
    return nats, dlogits.to(x.dtype)


def cross_entropy_and_grads(x: Array, head: Array, targets: Array, cap: float) -> tuple[Array, Array, Array]:
    """Cross-entropy in nats, summed, and its gradients by (N, D) hidden states and (V, D) head, by chunks of (N,)."""
    total, dhead = torch.zeros((), device=x.device), torch.zeros_like(head, dtype=torch.float32)
    dx: list[Array] = []
    for chunk, wanted in loss_chunks(x, targets, len(head)):
        nats, dlogits = cross_entropy_and_dlogits(chunk, head, wanted, cap)
        total += nats
        dx.append(dlogits @ head)
        dhead += dlogits.mT @ chunk
    return total, torch.cat(dx), dhead.to(head.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Array, head: Array, targets: Array, cap: float) -> Array:
        total, *grads = cross_entropy_and_grads(x, head, targets, cap)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        dx, dhead = ctx.saved_tensors
        return (cotangent * dx).to(dx.dtype), (cotangent * dhead).to(dhead.dtype), None, None


def chunked_cross_entropy(x: Array, p: Parameters, targets: Array, config: GPTConfig) -> Array:
    """Cross-entropy of (B, T, D) hidden states and (B, T) targets in nats, summed; a target below 0 is padding.

    Never holds the (B T, V) logits: goes by chunks of positions, and takes the gradients of `x` and the head in the
    forward pass (as Liger Kernel's fused linear cross-entropy), which the backward pass only scales.
    """
    weight = p[f"{head(p, config)}.weight"]
    total: Array = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, 1), weight, targets.flatten(), config.logit_softcap
    )
    return total


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Cross-entropy of (B, T, V) logits and (B, T) targets in nats, summed; a target of -1 is padding."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
