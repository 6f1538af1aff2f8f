"""Decoding with a sliding window: milliseconds per token behind a long text, on both backends.

    python benchmarks/decode_window.py [--held 4096] [--window 256] [--rows 1] [--json]

Rows that hold `held` positions each are decoded token by token, greedily, by a random model whose layers all have the
window: from the keys that it shows, as the engines do, and from all keys under a mask. The two take turns, and the
medians over the turns are printed; `ratio` is masked to shown, so more than 1 is faster.
"""

from __future__ import annotations

import argparse
import json
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

TURNS, TOKENS = 5, 8


def row(backend: str, config: GPTConfig, held: int, n_rows: int) -> dict[str, Any]:
    """Milliseconds of a token from the keys that the window shows, and from all under a mask."""
    engines = registry.get(backend)
    device = registry.find_device(engines, None)
    engine = engines.InferenceEngine(config, initialise(config, 1), device, dtype=device.default_dtype)
    cache, greedy = engine.new_cache(n_rows, config.block_size), SamplingRows([Sampling(temp=0)] * n_rows)
    engine.prefill(cache, 0, np.arange(held) % config.vocab_size)
    for number in range(1, n_rows):
        cache.copy(0, number)

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(TOKENS):
            handle = engine.step(cache, greedy, np.zeros(n_rows))
        engine.logits(handle)  # waits for the last forward pass, where `read` waits for its token
        return 1000 * (time.perf_counter() - start) / TOKENS

    slots = import_module(f"twingpt.backends.{backend}.kv_cache").CacheSlots
    times: dict[str, list[float]] = {"shown": [], "masked": []}
    for _ in range(TURNS + 1):  # the first one warms up
        for keys, taken in times.items():
            from_all = mock.patch.object(slots, "start", lambda self, window: 0)
            with from_all if keys == "masked" else nullcontext():
                taken.append(measure())
    shown, masked = (statistics.median(taken[1:]) for taken in times.values())
    found = {"backend": backend, "device": device.name, "dtype": device.default_dtype}
    return found | {"milliseconds_per_token": shown, "milliseconds_masked": masked, "ratio": masked / shown}


def main() -> None:
    """Measure, and print a row for each backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held", type=int, default=4096, help="positions of a row before the first step")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--n-layer", type=int, default=12)
    parser.add_argument("--n-embd", type=int, default=768)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    shape = {"vocab_size": 8192, "n_layer": args.n_layer, "n_embd": args.n_embd, "n_head": args.n_embd // 64}
    length = args.held + 2 * (TURNS + 1) * TOKENS
    config = GPTConfig.from_dict({**shape, "block_size": length, "sliding_window": args.window})
    rows = [row(backend, config, args.held, args.rows) for backend in filter(registry.installed, BACKENDS)]
    if args.json:
        print(json.dumps({"held": args.held, "window": args.window, "rows": rows}))
        return
    for found in rows:
        milliseconds = "{milliseconds_per_token:8.2f} ms, under a mask {milliseconds_masked:8.2f} ms"
        print(("{backend:6} {dtype:9} " + milliseconds + "  {ratio:5.2f}x").format(**found))


if __name__ == "__main__":
    main()
