"""Which devices have fused attention for which heads, and what `gpt train` says of it."""

import pytest

from tests.cli.test_train import SMALL, logged
from twingpt.backends.fused import head_note
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig
from twingpt.training import summary

EVALUATION, DECODING = "evaluation and prompts", "decoding"
BOTH_PARTS = f"{EVALUATION} and {DECODING}"
EVERYTHING = "training, evaluation and decoding"


def note(kind: str, width: int, group: int = 2) -> str | None:
    device = Device("x", kind, "a chip", ("float32",), ("float32",), "float32", None)
    return head_note(GPTConfig(vocab_size=9, n_embd=32, n_head=group, n_kv_head=1, head_dim=width), device)


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (16, BOTH_PARTS), (32, BOTH_PARTS), (48, BOTH_PARTS), (64, None), (72, DECODING), (80, DECODING), (96, None),
        (112, BOTH_PARTS), (128, None), (192, BOTH_PARTS), (256, EVALUATION),
    ],
)  # fmt: skip
def test_on_metal(width, missing):
    found = note("metal", width)
    assert (found is None) == (missing is None)
    if missing:
        assert f"a chip has no fused attention for heads {width} wide in {missing}, which" in found
        assert "widths of 64 and 128" in found


def test_on_metal_a_group_may_have_32_queries():
    assert note("metal", 64, 32) is None
    found = note("metal", 64, 33)
    assert "heads 64 wide, 33 to a key in decoding, which" in found and "at most 32 queries to a key" in found


@pytest.mark.parametrize(("width", "fine"), [(8, True), (20, False), (48, True), (64, True), (256, True), (264, False)])
def test_on_cuda(width, fine):
    assert (note("cuda", width) is None) == fine
    assert fine or EVERYTHING in note("cuda", width)


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_nothing_is_said_of_other_devices(kind):
    assert note(kind, 20) is None


def test_a_run_says_it_once_at_its_start(gpt, prose, tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = ("train", "--data", prose, "--out", run, *SMALL)
    monkeypatch.setattr(
        summary, "head_note", lambda config, device: f"no kernel for {config.head_dim} on {device.kind}"
    )
    code, out, err = gpt(*command, "--stop-after", 4, "--device", "cpu")
    assert code == 0 and "no kernel for 8 on cpu" in out, err
    code, out, err = gpt("train", "--resume", run)
    assert code == 0 and "no kernel" not in out, err
    assert [entry["message"] for entry in logged(run, "device_noted")] == ["no kernel for 8 on cpu"]
