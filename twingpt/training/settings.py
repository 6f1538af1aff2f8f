"""A run's settings from a TOML file, flags and key=value pairs, each checked by its field's type; and back to TOML."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from twingpt.core.config import (
    GPTConfig,
    RopeScaling,
    Setting,
    TrainConfig,
    coerce,
    setting,
    settings_of,
    unknown_choice,
    without_none,
)
from twingpt.core.errors import UserError
from twingpt.core.paths import expand, write_atomically
from twingpt.core.presets import PRESETS, SHAPES
from twingpt.runs.shell import quote

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = dict[str, Any]

DEEPEST = 48  # of --depth


@dataclass(frozen=True)
class SizeSettings:
    """What stands for many fields of GPTConfig, each of which replaces one of its values."""

    preset: str = setting(MISSING, "Size by name", choices=PRESETS, derived="micro on a CPU, tiny on a GPU")
    depth: int = setting(MISSING, f"1 to {DEEPEST}: size, batch, rates and length follow from it")
    shape: str = setting(MISSING, "Kind of block", choices=SHAPES, derived="qwen3, or the preset's")


@dataclass(frozen=True)
class RunSettings:
    """Where a run goes and comes from, what computes it, and who is told."""

    out: str | None = setting(None, "The run's folder", derived="runs/DATA-DATE")
    init_from: str | None = setting(None, "Fine-tune this model: a run, a checkpoint, or what gpt convert reads")
    backend: str | None = setting(None, "Backend", choices=("auto", "mlx", "torch"), derived="auto")
    device: str | None = setting(None, "A device of the backend: cpu, cuda, cuda:1, mps or gpu", derived="the best")
    compile: bool | None = setting(None, "Compile the step", derived="not on a CPU")
    wired_limit: float | None = setting(
        None, "On Metal, keep memory wired: a share of the working set, 0.9 at most, or bytes", derived="nothing"
    )
    report_to: str | None = setting(None, "tensorboard, wandb, mlflow: one or several, with commas", derived="none")


MODEL_FIELDS = {key: about for key, about in settings_of(GPTConfig).items() if key != "vocab_size"}
TRAIN_FIELDS = settings_of(TrainConfig)
# A file's tables. The vocabulary's size is the tokenizer's, so it is among [train].
TABLES: dict[str, dict[str, Setting]] = {
    "model": settings_of(SizeSettings) | MODEL_FIELDS,
    "train": TRAIN_FIELDS,
    "run": settings_of(RunSettings),
}
FIELDS = {key: about for table in TABLES.values() for key, about in table.items()}
SIZE_KEYS = set(settings_of(SizeSettings))

# What each of these decides, and so replaces where the file has it: `--depth 6` on top of a file that
# spells a model out would do nothing otherwise.
_SIZE = {"preset", "depth", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner", "block_size"}
_LENGTH = {"batch_size", "gradient_accumulation_steps", "max_iters", "warmup_iters"}
_RATES = {"optimizer", "learning_rate", "min_lr", "matrix_lr", "lr_schedule"}
DECIDES: dict[str, set[str]] = {
    "preset": _SIZE,
    "depth": _SIZE | _LENGTH | _RATES,
    "shape": {"shape", *(key for switches in SHAPES.values() for key in switches)},
    "backend": {"device"},
}


def default_text(about: Setting) -> str:
    """A setting's default in words, or as --set takes it; nothing where it has none."""
    if about.derived or about.default in (MISSING, None):
        return about.derived
    return as_text(_plain(about.default))


def gather(file: Path | None, flags: Mapping[str, Any], pairs: Sequence[str]) -> tuple[Settings, dict[str, str]]:
    """Settings by key, and for each how it was given, to be named in errors.

    A file's are replaced by flags, and both by `pairs` ("key=value"), of which the last one counts. A
    preset, depth, shape or backend on the command line also replaces what it decides in the file.
    """
    below = {} if file is None else read(file)
    names = {key: f"{key} in {file}" for key in below}
    given = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
    names |= {key: f"--{key.replace('_', '-')}" for key in given}
    for key in (FIELDS.keys() & given.keys()) - {"out"}:  # which no file keeps
        given[key] = _plain(coerce(key, FIELDS[key].hint, given[key]))
    for pair in pairs:
        key, value = _pair(pair)
        given[key], names[key] = value, f"--set {key}"
    for layer in (below, given):
        if "preset" in layer and "depth" in layer:
            raise UserError(f"{names['preset']} and {names['depth']} both say how large the model is: leave one out.")
    deciding = DECIDES.keys() & given.keys()
    if "shape" in PRESETS.get(given.get("preset", ""), {}):  # gpt2 is of its own
        deciding.add("shape")
    decided = {key for name in deciding for key in DECIDES[name]}
    settings = {key: value for key, value in below.items() if key not in decided} | given
    return settings, {key: names[key] for key in settings}


