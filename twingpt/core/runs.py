"""A run's folder: its checkpoints, and the pointers that name the latest and the best."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from twingpt.core.errors import UserError
from twingpt.core.paths import expand, sync_folder, write_atomically

NAME = re.compile(r"step-\d{8,}")
FILES = ("run.json", "metrics.jsonl", "latest", "best", "loss.svg")  # beside the folder `checkpoints`


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def point(run: Path, pointer: str, folder: Path) -> None:
    """Make `latest` or `best` of a run name one of its checkpoints."""
    write_atomically(run / pointer, folder.name + "\n")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, by step."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def pointed(run: Path, pointer: str) -> Path | None:
    """The checkpoint that `latest` or `best` of a run names, or None where it names none."""
    try:
        name = (run / pointer).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return run / "checkpoints" / name if NAME.fullmatch(name) else None


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest where a crash came before the file; None where none is."""
    if (run / "latest").exists():
        return pointed(run, "latest")
    return next(reversed(checkpoints(run)), None)


def remove_leftovers(run: Path) -> None:
    """Remove what killed saves and removals left behind, as far as that can be."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in FILES:
        for file in run.glob(f".{name}.*.tmp"):
            with suppress(OSError):
                file.unlink()


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints, the best and the latest named; a crash leaves no half one.

    What killed saves and removals left behind goes too.
    """
    remove_leftovers(run)
    named = {pointed(run, "latest"), pointed(run, "best")}
    for folder in checkpoints(run)[:-keep]:
        if folder not in named:
            doomed = folder.with_name(f".{folder.name}.old")
            folder.rename(doomed)
            shutil.rmtree(doomed)
    sync_folder(run / "checkpoints")


def find_run(name: str | Path) -> Path:
    """The folder of a run given by path, or by its name under runs/."""
    for folder in (expand(name), Path("runs") / name):
        if (folder / "run.json").is_file():
            return folder
    raise UserError(f"There is no run {name}: give its folder, or its name under runs/.")


def resolve(path: str | Path) -> Path:
    """A checkpoint's folder: the one given, or of a run its latest; RUN@best and RUN@STEP name others."""
    folder = expand(path)
    if (folder / "config.json").exists() or (folder / "manifest.json").exists():
        return folder
    try:
        run, which = find_run(path), "latest"
    except UserError:
        name, at, which = str(path).rpartition("@")
        if not at:
            raise
        run = find_run(name)
    if which.isascii() and which.isdecimal():
        found: Path | None = checkpoint_folder(run, int(which))
    elif which in ("latest", "best"):
        found = latest(run) if which == "latest" else pointed(run, which)
    else:
        raise UserError(f"{path} is no checkpoint: after @ give latest, best or a step.")
    if found is None or not found.is_dir():
        steps = ", ".join(str(int(folder.name.removeprefix("step-"))) for folder in checkpoints(run))
        rest = f"it has those of the steps {steps}, as {run}@STEP" if steps else "it has none yet"
        raise UserError(f"The run {run} has no checkpoint {which}: {rest}.")
    return found
