"""The compiled training step is the plain one.

In a file of its own, which one worker runs: MLX's kernels for a CPU lie in a folder that all processes share, and
one that opens a kernel while another compiles it gets half of it.
"""

import dataclasses
import shutil
from functools import partial

import numpy as np
import pytest

from tests.conftest import dose
from tests.parity.test_precision import engine_of, step
from tests.parity.test_training import CONFIG, MUON, losses
from twingpt.core.config import TrainConfig
from twingpt.data.prepare import prepare

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
ONE_LAYER = dataclasses.replace(CONFIG, n_layer=1)


@pytest.fixture(autouse=True, params=dose("traced", "compiled"))
def compiler(request, monkeypatch, engines):
    """By default torch runs the graph that it traced; to have g++ compile it takes a minute."""
    if request.param == "traced" and engines.NAME == "torch":
        import torch

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture(scope="module")
def docs():
    return prepare("python-docs", "bpe", 512)


def test_the_compiled_step_is_the_same_step(engines, docs):
    plain, compiled = (losses(engines, ONE_LAYER, docs, steps=4, compile=c, train=MUON) for c in (False, True))
    np.testing.assert_allclose(plain, compiled, rtol=engines.within(1e-5))


@pytest.mark.soak
def test_the_compiled_step_that_checkpoints_and_skips(engines, docs):
    """AdamW, gradient checkpointing and skipping in one compiled step."""
    tokens, targets = docs.batch(0, 4, 32, 1)
    settings = {"gradient_checkpointing": True, "skip_nonfinite": True, "optimizer": "adamw"}
    train = TrainConfig(warmup_iters=0)
    plain, compiled = (
        [step(engine, tokens, targets, train) for _ in range(3)]
        for engine in (engine_of(engines, config=ONE_LAYER, compile=c, **settings) for c in (False, True))
    )
    np.testing.assert_allclose(plain, compiled, rtol=engines.within(2e-5))
