"""The forward pass in PyTorch: the twin of `backends/mlx/model.py`, judged by `core/reference.py`.

Pure functions over a flat dict of parameters under their canonical names. Shapes: B batch, T time,
D n_embd, H heads, K key-value heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twingpt.backends.torch.quantized import dequantize, packed_matmul, quantized_matmul
from twingpt.core.config import LOSS_LOGITS, LOSS_ROWS, NORM_SITES, GPTConfig
from twingpt.core.rope import rope_frequencies

Array = Tensor
Parameters = dict[str, Tensor]

CACHE_ROOM = 256  # positions, to begin with


class Rope:
    """Rotary position embedding with its tables: cos and signed sin, (length, rope_dim) float32.

    They are for the first `length` positions, or all of the block size, and grow where more are asked for.
    The layers that rotate by `local_rope_theta` have tables of their own.
    """

    def __init__(self, config: GPTConfig, device: torch.device, length: int = 0) -> None:
        self.config, self.device = config, device
        self.extend(length or config.block_size)

    def extend(self, length: int) -> None:
        """Make the tables for so many positions, and no more than there are."""
        kinds = (False, True)[: 1 + (self.config.local_rope_theta > 0)]
        self.length = min(length, self.config.block_size)
        self.tables = {local: self.table(local) for local in kinds}

    def table(self, local: bool) -> tuple[Array, Array]:
        """cos and signed sin of the positions."""
        frequencies, factor = rope_frequencies(self.config, local)
        angles = np.arange(self.length, dtype=np.float32)[:, None] * frequencies
        # cos and sin of the float32 angle in float64: a device's own may be off in the last bits.
        cos, sin = (f(angles, dtype=np.float64) * factor for f in (np.cos, np.sin))
        pairs = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        cos, sin = (torch.from_numpy(pair.astype(np.float32)).to(self.device) for pair in pairs)
        return cos, sin

    def __call__(self, x: Array, offset: int, local: bool) -> Array:
        """Rotate (B, H, T, d), whose first position is `offset`."""
        end = offset + x.shape[2]
        if end > self.length:
            self.extend(2 * end)
        cos, sin = (table[offset:end] for table in self.tables[local])
        dim, x32 = self.config.rope_dim, x.float()
        rotary, rest = x32[..., :dim], x32[..., dim:]
        y = rotary * cos + rotary.roll(dim // 2, -1) * sin  # the roll swaps the halves
        return (torch.cat([y, rest], dim=-1) if rest.shape[-1] else y).to(x.dtype)


class KVCache:
    """The token ids, keys and values of the positions seen so far, in room that doubles up to block_size."""

    def __init__(self, config: GPTConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, config.n_kv_head, min(CACHE_ROOM, config.block_size), config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        seen = config.block_size if config.smear else 0  # which alone looks back at them
        self.tokens = torch.zeros(batch, seen, dtype=torch.int64, device=device)
        self.block_size, self.offset = config.block_size, 0

    def update(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append (B, K, T, d) to a layer and return all of it up to there."""
        end = self.offset + k.shape[2]
        if end > self.keys[layer].shape[2]:
            self._grow(layer, end)
        self.keys[layer][:, :, self.offset : end] = k
        self.values[layer][:, :, self.offset : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def _grow(self, layer: int, end: int) -> None:
        B, K, T, d = self.keys[layer].shape
        room = min(self.block_size, max(end, 2 * T))
        for kept in (self.keys, self.values):
            empty = kept[layer].new_zeros(B, K, room - T, d)
            kept[layer] = torch.cat([kept[layer], empty], dim=2)


class Dropout:
    """Zeroes entries with probability `rate` and scales the rest; draws from torch's seeded generator."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, x: Array) -> Array:
        """Drop out entries of `x`."""
        return F.dropout(x, self.rate)


def keep_all(x: Array) -> Array:
    """No dropout."""
    return x


def product(x: Array, p: Parameters, name: str) -> Array:
    """x W^T for the matrix called `name`, by the quantized kernel where there is one (see `quantized`)."""
    if f"{name}.packed" in p:
        y = packed_matmul(x, p[f"{name}.packed"], p[f"{name}.packed_scales"])
        return y[..., : len(p[f"{name}.scales"])]
    if f"{name}.scales" in p:
        return quantized_matmul(x, p[f"{name}.weight"], p[f"{name}.scales"], p[f"{name}.biases"])
    return F.linear(x, p[f"{name}.weight"])


def linear(x: Array, p: Parameters, name: str) -> Array:
    """x W^T + b, where the checkpoint has a bias of that name."""
    bias = p.get(f"{name}.bias")
    if f"{name}.scales" in p:
        return product(x, p, name) if bias is None else product(x, p, name) + bias
    return F.linear(x, p[f"{name}.weight"], bias)


def rows(p: Parameters, name: str, index: Array, width: int) -> Array:
    """Rows of the embedding called `name`, (*index, width)."""
    weight = p[f"{name}.weight"]
    if f"{name}.scales" in p:
        return dequantize(weight[index], p[f"{name}.scales"][index], p[f"{name}.biases"][index], width)
    return F.embedding(index, weight)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm over the last axis, in float32."""
    x32 = x.float()
    if x.is_cpu:  # where F.rms_norm is a chain of slow powers
        mean_square = torch.linalg.vecdot(x32, x32).unsqueeze(-1) / x.shape[-1]
        return (x32 * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)
    return F.rms_norm(x32, weight.shape, weight.float(), eps).to(x.dtype)


def norm_weight(p: Parameters, name: str, config: GPTConfig) -> Array:
    """What a norm multiplies by."""
    weight = p[f"{name}.weight"]
    return weight.float() + 1 if config.norm_offset else weight


def norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """The block's RMSNorm or LayerNorm, in float32, (B, T, D); x for the empty name of one that isn't there."""
    if name.endswith("."):
        return x
    weight = norm_weight(p, name, config)
    if config.norm == "rmsnorm":
        return rms_norm(x, weight, config.norm_eps)
    bias = p[f"{name}.bias"].float() if config.norm_bias else None
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias, config.norm_eps).to(x.dtype)


