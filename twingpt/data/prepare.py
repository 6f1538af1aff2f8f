"""Sources and a tokenizer's name to a prepared data set, made once and found again; streamed, on all cores."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twingpt.core import paths, rng
from twingpt.core.errors import UserError
from twingpt.core.locks import locked
from twingpt.core.tokenizer import TOKENIZERS, Tokenizer, files
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.data import named, readers, shards, sources, workers
from twingpt.data.readers import File, Item, Text, pieces
from twingpt.data.shards import SPLITS, TokenDataset
from twingpt.data.sources import Source
from twingpt.data.tokenizers import find as find_tokenizer
from twingpt.data.tokenizers import make
from twingpt.data.workers import VAL_FRACTION, Encoded, Work, place, tail

FEW = 20  # text files; with so few it is worth counting before encoding
SAMPLE = 2**26  # characters that a tokenizer is learned from, at most

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


@dataclass(frozen=True)
class How:
    """What is made of the sources: by the tokenizer of this name and size, or found at this place, or given."""

    kind: str
    vocab_size: int
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        """Find the tokenizer that `kind` is the place of."""
        if self.tokenizer is None and self.kind not in TOKENIZERS:
            object.__setattr__(self, "tokenizer", find_tokenizer(self.kind))

    @classmethod
    def of(cls, kind: str, vocab_size: int, tokenizer: Tokenizer | None = None) -> How:
        """The same, with the tokenizer of a `kind` that is a path: it is what counts, not where it lies."""
        return cls(kind, vocab_size, tokenizer or (None if kind in TOKENIZERS else find_tokenizer(kind)))

    @property
    def asked(self) -> dict[str, Any]:
        """The tokenizer in a run's options."""
        if self.tokenizer:
            return {}
        return {"tokenizer": self.kind} | ({"vocab_size": self.vocab_size} if self.kind == "bpe" else {})

    @property
    def key(self) -> str:
        """What tells apart the results."""
        return self.tokenizer.digest if self.tokenizer else json.dumps(self.asked)


@dataclass
class Progress:
    """How far a preparation is, told to whoever shows it; `total` bytes are read once in each pass."""

    show: Callable[[Progress], object] = lambda progress: None
    task: str = ""
    total: int = 0
    done: int = 0
    documents: int = 0
    tokens: int = 0

    def begin(self, task: str, total: int) -> None:
        """A pass over all bytes begins."""
        self.task, self.total, self.done, self.documents, self.tokens = task, total, 0, 0, 0
        self.show(self)

    def advance(self, count: int) -> None:
        """So many more bytes were read."""
        self.done += count
        self.show(self)


def folder_of(name: str) -> Path:
    """Where the data set called `name` is, if it has been prepared."""
    return paths.home() / "data" / name


def prepare(spec: str, kind: str, vocab_size: int, tokenizer: Tokenizer | None = None) -> TokenDataset:
    """The data set that was prepared under the name `spec`; else the source `spec` under the tokenizer `kind`.

    `kind` and `vocab_size` give way to `tokenizer`, and to what a named data set has. The data set of a
    source is found again by the digest of all it depends on, in `paths.home()/data`.
    """
    if there := find(spec):
        data = TokenDataset(there)
        if tokenizer and tokenizer.digest != data.manifest["tokenizer"]:
            raise UserError(f"{spec} is prepared with another tokenizer than the model's: prepare its text with that.")
        return data
    source, how = sources.load(spec), How.of(kind, vocab_size, tokenizer)
    key = hashlib.sha256("/".join([str(shards.SCHEMA), source.digest, how.key]).encode()).hexdigest()[:12]
    folder = folder_of(f"{source.name[:40]}-{key}")
    if not folder.exists():
        _write(folder, source.name, lambda _: {spec: source}, how)
    return TokenDataset(folder)


def find(spec: str) -> Path | None:
    """The folder of the data set prepared as `spec`, its name or its path; None where there is none."""
    if not spec or named.parse(spec):
        return None
    folder = folder_of(spec) if NAME.fullmatch(spec) else paths.expand(spec)
    return folder if (folder / "manifest.json").is_file() else None


