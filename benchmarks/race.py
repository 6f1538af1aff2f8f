"""The race: nanoGPT's documented CPU run against ours, to the same loss on Tiny Shakespeare's characters.

    python benchmarks/race.py --nanogpt DIR --data input.txt --json

DIR is a checkout of https://github.com/karpathy/nanoGPT, which is copied to a temporary folder and run there
as its README says for a CPU; FILE is the text of its data/shakespeare_char. Times are of training alone: no
imports, evaluations or checkpoints, on either side. Losses are over the whole validation split (the last
tenth), in nats per character, each model reading it in windows of its own block_size. Three runs per backend:

- sprint: the shortest of SPRINT_STEPS that ends at nanoGPT's final loss or below. `ours_seconds` is its time,
  and `ratio` is ours_seconds / nanogpt_seconds; both are null where none gets there.
- marathon: the loss after as many seconds as nanoGPT's whole run took, `ours_loss_at_nanogpt_time`.

The figures on top are those of the first backend; `backends` has them all.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.backends import registry
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.order import window_starts
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.schedule import Hyper, hyperparameters

Array = np.ndarray

# nanoGPT's README, "I only have a macbook" (its CPU run); evaluated at the end alone, which is not timed.
NANOGPT_FLAGS = ["--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64",
                 "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000",
                 "--lr_decay_iters=2000", "--dropout=0.0", "--eval_interval=2000"]  # fmt: skip
NANOGPT_LOSS = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
val, T, nats = np.fromfile("data/shakespeare_char/val.bin", np.uint16).astype(np.int64), 64, 0.0
with torch.no_grad():
    for start in range(0, len(val) - 1, T):
        window = torch.from_numpy(val[start : start + T + 1])[None]
        nats += model(window[:, :-1], window[:, 1:])[1].item() * (window.shape[1] - 1)
print(nats / (len(val) - 1))
"""

SEED = 1337
COMMON = {"optimizer": "muon", "lr_schedule": "wsd", "warmdown_fraction": 0.8, "warmup_iters": 0, "min_lr": 0.0,
          "momentum_warmup_iters": 100, "weight_decay": 0.0, "grad_clip": 0.0, "beta1": 0.8}  # fmt: skip
SPRINT_MODEL = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 128}
SPRINT = {"batch_size": 16, "learning_rate": 0.015, "embedding_lr": 0.04, "matrix_lr": 0.04}
SPRINT_STEPS = (190, 250, 330)
MARATHON_MODEL = {"block_size": 256, "n_layer": 3, "n_head": 4, "n_embd": 128}
MARATHON = {"batch_size": 4, "learning_rate": 0.01, "matrix_lr": 0.02, "max_iters": 1000}  # by time, in thousandths


def characters(path: Path) -> tuple[Array, Array, list[str]]:
    """Training and validation ids as nanoGPT's data/shakespeare_char/prepare.py makes them, and the characters."""
    text = path.read_text("utf-8")
    chars = sorted(set(text))
    number = {char: i for i, char in enumerate(chars)}
    ids = np.array([number[char] for char in text], np.uint16)
    cut = int(len(text) * 0.9)
    return ids[:cut], ids[cut:], chars


def race_nanogpt(source: Path, train: Array, val: Array, chars: list[str]) -> dict[str, float]:
    """Seconds that nanoGPT's training steps took, and its final loss."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("train.py", "model.py", "configurator.py"):
            shutil.copy(source / part, folder)
        shutil.copytree(source / "config", folder / "config")
        data = folder / "data" / "shakespeare_char"
        data.mkdir(parents=True)
        train.tofile(data / "train.bin")
        val.tofile(data / "val.bin")
        with (data / "meta.pkl").open("wb") as file:  # the format that nanoGPT reads
            pickle.dump({"vocab_size": len(chars), "itos": dict(enumerate(chars))}, file)
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT_FLAGS]
        output = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
        times = {int(i): float(ms) / 1e3 for i, ms in re.findall(r"iter (\d+): loss \S+, time ([\d.]+)ms", output)}
        loss = subprocess.run([sys.executable, "-c", NANOGPT_LOSS], cwd=folder, check=True, capture_output=True)
    inner = [seconds for i, seconds in times.items() if 0 < i < 2000]  # the first and last also evaluate
    return {"seconds": 2000 * statistics.fmean(inner), "loss": float(loss.stdout.split()[-1])}


class Runner:
    """Our training of one model on one backend's CPU."""

    def __init__(self, name: str, model: dict[str, Any], settings: dict[str, Any], train: Array, val: Array) -> None:
        self.train, self.val = train, val
        vocab_size = int(max(train.max(), val.max())) + 1
        self.config = GPTConfig.from_dict(SHAPES["nano"] | model | {"vocab_size": vocab_size})
        self.settings = TrainConfig.from_dict(COMMON | settings)
        engines = registry.get(name)
        self.engine = engines.TrainEngine(self.config, registry.find_device(engines, "cpu"), optimizer="muon")
        self.batch(0)
        self.engine.load(initialise(self.config, SEED))
        for step in range(3):  # warm the caches, then forget what was learned
            self.step(step, hyperparameters(self.settings, step))
        self.engine.read([self.step(3, hyperparameters(self.settings, 3))])
        self.engine.load(initialise(self.config, SEED))

    def batch(self, step: int) -> tuple[Array, Array]:
        """Tokens and targets of a step, (B, T)."""
        B, T = self.settings.batch_size, self.config.block_size
        starts = window_starts(np.arange(step * B, step * B + B), len(self.train), T, SEED)
        windows = self.train[starts[:, None] + np.arange(T + 1)].astype(np.int32)
        return windows[:, :-1], windows[:, 1:]

    def step(self, step: int, hyper: Hyper) -> Any:
        """Enqueue a step; its handle."""
        B = self.settings.batch_size
        self.engine.forward_backward(*self.batch(step), np.arange(step * B, step * B + B))
        return self.engine.optimizer_step(hyper)

    def run(self, hyper: Callable[[int, float], Hyper | None]) -> dict[str, float]:
        """Train until `hyper` of (step, seconds so far) is None: seconds, steps and final loss."""
        start, step, handle = time.perf_counter(), 0, None
        while (now := hyper(step, time.perf_counter() - start)) is not None:
            previous, handle = handle, self.step(step, now)
            if previous is not None:
                self.engine.read([previous])  # so that the clock that a schedule reads is that of done work
            step += 1
        self.engine.read([handle])
        return {"seconds": time.perf_counter() - start, "steps": step, "loss": self.loss()}

    def windows(self) -> Iterator[tuple[Array, Array]]:
        """The validation split in order, as batches; what is missing at its end has targets of -1."""
        T = self.config.block_size
        for start in range(0, len(self.val) - 1, 32 * T):
            part = np.full(32 * T + 1, -1, np.int32)
            piece = self.val[start : start + 32 * T + 1]
            part[: len(piece)] = piece
            yield np.maximum(part[:-1], 0).reshape(32, T), part[1:].reshape(32, T)

    def loss(self) -> float:
        """Nats per character over the whole validation split."""
        engine = self.engine.inference()
        handles = [engine.log_probs(tokens, targets) for tokens, targets in self.windows()]
        return -sum(float(engine.read(handle).targets.sum()) for handle in handles) / (len(self.val) - 1)


