"""Hugging Face directories as they come: published configurations, old names, and what is refused."""

import json
import os

import numpy as np
import pytest

from tests.conftest import dose, links, pipes
from tests.mutate import mutations, overwrite, whole
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.checkpoint.safetensors_file import TensorFile, write_safetensors
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise, parameter_count
from twingpt.core.presets import SHAPES
from twingpt.weights.families import FAMILIES, family_of
from twingpt.weights.huggingface import INDEX, HuggingFace, write

TINY = {
    "model_type": "llama", "vocab_size": 40, "max_position_embeddings": 16, "num_hidden_layers": 2, "hidden_size": 16,
    "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def folder_of(path, content):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def rewrite(path, change):
    """Change the tensors of a directory: `change` gets and returns {name: array}."""
    file = TensorFile(path / "model.safetensors")
    arrays = change({name: file.read(name) for name in file.entries})
    dtypes = {name: {"float32": "F32", "int64": "I64"}[str(array.dtype)] for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    write_safetensors(path / "model.safetensors", shapes, arrays.items(), dtypes)


def written(path, **switches):
    config = GPTConfig.from_dict(
        {"vocab_size": 40, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "qk_norm": False, **switches}
    )
    write(path, config, initialise(config, 3))
    return path, config


def all_tensors(path):
    return dict(opened(path).parameters())


def opened(path):
    return HuggingFace().open(ModelDirectory(path))


def detected(path):
    return HuggingFace().detect(ModelDirectory(path))


# Configurations as they are published, older spellings included, with the published numbers of parameters.
PUBLISHED = {
    "openai-community/gpt2": (124_439_808, {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "embd_pdrop": 0.1, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257,
    }),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, {
        "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }),
    "Qwen/Qwen2.5-0.5B": (494_032_768, {
        "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Qwen/Qwen3-0.6B": (596_049_920, {
        "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 32000,
    }),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, {
        "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "mlp_bias": False,
        "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 128256,
    }),
    "google/gemma-3-1b-pt": (999_885_952, {
        "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144,
    }),
    "EleutherAI/pythia-160m": (162_322_944, {
        "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12,
        "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True, "vocab_size": 50304,
    }),
    "allenai/OLMo-2-0425-1B": (1_484_916_736, {
        "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
    }),
    "ibm-granite/granite-3.1-2b-base": (2_533_531_648, {
        "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": True, "vocab_size": 49155,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name, tmp_path):
    parameters, content = PUBLISHED[name]
    config = opened(folder_of(tmp_path / "x", content)).config
    assert parameter_count(config) == parameters
    family = family_of(content)
    assert family.computes(config) and family.config(family.content(config)).rope_theta == config.rope_theta


def test_published_details(tmp_path):
    read = {name: family_of(content).config(content) for name, (_, content) in PUBLISHED.items()}
    gemma, smollm = read["google/gemma-3-1b-pt"], read["HuggingFaceTB/SmolLM3-3B"]
    assert (gemma.full_attention_layers, gemma.sliding_window) == ((5, 11, 17, 23), 512)
    assert (gemma.rope_theta, gemma.local_rope_theta, gemma.attn_scale) == (1e6, 1e4, 0.0)
    assert smollm.no_rope_layers == tuple(range(3, 36, 4)) and not smollm.sliding_window
    assert read["Qwen/Qwen2.5-0.5B"].sliding_window == 0 and read["mistralai/Mistral-7B-v0.1"].sliding_window == 4096
    pythia, granite = read["EleutherAI/pythia-160m"], read["ibm-granite/granite-3.1-2b-base"]
    assert pythia.rope_dim == 16 and pythia.parallel_residual
    assert granite.score_scale == 1 / 64 and granite.logit_divisor == 8


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
        {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ],
)
def test_rope_is_spelled_in_three_ways(scaling):
    older = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    spellings = [
        {"rope_parameters": {**scaling, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": scaling},
        {"rope_theta": 500.0, "rope_scaling": older},
    ]
    first, *others = (FAMILIES["llama"].config({**TINY, **spelling}) for spelling in spellings)
    assert first.rope_scaling and first.rope_theta == 500 and all(other == first for other in others)


NEVER = {"rope_type": "linear", "factor": 2.0}

REFUSED = {
    "another family": ({"model_type": "mixtral"}, "The family 'mixtral' is not supported: only llama, qwen3"),
    "experts": ({"model_type": "qwen3_moe"}, "The family 'qwen3_moe' is not supported"),
    "images": ({"model_type": "gemma3", "vision_config": {}}, "The family 'gemma3' is not supported"),
    "no family": ({"model_type": None}, "model_type is missing"),
    "experts in a known family": ({"num_local_experts": 8}, "num_local_experts = 8 is not supported"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
    "both directions": ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_att"),
    "attention softcap": ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "inverse layers": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    "longrope": ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_type 'longrope' is not supported"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic' is not supported"),
    "yarn untruncated": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate = False"
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported in this family"),
    "scaling without a factor": ({"rope_scaling": {"type": "linear"}}, "factor must be a finite number, and is None"),
    "scaling of another kind": ({"rope_scaling": 3}, "rope_scaling must be a set of keys, and is 3"),
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported: only silu, swish, gelu"),
    "activation of another kind": ({"hidden_act": ["silu"]}, "hidden_act ['silu'] is not supported"),
    "a key too few": ({"hidden_size": ...}, "hidden_size is missing"),
    "a text for a number": ({"hidden_size": "16"}, "hidden_size must be of type int, and is '16'"),
    "no heads": ({"num_attention_heads": 0}, "n_head must be positive"),
    "negative heads": ({"head_dim": -4}, "head_dim must be positive"),
    "a million layers": ({"num_hidden_layers": 10**6}, "1000000 layers are more than the 4096"),
    "a number without end": ({"rms_norm_eps": 10**400}, "which is too large"),
    "NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
    "chunks": (
        {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer_types with 'chunked_attention'"
    ),
    "layers too few": ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "each of the 2 layers"),
    "mixed mistral": (
        {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types of several"
    ),
    "half a rope": ({"model_type": "smollm3", "no_rope_layers": [1, 0.5]}, "no_rope_layers must have a 0 or 1"),
    "rope every 0": ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval must be positive"),
    "flat rope": (
        {"model_type": "gemma3_text", "rope_parameters": NEVER}, "must have full_attention and sliding_attention"
    ),
    "scaled local rope": (
        {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": NEVER}}, "A scaled rope_type of sliding"
    ),
    "no scores": ({"model_type": "granite", "attention_multiplier": 0.0}, "attention_multiplier must be positive"),
    "windows of text": (
        {"model_type": "mistral", "sliding_window": "all"}, "sliding_window must be of type int, and is 'all'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, name):
    """There are no weights that could have been read."""
    changes, message = REFUSED[name]
    content = {key: value for key, value in {**TINY, **changes}.items() if value is not ...}
    with pytest.raises(UserError) as refused:
        opened(folder_of(tmp_path / "x", content))
    assert message in str(refused.value) and str(tmp_path / "x" / "config.json") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "is not a JSON object"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "can't be read"),
        ('"\\ud800"', "is not a JSON object"),
    ],
)
def test_a_config_that_is_none(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        opened(folder_of(tmp_path / "x", content))


@pytest.mark.parametrize("each", dose(50, 1000))
def test_mutated_configurations(tmp_path, each):
    """Each is refused in one sentence, or is a configuration."""
    accepted = 0
    for seed, (_, content) in enumerate(PUBLISHED.values()):
        folder_of(tmp_path, content)
        for mutated in mutations(json.dumps(content).encode(), seed, each, whole):
            overwrite(tmp_path / "config.json", mutated)
            try:
                accepted += isinstance(opened(tmp_path).config, GPTConfig)
            except UserError as error:
                assert "\n" not in str(error)
    n = each * len(PUBLISHED)
    assert 0.1 * n < accepted < 0.9 * n  # what changes a key that plays no part is as good as before


@pytest.mark.parametrize("n", dose(200, 1000))
def test_mutated_indexes(tmp_path, n):
    path, _, _ = sharded(tmp_path / "x")
    content, accepted = (path / INDEX).read_bytes(), 0
    for mutated in mutations(content, 0, n, whole):
        (path / INDEX).write_bytes(mutated)
        try:
            accepted += opened(path).parameters() is not None  # it has checked all names and shapes
        except UserError as error:
            assert "\n" not in str(error)
    assert accepted < 0.5 * n


def test_missing_and_strange_tensors(tmp_path):
    path, _ = written(tmp_path / "x")
    good = (path / "model.safetensors").read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    changes = [
        (lambda a: {k: v for k, v in a.items() if k != name}, f"The tensor {name} is missing from"),
        (lambda a: a | {"model.layers.2.mlp.up_proj.weight": a[name]}, "has a tensor model.layers.2.mlp.up_proj"),
        (lambda a: a | {name: a[name].T.copy()}, rf"The tensor {name} in .* has shape \(16, 64\)"),
        (lambda a: a | {name: a[name].astype(np.int64)}, f"The tensor {name} in .* is I64, and must be F32"),
        (lambda a: a | {name.removeprefix("model."): a[name]}, f"The tensor {name} is there twice"),
        (lambda a: a | {"lm_head.weight": a["model.norm.weight"]}, "beside the embedding that config.json says"),
    ]
    for change, message in changes:
        (path / "model.safetensors").write_bytes(good)
        rewrite(path, change)
        with pytest.raises(UserError, match=message) as refused:
            all_tensors(path)
        assert "\n" not in str(refused.value)


def test_names_as_older_files_have_them(tmp_path):
    """Without the prefix, with buffers, with a copy of the tied head."""
    path, config = written(tmp_path / "x")
    params = dict(initialise(config, 3))

    def older(arrays):
        arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
        beside = {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
        return arrays | beside | {"lm_head.weight": arrays["embed_tokens.weight"]}

    rewrite(path, older)
    read = all_tensors(path)
    assert read.keys() == params.keys() and all(np.array_equal(read[name], params[name]) for name in params)


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "in parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "checkpointed": lambda name: name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("shape", ["qwen3", "gpt2"])
def test_names_of_a_model_that_was_saved_wrapped(tmp_path, shape, wrap):
    """https://github.com/huggingface/transformers/issues/28041"""
    path, config = written(tmp_path / "x", **SHAPES[shape])
    rewrite(path, lambda arrays: {wrap(name): array for name, array in arrays.items()})
    params, read = dict(initialise(config, 3)), all_tensors(path)
    assert read.keys() == params.keys() and all(np.array_equal(read[name], params[name]) for name in params)
    rewrite(path, lambda arrays: arrays | {wrap(next(iter(arrays))).replace(".", "._orig_mod.", 1): np.ones(3, "f4")})
    with pytest.raises(UserError, match="is there twice"):
        all_tensors(path)


def test_adapters_that_were_not_merged_are_named(tmp_path):
    """https://github.com/huggingface/peft/issues/1381"""
    path, _ = written(tmp_path / "x")

    def with_adapters(arrays):
        found = {}
        for name, array in arrays.items():
            base = name.removesuffix(".weight")
            if not base.endswith("q_proj"):
                found[name] = array
                continue
            found[f"{base}.base_layer.weight"] = array
            found |= {f"{base}.lora_{side}.default.weight": np.zeros((4, 4), np.float32) for side in "AB"}
        return found

    rewrite(path, with_adapters)
    with pytest.raises(UserError, match=r"has adapters beside its weights .*lora_A.*merge_and_unload"):
        all_tensors(path)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_with_and_without_its_prefix(tmp_path, prefix):
    path, config = written(tmp_path / "x", **SHAPES["gpt2"])
    masks = {f"{prefix}h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32)}
    masks[f"{prefix}h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
    rewrite(path, lambda arrays: {prefix + name: array for name, array in arrays.items()} | masks)
    params, read = dict(initialise(config, 3)), all_tensors(path)
    assert all(np.array_equal(read[name], params[name]) for name in params)


def test_gpt_neox_with_a_head_of_either_name(tmp_path):
    switches = {"norm": "layernorm", "norm_bias": True, "mlp": "gelu", "mlp_bias": True, "tie_embeddings": False}
    path, _ = written(tmp_path / "x", **switches, qkv_bias=True, attn_out_bias=True, rope_fraction=0.25, n_head=1)
    assert json.loads((path / "config.json").read_text("utf-8"))["model_type"] == "gpt_neox"
    before = all_tensors(path)
    rewrite(path, lambda arrays: {name.replace("embed_out", "lm_head"): array for name, array in arrays.items()})
    assert np.array_equal(all_tensors(path)["lm_head.weight"], before["lm_head.weight"])


def sharded(path):
    """A directory with its tensors in two files and an index."""
    path, config = written(path)
    arrays = {name: array.copy() for name, array in initialise(config, 3)}
    half = len(arrays) // 2
    places = {}
    for i, names in enumerate((list(arrays)[:half], list(arrays)[half:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        write_safetensors(path / file, {n: arrays[n].shape for n in names}, ((n, arrays[n]) for n in names))
        places |= dict.fromkeys(names, file)
    (path / "model.safetensors").unlink()
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path, arrays, places


def test_shards(tmp_path):
    path, arrays, _ = sharded(tmp_path / "x")
    read = all_tensors(path)
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "\0"])
def test_an_index_leads_nowhere_else(tmp_path, place):
    path, _, places = sharded(tmp_path / "x")
    (tmp_path / "secret.safetensors").write_bytes((path / places["model.norm.weight"]).read_bytes())
    (path / INDEX).write_text(json.dumps({"weight_map": places | {"model.norm.weight": place}}))
    with pytest.raises(UserError, match=r"which is not in it: it is not opened|is missing"):
        all_tensors(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map from tensors to files"),
        ({"weight_map": {"a": 3}}, "has no weight_map from tensors to files"),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "The tensor a is missing from"),
        ({"weight_map": {"a": "model-00009-of-00002.safetensors"}}, "model-00009-of-00002.safetensors is missing"),
        ({"weight_map": {}}, "has no weight_map from tensors to files"),
    ],
)
def test_an_index_that_lies(tmp_path, index, message):
    path, _, _ = sharded(tmp_path / "x")
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        all_tensors(path)


@links
def test_links_out_of_the_directory_are_refused(tmp_path):
    path, _ = written(tmp_path / "x")
    for name in ("model.safetensors", "config.json"):
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a link to .*: it is not opened"):
            all_tensors(path)
        (path / name).unlink()
        (path / name).symlink_to(path / name)  # to itself
        with pytest.raises(UserError, match=f"{name} is missing|no {name}"):
            all_tensors(path)
        (path / name).unlink()
        (tmp_path / name).rename(path / name)


@links
def test_the_hubs_cache_is_made_of_links(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    path, config = written(snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        (path / name).rename(blobs / name)
        os.symlink(f"../../blobs/{name}", path / name)
    assert all_tensors(path).keys() == dict(initialise(config, 0)).keys()


@pipes
def test_a_pipe_is_no_file(tmp_path):
    path, _ = written(tmp_path / "x")
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors is missing"):  # and does not wait for a writer
        all_tensors(path)


def test_pickles_are_not_opened(tmp_path):
    path, _ = written(tmp_path / "x")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, which could run code"):
        all_tensors(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors\."):
        all_tensors(path)


def test_which_directories_are_someone_elses(tmp_path, saved):
    path, _ = written(tmp_path / "x")
    assert detected(path) and not detected(saved) and not detected(tmp_path)
    (saved / "manifest.json").unlink()
    assert detected(saved)  # as another tool leaves it; its fields say all of the model
    assert detected(folder_of(tmp_path / "y", "{"))


def test_a_model_without_a_tokenizer_takes_no_text(tmp_path):
    path, _ = written(tmp_path / "x")
    with pytest.raises(UserError, match=r"has no tokenizer.json: the model can be converted, but takes no text"):
        opened(path).tokenizer()


def test_a_write_that_fails_leaves_nothing(tmp_path):
    _, config = written(tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written: "):
        write(tmp_path / "file" / "y", config, initialise(config, 0))
    with pytest.raises(UserError, match="No transformers family computes this model"):
        write(tmp_path / "z", GPTConfig(vocab_size=40, n_embd=16, smear=True), [])
    assert not (tmp_path / "z").exists()
