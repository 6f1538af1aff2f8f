"""Memory of a training step, estimated from the configuration alone, and the settings that fit a device.

The counts of activations follow the backends' models line by line: what the backward pass of each line
needs again. tests/spec/test_memory.py holds them to what is measured on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from twingpt.backends.blocks import block_size, keeps_scores, query_blocks
from twingpt.core.backend import Device
from twingpt.core.config import LOSS_LOGITS, LOSS_ROWS, NORM_SITES, GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import MATRIX, optimizer_plan, parameter_count, parameter_table, state_table
from twingpt.runs.units import human_bytes

FLOAT = 4  # bytes of a float32
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Arrays of the MLP's hidden width that the backward pass needs, the input of the last product among them.
HIDDEN = {
    "torch": {"swiglu": 4, "geglu": 4, "geglu_tanh": 4, "gelu": 2, "gelu_tanh": 2, "relu2": 3},
    "mlx": {"swiglu": 4, "geglu": 6, "geglu_tanh": 5, "gelu": 4, "gelu_tanh": 3, "relu2": 2},
}

# What a process on a CPU takes for each byte of arrays: a C library's heap leaves gaps between them. Measured
# with glibc 2.36: 1.05 to 1.4 with torch, whose arrays are aligned, and 1.04 to 1.14 with MLX.
HEAP = {"torch": 1.25, "mlx": 1.1}
SHARED = ("cpu", "mps", "metal")  # kinds of devices that have the host's memory

# Of Metal's recommended working set: with all of it wired a Mac crashed, with 90 % training was stable (mlx-lm#828).
MOST_WIRED = 0.9

SPARE = 0.1  # of the free memory, left for what isn't counted
CHANGES = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing")  # what a plan may change
CLEARLY = 1.5  # times all memory: the estimate is never as wrong


@dataclass(frozen=True)
class Estimate:
    """Memory of a training step in bytes of arrays, by what they are for.

    `parameters` and `optimizer` (its state) are there throughout, in float32. In the forward and backward passes
    there are `casts`, the parameters in the compute dtype, and up to where the backward pass begins `activations`,
    which it needs, with the gradients of earlier micro-batches. What is there for a moment besides: `loss` at the
    loss, `begin` where the backward pass begins, `end` where it ends, when all `gradients` are there, and
    `update` in the optimizer step.
    """

    parameters: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    loss: int
    begin: int
    end: int
    update: int

    @property
    def peak(self) -> int:
        """Bytes at the widest moment of the step."""
        begin = self.activations + max(self.loss, self.begin)
        passes = self.casts + max(begin, self.gradients + self.end)
        return self.parameters + self.optimizer + max(passes, self.gradients + self.update)


def estimate(config: GPTConfig, train: TrainConfig, backend: str, kind: str) -> Estimate:
    """Memory of an optimizer step on a backend's device of a `kind`, uncompiled."""
    counts = Counts(config, train, backend, kind)
    parameters = FLOAT * parameter_count(config)
    blocks = [counts.block(layer) for layer in range(config.n_layer)]
    inside = max(blocks)
    recomputed = inside if train.gradient_checkpointing else 0
    kept = config.n_layer * counts.width * config.n_embd if train.gradient_checkpointing else sum(blocks)
    accumulated = parameters if train.gradient_accumulation_steps > 1 else 0
    ahead = backend == "mlx"  # it works ahead: the loss's arrays, or those of another block computed again, are there
    begin = recomputed + counts.backward() + (max(counts.loss(), recomputed) if ahead else 0)
    return Estimate(
        parameters=parameters,
        gradients=parameters,
        optimizer=FLOAT * _state_size(config, train),
        casts=parameters * counts.width // FLOAT if counts.half else 0,
        activations=kept + counts.outside() + accumulated,
        loss=counts.loss(),
        begin=begin,
        end=inside + counts.backward() + counts.table() + (accumulated if ahead else 0),
        update=counts.update(),
    )


def needed(config: GPTConfig, train: TrainConfig, backend: str, kind: str) -> int:
    """Peak memory of a run on a device of a `kind`, in bytes: of a step or, in the host's memory, of saving."""
    step = estimate(config, train, backend, kind)
    saved = 2 * (step.parameters + step.optimizer) if kind in SHARED else 0  # a checkpoint is copied to the host
    return int(max(step.peak, saved) * (HEAP[backend] if kind == "cpu" else 1))


