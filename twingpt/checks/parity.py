"""Parity: logits of the backends, the reference and other libraries, compared on every device of the machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from twingpt.backends import registry
from twingpt.core import reference, rng
from twingpt.core.checkpoint.quantize import dequantized
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES

Array = np.ndarray

# Of the largest |logit|. bfloat16 keeps 8 bits, and a model of a few layers loses about two of them.
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}
QUANTIZED_TOLERANCE = 1e-4  # in float32: kernels round sums of whole numbers times scales in other places
BATCH, MAX_TIME = 2, 64


@dataclass(frozen=True)
class Pair:
    """Two implementations' logits on the same tokens; `max_rel_diff` is of the largest |logit| of `a`.

    `kl` is the mean over positions of KL(a || b) in nats, `top1_agreement` the share of positions
    whose most likely token is the same.
    """

    model: str
    a: str
    b: str
    device_a: str
    device_b: str
    dtype: str
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    kl: float


class Implementation(Protocol):
    """Another implementation of some models, beside the reference and the backends; it computes in float32."""

    @property
    def name(self) -> str:
        """Its name in a pair."""

    @property
    def device(self) -> str:
        """The device that it runs on."""

    def computes(self, config: GPTConfig) -> bool:
        """Whether it supports this architecture."""

    def forward(self, config: GPTConfig, params: Mapping[str, Array], tokens: Array) -> Array:
        """(B, T) ids -> (B, T, V) float32 logits of a model that it computes, from its tensors as they are stored."""


def random_models(seed: int) -> Iterator[tuple[str, GPTConfig, dict[str, Array]]]:
    """A small random model of each shape, and one with the switches that the shapes leave off."""
    small = {"vocab_size": 512, "block_size": MAX_TIME, "n_layer": 4, "n_head": 4, "n_embd": 128, "init_std": 0.08}
    awkward = {
        "n_kv_head": 1,
        "head_dim": 40,
        "mlp": "relu2",
        "tie_embeddings": False,
        "attn_softcap": 20.0,
        "logit_softcap": 15.0,
        "norm_placement": "both",
        "norm_offset": True,
        "sliding_window": 16,
        "full_attention_layers": (1,),
        "local_rope_theta": 500.0,
        "rope_fraction": 0.5,
        "no_rope_layers": (3,),
    }
    for name, switches in {**SHAPES, "awkward": awkward}.items():
        switches = switches | {"zero_init": False}  # or nothing of the blocks would be seen
        config = GPTConfig.from_dict(small | ({"n_kv_head": 2} if name == "qwen3" else {}) | switches)
        yield name, config, dict(initialise(config, seed))


def logits_by_engine(
    config: GPTConfig, params: Mapping[str, Array], tokens: Array, names: Sequence[str], dtype: str
) -> Iterator[tuple[str, str, Array]]:
    """Yield (implementation, device, logits): the reference, then each backend on each device that has `dtype`."""
    yield "reference", "numpy", reference.forward(dict(dequantized(params.items(), config)), tokens, config)
    for name in names:
        engines = registry.get(name)
        for device in engines.devices():
            if dtype in device.dtypes:
                engine = engines.InferenceEngine(config, params.items(), device, dtype=dtype)
                label = device.name if device.name in (device.kind, f"{device.kind}:0") else device.kind
                yield name, label, engine.forward(tokens)


def compare(model: str, a: tuple[str, str, Array], b: tuple[str, str, Array], dtype: str) -> Pair:
    """Differences of the logits `b` from `a`, each as (implementation, device, (B, T, V) logits)."""
    (name_a, device_a, x), (name_b, device_b, y) = a, b
    x, y = x.astype(np.float64), y.astype(np.float64)
    log_p, log_q = (z - z.max(-1, keepdims=True) for z in (x, y))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (log_p, log_q))
    difference = float(np.abs(x - y).max())
    return Pair(
        model=model,
        a=name_a,
        b=name_b,
        device_a=device_a,
        device_b=device_b,
        dtype=dtype,
        max_abs_diff=difference,
        max_rel_diff=difference / float(np.abs(x).max()),
        top1_agreement=float((x.argmax(-1) == y.argmax(-1)).mean()),
        kl=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
    )


def measure(
    models: Iterator[tuple[str, GPTConfig, dict[str, Array]]],
    names: Sequence[str],
    dtype: str = "float32",
    tolerance: float | None = None,
    seed: int = 1337,
    others: Sequence[Implementation] = (),
) -> dict[str, Any]:
    """Compare every pair of implementations on every model: {"ok", "tolerance", "pairs", "skipped"}.

    `ok` is whether each pair's `max_rel_diff` is finite and at most `tolerance`; `skipped` has the models
    that one of `others` does not compute. Raises UserError for a dtype without a tolerance, and for logits that
    are not finite.
    """
    if dtype not in TOLERANCES:
        raise UserError(f"Parity is measured in {' or '.join(TOLERANCES)}, not in {dtype}.")
    if others and dtype != "float32":
        raise UserError(f"{others[0].name} is compared in float32: leave out --dtype {dtype}.")
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    pairs, skipped = [], []
    for model, config, params in models:
        shape = (BATCH, min(MAX_TIME, config.block_size))
        tokens = rng.generator("parity", seed).integers(0, config.vocab_size, shape)
        results = list(logits_by_engine(config, params, tokens, names, dtype))
        for other in others:
            if other.computes(config):
                results.append((other.name, other.device, other.forward(config, params, tokens)))
            else:
                skipped.append({"model": model, "against": other.name})
        for name, device, logits in results:
            if not np.isfinite(logits).all():
                raise UserError(f"The logits of {model} by {name} ({device}) in {dtype} are not finite: none agree.")
        pairs += [compare(model, a, b, dtype) for a, b in itertools.combinations(results, 2)]
    return {
        "ok": all(pair.max_rel_diff <= limit for pair in pairs),
        "tolerance": limit,
        "pairs": [asdict(pair) for pair in pairs],
        "skipped": skipped,
    }
