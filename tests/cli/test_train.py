"""gpt train: a run from text to checkpoints, and going on with it exactly."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import BOTH, ONE, cpu, dose, needs, open_checkpoint, posix
from twingpt.backends import host, registry
from twingpt.runs import folder as runs
from twingpt.runs.events import read_events
from twingpt.training import launch
from twingpt.training.flops import Peak
from twingpt.training.trainer import Trainer

SMALL = [
    "--tokenizer", "byte", "--n-layer", 2, "--n-head", 4, "--n-kv-head", 2, "--n-embd", 32, "--block-size", 32,
    "--batch-size", 4, "--max-iters", 12, "--warmup-iters", 2, "--eval-interval", 4, "--eval-iters", 4,
    "--checkpoint-interval", 4, "--sample-interval", 0, "--log-interval", 2,
    "--device", "cpu",  # where the same run has the same bits, on a machine with a GPU too
]  # fmt: skip

KEYS = {
    "run", "checkpoint", "backend", "device", "dtype", "step", "train_loss", "val_loss", "val_bpb",
    "tokens_per_second", "mfu", "peak_memory_bytes", "seconds",
}  # fmt: skip

both = pytest.mark.parametrize("backend", BOTH)


def tensors(run) -> dict[str, np.ndarray]:
    opened = open_checkpoint(run)
    return dict(opened.parameters()) | dict(opened.optimizer_state())


def equal(a, b) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


def train(gpt, *arguments) -> dict:
    code, out, err = gpt("train", "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


def logged(run, event="trained") -> list[dict]:
    return [entry for entry in read_events(run / "metrics.jsonl") if entry["event"] == event]


@both
def test_a_run_from_text_to_checkpoints(gpt, prose, tmp_path, backend, monkeypatch):
    monkeypatch.setattr(launch, "peak", lambda *_: Peak(1e15, "documented"))
    run = tmp_path / "run"
    result = train(gpt, "--data", prose, "--out", run, "--backend", backend, *SMALL)
    assert set(result) >= KEYS
    assert result["backend"] == backend and result["device"] == "cpu" and result["step"] == 12
    assert result["run"] == str(run) and result["val_loss"] < 5.4 and 0 < result["val_bpb"] < 8
    assert {path.name for path in run.iterdir()} == {
        "run.json", "config.toml", "metrics.jsonl", "checkpoints", "latest", "best", "loss.svg", "report.html",
    }  # fmt: skip
    assert [path.name for path in runs.checkpoints(run)] == ["step-00000008", "step-00000012"]
    assert (run / "latest").read_text("utf-8") == "step-00000012\n"
    described = json.loads((run / "run.json").read_text("utf-8"))
    assert described["config"]["n_embd"] == 32 and described["train"]["max_iters"] == 12
    assert [entry["step"] for entry in logged(run)] == [2, 4, 6, 8, 10, 12]
    assert 0 < result["mfu"] < 1 and all(0 < entry["mfu"] < 1 for entry in logged(run))
    assert [entry["step"] for entry in logged(run, "evaluated")] == [0, 4, 8, 12]
    assert logged(run, "evaluated")[-1]["val_loss"] == result["val_loss"]
    state = open_checkpoint(run).training()
    assert state["step"] == 12 and state["tokens"] == 12 * 4 * 32 and state["val_loss"] == result["val_loss"]


@pytest.mark.parametrize("backend", ONE)
def test_a_busy_machine_is_told_of_once(gpt, prose, tmp_path, backend, monkeypatch):
    monkeypatch.setattr(host, "cores", lambda: 2)
    loads = iter([None, 0.9, 0.2, None, 1.04, 1.2, 2.0])
    monkeypatch.setattr(host.OtherLoad, "read", lambda self: next(loads, 2.0))
    run = tmp_path / "run"
    code, out, err = gpt("train", "--data", prose, "--out", run, "--backend", backend, *SMALL, "--log-interval", 1)
    assert code == 0, err
    what = "Other processes keep 1.2 of 2 cores busy, and the run goes slower for it."
    assert [(told["step"], told["message"]) for told in logged(run, "machine_noted")] == [(6, what)]
    assert " ".join(out.split()).count(what) == 1


@needs("torch")
def test_mfu_is_null_where_no_peak_is_known(gpt, prose, tmp_path, monkeypatch):
    def fails(device, dtype, n):
        raise RuntimeError("no products here")

    monkeypatch.setattr(registry.get("torch"), "matmul", fails)
    run = tmp_path / "run"
    code, out, err = gpt("train", "--data", prose, "--out", run, "--backend", "torch", *SMALL)
    assert code == 0 and "MFU n/a" in out, err
    assert all(entry["mfu"] is None for entry in logged(run))
    assert train(gpt, "--resume", run, "--backend", "torch", "--max-iters", 16)["mfu"] is None


@both
@pytest.mark.parametrize("optimizer", dose("muon", "adamw"))
def test_a_resumed_run_is_bit_identical(gpt, prose, tmp_path, backend, optimizer):
    common = ["--data", prose, "--backend", backend, "--optimizer", optimizer, *SMALL]
    common += ["--dropout", 0.1, "--gradient-accumulation-steps", 2]
    train(gpt, *common, "--out", tmp_path / "whole")
    stopped = train(gpt, *common, "--out", tmp_path / "parts", "--stop-after", 5)
    assert stopped["step"] == 5 and stopped["reason"] == "stop-after"
    train(gpt, "--resume", tmp_path / "parts", "--backend", backend, "--stop-after", 7)
    last = train(gpt, "--resume", tmp_path / "parts", "--backend", backend)
    assert last["step"] == 12
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    whole, parts = (logged(tmp_path / name, "evaluated") for name in ("whole", "parts"))
    assert whole[-1]["val_loss"] == parts[-1]["val_loss"]


@pytest.mark.parametrize("optimizer", dose("muon", "adamw"))
def test_a_run_goes_on_on_the_other_backend(gpt, prose, tmp_path, twins, optimizer):
    """Losses follow those of the run that stayed where it was: state and data position are carried over."""
    common = [
        "--data",
        prose,
        "--optimizer",
        optimizer,
        *SMALL,
        "--max-iters",
        60,
        "--eval-interval",
        0,
        "--log-interval",
        1,
        "--keep",
        99,
    ]
    train(gpt, *common, "--out", tmp_path / "stays", "--backend", "torch")
    for first, second in (("torch", "mlx"), ("mlx", "torch")):
        run = tmp_path / f"{first}-{second}"
        train(gpt, *common, "--out", run, "--backend", first, "--stop-after", 30)
        result = train(gpt, "--resume", run, "--backend", second)
        assert result["backend"] == second and result["step"] == 60
        stayed, moved = ([entry["loss"] for entry in logged(where)] for where in (tmp_path / "stays", run))
        assert len(stayed) == len(moved) == 60
        assert np.abs(np.subtract(stayed, moved))[:10].max() <= 1e-4
        assert np.abs(np.subtract(stayed, moved)).max() <= 2e-3
        starts = json.loads((run / "run.json").read_text("utf-8"))["starts"]
        assert [start["backend"] for start in starts] == [first, second]


@needs("torch")
def test_resuming_from_an_earlier_checkpoint_forgets_what_came_after(gpt, prose, tmp_path):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, "--backend", "torch", *SMALL, "--keep", 99)
    before = tensors(run)
    result = train(gpt, "--resume", f"{run}@4", "--backend", "torch")
    assert result["step"] == 12 and equal(before, tensors(run))
    assert [entry["step"] for entry in logged(run)] == [2, 4, 6, 8, 10, 12]


@needs("torch")
def test_a_longer_schedule_and_a_finished_run(gpt, prose, tmp_path):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, "--backend", "torch", *SMALL)
    done = train(gpt, "--resume", run, "--backend", "torch")
    assert done["step"] == 12 and done["reason"] == "finished"
    assert train(gpt, "--resume", run, "--backend", "torch", "--max-iters", 16)["step"] == 16


@needs("torch")
def test_resume_without_the_prepared_data_or_the_original(gpt, prose, tmp_path, monkeypatch):
    run = tmp_path / "run"
    common = ["--data", prose, "--backend", "torch", *SMALL]
    train(gpt, *common, "--tokenizer", "bpe", "--vocab-size", 300, "--out", run, "--stop-after", 4)
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "another"))
    (tmp_path / "another").mkdir()
    moved = prose.rename(tmp_path / "moved.txt")
    folder = json.loads((run / "run.json").read_text("utf-8"))["data"]["folder"]
    os.rename(folder, folder + "-gone")
    code, _, err = gpt("train", "--resume", run, "--backend", "torch")
    assert code == 2 and "There is no file or folder" in err
    assert train(gpt, "--resume", run, "--backend", "torch", "--data", moved)["step"] == 12
    moved.write_text(moved.read_text("utf-8") + "Something else.")
    code, _, err = gpt("train", "--resume", run, "--backend", "torch", "--data", moved)
    assert code == 2 and "fingerprint differs" in err


def killed(gpt, *arguments) -> None:
    """A start that ends before the first step."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", interrupted)
        assert gpt("train", *arguments)[0] == 130


