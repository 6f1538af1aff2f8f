"""Tiny random models of each family, built by transformers: the same logits here, the same text, and back again."""

import json

import numpy as np
import pytest

from tests.conftest import cpu, decoded, dose, needs
from twingpt.backends import registry
from twingpt.core import reference
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.safetensors_file import TensorFile
from twingpt.core.errors import UserError
from twingpt.weights import huggingface, mlx_lm
from twingpt.weights.families import FAMILIES, family_for

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = needs("torch")  # transformers computes with it

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 2000.0}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
GQA = {"num_key_value_heads": 2}

VARIANTS = {
    "gpt2": {},
    "gpt2, untied, exact GELU": {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 48},
    "gpt2, unscaled scores": {"scale_attn_weights": False},
    "llama": GQA,
    "llama, llama3": {**GQA, "rope_parameters": LLAMA3},
    "llama, linear": {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    "llama, yarn": {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 8.0}},
    "llama, yarn with mscale": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "llama, head_dim and biases": {"head_dim": 20, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "qwen2": GQA,
    "qwen2, windows": {
        **GQA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "rms_norm_eps": 1e-5,
    },
    "qwen2, yarn, tied": {**GQA, "rope_parameters": YARN, "tie_word_embeddings": True},
    "qwen3": {**GQA, "head_dim": 16},
    "qwen3, tied, biases, windows": {
        **GQA, "head_dim": 24, "tie_word_embeddings": True, "attention_bias": True, "use_sliding_window": True,
        "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {**GQA, "no_rope_layer_interval": 2},
    "smollm3, windows, untied": {
        **GQA, "no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 6, "attention_bias": True,
        "tie_word_embeddings": False, "mlp_bias": True, "rope_parameters": LINEAR,
    },
    "gemma3_text": {
        "head_dim": 16, **GQA, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "query_pre_attn_scalar": 24,
    },
    "gemma3_text, scaled, softcap": {
        "head_dim": 12, "num_key_value_heads": 1, "sliding_window": 5, "final_logit_softcapping": 4.0,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "attention_bias": True,
        "rope_parameters": {
            "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma3_text, no windows, untied": {
        "head_dim": 16, **GQA, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": False,
        "query_pre_attn_scalar": 16, "hidden_activation": "gelu",
    },
    "mistral": {**GQA, "sliding_window": 6},
    "mistral, no window, head_dim": {"num_key_value_heads": 4, "sliding_window": None, "head_dim": 24},
    "gpt_neox": {},
    "gpt_neox, sequential, tied, no bias": {
        "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_new",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    },
    "gpt_neox, linear": {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
    "olmo2": GQA,
    "olmo2, biases, yarn, tied": {"attention_bias": True, "rope_parameters": YARN, "tie_word_embeddings": True},
    "granite": {
        **GQA, "embedding_multiplier": 6.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1,
        "logits_scaling": 0.7,
    },
    "granite, plain, biases, llama3": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
}  # fmt: skip

SIZES = {
    "vocab_size": 199, "max_position_embeddings": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "hidden_size": 64, "intermediate_size": 80, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": 199, "n_positions": 96, "n_layer": 3, "n_head": 4, "n_embd": 48, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def build(name: str, **changes):
    """A random model whose every parameter is away from its initial value, so that none can be forgotten."""
    import torch

    family = name.split(",")[0]
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    config = transformers.CONFIG_MAPPING[family](**{**sizes, **VARIANTS.get(name, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.ndim == 2 else parameter + 0.2 * noise)
    return model


def their_logits(model, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens)), use_cache=False).logits.numpy()


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    """(name, the model of transformers, its directory)."""
    model = build(request.param)
    model.save_pretrained(tmp_path / "hf")
    return request.param, model, tmp_path / "hf"


def relative(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def tensors_of(folder) -> dict[str, np.ndarray]:
    return dict(opened(folder).parameters())


def opened(folder):
    return huggingface.HuggingFace().open(ModelDirectory(folder))


TOKENS = np.random.default_rng(0).integers(0, 199, (2, 40))


@pytest.mark.parametrize("length", dose(16, 64))
def test_it_computes_what_transformers_computes(variant, monkeypatch, length):
    _, model, folder = variant
    expected, read = their_logits(model, TOKENS), []
    original = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda file, name: read.append(name) or original(file, name))
    config, params = opened(folder).config, tensors_of(folder)
    assert sorted(read) == sorted(TensorFile(folder / "model.safetensors").entries)  # each once, none left
    assert relative(reference.forward(params, TOKENS, config), expected) <= 1e-5
    for name in filter(registry.installed, registry.BACKENDS):
        engines = registry.get(name)
        engine = engines.InferenceEngine(config, params.items(), cpu(engines))
        assert relative(engine.forward(TOKENS), expected) <= 1e-5, name
        # The same greedy text: each token is the one that transformers, after those before it, takes.
        prompt = TOKENS[0, :8]
        text = [*prompt, *decoded(engine, prompt, length)]
        scores = np.sort(their_logits(model, [text])[0], -1)
        assert (scores[7:-1, -1] - scores[7:-1, -2]).min() > 1e-4, "a tie: take other weights"
        assert their_logits(model, [text])[0].argmax(-1)[7:-1].tolist() == text[8:], name


def test_it_goes_back_to_transformers(variant, tmp_path):
    name, model, folder = variant
    config, params = opened(folder).config, tensors_of(folder)
    family = huggingface.write(tmp_path / "back", config, params.items(), {"bos_token_id": 0, "eos_token_id": 0})
    # What a plain one of another family is, llama writes as well.
    assert family == name.split(",")[0] or name.startswith(("mistral, no window", "granite, plain"))
    again = tensors_of(tmp_path / "back")
    assert opened(tmp_path / "back").config == config
    assert again.keys() == params.keys() and all(np.array_equal(again[key], params[key]) for key in params)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    assert relative(their_logits(loaded, TOKENS), their_logits(model, TOKENS)) <= 1e-6


# What mlx-lm leaves out of some models, saying nothing or failing.
NOT_IN_MLX_LM = {
    "gpt2, untied, exact GELU": "the activation of gelu",
    "gpt2, unscaled scores": "unscaled scores",
    "llama, head_dim and biases": "the activation of geglu",
    "qwen2, windows": "sliding windows",
    "qwen3, tied, biases, windows": "biases in attention",
    "gemma3_text, scaled, softcap": "biases in attention",
    "gemma3_text, no windows, untied": "the activation of geglu",
    "mistral": "sliding windows",
    "gpt_neox": "the activation of gelu",
    "gpt_neox, sequential, tied, no bias": "leaving out attention's biases",
    "gpt_neox, linear": "the activation of gelu",
}


@needs("mlx")
def test_mlx_lm_computes_the_same_or_is_not_written_for(variant, tmp_path):
    registry.get("mlx")  # opens a fast BLAS before mlx_lm imports mlx

    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    import mlx.core as mx

    name, model, folder = variant
    config = opened(folder).config
    if name in NOT_IN_MLX_LM:
        with pytest.raises(UserError, match=f"mlx-lm computes .* models without {NOT_IN_MLX_LM[name]}: write --to hf"):
            mlx_lm.check(config)
        return
    mlx_lm.check(config)
    huggingface.write(tmp_path / "back", config, opened(folder).parameters(), {"bos_token_id": 0, "eos_token_id": 0})
    theirs, _ = utils.load_model(tmp_path / "back")
    assert relative(np.array(theirs(mx.array(TOKENS)).tolist()), their_logits(model, TOKENS)) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_in_shards(tmp_path, dtype):
    """Read exactly: the model in float32 with the same rounded weights gives the same logits."""
    import torch

    build("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config, params = opened(tmp_path).config, tensors_of(tmp_path)
    assert all(array.dtype == np.float32 for array in params.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = their_logits(model, TOKENS)
    assert relative(reference.forward(params, TOKENS, config), expected) <= 1e-5
    ours = params["model.layers.2.mlp.up_proj.weight"]
    assert np.array_equal(ours, model.model.layers[2].mlp.up_proj.weight.detach().numpy())


def test_what_llama_computes_is_written_as_llama():
    """A family with nothing of its own: the file is then one that more programs read."""
    config = FAMILIES["mistral"].config({**SIZES, "num_key_value_heads": 4, "sliding_window": None})
    assert family_for(config).model_type == "llama"


def test_text_from_a_directory_as_transformers_goes_on(gpt, tmp_path):
    """The command on a directory of transformers' own, with its tokenizer, and on what it is converted to."""
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the cat sat on the mat and the dog ran over the hill"] * 9, 300, min_frequency=2)
    bpe.add_special_tokens(["<|endoftext|>"])
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()), eos_token="<|endoftext|>"
    )
    model, folder = build("llama, llama3", vocab_size=len(whole), eos_token_id=whole.eos_token_id), tmp_path / "hf"
    model.save_pretrained(folder)
    whole.save_pretrained(folder)
    prompt = whole("the dog sat", return_tensors="pt").input_ids
    theirs = model.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    theirs = theirs[: theirs.index(whole.eos_token_id)] if whole.eos_token_id in theirs else theirs
    assert len(theirs) > 10
    assert gpt("convert", folder, tmp_path / "ours")[0] == 0
    for source in (folder, tmp_path / "ours"):
        for name in filter(registry.installed, registry.BACKENDS):
            options = ("-p", "the dog sat", "-m", 30, "--temp", 0, "--backend", name, "--json")
            code, out, err = gpt("generate", source, *options)
            assert code == 0, err
            said = json.loads(out)
            assert (said["prompt_tokens"], said["tokens"]) == (prompt[0].tolist(), theirs)
