"""Setting aside: what lies after the step that a run goes on from becomes a run of its own, in set-aside/."""

from __future__ import annotations

from pathlib import Path

from twingpt.core.paths import sync_folder, write_atomically
from twingpt.runs import folder as runs
from twingpt.runs import inventory, trackers
from twingpt.runs.events import read_events

UNFINISHED = ".unfinished"  # in set-aside/, until all is there: what was cut short goes on in it


def set_aside(run: Path, saved: Path) -> Path | None:
    """Move what a run has beyond its checkpoint `saved` to a folder below set-aside/; None where nothing is beyond.

    The folder has the later checkpoints, all of the events, `latest` and `best` as they were, and copies of what
    describes the run, so that every command takes it as a run. In the run `latest` then names `saved` and `best` the
    best checkpoint up to there, and its trackers begin new runs that name the old ones. Killed at any moment, it is
    completed by the next call.
    """
    place, latest, best = run / runs.SET_ASIDE, runs.pointed(run, "latest"), runs.pointed(run, "best")
    unfinished = place / UNFINISHED
    step = runs.step_of(saved)
    told = (event["step"] for event in read_events(run / "metrics.jsonl") if event["event"] == "saved")
    if not (unfinished.exists() or (latest and latest > saved) or any(later > step for later in told)):
        return None
    (unfinished / "checkpoints").mkdir(parents=True, exist_ok=True)
    _copy_files(run, unfinished)
    for pointer, named in (("latest", latest), ("best", best)):
        if named and named > saved:
            runs.point(unfinished, pointer, named)
    trackers.begin_anew(run, step)
    runs.point(run, "latest", saved)
    if best and best > saved:
        inventory.point_best(run, [folder for folder in runs.checkpoints(run) if folder <= saved])
    for folder in runs.checkpoints(run):
        if folder > saved:
            folder.rename(unfinished / "checkpoints" / folder.name)
    for changed in (run / "checkpoints", unfinished / "checkpoints", unfinished):
        sync_folder(changed)
    return unfinished.rename(_free_name(place, step))


def _copy_files(run: Path, folder: Path) -> None:
    """Copy a run's files but its pointers, unless an earlier call has."""
    for name in runs.FILES:
        if name not in ("latest", "best") and (run / name).is_file() and not (folder / name).exists():
            write_atomically(folder / name, (run / name).read_bytes())


def _free_name(place: Path, step: int) -> Path:
    """The first of after-STEP, after-STEP-2 … that is not taken."""
    name, count = f"after-{step:08d}", 1
    while (place / (name if count == 1 else f"{name}-{count}")).exists():
        count += 1
    return place / (name if count == 1 else f"{name}-{count}")
