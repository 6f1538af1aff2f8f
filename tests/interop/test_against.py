"""gpt parity of every format that is read, and against transformers and mlx-lm."""

import json
import math
import sys

import numpy as np
import pytest

from tests.conftest import needs
from tests.interop.test_nanogpt import ARGUMENTS, state_dict
from twingpt.backends import registry
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.checkpoint.quantize import Quantization
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.weights.convert import convert
from twingpt.weights.formats import open_model
from twingpt.weights.quantize import apply

SMALL = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64, "init_std": 0.1}
LIBRARIES = {"hf": "transformers", "mlx-lm": "mlx-lm"}
TRANSFORMERS = pytest.param("hf", marks=needs("torch"))
MLX_LM = pytest.param("mlx-lm", marks=needs("mlx"))


@pytest.fixture
def native(tmp_path):
    def make(quantization=None, **switches):
        config = GPTConfig.from_dict({**SMALL, **switches})
        tensors = initialise(config, 4)
        tensors = apply(quantization, tensors, config) if quantization else tensors
        checkpoint.save_model(tmp_path / "native", config, ByteTokenizer(), tensors, quantization)
        return tmp_path / "native"

    return make


def library(name):
    return pytest.importorskip({"hf": "transformers", "mlx-lm": "mlx_lm"}[name], reason=f"{name} is not installed")


def compared(gpt, model, against, tolerance=1e-5):
    """`gpt parity` agrees, and every other implementation was compared with the library's."""
    for name in against.split(","):
        library(name)
    code, out, err = gpt("parity", *([model] if model else []), "--against", against, "--json")
    assert code == 0, err or out
    result = json.loads(out)
    assert result["ok"] and result["tolerance"] == tolerance
    for name in against.split(","):
        pairs = [pair for pair in result["pairs"] if LIBRARIES[name] in (pair["a"], pair["b"])]
        assert {pair["a"] for pair in pairs} >= {"reference"}
        assert all(pair["device_b"] == "cpu" for pair in pairs if pair["b"] == LIBRARIES[name])
        assert all(0 < pair["max_rel_diff"] <= tolerance and pair["top1_agreement"] == 1 for pair in pairs)
    return result