def scaled(x: Array, factor: float) -> Array:
    """x * factor, or x where that is 1."""
    return x if factor == 1 else x * factor


def softcap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap), or x when the cap is off."""
    return cap * torch.tanh(x / cap) if cap else x


def attention_mask(n_query: int, n_key: int, window: int, device: torch.device) -> str | Array | None:
    """None where every key counts, "causal" where n_query = n_key, else (n_query, n_key) booleans."""
    windowed = 0 < window < n_key
    if n_query == 1 and not windowed:
        return None
    if n_query == n_key and not windowed:
        return "causal"
    key = torch.arange(n_key, device=device)
    query = key[n_key - n_query :, None]
    return (key <= query) & (query - key < window if windowed else True)


def capped_attention(q: Array, k: Array, v: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Attention with softcapped scores, which no fused kernel has, (B, H, T, d); softmax in float32."""
    B, H, T, d = q.shape
    q = q.reshape(B, config.n_kv_head, -1, T, d)
    scores = softcap((q @ k[:, :, None].mT).float() * config.score_scale, config.attn_softcap)
    if isinstance(mask, str):
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v[:, :, None]).reshape(B, H, T, d)


def attention(x: Array, p: Parameters, layer: int, config: GPTConfig, rope: Rope, cache: KVCache | None) -> Array:
    """Grouped-query causal self-attention, (B, T, D)."""
    name, (B, T, _) = f"model.layers.{layer}.self_attn", x.shape
    offset = cache.offset if cache else 0

    def heads(letter: str) -> Array:
        y = linear(x, p, f"{name}.{letter}_proj")
        if config.qk_norm and letter != "v":
            y = y if config.qk_norm_whole else y.view(B, T, -1, config.head_dim)
            y = rms_norm(y, norm_weight(p, f"{name}.{letter}_norm", config), config.norm_eps)
        return y.view(B, T, -1, config.head_dim).transpose(1, 2)

    q, k, v = heads("q"), heads("k"), heads("v")
    if config.uses_rope(layer):
        q, k = rope(q, offset, config.is_local(layer)), rope(k, offset, config.is_local(layer))
    if cache:
        k, v = cache.update(layer, k, v)
    if x.is_mps:  # its kernel misreads permuted inputs (pytorch#181133)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    mask = attention_mask(T, k.shape[2], config.window(layer), x.device)
    if config.attn_softcap:
        y = capped_attention(q, k, v, mask, config)
    else:
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if isinstance(mask, str) else mask,
            is_causal=isinstance(mask, str),
            scale=config.score_scale,
            enable_gqa=config.n_head != config.n_kv_head,
        )
    return linear(y.transpose(1, 2).reshape(B, T, -1), p, f"{name}.o_proj")


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) * x,  # a square's backward is a slow power on a CPU
}


def mlp(x: Array, p: Parameters, layer: int, config: GPTConfig) -> Array:
    """The position-wise MLP, gated or not, (B, T, D)."""
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
    cache: KVCache | None,
    dropout: Callable[[Array], Array],
) -> Array:
    """One transformer block, (B, T, D)."""
    name = f"model.layers.{layer}"
    (before_attn, after_attn), (before_mlp, after_mlp) = NORM_SITES[config.norm_placement]
    y = attention(norm(x, p, f"{name}.{before_attn}", config), p, layer, config, rope, cache)
    attended = x + scaled(dropout(norm(y, p, f"{name}.{after_attn}", config)), config.residual_scale)
    x = x if config.parallel_residual else attended
    y = mlp(norm(x, p, f"{name}.{before_mlp}", config), p, layer, config)
    return attended + scaled(dropout(norm(y, p, f"{name}.{after_mlp}", config)), config.residual_scale)


def checkpointed_block(
    x: Array, p: Parameters, layer: int, config: GPTConfig, rope: Rope, dropout: Callable[[Array], Array]
) -> Array:
    """`block` in training, keeping its input alone: the backward pass computes the rest again (Chen et al. 2016)."""
    y: Array = checkpoint(block, x, p, layer, config, rope, None, dropout, use_reentrant=False)
    return y


