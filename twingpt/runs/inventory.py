"""Inventory of runs: listed, filtered, described and removed, from a few small files and without a framework."""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import sync_folder
from twingpt.core.reading import read_json
from twingpt.runs import folder as runs

FOLDERS = (
    "checkpoints",
    "tensorboard",
    "wandb",
    runs.SET_ASIDE,
)  # what training and its trackers write beside runs.FILES


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint: losses are its own, None where it was not evaluated; `error` is what is wrong with it."""

    step: int
    path: str
    val_loss: float | None
    val_bpb: float | None
    backend: str | None
    size_bytes: int
    date: str
    latest: bool
    best: bool
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """A run: how far it is, its best loss among the checkpoints there are, and `error`, what is wrong with it.

    `state` is running (a process on this machine trains it), finished (all its steps are done) or stopped.
    """

    name: str
    path: str
    state: str
    step: int | None
    max_iters: int | None
    val_loss: float | None
    val_bpb: float | None
    backend: str | None
    data: str | None
    size_bytes: int
    date: str
    error: str | None = None
    checkpoints: list[SavedStep] = field(default_factory=list)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; UserError where the file holds none."""
    if not path.exists():
        raise UserError(f"{path.name} is missing")
    try:
        content = read_json(path)
    except UserError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is damaged")
    return content


def size(folder: Path) -> int:
    """Size in bytes of the files below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except OverflowError:
        return None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str | None:
    if isinstance(value, list):  # the sources of a mixture
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else None


def _checkpoint(folder: Path, latest: Path | None, best: Path | None) -> SavedStep:
    state: dict[str, Any] = {}
    error = None
    try:
        state = _read(folder / "training_state.json")
        if not (folder / "manifest.json").is_file():
            error = "manifest.json is missing"
    except UserError as problem:
        error = str(problem)
    step = runs.step_of(folder)
    if state.get("evaluated_at", step) != step:  # what was measured before it; the oldest versions don't say when
        state |= {"val_loss": None, "val_bpb": None}
    return SavedStep(
        step=step,
        path=str(folder),
        val_loss=_number(state.get("val_loss")),
        val_bpb=_number(state.get("val_bpb")),
        backend=_text(state.get("backend")),
        size_bytes=size(folder),
        date=_date(_mtime(folder)),
        latest=folder == latest,
        best=folder == best,
        error=error,
    )


def _problem(run: Path, saved: Iterable[SavedStep]) -> str | None:
    """What is wrong with a run whose run.json is fine."""
    for pointer in ("latest", "best"):
        named = runs.pointed(run, pointer)
        if named is None and (run / pointer).exists():
            return f"{pointer} names no checkpoint"
        if named is not None and not named.is_dir():
            return f"{pointer} names {named.name}, which is gone"
    return next((f"{Path(one.path).name}: {one.error}" for one in saved if one.error), None)


def inspect(run: Path) -> Run:
    """A run's row; whatever is damaged in it is told in `error`."""
    latest, best = runs.latest(run), runs.pointed(run, "best")
    saved = [_checkpoint(folder, latest, best) for folder in runs.checkpoints(run)]
    saved = [one for one in saved if Path(one.path).is_dir()]  # training may have dropped one meanwhile
    described: dict[str, Any] = {}
    try:
        described = _read(run / "run.json")
        error = _problem(run, saved)
    except UserError as problem:
        error = str(problem)
    train = _dict(described.get("train"))
    max_iters = train.get("max_iters") if isinstance(train.get("max_iters"), int) else None
    last = next((one for one in saved if one.latest), saved[-1] if saved else None)  # later ones: it was taken back
    measured = [one for one in saved if one.val_loss is not None]
    top = min(measured, key=lambda one: one.val_loss or 0.0, default=None)
    done = last is not None and max_iters is not None and last.step >= max_iters
    return Run(
        name=run.resolve().name,
        path=str(run),
        state="running" if runs.is_trained(run) else "finished" if done else "stopped",
        step=last.step if last else None,
        max_iters=max_iters,
        val_loss=top.val_loss if top else None,
        val_bpb=top.val_bpb if top else None,
        backend=last.backend if last else None,
        data=_text(train.get("data")),
        size_bytes=size(run),
        date=_date(runs.written(run) or _mtime(run)),
        error=error,
        checkpoints=saved,
    )


# Sorted by these, the first is the one that is most likely looked for; what has no figure comes last.
ORDERS: dict[str, Callable[[Run], Any]] = {
    "loss": lambda run: (run.val_loss is None, run.val_loss),
    "step": lambda run: -(run.step or 0),
    "date": lambda run: -datetime.datetime.fromisoformat(run.date).timestamp(),
    "size": lambda run: -run.size_bytes,
    "name": lambda run: run.name,
}


def find_runs(folder: Path) -> list[Run]:
    """The runs directly below a folder, the damaged ones too; UserError where the folder is not there."""
    if not folder.is_dir():
        if folder == runs.RUNS:
            return []
        raise UserError(f"There is no folder {folder}.")
    places = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [inspect(path) for path in places if _may_be_run(path)]


def _may_be_run(folder: Path) -> bool:
    try:
        return (folder / "run.json").exists() or (folder / "checkpoints").is_dir()
    except PermissionError:
        return True


