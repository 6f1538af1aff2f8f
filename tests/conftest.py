"""Settings for the whole suite, and the small models that many tests share."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Before any framework is imported: workers share the cores, and nothing may touch the user's own cache.
# Nor may other processes change how many threads compute, and with them the last bits.
threads = "1" if "PYTEST_XDIST_WORKER" in os.environ else str(os.cpu_count())
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, threads)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, and all that tests would start
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["TWINGPT_HOME"] = tempfile.mkdtemp(prefix="twingpt-test-home-")
atexit.register(shutil.rmtree, os.environ["TWINGPT_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
# What is printed is as on a plain terminal of 80 columns, and trackers are as they come, whoever runs the tests.
TASTES = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "GITHUB_ACTIONS")
for name in [*os.environ]:
    if name in TASTES or name.startswith(("WANDB_", "MLFLOW_")):
        del os.environ[name]
os.environ["TERM"] = "xterm"
if (SHARED / "tiktoken").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")

import hypothesis
import numpy as np
import pytest

from twingpt.backends import host, registry
from twingpt.checks import kernels
from twingpt.checks.tolerances import float32_tolerance
from twingpt.core.backend import Backend, Device
from twingpt.core.checkpoint import schema
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.parameters import initialise
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.runs import folder as runs
from twingpt.runs.events import Evaluated, JSONLReporter, RunEnded, RunStarted, Sampled, Saved, Trained
from twingpt.training import flops

if os.name == "nt":  # or what tests write would have other bytes there
    Path.write_text = functools.partialmethod(Path.write_text, newline="\n")
KERNEL_CASES, kernels.CASES = kernels.CASES, ((64, 257, 24),)  # tests/spec/test_kernels.py runs them in full
flops.SECONDS = 0.02  # no test looks at how fast a device is
host.OtherLoad.INTERVAL = float("inf")  # nor at what else the machine does
# The same examples in every run, however slow the machine.
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=SLOW, database=None)
hypothesis.settings.load_profile("same")


def pytest_make_parametrize_id(val):
    """A parameter of bytes is named by its size: what compressed it may have put the time in, and each worker collects
    for itself."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


def needs(name: str):
    return pytest.mark.skipif(not registry.installed(name), reason=f"the {name} backend is not installed")


def decoded(engine, prompt, n, *settings, seed=0):
    """The ids of `n` steps from a prompt of ids, greedy but for given settings."""
    from twingpt.core.sampler import Sampling
    from twingpt.inference.decoding import Row, decode

    row = Row([int(token) for token in prompt], *(settings or (Sampling(temp=0),)), n, seed)
    return [token.id for _, token in decode(engine, [row])]


def dose(small, full) -> list:
    """Values of a parameter: a small one by default, and the full one under `pytest -m soak`."""
    several = full if isinstance(full, tuple) else (full,)
    return [small, pytest.param(*several, marks=pytest.mark.soak)]


def posix(why: str):
    """A mark that leaves a test out on Windows, for this reason."""
    return pytest.mark.skipif(os.name == "nt", reason=why)


links = posix("Windows lets only some users make links")
pipes = posix("Windows has no pipes among files")
kills = posix("Windows has no SIGKILL: a process that is ended there is another test's")

BOTH = [pytest.param("torch", marks=needs("torch")), pytest.param("mlx", marks=needs("mlx"))]
# Where a test starts processes and looks at what no backend has a part in.
ONE = [BOTH[0], pytest.param("mlx", marks=[needs("mlx"), pytest.mark.soak])]


# A file system whose names are ASCII, as under LC_ALL=C without Python's UTF-8 mode.
names_in_unicode = pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="file names are not UTF-8 here")


@pytest.fixture(params=BOTH)
def engines(request):
    """Each installed backend in turn."""
    return registry.get(request.param)


@pytest.fixture(scope="session")
def twins():
    """Both backends, or a skip."""
    missing = [name for name in registry.BACKENDS if not registry.installed(name)]
    if missing:
        pytest.skip(f"the {missing[0]} backend is not installed")
    return registry.get("mlx"), registry.get("torch")


def open_checkpoint(name) -> schema.Checkpoint:
    """The checkpoint that a folder, a run, RUN@best or RUN@STEP is or names."""
    return schema.open_checkpoint(runs.resolve(name))


def cpu(engines):
    return registry.find_device(engines, "cpu")


@dataclass(frozen=True)
class Placed:
    """A backend on one of its devices: what the backend exports, with the device."""

    backend: Backend
    device: Device

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def stream(self):
        """A context: what a test computes by itself in MLX runs on this device. torch's tensors have theirs."""
        if self.NAME == "torch":
            return contextlib.nullcontext()
        import mlx.core as mx

        return mx.stream(mx.cpu if self.device.kind == "cpu" else mx.gpu)

    def needs_dtype(self, dtype: str) -> None:
        """Skip the test where the device doesn't compute in this precision."""
        if dtype not in self.device.dtypes:
            pytest.skip(f"{self.NAME}'s {self.device.name} has no {dtype}")

    def within(self, limit: float, length: int = 0) -> float:
        """What float32 results may be off by here, over `length` positions, where a CPU's may by `limit`.

        With a limit of 0 results have the same bits on a CPU.
        """
        return limit if self.device.kind == "cpu" else max(limit, float32_tolerance(self.device, length))


def within(limit: float, *placed: Placed, length: int = 0) -> float:
    """What results of several devices may be apart by."""
    return max(each.within(limit, length) for each in placed)


