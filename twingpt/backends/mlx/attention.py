"""Attention in MLX: the twin of `backends/torch/attention.py`, tested against `core/reference.py`.

Shapes as in `model.py`.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from twingpt.backends.blocks import FEW_QUERIES, block_size, query_blocks
from twingpt.backends.mlx.kv_cache import CacheSlots
from twingpt.backends.mlx.layers import Rope, linear, rms_norm, softcap
from twingpt.core.config import GPTConfig

Array = mx.array
Parameters = dict[str, mx.array]


def attention_mask(offset: int | Array, n_query: int, n_key: int, window: int) -> str | Array | None:
    """The causal mask as the fused kernel takes it, for queries at positions from `offset` on, the first key at 0.

    None for one query that sees all keys, or "causal"; else booleans, (n_query, n_key), or (B, 1, n_query, n_key) where
    rows have offsets of their own. A window that is not full needs the booleans.
    """
    windowed = 0 < window < n_key
    if isinstance(offset, int) and not windowed:
        return None if n_query == 1 else "causal"
    key = mx.arange(n_key)
    if isinstance(offset, int):
        query = key[offset : offset + n_query, None]
    else:
        query = (offset[:, None] + key[:n_query])[:, None, :, None]
    mask = key <= query
    return mask & (query - key < window) if windowed else mask


def attention_scores(q: Array, k: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Scores of (B, H, T, d) queries, scaled, and (B, K, S, d) keys, softcapped, (B, K, H / K, T, S) float32.

    They are -inf where `mask` hides a key.
    """
    (B, _, T, d), (K, S) = q.shape, k.shape[1:3]
    rows = q.reshape(B, K, -1, d)  # those of all heads that share keys
    scores = (rows @ k.swapaxes(-1, -2)).astype(mx.float32).reshape(B, K, -1, T, S)
    scores = softcap(scores, config.attn_softcap)
    if isinstance(mask, str):
        mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]
    return scores if mask is None else mx.where(mask[..., None, :, :], scores, -mx.inf)


def unfused_attention(q: Array, k: Array, v: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Attention by plain operations, (B, H, T, d), as softcapped scores need; scores and softmax in float32."""
    p = mx.softmax(attention_scores(q * config.score_scale, k, mask, config), axis=-1).astype(v.dtype)
    return (p @ v[:, :, None]).reshape(q.shape)


def dot_product_attention(q: Array, k: Array, v: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Attention of (B, H, T, d) queries to (B, K, S, d) keys and values, (B, H, T, d), fused where it can be."""
    if config.attn_softcap:
        return unfused_attention(q, k, v, mask, config)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=config.score_scale, mask=mask)


def forward_by_blocks(q: Array, k: Array, v: Array, window: int, size: int, config: GPTConfig) -> Array:
    """`dot_product_attention` of T queries to as many keys by blocks of `size` queries, as (B, T, H, d)."""
    done: list[Array] = []
    for queries, keys in query_blocks(q.shape[2], size, window):
        block, k_seen, v_seen = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        if done:  # serialise: MLX would schedule all blocks at once and hold the scores of every one
            block = mx.depends([block], [done[-1]])[0]
        mask = attention_mask(queries.start - keys.start, block.shape[2], k_seen.shape[2], window)
        done.append(dot_product_attention(block, k_seen, v_seen, mask, config).swapaxes(1, 2))
    return mx.concatenate(done, axis=1)


def backward_by_blocks(
    q: Array, k: Array, v: Array, dy: Array, window: int, size: int, config: GPTConfig
) -> tuple[Array, Array, Array]:
    """Gradients of `forward_by_blocks` by q, k and v; those of a key by each block are summed in float32."""
    scaled, dy = q * config.score_scale, dy.swapaxes(1, 2)
    dk, dv = mx.zeros(k.shape), mx.zeros(v.shape)
    dq: list[Array] = []
    for queries, keys in query_blocks(q.shape[2], size, window):
        block, dy_block = scaled[:, :, queries], dy[:, :, queries]
        block = mx.depends([block], [dy_block, *dq[-1:], dk, dv])[0]  # serialise, and not before dy is there
        mask = attention_mask(queries.start - keys.start, block.shape[2], keys.stop - keys.start, window)
        dq_block, dk_seen, dv_seen = block_grads(block, k[:, :, keys], v[:, :, keys], dy_block, mask, config)
        dq.append(dq_block)
        dk, dv = dk.at[:, :, keys].add(dk_seen), dv.at[:, :, keys].add(dv_seen)
    return mx.concatenate(dq, axis=2) * config.score_scale, dk.astype(k.dtype), dv.astype(v.dtype)


