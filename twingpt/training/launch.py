"""Launching: from a command's options to the state of a new run."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from twingpt.backends import registry
from twingpt.core.checkpoint.schema import Model
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.paths import expand
from twingpt.data import mixture
from twingpt.data.mixture import Data
from twingpt.data.split import parse_share
from twingpt.runs import trackers
from twingpt.runs.folder import check_untrained, checkpoints
from twingpt.training import memory
from twingpt.training.describe import clear_folder, describe, start_entry
from twingpt.training.engine import make_engine
from twingpt.training.flops import peak
from twingpt.training.recipes import FINE_TUNING, Options, adapted, cropped, resolve, with_end_of_text
from twingpt.training.settings import MODEL_FIELDS
from twingpt.training.state import RunState, Setup


def new_run(
    options: Options,
    out: Path | None,
    backend: str = "auto",
    device: str | None = None,
    *,
    compile: bool | None = None,
    init: Model | None = None,
    vocab_size: int | None = None,
    report_to: str | None = None,
    wired_limit: float | None = None,
) -> RunState:
    """A new run in `out`, or in a folder of its own under runs/, with the options of `resolve`; not yet trained.

    It begins with the model `init` where that is given, on texts in its tokenizer (see `adapted`), and reports to the
    trackers that `report_to` names; `memory.wired_bytes` has `wired_limit`. Raises UserError for anything that can't
    be, such as a `vocab_size` that isn't the tokenizer's; then nothing has been written but the prepared data.
    """
    chosen, tracked = set(options), trackers.parse(report_to)
    if init:
        model = adapted(init.config, options)
        options = FINE_TUNING | {key: value for key, value in options.items() if key not in MODEL_FIELDS}
    engines = registry.get(backend)
    target = registry.find_device(engines, device)
    wired = memory.wired_bytes(wired_limit, target)
    _, train = resolve(options, target, 256)  # wrong before any work is done
    if train.eval_interval and train.val_data and parse_share(train.val_data, "--val-data") == 0:
        raise UserError(
            f"--val-data {train.val_data} holds out nothing to evaluate on, and --eval-interval is "
            f"{train.eval_interval}: give --eval-interval 0 too, or hold out a share."
        )
    run = expand(out) if out else Path("runs") / f"{mixture.title(train.data)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    _check_free(run)
    tokenizer = init.tokenizer() if init else None
    data = mixture.prepare_all(train.data, train.tokenizer, train.vocab_size, tokenizer, train.val_data)
    options = _as_prepared(options, data)
    if vocab_size not in (None, data.tokenizer.vocab_size):
        raise UserError(
            f"vocab_size is {vocab_size}, and the tokenizer has {data.tokenizer.vocab_size} ids: give that."
        )
    config, train = resolve(options, target, data.tokenizer.vocab_size)
    config = with_end_of_text(model, data.tokenizer) if init else config
    eval_batch_size = train.batch_size
    train, notes = memory.plan(config, train, engines.NAME, target, engines.free_memory(target), chosen)
    data.check(config, evaluated=train.eval_interval > 0)
    state = RunState(
        folder=run,
        config=config,
        train=train,
        data=data,
        backend=engines,
        device=target,
        engine=make_engine(config, train, engines, target, compile=compile),
        peak=peak(engines, target, train.dtype),
        setup=Setup(engines.NAME, device, compile, report_to, wired_limit),
        trackers=tracked,
        wired_bytes=wired,
        eval_batch_size=eval_batch_size,
        starts=[start_entry(0, engines, target)],
        notes=notes,
        init_from=str(init.folder) if init else None,
    )
    state.engine.load(cropped(init.parameters(), config) if init else initialise(config, train.seed))
    _check_free(run)  # another may have begun it while data were prepared
    clear_folder(run, new=True)
    describe(state)
    return state


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