def learn(specs: Sequence[str], kind: str, vocab_size: int) -> Tokenizer:
    """The tokenizer called `kind` for several sources: where it learns, from the training texts of them all.

    It is kept in `paths.home()/tokenizers`, under the digest of all it depends on.
    """
    if kind not in TOKENIZERS:
        return find_tokenizer(kind)
    found, how = {spec: sources.load(spec) for spec in specs}, How.of(kind, vocab_size)
    key = "/".join([str(shards.SCHEMA), how.key, *(source.digest for source in found.values())])
    folder = paths.home() / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:12]
    if not folder.exists():
        each = [Preparation({spec: one}, one.name, how, Progress(), workers.cores()) for spec, one in found.items()]
        tokenizer = how.tokenizer or learn_from(each, how)[0]
        with _unless_there(folder), _new_folder(folder, alone=False) as temporary:
            for file, text in files(tokenizer, block_size=2**30).items():
                paths.write_synced(temporary / file, text.encode())
    return load_tokenizer(folder)


@contextmanager
def _unless_there(folder: Path) -> Iterator[None]:
    """Write a folder, unless another process is faster with the same content; UserError where that can't be."""
    try:
        yield
    except OSError as error:
        if not folder.exists():
            raise UserError(f"The prepared data can't be written to {folder}: {error.strerror}.") from error


@dataclass(frozen=True)
class Reading:
    """How sources are read: see `sources.load`; `licence` is noted of those that have none of their own."""

    field: str = "text"
    errors: str = "strict"
    licence: str | None = None

    def load(self, spec: str, spool: Path) -> Source:
        """The source `spec`; what comes on stdin is kept in the folder `spool`."""
        if spec == "-":
            source = sources.spool(spool, self.errors)
        elif sources.HUB_ID.fullmatch(spec) and not paths.expand(spec).exists() and not readers.known(Path(spec)):
            source = sources.load_hub(spec, self.field, self.errors)
        else:
            source = sources.load(spec, self.field, self.errors)
        return dataclasses.replace(source, licence=source.licence or self.licence)


def prepare_named(
    specs: Sequence[str],
    name: str,
    how: How,
    reading: Reading,
    progress: Progress | None = None,
    n_cores: int | None = None,
) -> TokenDataset:
    """Prepare sources under a name, on all cores unless told otherwise; the same again is found, another is refused."""
    if named.parse(name):
        raise UserError(f"{name} is the name of a source: choose another --name.")
    if not NAME.fullmatch(name):
        raise UserError(f"A data set can't be called {name!r}: give a --name of letters, digits, - _ and . alone.")
    folder, specs = folder_of(name), list(dict.fromkeys(specs))
    if folder.exists():
        return _same(folder, specs, name, how, reading)
    _write(
        folder, name, lambda spool: {spec: reading.load(spec, spool) for spec in specs}, how, progress, n_cores, True
    )
    return TokenDataset(folder)


def _same(folder: Path, specs: Sequence[str], name: str, how: How, reading: Reading) -> TokenDataset:
    """The data set that is there, if it is what would be prepared now."""
    data = TokenDataset(folder)
    alike = not how.tokenizer or how.tokenizer.digest == data.manifest["tokenizer"]
    if "-" not in specs and alike and data.manifest.get("asked") == how.asked:
        now = [reading.load(spec, folder).digest for spec in specs]
        if now == [row["sha256"] for row in data.manifest["sources"]]:
            return data
    raise UserError(f"{name} is prepared already, from something else: gpt data rm {name}, or choose another --name.")


# Writing ----------------------------------------------------------------------------------------------------


def _write(
    folder: Path,
    name: str,
    load: Callable[[Path], dict[str, Source]],
    how: How,
    progress: Progress | None = None,
    n_cores: int | None = None,
    alone: bool = False,
) -> None:
    """Prepare what `load` gives; a preparation that is killed or fails leaves nothing that looks like a data set."""
    with _unless_there(folder), _new_folder(folder, alone) as temporary:
        preparation = Preparation(load(temporary), name, how, progress or Progress(), n_cores or workers.cores())
        preparation.write(temporary)


