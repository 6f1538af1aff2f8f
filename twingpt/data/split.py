"""The train and val splits: a share is held out, by hash or the end of each document, or other text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from twingpt.core import rng
from twingpt.core.errors import UserError
from twingpt.data import documents
from twingpt.data.documents import DocumentPiece, Item

VAL_FRACTION = 0.1
BY_HASH = "documents by hash"  # as a manifest calls it


@dataclass(frozen=True)
class Split:
    """What is held out of documents: a `share`, by their hash or, with `tails`, of the end of each; or `only` is all.

    With `only`, "train" or "val", all of them go there.
    """

    share: float = VAL_FRACTION
    tails: bool = False
    only: str | None = None

    def of(self, document: str) -> str:
        """The split of a document, by the hash of its beginning, so that adding others moves none."""
        if self.only:
            return self.only
        key = rng.digest("val", document[: documents.PIECE // 2])  # no piece that begins a document is shorter
        return "val" if key % 10_000 < self.share * 10_000 else "train"

    def tail_start(self, length: int) -> int:
        """Where the held-out tail of a document of `length` characters begins."""
        return int(length * (1 - self.share))

    def misses(self, share: float) -> bool:
        """Whether the `share` that is held out by hash is far from what it should be, as of few documents."""
        return not self.only and self.share > 0 and not self.share / 2 < share < self.share * 2

    @property
    def description(self) -> str:
        """How a manifest calls it."""
        if self.only:
            return "a source of its own"
        if not self.share:
            return "nothing"
        tail = "tenth" if self.share == VAL_FRACTION else f"{100 * self.share:g}%"
        return f"the last {tail} of each document" if self.tails else BY_HASH

    def pieces(self, items: Iterable[Item], lengths: list[int]) -> Iterator[Item]:
        """The items, where each piece of a document has its split.

        With `tails`, `lengths` are the characters of each document that comes in pieces, from a pass without, which
        appends them.
        """
        return self._by_tail(items, lengths) if self.tails else self._by_hash(items, lengths)

    def _by_hash(self, items: Iterable[Item], lengths: list[int]) -> Iterator[Item]:
        split = ""
        for item in items:
            if isinstance(item, DocumentPiece) and not item.whole:
                if item.begins:
                    split = self.of(item.text)
                    lengths.append(0)
                lengths[-1] += len(item.text)
                item = dataclasses.replace(item, split=split)
            yield item

    def _by_tail(self, items: Iterable[Item], lengths: Sequence[int]) -> Iterator[Item]:
        """The piece in which a document's tail begins is cut in two."""
        document_lengths, left = iter(lengths), 0  # `left`: characters of the document to train on
        for item in items:
            if not isinstance(item, DocumentPiece) or item.whole:
                yield item
                continue
            if item.begins:
                left = self.tail_start(next(document_lengths))
            if left:
                head = item.text[:left]
                left -= len(head)
                yield DocumentPiece(head, item.begins, left == 0, "train")
                if len(head) == len(item.text):
                    continue
                item = dataclasses.replace(item, text=item.text[len(head) :])
            yield dataclasses.replace(item, split="val")


DEFAULT = Split()


def parse_share(text: str, option: str) -> float | None:
    """The share that an option is; None where it names a source. Raises UserError for one outside 0 to 1."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 <= share < 1 or 0 < share < 1e-4:
        raise UserError(f"{option} {text}: a share must be 0, or from 0.0001 to less than 1; ./{text} is a file.")
    return share
