"""The model in PyTorch: the twin of `backends/mlx/model.py`, tested against `core/reference.py`.

Pure functions over a flat dict of parameters under their canonical names (`core/parameters.py`), quantized
ones beside plain ones. Shapes: B batch, T time, D n_embd, H heads, K key-value heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from twingpt.backends.torch.kv_cache import CacheSlots
from twingpt.backends.torch.quantized import dequantized_rows, is_quantized, matrix_dtype, quantized_matmul
from twingpt.core.backend import LogProbs
from twingpt.core.config import LOSS_LOGITS, LOSS_ROWS, NORM_SITES, GPTConfig
from twingpt.core.dropout import GOLDEN, MIX, threshold
from twingpt.core.rope import rope_frequencies

Array = Tensor
Parameters = dict[str, Tensor]

EMBEDDINGS = ("model.embed_tokens.weight", "model.embed_positions.weight")


class Rope:
    """Rotary position embedding (RoPE) with its tables: cos and signed sin, (length, rope_dim) float32.

    They begin with `length` positions (0 for block_size) and grow with the positions asked for.
    `tables[True]` is for the layers that rotate by `local_rope_theta`.
    """

    def __init__(self, config: GPTConfig, device: torch.device, length: int = 0) -> None:
        self.config, self.device = config, device
        self.length, self.tables = 0, dict[bool, tuple[Array, Array]]()
        self.extending = threading.Lock()  # threads may decode by the tables of before, and never by shorter ones
        self.extend(length or config.block_size)

    def extend(self, length: int) -> None:
        """Have tables for `length` positions, at most block_size; more than that many, so that it happens seldom."""
        if length <= self.length:
            return
        with self.extending:
            length = max(self.length, min(max(length, 2 * self.length), self.config.block_size))
            kinds = (False, True)[: 1 + (self.config.local_rope_theta > 0)]
            self.tables = {local: self.table(length, local=local) for local in kinds}
            self.length = length

    def table(self, length: int, *, local: bool) -> tuple[Array, Array]:
        """cos and signed sin of every position: sin is negated in the first half, for the roll of `__call__`."""
        frequencies, factor = rope_frequencies(self.config, local=local)
        angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
        # cos and sin of the float32 angle, in float64 on the host: a device's own may be off in the last bits.
        cos, sin = (f(angles, dtype=np.float64) * factor for f in (np.cos, np.sin))
        pairs = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        cos, sin = (torch.from_numpy(pair.astype(np.float32)).to(self.device) for pair in pairs)
        return cos, sin

    def __call__(self, x: Array, offset: int | Array, *, local: bool) -> Array:
        """Rotate (B, H, T, d) at the T positions of each row from `offset` on."""
        index = positions(offset, x.shape[2])
        cos, sin = (table[index].unsqueeze(-3) for table in self.tables[local])  # the same for every head
        dim, x32 = self.config.rope_dim, x.float()
        rotary, rest = x32[..., :dim], x32[..., dim:]
        y = rotary * cos + rotary.roll(dim // 2, -1) * sin  # the roll swaps the halves
        return (torch.cat([y, rest], dim=-1) if rest.shape[-1] else y).to(x.dtype)


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


def matmul(x: Array, p: Parameters, name: str) -> Array:
    """x W^T for the matrix `name`, (…, in) -> (…, out); by the quantized kernel where it is quantized."""
    return quantized_matmul(x, p, name) if is_quantized(p, name) else F.linear(x, p[f"{name}.weight"])


def linear(x: Array, p: Parameters, name: str) -> Array:
    """x W^T + b, (…, in) -> (…, out); without b where there is no parameter `name`.bias."""
    bias = p.get(f"{name}.bias")
    if bias is None:
        return matmul(x, p, name)
    if is_quantized(p, name):
        return matmul(x, p, name) + bias
    return F.linear(x, p[f"{name}.weight"], bias.to(x.dtype))


def embedding_lookup(p: Parameters, name: str, index: Array, width: int) -> Array:
    """Rows of the embedding `name`, dequantized where it is quantized: (…) ids -> (…, width)."""
    return dequantized_rows(p, name, index, width) if is_quantized(p, name) else F.embedding(index, p[f"{name}.weight"])


def rms_norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """RMSNorm over the last axis, in float32; the result in x's dtype."""
    weight, eps, x32 = norm_weight(p[f"{name}.weight"], config).float(), config.norm_eps, x.float()
    if x.is_cpu:  # F.rms_norm is a chain of slow pow there
        mean_square = torch.linalg.vecdot(x32, x32).unsqueeze(-1) / x.shape[-1]
        return (x32 * torch.rsqrt(mean_square + eps) * weight).to(x.dtype)
    return F.rms_norm(x32, weight.shape, weight, eps).to(x.dtype)


def layer_norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """LayerNorm over the last axis, in float32; the result in x's dtype."""
    weight, bias, eps = norm_weight(p[f"{name}.weight"], config).float(), p.get(f"{name}.bias"), config.norm_eps
    shift = None if bias is None else bias.float()
    return F.layer_norm(x.float(), weight.shape, weight, shift, eps).to(x.dtype)


def norm_weight(weight: Array, config: GPTConfig) -> Array:
    """What a norm multiplies by: its weight, or with `norm_offset` (Gemma) 1 + weight in float32."""
    return weight.float() + 1 if config.norm_offset else weight


def norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """RMSNorm or LayerNorm as `config.norm` says, (B, T, D).

    x itself for a name that ends in a dot: `norm_placement` has no norm there (NORM_SITES).
    """
    if name.endswith("."):
        return x
    return (rms_norm if config.norm == "rmsnorm" else layer_norm)(x, p, name, config)


def scale(x: Array, factor: float) -> Array:
    """x * factor; x itself, without a pass over memory, where the factor is 1."""
    return x if factor == 1 else x * factor


def softcap(x: Array, cap: float) -> Array:
    """Softcap: cap * tanh(x / cap); x itself where `cap` is 0."""
    return cap * torch.tanh(x / cap) if cap else x


def positions(offset: int | Array, n: int) -> slice | Array:
    """The positions of `n` tokens a row, as an index: a slice for an `offset` that all rows have, (B, n) for a (B,)."""
    if isinstance(offset, int):
        return slice(offset, offset + n)
    return offset[:, None] + torch.arange(n, device=offset.device)


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


def softcapped_attention(q: Array, k: Array, v: Array, mask: str | Array | None, config: GPTConfig) -> Array:
    """Attention with softcapped scores, (B, H, T, d), unfused since no kernel has it; scores and softmax in float32."""
    B, H, T, d = q.shape
    q = q.reshape(B, config.n_kv_head, -1, T, d)
    scores = softcap((q @ k[:, :, None].mT).float() * config.score_scale, config.attn_softcap)
    if isinstance(mask, str):
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None, :, :], -torch.inf)
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v[:, :, None]).reshape(B, H, T, d)


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
    if window not in masks:
        first = cache.start(window) if cache else 0  # the first key's position
        masks[window] = attention_mask(offset - first, T, k.shape[2], window, x.device)
    mask = masks[window]
    if config.attn_softcap:
        y = softcapped_attention(q, k, v, mask, config)
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
