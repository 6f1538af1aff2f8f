"""The sources that have a name: what they are, where they come from, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One named source."""

    name: str
    licence: str
    size: int | None = None  # bytes to download; None where nothing is
    address: str | None = None
    sha256: str | None = None


TABLE = (
    Row("python-docs", "PSF-2.0"),
    Row(
        "shakespeare",
        "public domain",
        1_115_394,
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
)
NAMES = tuple(row.name for row in TABLE)
