"""Attention in MLX: the twin of `backends/torch/attention.py`, tested against `core/reference.py`.

Shapes as in `model.py`.
"""

from __future__ import annotations

import mlx.core as mx

from twingpt.backends.mlx.kv_cache import CacheSlots
from twingpt.backends.mlx.layers import Rope, linear, rms_norm, softcap
from twingpt.core.config import GPTConfig

Array = mx.array
Parameters = dict[str, mx.array]


def attention_mask(offset: int | Array, n_query: int, n_key: int, window: int) -> str | Array | None:
    """The causal mask as the fused kernel takes it, for queries at the positions from `offset` on.

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


def softcapped_attention(q: Array, k: Array, v: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Attention with softcapped scores, (B, H, T, d), unfused since no kernel has it; scores and softmax in float32."""
    B, H, T, d = q.shape
    q = q.reshape(B, config.n_kv_head, -1, T, d)
    scores = softcap((q @ k[:, :, None].swapaxes(-1, -2)).astype(mx.float32) * config.score_scale, config.attn_softcap)
    if isinstance(mask, str):
        mask = mx.arange(k.shape[2]) <= mx.arange(k.shape[2] - T, k.shape[2])[:, None]
    if mask is not None:
        scores = mx.where(mask[..., None, :, :], scores, -mx.inf)
    return (mx.softmax(scores, axis=-1).astype(v.dtype) @ v[:, :, None]).reshape(B, H, T, d)


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
    if cache:
        k, v = cache.update(layer, k, v)
    masks, window = (cache.masks if cache else {}), config.window(layer)
    if window not in masks:
        masks[window] = attention_mask(offset, T, k.shape[2], window)
    mask = masks[window]
    if config.attn_softcap:
        y = softcapped_attention(q, k, v, mask, config)
    else:
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=config.score_scale, mask=mask)
    return linear(y.swapaxes(1, 2).reshape(B, T, -1), p, f"{name}.o_proj")