def sprint(name: str, target: float, train: Array, val: Array) -> dict[str, Any]:
    """The shortest of the sprints that reaches `target`; the longest one with `reached` false where none does."""
    for steps in SPRINT_STEPS:
        runner = Runner(name, SPRINT_MODEL, SPRINT | {"max_iters": steps}, train, val)
        settings = runner.settings
        result = runner.run(lambda i, _, s=settings: hyperparameters(s, i) if i < s.max_iters else None)
        if result["loss"] <= target:
            break
    return result | {"reached": result["loss"] <= target}


def marathon(name: str, budget: float, train: Array, val: Array) -> dict[str, float]:
    """Train for `budget` seconds, with learning rates by the share of them that is gone."""
    runner = Runner(name, MARATHON_MODEL, MARATHON, train, val)
    settings = runner.settings

    def hyper(step: int, seconds: float) -> Hyper | None:
        share = (seconds + 2 * seconds / max(1, step)) / budget  # two steps may still be under way
        if share >= 1:
            return None
        by_time = hyperparameters(settings, int(share * settings.max_iters))
        rates = {field: getattr(by_time, field) for field in Hyper._fields if field.endswith("_lr")}
        return hyperparameters(settings, step)._replace(**rates)

    return runner.run(hyper)


def race(nanogpt: Path, data: Path, names: list[str]) -> dict[str, Any]:
    """Run all of it, each part in a process of its own."""
    train, val, chars = characters(data)
    theirs = race_nanogpt(nanogpt, train, val, chars)
    print(f"nanoGPT: {theirs['seconds']:.1f} s to {theirs['loss']:.4f}", file=sys.stderr)
    results = {}
    for name in names:
        ours = [
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--data", str(data), "--part", part, name, str(number)],
                    check=True,
                    stdout=subprocess.PIPE,
                ).stdout
            )
            for part, number in (("sprint", theirs["loss"]), ("marathon", theirs["seconds"]))
        ]
        seconds = ours[0]["seconds"] if ours[0]["reached"] else None
        results[name] = {
            "ours_seconds": seconds,
            "ratio": seconds / theirs["seconds"] if seconds else None,
            "ours_loss_at_nanogpt_time": ours[1]["loss"],
            "sprint": ours[0],
            "marathon": ours[1],
        }
        print(f"{name}: {json.dumps(results[name])}", file=sys.stderr)
    return {
        "target_loss": theirs["loss"],
        "nanogpt_seconds": theirs["seconds"],
        "nanogpt_final_loss": theirs["loss"],
        **{key: results[names[0]][key] for key in ("ours_seconds", "ratio", "ours_loss_at_nanogpt_time")},
        "backends": results,
    }


def show(result: dict[str, Any]) -> None:
    """The result as lines to read."""
    print(f"nanoGPT: {result['nanogpt_seconds']:.1f} s to {result['nanogpt_final_loss']:.4f} nats per character")
    for name, ours in result["backends"].items():
        there = f"{ours['ours_seconds']:.1f} s, 1/{1 / ours['ratio']:.1f} of it" if ours["ratio"] else "never there"
        print(f"{name}: there in {there}; {ours['ours_loss_at_nanogpt_time']:.4f} after nanoGPT's time")


def main() -> None:
    """Parse the command line and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--data", type=Path, required=True, help="Tiny Shakespeare's input.txt")
    parser.add_argument("--backend", nargs="+", default=[n for n in ("torch", "mlx") if registry.installed(n)])
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # one run of ours, in a process of its own
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"{arguments.data} is no file: give the input.txt of nanoGPT's data/shakespeare_char")
    if arguments.part:
        part, name, number = arguments.part
        train, val, _ = characters(arguments.data)
        print(json.dumps({"sprint": sprint, "marathon": marathon}[part](name, float(number), train, val)))
        return
    if arguments.nanogpt is None or not (arguments.nanogpt / "train.py").is_file():
        parser.error("--nanogpt needs a checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT")
    result = race(arguments.nanogpt, arguments.data, arguments.backend)
    print(json.dumps(result)) if arguments.json else show(result)


if __name__ == "__main__":
    main()
