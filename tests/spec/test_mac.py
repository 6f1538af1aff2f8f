"""Manners on a Mac, played on Linux: what is wired and cached, and given back; being kept awake.

MLX's allocator is faked as mlx/backend/metal/allocator.cpp (commit 846d176) has it: limits return the ones before,
nothing is wired by default, the cache's limit is that of memory. Unmeasured on a Mac.
"""

import json
import os
import time
from types import SimpleNamespace

import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_train import SMALL, both, logged, train
from tests.conftest import ONE, cpu, needs, posix
from twingpt.backends import host, registry
from twingpt.core.backend import Device, Memory
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.training import memory
from twingpt.training.trainer import Trainer

GB = 2**30
METAL = Device("gpu", "metal", "Apple M2", ("float32", "float16"), ("float32", "float16"), "float16", 10 * GB)


class Allocator:
    """mx's functions of memory, on a GPU whose recommended working set is METAL's."""

    def __init__(self) -> None:
        self.cache, self.wired, self.calls = 15 * GB, 0, []
        self.poisoned = False

    def set_cache_limit(self, limit):
        before, self.cache = self.cache, limit
        self.calls.append(("cache", limit))
        return before

    def set_wired_limit(self, limit):
        if limit > METAL.memory_bytes:
            raise ValueError(
                "[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size "
                "is not allowed."
            )
        before, self.wired = self.wired, limit
        self.calls.append(("wired", limit))
        return before

    def synchronize(self):
        self.calls.append("synchronize")
        if self.poisoned:
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory.")

    def clear_cache(self):
        self.calls.append("clear")


@pytest.fixture
def allocator(monkeypatch):
    import mlx.core as mx

    fake = Allocator()
    for name in ("set_cache_limit", "set_wired_limit", "synchronize", "clear_cache"):
        monkeypatch.setattr(mx, name, getattr(fake, name))
    return fake


@needs("mlx")
@pytest.mark.parametrize("end", [None, KeyboardInterrupt, RuntimeError])
def test_limits_are_given_back_however_a_run_ends(allocator, end):
    engines = registry.get("mlx")
    allocator.poisoned = end is RuntimeError
    try:
        with engines.memory_limits(METAL, cache=GB, wired=2 * GB):
            assert (allocator.cache, allocator.wired) == (GB, 2 * GB)
            if end:
                raise end
    except (KeyboardInterrupt, RuntimeError) as error:
        assert type(error) is end
    assert (allocator.cache, allocator.wired) == (15 * GB, 0)
    done = allocator.calls[2:]
    assert done.index("synchronize") < done.index(("wired", 0)) and done[-1] == "clear"


@needs("mlx")
def test_nothing_is_wired_unless_asked_for(allocator, monkeypatch):
    import mlx.core as mx

    engines = registry.get("mlx")
    with engines.memory_limits(METAL, cache=GB, wired=0):
        assert allocator.wired == 0
    assert {limit for what, limit in filter(lambda call: call[0] == "wired", allocator.calls)} == {0}
    allocator.calls.clear()
    config = GPTConfig(vocab_size=97, block_size=16, n_layer=1, n_embd=32)
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    engines.TrainEngine(config, METAL)
    engines.InferenceEngine(config, (), METAL)
    with engines.memory_limits(cpu(engines), cache=GB, wired=0):
        engines.clear_cache(cpu(engines))
    assert allocator.calls == []


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 0), (0.0, 0), (0.5, 5 * GB), (0.9, 9 * GB), (1.0 * GB, GB), (9.0 * GB, 9 * GB)]
)
def test_a_wired_limit_is_a_share_or_bytes(limit, expected):
    assert memory.wired_bytes(limit, METAL) == expected


def test_a_wired_limit_that_can_not_be_had():
    for limit in (0.91, 1.0, 9.1 * GB, -0.5, -GB):
        with pytest.raises(UserError, match=r"must be from 0 to 0\.9 or, in bytes, to 9663676416 here"):
            memory.wired_bytes(limit, METAL)
    other = Device("cuda:0", "cuda", "A GPU", ("float32",), ("float32",), "float32", 10 * GB)
    assert memory.wired_bytes(0.0, other) == 0
    with pytest.raises(UserError, match="is for MLX on Metal, and this is cuda:0: leave it out"):
        memory.wired_bytes(0.5, other)


