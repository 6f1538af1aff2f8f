"""gpt train --config, --set and --depth: layers, what is shown and kept, and runs repeated from their config.toml."""

import json

import pytest

from tests.cli.test_commands import mistake
from tests.cli.test_train import both, equal, tensors, train
from tests.conftest import needs, open_checkpoint
from twingpt.training.settings import read

FILE = """
[model]
n_layer = 2
n_head = 4
n_kv_head = 2
n_embd = 32
block_size = 32

[model.rope_scaling]
type = "linear"
factor = 2

[train]
tokenizer = "byte"
batch_size = 4
max_iters = 12
eval_iters = 2
sample_interval = 0
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text(FILE)
    return path


@needs("torch")
def test_a_file_says_where_to_report(gpt, prose, file, tmp_path):
    pytest.importorskip("tensorboardX")
    file.write_text(f'{FILE}\n[run]\nreport_to = "tensorboard"\n')
    rest = ["--config", file, "--data", prose, "--max-iters", 2, "--backend", "torch"]
    train(gpt, *rest, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "tensorboard").is_dir()
    assert read(tmp_path / "run" / "config.toml")["report_to"] == "tensorboard"
    train(gpt, *rest, "--report-to", "", "--out", tmp_path / "plain")
    assert not (tmp_path / "plain" / "tensorboard").exists()
    assert "Unknown --report-to 'tensorbord'" in mistake(gpt, "train", *rest, "--set", "report_to=tensorbord")


@both
def test_a_run_is_repeated_bit_for_bit_from_its_config(gpt, prose, file, tmp_path, backend):
    first, second = tmp_path / "first", tmp_path / "second"
    given = ["--config", file, "--data", prose, "--backend", backend, "--device", "cpu"]
    given += ["--dropout", 0.1, "--out", first]
    given += ["--set", "no_rope_layers=[1]", "--set", "gradient_accumulation_steps=2", "--set", "embedding_lr=0.01"]
    train(gpt, *given, "--set", "norm=layernorm", "--set", "seed=7", "--set", "compile=false")
    train(gpt, "--config", first / "config.toml", "--out", second)
    assert equal(tensors(first), tensors(second))
    assert (first / "config.toml").read_text("utf-8") == (second / "config.toml").read_text("utf-8")
    assert (
        open_checkpoint(second).config.rope_scaling.factor == 2 and open_checkpoint(second).config.norm == "layernorm"
    )
    kept = read(second / "config.toml")
    assert kept["backend"] == backend and kept["device"] == "cpu" and kept["compile"] is False and kept["seed"] == 7


@needs("torch")
def test_a_depth_is_repeated_bit_for_bit_too(gpt, prose, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    less = ["--tokenizer", "byte", "--block-size", 64, "--batch-size", 2, "--max-iters", 3, "--device", "cpu"]
    code, out, err = gpt("train", "--data", prose, "--depth", 1, "--shape", "nano", *less, "--out", first)
    assert code == 0, err
    assert "depth 1: 82.4k parameters, 6.1k tokens, 3 steps" in out
    train(gpt, "--config", first / "config.toml", "--out", second)
    assert equal(tensors(first), tensors(second))


@needs("torch")
def test_set_counts_before_flags_and_flags_before_the_file(gpt, prose, file, tmp_path):
    given = ["--config", file, "--data", prose, "--batch-size", 3, "--max-iters", 5, "--set", "max_iters=2"]
    result = train(gpt, *given, "--out", tmp_path / "run")
    assert result["step"] == result["max_iters"] == 2
    assert {"n_layer": 2, "batch_size": 3, "max_iters": 2, "optimizer": "muon"}.items() <= result["settings"].items()
    described = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert described["config"]["n_embd"] == 32 and described["train"]["batch_size"] == 3


@needs("torch")
def test_what_differs_from_the_recipe_is_shown(gpt, prose, file, tmp_path):
    code, out, err = gpt("train", "--config", file, "--data", prose, "--max-iters", 1, "--out", tmp_path / "run")
    assert code == 0, err
    shown = " ".join(out.split()).partition("Other than the recipe: ")[2].partition(" starts:")[0]
    for part in (
        "n_layer=2",
        "n_embd=32",
        "'rope_scaling={type=\"linear\", factor=2}'",
        "tokenizer=byte",
        "max_iters=1",
    ):
        assert part in shown
    assert "learning_rate" not in shown and "n_kv_head" not in shown  # as in the recipe


@needs("torch")
def test_where_a_run_goes_can_be_in_the_file(gpt, prose, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file.write_text(
        f'data = "{prose}"\nout = "runs/mine"\nbackend = "torch"\ndevice = "cpu"\nmax_iters = 1\n{FILE}'.replace(
            "\nmax_iters = 12", ""
        )
    )
    assert train(gpt, "--config", file)["run"] == "runs/mine"
    assert train(gpt, "--config", file, "--out", "other")["run"] == "other"
    assert "leave out out in" in mistake(gpt, "train", "--config", file, "--resume", "mine")
    assert "Unknown backend 'jax'" in mistake(gpt, "train", "--config", file, "--set", "backend=jax")


@needs("torch")
def test_resuming_with_a_file(gpt, prose, file, tmp_path):
    run = tmp_path / "run"
    train(gpt, "--config", file, "--data", prose, "--out", run, "--stop-after", 4)
    for arguments, message in (
        (["--set", "n_layer=3"], "--set n_layer 3 conflicts with the run, which has 2"),
        (["--set", "norm_eps=0.1"], "--set norm_eps 0.1 conflicts with the run, which has 1e-06"),
        (["--config", file, "--seed", 3], "--seed 3 conflicts with the run, which has 1337"),
        (["--depth", 1], "--depth can't change when a run goes on"),
        (["--set", "shape=nano"], "--set shape can't change when a run goes on"),
    ):
        assert message in mistake(gpt, "train", "--resume", run, *arguments)
    other = tmp_path / "other.toml"
    other.write_text("batch_size = 5")
    message = mistake(gpt, "train", "--resume", run, "--config", other)
    assert "A step of the run has 4 windows, and would have 5" in message
    result = train(gpt, "--resume", run, "--config", run / "config.toml", "--set", "max_iters=14", "--log-interval", 3)
    assert result["step"] == 14
    assert read(run / "config.toml")["max_iters"] == 14  # as run.json, it says what the run now is


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no.toml"], "There is no file no.toml"),
        (["--set", "n_layres=3"], "--set: Unknown key 'n_layres': did you mean 'n_layer'?"),
        (["--set", "n_layer=x"], "n_layer must be of type int, and is 'x'"),
        (["--set", "no_rope_layers=[9]"], "no_rope_layers must be layers 0 to 3"),
        (["--depth", 0], "depth must be from 1 to 48, and is 0"),
        (["--depth", 4, "--preset", "tiny"], "--preset and --depth both say how large the model is"),
        (["--wizard"], "--wizard asks questions, so it needs a terminal"),
        (["--wizard", "--json", "--depth", 3], "leave out --depth, --json"),
        (["--wizard", "--seed", 0, "--no-compile"], "leave out --seed, --compile"),
    ],
)
def test_mistakes_write_nothing(gpt, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(gpt, "train", *arguments)
    assert list(tmp_path.iterdir()) == []
