"""Folders of documents: which of their files are read, and a count of what is left out."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from twingpt.core.errors import UserError
from twingpt.data import readers
from twingpt.data.readers import DocumentFile
from twingpt.runs.units import counted

Read = Callable[[Path], DocumentFile]  # how a file is read

# What a folder within one is, that is no documents, by the files that it has.
OTHERS = (
    ("run", ("run.json",)),
    ("prepared data set", ("manifest.json", "train.bin")),
    ("model", ("config.json", "model.safetensors")),
    ("model", ("config.json", "model.safetensors.index.json")),
)


@dataclass
class Found:
    """The files of a folder or of a glob that are documents, in order, and `others`: what each other path is.

    A glob may take what a folder of its own leaves out, and come upon a path twice.
    """

    taken: dict[Path, DocumentFile] = field(default_factory=dict)
    others: dict[Path, str] = field(default_factory=dict)

    def take(self, path: Path, read: Read) -> None:
        """Add a document."""
        self.taken.setdefault(path, read(path))

    @property
    def files(self) -> list[DocumentFile]:
        """The documents."""
        return list(self.taken.values())


def say_left_out(left_out: Mapping[str, int]) -> str:
    """What is left out, in words: left out: 39 .py, 1 run."""
    return "left out: " + ", ".join(
        f"{count:,} {what}" if what.startswith((".", "without")) else counted(count, what)
        for what, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    )


def walk(folder: Path, read: Read) -> Found:
    """The documents of a folder and of the folders within, linked ones too, each folder once."""
    found = Found()
    _walk(folder, read, found, _above(folder))
    return found


def match(pattern: Path, read: Read) -> Found:
    """The files that a glob matches, and the documents of the folders that it matches."""
    found, seen = Found(), set[tuple[int, int]]()
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    for path in _matches(Path(pattern.anchor), parts, found):
        if path.is_dir():
            seen |= {_identity(path.parent), *_above(path.parent)}
            if not _is_other(path, found):
                _walk(path, read, found, seen)
        elif path.is_file():
            found.take(path, read)
    return found


def by_names(path: Path, read: Read) -> Found:
    """The documents of a folder, or of a glob, under the first rules of reading: by their names alone.

    They took files in hidden folders, runs and models, and none in linked folders.
    """

    def within(folder: Path) -> list[Path]:
        return sorted(
            one for one in folder.rglob("*") if one.name[0] != "." and readers.kind_by_name(one) and one.is_file()
        )

    found = Found()
    matches = [path] if path.is_dir() else map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    for match in matches:
        for file in within(match) if match.is_dir() else [match]:
            found.take(file, read)
    return found


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _above(folder: Path) -> set[tuple[int, int]]:
    """The folders that a folder is in, which a link within must not lead back to."""
    return {_identity(parent) for parent in folder.resolve().parents}


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}.") from None


def _is_other(folder: Path, found: Found) -> bool:
    """Whether a folder is hidden, a run, a data set or a model, and so left out."""
    what = next((what for what, names in OTHERS if all((folder / name).is_file() for name in names)), None)
    what = "hidden folder" if folder.name.startswith(".") else what
    if what:
        found.others[folder] = what
    return bool(what)


def _walk(folder: Path, read: Read, found: Found, seen: set[tuple[int, int]]) -> None:
    if (identity := _identity(folder)) in seen:  # a link back to it, or a second one
        return
    seen.add(identity)
    for path in _entries(folder):
        if path.is_dir():
            if not _is_other(path, found):
                _walk(path, read, found, seen)
        elif what := _reason(path, read):
            found.others[path] = what
        else:
            found.take(path, read)


def _reason(path: Path, read: Read) -> str | None:
    """Why a file of a folder is left out, in a word; None where it is one of its documents."""
    if path.name.startswith("."):
        return "hidden file"
    if not path.is_file():
        return "broken link" if path.is_symlink() else "special file"
    if not (kind := readers.kind_of(path)):
        return path.suffix.lower() or "without suffix"
    if kind == "json" and not read(path).holds_field():
        return f".json without {read(path).field!r}"
    return None


def _matches(folder: Path, parts: Sequence[str], found: Found) -> Iterator[Path]:
    """What a glob's parts match in a folder, sorted; ** goes through linked folders too, each of them once."""
    if not parts:
        yield folder
        return
    first, *rest = parts
    if first == "**" and folder.is_dir():
        for below in _below(folder, found, _above(folder)):
            yield from _matches(below, rest or ["*"], found)
    elif not glob.has_magic(first):
        if os.path.lexists(folder / first):
            yield from _matches(folder / first, rest, found)
    elif folder.is_dir():
        for path in _entries(folder):
            if fnmatchcase(path.name, first) and not (path.name.startswith(".") and first[0] != "."):
                yield from _matches(path, rest, found)


def _below(folder: Path, found: Found, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """A folder, and those within that may have documents."""
    if (identity := _identity(folder)) not in seen:
        seen.add(identity)
        yield folder
        for path in _entries(folder):
            if path.is_dir() and not _is_other(path, found):
                yield from _below(path, found, seen)
