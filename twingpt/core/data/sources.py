"""Where text comes from: the embedded default, a known download, or the user's own files."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import expand, home

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
NAMED = ("python-docs", "shakespeare")

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Source:
    """Some documents under a short name."""

    name: str
    documents: list[str]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the documents, in order."""
        sha = hashlib.sha256()
        for document in self.documents:
            content = document.encode()
            sha.update(len(content).to_bytes(8, "little") + content)
        return sha.hexdigest()


def load(spec: str) -> Source:
    """The source called `spec`: a name in NAMED, or the path of a text file or of a folder of them.

    Raises UserError where there is nothing to read, or what there is is not UTF-8 text.
    """
    if spec == "python-docs":
        return Source(spec, _python_docs())
    if spec == "shakespeare":
        return Source(spec, [_shakespeare().decode()])
    if not spec:
        raise UserError(f"--data is empty: give a file, a folder, or one of {', '.join(NAMED)}.")
    path = expand(spec)
    if path.is_dir():
        return Source(path.resolve().name, _folder(path))
    if path.is_file():
        return Source(path.stem, [_text_file(path)])
    if path.exists():
        raise UserError(f"{spec} is neither a regular file nor a folder: save its text to a file first.")
    if path.suffix or os.sep in spec:
        raise UserError(f"There is no file or folder {spec}: check the path given to --data.")
    raise unknown_choice("data source", spec, NAMED)


def _python_docs() -> list[str]:
    """The language reference that every CPython carries, a document a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python has no pydoc_data.topics: give --data a text file, or use a full CPython."
        ) from None
    return [topics[name] for name in sorted(topics)]


def _text_file(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}.") from None
    if not text.strip():
        raise UserError(f"{path} is empty: give --data a file with text.")
    return text


def _folder(folder: Path) -> list[str]:
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in TEXT_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not paths:
        raise UserError(f"{folder} has no text files ({', '.join(TEXT_SUFFIXES)}).")
    return [_text_file(path) for path in paths]


def _shakespeare() -> bytes:
    path = home() / "downloads" / "tinyshakespeare.txt"
    content = path.read_bytes() if path.exists() else _download(SHAKESPEARE_URL, path)
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not Tiny Shakespeare (its SHA-256 differs): delete it and try again.")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(content)
        temporary.replace(path)
    return content


def _download(url: str, path: Path) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content: bytes = response.read()
            return content
    except (OSError, urllib.error.URLError) as error:
        raise UserError(f"{url} can't be fetched ({error}): put the file at {path}, or give --data its path.") from None
