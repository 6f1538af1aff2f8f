"""Benchmarks: speed and memory of training steps, forward passes and the loss, each backend in its own process.

The parent drives the processes in turns, so that a slow moment of the machine hits them all; they share
neither memory nor threads.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.backends import registry
from twingpt.backends.host import end_with_parent
from twingpt.core import rng
from twingpt.core.backend import Backend, Device, TrainEngine
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise, parameter_count
from twingpt.core.presets import preset
from twingpt.core.schedule import hyperparameters
from twingpt.training import flops
from twingpt.training.engine import make_engine
from twingpt.training.memory import estimate
from twingpt.training.recipes import RECIPES
from twingpt.training.settings import MODEL_FIELDS, TRAIN_FIELDS

WARMUP = 2  # runs that are not counted: they compile, start threads and fill caches
PLAIN_LOSS_COPIES = 4  # float32 arrays of all logits that a plain loss may hold at a time
SIGKILL = -9  # the exit code of a process that it ended; Windows has neither
FORWARD_SHARE = 1 / 3  # of a training step's operations: the backward pass does twice the forward's

Options = Mapping[str, Any]


class Worker:
    """State of a measuring process: a backend, a device and an engine, which its parent's calls open, build and run."""

    engines: Backend
    device: Device
    engine: TrainEngine
    run_once: Callable[[], Any]

    def open(self, backend: str, device: str | None, dtype: str | None) -> dict[str, Any]:
        """Choose device and dtype; returns what they are and the device's peak FLOP/s."""
        self.engines = registry.get(backend)
        self.device = registry.find_device(self.engines, device)
        chosen = registry.find_dtype(self.device, dtype)
        peak = flops.peak(self.engines, self.device, chosen)
        return {
            "device": self.device.name,
            "kind": self.device.kind,
            "description": self.device.description,
            "dtype": chosen,
            "peak": dataclasses.asdict(peak) if peak else None,
        }

    def build(self, mode: str, config: Options, train: Options, *, compile: bool) -> None:
        """Build an engine with random weights and a random batch, and warm it up."""
        model, settings = GPTConfig.from_dict(config), TrainConfig.from_dict(train)
        self.engine = make_engine(model, settings, self.engines, self.device, compile=compile)
        self.engine.load(initialise(model, settings.seed))
        shape = (settings.batch_size, model.block_size + 1)
        tokens = rng.generator("bench", settings.seed).integers(0, model.vocab_size, shape).astype(np.int32)
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

        def step() -> Any:
            for _ in range(settings.gradient_accumulation_steps):
                self.engine.forward_backward(inputs, targets, np.arange(len(inputs)))
            return self.engine.optimizer_step(hyperparameters(settings, 0))

        if mode == "train":
            self.run_once: Callable[[], Any] = step
            self.read: Callable[[list[Any]], Any] = self.engine.read
        else:
            inference = self.engine.inference()
            self.run_once = lambda: inference.log_probs(inputs, targets)
            self.read = lambda handles: [inference.read(handle) for handle in handles]
        for _ in range(WARMUP):
            self.run(1)

    def arrays(self, config: Options, train: Options, *, compile: bool) -> int:
        """Peak bytes of arrays while a new engine takes its first training steps."""
        for name in ("engine", "run_once", "read"):  # one engine at a time
            vars(self).pop(name, None)
        return self.engines.arrays_peak(self.device, lambda: self.build("train", config, train, compile=compile))

    def run(self, steps: int) -> float:
        """Wall-clock seconds of `steps` steps, from the first call to the last result."""
        start = time.perf_counter()
        self.read([self.run_once() for _ in range(steps)])
        return time.perf_counter() - start

    def loss(self, vocab_size: int, n_embd: int, tokens: int, dtype: str, *, chunked: bool) -> tuple[int, float]:
        """Peak bytes, and seconds, of the cross-entropy of `tokens` tokens and its gradients."""
        config = GPTConfig(vocab_size=vocab_size, n_embd=n_embd, n_head=1, position="none", block_size=tokens)
        return self.engines.loss_memory(config, self.device, dtype, tokens, chunked=chunked)

    def free(self) -> int:
        """Free memory of the device in bytes."""
        return self.engines.free_memory(self.device)

    def memory(self) -> int:
        """Peak memory of the device in bytes, since the process began."""
        return self.engine.memory().peak


_worker: Worker  # of a process that measures


def _start(log: str) -> None:
    """Begin a process that measures: what it prints goes to the file `log`, Ctrl-C is left to its parent."""
    global _worker
    with Path(log).open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    end_with_parent()
    _worker = Worker()


