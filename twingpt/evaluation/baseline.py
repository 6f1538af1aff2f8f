"""n-gram baselines of a prepared data set: measured, kept beside it, and found again for the runs trained on it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.paths import write_atomically
from twingpt.core.reading import read_json
from twingpt.data.shards import TokenDataset
from twingpt.evaluation.ngram import LONGEST, NGram

Array = np.ndarray

FILE = "baselines.json"
MOST_TOKENS = 10_000_000  # of each split: 1.3 GB and 15 seconds at most
QUICK_TOKENS = 2_000_000  # that `gpt train` counts by itself, in about a second


@dataclass(frozen=True)
class Row:
    """What n-grams counted over the first `tokens` training tokens lose on the first `targets` held-out ones.

    `val_loss` is in nats per token. `seconds` are those of counting up to n, and of the loss.
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
    """The lengths that `3`, `1..5` or `1,3` names, rising. Raises UserError for anything but 1 to LONGEST."""
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


def measure(data: TokenDataset, orders: Sequence[int], targets: int | None = None) -> tuple[list[Row], NGram]:
    """The losses of n-grams of each length in `orders` (rising), and the counts up to the longest.

    Each of the first `targets` held-out tokens (None: of all) is predicted once, as in a model's evaluation,
    from all that stand before it in the split; the split's first is context only. Of both splits at
    most MOST_TOKENS are used. Raises UserError where the data is too short, or damaged.
    """
    train, val = (_tokens(data, split) for split in ("train", "val"))
    longest, name = orders[-1], data.manifest["name"]
    if len(train) < longest:
        raise UserError(f"The train split of {name} has {len(train)} tokens, too few for {longest}-grams: use --n 1.")
    if len(val) < 2:
        raise UserError(f"The val split of {name} has {len(val)} tokens, and a loss needs two: give more text.")
    val = val[: targets + 1] if targets else val
    size = max(1, int(data.tokenizer.byte_lengths[val[1:]].sum()))
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
            rows.append(Row(n, nats / (len(val) - 1), bits, len(train), len(val) - 1, seconds))
    _keep(data, rows)
    return rows, model


def _tokens(data: TokenDataset, split: str) -> Array:
    tokens = np.asarray(data.splits[split][:MOST_TOKENS]).astype(np.int32)
    if len(tokens) and tokens.max() >= data.tokenizer.vocab_size:
        raise UserError(
            f"{data.folder} holds the token id {tokens.max()}, outside its vocabulary of "
            f"{data.tokenizer.vocab_size}: its tokens are damaged, delete the folder to prepare again."
        )
    return tokens


def samples(data: TokenDataset, model: NGram, orders: Sequence[int], length: int, seed: int) -> list[str]:
    """For each n a text of at most `length` tokens, from the start of a document to its end, at temperature 1."""
    end = data.tokenizer.end_of_text
    return [data.tokenizer.decode(model.sample(end, length, seed, n)) for n in orders]


def best(rows: Sequence[Row]) -> Row:
    """The row of the least loss, the shortest n among equals."""
    return min(rows, key=lambda row: (row.val_loss, row.n))


# A source of a run: its data, its share, the held-out tokens that are evaluated, and bytes of text per such token.
EvaluatedSource = tuple[TokenDataset, float, int, float]


def for_run(sources: Sequence[EvaluatedSource]) -> Row | None:
    """The best n-gram on the held-out tokens that a run evaluates on.

    Of a mixture each source has n-grams of its own training tokens, and the losses are weighed as its
    evaluation weighs them. They are found beside the data, or counted where that takes about a second;
    None where it would take longer.
    """
    each = [{row.n: row for row in _quick_rows(data, targets)} for data, _, targets, _ in sources]
    means, size = list(each[0].values()), sum(share * size for _, share, _, size in sources)
    if len(sources) > 1:
        means = [_mean([rows[n] for rows in each], sources, size) for n in sorted(set.intersection(*map(set, each)))]
    return best(means) if means else None


def _mean(rows: Sequence[Row], sources: Sequence[EvaluatedSource], size: float) -> Row:
    """What n-grams of one length lose on a mixture of `size` bytes per token."""
    loss = sum(share * row.val_loss for (_, share, _, _), row in zip(sources, rows, strict=True))
    tokens, targets, seconds = (sum(getattr(row, key) for row in rows) for key in ("tokens", "targets", "seconds"))
    return Row(rows[0].n, loss, loss / math.log(2) / size, tokens, targets, seconds)


def _quick_rows(data: TokenDataset, targets: int) -> list[Row]:
    """What is known of n-grams on these held-out tokens, by n, after counting where that is quick."""
    known = [row for row in _kept(data) if row.targets == targets]
    orders = range(1, min(LONGEST, len(data.splits["train"])) + 1)
    if not {row.n for row in known} >= set(orders) and len(data.splits["train"]) + targets <= QUICK_TOKENS:
        known, _ = measure(data, orders, targets)
    return known


def _kept(data: TokenDataset) -> list[Row]:
    """What was measured earlier on these data."""
    try:
        content = read_json(data.folder / FILE)
        rows = [Row(**row) for row in content["rows"]] if content["fingerprint"] == data.fingerprint else []
    except (UserError, KeyError, TypeError):
        return []
    return rows


def _keep(data: TokenDataset, rows: Sequence[Row]) -> None:
    """Add to what is kept beside the data, unless it can't be written there: it can be measured again."""
    merged = {(row.n, row.tokens, row.targets): asdict(row) for row in [*_kept(data), *rows]}
    content: dict[str, Any] = {"fingerprint": data.fingerprint, "rows": [merged[key] for key in sorted(merged)]}
    with suppress(OSError):
        write_atomically(Path(data.folder) / FILE, json.dumps(content, indent=2))