def test_a_run_without_a_checkpoint_is_resumed_from_its_beginning(gpt, prose, tmp_path):
    run = tmp_path / "run"
    whole = train(gpt, "--data", prose, "--out", tmp_path / "whole", *SMALL, "--max-iters", 8, "--warmup-iters", 2)
    killed(gpt, "--data", prose, "--out", run, *SMALL)
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "run.json"]
    before = (run / "run.json").read_bytes()
    code, _, err = gpt("train", "--resume", run, "--seed", 7)
    assert code == 2 and "--seed 7 conflicts with the run, which has 1337" in err
    code, _, err = gpt("generate", run, "-p", "x")
    assert code == 2 and "has no checkpoint latest: it has none yet" in err
    assert (run / "run.json").read_bytes() == before
    killed(gpt, "--resume", run, "--max-iters", 8)
    assert train(gpt, "--resume", run)["step"] == whole["step"] == 8
    assert equal(tensors(run), tensors(tmp_path / "whole"))
    assert len(json.loads((run / "run.json").read_text("utf-8"))["starts"]) == 3


def test_a_run_without_a_checkpoint_and_other_data(gpt, prose, tmp_path):
    run = tmp_path / "run"
    killed(gpt, "--data", prose, "--out", run, *SMALL)
    described = json.loads((run / "run.json").read_text("utf-8"))
    other = tmp_path / "other.txt"
    other.write_text(prose.read_text("utf-8") + "Something else.")
    code, _, err = gpt("train", "--resume", run, "--data", other)
    assert code == 2 and "fingerprint differs" in err
    (run / "run.json").write_text(json.dumps({**described, "config": {**described["config"], "n_layers": 3}}))
    code, _, err = gpt("train", "--resume", run)
    assert code == 2 and "did you mean 'n_layer'" in err


