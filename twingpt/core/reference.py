"""The reference model in NumPy float64: the executable spec that both twins are tested against.

`backends/mlx/model.py` and `backends/torch/model.py` follow it function by function. Shapes: B batch, T time,
D n_embd, H heads, K key-value heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from twingpt.core.config import NORM_SITES, GPTConfig
from twingpt.core.rope import rope_frequencies

Array = np.ndarray
Parameters = Mapping[str, Array]
KVStore = Callable[[int, Array, Array], tuple[Array, Array]]  # a layer's keys, values (B, K, T, d) -> as cached


def linear(x: Array, p: Parameters, name: str) -> Array:
    """x W^T + b, (…, in) -> (…, out); without b where there is no parameter `name`.bias."""
    y: Array = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm (Zhang & Sennrich 2019) over the last axis: x / sqrt(mean(x^2) + eps) * weight."""
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight)


def norm_weight(p: Parameters, name: str, config: GPTConfig) -> Array:
    """The weight that a norm multiplies by: 1 + weight with `norm_offset` (Gemma)."""
    return p[f"{name}.weight"] + 1 if config.norm_offset else p[f"{name}.weight"]


def norm(x: Array, p: Parameters, name: str, config: GPTConfig) -> Array:
    """RMSNorm or LayerNorm as `config.norm` says, (B, T, D).

    x itself for a name that ends in a dot: `norm_placement` has no norm there (NORM_SITES).
    """
    if name.endswith("."):
        return x
    weight = norm_weight(p, name, config)
    if config.norm == "rmsnorm":
        return rms_norm(x, weight, config.norm_eps)
    centred = x - x.mean(-1, keepdims=True)
    y: Array = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + config.norm_eps) * weight
    return y + p[f"{name}.bias"] if config.norm_bias else y


def rope(x: Array, config: GPTConfig, *, local: bool = False) -> Array:
    """RoPE on (B, H, T, d): rotate pairs by +position x frequency; a pair is (i, i + rope_dim / 2), the half-split."""
    frequencies, factor = rope_frequencies(config, local=local)
    positions = np.arange(x.shape[2], dtype=np.float32)
    angles = (positions[:, None] * frequencies).astype(np.float64)  # a float32 product, as on the devices
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    half = config.rope_dim // 2
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


def softcap(x: Array, cap: float) -> Array:
    """Softcap: cap * tanh(x / cap); x itself where `cap` is 0."""
    return cap * np.tanh(x / cap) if cap else x


def softmax(x: Array) -> Array:
    """Softmax over the last axis: exp(x) / sum(exp(x))."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def attention_mask(n_query: int, n_key: int, window: int) -> Array:
    """The causal mask, (n_query, n_key) booleans: key <= query, and query - key < window where that is not 0.

    The queries stand at the last of the keys' positions.
    """
    query = np.arange(n_key - n_query, n_key)[:, None]
    key = np.arange(n_key)
    mask = key <= query
    return mask & (query - key < window) if window else mask


def attention(x: Array, p: Parameters, layer: int, config: GPTConfig, kv_store: KVStore | None) -> Array:
    """Grouped-query causal self-attention (Ainslie et al. 2023), (B, T, D) -> (B, T, D)."""
    name, (B, T, _) = f"model.layers.{layer}.self_attn", x.shape

    def project(letter: str) -> Array:  # (B, H or K, T, d)
        y = linear(x, p, f"{name}.{letter}_proj")
        if config.qk_norm and letter != "v":
            y = y if config.qk_norm_whole else y.reshape(B, T, -1, config.head_dim)
            y = rms_norm(y, norm_weight(p, f"{name}.{letter}_norm", config), config.norm_eps)
        return np.asarray(y.reshape(B, T, -1, config.head_dim).swapaxes(1, 2))

    q, k, v = project("q"), project("k"), project("v")
    if config.uses_rope(layer):
        local = config.is_local(layer)
        q, k = rope(q, config, local=local), rope(k, config, local=local)
    if kv_store:
        k, v = kv_store(layer, k, v)
    group = config.n_head // config.n_kv_head  # query heads that share one key-value head
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scores = softcap(q @ k.swapaxes(-1, -2) * config.score_scale, config.attn_softcap)
    scores = np.where(attention_mask(T, T, config.window(layer)), scores, -np.inf)
    y = (softmax(scores) @ v).swapaxes(1, 2).reshape(B, T, -1)
    return linear(y, p, f"{name}.o_proj")


def activation(x: Array, mlp: str) -> Array:
    """The nonlinearity of each of MLPS, elementwise."""
    if mlp == "swiglu":
        y: Array = x / (1 + np.exp(-x))
    elif mlp == "relu2":
        y = np.maximum(x, 0) ** 2
    elif mlp in ("gelu_tanh", "geglu_tanh"):
        y = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:  # gelu, geglu
        y = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return y


def mlp(x: Array, p: Parameters, layer: int, config: GPTConfig) -> Array:
    """The MLP, gated or not, (B, T, D) -> (B, T, D)."""
    name, kind = f"model.layers.{layer}.mlp", config.mlp
    up = linear(x, p, f"{name}.up_proj")
    hidden = activation(linear(x, p, f"{name}.gate_proj"), kind) * up if config.gated_mlp else activation(up, kind)
    return linear(hidden, p, f"{name}.down_proj")


def smear(x: Array, p: Parameters) -> Array:
    """x[t] + weight * x[t - 1] by channel (modded-nanogpt), (B, T, D); x[-1] is 0."""
    return np.asarray(x + p["model.smear.weight"] * np.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))))


def block(x: Array, p: Parameters, layer: int, config: GPTConfig, kv_store: KVStore | None) -> Array:
    """Transformer block: attention and MLP, each added to the residual stream, (B, T, D) -> (B, T, D)."""
    name = f"model.layers.{layer}"
    (before_attn, after_attn), (before_mlp, after_mlp) = NORM_SITES[config.norm_placement]
    y = attention(norm(x, p, f"{name}.{before_attn}", config), p, layer, config, kv_store)
    attended = x + norm(y, p, f"{name}.{after_attn}", config) * config.residual_scale
    x = x if config.parallel_residual else attended
    y = mlp(norm(x, p, f"{name}.{before_mlp}", config), p, layer, config)
    return attended + norm(y, p, f"{name}.{after_mlp}", config) * config.residual_scale


def forward(params: Parameters, tokens: Array, config: GPTConfig, kv_store: KVStore | None = None) -> Array:
    """The whole model: (B, T) token ids -> (B, T, V) float64 logits; attention sees what `kv_store` gives."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = p["model.embed_tokens.weight"][tokens] * config.embed_scale
    if config.position == "learned":
        x = x + p["model.embed_positions.weight"][: tokens.shape[1]]
    if config.embed_norm:
        x = norm(x, p, "model.embed_norm", config)
    if config.smear:
        x = smear(x, p)
    for layer in range(config.n_layer):
        x = block(x, p, layer, config, kv_store)
    x = norm(x, p, "model.norm", config) / config.logit_divisor
    head = p["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    return softcap(x @ head.T, config.logit_softcap)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Cross-entropy of (B, T, V) logits in nats, (B, T); a target below 0 is padding, and its loss is 0."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(shifted).sum(-1))
    picked = np.take_along_axis(shifted, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return np.where(targets >= 0, log_z - picked, 0.0)
