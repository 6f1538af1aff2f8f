"""From a command's options to a Trainer: a new run, or one that goes on."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from twingpt.core import backend as backends
from twingpt.core import depth, memory
from twingpt.core.backend import Backend, Device, TrainEngine
from twingpt.core.checkpoint import Checkpoint, Model, open_checkpoint
from twingpt.core.config import KINDS, GPTConfig, TrainConfig, check_type, preset, shaped, unknown_choice
from twingpt.core.data import mixture
from twingpt.core.data.mixture import Data
from twingpt.core.data.prepare import prepare
from twingpt.core.data.shards import TokenDataset
from twingpt.core.errors import UserError
from twingpt.core.events import JSONLReporter, Reporter, Saved, last_baseline, read_events, rewind, seconds_so_far
from twingpt.core.flops import peak
from twingpt.core.parameters import initialise
from twingpt.core.paths import expand, write_atomically
from twingpt.core.plot import PlotReporter
from twingpt.core.reading import read_json
from twingpt.core.report import HTMLReporter
from twingpt.core.runs import check_untrained, checkpoints, find_run, latest, owner, point, remove_leftovers
from twingpt.core.settings import FIELDS, MODEL_FIELDS, SIZE_KEYS, TRAIN_FIELDS, spelled_out
from twingpt.core.settings import write as write_toml
from twingpt.core.tokenizer import Tokenizer
from twingpt.core.trackers import IDS
from twingpt.core.trainer import Progress, Trainer

SCHEMA = 1
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

# What a run is without flags: on two CPU cores text worth reading in minutes, on a GPU a larger model.
# docs/experiments.md has the figures behind them.
RECIPES: dict[str, dict[str, Any]] = {
    "cpu": {
        "preset": "micro",
        "batch_size": 16,
        "max_iters": 400,
        "optimizer": "muon",
        "matrix_lr": 0.02,
        "lr_schedule": "wsd",
        "learning_rate": 3e-3,
        "min_lr": 3e-4,
        "eval_interval": 100,
        "sample_interval": 200,
        "checkpoint_interval": 100,
    },
    "gpu": {"preset": "tiny", "batch_size": 32, "max_iters": 2000, "dropout": 0.1},
}

# What fine-tuning is without flags; docs/experiments.md has what other rates gave.
FINE_TUNING: dict[str, Any] = {
    "optimizer": "adamw",
    "lr_schedule": "cosine",
    "learning_rate": 3e-4,
    "min_lr": 3e-5,
    "batch_size": 8,
    "max_iters": 200,
    "eval_interval": 50,
    "sample_interval": 100,
    "checkpoint_interval": 50,
}
LONGEST_WINDOW = 1024

Array = np.ndarray
Options = Mapping[str, Any]


def recipe(device: Device) -> dict[str, Any]:
    """What a run on a device is without flags."""
    return RECIPES["cpu" if device.kind == "cpu" else "gpu"]


def resolve(options: Options, device: Device, vocab_size: int) -> tuple[GPTConfig, TrainConfig]:
    """The configurations that `options` come to on a device, with a vocabulary.

    `options` are fields of GPTConfig and TrainConfig, `preset` or `depth`, and `shape`; what is not
    given comes from the depth, or else from the recipe of the device's kind. Raises UserError for
    anything that can't be.
    """
    known = MODEL_FIELDS.keys() | TRAIN_FIELDS.keys() | SIZE_KEYS
    for key, value in options.items():
        if key not in known:
            raise unknown_choice("option", key, known)
        check_type(key, FIELDS[key], value)
    values = depth.derive(options, vocab_size) if "depth" in options else recipe(device) | dict(options)
    values["dtype"] = backends.find_dtype(device, options.get("dtype"))
    if "min_lr" not in options and "learning_rate" in options:
        values["min_lr"] = options["learning_rate"] / 10
    if "max_iters" in values:  # a short run warms up for a tenth of it
        values.setdefault("warmup_iters", min(TrainConfig.warmup_iters, values["max_iters"] // 10))
    train = TrainConfig.from_dict({key: value for key, value in values.items() if key in TRAIN_FIELDS})
    model = {key: value for key, value in values.items() if key in MODEL_FIELDS}
    if "depth" in options:
        return shaped(values["shape"], vocab_size=vocab_size, **model), train
    return preset(values["preset"], vocab_size, values.get("shape"), **model), train


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
    engines = backends.get(backend)
    target = backends.find_device(engines, device)
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


def adapted(config: GPTConfig, options: Options) -> GPTConfig:
    """The configuration that a model is fine-tuned with: its own, with another dropout or block_size at most.

    A context beyond LONGEST_WINDOW is cut to it, unless `options` say otherwise; learned positions can't
    become more. Raises UserError for anything else of a model among `options` that isn't as it has it.
    """
    for key in SIZE_KEYS & options.keys():
        raise UserError(f"--{key} can't be given with --init-from: the model has its own.")
    for key in ("tokenizer", "vocab_size"):  # a run's config.toml has them as they are when nobody asks
        if options.get(key, getattr(TrainConfig, key)) != getattr(TrainConfig, key):
            raise UserError(f"--{key.replace('_', '-')} can't be given with --init-from: the model has its own.")
    own = config.to_dict()
    for key, value in options.items():
        fixed = key in MODEL_FIELDS and key not in ("dropout", "block_size")
        if fixed and GPTConfig.from_dict({**own, key: value}) != config:
            raise UserError(f"{key} {value} can't be had with --init-from: the model has {own[key]}.")
    block_size = options.get("block_size", min(config.block_size, LONGEST_WINDOW))
    if config.position == "learned" and block_size > config.block_size:
        raise UserError(
            f"--block-size {block_size} is more than the {config.block_size} positions that the model has learned."
        )
    return dataclasses.replace(config, block_size=block_size, dropout=options.get("dropout", config.dropout))


def with_end_of_text(config: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    """The configuration with one id more where the tokenizer's end of text is just beyond the model's vocabulary."""
    beyond = tokenizer.end_of_text == config.vocab_size == tokenizer.vocab_size - 1
    return dataclasses.replace(config, vocab_size=tokenizer.vocab_size) if beyond else config


def cropped(tensors: Iterable[tuple[str, Array]], config: GPTConfig) -> Iterator[tuple[str, Array]]:
    """Parameters for a model that may have fewer learned positions and one id more, its row the mean of the others'."""
    for name, array in tensors:
        if name == "model.embed_positions.weight":
            array = array[: config.block_size]
        elif name in ("model.embed_tokens.weight", "lm_head.weight") and len(array) == config.vocab_size - 1:
            array = np.concatenate([array, array.mean(0, keepdims=True)])
        yield name, array


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
    engines = backends.get(backend)
    target = backends.find_device(engines, device)
    if train.dtype not in target.dtypes and "dtype" not in options:
        train = dataclasses.replace(train, dtype=target.default_dtype)
    backends.find_dtype(target, train.dtype)
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
    saved = open_checkpoint(name)
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


def make_engine(
    config: GPTConfig, train: TrainConfig, engines: Backend, device: Device, compile: bool | None
) -> TrainEngine:
    """A training engine without parameters yet."""
    if compile is None:  # on a CPU compiling takes longer than the run that it would speed up
        compile = device.kind != "cpu"
    return engines.TrainEngine(
        config, device, train.optimizer, train.dtype, compile, train.gradient_checkpointing, train.skip_nonfinite
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


def differences(trainer: Trainer, options: Options) -> dict[str, Any]:
    """What of a run is not as its recipe has it: that of the preset, depth and shape among the run's `options`."""
    size = {key: options[key] for key in SIZE_KEYS & options.keys()}
    config, train = resolve(FINE_TUNING if trainer.init_from else size, trainer.device, trainer.config.vocab_size)
    usual = spelled_out(trainer.config if trainer.init_from else config, train)
    now = spelled_out(trainer.config, trainer.train)
    return {key: value for key, value in now.items() if key not in usual or value != usual[key]}


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
