"""HTTP downloads: resumed where they were cut, verified, and renamed into place only when whole."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from twingpt.core.errors import UserError
from twingpt.core.locks import locked
from twingpt.core.paths import naming, rename, sync_folder

CHUNK = 1 << 20

# Called with a description of what is done with which file, bytes done, and bytes in all where that is known.
Progress = Callable[[str, int, "int | None"], None]


class DownloadError(Exception):
    """Why a file can't be had from its address, as the second half of a sentence."""


class _TransientError(Exception):
    """A fault after which the same request may succeed: a cut connection, a busy server."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, never from https to anything less, and keeps what the first answer states of the file."""

    def __init__(self) -> None:
        self.stated: dict[str, str] = {}

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The next request; DownloadError where it would not be as safe as this one."""
        if urlsplit(newurl).scheme not in ("https", urlsplit(req.full_url).scheme):
            raise DownloadError(f"{urlsplit(req.full_url).netloc} redirects to {newurl}, which is not https")
        self.note(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def note(self, headers: Any) -> None:
        """Keep the SHA-256 and the size that Hugging Face's hub states of a large file; the first answer's count."""
        for key in ("X-Linked-Etag", "X-Linked-Size"):
            if headers.get(key):
                self.stated.setdefault(key, headers[key].strip('"'))


@dataclass
class _Download:
    """A download under way: what is known of the file, and the .part file that it grows in."""

    url: str
    name: str
    file: Any  # the .part file, unbuffered; its lock is held
    etag_path: Path
    size: int | None
    sha256: str | None
    timeout: float
    progress: Progress
    answered: bool = False
    resumed: bool = False

    @property
    def part_size(self) -> int:
        """Bytes in the .part file."""
        return os.fstat(self.file.fileno()).st_size

    def restart(self) -> None:
        """Empty the .part file."""
        self.file.truncate(0)
        self.resumed = False

    def attempt(self) -> None:
        """Fetch what is missing; _TransientError where another attempt may help, DownloadError where not."""
        if self.size is not None and self.part_size > self.size:
            self.restart()
        have = self.part_size
        if have and have == self.size:
            return
        etag = self.etag_path.read_text("latin-1") if have and self.etag_path.exists() else ""
        headers = {"User-Agent": "twingpt"}
        if etag:
            headers |= {"Range": f"bytes={have}-", "If-Range": etag}
        with self.open(headers) as response:
            if response.status == 416:
                self.check_complete(response.headers, have)
            else:
                self.copy(response, self.start_offset(response, have, etag))

    @contextmanager
    def open(self, headers: dict[str, str]) -> Iterator[Any]:
        """The server's response, of status 200, 206 or 416; any fault is a _TransientError or a DownloadError."""
        redirects = _Redirects()
        try:
            request = urllib.request.Request(self.url, headers=headers)
            with _response(urllib.request.build_opener(redirects), request, self.timeout) as response:
                self.answered = True
                redirects.note(response.headers)
                self.check_stated(redirects.stated)
                yield response
        except urllib.error.URLError as error:
            reason = getattr(error.reason, "strerror", None) or error.reason
            reason = f"{urlsplit(self.url).netloc} can't be reached ({reason})"
            raise (_TransientError if self.answered else DownloadError)(reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(f"the connection was cut ({str(error) or type(error).__name__})") from None
        except ValueError as error:
            raise DownloadError(f"the server redirects to no address ({error})") from None

    def check_stated(self, stated: dict[str, str]) -> None:
        """Check SHA-256 and size as the server states them, or keep them where none is known; else DownloadError."""
        digest, size = stated.get("X-Linked-Etag", ""), stated.get("X-Linked-Size", "")
        if re.fullmatch("[0-9a-f]{64}", digest):
            self.sha256 = self.sha256 or digest
            if digest != self.sha256:
                raise DownloadError(f"what is there now has another SHA-256, {digest}")
        if size.isdecimal():
            self.check_size(int(size))

    def check_size(self, size: int) -> None:
        """Check the size of the file, or keep it where none is known; else DownloadError."""
        self.size = size if self.size is None else self.size
        if size != self.size:
            raise DownloadError(f"what is there now has {size:,} bytes instead of {self.size:,}")

    def check_complete(self, headers: Any, have: int) -> None:
        """_TransientError unless the .part file is as large as the file that has nothing from its end on (416)."""
        total = headers.get("Content-Range", "").rpartition("/")[2]
        if not have or total != str(have):
            self.restart()
            raise _TransientError("the server has no such part of the file")

    def start_offset(self, response: Any, have: int, etag: str) -> int:
        """The offset in the file of the response's first byte, up to which the .part file is kept."""
        headers = response.headers
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if not match or int(match[1]) != have or headers.get("ETag", etag) != etag:
                self.restart()
                raise _TransientError("the server sent another part than it was asked for, or of another file")
            if match[2] != "*":
                self.check_size(int(match[2]))
            self.resumed = True
            return have
        self.restart()
        if headers.get("Content-Length", "").isdecimal():
            self.check_size(int(headers["Content-Length"]))
        etag = headers.get("ETag", "")
        with _disk_errors(self.etag_path.parent):
            self.etag_path.write_text("" if etag.startswith("W/") else etag, "latin-1")  # as http.client reads headers
        return 0

    def copy(self, response: Any, start: int) -> None:
        """Append the response to the .part file."""
        _check_room(self.etag_path.parent, (self.size or 0) - start)
        have = start
        while self.size is None or have < self.size:
            chunk = response.read1(CHUNK)
            if not chunk:
                break
            have += len(chunk)
            rest = memoryview(chunk)
            with _disk_errors(self.etag_path.parent):
                while rest:
                    rest = rest[self.file.write(rest) :]
            self.progress(self.name, have, self.size)
        if self.size is not None and have < self.size:
            raise _TransientError(f"the connection was cut after {have:,} of {self.size:,} bytes")


@contextmanager
def _response(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float) -> Iterator[Any]:
    try:
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                yield error
                return
            if 300 <= error.code < 400:
                raise DownloadError("the server redirects in a circle") from None
            reason = f"the server says {error.code} {error.reason}"
            passing = error.code >= 500 or error.code in (408, 429)
            raise (_TransientError if passing else DownloadError)(reason) from None
    with response:
        yield response


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        from twingpt.runs.units import human_bytes

        raise UserError(
            f"{folder} has {human_bytes(free)} free, and the download needs {human_bytes(needed)}: free some room, "
            "or set TWINGPT_HOME to a folder on a larger disk."
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn the disk's OSErrors into UserErrors, or they would be taken for the network's and tried again."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder} can't be written to: {error.strerror}.") from None
        raise UserError(
            f"The disk of {folder} is full: free some room and run the command again, which goes on with what has come."
        ) from None


def digest(path: Path, progress: Callable[[int, int | None], None]) -> str:
    """The SHA-256 of a file."""
    sha, done, size = hashlib.sha256(), 0, path.stat().st_size
    with naming(path), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
            done += len(chunk)
            progress(done, size)
    return sha.hexdigest()


def download(
    url: str,
    path: Path,
    size: int | None = None,
    sha256: str | None = None,
    progress: Progress = lambda what, done, total: None,
    *,
    timeout: float = 30.0,
    tries: int = 6,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """Download `url` to `path` and return its SHA-256; `size` in bytes and `sha256` must match where they are given.

    What has arrived stays in a .part file beside it, from which this or a later call resumes. Raises DownloadError
    after `tries` faults with no byte gained, or at once where another attempt is no use; UserError where the disk
    fails. `timeout` is in seconds without a byte; `wait` sleeps for a number of seconds.
    """
    part = path.with_name(f"{path.name}.part")
    with _disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("ab", buffering=0)
    with file, ExitStack() as stack:
        if stack.enter_context(locked(part)) is False:
            progress(f"{path.name}, by another process", 0, None)
            stack.enter_context(locked(part, timeout=-1))
        if path.exists():  # by the other process
            file.close()  # Windows neither removes nor renames what is open
            part.unlink(missing_ok=True)
            return digest(path, lambda done, total: None)
        etag_path = path.with_name(f"{path.name}.part.etag")
        this = _Download(url, path.name, file, etag_path, size, sha256, timeout, progress)
        found = _fetch_with_retries(this, part, tries, wait)
        with _disk_errors(path.parent):
            os.fsync(file.fileno())
            file.close()
            rename(part, path)
            etag_path.unlink(missing_ok=True)
            sync_folder(path.parent)
    return found


def _fetch_with_retries(this: _Download, part: Path, tries: int, wait: Callable[[float], None]) -> str:
    """Attempt until the .part file is whole and right, with exponential backoff; its SHA-256."""
    most, failed = this.part_size, 0  # `failed` attempts since the .part file grew beyond `most`
    while True:
        try:
            this.attempt()
            sha256 = digest(part, partial(this.progress, f"checking {this.name}"))
            if sha256 == (this.sha256 or sha256):
                return sha256
            resumed = this.resumed
            this.restart()
            reason = f"what came has the SHA-256 {sha256} instead of {this.sha256}"
            if not resumed:  # a resumed file may be pieced together from two versions, so that one begins again
                raise DownloadError(reason)
        except _TransientError as error:
            reason = str(error)
        failed = 0 if this.part_size > most else failed + 1
        most = max(most, this.part_size)
        if failed >= tries:
            raise DownloadError(f"{reason}, after {tries} tries")
        wait(min(2.0 ** max(failed - 1, 0), 60.0))


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar on stderr, as a Progress; none where stderr is no terminal."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as shown:
        tasks = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                for other in shown.task_ids:
                    shown.remove_task(other)
                tasks[what] = shown.add_task(what, total=total, completed=done)  # its speed counts from here
            shown.update(tasks[what], completed=done, total=total)

        yield report
