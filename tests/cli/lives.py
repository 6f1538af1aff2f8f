"""Lives of a run, many and cheap: a server that imports everything once and forks a process for each `gpt` command.

A process may be killed after a time, or at its k-th change to a file, or send itself signals at some moment.
On macOS, where forking with Metal loaded is not safe, each life is a process of its own, and takes seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORKS = sys.platform != "darwin"
HANGS = 200.0  # seconds after which a process is taken to hang, however slow the machine
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}  # as Python audits them


@dataclass(frozen=True)
class Life:
    """How a process ended (below 0: by that signal), after how many seconds, and what it printed."""

    code: int
    seconds: float
    output: str


class Lives:
    """The server's client."""

    def __init__(self, backend: str) -> None:
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.backend = backend
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.lives", backend],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **one},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, folder: Path, *arguments: object, **fate: Any) -> Life:
        """`gpt train ARGUMENTS` in `folder`.

        Of fate, `seconds` kills it after a time, `change` at its k-th change to a file, and `signals` are
        sent at the `call`-th call of the function or method that `moment` ("module:Class.method") names.
        """
        command = ["train", "--backend", self.backend, "--device", "cpu", *map(str, arguments)]
        request = {"command": command, "folder": str(folder), "fate": fate}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server died"
        return Life(**json.loads(answer), output=(folder / "output.txt").read_text("utf-8"))

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(HANGS)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_change(count: int) -> None:
    """Kill this process before its `count`-th change to a file or to a folder, or sync of one."""
    left = [count]

    def change() -> None:
        left[0] -= 1
        if not left[0]:
            die()

    def audit(event: str, details: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and details[1] and set(details[1]) & set("wax+")):
            change()

    def synced(descriptor: int, fsync: Any = os.fsync) -> None:
        change()
        fsync(descriptor)

    sys.addaudithook(audit)
    os.fsync = synced


def send_at(moment: str, call: int, signals: list[int]) -> None:
    """Send this process `signals` at the `call`-th call of `moment`."""
    module, _, path = moment.partition(":")
    owner_name, _, name = path.rpartition(".")
    owner = importlib.import_module(module)
    owner = getattr(owner, owner_name) if owner_name else owner
    real, left = getattr(owner, name), [call]

    def called(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, called)


def be_born(request: dict[str, Any]) -> None:
    """Be the process that a request asks for."""
    from twingpt import cli
    from twingpt.training import flops

    flops.SECONDS = 0.02  # no test looks at how fast a device is
    os.chdir(request["folder"])
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    fate, code = request["fate"], 0
    if "change" in fate:
        kill_at_change(fate["change"])
    if "moment" in fate:
        send_at(fate["moment"], fate["call"], fate["signals"])
    sys.argv = ["gpt", *request["command"]]
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def begin(request: dict[str, Any], backend: str) -> int:
    if not FORKS:
        return os.posix_spawn(
            sys.executable, [sys.executable, "-m", "tests.cli.lives", backend, json.dumps(request)], os.environ
        )
    pid = os.fork()
    if pid == 0:
        try:
            be_born(request)
        finally:  # an error in a child must not come back as a second server
            sys.excepthook(*sys.exc_info())
            os._exit(70)
    return pid


def watch(pid: int, seconds: float) -> Life:
    """Wait for a process, and kill it after so many seconds."""
    start = time.perf_counter()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        now = time.perf_counter() - start
        if ended:
            return Life(os.waitstatus_to_exitcode(status), now, "")
        if now >= seconds:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)


def warm_up(backend: str) -> None:
    """Import what a run needs, without running any of it: a forked process has none of its parent's threads."""
    import io

    if backend == "torch":
        import torch

        torch.set_num_threads(1)
    from matplotlib.figure import Figure

    from twingpt import cli
    from twingpt.backends import registry
    from twingpt.training import launch, resume, trainer  # noqa: F401

    registry.get(backend)
    figure = Figure(layout="constrained")
    figure.add_subplot().set_title("fonts and all", parse_math=False)
    figure.savefig(io.BytesIO(), format="svg")
    sys.argv, stdout, sys.stdout = ["gpt", "train", "--help"], sys.stdout, io.StringIO()
    try:
        cli.main()
    except SystemExit:
        sys.stdout = stdout


def serve(backend: str) -> None:
    if FORKS:
        warm_up(backend)
    for line in sys.stdin:
        request = json.loads(line)
        life = watch(begin(request, backend), request["fate"].get("seconds", HANGS))
        sys.stdout.write(json.dumps({"code": life.code, "seconds": life.seconds}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        be_born(json.loads(sys.argv[2]))
    else:
        serve(sys.argv[1])
