"""Going on with a run: as it was started, on the same held-out windows, and from an earlier step with nothing lost."""

import dataclasses
import functools
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_reports import mlflow_client, mlflow_runs, tell  # noqa: F401  (a fixture)
from tests.cli.test_runs import add_checkpoint
from tests.cli.test_train import SMALL, equal, logged, tensors, train
from tests.conftest import ONE, dose, needs, story, write_run
from twingpt.core.config import TrainConfig
from twingpt.core.errors import UserError
from twingpt.data import mixture, sources
from twingpt.data.prepare import prepare
from twingpt.data.readers import DocumentFile
from twingpt.evaluation import held_out
from twingpt.runs import folder as runs
from twingpt.runs import inventory, trackers
from twingpt.runs.set_aside import UNFINISHED, set_aside
from twingpt.training import memory, resume, settings
from twingpt.training.api import train as train_in_python
from twingpt.training.trainer import Trainer

BRIEF = [*SMALL, "--max-iters", 4, "--eval-iters", 1]
one = pytest.mark.parametrize("backend", ONE)


def described(run) -> dict:
    return json.loads((run / "run.json").read_text("utf-8"))


def older(run) -> None:
    """Make a run what an older version left: neither setup nor evaluation in its run.json."""
    content = {key: value for key, value in described(run).items() if key not in ("setup", "evaluation")}
    del content["data"]["tokenizer"], content["data"]["rules"]
    (run / "run.json").write_text(json.dumps(content))


# As it was started ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["this", "older"])
def test_a_run_goes_on_as_it_was_started(gpt, prose, tmp_path, twins, version):
    """Begun in MLX with a tracker on a machine whose choice is torch."""
    pytest.importorskip("tensorboardX")
    run = tmp_path / "run"
    asked = ["--backend", "mlx", "--device", "cpu", "--report-to", "tensorboard", "--no-compile", "--keep", 5]
    train(gpt, "--data", prose, "--out", run, *BRIEF, *asked, "--stop-after", 2)
    before = settings.read(run / "config.toml")
    assert before["report_to"] == "tensorboard" and before["compile"] is False and before["backend"] == "mlx"
    if version == "older":
        older(run)
    files = len(list((run / "tensorboard").iterdir()))
    result = train(gpt, "--resume", run)
    assert (result["backend"], result["device"], result["step"]) == ("mlx", "cpu", 4)
    assert settings.read(run / "config.toml") == before
    assert described(run)["setup"] == {"wired_limit": None} | {
        key: before[key] for key in ("backend", "device", "compile", "report_to")
    }
    assert len(list((run / "tensorboard").iterdir())) == files + 1


@one
def test_what_is_asked_for_replaces_what_the_run_had_and_stays(gpt, prose, tmp_path, backend, monkeypatch):
    monkeypatch.setattr(trackers, "installed", lambda name: True)
    monkeypatch.setattr(trackers, "make", lambda names, run: made.append(list(names)) or [])
    made = []
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, *BRIEF, "--backend", backend, "--report-to", "wandb", "--stop-after", 1)
    train(gpt, "--resume", run, "--report-to", "mlflow, tensorboard", "--compile", "--no-compile", "--stop-after", 2)
    train_in_python(resume=run, train_config=None)
    assert made == [["wandb"], ["mlflow", "tensorboard"], ["mlflow", "tensorboard"]]
    train(gpt, "--resume", run, "--report-to", "none")
    assert made[-1] == [] and described(run)["setup"]["report_to"] == "none"
    assert described(run)["setup"]["backend"] == backend and described(run)["setup"]["compile"] is False


@one
def test_what_is_not_available_now_is_said_and_comes_back(gpt, prose, tmp_path, backend, monkeypatch):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, *BRIEF, "--backend", backend, "--stop-after", 1)
    content = described(run)
    content["setup"] |= {"backend": "gone", "device": "cuda:7", "report_to": "wandb"}
    (run / "run.json").write_text(json.dumps(content))
    monkeypatch.setitem(trackers.LIBRARIES, "wandb", "not_there_at_all")
    code, out, err = gpt("train", "--resume", run, "--stop-after", 2)
    assert code == 0, err
    assert "The run's backend gone isn't available here: it goes on with " in out
    assert "The run reports to wandb, but not from here: that needs not_there_at_all, which is not installed" in out
    assert [event["step"] for event in logged(run, "setting_replaced")] == [1, 1]
    assert described(run)["setup"] == content["setup"]
    content = described(run)
    content["setup"] |= {"backend": backend, "report_to": None}
    (run / "run.json").write_text(json.dumps(content))
    code, out, err = gpt("train", "--resume", run, "--stop-after", 2)
    assert code == 0 and "The run's device cuda:7 isn't available here: it goes on on cpu." in out, err
    assert "cuda:7" in mistake(gpt, "train", "--resume", run, "--device", "cuda:7")


