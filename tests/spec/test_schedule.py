"""Learning rate and hyperparameters by step."""

import math
from itertools import pairwise

import pytest

from twingpt.core.config import TrainConfig
from twingpt.core.schedule import hyperparameters, learning_rate_factor, momentum, weight_decay


def test_warm_up_then_cosine_to_the_minimum():
    train = TrainConfig(max_iters=100, warmup_iters=10, learning_rate=1.0, min_lr=0.1)
    rates = [learning_rate_factor(train, step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert learning_rate_factor(train, 1000) == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_constant():
    train = TrainConfig(max_iters=100, warmup_iters=0, lr_schedule="constant")
    assert {learning_rate_factor(train, step) for step in range(200)} == {1.0}


def test_warm_up_longer_than_the_run():
    train = TrainConfig(max_iters=5, warmup_iters=10)
    assert learning_rate_factor(train, 20) == pytest.approx(train.min_lr / train.learning_rate)


def test_bias_correction_counts_from_one():
    hyper = hyperparameters(TrainConfig(beta1=0.9, beta2=0.95), 0)
    assert hyper.bias_correction1 == pytest.approx(0.1)
    assert hyper.bias_correction2 == pytest.approx(0.05)


def test_clip_of_zero_is_off():
    assert hyperparameters(TrainConfig(grad_clip=0.0), 0).grad_clip == math.inf


def test_wsd_holds_and_then_falls_linearly():
    train = TrainConfig(max_iters=100, warmup_iters=10, lr_schedule="wsd", warmdown_fraction=0.4, min_lr=0.0)
    factors = [learning_rate_factor(train, step) for step in range(101)]
    assert set(factors[10:61]) == {1.0}
    assert factors[80] == pytest.approx(0.5) and factors[100] == 0
    assert all(a > b for a, b in pairwise(factors[60:]))


def test_momentum_warms_up():
    train = TrainConfig(momentum=0.95, momentum_warmup_iters=100)
    assert [momentum(train, step) for step in (0, 50, 100, 1000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum(TrainConfig(momentum=0.5), 0) == 0.5
    assert momentum(TrainConfig(momentum_warmup_iters=0), 0) == 0.95


def test_weight_decay_falls_to_nothing():
    train = TrainConfig(max_iters=100, weight_decay=0.2, decay_weight_decay=True)
    assert [weight_decay(train, step) for step in (0, 50, 100, 200)] == pytest.approx([0.2, 0.1, 0, 0])
    assert weight_decay(TrainConfig(weight_decay=0.2), 50) == 0.2


def test_groups_have_their_own_rates_on_one_schedule():
    train = TrainConfig(optimizer="muon", learning_rate=1e-2, matrix_lr=0.02, embedding_lr=0.3, warmup_iters=9)
    hyper = hyperparameters(train, 4)
    assert (hyper.matrix_lr, hyper.embedding_lr, hyper.head_lr, hyper.vector_lr) == pytest.approx(
        (0.01, 0.15, 0.005, 0.005)
    )
    assert hyperparameters(TrainConfig(learning_rate=1e-2, warmup_iters=0), 0).matrix_lr == 1e-2