def _call(backend: str, name: str, arguments: Options) -> Any:
    try:
        return getattr(_worker, name)(**arguments)
    except UserError as error:
        raise UserError(str(error)) from None
    except Exception as error:  # as text: not all of the frameworks' own exceptions survive a pickle
        raise UserError(f"The measurement of {backend} failed: {type(error).__name__}: {error}") from None


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keep modules of the working directory from shadowing the standard library in processes that start here."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # from Python 3.11 on
    try:
        yield
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        os.environ |= {"PYTHONSAFEPATH": before} if before else {}


class Process:
    """A worker as its parent sees it: a pool of one process, begun afresh (spawned) in the parent's environment."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.log = Path(tempfile.mkdtemp()) / "log"  # closed here: Windows opens no temporary file a second time
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (str(self.log),))
        others = set(multiprocessing.active_children())
        with _safe_path():
            self.pool.submit(os.getpid)  # the process starts with its first task
        (self.process,) = set(multiprocessing.active_children()) - others

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.pool.shutdown()
        shutil.rmtree(self.log.parent, ignore_errors=True)

    def ask(self, name: str, **arguments: Any) -> Any:
        """What a method of the worker returns. Raises UserError with what went wrong there."""
        try:
            return self.pool.submit(_call, self.backend, name, arguments).result()
        except BrokenProcessPool:
            raise UserError(self._exit_reason()) from None

    def _exit_reason(self) -> str:
        self.pool.shutdown()
        code = self.process.exitcode
        if code == SIGKILL:
            return f"The measurement of {self.backend} was ended from outside, most likely for want of memory."
        said = self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""
        last = (said.strip().splitlines() or ["it said nothing."])[-1]
        return f"The measurement of {self.backend} ended with code {code}: {last}"


def configuration(kinds: Sequence[str], options: Options) -> tuple[GPTConfig, TrainConfig]:
    """Configuration to measure: the recipe of a GPU where every device is one, else a CPU's, changed by `options`."""
    values = RECIPES["cpu" if "cpu" in kinds else "gpu"] | dict(options)
    train = TrainConfig.from_dict({key: value for key, value in values.items() if key in TRAIN_FIELDS})
    shape = {key: value for key, value in values.items() if key in MODEL_FIELDS}
    return preset(values["preset"], train.vocab_size, values.get("shape"), **shape), train


def measure(
    mode: str,
    names: Sequence[str],
    options: Options,
    *,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool | None = None,
    repeats: int = 5,
    steps: int = 5,
) -> dict[str, Any]:
    """Benchmark `mode` ("train" or "forward") on backends: `repeats` measurements of `steps` steps each, in turns.

    `options` are fields of GPTConfig and TrainConfig, `preset` and `shape`. The result is {"mode", "rows",
    "skipped"}: a row a backend, and what can't be measured with the reason. Raises UserError where nothing
    can.
    """
    for flag, value in (("--repeats", repeats), ("--steps", steps)):
        if value < 1:
            raise UserError(f"{flag} must be at least 1, and is {value}.")
    skipped: list[dict[str, str]] = []
    configuration(["cpu"], options)  # a mistake is one before any work is done
    processes = [Process(name) for name in names]
    try:
        opened = _try_each(processes, skipped, lambda p: p.ask("open", backend=p.backend, device=device, dtype=dtype))
        config, train = configuration([facts["kind"] for facts in opened.values()], options)

        def build(process: Process) -> dict[str, Any]:
            facts = opened[process]
            compiled = registry.compiles(process.backend, facts["kind"]) if compile is None else compile
            settings = dataclasses.replace(train, dtype=facts["dtype"]).to_dict()
            built = {"config": config.to_dict(), "train": settings, "compile": compiled}
            process.ask("build", mode=mode, **built)
            return {**facts, "built": built}

        ready = _try_each(list(opened), skipped, build)
        seconds: dict[Process, list[float]] = {process: [] for process in ready}
        for _ in range(repeats):
            for process in ready:
                seconds[process].append(process.ask("run", steps=steps) / steps)
        rows = [_row(mode, process, facts, config, train, seconds[process], steps) for process, facts in ready.items()]
    finally:
        for process in processes:
            process.end()
    return {"mode": mode, "rows": rows, "skipped": skipped}