@needs("torch")
def test_what_a_resumed_run_changed_outlives_a_kill(gpt, prose, tmp_path):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, "--backend", "torch", *SMALL, "--stop-after", 4)
    killed(gpt, "--resume", run, "--backend", "torch", "--max-iters", 16)
    assert train(gpt, "--resume", run, "--backend", "torch")["step"] == 16


@needs("torch")
def test_a_finished_run_is_not_evaluated_or_sampled_twice(gpt, prose, tmp_path):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, "--backend", "torch", *SMALL, "--sample-interval", 6)
    before, best = list(read_events(run / "metrics.jsonl")), runs.pointed(run, "best")
    train(gpt, "--resume", run, "--backend", "torch")
    train(gpt, "--resume", run, "--backend", "torch", "--max-iters", 16, "--stop-after", 14)
    events = [(event["event"], event["step"]) for event in read_events(run / "metrics.jsonl")]
    before = [event for event in before if event["event"] != "baseline"]  # each start tells it anew
    events = [event for event in events if event[0] != "baseline"]
    assert events.count(("evaluated", 12)) == events.count(("sampled", 12)) == events.count(("saved", 12)) == 1
    assert [event for event in events if event[1] < 12] == [
        (event["event"], event["step"]) for event in before if event["step"] < 12
    ]
    assert best.name == "step-00000012"


