"""The order of windows: a permutation for each epoch, and a function of (seed, step) alone."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twingpt.core.order import interleave, permute, source_counts, window_count, window_starts

SEEDS = st.integers(0, 2**64)
PRIMES = (2, 3, 5, 7, 127, 131, 8191, 65537, 104_729, 524_287)


def is_permutation(image, n) -> bool:
    """Whether `image` holds each of range(n) once."""
    return len(image) == n and image.min() >= 0 and image.max() < n and (np.bincount(image, minlength=n) == 1).all()


@pytest.mark.parametrize("first", range(1, 2049, 256))
def test_permute_is_a_permutation_of_every_small_size(first):
    for n in range(first, first + 256):
        assert is_permutation(permute(np.arange(n), n, first), n), n


@pytest.mark.parametrize("n", sorted({*PRIMES, *(2**k + d for k in range(1, 18) for d in (-1, 0, 1))}))
def test_permute_is_a_permutation_of_primes_and_about_powers_of_two(n):
    assert is_permutation(permute(np.arange(n), n, "a key", n), n)


@given(st.integers(1, 10**6), SEEDS)
@settings(max_examples=20, deadline=None)
@example(1, 0)
@example(10**6 + 3, 1)
def test_permute_is_a_permutation_under_any_key(n, seed):
    assert is_permutation(permute(np.arange(n), n, seed), n)


@given(st.integers(1, 2**48), SEEDS, st.data())
def test_permute_sends_no_two_of_a_huge_range_to_the_same_place(n, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=40, unique=True)))
    image = permute(index, n, seed)
    assert len(set(image.tolist())) == len(index) and image.min() >= 0 and image.max() < n
    assert np.array_equal(image, [permute(np.array([i]), n, seed)[0] for i in index])  # each alone as among others


def test_permutation_depends_on_the_key_and_mixes():
    a, b = (permute(np.arange(1000), 1000, seed) for seed in (1, 2))
    assert (a == b).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), a)[0, 1]) < 0.1


def test_permutation_of_a_set_too_large_to_hold():
    index = np.arange(5) + 10**12 - 5
    image = permute(index, 10**12, 7)
    assert len(set(image.tolist())) == 5 and (image < 10**12).all() and (image >= 0).all()


@given(st.integers(2, 5000), st.integers(1, 64), st.integers(0, 100))
def test_windows_lie_within_the_tokens_and_do_not_overlap(n_tokens, block_size, seed):
    if n_tokens <= block_size:
        return
    n = window_count(n_tokens, block_size)
    for epoch in range(2):
        starts = window_starts(np.arange(n) + epoch * n, n_tokens, block_size, seed)
        assert starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens
        assert (np.diff(np.sort(starts)) == block_size).all()


def test_epochs_differ_in_order_and_offset():
    first, second = (window_starts(np.arange(99) + e * 99, 3200, 32, 1) for e in (0, 1))
    assert first.min() != second.min()
    assert not np.array_equal(first - first.min(), second - second.min())


def test_a_batch_is_a_function_of_seed_and_number_alone():
    whole = window_starts(np.arange(500), 3200, 32, 1)
    parts = [window_starts(np.arange(i, i + 50), 3200, 32, 1) for i in range(0, 500, 50)]
    assert np.array_equal(whole, np.concatenate(parts))


@given(st.integers(1, 40_000), st.integers(1, 64), SEEDS, st.integers(0, 3), st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_each_window_once_whatever_the_batches(extra, block_size, seed, epoch, batch):
    n_tokens = block_size + extra
    n = window_count(n_tokens, block_size)
    numbers = np.arange(n) + epoch * n
    starts = np.concatenate(
        [window_starts(numbers[i : i + batch], n_tokens, block_size, seed) for i in range(0, n, batch)]
    )
    windows, offsets = np.divmod(starts, block_size)
    assert len(set(offsets.tolist())) == 1 and is_permutation(windows, n)


SHARES = st.lists(st.integers(1, 1000) | st.integers(1, 2**28), min_size=2, max_size=5)


@given(SHARES, st.integers(0, 2**40), SEEDS)
@settings(deadline=None)
def test_sources_take_turns_by_their_shares(shares, first, seed):
    numbers = np.arange(first, first + 300)
    source, rank = interleave(numbers, shares, seed)
    before = source_counts(np.array([first]), shares, seed)[:, 0]
    for i, share in enumerate(shares):
        mine = rank[source == i]
        assert np.array_equal(mine, np.arange(len(mine)) + before[i])  # none is left out, none comes twice
        counts = np.cumsum(source == i) - np.arange(1, 301) * (share / sum(shares))
        assert np.abs(counts).max() < len(shares)
    again = interleave(numbers[123:200], shares, seed)
    assert np.array_equal(again[0], source[123:200]) and np.array_equal(again[1], rank[123:200])


@given(SHARES, st.integers(0, 1000), SEEDS)
def test_a_whole_round_has_each_source_exactly_by_its_share(shares, rounds, seed):
    total = sum(shares)
    counts = source_counts(np.array([rounds, rounds + 1]) * total, shares, seed)
    assert np.array_equal(counts[:, 1] - counts[:, 0], shares)


def test_the_order_of_sources_depends_on_the_seed():
    orders = {tuple(interleave(np.arange(100), [3, 2, 1], seed)[0]) for seed in range(20)}
    assert len(orders) > 5


def test_the_order_of_one_source_is_for_good():
    """Runs of earlier versions go on with the windows they would have had."""
    starts = window_starts(np.array([0, 1, 2, 98, 99, 100]), 3200, 32, 1337)
    assert starts.tolist() == [760, 2552, 344, 3096, 81, 1873]
    starts = window_starts(np.array([0, 1023, 1024, 1025, 9999, 10**6]), 2**20, 64, 7)
    assert starts.tolist() == [960926, 817246, 1007838, 905566, 720734, 569255]