def measure_loss(
    names: Sequence[str],
    vocab_size: int = 50304,
    n_embd: int = 768,
    tokens: int = 16384,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Peak memory of the cross-entropy of `tokens` tokens and its gradients, plain and by chunks of positions.

    The result is like `measure`'s, with a row for each backend and way, each measured in a process of its own;
    `ratio` is the plain way's bytes over the chunked one's. What the machine has no memory for is skipped.
    """
    for flag, value in (("--vocab-size", vocab_size), ("--n-embd", n_embd), ("--tokens", tokens)):
        if value < 2:
            raise UserError(f"{flag} must be at least 2, and is {value}.")
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for name in names:
        for way in ("plain", "chunked"):
            process = Process(name)
            try:
                rows.append(_loss_row(process, way, vocab_size, n_embd, tokens, device, dtype))
            except UserError as error:
                skipped.append({"backend": name, "reason": str(error)})
            finally:
                process.end()
    if not rows:
        raise UserError(" ".join(entry["reason"] for entry in skipped))
    for row in rows:
        plain = [other for other in rows if other["backend"] == row["backend"] and other["way"] == "plain"]
        row["ratio"] = plain[0]["peak_memory_bytes"] / row["peak_memory_bytes"] if plain else None
    return {"mode": "memory", "rows": rows, "skipped": skipped}


def _loss_row(
    process: Process, way: str, vocab_size: int, n_embd: int, tokens: int, device: str | None, dtype: str | None
) -> dict[str, Any]:
    facts = process.ask("open", backend=process.backend, device=device, dtype=dtype)
    free, plain = process.ask("free"), PLAIN_LOSS_COPIES * 4 * vocab_size * tokens
    if way == "plain" and plain > free:
        raise UserError(
            f"The plain loss would take about {plain / 1e9:.1f} GB on {process.backend}, and {free / 1e9:.1f} GB are "
            "free: give a smaller --tokens or --vocab-size."
        )
    sizes = {"vocab_size": vocab_size, "n_embd": n_embd, "tokens": tokens, "dtype": facts["dtype"]}
    peak, seconds = process.ask("loss", **sizes, chunked=way == "chunked")
    return {
        "backend": process.backend,
        "device": facts["device"],
        "way": way,
        **sizes,
        "tokens_per_second": tokens / seconds,
        "mfu": None,
        "seconds_per_step": seconds,
        "repeats": 1,
        "peak_memory_bytes": peak,
    }


def _try_each(
    processes: Sequence[Process], skipped: list[dict[str, str]], call: Callable[[Process], dict[str, Any]]
) -> dict[Process, dict[str, Any]]:
    """What `call` gives for each process that it works for; the rest is noted. UserError where none is left."""
    results = {}
    for process in processes:
        try:
            results[process] = call(process)
        except UserError as error:
            skipped.append({"backend": process.backend, "reason": str(error)})
    if not results:
        raise UserError(" ".join(entry["reason"] for entry in skipped))
    return results


def _row(
    mode: str, process: Process, facts: Options, config: GPTConfig, train: TrainConfig, seconds: list[float], steps: int
) -> dict[str, Any]:
    peak = flops.Peak(**facts["peak"]) if facts["peak"] else None
    accumulated = train.gradient_accumulation_steps if mode == "train" else 1
    step = statistics.median(seconds)
    speed = train.batch_size * accumulated * config.block_size / step
    share = flops.mfu(speed * (FORWARD_SHARE if mode == "forward" else 1), config, peak)
    return {
        "backend": process.backend,
        "device": facts["device"],
        "description": facts["description"],
        "dtype": facts["dtype"],
        "compile": facts["built"]["compile"],
        "tokens_per_second": speed,
        "seconds_per_step": step,
        "spread": (max(seconds) - min(seconds)) / step,
        "repeats": len(seconds),
        "steps": steps,
        "mfu": share,
        "peak_flops": peak and peak.flops_per_second,
        "peak_source": peak and peak.source,
        "peak_memory_bytes": process.ask("memory"),
        **_arrays(mode, process, facts, config),
        "parameters": parameter_count(config),
        "batch_size": train.batch_size,
        "gradient_accumulation_steps": accumulated,
        "optimizer": train.optimizer if mode == "train" else None,
        "config": config.to_dict(),
    }


def _arrays(mode: str, process: Process, facts: Options, config: GPTConfig) -> dict[str, int | None]:
    """The arrays of training as they were measured and as `estimate` has them; of a forward pass neither."""
    names = ("array_memory_bytes", "estimated_memory_bytes")
    if mode != "train":
        return dict.fromkeys(names)
    built = facts["built"]
    estimated = estimate(config, TrainConfig.from_dict(built["train"]), process.backend, facts["kind"])
    return dict(zip(names, (process.ask("arrays", **built), estimated.peak), strict=True))
