"""TensorBoard, W&B and MLflow: reporters that hand a run's events to a library, if it is installed."""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import write_atomically
from twingpt.core.reading import read_json
from twingpt.runs.events import Baseline, Evaluated, Event, Reporter, RunEnded, RunStarted, Sampled, Trained

Report = Callable[[Any, Event], None]

LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
IDS = "trackers.json"  # in the run's folder: what W&B and MLflow call the run
CONTINUES = "continues"  # in IDS: what the run was called whose later steps were set aside
MLFLOW_PARENT = "mlflow.parentRunId"  # the tag by which its pages show a run below another
PROJECT = "twingpt"
MLFLOW_STATUS = {"finished": "FINISHED", "stop-after": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


def split(text: str | None) -> list[str]:
    """The names in a comma-separated list, each once; none for None, "" and "none"."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    return [] if names == ["none"] else list(dict.fromkeys(names))


def parse(text: str | None) -> list[str]:
    """The names of `split`; UserError for an unknown one, or one whose library isn't there."""
    names = split(text)
    for name in names:
        if name not in LIBRARIES:
            raise unknown_choice("--report-to", name, LIBRARIES)
        if not installed(name):
            raise UserError(f"--report-to {name} needs {how_to_install(name)}.")
    return names


def installed(name: str) -> bool:
    """Whether a tracker's library is there; does not import it."""
    spec = importlib.util.find_spec(LIBRARIES[name])
    return spec is not None and spec.origin is not None  # no origin: a folder ./wandb or ./mlflow, not the library


def how_to_install(name: str) -> str:
    """What a tracker whose library is missing needs, as part of a sentence."""
    return f'{LIBRARIES[name]}, which is not installed: pip install "twingpt[{name}]"'


def make(names: Iterable[str], run: Path) -> list[Reporter]:
    """The reporters of these names for a run. They load their library, and connect, when the run starts."""
    kinds: dict[str, Callable[[Path], Reporter]] = {
        "tensorboard": TensorBoardReporter,
        "wandb": WandbReporter,
        "mlflow": MLflowReporter,
    }
    return [kinds[name](run) for name in names]


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event under the names that trackers group by."""
    if isinstance(event, Trained):
        return {
            "train/loss": event.loss,
            "train/grad_norm": event.grad_norm,
            "train/learning_rate": event.learning_rate,
            "train/tokens": event.tokens,
            "train/skipped_steps": event.skipped,
            "speed/tokens_per_second": event.tokens_per_second,
            "memory/bytes": event.memory_bytes,
            "memory/peak_bytes": event.peak_memory_bytes,
            **({} if event.cached_memory_bytes is None else {"memory/cached_bytes": event.cached_memory_bytes}),
            **({} if event.epoch is None else {"train/epoch": event.epoch}),
            **{f"train/epoch_{_plain(name)}": epoch for name, epoch in event.epochs.items()},
        }
    if isinstance(event, Evaluated):
        found = {"val/loss": event.val_loss, "val/bits_per_byte": event.val_bpb}
        for name, losses in event.sources.items():
            found |= {
                f"val/loss_{_plain(name)}": losses.val_loss,
                f"val/bits_per_byte_{_plain(name)}": losses.val_bpb,
            }
        return found
    if isinstance(event, Baseline):
        return {"baseline/loss": event.val_loss, "baseline/bits_per_byte": event.bits_per_byte}
    return {}


def _plain(name: str) -> str:
    """A source's name, which may be a path, as all three libraries take it."""
    return re.sub(r"[^\w.-]", "_", name)[-100:]


def _configuration(run: Path) -> dict[str, Any]:
    """The run's model and training configuration, as run.json has them."""
    described = json.loads((run / "run.json").read_text("utf-8"))
    return {**described["config"], **described["train"]}


def _read_ids(run: Path) -> dict[str, str]:
    try:
        ids = read_json(run / IDS)
    except UserError:
        return {}
    return {name: id for name, id in ids.items() if isinstance(id, str)} if isinstance(ids, Mapping) else {}


def _remember(run: Path, name: str, id: str) -> None:
    """Keep what a tracker calls the run, for the next start."""
    _write_ids(run, _read_ids(run) | {name: id}, _continued(run))


def _write_ids(run: Path, ids: Mapping[str, str], continued: Mapping[str, Any]) -> None:
    content = {**ids, CONTINUES: continued} if continued else ids
    write_atomically(run / IDS, json.dumps(content, indent=2))


def begin_anew(run: Path, step: int) -> None:
    """Let W&B and MLflow begin new runs at the next start, that name the old ones: a curve of theirs only goes up."""
    if ids := _read_ids(run):
        _write_ids(run, {}, {**_continued(run), **ids, "step": step})


def _continued(run: Path) -> dict[str, Any]:
    """By tracker the id of the run that this one goes on from, and under "step" after how many steps."""
    try:
        found = read_json(run / IDS)[CONTINUES]
    except (UserError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}


def _for_good(report: Report) -> Report:
    """Let an OSError end a tracker: what is not our own file on a disk is not worth a wait at every event."""

    @functools.wraps(report)
    def final(self: Any, event: Event) -> None:
        try:
            report(self, event)
        except OSError as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return final


class TensorBoardReporter:
    """Event files in the run's folder tensorboard/; a resumed run goes on in them."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.writer: Any = None

    @_for_good
    def report(self, event: Event) -> None:
        """Write an event's numbers, or its text."""
        if isinstance(event, RunStarted):
            from tensorboardX import SummaryWriter

            # What an earlier start wrote past this step will come again, so TensorBoard is told to drop it.
            # The library names files by the second, and would overwrite that of a start in the same one.
            suffix = f".{time.time_ns()}"
            self.writer = SummaryWriter(
                str(self.run / "tensorboard"), purge_step=event.step + 1, flush_secs=10, filename_suffix=suffix
            )
            self.writer.add_text("configuration", _as_code(json.dumps(_configuration(self.run), indent=2)), event.step)
        elif isinstance(event, Sampled):
            self.writer.add_text("sample", _as_code(event.text), event.step)
        elif isinstance(event, RunEnded):
            self.writer.close()
        for name, value in scalars(event).items():
            self.writer.add_scalar(name, value, event.step)


def _as_code(text: str) -> str:
    """Text as a code block of Markdown."""
    return "\n".join("    " + line for line in text.splitlines())


class WandbReporter:
    """A W&B run; WANDB_MODE, WANDB_PROJECT, WANDB_DIR and the rest of its environment are the library's to read.

    Its files lie in the run's folder wandb/ unless WANDB_DIR says otherwise.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.tracked: Any = None

    @_for_good
    def report(self, event: Event) -> None:
        """Log an event's numbers, or its text."""
        if isinstance(event, RunStarted):
            self._start()
        elif isinstance(event, Sampled):
            import wandb

            text = f"<pre>{html.escape(event.text)}</pre>"
            self.tracked.log({"step": event.step, "sample": wandb.Html(text, inject=False)})
        elif isinstance(event, RunEnded):
            self.tracked.finish(exit_code=int(event.reason == "failed"))
        elif numbers := scalars(event):
            self.tracked.log({"step": event.step, **numbers})

    def _start(self) -> None:
        import wandb

        id, before = _read_ids(self.run).get("wandb"), _continued(self.run)
        link = {"continues": before["wandb"], "continues_at_step": before["step"]} if before.get("wandb") else {}
        self.tracked = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=None if os.environ.get("WANDB_DIR") else str(self.run),
            name=os.environ.get("WANDB_NAME", self.run.resolve().name),
            id=id,
            resume="allow" if id else None,
            config=_configuration(self.run) | link,
            notes="Goes on from step {continues_at_step} of the run {continues}.".format(**link) if link else None,
            settings=wandb.Settings(console="off"),  # the terminal has a live bar, which is no log
        )
        # W&B's own counter only goes up, and a run may be resumed from an earlier step.
        self.tracked.define_metric("step")
        self.tracked.define_metric("*", step_metric="step")
        if not id:
            _remember(self.run, "wandb", self.tracked.id)


