"""The embedded corpus: the language reference and the docstrings that every CPython carries, without repetitions."""

from __future__ import annotations

import ast
import gzip
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from platform import python_version

from twingpt.core.errors import UserError
from twingpt.core.paths import home, write_atomically

RULES = 1  # of what is taken and how it reads; the cache's file has it in its name

# Folders of the library that document nothing for a reader, whole copies of other modules, and what some of the
# versions from 3.10 on have no more: so that the text is as much the same in all of them as it can be.
LEFT_OUT = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "site-packages", "dist-packages"),
    *("__pycache__", "_bundled", "distutils", "msilib", "__phello__"),
    *("_pydecimal.py", "_pydatetime.py", "_pyio.py", "_pylong.py", "_pyrepl"),
    *("aifc.py", "asynchat.py", "asyncore.py", "cgi.py", "cgitb.py", "chunk.py", "crypt.py", "imghdr.py", "imp.py"),
    *("mailcap.py", "nntplib.py", "pipes.py", "smtpd.py", "sndhdr.py", "sunau.py", "telnetlib.py", "uu.py"),
    *("xdrlib.py", "binhex.py", "formatter.py", "tix.py"),
}
RUN = 8  # words in a row: a paragraph of which half the runs stood in the text before repeats it
FEW_WORDS = 4  # a paragraph of fewer may stand in several places
SHORT = 200  # characters: what has fewer, without its repetitions, is no document


def topics() -> list[str]:
    """The language reference, a document a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python has no pydoc_data.topics: give --data a text file, or use a full CPython."
        ) from None
    return [topics[name] for name in sorted(topics)]


def documents() -> list[str]:
    """The language reference by topic, then the library by module; the topics alone where it has no sources here.

    Parsing takes seconds, so they are kept in a file under `home()`, by Python version.
    """
    cache = home() / "embedded" / f"python-{python_version()}-{RULES}.json.gz"
    with suppress(OSError, EOFError, ValueError, zlib.error):  # gzip checks what it reads
        return list(json.loads(gzip.decompress(cache.read_bytes())))
    found = without_repetitions([*topics(), *modules(Path(sysconfig.get_paths()["stdlib"]))])
    with suppress(OSError):  # where nothing can be written, it is parsed each time
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, gzip.compress(json.dumps(found).encode(), mtime=0))
    return found


def modules(library: Path) -> Iterator[str]:
    """The docstrings of each module under the folder `library`, by its name; parsed, never imported."""
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        parts = path.relative_to(library).parts
        if LEFT_OUT.isdisjoint(parts) and not parts[0].startswith("config-"):
            with suppress(OSError, SyntaxError, ValueError):  # a file that this Python doesn't read is left out
                text = module_text(".".join(parts).removesuffix(".py").removesuffix(".__init__"), path.read_bytes())
                text.encode()  # as is one with half a surrogate pair
                yield text


def module_text(name: str, source: bytes) -> str:
    """A module's docstring, then those of its classes, methods and functions, each below its signature."""
    module = ast.parse(source)
    return "\n\n".join(filter(None, [name, ast.get_docstring(module), *_entries(module, "")]))


def _entries(parent: ast.AST, owner: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, (ast.If, ast.Try)):  # as by platform
            yield from _entries(node, owner)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if docstring := ast.get_docstring(node):
                yield f"{_signature(node, owner)}\n\n{docstring}"
            if isinstance(node, ast.ClassDef):
                yield from _entries(node, f"{owner}{node.name}.")


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> str:
    """As pydoc has it, without annotations, `self` and `cls`: what differs least between versions."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {owner}{node.name}" + (f"({bases})" if bases else "")
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in filter(None, named):
        argument.annotation = None
    if owner and arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    return f"{owner}{node.name}({ast.unparse(arguments)})"


def without_repetitions(texts: Iterable[str]) -> list[str]:
    """The documents without the paragraphs that repeat earlier ones, and without what is SHORT then."""
    seen: set[tuple[str, ...]] = set()
    documents = []
    for text in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            words = paragraph.split()
            runs = [tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))]
            if len(words) >= FEW_WORDS:
                if 2 * sum(run in seen for run in runs) >= len(runs):
                    continue
                seen.update(runs)
            kept.append(paragraph)
        document = "\n\n".join(kept)
        if len(document) >= SHORT:
            documents.append(document)
    return documents
