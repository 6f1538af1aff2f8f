"""A run as its folder has it: run.json, the checkpoint to go on from, and the data that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np

from twingpt.core.checkpoint.schema import MANIFEST, Checkpoint, ManifestError, open_checkpoint
from twingpt.core.config import GPTConfig, TrainConfig, coerce
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.reading import read_json
from twingpt.data import mixture
from twingpt.data.mixture import Data
from twingpt.data.named import EMBEDDED
from twingpt.data.prepare import find as find_prepared
from twingpt.data.sources import HOW_READ, RULES
from twingpt.runs.folder import find_run, latest, owner, resolve
from twingpt.training import settings
from twingpt.training.state import Setup

Array = np.ndarray


@dataclass(frozen=True)
class StoredRun:
    """A run read from its folder: what run.json says, and the checkpoint to go on from.

    `config` and `train` are the configurations of its last start, as JSON values; `data_folder` is that of the
    prepared data, or of each source of a mixture, and `data_rules` the version of the rules by which these were read,
    which older runs didn't note. `eval_batch_size` and `setup` are as in RunState. `checkpoint` is
    None where the run was killed before its first.
    """

    folder: Path
    config: dict[str, Any]
    train: dict[str, Any]
    data_folder: str | Sequence[str]
    data_fingerprint: str
    data_rules: int | None
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
            described["data"].get("rules"),
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

    def open_data(self, train: TrainConfig, fingerprint: str, given: Sequence[str] = ()) -> Data:
        """The data that the run was trained on: as prepared then, or prepared again where they are gone.

        Also where the keys of `train` in `given`, "data" and "val_data", say anew where they are. Raises UserError
        unless they have the `fingerprint`.
        """
        found = None if given else mixture.open_folders(self.data_folder, train.data)
        if found and found.fingerprint == fingerprint:
            return found
        if max(self.data_rules or 0, mixture.rules(found) if found else 0) > RULES:
            raise UserError(f"The data of {self.folder} are read as a newer version of twingpt does: install that.")
        data = found or self._prepare_again(train, fingerprint, given)
        if data.fingerprint == fingerprint:
            return data
        was, now = self.data_rules or 1, mixture.rules(data)
        if found and was != now:  # prepared anew under its name
            raise UserError(
                f"The data {mixture.spell(train.data)} were prepared again since {self.folder} was trained on them, "
                f"and the rules of reading changed: a file was read {HOW_READ[was]}, and is {HOW_READ[now]}. Give the "
                "text itself, as --data FILE, which is then read as it was, or start a new run."
            )
        raise self._other_data(train, given)

    def _prepare_again(self, train: TrainConfig, fingerprint: str, given: Sequence[str]) -> Data:
        """The data prepared by the rules of reading that the run noted; by any that give the `fingerprint`, if none."""
        for (spec, _), folder in zip(mixture.parse(train.data), self._folders(), strict=False):
            if Path(folder).name == spec and "data" not in given and not find_prepared(spec):
                raise UserError(
                    f"The prepared data set {spec} of {self.folder} is gone: prepare its text again under that name, "
                    "or give the text, as --data FILE."
                )
        tokenizer = self.checkpoint.tokenizer() if self.checkpoint else None
        how = (train.data, train.tokenizer, train.vocab_size, tokenizer, train.val_data)
        found, failed = list[Data](), list[UserError]()
        for rules in [self.data_rules] if self.data_rules else range(RULES, 0, -1):
            try:
                found.append(mixture.prepare_all(*how, rules))
            except UserError as error:
                failed.append(error)
            else:
                if found[-1].fingerprint == fingerprint:
                    return found[-1]
        if not found:
            raise failed[0]
        return found[0]

    def _folders(self) -> list[str]:
        return [self.data_folder] if isinstance(self.data_folder, str) else list(self.data_folder)

    def _other_data(self, train: TrainConfig, given: Sequence[str]) -> UserError:
        """The error of data that are not those of the run."""
        if list(given) == ["val_data"]:
            return UserError(
                f"The held-out text {train.val_data} is not what {self.folder} was evaluated on (the fingerprint of "
                "its data differs): give --val-data the original, or start a new run."
            )
        began = next((start.get("python") for start in self.starts if isinstance(start, dict)), None)
        if began not in (None, python_version()) and any(spec in EMBEDDED for spec, _ in mixture.parse(train.data)):
            return UserError(
                f"The data {mixture.spell(train.data)} comes with Python, and {self.folder} was trained on that of "
                f"Python {began}, while this is {python_version()}: resume it with that Python, or start a new run."
            )
        fix = "give --data the original" if given else "it was changed since, so give --data a copy of the original"
        return UserError(
            f"The data {mixture.spell(train.data)} is not what {self.folder} was trained on (its fingerprint differs): "
            f"{fix}, or start a new run."
        )


def read_run_json(run: Path) -> dict[str, Any]:
    """The content of a run's run.json; UserError where it is not as `run_json` wrote it."""
    kinds = {"config": dict, "train": dict, "data": dict, "starts": list}
    try:
        described = read_json(run / "run.json")
        data = described["data"]
        coerce("folder", str | tuple[str, ...], data["folder"])
        coerce("fingerprint", str, data["fingerprint"])
        coerce("rules", int, data.get("rules", RULES))
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
    kinds: dict[str, Any] = {"backend": str, "device": str, "compile": bool, "report_to": str}
    kinds["wired_limit"] = (int, float)  # a share, or bytes
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
    data = run.open_data(train, run.data_fingerprint)
    return data, train.eval_iters * run.eval_batch_size * config.block_size or None


def _find(name: str) -> tuple[Path, Checkpoint | None]:
    """The run that `name` names, and the checkpoint to go on from: none where it was killed before its first."""
    try:
        run = find_run(name)
    except UserError:  # RUN@STEP, a checkpoint's folder, or nothing
        run = None
    if run and latest(run) is None and not (run / "latest").exists():
        return run, None
    try:
        checkpoint = open_checkpoint(resolve(name))
    except ManifestError as error:
        raise UserError(
            f"{str(error).rstrip('.')}; go on from an earlier checkpoint (RUN@STEP), or if another tool saved it, "
            f"remove {MANIFEST} and fine-tune it by --init-from."
        ) from None
    run = checkpoint.folder.parent.parent
    if not (run / "run.json").is_file():  # named from within, as `.`
        run = find_run(checkpoint.folder.resolve().parent.parent)
    return run, checkpoint