def test_the_cache_has_room_for_what_a_step_frees_and_no_more():
    config, train_config = GPTConfig(vocab_size=97, block_size=64, n_embd=64), TrainConfig(batch_size=4)
    step = memory.estimate(config, train_config, "mlx", "metal")
    limit = memory.cache_limit(config, train_config, "mlx", "metal")
    assert step.activations + step.begin <= limit < step.peak
    larger = memory.cache_limit(config, TrainConfig(batch_size=8), "mlx", "metal")
    assert larger > limit


@pytest.fixture
def asked(monkeypatch):
    """What a run asks of its backend: the limits within which it trains, and when the cache is cleared."""
    calls, engines = [], registry.get("torch" if registry.installed("torch") else "mlx")

    class Limits:
        def __init__(self, device, *, cache, wired):
            calls.append(("limits", cache, wired))

        def __enter__(self):
            calls.append("begins")

        def __exit__(self, *_):
            calls.append("ends")

    monkeypatch.setattr(engines, "memory_limits", Limits)
    monkeypatch.setattr(engines, "clear_cache", lambda device: calls.append("clear"))
    return SimpleNamespace(calls=calls, name=engines.NAME, engines=engines)


def test_a_run_clears_the_cache_after_evaluating_sampling_and_saving_and_not_after_steps(gpt, prose, tmp_path, asked):
    options = ["--data", prose, "--backend", asked.name, *SMALL, "--sample-interval", 6]
    train(gpt, *options, "--out", tmp_path / "run")
    (limits, cache, wired), *rest = asked.calls
    assert limits == "limits" and cache > 0 and wired == 0
    done = [event for kind in ("evaluated", "sampled", "saved") for event in logged(tmp_path / "run", kind)]
    assert rest == ["begins", *["clear"] * len(done), "ends"]


def test_limits_end_with_a_run_that_fails(gpt, prose, tmp_path, asked, monkeypatch):
    def stops(self, stop):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_train", stops)
    code, _, _ = gpt("train", "--data", prose, "--out", tmp_path / "run", "--backend", asked.name, *SMALL)
    assert code == 130 and asked.calls[-1] == "ends"


def test_a_wired_limit_is_kept_and_said_and_can_be_taken_back(gpt, prose, tmp_path, asked, monkeypatch):
    run, options = tmp_path / "run", ["--data", prose, "--backend", asked.name, *SMALL]
    assert "is for MLX on Metal" in mistake(gpt, "train", *options, "--wired-limit", 0.5, "--out", run)
    assert not run.exists()
    monkeypatch.setattr(memory, "wired_bytes", lambda limit, device: int((limit or 0) * 10 * GB))
    code, out, _ = gpt("train", *options, "--wired-limit", 0.5, "--out", run, "--stop-after", 1)
    assert code == 0 and "Up to 5.4 GB stay wired until the run ends" in out
    assert asked.calls[0][2] == 5 * GB
    assert json.loads((run / "run.json").read_text("utf-8"))["setup"]["wired_limit"] == 0.5
    assert "wired_limit = 0.5" in (run / "config.toml").read_text("utf-8")
    train(gpt, "--resume", run, "--stop-after", 2)
    assert [call[2] for call in asked.calls if call[0] == "limits"] == [5 * GB, 5 * GB]
    monkeypatch.undo()
    code, out, _ = gpt("train", "--resume", run, "--stop-after", 3)
    assert code == 0 and "The run's wired limit can't be had on cpu: nothing is wired." in out
    assert "is for MLX on Metal" in mistake(gpt, "train", "--resume", run, "--wired-limit", 0.4)
    train(gpt, "--resume", run, "--wired-limit", 0, "--stop-after", 4)
    assert json.loads((run / "run.json").read_text("utf-8"))["setup"]["wired_limit"] == 0


# Active and cached ------------------------------------------------------------------------------------------


