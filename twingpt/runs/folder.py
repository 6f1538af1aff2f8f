"""Run folder: checkpoints, the pointer files `latest` and `best`, the lock, and finding runs by name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from twingpt.core import paths
from twingpt.core.errors import UserError
from twingpt.core.locks import is_locked, locked
from twingpt.core.paths import expand, sync_folder, write_atomically
from twingpt.runs.events import points, read_events

NAME = re.compile(r"step-\d{8,}")
RUNS = Path("runs")
SET_ASIDE = "set-aside"  # a folder of runs: what lay after a step that the run went on from
# Beside the folder `checkpoints`. run.json is the last, so that a removal that was cut short can be repeated.
FILES = ("metrics.jsonl", "loss.svg", "report.html", "trackers.json", "best", "latest", "config.toml", "run.json")


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def point(run: Path, pointer: str, folder: Path) -> None:
    """Write the pointer file `latest` or `best` of a run, atomically."""
    write_atomically(run / pointer, folder.name + "\n")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, by step."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def pointed(run: Path, pointer: str) -> Path | None:
    """Read the pointer file `latest` or `best` of a run: the checkpoint it names, or None."""
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
    paths.remove_leftovers(run / "checkpoints", ".step-*", unlocked_age=0)  # the run's lock keeps others away
    for name in FILES:
        for file in run.glob(f".{name}.*.tmp"):
            with suppress(OSError):
                file.unlink()


def written(run: Path) -> float:
    """When a run was last written to, in seconds since the epoch; 0 where nothing of it is there."""
    times = [0.0]
    for name in ("run.json", "metrics.jsonl", "latest"):
        with suppress(OSError):
            times.append((run / name).stat().st_mtime)
    return max(times)


@contextmanager
def training(run: Path) -> Iterator[None]:
    """Exclusive lock of a run, for who trains or removes it; UserError where another process holds it."""
    with locked(run, timeout=0.2) as held:  # `is_trained` holds it for an instant
        if held is False:
            raise _busy(run)
        yield


def is_trained(run: Path) -> bool:
    """Whether a process on this machine trains the run at this moment."""
    return bool(is_locked(run))


def check_untrained(run: Path) -> None:
    """Raise UserError where another process trains the run at this moment."""
    if is_trained(run):
        raise _busy(run)


def _busy(run: Path) -> UserError:
    return UserError(f"{run} is being trained by another process: wait for it, or stop it with Ctrl-C, which saves.")


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint's folder; a crash leaves no half one in sight, and `prune` sweeps up what it left."""
    doomed = folder.with_name(f".{folder.name}.old")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints up to where the run is, and the best; a crash leaves no half one.

    Those after it, of a run that goes on from an earlier one, stay until it has passed them. What killed saves
    and removals left behind goes too.
    """
    remove_leftovers(run)
    now, best = pointed(run, "latest"), pointed(run, "best")
    passed = [folder for folder in checkpoints(run) if now is None or folder <= now]
    for folder in passed[:-keep]:
        if folder != best:
            remove_checkpoint(folder)
    sync_folder(run / "checkpoints")


def find_run(name: str | Path) -> Path:
    """The folder of a run given by path, or by its name under runs/; `latest` is the one last written to."""
    places = (expand(name), RUNS / name)
    for folder in places:
        if (folder / "run.json").is_file():
            return folder
    if str(name) == "latest" and not any(folder.is_dir() for folder in places):
        found = [folder.parent for folder in RUNS.glob("*/run.json")]
        if found:
            return max(found, key=written)
    raise UserError(f"There is no run {name}: give its folder, or its name under runs/.")


def owner(name: str | Path) -> Path:
    """The folder of the run that `name` is, or that it names a checkpoint of."""
    try:
        return find_run(name)
    except UserError:
        folder = resolve(name)
    if not folder.name:  # named from within, as `.`
        folder = folder.absolute()
    run = folder.parent.parent
    if folder.parent.name != "checkpoints" or not (run / "run.json").is_file():
        raise UserError(f"{name} is neither a run nor a checkpoint of one.")
    return run


def _why_no_best(run: Path) -> str:
    """Why no checkpoint is a run's best, as part of a sentence."""
    if (run / "best").exists():
        named = pointed(run, "best")
        return f", as {named.name}, which was it, is gone" if named else ", as its file best is damaged"
    losses = points(read_events(run / "metrics.jsonl"), "evaluated", "val_loss")
    if not losses:
        return ", as it has not been evaluated"
    step, loss = min(losses, key=lambda point: point[1])
    there = "its file best is missing" if checkpoint_folder(run, int(step)).is_dir() else "there is none of it"
    return f", as its lowest held-out loss, {loss:.4f}, was at step {step:,} and {there}"


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
        steps = ", ".join(str(step_of(folder)) for folder in checkpoints(run))
        rest = f"it has those of the steps {steps}, as {run}@STEP" if steps else "it has none yet"
        why = _why_no_best(run) if which == "best" else ""
        raise UserError(f"The run {run} has no checkpoint {which}{why}: {rest}.")
    return found
