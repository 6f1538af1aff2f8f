"""What the training loop costs: steps in the loop against the same steps on a batch that lies ready.

    python benchmarks/loop.py --backend torch --steps 60

All step the same engine. `loop` prefetches batches from the token shards and reads losses one step late, as the
trainer does; `waiting` gathers each batch between the steps and reads each loss at once; `bare` repeats one batch and
reads nothing until the end. A loop that costs nothing over `bare` leaves the device no time to be idle.
The three take turns, and medians over the turns are printed, as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from twingpt.backends import registry
from twingpt.core.config import TrainConfig
from twingpt.core.parameters import initialise
from twingpt.core.presets import preset
from twingpt.core.schedule import hyperparameters
from twingpt.data.prefetch import Prefetcher
from twingpt.data.prepare import prepare


def measure(name: str, size: str, steps: int, turns: int) -> dict[str, float | str]:
    """Median seconds a step of each way of stepping."""
    data = prepare("python-docs", "bpe", 2048)
    config, train = preset(size, data.tokenizer.vocab_size), TrainConfig(optimizer="muon", batch_size=16)
    engines = registry.get(name)
    device = registry.find_device(engines, None)
    engine = engines.TrainEngine(
        config, device, optimizer="muon", dtype=device.default_dtype, compile=device.kind != "cpu"
    )
    engine.load(initialise(config, 1))
    hyper = hyperparameters(train, 10)

    def batch(number: int):  # type: ignore[no-untyped-def]
        return data.batch(number * train.batch_size, train.batch_size, config.block_size, 1)

    ready, windows = batch(0), np.arange(train.batch_size)

    def run(next_batch: Callable, *, read_late: bool) -> float:  # type: ignore[type-arg]
        handles = []
        start = time.perf_counter()
        for number in range(steps):
            engine.forward_backward(*next_batch(number), windows)
            handles.append(engine.optimizer_step(hyper))
            if not read_late:
                engine.read(handles[-1:])
            elif len(handles) > 1:
                engine.read(handles[-2:-1])
        engine.read(handles)
        return (time.perf_counter() - start) / steps

    def bare() -> float:
        start = time.perf_counter()
        handles = []
        for _ in range(steps):
            engine.forward_backward(*ready, windows)
            handles.append(engine.optimizer_step(hyper))
        engine.read(handles)
        return (time.perf_counter() - start) / steps

    ways = {
        "bare": bare,
        "loop": lambda: run(Prefetcher(batch), read_late=True),
        "waiting": lambda: run(batch, read_late=False),
    }
    bare()  # warm
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, function in ways.items():
            times[way].append(function())
    medians = {way: statistics.median(values) for way, values in times.items()}
    ratios = {f"{way}_over_bare": medians[way] / medians["bare"] for way in ("loop", "waiting")}
    return {"backend": name, "device": device.name, "preset": size, **medians, **ratios}


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", choices=registry.BACKENDS)
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.backend, arguments.preset, arguments.steps, arguments.turns)))


if __name__ == "__main__":
    main()
