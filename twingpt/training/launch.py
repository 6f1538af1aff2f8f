"""From a command's options to a Trainer of a new run."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.backends import registry
from twingpt.core.backend import Backend, Device, TrainEngine
from twingpt.core.checkpoint.schema import Checkpoint, Model
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.paths import expand, write_atomically
from twingpt.data import mixture
from twingpt.data.mixture import Data
from twingpt.runs.events import JSONLReporter, Reporter, Saved, rewind
from twingpt.runs.folder import check_untrained, checkpoints, point, remove_leftovers
from twingpt.runs.plot import PlotReporter
from twingpt.runs.report import HTMLReporter
from twingpt.runs.trackers import IDS
from twingpt.training import memory
from twingpt.training.flops import peak
from twingpt.training.recipes import FINE_TUNING, Options, adapted, cropped, resolve, with_end_of_text
from twingpt.training.settings import MODEL_FIELDS, spelled_out
from twingpt.training.settings import write as write_toml
from twingpt.training.trainer import Progress, Trainer

SCHEMA = 1


Array = np.ndarray


def new_run(
    options: Options,
    out: Path | None,
    backend: str,
    device: str | None,
    compile: bool | None,
    init: Model | None = None,
    report_to: str | None = None,
) -> Trainer:
    """A Trainer for a new run in `out`, or in a folder of its own under runs/, with the options of `resolve`.

    It begins with the model `init` where that is given, on texts in its tokenizer (see `adapted`), and
    `report_to` is noted in its config.toml. Raises UserError for anything that can't be; then nothing has been
    written but the prepared data.
    """
    chosen = set(options)
    if init:
        model = adapted(init.config, options)
        options = FINE_TUNING | {key: value for key, value in options.items() if key not in MODEL_FIELDS}
    engines = registry.get(backend)
    target = registry.find_device(engines, device)
    _, train = resolve(options, target, 256)  # wrong before any work is done
    run = expand(out) if out else Path("runs") / f"{mixture.title(train.data)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    _check_free(run)
    data = mixture.prepare_all(train.data, train.tokenizer, train.vocab_size, init.tokenizer() if init else None)
    options = _as_prepared(options, data)
    config, train = resolve(options, target, data.tokenizer.vocab_size)
    config = with_end_of_text(model, data.tokenizer) if init else config
    train, notes = memory.plan(config, train, engines.NAME, target, engines.free_memory(target), chosen)
    trainer = _trainer(run, config, train, data, engines, target, compile, Progress())
    trainer.notes = notes
    trainer.engine.load(cropped(init.parameters(), config) if init else initialise(config, train.seed))
    trainer.init_from = str(init.folder) if init else None
    _check_free(run)  # another may have begun it while data were prepared
    _write_run(trainer, [], None)
    _write_config(trainer, compile, report_to)
    return trainer


def _check_free(run: Path) -> None:
    """Raise UserError unless a new run can begin in the folder."""
    check_untrained(run)
    if (run / "run.json").exists() and checkpoints(run):
        raise UserError(f"{run} holds a run already: go on with --resume {run}, or choose another --out.")


def _as_prepared(options: Options, data: Data) -> Options:
    """The options with the tokenizer of data that were prepared under a name; UserError where they ask for another."""
    asked: dict[str, Any] = data.manifest.get("asked", {})
    for key, value in asked.items():
        if options.get(key, value) != value:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(
                f"{data.manifest['name']} is prepared with {flag} {value}: leave out {flag} {options[key]}, or prepare "
                "the text again under another name."
            )
    return {**options, **asked}


def make_engine(
    config: GPTConfig, train: TrainConfig, engines: Backend, device: Device, compile: bool | None
) -> TrainEngine:
    """A training engine without parameters yet."""
    if compile is None:  # on a CPU compiling takes longer than the run that it would speed up
        compile = device.kind != "cpu"
    return engines.TrainEngine(
        config,
        device,
        optimizer=train.optimizer,
        dtype=train.dtype,
        compile=compile,
        gradient_checkpointing=train.gradient_checkpointing,
        skip_nonfinite=train.skip_nonfinite,
    )


def _trainer(
    run: Path,
    config: GPTConfig,
    train: TrainConfig,
    data: Data,
    engines: Backend,
    device: Device,
    compile: bool | None,
    progress: Progress,
) -> Trainer:
    data.check(config)
    engine = make_engine(config, train, engines, device, compile)
    reporters: list[Reporter] = [JSONLReporter(run / "metrics.jsonl"), PlotReporter(run), HTMLReporter(run)]
    measured = peak(engines, device, train.dtype)
    return Trainer(run, config, train, data, engines, device, engine, reporters, progress, measured)


def _write_config(trainer: Trainer, compile: bool | None, report_to: str | None) -> None:
    """config.toml, which starts the same run again."""
    values: dict[str, Any] = {"backend": trainer.backend.NAME, "device": trainer.device.name, "compile": compile}
    values |= {"init_from": trainer.init_from, "report_to": report_to}
    run = {key: value for key, value in values.items() if value is not None}
    again = "Every setting of this run. It runs again with: gpt train --config THIS_FILE --out FOLDER"
    write_toml(trainer.run / "config.toml", spelled_out(trainer.config, trainer.train) | run, again)


def _write_run(trainer: Trainer, starts: list[Any], saved: Checkpoint | None) -> None:
    """run.json: the resolved configuration, the data's fingerprint, versions and device, of each start.

    The other files of the folder become what they were when `saved` was, or at the start of a run.
    """
    run, progress = trainer.run, trainer.progress
    start = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "step": progress.step,
        "backend": trainer.backend.NAME,
        "device": dataclasses.asdict(trainer.device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "twingpt", trainer.backend.NAME)},
    }
    content = {
        "schema": SCHEMA,
        "config": trainer.config.to_dict(),
        "train": trainer.train.to_dict(),
        "data": {"folder": mixture.folders(trainer.data), "fingerprint": trainer.data.fingerprint},
        "init_from": trainer.init_from,
        "starts": [*starts, start],
    }
    trainer.saver.description = json.dumps(content, indent=2)
    try:
        run.mkdir(parents=True, exist_ok=True)
        if saved:
            trainer.saver.saved_at = progress.step
            point(run, "latest", saved.folder)  # what came after it will be written again
            done = {"evaluated": progress.evaluated_at, "sampled": progress.sampled_at}
            again = [event for event, step in done.items() if step != progress.step]
            rewind(run / "metrics.jsonl", Saved(progress.step, str(saved.folder)), again)
        else:
            for name in ("metrics.jsonl", "latest", "best", *(() if starts else (IDS,))):
                (run / name).unlink(missing_ok=True)
        write_atomically(run / "run.json", trainer.saver.description)
        remove_leftovers(run)
    except OSError as error:
        raise UserError(f"The run can't be written to {run}: {error.strerror}.") from error
