"""Parity: logits of the backends, the reference and other libraries, compared on every device of the machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from twingpt.backends import registry
from twingpt.checks import kernels
from twingpt.checks.tolerances import TOLERANCES, tolerance_of
from twingpt.core import reference, rng
from twingpt.core.backend import Backend, Device
from twingpt.core.checkpoint.quantize import dequantized
from twingpt.core.config import GPTConfig, unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES

Array = np.ndarray
Place = tuple[Backend, Device, str]  # and the device's name as it is shown

BATCH, MAX_TIME = 2, 64


@dataclass(frozen=True)
class Pair:
    """Two implementations' logits on the same tokens; `max_rel_diff` is of the largest |logit| of `a`.

    `tolerance` is how much it may be, on the device of the two that keeps less. `kl` is the mean over positions of
    KL(a || b) in nats, `top1_agreement` the share of positions whose most likely token is the same.
    """

    model: str
    a: str
    b: str
    device_a: str
    device_b: str
    dtype: str
    tolerance: float
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    kl: float


@dataclass(frozen=True)
class Result:
    """One implementation's (B, T, V) logits, the device they come from, and the tolerance there."""

    name: str
    device: str
    logits: Array
    tolerance: float


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


def find_places(names: Sequence[str], device: str | None = None) -> tuple[list[Place], list[dict[str, str]]]:
    """Devices of backends, all or those that `device` names ("cuda" any CUDA GPU), and those left out with the reason.

    Raises UserError where none is left.
    """
    places, left_out, known = [], [], []
    for name in names:
        engines = registry.get(name)
        for found in engines.devices():
            known.append(found.name)
            if device not in (None, found.name, found.kind):
                continue
            label = found.name if found.name in (found.kind, f"{found.kind}:0") else found.kind
            if reason := registry.device_failure(engines, found):
                left_out.append({"backend": name, "device": label, "reason": reason})
            else:
                places.append((engines, found, label))
    if left_out and not places:
        raise UserError(f"No device can compute here: {left_out[0]['reason']}")
    if not places:
        raise unknown_choice("device", str(device), dict.fromkeys(known))
    return places, left_out


def logits_by_engine(
    config: GPTConfig, params: Mapping[str, Array], tokens: Array, places: Sequence[Place], dtype: str
) -> Iterator[Result]:
    """Yield the logits of the reference, then of each backend on each device."""
    expected = reference.forward(dict(dequantized(params.items(), config)), tokens, config)
    yield Result("reference", "numpy", expected, TOLERANCES[dtype])
    for engines, device, label in places:
        engine = engines.InferenceEngine(config, params.items(), device, dtype=dtype)
        yield Result(engines.NAME, label, engine.forward(tokens), tolerance_of(device, dtype, tokens.shape[1]))


def compare(model: str, a: Result, b: Result, dtype: str, tolerance: float | None) -> Pair:
    """Differences of the logits of `b` from those of `a`; `tolerance` replaces that of their devices."""
    x, y = a.logits.astype(np.float64), b.logits.astype(np.float64)
    log_p, log_q = (z - z.max(-1, keepdims=True) for z in (x, y))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (log_p, log_q))
    difference = float(np.abs(x - y).max())
    return Pair(
        model=model,
        a=a.name,
        b=b.name,
        device_a=a.device,
        device_b=b.device,
        dtype=dtype,
        tolerance=max(a.tolerance, b.tolerance) if tolerance is None else tolerance,
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
    device: str | None = None,
    *,
    fused: bool = False,
) -> dict[str, Any]:
    """Compare every pair of implementations on every model: {"ok", "tolerance", "pairs", "kernels", "skipped", …}.

    On every device, or on those that `device` names; `left_out` are those that fail at a small product. `fused` adds
    the checks of `checks/kernels.py`, in "kernels". `ok` is whether each pair's `max_rel_diff` is finite and at most
    its tolerance, and each check ok; `skipped` has the models that one of `others` does not compute. Raises UserError
    for a dtype without a tolerance, and for logits that are not finite.
    """
    if dtype not in TOLERANCES:
        raise UserError(f"Parity is measured in {' or '.join(TOLERANCES)}, not in {dtype}.")
    if others and dtype != "float32":
        raise UserError(f"{others[0].name} is compared in float32: leave out --dtype {dtype}.")
    found, left_out = find_places(names, device)
    places = [place for place in found if dtype in place[1].dtypes]
    if not places:
        raise UserError(f"{found[0][1].description} does not compute in {dtype}: leave out --dtype {dtype}.")
    pairs, skipped = [], []
    for model, config, params in models:
        shape = (BATCH, min(MAX_TIME, config.block_size))
        tokens = rng.generator("parity", seed).integers(0, config.vocab_size, shape)
        results = list(logits_by_engine(config, params, tokens, places, dtype))
        for other in others:
            if other.computes(config):
                logits = other.forward(config, params, tokens)
                results.append(Result(other.name, other.device, logits, TOLERANCES[dtype]))
            else:
                skipped.append({"model": model, "against": other.name})
        for result in results:
            if not np.isfinite(result.logits).all():
                raise UserError(
                    f"The logits of {model} by {result.name} ({result.device}) in {dtype} are not finite: none agree."
                )
        pairs += [compare(model, a, b, dtype, tolerance) for a, b in itertools.combinations(results, 2)]
    checks = kernels.check_all(places, dtype, seed, tolerance) if fused else []
    return {
        "ok": all(pair.max_rel_diff <= pair.tolerance for pair in pairs) and all(check.ok for check in checks),
        "tolerance": TOLERANCES[dtype] if tolerance is None else tolerance,
        "pairs": [asdict(pair) for pair in pairs],
        "kernels": [check.as_json() for check in checks],
        "failed": [check.describe() for check in checks if not check.ok],
        "skipped": skipped,
        "left_out": left_out,
    }
