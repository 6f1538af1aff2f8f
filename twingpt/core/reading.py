"""Reading untrusted files: paths that stay within their folder, JSON of a bounded size, values quoted in messages."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from twingpt.core.errors import UserError

MAX_JSON = 2**22  # bytes: an index of 4096 layers; parsing takes 30 times the memory, and for more seconds

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


def short(value: object) -> str:
    """A value from a file, for a message: `repr` on one line, cut in length and depth."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of very many digits"
    return " ".join(text.split())


def inside(folder: Path, name: str, whole: str = "model directory") -> Path:
    """The path of a file of `folder`; UserError where it is missing, no plain file, or leads out of the folder."""
    path = folder / name
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{folder} names a file {short(name)}, which is not in it: it is not opened.")
    if not path.is_file():
        raise UserError(f"{folder} is not a whole {whole}: {name} is missing.")
    if path.is_symlink():
        base, real = folder.resolve(), path.resolve()
        hub = real.parent.name == "blobs" and real.parent.parent / "snapshots" in base.parents  # of huggingface_hub
        if real.parent != base and not hub:
            raise UserError(f"{path} is a link to {real}, out of its directory: it is not opened.")
    return path


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """Parse a JSON file; UserError where it can't be read, is not JSON, or has more than `most` bytes."""
    return parse_json(read_text(path, most), path)


def read_text(path: Path, most: int = MAX_JSON) -> str:
    """Read a UTF-8 text file, BOM or not; UserError where it can't be read, or has more than `most` bytes."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block, and a device never end
            raise UserError(f"{path} can't be read: it is not a file.")
        if (size := path.stat().st_size) > most:
            raise UserError(f"{path} can't be read: it has {size:,} bytes, and at most {most:,} are read.")
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} can't be read as JSON: {error}.") from None


def parse_json(text: str, path: Path) -> Any:
    """What a JSON text says; UserError, which names the file that it was read from, where it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{path} can't be read: it is nested too deeply.") from None
    except ValueError as error:
        raise UserError(f"{path} can't be read as JSON: {error}.") from None
