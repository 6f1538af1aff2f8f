"""gpt train --init-from: a run that begins with another model."""

import json

import numpy as np
import pytest

from tests.conftest import BOTH, needs, open_checkpoint
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.checkpoint.quantize import Quantization
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.training import launch
from twingpt.weights.quantize import apply

TINY = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "init_std": 0.1}
SHORT = ["--max-iters", 6, "--eval-interval", 3, "--eval-iters", 2, "--sample-interval", 0, "--batch-size", 2]
SHORT += ["--learning-rate", 0.01, "--keep", 9, "--json", "--device", "cpu"]  # where runs have the same bits


@pytest.fixture
def model(tmp_path):
    def make(**switches):
        config = GPTConfig.from_dict({**TINY, **switches})
        checkpoint.save_model(tmp_path / "model", config, ByteTokenizer(), initialise(config, 3))
        return tmp_path / "model"

    return make


def started(gpt, *arguments):
    code, out, err = gpt("train", *SHORT, *arguments)
    assert code == 0, err
    return json.loads(out)


def refused(gpt, *arguments) -> str:
    code, _, err = gpt("train", *SHORT, *arguments)
    assert code == 2 and err.count("\n") == 1
    return err


@pytest.mark.parametrize("backend", BOTH)
def test_it_begins_with_the_model_and_learns(gpt, model, prose, tmp_path, backend):
    run = tmp_path / "run"
    end = started(gpt, "--init-from", model(), "--data", prose, "--out", run, "--backend", backend)
    assert end["val_loss"] < 0.9 * np.log(257)
    first = open_checkpoint(f"{run}@0")  # kept, because the run is that short
    assert all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(first.parameters(), initialise(first.config, 3), strict=True)
    )
    assert json.loads((run / "run.json").read_text("utf-8"))["init_from"].endswith("model")
    assert first.tokenizer().kind == "byte" and first.config.n_layer == 2


@needs("torch")
def test_its_file_of_settings_runs_it_again(gpt, model, prose, tmp_path):
    options = ["--data", prose, "--backend", "torch", "--dropout", 0.1, "--block-size", 16]
    started(gpt, "--init-from", model(), *options, "--out", tmp_path / "a")
    started(gpt, "--config", tmp_path / "a" / "config.toml", "--out", tmp_path / "b")
    a, b = (open_checkpoint(tmp_path / name) for name in "ab")
    assert a.config == b.config and a.config.block_size == 16 and a.config.dropout == 0.1
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(a.parameters(), b.parameters(), strict=True))


@needs("torch")
def test_learned_positions_are_cropped_and_never_invented(gpt, model, prose, tmp_path):
    folder = model(**SHAPES["gpt2"])
    options = ["--init-from", folder, "--data", prose, "--backend", "torch", "--out", tmp_path / "run"]
    assert "more than the 32 positions" in refused(gpt, *options, "--block-size", 64)
    started(gpt, *options, "--block-size", 8)
    assert dict(open_checkpoint(f"{tmp_path / 'run'}@0").parameters())["model.embed_positions.weight"].shape == (8, 32)


@needs("torch")
def test_a_quantized_model_is_fine_tuned_in_full_precision(gpt, prose, tmp_path):
    config = GPTConfig.from_dict(TINY)
    tensors = apply(Quantization(8, 32), initialise(config, 3), config)
    checkpoint.save_model(tmp_path / "q", config, ByteTokenizer(), tensors, Quantization(8, 32))
    started(gpt, "--init-from", tmp_path / "q", "--data", prose, "--backend", "torch", "--out", tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").quantization is None


@needs("torch")
def test_it_goes_on_without_the_model(gpt, model, prose, tmp_path):
    folder, run = model(), tmp_path / "run"
    started(gpt, "--init-from", folder, "--data", prose, "--backend", "torch", "--out", run, "--stop-after", 2)
    folder.rename(tmp_path / "elsewhere")
    started(gpt, "--resume", run)
    assert open_checkpoint(run).training()["step"] == 6
    assert "leave out --init-from" in refused(gpt, "--resume", run, "--init-from", tmp_path / "elsewhere")


@needs("torch")
def test_a_run_killed_before_its_first_checkpoint_says_how_to_start_again(gpt, model, prose, tmp_path):
    init = open_checkpoint(model())
    launch.new_run({"data": str(prose)}, tmp_path / "run", "torch", "cpu", init=init)
    code, _, message = gpt("train", "--resume", tmp_path / "run")
    assert code == 2 and "was killed before its first checkpoint: start it again with gpt train --config" in message


@needs("torch")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny"], "--preset can't be given with --init-from"),
        (["--depth", 4], "--depth can't be given with --init-from"),
        (["--n-layer", 3], "n_layer 3 can't be had with --init-from: the model has 2"),
        (["--tokenizer", "byte"], "--tokenizer can't be given with --init-from"),
        (["--vocab-size", 300], "--vocab-size can't be given with --init-from"),
        (["--set", "mlp=relu2"], "mlp relu2 can't be had with --init-from: the model has swiglu"),
    ],
)
def test_what_the_model_has_of_its_own(gpt, model, prose, arguments, message):
    assert message in refused(gpt, "--init-from", model(), "--data", prose, *arguments)


@needs("torch")
def test_a_model_that_is_not_there(gpt, prose, tmp_path):
    assert "nowhere" in refused(gpt, "--init-from", tmp_path / "nowhere", "--data", prose)
