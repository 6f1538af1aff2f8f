"""The loader: tokens per second that it makes from token shards, against those that the fastest training step takes.

    python benchmarks/loader.py [--tokens 50000000] [--json]

The step is that of the race's sprint, the fastest measured here: the shape `nano`, 2 layers of 128, 16 windows of
64 tokens, on torch's best device. Loader and steps take turns in one process; medians over the turns are printed,
and `ratio` is loader / training. `windows` are the sizes of batch measured, `mixture` one source in ten windows, and
`thread` what is left when the next batch is prefetched on a thread, as in training, while the caller copies the last.
The tokens are random and more than any cache holds; they do lie in the page cache, as no file larger than memory is
written here: from a disk, a loader is as fast as the disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.backends import registry
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.schedule import hyperparameters
from twingpt.data.mixture import Mixture
from twingpt.data.prefetch import Prefetcher
from twingpt.data.prepare import prepare
from twingpt.data.shards import TokenDataset

SECONDS = 0.5  # of each measurement
MODEL = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 257}
BATCHES = ((16, 64), (12, 256), (32, 1024))


def random_data(folder: Path, tokens: int, seed: int) -> TokenDataset:
    """A prepared data set of so many bytes of random letters."""
    path = folder / f"letters-{seed}.txt"
    letters = np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, tokens, np.uint8)
    path.write_bytes(letters.tobytes())
    return prepare(str(path), "byte", 0)


def rate(make: Callable[[int], Any], tokens: int) -> float:
    """Tokens per second of calling `make` for one number after the other."""
    make(0)
    start, number = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < SECONDS:
        number += 1
        make(number)
    return number * tokens / seconds


def training(data: TokenDataset) -> tuple[str, Callable[[], float]]:
    """The device, and a function that measures the tokens per second of training steps on a batch that lies ready."""
    config, train = GPTConfig.from_dict(SHAPES["nano"] | MODEL), TrainConfig(optimizer="muon", batch_size=16)
    engines = registry.get("torch")
    device = registry.find_device(engines, None)
    engine = engines.TrainEngine(config, device, optimizer="muon")
    engine.load(initialise(config, 1))
    batch, hyper = data.batch(0, 16, 64, 1), hyperparameters(train, 1)

    def step(number: int) -> None:
        engine.forward_backward(*batch, np.arange(len(batch[0])))
        engine.read([engine.optimizer_step(hyper)])

    for number in range(3):
        step(number)
    return device.name, lambda: rate(step, 16 * 64)


def loaders(data: TokenDataset, mixture: Mixture) -> dict[str, Callable[[], float]]:
    """What measures the tokens per second of each way of loading, by name."""

    def batches(source: TokenDataset | Mixture, rows: int, length: int) -> Callable[[int], Any]:
        return lambda number: source.batch(number * rows, rows, length, 1)

    def thread() -> float:
        prefetched = Prefetcher(batches(data, *BATCHES[0]))
        return rate(lambda number: [part.copy() for part in prefetched(number)], 16 * 64)

    ways = {f"windows {rows} x {length}": batches(data, rows, length) for rows, length in BATCHES}
    ways["mixture 16 x 64"] = batches(mixture, *BATCHES[0])
    sizes = [rows * length for rows, length in (*BATCHES, BATCHES[0])]
    found = {name: (lambda m=make, n=size: rate(m, n)) for (name, make), size in zip(ways.items(), sizes, strict=True)}
    return found | {"thread 16 x 64": thread}


def measure(tokens: int, turns: int) -> dict[str, Any]:
    """Median tokens per second of each loader and of training, and the ratio of the first to the last."""
    with tempfile.TemporaryDirectory() as name:
        import os

        os.environ["TWINGPT_HOME"] = name
        folder = Path(name)
        data, other = random_data(folder, tokens, 1), random_data(folder, tokens // 10, 2)
        device, steps = training(data)
        ways = {"training": steps, **loaders(data, Mixture([data, other], [0.9, 0.1], ["a", "b"]))}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(turns):
            for way, function in ways.items():
                rates[way].append(function())
    medians = {way: statistics.median(values) for way, values in rates.items()}
    return {
        "device": device,
        "tokens": tokens,
        "training_tokens_per_second": medians["training"],
        "loader_tokens_per_second": medians["windows 16 x 64"],
        "ratio": medians["windows 16 x 64"] / medians["training"],
        "tokens_per_second": medians,
    }


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="of the data")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    result = measure(arguments.tokens, arguments.turns)
    if arguments.json:
        print(json.dumps(result))
        return
    for way, speed in result["tokens_per_second"].items():
        print(f"{way:18} {speed:14,.0f} tokens/s  {speed / result['training_tokens_per_second']:8.1f} x training")


if __name__ == "__main__":
    main()
