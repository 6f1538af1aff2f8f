"""Training engines: the same losses on both backends, accumulation, dropout, precision, evaluation."""

import dataclasses

import numpy as np
import pytest

from tests.conftest import cpu, dose
from twingpt.backends import registry
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.schedule import hyperparameters
from twingpt.data.prepare import prepare

TRAIN = TrainConfig(max_iters=60, learning_rate=1e-3, warmup_iters=5, batch_size=8)


def losses(engines, config, data, steps=60, dtype="float32", compile=False, train=TRAIN):
    engine = engines.TrainEngine(config, cpu(engines), optimizer=train.optimizer, dtype=dtype, compile=compile)
    engine.load(initialise(config, 1))
    handles = []
    for step in range(steps):
        tokens, targets = data.batch(step * train.batch_size, train.batch_size, config.block_size, 1)
        engine.forward_backward(tokens, targets, key=step)
        handles.append(engine.optimizer_step(hyperparameters(train, step)))
    return engine.read(handles)[:, 0]


@pytest.fixture(scope="module")
def docs():
    return prepare("python-docs", "bpe", 512)


MUON = TrainConfig(
    max_iters=60, optimizer="muon", learning_rate=3e-3, warmup_iters=5, batch_size=8, momentum_warmup_iters=30
)


SMALL = {"n_layer": 2, "n_embd": 64, "block_size": 32}, 0.5
LARGE = {"n_layer": 4, "n_embd": 128, "block_size": 64}, 1.0


@pytest.mark.parametrize(("size", "learned"), dose(SMALL, LARGE), ids=["small", "large"])
@pytest.mark.parametrize(("shape", "train"), [("qwen3", TRAIN), ("gpt2", TRAIN), ("nano", MUON)])
def test_sixty_steps_follow_each_other(twins, docs, shape, train, size, learned):
    values = {"vocab_size": 512, "n_head": 4, **size, **SHAPES[shape]}
    config = GPTConfig.from_dict(values | ({"n_kv_head": 2} if shape != "gpt2" else {}))
    ours, theirs = (losses(engines, config, docs, train=train) for engines in twins)
    assert np.abs(ours - theirs)[:10].max() <= 1e-4
    assert np.abs(ours - theirs).max() <= 2e-3
    assert theirs[-5:].mean() < theirs[:5].mean() - learned


CONFIG = GPTConfig(vocab_size=512, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


def test_accumulation_equals_one_large_batch(engines, docs):
    tokens, targets = docs.batch(0, 8, 32, 1)
    states = []
    for parts in (1, 4):
        engine = engines.TrainEngine(CONFIG, cpu(engines))
        engine.load(initialise(CONFIG, 1))
        for x, y in zip(np.split(tokens, parts), np.split(targets, parts), strict=True):
            engine.forward_backward(x, y, key=0)
        loss, norm, _ = engine.read([engine.optimizer_step(hyperparameters(TRAIN, 3))])[0]
        states.append((loss, norm))
    np.testing.assert_allclose(states[0], states[1], rtol=1e-5)


def test_evaluation_sums_nats_and_ignores_padding(engines, docs):
    from twingpt.core import reference

    params = dict(initialise(CONFIG, 1))
    engine = engines.TrainEngine(CONFIG, cpu(engines))
    engine.load(params.items())
    tokens, targets = docs.batch(0, 3, 32, 1)
    targets = targets.copy()
    targets[1, 20:] = -1
    expected = reference.cross_entropy(reference.forward(params, tokens, CONFIG), targets).sum()
    assert engine.read([engine.evaluate(tokens, targets)])[0, 0] == pytest.approx(expected, rel=1e-6)


def test_dropout_is_keyed_trains_and_is_off_in_evaluation(engines, docs):

    config = dataclasses.replace(CONFIG, dropout=0.5)
    tokens, targets = docs.batch(0, 8, 32, 1)

    def gradient(key):
        engine = engines.TrainEngine(config, cpu(engines))
        engine.load(initialise(config, 1))
        engine.forward_backward(tokens, targets, key=key)
        return np.array(engine.gradients()["model.layers.0.mlp.up_proj.weight"].tolist())

    assert np.array_equal(gradient(1), gradient(1))
    assert not np.allclose(gradient(1), gradient(2))
    engine = engines.TrainEngine(config, cpu(engines))
    engine.load(initialise(config, 1))
    nats = engine.read([engine.evaluate(tokens, targets) for _ in range(2)])
    plain = engines.TrainEngine(CONFIG, cpu(engines))
    plain.load(initialise(CONFIG, 1))
    assert nats[0] == nats[1] == plain.read([plain.evaluate(tokens, targets)])[0]
    curve = losses(engines, dataclasses.replace(CONFIG, dropout=0.1), docs)
    assert curve[-5:].mean() < curve[0] - 0.5


def test_dropout_keeps_the_mean(engines):
    if engines.NAME == "torch":
        import torch

        from twingpt.backends.torch.model import Dropout

        torch.manual_seed(0)
        y = Dropout(0.3)(torch.ones(200_000))
    else:
        import mlx.core as mx

        from twingpt.backends.mlx.model import Dropout

        y = Dropout(0.3, mx.random.key(0), CONFIG)(mx.ones(200_000))
    y = np.array(y.tolist())
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert y.mean() == pytest.approx(1.0, abs=0.01)


def test_state_round_trip_is_exact(engines, docs):
    engine = engines.TrainEngine(CONFIG, cpu(engines))
    engine.load(initialise(CONFIG, 1))
    engine.forward_backward(*docs.batch(0, 4, 32, 1), key=0)
    engine.optimizer_step(hyperparameters(TRAIN, 0))
    state = dict(engine.state())
    for other in (registry.get(name) for name in registry.BACKENDS if registry.installed(name)):
        loaded = other.TrainEngine(CONFIG, cpu(other))
        loaded.load(state.items())
        assert list(dict(loaded.state())) == list(state)
        assert all(np.array_equal(array, state[name]) for name, array in loaded.state())


def test_memory_is_reported(engines):
    engine = engines.TrainEngine(CONFIG, cpu(engines))
    memory = engine.memory()
    assert 0 < memory.now <= memory.peak
