"""The model in MLX: the twin of `backends/torch/model.py`, tested against `core/reference.py`.

Pure functions over a flat dict of parameters under their canonical names (`core/parameters.py`), quantized
ones beside plain ones. Shapes: B batch, T time, D n_embd, H heads, K key-value heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from twingpt.backends.mlx.attention import attention
from twingpt.backends.mlx.gradients import add_gradient, constant
from twingpt.backends.mlx.kv_cache import CacheSlots
from twingpt.backends.mlx.layers import Rope, embedding_lookup, linear, matmul, norm, positions, scale, softcap
from twingpt.backends.mlx.quantized import matrix_dtype
from twingpt.core.backend import LogProbs
from twingpt.core.config import LOSS_LOGITS, LOSS_ROWS, NORM_SITES, GPTConfig
from twingpt.core.dropout import GOLDEN, MIX, threshold

Array = mx.array
Parameters = dict[str, mx.array]

EMBEDDINGS = ("model.embed_tokens.weight", "model.embed_positions.weight")


class Dropout:
    """Inverted dropout by the masks of `core.dropout`: entries are 0 with probability `rate`, the rest over 1 - rate.

    `keys` (B, sites) are those of the batch's windows, as uint32.
    """

    def __init__(self, rate: float, keys: Array) -> None:
        self.rate, self.keys = rate, keys

    def __call__(self, x: Array, site: int) -> Array:
        """Drop out entries of (B, T, D) activations at a site."""
        _, T, D = x.shape
        h = (mx.arange(T * D, dtype=mx.uint32) * uint32(GOLDEN)).reshape(T, D)
        h = h ^ self.keys[:, site, None, None]
        for shift, factor in zip((16, 13), MIX, strict=True):
            h = (h ^ (h >> shift)) * uint32(factor)
        h = h ^ (h >> 16)
        dropped = h < uint32(threshold(self.rate))
        return mx.where(dropped, 0, x * (1 / (1 - self.rate)))


def uint32(number: int) -> Array:
    """A scalar that MLX takes for no int32, which Python's numbers are."""
    return mx.array(number, mx.uint32)


def no_dropout(x: Array, site: int) -> Array:
    """`Dropout` with a rate of 0."""
    return x


# Activations with custom vjps: autograd's backward makes two or three times as many passes over memory.
# Not mlx.nn's, which are wrapped in mx.compile: that costs seconds of g++ on a CPU.
GELU_LINEAR, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715 * math.sqrt(2 / math.pi)


@mx.custom_function
def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    half = 0.5 * mx.tanh(x * (GELU_LINEAR + GELU_CUBIC * mx.square(x)))
    return x * (half + 0.5), half


@_gelu_tanh.vjp
def _gelu_tanh_vjp(x: Array, cotangents: tuple[Array, Array], outputs: tuple[Array, Array]) -> Array:
    half = outputs[1]
    dhalf = x * (GELU_LINEAR + 3 * GELU_CUBIC * mx.square(x)) * (0.5 - 2 * mx.square(half))
    return cotangents[0] * (dhalf + half + 0.5)


@mx.custom_function
def _silu(x: Array) -> tuple[Array, Array]:
    sigmoid = mx.sigmoid(x)
    return x * sigmoid, sigmoid


@_silu.vjp
def _silu_vjp(x: Array, cotangents: tuple[Array, Array], outputs: tuple[Array, Array]) -> Array:
    y, sigmoid = outputs
    return cotangents[0] * (sigmoid + y * (1 - sigmoid))


@mx.custom_function
def _relu2(x: Array) -> tuple[Array, Array]:
    relu = mx.maximum(x, 0)
    return mx.square(relu), relu


@_relu2.vjp
def _relu2_vjp(x: Array, cotangents: tuple[Array, Array], outputs: tuple[Array, Array]) -> Array:
    return cotangents[0] * (2 * outputs[1])


