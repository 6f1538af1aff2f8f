"""n-grams against a plain implementation with dictionaries, and as distributions."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twingpt.evaluation import ngram
from twingpt.evaluation.ngram import LONGEST, NGram


class Plain:
    """Interpolated modified Kneser-Ney as Chen & Goodman (1998) write it, a gram at a time."""

    def __init__(self, tokens, vocab_size, n):
        self.vocab_size, self.n = vocab_size, n
        grams = {k: Counter(tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)) for k in range(1, n + 1)}
        self.counts = {n: grams[n]}
        for k in range(1, n):
            self.counts[k] = Counter(gram[1:] for gram in grams[k + 1])  # each longer gram counts once
        self.discounts = {k: self._discounts(counts) for k, counts in self.counts.items()}
        self.after = {k: defaultdict(dict) for k in self.counts}
        for k, counts in self.counts.items():
            for gram, count in counts.items():
                self.after[k][gram[:-1]][gram[-1]] = count

    def _discounts(self, counts):
        n1, n2, n3, n4 = (sum(count == i for count in counts.values()) for i in (1, 2, 3, 4))
        discounts = [0.5, 1.0, 1.5]
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            estimates = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            for i, estimate in enumerate(estimates):
                if 0 < estimate <= i + 1:
                    discounts[i] = estimate
        return discounts

    def probability(self, history, token, k=None):
        k = self.n if k is None else k
        if k == 0:
            return 1 / self.vocab_size
        lower = self.probability(history, token, k - 1)
        if len(history) < k - 1:
            return lower
        after = self.after[k].get(tuple(history[len(history) - k + 1 :]))
        if not after:
            return lower
        taken = {w: self.discounts[k][min(count, 3) - 1] for w, count in after.items()}
        total = sum(after.values())
        share = max(0, after.get(token, 0) - taken.get(token, 0)) / total
        return share + sum(taken.values()) / total * lower


def grown(tokens, vocab_size, n) -> NGram:
    model = NGram(np.array(tokens), vocab_size)
    for _ in range(n):
        model.grow()
    return model


def markov(length: int, vocab_size: int, seed: int) -> list[int]:
    """A text with structure: each token is likely to be one of two that depend on the last two."""
    chance, text = np.random.default_rng(seed), [0, 1]
    while len(text) < length:
        likely = (3 * text[-1] + 5 * text[-2] + int(chance.integers(2))) % vocab_size
        text.append(likely if chance.random() < 0.7 else int(chance.integers(vocab_size)))
    return text


texts = st.lists(st.integers(0, 4), min_size=LONGEST, max_size=60)


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.integers(1, LONGEST))
def test_probabilities_are_those_of_a_plain_implementation(text, other, n):
    other = [*other, 6, 1, 5]  # ids that the text never has
    plain, model = Plain(text, 7, n), grown(text, 7, n)
    expected = [plain.probability(other[:i], other[i]) for i in range(1, len(other))]
    np.testing.assert_allclose(model.probabilities(np.array(other)), expected, rtol=2e-6)


@settings(max_examples=60, deadline=None)
@given(texts, st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, LONGEST), st.integers(0, 1))
def test_probabilities_sum_to_one_after_any_history(text, history, n, fewer):
    model = grown(text, 7, n)
    p = model.distribution(np.array(history), n)
    assert p.sum() == pytest.approx(1, abs=1e-6) and p.min() > 0
    each = [model.probabilities(np.array([*history, token]))[-1] for token in range(7)]
    np.testing.assert_allclose(p, each, rtol=1e-6)
    shorter = max(1, n - fewer)  # drawn from the counts of a longer one, it is the same
    alone = grown(text, 7, shorter).distribution(np.array(history), shorter)
    np.testing.assert_allclose(model.distribution(np.array(history), shorter), alone, rtol=1e-6)


@pytest.mark.parametrize("n", range(1, LONGEST + 1))
def test_a_longer_text_with_estimated_discounts(n):
    """Counts of 1 to 4 all occur, so that no discount is the fallback; and the vocabulary needs more than 16 bits."""
    text, other = markov(3000, 40, 1), markov(300, 40, 2)
    plain, model = Plain(text, 100_000, n), grown(text, 100_000, n)
    assert n == 1 or plain.discounts[n] != [0.5, 1.0, 1.5]
    expected = [plain.probability(other[:i], other[i]) for i in range(1, len(other))]
    np.testing.assert_allclose(model.probabilities(np.array(other)), expected, rtol=2e-6)
    assert model.nats(np.array(other)) == pytest.approx(-sum(map(math.log, expected)), rel=1e-6)


def test_discounts_are_chen_and_goodmans():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 7])
    y = 40 / (40 + 2 * 20)
    expected = [0, 1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10]
    assert ngram.discounts_of(counts) == pytest.approx(expected)
    assert list(ngram.discounts_of(np.array([5, 6, 7]))) == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_loss_is_the_same_in_pieces(monkeypatch, n):
    model, other = grown(markov(2000, 20, 3), 20, n), np.array(markov(100, 20, 4))
    whole = model.nats(other)
    monkeypatch.setattr(ngram, "CHUNK", 7)
    assert model.nats(other) == pytest.approx(whole, rel=1e-12)


def test_longer_grams_predict_a_structured_text_better():
    text, other = markov(20_000, 20, 5), np.array(markov(2000, 20, 6))
    losses = [grown(text, 20, n).nats(other) / 1999 for n in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2] + 0.3 and losses[0] == pytest.approx(math.log(20), abs=0.05)


def test_samples_are_reproducible_and_follow_the_counts():
    model = grown([9, *([0, 1, 2, 3] * 200)], 10, 3)
    text = model.sample(9, 100, seed=1, n=3)
    assert len(text) <= 100 and text == model.sample(9, 100, seed=1, n=3) != model.sample(9, 100, seed=2, n=3)
    assert sum((a + 1) % 4 == b for a, b in pairwise(text)) > 0.9 * (len(text) - 1)
    ends = grown([9, 0, 9, 0, 9, 0, 9, 0], 10, 2).sample(9, 500, seed=1, n=2)
    assert 9 not in ends and len(ends) < 500  # the document ended
