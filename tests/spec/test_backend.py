"""The backends' contract, finding and choosing one, and the check of tokens."""

import dataclasses
import inspect
import mmap
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TypeVar

import numpy as np
import pytest

from tests.conftest import cpu, decoded, needs
from twingpt.backends import host, registry
from twingpt.core import backend
from twingpt.core.backend import check_tokens
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError


@pytest.fixture
def only(monkeypatch):
    """Pretend that only the named backends are installed: the others' frameworks can't be imported."""

    def pretend(*names: str) -> None:
        for name, module in registry.REQUIRED_MODULE.items():
            there = ModuleType(module)
            there.__spec__ = ModuleSpec(module, None)
            monkeypatch.setitem(sys.modules, module, there if name in names else None)

    return pretend


@pytest.fixture
def system(monkeypatch):
    """Pretend to be on the named system."""

    def pretend(name, machine):
        monkeypatch.setattr(registry.platform, "system", lambda: name)
        monkeypatch.setattr(registry.platform, "machine", lambda: machine)

    return pretend


def test_choice(only, system):
    only("torch", "mlx")
    system("Linux", "x86_64")
    assert registry.choose()[0] == "torch"
    system("Darwin", "arm64")
    assert registry.choose()[0] == "mlx"
    only("mlx")
    assert registry.choose()[0] == "mlx"
    assert registry.choose("mlx") == ("mlx", "asked for")


def test_not_installed_names_the_extra(only, system):
    only("torch")
    system("Linux", "x86_64")
    with pytest.raises(UserError, match=r'mlx backend is not installed: pip install "twingpt\[mlx-cpu\]"'):
        registry.choose("mlx")
    only()
    with pytest.raises(UserError, match="No backend is installed"):
        registry.choose()
    with pytest.raises(UserError, match="did you mean 'torch'"):
        registry.choose("pytorch")


OPENED = """
import ctypes, os, sys
real, opened = ctypes.CDLL, []
ctypes.CDLL = lambda name, *given, **named: opened.append(name) or real(name, *given, **named)
import twingpt.backends.mlx.prepare
from twingpt.backends import registry
assert "mlx.core" not in sys.modules
if sys.argv[1] == "imported":
    import twingpt.backends.mlx.backend
assert not opened and "MLX_ENABLE_TF32" not in os.environ, opened
engines, first = registry.get("mlx"), list(opened)
assert registry.get("mlx") is engines and opened == first, opened
print(engines.details()["blas"], len(opened), os.environ["MLX_ENABLE_TF32"], sep="|")
"""


@needs("mlx")
@pytest.mark.parametrize("before", ["nothing", pytest.param("imported", marks=pytest.mark.soak)])
def test_a_backend_does_no_work_when_imported_and_is_prepared_by_the_registry(before):
    environment = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    command = [sys.executable, "-c", OPENED, before]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    blas, opened, tf32 = done.stdout.strip().split("|")
    assert tf32 == "0"
    if sys.platform == "linux" and blas != "MLX's own":  # as a GPU build's
        assert int(opened) > 0
        assert blas.startswith(("OpenBLAS", "torch") if before == "nothing" else "MLX's own (mlx was imported before")


@needs("torch")
def test_opening_torch_has_float32_products_in_float32():
    """As after TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which some containers set."""
    import torch

    torch.set_float32_matmul_precision("high")
    registry.get("torch")
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32


def methods(protocol):
    return {name: m for name, m in vars(protocol).items() if inspect.isfunction(m) and not name.startswith("_")}


def parameters(function):
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name != "self"]


def test_a_backend_exports_its_protocol_and_no_more(engines):
    functions = methods(backend.Backend)
    assert set(engines.__all__) == {*backend.Backend.__annotations__, *functions}
    for name, function in functions.items():
        assert parameters(getattr(engines, name)) == parameters(function), name


@pytest.mark.parametrize("name", ["TrainEngine", "InferenceEngine"])
def test_an_engine_has_the_methods_and_the_constructor_of_its_protocol(engines, name):
    engine = getattr(engines, name)
    assert parameters(engine) == parameters(getattr(backend, f"New{name}").__call__)
    for method, function in methods(getattr(backend, name)).items():
        assert parameters(getattr(engine, method)) == parameters(function), method


TWINS = (
    *("layers", "attention", "model", "inference", "kv_cache", "training"),
    *("optimizer", "quantized", "device", "measure"),
)
QUANTIZED = {
    "in_bytes", "dequantize", "quantize", "dequantizing_matmul", "has_int4_kernel", "prepack", "pack", "packed_matmul",
}  # fmt: skip
ALONE = {  # public names that one framework needs and the other has no use for
    "mlx": {"async_eval"},
    "torch": {"return_freed_memory", "extend", "grads", "flash_takes", *QUANTIZED},
}
# Parameters of torch's alone, which places tensors, keeps tables of RoPE and waits for copies by events.
PLACED = {"device", "length", "copied"}
OTHERWISE = {"Rope.table", "uint32"}  # whose results are what the framework's operations want
TYPES = {"mx.array": "Array", "Tensor": "Array", "mx.Dtype": "dtype", "torch.dtype": "dtype", "torch.nn": "nn"}