def test_a_dtype_that_the_device_lacks_is_said():
    cpu = SimpleNamespace(name="cpu", dtypes=("float32",), default_dtype="float32")
    train, notes = resume._with_dtype(TrainConfig(dtype="bfloat16"), cpu, {})
    assert train.dtype == "float32" and notes == [
        "The run's dtype bfloat16 isn't available on cpu: it goes on in float32."
    ]
    with pytest.raises(UserError, match="bfloat16"):
        resume._with_dtype(TrainConfig(dtype="bfloat16"), cpu, {"dtype": "bfloat16"})


# The same held-out windows ----------------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("windows", [1, 5, 8, 0])
def test_an_evaluation_sees_the_same_windows_in_any_micro_batch(prose, windows, monkeypatch):
    class Counts:
        """An engine whose log probability of a target is its own id, negative."""

        def log_probs(self, tokens, targets):
            return SimpleNamespace(targets=-np.where(targets < 0, 0, targets))

        def read(self, handle):
            return handle

    data = prepare(str(prose), "byte", 0)
    found = [held_out.evaluate(Counts(), data, size, 32, windows).mean for size in (1, 2, 3, 4, 8)]
    assert len({(loss.targets, round(loss.nats, 9)) for loss in found}) == 1
    assert found[0].targets == (windows * 32 or len(data.splits["val"]) - 1)


@one
@pytest.mark.parametrize("version", ["this", "older"])
def test_windows_are_those_asked_for_after_a_memory_plan_and_on_resume(
    gpt, prose, tmp_path, backend, version, monkeypatch
):
    def smaller(config, train, name, device, free, chosen):
        return dataclasses.replace(train, batch_size=1, gradient_accumulation_steps=4), ["It is smaller."]

    whole, run = tmp_path / "whole", tmp_path / "run"
    common = ["--data", prose, "--backend", backend, *SMALL, "--max-iters", 4, "--eval-iters", 3]
    train(gpt, *common, "--out", whole)
    monkeypatch.setattr(memory, "plan", smaller)
    train(gpt, *common, "--out", run, "--stop-after", 2)
    monkeypatch.undo()
    assert described(run)["evaluation"] == {"windows": 12, "batch_size": 4}
    assert described(run)["train"]["batch_size"] == 1
    if version == "older":
        older(run)
        train(gpt, "--resume", run)
        assert described(run)["evaluation"] == {"windows": 3, "batch_size": 1}
        return
    train(gpt, "--resume", run, "--batch-size", 2, "--gradient-accumulation-steps", 2)
    mine, theirs = (logged(which, "evaluated")[-1]["val_loss"] for which in (run, whole))
    assert mine == pytest.approx(theirs, rel=1e-4) and described(run)["evaluation"]["windows"] == 12
    code, out, err = gpt("baseline", run, "--n", 1, "--sample", 0, "--json")
    assert code == 0 and json.loads(out)["rows"][0]["targets"] == 12 * 32, err
    train(gpt, "--resume", run, "--max-iters", 5, "--eval-iters", 2)
    assert described(run)["evaluation"] == {"windows": 8, "batch_size": 4}


# From an earlier step ---------------------------------------------------------------------------------------


