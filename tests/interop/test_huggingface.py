"""Our checkpoints as transformers and mlx-lm open them: the same logits, the same token ids."""

import numpy as np
import pytest

from tests.conftest import needs, open_checkpoint
from twingpt.backends import registry
from twingpt.core import reference
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.data.sources import load
from twingpt.data.tokenizers import train_bpe
from twingpt.weights.convert import convert
from twingpt.weights.formats import open_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"vocab_size": 600, "block_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 64, "init_std": 0.1}

PORTABLE = {
    "default": {"n_kv_head": 2},
    "untied": {"tie_embeddings": False, "n_kv_head": 1},
    "explicit head_dim": {"head_dim": 40},
    "llama": {"qk_norm": False},
    "llama with biases": {"qk_norm": False, "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
    "qwen3 with attention biases": {"qkv_bias": True, "attn_out_bias": True},
    "large theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {
        "qk_norm": False,
        "rope_scaling": {"type": "llama3", "factor": 8.0, "original_block_size": 16},
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_block_size": 16}},
}


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(load("python-docs").documents, 600)


def save(folder, config, tokenizer):
    checkpoint.save(folder, config, tokenizer, dict(initialise(config, 5)))
    return folder


def our_logits(folder, tokens):
    opened = open_checkpoint(folder)
    return reference.forward(dict(opened.parameters()), tokens, opened.config)


def transformers_logits(folder, tokens):
    import torch

    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def mlx_lm_logits(folder, tokens):
    registry.get("mlx")  # opens a fast BLAS before mlx_lm imports mlx

    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    model, _ = mlx_lm.load(str(folder))
    return np.array(model(mx.array(tokens)).tolist())


def relative(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def some_tokens(vocab_size):
    return np.random.default_rng(0).integers(0, vocab_size, (2, 50))


@needs("torch")
@pytest.mark.parametrize("switches", PORTABLE.values(), ids=PORTABLE)
def test_transformers_computes_the_same(tmp_path, bpe, switches):
    folder = save(tmp_path / "model", GPTConfig.from_dict({**SMALL, **switches}), bpe)
    tokens = some_tokens(600)
    assert relative(transformers_logits(folder, tokens), our_logits(folder, tokens)) <= 1e-5


# mlx-lm's qwen3 has no attention biases, and refuses a file that has them.
@needs("mlx")
@pytest.mark.parametrize("name", [name for name in PORTABLE if name != "qwen3 with attention biases"])
def test_mlx_lm_computes_the_same(tmp_path, bpe, name):
    folder = save(tmp_path / "model", GPTConfig.from_dict({**SMALL, **PORTABLE[name]}), bpe)
    tokens = some_tokens(600)
    assert relative(mlx_lm_logits(folder, tokens), our_logits(folder, tokens)) <= 1e-5


@needs("torch")
@needs("mlx")
def test_a_gpt2_shaped_checkpoint_is_exported(tmp_path, bpe):
    config = GPTConfig.from_dict({**SMALL, **SHAPES["gpt2"]})
    folder = save(tmp_path / "model", config, bpe)
    assert convert(open_model(folder), tmp_path / "hf")["family"] == "gpt2"
    tokens = some_tokens(600)
    assert relative(transformers_logits(tmp_path / "hf", tokens), our_logits(folder, tokens)) <= 1e-5
    assert relative(mlx_lm_logits(tmp_path / "hf", tokens), our_logits(folder, tokens)) <= 1e-5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").vocab_size == 599


@needs("torch")
def test_the_default_shape_is_exported_as_it_is(tmp_path, bpe):
    folder = save(tmp_path / "model", GPTConfig.from_dict({**SMALL, "n_kv_head": 2}), bpe)
    assert convert(open_model(folder), tmp_path / "hf")["family"] == "qwen3"
    tokens = some_tokens(600)
    assert relative(transformers_logits(tmp_path / "hf", tokens), our_logits(folder, tokens)) <= 1e-5


@pytest.mark.parametrize("switches", [{"mlp": "relu2"}, SHAPES["gpt2"] | {"embed_norm": True}])
def test_a_model_without_a_family_is_refused(tmp_path, bpe, switches):
    from twingpt.core.errors import UserError

    folder = save(tmp_path / "model", GPTConfig.from_dict({**SMALL, **switches}), bpe)
    with pytest.raises(UserError, match="No transformers family computes this model"):
        convert(open_model(folder), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@needs("torch")
def test_a_trained_run_opens_as_it_stands(tmp_path):
    """From `gpt train` to transformers' and mlx-lm's own generation, with nothing between."""
    from twingpt.training.launch import new_run
    from twingpt.training.trainer import Trainer

    options = {"vocab_size": 400, "n_layer": 2, "n_embd": 64, "block_size": 32, "max_iters": 40, "eval_iters": 1}
    run = tmp_path / "run"
    folder = Trainer(new_run({**options, "sample_interval": 0}, run, "torch", "cpu")).fit()["checkpoint"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The value of", return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    import twingpt

    loaded = twingpt.load(run, "torch")
    ours = [response.token for response in loaded.stream("The value of", 20, temp=0)]
    assert loaded.encode("The value of") == ids[0].tolist() and ours == theirs.tolist()[: len(ours)]
    assert model.config.eos_token_id == tokenizer.eos_token_id == open_checkpoint(folder).tokenizer().end_of_text