@contextmanager
def _new_folder(folder: Path, alone: bool) -> Iterator[Path]:
    """`paths.new_folder`, whose lock says that its process lives; what dead ones left for any data set is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(folder.parent, timeout=-1):
            others = paths.remove_leftovers(folder.parent, ".*.tmp", ".*.old")
            if alone and any(re.fullmatch(rf"\.{re.escape(folder.name)}\.\w+\.tmp", other.name) for other in others):
                raise UserError(f"{folder.name} is being prepared by another process: wait for it, or stop that.")
            temporary = stack.enter_context(paths.new_folder(folder))
        yield temporary


class Preparation:
    """Some sources on their way into a folder, read in as many passes as it takes."""

    def __init__(self, found: dict[str, Source], name: str, how: How, progress: Progress, n_cores: int) -> None:
        self.found, self.name, self.how, self.progress, self.n_cores = found, name, how, progress, n_cores
        self.source = Source(name, [one for source in found.values() for one in source.inputs])
        self.size = self.source.size
        # Whether the end of each document is held out, and the lengths of the documents that come in pieces.
        self.tails, self.lengths, self.counted = False, list[int](), False

    def write(self, folder: Path) -> None:
        """Fill the folder: shards, tokenizer and, last, the manifest."""
        stamp = self.source.stamp()
        with ThreadPoolExecutor(1, "digests") as thread:
            digests = thread.submit(lambda: {spec: source.digest for spec, source in self.found.items()})
            if self._few():
                self.count()
            tokenizer, learned = (self.how.tokenizer, {}) if self.how.tokenizer else learn_from([self], self.how)
            counts, writers = self._encode(folder, tokenizer)
            rows = self._rows(digests.result())
        if self.source.stamp() != stamp:
            raise UserError(f"A file of {self.name} changed while it was read: prepare it again.")
        (folder / "stdin").unlink(missing_ok=True)
        split = "the last tenth of each document" if self.tails else shards.BY_HASH
        facts: dict[str, Any] = {"name": self.name, "asked": self.how.asked, "sources": rows, "split": split}
        facts |= {"documents": counts.documents, "empty_documents": counts.empty, **learned}
        shards.finish(folder, tokenizer, facts, writers)

    def _few(self) -> bool:
        return len(self.source.inputs) < FEW and all(getattr(one, "kind", "") == "text" for one in self.source.inputs)

    def _rows(self, digests: dict[str, str]) -> list[dict[str, Any]]:
        """What the manifest says of each source."""
        return [
            {
                "source": spec,
                "files": len(source.inputs),
                "bytes": source.size,
                "sha256": digests[spec],
                "licence": source.licence,
            }
            for spec, source in self.found.items()
        ]

    def _run(self, work: Work, task: str, sink: Callable[[Encoded], object] = lambda result: None) -> Encoded:
        """Do `work` on everything; the counts, from which `self.tails` is decided."""
        self.progress.begin(task, self.size)
        counts, lengths = Encoded(), list[int]()
        items = self.source.items(self.progress.advance)
        placed = by_tail(items, self.lengths) if work.tails else by_hash(items, lengths)
        for result in workers.run(work, placed, self.n_cores):
            sink(result)
            counts.count(result)
            self.progress.documents, self.progress.tokens = sum(counts.documents.values()), counts.n_tokens
        if not sum(counts.characters.values()):
            raise sources.empty(self._what())
        if not work.tails:
            share = counts.characters["val"] / sum(counts.characters.values())
            self.tails, self.lengths = not VAL_FRACTION / 2 < share < VAL_FRACTION * 2, lengths
            self.counted = True
        return counts

    def _what(self) -> object:
        first = self.source.inputs[0]
        return first.title if isinstance(first, File) and len(self.source.inputs) == 1 else self.name

    def _encode(self, folder: Path, tokenizer: Tokenizer) -> tuple[Encoded, dict[str, shards.Writer]]:
        """Write the shards; twice where only the first time shows that there are too few documents to hold some out."""
        dtype = shards.token_dtype(tokenizer.vocab_size)
        while True:
            work = Work(tokenizer, dtype.str, self.tails)
            with ExitStack() as stack:
                writers = {
                    split: stack.enter_context(shards.Writer(folder / f"{split}.bin", dtype)) for split in SPLITS
                }

                def sink(result: Encoded, writers: dict[str, shards.Writer] = writers) -> None:
                    for split, writer in writers.items():
                        writer.append(result.tokens[split], result.bytes[split])

                counts = self._run(work, "tokenizing", sink)
            if work.tails == self.tails:
                return counts, writers

    def count(self) -> None:
        """Read everything once, and decide what is held out."""
        if not self.counted:
            self._run(Work(None, "", tails=False), "counting")

    def training_texts(self) -> Iterator[str]:
        """What is not held out, in order."""
        work, items = Work(None, "", self.tails), self.source.items()
        for item in by_tail(items, self.lengths) if self.tails else by_hash(items, []):
            yield from (text for text, split, _ in work.parts(item, Encoded()) if split == "train")

    def alphabet(self) -> Iterator[str]:
        """Every character that occurs, once."""
        seen: set[str] = set()
        for item in self.source.items():
            for text in item.documents():
                seen.update(text)
        yield "".join(seen)


def learn_from(preparations: Sequence[Preparation], how: How) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer that `how` names, learned if it has to be, and what a manifest says of that."""
    if how.kind == "bpe":
        for one in preparations:
            one.count()
            one.progress.begin("learning the tokenizer", 0)
    sample = Sample(text for one in preparations for text in one.training_texts())
    tokenizer = make(how.kind, sample, (text for one in preparations for text in one.alphabet()), how.vocab_size)
    if not sample.total:
        return tokenizer, {}
    return tokenizer, {"learned_from": {"characters": sample.taken, "of": sample.total, "by": "lowest hash"}}


