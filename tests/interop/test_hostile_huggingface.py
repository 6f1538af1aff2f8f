"""Hugging Face's and mlx-lm's directories as an enemy or a bad disk would leave them."""

import json

import pytest

from tests.conftest import dose
from tests.mutate import Judge, header_at, mutations, overwrite, whole
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.quantize import Quantization
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.weights import huggingface, mlx_lm
from twingpt.weights.families import FAMILIES
from twingpt.weights.formats import open_model

TINY = {"vocab_size": 4, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 4, "n_inner": 4}
SCALING = {"type": "llama3", "factor": 8.0, "original_block_size": 4}
MODELS = {
    "llama": {"qk_norm": False, "rope_scaling": SCALING},
    "qwen3": {"sliding_window": 4},
    "smollm3": {"qk_norm": False, "n_layer": 2, "no_rope_layers": (1,)},
    "gemma3_text": {
        "norm_placement": "both", "norm_offset": True, "embed_scale": 2.0, "mlp": "geglu_tanh", "n_layer": 2,
        "sliding_window": 4, "full_attention_layers": (0,), "local_rope_theta": 100.0,
    },
    "gpt2": SHAPES["gpt2"],
}  # fmt: skip
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def write(folder, family, monkeypatch, quantization=None):
    """A directory of the family; its tensors in two files, or quantized in one."""
    config = GPTConfig.from_dict({**TINY, **MODELS[family], **({"n_embd": 32} if quantization else {})})
    theirs = FAMILIES[family]
    assert theirs.computes(config)
    if quantization:
        arrays = huggingface.joined(initialise(config, 0), theirs, theirs.layout(config), config)
        mlx_lm.write_quantized(folder, config, theirs, theirs.content(config), arrays, quantization, {})
        return
    sizes = [array.nbytes for _, array in initialise(config, 0)]
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", sum(sizes) - sizes[-2] - sizes[-1])
    folder.mkdir()
    huggingface.write(folder, config, initialise(config, 0))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", *SHARDS, INDEX]


def judged(judge, folder, format, counts):
    """Read mutations of the folder's files in a `format`; one of 25 as `gpt convert` does, which asks all readers."""
    for name, count in counts.items():
        content = (folder / name).read_bytes()
        for mutated in mutations(content, 3, count, header_at if name.endswith("safetensors") else whole):
            overwrite(folder / name, mutated)
            opened = (
                (lambda: format.open(ModelDirectory(folder))) if judge.judged % 25 else lambda: open_model(folder).model
            )
            judge(lambda opened=opened: list(opened().parameters()), len(mutated))
        overwrite(folder / name, content)


@pytest.mark.parametrize("n", dose(500, 10_000))
def test_mutated_directories(tmp_path, monkeypatch, n, soak):
    judge = Judge(3, soak=soak)
    for family in MODELS:
        write(tmp_path / family, family, monkeypatch)
        counts = {"config.json": n * 14 // 100, INDEX: n * 4 // 100, SHARDS[0]: n * 2 // 100}
        judged(judge, tmp_path / family, huggingface.HuggingFace(), counts)
    assert judge.judged == n and 0.1 * n < judge.read < 0.6 * n


@pytest.mark.parametrize("n", dose(500, 10_000))
def test_mutated_quantized_directories(tmp_path, monkeypatch, n, soak):
    judge = Judge(3, soak=soak)
    for bits in (4, 8):
        write(tmp_path / str(bits), "qwen3", monkeypatch, Quantization(bits, 32))
        judged(judge, tmp_path / str(bits), mlx_lm.MLXLM(), {"config.json": n // 4, "model.safetensors": n // 4})
    assert judge.judged == n and 0.05 * n < judge.read < 0.6 * n


@pytest.mark.parametrize("quantization", [None, Quantization(4, 32)])
def test_a_million_layers_are_refused_at_once(tmp_path, monkeypatch, quantization):
    folder, judge = tmp_path / "x", Judge()
    write(folder, "qwen3", monkeypatch, quantization)
    content = json.loads((folder / "config.json").read_text("utf-8"))
    content.pop("layer_types")
    for layers, message in ((10**6, "1000000 layers are more than"), (4000, "has 4000 layers, and has")):
        (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": layers}))
        with pytest.raises(UserError, match=message):
            list(open_model(folder).model.parameters())
        assert not judge(lambda: list(open_model(folder).model.parameters()), 2**13)
