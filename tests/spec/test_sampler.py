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


def frequencies(probabilities, text=(), n_prompt=0, **settings):
    """Chi-square of 4000 draws against `probabilities`, at the 0.1 % level; what has none must not be drawn."""
    sampling, expected = Sampling(**{**PLAIN, **settings}), np.asarray(probabilities, float)
    tokens = [sample(LOGITS, sampling, rng.uniform(1, i), text, n_prompt) for i in range(4000)]
    drawn, expected = np.bincount(tokens, minlength=5), 4000 * expected / expected.sum()
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    square = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
    assert square < {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}[possible.sum() - 1]


P = np.exp(LOGITS)


@pytest.mark.parametrize(
    ("settings", "probabilities"),
    [
        ({}, P),
        ({"temp": 0.5}, P**2),
        ({"temp": 2}, P**0.5),
        ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
        ({"top_p": 0.5}, [0, 0.4, 0, 0.25, 0]),  # the token that crosses it is kept
        ({"min_p": 0.5}, [0, 0.4, 0, 0.25, 0.2]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, [0, 0.4, 0, 0.25, 0.2]),
        ({"presence_penalty": 1}, P * np.exp([0, 0, -1, 0, -1])),
        ({"frequency_penalty": 0.7}, P * np.exp([0, 0, -0.7, 0, -1.4])),
        ({"frequency_penalty": -0.5, "presence_penalty": 0.5}, P * np.exp([0, 0, 0, 0, 0.5])),
        ({"repetition_penalty": 2}, P ** [1, 2, 2, 1, 2]),  # logits below 0 are multiplied
        ({"logit_bias": {0: 1.5, 3: -100}}, P * np.exp([1.5, 0, 0, -100, 0]) * [1, 1, 1, 0, 1]),
        ({"logit_bias": {2: 2}, "repetition_penalty": 2, "temp": 0.5},  # the bias comes first
         (P * np.exp([0, 0, 2, 0, 0])) ** [2, 4, 4, 2, 4]),
    ],
)  # fmt: skip
def test_the_frequencies_of_ids_are_those_that_the_settings_say(settings, probabilities):
    """After a prompt of two ids, and three that were generated."""
    frequencies(probabilities, [1, 2, 2, 4, 4], 2, **settings)


def test_greedy():
    assert sample(LOGITS, Sampling(temp=0), 0.99) == 1


def test_repetition_penalty_pushes_both_signs_down():
    sampling = Sampling(temp=0, repetition_penalty=2.0)
    assert sample(np.array([2.0, 1.5]), sampling, 0.0) == 0
    assert sample(np.array([2.0, 1.5]), sampling, 0.0, [0], 1) == 1
    assert sample(np.array([-1.0, -1.5]), sampling, 0.0, [0]) == 1


def test_u_walks_down_the_sorted_distribution():
    sampling = Sampling(**PLAIN)
    assert [sample(LOGITS, sampling, u) for u in (0.0, 0.39, 0.41, 0.64, 0.66, 0.86, 0.96)] == [1, 1, 3, 3, 4, 0, 2]


SETTINGS = {"drawn": Sampling(), "greedy": Sampling(temp=0), "repeated": Sampling(repetition_penalty=1.3)}


def _not_finite(engines, kind):
    """An engine whose logits are NaN, or have an infinity."""
    config = GPTConfig(vocab_size=97, block_size=16, n_layer=1, n_embd=32, tie_embeddings=False)
    params = dict(initialise(config, 0))
    if kind == "NaN":
        params["model.norm.weight"] = np.full(32, np.nan, np.float32)
        return engines.InferenceEngine(config, params.items(), engines.device)
    params["lm_head.weight"][5:7] *= np.array([[1e30], [-1e30]], np.float32) * 1e8  # 1e38 overflows in a product
    params["model.norm.weight"] *= 1e5
    return engines.InferenceEngine(config, params.items(), engines.device)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["NaN", "an infinity"])
