"""Learning a tokenizer from data sources, and comparing several on them: on all that `gpt data prepare` takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.paths import expand, new_folder
from twingpt.core.tokenizer import CharTokenizer
from twingpt.data import sources
from twingpt.data.documents import DocumentPiece, Item
from twingpt.data.prepare import find as find_prepared
from twingpt.data.readers import Advance
from twingpt.data.shards import SPLITS, TokenDataset, write_tokenizer
from twingpt.data.sources import AS_THEY_ARE, ReadOptions, Source
from twingpt.data.spelling import Spelling, Unspelled
from twingpt.data.tokenizers import find, train_bpe

CHUNK = 2**20  # tokens looked at together


@dataclass(frozen=True)
class PreparedDocuments:
    """The documents of a prepared data set, decoded; where the tail of each is held out, they come in two."""

    data: TokenDataset
    kind = "prepared"

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(int(self.data.manifest["splits"][split]["bytes"]) for split in SPLITS)

    def digest(self) -> str:
        """Its fingerprint."""
        return self.data.fingerprint

    def items(self, advance: Advance = lambda count: None) -> Iterator[Item]:
        """Its documents, those to train on first."""
        tokenizer = self.data.tokenizer
        for split in SPLITS:
            rest, tokens = np.empty(0, np.int32), self.data.splits[split]
            for start in range(0, len(tokens), CHUNK):
                chunk = np.asarray(tokens[start : start + CHUNK], np.int32)
                *whole, rest = np.split(
                    np.concatenate([rest, chunk]), np.flatnonzero(chunk == tokenizer.end_of_text) + len(rest) + 1
                )
                yield from (DocumentPiece(tokenizer.decode(ids[:-1])) for ids in whole)
            if len(rest):
                yield DocumentPiece(tokenizer.decode(rest))


@contextmanager
def _opened(specs: Sequence[str], options: ReadOptions) -> Iterator[dict[str, Source]]:
    """The sources, of which prepared data sets come before what else has their name; stdin is kept for the block."""
    with tempfile.TemporaryDirectory(prefix="twingpt-") as spool:
        prepared = {spec: folder for spec in specs if (folder := find_prepared(spec))}
        others = [spec for spec in specs if spec not in prepared]
        found = {spec: Source(spec, [PreparedDocuments(TokenDataset(folder))]) for spec, folder in prepared.items()}
        found |= options.load(others, Path(spool)) if others else {}
        options.check_used([one for source in found.values() for one in source.inputs])
        yield {spec: found[spec] for spec in specs}


def learn_to_folder(
    specs: Sequence[str], vocab_size: int, pattern: str, out: Path, options: ReadOptions = AS_THEY_ARE, *, chat: bool
) -> dict[str, Any]:
    """Learn a byte-level BPE from data sources and write it to the new folder `out`; its facts, with the seconds taken.

    Raises UserError where `out` exists or can't be written, without text, or for what `train_bpe` refuses.
    """
    folder = expand(out)
    if folder.exists():
        raise UserError(f"{out} exists already: choose another folder, or remove it.")
    start, counts, notes = time.perf_counter(), {"documents": 0, "bytes": 0}, list[str]()
    with _opened(list(dict.fromkeys(specs)), options) as loaded:

        def texts() -> Iterator[str]:
            for source in loaded.values():
                bad: list[str] = []
                for text, begins in source.texts(bad):
                    counts["documents"] += begins
                    counts["bytes"] += len(text.encode())
                    yield text
                notes.extend(source.notes(bad))

        tokenizer = train_bpe(texts(), vocab_size, pattern, chat=chat)
    if not counts["bytes"]:
        raise sources.empty(", ".join(specs))
    try:
        with new_folder(folder) as temporary:
            write_tokenizer(temporary, tokenizer)
    except OSError as error:
        raise UserError(f"The tokenizer can't be written to {out}: {error.strerror}.") from error
    facts = {"path": str(out), "vocab_size": tokenizer.vocab_size, "pattern": pattern, **counts}
    return {**facts, "seconds": time.perf_counter() - start, "notes": notes}


def compare(names: Sequence[str], spec: str, options: ReadOptions = AS_THEY_ARE) -> dict[str, Any]:
    """Tokenizers compared on a data source: a row for each with tokens, bytes per token, and MB encoded a second.

    `unspelled` is the share of the text that one can't spell. `char` has the alphabet of the source itself. Raises
    UserError for a source without text.
    """
    with _opened([spec], options) as loaded:
        rows = [_measure(name, loaded[spec]) for name in names]
    documents, size = rows[0][1:]
    return {"source": sources.printable(spec), "documents": documents, "bytes": size, "rows": [row for row, *_ in rows]}


def _measure(name: str, source: Source) -> tuple[dict[str, Any], int, int]:
    """The row of a tokenizer, and the documents and bytes of the source."""
    alphabet = (set(text) for text, _ in source.texts([]))
    tokenizer = CharTokenizer(set().union(*alphabet)) if name == "char" else find(name)
    tokenizer.encode("")  # sets up what the first call would be timed for
    spelling, unspelled = Spelling.of(tokenizer), Unspelled()
    documents = size = count = 0
    seconds = 1e-9
    for text, begins in source.texts([]):
        start = time.perf_counter()
        ids = tokenizer.encode(text)
        seconds += time.perf_counter() - start
        count, documents, size = count + len(ids), documents + begins, size + len(text.encode())
        if spelling:
            unspelled += spelling.count(text, ids)
    if not size:
        raise sources.empty(source.display_name)
    row = {"tokenizer": name, "vocab_size": tokenizer.vocab_size, "tokens": count}
    figures = {"bytes_per_token": size / max(1, count), "mb_per_second": size / 1e6 / seconds}
    return {**row, **figures, "unspelled": unspelled.share}, documents, size
