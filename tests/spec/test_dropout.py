"""Dropout's masks: their rate, their independence, and that a window has its own whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest

from twingpt.core.dropout import dropout_keys, dropped, mix


def test_the_finalizer_is_murmurs():
    # fmix32 of MurmurHash3's reference implementation
    assert mix(np.array([0, 1, 2, 0xFFFFFFFF], np.uint32)).tolist() == [0, 0x514E28B7, 0x30F4C306, 0x81F16F39]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(rate):
    masks = dropped(dropout_keys(7, np.arange(16), 1)[:, 0], 64, 128, rate)
    assert masks.mean() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / masks.size) ** 0.5 + 1e-12)


def test_a_window_has_its_mask_in_any_batch():
    whole = dropout_keys(1, np.arange(100, 108), 5)
    parts = np.concatenate([dropout_keys(1, np.arange(100, 103), 5), dropout_keys(1, np.arange(103, 108), 5)])
    assert np.array_equal(whole, parts)
    assert np.array_equal(whole[2], dropout_keys(1, np.array([102]), 9)[0, :5])


def test_masks_of_other_seeds_windows_and_sites_are_independent():
    keys = [
        *dropout_keys(1, np.array([0, 1, 2**32, 2**32 + 1, 10**12]), 4).ravel(),
        *dropout_keys(2, np.arange(2), 4).ravel(),
    ]
    assert len(set(keys)) == len(keys)
    signs = np.stack([dropped(np.array([key]), 64, 128, 0.5).ravel() - 0.5 for key in keys]) * 2
    correlation = signs @ signs.T / signs.shape[1] - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / signs.shape[1] ** 0.5
