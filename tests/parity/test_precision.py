"""Precision, skipped steps, gradient checkpointing and the chunked loss: the same in both twins."""

import dataclasses
import math

import numpy as np
import pytest

from tests.conftest import dose
from tests.parity.test_training import CONFIG, TRAIN, losses
from tests.parity.test_twins import MATRIX, batch, config_of, gradients
from twingpt.core import reference
from twingpt.core.parameters import initialise, state_table
from twingpt.core.presets import SHAPES
from twingpt.core.schedule import LOSS_SCALE_START, hyperparameters
from twingpt.data.prepare import prepare

HALVES = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def docs():
    return prepare("python-docs", "bpe", 512)


@pytest.fixture(scope="module", params=dose(25, 200))
def train(request):
    return dataclasses.replace(TRAIN, max_iters=request.param)


@pytest.fixture(scope="module")
def full(engines, docs, train):
    """A backend on a device, and the losses of float32 steps there."""
    return engines, losses(engines, CONFIG, docs, steps=train.max_iters, train=train)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_steps_end_within_a_hundredth(full, docs, train, dtype):
    engines, plain = full
    half = losses(engines, CONFIG, docs, steps=train.max_iters, dtype=dtype, train=train)
    assert half[-10:].mean() == pytest.approx(plain[-10:].mean(), rel=0.01)
    assert not np.array_equal(half, plain)


def engine_of(engines, dtype="float32", config=CONFIG, optimizer="muon", **settings):
    engines.needs_dtype(dtype)
    engine = engines.TrainEngine(config, engines.device, optimizer=optimizer, dtype=dtype, **settings)
    engine.load(initialise(config, 1))
    return engine


def step(engine, tokens, targets, train=TRAIN):
    engine.forward_backward(tokens, targets, np.arange(len(tokens)))
    return engine.read([engine.optimizer_step(hyperparameters(train, 20))])[0]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_gradients_are_those_of_float32(engines, docs, dtype):
    """float16 with its loss scale loses no small gradient: one part in fifty of each tensor's largest."""
    tokens, targets = docs.batch(0, 8, 32, 1)
    found = []
    for precision in ("float32", dtype):
        engine = engine_of(engines, precision)
        engine.forward_backward(tokens, targets, np.arange(len(tokens)))
        found.append({name: np.array(g.tolist()) for name, g in engine.gradients().items()})
    for name, g in found[0].items():
        assert np.abs(found[1][name] - g).max() <= 0.05 * np.abs(g).max(), name


def poison(engine):
    """A weight that makes every loss NaN."""
    state = dict(engine.state())
    state["model.norm.weight"] = np.full_like(state["model.norm.weight"], np.nan)
    engine.load(state.items())


def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(engines, docs):
    tokens, targets = docs.batch(0, 4, 32, 1)
    engine = engine_of(engines, skip_nonfinite=True)
    assert step(engine, tokens, targets)[2] == 0
    poison(engine)
    before = dict(engine.state())
    loss, norm, skipped = step(engine, tokens, targets)
    assert math.isnan(loss) and not math.isfinite(norm) and skipped == 1
    for name, array in engine.state():
        assert np.array_equal(array, before[name], equal_nan=True), name


def test_the_loss_scale_falls_until_it_fits_and_grows_in_time(engines, docs):
    tokens, targets = docs.batch(0, 4, 32, 1)
    engine = engine_of(engines, "float16")
    assert dict(engine.state())["loss_scale"] == LOSS_SCALE_START
    state = dict(engine.state()) | {"loss_scale": np.float32(2.0**40), "loss_scale.steps": np.float32(7)}
    engine.load(state.items())
    skips = 0
    while step(engine, tokens, targets)[2]:
        skips += 1
        assert skips < 60
        now = dict(engine.state())
        assert now["loss_scale"] == 2.0 ** (40 - skips) and now["loss_scale.steps"] == 0
        assert np.array_equal(now["model.norm.weight"], state["model.norm.weight"])
    assert skips > 3 and dict(engine.state())["loss_scale.steps"] == 1
    engine.load((dict(engine.state()) | {"loss_scale": np.float32(8), "loss_scale.steps": np.float32(1999)}).items())
    assert step(engine, tokens, targets)[2] == 0
    assert dict(engine.state())["loss_scale"] == 16 and dict(engine.state())["loss_scale.steps"] == 0


def test_float16_state_is_carried_over_and_left_behind(engines):
    half = engine_of(engines, "float16")
    assert set(dict(half.state())) - set(dict(engine_of(engines).state())) == {"loss_scale", "loss_scale.steps"}
    full = engine_of(engines)
    full.load(half.state())
    assert "loss_scale" not in dict(full.state())
    assert "loss_scale" in state_table(CONFIG, "adamw", "float16")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", ["qwen3", "gpt2", "nano"])
def test_checkpointed_gradients_are_the_same(engines, docs, shape, dropout):
    config = dataclasses.replace(config_of(SHAPES[shape] | {"zero_init": False}), dropout=dropout)
    tokens, targets = batch(config, 2, 20)
    found = []
    for checkpointing in (False, True):
        engine = engines.TrainEngine(config, engines.device, gradient_checkpointing=checkpointing)
        engine.load(initialise(config, 1))
        engine.forward_backward(tokens, targets, np.arange(len(tokens)))
        found.append({name: np.array(g.tolist()) for name, g in engine.gradients().items()})
    for name, g in found[0].items():
        assert np.abs(found[1][name] - g).max() <= engines.within(1e-6) * max(np.abs(g).max(), 1e-6), name


