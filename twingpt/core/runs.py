"""A run's folder: its checkpoints, and the pointers that name the latest and the best."""

from __future__ import annotations

import shutil
from pathlib import Path

from twingpt.core.errors import UserError
from twingpt.core.paths import sync_folder, write_atomically


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def point(run: Path, pointer: str, folder: Path) -> None:
    """Make `latest` or `best` of a run name one of its checkpoints."""
    write_atomically(run / pointer, folder.name + "\n")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, by step."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints, the best and the latest named; a crash leaves no half one."""
    named = {(run / pointer).read_text().strip() for pointer in ("latest", "best") if (run / pointer).exists()}
    for folder in checkpoints(run)[:-keep]:
        if folder.name not in named:
            doomed = folder.with_name(f".{folder.name}.old")
            folder.rename(doomed)
            shutil.rmtree(doomed)
    sync_folder(run / "checkpoints")


def find_run(name: str | Path) -> Path:
    """The folder of a run given by path, or by its name under runs/."""
    for folder in (Path(name).expanduser(), Path("runs") / name):
        if (folder / "run.json").is_file():
            return folder
    raise UserError(f"There is no run {name}: give its folder, or its name under runs/.")


def resolve(path: str | Path) -> Path:
    """A checkpoint's folder: the one given, or of a run its latest; RUN@best and RUN@STEP name others."""
    folder = Path(path).expanduser()
    if (folder / "config.json").exists() or (folder / "manifest.json").exists():
        return folder
    name, _, which = str(path).partition("@")
    run = find_run(name)
    if which.isdigit():
        found = checkpoint_folder(run, int(which))
    elif which in ("", "latest", "best"):
        pointer = run / (which or "latest")
        if not pointer.exists():
            raise UserError(f"The run {name} has no {pointer.name} checkpoint yet.")
        found = run / "checkpoints" / pointer.read_text().strip()
    else:
        raise UserError(f"{path} is no checkpoint: after @ give latest, best or a step.")
    if not found.is_dir():
        saved = ", ".join(str(int(folder.name.removeprefix("step-"))) for folder in checkpoints(run)) or "none"
        raise UserError(f"The run {name} has no checkpoint {which or 'latest'}: its steps are {saved}.")
    return found
