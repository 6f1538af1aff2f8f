"""What the processor and the GPUs are said to be, from what their drivers say."""

import collections
import os
import subprocess
import sys
import types

import pytest

from tests.conftest import needs
from twingpt.backends import host, registry

EPYC = "processor : 0\nmodel name\t: AMD EPYC 9354\nflags\t\t: fpu sse avx2 avx512f avx512_bf16 fma\n"
XEON = "model name\t: Intel(R) Xeon(R) Platinum 8480+\nflags\t: avx512_bf16 avx512_fp16 amx_bf16 amx_tile\n"
OLD = "model name\t: Intel(R) Core(TM) i5-8250U\nflags\t: avx2 fma f16c\n"
GRAVITON = "processor : 0\nFeatures\t: fp asimd evtstrm fphp asimdhp i8mm bf16 dgh\n"


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        (EPYC, ("float32", "bfloat16")),
        (XEON, ("float32", "bfloat16", "float16")),
        (OLD, ("float32",)),
        (GRAVITON, ("float32", "bfloat16", "float16")),
        ("", ("float32",)),
    ],
)
def test_what_a_cpu_is_fast_at(monkeypatch, cpuinfo, fast):
    monkeypatch.setattr(host, "_read", lambda _: cpuinfo)
    assert host.cpu_fast_dtypes() == fast


def test_the_name_of_the_cpu(monkeypatch):
    monkeypatch.setattr(host, "_read", lambda _: EPYC)
    assert host.cpu_name() == "AMD EPYC 9354"
    monkeypatch.setattr(host, "_read", lambda _: "")
    monkeypatch.setattr(host.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(host.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="Apple M3 Pro\n"))
    assert host.cpu_name() == "Apple M3 Pro"


def test_what_gpus_are_fast_at():
    assert [host.nvidia_fast_dtypes(major) for major in (6, 7, 8)] == [
        ("float32",),
        ("float32", "float16"),
        ("float32", "float16", "bfloat16"),
    ]
    assert "bfloat16" not in host.apple_fast_dtypes("Apple M2 Max")
    assert "bfloat16" in host.apple_fast_dtypes("Apple M10")


def test_a_container_has_what_its_limit_leaves(monkeypatch, tmp_path):
    whole = host.total_memory()
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(host, "CGROUPS", [(limit, used)])
    assert host.total_memory() == whole  # no container
    limit.write_text("max\n")
    used.write_text("1000\n")
    assert host.total_memory() == whole
    limit.write_text(f"{2**20}\n")
    assert host.total_memory() == 2**20 and host.free_memory() == 2**20 - 1000
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 400\nactive_file 7\n")
    assert host.free_memory() == 2**20 - 600  # the rest are files that were read or written, as in an installation
    used.write_text(f"{2**21}\n")
    assert host.free_memory() == 0


def test_free_memory_is_part_of_all(engines):
    for device in engines.devices():
        assert 0 < engines.free_memory(device) <= device.memory_bytes


def fake_gpu(**facts) -> types.SimpleNamespace:
    return types.SimpleNamespace(name="A GPU", total_memory=2**34, **facts)


def driver(count, properties) -> types.SimpleNamespace:
    """What torch.cuda and torch.xpu say of so many GPUs."""
    return types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: count,
        get_device_properties=lambda index: properties,
        mem_get_info=lambda name: (2**33, 2**34),
    )


@needs("torch")
@pytest.mark.parametrize(
    ("properties", "hip", "fast", "default"),
    [
        (fake_gpu(major=9), None, {"float32", "bfloat16"}, "bfloat16"),
        (fake_gpu(major=7), None, {"float32", "float16"}, "float16"),
        (fake_gpu(major=6), None, {"float32"}, "float32"),
        (fake_gpu(major=9, gcnArchName="gfx90a:sramecc+:xnack-"), "6.4", {"float32", "bfloat16"}, "bfloat16"),
        (fake_gpu(major=10, gcnArchName="gfx1030"), "6.4", {"float32", "float16"}, "float16"),
    ],
)
def test_cuda_and_rocm_devices(monkeypatch, properties, hip, fast, default):
    import torch

    engines = registry.get("torch")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "cuda", driver(2, properties))
    first, second, *_ = engines.devices()
    assert (first.name, second.name, first.kind) == ("cuda:0", "cuda:1", "cuda")
    assert first.default_dtype == default and fast <= set(first.fast_dtypes)
    assert ("bfloat16" in first.fast_dtypes) == ("bfloat16" in fast)
    assert engines.free_memory(first) == 2**33


@needs("torch")
@pytest.mark.parametrize("systolic", [True, False])
def test_xpu_devices(monkeypatch, systolic):
    import torch

    engines = registry.get("torch")
    properties = fake_gpu(has_subgroup_matrix_multiply_accumulate=systolic)
    monkeypatch.setattr(torch, "xpu", driver(1, properties))
    device = registry.find_device(engines, "xpu")
    assert device.name == "xpu:0" and device.default_dtype == ("bfloat16" if systolic else "float32")
    assert ("bfloat16" in device.fast_dtypes) == systolic
    assert engines.free_memory(device) == 2**33