def cache_limit(config: GPTConfig, train: TrainConfig, backend: str, kind: str) -> int:
    """Bytes that a step frees and the next one takes again: what of freed memory is worth keeping.

    Anything beyond has the shapes of evaluations and samples, and would grow with them (mlx-lm#828).
    """
    step = estimate(config, train, backend, kind)
    return step.peak - step.parameters - step.optimizer


def wired_bytes(limit: float | None, device: Device) -> int:
    """Bytes of memory to keep wired by --wired-limit: up to 1 a share of Metal's recommended working set, else bytes.

    0 where there is no limit. Raises UserError for one that can't be had: MOST_WIRED at most, and on Metal alone.
    """
    if not limit:
        return 0
    if device.kind != "metal" or device.memory_bytes is None:
        raise UserError(f"--wired-limit is for MLX on Metal, and this is {device.name}: leave it out.")
    most = int(MOST_WIRED * device.memory_bytes)
    wired = int(limit * device.memory_bytes if limit <= 1 else limit)
    if not 0 <= wired <= most:
        raise UserError(f"--wired-limit {limit:g} must be from 0 to {MOST_WIRED} or, in bytes, to {most} here.")
    return wired


def checkpoint_bytes(config: GPTConfig, train: TrainConfig) -> int:
    """Bytes of a checkpoint's tensors on the disk: parameters and optimizer state, in float32."""
    return FLOAT * (parameter_count(config) + _state_size(config, train))


def _state_size(config: GPTConfig, train: TrainConfig) -> int:
    """Numbers in the optimizer state."""
    return sum(math.prod(shape) for shape in state_table(config, train.optimizer, train.dtype).values())


