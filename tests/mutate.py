"""Files as an enemy or a bad disk would leave them: mutations of a good one, by a seeded generator."""

import functools
import io
import json
import os
import pickletools
import random
import re
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from twingpt.core.errors import UserError

NUMBERS = [
    "NaN", "Infinity", "-1", "0", "1.5", "1e999", "1e300", "65536", "999999", "1000000", str(2**31), str(2**63),
    str(2**64 + 1), "9" * 400, "9" * 5000, "true",
]  # fmt: skip
OTHERS = [
    "null",
    '""',
    "[]",
    "{}",
    '"../../etc/passwd"',
    '"\\ud800"',
    "[" * 30_000,
    "[" * 950 + "]" * 950,
    '{"a":' * 30_000,
    '"' + "x" * 9999,
]

# The memory that reading a file may take is a constant and TIMES the file's bytes: the bytes themselves, and
# the text or the array that is made of them. The constants are what was measured, with a third to spare.
TIMES = 2.5
DENSE = 40  # instead, for JSON of little but braces: 28 was measured for `{"":1},`, and is 37 before Python 3.11
HASHING = 2**18  # a file is hashed in pieces of so many bytes
# Of Python's objects and NumPy's arrays, as tracemalloc counts them. Lists within lists down to Python's own
# limit, of which each takes 100 bytes, are most of it; that is a thousand, and ten thousand in Python 3.13.
ROOM = 2**18 if sys.version_info < (3, 12) else 2**22
# Of the process, in a soak: Python takes memory by the megabyte, malloc more for a large piece, Linux two
# megabytes where its pages are huge, and it counts in batches.
RESIDENT = 2**22
# Which are no memory yet: libraries that are opened late, and what malloc reserves for each of a library's threads.
ADDRESSES = 2**29 + 2**27 * (os.cpu_count() or 1)
# One file of so many is read with tracemalloc, which takes thrice the time; primes, to meet all kinds.
TRACED, TRACED_IN_SOAK = 5, 47


class Judge:
    """Tells of each mutated file whether it was read; fails unless it was, or was refused in one sentence.

    It fails too where that took more of Python's memory than `room` and `times` the file. In a soak it also
    looks at the process: at most a second of the processor's time, and, on Linux, `resident` bytes more and
    `times` the file. What is over once is judged again, as modules are imported late. A failure names the
    seed and the file's number, with which the same run comes to the same file.
    """

    def __init__(self, seed: int = 0, room: int = ROOM, times: float = TIMES, *, soak: bool = False) -> None:
        self.seed, self.room, self.times, self.resident, self.soak = seed, room, times, RESIDENT, soak
        self.read = self.refused = 0
        self._files = _proc_files() if soak else None
        self._addresses = 0

    @property
    def judged(self) -> int:
        """How many files it has judged."""
        return self.read + self.refused

    def __call__(self, read: Callable[[], object], size: int) -> bool:
        for _ in range(3):
            try:
                sound, problem = self._measure(read, size)
                if self.judged % (TRACED_IN_SOAK if self.soak else TRACED) == 0:
                    problem += self._traced(read, size)
            except Exception as error:
                raise AssertionError(f"{type(error).__name__} from {self}: {str(error)[:500]}") from error
            if not problem:
                break
        assert not problem, f"{problem} to read {self}, of {size} bytes"
        self.read += sound
        self.refused += not sound
        return sound

    def __str__(self) -> str:
        return f"file {self.judged} of seed {self.seed}"

    def _measure(self, read: Callable[[], object], size: int) -> tuple[bool, str]:
        """Whether the file was read, and what of the machine's it took too much of."""
        before, begin, sound = self._memory(), time.process_time(), True
        try:
            read()
        except UserError as error:
            sound = False
            assert "\n" not in str(error) and len(str(error)) < 1500, f"{str(error)[:2000]!r} is not one sentence"
        took, (resident, addresses) = time.process_time() - begin, self._memory()
        self._addresses = self._addresses or addresses  # after the first, which opens libraries
        problem = f"{took:.1f} s" if self.soak and took > 1 else ""
        for kind, taken, room in (
            ("memory", resident - before[0], self.resident),
            ("addresses", addresses - self._addresses, ADDRESSES),
        ):
            if taken > room + self.times * size:
                problem += f" {taken} bytes of {kind}"
        return sound, problem

    def _traced(self, read: Callable[[], object], size: int) -> str:
        """Too much of Python's memory for the file, in words; empty where it was not."""
        tracemalloc.start()
        try:
            with suppress(UserError):
                read()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        return f" {peak} bytes of Python's memory" if peak > self.room + self.times * size else ""

    def _memory(self) -> tuple[int, int]:
        """The most resident memory since the last call, and the most addresses ever, in bytes."""
        if self._files is None:
            return 0, 0
        status, clear = self._files
        found = re.search(rb"VmPeak:\s+(\d+) kB.*VmHWM:\s+(\d+) kB", os.pread(status, 2**14, 0), re.DOTALL)
        with suppress(OSError):  # a kernel that can't
            os.pwrite(clear, b"5", 0)  # begins again
        return (int(found[2]) * 1024, int(found[1]) * 1024) if found else (0, 0)


