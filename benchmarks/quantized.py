"""Decoding from quantized weights: milliseconds per token and bytes of parameters, on both backends.

    python benchmarks/quantized.py [--n-layer 12] [--n-embd 768] [--json]

One text is decoded token by token, greedily, by a random model in float32 and bfloat16, from full weights and from
8 and 4 bits in groups of 64. The engines take turns, and the median over the turns is printed; `ratio` is that of
the same backend's full weights in float32 to this, so more than 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from twingpt.backends import registry
from twingpt.backends.registry import BACKENDS
from twingpt.core.checkpoint.quantize import Quantization
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise
from twingpt.core.sampler import Sampling, SamplingRows
from twingpt.weights.quantize import apply

DTYPES = ("float32", "bfloat16")
BITS = (None, 8, 4)
TURNS, TOKENS = 5, 4


def inference(engines: Any, config: GPTConfig, tensors: Iterable[Any], dtype: str) -> Callable[[], float]:
    """What measures the milliseconds that a token takes."""
    engine = engines.InferenceEngine(config, tensors, registry.find_device(engines, None), dtype=dtype)
    greedy, draw, cache = SamplingRows([Sampling(temp=0)]), np.zeros(1), engine.new_cache(1, 64)
    engine.prefill(cache, 0, np.zeros(8, np.int64))

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(TOKENS):
            handle = engine.step(cache, greedy, draw)
        engine.read(handle)
        return 1000 * (time.perf_counter() - start) / TOKENS

    measure()
    return measure


def rows(config: GPTConfig) -> list[dict[str, Any]]:
    """A row for each backend, number of bits and dtype."""
    full = list(initialise(config, 1))
    found, measures = [], []
    for backend in filter(registry.installed, BACKENDS):
        for bits in BITS:
            tensors = list(apply(Quantization(bits, 64), full, config)) if bits else full
            size = sum(array.nbytes for _, array in tensors)
            for dtype in DTYPES:
                found.append({"backend": backend, "bits": bits or 32, "dtype": dtype, "stored_bytes": size})
                measures.append(inference(registry.get(backend), config, tensors, dtype))
    times = [[measure() for measure in measures] for _ in range(TURNS)]
    base: dict[str, float] = {}
    for row, taken in zip(found, zip(*times, strict=True), strict=True):
        milliseconds = statistics.median(taken)
        base.setdefault(row["backend"], milliseconds)
        row |= {"milliseconds_per_token": milliseconds, "ratio": base[row["backend"]] / milliseconds}
    return found


def main() -> None:
    """Measure, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-layer", type=int, default=12)
    parser.add_argument("--n-embd", type=int, default=768)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    shape = {"vocab_size": 8192, "block_size": 256, "n_layer": args.n_layer, "n_embd": args.n_embd}
    found = rows(GPTConfig.from_dict({**shape, "n_head": args.n_embd // 64}))
    if args.json:
        print(json.dumps({"rows": found}))
        return
    for row in found:
        print("{backend:6} {bits:2} bits {dtype:9} {milliseconds_per_token:8.1f} ms  {ratio:5.2f}x".format(**row))


if __name__ == "__main__":
    main()
