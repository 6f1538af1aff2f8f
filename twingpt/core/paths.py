"""Where files go, and writing them so that a crash leaves the old one or the new one, never half."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def expand(path: str | Path) -> Path:
    """The path with ~ replaced; unlike Path.expanduser, a user that isn't there is left as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def home() -> Path:
    """The folder of prepared data and downloads: $TWINGPT_HOME, or ~/.cache/twingpt."""
    return expand(os.environ.get("TWINGPT_HOME") or "~/.cache/twingpt")


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` durable."""
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            write_synced(temporary, content.encode() if isinstance(content, str) else content)
            temporary.replace(path)
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
    _remove_leftovers(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _locked(temporary):
            temporary.chmod(0o755)  # mkdtemp's 0o700 would follow the folder around
            yield temporary
            sync_folder(temporary)
            if path.exists():
                old = temporary.with_suffix(".old")
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary folders for `path` that nobody writes to any more.

    What was to be replaced goes too, but where a killed process left nothing at `path` it is all that there is.
    """
    endings = ("tmp", "old") if path.exists() else ("tmp",)
    for leftover in [folder for end in endings for folder in path.parent.glob(f".{glob.escape(path.name)}.*.{end}")]:
        with suppress(OSError), _locked(leftover) as free:
            if free:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, and say whether that went: not where somebody has it, or where the file system has no locks."""
    descriptor, locked = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        yield locked
    finally:
        os.close(descriptor)