class MLflowReporter:
    """An MLflow run in the store of MLFLOW_TRACKING_URI, or MLflow's own default.

    The experiment is MLFLOW_EXPERIMENT_NAME, or twingpt.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.client: Any = None
        self.id = ""

    @_for_good
    def report(self, event: Event) -> None:
        """Log an event's numbers, or its text."""
        if isinstance(event, RunStarted):
            self._start()
        elif isinstance(event, Sampled):
            self.client.log_text(self.id, event.text, f"samples/step-{event.step:08d}.txt")
        elif isinstance(event, RunEnded):
            self.client.set_terminated(self.id, MLFLOW_STATUS[event.reason])
        elif numbers := scalars(event):
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self.client.log_batch(self.id, [Metric(name, value, now, event.step) for name, value in numbers.items()])

    def _start(self) -> None:
        # The library's own patience with a server that is gone would hold training up for a quarter of an hour.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self.client = MlflowClient()
        if id := _read_ids(self.run).get("mlflow"):
            try:
                self.client.update_run(id, status="RUNNING")
                self.id = id
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another store: there it is a new run
                    raise
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        before = _continued(self.run)
        link = {MLFLOW_PARENT: before["mlflow"], "continues_at_step": str(before["step"])} if "mlflow" in before else {}
        self.id = self.client.create_run(experiment, run_name=self.run.resolve().name, tags=link).info.run_id
        settings = [Param(key, str(value)) for key, value in _configuration(self.run).items()]
        self.client.log_batch(self.id, params=settings)
        _remember(self.run, "mlflow", self.id)
