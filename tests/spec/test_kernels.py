"""The checks of fused kernels: they pass on every device here, and name the part that is wrong."""

import math
from types import SimpleNamespace

import pytest

from tests.conftest import KERNEL_CASES, needs
from twingpt.backends import registry
from twingpt.checks.kernels import Case, check

PARTS = ("forward", "chunk", "step", "sampling", "gradient")


def test_the_cases_reach_the_kernels():
    assert {head_dim for head_dim, _, T in KERNEL_CASES if T > 512} == {64, 128}  # beyond a chunk of a prefill
    assert {vocab_size for _, vocab_size, _ in KERNEL_CASES} >= {50304}


@pytest.mark.parametrize("size", KERNEL_CASES, ids=str)
def test_every_device_computes_what_the_reference_does(placed, size):
    checks = list(check(placed, placed.device, placed.device.name, "float32", Case(*size, 1337)))
    assert tuple(each.part for each in checks) == PARTS
    assert all(each.ok for each in checks), [each.describe() for each in checks]


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_is_nearer_than_its_tolerance_and_farther_than_float32(placed, dtype):
    placed.needs_dtype(dtype)
    checks = list(check(placed, placed.device, placed.device.name, dtype, Case(64, 257, 40, 1337)))
    assert all(each.ok for each in checks), [each.describe() for each in checks]
    assert checks[0].max_rel_diff > 1e-4


def faulty(part: str):
    """The torch backend with one part that is a thousandth off, or with something worse."""
    engines = registry.get("torch")

    class Inference(engines.InferenceEngine):
        def forward(self, tokens):
            if part == "nothing runs":
                raise RuntimeError("no kernel for this\nand a trace")
            return super().forward(tokens) * {"forward": 1.001, "not finite": math.nan}.get(part, 1)

        def logits(self, handle):
            off = part == ("chunk" if handle.sampled is None else "step")
            return super().logits(handle) * (1.001 if off else 1)

        def read(self, handle):
            sampled = super().read(handle)
            if part == "sampling":
                sampled.tokens[:] = (sampled.tokens + 1) % self.config.vocab_size
            return sampled

    class Train(engines.TrainEngine):
        def state(self):
            for name, value in super().state():
                yield name, value * (1.01 if part == "gradient" and name.endswith("q_proj.weight") else 1)

    return SimpleNamespace(NAME="torch", InferenceEngine=Inference, TrainEngine=Train)


@needs("torch")
@pytest.mark.parametrize("part", [*PARTS, "not finite", "nothing runs"])
def test_a_fault_is_found_in_its_part(part):
    (device,) = [each for each in registry.get("torch").devices() if each.kind == "cpu"]
    found = {each.part: each for each in check(faulty(part), device, "cpu", "float32", Case(64, 257, 24, 1337))}
    failed = {name for name, each in found.items() if not each.ok}
    also = {"sampling": {"step"}, "not finite": {"forward"}, "nothing runs": set(PARTS)}
    assert failed - also.get(part, set()) == {part} & set(PARTS)
    if part == "not finite":
        assert found["forward"].describe().endswith("not finite")
    if part == "nothing runs":
        assert {each.error for each in found.values()} == {"no kernel for this"}
