"""What gpt doctor says of MLX's wheels on a Mac, played on Linux with the wheels' own files, and of dtypes by chip.

WHEEL and the first bytes of mlx/lib/mlx.metallib are those of mlx-metal 0.32.4 from the registry.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from tests.conftest import BOTH, cpu, needs
from twingpt.backends import host, registry
from twingpt.backends.mlx import wheel
from twingpt.checks import doctor
from twingpt.core.backend import Device

HEADERS = {
    "15": bytes.fromhex("4d544c4201800200080000810f000000a0c8c008"),
    "26": bytes.fromhex("4d544c4201800200090000811a000200a0c4c30c"),
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install wheels of mlx and mlx-metal, before all others, with the kernels of the wheel for a macOS."""

    def install(mlx="0.32.4", metal="0.32.4", macos="15"):
        for name, version, tag in (("mlx", mlx, "cp311-cp311"), ("mlx-metal", metal, "py3-none")):
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
            (info / "WHEEL").write_text(
                "Wheel-Version: 1.0\nGenerator: setuptools (84.0.0)\nRoot-Is-Purelib: false\n"
                f"Tag: {tag}-macosx_{macos}_0_arm64\n\n"
            )
        (tmp_path / "mlx" / "lib").mkdir(parents=True)
        (tmp_path / "mlx" / "lib" / "mlx.metallib").write_bytes(HEADERS[macos])
        monkeypatch.syspath_prepend(str(tmp_path))

    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    return install


@pytest.mark.parametrize(("macos", "system"), [("15", "15.0"), ("15", "26.1"), ("26", "26.2"), ("26", "27.0")])
def test_wheels_that_fit(installed, macos, system):
    installed(macos=macos)
    assert wheel.examine(system, "Apple M3 Pro") == {
        "mlx": "0.32.4",
        "mlx_metal": "0.32.4",
        "wheel": f"macosx_{macos}_0_arm64",
        "built_for": {"15": "15.0", "26": "26.2"}[macos],
        "notes": [],
    }


def test_wheels_of_two_versions(installed):
    installed(metal="0.31.2")
    (note,) = wheel.examine("15.7", "Apple M1")["notes"]
    assert note.startswith("mlx 0.32.4 and mlx-metal 0.31.2 don't fit each other: pip install --upgrade --force-reinst")


def test_kernels_of_a_later_macos(installed):
    installed(macos="26")
    (note,) = wheel.examine("15.7.4", "Apple M2")["notes"]
    assert note.startswith("mlx-metal's kernels are for macOS 26.2, and this is 15.7.4: update it, or pip install")
    (note,) = wheel.examine("26.0.1", "Apple M2")["notes"]  # whose tag, macosx_26_0, pip takes there
    assert note == "mlx-metal's kernels are for macOS 26.2, and this is 26.0.1: update it."


def test_the_neural_accelerators_of_m5(installed, monkeypatch):
    installed(macos="15")
    accelerators, tf32 = wheel.examine("26.3", "Apple M5 Max")["notes"]
    assert accelerators.startswith("Only the macOS 26 wheel of mlx-metal has the kernels for this chip's neural")
    assert "are exact; MLX_ENABLE_TF32=1 rounds them" in tf32
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    assert "are rounded to 10 bits; MLX_ENABLE_TF32=0 makes" in wheel.examine("26.3", "Apple M5")["notes"][-1]
    assert wheel.examine("26.3", "Apple M4")["notes"] == []


def test_the_macos_26_wheel_on_an_m5_lacks_nothing(installed):
    installed(macos="26")
    (tf32,) = wheel.examine("26.3", "Apple M5")["notes"]
    assert "MLX_ENABLE_TF32" in tf32


def test_wheels_that_are_not_there(monkeypatch):
    found = {"mlx": SimpleNamespace(version="0.32.4"), "mlx-metal": None}
    monkeypatch.setattr(wheel, "_distribution", found.get)
    known = wheel.examine("15.0", "Apple M1")
    assert known["mlx_metal"] is known["wheel"] is known["built_for"] is None
    assert known["notes"][0].startswith("mlx 0.32.4 and mlx-metal missing don't fit each other: pip install")
    found["mlx"] = None
    assert wheel.examine("15.0", "Apple M1")["notes"] == []


# In gpt doctor ----------------------------------------------------------------------------------------------


@pytest.fixture
def mac(monkeypatch, installed):
    installed()
    platform = SimpleNamespace(
        system=lambda: "Darwin", mac_ver=lambda: ("15.7.4", ("", "", ""), "arm64"),
        platform=lambda: "macOS-15.7.4-arm64-arm-64bit", python_version=lambda: "3.12.1",
    )  # fmt: skip
    monkeypatch.setattr(doctor, "platform", platform)
    monkeypatch.setattr(host, "cpu_name", lambda: "Apple M2")