@functools.cache
def places() -> list:
    """Every device of every backend, as parameters with ids such as mlx-gpu; imports the frameworks.

    What can't be used is skipped with the reason: a backend that isn't installed, a device that fails at a product.
    """
    found = []
    for name in registry.BACKENDS:
        if not registry.installed(name):
            found.append(pytest.param(None, id=name, marks=needs(name)))
            continue
        backend = registry.get(name)
        for device in backend.devices():
            reason = registry.device_failure(backend, device) if device.kind != "cpu" else None
            marks = pytest.mark.skipif(reason is not None, reason=f"{name} can't use {device.name}: {reason}")
            found.append(pytest.param(Placed(backend, device), id=f"{name}-{device.name}", marks=marks))
    return found


def place_pairs() -> list:
    """(MLX, PyTorch) as parameters, both on the CPU and then each other device beside the other backend's CPU."""
    missing = [entry for entry in places() if entry.values[0] is None]
    if missing:
        return [pytest.param(None, id="twins", marks=missing[0].marks)]
    cpus = {entry.values[0].NAME: entry.values[0] for entry in places() if entry.values[0].device.name == "cpu"}
    pairs = [pytest.param(tuple(cpus[name] for name in registry.BACKENDS), id="twins-cpu")]
    for entry in places():
        placed = entry.values[0]
        if placed.device.name != "cpu":
            pair = tuple((cpus | {placed.NAME: placed})[name] for name in registry.BACKENDS)
            pairs.append(pytest.param(pair, id=entry.id, marks=entry.marks))
    return pairs


def pytest_generate_tests(metafunc):
    """Parametrize what runs on devices; here, so that no framework is imported where nothing collected needs one."""
    for name, parameters in (("placed", places), ("placed_twins", place_pairs)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, parameters(), indirect=True, scope="module")


@pytest.fixture(scope="module")
def placed(request) -> Placed:
    """Each installed backend on each device of this machine in turn."""
    return request.param


@pytest.fixture(scope="module")
def placed_twins(request) -> tuple[Placed, Placed]:
    """Both backends on the CPU, and each other device of one beside the CPU of the other; or a skip."""
    return request.param


@pytest.fixture
def shakespeare() -> Path:
    """Tiny Shakespeare, where this checkout has it."""
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("../shared/data/tinyshakespeare.txt is not here")
    return path


@pytest.fixture
def prose(tmp_path) -> Path:
    """A text file large enough to train on, of a few kilobytes."""
    return write_prose(tmp_path)


def write_prose(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "bird", "sat", "ran", "flew", "on", "over", "mat", "hill", "tree", "and"]
    lines = [" ".join(rng.choice(words, 9)).capitalize() + "." for _ in range(400)]
    path = folder / "prose.txt"
    path.write_text("\n".join(lines))
    return path


def training_state(step: int) -> dict:
    losses = dict.fromkeys(("train_loss", "val_loss", "val_bpb", "best_val_loss"), 1.5)
    return {"step": step, "data": "none", "train": TrainConfig().to_dict(), **losses}


STARTED = RunStarted(0, 100, "runs/x", "torch", "cpu", "float32", 2_000_000, 2048, "prose", 50_000, 5_000, 512)


def story(last: int, first: int = 0) -> list:
    """The events of a run of `last` steps, reported every 10, evaluated every 20; the loss is 1 / step."""
    events = [RunStarted(**{**vars(STARTED), "step": first})]
    for step in range(first + 10, last + 1, 10):
        events.append(Trained(step, 1 / step, 0.5, 1e-3, step * 2048, 6400.0, 5 * 10**8, 6 * 10**8, 0, step / 2))
        if step % 20 == 0:
            events.append(Evaluated(step, 2 / step, 3 / step, True, step / 2))
    return [*events, Sampled(last, "a <b>\nsample"), Saved(last, "x"), RunEnded(last, "finished", last / 2)]


def write_run(run: Path, events=()) -> Path:
    """A run's folder without checkpoints, with these events in its metrics.jsonl."""
    run.mkdir(parents=True)
    start = {
        "time": "2026-01-02T03:04:05+00:00", "step": 0, "backend": "torch", "platform": "Plan 9 & Co",
        "python": "3.14.1", "versions": {"numpy": "2.9"}, "device": {"name": "cpu", "description": "a <chip>"},
    }  # fmt: skip
    config, data = GPTConfig(vocab_size=512).to_dict(), {"folder": "/nowhere", "fingerprint": "00"}
    described = {"schema": 1, "config": config, "train": TrainConfig().to_dict(), "data": data, "starts": [start]}
    (run / "run.json").write_text(json.dumps(described))
    reporter = JSONLReporter(run / "metrics.jsonl")
    for event in events:
        reporter.report(event)
    return run


@pytest.fixture
def saved(tmp_path) -> Path:
    """A small byte-level checkpoint with optimizer state, made without a backend."""
    config = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, init_std=0.1)
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    tensors = dict(initialise(config, 0))
    tensors |= {f"adamw.{slot}.{name}": np.abs(array) for name, array in tensors.items() for slot in "mv"}
    schema.save(folder, config, ByteTokenizer(), tensors, training_state(3))
    return folder


@pytest.fixture
def stdin(monkeypatch):
    """Give these bytes to what reads stdin; None for no stdin at all."""

    def give(content: bytes | None) -> None:
        file = None if content is None else io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", file)

    return give


@pytest.fixture
def soak(request) -> bool:
    """Whether this is a full dose, which alone may look at the clock and at the memory of the process."""
    return request.node.get_closest_marker("soak") is not None


@pytest.fixture
def gpt(capsys, monkeypatch):
    """Run the command in this process: gpt("train", …) -> (exit code, stdout, stderr)."""
    from twingpt.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpt", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