class Counts:
    """Bytes of a micro-batch's arrays, part by part, as the lines of the backends' models allocate them."""

    def __init__(self, config: GPTConfig, train: TrainConfig, backend: str, kind: str) -> None:
        self.config, self.train, self.backend, self.kind = config, train, backend, kind
        self.tokens = train.batch_size * config.block_size
        self.width = BYTES[train.dtype]  # bytes of a number in the compute dtype
        self.half = self.width < FLOAT
        self.queries, self.keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim

    def block(self, layer: int) -> int:
        """Activations of a block: what its backward pass needs."""
        c = self.config
        projections = self.width * (2 * self.queries + 2 * self.keys)  # queries, keys, values; and the result
        normed = self.norm("rmsnorm") * (self.queries + self.keys) if c.qk_norm else 0
        hidden = self.width * HIDDEN[self.backend][c.mlp] * c.n_inner
        sites = sum(map(bool, chain(*NORM_SITES[c.norm_placement])))
        norms = sites * (self.norm(c.norm) + self.width) * c.n_embd
        return self.tokens * (norms + normed + projections + self.attention(layer) + hidden + 2 * self.dropout())

    def norm(self, kind: str) -> int:
        """Bytes for each number that a norm takes, beside its output: the input, and that scaled."""
        if self.backend == "torch":
            return FLOAT if kind == "layernorm" or self.kind != "cpu" else 2 * FLOAT
        return FLOAT + self.width if self.kind == "cpu" else self.width

    def attention(self, layer: int) -> int:
        """Bytes of a token for a layer's scores, where they are not computed again or never in memory."""
        c, softcapped, seen = self.config, self.config.attn_softcap > 0, self.keys_seen(layer)
        kept = softcapped or keeps_scores(self.backend, self.kind, c.block_size, c.window(layer), c.head_dim)
        if self.recomputes(layer) or not kept:
            return 0
        numbers = 2 * FLOAT + (self.width if self.half else 0) if softcapped else self.width
        return int(numbers * self.config.n_head * sum(seen) / self.config.block_size)

    def recomputes(self, layer: int) -> bool:
        """Whether a layer's backward pass goes by blocks that compute their probabilities again."""
        return self.query_block_size(layer) > 0 and (self.backend, self.kind) != ("mlx", "cpu")

    def query_block_size(self, layer: int) -> int:
        """Queries in a block of a layer's attention; 0 for the framework's own."""
        c, softcapped = self.config, self.config.attn_softcap > 0
        window = c.window(layer)
        how = {"half": self.half, "softcapped": softcapped}
        return block_size(self.backend, self.kind, c.block_size, window, c.head_dim, **how)

    def keys_seen(self, layer: int) -> list[int]:
        """Query-key pairs of each block of a layer's attention, for a window of the data and a head."""
        c = self.config
        size = self.query_block_size(layer)
        blocks = query_blocks(c.block_size, size or c.block_size, c.window(layer) if size else 0)
        return [(queries.stop - queries.start) * (keys.stop - keys.start) for queries, keys in blocks]

    def scores(self, layer: int) -> int:
        """Temporaries of a token in the backward pass of a layer's attention, at its widest block: scores and such."""
        numbers = self.config.n_head * max(self.keys_seen(layer)) / self.config.block_size
        if self.recomputes(layer):
            return int((5 if self.backend == "mlx" else 4) * FLOAT * numbers)  # measured
        return int(2.4 * self.width * numbers) if self.attention(layer) else 0

    def dropout(self) -> int:
        """Bytes of a token for the mask of one site, which is in the compute dtype in torch on a CPU."""
        if not self.config.dropout:
            return 0
        return self.config.n_embd * (self.width if self.backend == "torch" and self.kind == "cpu" else 1)

    def outside(self) -> int:
        """Activations before and after the blocks."""
        c = self.config
        norms = (1 + c.embed_norm) * (self.norm(c.norm) + self.width) * c.n_embd
        return self.tokens * (norms + c.smear * self.width * c.n_embd + self.dropout())

    def loss(self) -> int:
        """The logits of a chunk, as often as they are there at a time; and the gradients that the loss keeps."""
        c = self.config
        rows = min(LOSS_ROWS, max(1, LOSS_LOGITS // c.vocab_size))
        logits = FLOAT * min(self.tokens, rows) * c.vocab_size
        head, hidden = FLOAT * c.vocab_size * c.n_embd, self.width * self.tokens * c.n_embd
        if self.backend == "mlx":  # measured: it begins the next chunks while one is under way
            copies = ((4, 8, 9) if c.logit_softcap else (3, 6, 8))[min(-(-self.tokens // rows), 3) - 1]
            return copies * logits + 2 * head + hidden
        before = logits * self.width // FLOAT if self.tokens > rows else 0  # the gradient by the last chunk's
        return (4 if c.logit_softcap else 2) * logits + before + head + hidden

    def backward(self) -> int:
        """Temporaries of a block's backward pass at its widest moment, in the MLP or the attention."""
        c = self.config
        scores = max(self.scores(layer) for layer in range(c.n_layer))
        if self.backend == "mlx":  # measured: it works on several lines at a time
            return int(self.tokens * (self.width * (3.3 * c.n_inner + 8.6 * c.n_embd) + scores))
        wide = (2 if c.gated_mlp or c.mlp == "relu2" else 1) * c.n_inner + 1.9 * c.n_embd
        return int(self.tokens * max(self.width * wide, scores))

    def table(self) -> int:
        """The embedding's own gradient, beside the one that it has as a head."""
        return FLOAT * self.config.vocab_size * self.config.n_embd if self.config.tie_embeddings else 0

    def update(self) -> int:
        """Temporaries of the optimizer step: the clipped gradients, and the updates of its largest arrays."""
        table, plan = parameter_table(self.config), optimizer_plan(self.config, self.train.optimizer)
        sizes = sorted((table[name].size for name in plan.adamw), reverse=True)
        batches = max((sum(table[name].size for name in batch) for batch in plan.muon), default=0)
        if self.backend == "mlx":  # measured: it computes ahead, up to some arrays at a time
            blocks = sorted((table[name].size for name in plan.adamw if table[name].group == MATRIX), reverse=True)
            return FLOAT * max(2 * sizes[0], 4 * sum(blocks[:4]), 13 * batches)
        guarded = self.train.skip_nonfinite or self.train.dtype == "float16"
        clipped = parameter_count(self.config) * (2 if guarded else 1)
        return FLOAT * (clipped + max(2 * sizes[0], 4 * batches))


def plan(
    config: GPTConfig, train: TrainConfig, backend: str, device: Device, free: int, chosen: Collection[str]
) -> tuple[TrainConfig, list[str]]:
    """`train` with micro-batches, and if need be gradient checkpointing, that fit a device's `free` bytes; and notes.

    `batch_size`, `gradient_accumulation_steps` and `gradient_checkpointing` change only where they are not among
    the user's `chosen` ones, and a step keeps its windows. The notes are sentences on what was changed or will not
    fit. Raises UserError for a run that is clearly larger than all of the device's memory.
    """
    if _fits(config, train, backend, device, free):
        return train, []
    smaller = list(_smaller(train, chosen))
    for candidate in smaller:
        if _fits(config, candidate, backend, device, free):
            return candidate, [_change_note(train, candidate, free)]
    least = needed(config, smaller[-1] if smaller else train, backend, device.kind)
    short = f"Training this takes about {human_bytes(least)} of memory, and {device.name} has"
    hint = advice(config, train, backend, device, free)
    if device.memory_bytes and least > CLEARLY * device.memory_bytes:
        raise UserError(f"{short} {human_bytes(device.memory_bytes)}. {hint}")
    return train, [f"{short} {human_bytes(free)} free. {hint}"]


def advice(config: GPTConfig, train: TrainConfig, backend: str, device: Device, free: int | None) -> str:
    """A sentence on the options that make a run need less memory: no more than `free` bytes where that can be."""
    now = needed(config, train, backend, device.kind)
    budget = min(now, free or now)  # it doesn't fit, whatever the estimate says
    ideas = []
    for smaller in _smaller(train, {"gradient_checkpointing"}):
        if _fits(config, smaller, backend, device, budget):
            parts = smaller.gradient_accumulation_steps
            ideas.append(f"--batch-size {smaller.batch_size} --gradient-accumulation-steps {parts}")
            break
    changes: dict[str, dict[str, Any]] = {"--gradient-checkpointing": {"gradient_checkpointing": True}}
    changes |= {f"--dtype {dtype}": {"dtype": dtype} for dtype in device.fast_dtypes if dtype != "float32"}
    for flag, change in changes.items():
        if needed(config, dataclasses.replace(train, **change), backend, device.kind) < now:
            ideas.append(flag)
    return f"Less is needed with {', or with '.join(ideas or ['a smaller model', 'a shorter --block-size'])}."


def _fits(config: GPTConfig, train: TrainConfig, backend: str, device: Device, free: int) -> bool:
    return needed(config, train, backend, device.kind) <= (1 - SPARE) * free


def _smaller(train: TrainConfig, chosen: Collection[str]) -> Iterator[TrainConfig]:
    """The same steps in ever smaller micro-batches, then those with gradient checkpointing."""
    windows = train.batch_size * train.gradient_accumulation_steps
    sizes = [train.batch_size]
    if not {"batch_size", "gradient_accumulation_steps"} & set(chosen):
        sizes = [size for size in range(train.batch_size, 0, -1) if windows % size == 0]
    choices = [train.gradient_checkpointing]
    if not train.gradient_checkpointing and "gradient_checkpointing" not in chosen:
        choices.append(True)
    for checkpointing in choices:
        for size in sizes:
            if (size, checkpointing) != (train.batch_size, train.gradient_checkpointing):
                yield dataclasses.replace(
                    train,
                    batch_size=size,
                    gradient_accumulation_steps=windows // size,
                    gradient_checkpointing=checkpointing,
                )


def _change_note(train: TrainConfig, fitting: TrainConfig, free: int) -> str:
    """What of `train` was changed to fit, in a sentence."""
    parts = []
    if fitting.batch_size != train.batch_size:
        parts.append(
            f"a step is {fitting.gradient_accumulation_steps} micro-batches of {fitting.batch_size} windows, "
            f"not {train.gradient_accumulation_steps} of {train.batch_size}"
        )
    if fitting.gradient_checkpointing != train.gradient_checkpointing:
        parts.append("the backward pass computes activations again")
    return f"To fit the {human_bytes(free)} that are free, {', and '.join(parts)}."
