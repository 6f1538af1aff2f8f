"""Locks between processes: one holder at a time, freed by its death, seen by earlier versions and leaving no file."""

import errno
import os
import subprocess
import sys
import threading
import time

import filelock
import pytest

from tests.conftest import links, posix
from twingpt.core import paths
from twingpt.core.locks import is_locked, lock_file, locked
from twingpt.runs import folder as runs
from twingpt.runs import inventory

try:
    import fcntl
except ImportError:  # on Windows, where the lock file is the only lock
    fcntl = None
flock = posix("Windows has no flock")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    return tmp_path / "runs" / "x"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


NEW = "with locked(folder): print(flush=True); time.sleep(500)"


def hold(folder, code: str = NEW) -> subprocess.Popen:
    """A process that holds the lock of a folder until it is killed."""
    head = "import os, sys, time\nfrom pathlib import Path\nfrom twingpt.core.locks import locked\n"
    command = [sys.executable, "-c", f"{head}folder = Path(sys.argv[1])\n{code}", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def end(process) -> None:
    process.kill()
    process.communicate()


# As the versions before this module locked a folder.
OLD = "import fcntl; fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); time.sleep(500)"


@pytest.mark.parametrize("code", [NEW, pytest.param(OLD, marks=flock)])
def test_one_process_at_a_time_until_it_dies(folder, code):
    process = hold(folder, code)
    assert is_locked(folder) is True and runs.is_trained(folder)
    with locked(folder) as held:
        assert held is False
    with pytest.raises(runs.UserError, match="is being trained by another process"), runs.training(folder):
        pass
    end(process)
    assert is_locked(folder) is False
    with locked(folder) as held:
        assert held is True and names(folder.parent) == [".x.lock", "x"] and names(folder) == []
        if fcntl:
            descriptor = os.open(folder, os.O_RDONLY)
            with pytest.raises(BlockingIOError):  # as an earlier version tries
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(descriptor)
    assert names(folder.parent) == ["x"]


def test_waiting_ends_with_the_holder_or_the_time(folder):
    results = []

    def wait():
        with locked(folder, timeout=-1) as held:
            results.append(held)

    with locked(folder):
        threads = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        with locked(folder, timeout=0.15) as held:
            assert held is False and time.monotonic() - start >= 0.15 and results == []
    for thread in threads:
        thread.join(200)
    assert results == [True] * 3 and names(folder.parent) == ["x"]


@flock
def test_looking_leaves_nothing_and_is_in_nobodys_way(folder):
    assert is_locked(folder) is False and is_locked(folder / "nothing") is None
    assert names(folder.parent) == ["x"] and names(folder) == []
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # another who looks
    assert is_locked(folder) is False
    os.close(descriptor)


@links
def test_a_run_by_several_names(folder, monkeypatch):
    link = folder.parent / "link"
    link.symlink_to(folder)
    with runs.training(link):
        assert runs.is_trained(folder) and names(folder.parent) == [".x.lock", "link", "x"]
        monkeypatch.chdir(folder)
        assert runs.is_trained(runs.Path()) and runs.is_trained(runs.Path("../link"))
        with locked(runs.Path()) as held:
            assert held is False
    loop = folder.parent / "loop"
    loop.symlink_to(loop)
    assert not runs.is_trained(loop) and lock_file(runs.Path("/")).parent == runs.Path("/")


@flock
def test_where_there_are_no_locks(folder, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(folder) as held:
        assert held is None and names(folder.parent) == ["x"]
    assert is_locked(folder) is None and not runs.is_trained(folder)
    with runs.training(folder):
        pass
    fresh, old = folder.parent / ".set.a1.tmp", folder.parent / ".set.a2.tmp"
    for leftover in (fresh, old):
        leftover.mkdir()
    os.utime(old, (time.time() - 2 * paths.DAY,) * 2)
    assert paths.remove_leftovers(folder.parent, ".set.*.tmp") == [fresh] and not old.exists()


@flock
def test_where_the_lock_file_can_not_be_written(folder, monkeypatch):
    def acquire(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with runs.training(folder):  # by flock
        assert runs.is_trained(folder) and names(folder.parent) == ["x"]
        with pytest.raises(runs.UserError, match="is being trained"), runs.training(folder):
            pass
    assert not runs.is_trained(folder)


def test_without_fcntl(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(folder) as held:
        assert held is True and is_locked(folder) is True and runs.is_trained(folder)
        with locked(folder) as again:
            assert again is False
        with pytest.raises(runs.UserError, match="is being trained"), runs.training(folder):
            pass
    assert not runs.is_trained(folder) and names(folder.parent) == ["x"]
    lock_file(folder).touch()  # of a process that was killed
    assert is_locked(folder) is False


def test_nothing_needs_fcntl_to_be_imported():
    code = "import sys; sys.modules['fcntl'] = None; import twingpt.data.prepare, twingpt.data.download, twingpt.cli"
    subprocess.run([sys.executable, "-c", f"{code}, twingpt.runs.inventory"], check=True)


def test_what_a_killed_process_left_goes_with_the_run(folder):
    (folder / "run.json").write_text("{}")
    end(hold(folder))
    assert names(folder.parent) == [".x.lock", "x"]
    assert [run.name for run in inventory.find_runs(folder.parent)] == ["x"]
    with runs.training(folder), pytest.raises(runs.UserError, match="is being trained"):
        inventory.remove_run(folder)
    end(hold(folder))
    assert inventory.remove_run(folder) == [] and names(folder.parent) == []


def test_the_lock_files_of_killed_writers_go_with_their_folders(tmp_path):
    code = "from twingpt.core.paths import new_folder\n"
    code += "with new_folder(folder) as temporary: (temporary / 'half').touch(); print(flush=True); time.sleep(500)"
    process = hold(tmp_path / "set", code)
    (temporary,) = tmp_path.glob(".set.*.tmp")
    assert names(tmp_path) == sorted([temporary.name, f".{temporary.name}.lock"])
    assert paths.remove_leftovers(tmp_path, ".*.tmp") == [temporary]
    end(process)
    (tmp_path / "..set.gone.tmp.lock").touch()  # of one that was killed after its renames
    (tmp_path / "..other.gone.tmp.lock").touch()
    with paths.new_folder(tmp_path / "set") as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == ["..other.gone.tmp.lock", "set"] and names(tmp_path / "set") == ["whole"]