@pytest.mark.parametrize("switches", ["qwen3", "untied", "logit softcap", "nano"])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(engines, monkeypatch, switches, chunk_size):
    config = config_of(MATRIX[switches])
    model = __import__(f"twingpt.backends.{engines.NAME}.model", fromlist=["model"])
    params = dict(initialise(config, 1))
    tokens, targets = batch(config, 2, 17)
    targets[1, 9:] = -1
    monkeypatch.setattr(model, "LOSS_ROWS", chunk_size)
    chunked = gradients(engines, config, params, tokens, targets)
    engine = engines.TrainEngine(config, engines.device)
    engine.load(params.items())
    inference = engine.inference()
    nats = -inference.read(inference.log_probs(tokens, targets)).targets.sum()
    monkeypatch.setattr(
        model,
        "chunked_cross_entropy",
        lambda x, p, targets, config: model.cross_entropy(model.logits(x, p, config), targets),
    )
    plain = gradients(engines, config, params, tokens, targets)
    for name, g in plain.items():
        assert np.abs(chunked[name] - g).max() <= engines.within(1e-5) * np.abs(g).max(), name
    expected = reference.cross_entropy(reference.forward(params, tokens, config), targets).sum()
    assert nats == pytest.approx(expected, rel=engines.within(1e-6))


def needs_peaks(engines):
    if engines.device.kind == "mps":
        pytest.skip("MPS counts no peak of its memory")


def test_the_chunked_loss_never_holds_all_logits(engines, monkeypatch):
    needs_peaks(engines)
    model = __import__(f"twingpt.backends.{engines.NAME}.model", fromlist=["model"])
    config = config_of({"n_layer": 1, "vocab_size": 4096})
    tokens, targets = batch(config, 64, 16)
    peaks = []
    for rows in (64, 1024):
        monkeypatch.setattr(model, "LOSS_ROWS", rows)
        engine = engines.TrainEngine(config, engines.device)
        engine.load(initialise(config, 1))

        def run(engine=engine):
            engine.forward_backward(tokens, targets, np.arange(len(tokens)))
            engine.read([engine.optimizer_step(hyperparameters(TRAIN, 20))])

        peaks.append(engines.arrays_peak(engine.device, run))
    assert peaks[0] < 1024 * 4096 * 4 < peaks[1]  # bytes


def test_log_probabilities_never_hold_all_logits(engines, monkeypatch):
    needs_peaks(engines)
    model = __import__(f"twingpt.backends.{engines.NAME}.model", fromlist=["model"])
    config = config_of({"n_layer": 1, "vocab_size": 4096})
    tokens, targets = batch(config, 64, 16)
    peaks = []
    for rows in (64, 1024):
        monkeypatch.setattr(model, "LOSS_ROWS", rows)
        engine = engines.InferenceEngine(config, initialise(config, 1), engines.device)
        peaks.append(engines.arrays_peak(engine.device, lambda e=engine: e.read(e.log_probs(tokens, targets, top_k=2))))
    assert 2 * peaks[0] < peaks[1] > 1024 * 4096 * 4  # bytes


@pytest.mark.parametrize("vocab_size", dose(65, 50304))
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_embedding_gradients_are_summed_in_float32(engines, tied, vocab_size):
    """Over 16,384 tokens, of which the commonest has a sixth: summed in bfloat16 its row was 16 % off."""
    config = config_of({"vocab_size": vocab_size, "n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 256})
    config = dataclasses.replace(config, tie_embeddings=tied)
    share = 1 / np.arange(1, 66)
    tokens = np.random.default_rng(0).choice(65, (64, 257), p=share / share.sum()).astype(np.int32)
    engines.needs_dtype("bfloat16")
    found = []
    for dtype in ("float32", "bfloat16"):
        engine = engines.TrainEngine(config, engines.device, dtype=dtype)
        engine.load(initialise(config, 1))
        engine.forward_backward(tokens[:, :-1], tokens[:, 1:], np.arange(64))
        found.append(np.array(engine.gradients()["model.embed_tokens.weight"].tolist()))
    assert np.abs(found[1] - found[0]).max() <= 0.01 * np.abs(found[0]).max()


BIASES = {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("checkpointing", dose(False, True))
@pytest.mark.parametrize(
    "switches",
    [
        pytest.param(SHAPES["gpt2"], id="gpt2"),
        pytest.param(SHAPES["nano"] | {"zero_init": False}, id="nano"),
        pytest.param({**BIASES, "attn_softcap": 20.0, "logit_softcap": 10.0}, id="softcaps", marks=pytest.mark.soak),
        pytest.param({"norm_offset": True}, id="norm offset", marks=pytest.mark.soak),
    ],
)
def test_bfloat16_gradients_of_biases_and_norms_are_summed_in_float32(engines, docs, switches, checkpointing):
    """Over 16,384 tokens: before 0.32.4 MLX's own sums on a CPU were up to 86 % off."""
    config = config_of({"n_layer": 1, "n_embd": 32, "n_head": 1, "block_size": 256, "init_std": 0.02} | switches)
    tokens, targets = (ids % 97 for ids in docs.batch(0, 64, 256, 1))
    found = []
    for dtype in ("float32", "bfloat16"):
        engine = engine_of(engines, dtype, config, gradient_checkpointing=checkpointing)
        engine.forward_backward(tokens, targets, np.arange(64))
        found.append({name: np.array(g.tolist()) for name, g in engine.gradients().items() if g.ndim == 1})
    largest = max(map(np.linalg.norm, found[0].values()))
    for name, g in found[0].items():
        if np.linalg.norm(g) > 1e-6 * largest:  # without RoPE a key bias has none
            assert np.linalg.norm(found[1][name] - g) <= 0.01 * np.linalg.norm(g), name
