"""Building a data set: some passes over its sources: count, learn the tokenizer, encode to shards."""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from twingpt.core import rng
from twingpt.core.errors import UserError
from twingpt.core.tokenizer import TOKENIZERS, Tokenizer
from twingpt.core.tokenizer.base import END_OF_TEXT
from twingpt.data import shards, sources, spelling, workers
from twingpt.data.documents import pieces
from twingpt.data.shards import SPLITS, ShardWriter
from twingpt.data.sources import Source
from twingpt.data.split import VAL_FRACTION, Split
from twingpt.data.tokenizers import find, learn_or_find
from twingpt.data.workers import ChunkEncoder, EncodedChunk
from twingpt.runs.units import counted, human_share

FEW = 20  # text files; with so few, tails may be held out, and a pass that counts is cheaper than encoding twice
SAMPLE = 2**26  # characters that a tokenizer is learned from, at most


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer of a data set: of this kind and size, from the path `kind`, or the one given."""

    kind: str
    vocab_size: int
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        """Find the tokenizer that `kind` is the path of: the choice is its content, not where it lies."""
        if self.tokenizer is None and self.kind not in TOKENIZERS:
            object.__setattr__(self, "tokenizer", find(self.kind))

    @property
    def asked(self) -> dict[str, Any]:
        """The options of a run that ask for it; none for a given tokenizer."""
        if self.tokenizer:
            return {}
        return {"tokenizer": self.kind} | ({"vocab_size": self.vocab_size} if self.kind == "bpe" else {})

    @property
    def key(self) -> str:
        """What differs between choices that give different tokens."""
        return self.tokenizer.digest if self.tokenizer else json.dumps(self.asked)


@dataclass
class Progress:
    """Progress of a build, for `show`; `total` bytes are read once in each pass, called `task`."""

    show: Callable[[Progress], object] = lambda progress: None
    task: str = ""
    total: int = 0
    done: int = 0
    documents: int = 0
    tokens: int = 0

    def begin(self, task: str, total: int) -> None:
        """Begin a pass."""
        self.task, self.total, self.done, self.documents, self.tokens = task, total, 0, 0, 0
        self.show(self)

    def advance(self, count: int) -> None:
        """Add bytes that were read."""
        self.done += count
        self.show(self)


@dataclass(frozen=True)
class LoadedSources:
    """The sources of a data set, by what --data calls them, and what is held out: a share of them, or `val`.

    Without either it is a source's own held-out text, and a tenth of those that have none.
    """

    sources: Mapping[str, Source]
    share: float | None = None
    val: Mapping[str, Source] = field(default_factory=dict)

    def all(self) -> dict[str, Source]:
        """Every source, the held-out ones last, by a name for each."""
        own = {f"{spec}, its validation split": one.held_out for spec, one in self.sources.items() if one.held_out}
        return {**self.sources, **(own if self.share is None and not self.val else {}), **self.val}

    def groups(self) -> list[tuple[Source, Split]]:
        """The sources that are split alike, as one: those without held-out text, those with, and that text."""
        with_val = [one for one in self.sources.values() if self.val or (one.held_out and self.share is None)]
        others = [one for one in self.sources.values() if one not in with_val]
        held_out = [one for name, one in self.all().items() if name not in self.sources]
        by_share = VAL_FRACTION if self.share is None else self.share
        splits = ((others, Split(by_share)), (with_val, Split(only="train")), (held_out, Split(only="val")))
        return [(joined("", one), split) for one, split in splits if one]


def joined(name: str, several: Iterable[Source]) -> Source:
    """Several sources as one."""
    found = list(several)
    return Source(
        name,
        [one for source in found for one in source.inputs],
        others={path: what for source in found for path, what in source.others.items()},
        most_bad=max((source.most_bad for source in found), default=0),
    )


class DatasetBuilder:
    """Builds one data set from sources, in as many passes as it takes."""

    def __init__(
        self, loaded: LoadedSources, name: str, choice: TokenizerChoice, progress: Progress, n_cores: int
    ) -> None:
        self.loaded, self.name, self.choice, self.progress, self.n_cores = loaded, name, choice, progress, n_cores
        self.source, self.groups = joined(name, loaded.all().values()), loaded.groups()
        self.size = self.source.size
        # Whether the tail of each document is held out, and the characters of each document that comes in pieces.
        self.tails, self.lengths, self.counted = False, list[int](), False

    def write(self, folder: Path) -> None:
        """Fill the folder: shards, tokenizer and, last, the manifest."""
        stamp = self.source.stamp()
        with ThreadPoolExecutor(1, "digests") as thread:
            digests = thread.submit(lambda: {spec: source.digest for spec, source in self.loaded.all().items()})
            if len(self.source.inputs) < FEW and all(one.kind == "text" for one in self.source.inputs):
                self.count()
            given = self.choice.tokenizer
            tokenizer, learned = (given, {}) if given else learn_tokenizer([self], self.choice)
            counts, writers = self._encode(folder, tokenizer)
            rows = self._source_rows(digests.result())
        if self.source.stamp() != stamp:
            raise UserError(f"A file of {self.name} changed while it was read: prepare it again.")
        (folder / "stdin").unlink(missing_ok=True)  # sources.spool's
        split = self._split(self.groups[0][1]).description
        facts: dict[str, Any] = {"name": self.name, "asked": self.choice.asked, "sources": rows, "split": split}
        facts["val"] = next(map(sources.printable, self.loaded.val), self.loaded.share)
        facts |= {"documents": counts.documents, "empty_documents": counts.empty, **learned, "rules": self.source.rules}
        facts |= {"left_out": dict(self.source.left_out), "notes": self._notes(counts)}
        shards.finish_dataset(folder, tokenizer, facts, writers)

    def _notes(self, counts: EncodedChunk) -> list[str]:
        """What whoever uses the data must know, a sentence each. Raises UserError where too little could be spelled."""
        notes, unspelled, name = [], counts.unspelled, self.source.display_name
        if unspelled.share > spelling.MOST:
            raise UserError(
                f"The tokenizer can't spell {unspelled.share:.0%} of {name}: learn one from it (--tokenizer bpe), or "
                "take one of bytes."
            )
        if unspelled.share:
            notes.append(
                f"The tokenizer can't spell {human_share(unspelled.share)} of the text: {unspelled.unknown:,} of "
                f"{unspelled.ids:,} ids stand for what is unknown, and {unspelled.lost:,} of {unspelled.characters:,} "
                "characters are lost."
            )
        separators = self.source.separators
        if separators and not counts.separated:
            notes.append(f"no line of {' or '.join(map(repr, separators))} was found: each text file is one document")
        if counts.ends and END_OF_TEXT not in separators:
            notes.append(
                f"{END_OF_TEXT} in the text ({counted(counts.ends, 'time')}) is text like any other; where such a line "
                f"ends a document: gpt data prepare --separator '{END_OF_TEXT}'"
            )
        notes += [note for source in self.loaded.sources.values() for note in source.split_notes]
        return [*notes, *self.source.notes(counts.bad)]

    def _source_rows(self, digests: Mapping[str, str]) -> list[dict[str, Any]]:
        """The manifest's entry of each source."""
        return [
            {
                "source": sources.printable(spec),
                "files": len(source.inputs),
                "bytes": source.size,
                "sha256": digests[spec],
                "licence": source.licence,
            }
            for spec, source in self.loaded.all().items()
        ]

    def _split(self, split: Split) -> Split:
        """The way of a group to split, where tails are held out if it turned out so."""
        return dataclasses.replace(split, tails=self.tails and not split.only)

    def _pass(
        self,
        tokenizer: Tokenizer | None,
        task: str,
        dtype: str = "",
        writers: Mapping[str, ShardWriter] = MappingProxyType({}),
    ) -> EncodedChunk:
        """Encode everything, to the shards, or count without a tokenizer; from the counts `self.tails` is decided."""
        self.progress.begin(task, self.size)
        counts, splits = EncodedChunk(), [self._split(split) for _, split in self.groups]
        for (source, _), split in zip(self.groups, splits, strict=True):
            lengths = self.lengths if split.tails else list[int]()
            before = dict(counts.characters)
            items = split.pieces(source.items(self.progress.advance), lengths)
            for chunk in workers.run(ChunkEncoder(tokenizer, dtype, split), items, self.n_cores):
                for name, writer in writers.items():
                    writer.append(chunk.tokens[name], chunk.bytes[name], chunk.token_bytes[name])
                counts.count(chunk)
                self.source.check_bad(counts.bad)
                self.progress.documents, self.progress.tokens = sum(counts.documents.values()), counts.n_tokens
            total = sum(counts.characters.values()) - sum(before.values())
            if not total:
                raise sources.empty(source.display_name if len(self.groups) > 1 else self.source.display_name)
            if not split.tails and not split.only:
                self.tails = split.misses((counts.characters["val"] - before["val"]) / total)
                self.lengths = lengths
        self.counted = True
        return counts

    def _encode(self, folder: Path, tokenizer: Tokenizer) -> tuple[EncodedChunk, dict[str, ShardWriter]]:
        """Write the shards; again where only the first pass shows that by hash too little or too much is held out."""
        dtype = shards.token_dtype(tokenizer.vocab_size)
        while True:
            tails = self.tails
            with ExitStack() as stack:
                writers = {split: stack.enter_context(ShardWriter(folder / f"{split}.bin", dtype)) for split in SPLITS}
                counts = self._pass(tokenizer, "tokenizing", dtype.str, writers)
            if tails == self.tails:
                return counts, writers

    def count(self) -> None:
        """Decide how the data is split, by a pass that only counts, unless one was made."""
        if not self.counted:
            self._pass(None, "counting")

    def training_texts(self) -> Iterator[str]:
        """What is not held out, in order."""
        for source, split in ((source, self._split(split)) for source, split in self.groups):
            encode = ChunkEncoder(None, "", split)
            for item in split.pieces(source.items(), self.lengths if split.tails else []):
                yield from (text for text, where, _ in encode.split(item, EncodedChunk()) if where == "train")

    def alphabet(self) -> Iterator[str]:
        """Every character that occurs, once."""
        seen: set[str] = set()
        for item in self.source.items():
            for text in item.documents():
                seen.update(text)
        yield "".join(seen)


def learn_tokenizer(builders: Sequence[DatasetBuilder], choice: TokenizerChoice) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer chosen, learned from the training texts of `builders` where it learns, and the manifest's facts."""
    if choice.kind == "bpe":
        for builder in builders:
            builder.count()
            builder.progress.begin("learning the tokenizer", 0)
    sample = TextSample(text for builder in builders for text in builder.training_texts())
    alphabet = (text for builder in builders for text in builder.alphabet())
    tokenizer = learn_or_find(choice.kind, sample, alphabet, choice.vocab_size)
    if not sample.total:
        return tokenizer, {}
    return tokenizer, {"learned_from": {"characters": sample.taken, "of": sample.total, "by": "lowest hash"}}


class TextSample:
    """Texts to learn from: all, or the pieces of lowest hash that make SAMPLE characters, in their order.

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
