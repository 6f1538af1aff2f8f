"""Windows, as far as another system can play it: what POSIX alone has is hidden from the package, and from it alone.

Modules, functions and signals are missing for code of `twingpt`, and sys.platform, os.name and platform.system()
say Windows to it; other libraries find what is there. As there, no folder can be opened, no file that is open for
reading alone be synced, and what is open or mapped can be neither renamed nor removed, nor the folder that it is in.

    python tests/windows.py FOLDER     imports every module of the package, trains, resumes and converts in FOLDER
"""

import builtins
import contextlib
import ctypes
import errno
import fcntl
import functools
import http.server
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import signal
import sys
import threading
import types
from pathlib import Path

import psutil

MODULES = {"crypt", "fcntl", "grp", "nis", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}  # what Windows has of them
MISSING = {
    "os": """
        fork forkpty openpty wait wait3 wait4 waitid killpg getpgid getpgrp setpgid setsid getsid getuid geteuid getgid
        getegid getgroups setuid sysconf confstr pathconf statvfs uname getloadavg nice getpriority sched_getaffinity
        sched_setaffinity sched_yield mkfifo mknod chown fchown lchown fchmod chroot pread pwrite preadv sendfile sync
        fdatasync lockf posix_fadvise posix_fallocate register_at_fork ttyname ctermid getxattr setxattr O_DIRECTORY
        O_CLOEXEC O_NOFOLLOW O_NONBLOCK O_SYNC O_NOCTTY WNOHANG WIFEXITED WIFSIGNALED
    """,
    "signal": "alarm pause setitimer getitimer siginterrupt pthread_kill pthread_sigmask sigwait",
    "select": "poll epoll kqueue",
    "mmap": "MADV_DONTNEED MADV_WILLNEED MADV_SEQUENTIAL MADV_RANDOM MAP_SHARED MAP_PRIVATE PROT_READ PROT_WRITE",
    "time": "tzset clock_gettime pthread_getcpuclockid",
}


def _is_ours(names: dict) -> bool:
    """Whether these are a module of the package."""
    return str(names.get("__name__", "")).partition(".")[0] == "twingpt"


def _asked_by_us(frame: types.FrameType | None) -> bool:
    """Whether the package asked, by itself or through the standard library."""
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in sys.stdlib_module_names:
        frame = frame.f_back
    return frame is not None and _is_ours(frame.f_globals)


class _Seen:
    """A module as the package sees it, with these attributes in place of its own; a missing one is None."""

    def __init__(self, module: types.ModuleType, other: dict) -> None:
        vars(self).update(_module=module, _other=other)

    def __getattr__(self, name: str) -> object:
        found = self._other[name] if name in self._other else getattr(self._module, name)
        if found is None and name in self._other:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")
        return found

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._module, name, value)


def _without_libc(name: str | None, *arguments: object, **options: object) -> ctypes.CDLL:
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    return ctypes.CDLL(name, *arguments, **options)


def _taken(path: Path) -> bool:
    """Whether this process has a file open or mapped that is at `path` or within."""
    files = {file.path for file in psutil.Process().open_files()}
    with contextlib.suppress(OSError):  # not Linux
        files |= {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines()}
    return any(path == Path(file) or path in Path(file).parents for file in files)