@needs("torch")
def test_mps_device(monkeypatch):
    import torch

    engines = registry.get("torch")
    monkeypatch.setattr(host, "cpu_name", lambda: "Apple M1")
    monkeypatch.setattr(host, "free_memory", lambda: 6 * 2**30)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = {"recommended_max_memory": lambda: 10 * 2**30, "driver_allocated_memory": lambda: 2**30}
    monkeypatch.setattr(torch, "mps", types.SimpleNamespace(**mps))
    device = registry.find_device(engines, "mps")
    assert device.description == "Apple M1" and "bfloat16" not in device.fast_dtypes
    assert device.memory_bytes == 10 * 2**30 and engines.free_memory(device) == 6 * 2**30


@needs("mlx")
def test_metal_device(monkeypatch):
    import mlx.core as mx

    engines = registry.get("mlx")
    info = {"device_name": "Apple M4", "max_recommended_working_set_size": 10 * 2**30}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    monkeypatch.setattr(host, "free_memory", lambda: 20 * 2**30)
    device = engines.devices()[0]
    assert (device.kind, device.description, device.default_dtype) == ("metal", "Apple M4", "bfloat16")
    assert "bfloat16" in device.fast_dtypes and 9 * 2**30 < engines.free_memory(device) <= device.memory_bytes


@needs("mlx")
@pytest.mark.parametrize(("major", "default"), [(9, "bfloat16"), (7, "float16"), (6, "float32")])
def test_mlx_on_cuda(monkeypatch, major, default):
    import mlx.core as mx

    engines = registry.get("mlx")
    info = {
        "device_name": "NVIDIA L4", "compute_capability_major": major, "total_memory": 2**34, "free_memory": 2**33,
    }  # fmt: skip
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    device = engines.devices()[0]
    assert (device.kind, device.default_dtype, device.memory_bytes) == ("cuda", default, 2**34)
    assert engines.free_memory(device) == 2**33


@needs("mlx")
def test_mlx_keeps_float32_products_in_float32():
    import os

    registry.get("mlx")
    assert os.environ["MLX_ENABLE_TF32"] == "0"


@pytest.fixture
def cores(monkeypatch):
    """A machine of four cores whose clock, busy seconds and own ones the test says; this process may run on three."""
    Times = collections.namedtuple("Times", "user nice idle iowait guest steal")
    now = types.SimpleNamespace(clock=0.0, busy=[0.0] * 4, own=0.0)

    def cpu_times(percpu):
        return [Times(100 + busy, 7, 1000 * now.clock, 50 * now.clock, 30, 5) for busy in now.busy]

    monkeypatch.setattr(host.psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(host.time, "monotonic", lambda: now.clock)
    monkeypatch.setattr(host.time, "process_time", lambda: now.own)
    monkeypatch.setattr(host.OtherLoad, "INTERVAL", 1.0)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: {0, 1, 3}, raising=False)

    def passes(seconds, own, *others):
        """Some time, in which this process used as many cores as `own`, and others so much of each core."""
        now.clock, now.own = now.clock + seconds, now.own + own * seconds
        now.busy = [busy + seconds * (other + own / 3) for busy, other in zip(now.busy, others, strict=True)]

    return passes


def test_the_load_of_others(cores):
    assert host.cores() == 3
    others = host.OtherLoad()
    cores(0.9, 2, 0, 0, 0, 0)
    assert others.read() is None  # too short a time
    cores(0.6, 2, 0, 0, 1, 0)  # the third core isn't ours
    assert others.read() == pytest.approx(0, abs=1e-6)
    cores(2, 1, 1, 0.5, 1, 0)
    assert others.read() == pytest.approx(1.5)
    cores(2, 3, 0, -0.1, 0, 0)  # what clocks of different grain can say
    assert others.read() == 0


@needs("torch")
def test_threads_are_as_many_as_the_cores_that_others_leave(cores, monkeypatch):
    import torch

    from twingpt.backends.torch import threads

    number = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda wanted: number.append(number.pop() and wanted))
    ours = threads.Threads()

    def look(*others):
        cores(1, 1, *others)
        ours.adapt()
        return number[0]

    assert [look(1, 0, 0, 0), look(1, 0, 0, 0)] == [3, 2]  # after two looks that agree
    assert [look(0, 0, 0, 0), look(0, 1, 0, 1), look(0, 1, 0, 1)] == [2, 2, 1]
    assert [look(1, 1, 1, 1), look(1, 1, 1, 1)] == [1, 1]  # never none
    assert [look(0, 0, 0, 0), look(0, 0, 0.9, 0)] == [1, 3]
    number[0] = 2  # as by torch.set_num_threads
    assert [look(1, 1, 0, 0), look(1, 1, 0, 0)] == [2, 2]


@needs("torch")
def test_threads_that_the_user_has_set_stay(monkeypatch):
    from twingpt.backends.torch import threads

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(threads._threads.__wrapped__(), threads.Threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads._threads.__wrapped__() is None


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_how_long_openmp_spins_is_limited_unless_the_user_says(monkeypatch, name):
    monkeypatch.setattr(host.os, "environ", {})
    host.limit_spinning()
    assert host.os.environ == {"GOMP_SPINCOUNT": "100000"}
    monkeypatch.setattr(host.os, "environ", {name: "active"})
    host.limit_spinning()
    assert host.os.environ == {name: "active"}


def test_openmp_hears_of_it_before_its_library_is_loaded():
    code = "from twingpt.backends import registry; import os, sys; assert 'torch' not in sys.modules; registry.get();"
    code += "assert os.environ['GOMP_SPINCOUNT'] == '100000' and {'torch', 'mlx'} & sys.modules.keys()"
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean)