def refused(gpt, *arguments) -> str:
    code, out, err = gpt("parity", *arguments)
    assert code == 2 and out == "" and err.startswith("gpt: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("against", [TRANSFORMERS, MLX_LM])
@pytest.mark.parametrize(
    "switches", [{"n_kv_head": 2}, {"qk_norm": False, "tie_embeddings": False}, SHAPES["gpt2"]], ids=str
)
def test_our_own(gpt, native, against, switches):
    compared(gpt, native(**switches), against)


def test_both_at_once_on_random_models(gpt, twins):
    result = compared(gpt, None, "hf,mlx-lm")
    models = {pair["model"] for pair in result["pairs"] if pair["b"] == "mlx-lm" and pair["a"] == "transformers"}
    assert models == {"qwen3", "llama", "gpt2"}
    skipped = {(entry["model"], entry["against"]) for entry in result["skipped"]}
    assert skipped == {(model, name) for model in ("nano", "awkward") for name in LIBRARIES.values()}


@pytest.mark.parametrize("against", [TRANSFORMERS, MLX_LM])
def test_a_hugging_face_directory_in_bfloat16_as_it_stands(gpt, native, tmp_path, monkeypatch, against):
    library(against)
    convert(open_model(native(n_kv_head=2)), tmp_path / "hf")
    in_bfloat16(tmp_path / "hf")
    monkeypatch.setattr("twingpt.checks.others.write", None)  # no export
    compared(gpt, tmp_path / "hf", against)


def in_bfloat16(folder):
    from safetensors import safe_open

    from twingpt.core.checkpoint.safetensors_file import write_safetensors

    with safe_open(folder / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    halves = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in tensors.items()}
    shapes = {name: array.shape for name, array in halves.items()}
    write_safetensors(folder / "model.safetensors", shapes, halves.items(), dict.fromkeys(shapes, "BF16"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))


@pytest.mark.parametrize("against", [TRANSFORMERS, MLX_LM])
@pytest.mark.parametrize("to", ["twingpt", "mlx"])
def test_quantized(gpt, native, tmp_path, against, to):
    """mlx-lm runs its own kernel on the file as it stands; transformers gets the numbers that it stands for."""
    convert(open_model(native(n_kv_head=2)), tmp_path / "q", to, Quantization(4, 32))
    compared(gpt, tmp_path / "q", against, 1e-4)


@needs("mlx")
def test_what_mlx_lm_quantized_to_half_precision(gpt, native, tmp_path):
    registry.get("mlx")  # opens a fast BLAS before mlx_lm imports mlx

    convert(open_model(native(**SHAPES["gpt2"])), tmp_path / "hf")
    options = {"quantize": True, "q_bits": 8, "q_group_size": 32, "dtype": "float16"}
    library("mlx-lm").convert(str(tmp_path / "hf"), str(tmp_path / "theirs"), **options)
    compared(gpt, tmp_path / "theirs", "mlx-lm", 1e-4)


@needs("torch")
def test_nanogpt(gpt, tmp_path):
    import torch

    torch.save({"model": state_dict(), "model_args": {**ARGUMENTS, "bias": True}}, tmp_path / "ckpt.pt")
    compared(gpt, tmp_path / "ckpt.pt", "hf")


@needs("torch")
def test_a_torch_state(gpt, native, tmp_path):
    convert(open_model(native(n_kv_head=2)), tmp_path / "state", "torch")
    compared(gpt, tmp_path / "state", "hf")


@pytest.mark.parametrize("against", [TRANSFORMERS, MLX_LM])
def test_a_model_that_they_have_not(gpt, native, against):
    library(against)
    message = refused(gpt, native(mlp="relu2"), "--against", against)
    assert f"can't be compared with {LIBRARIES[against]}: it has no such model: only those of llama, " in message


@needs("mlx")
def test_a_model_that_mlx_lm_computes_otherwise(gpt, native):
    library("mlx-lm")
    message = refused(gpt, native(**{**SHAPES["gpt2"], "mlp": "gelu"}), "--against", "mlx-lm")
    assert "it computes gpt2 models without the activation of gelu." in message


@needs("mlx")
@pytest.mark.parametrize(("n_embd", "exact"), [(64, True), (40, False)])
def test_mlx_lm_rounds_gemmas_factor_on_embeddings(gpt, native, tmp_path, n_embd, exact):
    """The root of 64 has few digits, that of 40, as those of all published widths, has not."""
    library("mlx-lm")
    folder = native(
        n_embd=n_embd, embed_scale=math.sqrt(n_embd), mlp="geglu_tanh", norm_placement="both", norm_offset=True,
        sliding_window=8, full_attention_layers=[1], local_rope_theta=1e4,
    )  # fmt: skip
    assert convert(open_model(folder), tmp_path / "mlx", "mlx")["family"] == "gemma3_text"
    if exact:
        compared(gpt, tmp_path / "mlx", "mlx-lm")
    else:
        message = refused(gpt, tmp_path / "mlx", "--against", "mlx-lm")
        assert "it computes gemma3_text models without the exact factor on embeddings" in message


@needs("mlx")
def test_a_model_that_the_library_can_not_open(gpt, native, monkeypatch):
    library("mlx-lm")  # whose qwen3 has no biases
    monkeypatch.setattr("twingpt.checks.others.Library.problem", lambda *_: None)
    message = refused(gpt, native(qkv_bias=True, attn_out_bias=True), "--against", "mlx-lm")
    assert "mlx-lm can't run " in message and "not in model" in message


@pytest.mark.parametrize("against", [TRANSFORMERS, MLX_LM])
def test_no_code_beside_a_model_is_run(gpt, native, tmp_path, against):
    library(against)
    convert(open_model(native(n_kv_head=2)), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))
    evil = {"model_file": "evil.py", "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | evil))
    (tmp_path / "hf" / "evil.py").write_text(f"open({str(tmp_path / 'done')!r}, 'w')\nModel = ModelArgs = None\n")
    compared(gpt, tmp_path / "hf", against)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("against", [TRANSFORMERS, MLX_LM])
def test_mistakes(gpt, saved, monkeypatch, against):
    assert "Unknown library 'mlx-ml': did you mean 'mlx-lm'?" in refused(gpt, saved, "--against", "mlx-ml")
    library(against)
    options = (saved, "--against", against)
    assert "is compared in float32: leave out --dtype" in refused(gpt, *options, "--dtype", "bfloat16")
    monkeypatch.setitem(sys.modules, "torch" if against == "hf" else "mlx.core", None)
    assert f"{LIBRARIES[against]} needs {'torch' if against == 'hf' else 'mlx'}: pip" in refused(gpt, *options)
    monkeypatch.setitem(sys.modules, "transformers" if against == "hf" else "mlx_lm", None)
    assert f"{LIBRARIES[against]} is not installed: pip install {LIBRARIES[against]}." in refused(gpt, *options)
