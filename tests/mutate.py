"""Files as an enemy or a bad disk would leave them: mutations of a good one, by a seeded generator."""

import json
import pickletools
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from twingpt import UserError

NUMBERS = [
    "NaN", "Infinity", "-1", "0", "1.5", "1e999", "1e300", "1000000", str(2**31), str(2**63), str(2**64 + 1),
    "9" * 400, "9" * 5000, "true",
]  # fmt: skip
ROOM = 2**24  # bytes: what allocators take at a time, and a module that is imported
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


class Judge:
    """Tells of each mutated file whether it was read; fails unless it was, or was refused in one sentence.

    It fails too where that took more than a second of work, or more memory than the file has bytes:
    but for a constant, and for Python's objects, which are larger than their text. Memory is known on Linux alone.
    """

    def __init__(self) -> None:
        self.read = self.refused = 0
        self._peak = Path("/proc/self/clear_refs") if sys.platform == "linux" else None

    def __call__(self, read: Callable[[], object], size: int) -> bool:
        for _ in range(3):  # a module imported late and a collection of garbage happen once, a greedy reader each time
            sound, took, taken = self._measure(read)
            if took < 1 and taken < ROOM + 30 * size:
                break
        assert took < 1, f"{took} s of work"
        assert taken < ROOM + 30 * size, f"{taken} bytes taken to read {size}"
        self.read += sound
        self.refused += not sound
        return sound

    def _measure(self, read: Callable[[], object]) -> tuple[bool, float, int]:
        """Whether the file was read, in how many seconds of work and how many bytes of memory."""
        begin, before, sound = time.process_time(), self._memory(), True
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, f"{str(error)[:2000]!r} is not one sentence"
            sound = False
        return sound, time.process_time() - begin, self._memory() - before

    def _memory(self) -> int:
        """The most resident memory since the last call, in bytes."""
        if self._peak is None:
            return 0
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        try:
            self._peak.write_bytes(b"5")  # begins again
        except OSError:  # a kernel that can't
            return 0
        return int(found[1]) * 1024 if found else 0


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
    value = json.loads(text)
    parents = [(value, key) for key in _keys(value)]
    for parent, key in parents:
        parents += [(parent[key], inner) for inner in _keys(parent[key])]
    parent, key = chance.choice(parents)
    kind = chance.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[chance.choice(["x", "__metadata__", key + "x", ""])] = parent.pop(key)
    elif kind == 2:
        other, other_key = chance.choice(parents)
        parent[key] = json.loads(json.dumps(other[other_key])) if _has(other, other_key) else None
    elif kind == 3 and isinstance(parent, dict):  # the same name twice
        mark = "\x00twice"
        parent[mark] = parent[key]
        return json.dumps(value).replace(json.dumps(mark), json.dumps(key))
    else:
        parent[key] = "\x00mark"
        return json.dumps(value).replace(json.dumps("\x00mark"), chance.choice(NUMBERS + OTHERS))
    return json.dumps(value)


# What a pickle of plain values and tensors does not hold, or not in this place.
OPERATIONS = [
    b"N", b"\x88", b"0", b"2", b"(", b"R", b"Q", b"b", b"\x81", b"\x85" * 2000, b"]" * 2000, b"J\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff", b"K\0", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\0",
    b"\x8b\xff\xff\xff\x7f", b"G\x7f\xf8" + bytes(6), b"X\xff\xff\xff\x7fx", b"X\1\0\0\0x", b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\xff", b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n",
    b"ctorch\nSize\n", b"ccollections\nOrderedDict\n)R", b"X\5\0\0\0touch\x85R",
]  # fmt: skip


def pickle_changed(content: bytes, chance: random.Random) -> bytes:
    """An operation of a pickle taken away, repeated elsewhere, exchanged with another, or replaced by a bad one."""
    starts = [at or 0 for _, _, at in pickletools.genops(content)] + [len(content)]
    parts = [content[start:end] for start, end in pairwise(starts)]
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


def _has(value: object, key: object) -> bool:
    return key in value if isinstance(value, dict) else isinstance(value, list) and key < len(value)
