"""run.json and config.toml: a run described at each of its starts, in a folder that holds nothing of a later step."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from twingpt.core.backend import Backend, Device
from twingpt.core.checkpoint.schema import Checkpoint
from twingpt.core.errors import UserError
from twingpt.core.paths import write_atomically
from twingpt.data import mixture
from twingpt.runs.events import Saved, rewind
from twingpt.runs.folder import checkpoint_folder, point, remove_leftovers
from twingpt.runs.set_aside import set_aside
from twingpt.runs.trackers import IDS
from twingpt.training import settings
from twingpt.training.state import Progress, RunState
from twingpt.version import __version__

SCHEMA = 1
AGAIN = "Every setting of this run. It runs again with: gpt train --config THIS_FILE --out FOLDER"


def start_entry(step: int, backend: Backend, device: Device) -> dict[str, Any]:
    """A start after `step` steps, now, with the device and versions that it has: an entry of run.json's `starts`."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "backend": backend.NAME,
        "device": dataclasses.asdict(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"numpy": version("numpy"), "twingpt": __version__, backend.NAME: version(backend.NAME)},
    }


def run_json(state: RunState) -> str:
    """run.json: the resolved configuration, the data's folder and fingerprint, how it was started, and every start."""
    content = {
        "schema": SCHEMA,
        "config": state.config.to_dict(),
        "train": state.train.to_dict(),
        "data": {
            "folder": mixture.folders(state.data),
            "fingerprint": state.data.fingerprint,
            "tokenizer": state.data.tokenizer.digest,
            "rules": mixture.rules(state.data),
        },
        "evaluation": {"windows": state.eval_windows, "batch_size": state.eval_batch_size},
        "setup": dataclasses.asdict(state.setup),
        "init_from": state.init_from,
        "starts": state.starts,
    }
    return json.dumps(content, indent=2)


def clear_folder(run: Path, *, new: bool) -> None:
    """Make a run's folder one of a run before its first step; a `new` run forgets its trackers' ids too."""
    with _write_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "latest", "best", *((IDS,) if new else ())):
            (run / name).unlink(missing_ok=True)


def rewind_folder(run: Path, saved: Checkpoint | None, progress: Progress) -> Path | None:
    """Make `latest` and metrics.jsonl of a run what they were when `saved` was, or before the first step (None).

    Where the run had been saved at a later step, all of that is set aside; where to, or None.
    """
    if saved is None:
        clear_folder(run, new=False)
        return None
    again = {"evaluated": progress.evaluated_at, "sampled": progress.sampled_at}
    with _write_errors(run):
        aside = set_aside(run, checkpoint_folder(run, progress.step))
        point(run, "latest", saved.folder)  # what came after it will be written again
        events = [event for event, step in again.items() if step != progress.step]
        rewind(run / "metrics.jsonl", Saved(progress.step, str(saved.folder)), events)
    return aside


def describe(state: RunState) -> None:
    """Write run.json, and config.toml with which the same run starts again; UserError where that can't be done."""
    run = state.folder
    with _write_errors(run):
        write_atomically(run / "run.json", run_json(state))
        remove_leftovers(run)
    values = {
        "backend": state.backend.NAME,
        "device": state.device.name,
        "compile": state.setup.compile,
        "init_from": state.init_from,
        "report_to": state.setup.report_to,
        "wired_limit": state.setup.wired_limit,
    }
    where = {key: value for key, value in values.items() if value is not None}
    settings.write(run / "config.toml", settings.spelled_out(state.config, state.train) | where, AGAIN)


@contextmanager
def _write_errors(run: Path) -> Iterator[None]:
    """Raise UserError, naming the run, for an OSError within the block."""
    try:
        yield
    except OSError as error:
        raise UserError(f"The run can't be written to {run}: {error.strerror}.") from error