@pytest.mark.parametrize("backend", BOTH)
def test_doctor_shows_a_mac_and_why_it_trains_in_float16(gpt, mac, backend, monkeypatch):
    engines = registry.get(backend)
    (processor,) = [device for device in engines.devices() if device.kind == "cpu"]
    metal = dataclasses.replace(processor, name="gpu", kind="metal", default_dtype="float16")
    limits = {"wired": 0, "cache": 15 * 10**9, "memory": 15 * 10**9}
    facts = {"version": "0.32.4", "metal": True, "working_set_bytes": 11 * 10**9, "limits": limits}
    monkeypatch.setattr(doctor, "_backend", lambda name: (facts, [{"backend": name, **doctor._device(engines, metal)}]))
    monkeypatch.setattr(registry, "find_device", lambda engines, name: metal)
    monkeypatch.setattr(doctor.flops, "measured_peak", lambda *_: None)
    self_test = {"ok": True, "tolerance": 1e-5, "max_rel_diff": None, "failed": [], "left_out": []}
    monkeypatch.setattr(doctor, "_self_test", lambda *_: self_test)
    code, out, err = gpt("doctor", "--backend", backend)
    assert code == 0, err
    for part in (
        "macOS 15.7.4 on Apple M2: mlx 0.32.4, mlx-metal 0.32.4 (macosx_15_0_arm64, kernels for macOS 15.0)",
        "working set 11.0 GB; limits: wired 0 B, cache 15.0 GB, memory 15.0 GB.",
        "In float16, because M1 and M2 have none for bfloat16; it has a loss scale.",
    ):
        assert " ".join(part.split()) in " ".join(out.split()), part
    found = json.loads(gpt("doctor", "--backend", backend, "--json")[1])
    assert found["mac"]["wheel"] == "macosx_15_0_arm64" and found["mac"]["macos"] == "15.7.4"
    assert found["choice"]["dtype"] == "float16" and "M1 and M2" in found["choice"]["dtype_why"]


@needs("mlx")
def test_doctor_shows_the_wheels_where_they_do_not_load(gpt, mac, monkeypatch):
    """And doesn't import mlx once more, which a failed import may have left half done."""
    imported = []

    def fails(name="auto"):
        imported.append(name)
        raise doctor.UserError("The wheel of mlx-metal doesn't fit this macOS, or this mlx.")

    monkeypatch.setattr(registry, "get", fails)
    monkeypatch.setattr(registry, "choose", lambda name: ("mlx", "Apple silicon: MLX runs on Metal"))
    monkeypatch.setattr(registry, "installed", lambda name: name == "mlx")
    code, out, _ = gpt("doctor")
    assert code == 1 and "mlx-metal 0.32.4 (macosx_15_0_arm64" in " ".join(out.split())
    assert "Choice: none: The wheel of mlx-metal doesn't fit" in " ".join(out.split()) and imported == ["mlx"]


@needs("mlx")
def test_limits_are_read_without_changing_them(monkeypatch):
    import mlx.core as mx

    now = {"wired": 3, "cache": 5}

    def setter(name):
        def set_limit(limit):
            before, now[name] = now[name], limit
            return before

        return set_limit

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: {"max_recommended_working_set_size": 10})
    monkeypatch.setattr(mx, "set_wired_limit", setter("wired"))
    monkeypatch.setattr(mx, "set_cache_limit", setter("cache"))
    monkeypatch.setattr(mx, "get_memory_limit", lambda: 7)
    facts = registry.get("mlx").details()
    assert facts["working_set_bytes"] == 10 and facts["limits"] == {"wired": 3, "cache": 5, "memory": 7}
    assert now == {"wired": 3, "cache": 5}


# By chip ----------------------------------------------------------------------------------------------------


@needs("mlx")
@pytest.mark.parametrize(
    ("chip", "dtype", "why"),
    [
        ("Apple M1", "float16", "loss scale"),
        ("Apple M2 Ultra", "float16", "none for bfloat16"),
        ("Apple M3", "bfloat16", "from M3 on"),
        ("Apple M5 Max", "bfloat16", "from M3 on"),
        ("Apple Paravirtual device", "float32", "nothing is known"),
    ],
)
def test_metal_trains_in_the_dtype_that_the_chip_is_fast_at(monkeypatch, chip, dtype, why):
    import mlx.core as mx

    info = {"device_name": chip, "max_recommended_working_set_size": 10 * 2**30}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    device = registry.get("mlx").devices()[0]
    assert device.default_dtype == device.fast_dtypes[-1] == dtype
    assert why in host.dtype_reason(device)


def test_other_devices_have_no_such_reason(engines):
    assert host.dtype_reason(cpu(engines)) == ""
    assert host.dtype_reason(Device("mps", "mps", "Apple M1", ("float32",), ("float32",), "float32", None)) == ""
