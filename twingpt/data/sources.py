"""Data sources: what --data names, resolved to files: a named source, own files, a glob, a hub's data set, stdin."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import expand
from twingpt.data import compression, folders, named, readers
from twingpt.data.documents import DocumentPiece, Item
from twingpt.data.readers import Advance, DocumentFile, InMemoryDocuments
from twingpt.runs.shell import quote
from twingpt.runs.units import counted

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class DocumentInput(Protocol):
    """A part of a source: a file, or what is in memory or prepared already."""

    @property
    def kind(self) -> str:
        """What it holds: text, jsonl, json, parquet, arrow, memory or prepared."""

    @property
    def size(self) -> int:
        """Bytes to read."""

    def digest(self) -> str:
        """SHA-256 of its content."""

    def items(self, advance: Advance = ...) -> Iterator[Item]:
        """Its documents, in order."""


VALIDATION = ("validation", "valid", "val", "dev")  # what a data set calls what it holds out itself
RULES = 2  # how sources are read, by version; 1 went by names alone, and noted no version
HOW_READ = {1: "by its name alone", 2: "by what it holds"}


@dataclass(frozen=True)
class Source:
    """A data source: documents under a short name, in files or in memory; nothing is read before it is asked for.

    `others` are the paths in its folders that are no documents, with a word for each. More than `most_bad` records
    without text are a UserError. `held_out` is what a data set has for validation itself.
    """

    name: str
    inputs: Sequence[DocumentInput]
    licence: str | None = None
    others: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    most_bad: int = 0
    held_out: Source | None = None

    @property
    def rules(self) -> int:
        """The version of RULES by which it is read."""
        return 1 if any(isinstance(one, DocumentFile) and one.by_name for one in self.inputs) else RULES

    @property
    def digest(self) -> str:
        """SHA-256 over the inputs' digests, and over how they are read."""
        return self.digest_under(self.rules)

    def digest_under(self, rules: int) -> str:
        """The digest that it has, or had, where sources are read by these RULES."""
        sha = hashlib.sha256() if rules == 1 else hashlib.sha256(f"rules {rules}/".encode())
        for one, content in zip(self.inputs, self._content, strict=True):
            parts = [one.kind, one.field, one.errors, one.separator] if isinstance(one, DocumentFile) else [one.kind]
            sha.update(f"{'/'.join(map(str, parts))}/{content}/".encode())
        return sha.hexdigest()

    @cached_property
    def _content(self) -> list[str]:
        return [one.digest() for one in self.inputs]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(one.size for one in self.inputs)

    @property
    def files(self) -> set[Path]:
        """The paths of its files, without links."""
        return {one.path.resolve() for one in self.inputs if isinstance(one, DocumentFile)}

    @property
    def separators(self) -> list[str]:
        """The lines that end a document of its text files."""
        texts = (one for one in self.inputs if isinstance(one, DocumentFile) and one.kind == "text")
        return list(dict.fromkeys(one.separator for one in texts if one.separator is not None))

    def without(self, files: set[Path]) -> Source:
        """The source without some of its `files`."""
        kept = [one for one in self.inputs if not (isinstance(one, DocumentFile) and one.path.resolve() in files)]
        return dataclasses.replace(self, inputs=kept)

    @property
    def left_out(self) -> Counter[str]:
        """What is left out, counted by kind; not what another of the sources that it joins takes, as a glob may."""
        taken = {one.path for one in self.inputs if isinstance(one, DocumentFile)}
        return Counter(what for path, what in self.others.items() if path not in taken)

    def stamp(self) -> list[tuple[int, int]]:
        """Size and modification time of each file: another stamp means that a file was written to."""
        found = (one.path.stat() for one in self.inputs if isinstance(one, DocumentFile))
        return [(stat.st_size, stat.st_mtime_ns) for stat in found]

    def items(self, advance: Advance = lambda count: None) -> Iterator[Item]:
        """All documents in order, long ones in pieces."""
        for one in self.inputs:
            yield from one.items(advance)

    def texts(self, bad: list[str]) -> Iterator[tuple[str, bool]]:
        """The documents, long ones in pieces, each with whether a document begins there; bad records go to `bad`."""
        for item in self.items():
            for text in item.documents(bad):
                yield text, not isinstance(item, DocumentPiece) or item.begins
            self.check_bad(bad)

    def notes(self, bad: Sequence[str]) -> list[str]:
        """What is left out, in sentences, where `bad` says what is wrong with records."""
        notes = [f"{counted(len(bad), 'bad record')} left out, the first: {bad[0]}"] if bad else []
        return notes + ([folders.say_left_out(self.left_out)] if self.left_out else [])

    @property
    def split_notes(self) -> list[str]:
        """A sentence where a file called train lies beside others that are called as what is held out."""
        paths = {_stem(one.path): one.path for one in self.inputs if isinstance(one, DocumentFile)}
        train, names = paths.get("train"), (*VALIDATION, "test")
        beside = [paths[name] for name in names if train and name in paths and paths[name].parent == train.parent]
        if not train or not beside:
            return []
        return [
            f"trained on as {train.name} is: {', '.join(path.name for path in beside)}; to hold one out: "
            f"gpt data prepare {quote(train)} --val {quote(beside[0])}"
        ]

    def check_bad(self, bad: Sequence[str]) -> None:
        """Raise UserError for more bad records than may be left out."""
        if len(bad) > self.most_bad:
            raise UserError(f"More than {self.most_bad:,} records are bad, the next: {bad[self.most_bad]}")

    @property
    def display_name(self) -> object:
        """What a message calls it: its only file, or its name."""
        first, *others = self.inputs
        return first.display_name if isinstance(first, DocumentFile) and not others else self.name

    @property
    def documents(self) -> list[str]:
        """All documents whole, for a source that fits in memory."""
        documents: list[str] = []
        for item in self.items():
            if isinstance(item, DocumentPiece) and not item.begins:
                documents[-1] += item.text
            else:
                documents += item.documents()
        return documents


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read; `licence` is noted of those that have none of their own.

    JSON records and tables have their text in `field` (None: in "text", and nothing need have one); `errors` is
    "strict" or "replace", for what is not UTF-8; so many records without text are left out. With `as_text` JSON is the
    plain text that it also is, and a line of `separator` ends a document of a text. `rules` are those of RULES that a
    run noted.
    """

    field: str | None = None
    errors: str = "strict"
    licence: str | None = None
    skip_bad_lines: int = 0
    as_text: bool = False
    separator: str | None = None
    rules: int = RULES

    def __post_init__(self) -> None:
        """Check the values, before anything is read."""
        if self.errors not in ("strict", "replace"):
            raise unknown_choice("way with errors", self.errors, ("strict", "replace"))
        if self.as_text and self.field is not None:
            raise UserError(f"--field {self.field} has no use with --as-text: leave one out.")
        if "\n" in (self.separator or "").strip():
            raise UserError(f"--separator {self.separator!r} is more than a line: give one line.")
        if self.skip_bad_lines < 0:
            raise UserError(f"--skip-bad-lines must be at least 0, and is {self.skip_bad_lines}.")

    def file(self, path: Path, name: str = "") -> DocumentFile:
        """A file that is read so."""
        skip_bad, by_name = self.skip_bad_lines > 0, self.rules == 1
        separator = None if self.separator is None else self.separator.strip()
        return DocumentFile(path, self.field or "text", self.errors, separator, name, skip_bad, self.as_text, by_name)

    def load(self, specs: Sequence[str], spool: Path) -> dict[str, Source]:
        """The sources that are called so: as `load` knows them, a hub's data sets, and stdin, kept in `spool`.

        Raises UserError for a field that nothing has a use for.
        """
        found = {spec: self._load(spec, spool) for spec in specs}
        self.check_used([one for source in found.values() for one in source.inputs])
        return found

    def check_used(self, inputs: Sequence[DocumentInput]) -> None:
        """Raise UserError for a field, or a separator, that none of the inputs has a use for."""
        texts = any(isinstance(one, DocumentFile) and one.kind == "text" for one in inputs)
        if self.separator is not None and not texts:
            apart = all(one.kind in ("memory", "prepared") for one in inputs)
            why = "documents are apart already" if apart else "each record of JSON or a table is a document"
            raise UserError(f"--separator {self.separator} has no use: no files of text are given, and {why}.")
        if self.field is not None and all(one.kind in ("text", "memory", "prepared") for one in inputs):
            raise UserError(
                f"--field {self.field} has no use: no JSON and no tables are given, but text (JSON in a .txt is text: "
                "name it .jsonl)."
            )

    def _load(self, spec: str, spool: Path) -> Source:
        if spec == "-":
            source = spool_stdin(spool, self)
        elif HUB_ID.fullmatch(spec) and not expand(spec).exists() and not readers.is_data_file(Path(spec)):
            source = load_hub(spec, self)
        else:
            source = load(spec, self)
        return dataclasses.replace(source, licence=source.licence or self.licence, most_bad=self.skip_bad_lines)


AS_THEY_ARE = ReadOptions()


def load(spec: str, options: ReadOptions = AS_THEY_ARE) -> Source:
    """The data source `spec`: a name in named.TABLE, the path of a file or of a folder of files, or a glob.

    Raises UserError where there is nothing to read.
    """
    if name_and_shards := named.parse(spec):
        return _named(spec, *name_and_shards, options)
    if not spec:
        raise UserError(f"--data is empty: give a file, a folder, or one of {', '.join(named.NAMES)}.")
    path = expand(spec)
    if path.is_dir():
        return _folder(spec, path, options)
    if path.is_file():
        return Source(printable(_stem(path)), [options.file(path)])
    if path.exists():
        raise UserError(f"{spec} is neither a regular file nor a folder: save its text to a file first.")
    if glob.has_magic(spec):
        found = (folders.by_names if options.rules == 1 else folders.match)(path, options.file)
        source = Source(slug(path.name), found.files, others=found.others)
        if not found.files:
            raise UserError(f"No file matches {spec}{_and_left_out(source)}.")
        return source
    raise _missing(spec)


def _folder(spec: str, path: Path, options: ReadOptions) -> Source:
    """The documents of a folder, or of a table that was saved as one."""
    name = printable(path.resolve().name)
    if tables := _saved_to_disk(path):
        splits = VALIDATION if options.rules > 1 else ()
        val = next(filter(None, (_saved_to_disk(path / split) for split in splits)), None)
        held_out = Source(name, [*map(options.file, val)]) if val else None
        return Source(name, [*map(options.file, tables)], held_out=held_out)
    found = (folders.by_names if options.rules == 1 else folders.walk)(path, options.file)
    source = Source(name, found.files, others=found.others)
    if not found.files:
        kinds = f"{', '.join(readers.KINDS)}, {' or '.join(compression.SUFFIXES)}"
        raise UserError(f"{spec} has no text files ({kinds}){_and_left_out(source)}.")
    return source


def _and_left_out(source: Source) -> str:
    """What is left out, to end a sentence with."""
    return f"; {folders.say_left_out(source.left_out)}" if source.others else ""


def _missing(spec: str) -> UserError:
    """The error of a source that is not there."""
    if HUB_ID.fullmatch(spec) and not readers.is_data_file(Path(spec)):
        return UserError(
            f"There is no file or folder {spec}: check the path, or, if it is a data set's id on Hugging Face's hub, "
            f"gpt data prepare {spec} --name {slug(spec.rpartition('/')[2])}."
        )
    if Path(spec).suffix or Path(spec).name != spec:
        return UserError(f"There is no file or folder {spec}: check the path.")
    return unknown_choice("data source", spec, named.NAMES)


def printable(text: str) -> str:
    """A file's name with U+FFFD for bytes that are not UTF-8, as it can be written to JSON and shown."""
    return os.fsencode(text).decode("utf-8", "replace")