@needs("torch")
@posix("another process can send no Ctrl-C on Windows")
@pytest.mark.soak  # test_kill.py has the signals; this is the command as it is typed
def test_ctrl_c_saves_and_says_how_to_go_on(prose, tmp_path):
    command = [sys.executable, "-m", "twingpt", "train", "--data", prose, "--out", "run", "--backend", "torch", *SMALL]
    command += ["--max-iters", 10**7, "--checkpoint-interval", 0, "--eval-interval", 0]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 200
    while not logged(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 130, out
    assert "interrupted after" in out and "gpt train --resume run" in out and "Traceback" not in out
    opened = open_checkpoint(tmp_path / "run")
    assert 0 < opened.training()["step"] < 10**7


@needs("torch")
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(gpt, prose, tmp_path):
    run = tmp_path / "run"
    common = ["--data", prose, "--out", run, "--backend", "torch", *SMALL, "--grad-clip", 0, "--warmup-iters", 0]
    code, _, err = gpt("train", *common, "--learning-rate", 1e30, "--eval-interval", 0)
    assert code == 2 and "is not finite: lower the learning rate" in err
    assert not runs.checkpoints(run)
    code, _, err = gpt("train", *common, "--learning-rate", 1e30, "--log-interval", 100)  # seen by an evaluation first
    assert code == 2 and re.search(r"gpt: The (loss|gradient) of step \d is not finite", err), err


@both
def test_a_step_that_is_not_finite_can_be_skipped(gpt, prose, tmp_path, backend, monkeypatch):
    engines = registry.get(backend)
    forward_backward, calls = engines.TrainEngine.forward_backward, []

    def poisoned(self, tokens, targets, windows):
        forward_backward(self, tokens, targets, windows)
        calls.append(windows)
        if len(calls) == 5:
            self.losses[-1] = self.losses[-1] * float("nan")
            grads = self.grads if backend == "mlx" else {name: p.grad for name, p in self.params.items()}
            for name in grads:
                grads[name] *= float("nan")

    monkeypatch.setattr(engines.TrainEngine, "forward_backward", poisoned)
    common = ["--data", prose, "--backend", backend, *SMALL]
    code, _, err = gpt("train", *common, "--out", tmp_path / "stops")
    assert code == 2 and "The loss of step 5 is not finite" in err and "the last checkpoint is good" in err
    calls.clear()
    code, out, _ = gpt("train", *common, "--out", tmp_path / "skips", "--skip-nonfinite")
    assert code == 0 and "not finite and left out, 1 steps so far" in out
    assert open_checkpoint(tmp_path / "skips").training()["skipped"] == 1
    assert all(np.isfinite(array).all() for array in tensors(tmp_path / "skips").values())
    assert [entry["skipped"] for entry in logged(tmp_path / "skips")] == [0, 0, 1, 1, 1, 1]


@needs("torch")
def test_skipping_ends_when_nothing_is_finite_any_more(gpt, prose, tmp_path):
    common = ["--data", prose, "--backend", "torch", *SMALL, "--max-iters", 150, "--eval-interval", 0]
    common += ["--checkpoint-interval", 0, "--skip-nonfinite", "--learning-rate", 1e30, "--warmup-iters", 0]
    code, _, err = gpt("train", *common, "--out", tmp_path / "run")
    assert code == 2 and "as those of the 99 before it, is not finite" in err


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(pytest.param(*pair, marks=needs(pair[0])) for pair in [("torch", "float16"), ("mlx", "bfloat16")]),
     *(pytest.param(*pair, marks=[needs(pair[0]), pytest.mark.soak]) for pair in
       [("torch", "bfloat16"), ("mlx", "float16")])],
)  # fmt: skip
def test_half_precision_runs_resume_exactly(gpt, prose, tmp_path, backend, dtype):
    common = ["--data", prose, "--backend", backend, *SMALL, "--dtype", dtype, "--gradient-checkpointing"]
    train(gpt, *common, "--out", tmp_path / "whole")
    train(gpt, *common, "--out", tmp_path / "parts", "--stop-after", 5)
    train(gpt, "--resume", tmp_path / "parts", "--backend", backend)
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    assert ("loss_scale" in tensors(tmp_path / "whole")) == (dtype == "float16")