@one
def test_what_lies_after_an_earlier_step_is_set_aside_whole(gpt, prose, tmp_path, backend):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, "--backend", backend, *SMALL, "--keep", 9)
    before, events = tensors(run), (run / "metrics.jsonl").read_bytes()
    (run / trackers.IDS).write_text(json.dumps({"wandb": "w", "mlflow": "m"}))
    code, out, err = gpt("train", "--resume", f"{run}@4", "--stop-after", 6)
    aside = run / "set-aside" / "after-00000004"
    assert code == 0 and f"What lay after step 4 is set aside as a run of its own: {aside}" in out, err
    assert [runs.step_of(folder) for folder in runs.checkpoints(aside)] == [8, 12]
    assert (aside / "metrics.jsonl").read_bytes() == events
    assert runs.pointed(aside, "latest").name == runs.pointed(aside, "best").name == "step-00000012"
    assert equal(tensors(aside), before) and inventory.inspect(aside).error is None
    assert json.loads((aside / trackers.IDS).read_text("utf-8")) == {"wandb": "w", "mlflow": "m"}
    assert json.loads((run / trackers.IDS).read_text("utf-8")) == {
        "continues": {"wandb": "w", "mlflow": "m", "step": 4}
    }
    assert [runs.step_of(folder) for folder in runs.checkpoints(run)] == [4, 6]
    assert runs.pointed(run, "best").name < "step-00000008" and inventory.inspect(run).error is None
    assert max(event["step"] for event in logged(run)) == 6
    assert train(gpt, "--resume", run)["step"] == 12 and equal(tensors(run), before)
    assert [path.name for path in (run / "set-aside").iterdir()] == [aside.name]  # going on sets nothing aside
    assert train(gpt, "--resume", aside, "--max-iters", 14)["step"] == 14
    assert gpt("runs", "rm", run, "--yes")[0] == 0 and not run.exists()


@pytest.fixture
def further(tmp_path) -> Path:
    """A run of checkpoints 10 to 40, the best of them 30, with its events."""
    run = write_run(tmp_path / "run", story(40))
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0), (40, 1.5)):
        add_checkpoint(run, step, loss)
    runs.point(run, "latest", Path("step-00000040"))
    runs.point(run, "best", Path("step-00000030"))
    return run


def test_best_is_then_the_best_of_what_stays(further):
    add_checkpoint(further, 5, 2.5)
    aside = set_aside(further, runs.checkpoint_folder(further, 20))
    assert runs.pointed(further, "best").name == "step-00000020" == runs.pointed(further, "latest").name
    assert runs.pointed(aside, "best").name == "step-00000030"
    assert set_aside(further, runs.checkpoint_folder(further, 20)) is not None  # its events are still there
    (further / "metrics.jsonl").unlink()
    assert set_aside(further, runs.checkpoint_folder(further, 20)) is None


@pytest.mark.parametrize("failing", range(1, 12))
def test_setting_aside_is_completed_after_a_crash(further, failing, monkeypatch):
    calls = [failing]

    def crash(real):
        def called(*args, **kwargs):
            calls[0] -= 1
            if not calls[0]:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return called

    for owner, name in ((runs, "point"), (inventory, "point_best"), (trackers, "begin_anew"), (Path, "rename")):
        monkeypatch.setattr(owner, name, crash(getattr(owner, name)))
    saved = runs.checkpoint_folder(further, 20)
    try:
        aside = set_aside(further, saved)
    except KeyboardInterrupt:
        monkeypatch.undo()
        if runs.pointed(further, "latest") != saved:
            assert runs.latest(further).is_dir()
        aside = set_aside(further, saved)
    assert [runs.step_of(folder) for folder in runs.checkpoints(aside)] == [30, 40]
    assert [runs.step_of(folder) for folder in runs.checkpoints(further)] == [10, 20]
    assert runs.pointed(aside, "latest").name == "step-00000040" and runs.pointed(aside, "best").is_dir()
    assert runs.pointed(further, "latest") == runs.pointed(further, "best") == saved
    assert not (further / "set-aside" / UNFINISHED).exists()


def test_a_checkpoint_whose_pointer_a_crash_forgot_is_not_set_aside(further):
    add_checkpoint(further, 50, 0.5)
    assert set_aside(further, runs.checkpoint_folder(further, 40)) is None


def test_trackers_begin_new_runs_that_name_the_old_ones(further, mlflow_client, monkeypatch):  # noqa: F811
    tell("mlflow", further, story(40))
    old = json.loads((further / trackers.IDS).read_text("utf-8"))["mlflow"]
    set_aside(further, runs.checkpoint_folder(further, 20))
    tell("mlflow", further, story(30, first=20))
    new, first = mlflow_runs(mlflow_client)
    assert first.info.run_id == old and new.data.tags["mlflow.parentRunId"] == old
    assert new.data.tags["continues_at_step"] == "20"
    tell("mlflow", further, story(40, first=30))  # from then on that one goes on
    assert len(mlflow_runs(mlflow_client)) == 2


