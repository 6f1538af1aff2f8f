"""Locks between processes, on a folder or a file; the kernel frees them when their process ends, however that is."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

POLL = 0.05  # seconds between two tries
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # of a file system without them


def lock_file(path: Path) -> Path:
    """The lock file of `path`: hidden, beside what `path` leads to, and removed when the lock is freed.

    A process that is killed leaves its own, which nobody holds then.
    """
    real = Path(os.path.realpath(path))
    return real.parent / f".{real.name}.lock"


@contextmanager
def locked(path: Path, *, timeout: float = 0.0) -> Iterator[bool | None]:
    """Exclusive lock of a folder or file; waits up to `timeout` seconds for each of its two, below 0 for ever.

    Yields True where this process holds it, False where another does (or this one already: it is not reentrant),
    None where there are no locks, as on some network file systems: whether to go on then is the caller's.

    It is two locks: filelock's, on the lock file, and where there is flock, one on `path` itself, by which earlier
    versions of TwinGPT and this one see each other. Either alone is enough.
    """
    held: bool | None = None
    with ExitStack() as stack:
        for lock in (_lock_beside, _flock):
            taken = stack.enter_context(lock(path, timeout))
            if taken is False:
                stack.close()
                held = False
                break
            held = held or taken
        yield held


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock of `path`; None where that can't be told.

    It makes no file: the lock file is asked where there is one, since the folder may be another by now than the one
    that was locked.
    """
    with _flock(path, 0.0, shared=True) as free:
        if free is False:
            return True
    with suppress(OSError):
        if lock_file(path).exists():
            with _lock_beside(path, 0.0) as beside:
                free = beside if free is None or beside is False else free
    return None if free is None else not free


@contextmanager
def _lock_beside(path: Path, timeout: float) -> Iterator[bool | None]:
    from filelock import FileLock, Timeout

    file = lock_file(path)
    # Soft locks, which filelock would fall back to, outlive a process that is killed.
    lock = FileLock(file, timeout, thread_local=False, poll_interval=POLL, fallback_to_soft=False)
    held: bool | None = None
    try:
        lock.acquire()
        held = True
    except Timeout:
        held = False
    except PermissionError:  # the folder is read-only, or the lock file another user's
        pass
    except OSError as error:
        if error.errno in NO_LOCKS:  # so that nobody holds the file that was just made
            with suppress(OSError):
                file.unlink()
    try:
        yield held
    finally:
        if held:
            with suppress(OSError):  # while it is held: who waits for it sees that it is gone, and makes another
                file.unlink()
            lock.release()


@contextmanager
def _flock(path: Path, timeout: float, *, shared: bool = False) -> Iterator[bool | None]:
    if sys.platform == "win32":  # mypy knows by this name alone that there is no fcntl
        yield None
        return
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):  # not on POSIX; or what isn't there, or can't be read
        yield None
        return
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    end = time.monotonic() + timeout
    held: bool | None = False
    try:
        while not held:
            try:
                fcntl.flock(descriptor, operation)
                held = True
            except BlockingIOError:
                if timeout >= 0 and time.monotonic() >= end:
                    break
                time.sleep(POLL)
            except OSError:  # a file system without locks
                held = None
                break
        yield held
    finally:
        os.close(descriptor)
