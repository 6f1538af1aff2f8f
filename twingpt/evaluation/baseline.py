"""n-gram baselines of a data set: measured, cached beside it, and found again for the runs trained on it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.paths import write_atomically
from twingpt.core.reading import read_json
from twingpt.data.mixture import Data, MixturePart, parts
from twingpt.data.shards import TokenDataset
from twingpt.evaluation.ngram import LONGEST, NGram

Array = np.ndarray

FILE = "baselines.json"
MOST_TOKENS = 10_000_000  # of each split: 1.3 GB and 15 seconds at most
QUICK_TOKENS = 2_000_000  # of both splits: what `gpt train` measures unasked, in about a second


@dataclass(frozen=True)
class NGramLoss:
    """Cross-entropy in nats per token of n-grams, counted on `tokens` training tokens, on `targets` held-out ones.

    Both are the first of their splits. `seconds` are those of counting up to n, and of the loss.
    """

    n: int
    val_loss: float
    bits_per_byte: float
    tokens: int
    targets: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.val_loss)


def parse_orders(text: str) -> list[int]:
    """The orders n in `3`, `1..5` or `1,3`, rising. Raises UserError for anything but 1 to LONGEST."""
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?", part, re.ASCII)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, 0)
        if not 1 <= first <= last <= LONGEST:
            raise UserError(
                f"--n {text!r} is no choice of 1 to {LONGEST}: give one as 3, some as 1,3, a range as 1..5."
            )
        found.update(range(first, last + 1))
    return sorted(found)


def measure(data: TokenDataset, orders: Sequence[int], targets: int | None = None) -> tuple[list[NGramLoss], NGram]:
    """The losses of n-grams of each order in `orders` (rising), and the counts up to the highest; also cached.

    Each of the first `targets` held-out tokens (None: of all) is predicted once, as in a model's evaluation,
    from all that stand before it in the split; the split's first is context only. Of both splits at
    most MOST_TOKENS are used. Raises UserError where the data is too short, or damaged.
    """
    train, val = (_tokens(data, split) for split in ("train", "val"))
    longest, name = orders[-1], data.manifest["name"]
    if len(train) < longest:
        raise UserError(f"The train split of {name} has {len(train)} tokens, too few for {longest}-grams: use --n 1.")
    if len(val) < 2:
        raise UserError(f"The val split of {name} has {len(val)} tokens, and a loss needs two: hold out more text.")
    val = val[: targets + 1] if targets else val
    size = max(1, data.text_bytes("val", val[1:]))
    model, rows, counting = NGram(train, data.tokenizer.vocab_size), [], 0.0
    for n in range(1, longest + 1):
        begin = time.perf_counter()
        model.grow()
        counted = time.perf_counter()
        counting += counted - begin
        if n in orders:
            nats = model.nats(val)
            seconds = counting + time.perf_counter() - counted
            bits = nats / math.log(2) / size
            rows.append(NGramLoss(n, nats / (len(val) - 1), bits, len(train), len(val) - 1, seconds))
    _add_to_cache(data, rows)
    return rows, model


@dataclass(frozen=True)
class SourceNGrams:
    """The losses of n-grams on one source of a run's data, counted on its own training tokens, and the counts."""

    part: MixturePart
    rows: Sequence[NGramLoss]
    model: NGram


def measure_all(
    data: Data, orders: Sequence[int], targets: int | None = None
) -> tuple[list[NGramLoss], list[SourceNGrams]]:
    """`measure` for each source of `data`, and the losses over all, weighted by their shares as an evaluation is."""
    sources = [SourceNGrams(part, *measure(part.data, orders, targets)) for part in parts(data)]
    if len(sources) == 1:
        return list(sources[0].rows), sources
    evaluated = []
    for source in sources:
        n_targets = source.rows[0].targets
        size = source.part.data.text_bytes("val", source.part.data.splits["val"][1 : n_targets + 1])
        evaluated.append((source.part.data, source.part.share, n_targets, max(1, size) / n_targets))
    size = sum(share * size for _, share, _, size in evaluated)
    by_order = zip(*(source.rows for source in sources), strict=True)
    return [_weighted_mean(rows, evaluated, size) for rows in by_order], sources


