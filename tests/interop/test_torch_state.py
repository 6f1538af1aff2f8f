"""A model as torch's state dict: torch.load takes it as it stands, and it comes back bit for bit."""

import json
import zipfile

import numpy as np
import pytest

from tests.conftest import needs
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise, parameter_table
from twingpt.core.presets import SHAPES
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.weights import torch_file, torch_state
from twingpt.weights.formats import open_model

pytestmark = needs("torch")

SMALL = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_bit_for_bit(tmp_path, shape):
    import torch

    config = GPTConfig.from_dict({**SMALL, **SHAPES[shape]})
    tensors = dict(initialise(config, 1))
    torch_state.write(tmp_path / "x", config, tensors.items(), ByteTokenizer())
    loaded = torch.load(tmp_path / "x" / "model.pt", weights_only=True)
    assert list(loaded) == list(parameter_table(config))
    assert all(np.array_equal(loaded[name].numpy(), array) for name, array in tensors.items())
    with zipfile.ZipFile(tmp_path / "x" / "model.pt") as archive:
        assert archive.testzip() is None
    opened = open_model(tmp_path / "x")
    assert opened.format == "torch" and opened.model.config == config
    back = dict(opened.model.parameters())
    assert list(back) == list(tensors)
    assert all(back[name].dtype == np.float32 and np.array_equal(back[name], tensors[name]) for name in tensors)
    assert opened.model.tokenizer().digest == ByteTokenizer().digest


def test_without_a_tokenizer(tmp_path):
    config = GPTConfig(**SMALL)
    torch_state.write(tmp_path / "x", config, initialise(config, 1))
    with pytest.raises(UserError, match="x has no tokenizer: the model can be converted"):
        open_model(tmp_path / "x").model.tokenizer()


@pytest.fixture
def written(tmp_path):
    config = GPTConfig(**SMALL)
    torch_state.write(tmp_path / "x", config, initialise(config, 1))
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no twingpt section"),
        ("[]", "is not a JSON object"),
        ("{", "can't be read"),
        ("[" * 100_000, "nested too deeply"),
        (None, "config.json is missing"),
    ],
)
def test_a_broken_configuration_is_refused(written, text, message):
    (written / "config.json").unlink()
    if text is not None:
        (written / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        torch_state.TorchState().open(ModelDirectory(written))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 10**6}, "n_layer must be at most 4096, and is 1000000"),
        ({"n_layer": 3}, "is missing"),
        ({"n_layer": 1}, "for which this model has no place"),
        ({"vocab_size": 300}, "has shape"),
    ],
)
def test_another_models_tensors_are_refused(written, changes, message):
    content = json.loads((written / "config.json").read_text("utf-8"))
    content["twingpt"] |= changes
    (written / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        list(open_model(written).model.parameters())


def test_tensors_in_another_order_are_not_written(tmp_path):
    config = GPTConfig(**SMALL)
    with pytest.raises(ValueError, match=r"came, where model\.embed_tokens\.weight .* is next"):
        torch_state.write(tmp_path / "x", config, reversed(list(initialise(config, 1))))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_file, "write_state_dict", full)
    config = GPTConfig(**SMALL)
    with pytest.raises(UserError, match="x can't be written: No space left on device"):
        torch_state.write(tmp_path / "x", config, initialise(config, 1))
    assert list(tmp_path.iterdir()) == []
