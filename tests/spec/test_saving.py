"""Saving through trouble: what can't be written waits, is tried again with patience, and nothing else is touched."""

import errno
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import open_checkpoint, training_state
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.runs import folder as runs
from twingpt.runs.events import Evaluated, JSONLReporter, Saved, SaveFailed, read_events, rewind, to_dict
from twingpt.training import saving
from twingpt.training.saving import Saver, Snapshot

CONFIG = GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16)


class Disk:
    """Lets checkpoints be written, or not, and counts the tries; its time passes only when someone sleeps."""

    def __init__(self, monkeypatch):
        self.full, self.tries, self.time, self.slept = False, 0, 1000.0, []
        real = checkpoint.write_safetensors

        def write(path, *what):
            self.tries += path.name == checkpoint.MODEL
            if self.full:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, *what)

        monkeypatch.setattr(checkpoint, "write_safetensors", write)
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: self.time, sleep=self.sleep))

    def sleep(self, seconds):
        self.time += seconds
        self.slept.append(seconds)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def saver(tmp_path):
    events = []
    saver = Saver(tmp_path / "run", CONFIG, ByteTokenizer(), keep=2, report=events.append, run_json="{}")
    saver.events = events
    return saver


def snapshot(step, best=False) -> Snapshot:
    tensors = {name: array + step for name, array in initialise(CONFIG, 0)}
    return Snapshot(step, tensors, training_state(step), best)


def steps(run) -> list[int]:
    return [open_checkpoint(path).training()["step"] for path in runs.checkpoints(run)]


def test_a_run_folder_is_made_as_it_should_be(saver):
    saver.save(snapshot(1, best=True))
    saver.save(snapshot(2))
    saver.save(snapshot(3))
    saver.save(snapshot(4))
    assert steps(saver.run) == [1, 3, 4] and (saver.run / "run.json").read_text("utf-8") == "{}"
    assert runs.resolve(f"{saver.run}@best").name == "step-00000001" and runs.resolve(saver.run).name == "step-00000004"
    assert [type(event) for event in saver.events] == [Saved] * 4


def test_what_waits_is_the_newest_and_the_best(saver, disk):
    saver.save(snapshot(1, best=True))
    disk.full = True
    for step, best in ((2, True), (3, True), (4, False), (5, False)):
        saver.save(snapshot(step, best))
    assert [waiting.step for waiting in saver.waiting] == [5, 3] and saver.holds(5) and not saver.holds(4)
    assert steps(saver.run) == [1] and saver.saved_at == 1
    assert not list((saver.run / "checkpoints").glob(".*"))
    disk.full = False
    saver.retry(now=True)
    assert steps(saver.run) == [3, 5] and saver.waiting == [] and saver.saved_at == 5
    assert runs.resolve(f"{saver.run}@best").name == "step-00000003" and runs.resolve(saver.run).name == "step-00000005"
    weights = dict(open_checkpoint(f"{saver.run}@best").parameters())
    assert all(np.array_equal(array, weights[name]) for name, array in snapshot(3).tensors.items())


def test_it_is_said_once_and_again_after_it_worked(saver, disk):
    for step in range(1, 9):
        disk.full = step not in (4, 8)
        disk.time += 100
        saver.save(snapshot(step))
    failed = [event for event in saver.events if isinstance(event, SaveFailed)]
    assert [event.step for event in failed] == [1, 5]
    assert "can't be saved (No space left on device): it waits in memory, and is tried again" in failed[0].message
    assert "free some space or mend" in failed[0].message
    assert [event.step for event in saver.events if isinstance(event, Saved)] == [4, 8]


def test_tries_become_rare_while_training_goes_on(saver, disk):
    disk.full = True
    for step in range(3600):  # an hour of a step a second, each of which would save
        saver.save(snapshot(step + 1)) if step < 50 else saver.retry()
        disk.time += 1
    assert 60 < disk.tries < 70
    disk.full, before = False, disk.tries
    disk.time += saving.LONGEST_WAIT
    saver.retry()
    saver.save(snapshot(3601))
    assert disk.tries == before + 2 and saver.waiting == []  # the patience starts anew


def test_the_end_of_a_run_waits_some_seconds_for_the_disk(saver, disk, monkeypatch):
    disk.full = True
    saver.save(snapshot(7))
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: setattr(disk, "full", seconds < 2))
    saver.finish()
    assert steps(saver.run) == [7] and disk.tries == 5


def test_the_end_of_a_run_that_can_not_be_saved_is_one_sentence(saver, disk):
    saver.save(snapshot(7))
    before = {path: path.read_bytes() for path in saver.run.rglob("*") if path.is_file()}
    disk.full = True
    saver.save(snapshot(8))
    with pytest.raises(UserError) as error:
        saver.finish()
    assert disk.slept == list(saving.LAST_WAITS) and disk.tries == 3 + len(disk.slept)
    assert str(error.value) == (
        f"The checkpoint of step 8 can't be saved (No space left on device): free some space or mend {saver.run}, "
        f"then gpt train --resume {saver.run} goes on; earlier checkpoints are untouched."
    )
    assert {path: path.read_bytes() for path in saver.run.rglob("*") if path.is_file()} == before