@both
def test_memory_in_use_and_in_the_cache_are_shown_apart(gpt, prose, tmp_path, backend, monkeypatch):
    engines, found = registry.get(backend), iter([Memory(5 * 10**8, 6 * 10**8, 3 * 10**8)] * 2)
    monkeypatch.setattr(engines.TrainEngine, "memory", lambda self: next(found, Memory(5 * 10**8, 6 * 10**8, 10**8)))
    run = tmp_path / "run"
    code, out, _ = gpt("train", "--data", prose, "--out", run, "--backend", backend, *SMALL)
    assert code == 0 and "500 MB + 300 MB cache" in out and "500 MB + 100 MB cache" in out
    assert [event["cached_memory_bytes"] for event in logged(run)][:3] == [3 * 10**8, 3 * 10**8, 10**8]
    assert "at its peak, and up to 300 MB of cache" in (run / "report.html").read_text("utf-8")


@pytest.mark.parametrize("backend", ONE)
def test_a_cpu_has_no_cache_to_show(gpt, prose, tmp_path, backend):
    result = train(gpt, "--data", prose, "--out", tmp_path / "run", "--backend", backend, *SMALL, "--max-iters", 2)
    assert result["peak_cached_memory_bytes"] is None
    assert {event["cached_memory_bytes"] for event in logged(tmp_path / "run")} == {None}


@needs("torch")
def test_what_torch_reserves_beyond_what_it_allocates_is_its_cache(monkeypatch):
    import torch

    from twingpt.backends.torch.device import clear_cache
    from twingpt.backends.torch.device import memory as memory_of

    gpus = SimpleNamespace(
        memory_allocated=lambda name: 5, max_memory_allocated=lambda name: 7, memory_reserved=lambda name: 9
    )
    cleared = []
    mps = SimpleNamespace(
        current_allocated_memory=lambda: 3, driver_allocated_memory=lambda: 8, empty_cache=lambda: cleared.append("mps")
    )
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(torch, kind, gpus)
        device = Device(f"{kind}:0", kind, "A GPU", ("float32",), ("float32",), "float32", GB)
        assert memory_of(device) == Memory(5, 7, 4)
        clear_cache(device)  # whose memory nobody else waits for
    monkeypatch.setattr(torch, "mps", mps)
    device = Device("mps", "mps", "Apple M1", ("float32",), ("float32",), "float32", GB)
    assert memory_of(device) == Memory(3, 8, 5)
    clear_cache(device)
    assert cleared == ["mps"]


# Awake ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """A Mac as far as `host` asks, with a caffeinate that writes down its arguments and ends when it is told to."""
    bin, notes = tmp_path / "bin", tmp_path / "caffeinate.txt"
    bin.mkdir()
    (bin / "caffeinate").write_text(f'#!/bin/sh\necho "$$ $@" >> {notes}\nexec sleep 600\n')
    (bin / "caffeinate").chmod(0o755)
    monkeypatch.setattr(host, "platform", SimpleNamespace(system=lambda: "Darwin"))
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    return notes


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@posix("the fake caffeinate is a shell script")
@pytest.mark.parametrize("backend", ONE)
def test_a_mac_is_kept_awake_while_it_trains(gpt, prose, tmp_path, backend, mac):
    code, out, _ = gpt("train", "--data", prose, "--out", tmp_path / "run", "--backend", backend, *SMALL)
    assert code == 0 and out.count("caffeinate keeps this Mac from idle sleep while it trains") == 1
    pid, *arguments = mac.read_text("utf-8").split()
    assert arguments == ["-i", "-w", str(os.getpid())] and not running(int(pid))
    assert len(logged(tmp_path / "run", "machine_noted")) == 1


@posix("the fake caffeinate is a shell script")
def test_being_awake_ends_however_the_block_does(mac):
    with pytest.raises(KeyboardInterrupt), host.awake() as awake:
        while not (mac.exists() and mac.read_text("utf-8").endswith("\n")):
            time.sleep(0.01)
        assert awake and running(int(mac.read_text("utf-8").split()[0]))
        raise KeyboardInterrupt
    assert not running(int(mac.read_text("utf-8").split()[0]))


def test_nothing_is_kept_awake_elsewhere_or_without_caffeinate(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for system in ("Linux", "Darwin"):
        monkeypatch.setattr(host, "platform", SimpleNamespace(system=lambda system=system: system))
        with host.awake() as awake:
            assert awake is False
