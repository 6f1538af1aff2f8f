"""Trouble with a run's folder while it trains: said once, survived, and nothing lost when it is over."""

import errno
import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_train import SMALL, equal, logged, tensors, train
from tests.conftest import open_checkpoint
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.errors import UserError
from twingpt.data import mixture
from twingpt.data.shards import TokenDataset
from twingpt.runs import folder as runs
from twingpt.runs.console import ConsoleReporter
from twingpt.runs.events import Saved, SaveFailed, Trained, read_events
from twingpt.training import saving


@pytest.fixture
def when(monkeypatch):
    """when(kind, step, act): act once when a run reports an event of that kind, at that step or later."""
    plans, real = [], ConsoleReporter.report

    def report(self, event):
        real(self, event)
        for plan in list(plans):
            kind, step, act = plan
            if isinstance(event, kind) and event.step >= step:
                plans.remove(plan)
                act()

    monkeypatch.setattr(ConsoleReporter, "report", report)
    monkeypatch.setattr(saving, "FIRST_WAIT", 0.0)  # these runs are over in a second
    return lambda kind, step, act: plans.append((kind, step, act))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(saving, "LAST_WAITS", (0.01, 0.01))


@pytest.fixture
def calm(gpt, prose, tmp_path):
    """The same run, undisturbed."""
    train(gpt, "--data", prose, "--out", tmp_path / "calm", *SMALL)
    return tmp_path / "calm"


def sentence(err) -> str:
    last = err.splitlines()[-1]
    assert last.startswith("gpt: ") and "Traceback" not in err
    return last


def same_ending(run, calm) -> None:
    """Assert that a run ended as an undisturbed one, with every event, checkpoint and pointer, and nothing more."""
    assert equal(tensors(run), tensors(calm))
    for event, number in (("trained", "loss"), ("evaluated", "val_loss"), ("saved", "step")):
        ours, theirs = ([(entry["step"], entry[number]) for entry in logged(which, event)] for which in (run, calm))
        assert ours == theirs
    for pointer in ("latest", "best"):
        assert runs.resolve(f"{run}@{pointer}").name == runs.resolve(f"{calm}@{pointer}").name
    assert {path.relative_to(run) for path in run.rglob("*")} == {path.relative_to(calm) for path in calm.rglob("*")}


def full_disk(monkeypatch, run):
    def write(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_safetensors", write)


def read_only(monkeypatch, run):
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if not path.exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)


def no_permission(monkeypatch, run):
    def point(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(runs, "point", point)


def replaced_by_a_file(monkeypatch, run):
    run.rename(run.with_name("away"))
    run.write_text("a file")


def mend(monkeypatch, run):
    monkeypatch.undo()
    if run.is_file():
        run.unlink()
        run.with_name("away").rename(run)


TROUBLES = {
    "No space left on device": full_disk,
    "Read-only file system": read_only,
    "Permission denied": no_permission,
    "File exists": replaced_by_a_file,
}


@pytest.mark.parametrize("reason", TROUBLES)
def test_trouble_that_passes_loses_nothing(gpt, prose, tmp_path, when, calm, reason):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        when(Saved, 4, lambda: TROUBLES[reason](patch, run))
        when(SaveFailed, 8, lambda: when(Trained, 10, lambda: mend(patch, run)))
        code, out, err = gpt("train", "--data", prose, "--out", run, *SMALL, "--json")
    assert code == 0 and json.loads(out)["step"] == 12
    assert err.count(f"can't be saved ({reason})") == 1 and "Traceback" not in err
    assert "step 8: saved" in err.replace("\n", " ")
    same_ending(run, calm)
    assert [event["step"] for event in logged(run, "save_failed") if "can't be saved" in event["message"]] == [8]


@pytest.mark.parametrize("reason", TROUBLES)
def test_trouble_that_stays_ends_in_one_sentence(gpt, prose, tmp_path, when, calm, impatient, reason):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        when(Saved, 4, lambda: TROUBLES[reason](patch, run))
        code, out, err = gpt("train", "--data", prose, "--out", run, *SMALL, "--json")
        assert code == 2 and out == "" and err.count("can't be saved") == 2  # when it began, and in the end
        assert f"The checkpoint of step 12 can't be saved ({reason}): free some space or mend {run}" in sentence(err)
        assert "earlier checkpoints are untouched" in sentence(err)
        if run.is_file():
            assert run.read_text("utf-8") == "a file"
        mend(patch, run)
    assert not list((run / "checkpoints").glob(".*"))
    assert open_checkpoint(f"{run}@4").training()["step"] == 4
    assert train(gpt, "--resume", run)["step"] == 12
    assert equal(tensors(run), tensors(calm))


def test_a_disk_that_is_full_from_the_start(gpt, prose, tmp_path, when, calm, impatient, monkeypatch):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, run)
        code, _, err = gpt("train", "--data", prose, "--out", run, *SMALL)
    assert code == 2 and "The checkpoint of step 12 can't be saved" in sentence(err) and not runs.checkpoints(run)
    assert train(gpt, "--resume", run)["step"] == 12
    same_ending(run, calm)


def test_a_removed_folder_is_made_again(gpt, prose, tmp_path, when, calm):
    run = tmp_path / "run"
    when(Saved, 4, lambda: shutil.rmtree(run))
    code, _, err = gpt("train", "--data", prose, "--out", run, *SMALL, "--json")
    assert code == 0, err
    assert "metrics.jsonl can't be written (No such file or directory)" in err
    assert [path.name for path in runs.checkpoints(run)] == ["step-00000008", "step-00000012"]
    assert equal(tensors(run), tensors(calm))
    assert json.loads((run / "run.json").read_text("utf-8")) | {"starts": []} == (
        json.loads((calm / "run.json").read_text("utf-8")) | {"starts": []}
    )
    assert [entry["step"] for entry in logged(run)] == [6, 8, 10, 12]  # what came after, in order
    assert train(gpt, "--resume", run, "--max-iters", 16)["step"] == 16