def select(
    found: Iterable[Run],
    *,
    best: bool = False,
    latest: bool = False,
    max_loss: float | None = None,
    min_step: int | None = None,
    search: str = "",
    sort: str = "date",
) -> list[Run]:
    """The runs that match, each with its checkpoints that match, in an order of ORDERS.

    `best` and `latest` keep the checkpoints so pointed at, and `max_loss` and `min_step` those that
    reach them; a run left without one is left out. `search` is a part of a run's name, path, data or
    backend.
    """
    if sort not in ORDERS:
        raise unknown_choice("--sort", sort, ORDERS)

    def wanted(one: SavedStep) -> bool:
        return (
            (not (best or latest) or (best and one.best) or (latest and one.latest))
            and (max_loss is None or (one.val_loss is not None and one.val_loss <= max_loss))
            and (min_step is None or one.step >= min_step)
        )

    filtered = best or latest or max_loss is not None or min_step is not None
    kept = []
    for run in found:
        text = "\n".join(filter(None, (run.name, run.path, run.data, run.backend))).lower()
        checkpoints = [one for one in run.checkpoints if wanted(one)]
        if search.lower() in text and (checkpoints or not filtered):
            kept.append(dataclasses.replace(run, checkpoints=checkpoints))
    return sorted(kept, key=ORDERS[sort])


def describe(name: str) -> tuple[Run, dict[str, Any]]:
    """A run's row, config, train, data and starts of its run.json, empty where damaged, and runs set aside in it."""
    run = runs.owner(name)
    try:
        described = _read(run / "run.json")
    except UserError as problem:
        raise UserError(f"{run}: {problem}, so the run can't be shown; its checkpoints may be whole.") from None
    parts: dict[str, Any] = {key: _dict(described.get(key)) for key in ("config", "train", "data")}
    starts = [start for start in _list(described.get("starts")) if _dict(start)]
    aside = sorted(str(folder.parent) for folder in (run / runs.SET_ASIDE).glob("*/run.json"))
    return inspect(run), {**parts, "starts": starts, "set_aside": aside}


def starts(described: Mapping[str, Any]) -> list[dict[str, str]]:
    """When and where each start of a run.json was, as text to show."""
    rows = []
    for start in filter(None, map(_dict, _list(described.get("starts")))):
        device, versions = _dict(start.get("device")), _dict(start.get("versions"))
        python = [f"Python {start['python']}"] if "python" in start else []
        row = {
            "when": str(start.get("time", ""))[:19].replace("T", " "),
            "step": str(start.get("step", "")),
            "backend": str(start.get("backend", "")),
            "device": ", ".join(str(device[key]) for key in ("name", "description") if device.get(key)),
            "versions": ", ".join([f"{name} {version}" for name, version in versions.items()] + python),
            "platform": str(start.get("platform", "")),
        }
        rows.append(row)
    return rows


def to_remove(name: str) -> tuple[Path, Path | None]:
    """The run and, if `name` is of one checkpoint (RUN@STEP or its folder), that.

    UserError where it is neither, or the run is being trained.
    """
    run, folder = runs.owner(name), None
    try:
        runs.find_run(name)
    except UserError:
        folder = run / "checkpoints" / runs.resolve(name).absolute().name
    runs.check_untrained(run)
    if folder is not None and (folder.is_symlink() or not folder.resolve().is_relative_to(run.resolve())):
        raise UserError(f"{folder} is a link to another place: remove it yourself.")
    return run, folder


def remove_checkpoint(run: Path, folder: Path) -> None:
    """Remove a checkpoint of a run, after `latest` and `best` name others that are left, or nothing."""
    left = [path for path in runs.checkpoints(run) if path != folder]
    before, written = [path for path in left if path < folder], runs.written(run)
    if runs.pointed(run, "best") == folder:
        point_best(run, left)
    if runs.pointed(run, "latest") == folder:
        if heir := (before or left)[-1:]:
            runs.point(run, "latest", heir[0])
            os.utime(run / "latest", (written, written))  # or the run would be the one last trained
        else:
            (run / "latest").unlink()
    runs.remove_checkpoint(folder)
    sync_folder(folder.parent)


def point_best(run: Path, among: Iterable[Path]) -> None:
    """Let `best` name the checkpoint of the lowest held-out loss of its own, or nothing where none has one."""
    saved = [_checkpoint(folder, None, None) for folder in among]
    measured = [one for one in saved if one.val_loss is not None and not one.error]
    if measured:
        runs.point(run, "best", Path(min(measured, key=lambda one: one.val_loss or 0.0).path))
    else:
        (run / "best").unlink(missing_ok=True)


def best_loss(run: Path, last: Path) -> float | None:
    """The held-out loss of the checkpoint that `best` names; None where it names none up to `last`."""
    best = runs.pointed(run, "best")
    return _checkpoint(best, None, best).val_loss if best and best.is_dir() and best <= last else None


def remove_run(run: Path) -> list[str]:
    """Remove what training wrote in a run's folder, and the folder; the names of other files, which stay."""
    where = run.resolve()
    with runs.training(where):  # which also removes the lock file that a killed process left
        runs.remove_leftovers(where)
        for name in (*FOLDERS, *runs.FILES):
            _discard(where / name)
        others = sorted(path.name for path in where.iterdir())
        if not others:
            where.rmdir()
    if not others and run.is_symlink():
        run.unlink()
    return others


def _discard(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