@both
def test_samples_and_the_display(gpt, prose, tmp_path, backend):
    code, out, err = gpt(
        "train", "--data", prose, "--out", tmp_path / "run", "--backend", backend, *SMALL, "--sample-interval", 6
    )
    assert code == 0 and err == ""
    assert "parameters on " + backend in out and "a sample after 6 steps" in out and "best so far" in out
    assert "gpt generate" in out and "ETA" in out
    assert [entry["step"] for entry in logged(tmp_path / "run", "sampled")] == [6, 12]


@needs("torch")
def test_a_text_file_gets_a_bpe_of_its_own(gpt, prose, tmp_path):
    arguments = [a for a in SMALL if a not in ("--tokenizer", "byte")]
    train(gpt, "--data", prose, "--out", tmp_path / "run", "--vocab-size", 300, *arguments, "--max-iters", 2)
    assert open_checkpoint(tmp_path / "run").tokenizer().kind == "bpe"


@both
def test_bfloat16_run(gpt, prose, tmp_path, backend):
    result = train(gpt, "--data", prose, "--out", tmp_path / "run", "--backend", backend, *SMALL, "--dtype", "bfloat16")
    assert result["dtype"] == "bfloat16"
    assert all(array.dtype == np.float32 for array in tensors(tmp_path / "run").values())


@needs("torch")
def test_gpt2_shape_trains_too(gpt, prose, tmp_path):
    arguments = [a for a in SMALL if a not in ("--n-kv-head", 2)]
    position = SMALL.index("--n-layer")
    arguments = ["--tokenizer", "byte", "--n-layer", 2, *SMALL[position + 2 : position + 4], *SMALL[position + 6 :]]
    train(gpt, "--data", prose, "--out", tmp_path / "run", "--shape", "gpt2", *arguments)
    assert open_checkpoint(tmp_path / "run").config.position == "learned"


@both
def test_a_run_in_the_float16_of_its_device_goes_on_converts_and_writes(gpt, prose, tmp_path, backend, monkeypatch):
    """As on an M1: float16 with its loss scale comes from the device, is kept in run.json, and needs no flag again."""
    engines = registry.get(backend)
    metal = dataclasses.replace(cpu(engines), fast_dtypes=("float32", "float16"), default_dtype="float16")
    monkeypatch.setattr(engines, "devices", lambda: [metal])
    monkeypatch.setattr(host, "dtype_reason", lambda device: "the chip has none for bfloat16")
    run, options = tmp_path / "run", ["--data", prose, "--backend", backend, *SMALL]
    code, out, err = gpt("train", *options, "--out", run, "--stop-after", 5)
    assert code == 0 and "in float16 (the chip has none for bfloat16)" in " ".join(out.split()), err
    assert json.loads((run / "run.json").read_text("utf-8"))["train"]["dtype"] == "float16"
    monkeypatch.setattr(engines, "devices", lambda: [dataclasses.replace(metal, default_dtype="float32")])
    result = train(gpt, "--resume", run, "--backend", backend)
    assert result["dtype"] == "float16" and result["step"] == 12 and result["val_loss"] < 5.4
    train(gpt, *options, "--out", tmp_path / "whole", "--dtype", "float16")
    whole = tensors(tmp_path / "whole")
    assert equal(whole, tensors(run)) and whole["loss_scale"] > 1
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in whole.values())
    assert gpt("convert", run, tmp_path / "half", "--to", "hf", "--dtype", "float16")[0] == 0
    for model, dtype in ((run, "float32"), (tmp_path / "half", "float16")):
        code, out, err = gpt("generate", model, "-p", "The", "-m", 5, "--backend", backend, "--json")
        assert code == 0 and json.loads(out)["dtype"] == dtype, err