def test_a_leftover_that_fills_the_disk_makes_room(saver, monkeypatch):
    leftover = saver.run / "checkpoints" / ".step-00000003.x1y2.tmp"
    leftover.mkdir(parents=True)
    real = checkpoint.write_safetensors

    def write(path, *what):
        if leftover.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *what)

    monkeypatch.setattr(checkpoint, "write_safetensors", write)
    saver.save(snapshot(4))
    assert steps(saver.run) == [4] and not leftover.exists()


def test_pointers_that_can_not_be_written_keep_no_more_checkpoints_than_asked(saver, disk):
    saver.save(snapshot(1))
    (saver.run / "latest").unlink()
    (saver.run / "latest").mkdir()
    for step in (2, 3, 4, 5):
        disk.time += 100
        saver.save(snapshot(step))
    assert steps(saver.run) == [4, 5] and saver.saved_at == 1 and saver.holds(5)
    (saver.run / "latest").rmdir()
    saver.finish()
    assert runs.resolve(saver.run).name == "step-00000005"


def test_old_checkpoints_that_can_not_be_removed_stop_nothing(saver, monkeypatch):
    real = runs.prune
    monkeypatch.setattr(runs, "prune", lambda run, keep: (_ for _ in ()).throw(PermissionError(1, "Not permitted")))
    for step in (1, 2, 3):
        saver.save(snapshot(step))
    said = [event.message for event in saver.events if isinstance(event, SaveFailed)]
    assert said == ["old checkpoints can't be removed (Not permitted): they stay for now"]
    assert saver.saved_at == 3 and steps(saver.run) == [1, 2, 3]
    monkeypatch.setattr(runs, "prune", real)
    saver.finish()
    assert steps(saver.run) == [2, 3]


def test_best_may_name_a_checkpoint_later(saver):
    saver.save(snapshot(1))
    saver.mark_best(2)
    assert not (saver.run / "best").exists()
    saver.mark_best(1)
    assert runs.resolve(f"{saver.run}@best").name == "step-00000001"
    (saver.run / "best").unlink()
    (saver.run / "best").mkdir()
    saver.mark_best(1)
    assert f"{saver.run / 'best'} can't be written" in saver.events[-1].message


# metrics.jsonl ----------------------------------------------------------------------------------------------


def lines(path) -> list[int]:
    assert all(line.endswith("}\n") for line in path.read_text("utf-8").splitlines(keepends=True))
    return [event["step"] for event in read_events(path)]


def evaluated(step) -> Evaluated:
    return Evaluated(step, 1.0, 1.0, False, 1.0)


def test_events_that_can_not_be_written_come_later_in_order(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    reporter = JSONLReporter(path)
    for step in (1, 2):
        with pytest.raises(OSError, match="No such file") as error:
            reporter.report(evaluated(step))
        assert error.value.filename == str(path)
    path.parent.mkdir()
    reporter.report(evaluated(3))
    assert lines(path) == [1, 2, 3]


@pytest.mark.parametrize("torn", [0, 10, 80])
def test_an_event_that_was_half_written_is_written_again(tmp_path, monkeypatch, torn):
    path = tmp_path / "metrics.jsonl"
    reporter = JSONLReporter(path)
    reporter.report(evaluated(1))
    real = type(path).open

    class Torn:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[:torn])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "open", lambda self, *args: Torn(real(self, *args)))
    for step in (2, 3):
        with pytest.raises(OSError, match="No space"):
            reporter.report(evaluated(step))
    monkeypatch.undo()
    reporter.report(evaluated(4))
    assert lines(path) == [1, 2, 3, 4]


def test_only_so_many_events_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("twingpt.runs.events.WAITING_EVENTS", 3)
    reporter = JSONLReporter(tmp_path / "run" / "metrics.jsonl")
    for step in range(6):
        with pytest.raises(OSError, match="No such file"):
            reporter.report(evaluated(step))
    (tmp_path / "run").mkdir()
    reporter.report(evaluated(6))
    assert lines(reporter.path) == [4, 5, 6]


def test_rewinding_drops_what_will_be_reported_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for event in (evaluated(4), Saved(4, "a"), evaluated(8), Saved(8, "b"), evaluated(12)):
        JSONLReporter(path).report(event)
    rewind(path, Saved(8, "b"), [])
    assert lines(path) == [4, 4, 8, 8]
    rewind(path, Saved(8, "b"), ["evaluated"])
    assert lines(path) == [4, 4, 8]
    rewind(path, Saved(4, "a"), [])
    path.write_text(path.read_text("utf-8") + '{"event": "evaluated", "st')  # cut by a kill
    rewind(path, Saved(4, "a"), ["sampled"])
    assert lines(path) == [4, 4]
    JSONLReporter(path).report(evaluated(7))
    rewind(path, Saved(8, "b"), [])  # killed between the checkpoint and its event
    assert lines(path) == [4, 4, 7, 8] and list(read_events(path))[-1] == to_dict(Saved(8, "b"))
