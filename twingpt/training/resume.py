"""Resuming: from a run's folder to the state of a run that goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from twingpt.backends import registry
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.paths import quote
from twingpt.runs.events import last_baseline, read_events, seconds_so_far
from twingpt.runs.folder import check_untrained
from twingpt.training import memory
from twingpt.training.describe import describe, rewind_folder, start_entry
from twingpt.training.engine import make_engine
from twingpt.training.flops import peak
from twingpt.training.recipes import Options
from twingpt.training.state import Progress, RunState
from twingpt.training.stored import StoredRun

# What a resumed run may change: how far it goes, what it reports, where it finds its data. The rest
# decides the weights, so a change would be another run.
RESUME_KEYS = {
    "batch_size",  # as long as a step has as many windows
    "gradient_accumulation_steps",
    "data",
    "val_data",
    "dtype",
    "gradient_checkpointing",
    "skip_nonfinite",
    "max_iters",
    "eval_interval",
    "eval_iters",
    "log_interval",
    "sample_interval",
    "checkpoint_interval",
    "keep",
}


def resume_run(
    name: str,
    options: Options,
    backend: str = "auto",
    device: str | None = None,
    *,
    compile: bool | None = None,
    stop_after: int | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    report_to: str | None = None,
) -> RunState:
    """A run as it goes on from its latest checkpoint (RUN@STEP: from that one), on any backend.

    A run that was killed before its first checkpoint starts again, as run.json says. `options` may
    change what RESUME_KEYS names; anything else that differs from the run's own is a UserError, as are
    data that are no longer the same. `names` says how an option was given, if not as the flag of its name.
    """
    stored = StoredRun.open(name)
    run = stored.folder
    check_untrained(run)
    training, config = stored.training(), stored.model_config()
    progress = Progress.from_dict(training)
    train = _resumed_config(config, training["train"], stored.train, options, names)
    for flag, last in (("--max-iters", train.max_iters), ("--stop-after", stop_after)):
        if last is not None and progress.step > last:
            raise UserError(f"{run} is at step {progress.step} already, past {flag} {last}.")
    engines = registry.get(backend)
    target = registry.find_device(engines, device)
    train = _with_dtype(train, target, options)
    if stored.init_from and not stored.checkpoint:
        raise UserError(
            f"{run} was killed before its first checkpoint: start it again with "
            f"gpt train --config {quote(run / 'config.toml')} --out {quote(run)}."
        )
    data = stored.open_data(train, training["data"], moved=bool({"data", "val_data"} & options.keys()))
    # A run goes on exactly, so nothing of it changes unasked.
    _, notes = memory.plan(config, train, engines.NAME, target, engines.free_memory(target), memory.CHANGES)
    data.check(config, evaluated=train.eval_interval > 0)
    engine = make_engine(config, train, engines, target, compile=compile)
    measured = peak(engines, target, train.dtype)
    engine.load(stored.tensors(config, train.seed))
    metrics = run / "metrics.jsonl"
    baseline = last_baseline(read_events(metrics)) if stored.checkpoint else None
    check_untrained(run)  # another may have gone on with it while data were prepared
    rewind_folder(run, stored.checkpoint, progress)
    state = RunState(
        folder=run,
        config=config,
        train=train,
        data=data,
        backend=engines,
        device=target,
        engine=engine,
        peak=measured,
        starts=[*stored.starts, start_entry(progress.step, engines, target)],
        notes=notes,
        init_from=stored.init_from,
        progress=progress,
        baseline=baseline,
        saved_at=progress.step if stored.checkpoint else -1,
        seconds_before=seconds_so_far(metrics),
    )
    describe(state, compile=compile, report_to=report_to)
    return state


def _with_dtype(train: TrainConfig, device: Device, options: Options) -> TrainConfig:
    """`train` in the device's default dtype where it lacks the run's own; UserError where one that is asked for."""
    if train.dtype not in device.dtypes and "dtype" not in options:
        train = dataclasses.replace(train, dtype=device.default_dtype)
    registry.find_dtype(device, train.dtype)
    return train


def _resumed_config(
    config: GPTConfig, stored: Options, newest: Options, options: Options, names: Mapping[str, str]
) -> TrainConfig:
    """How the run goes on: as its checkpoint says, with what may change as its last start (`newest`) had it."""
    now = {**stored, **config.to_dict()}
    for key, value in options.items():
        if key in RESUME_KEYS:
            continue
        name = names.get(key, f"--{key.replace('_', '-')}")
        if key not in now:
            raise UserError(f"{name} can't change when a run goes on: leave it out.")
        if value != (stored.get(key, now[key])):
            raise UserError(
                f"{name} {value} conflicts with the run, which has {stored.get(key, now[key])}: "
                "leave it out, or start a new run."
            )
    changes = {key: value for key, value in {**newest, **options}.items() if key in RESUME_KEYS}
    train, before = TrainConfig.from_dict({**stored, **changes}), TrainConfig.from_dict(dict(stored))
    if _windows(train) != _windows(before):
        raise UserError(
            f"A step of the run has {_windows(before)} windows, and would have {_windows(train)}: give --batch-size "
            "and --gradient-accumulation-steps that multiply to as many, or start a new run."
        )
    return train


def _windows(train: TrainConfig) -> int:
    return train.batch_size * train.gradient_accumulation_steps
