"""The executable spec against what must hold of any such model, and against hand-computed values."""

import dataclasses
import math

import numpy as np
import pytest

from twingpt.core import reference
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.rope import rope_frequencies, rope_periods

CONFIG = GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, init_std=0.2)


def run(config, tokens, seed=0):
    return reference.forward(dict(initialise(config, seed)), tokens, config)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 61, (2, 24))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_position_sees_the_future(shape, tokens):
    config = GPTConfig.from_dict({**CONFIG.to_dict(), "n_kv_head": 4, **SHAPES[shape]})
    before = run(config, tokens)
    changed = tokens.copy()
    changed[:, 15:] = (changed[:, 15:] + 7) % 61
    after = run(config, changed)
    np.testing.assert_allclose(before[:, :15], after[:, :15], atol=1e-12)
    assert not np.allclose(before[:, 15:], after[:, 15:])


def test_a_window_forgets_what_is_behind_it(tokens):
    config = dataclasses.replace(CONFIG, sliding_window=5, n_layer=1)
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 61
    before, after = run(config, tokens), run(config, changed)
    differs = np.abs(before - after).max(axis=(0, 2)) > 1e-12
    assert differs.nonzero()[0].tolist() == [3, 4, 5, 6, 7]  # query - key < 5


def test_rope_depends_on_distance_only(tokens):
    q = np.random.default_rng(1).normal(size=(1, 1, 24, 8))
    q[:] = q[:, :, :1]  # the same vector everywhere
    scores = reference.rope(q, CONFIG)[0, 0] @ reference.rope(q, CONFIG)[0, 0].T
    for distance in range(1, 5):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-5)


def test_rope_rotates_halves_by_plus_theta():
    config = GPTConfig(vocab_size=8, n_embd=4, n_head=1, rope_theta=100.0)
    x = np.zeros((1, 1, 2, 4))
    x[0, 0, 1] = [1, 0, 0, 0]
    rotated = reference.rope(x, config)[0, 0, 1]
    np.testing.assert_allclose(rotated, [math.cos(1), 0, math.sin(1), 0], atol=1e-7)


def test_without_positions_order_does_not_matter_to_the_last_token(tokens):
    config = dataclasses.replace(CONFIG, position="none", n_layer=1)
    swapped = tokens.copy()
    swapped[:, [2, 9]] = swapped[:, [9, 2]]
    np.testing.assert_allclose(run(config, tokens)[:, -1], run(config, swapped)[:, -1], atol=1e-12)


def test_softcap_bounds_the_logits(tokens):
    assert np.abs(run(dataclasses.replace(CONFIG, logit_softcap=0.5), tokens)).max() < 0.5


def test_rms_norm_by_hand():
    y = reference.rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(y, [3 / math.sqrt(12.5), 8 / math.sqrt(12.5)])


@pytest.mark.parametrize(
    ("mlp", "x", "y"),
    [("relu2", 3.0, 9.0), ("relu2", -3.0, 0.0), ("swiglu", 1.0, 1 / (1 + math.exp(-1))),
     ("gelu", 1.0, 0.8413447460685429), ("gelu_tanh", 1.0, 0.8411919906082768)],
)  # fmt: skip
def test_activations_by_hand(mlp, x, y):
    assert reference.activation(np.array([x]), mlp)[0] == pytest.approx(y, rel=1e-12)


def test_cross_entropy_of_uniform_logits_is_log_v_and_ignores_negative_targets():
    nats = reference.cross_entropy(np.zeros((1, 3, 50)), np.array([[4, -1, 49]]))
    np.testing.assert_allclose(nats, [[math.log(50), 0, math.log(50)]])


def test_reciprocal_of_a_period_is_the_frequency():
    for theta in (10000.0, 500000.0):
        config = dataclasses.replace(CONFIG, rope_theta=theta)
        assert np.array_equal(np.float32(1) / rope_periods(config)[0], rope_frequencies(config)[0])


def test_group_of_heads_equals_repeated_heads(tokens):
    """GQA is MHA whose key-value heads are copies."""
    params = dict(initialise(CONFIG, 0))
    full = dataclasses.replace(CONFIG, n_kv_head=4)
    copied = dict(params)
    for layer in range(2):
        for part in ("k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            copied[name] = params[name].reshape(2, 8, 32).repeat(2, axis=0).reshape(32, 32)
    np.testing.assert_allclose(
        reference.forward(params, tokens, CONFIG), reference.forward(copied, tokens, full), atol=1e-12
    )
