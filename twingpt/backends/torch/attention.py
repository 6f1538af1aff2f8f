"""Attention in PyTorch: the twin of `backends/mlx/attention.py`, tested against `core/reference.py`.

Shapes as in `model.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twingpt.backends.blocks import block_size, query_blocks
from twingpt.backends.torch.kv_cache import CacheSlots
from twingpt.backends.torch.layers import Rope, linear, rms_norm, softcap
from twingpt.core.config import GPTConfig

Array = Tensor
Parameters = dict[str, Tensor]


def attention_mask(
    offset: int | Array, n_query: int, n_key: int, window: int, device: torch.device
) -> str | Array | None:
    """The causal mask as the fused kernel takes it, for queries at positions from `offset` on, the first key at 0.

    None for one query that sees all keys, or "causal"; else booleans, (n_query, n_key), or (B, 1, n_query, n_key) where
    rows have offsets of their own. torch's is_causal aligns the first query with the first key, so that "causal" is
    right for n_query = n_key alone. A window that is not full needs the booleans.
    """
    windowed = 0 < window < n_key
    if isinstance(offset, int) and not windowed and n_query in (1, n_key):
        return None if n_query == 1 else "causal"
    key = torch.arange(n_key, device=device)
    if isinstance(offset, int):
        query = key[offset : offset + n_query, None]
    else:
        query = (offset[:, None] + key[:n_query])[:, None, :, None]
    return (key <= query) & (query - key < window if windowed else True)


def attention_scores(q: Array, k: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Scores of (B, H, T, d) queries, scaled, and (B, K, S, d) keys, softcapped, (B, K, H / K, T, S) float32.

    They are -inf where `mask` hides a key.
    """
    (B, _, T, d), (K, S) = q.shape, k.shape[1:3]
    rows = q.reshape(B, K, -1, d)  # those of all heads that share keys
    scores = (rows @ k.mT).float().view(B, K, -1, T, S)
    scores = softcap(scores, config.attn_softcap)
    if isinstance(mask, str):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    return scores if mask is None else scores.masked_fill(~mask[..., None, :, :], -torch.inf)


