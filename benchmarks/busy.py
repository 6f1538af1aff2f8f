"""Training and decoding while other processes compute: tokens per second with 0, 1 and 2 of them.

    python benchmarks/busy.py --backend torch
    python benchmarks/busy.py --backend torch --plain     as if the backend did nothing about it

Each figure comes from a process of its own, which warms up until the number of threads has settled; the numbers of
others take turns, and medians over the turns are printed, as one JSON object. A machine that does anything else gives
nothing to go by.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np

SETTLE, SECONDS = 4.0, 6.0


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


def measure(backend: str, what: str, plain: bool) -> float:
    """Tokens per second of training `micro` in batches of 16 windows, or of decoding a row with it."""
    if plain:
        os.environ["GOMP_SPINCOUNT"] = "300000"  # as libgomp has it by default
        os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    from twingpt.backends import registry
    from twingpt.core.config import TrainConfig
    from twingpt.core.parameters import initialise
    from twingpt.core.presets import preset
    from twingpt.core.sampler import Sampling, SamplingRows
    from twingpt.core.schedule import hyperparameters

    engines = registry.get(backend)
    device, config = registry.find_device(engines, "cpu"), preset("micro", 2048)
    if what == "train":
        engine = engines.TrainEngine(config, device, optimizer="muon")
        engine.load(initialise(config, 1))
        ids = np.random.default_rng(0).integers(0, 2048, (16, config.block_size + 1)).astype(np.int32)
        hyper = hyperparameters(TrainConfig(optimizer="muon"), 10)

        def step() -> int:
            engine.forward_backward(ids[:, :-1], ids[:, 1:], np.arange(16))
            engine.read([engine.optimizer_step(hyper)])
            return 16 * config.block_size
    else:
        decoder = engines.InferenceEngine(config, initialise(config, 1), device)

        def step() -> int:
            cache, sampling = decoder.new_cache(1, config.block_size), SamplingRows([Sampling(temp=0.0)])
            decoder.prefill(cache, 0, np.zeros(1, np.int32))
            for _ in range(config.block_size - 1):
                decoder.read(decoder.step(cache, sampling, np.array([0.5])))
            return config.block_size - 1

    def run(seconds: float) -> float:
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            tokens += step()
        return tokens / (time.perf_counter() - start)

    run(SETTLE)
    return run(SECONDS)


def beside(others: int, *arguments: object) -> float:
    """`measure` beside so many spinning processes."""
    spinning = [multiprocessing.Process(target=spin, daemon=True) for _ in range(others)]
    for process in spinning:
        process.start()
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, *arguments).result()
    finally:
        for process in spinning:
            process.kill()
            process.join()


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=("mlx", "torch"))
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    speeds: dict[str, list[list[float]]] = {what: [[], [], []] for what in ("train", "decode")}
    for _ in range(arguments.turns):
        for what, found in speeds.items():
            for others in range(3):
                found[others].append(beside(others, arguments.backend, what, arguments.plain))
    medians = {what: [statistics.median(turn) for turn in found] for what, found in speeds.items()}
    shares = {f"{what}_share": [speed / found[0] for speed in found] for what, found in medians.items()}
    print(json.dumps({"backend": arguments.backend, "plain": arguments.plain, **medians, **shares}))


if __name__ == "__main__":
    main()