def embed(p: Parameters, tokens: Array, config: GPTConfig, offset: int) -> Array:
    """(B, T) token ids, whose first position is `offset` -> (B, T, D)."""
    x = scaled(rows(p, "model.embed_tokens", tokens, config.n_embd), config.embed_scale)
    if config.position == "learned":
        x = x + p["model.embed_positions.weight"][offset : offset + tokens.shape[1]]
    return norm(x, p, "model.embed_norm", config) if config.embed_norm else x


def smear(x: Array, previous: Array, p: Parameters) -> Array:
    """Each position and, by channel, a learned share of the one before it; `previous` (B, 1, D) is before the first."""
    return x + p["model.smear.weight"] * torch.cat([previous, x[:, :-1]], dim=1)


def hidden_states(
    p: Parameters,
    tokens: Array,
    config: GPTConfig,
    rope: Rope,
    cache: KVCache | None = None,
    dropout: Callable[[Array], Array] = keep_all,
    gradient_checkpointing: bool = False,
) -> Array:
    """(B, T) token ids -> (B, T, D), whose products with the head are logits; moves `cache` on by T positions.

    In training, `gradient_checkpointing` keeps each block's input alone and recomputes its inside in the backward pass.
    """
    T, offset = tokens.shape[1], cache.offset if cache else 0
    x = embed(p, tokens, config, offset)
    if config.smear:
        previous = torch.zeros_like(x[:, :1])
        if cache:
            cache.tokens[:, offset : offset + T] = tokens
            if offset:
                previous = embed(p, cache.tokens[:, offset - 1 : offset], config, offset - 1)
        x = smear(x, previous, p)
    x = dropout(x)
    for layer in range(config.n_layer):
        if gradient_checkpointing:
            x = checkpointed_block(x, p, layer, config, rope, dropout)
        else:
            x = block(x, p, layer, config, rope, cache, dropout)
    if cache:
        cache.offset += T
    return scaled(norm(x, p, "model.norm", config), 1 / config.logit_divisor)


def logits(x: Array, p: Parameters, config: GPTConfig) -> Array:
    """(B, T, D) hidden states -> (B, T, V) float32 logits."""
    head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
    return softcap(product(x, p, head).float(), config.logit_softcap)


def cross_entropy_and_dlogits(x: Array, head: Array, targets: Array, cap: float) -> tuple[Array, Array]:
    """The summed nats of (n,) targets after (n, D) hidden states, and their gradient by the logits, (n, V)."""
    scores = softcap(F.linear(x, head).float(), cap)
    counted, index = (targets >= 0)[:, None], targets.clamp_min(0)[:, None]
    log_p = torch.log_softmax(scores, dim=-1)
    nats = -(log_p.gather(-1, index) * counted).sum()
    dlogits = log_p.exp_()  # of the same memory
    dlogits.scatter_add_(-1, index, torch.full_like(index, -1.0, dtype=dlogits.dtype)).mul_(counted)
    if cap:
        dlogits *= 1 - (scores / cap).square()
    return nats, dlogits.to(x.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed nats a chunk of positions at a time, taking the gradients along the way (as Liger's kernels do).

    It never holds the logits of all positions: beside a chunk's, it keeps gradients of the size of `x` and `head`.
    """

    @staticmethod
    def forward(ctx: Any, x: Array, head: Array, targets: Array, cap: float, training: bool) -> Array:
        """(N, D) hidden states, (V, D) head and (N,) targets -> summed nats."""
        total = torch.zeros((), device=x.device)
        dx, dhead = [], torch.zeros_like(head, dtype=torch.float32) if training else None
        rows = max(1, min(LOSS_ROWS, LOSS_LOGITS // len(head)))
        for part, wanted in zip(x.split(rows), targets.split(rows), strict=True):
            nats, dlogits = cross_entropy_and_dlogits(part, head, wanted, cap)
            total += nats
            if dhead is not None:
                dx.append(dlogits @ head)
                dhead += dlogits.mT @ part
        if dhead is not None:
            ctx.save_for_backward(torch.cat(dx), dhead.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        """The gradients of `x` and `head`."""
        dx, dhead = ctx.saved_tensors
        return (cotangent * dx).to(dx.dtype), (cotangent * dhead).to(dhead.dtype), None, None, None


def chunked_cross_entropy(x: Array, p: Parameters, targets: Array, config: GPTConfig) -> Array:
    """The summed nats of (B, T) targets after (B, T, D) hidden states; a target below 0 counts nothing."""
    head = p["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    arguments = (x.flatten(0, 1), head, targets.flatten(), config.logit_softcap, torch.is_grad_enabled())
    total: Array = ChunkedCrossEntropy.apply(*arguments)
    return total


def cross_entropy(scores: Array, targets: Array) -> Array:
    """The summed nats of (B, T) targets under (B, T, V) logits; a target below 0 counts nothing."""
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
