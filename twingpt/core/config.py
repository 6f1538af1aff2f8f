"""GPTConfig and TrainConfig: what a model is and how a run trains it, frozen and validated."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from twingpt.core.errors import UserError
from twingpt.core.reading import short

POSITIONS = ("rope", "learned", "none")
NORMS = ("rmsnorm", "layernorm")
MLPS = ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2")
GATED_MLPS = ("swiglu", "geglu", "geglu_tanh")
# norm_placement -> the norms (before, after) attention, then (before, after) the MLP, by transformers' names.
# "" is none: its parameter name then ends in a dot.
NORM_SITES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "pre": (("input_layernorm", ""), ("post_attention_layernorm", "")),
    "post": (("", "post_attention_layernorm"), ("", "post_feedforward_layernorm")),
    "both": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
ROPE_SCALINGS = ("linear", "llama3", "yarn")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd", "constant")
DTYPES = ("float32", "bfloat16", "float16")
LAYER_LISTS = ("no_rope_layers", "full_attention_layers")

# The chunked loss: at most so many logits at a time (128 MB in float32) and so many positions, since the head's
# gradient of more could overflow in float16.
LOSS_LOGITS, LOSS_ROWS = 2**25, 4096

# Integers must be below this: 10^400 would raise OverflowError in any formula with a float.
LARGEST = 2**63
# More than any model has. A hostile config.json may claim millions, and whatever loops over layers would hang.
MAX_LAYERS = 4096

T = TypeVar("T")


def _fail(problem: str) -> None:
    raise UserError(problem)


def unknown_choice(what: str, value: object, choices: Iterable[str]) -> UserError:
    """The UserError for a value that is not among `choices`; it names the nearest one."""
    names = sorted(choices)
    near = difflib.get_close_matches(str(value)[:100], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}."
    return UserError(f"Unknown {what} {short(value)}: {hint}")


def _check_choice(what: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise unknown_choice(what, value, choices)


def _is_number(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "bool"
    if kind == "int":
        return isinstance(value, int)
    return kind == "float" and isinstance(value, (int, float)) and math.isfinite(value)


# A field's annotation -> what messages call its type, and whether a value is of it.
KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "int": ("of type int", lambda value: _is_number(value, "int")),
    "float": ("a finite number", lambda value: _is_number(value, "float")),
    "bool": ("of type bool", lambda value: _is_number(value, "bool")),
    "str": ("of type str", lambda value: isinstance(value, str)),
    "str | tuple[str, ...]": (
        "of type str, or a list of them",
        lambda value: (
            isinstance(value, str)
            or (isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, str) for item in value))
        ),
    ),
    "tuple[int, ...]": (
        "a list of layer numbers",
        lambda value: isinstance(value, (list, tuple)) and all(_is_number(item, "int") for item in value),
    ),
    "RopeScaling": ("a set of keys or nothing", lambda value: isinstance(value, (Mapping, RopeScaling))),
}


def check_type(name: str, annotation: str, value: object) -> None:
    """Raise UserError unless `value` is of the type that the field `name` is annotated with, one of KINDS."""
    if isinstance(value, int) and abs(value) >= LARGEST:
        _fail(f"{name} is {short(value)}, which is too large.")
    kind, optional = annotation.removesuffix(" | None"), annotation.endswith(" | None")
    what, fits = KINDS[kind]
    if not fits(value) and not (optional and value is None):
        _fail(f"{name} must be {what}, and is {short(value)}.")
    for text in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []:
        if isinstance(text, str) and text != text.encode(errors="replace").decode():  # surrogates, from a file name
            _fail(f"{name} is {short(text)}, whose bytes are not UTF-8, as config.toml needs them: rename it.")


def _check_types(config: Any) -> None:
    for field in dataclasses.fields(config):
        check_type(field.name, str(field.type), getattr(config, field.name))


def _from_dict(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown_choice(f"{what} key", key, known)
    try:
        return cls(**values)
    except TypeError as error:  # a required key is missing
        raise UserError(f"The {what} is incomplete: {error}.") from None


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling: how the frequencies are stretched beyond the context that they were trained for.

    `type` is `linear` (Chen et al. 2023), `llama3` (Llama 3.1) or `yarn` (Peng et al. 2023), each as
    transformers computes it; `original_block_size` is the context before scaling, in tokens.
    """

    type: str
    factor: float
    original_block_size: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choice("rope_scaling type", self.type, ROPE_SCALINGS)
        if self.factor < 1:
            _fail(f"rope_scaling factor must be at least 1, and is {self.factor}.")
        if self.type != "linear" and self.original_block_size < 1:
            _fail(f"rope_scaling type {self.type!r} needs original_block_size, in tokens.")
        if self.attention_factor is not None and self.attention_factor <= 0:
            _fail(f"rope_scaling attention_factor must be positive, and is {self.attention_factor}.")
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            _fail("rope_scaling high_freq_factor must be larger than low_freq_factor.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """The scaling with these fields; UserError for an unknown key, naming the nearest one."""
        return _from_dict(cls, values, "rope_scaling")


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a decoder-only transformer. Field names follow nanoGPT; lengths and windows are in tokens.

    0 derives a value: `n_kv_head` is `n_head`, `head_dim` is `n_embd / n_head`, `n_inner` (the MLP's hidden width) is
    4 x `n_embd`, or 8/3 of it rounded up to a multiple of 32 for a gated MLP, `attn_scale` is head_dim^-1/2. For caps,
    `sliding_window` and `local_rope_theta` 0 is off.

    Norms: `norm_placement` is before attention and MLP (`pre`), after them (`post`, as in OLMo 2) or `both`.
    `norm_offset` multiplies by 1 + weight (Gemma). `embed_norm` is a norm after the embedding. `qk_norm` is an RMSNorm
    of queries and keys by head, with `qk_norm_whole` over all heads together.

    Attention: `full_attention_layers` have no sliding window; the other layers rotate by `local_rope_theta`, unscaled,
    where that is given. `no_rope_layers` don't rotate.

    Residual stream: with `parallel_residual` attention and MLP read the same input (GPT-NeoX). `smear` adds to each
    position's embedding a learned share, by channel, of the one before it (modded-nanogpt). `zero_init` initialises
    the projections into the stream at 0, so that every block begins as the identity. `embed_scale` multiplies the
    embedding, `residual_scale` what blocks add; `logit_divisor` divides the logits.

    Raises UserError for an impossible value, in one sentence.
    """

    vocab_size: int
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    n_kv_head: int = 0
    head_dim: int = 0
    n_inner: int = 0
    position: str = "rope"
    no_rope_layers: tuple[int, ...] = ()
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_placement: str = "pre"
    norm_offset: bool = False
    parallel_residual: bool = False
    mlp: str = "swiglu"
    mlp_bias: bool = False
    qkv_bias: bool = False
    attn_out_bias: bool = False
    qk_norm: bool = True
    qk_norm_whole: bool = False
    tie_embeddings: bool = True
    embed_norm: bool = False
    smear: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attn_scale: float = 0.0
    attn_softcap: float = 0.0
    logit_divisor: float = 1.0
    logit_softcap: float = 0.0
    sliding_window: int = 0
    full_attention_layers: tuple[int, ...] = ()
    local_rope_theta: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.02
    zero_init: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        self._derive()
        self._validate()

    def _derive(self) -> None:
        self._check_positive("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        if self.n_layer > MAX_LAYERS:
            _fail(f"n_layer must be at most {MAX_LAYERS}, and is {self.n_layer}.")
        if self.block_size < 2:
            _fail("block_size must be at least 2: a token and the next one.")
        if not self.n_kv_head:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if not self.head_dim:
            if self.n_embd % self.n_head:
                _fail(
                    f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                    "change one of them, or give head_dim."
                )
            object.__setattr__(self, "head_dim", self.n_embd // self.n_head)
        if not self.n_inner:
            wide = -(-8 * self.n_embd // (3 * 32)) * 32 if self.gated_mlp else 4 * self.n_embd
            object.__setattr__(self, "n_inner", wide)
        for name in LAYER_LISTS:
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))

    def _validate(self) -> None:
        self._check_positive("n_kv_head", "head_dim", "n_inner", "norm_eps", "rope_theta", "init_std")
        self._check_positive("embed_scale", "residual_scale", "logit_divisor")
        for name in ("attn_scale", "attn_softcap", "logit_softcap", "sliding_window", "local_rope_theta"):
            if getattr(self, name) < 0:
                _fail(f"{name} must be at least 0 (0 turns it off), and is {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            _fail(f"dropout must be in [0, 1), and is {self.dropout}.")
        if self.n_head % self.n_kv_head:
            _fail(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}.")
        _check_choice("position", self.position, POSITIONS)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("mlp", self.mlp, MLPS)
        _check_choice("norm_placement", self.norm_placement, NORM_SITES)
        if self.norm == "rmsnorm" and self.norm_bias:
            _fail("norm_bias needs norm='layernorm': an RMSNorm has no bias.")
        if self.qk_norm_whole and not self.qk_norm:
            _fail("qk_norm_whole needs qk_norm.")
        if not self.sliding_window and (self.full_attention_layers or self.local_rope_theta):
            _fail("full_attention_layers and local_rope_theta need a sliding_window.")
        self._validate_positions()

    def _validate_positions(self) -> None:
        if self.position == "rope":
            self._validate_rope()
        elif self.no_rope_layers or self.rope_scaling or self.local_rope_theta:
            _fail(f"no_rope_layers, rope_scaling and local_rope_theta need position='rope', not {self.position!r}.")
        for name in LAYER_LISTS:
            layers = getattr(self, name)
            if layers and not 0 <= layers[0] <= layers[-1] < self.n_layer:
                _fail(f"{name} must be layers 0 to {self.n_layer - 1}, and is {short(layers)}.")

    def _validate_rope(self) -> None:
        if not 0 < self.rope_fraction <= 1:
            _fail(f"rope_fraction must be in (0, 1], and is {self.rope_fraction}.")
        if self.rope_dim % 2 or self.rope_dim < 2:
            _fail(
                f"RoPE rotates pairs, so head_dim x rope_fraction must be even and at least 2, and is {self.rope_dim}."
            )

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                _fail(f"{name} must be positive, and is {getattr(self, name)}.")

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP is a gated linear unit (SwiGLU, GeGLU; Shazeer 2020)."""
        return self.mlp in GATED_MLPS

    @property
    def rope_dim(self) -> int:
        """The leading dimensions of each head that RoPE rotates."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def score_scale(self) -> float:
        """The scale of attention's scores q k^T."""
        return self.attn_scale or self.head_dim**-0.5

    def uses_rope(self, layer: int) -> bool:
        """Whether layer `layer` has RoPE."""
        return self.position == "rope" and layer not in self.no_rope_layers

    def window(self, layer: int) -> int:
        """The sliding window of layer `layer`: the tokens it attends to, itself included; 0 is all."""
        return 0 if layer in self.full_attention_layers else self.sliding_window

    def is_local(self, layer: int) -> bool:
        """Whether layer `layer` rotates by `local_rope_theta`."""
        return self.local_rope_theta > 0 and self.window(layer) > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, which `from_dict` takes back."""
        return dataclasses.asdict(self) | {name: list(getattr(self, name)) for name in LAYER_LISTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """The inverse of `to_dict`; UserError for an unknown key, naming the nearest one."""
        return _from_dict(cls, values, "model configuration")


def _one_or_several(data: str | Iterable[str]) -> str | tuple[str, ...]:
    """A list of one source as a string, as runs without a mixture have it."""
    several = (data,) if isinstance(data, str) else tuple(data)
    return several[0] if len(several) == 1 else several


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains: data, optimizer, schedule, evaluation and checkpoints. Names follow nanoGPT.

    A step is `gradient_accumulation_steps` micro-batches of `batch_size` windows of the model's `block_size` tokens.
    Intervals are in steps; 0 is off. `eval_iters` is in batches of each source's fixed validation windows, 0 for the
    whole split. The latest `keep` checkpoints stay. `data` is one source, or several as SOURCE:WEIGHT;
    `val_data` is a source that is held out instead of a tenth of it, or another share.

    The optimizer `muon` steps the blocks' matrices by Muon, with `matrix_lr` and `momentum`, which warms up from 0.85,
    and the rest by AdamW. `embedding_lr` and `head_lr` replace `learning_rate` for those two groups. All learning
    rates follow one `lr_schedule`, down to the share `min_lr / learning_rate`; `wsd` holds them until the last
    `warmdown_fraction` of the run. With `decay_weight_decay`, `weight_decay` falls linearly to 0.

    `gradient_checkpointing` keeps each block's input alone and recomputes its inside in the backward pass.
    `skip_nonfinite` skips a step whose loss or gradient is not finite, where the run would stop.
    """

    data: str | tuple[str, ...] = "python-docs"
    val_data: str | None = None
    tokenizer: str = "bpe"
    vocab_size: int = 2048
    seed: int = 1337
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    skip_nonfinite: bool = False
    batch_size: int = 12
    gradient_accumulation_steps: int = 1
    max_iters: int = 2000
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    min_lr: float = 1e-4
    matrix_lr: float = 0.02
    embedding_lr: float | None = None
    head_lr: float | None = None
    warmup_iters: int = 100
    lr_schedule: str = "cosine"
    warmdown_fraction: float = 0.5
    weight_decay: float = 0.1
    decay_weight_decay: bool = False
    momentum: float = 0.95
    momentum_warmup_iters: int = 300
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip: float = 1.0
    eval_interval: int = 250
    eval_iters: int = 0
    log_interval: int = 10
    sample_interval: int = 500
    checkpoint_interval: int = 250
    keep: int = 2

    def __post_init__(self) -> None:
        _check_types(self)
        object.__setattr__(self, "data", _one_or_several(self.data))
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("lr_schedule", self.lr_schedule, SCHEDULES)
        _check_choice("dtype", self.dtype, DTYPES)
        for name in ("batch_size", "gradient_accumulation_steps", "max_iters", "log_interval", "keep"):
            if getattr(self, name) < 1:
                _fail(f"{name} must be at least 1, and is {getattr(self, name)}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value < 0:
                _fail(f"{field.name} must be at least 0, and is {value}.")
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) >= 1:
                _fail(f"{name} must be below 1, and is {getattr(self, name)}.")
        if self.warmdown_fraction > 1:
            _fail(f"warmdown_fraction must be at most 1, and is {self.warmdown_fraction}.")
        if self.adam_eps == 0:
            _fail("adam_eps must be positive.")
        if self.min_lr > self.learning_rate:
            _fail(f"min_lr {self.min_lr} is larger than learning_rate {self.learning_rate}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, which `from_dict` takes back."""
        return dataclasses.asdict(self) | {"data": self.data if isinstance(self.data, str) else list(self.data)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; UserError for an unknown key, naming the nearest one."""
        return _from_dict(cls, values, "training configuration")
