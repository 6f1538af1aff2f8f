"""A model on disk, each of whose files is read once, whoever asks: for its format, its tensors, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from twingpt.core.checkpoint.safetensors_file import TensorFile
from twingpt.core.errors import UserError
from twingpt.core.reading import inside, read_json, read_text
from twingpt.core.tokenizer import Tokenizer
from twingpt.core.tokenizer import load as load_tokenizer

T = TypeVar("T")


class ModelDirectory:
    """A model's folder, or its one file; what was read of it is kept, and nobody changes it.

    That is JSON, safetensors headers and the tokenizer; tensors' data are read when asked for, and not kept. A
    file that can't be read is tried again by the next who asks, who then says what is wrong with it.
    """

    def __init__(self, path: Path, *, ignore_manifest: bool = False) -> None:
        self.path = path
        self.has_manifest = not ignore_manifest and (path / "manifest.json").exists()
        self._contents: dict[Path, tuple[Any, Any]] = {}  # what was read of each file, and which state of it

    def read_once(self, path: Path, reader: Callable[[Path], T]) -> T:
        """What `reader` makes of a file, which is read by the first call; a file has one reader."""
        if path not in self._contents:
            state = _state(path)
            self._contents[path] = reader(path), state
        content: T = self._contents[path][0]
        return content

    def check_unchanged(self) -> None:
        """Raise UserError where a file is another than was read: its tensors would not be where its header had them."""
        for path, (_, state) in self._contents.items():
            if _state(path) != state:
                raise UserError(f"{path} was changed after it was opened: run the command again.")

    def json(self, name: str, whole: str = "model directory") -> Any:
        """What a JSON file of the folder says; UserError where it isn't in this `whole`, or can't be read."""
        return self.read_once(inside(self.path, name, whole), read_json)

    def text(self, name: str) -> str:
        """A text file of the folder, as `json` reads one."""
        return self.read_once(inside(self.path, name), read_text)

    def json_object(self, name: str) -> dict[str, Any]:
        """As `json`; UserError too for what is no object."""
        content = self.json(name)
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name} is not a JSON object.")
        return content

    def tensor_file(self, name: str) -> TensorFile:
        """A safetensors file of the folder; UserError where it is missing, or not whole and sound."""
        return self.read_once(inside(self.path, name), TensorFile)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of tokenizer.json; UserError where that is missing or broken."""
        there = (self.path / "config.json").is_file()
        return load_tokenizer(self.path, self.json_object("config.json") if there else {})


def _state(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that was at `path` before; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
