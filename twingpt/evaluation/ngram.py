"""Interpolated modified Kneser-Ney n-grams over token ids (Chen & Goodman 1998)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twingpt.core import rng

Array = np.ndarray

LONGEST = 5  # the highest order n
CHUNK = 2**18  # targets that are scored at once


@dataclass(frozen=True)
class Smoothed:
    """Discounted counts of an order: `p(w | h) = share[hw] + backoff[h] * p(w | h without its first token)`.

    `share` is (grams,), `backoff` is (contexts,); float32, as there are many.
    """

    share: Array
    backoff: Array

    def mix(self, lower: Array, context: Array, gram: Array) -> Array:
        """Interpolate with `lower`, the probabilities of the order below; ranks are -1 for what was never seen."""
        backoff = np.where(context >= 0, self.backoff[context], 1.0)
        mixed: Array = np.where(gram >= 0, self.share[gram], 0.0) + backoff * lower
        return mixed


@dataclass(frozen=True)
class Order:
    """The distinct k-grams of a text, sorted: a gram's rank is its place here.

    `keys` are (rank of the first k-1 tokens among the grams of the order below) * vocabulary + last token.
    `occurrences` smooths how often each occurred, for the highest order; `continuations`, for the orders below
    it, after how many different tokens, and is None until a higher order has been counted.
    """

    keys: Array
    occurrences: Smoothed
    continuations: Smoothed | None = None


class NGram:
    """n-gram probabilities from a text, for an n that `grow` raises; the lowest order backs off to uniform."""

    def __init__(self, tokens: Array, vocab_size: int) -> None:
        self.tokens, self.vocab_size = np.asarray(tokens).astype(np.int32), vocab_size
        self.orders: list[Order] = []
        self._ranks_in_text = np.zeros(len(tokens) + 1, np.int32)  # of the highest order's grams, as they occur

    @property
    def n(self) -> int:
        """The highest order, 0 before the first `grow`."""
        return len(self.orders)

    def grow(self) -> None:
        """Count the grams of one token more. The text must have as many tokens."""
        before, n = self._ranks_in_text, self.n + 1
        keys = before[:-1].astype(np.int64) * self.vocab_size + self.tokens[n - 1 :]
        order = np.argsort(keys)
        keys = keys[order]
        new = np.concatenate([[True], keys[1:] != keys[:-1]])
        starts = np.flatnonzero(new)
        self._ranks_in_text = np.empty(len(order), np.int32)
        self._ranks_in_text[order] = np.cumsum(new, dtype=np.int32) - 1
        places = order[starts]  # where in the text each gram occurs, one of its places
        counts = np.diff(np.append(starts, len(keys)))
        keys = keys[starts]
        if self.orders:
            below = self.orders[-1]
            after = np.bincount(before[places + 1], minlength=len(below.keys))
            contexts = len(self.orders[-2].keys) if n > 2 else 1
            self.orders[-1] = Order(below.keys, below.occurrences, self._smooth(below.keys, after, contexts))
        contexts = len(self.orders[-1].keys) if self.orders else 1
        self.orders.append(Order(keys, self._smooth(keys, counts, contexts)))

    def _smooth(self, keys: Array, counts: Array, contexts: int) -> Smoothed:
        context = keys // self.vocab_size
        discounts = discounts_of(counts)[np.minimum(counts, 3)]
        total = np.bincount(context, counts, contexts)
        discounted = np.bincount(context, discounts, contexts)
        backoff = np.where(total > 0, discounted / np.maximum(total, 1), 1.0)
        share = (counts - discounts) / np.maximum(total, 1)[context]
        return Smoothed(share.astype(np.float32), backoff.astype(np.float32))

    def _ranks(self, tokens: Array) -> list[Array]:
        """For each k from 0 to n, the rank of the k tokens that end at each place, -1 where never seen."""
        ranks = [np.zeros(len(tokens), np.int64)]
        for k, order in enumerate(self.orders, 1):
            context = ranks[-1] if k == 1 else np.concatenate([[-1], ranks[-1][:-1]])
            wanted = context * self.vocab_size + tokens
            place = np.minimum(np.searchsorted(order.keys, wanted), len(order.keys) - 1)
            ranks.append(np.where((context >= 0) & (order.keys[place] == wanted), place, -1))
        return ranks

    def probabilities(self, tokens: Array) -> Array:
        """The probability of each token but the first, given all those before it, (len(tokens) - 1,) float64."""
        ranks = self._ranks(np.asarray(tokens).astype(np.int64))
        p = np.full(len(tokens) - 1, 1 / self.vocab_size)
        for k, order in enumerate(self.orders, 1):
            p = _smoothed(order, highest=k == self.n).mix(p, ranks[k - 1][:-1], ranks[k][1:])
        return p

    def nats(self, tokens: Array) -> float:
        """Cross-entropy in nats, summed over each token but the first, which has no context."""
        total, history = 0.0, max(0, self.n - 2)  # tokens before a chunk that its first context begins with
        for first in range(0, len(tokens) - 1, CHUNK):
            begin = max(0, first - history)
            p = self.probabilities(tokens[begin : first + CHUNK + 1])[first - begin :]
            total -= float(np.log(p).sum())
        return total

    def distribution(self, history: Array, n: int) -> Array:
        """The probability of every id after `history` (at least one token) by the n-gram, (V,) float64."""
        history = np.asarray(history[-max(1, n - 1) :], np.int64)
        ranks = self._ranks(history)
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        for k, order in enumerate(self.orders[:n], 1):
            context = int(ranks[k - 1][-1])
            if context < 0:
                continue
            smoothed = _smoothed(order, highest=k == n)
            bounds = np.array([context, context + 1], np.int64) * self.vocab_size
            low, high = np.searchsorted(order.keys, bounds)
            p *= smoothed.backoff[context]
            p[order.keys[low:high] - bounds[0]] += smoothed.share[low:high]
        return p

    def sample(self, start: int, length: int, seed: int, n: int) -> list[int]:
        """Sample at most `length` ids after the id `start` at temperature 1, up to the next `start`.

        The uniform numbers are those that a model's sampler draws with this seed.
        """
        text = [start]
        for position in range(1, length + 1):
            cumulative = self.distribution(np.array(text[-n:]), n).cumsum()
            token = int(np.searchsorted(cumulative, rng.uniform(seed, position) * cumulative[-1], side="right"))
            if token == start:
                break
            text.append(token)
        return text[1:]


def _smoothed(order: Order, *, highest: bool) -> Smoothed:
    return order.occurrences if highest or order.continuations is None else order.continuations


def discounts_of(counts: Array) -> Array:
    """Discounts of a count of 0, 1, 2, and of 3 and more, (4,) float64.

    Chen & Goodman's estimate from how many counts are 1 to 4; where a text has too few of them, or the
    estimate lies outside (0, count], 1/2, 1 and 3/2 as in KenLM (Heafield et al. 2013).
    """
    _, *n = np.bincount(np.minimum(counts, 5), minlength=6)[:5].astype(float)
    result = np.array([0, 0.5, 1, 1.5])
    if all(n[:3]):
        y = n[0] / (n[0] + 2 * n[1])
        estimate = np.array([0, *(i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3))])
        fine = (estimate > 0) & (estimate <= np.arange(4))
        result[fine] = estimate[fine]
    return result
