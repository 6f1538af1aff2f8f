"""Resuming: from a run's folder to the state of a run that goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from twingpt.backends import registry
from twingpt.core.backend import Backend, Device
from twingpt.core.checkpoint.schema import Checkpoint
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.runs import trackers
from twingpt.runs.events import last_baseline, read_events, seconds_so_far
from twingpt.runs.folder import check_untrained, checkpoint_folder
from twingpt.runs.inventory import best_loss
from twingpt.runs.shell import quote
from twingpt.training import memory
from twingpt.training.describe import describe, rewind_folder, start_entry
from twingpt.training.engine import make_engine
from twingpt.training.flops import peak
from twingpt.training.recipes import Options
from twingpt.training.state import Progress, RunState, Setup
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
    backend: str | None = None,
    device: str | None = None,
    *,
    compile: bool | None = None,
    stop_after: int | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    report_to: str | None = None,
    wired_limit: float | None = None,
) -> RunState:
    """A run as it goes on from its latest checkpoint (RUN@STEP: from that one), on any backend.

    A run that was killed before its first checkpoint starts again, as run.json says. What is None, and what `options`
    lack, is as the run had it; where that isn't available now, something else takes its place, and the state says so.
    `options` may change what RESUME_KEYS names; anything else that differs from the run's own is a UserError, as are
    data that are no longer the same. `names` says how an option was given, if not as the flag of its name. Going on
    from an earlier step sets aside what lies after it.
    """
    trackers.parse(report_to)
    stored = StoredRun.open(name)
    check_untrained(stored.folder)
    training, config = stored.training(), stored.model_config()
    progress = Progress.from_dict(training)
    train = _resumed_config(config, training["train"], stored.train, options, names)
    _check_goes_on(stored, progress, train, stop_after)
    place = _find_place(stored.setup, Setup(backend, device, compile, report_to, wired_limit))
    train, replaced = _with_dtype(train, place.device, options)
    data = stored.open_data(train, training["data"], given=[key for key in ("data", "val_data") if key in options])
    data.check(config, evaluated=train.eval_interval > 0)
    # A run goes on exactly, so nothing of it changes unasked.
    free = place.engines.free_memory(place.device)
    _, notes = memory.plan(config, train, place.engines.NAME, place.device, free, memory.CHANGES)
    engine = make_engine(config, train, place.engines, place.device, compile=place.setup.compile)
    state = RunState(
        folder=stored.folder,
        config=config,
        train=train,
        data=data,
        backend=place.engines,
        device=place.device,
        engine=engine,
        peak=peak(place.engines, place.device, train.dtype),
        setup=place.setup,
        trackers=place.trackers,
        wired_bytes=place.wired_bytes,
        eval_batch_size=stored.eval_batch_size,
        starts=[*stored.starts, start_entry(progress.step, place.engines, place.device)],
        notes=notes,
        replaced=[*place.replaced, *replaced],
        init_from=stored.init_from,
        progress=progress,
    )
    engine.load(stored.tensors(config, train.seed))
    state = _rewound(state, stored.checkpoint)
    describe(state)
    return state


def _check_goes_on(stored: StoredRun, progress: Progress, train: TrainConfig, stop_after: int | None) -> None:
    """Raise UserError for a run that is past its end already, or whose first weights are gone."""
    for flag, last in (("--max-iters", train.max_iters), ("--stop-after", stop_after)):
        if last is not None and progress.step > last:
            raise UserError(f"{stored.folder} is at step {progress.step} already, past {flag} {last}.")
    if stored.init_from and not stored.checkpoint:
        raise UserError(
            f"{stored.folder} was killed before its first checkpoint: start it again with "
            f"gpt train --config {quote(stored.folder / 'config.toml')} --out {quote(stored.folder)}."
        )


def _rewound(state: RunState, checkpoint: Checkpoint | None) -> RunState:
    """The state of a run whose folder now holds nothing that lies after its step, but for what was set aside."""
    run, progress, metrics = state.folder, state.progress, state.folder / "metrics.jsonl"
    check_untrained(run)  # another may have gone on with it while data were prepared
    baseline = last_baseline(read_events(metrics)) if checkpoint else None
    aside = rewind_folder(run, checkpoint, progress)
    best = best_loss(run, checkpoint_folder(run, progress.step))  # the best one may have been removed
    return dataclasses.replace(
        state,
        set_aside=aside,
        progress=progress if best is None else dataclasses.replace(progress, best_val_loss=best),
        baseline=baseline,
        saved_at=progress.step if checkpoint else -1,
        seconds_before=seconds_so_far(metrics),
    )


@dataclass(frozen=True)
class _Place:
    """Where a run goes on: `replaced` says, in sentences, what of its setup isn't available now."""

    engines: Backend
    device: Device
    setup: Setup
    trackers: list[str]
    wired_bytes: int
    replaced: list[str]


def _find_place(own: Setup, asked: Setup) -> _Place:
    """The backend, device and trackers that are `asked` for, or else the run's `own`, or what there is instead.

    What is replaced stays in the setup: where it is available again, the run goes back to it. Raises UserError where
    what is asked for isn't there.
    """
    replaced = []
    try:
        engines = registry.get(asked.backend or own.backend or "auto")
    except UserError:
        if asked.backend:
            raise
        engines = registry.get()
        replaced.append(f"The run's backend {own.backend} isn't available here: it goes on with {engines.NAME}.")
    moved = own.backend != engines.NAME
    wanted = asked.device or (None if moved else own.device)
    try:
        device = registry.find_device(engines, wanted)
    except UserError:
        if asked.device:
            raise
        device = registry.find_device(engines, None)
        replaced.append(f"The run's device {wanted} isn't available here: it goes on on {device.name}.")
    setup = Setup(
        engines.NAME if asked.backend else own.backend,
        asked.device or (None if moved and asked.backend else own.device),
        own.compile if asked.compile is None else asked.compile,
        own.report_to if asked.report_to is None else asked.report_to,
        own.wired_limit if asked.wired_limit is None else asked.wired_limit,
    )
    try:
        wired = memory.wired_bytes(setup.wired_limit, device)
    except UserError:
        if asked.wired_limit is not None:
            raise
        wired = 0
        replaced.append(f"The run's wired limit can't be had on {device.name}: nothing is wired.")
    names = [name for name in trackers.split(setup.report_to) if name in trackers.LIBRARIES]
    for name in names:
        if not trackers.installed(name):
            replaced.append(
                f"The run reports to {name}, but not from here: that needs {trackers.how_to_install(name)}."
            )
    return _Place(engines, device, setup, list(filter(trackers.installed, names)), wired, replaced)


def _with_dtype(train: TrainConfig, device: Device, options: Options) -> tuple[TrainConfig, list[str]]:
    """`train` in the device's default dtype where it lacks the run's own, and a note; UserError for one asked for."""
    if train.dtype in device.dtypes or "dtype" in options:
        registry.find_dtype(device, train.dtype)
        return train, []
    note = f"The run's dtype {train.dtype} isn't available on {device.name}: it goes on in {device.default_dtype}."
    return dataclasses.replace(train, dtype=device.default_dtype), [note]


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