def test_wandb_begins_a_new_run_that_names_the_old_one(further, monkeypatch):
    wandb = pytest.importorskip("wandb")
    begun = []
    monkeypatch.setattr(wandb, "init", lambda **settings: begun.append(settings) or Tracked())

    class Tracked:
        id = "new"

        def define_metric(self, *_, **__): ...

        def log(self, _): ...

        def finish(self, exit_code): ...

    (further / trackers.IDS).write_text(json.dumps({"wandb": "old"}))
    set_aside(further, runs.checkpoint_folder(further, 20))
    tell("wandb", further, story(30, first=20))
    tell("wandb", further, story(40, first=30))
    assert begun[0]["id"] is None and begun[0]["config"]["continues"] == "old"
    assert begun[0]["notes"] == "Goes on from step 20 of the run old." and begun[1]["id"] == "new"


# Best, listed losses, and the last one written --------------------------------------------------------------


@one
def test_best_names_a_checkpoint_or_says_why_none_is(gpt, prose, tmp_path, backend):
    run = tmp_path / "run"
    common = ["--data", prose, "--backend", backend, *BRIEF]
    train(gpt, *common, "--eval-interval", 0, "--out", run, "--stop-after", 2)
    (run / "best").unlink()
    losses = (run / "metrics.jsonl").read_text("utf-8")
    (run / "metrics.jsonl").write_text("".join(line for line in losses.splitlines(True) if "evaluated" not in line))
    assert "has no checkpoint best, as it has not been evaluated: it has those of" in mistake(
        gpt, "generate", f"{run}@best", "-p", "x"
    )
    (run / "metrics.jsonl").write_text('{"event": "evaluated", "step": 0, "val_loss": 1.5}\n')
    assert "as its lowest held-out loss, 1.5000, was at step 0 and there is none of it: it has" in mistake(
        gpt, "generate", f"{run}@best", "-p", "x"
    )
    (run / "metrics.jsonl").write_text('{"event": "evaluated", "step": 2, "val_loss": 1.5}\n')
    assert "was at step 2 and its file best is missing" in mistake(gpt, "generate", f"{run}@best", "-p", "x")
    (run / "best").write_text("step-00000009\n")
    assert "as step-00000009, which was it, is gone" in mistake(gpt, "generate", f"{run}@best", "-p", "x")
    (run / "best").write_text("?")
    assert "as its file best is damaged" in mistake(gpt, "generate", f"{run}@best", "-p", "x")


@one
def test_a_fine_tuned_model_that_was_best_as_it_was(gpt, prose, tmp_path, backend):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    train(gpt, "--data", prose, "--out", run, "--backend", backend, *BRIEF)
    rest = ["--learning-rate", 0.5, "--min-lr", 0.5, "--warmup-iters", 0, "--max-iters", 2, "--eval-interval", 1]
    result = train(gpt, "--init-from", run, "--data", prose, "--out", tuned, "--backend", backend, *rest)
    assert result["val_loss"] > result["best_val_loss"]
    assert runs.resolve(f"{tuned}@best").name == "step-00000000"


@one
def test_a_checkpoint_has_its_own_loss_or_none(gpt, prose, tmp_path, backend):
    run = tmp_path / "run"
    train(gpt, "--data", prose, "--out", run, "--backend", backend, *SMALL, "--checkpoint-interval", 2, "--keep", 9)
    losses = {one.step: one.val_loss for one in inventory.inspect(run).checkpoints}
    measured = {event["step"]: event["val_loss"] for event in logged(run, "evaluated")}
    assert losses == {step: measured.get(step) for step in (2, 4, 6, 8, 10, 12)} and losses[6] is None
    assert gpt("runs", "rm", f"{run}@best", "--yes")[0] == 0
    assert runs.pointed(run, "best").name in ("step-00000004", "step-00000008")


def test_a_loss_whose_checkpoint_is_removed_is_no_longer_to_be_beaten(further):
    last = runs.checkpoint_folder(further, 40)
    assert inventory.best_loss(further, last) == 1.0
    assert inventory.best_loss(further, runs.checkpoint_folder(further, 20)) is None  # best is ahead of the run
    inventory.remove_checkpoint(further, runs.checkpoint_folder(further, 30))
    assert inventory.best_loss(further, last) == 1.5


