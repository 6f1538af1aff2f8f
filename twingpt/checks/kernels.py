"""Fused kernels against the reference: the head widths, lengths and vocabulary that choose other kernels on a GPU.

Small models are run at sizes at which a GPU takes its fused attention, a long prompt goes in chunks, and the head and
the sampler go by several blocks. In float32 the gradient is compared along one random direction, in which float64
differences of the reference's loss give it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twingpt.checks.tolerances import tolerance_of
from twingpt.core import reference, rng
from twingpt.core.backend import Backend, Device, InferenceEngine
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.sampler import Sampling, SamplingRows, sample
from twingpt.core.schedule import hyperparameters

Array = np.ndarray

# (head_dim, vocab_size, T): both widths that all devices have kernels for, T beyond a prefill's chunk, and GPT-2's
# vocabulary, padded.
CASES = ((64, 257, 544), (128, 257, 544), (64, 50304, 40))
ROWS, STEPS, FEW_QUERIES = 2, 3, 5  # few: Metal has another kernel up to 8
SAMPLING = Sampling(temp=1.0, top_k=40, top_p=0.9)
GRADIENT = 2  # times the tolerance of logits: the backward pass rounds about as often again
RELATIVE_MOVE = 1e-5  # of parameters, for a difference of the loss in float64


@dataclass(frozen=True)
class Check:
    """One part of one case on one device: `max_rel_diff` is of the reference's largest |logit|, or of the gradient.

    `part` is forward, chunk, step, sampling or gradient; of sampling `max_rel_diff` is the share of other tokens.
    None with an `error` where the part raised one.
    """

    backend: str
    device: str
    dtype: str
    head_dim: int
    vocab_size: int
    T: int
    part: str
    max_rel_diff: float | None
    tolerance: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the part is as close as it must be."""
        return self.max_rel_diff is not None and self.max_rel_diff <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """The fields, and whether it is ok."""
        return {**asdict(self), "ok": self.ok}

    def describe(self) -> str:
        """What was checked, and what came of it."""
        found = self.error or f"off by {self.max_rel_diff:.1e}, where {self.tolerance:.0e} is allowed"
        return (
            f"{self.part} with head width {self.head_dim}, T {self.T} and a vocabulary of {self.vocab_size:,}, "
            f"by {self.backend} ({self.device}) in {self.dtype}: {found}"
        )


