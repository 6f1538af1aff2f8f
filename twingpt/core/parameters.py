"""The parameter table: every tensor's canonical name, shape, initialisation and optimizer group."""

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
    """A row of the table: a tensor's shape, optimizer group, and initial values, normal of `std` or else all `fill`."""

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
        """The number of elements."""
        return math.prod(self.shape)


class _Table(dict[str, Parameter]):
    """Builds `parameter_table`: each method adds the parameters of a layer of its kind."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config

    def embedding(self, name: str, rows: int) -> None:
        self[f"{name}.weight"] = Parameter((rows, self.config.n_embd), EMBEDDING, std=self.config.init_std)

    def norm(self, name: str, width: int) -> None:
        """Nothing for a name that ends in a dot: `norm_placement` has no norm there."""
        if name.endswith("."):
            return
        self.scale(name, width)
        if self.config.norm_bias:
            self[f"{name}.bias"] = Parameter((width,), VECTOR)

    def scale(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = Parameter((width,), VECTOR, fill=0.0 if self.config.norm_offset else 1.0)

    def linear(self, name: str, n_out: int, n_in: int, std: float, *, bias: bool) -> None:
        self[f"{name}.weight"] = Parameter((n_out, n_in), MATRIX, std=std)
        if bias:
            self[f"{name}.bias"] = Parameter((n_out,), VECTOR)


def parameter_table(config: GPTConfig) -> dict[str, Parameter]:
    """Canonical name (Llama-style, as transformers has them) -> Parameter, in the order of the forward pass.

    Projections into the residual stream are initialised with std / sqrt(2 n_layer), as in GPT-2, or at 0 with
    `zero_init`.
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
        table.linear(f"{layer}.self_attn.q_proj", c.n_head * c.head_dim, c.n_embd, std, bias=c.qkv_bias)
        table.linear(f"{layer}.self_attn.k_proj", c.n_kv_head * c.head_dim, c.n_embd, std, bias=c.qkv_bias)
        table.linear(f"{layer}.self_attn.v_proj", c.n_kv_head * c.head_dim, c.n_embd, std, bias=c.qkv_bias)
        if c.qk_norm:  # an RMSNorm over each head or all of them, whatever the block's norm is
            table.scale(f"{layer}.self_attn.q_norm", c.head_dim * (c.n_head if c.qk_norm_whole else 1))
            table.scale(f"{layer}.self_attn.k_norm", c.head_dim * (c.n_kv_head if c.qk_norm_whole else 1))
        out_in = (c.n_embd, c.n_head * c.head_dim)
        table.linear(f"{layer}.self_attn.o_proj", *out_in, residual_std, bias=c.attn_out_bias)
        table.norm(f"{layer}.{after_attn}", c.n_embd)
        table.norm(f"{layer}.{before_mlp}", c.n_embd)
        if c.gated_mlp:
            table.linear(f"{layer}.mlp.gate_proj", c.n_inner, c.n_embd, std, bias=c.mlp_bias)
        table.linear(f"{layer}.mlp.up_proj", c.n_inner, c.n_embd, std, bias=c.mlp_bias)
        table.linear(f"{layer}.mlp.down_proj", c.n_embd, c.n_inner, residual_std, bias=c.mlp_bias)
        table.norm(f"{layer}.{after_mlp}", c.n_embd)
    table.norm("model.norm", c.n_embd)
    if not c.tie_embeddings:
        table["lm_head.weight"] = Parameter((c.vocab_size, c.n_embd), HEAD, std=std)
    return dict(table)


def parameter_count(config: GPTConfig) -> int:
    """The number of parameters of the model; tied embeddings count once."""
    return sum(parameter.size for parameter in parameter_table(config).values())


def initialise(config: GPTConfig, seed: int) -> Iterator[tuple[str, Array]]:
    """Initial parameters: (name, float32 array) in table order.

    Each tensor has a Philox stream of its own, keyed by (seed, name): both backends start from the same bits, and
    another layer changes no other tensor.
    """
    for name, parameter in parameter_table(config).items():
        if parameter.std is None:
            yield name, np.full(parameter.shape, parameter.fill, np.float32)
        else:
            normal = rng.generator("init", seed, name).standard_normal(parameter.shape, np.float32)
            yield name, normal * np.float32(parameter.std)


@dataclass(frozen=True)
class OptimizerPlan:
    """Parameter groups: which parameters AdamW steps, at which group's learning rate, and which Muon.

    `adamw` maps names to groups, `decays` are those of them with weight decay. `muon` has batches of matrices of one
    shape up to transposition, which are orthogonalised as one stack.
    """

    adamw: dict[str, str]
    decays: frozenset[str]
    muon: tuple[tuple[str, ...], ...]


def optimizer_plan(config: GPTConfig, optimizer: str) -> OptimizerPlan:
    """The groups for `optimizer`: `muon` is Muon for the matrices of the blocks and AdamW for the rest."""
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
    """Canonical name -> shape of the float32 optimizer state: adamw.m.NAME, adamw.v.NAME, muon.momentum.NAME.

    In float16 also `loss_scale`, and `loss_scale.steps` since it last changed.
    """
    table, plan = parameter_table(config), optimizer_plan(config, optimizer)
    state = {f"adamw.{slot}.{name}": table[name].shape for slot in "mv" for name in plan.adamw}
    state |= {f"muon.momentum.{name}": table[name].shape for batch in plan.muon for name in batch}
    return state | ({"loss_scale": (), "loss_scale.steps": ()} if dtype == "float16" else {})
