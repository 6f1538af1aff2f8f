"""A run as its folder has it: run.json, the checkpoint to go on from, and the data that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.schema import Checkpoint, open_checkpoint
from twingpt.core.config import GPTConfig, TrainConfig, coerce
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.reading import read_json
from twingpt.data import mixture
from twingpt.data.mixture import Data
from twingpt.runs.folder import find_run, latest, owner, resolve
from twingpt.training import settings
from twingpt.training.state import Setup

Array = np.ndarray


@dataclass(frozen=True)
class StoredRun:
    """A run read from its folder: what run.json says, and the checkpoint to go on from.

    `config` and `train` are the configurations of its last start, as JSON values; `data_folder` is that of the
    prepared data, or of each source of a mixture. `eval_batch_size` and `setup` are as in RunState. `checkpoint` is
    None where the run was killed before its first.
    """

    folder: Path
    config: dict[str, Any]
    train: dict[str, Any]
    data_folder: str | Sequence[str]
    data_fingerprint: str
    eval_batch_size: int
    setup: Setup
    init_from: str | None
    starts: Sequence[dict[str, Any]]
    checkpoint: Checkpoint | None

    @classmethod
    def open(cls, name: str) -> StoredRun:
        """The run that `name` names, at its latest checkpoint (RUN@STEP: at that one).

        Raises UserError where there is no such run or checkpoint, and where run.json is damaged.
        """
        run, checkpoint = _find(name)
        described = read_run_json(run)
        return cls(
            run,
            described["config"],
            described["train"],
            described["data"]["folder"],
            described["data"]["fingerprint"],
            _eval_batch_size(described),
            _read_setup(run, described),
            described.get("init_from"),
            described["starts"],
            checkpoint,
        )

    def training(self) -> dict[str, Any]:
        """training_state.json of the checkpoint; before the first one, that of a run that begins."""
        if self.checkpoint:
            return self.checkpoint.training()
        return {"step": 0, "train": self.train, "data": self.data_fingerprint}

    def model_config(self) -> GPTConfig:
        """The model's configuration."""
        return self.checkpoint.config if self.checkpoint else GPTConfig.from_dict(self.config)

    def tensors(self, config: GPTConfig, seed: int) -> Iterable[tuple[str, Array]]:
        """Parameters and optimizer state of the checkpoint; before the first one, initial parameters."""
        if self.checkpoint:
            return [*self.checkpoint.parameters(), *self.checkpoint.optimizer_state()]
        return initialise(config, seed)

    def open_data(self, train: TrainConfig, fingerprint: str, *, moved: bool) -> Data:
        """The data that the run was trained on: as prepared then or, where they `moved`, prepared again.

        Raises UserError unless they have the `fingerprint`.
        """
        data = None if moved else mixture.open_folders(self.data_folder, train.data)
        if data is None:
            tokenizer = self.checkpoint.tokenizer() if self.checkpoint else None
            data = mixture.prepare_all(train.data, train.tokenizer, train.vocab_size, tokenizer, train.val_data)
        if data.fingerprint != fingerprint:
            raise UserError(
                f"The data {mixture.spell(train.data)} is not what {self.folder} was trained on (its fingerprint "
                "differs): give --data the original, or start a new run."
            )
        return data


def read_run_json(run: Path) -> dict[str, Any]:
    """The content of a run's run.json; UserError where it is not as `run_json` wrote it."""
    kinds = {"config": dict, "train": dict, "data": dict, "starts": list}
    try:
        described = read_json(run / "run.json")
        data = described["data"]
        coerce("folder", str | tuple[str, ...], data["folder"])
        coerce("fingerprint", str, data["fingerprint"])
        if all(isinstance(described[key], kind) for key, kind in kinds.items()):
            return dict(described)
    except (UserError, KeyError, TypeError):
        pass
    raise UserError(f"{run / 'run.json'} is not what twingpt wrote: the run can't be resumed.")


def _eval_batch_size(described: Mapping[str, Any]) -> int:
    """The batch size of which an evaluation has `eval_iters`; of an older version, that of the run's micro-batches."""
    evaluation = described.get("evaluation")
    size = evaluation.get("batch_size") if isinstance(evaluation, dict) else None
    return size if type(size) is int and size > 0 else TrainConfig.from_dict(described["train"]).batch_size


def _read_setup(run: Path, described: Mapping[str, Any]) -> Setup:
    """Where and how a run trains; an older version has it in config.toml alone, which may be gone."""
    found = described.get("setup")
    if not isinstance(found, dict):
        try:
            found = settings.read(run / "config.toml")
        except UserError:
            found = {}
    start = described["starts"][-1] if described["starts"] else {}
    kinds = {"backend": str, "device": str, "compile": bool, "report_to": str, "wired_limit": float}
    kept = {key: found[key] for key, kind in kinds.items() if isinstance(found.get(key), kind)}
    last = start.get("backend") if isinstance(start, dict) else None
    return Setup(**{"backend": last if isinstance(last, str) else None} | kept)


def open_named_data(names: Sequence[str], tokenizer: str | None, vocab_size: int | None) -> tuple[Data, int | None]:
    """The data of a run, or of what --data may name, and how many held-out tokens of each source it evaluates on.

    None is all of them. RUN@STEP is its run. Raises UserError where there is neither, and for a tokenizer or
    vocab_size beside a run.
    """
    name = names[0]
    try:
        if len(names) > 1:
            raise UserError("Several are what --data names.")
        owner(name)
    except UserError:
        kind, size = tokenizer or TrainConfig.tokenizer, vocab_size or TrainConfig.vocab_size
        return mixture.prepare_all(names, kind, size), None
    if tokenizer or vocab_size:
        raise UserError(f"{name} is a run, with a tokenizer of its own: leave out --tokenizer and --vocab-size.")
    run = StoredRun.open(name)
    config, train = GPTConfig.from_dict(run.config), TrainConfig.from_dict(run.train)
    data = run.open_data(train, run.data_fingerprint, moved=False)
    return data, train.eval_iters * run.eval_batch_size * config.block_size or None


def _find(name: str) -> tuple[Path, Checkpoint | None]:
    """The run that `name` names, and the checkpoint to go on from: none where it was killed before its first."""
    try:
        run = find_run(name)
    except UserError:  # RUN@STEP, a checkpoint's folder, or nothing
        run = None
    if run and latest(run) is None and not (run / "latest").exists():
        return run, None
    checkpoint = open_checkpoint(resolve(name))
    run = checkpoint.folder.parent.parent
    if not (run / "run.json").is_file():  # named from within, as `.`
        run = find_run(checkpoint.folder.resolve().parent.parent)
    return run, checkpoint