@pytest.mark.parametrize("log_probs", [None, 0])
def test_a_device_says_where_a_logit_is_not_finite(placed, kind, settings, log_probs):
    engine = _not_finite(placed, kind)
    cache = engine.new_cache(1, 4)
    engine.prefill(cache, 0, np.array([1, 2]))
    sampled = engine.read(engine.step(cache, SamplingRows([settings]), np.array([0.5]), log_probs=log_probs))
    assert sampled.tokens.tolist() == [-1]
    with pytest.raises(UserError, match="The model's logits are not finite"):
        list(decode(engine, [Row([1, 2], settings, 4, 0)], log_probs=log_probs))


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
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"frequency_penalty": "1"},
        {"logit_bias": {5: 101}},
        {"logit_bias": {5: "1"}},
        {"logit_bias": {"5": 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": [5]},
        {"logit_bias": {True: 1}},
        {"logit_bias": {5: True}},
        {"temp": True},
        {"top_k": np.float32(3)},
        {"top_k": False},
        {"top_p": np.bool_(1)},
        {"min_p": np.array([0.5])},
    ],
)
def test_impossible_settings(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)


def test_numbers_of_numpy_are_settings():
    settings = {"temp": np.float32(0.5), "top_k": np.int8(3), "logit_bias": {np.uint16(2): np.float64(1.5)}}
    plain = Sampling(temp=0.5, top_k=3, logit_bias={2: 1.5})
    assert [sample(LOGITS, Sampling(**settings), i / 9) for i in range(9)] == [
        sample(LOGITS, plain, i / 9) for i in range(9)
    ]
    for name, array in vars(SamplingRows([Sampling(**settings)])).items():
        np.testing.assert_array_equal(array, getattr(SamplingRows([plain]), name))


SETTINGS = [
    {}, {"temp": 0.0}, {"temp": 0.7, "top_k": 5}, {"top_p": 0.3}, {"min_p": 0.1}, {"top_k": 1000}, {"top_p": 0.95},
    {"temp": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02}, {"repetition_penalty": 1.5, "temp": 0.8}, {"top_k": 256},
    {"presence_penalty": 1.5}, {"frequency_penalty": -0.4, "temp": 0}, {"logit_bias": {5: 8, 299: -100}, "top_p": 0.9},
    {"repetition_penalty": 0.8, "presence_penalty": -1, "frequency_penalty": 0.3, "logit_bias": {7: 5.5}, "top_k": 40},
]  # fmt: skip
ROWS = 56


class DeviceSampler:
    """The sampler of a backend on one of its devices, on NumPy arrays."""

    def __init__(self, placed):
        self.module = import_module(f"twingpt.backends.{placed.NAME}.sampler")
        self.device, self.torch, self.stream = placed.device, placed.NAME == "torch", placed.stream
        self.within = placed.within
        to_device = import_module(f"twingpt.backends.{placed.NAME}.device").to_device
        self.array = (lambda x: to_device(x, self.device)) if self.torch else to_device

    def sample(self, logits, rows, u, texts, n_prompt):
        batch, vocab_size = SamplingRows(rows, n_prompt), logits.shape[1]

        def counts(start):
            held = [np.bincount(text[first:], minlength=vocab_size) for text, first in zip(texts, start, strict=True)]
            return self.array(np.array(held, np.float32))

        penalised = self.module.penalise(self.array(logits), batch, counts, *[self.device] * self.torch)
        return self.module.sample(penalised, batch, u, self.device)


@pytest.fixture
def sampler(placed):
    with placed.stream():
        yield DeviceSampler(placed)


@pytest.mark.parametrize("vocab_size", [300, 3000])  # a CPU ranks all of the first, and a part of the second
@pytest.mark.parametrize("settings", SETTINGS)
def test_device_sampler_equals_the_spec(sampler, settings, vocab_size):
    rows = [Sampling(**{**PLAIN, **settings})] * ROWS
    if not settings:  # each row has settings of its own
        rows = [Sampling(**{**PLAIN, **chosen}) for chosen in SETTINGS for _ in range(ROWS // len(SETTINGS))]
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (ROWS, vocab_size)).astype(np.float32)
    u = random.random(ROWS, np.float32)
    texts, n_prompt = random.integers(0, 300, (ROWS, 90)), [*range(ROWS)]
    tokens = sampler.sample(logits, rows, u, texts, n_prompt)
    assert tokens.tolist() == [sample(logits[i], rows[i], float(u[i]), texts[i], i) for i in range(ROWS)]
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    chosen, top, top_ids = sampler.module.log_probs_of(sampler.array(logits), tokens, 7)
    expected = [log_p[row, token] for row, token in enumerate(tokens.tolist())]
    np.testing.assert_allclose(chosen.tolist(), expected, atol=sampler.within(1e-5))
    assert top_ids.tolist() == np.argsort(-log_p, axis=-1)[:, :7].tolist()
    np.testing.assert_allclose(top.tolist(), -np.sort(-log_p, axis=-1)[:, :7], atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 1, 4, "steps", "cliff", "equal"])