@functools.cache
def _proc_files() -> tuple[int, int] | None:
    """Where Linux tells of this process's memory, open for all judges, and where it is told to begin again."""
    try:
        return os.open("/proc/self/status", os.O_RDONLY), os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return None


def overwrite(path: Path, content: bytes) -> None:
    """Write a file over the one that is there; a tenth of the time that making it anew takes."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0))
    try:
        os.write(file, content)
        os.ftruncate(file, len(content))
    finally:
        os.close(file)


def mutations(content: bytes, seed: int, n: int, text: Callable[[bytes], tuple[int, int]]) -> Iterator[bytes]:
    """Yield `n` mutations of `content`, whose JSON lies between the two positions that `text` tells."""
    chance = random.Random(seed)
    start, end = text(content)
    for _ in range(n):
        if chance.random() < 0.4:
            yield bytes_changed(content, chance)
        else:
            changed = json_changed(content[start:end].decode(), chance).encode("utf-8", "surrogatepass")
            head = content[:start]
            if start == 8 and chance.random() < 0.8:  # a safetensors header that says its length rightly
                head = len(changed).to_bytes(8, "little")
            yield head + changed + content[end:]


def bytes_changed(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut out or put in, mostly near the beginning."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = min(int(chance.expovariate(1 / 300)), max(len(changed) - 1, 0))
        kind = chance.randrange(4)
        if kind == 0 and changed:
            changed[at] = chance.randrange(256)
        elif kind == 1:
            del changed[at : at + chance.choice([1, 2, 8, 1000])]
        elif kind == 2:
            changed[at:at] = chance.randbytes(chance.choice([1, 2, 8, 1000]))
        else:
            del changed[chance.randrange(len(changed) + 1) :]
    return bytes(changed)


def json_changed(text: str, chance: random.Random) -> str:
    """A number, a string, a key or a whole value replaced, repeated or taken away; not always JSON any more."""
    value, places = json.loads(text), _places(text)
    *path, key = chance.choice(places)
    parent = _at(value, path)
    kind = chance.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[chance.choice(["x", "__metadata__", key + "x", ""])] = parent.pop(key)
    elif kind == 2:
        parent[key] = json.loads(json.dumps(_at(value, chance.choice(places))))
    elif kind == 3 and isinstance(parent, dict):  # the same name twice
        mark = "\x00twice"
        parent[mark] = parent[key]
        return json.dumps(value).replace(json.dumps(mark), json.dumps(key))
    else:
        parent[key] = "\x00mark"
        return json.dumps(value).replace(json.dumps("\x00mark"), chance.choice(NUMBERS + OTHERS))
    return json.dumps(value)


@functools.lru_cache(4)
def _places(text: str) -> list[tuple[str | int, ...]]:
    """Where the values of a JSON text are, each by the keys that lead to it."""
    value, places = json.loads(text), [()]
    for path in places:
        places += [(*path, key) for key in _keys(_at(value, path))]
    return places[1:]


def _at(value: Any, path: Iterable[str | int]) -> Any:
    for key in path:
        value = value[key]
    return value


# What a pickle of plain values and tensors does not hold, or not in this place.
OPERATIONS = [
    b"N", b"\x88", b"0", b"2", b"(", b"R", b"Q", b"b", b"\x81", b"\x85" * 2000, b"]" * 2000, b"J\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff", b"K\0", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\0",
    b"\x8b\xff\xff\xff\x7f", b"G\x7f\xf8" + bytes(6), b"X\xff\xff\xff\x7fx", b"X\1\0\0\0x", b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\xff", b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n",
    b"ctorch\nSize\n", b"ccollections\nOrderedDict\n)R", b"X\5\0\0\0touch\x85R",
]  # fmt: skip
# Of a number's place: in a shape, a stride, an offset into a storage or its length.
INTEGERS = [
    b"K\0", b"K\1", b"K\7", b"M\0\1", b"J\xff\xff\xff\xff", b"J\0\0\0\x80", b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x08" + bytes(7) + b"\x80", b"\x8a\x06" + bytes(5) + b"\1",
    b"\x8a\x09" + b"\xff" * 8 + b"\0", b"G\x7f\xf8" + bytes(6), b"\x88", b"N",
]  # fmt: skip


class SavedByTorch:
    """A file of torch.save, and mutations of it: of its bytes, of its zip file's records, and of its pickle.

    `content` is the same without what its pickle remembers in vain, a third of it, which takes torch as long.
    """

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            self._records = {name: archive.read(name) for name in archive.namelist()}
        self._name = next(name for name in self._records if name.endswith("data.pkl"))
        content = pickletools.optimize(self._records.pop(self._name))
        steps = list(pickletools.genops(content))
        starts = [at or 0 for _, _, at in steps] + [len(content)]
        self._parts = [content[start:end] for start, end in pairwise(starts)]
        self._integers = [i for i, (_, argument, _) in enumerate(steps) if type(argument) is int]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, record in self._records.items():
                archive.writestr(name, record)
        whole = file.getvalue()
        self._body, self._directory = whole[: archive.start_dir], whole[archive.start_dir : -22]
        self.content = self.with_pickle(content)

    def mutations(self, seed: int, n: int) -> Iterator[bytes]:
        """Yield `n` mutations, three of eight of the pickle."""
        chance = random.Random(seed)
        for i in range(n):
            if i % 8 in (0, 1):
                yield bytes_changed(self.content, chance)
            elif i % 8 == 2:
                yield self._record_changed(chance)
            elif i % 8 in (3, 4):  # the directory of the zip file
                yield self.content[:-1000] + bytes_changed(self.content[-1000:], chance)
            else:
                yield self.with_pickle(self._pickle_changed(chance))

    def _pickle_changed(self, chance: random.Random) -> bytes:
        """A number of the pickle replaced, or an operation taken away, repeated, exchanged or replaced by a bad one."""
        parts = list(self._parts)
        if chance.random() < 0.4:
            for at in chance.sample(self._integers, chance.choice([1, 1, 2])):
                parts[at] = chance.choice(INTEGERS)
            return b"".join(parts)
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            at, other, kind = chance.randrange(len(parts)), chance.randrange(len(parts)), chance.randrange(5)
            if kind == 0 and len(parts) > 1:
                del parts[at]
            elif kind == 1:
                parts.insert(other, parts[at])
            elif kind == 2:
                parts[at], parts[other] = parts[other], parts[at]
            elif kind == 3:
                parts.insert(at, chance.choice(OPERATIONS))
            else:
                parts[at] = chance.choice(OPERATIONS)
        return b"".join(parts)

    def with_pickle(self, content: bytes) -> bytes:
        """The zip file with another pickle, its last record: by hand, as zipfile takes ten times as long."""
        name, check, n = self._name.encode(), zlib.crc32(content), len(self._records) + 1
        sizes = struct.pack("<IIIHH", check, len(content), len(content), len(name), 0)
        body = self._body + struct.pack("<IHHHHH", 0x04034B50, 20, 0, 0, 0, 33) + sizes + name + content
        entry = struct.pack("<IHHHHHH", 0x02014B50, 20, 20, 0, 0, 0, 33) + sizes
        directory = self._directory + entry + struct.pack("<HHHII", 0, 0, 0, 0, len(self._body)) + name
        return body + directory + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, n, n, len(directory), len(body), 0)

    def _record_changed(self, chance: random.Random) -> bytes:
        """A record of the zip file cut, made longer, taken away, exchanged with another, compressed, or there twice."""
        records = [*self._records.items(), (self._name, b"".join(self._parts))]
        at, other, kind = chance.randrange(len(records)), chance.randrange(len(records)), chance.randrange(6)
        (name, content), (_, another) = records[at], records[other]
        if kind == 0:
            records[at] = name, content[: chance.randrange(len(content) + 1)]
        elif kind == 1:
            records[at] = name, content + chance.randbytes(chance.choice([1, 4, 4000]))
        elif kind == 2:
            del records[at]
        elif kind == 3:
            records[at] = name, another
        elif kind == 4:
            records.append((name, another))
        file = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
            warnings.simplefilter("ignore")  # of a name twice
            for i, (name, content) in enumerate(records):
                archive.writestr(name, content, zipfile.ZIP_DEFLATED if kind == 5 and i == at else None)
        return file.getvalue()


def whole(content: bytes) -> tuple[int, int]:
    """Where the JSON of a JSON file is."""
    return 0, len(content)


def header_at(content: bytes) -> tuple[int, int]:
    """Where the JSON of a safetensors file is."""
    return 8, 8 + int.from_bytes(content[:8], "little")


def _keys(value: object) -> list:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []
