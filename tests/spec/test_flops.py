"""What a model computes, what a device can compute, and the share between them."""

import math
from types import SimpleNamespace

import pytest

from tests.conftest import cpu
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig
from twingpt.core.presets import preset
from twingpt.training import flops


def gpu(description: str, kind: str = "cuda") -> Device:
    return Device(f"{kind}:0", kind, description, ("float32",), ("float32",), "float32", 2**34)


def test_flops_of_gpt2_are_those_of_its_matrices():
    config = preset("gpt2", 50257)
    matrices = 12 * 12 * 768 * 768 + 50257 * 768  # of the blocks, and of the head
    attention = 12 * 12 * 768 * 1024
    assert flops.flops_per_token(config) == pytest.approx(6 * matrices + attention, rel=2e-3)  # norms and biases


def test_flops_count_the_head_once_and_no_table():
    tied = GPTConfig(vocab_size=1000, n_layer=2, n_embd=64, block_size=128)
    untied = GPTConfig(vocab_size=1000, n_layer=2, n_embd=64, block_size=128, tie_embeddings=False)
    assert flops.flops_per_token(tied) == flops.flops_per_token(untied)
    learned = GPTConfig(vocab_size=1000, n_layer=2, n_embd=64, block_size=128, position="learned")
    assert flops.flops_per_token(learned) == flops.flops_per_token(tied)
    more = GPTConfig(vocab_size=1001, n_layer=2, n_embd=64, block_size=128)
    assert flops.flops_per_token(more) - flops.flops_per_token(tied) == 6 * 64


def test_a_window_shortens_attention():
    wide, narrow = (GPTConfig(vocab_size=100, block_size=512, sliding_window=window) for window in (0, 128))
    assert flops.flops_per_token(wide) - flops.flops_per_token(narrow) == 12 * 4 * 256 * (512 - 128)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA A100 80GB PCIe", "float16", 312),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "float32", 67),
        ("Tesla T4", "float16", 65),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("AMD Instinct MI250X", "bfloat16", 191.5),
        ("AMD Instinct MI300X", "float16", 1307.4),
    ],
)
def test_documented_peaks(name, dtype, tflops):
    peak = flops.documented_peak(gpu(name), dtype)
    assert peak == flops.Peak(pytest.approx(tflops * 1e12), "documented")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
        ("NVIDIA A10G", "bfloat16"),
        ("NVIDIA H20", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("NVIDIA B200", "float32"),
        ("a GPU of next year", "float32"),
    ],
)
def test_what_is_not_documented_is_not_guessed(name, dtype):
    assert flops.documented_peak(gpu(name), dtype) is None


def test_a_cpu_named_as_a_gpu_is_none():
    assert flops.documented_peak(gpu("NVIDIA H200", "cpu"), "float32") is None


class Fake:
    """A backend whose n x n product takes as long as a device of `flops_per_second` needs."""

    def __init__(self, flops_per_second: float, monkeypatch) -> None:
        self.now, self.speed, self.sizes = 0.0, flops_per_second, []
        monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(flops, "SECONDS", 0.25)

    def matmul(self, device, dtype, n):
        self.sizes.append(n)
        runs = []

        def product():
            runs.append(n)
            slow = 2 if len(runs) == 1 else 1  # the first one warms up
            self.now += slow * 2 * n**3 / self.speed

        return product


@pytest.mark.parametrize(("speed", "largest"), [(1e9, 256), (150e9, 1024), (800e12, 8192)])
def test_the_measured_peak_uses_the_largest_product_that_fits_the_time(monkeypatch, speed, largest):
    fake = Fake(speed, monkeypatch)
    assert flops.measured_peak(fake, gpu("x"), "float32") == flops.Peak(pytest.approx(speed), "measured")
    assert fake.sizes[-1] == largest
    assert fake.now < 0.3


def test_a_product_that_fails_gives_no_peak():
    class Broken:
        def matmul(self, device, dtype, n):
            raise RuntimeError("not on this device")

    assert flops.peak(Broken(), gpu("x"), "float32") is None
    assert flops.mfu(1000.0, GPTConfig(vocab_size=10), None) is None


def test_every_device_here_has_a_measured_peak(engines):
    for dtype in cpu(engines).dtypes:
        peak = flops.peak(engines, cpu(engines), dtype)
        assert peak and peak.source == "measured" and peak.flops_per_second > 0


def test_mfu_is_the_share_of_the_peak():
    config = GPTConfig(vocab_size=100)
    speed = 1e12 / flops.flops_per_token(config)
    assert math.isclose(flops.mfu(speed, config, flops.Peak(4e12, "measured")), 0.25)
    assert flops.mfu(speed, config, flops.Peak(0.9e12, "measured")) is None  # it can't have been the peak
