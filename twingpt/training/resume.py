"""Resuming: from a run's folder to a run that goes on."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from twingpt.backends import registry
from twingpt.core.checkpoint.schema import Checkpoint, open_checkpoint
from twingpt.core.config import KINDS, GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.reading import read_json
from twingpt.data import mixture
from twingpt.data.mixture import Data
from twingpt.data.prepare import prepare
from twingpt.data.shards import TokenDataset
from twingpt.runs.events import last_baseline, read_events, seconds_so_far
from twingpt.runs.folder import check_untrained, find_run, latest, owner, resolve
from twingpt.training import memory
from twingpt.training.launch import _trainer, _write_config, _write_run
from twingpt.training.recipes import Options
from twingpt.training.trainer import Progress, Trainer

# What a resumed run may change: how far it goes, what it reports, where it finds its data. The rest
# decides the weights, so a change would be another run.
RESUME_KEYS = {
    "batch_size",  # as long as a step has as many windows
    "gradient_accumulation_steps",
    "data",
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
    backend: str,
    device: str | None,
    compile: bool | None,
    stop_after: int | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    report_to: str | None = None,
) -> Trainer:
    """A Trainer that goes on from the latest checkpoint of a run (RUN@STEP: from that one), on any backend.

    A run that was killed before its first checkpoint starts again, as run.json says. `options` may
    change what RESUME_KEYS names; anything else that differs from the run's own is a UserError, as are
    data that are no longer the same. `names` says how an option was given, if not as the flag of its name.
    """
    run, saved = _find(name)
    check_untrained(run)
    described = _read_run(run)
    state = saved.training() if saved else described | {"step": 0, "data": described["data"]["fingerprint"]}
    config = saved.config if saved else GPTConfig.from_dict(described["config"])
    train = _resumed_config(config, state["train"], described["train"], options, names)
    for flag, last in (("--max-iters", train.max_iters), ("--stop-after", stop_after)):
        if last is not None and state["step"] > last:
            raise UserError(f"{run} is at step {state['step']} already, past {flag} {last}.")
    engines = registry.get(backend)
    target = registry.find_device(engines, device)
    if train.dtype not in target.dtypes and "dtype" not in options:
        train = dataclasses.replace(train, dtype=target.default_dtype)
    registry.find_dtype(target, train.dtype)
    if saved is None and described.get("init_from"):
        raise UserError(
            f"{run} was killed before its first checkpoint: start it again with "
            f"gpt train --config {shlex.quote(str(run / 'config.toml'))} --out {shlex.quote(str(run))}."
        )
    data = _resumed_data(run, described, saved, train, state["data"], moved="data" in options)
    # A run goes on exactly, so nothing of it changes unasked.
    _, notes = memory.plan(config, train, engines.NAME, target, engines.free_memory(target), memory.CHANGES)
    trainer = _trainer(run, config, train, data, engines, target, compile, _progress(state) if saved else Progress())
    trainer.notes = notes
    if saved:
        trainer.engine.load([*saved.parameters(), *saved.optimizer_state()])
        trainer.baseline = last_baseline(read_events(run / "metrics.jsonl"))
    else:
        trainer.engine.load(initialise(config, train.seed))
    trainer.init_from = described.get("init_from")
    check_untrained(run)  # another may have gone on with it while data were prepared
    _write_run(trainer, described["starts"], saved)
    _write_config(trainer, compile, report_to)
    trainer.seconds_before = seconds_so_far(run / "metrics.jsonl")
    return trainer


def _find(name: str) -> tuple[Path, Checkpoint | None]:
    """The run that `name` names, and the checkpoint to go on from: none where it was killed before its first."""
    try:
        run = find_run(name)
    except UserError:  # RUN@STEP, a checkpoint's folder, or nothing
        run = None
    if run and latest(run) is None and not (run / "latest").exists():
        return run, None
    saved = open_checkpoint(resolve(name))
    run = saved.folder.parent.parent
    if not (run / "run.json").is_file():  # named from within, as `.`
        run = find_run(saved.folder.resolve().parent.parent)
    return run, saved


def _progress(state: Options) -> Progress:
    """How far a checkpoint is."""
    fields = {key: state.get(key, usual) for key, usual in vars(Progress()).items()}
    fields = {key: math.nan if value is None else value for key, value in fields.items()}
    if math.isnan(fields["best_val_loss"]):
        fields["best_val_loss"] = math.inf
    return Progress(**fields)


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


def _read_run(run: Path) -> dict[str, Any]:
    """run.json as `_write_run` left it."""
    kinds = {"config": dict, "train": dict, "data": dict, "starts": list}
    try:
        described = read_json(run / "run.json")
        data = described["data"]
        _, is_text_or_texts = KINDS["str | tuple[str, ...]"]
        if (
            all(isinstance(described[key], kind) for key, kind in kinds.items())
            and is_text_or_texts(data["folder"])
            and isinstance(data["fingerprint"], str)
        ):
            return dict(described)
    except (UserError, KeyError, TypeError):
        pass
    raise UserError(f"{run / 'run.json'} is not what twingpt wrote: the run can't be resumed.")


def _resumed_data(
    run: Path, described: Options, saved: Checkpoint | None, train: TrainConfig, fingerprint: str, moved: bool
) -> Data:
    """The data that the run was trained on: prepared earlier, or prepared again with its tokenizer."""
    data = None if moved else mixture.open_folders(described["data"]["folder"], train.data)
    if data is None:
        tokenizer = saved.tokenizer() if saved else None
        data = mixture.prepare_all(train.data, train.tokenizer, train.vocab_size, tokenizer)
    if data.fingerprint != fingerprint:
        raise UserError(
            f"The data {mixture.spell(train.data)} is not what {run} was trained on (its fingerprint differs): "
            "give --data the original, or start a new run."
        )
    return data


def data_of(name: str, tokenizer: str | None, vocab_size: int | None) -> tuple[TokenDataset, int | None]:
    """The data of a run, or of what --data may name, and how many held-out tokens the run evaluates on (None: all).

    RUN@STEP is its run. Raises UserError where there is neither, or a run is to have another tokenizer than its own.
    """
    try:
        run = owner(name)
    except UserError:
        kind, size = tokenizer or TrainConfig.tokenizer, vocab_size or TrainConfig.vocab_size
        return prepare(name, kind, size), None
    if tokenizer or vocab_size:
        raise UserError(f"{name} is a run, with a tokenizer of its own: leave out --tokenizer and --vocab-size.")
    described, (_, saved) = _read_run(run), _find(name)
    config, train = GPTConfig.from_dict(described["config"]), TrainConfig.from_dict(described["train"])
    data = _resumed_data(run, described, saved, train, described["data"]["fingerprint"], moved=False)
    if not isinstance(data, TokenDataset):
        raise UserError(f"{name} is trained on a mixture: name one of its sources, {mixture.spell(train.data)}.")
    return data, train.eval_iters * train.batch_size * config.block_size or None