def public(owner, module) -> dict:
    """Name -> function, class or property, of all that a module or class defines for others, in order."""
    found = {}
    for name, value in vars(owner).items():
        value = inspect.unwrap(value) if inspect.isfunction(value) else value
        own = isinstance(value, property) or getattr(value, "__module__", None) == module
        private = name.startswith("_") and name not in ("__init__", "__call__")
        if own and not private and name not in ALONE[module.split(".")[2]] and not isinstance(value, TypeVar):
            found[name] = value
            if inspect.isclass(value):
                found |= {f"{name}.{key}": each for key, each in public(value, module).items()}
    return found


def signature(function) -> list:
    """The parameters and the result of a function, with the frameworks' types under one name."""
    found = inspect.signature(function)
    given = [p for p in found.parameters.values() if p.name not in PLACED]
    types = [(p.name, p.kind, getattr(p.default, "__name__", p.default), p.annotation) for p in given]
    types.append(("return", found.return_annotation))
    return [(*rest, re.sub("|".join(TYPES), lambda m: TYPES[m[0]], str(annotation))) for *rest, annotation in types]


@pytest.mark.parametrize("name", TWINS)
def test_the_twins_have_the_same_names_in_the_same_order_and_the_same_signatures(twins, name):
    modules = [f"twingpt.backends.{engines.NAME}.{name}" for engines in twins]
    ours, theirs = (public(import_module(module), module) for module in modules)
    assert list(ours) == list(theirs)
    for key, function in ours.items():
        if inspect.isfunction(function) and key not in OTHERWISE:
            assert signature(function) == signature(theirs[key]), key


def test_devices(engines):
    devices = engines.devices()
    assert devices[-1].kind == "cpu" and devices[-1].memory_bytes > 2**28
    assert all(device.default_dtype in device.dtypes for device in devices)
    assert all({"float32"} <= set(device.fast_dtypes) <= set(device.dtypes) for device in devices)
    assert registry.find_device(engines, None) == devices[0]
    with pytest.raises(UserError, match=f"Unknown {engines.NAME} device 'cpus': did you mean 'cpu'"):
        registry.find_device(engines, "cpus")
    with pytest.raises(UserError, match="Unknown dtype on cpu 'float8'"):
        registry.find_dtype(cpu(engines), "float8")


def test_memory_of_the_process(monkeypatch):
    if sys.platform == "linux":  # where its peak begins at that of the process that started this one
        monkeypatch.setattr("resource.getrusage", None)
    memory = host.process_memory()
    assert 0 < memory.now <= memory.peak


@pytest.mark.soak
def test_a_process_does_not_count_the_peak_of_the_one_that_started_it():
    held = np.ones(2**26)
    code = "from twingpt.backends.host import process_memory; print(process_memory().peak)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.nbytes


@pytest.mark.soak
def test_memory_of_the_process_grows_with_what_it_holds():
    before = host.process_memory()
    with mmap.mmap(-1, 2**28) as held:  # not from malloc, which may have kept as much from before
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        after = host.process_memory()
        assert after.now >= before.now + len(held) // 2
    assert after.peak >= before.now + 2**27


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 97]], "Token id 97 is outside the vocabulary, 0 to 96"),
        ([[-1, 3]], "Token id -1 is outside"),
        ([[0] * 17], "17 tokens are more than the model's block_size 16"),
        ([0, 1], "shape"),
        ([[]], "shape"),
        ([[0.5]], "must be integers"),
    ],
)
def test_check_tokens(tokens, message):
    with pytest.raises(UserError, match=message):
        check_tokens(np.array(tokens), GPTConfig(vocab_size=97, block_size=16))


def test_every_engine_checks_its_tokens(placed):
    from twingpt.core.parameters import initialise

    config = GPTConfig(vocab_size=97, block_size=16, n_layer=1, n_embd=32)
    engine = placed.InferenceEngine(config, initialise(config, 0), placed.device)
    cache = engine.new_cache(1, 16)
    for call in (lambda: engine.forward(np.array([[97]])), lambda: engine.prefill(cache, 0, np.array([97]))):
        with pytest.raises(UserError, match="Token id 97"):
            call()
    assert cache.lengths.tolist() == [0]


@needs("torch")
def test_on_cuda_a_token_is_read_before_the_forward_passes_after_it_end(monkeypatch):
    """On a CPU that says it is CUDA: an event is recorded behind each sampling, and reading waits for nothing else."""
    import torch

    from twingpt.backends.torch import model
    from twingpt.core.parameters import initialise

    said, events, hidden_states = [], [], model.hidden_states

    class Event:
        def __init__(self):
            self.step = len(events)
            events.append(self)

        def record(self, stream):
            assert stream == engine.device.name
            said.append(f"sampled {self.step}")

        def synchronize(self):
            said.append(f"read {self.step}")

    def forward(*args):
        said.append("forward")
        return hidden_states(*args)

    config, engines = GPTConfig(vocab_size=97, block_size=16, n_layer=1, n_embd=32), registry.get("torch")
    engine = engines.InferenceEngine(config, initialise(config, 0), cpu(engines))
    expected = decoded(engine, [5, 6], 3)
    engine.device = dataclasses.replace(engine.device, kind="cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(model, "hidden_states", forward)
    assert decoded(engine, [5, 6], 3) == expected
    story = "forward, sampled 0, forward, sampled 1, forward, read 0, sampled 2, forward, read 1, read 2"
    assert ", ".join(said) == story
