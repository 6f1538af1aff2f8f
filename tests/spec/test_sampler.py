"""The sampler's spec, and the device samplers against it."""

from importlib import import_module

import numpy as np
import pytest

from twingpt.core import rng
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.sampler import Sampling, SamplingRows, sample
from twingpt.inference.decoding import Row, decode

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))
PLAIN = {"temp": 1.0, "top_p": 1.0}


def draws(n=4000, **settings):
    sampling = Sampling(**{**PLAIN, **settings})
    tokens = [sample(LOGITS, sampling, rng.uniform(1, i)) for i in range(n)]
    return np.bincount(tokens, minlength=5) / n


def test_without_filters_it_draws_the_distribution():
    np.testing.assert_allclose(draws(), np.exp(LOGITS), atol=0.03)


def test_greedy():
    assert sample(LOGITS, Sampling(temp=0), 0.99) == 1


def test_temperature_sharpens():
    np.testing.assert_allclose(draws(temp=0.5), np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum(), atol=0.03)


def test_top_k():
    np.testing.assert_allclose(draws(top_k=2), np.array([0, 0.4, 0, 0.25, 0]) / 0.65, atol=0.03)


def test_top_p_keeps_the_token_that_crosses_it():
    np.testing.assert_allclose(draws(top_p=0.5), np.array([0, 0.4, 0, 0.25, 0]) / 0.65, atol=0.03)


def test_min_p():
    np.testing.assert_allclose(draws(min_p=0.5), np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85, atol=0.03)


def test_repetition_penalty_pushes_both_signs_down():
    seen = np.array([True, True])
    assert sample(np.array([2.0, 1.5]), Sampling(temp=0, repetition_penalty=2.0), 0.0, ~seen) == 0
    assert sample(np.array([2.0, 1.5]), Sampling(temp=0, repetition_penalty=2.0), 0.0, np.array([True, False])) == 1
    assert sample(np.array([-1.0, -1.5]), Sampling(temp=0, repetition_penalty=2.0), 0.0, np.array([True, False])) == 1


def test_u_walks_down_the_sorted_distribution():
    sampling = Sampling(**PLAIN)
    assert [sample(LOGITS, sampling, u) for u in (0.0, 0.39, 0.41, 0.64, 0.66, 0.86, 0.96)] == [1, 1, 3, 3, 4, 0, 2]


def test_a_device_samples_some_id_where_no_logit_is_a_number(placed):
    config = GPTConfig(vocab_size=97, block_size=16, n_layer=1, n_embd=32)
    params = dict(initialise(config, 0))
    params["model.norm.weight"] = np.full(32, np.nan, np.float32)
    engine = placed.InferenceEngine(config, params.items(), placed.device)
    cache = engine.new_cache(1, 4)
    engine.prefill(cache, 0, np.array([1, 2]))
    sampled = engine.read(engine.step(cache, SamplingRows([Sampling()]), np.array([0.5])))
    assert 0 <= sampled.tokens[0] < 97 and np.isnan(sampled.log_probs[0])
    with pytest.raises(UserError, match="The model's logits are not finite"):
        list(decode(engine, [Row([1, 2], Sampling(), 4, 0)]))


def test_the_last_representable_u_stays_in_the_vocabulary():
    assert sample(LOGITS, Sampling(**PLAIN), 1 - 2**-24) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": -1},
        {"temp": 1e-40},
        {"top_k": -1},
        {"top_k": 10**30},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-40},
    ],
)
def test_impossible_settings(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)


SETTINGS = [
    {}, {"temp": 0.0}, {"temp": 0.7, "top_k": 5}, {"top_p": 0.3}, {"min_p": 0.1}, {"top_k": 1000},
    {"temp": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02}, {"repetition_penalty": 1.5, "temp": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_device_sampler_equals_the_spec(placed, settings):
    rows = [Sampling(**{**PLAIN, **settings})] * 64
    if not settings:  # each row has settings of its own
        rows = [Sampling(**{**PLAIN, **chosen}) for chosen in SETTINGS for _ in range(8)]
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (64, 300)).astype(np.float32)
    u = random.random(64, np.float32)
    seen = random.random((64, 300)) < 0.2
    sampler, device = (import_module(f"twingpt.backends.{placed.NAME}.{name}") for name in ("sampler", "device"))
    place = [placed.device] if placed.NAME == "torch" else []

    def array(values):
        return device.to_device(values, *place)

    batch = SamplingRows(rows)
    penalise = (batch.repetition_penalty != 1).any()
    with placed.stream():
        tokens = sampler.sample(array(logits), batch, u, array(seen) if penalise else None, *place)
        log_prob = sampler.log_prob(array(logits), tokens).tolist()
    assert tokens.tolist() == [sample(logits[i], rows[i], float(u[i]), seen[i]) for i in range(64)]
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    expected = [log_p[row, token] for row, token in enumerate(tokens.tolist())]
    np.testing.assert_allclose(log_prob, expected, atol=placed.within(1e-5))


def test_uniforms_are_keyed_and_even():
    u = np.array([rng.uniform(seed, i) for seed in (1, 2) for i in range(2000)])
    assert u.min() >= 0 and u.max() < 1 and len(set(u.tolist())) > 3990
    assert np.histogram(u, 10, (0, 1))[0].min() > 330
    assert rng.uniform(1, 5) == rng.uniform(1, 5) != rng.uniform(1, 6)
