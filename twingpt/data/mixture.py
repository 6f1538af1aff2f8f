"""Data mixtures: windows of several data sets in the proportions of their weights, in an order keyed by the seed."""

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
from twingpt.data.prepare import find, prepare, shared_tokenizer
from twingpt.data.shards import SPLITS, TokenDataset
from twingpt.data.sources import RULES, printable

Array = np.ndarray

MOST_SHARES = 2**30  # what `whole_shares` sum to, at most


def parse(data: str | Sequence[str]) -> list[tuple[str, float]]:
    """The sources and weights in --data: `SOURCE:WEIGHT`, or `SOURCE` alone for a weight of 1.

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
    name = "+".join(printable(Path(spec).stem) for spec, _ in parse(data))[:60]
    return name.encode()[:180].decode("utf-8", "ignore")  # a file's name has 255 bytes at most


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
class MixturePart:
    """A data set in a mixture: its name there and its share of the windows, of 1."""

    name: str
    share: float
    data: TokenDataset


class Mixture:
    """A weighted mixture of data sets with one tokenizer; used as a TokenDataset is.

    `specs` are what --data calls them, by which those of one name are told apart; `asked` are the options of a run
    that one of them decides, being prepared by name. Raises UserError where two have different tokenizers, or are
    the same.
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
            MixturePart(name, share / sum(self.shares), data)
            for name, share, data in zip(names, self.shares, datasets, strict=True)
        ]
        self.tokenizer, self.asked = first.tokenizer, dict(asked)

    @property
    def manifest(self) -> dict[str, Any]:
        """The keys of a TokenDataset's manifest that runs read, for all sources together."""
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
        """SHA-256 over the sources' fingerprints and shares, in order, which a resumed run must find unchanged."""
        parts = [f"{part.data.fingerprint} {share}" for part, share in zip(self.parts, self.shares, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def holds_out(self) -> bool:
        """Whether every source has held-out text to evaluate on."""
        return all(part.data.holds_out for part in self.parts)

    def check(self, config: GPTConfig, *, evaluated: bool = True) -> None:
        """Raise UserError unless every source can train the model (see TokenDataset.check)."""
        for part in self.parts:
            part.data.check(config, evaluated=evaluated)

    def batch(self, first: int, batch_size: int, block_size: int, seed: int) -> tuple[Array, Array]:
        """Tokens and targets, (B, T) int32, of the run's training windows `first` to `first + batch_size`.

        The order of a source's windows is keyed by the seed and its place in the mixture.
        """
        source, rank = interleave(np.arange(first, first + batch_size), self.shares, seed)
        windows = np.empty((batch_size, block_size + 1), np.int32)
        for i in np.unique(source).tolist():
            rows = np.flatnonzero(source == i)
            self.parts[i].data.gather(windows, rows, rank[rows], seed, "source", i)
        return windows[:, :-1], windows[:, 1:]

    def validation(self, batch_size: int, block_size: int, n_batches: int) -> Iterator[tuple[Array, Array]]:
        """The held-out batches of each source in turn, at most `n_batches` of each (0: all)."""
        for part in self.parts:
            yield from part.data.validation(batch_size, block_size, n_batches)

    def source_epochs(self, windows: int, block_size: int, seed: int) -> dict[str, float]:
        """Epochs of each source that the first `windows` of the run are."""
        counts = source_counts(np.array([windows]), self.shares, seed)[:, 0]
        pairs = zip(self.parts, counts.tolist(), strict=True)
        return {part.name: part.data.epochs(count, block_size) for part, count in pairs}

    def epochs(self, windows: int, block_size: int) -> float:
        """Epochs that so many windows are, where one goes through as many as all sources have."""
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


def parts(data: Data) -> list[MixturePart]:
    """The data sets of a mixture, or the only one, with a share of 1."""
    return data.parts if isinstance(data, Mixture) else [MixturePart(str(data.manifest["name"]), 1.0, data)]


def prepare_all(
    data: str | Sequence[str],
    kind: str,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    val: str | None = None,
    rules: int = RULES,
) -> Data:
    """Prepare what --data names under the tokenizer called `kind`, or under the one given.

    A kind that is learned is learned from the training texts of all sources; where one of them was
    prepared by name, its tokenizer is that of all. `val` is what is held out of each, and `rules` how they are read, as
    in `prepare`.
    """
    sources = parse(data)
    specs = [spec for spec, _ in sources]
    if len(sources) == 1:
        return prepare(specs[0], tokenizer or kind, vocab_size, val, rules)
    named = {spec: TokenDataset(folder) for spec in specs if (folder := find(spec))}
    first = next(iter(named.values()), None)
    if not tokenizer:
        _check_tokenizers(list(named), list(named.values()))
        tokenizer = first.tokenizer if first else shared_tokenizer(specs, kind, vocab_size, val, rules)
    datasets = [prepare(spec, tokenizer or kind, vocab_size, val, rules) for spec in specs]
    asked = first.manifest.get("asked", {}) if first else {}
    return Mixture(datasets, [weight for _, weight in sources], specs, asked)


def rules(data: Data) -> int:
    """The version of the rules by which the sources were read; prepared by name, one may be older."""
    return max(int(part.data.manifest.get("rules", 1)) for part in parts(data))


def folders(data: Data) -> str | list[str]:
    """The folders of the prepared data, for `open_folders`; of one data set, its own."""
    found = [str(part.data.folder.resolve()) for part in parts(data)]
    return found if isinstance(data, Mixture) else found[0]


def open_folders(folders: str | Sequence[str], data: str | Sequence[str]) -> Data | None:
    """What `prepare_all` of `data` gave, from its folders; None where one of them is gone."""
    found, sources = list(map(Path, [folders] if isinstance(folders, str) else folders)), parse(data)
    if len(found) != len(sources) or not all(folder.exists() for folder in found):
        return None
    datasets = [TokenDataset(folder) for folder in found]
    if len(sources) == 1:
        return datasets[0]
    return Mixture(datasets, [weight for _, weight in sources], [spec for spec, _ in sources])