def _first(outputs: Any) -> Array:  # MLX types a custom function's result as object
    first: Array = outputs[0]
    return first


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + mx.erf(x / math.sqrt(2)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": lambda x: _first(_silu(x)),
    "geglu": _gelu,
    "geglu_tanh": lambda x: _first(_gelu_tanh(x)),
    "gelu": _gelu,
    "gelu_tanh": lambda x: _first(_gelu_tanh(x)),
    "relu2": lambda x: _first(_relu2(x)),
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
    # mx.checkpoint differentiates by its arguments alone: parameters from the closure would get no gradient.
    layer_params = {name: value for name, value in p.items() if name.startswith(f"model.layers.{layer}.")}

    def run(x: Array, layer_params: Parameters) -> Array:
        return block(x, layer_params, layer, config, rope, None, dropout)

    return mx.checkpoint(run)(x, layer_params)


def cast(params: Parameters, dtype: mx.Dtype, config: GPTConfig) -> Parameters:
    """The matrices in the compute dtype, cast once; a tied head becomes a matrix of its own.

    Embeddings, biases and norms stay float32, and their gradients are summed so. A gather's gradient is summed in the
    dtype of what it gathers from: in bfloat16 the row of a frequent token would stop growing.
    """
    kept = {name for name, value in params.items() if value.ndim == 1}.union(EMBEDDINGS)
    p = {name: value if name in kept else value.astype(dtype) for name, value in params.items()}
    if config.tie_embeddings:
        p["lm_head.weight"] = params["model.embed_tokens.weight"].astype(dtype)
    return p


def head(p: Parameters, config: GPTConfig) -> str:
    """The name of the matrix that makes logits: the embedding where it is tied, but for the copy that `cast` makes."""
    return "model.embed_tokens" if config.tie_embeddings and "lm_head.weight" not in p else "lm_head"


def embed(p: Parameters, tokens: Array, config: GPTConfig, offset: int | Array) -> Array:
    """Token, position and norm of the embedding: (B, T) ids at the positions from `offset` on -> (B, T, D)."""
    x = scale(embedding_lookup(p, "model.embed_tokens", tokens, config.n_embd), config.embed_scale)
    if config.position == "learned":
        x = x + p["model.embed_positions.weight"][positions(offset, tokens.shape[1])]
    x = x.astype(matrix_dtype(p, "model.layers.0.self_attn.o_proj"))
    return norm(x, p, "model.embed_norm", config) if config.embed_norm else x


def smear(x: Array, previous: Array, p: Parameters) -> Array:
    """x[t] + weight * x[t - 1] by channel (modded-nanogpt), (B, T, D); `previous` (B, 1, D) stands before the first."""
    weight, before = p["model.smear.weight"], mx.concatenate([previous, x[:, :-1]], axis=1)
    return add_gradient(x + constant(weight, x).astype(x.dtype) * before, weight, lambda: before)


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
    x = embed(p, tokens, config, offset)
    if config.smear:
        before = cache.previous_tokens() if cache else None
        previous = mx.zeros_like(x[:, :1]) if before is None else embed(p, before, config, offset - 1)
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
    return softcap(matmul(x, p, head(p, config)).astype(mx.float32), config.logit_softcap)


def log_probs(x: Array, p: Parameters, targets: Array, config: GPTConfig, top_k: int) -> LogProbs:
    """Log-probabilities of (B, T) targets, and of the `top_k` likeliest ids, after (B, T, D) hidden states.

    Goes by chunks of positions, as `chunked_cross_entropy` does.
    """
    chosen, top, top_ids = list[Array](), list[Array](), list[Array]()
    for chunk, wanted in loss_chunks(x.flatten(0, 1), targets.flatten(), config.vocab_size):
        if chosen:  # serialise: MLX would schedule all chunks at once and hold every (chunk_size, V) of logits
            chunk = mx.depends([chunk], [chosen[-1], *top[-1:], *top_ids[-1:]])[0]
        scores = logits(chunk[None], p, config)[0]
        log_p = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
        picked = mx.take_along_axis(log_p, mx.maximum(wanted, 0)[:, None], axis=-1)[:, 0]
        chosen.append(mx.where(wanted < 0, 0.0, picked))
        if top_k:
            order = mx.argsort(-log_p, axis=-1)
            top_ids.append(mx.contiguous(order[:, :top_k]))  # a view would keep all of the order
            top.append(mx.take_along_axis(log_p, top_ids[-1], axis=-1))
    by_position = mx.concatenate(chosen).reshape(targets.shape)
    if not top_k:
        return LogProbs(by_position, None, None)
    shape = (*targets.shape, top_k)
    return LogProbs(by_position, mx.concatenate(top).reshape(shape), mx.concatenate(top_ids).reshape(shape))


def loss_chunks(x: Array, targets: Array, vocab_size: int) -> Iterator[tuple[Array, Array]]:
    """(N, D) hidden states and (N,) targets in chunks of at most LOSS_ROWS positions and LOSS_LOGITS logits."""
    chunk_size = max(1, min(LOSS_ROWS, LOSS_LOGITS // vocab_size))
    for start in range(0, len(x), chunk_size):
        yield x[start : start + chunk_size], targets[start : start + chunk_size]


def cross_entropy_and_dlogits(x: Array, head: Array, targets: Array, cap: float) -> tuple[Array, Array]:
    """Cross-entropy in nats, summed, and its gradient by the logits before the softcap (dlogits), (n, V) in x's dtype.

    (n, D) hidden states, (V, D) head, (n,) targets; a target below 0 is padding: it counts nothing, its row is 0.
    """
    logits = softcap((x @ head.T).astype(mx.float32), cap)
    counted, index = (targets >= 0)[:, None], mx.maximum(targets, 0)[:, None]
    log_z = mx.logsumexp(logits, axis=-1, keepdims=True)
    nats = mx.where(counted, log_z - mx.take_along_axis(logits, index, axis=-1), 0.0).sum()
    p = mx.exp(logits - mx.where(counted, log_z, mx.inf))  # softmax; rows of 0 for padding
    dlogits = mx.put_along_axis(p, index, mx.take_along_axis(p, index, axis=-1) - counted, axis=-1)
    if cap:
        dlogits = dlogits * (1 - mx.square(logits / cap))
    return nats, dlogits.astype(x.dtype)


def cross_entropy_and_grads(x: Array, head: Array, targets: Array, cap: float) -> tuple[Array, Array, Array]:
    """Cross-entropy in nats, summed, and its gradients by (N, D) hidden states and (V, D) head, by chunks of (N,)."""
    total, dhead = mx.array(0.0), mx.zeros(head.shape)
    dx: list[Array] = []
    for chunk, wanted in loss_chunks(x, targets, len(head)):
        if dx:  # serialise: MLX would schedule all chunks at once and hold every (chunk_size, V) of logits
            chunk = mx.depends([chunk], [total, dx[-1], dhead])[0]
        nats, dlogits = cross_entropy_and_dlogits(chunk, head, wanted, cap)
        total = total + nats
        dx.append(dlogits @ head)
        dhead = dhead + dlogits.T @ chunk
    return total, mx.concatenate(dx), dhead.astype(head.dtype)


def chunked_cross_entropy(x: Array, p: Parameters, targets: Array, config: GPTConfig) -> Array:
    """Cross-entropy of (B, T, D) hidden states and (B, T) targets in nats, summed; a target below 0 is padding.

    Never holds the (B T, V) logits: goes by chunks of positions, and takes the gradients of `x` and the head in the
    forward pass (as Liger Kernel's fused linear cross-entropy), which the backward pass only scales.
    """

    @mx.custom_function
    def loss_and_grads(x: Array, head: Array) -> tuple[Array, Array, Array]:
        return cross_entropy_and_grads(x, head, targets.flatten(), config.logit_softcap)

    @loss_and_grads.vjp
    def _vjp(_: Any, cotangents: tuple[Array, ...], outputs: tuple[Array, ...]) -> tuple[Array, Array]:
        _, dx, dhead = outputs
        return (cotangents[0] * dx).astype(dx.dtype), (cotangents[0] * dhead).astype(dhead.dtype)

    return _first(loss_and_grads(x.flatten(0, 1), p[f"{head(p, config)}.weight"]))


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Cross-entropy of (B, T, V) logits and (B, T) targets in nats, summed; a target of -1 is padding."""
    picked = mx.take_along_axis(logits, mx.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return mx.where(targets >= 0, mx.logsumexp(logits, axis=-1) - picked, 0.0).sum()