def _path_of(descriptor: int) -> str:
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _check_closed(root: Path, path: object, folder: int = -1) -> None:
    """PermissionError for what this process has open; `folder` is the descriptor that a relative path begins at."""
    name = os.fsdecode(path)
    if folder not in (-1, None) and not os.path.isabs(name):
        name = os.path.join(_path_of(folder), name)
    found = Path(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
    if root in found.parents and _taken(found):
        raise PermissionError(errno.EACCES, "it is open", str(found))


def _check_openable(path: object, frame: types.FrameType) -> None:
    """OSError for what Windows doesn't open."""
    if isinstance(path, int):
        return
    if str(path).startswith(("/proc/", "/sys/")) and _asked_by_us(frame):
        raise FileNotFoundError(errno.ENOENT, "it is Linux's", str(path))
    if _is_ours(frame.f_globals) and os.path.isdir(path):
        raise PermissionError(errno.EACCES, "it is a folder", str(path))


def _audit(root: Path):
    """An audit hook: Windows' own refusals."""
    busy = []  # while it looks by itself

    def hook(event: str, arguments: tuple) -> None:
        if busy or event not in ("open", "os.rename", "os.remove", "os.rmdir"):
            return
        busy.append(event)
        try:
            if event == "open":
                _check_openable(arguments[0], sys._getframe(1))
            elif event == "os.rename":
                _check_closed(root, arguments[0], arguments[2])
                _check_closed(root, arguments[1], arguments[3])
            else:
                _check_closed(root, *arguments)
        finally:
            busy.pop()

    return hook


def pretend(root: Path) -> None:
    """Begin to be Windows; what is open is looked for within `root` alone."""
    real_import, real_fsync, real_info = builtins.__import__, os.fsync, psutil.Process.memory_info
    hidden = {name for name in dir(signal) if name.startswith("SIG") and name[3] != "_"} - SIGNALS
    other = {name: dict.fromkeys(names.split()) for name, names in MISSING.items()}
    other["os"]["name"] = "nt"
    other["signal"] |= dict.fromkeys(hidden) | {"SIGBREAK": signal.SIGUSR1}
    other["sys"] = {"platform": "win32"}
    other["platform"] = {"system": lambda: "Windows", "libc_ver": lambda: ("", "")}
    other["ctypes"] = {"CDLL": _without_libc}
    seen = {name: _Seen(importlib.import_module(name), attributes) for name, attributes in other.items()}

    def import_(name, given=None, *arguments, **options):
        if not _is_ours(given or {}):
            return real_import(name, given, *arguments, **options)
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        found = real_import(name, given, *arguments, **options)
        return seen.get(found.__name__, found)

    def fsync(file) -> None:
        number = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_fsync(number)

    def memory_info(self):
        found = real_info(self)
        return types.SimpleNamespace(**found._asdict(), peak_wset=found.rss)

    builtins.__import__, os.fsync, psutil.Process.memory_info = import_, fsync, memory_info
    sys.addaudithook(_audit(root.resolve()))


def gpt(*arguments: object) -> str:
    """What a command prints; SystemExit with what it says where it fails."""
    from twingpt.cli import main

    sys.argv = ["gpt", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        if stop.code:
            raise SystemExit(f"{arguments}: {stop.code}: {err.getvalue()}") from None
    return out.getvalue()


def import_everything() -> list[str]:
    """Import every module of the package, and of the backends those that are here."""
    import twingpt
    from twingpt.backends import registry

    missing = tuple(f"twingpt.backends.{name}" for name in registry.BACKENDS if not registry.installed(name))
    names = [found.name for found in pkgutil.walk_packages(twingpt.__path__, "twingpt.", onerror=lambda name: None)]
    names = [name for name in names if not name.startswith(missing or ("-",))]
    for name in names:
        importlib.import_module(name)
    return names


def download(path: Path, to: Path) -> None:
    """Fetch a file from a server of this process."""
    from twingpt.data.download import download

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=path.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with contextlib.redirect_stderr(io.StringIO()):  # its log
            download(f"http://127.0.0.1:{server.server_port}/{path.name}", to)
        server.shutdown()


def is_stopped_by_ctrl_break() -> bool:
    """Whether training would save and end."""
    from twingpt.training.interrupt import Interrupt

    with Interrupt() as wish:
        signal.raise_signal(signal.SIGUSR1)  # SIGBREAK, to the package
    return wish.requested


def live(folder: Path) -> dict:
    """Train, resume, convert there and back, prepare, download and remove; what came of it."""
    os.chdir(folder)
    Path("prose.txt").write_text("The cat sat on the mat. The bird flew over the hill.\n" * 200, encoding="utf-8")
    tiny = {"n-layer": 1, "n-head": 2, "n-embd": 16, "block-size": 16, "batch-size": 2, "tokenizer": "byte"}
    flags = [part for name, value in tiny.items() for part in (f"--{name}", value)]
    run, options = "runs/a run", ("--backend", "torch", "--device", "cpu", "--json")
    lengths = ("--max-iters", 4, "--eval-interval", 2, "--eval-iters", 1)
    gpt("train", "--data", "prose.txt", "--out", run, *flags, *lengths, *options)
    resumed = gpt("train", "--resume", run, "--max-iters", 6, *options)
    for source, target, *how in [
        (run, "hf", "--to", "hf"), ("hf", "back"), (run, "state", "--to", "torch"), ("state", "again"),
        (run, "back", "--force", "--to", "twingpt"), ("hf", "model.gguf"),
    ]:  # fmt: skip
        if target != "model.gguf" or importlib.util.find_spec("gguf"):
            gpt("convert", source, target, *how)
    gpt("data", "prepare", "prose.txt", "--name", "prose", "--tokenizer", "byte")
    gpt("data", "rm", "prose", "--yes")
    download(folder / "prose.txt", folder / "copy.txt")
    shown = gpt("runs", "--json")
    text = gpt("generate", "again", "-p", "The", "-m", 4, "--backend", "torch", "--device", "cpu")
    checkpoints = sorted(path.name for path in Path(run, "checkpoints").iterdir())
    gpt("runs", "rm", run, "--yes")
    left = sorted(path.name for path in folder.iterdir())
    seen = {"resumed": json.loads(resumed), "runs": json.loads(shown), "stopped": is_stopped_by_ctrl_break()}
    return {**seen, "checkpoints": checkpoints, "text": text, "left": left}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    pretend(place)
    modules = import_everything()
    sys.stdout.write(json.dumps({"modules": modules, **live(place)}))
