"""Training engines: the same losses on both backends, accumulation, dropout, precision, evaluation."""

import dataclasses
from importlib import import_module

import numpy as np
import pytest

from tests.conftest import cpu, dose, within
from twingpt.backends import registry
from twingpt.core.config import GPTConfig, TrainConfig
from twingpt.core.dropout import dropout_keys, dropped
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.schedule import hyperparameters
from twingpt.data.prepare import prepare

TRAIN = TrainConfig(max_iters=60, learning_rate=1e-3, warmup_iters=5, batch_size=8)


def losses(engines, config, data, steps=60, dtype="float32", compile=False, train=TRAIN):
    engines.needs_dtype(dtype)
    engine = engines.TrainEngine(config, engines.device, optimizer=train.optimizer, dtype=dtype, compile=compile)
    engine.load(initialise(config, 1))
    handles = []
    for step in range(steps):
        tokens, targets = data.batch(step * train.batch_size, train.batch_size, config.block_size, 1)
        engine.forward_backward(tokens, targets, np.arange(step * len(tokens), (step + 1) * len(tokens)))
        handles.append(engine.optimizer_step(hyperparameters(train, step)))
    return engine.read(handles)[:, 0]


@pytest.fixture(scope="module")
def docs():
    return prepare("python-docs", "bpe", 512)


MUON = TrainConfig(
    max_iters=60, optimizer="muon", learning_rate=3e-3, warmup_iters=5, batch_size=8, momentum_warmup_iters=30
)


OF = SHAPES | {"dropout": {**SHAPES["qwen3"], "dropout": 0.1}}
SMALL = {"n_layer": 2, "n_embd": 64, "block_size": 32}, 0.5
LARGE = {"n_layer": 4, "n_embd": 128, "block_size": 64}, 1.0


@pytest.mark.parametrize(("size", "learned"), dose(SMALL, LARGE), ids=["small", "large"])
@pytest.mark.parametrize(
    ("shape", "train"),
    [pytest.param("qwen3", TRAIN, marks=pytest.mark.soak), ("gpt2", TRAIN), ("nano", MUON), ("dropout", TRAIN)],
)
def test_sixty_steps_follow_each_other(twins, docs, shape, train, size, learned):
    values = {"vocab_size": 512, "n_head": 4, **size, **OF[shape]}
    config = GPTConfig.from_dict(values | ({"n_kv_head": 2} if shape != "gpt2" else {}))
    ours, theirs = (losses(engines, config, docs, train=train) for engines in twins)
    assert np.abs(ours - theirs)[:10].max() <= within(1e-4, *twins)
    assert np.abs(ours - theirs).max() <= 2e-3
    assert theirs[-5:].mean() < theirs[:5].mean() - learned


CONFIG = GPTConfig(vocab_size=512, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


def nats(engine, tokens, targets) -> float:
    """The cross-entropy of an engine's present parameters, summed."""
    inference = engine.inference()
    return -float(inference.read(inference.log_probs(tokens, targets)).targets.sum())


@pytest.mark.parametrize(
    ("dropout", "masked"),
    [(0.2, True), *(pytest.param(*pair, marks=pytest.mark.soak) for pair in [(0.0, False), (0.0, True), (0.2, False)])],
)
def test_any_split_of_a_step_has_the_same_loss_and_gradients(engines, docs, dropout, masked):
    """Also where rows have unequal numbers of targets that count, which a mean of means would weigh wrongly."""
    config, limit = (
        dataclasses.replace(CONFIG, dropout=dropout),
        engines.within({"torch": 1e-6, "mlx": 4e-6}[engines.NAME]),
    )
    tokens, targets = docs.batch(0, 8, 32, 1)
    targets = targets.copy()
    if masked:
        for row in range(8):
            targets[row, : 4 * row] = -1
    found = []
    for cuts in ([], [1, 3, 6], range(1, 8)):
        engine = engines.TrainEngine(config, engines.device, seed=7)
        engine.load(initialise(config, 1))
        for rows in np.split(np.arange(8), cuts):
            engine.forward_backward(tokens[rows], targets[rows], 100 + rows)
        gradients = {name: np.array(g.tolist()) for name, g in engine.gradients().items()}
        found.append((gradients, *engine.read([engine.optimizer_step(hyperparameters(TRAIN, 3))])[0, :2]))
    (whole, *numbers), *rest = found
    for gradients, *others in rest:
        np.testing.assert_allclose(others, numbers, rtol=engines.within(2e-6))
        for name, g in whole.items():
            assert np.abs(gradients[name] - g).max() <= limit * np.abs(g).max(), name


def test_evaluation_sums_nats_and_ignores_padding(engines, docs):
    from twingpt.core import reference

    params = dict(initialise(CONFIG, 1))
    engine = engines.TrainEngine(CONFIG, engines.device)
    engine.load(params.items())
    tokens, targets = docs.batch(0, 3, 32, 1)
    targets = targets.copy()
    targets[1, 20:] = -1
    expected = reference.cross_entropy(reference.forward(params, tokens, CONFIG), targets).sum()
    assert nats(engine, tokens, targets) == pytest.approx(expected, rel=engines.within(1e-6))


def test_dropout_is_off_in_evaluation(engines, docs):
    tokens, targets = docs.batch(0, 8, 32, 1)
    found = []
    for dropout in (0.0, 0.5):
        engine = engines.TrainEngine(dataclasses.replace(CONFIG, dropout=dropout), engines.device)
        engine.load(initialise(CONFIG, 1))
        found.append(nats(engine, tokens, targets))
    assert abs(found[0] - found[1]) <= engines.within(0) * found[0]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_both_backends_drop_what_the_spec_drops(engines, rate):
    model = import_module(f"twingpt.backends.{engines.NAME}.model")
    device = import_module(f"twingpt.backends.{engines.NAME}.device")
    keys = dropout_keys(3, np.arange(2**31 - 2, 2**31 + 2), 5)
    on_device = [keys] if engines.NAME == "mlx" else [keys.view(np.int32), engines.device]
    x = [np.ones((4, 33, 20), np.float32), *on_device[1:]]
    with engines.stream():
        y = model.Dropout(rate, device.to_device(*on_device))(device.to_device(*x), 2)
    expected = np.where(dropped(keys[:, 2], 33, 20, rate), 0, np.float32(1 / (1 - rate)))
    np.testing.assert_array_equal(device.to_numpy(y), expected)


def test_state_round_trip_is_exact(engines, docs):
    engine = engines.TrainEngine(CONFIG, engines.device)
    engine.load(initialise(CONFIG, 1))
    engine.forward_backward(*docs.batch(0, 4, 32, 1), np.arange(4))
    engine.optimizer_step(hyperparameters(TRAIN, 0))
    state = dict(engine.state())
    for other in (registry.get(name) for name in registry.BACKENDS if registry.installed(name)):
        loaded = other.TrainEngine(CONFIG, cpu(other))
        loaded.load(state.items())
        assert list(dict(loaded.state())) == list(state)
        assert all(np.array_equal(array, state[name]) for name, array in loaded.state())


def test_memory_is_reported(engines):
    engine = engines.TrainEngine(CONFIG, engines.device)
    engine.load(initialise(CONFIG, 1))
    memory = engine.memory()
    assert 0 < memory.now <= memory.peak