class Case:
    """A random model of one layer at a size, its tokens (ROWS, T), and the reference's logits of them."""

    def __init__(self, head_dim: int, vocab_size: int, T: int, seed: int) -> None:
        self.head_dim, self.vocab_size, self.T, self.seed = head_dim, vocab_size, T, seed
        self.config = GPTConfig(
            vocab_size=vocab_size,
            block_size=T + STEPS,
            n_layer=1,
            n_head=2,
            n_kv_head=1,
            n_embd=64,
            head_dim=head_dim,
            init_std=0.1,
        )
        self.params = dict(initialise(self.config, seed))
        ids = rng.generator("kernels", seed).integers(0, vocab_size, (ROWS, T + 1)).astype(np.int32)
        self.tokens, self.targets = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
        self.logits = reference.forward(self.params, self.tokens, self.config)

    def differences(self, engines: Backend, device: Device, dtype: str) -> Iterator[tuple[str, float]]:
        """Yield (part, relative difference): forward, each chunk, each step, what was sampled, the gradient."""
        engine = engines.InferenceEngine(self.config, self.params.items(), device, dtype=dtype)
        yield "forward", relative(engine.forward(self.tokens), self.logits)
        yield from self.cached(engine)
        yield "gradient", self.gradient_error(engines, device, dtype)

    def cached(self, engine: InferenceEngine) -> Iterator[tuple[str, float]]:
        """Prefill in chunks, a few queries at first, rows of unequal lengths; then steps of both rows together."""
        cache, texts = engine.new_cache(ROWS, 16), [self.tokens[row, : self.T - row].tolist() for row in range(ROWS)]
        before = np.empty((ROWS, self.vocab_size), np.float32)
        for row, text in enumerate(texts):
            for start, end in ((0, FEW_QUERIES), (FEW_QUERIES, 2 * FEW_QUERIES), (2 * FEW_QUERIES, len(text))):
                before[row] = engine.logits(engine.prefill(cache, row, np.array(text[start:end])))[0]
                yield "chunk", relative(before[row], self.logits[row, end - 1])
        rows, u = SamplingRows([SAMPLING] * ROWS), rng.generator("kernels u", self.seed).random((STEPS, ROWS))
        found = []
        for drawn in u.astype(np.float32):
            handle = engine.step(cache, rows, drawn)
            tokens = engine.read(handle).tokens.tolist()
            expected = [sample(before[row], SAMPLING, float(drawn[row])) for row in range(ROWS)]
            yield "sampling", float(np.mean([a != b for a, b in zip(tokens, expected, strict=True)]))
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
            before = engine.logits(handle)
            found.append(before)
        for row, text in enumerate(texts):
            logits = reference.forward(self.params, np.array([text]), self.config)[0, -STEPS:]
            yield "step", max(relative(found[step][row], logits[step]) for step in range(STEPS))

    def gradient_error(self, engines: Backend, device: Device, dtype: str) -> float:
        """How far the gradient's slope along a random direction, as long in each tensor, is off, of its expected size.

        AdamW's first moment after one step, unclipped, is the gradient times 1 - beta1.
        """
        hyper = hyperparameters(TrainConfig(grad_clip=0.0), 0)
        engine = engines.TrainEngine(self.config, device, dtype=dtype)
        engine.load(self.params.items())
        engine.forward_backward(self.tokens, self.targets, np.arange(ROWS))
        engine.read([engine.optimizer_step(hyper)])
        state = dict(engine.state())
        grads = {name: state[f"adamw.m.{name}"].astype(np.float64) / hyper.one_minus_beta1 for name in self.params}
        random, moves = rng.generator("kernels direction", self.seed), {}
        with np.errstate(all="ignore"):  # a tensor without a gradient makes the result NaN, which is no agreement
            for name, g in grads.items():
                moves[name] = random.normal(size=g.shape) / np.linalg.norm(g)
            largest = max(rms(moves[name]) / rms(p) for name, p in self.params.items())
            h = RELATIVE_MOVE / largest
            slope = (self.losses(moves, h) - self.losses(moves, -h)).mean() / (2 * h)
            ours = sum((grads[name] * move).sum() for name, move in moves.items())
            return float(abs(ours - slope) / np.sqrt(len(moves)))

    def losses(self, moves: Mapping[str, Array], h: float) -> Array:
        """The reference's (ROWS, T) losses where parameters are moved by `h` times `moves`."""
        moved = {name: p + h * moves[name] for name, p in self.params.items()}
        return reference.cross_entropy(reference.forward(moved, self.tokens, self.config), self.targets)


def relative(a: Array, b: Array) -> float:
    """The largest difference of `a` from `b`, of the largest |b|; not a number where `a` is not finite."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def rms(x: Array) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def check_all(
    places: Sequence[tuple[Backend, Device, str]], dtype: str, seed: int, tolerance: float | None = None
) -> list[Check]:
    """Every part of every case, on each device that has `dtype`; `tolerance` replaces that of logits."""
    found: list[Check] = []
    for size in CASES:
        case = Case(*size, seed)
        for engines, device, label in places:
            found += check(engines, device, label, dtype, case, tolerance)
    return found


def check(
    engines: Backend, device: Device, label: str, dtype: str, case: Case, tolerance: float | None = None
) -> Iterator[Check]:
    """One Check for each part of a case on a device, which `label` names; a part that raises ends the case."""
    size = (case.head_dim, case.vocab_size, case.T)
    limit = tolerance_of(device, dtype, case.T) if tolerance is None else tolerance
    limits = {"forward": limit, "chunk": limit, "step": limit, "sampling": 0.0, "gradient": GRADIENT * limit}
    worst: dict[str, float] = {}
    error = None
    try:
        for part, difference in case.differences(engines, device, dtype):
            worst[part] = max(worst.get(part, 0.0), np.inf if np.isnan(difference) else difference)
    except (RuntimeError, ValueError, UserError) as raised:
        error = (str(raised).splitlines() or [type(raised).__name__])[0]
    for part, allowed in limits.items():
        found = worst.get(part)
        said = error if found is None else None
        if found is not None and not np.isfinite(found):
            found, said = None, "not finite"
        yield Check(engines.NAME, label, dtype, *size, part, found, allowed, said)
