"""The names of the Metal kernels that a release of MLX was built with: `kernels-VERSION.txt.xz`, and how it is made.

    python -m tests.metal.kernels           the table of the installed release; downloads its wheels, 120 MB
    python -m tests.metal.kernels 0.32.4    that of another one
    python -m tests.metal.kernels WHEEL…    from wheels that are there

A table is of one release. pyproject.toml asks for `mlx>=0.32` without an upper bound, so CI installs releases that have
no table yet. Hence three tests: our calls are held to every table that is kept, whatever is installed; the newest table
is of a release that pyproject.toml admits, or the test fails with the command; and where the installed release has no
table, a test is skipped with the command. A new release breaks nothing on its own; a raised bound asks for a table.

A wheel for each macOS holds `mlx.metallib`. The one for macOS 26 has all kernels of the older one, and those for the
neural accelerators of M5 beside them: the table has the ones that all wheels hold, then those that only some do. It
also has the names of the Metal headers, since the templates of what MLX compiles at run time are among them.
"""

from __future__ import annotations

import importlib.metadata
import lzma
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
COMMAND = "python -m tests.metal.kernels"
PLATFORMS = ("macosx_15_0_arm64", "macosx_26_0_arm64")
METALLIB, HEADERS = "mlx/lib/mlx.metallib", "mlx/include/mlx/backend/metal/kernels/"


@dataclass(frozen=True, repr=False)
class Table:
    """The kernels of a release by their names: on any macOS, and beside them on macOS 26; and its Metal headers."""

    version: str
    everywhere: frozenset[str]
    newest: frozenset[str]
    headers: frozenset[str]


def tables() -> list[Path]:
    """The files that are kept, the oldest release first."""
    return sorted(FOLDER.glob("kernels-*.txt.xz"), key=lambda path: numbers(version(path)))


def version(path: Path) -> str:
    """The release that a table or a wheel is of."""
    return re.split(r"-", path.name.removesuffix(".txt.xz"))[1]


def numbers(version: str) -> tuple[int, ...]:
    """0.32.4 as (0, 32, 4), of what else it has as well."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def read(path: Path) -> Table:
    """The table that a file holds."""
    sections = lzma.decompress(path.read_bytes()).decode().split("\n\n")
    return Table(version(path), *(frozenset(section.split()) for section in sections))


def write(table: Table) -> Path:
    """Writes the file of a table; the same table gives the same bytes."""
    sections = ("\n".join(sorted(names)) for names in (table.everywhere, table.newest, table.headers))
    path = FOLDER / f"kernels-{table.version}.txt.xz"
    path.write_bytes(lzma.compress("\n\n".join(sections).encode(), preset=9 | lzma.PRESET_EXTREME))
    return path


def from_wheels(wheels: list[Path]) -> Table:
    """The table of a release from its wheels, the one for the oldest macOS first."""
    names, headers = [], frozenset[str]()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names.append(frozenset(function_names(archive.read(METALLIB))))
            found = (name.removeprefix(HEADERS) for name in archive.namelist() if name.startswith(HEADERS))
            headers = frozenset(name for name in found if name.endswith(".h"))
    everywhere = frozenset.intersection(*names)
    return Table(version(wheels[0]), everywhere, frozenset.union(*names) - everywhere, headers)


def function_names(metallib: bytes) -> Iterator[str]:
    """The names in the function list of a Metal library.

    The header, from MTLB on, has the list's offset at byte 24. The list is its length, then entries: each its own
    size, then tags of four letters with a two-byte size before their content, up to ENDT. All is little-endian.
    """
    if metallib[:4] != b"MTLB":
        raise ValueError("This is no Metal library: it doesn't begin with MTLB.")
    (offset,) = struct.unpack_from("<Q", metallib, 24)
    (count,) = struct.unpack_from("<I", metallib, offset)
    offset += 4
    for _ in range(count):
        (size,) = struct.unpack_from("<I", metallib, offset)
        yield tags(metallib[offset + 4 : offset + size])[b"NAME"].rstrip(b"\0").decode()
        offset += size


def tags(entry: bytes) -> dict[bytes, bytes]:
    """Tag -> content, of an entry of the function list."""
    found, offset = dict[bytes, bytes](), 0
    while (tag := entry[offset : offset + 4]) != b"ENDT":
        (size,) = struct.unpack_from("<H", entry, offset + 4)
        found[tag] = entry[offset + 6 : offset + 6 + size]
        offset += 6 + size
    return found


def download(version: str, folder: Path) -> list[Path]:
    """The wheels of a release, downloaded by pip."""
    for platform in PLATFORMS:
        wheel = ["--no-deps", "--only-binary=:all:", f"--platform={platform}", f"mlx-metal=={version}"]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *wheel], check=True)
    return sorted(folder.glob("*.whl"))


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels = sorted(Path(argument) for argument in arguments if argument.endswith(".whl"))
        wanted = arguments[0] if arguments else importlib.metadata.version("mlx")
        table = from_wheels(wheels or download(wanted, Path(folder)))
    path = write(table)
    counts = f"{len(table.everywhere):,} kernels, {len(table.newest):,} on the newest macOS alone"
    sys.stdout.write(f"{path}: {counts}, {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main(sys.argv[1:])