def _tokens(data: TokenDataset, split: str) -> Array:
    tokens = np.asarray(data.splits[split][:MOST_TOKENS]).astype(np.int32)
    if len(tokens) and tokens.max() >= data.tokenizer.vocab_size:
        raise UserError(
            f"{data.folder} holds the token id {tokens.max()}, outside its vocabulary of "
            f"{data.tokenizer.vocab_size}: its tokens are damaged, delete the folder to prepare again."
        )
    return tokens


def samples(data: TokenDataset, model: NGram, orders: Sequence[int], length: int, seed: int) -> list[str]:
    """A text of at most `length` tokens from each order, one document at temperature 1."""
    end = data.tokenizer.end_of_text
    return [data.tokenizer.decode(model.sample(end, length, seed, n)) for n in orders]


def best(rows: Sequence[NGramLoss]) -> NGramLoss:
    """The row of least loss, of lowest order among equals."""
    return min(rows, key=lambda row: (row.val_loss, row.n))


# A source of a run: its data, its share of the windows, held-out tokens evaluated, and bytes of text per such token.
EvaluatedSource = tuple[TokenDataset, float, int, float]


def for_run(sources: Sequence[EvaluatedSource]) -> NGramLoss | None:
    """The best n-gram on the held-out tokens that a run evaluates on.

    Each source of a mixture has n-grams of its own training tokens, and the losses are weighted as the run's
    evaluation weights them. They are found in the cache, or measured where that takes about a second; None
    where it would take longer.
    """
    by_source = [{row.n: row for row in _quick_rows(data, targets)} for data, _, targets, _ in sources]
    if len(sources) == 1:
        rows = list(by_source[0].values())
    else:
        size = sum(share * size for _, share, _, size in sources)
        orders = sorted(set.intersection(*map(set, by_source)))
        rows = [_weighted_mean([rows[n] for rows in by_source], sources, size) for n in orders]
    return best(rows) if rows else None


def _weighted_mean(rows: Sequence[NGramLoss], sources: Sequence[EvaluatedSource], size: float) -> NGramLoss:
    """The loss of n-grams of one order on a mixture of `size` bytes of text per token."""
    loss = sum(share * row.val_loss for (_, share, _, _), row in zip(sources, rows, strict=True))
    tokens, targets, seconds = (sum(getattr(row, key) for row in rows) for key in ("tokens", "targets", "seconds"))
    return NGramLoss(rows[0].n, loss, loss / math.log(2) / size, tokens, targets, seconds)


def _quick_rows(data: TokenDataset, targets: int) -> list[NGramLoss]:
    """The losses on the first `targets` held-out tokens: cached, or of all orders, measured where that is quick."""
    cached = [row for row in _read_cache(data) if row.targets == targets]
    orders = range(1, min(LONGEST, len(data.splits["train"])) + 1)
    if not {row.n for row in cached} >= set(orders) and len(data.splits["train"]) + targets <= QUICK_TOKENS:
        cached, _ = measure(data, orders, targets)
    return cached


def _read_cache(data: TokenDataset) -> list[NGramLoss]:
    """What was measured earlier on these tokens; nothing where the file is missing, broken or of other tokens."""
    try:
        content = read_json(data.folder / FILE)
        rows = [NGramLoss(**row) for row in content["rows"]] if content["fingerprint"] == data.fingerprint else []
    except (UserError, KeyError, TypeError):
        return []
    return rows


def _add_to_cache(data: TokenDataset, rows: Sequence[NGramLoss]) -> None:
    """Add rows to the cache beside the data; where that can't be written, they are measured again the next time."""
    merged = {(row.n, row.tokens, row.targets): asdict(row) for row in [*_read_cache(data), *rows]}
    content: dict[str, Any] = {"fingerprint": data.fingerprint, "rows": [merged[key] for key in sorted(merged)]}
    with suppress(OSError):
        write_atomically(data.folder / FILE, json.dumps(content, indent=2))