@pytest.mark.parametrize("settings", [SETTINGS, *([one] for one in SETTINGS[:11] if one.get("temp") != 0)])
def test_what_a_cpu_leaves_out_changes_no_id(sampler, monkeypatch, settings, spread):
    """The same id with a shortlist, and with all ranked: of flat and peaked logits, and of many that are equal."""
    random, rows = np.random.default_rng(1), [Sampling(**{**PLAIN, **one}) for one in settings]
    n = 2 * len(rows) + 6
    rows = [rows[i % len(rows)] for i in range(n)]
    if spread == "steps":  # as of bfloat16
        logits = np.round(random.normal(0, 2, (n, 2000)) * 4) / 4
    elif spread == "cliff":  # the last of the shortlist is one of equals
        logits = np.where(random.permuted(np.tile(np.arange(2000), (n, 1)), axis=1) < 200, 2.0, -4.0)
    else:
        logits = random.normal(0, 1, (n, 2000)) * (0 if spread == "equal" else spread)
    logits, u = logits.astype(np.float32), random.random(n, np.float32)
    u[:3] = 0, 1 - 2**-24, 0.999
    texts = random.integers(0, 300, (n, 20))
    found = sampler.sample(logits, rows, u, texts, [0] * n).tolist()
    each = [sampler.sample(logits[[i]], [rows[i]], u[[i]], texts[[i]], [0]).tolist()[0] for i in range(n)]
    monkeypatch.setattr(sampler.module, "SHORTLIST", 10**6)
    assert found == each == sampler.sample(logits, rows, u, texts, [0] * n).tolist()


def test_a_cpu_ranks_a_part_where_that_decides(sampler, monkeypatch):
    if sampler.device.kind != "cpu":
        pytest.skip("a GPU ranks all")
    ranked = []
    largest = sampler.module.largest
    monkeypatch.setattr(sampler.module, "largest", lambda logits, k: ranked.append(k) or largest(logits, k))
    draw = sampler.module._draw
    monkeypatch.setattr(sampler.module, "_draw", lambda x, *rest: ranked.append(x.shape[-1]) or draw(x, *rest))
    random, rows = np.random.default_rng(0), [Sampling(), Sampling(top_k=40)]
    logits = random.normal(0, 1, (2, 5000)).astype(np.float32)
    for scale, expected in ((4, [257, 256]), (0.1, [257, 256, 5000])):
        ranked.clear()
        sampler.sample(scale * logits, rows, np.array([0.5, 0.9]), [[], []], [0, 0])
        assert ranked == expected
    ranked.clear()
    sampler.sample(logits, [Sampling(temp=0)] * 2, np.zeros(2), [[], []], [0, 0])
    assert ranked == []


def test_uniforms_are_keyed_and_even():
    u = np.array([rng.uniform(seed, i) for seed in (1, 2) for i in range(2000)])
    assert u.min() >= 0 and u.max() < 1 and len(set(u.tolist())) > 3990
    assert np.histogram(u, 10, (0, 1))[0].min() > 330
    assert rng.uniform(1, 5) == rng.uniform(1, 5) != rng.uniform(1, 6)
    assert len({rng.uniform(1, 5, choice) for choice in range(50)}) == 50 and rng.uniform(1, 5, 0) == rng.uniform(1, 5)
    assert rng.uniform(1337, 7) == 0.15624958276748657  # of texts that were sampled before there were choices
