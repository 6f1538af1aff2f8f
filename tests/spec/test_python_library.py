"""The embedded corpus: what it takes from the library, how it reads, that it repeats nothing, and its cache."""

import gzip
import json

import pytest

from twingpt.data import python_library
from twingpt.data.python_library import documents, module_text, modules, without_repetitions
from twingpt.data.split import DEFAULT

SOURCE = '''"""Tools for tools."""

import sys

def plain(a: int, /, b=1, *rest, c: str = "x", **more) -> None:
    """Does it.

    At once:

        indented
    """

async def later(self): "Later."

def silent(): pass

if sys.platform == "win32":
    def windows(): """Only there."""
else:
    try:
        def posix(): """Only here."""
    except ImportError:
        pass

class Tool(Base, metaclass=Meta):
    """A tool."""

    def use(self, how=None):
        """Use it."""
        def inner(): """Nobody calls it."""

    @classmethod
    def make(cls): """Make one."""

    @staticmethod
    def parse(text): """From text."""

    class Part:
        """Of a tool."""
'''

TEXT = """tools

Tools for tools.

plain(a, /, b=1, *rest, c='x', **more)

Does it.

At once:

    indented

later(self)

Later.

windows()

Only there.

posix()

Only here.

class Tool(Base)

A tool.

Tool.use(how=None)

Use it.

Tool.make()

Make one.

Tool.parse(text)

From text.

class Tool.Part

Of a tool."""


def test_how_a_module_reads():
    assert module_text("tools", SOURCE.encode()) == TEXT


def test_what_is_taken_and_in_which_order(tmp_path):
    files = {
        "b.py": '"""B."""',
        "a/__init__.py": '"""A."""',
        "a/c.py": '"""C."""',
        "latin.py": b'# -*- coding: latin-1 -*-\n"""caf\xe9"""',
        "future.py": "def new(: pass",
        "half.py": '"""\\ud800"""',
        "zero.py": b"\0",
        "a/test/d.py": '"""no"""',
        "site-packages/e.py": '"""no"""',
        "config-3.11-x86_64-linux-gnu/f.py": '"""no"""',
        "telnetlib.py": '"""no"""',
        "notes.txt": "no",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert [*modules(tmp_path)] == ["a\n\nA.", "a.c\n\nC.", "b\n\nB.", "latin\n\ncafé"]
    assert [*modules(tmp_path / "python311.zip")] == []  # a Python without sources


def test_paragraphs_that_stood_before_are_left_out(monkeypatch):
    monkeypatch.setattr(python_library, "SHORT", 20)
    one = "The quick brown fox jumps over the lazy dog again and again."
    other = "The quick brown fox jumps over the lazy dog, then rests for a while under an old and quiet tree."
    assert without_repetitions([f"{one}\n\n{one}\n\nSee also:\n", f"{one}\n\nNo."]) == [f"{one}\n\nSee also:"]
    assert without_repetitions([one, other, f"\n\n{one.upper()}"]) == [one, other, one.upper()]


def test_the_corpus_repeats_itself_hardly(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path))
    found = documents()
    assert any('The "assert" statement' in document for document in found)  # the language
    assert any(document.startswith("argparse\n\nCommand-line parsing library") for document in found)  # the library
    assert 1_500_000 < sum(map(len, found)) < 2_500_000 and all(len(document) >= 200 for document in found)
    runs = {"train": set(), "val": set()}
    for document in found:
        words = document.split()
        runs[DEFAULT.of(document)].update(" ".join(words[i : i + 12]) for i in range(len(words) - 11))
    assert len(runs["val"]) > 5000 and len(runs["val"] & runs["train"]) < 0.01 * len(runs["val"])


@pytest.mark.parametrize("damage", [b"", b"not gzip", "cut", "flipped"])
def test_the_cache_is_read_only_if_it_is_whole(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(python_library, "topics", lambda: ["A topic of some words. " * 20])
    monkeypatch.setattr(python_library, "modules", lambda folder: calls.append(folder) or [])
    found = documents()
    assert documents() == found and len(calls) == 1
    (cache,) = (tmp_path / "embedded").iterdir()
    kept = cache.read_bytes()
    middle = len(kept) // 2
    damaged = {"cut": kept[:-9], "flipped": kept[:middle] + bytes([kept[middle] ^ 255]) + kept[middle + 1 :]}
    cache.write_bytes(damaged.get(damage, damage))
    assert documents() == found and len(calls) == 2
    assert json.loads(gzip.decompress(cache.read_bytes())) == found


def test_without_a_place_for_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(python_library, "topics", lambda: ["A topic of some words. " * 20])
    monkeypatch.setattr(python_library, "modules", lambda folder: [])
    assert documents() == [("A topic of some words. " * 20).strip("\n")]
