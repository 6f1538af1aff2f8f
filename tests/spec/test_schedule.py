"""Learning rate and hyperparameters by step."""

import math
from itertools import pairwise

import pytest

from twingpt import TrainConfig
from twingpt.core.schedule import hyperparameters, learning_rate


def test_warm_up_then_cosine_to_the_minimum():
    train = TrainConfig(max_iters=100, warmup_iters=10, learning_rate=1.0, min_lr=0.1)
    rates = [learning_rate(train, step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert learning_rate(train, 1000) == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_constant():
    train = TrainConfig(max_iters=100, warmup_iters=0, lr_schedule="constant")
    assert {learning_rate(train, step) for step in range(200)} == {train.learning_rate}


def test_warm_up_longer_than_the_run():
    train = TrainConfig(max_iters=5, warmup_iters=10)
    assert learning_rate(train, 20) == train.min_lr


def test_bias_correction_counts_from_one():
    hyper = hyperparameters(TrainConfig(beta1=0.9, beta2=0.95), 0)
    assert hyper.bias_correction1 == pytest.approx(0.1)
    assert hyper.bias_correction2 == pytest.approx(0.05)


def test_clip_of_zero_is_off():
    assert hyperparameters(TrainConfig(grad_clip=0.0), 0).grad_clip == math.inf
