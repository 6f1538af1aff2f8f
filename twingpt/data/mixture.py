"""Several sources as one: windows of each by its weight, in an order that is a function of (seed, number) alone."""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from twingpt.core import paths
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.order import interleave, source_counts
from twingpt.core.tokenizer import Tokenizer
from twingpt.data.prepare import find, learn, prepare
from twingpt.data.shards import SPLITS, TokenDataset

Array = np.ndarray

MOST_SHARES = 2**30  # what weights sum to in whole numbers, at most


def parse(data: str | Sequence[str]) -> list[tuple[str, float]]:
    """The sources that --data names and their weights: `SOURCE:WEIGHT`, or `SOURCE` alone for a weight of 1.

    Only a number after the last colon is a weight, and only where nothing of the whole name exists.
    Raises UserError for a weight that is not positive, and for a source given twice.
    """
    sources = [_weighted(spec) for spec in ([data] if isinstance(data, str) else data)]
    for spec, count in Counter(spec for spec, _ in sources).items():
        if count > 1:
            raise UserError(f"--data {spec} is given {count} times: give it once, with the sum of the weights.")
    return sources


def _weighted(text: str) -> tuple[str, float]:
    spec, colon, number = text.rpartition(":")
    path = str(paths.expand(text))
    if not colon or os.path.lexists(path) or glob.glob(path):  # noqa: PTH207  (the path may be absolute)
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not 0 < weight < math.inf:
        raise UserError(f"--data {text}: a weight must be a positive number, and is {number}.")
    return spec, weight


def title(data: str | Sequence[str]) -> str:
    """A short name for what --data names, to name a run by."""
    return "+".join(Path(spec).stem for spec, _ in parse(data))[:60]


