"""The parametrization over devices takes every device that a backend has, here where only CPUs are."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tests import conftest, devices
from tests.conftest import Placed, cpu, pytest_generate_tests, within
from twingpt.checks.tolerances import float32_tolerance
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise


class Metafunc:
    """What pytest hands to `pytest_generate_tests`, for a test that asks for both."""

    fixturenames = ("placed", "placed_twins")

    def __init__(self):
        self.parameters = {}

    def parametrize(self, name, parameters, **_):
        self.parameters[name] = {entry.id: entry for entry in parameters}


def test_a_second_device_and_one_that_fails_are_taken_too(twins, monkeypatch):
    monkeypatch.setattr(conftest, "places", conftest.places.__wrapped__)
    own = {engines.NAME: cpu(engines) for engines in twins}
    second = dataclasses.replace(own["torch"], name="cpu:0")
    broken = dataclasses.replace(own["torch"], name="nowhere", kind="mps")
    monkeypatch.setattr(twins[0], "devices", lambda: [own["mlx"]])
    monkeypatch.setattr(twins[1], "devices", lambda: [broken, second, own["torch"]])
    metafunc = Metafunc()
    pytest_generate_tests(metafunc)
    single, pairs = metafunc.parameters["placed"], metafunc.parameters["placed_twins"]
    assert [*single] == ["mlx-cpu", "torch-nowhere", "torch-cpu:0", "torch-cpu"]
    assert [*pairs] == ["twins-cpu", "torch-nowhere", "torch-cpu:0"]
    for found in (single, pairs):
        (mark,) = found["torch-nowhere"].marks
        assert mark.args == (True,) and mark.kwargs["reason"].startswith("torch can't use nowhere: ")
        assert not found["torch-cpu:0"].marks[0].args[0]
    assert [placed.device for placed in pairs["torch-cpu:0"].values[0]] == [own["mlx"], second]
    config = GPTConfig(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=16)
    placed = single["torch-cpu:0"].values[0]
    engine = placed.InferenceEngine(config, initialise(config, 0), placed.device)
    assert engine.device is second and np.isfinite(engine.forward(np.array([[1, 2, 3]]))).all()


@pytest.mark.parametrize(
    ("kind", "description", "limits"),
    [
        ("cpu", "Apple M1 (Virtual)", (1e-6, 1e-6)),
        ("metal", "Apple M3 Pro", (1e-5, 1e-4)),
        ("cuda", "NVIDIA H100", (1e-5, 1e-5)),
        ("mps", "Apple M3 Pro", (1e-5, 1e-5)),
        ("metal", "Apple Paravirtual device", (1e-3, 1e-3)),
        ("mps", "Apple M1 (Virtual)", (1e-3, 1e-3)),
    ],
)
def test_tolerances_by_device_and_length(kind, description, limits):
    device = Device("x", kind, description, ("float32",), ("float32",), "float32", None)
    placed = Placed(None, device)
    assert tuple(placed.within(1e-6, length) for length in (24, 1000)) == pytest.approx(limits)
    assert within(2e-3, placed, placed) == 2e-3
    if kind != "cpu":
        assert float32_tolerance(device, 24) == limits[0]


REPORT = """<testsuites><testsuite>
<testcase name="test_logits[mlx-gpu-qwen3]"/>
<testcase name="test_logits[mlx-gpu-gpt2]"><failure message="off"/></testcase>
<testcase name="test_sampler[torch-mps-settings0]"><skipped message="torch can't use mps: no memory"/></testcase>
<testcase name="test_logits[twins-cpu-qwen3]"/>
<testcase name="test_steps[torch-cuda:1]"/>
<testcase name="test_help[torch]"><skipped message="elsewhere"/></testcase>
</testsuite></testsuites>"""


def test_the_table_of_what_passed_on_which_device():
    assert devices.table(ElementTree.fromstring(REPORT)).splitlines() == [
        "| device | passed | failed | skipped |",
        "| --- | --: | --: | --: |",
        "| mlx-gpu | 1 | 1 | 0 |",
        "| no device of its own | 0 | 0 | 1 |",
        "| torch-cuda:1 | 1 | 0 | 0 |",
        "| torch-mps | 0 | 0 | 1 |",
        "| twins-cpu | 1 | 0 | 0 |",
        "",
        "torch-mps skipped: torch can't use mps: no memory",
    ]