def block_grads(
    q: Array, k: Array, v: Array, dy: Array, mask: str | Array | None, config: GPTConfig
) -> tuple[Array, Array, Array]:
    """Gradients of `dot_product_attention` by q, k and v, from the scaled q, by which that of q is.

    Computes the probabilities again, as FlashAttention does (Dao et al. 2022). It keeps the result and each query's
    log-sum-exp for that, which are needless here: a block has all scores of its queries at once.
    """
    (B, _, _, d), (K, S) = q.shape, k.shape[1:3]
    scores = attention_scores(q, k, mask, config)
    p = mx.softmax(scores, axis=-1)
    rows, dy = (x.reshape(B, K, -1, d) for x in (q, dy))
    dv = p.astype(v.dtype).reshape(B, K, -1, S).swapaxes(-1, -2) @ dy
    dp = (dy @ v.swapaxes(-1, -2)).astype(mx.float32).reshape(p.shape)
    dscores = p * (dp - (p * dp).sum(-1, keepdims=True))
    if config.attn_softcap:  # tanh's derivative; a hidden key's score is -inf, and its p is 0
        dscores = dscores * (1 - mx.square(mx.maximum(scores / config.attn_softcap, -1)))
    dscores = dscores.astype(q.dtype).reshape(B, K, -1, S)
    dq = (dscores @ k).reshape(q.shape)
    return dq, dscores.swapaxes(-1, -2) @ rows, dv


def attention_by_blocks(q: Array, k: Array, v: Array, window: int, size: int, config: GPTConfig) -> Array:
    """`forward_by_blocks` whose backward pass goes by blocks, too: it keeps q, k and v alone."""

    @mx.custom_function
    def by_blocks(q: Array, k: Array, v: Array) -> Array:
        return forward_by_blocks(q, k, v, window, size, config)

    @by_blocks.vjp
    def _vjp(primals: tuple[Array, Array, Array], dy: Array, _: Array) -> tuple[Array, Array, Array]:
        return backward_by_blocks(*primals, dy, window, size, config)

    return cast(Array, by_blocks(q, k, v))


def query_block_size(q: Array, window: int, config: GPTConfig) -> int:
    """`block_size` for (B, H, T, d) queries that are all there is."""
    half, softcapped = q.dtype.size == 2, config.attn_softcap > 0
    return block_size("mlx", device_kind(q), q.shape[2], window, config.head_dim, half=half, softcapped=softcapped)


def device_kind(x: Array) -> str:
    """The kind of the device on which MLX computes what is made of `x`: that of its default stream."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def attention(x: Array, p: Parameters, layer: int, config: GPTConfig, rope: Rope, cache: CacheSlots | None) -> Array:
    """Grouped-query causal self-attention, (B, T, D) -> (B, T, D); appends to `cache` where there is one."""
    name, (B, T, _) = f"model.layers.{layer}.self_attn", x.shape
    offset = cache.offset if cache else 0

    def project(letter: str) -> Array:  # (B, H or K, T, d)
        y = linear(x, p, f"{name}.{letter}_proj")
        if config.qk_norm and letter != "v":
            y = y if config.qk_norm_whole else y.reshape(B, T, -1, config.head_dim)
            y = rms_norm(y, p, f"{name}.{letter}_norm", config)
        return y.reshape(B, T, -1, config.head_dim).swapaxes(1, 2)

    q, k, v = project("q"), project("k"), project("v")
    if config.uses_rope(layer):
        local = config.is_local(layer)
        q, k = rope(q, offset, local=local), rope(k, offset, local=local)
    window = config.window(layer)
    if cache:
        k, v = cache.update(layer, k, v, window)
    masks = cache.masks if cache else {}
    size = 0 if cache else query_block_size(q, window, config)
    if size:
        k, v = mx.contiguous(k), mx.contiguous(v)  # or each block's products would copy what they take
        # On a CPU MLX computes one exponential at a time, most of what attention takes: autograd's backward keeps them.
        by_blocks = forward_by_blocks if device_kind(x) == "cpu" else attention_by_blocks
        y = by_blocks(q, k, v, window, size, config)
    else:
        if window not in masks:
            first = cache.start(window) if cache else 0  # the first key's position
            masks[window] = attention_mask(offset - first, T, k.shape[2], window)
        # Without a cache it may be training, for which Metal has no kernels for few queries.
        attend = dot_product_attention if cache or T > FEW_QUERIES else unfused_attention
        y = attend(q, k, v, masks[window], config).swapaxes(1, 2)
    return linear(y.reshape(B, T, -1), p, f"{name}.o_proj")
