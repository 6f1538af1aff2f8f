"""Data sources: what --data names, resolved to files: a named source, own files, a glob, a hub's data set, stdin."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import expand
from twingpt.data import named, readers
from twingpt.data.documents import DocumentPiece, Item
from twingpt.data.readers import Advance, DocumentFile, InMemoryDocuments

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A data source: documents under a short name, in files or in memory; nothing is read before it is asked for."""

    name: str
    inputs: Sequence[DocumentFile | InMemoryDocuments]
    licence: str | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the inputs' digests, and over how they are read."""
        sha = hashlib.sha256()
        for one in self.inputs:
            parts = [one.kind, one.field, one.errors, one.separator] if isinstance(one, DocumentFile) else [one.kind]
            sha.update(f"{'/'.join(map(str, parts))}/{one.digest()}/".encode())
        return sha.hexdigest()

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(one.size for one in self.inputs)

    def stamp(self) -> list[tuple[int, int]]:
        """Size and modification time of each file: another stamp means that a file was written to."""
        found = (one.path.stat() for one in self.inputs if isinstance(one, DocumentFile))
        return [(stat.st_size, stat.st_mtime_ns) for stat in found]

    def items(self, advance: Advance = lambda count: None) -> Iterator[Item]:
        """All documents in order, long ones in pieces."""
        for one in self.inputs:
            yield from one.items(advance)

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


def load(spec: str, field: str = "text", errors: str = "strict") -> Source:
    """The data source `spec`: a name in named.TABLE, the path of a file or of a folder of files, or a glob.

    Tables and JSON lines have their text in `field`; `errors` is "strict" or "replace", for what is not
    UTF-8. Raises UserError where there is nothing to read.
    """
    if errors not in ("strict", "replace"):
        raise unknown_choice("way with errors", errors, ("strict", "replace"))
    if name_and_shards := named.parse(spec):
        return _named(spec, *name_and_shards)
    if not spec:
        raise UserError(f"--data is empty: give a file, a folder, or one of {', '.join(named.NAMES)}.")
    path = expand(spec)
    if path.is_dir():
        files = _saved_to_disk(path) or _files_in(path)
        return Source(path.resolve().name, [DocumentFile(file, field, errors) for file in files])
    if path.is_file():
        return Source(_stem(path), [DocumentFile(path, field, errors)])
    if path.exists():
        raise UserError(f"{spec} is neither a regular file nor a folder: save its text to a file first.")
    if glob.has_magic(spec):
        return Source(_slug(path.name), [DocumentFile(file, field, errors) for file in _matches(spec)])
    if path.suffix or path.name != spec:
        raise UserError(f"There is no file or folder {spec}: check the path.")
    raise unknown_choice("data source", spec, named.NAMES)


def empty(what: object) -> UserError:
    """The error of a source without text."""
    return UserError(f"{what} is empty: give a file with text.")


def _named(spec: str, name: str, shards: int | None) -> Source:
    source, files = named.SOURCES[name], named.fetch(name, shards)
    if not files:
        return Source(spec, [InMemoryDocuments(tuple(_python_docs()))], source.licence)
    return Source(spec, [DocumentFile(file, separator=source.separator) for file in files], source.licence)


def load_hub(spec: str, field: str, errors: str) -> Source:
    """The training split of the Hugging Face data set `org/name` or `org/name:config`, downloaded by `datasets`."""
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
    except Exception as error:  # the hub's, the network's, and those of every format's reader
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"There is no file or folder {spec}, and it can't be fetched as a Hugging Face data set: {reason}"
        ) from None
    files = [DocumentFile(Path(file["filename"]), field, errors) for file in table.cache_files]
    return Source(_slug(spec.rpartition("/")[2]), files)


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


def spool(folder: Path, errors: str) -> Source:
    """The source of what comes in on stdin, spooled to a file in `folder`, because it is read more than once."""
    path = folder / "stdin"
    if sys.stdin is None:
        raise UserError("There is no stdin to read from.")
    with path.open("wb") as file:
        while block := sys.stdin.buffer.read(readers.BLOCK):
            file.write(block)
    return Source("stdin", [DocumentFile(path, errors=errors, name="stdin")])


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() in readers.COMPRESSED else path.stem


def _slug(text: str) -> str:
    """`text` as a name: what is not a letter, digit, _, . or - becomes a -."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "data"


def _python_docs() -> list[str]:
    """The language reference that every CPython carries, a document a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python has no pydoc_data.topics: give --data a text file, or use a full CPython."
        ) from None
    return [topics[name] for name in sorted(topics)]


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if readers.is_data_file(path) and path.is_file())


def _files_in(folder: Path) -> list[Path]:
    files = _data_files(folder)
    if not files:
        raise UserError(f"{folder} has no text files ({', '.join(readers.KINDS)}, {' or '.join(readers.COMPRESSED)}).")
    return files


def _matches(pattern: str) -> list[Path]:
    """The files that a glob matches, and those in the folders that it matches."""
    found = [Path(name) for name in sorted(glob.glob(str(expand(pattern)), recursive=True))]  # noqa: PTH207, it may be absolute
    files = [file for path in found for file in (_data_files(path) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"No file matches {pattern}.")
    return list(dict.fromkeys(files))


def _saved_to_disk(folder: Path) -> list[Path] | None:
    """The tables that `save_to_disk` of `datasets` wrote to a folder, of its split train; None for other folders."""
    splits = folder / "dataset_dict.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_text("utf-8"))["splits"]
            if "train" not in names:
                raise UserError(f"{folder} has no split called train: give the folder of one of {', '.join(names)}.")
            return _saved_to_disk(folder / "train")
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text("utf-8"))
            return [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder} is a damaged copy of a Hugging Face data set: save it again.") from None
    return None
