"""Named sources: the data sets that --data knows by name, with licence, address and digests; and fetching them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from platform import python_version
from typing import Any

from twingpt.core.errors import UserError
from twingpt.core.paths import home, write_atomically
from twingpt.data import download, python_library

TINYSTORIES = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
OPENWEBTEXT = "79d93d786212f7344586290adb811d4ae6a1762c"
FINEWEB_EDU = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
HUB = "https://huggingface.co/datasets"


@dataclass(frozen=True)
class RemoteFile:
    """A file to download: its address, its path below `home()/downloads`, and what it must be, where that is known."""

    path: str
    url: str
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True)
class NamedSource:
    """A data set known by name; one without files comes with Python."""

    name: str
    licence: str
    address: str
    size: int | None  # bytes to download in all; None where it depends on the Python
    revision: str | None = None  # the commit that the files are of
    files: tuple[RemoteFile, ...] = ()
    default: int | None = None  # shards that the name alone stands for; None: all, and NAME@SHARDS is an error
    separator: str | None = None  # the line of a text file that ends a document


# Sizes and digests of fineweb-edu's sample of 10B tokens at its revision.
_FINEWEB_EDU = (
    (2152819114, "b1ba7b2ce4cb5ea6ef42dca40263eabb85f37700d01693a68e9b30a31d78e871"),
    (2152222432, "3fcf2dc69cd52503986276d3d2d26a8c356d0f2ea28a0de4fdbda8cf87755693"),
    (2151796315, "547ae182d132c9f06b6ce63149567208ea9f57630bfd9b1a2938e504f0c9ebd7"),
    (2152437524, "22184e6eb25759ddd97783751ffc73e1705dfa2542e630dae1f2a8bac8ee6ddb"),
    (2152338550, "33557ddd87a07a4ae6fcaf7a4789c7b484e5cc0c273ca12a65b74200e6d8748b"),
    (2152189947, "e08d79927ecb377786572cd854817c748ceb8880878b1a0eb91abf8c85d505ea"),
    (2152689867, "554fa2613c9261d6c9c396caab881de3160175794c6c3e1856bf28a0e9cb9b76"),
    (2150686637, "4b7d1f697d4afff7f5f65cb7aa4d83acc6db716da4d46ea23399d0c50608c6e3"),
    (2151274846, "a6d9dcc0c72ecd7c7f0173c2d06b3a4249a2ccaa94961469d1a522ca689bbf1a"),
    (2151913277, "f836cd3c70b95776699eb6c356b2dbf702816e25dcf39992f5c80a29029d23c3"),
    (2152798864, "e5a2eae25f057f0856a10bfae314c6ca8ea8bb08456d2131e9e89b2b8305e2f6"),
    (2152323681, "db71cf0425bb3d1813a09f12ff1acd6dabdfb91a2e4f141960254ee5a7f036e7"),
    (2152069689, "08b47a3e1c25161f796d2f8dbf99ccf60affdebdcea4910833d0d5783315551f"),
    (540632672, "b393f51fefab26cd6f4c8f65707c1924f6666c4961a0ebebe04bb57f7ec832de"),
)

# What needs no download, and what gives its documents.
EMBEDDED = {"python-library": python_library.documents, "python-docs": python_library.topics}

TABLE = (
    NamedSource("python-library", "PSF-2.0", "https://docs.python.org/3/library/", None, f"Python {python_version()}"),
    NamedSource("python-docs", "PSF-2.0", "https://docs.python.org/3/reference/", None, f"Python {python_version()}"),
    NamedSource(
        "shakespeare",
        "public domain",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394,
        files=(
            RemoteFile(
                "tinyshakespeare.txt",
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
    ),
    NamedSource(
        "tinystories",
        "CDLA-Sharing-1.0",
        f"{HUB}/roneneldan/TinyStories",
        2_227_753_162,
        TINYSTORIES,
        (
            RemoteFile(
                "tinystories/TinyStoriesV2-GPT4-train.txt",
                f"{HUB}/roneneldan/TinyStories/resolve/{TINYSTORIES}/TinyStoriesV2-GPT4-train.txt",
                2_227_753_162,
                "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
            ),
        ),
        separator="<|endoftext|>",
    ),
    NamedSource(
        "openwebtext",
        "CC0-1.0",  # of the collection; the pages are their authors'
        f"{HUB}/Skylion007/openwebtext",
        24_193_092_408,
        OPENWEBTEXT,
        tuple(  # checked against the size and the SHA-256 that the hub states at this revision
            RemoteFile(
                f"openwebtext/train-{i:05d}-of-00080.parquet",
                f"{HUB}/Skylion007/openwebtext/resolve/{OPENWEBTEXT}/plain_text/train-{i:05d}-of-00080.parquet",
            )
            for i in range(80)
        ),
        default=80,
    ),
    NamedSource(
        "fineweb-edu",
        "ODC-By-1.0",
        f"{HUB}/HuggingFaceFW/fineweb-edu",
        sum(size for size, _ in _FINEWEB_EDU),
        FINEWEB_EDU,
        tuple(
            RemoteFile(
                f"fineweb-edu/{i:03d}_00000.parquet",
                f"{HUB}/HuggingFaceFW/fineweb-edu/resolve/{FINEWEB_EDU}/sample/10BT/{i:03d}_00000.parquet",
                size,
                sha256,
            )
            for i, (size, sha256) in enumerate(_FINEWEB_EDU)
        ),
        default=1,
    ),
)
SOURCES = {source.name: source for source in TABLE}
NAMES = tuple(SOURCES)


def parse(spec: str) -> tuple[str, int | None] | None:
    """Name and number of shards in NAME or NAME@SHARDS; None where `spec` begins with no name of TABLE."""
    name, at, number = spec.partition("@")
    if name not in SOURCES:
        return None
    if at and not (number.isascii() and number.isdecimal()):
        raise UserError(f"{spec}: after the @ stands the number of shards, as in fineweb-edu@8.")
    return name, int(number) if at else None


def fetch(name: str, shards: int | None = None, progress: download.Progress | None = None) -> list[Path]:
    """Download the files of a source, or its first `shards`, unless they are here; no files where it is embedded.

    Without `progress` a bar is shown where stderr is a terminal. Raises UserError where a file can't be had, which
    says what to put where, and where a file is not what TABLE says.
    """
    wanted = _shards(SOURCES[name], shards)
    with nullcontext(progress) if progress else download.bar() as report:
        for file in wanted:
            try:
                _fetch(name, file, report)
            except download.DownloadError as error:
                path, missing = _local_path(file), sum(not _local_path(file).exists() for file in wanted)
                others = f" and {missing - 1} more of {path.parent}" if missing > 1 else ""
                raise UserError(
                    f"{name} needs {path.name}{others}, but {error}: download it from {file.url} and put it at {path}."
                ) from None
    return [_local_path(file) for file in wanted]


def _shards(source: NamedSource, shards: int | None) -> tuple[RemoteFile, ...]:
    if shards is None:
        return source.files[: source.default]
    if source.default is None:
        raise UserError(f"{source.name} has no shards: leave out @{shards}.")
    if not 1 <= shards <= len(source.files):
        raise UserError(f"{source.name} has 1 to {len(source.files)} shards, and {shards} are asked for.")
    return source.files[:shards]


def _local_path(file: RemoteFile) -> Path:
    return home() / "downloads" / file.path


def _fetch(name: str, file: RemoteFile, progress: download.Progress) -> None:
    path = _local_path(file)
    if path.exists():
        _check(name, file, path, progress)
    else:
        _record(path, download.download(file.url, path, file.size, file.sha256, progress))


def _check(name: str, file: RemoteFile, path: Path, progress: download.Progress) -> None:
    """Raise UserError unless the file at `path` has the SHA-256 of TABLE, or that of its record where TABLE has none.

    It is read for that only where its size or date are not those of its record.
    """
    record = {}
    with suppress(OSError, ValueError, TypeError, RecursionError):
        record = dict(json.loads(_record_path(path).read_text("utf-8")))
    expected = file.sha256 or record.get("sha256")
    if expected and record == {"sha256": expected, **_stamp(path)}:
        return
    size = path.stat().st_size
    if file.size not in (None, size):
        raise UserError(f"{path} has {size:,} bytes, and {name}'s file has {file.size:,}: delete it and try again.")
    sha256 = download.digest(path, partial(progress, f"checking {path.name}"))
    if sha256 != (expected or sha256):
        raise UserError(f"{path} is not {name}'s file, its SHA-256 differs: delete it and try again.")
    _record(path, sha256)


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _record(path: Path, sha256: str) -> None:
    """Write a file's SHA-256, size and date beside it, so that it need not be read for them the next time."""
    with suppress(OSError):  # where that can't be written, the digest is computed each time
        write_atomically(_record_path(path), json.dumps({"sha256": sha256, **_stamp(path)}))


def describe() -> Iterator[dict[str, Any]]:
    """TABLE as JSON objects, with each file's whole path, and whether it is downloaded."""
    for source in TABLE:
        places = [(file, _local_path(file)) for file in source.files]
        files = [asdict(file) | {"path": str(path), "downloaded": path.is_file()} for file, path in places]
        yield asdict(source) | {"size": source.size or _embedded_size(source.name), "files": files}


def _embedded_size(name: str) -> int | None:
    try:
        return sum(len(text.encode()) for text in EMBEDDED[name]())
    except UserError:  # this Python doesn't carry it
        return None
