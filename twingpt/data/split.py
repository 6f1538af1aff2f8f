"""The train and val splits: a tenth is held out, of many documents by hash, of few the end of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from twingpt.core import rng
from twingpt.data import documents
from twingpt.data.documents import DocumentPiece, Item

VAL_FRACTION = 0.1

# How a manifest calls the two ways.
BY_HASH = "documents by hash"
BY_TAIL = "the last tenth of each document"


def split_of(document: str) -> str:
    """The split of a document, by the hash of its beginning, so that adding others moves none."""
    key = rng.digest("val", document[: documents.PIECE // 2])  # no piece that begins a document is shorter
    return "val" if key % 10_000 < VAL_FRACTION * 10_000 else "train"


def tail_start(length: int) -> int:
    """Where the held-out tail of a document of `length` characters begins."""
    return int(length * (1 - VAL_FRACTION))


def pieces_by_hash(items: Iterable[Item], lengths: list[int]) -> Iterator[Item]:
    """The items, where pieces have the split of their document; its characters are appended to `lengths`."""
    split = ""
    for item in items:
        if isinstance(item, DocumentPiece) and not item.whole:
            if item.begins:
                split = split_of(item.text)
                lengths.append(0)
            lengths[-1] += len(item.text)
            item = dataclasses.replace(item, split=split)
        yield item


def pieces_by_tail(items: Iterable[Item], lengths: Sequence[int]) -> Iterator[Item]:
    """The items, where the piece in which a document's tail begins is cut in two.

    `lengths` are the characters of each document that comes in pieces, from a pass of `pieces_by_hash`.
    """
    document_lengths, left = iter(lengths), 0  # `left`: characters of the document to train on
    for item in items:
        if not isinstance(item, DocumentPiece) or item.whole:
            yield item
            continue
        if item.begins:
            left = tail_start(next(document_lengths))
        if left:
            head = item.text[:left]
            left -= len(head)
            yield DocumentPiece(head, item.begins, left == 0, "train")
            if len(head) == len(item.text):
                continue
            item = dataclasses.replace(item, text=item.text[len(head) :])
        yield dataclasses.replace(item, split="val")