def read(path: Path) -> Settings:
    """The settings of a TOML file, by key: at its top or in the tables of TABLES.

    Raises UserError, naming the file, for a file that can't be read or isn't TOML, an unknown key, a key
    in another table, one given twice, and a value of another type.
    """
    settings: Settings = {}
    for key, value in _entries(path, _load(path)):
        if key in settings:
            raise UserError(f"{path}: {key} is given twice: leave one out.")
        settings[key] = _checked(str(path), key, value)
    return settings


def _load(path: Path) -> dict[str, Any]:
    if expand(path).is_dir():
        raise UserError(f"{path} is a folder: give the TOML file in it, as --config {path / 'config.toml'}.")
    try:
        text = expand(path).read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: check the path given to --config.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start}.") from None
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{path} is not TOML: it is nested too deeply.") from None
    except ValueError as error:  # also of a number of thousands of digits
        last = f"at the end, line {len(text.splitlines())}"
        raise UserError(f"{path} is not TOML: {str(error).replace('at end of document', last)}.") from None
    return table


def _entries(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a file, out of their tables."""
    for name, part in content.items():
        if name not in TABLES:
            if isinstance(part, dict) and name not in FIELDS:
                raise UserError(f"{path}: {unknown_choice('table', name, TABLES)}")
            yield name, part
            continue
        if not isinstance(part, dict):
            raise UserError(f"{path}: {name} must be a table, [{name}], and is {part!r}.")
        for key, value in part.items():
            home = next((table for table, keys in TABLES.items() if key in keys), name)
            if home != name:
                raise UserError(f"{path}: {key} belongs in [{home}], and is in [{name}].")
            yield key, value


def _checked(where: str, key: str, value: Any) -> Any:
    """The value as its field has it; "none" empties a field that may be empty, as TOML has no word for it."""
    try:
        if key not in FIELDS:
            raise unknown_choice("key", key, FIELDS)
        if value == "none" and FIELDS[key].optional and key not in TABLES["run"]:  # where it may be a name
            return None
        return _plain(coerce(key, FIELDS[key].hint, value))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _plain(value: Any) -> Any:
    """A field's value as JSON and TOML have it, to be compared with theirs."""
    if isinstance(value, tuple):
        return list(value)
    return dataclasses.asdict(value) if isinstance(value, RopeScaling) else value


def _pair(text: str) -> tuple[str, Any]:
    """The key and the value of "key=value", read by its field's type: text as it stands, the rest as in TOML."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UserError(f"--set {text}: write it as key=value.")
    try:
        parsed = value if value == "none" or key not in FIELDS else _parse(FIELDS[key], value)
    except (KeyError, ValueError):  # still text: the check says what it should be
        parsed = value
    return key, _checked("--set", key, parsed)


def _parse(about: Setting, text: str) -> Any:
    return PARSERS.get(without_none(about.hint), _parse_toml)(text)


def _parse_toml(text: str) -> Any:
    return tomllib.loads(f"value = {text}")["value"]


def _parse_texts(text: str) -> Any:
    """One text, or a list of them as in TOML."""
    return _parse_toml(text) if text.startswith("[") else text


PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    str | tuple[str, ...]: _parse_texts,
    int: int,
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
}


def spelled_out(config: GPTConfig, train: TrainConfig) -> Settings:
    """Every setting of a run, by key, but those of the model that follow from others anyway."""
    inner = dataclasses.replace(config, n_inner=0).n_inner
    follows = {"n_kv_head": config.n_head, "head_dim": config.n_embd / config.n_head, "n_inner": inner}
    model = {key: value for key, value in config.to_dict().items() if key in MODEL_FIELDS}
    return {key: value for key, value in model.items() if value != follows.get(key)} | train.to_dict()


def to_toml(settings: Mapping[str, Any], comment: str) -> str:
    """A file that `read` reads back as `settings`, under a comment of one line."""
    import tomli_w

    tables: dict[str, Settings] = {}
    for table, keys in TABLES.items():
        part = {key: _toml_value(settings[key]) for key in keys if key in settings}
        if part:
            tables[table] = part
    return f"# {comment}\n\n{tomli_w.dumps(tables)}"


def as_pairs(settings: Mapping[str, Any]) -> str:
    """Settings in one line, as --set takes them on a command line."""
    return " ".join(quote(f"{key}={as_text(value)}") for key, value in settings.items())


def as_text(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, dict):  # of a RoPE scaling, what is not as usual
        usual = dataclasses.asdict(RopeScaling(type="linear", factor=1.0))
        parts = (f"{key}={_quoted(item)}" for key, item in value.items() if item != usual[key] or key == "type")
        return f"{{{', '.join(parts)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_quoted, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _toml_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return "none" if value is None else value


def write(path: Path, settings: Mapping[str, Any], comment: str) -> None:
    """Write `to_toml` to a file in one step; UserError where that can't be done."""
    try:
        write_atomically(path, to_toml(settings, comment))
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}.") from None
