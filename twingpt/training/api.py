"""train: a run from Python, as `gpt train` has it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.errors import UserError
from twingpt.runs.events import Event
from twingpt.training.launch import new_run
from twingpt.training.resume import resume_run
from twingpt.training.settings import MODEL_FIELDS
from twingpt.training.trainer import Trainer
from twingpt.weights.formats import open_model

Callback = Callable[[Event], object]


class CallbackReporter:
    """A Reporter that calls a function with each event; what the function raises becomes a warning, and ends it."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback

    def report(self, event: Event) -> None:
        """Receive an event."""
        try:
            self.callback(event)
        except Exception as error:
            warnings.warn(f"A callback failed and hears no more of the run: {error!r}", stacklevel=2)
            raise


def train(
    config: GPTConfig | str | None = None,
    train_config: TrainConfig | None = None,
    *,
    data: str | Path | Sequence[str] | None = None,
    out: str | Path | None = None,
    backend: str | None = None,
    device: str | None = None,
    compile: bool | None = None,
    report_to: str | None = None,
    wired_limit: float | None = None,
    init_from: str | Path | None = None,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train a model, and keep it in a run's folder as `gpt train` does; returns what that prints with --json.

    `config` is a model's configuration, or the name of a preset; what is not given comes from the recipe for the kind
    of device. `data` take the place of `train_config.data`: what `gpt data sources` names, a file, a folder, or several
    as SOURCE:WEIGHT. `init_from` fine-tunes a model, `resume` goes on with a run: then `config` is theirs, and a run's
    are the backend, the device and all else that is not given. `report_to` names trackers, with commas; `wired_limit`
    is memory to keep wired on Metal, a share of the working set or bytes. Each of `callbacks` is called with the events
    of `twingpt.runs.events` as they happen. Raises UserError as the command does, and for a `config.vocab_size` that
    isn't the tokenizer's.
    """
    options: dict[str, Any] = {}
    if isinstance(config, str):
        options["preset"] = config
    elif config is not None:
        options |= {key: value for key, value in config.to_dict().items() if key in MODEL_FIELDS}
    if train_config is not None:
        options |= train_config.to_dict()
    if data is not None:
        options["data"] = str(data) if isinstance(data, str | Path) else tuple(map(str, data))
    how: dict[str, Any] = {"compile": compile, "report_to": report_to, "wired_limit": wired_limit}
    if resume is not None:
        if out is not None or init_from is not None:
            raise UserError("resume goes on in the run's own folder, with its own model: leave out out and init_from.")
        state = resume_run(str(resume), options, backend, device, **how)
    else:
        init = open_model(init_from).model if init_from is not None else None
        place = Path(out) if out is not None else None
        vocab_size = config.vocab_size if isinstance(config, GPTConfig) else None
        state = new_run(options, place, backend or "auto", device, init=init, vocab_size=vocab_size, **how)
    return Trainer(state, [CallbackReporter(callback) for callback in callbacks]).fit()