def test_a_folder_removed_for_good_is_made_again_at_the_end(gpt, prose, tmp_path, when, calm, monkeypatch):
    """The only save fails while the folder is a file; it is gone when the run ends."""
    run = tmp_path / "run"
    when(Trained, 2, lambda: (shutil.rmtree(run), run.write_text("a file")))
    monkeypatch.setattr(saving, "LAST_WAITS", (0.0,))
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: run.unlink()))
    settings = [*SMALL, "--checkpoint-interval", 0, "--eval-interval", 0]
    code, _, err = gpt("train", "--data", prose, "--out", run, *settings)
    assert code == 0, err
    assert (run / "run.json").exists() and equal(tensors(run), tensors(calm))


def test_a_run_that_another_process_begins_meanwhile_is_left_alone(gpt, prose, tmp_path, calm, monkeypatch):
    began, locks, real = tmp_path / "began", ExitStack(), (mixture.prepare_all, mixture.open_folders)

    def prepare_all(*arguments):
        shutil.copytree(calm, began)
        return real[0](*arguments)

    def open_folders(*arguments):
        locks.enter_context(runs.training(calm))
        return real[1](*arguments)

    monkeypatch.setattr(mixture, "prepare_all", prepare_all)
    assert "holds a run already" in mistake(gpt, "train", "--data", prose, "--out", began, *SMALL)
    assert (began / "metrics.jsonl").read_bytes() == (calm / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(mixture, "open_folders", open_folders)
    before = (calm / "run.json").read_bytes()
    with locks:
        assert "is being trained by another process" in mistake(gpt, "train", "--resume", calm, "--max-iters", 20)
    assert (calm / "run.json").read_bytes() == before


def test_events_wait_while_metrics_can_not_be_written(gpt, prose, tmp_path, when, calm):
    run = tmp_path / "run"
    metrics, away = run / "metrics.jsonl", run / "metrics.txt"
    when(Trained, 2, lambda: (metrics.rename(away), metrics.mkdir()))
    when(Trained, 8, lambda: (metrics.rmdir(), away.rename(metrics)))
    code, out, _ = gpt("train", "--data", prose, "--out", run, *SMALL)
    assert code == 0
    assert out.count("can't be written") == 1 and "metrics.jsonl can't be written (Is a directory)" in out
    same_ending(run, calm)
    steps = [event["step"] for event in read_events(metrics)]
    assert steps == sorted(steps)


def test_a_loss_curve_that_can_not_be_drawn_stops_nothing(gpt, prose, tmp_path, when):
    run = tmp_path / "run"
    when(Trained, 2, lambda: (run / "loss.svg").mkdir())
    code, out, _ = gpt("train", "--data", prose, "--out", run, *SMALL)
    assert code == 0 and "loss.svg can't be written (Is a directory)" in out and "finished after 12 steps" in out
    assert not list(run.glob(".*"))


def test_what_waits_is_saved_when_training_breaks(gpt, prose, tmp_path, when):
    run = tmp_path / "run"

    def batch(*_):
        raise UserError("The data are damaged.")

    with pytest.MonkeyPatch.context() as patch:
        when(Saved, 4, lambda: full_disk(patch, run))
        when(Trained, 8, lambda: (patch.undo(), patch.setattr(TokenDataset, "batch", batch)))
        patch.setattr(saving, "FIRST_WAIT", 60.0)
        code, _, err = gpt("train", "--data", prose, "--out", run, *SMALL)
    assert code == 2 and sentence(err) == "gpt: The data are damaged."
    assert runs.resolve(run).name == "step-00000008"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where that can be had."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def fill(folder) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 1000):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_a_disk_that_is_really_full_for_a_while(gpt, prose, when, calm, small_disk):
    run = small_disk / "run"
    when(Saved, 4, lambda: fill(small_disk))
    when(SaveFailed, 8, lambda: when(Trained, 10, lambda: (small_disk / "ballast").unlink()))
    code, _, err = gpt("train", "--data", prose, "--out", run, *SMALL, "--json")
    assert code == 0, err
    assert err.count("can't be saved (No space left on device)") == 1
    same_ending(run, calm)


def test_a_disk_that_is_really_full_until_the_end(gpt, prose, when, calm, small_disk, impatient):
    run = small_disk / "run"
    when(Saved, 4, lambda: fill(small_disk))
    code, _, err = gpt("train", "--data", prose, "--out", run, *SMALL, "--json")
    assert code == 2 and "The checkpoint of step 12 can't be saved (No space left on device)" in sentence(err)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    (small_disk / "ballast").unlink()
    assert train(gpt, "--resume", run)["step"] == 12
    same_ending(run, calm)


def test_a_file_system_that_is_really_read_only_for_a_while(gpt, prose, when, calm, small_disk):
    run = small_disk  # all of it: a disk with an open file, as the lock file beside the run is, can't be remounted
    remount = ["mount", "-o", "remount"]
    when(Saved, 4, lambda: subprocess.run([*remount, "-o", "ro", small_disk], check=True))
    writable = lambda: subprocess.run([*remount, "-o", "rw", small_disk], check=True)  # noqa: E731
    when(SaveFailed, 8, lambda: when(Trained, 10, writable))
    code, _, err = gpt("train", "--data", prose, "--out", run, *SMALL, "--json")
    assert code == 0, err
    assert err.count("can't be saved (Read-only file system)") == 1
    same_ending(run, calm)
