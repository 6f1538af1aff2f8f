"""Sampling: the time of a sampled step of decoding against a greedy one, on both backends.

    python benchmarks/sampling.py [--vocab-size 8192 50304] [--rows 1] [--n-layer 6] [--n-embd 384] [--json]

A random model whose logits are made peaked, as a trained one's are (normal, of a standard deviation of 4), decodes
token by token: greedily, sampled with the default settings, sampled with all penalties, and sampled by a sort of the
whole vocabulary, as where the shortlist of a CPU does not decide. These take turns; the medians over the turns are
printed, and the speed of each as a ratio to that of greedy decoding: 1 is as fast.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from contextlib import nullcontext
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np

from twingpt.backends import registry
from twingpt.backends.registry import BACKENDS
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise
from twingpt.core.sampler import Sampling, SamplingRows

TURNS, TOKENS, SPREAD = 9, 8, 4.0
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {5: -100.0}}
SAMPLINGS = {
    "greedy": Sampling(temp=0), "sampled": Sampling(), "penalised": Sampling(**PENALTIES), "sorted": Sampling(),
}  # fmt: skip


def row(backend: str, config: GPTConfig, n_rows: int) -> dict[str, Any]:
    """Milliseconds of a step by each kind of SAMPLINGS, and their speeds as shares of greedy decoding's."""
    engines = registry.get(backend)
    device = registry.find_device(engines, None)
    params = dict(initialise(config, 1))
    params["lm_head.weight"] *= SPREAD / (
        config.init_std * math.sqrt(config.n_embd)
    )  # of a norm's output, whose RMS is 1
    engine = engines.InferenceEngine(config, params.items(), device, dtype=device.default_dtype)
    cache, random = engine.new_cache(n_rows, config.block_size), np.random.default_rng(0)
    for number in range(n_rows):
        engine.prefill(cache, number, random.integers(0, config.vocab_size, 64))

    def measure(sampling: Sampling) -> float:
        for number in range(n_rows):  # each kind decodes at the same positions
            held = int(cache.lengths[number])
            cache.trim(number, held - 63)
            engine.prefill(cache, number, np.array([1]))
        rows = SamplingRows([sampling] * n_rows, [64] * n_rows)
        handle = engine.step(cache, rows, random.random(n_rows), log_probs=None)
        engine.logits(handle)
        start = time.perf_counter()
        for _ in range(TOKENS):
            handle = engine.step(cache, rows, random.random(n_rows), log_probs=None)
        engine.logits(handle)  # waits for the last forward pass, where `read` waits for its token
        return 1000 * (time.perf_counter() - start) / TOKENS

    sampler = import_module(f"twingpt.backends.{backend}.sampler")
    times: dict[str, list[float]] = {kind: [] for kind in SAMPLINGS}
    for _ in range(TURNS + 1):  # the first one warms up
        for kind, sampling in SAMPLINGS.items():
            with mock.patch.object(sampler, "SHORTLIST", 10**9) if kind == "sorted" else nullcontext():
                times[kind].append(measure(sampling))
    milliseconds = {kind: statistics.median(taken[1:]) for kind, taken in times.items()}
    ratios = {kind: milliseconds["greedy"] / one for kind, one in milliseconds.items() if kind != "greedy"}
    found = {"backend": backend, "device": device.name, "dtype": device.default_dtype}
    return found | {"vocab_size": config.vocab_size, "milliseconds": milliseconds, "ratios": ratios}


def main() -> None:
    """Measure, and print a row for each backend and vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[8192, 50304])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-embd", type=int, default=384)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    shape = {"n_layer": args.n_layer, "n_embd": args.n_embd, "n_head": args.n_embd // 64, "tie_embeddings": False}
    rows = [
        row(backend, GPTConfig.from_dict({**shape, "vocab_size": vocab_size, "block_size": 128}), args.rows)
        for backend in filter(registry.installed, BACKENDS)
        for vocab_size in args.vocab_size
    ]
    if args.json:
        print(json.dumps({"rows_decoded": args.rows, "rows": rows}))
        return
    for found in rows:
        kinds = [f"{kind} {ms:6.2f} ms" for kind, ms in found["milliseconds"].items()]
        speeds = [f"{kind} {ratio:.2f}x" for kind, ratio in found["ratios"].items()]
        print("{backend:6} {device:6} {vocab_size:6}  ".format(**found) + "  ".join([*kinds, *speeds]))


if __name__ == "__main__":
    main()