def unfused_attention(q: Array, k: Array, v: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Attention by plain operations, (B, H, T, d), as softcapped scores need; scores and softmax in float32."""
    p = torch.softmax(attention_scores(q * config.score_scale, k, mask, config), dim=-1).to(v.dtype)
    return (p @ v[:, :, None]).reshape(q.shape)


def flash_takes(q: Array, mask: str | Array | None) -> bool:
    """Whether FlashAttention takes the queries on CUDA: of PyTorch's kernels there it alone shares keys by itself."""
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return ampere and not isinstance(mask, Tensor) and q.dtype != torch.float32


def dot_product_attention(q: Array, k: Array, v: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Attention of (B, H, T, d) queries to (B, K, S, d) keys and values, (B, H, T, d), fused where it can be."""
    if config.attn_softcap:
        return unfused_attention(q, k, v, mask, config)
    gqa = config.n_head != config.n_kv_head
    if gqa and q.is_cuda and not flash_takes(q, mask):  # or it would go unfused, and keep T² scores in training
        k, v = (x.repeat_interleave(config.n_head // config.n_kv_head, dim=1) for x in (k, v))
        gqa = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if isinstance(mask, str) else mask,
        is_causal=isinstance(mask, str),
        scale=config.score_scale,
        enable_gqa=gqa,
    )


def forward_by_blocks(q: Array, k: Array, v: Array, window: int, size: int, config: GPTConfig) -> Array:
    """`dot_product_attention` of T queries to as many keys by blocks of `size` queries, as (B, T, H, d)."""
    B, H, T, d = q.shape
    y = q.new_empty(B, T, H, d)
    for queries, keys in query_blocks(T, size, window):
        block, k_seen, v_seen = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        mask = attention_mask(queries.start - keys.start, block.shape[2], k_seen.shape[2], window, q.device)
        y[:, queries] = dot_product_attention(block, k_seen, v_seen, mask, config).transpose(1, 2)
    return y


def backward_by_blocks(
    q: Array, k: Array, v: Array, dy: Array, window: int, size: int, config: GPTConfig
) -> tuple[Array, Array, Array]:
    """Gradients of `forward_by_blocks` by q, k and v; those of a key by each block are summed in float32."""
    scaled, dy = (q * config.score_scale).contiguous(), dy.transpose(1, 2).contiguous()
    dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for queries, keys in query_blocks(q.shape[2], size, window):
        block, dy_block = scaled[:, :, queries], dy[:, :, queries]
        mask = attention_mask(queries.start - keys.start, block.shape[2], keys.stop - keys.start, window, q.device)
        dq[:, :, queries], dk_seen, dv_seen = block_grads(block, k[:, :, keys], v[:, :, keys], dy_block, mask, config)
        dk[:, :, keys] += dk_seen
        dv[:, :, keys] += dv_seen
    return dq.mul_(config.score_scale), dk.to(k.dtype), dv.to(v.dtype)


def block_grads(
    q: Array, k: Array, v: Array, dy: Array, mask: str | Array | None, config: GPTConfig
) -> tuple[Array, Array, Array]:
    """Gradients of `dot_product_attention` by q, k and v, from the scaled q, by which that of q is.

    Computes the probabilities again, as FlashAttention does (Dao et al. 2022). It keeps the result and each query's
    log-sum-exp for that, which are needless here: a block has all scores of its queries at once.
    """
    (B, _, _, d), (K, S) = q.shape, k.shape[1:3]
    scores = attention_scores(q, k, mask, config)
    p = torch.softmax(scores, dim=-1)
    rows, dy = (x.reshape(B, K, -1, d) for x in (q, dy))
    dv = p.to(v.dtype).view(B, K, -1, S).mT @ dy
    dp = (dy @ v.mT).float().view(p.shape)
    dscores = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - (p * dp).sum(-1)) in one pass
    if config.attn_softcap:  # tanh's derivative; a hidden key's score is -inf, and its p is 0
        dscores *= 1 - (scores / config.attn_softcap).clamp_min(-1).square()
    dscores = dscores.to(q.dtype).view(B, K, -1, S)
    dq = (dscores @ k).view(q.shape)
    return dq, dscores.mT @ rows, dv


class _AttentionByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Array, k: Array, v: Array, *settings: Any) -> Array:
        ctx.save_for_backward(q, k, v)
        ctx.settings = settings
        return forward_by_blocks(q, k, v, *settings)

    @staticmethod
    def backward(ctx: Any, dy: Array) -> tuple[Array | None, ...]:
        q, k, v = ctx.saved_tensors
        return *backward_by_blocks(q, k, v, dy, *ctx.settings), None, None, None


def attention_by_blocks(q: Array, k: Array, v: Array, window: int, size: int, config: GPTConfig) -> Array:
    """`forward_by_blocks` whose backward pass goes by blocks, too: it keeps q, k and v alone."""
    y: Array = _AttentionByBlocks.apply(q, k, v, window, size, config)  # type: ignore[no-untyped-call]
    return y


def query_block_size(q: Array, window: int, config: GPTConfig) -> int:
    """`block_size` for (B, H, T, d) queries that are all there is."""
    half, softcapped = q.dtype.itemsize == 2, config.attn_softcap > 0
    return block_size("torch", device_kind(q), q.shape[2], window, config.head_dim, half=half, softcapped=softcapped)


def device_kind(x: Array) -> str:
    """The kind of the device on which torch computes what is made of `x`: where x is."""
    return x.device.type


def attention(x: Array, p: Parameters, layer: int, config: GPTConfig, rope: Rope, cache: CacheSlots | None) -> Array:
    """Grouped-query causal self-attention, (B, T, D) -> (B, T, D); appends to `cache` where there is one."""
    name, (B, T, _) = f"model.layers.{layer}.self_attn", x.shape
    offset = cache.offset if cache else 0

    def project(letter: str) -> Array:  # (B, H or K, T, d)
        y = linear(x, p, f"{name}.{letter}_proj")
        if config.qk_norm and letter != "v":
            y = y if config.qk_norm_whole else y.view(B, T, -1, config.head_dim)
            y = rms_norm(y, p, f"{name}.{letter}_norm", config)
        return y.view(B, T, -1, config.head_dim).transpose(1, 2)

    q, k, v = project("q"), project("k"), project("v")
    if config.uses_rope(layer):
        local = config.is_local(layer)
        q, k = rope(q, offset, local=local), rope(k, offset, local=local)
    window = config.window(layer)
    if cache:
        k, v = cache.update(layer, k, v, window)
    if x.is_mps:  # its kernel misreads permuted inputs (pytorch#181133)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    masks = cache.masks if cache else {}
    size = 0 if cache else query_block_size(q, window, config)
    if size:
        k, v = k.contiguous(), v.contiguous()  # or each block's products would copy what they take
        y = attention_by_blocks(q, k, v, window, size, config)
    else:
        if window not in masks:
            first = cache.start(window) if cache else 0  # the first key's position
            masks[window] = attention_mask(offset - first, T, k.shape[2], window, x.device)
        y = dot_product_attention(q, k, v, masks[window], config).transpose(1, 2)
    return linear(y.reshape(B, T, -1), p, f"{name}.o_proj")