def test_removing_a_checkpoint_is_not_training(further):
    before = runs.written(further)
    for step in (40, 10):
        inventory.remove_checkpoint(further, runs.checkpoint_folder(further, step))
        assert runs.written(further) == pytest.approx(before, abs=1e-3)
    assert runs.pointed(further, "latest").name == "step-00000030"


# Exit codes -------------------------------------------------------------------------------------------------


@one
@pytest.mark.parametrize(("number", "code"), dose((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_a_signal_is_the_exit_code_after_saving(gpt, prose, tmp_path, backend, number, code, monkeypatch):
    step = Trainer._step

    def interrupted(self):
        step(self)
        if self.progress.step == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    run = tmp_path / "run"
    found, out, err = gpt("train", "--data", prose, "--out", run, "--backend", backend, *BRIEF, "--json")
    assert found == code and json.loads(out)["reason"] == "interrupted", err
    assert runs.latest(run).name == "step-00000002" and f"gpt train --resume {run}" not in out
    monkeypatch.undo()
    assert gpt("train", "--resume", run, "--backend", backend)[0] == 0


def test_exit_codes_are_documented(gpt):
    out = " ".join(gpt("--help")[1].split())
    for code in ("0", "1", "2", "130", "143"):
        assert f" {code} " in out[out.index("Exit codes") :], code


# Data that are gone -----------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path, prose, monkeypatch):
    """JSON lines in a file without a suffix, which the first rules of reading took for text."""
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))
    path = tmp_path / "lines"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in prose.read_text("utf-8").splitlines()))
    return path


@needs("torch")
@pytest.mark.parametrize(("noted", "several"), [(True, True), (False, False)])
def test_data_are_prepared_again_by_the_rules_of_then(gpt, lines, prose, tmp_path, monkeypatch, noted, several):
    run, where = tmp_path / "run", [*SMALL, "--backend", "torch"]
    data = ["--data", lines, *(["--data", f"{prose}:0.5"] if several else [])]
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "prepare_all", functools.partial(mixture.prepare_all, rules=1))
        train(gpt, *data, *where, "--out", run, "--stop-after", 3)
    content = described(run)
    assert content["data"]["rules"] == 1
    if not noted:
        del content["data"]["rules"]
        (run / "run.json").write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "home")
    assert train(gpt, "--resume", run, "--stop-after", 6)["step"] == 6
    assert train(gpt, "--resume", run, *data, "--stop-after", 7)["step"] == 7
    again = described(run)
    assert again["data"]["rules"] == 1 and again["data"]["fingerprint"] == content["data"]["fingerprint"]
    again["data"]["rules"] = 3
    (run / "run.json").write_text(json.dumps(again))
    shutil.rmtree(tmp_path / "home")
    error = mistake(gpt, "train", "--resume", run)
    assert "are read as a newer version of twingpt does: install that" in error


@needs("torch")
def test_what_became_of_the_data_is_said(gpt, lines, tmp_path, monkeypatch):
    run, where = tmp_path / "run", [*SMALL[2:], "--backend", "torch", "--out", tmp_path / "run"]
    prepared = ["data", "prepare", lines, "--tokenizer", "byte", "--name", "docs"]
    with monkeypatch.context() as patch:
        patch.setattr(sources.ReadOptions, "file", lambda self, path, name="": DocumentFile(path, by_name=True))
        assert gpt(*prepared)[0] == 0
    train(gpt, "--data", "docs", *where, "--stop-after", 3)
    assert gpt("data", "rm", "docs", "--yes")[0] == 0
    error = mistake(gpt, "train", "--resume", run)
    assert f"The prepared data set docs of {run} is gone: prepare its text again under that name, or give" in error
    assert gpt(*prepared)[0] == 0
    error = mistake(gpt, "train", "--resume", run)
    assert "the rules of reading changed: a file was read by its name alone, and is by what it holds. Give the" in error
    assert train(gpt, "--resume", run, "--data", lines, "--stop-after", 4)["step"] == 4
    shutil.rmtree(tmp_path / "home")
    lines.write_text(lines.read_text("utf-8") * 2)
    error = mistake(gpt, "train", "--resume", run)
    assert "fingerprint differs): it was changed since, so give --data a copy of the original, or start" in error
    error = mistake(gpt, "train", "--resume", run, "--data", lines)
    assert "fingerprint differs): give --data the original, or start" in error
