"""The order of windows: a permutation for each epoch, and a function of (seed, step) alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twingpt.core.data.order import permute, window_count, window_starts


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permute_is_a_permutation(n, seed):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed)), np.arange(n))


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
