"""GPTConfig and TrainConfig: what a model is and how a run trains it, frozen and validated."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

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
    """The UserError for a value that is not among `choices`: it names the nearest, or all if few and none is near."""
    names, text = sorted(choices), str(value)[:100]
    if near := difflib.get_close_matches(text, names, n=1, cutoff=0.5):
        hint = f"did you mean {near[0]!r}?"
    elif len(names) <= 12:
        hint = f"choose from {', '.join(names)}."
    else:
        hint = f"the nearest of {len(names)} is {difflib.get_close_matches(text, names, n=1, cutoff=0.0)[0]!r}."
    return UserError(f"Unknown {what} {short(value)}: {hint}")


@dataclass(frozen=True)
class Setting:
    """What a field of a configuration is: flags, TOML, --set, --help and docs/settings.md all come from this.

    `hint` is its type, by get_type_hints. `flag` is whether it has one, or the names of a switch. `derived` says what
    an absent value becomes, where that is not `default`.
    """

    name: str
    hint: Any
    default: Any
    help: str
    flag: bool | str
    unit: str
    choices: tuple[str, ...]
    derived: str
    examples: tuple[str, ...]

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return NoneType in get_args(self.hint)

    @property
    def sentence(self) -> str:
        """The help, with the choices."""
        *most, last = self.choices or ("",)
        return f"{self.help}: {', '.join(most)} or {last}." if most else f"{self.help}."


def setting(
    default: Any,
    help: str,
    *,
    flag: bool | str = True,
    unit: str = "",
    choices: Iterable[str] = (),
    derived: str = "",
    examples: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is described (see Setting), required if its default is MISSING."""
    about = {"help": help, "flag": flag, "unit": unit, "choices": tuple(choices), "derived": derived}
    return dataclasses.field(default=default, metadata=about | {"examples": examples})


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The fields of a dataclass of settings, by name."""
    hints = get_type_hints(cls)
    return {
        field.name: Setting(field.name, hints[field.name], field.default, **field.metadata)
        for field in dataclasses.fields(cls)
    }


def without_none(hint: Any) -> Any:
    """X of the type X | None, or the type itself."""
    kinds = get_args(hint)
    return next(kind for kind in kinds if kind is not NoneType) if NoneType in kinds else hint


def coerce(name: str, hint: Any, value: object) -> Any:
    """A value from a constructor, JSON, TOML or a flag, made what the type `hint` (one of KINDS, or None) says.

    A list becomes a tuple, a mapping the dataclass that it describes, an int a float. Raises UserError, which calls it
    `name`, for a value of another type, an integer that is too large, and text that is not Unicode.
    """
    if isinstance(value, int) and abs(value) >= LARGEST:
        _fail(f"{name} is {short(value)}, which is too large.")
    if value is None and NoneType in get_args(hint):
        return None
    what, fits, convert = KINDS[without_none(hint)]
    if not fits(value):
        _fail(f"{name} must be {what}, and is {short(value)}.")
    for text in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []:
        if isinstance(text, str) and text != text.encode(errors="replace").decode():  # surrogates, from a file name
            _fail(f"{name} is {short(text)}, whose bytes are not UTF-8, as config.toml needs them: rename it.")
    return convert(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(fits: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(fits, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _coerce_fields(config: Any, within: str = "") -> None:
    """Coerce each field to its type and check its choices; an int in a float's place stays as it is written."""
    for name, about in settings_of(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        typed = coerce(within + name, about.hint, value)
        if about.choices and typed not in about.choices:
            raise unknown_choice(within + name, typed, about.choices)
        if typed != value:
            object.__setattr__(config, name, typed)


def _from_dict(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    known = settings_of(cls)  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown_choice(f"{what} key", key, known)
    if lacking := [name for name, about in known.items() if about.default is MISSING and name not in values]:
        _fail(f"The {what} is incomplete: it lacks {' and '.join(lacking)}.")
    return cls(**values)


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling: how the frequencies are stretched beyond the context that they were trained for.

    `type` is `linear` (Chen et al. 2023), `llama3` (Llama 3.1) or `yarn` (Peng et al. 2023), each as
    transformers computes it.
    """

    type: str = setting(MISSING, "How frequencies are stretched", choices=ROPE_SCALINGS)
    factor: float = setting(MISSING, "The new context by the old one, at least 1")
    original_block_size: int = setting(0, "Context before scaling; llama3 and yarn need it", unit="tokens")
    low_freq_factor: float = setting(1.0, "llama3: slower frequencies are divided by factor")
    high_freq_factor: float = setting(4.0, "llama3: faster frequencies stay")
    beta_fast: float = setting(32.0, "yarn: frequencies of more rotations in the old context stay")
    beta_slow: float = setting(1.0, "yarn: frequencies of fewer rotations are divided by factor")
    attention_factor: float | None = setting(None, "yarn: scale of cosines and sines", derived="0.1 ln factor + 1")

    def __post_init__(self) -> None:
        _coerce_fields(self, "rope_scaling ")
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


# A field's type -> what messages call it, whether a value can be of it, and the value made so.
KINDS: dict[Any, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    int: ("of type int", _is_integer, int),
    float: ("a finite number", _is_number, float),
    bool: ("of type bool", lambda value: isinstance(value, bool), bool),
    str: ("of type str", _is_text, str),
    str | tuple[str, ...]: (
        "of type str, or a list of them",
        lambda value: _is_text(value) or (bool(value) and _are(_is_text, value)),
        lambda value: value if _is_text(value) else tuple(value) if len(value) > 1 else value[0],
    ),
    tuple[int, ...]: ("a list of layer numbers", functools.partial(_are, _is_integer), tuple),
    RopeScaling: (
        "a set of keys or nothing",
        lambda value: isinstance(value, (Mapping, RopeScaling)),
        lambda value: value if isinstance(value, RopeScaling) else RopeScaling.from_dict(value),
    ),
}


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a decoder-only transformer. Field names follow nanoGPT.

    Raises UserError for an impossible value, in one sentence.
    """

    vocab_size: int = setting(MISSING, "Ids of the vocabulary: the tokenizer's", flag=False)
    block_size: int = setting(256, "Context length", unit="tokens", derived="the preset's")
    n_layer: int = setting(4, "Blocks", derived="the preset's")
    n_head: int = setting(4, "Query heads", derived="the preset's")
    n_embd: int = setting(256, "Width", derived="the preset's")
    n_kv_head: int = setting(0, "Key-value heads; divides n_head", derived="the preset's, or n_head")
    head_dim: int = setting(0, "Width of a head", flag=False, derived="n_embd / n_head")
    n_inner: int = setting(
        0,
        "Hidden width of the MLP",
        flag=False,
        derived="4 x n_embd, or 8/3 of it rounded up to a multiple of 32 for a gated MLP",
    )
    position: str = setting("rope", "Position encoding", flag=False, choices=POSITIONS)
    no_rope_layers: tuple[int, ...] = setting((), "Layers that don't rotate", flag=False, examples=("[3, 7]",))
    rope_theta: float = setting(10000.0, "Base of the rotary frequencies", flag=False)
    rope_fraction: float = setting(1.0, "Share of a head that rotates, its leading dimensions", flag=False)
    rope_scaling: RopeScaling | None = setting(
        None,
        "Frequencies stretched beyond the context that they were trained for",
        flag=False,
        examples=('{type="yarn", factor=4, original_block_size=2048}',),
    )
    norm: str = setting("rmsnorm", "Normalization", flag=False, choices=NORMS)
    norm_eps: float = setting(1e-6, "Added to a norm's variance or mean square", flag=False)
    norm_bias: bool = setting(False, "Biases in layernorms", flag=False)
    norm_placement: str = setting(
        "pre", "Norms before attention and MLP, after them (OLMo 2), or both", flag=False, choices=NORM_SITES
    )
    norm_offset: bool = setting(False, "Norms multiply by 1 + weight (Gemma)", flag=False)
    parallel_residual: bool = setting(False, "Attention and MLP read the same input (GPT-NeoX)", flag=False)
    mlp: str = setting("swiglu", "Activation of the MLP, gated if it is a GLU", flag=False, choices=MLPS)
    mlp_bias: bool = setting(False, "Biases in the MLP", flag=False)
    qkv_bias: bool = setting(False, "Biases of queries, keys and values", flag=False)
    attn_out_bias: bool = setting(False, "Bias of attention's output projection", flag=False)
    qk_norm: bool = setting(True, "RMSNorm of queries and keys, by head", flag=False)
    qk_norm_whole: bool = setting(False, "qk_norm over all heads together", flag=False)
    tie_embeddings: bool = setting(True, "The head is the embedding", flag=False)
    embed_norm: bool = setting(False, "A norm after the embedding", flag=False)
    smear: bool = setting(
        False, "Each embedding gets a learned share, by channel, of the one before it (modded-nanogpt)", flag=False
    )
    embed_scale: float = setting(1.0, "Factor of the embedding", flag=False)
    residual_scale: float = setting(1.0, "Factor of what a block adds to the residual stream", flag=False)
    attn_scale: float = setting(0.0, "Factor of attention's scores", flag=False, derived="head_dim^-1/2")
    attn_softcap: float = setting(0.0, "Cap c of attention's scores, c tanh(x/c); 0 is off", flag=False)
    logit_divisor: float = setting(1.0, "Divisor of the logits", flag=False)
    logit_softcap: float = setting(0.0, "Cap c of the logits, c tanh(x/c); 0 is off", flag=False)
    sliding_window: int = setting(0, "What a position attends to, itself included; 0 is all", flag=False, unit="tokens")
    full_attention_layers: tuple[int, ...] = setting(
        (), "Layers without the sliding window", flag=False, examples=("[5, 11]",)
    )
    local_rope_theta: float = setting(
        0.0, "rope_theta of the layers with a sliding window, unscaled; 0 is as in the others", flag=False
    )
    dropout: float = setting(0.0, "Dropout of the embedding and of each branch", derived="the recipe's")
    init_std: float = setting(0.02, "Standard deviation of initial weights", flag=False)
    zero_init: bool = setting(
        False, "Projections into the residual stream begin at 0, each block as the identity", flag=False
    )

    def __post_init__(self) -> None:
        _coerce_fields(self)
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


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains: data, optimizer, schedule, evaluation and checkpoints. Field names follow nanoGPT.

    A step is `gradient_accumulation_steps` micro-batches of `batch_size` windows of the model's `block_size` tokens.
    Muon steps the blocks' matrices, AdamW the rest. All learning rates follow one `lr_schedule`, down to the share
    `min_lr / learning_rate`.
    """

    data: str | tuple[str, ...] = setting(
        "python-docs",
        "What gpt data sources or list names, or a file or folder; several as SOURCE:WEIGHT, repeated",
        examples=('["novel.txt:0.7", "notes/:0.3"]',),
    )
    val_data: str | None = setting(None, "What is held out: a source, or a share", derived="0.1")
    tokenizer: str = setting(
        "bpe", "bpe, char, byte, gpt2, cl100k_base, o200k_base, or a tokenizer.json, its folder, or a run"
    )
    vocab_size: int = setting(2048, "Ids of a BPE that is trained on the data")
    seed: int = setting(1337, "Seed of initial weights, data order and dropout")
    dtype: str = setting("float32", "Compute precision", choices=DTYPES, derived="the device's")
    gradient_checkpointing: bool = setting(
        False, "Keep each block's input alone, and recompute its inside: less memory, a third more work"
    )
    skip_nonfinite: bool = setting(
        False,
        "Leave out and count a step whose loss or gradient is not finite, or stop there",
        flag="--skip-nonfinite/--stop-nonfinite",
        derived="stop",
    )
    batch_size: int = setting(12, "Windows of a micro-batch", derived="the recipe's")
    gradient_accumulation_steps: int = setting(1, "Micro-batches of a step, whose gradients are added")
    max_iters: int = setting(2000, "Length of the whole schedule", unit="steps", derived="the recipe's")
    optimizer: str = setting(
        "adamw",
        "Optimizer of the blocks' matrices, with AdamW for the rest",
        choices=OPTIMIZERS,
        derived="the recipe's",
    )
    learning_rate: float = setting(1e-3, "AdamW's learning rate at its highest", derived="the recipe's")
    min_lr: float = setting(1e-4, "Learning rate at the end", derived="a tenth of learning_rate")
    matrix_lr: float = setting(0.02, "Muon's learning rate")
    embedding_lr: float | None = setting(None, "The embedding's learning rate", derived="learning_rate")
    head_lr: float | None = setting(None, "An untied head's learning rate", derived="learning_rate")
    warmup_iters: int = setting(100, "Linear warm-up", unit="steps", derived="100, a tenth of max_iters at most")
    lr_schedule: str = setting("cosine", "Schedule of the learning rates", choices=SCHEDULES, derived="the recipe's")
    warmdown_fraction: float = setting(0.5, "Share of the run, at its end, in which wsd falls")
    weight_decay: float = setting(0.1, "Weight decay of matrices and embeddings")
    decay_weight_decay: bool = setting(False, "Weight decay falls linearly to 0", flag=False)
    momentum: float = setting(0.95, "Muon's momentum, which warms up from 0.85")
    momentum_warmup_iters: int = setting(300, "Warm-up of Muon's momentum", flag=False, unit="steps")
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient")
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient")
    adam_eps: float = setting(1e-8, "Added to AdamW's divisor", flag=False)
    grad_clip: float = setting(1.0, "Largest norm of all gradients; 0 is off")
    eval_interval: int = setting(250, "Interval between evaluations; 0 is off", unit="steps", derived="the recipe's")
    eval_iters: int = setting(0, "Length of an evaluation of each source; 0 is the whole split", unit="batches")
    log_interval: int = setting(10, "Interval between reports", unit="steps")
    sample_interval: int = setting(500, "Interval between samples; 0 is off", unit="steps", derived="the recipe's")
    checkpoint_interval: int = setting(
        250, "Interval between checkpoints; 0 is off", unit="steps", derived="the recipe's"
    )
    keep: int = setting(2, "Latest checkpoints to keep, beside the best")

    def __post_init__(self) -> None:
        _coerce_fields(self)
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