def empty(what: object) -> UserError:
    """The error of a source without text."""
    return UserError(f"{what} is empty: give a file with text.")


def _named(spec: str, name: str, shards: int | None, options: ReadOptions) -> Source:
    source, files = named.SOURCES[name], named.fetch(name, shards)
    if not files:
        return Source(spec, [InMemoryDocuments(tuple(named.EMBEDDED[name]()))], source.licence)
    separator = source.separator if options.separator is None else options.separator
    options = dataclasses.replace(options, separator=separator, rules=RULES)  # none of its files needs the first rules
    return Source(spec, [*map(options.file, files)], source.licence)


def load_hub(spec: str, options: ReadOptions) -> Source:
    """The Hugging Face data set `org/name` or `org/name:config`, downloaded by `datasets`: its split train.

    Its validation split, where it has one, is held out.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f'There is no file or folder {spec}; to fetch it as a Hugging Face data set: pip install "twingpt[hf]".'
        ) from None
    name, _, config = spec.partition(":")
    _go_offline_unless_reachable(name)
    try:
        table = datasets.load_dataset(name, config or None, split="train")
        split = next((split for split in VALIDATION if split in (table.info.splits or ())), None)
        val = datasets.load_dataset(name, config or None, split=split) if split else None
    except Exception as error:  # the hub's, the network's, and those of every format's reader
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"There is no file or folder {spec}, and it can't be fetched as a Hugging Face data set: {reason}"
        ) from None

    def source(table: Any) -> Source:
        return Source(
            slug(spec.rpartition("/")[2]), [options.file(Path(file["filename"])) for file in table.cache_files]
        )

    return dataclasses.replace(source(table), held_out=source(val) if val else None)


def _go_offline_unless_reachable(name: str) -> None:
    """Make `datasets` use its cache alone where the hub can't be reached: by itself it tries for half a minute."""
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:  # it answered, and `datasets` will say what is wrong
        pass
    except Exception:  # of whichever HTTP library it uses
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def spool_stdin(folder: Path, options: ReadOptions) -> Source:
    """The source of what comes in on stdin, spooled to a file in `folder`, because it is read more than once."""
    path = folder / "stdin"
    if sys.stdin is None:
        raise UserError("There is no stdin to read from.")
    with path.open("wb") as file:
        while block := sys.stdin.buffer.read(readers.BLOCK):
            file.write(block)
    return Source("stdin", [options.file(path, "stdin")])


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() in compression.SUFFIXES else path.stem


def slug(text: str) -> str:
    """`text` as a name: what is not a letter, digit, _, . or - becomes a -."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "data"


def _saved_to_disk(folder: Path) -> list[Path] | None:
    """The tables that `save_to_disk` of `datasets` wrote to a folder, of its split train; None for other folders."""
    splits = folder / "dataset_dict.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_text("utf-8-sig"))["splits"]
            if "train" not in names:
                raise UserError(f"{folder} has no split called train: give the folder of one of {', '.join(names)}.")
            return _saved_to_disk(folder / "train")
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text("utf-8-sig"))
            return [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder} is a damaged copy of a Hugging Face data set: save it again.") from None
    return None
