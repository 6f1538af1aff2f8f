"""Runs that commit 8422d67 wrote, in tests/golden/runs: they load and go on, whatever changes after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import twingpt
from tests.conftest import BOTH

GOLDEN = Path(__file__).parents[1] / "golden"
# What 8422d67 gave: the greedy ids after "The", and the losses of going on to step 26.
GREEDY = {"qwen3": [32] * 30, "nano": [32, 116] * 15}
LOSSES = {"qwen3": (3.3980979919433594, 3.387282609939575), "nano": (4.4373779296875, 4.432486057281494)}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the runs and their text, to be in."""
    shutil.copytree(GOLDEN / "runs", tmp_path / "runs")
    shutil.copy(GOLDEN / "prose.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("run", GREEDY)
@pytest.mark.parametrize("backend", BOTH)
def test_an_old_run_writes_what_it_wrote(run, backend, folder):
    model = twingpt.load(f"runs/{run}", backend, "cpu", "float32")
    assert [response.token for response in model.stream("The", 30, temp=0)] == GREEDY[run]


@pytest.mark.parametrize("run", LOSSES)
@pytest.mark.parametrize("backend", BOTH)
def test_an_old_run_goes_on(gpt, run, backend, folder):
    code, out, err = gpt("train", "--resume", run, "--max-iters", 26, "--backend", backend, "--device", "cpu", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["step"] == 26 and summary["reason"] == "finished"
    assert (summary["train_loss"], summary["val_loss"]) == pytest.approx(LOSSES[run], rel=1e-5)