def spell(data: str | Sequence[str]) -> str:
    """What --data names, in one line."""
    return data if isinstance(data, str) else ", ".join(data)


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of `weights` as they are written: of 0.7 and 0.3 these are 7 and 3.

    Where those would be larger than MOST_SHARES in all, they are rounded to that, each to at least 1.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(part.denominator for part in exact))
    shares = [int(part * scale) for part in exact]
    shares = [share // math.gcd(*shares) for share in shares]
    if (total := sum(shares)) > MOST_SHARES:
        shares = [max(1, share * MOST_SHARES // total) for share in shares]
    return shares


@dataclass(frozen=True)
class Part:
    """A source of a mixture: its name there, its share of the windows, and its tokens."""

    name: str
    share: float
    data: TokenDataset


class Mixture:
    """Prepared data sets of one tokenizer, trained on in the proportions of their weights; used as a TokenDataset is.

    `specs` are their names to tell them apart by, where they are called the same, and `asked` the options of a
    run that one of them decides, being prepared by name. Raises UserError where two have different tokenizers,
    or are the same.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        weights: Sequence[float],
        specs: Sequence[str],
        asked: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        names = [str(data.manifest["name"]) for data in datasets]
        names = names if len(set(names)) == len(names) else list(specs)
        first = datasets[0]
        _check_tokenizers(names, datasets)
        for i, data in enumerate(datasets):
            if same := [names[j] for j in range(i) if datasets[j].folder == data.folder]:
                raise UserError(
                    f"{same[0]} and {names[i]} are the same data: give it once, with the sum of the weights."
                )
        self.shares = whole_shares(weights)
        self.parts = [
            Part(name, share / sum(self.shares), data)
            for name, share, data in zip(names, self.shares, datasets, strict=True)
        ]
        self.tokenizer, self.asked = first.tokenizer, dict(asked)

    @property
    def manifest(self) -> dict[str, Any]:
        """What a data set's manifest says of name, vocabulary and size, for all sources together."""
        parts = [part.data.manifest for part in self.parts]
        sizes = {
            split: {key: sum(part["splits"][split][key] for part in parts) for key in ("tokens", "bytes")}
            for split in SPLITS
        }
        name = " + ".join(f"{part.name} {part.share:.3g}" for part in self.parts)
        same = {key: parts[0][key] for key in ("vocab_size", "tokenizer")}
        return {"name": name, "asked": self.asked, **same, "splits": sizes}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sources' own and their shares, in order: what a resumed run must find again."""
        parts = [f"{part.data.fingerprint} {share}" for part, share in zip(self.parts, self.shares, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check(self, config: GPTConfig) -> None:
        """Raise UserError unless every source can train the model (see TokenDataset.check)."""
        for part in self.parts:
            part.data.check(config)

    def batch(self, first: int, batch_size: int, block_size: int, seed: int) -> tuple[Array, Array]:
        """Training windows number `first` to `first + batch_size` of the run: tokens and targets, (B, T) int32.

        Each source gives its windows in an order of its own, keyed by its place in the mixture.
        """
        source, rank = interleave(np.arange(first, first + batch_size), self.shares, seed)
        windows = np.empty((batch_size, block_size + 1), np.int32)
        for i in np.unique(source).tolist():
            rows = np.flatnonzero(source == i)
            self.parts[i].data.read(windows, rows, rank[rows], seed, "source", i)
        return windows[:, :-1], windows[:, 1:]

    def validation(self, batch_size: int, block_size: int, n_batches: int) -> Iterator[tuple[Array, Array]]:
        """The held-out batches of each source in turn, at most `n_batches` of each (0: all)."""
        for part in self.parts:
            yield from part.data.validation(batch_size, block_size, n_batches)

    def source_epochs(self, windows: int, block_size: int, seed: int) -> dict[str, float]:
        """How often the first `windows` of the run go through each source."""
        counts = source_counts(np.array([windows]), self.shares, seed)[:, 0]
        pairs = zip(self.parts, counts.tolist(), strict=True)
        return {part.name: part.data.epochs(count, block_size) for part, count in pairs}

    def epochs(self, windows: int, block_size: int) -> float:
        """So many windows, as a share of one pass through all sources."""
        return windows / sum(1 / part.data.epochs(1, block_size) for part in self.parts)


def _check_tokenizers(names: Sequence[str], datasets: Sequence[TokenDataset]) -> None:
    for name, data in zip(names, datasets, strict=True):
        if data.manifest["tokenizer"] != datasets[0].manifest["tokenizer"]:
            raise UserError(
                f"{names[0]} and {name} have different tokenizers, {_described(datasets[0])} and {_described(data)}: "
                "prepare both with the same one."
            )


def _described(data: TokenDataset) -> str:
    return f"{data.tokenizer.kind} of {data.tokenizer.vocab_size:,} ids ({data.manifest['tokenizer'][:8]})"


Data = TokenDataset | Mixture


def parts(data: Data) -> list[Part]:
    """The sources of what a run trains on; one, with all windows, where it is no mixture."""
    return data.parts if isinstance(data, Mixture) else [Part(str(data.manifest["name"]), 1.0, data)]


def prepare_all(data: str | Sequence[str], kind: str, vocab_size: int, tokenizer: Tokenizer | None = None) -> Data:
    """What --data names, prepared under the tokenizer called `kind`, or under the one given.

    A kind that is learned is learned from the training texts of all sources; where one of them was
    prepared by name, its tokenizer is that of all.
    """
    sources = parse(data)
    specs = [spec for spec, _ in sources]
    if len(sources) == 1:
        return prepare(specs[0], kind, vocab_size, tokenizer)
    named = {spec: TokenDataset(folder) for spec in specs if (folder := find(spec))}
    first = next(iter(named.values()), None)
    if not tokenizer:
        _check_tokenizers(list(named), list(named.values()))
        tokenizer = first.tokenizer if first else learn(specs, kind, vocab_size)
    datasets = [prepare(spec, kind, vocab_size, tokenizer) for spec in specs]
    asked = first.manifest.get("asked", {}) if first else {}
    return Mixture(datasets, [weight for _, weight in sources], specs, asked)


def folders(data: Data) -> str | list[str]:
    """Where the prepared data are, for `open_folders`."""
    found = [str(part.data.folder.resolve()) for part in parts(data)]
    return found if isinstance(data, Mixture) else found[0]


def open_folders(found: str | Sequence[str], data: str | Sequence[str]) -> Data | None:
    """What `prepare_all` of `data` gave, from the folders it is in; None where one of them is gone."""
    places, sources = [Path(place) for place in ([found] if isinstance(found, str) else found)], parse(data)
    if len(places) != len(sources) or not all(place.exists() for place in places):
        return None
    datasets = [TokenDataset(place) for place in places]
    if len(sources) == 1:
        return datasets[0]
    return Mixture(datasets, [weight for _, weight in sources], [spec for spec, _ in sources])
