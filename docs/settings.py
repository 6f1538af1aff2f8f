"""Writes docs/settings.md from the metadata of the settings: python docs/settings.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from twingpt.core.config import RopeScaling, Setting, settings_of, without_none
from twingpt.core.presets import PRESETS, SHAPES
from twingpt.training.recipes import FINE_TUNING, RECIPES
from twingpt.training.settings import FIELDS, TABLES, as_text, default_text

TYPES = {
    str | tuple[str, ...]: "text or list of texts",
    tuple[int, ...]: "list of integers",
    RopeScaling: "table",
    str: "text",
    bool: "true or false",
    int: "integer",
    float: "number",
}

HEAD = """# Settings

`python docs/settings.py` writes this page from the descriptions of the fields in `twingpt/core/config.py` and
`twingpt/training/settings.py`. A setting is a key of a TOML file, below its table or at the top, for `--config`; any is
`--set KEY=VALUE` too, and most are flags. In [model] and [train] `none` empties what may be empty.
"""

RECIPES_HEAD = """## Recipes, presets and shapes

What holds where nothing is given: the recipe of the kind of device, or of fine-tuning; a preset; a shape.
"""

ABOUT = {
    "model": "What the model is. `preset` or `depth`, and `shape`, stand for many of the others.",
    "train": "How it is trained.",
    "run": "Where the run goes and comes from, and what computes it.",
}
COLUMNS = ("key", "type", "default", "flag", "unit", "what it is")


def markdown() -> str:
    """The page."""
    parts = [HEAD]
    for table, fields in TABLES.items():
        parts.append(f"## [{table}]\n\n{ABOUT[table]}\n\n{_table(COLUMNS, map(_row, fields.values()))}")
        if table == "model":
            scaling = _table(COLUMNS, map(_row, settings_of(RopeScaling).values()))
            parts.append(f"### rope_scaling\n\nKeys of the table `[model.rope_scaling]`.\n\n{scaling}")
    recipes, shapes = _filled({**RECIPES, "fine-tuning": FINE_TUNING}), _filled(SHAPES)
    parts.append(f"{RECIPES_HEAD}\n{_columns(recipes)}\n{_columns(PRESETS)}\n{_columns(shapes)}")
    return "\n".join(parts)


def _row(about: Setting) -> tuple[str, ...]:
    usual = f"--{about.name.replace('_', '-')}"
    switch = f"{usual}/{usual.replace('--', '--no-')}" if without_none(about.hint) is bool else usual
    flag = about.flag if isinstance(about.flag, str) else switch if about.flag and about.name in FIELDS else ""
    examples = "".join(f" `{about.name} = {example}`" for example in about.examples)
    return (
        f"`{about.name}`",
        TYPES[without_none(about.hint)],
        default_text(about),
        " ".join(f"`{name}`" for name in flag.split("/") if name),
        about.unit,
        f"{about.sentence}{examples and f' Such as{examples}.'}",
    )


def _filled(named: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The values that names stand for, and the defaults of what only others of them stand for."""
    keys = {key for values in named.values() for key in values}
    usual = {key: FIELDS[key].default for key in keys if FIELDS[key].default is not MISSING}
    return {name: {**usual, **values} for name, values in named.items()}


def _columns(named: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of what each name stands for, key by key."""
    keys = [key for key in FIELDS if any(key in values for values in named.values())]
    rows = ([f"`{key}`", *(as_text(values[key]) if key in values else "" for values in named.values())] for key in keys)
    return _table(["key", *named], rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(markdown(), "utf-8")
