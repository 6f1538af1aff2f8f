"""Where files go, and writing them so that a crash leaves the old one or the new one, never half."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twingpt.core.locks import POLL, locked

DAY = 24 * 3600  # seconds: longer than a temporary folder is written to
PATIENCE = 2.0  # seconds: longer than a virus scanner or a reader holds a file of ours
HELD = {5, 32}  # Windows' codes for what a process has open: access denied, sharing violation


def expand(path: str | Path) -> Path:
    """The path with ~ replaced; unlike Path.expanduser, a user that isn't there is left as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def home() -> Path:
    """The folder of prepared data and downloads: $TWINGPT_HOME, or ~/.cache/twingpt."""
    return expand(os.environ.get("TWINGPT_HOME") or "~/.cache/twingpt")


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` durable; Windows opens no folders, and its file system journals renames."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk; it may be half there after a crash."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Rename a file, replacing one at `target`, or a folder.

    Windows refuses while any process has it, or a file in it, open; there it is tried again for PATIENCE seconds.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            source.replace(target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in HELD or time.monotonic() >= end:
                raise
        time.sleep(POLL)


def _shortened(name: str) -> str:
    """A file's name, cut where temporary ones made of it would have more than the 255 bytes that a name may have."""
    content = os.fsencode(name)
    if len(content) <= 200:
        return name
    return f"{content[:150].decode('utf-8', 'ignore')}-{hashlib.sha256(content).hexdigest()[:8]}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError within name `path`, which is what its reader knows."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by one rename."""
    temporary = path.with_name(f".{_shortened(path.name)}.{os.getpid()}.tmp")
    with naming(path):
        try:
            write_synced(temporary, content.encode() if isinstance(content, str) else content)
            rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, and is removed if it fails.

    A folder that was at `path` is replaced. The caller syncs the files it writes. It is locked until then, and
    what processes that were killed left of theirs for `path` is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # What was to be replaced is all that there is where a killed process left nothing at `path`.
    endings, name = ("tmp", "old") if path.exists() else ("tmp",), _shortened(path.name)
    remove_leftovers(path.parent, *(f".{glob.escape(name)}.*.{ending}" for ending in endings))
    # Not by mkdtemp, whose folders are their owner's alone: on Windows for good, however they are renamed.
    temporary = path.with_name(f".{name}.{os.urandom(4).hex()}.tmp")
    temporary.mkdir()
    try:
        with locked(temporary):
            yield temporary
            sync_folder(temporary)
            if path.exists():
                old = temporary.with_suffix(".old")
                rename(path, old)
                rename(temporary, path)
                shutil.rmtree(old)
            else:
                rename(temporary, path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, *patterns: str, unlocked_age: float = DAY) -> list[Path]:
    """Remove what killed processes left in `folder` under names like these; what is left is being written to.

    On a file system without locks only what is older than `unlocked_age` seconds counts as left.
    """
    alive = []
    for pattern in patterns:
        # A process that is killed after its last rename leaves the lock file alone.
        guarded = (file.with_name(file.name[1 : -len(".lock")]) for file in folder.glob(f".{pattern}.lock"))
        for leftover in {*folder.glob(pattern), *guarded}:
            with locked(leftover) as held:
                if held or (held is None and _age(leftover) >= unlocked_age):  # None: a file system without locks
                    shutil.rmtree(leftover, ignore_errors=True)
                elif leftover.exists():
                    alive.append(leftover)
    return alive


def _age(path: Path) -> float:
    """Seconds since something was added to a folder."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
