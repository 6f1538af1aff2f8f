"""Words of the command lines that are printed for a user to copy."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path


def quote(word: str | Path) -> str:
    """A word of a command line, quoted for the shell that a user of this system copies it to."""
    if sys.platform == "win32":  # cmd.exe takes a single quote for a part of the word
        return subprocess.list2cmdline([str(word)])
    return shlex.quote(str(word))
