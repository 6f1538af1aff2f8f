"""The parameter table: every tensor's canonical name, shape, initial values and optimizer group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from twingpt.core import rng
from twingpt.core.config import NORM_SITES, GPTConfig

EMBEDDING, HEAD, MATRIX, VECTOR = "embedding", "head", "matrix", "vector"

Array = np.ndarray


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model. `std` is that of its normal initial values; None fills with `fill`."""

    shape: tuple[int, ...]
    group: str
    std: float | None = None
    fill: float = 0.0

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices and embeddings, not to norms and biases."""
        return self.group != VECTOR

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


class _Table(dict[str, Parameter]):
    """Collects the rows of `parameter_table` in the order of the forward pass."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config

    def embedding(self, name: str, rows: int) -> None:
        self[f"{name}.weight"] = Parameter((rows, self.config.n_embd), EMBEDDING, std=self.config.init_std)

    def norm(self, name: str, width: int) -> None:
        """Nothing for the empty name of a norm that a placement leaves out."""
        if name.endswith("."):
            return
        self.scale(name, width)
        if self.config.norm_bias:
            self[f"{name}.bias"] = Parameter((width,), VECTOR)

    def scale(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = Parameter((width,), VECTOR, fill=0.0 if self.config.norm_offset else 1.0)

    def linear(self, name: str, n_out: int, n_in: int, bias: bool, std: float) -> None:
        self[f"{name}.weight"] = Parameter((n_out, n_in), MATRIX, std=std)
        if bias:
            self[f"{name}.bias"] = Parameter((n_out,), VECTOR)


def parameter_table(config: GPTConfig) -> dict[str, Parameter]:
    """Canonical name -> Parameter, under the names that Llama-style checkpoints use.

    Projections that write into the residual stream start smaller by sqrt(2 n_layer), as in GPT-2, or
    at zero with `zero_init`.
    """
    c, table = config, _Table(config)
    std = c.init_std
    residual_std = 0.0 if c.zero_init else std / math.sqrt(2 * c.n_layer)
    table.embedding("model.embed_tokens", c.vocab_size)
    if c.position == "learned":
        table.embedding("model.embed_positions", c.block_size)
    if c.embed_norm:
        table.norm("model.embed_norm", c.n_embd)
    if c.smear:
        table["model.smear.weight"] = Parameter((c.n_embd,), VECTOR, fill=0.1)
    (before_attn, after_attn), (before_mlp, after_mlp) = NORM_SITES[c.norm_placement]
    for i in range(c.n_layer):
        layer = f"model.layers.{i}"
        table.norm(f"{layer}.{before_attn}", c.n_embd)
        table.linear(f"{layer}.self_attn.q_proj", c.n_head * c.head_dim, c.n_embd, c.qkv_bias, std)
        table.linear(f"{layer}.self_attn.k_proj", c.n_kv_head * c.head_dim, c.n_embd, c.qkv_bias, std)
        table.linear(f"{layer}.self_attn.v_proj", c.n_kv_head * c.head_dim, c.n_embd, c.qkv_bias, std)
        if c.qk_norm:  # an RMSNorm over each head or all of them, whatever the block's norm is
            table.scale(f"{layer}.self_attn.q_norm", c.head_dim * (c.n_head if c.qk_norm_whole else 1))
            table.scale(f"{layer}.self_attn.k_norm", c.head_dim * (c.n_kv_head if c.qk_norm_whole else 1))
        out_in = (c.n_embd, c.n_head * c.head_dim)
        table.linear(f"{layer}.self_attn.o_proj", *out_in, c.attn_out_bias, residual_std)
        table.norm(f"{layer}.{after_attn}", c.n_embd)
        table.norm(f"{layer}.{before_mlp}", c.n_embd)
        if c.gated_mlp:
            table.linear(f"{layer}.mlp.gate_proj", c.n_inner, c.n_embd, c.mlp_bias, std)
        table.linear(f"{layer}.mlp.up_proj", c.n_inner, c.n_embd, c.mlp_bias, std)
        table.linear(f"{layer}.mlp.down_proj", c.n_embd, c.n_inner, c.mlp_bias, residual_std)
        table.norm(f"{layer}.{after_mlp}", c.n_embd)
    table.norm("model.norm", c.n_embd)
    if not c.tie_embeddings:
        table["lm_head.weight"] = Parameter((c.vocab_size, c.n_embd), HEAD, std=std)
    return dict(table)


def parameter_count(config: GPTConfig) -> int:
    """The number of trainable numbers in the model."""
    return sum(parameter.size for parameter in parameter_table(config).values())


def initialise(config: GPTConfig, seed: int) -> Iterator[tuple[str, Array]]:
    """Yield (name, float32 array) in table order.

    Each tensor has a Philox stream of its own, keyed by (seed, name): both backends start from the
    same bits, and adding a layer changes no other tensor.
    """
    for name, parameter in parameter_table(config).items():
        if parameter.std is None:
            yield name, np.full(parameter.shape, parameter.fill, np.float32)
        else:
            normal = rng.generator("init", seed, name).standard_normal(parameter.shape, np.float32)
            yield name, normal * np.float32(parameter.std)


@dataclass(frozen=True)
class OptimizerPlan:
    """Which parameter is stepped how: by AdamW with its group's learning rate, or by Muon.

    `adamw` maps names to groups, `decays` names those of them that weight decay applies to. `muon`
    lists batches of matrices that have one shape once the tall are turned wide, which Muon
    orthogonalises together.
    """

    adamw: dict[str, str]
    decays: frozenset[str]
    muon: tuple[tuple[str, ...], ...]


def optimizer_plan(config: GPTConfig, optimizer: str) -> OptimizerPlan:
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all."""
    table = parameter_table(config)
    matrices = [
        name for name, row in table.items() if optimizer == "muon" and row.group == MATRIX and len(row.shape) == 2
    ]
    batches: dict[tuple[int, ...], list[str]] = {}
    for name in matrices:
        batches.setdefault(tuple(sorted(table[name].shape)), []).append(name)
    adamw = {name: row.group for name, row in table.items() if name not in matrices}
    decays = frozenset(name for name in adamw if table[name].decays)
    return OptimizerPlan(adamw, decays, tuple(map(tuple, batches.values())))


def state_table(config: GPTConfig, optimizer: str, dtype: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the optimizer's float32 state: AdamW's two moments, Muon's momentum.

    In float16 also the loss scale, and how many steps it has fitted.
    """
    table, plan = parameter_table(config), optimizer_plan(config, optimizer)
    state = {f"adamw.{slot}.{name}": table[name].shape for slot in "mv" for name in plan.adamw}
    state |= {f"muon.momentum.{name}": table[name].shape for batch in plan.muon for name in batch}
    return state | ({"loss_scale": (), "loss_scale.steps": ()} if dtype == "float16" else {})