class Sample:
    """Texts to learn from: all, or those of the lowest hash that make SAMPLE characters, in their order.

    `taken` of `total` characters are known once it has been read.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.taken = self.total = 0

    def __iter__(self) -> Iterator[str]:
        heap: list[tuple[int, int, str]] = []  # the highest hash first
        parts = (piece for text in self.texts for piece, _ in pieces([text]))
        for number, part in enumerate(parts):
            self.total += len(part)
            self.taken += len(part)
            heapq.heappush(heap, (-rng.digest("sample", part), number, part))
            while self.taken > SAMPLE:
                self.taken -= len(heapq.heappop(heap)[2])
        yield from (part for _, _, part in sorted(heap, key=lambda entry: entry[1]))


# Documents that come in pieces ------------------------------------------------------------------------------


def by_hash(items: Iterable[Item], lengths: list[int]) -> Iterator[Item]:
    """The items, pieces with their document's split; `lengths` gets the characters of each document in pieces."""
    split = ""
    for item in items:
        if isinstance(item, Text) and not item.whole:
            if item.begins:
                split = place(item.text)
                lengths.append(0)
            lengths[-1] += len(item.text)
            item = dataclasses.replace(item, split=split)
        yield item


def by_tail(items: Iterable[Item], lengths: Sequence[int]) -> Iterator[Item]:
    """The items, pieces cut where their document's last tenth begins."""
    each, left = iter(lengths), 0
    for item in items:
        if not isinstance(item, Text) or item.whole:
            yield item
            continue
        if item.begins:
            left = tail(next(each))
        if left:
            head = item.text[:left]
            left -= len(head)
            yield Text(head, item.begins, left == 0, "train")
            if len(head) == len(item.text):
                continue
            item = dataclasses.replace(item, text=item.text[len(head) :])
        yield dataclasses.replace(item, split="val")
