"""nanochat's models: the same logits as a forward pass of its own and as transformers'."""

import json

import numpy as np
import pytest

from tests.conftest import cpu, needs
from twingpt.backends import registry
from twingpt.core import reference
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.tokenizer import ByteTokenizer, files
from twingpt.weights import nanochat

pytestmark = needs("torch")

OPTIONS = {"sequence_len": 32, "vocab_size": 70, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32}


def state_dict(seed=0, rows=70):
    """Random weights under nanochat's names."""
    import torch

    torch.manual_seed(seed)

    def matrix(*shape):
        return 0.4 * torch.randn(*shape)

    state = {"transformer.wte.weight": matrix(rows, 32), "lm_head.weight": matrix(rows, 32)}
    for i in range(OPTIONS["n_layer"]):
        name = f"transformer.h.{i}"
        state |= {f"{name}.attn.c_q.weight": matrix(32, 32), f"{name}.attn.c_proj.weight": matrix(32, 32)}
        state |= {f"{name}.attn.c_k.weight": matrix(16, 32), f"{name}.attn.c_v.weight": matrix(16, 32)}
        state |= {f"{name}.mlp.c_fc.weight": matrix(128, 32), f"{name}.mlp.c_proj.weight": matrix(32, 128)}
    return state


def forward(p, tokens):
    """nanochat's gpt.py of 2025 in a page of torch, in float64."""
    import torch
    import torch.nn.functional as F

    p = {name: tensor.double() for name, tensor in p.items()}
    T = tokens.shape[1]
    angles = torch.outer(torch.arange(T).float(), 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8)).double()
    cos, sin = angles.cos(), angles.sin()

    def norm(x):
        return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)

    def heads(x, name):
        return F.linear(x, p[name]).view(*x.shape[:2], -1, 8).transpose(1, 2)

    def rotated(x):
        x1, x2 = x.chunk(2, -1)
        return norm(torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1))

    x = norm(p["transformer.wte.weight"][tokens])
    for i in range(OPTIONS["n_layer"]):
        name, y = f"transformer.h.{i}", norm(x)
        q, k = (rotated(heads(y, f"{name}.attn.c_{letter}.weight")) for letter in "qk")
        v = heads(y, f"{name}.attn.c_v.weight")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), p[f"{name}.attn.c_proj.weight"])
        x = x + F.linear(F.linear(norm(x), p[f"{name}.mlp.c_fc.weight"]).relu() ** 2, p[f"{name}.mlp.c_proj.weight"])
    logits = F.linear(norm(x), p["lm_head.weight"])[..., : OPTIONS["vocab_size"]]
    return (15 * torch.tanh(logits / 15)).numpy()


def saved(folder, state, step="000650", **changes):
    import torch

    torch.save(state, folder / f"model_{step}.pt")
    (folder / f"meta_{step}.json").write_text(json.dumps({"step": 650, "model_config": OPTIONS} | changes))
    return folder


def detected(path):
    return nanochat.Nanochat().detect(ModelDirectory(path))


def opened(path):
    return nanochat.Nanochat().open(ModelDirectory(path))


def some_tokens():
    return np.random.default_rng(0).integers(0, 70, (2, 32))


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def assert_computes(path, theirs):
    model = opened(path)
    config, tensors = model.config, dict(model.parameters())
    assert {name: array.shape for name, array in tensors.items()} == {
        name: row.shape for name, row in parameter_table(config).items()
    }
    assert relative(reference.forward(tensors, some_tokens(), config), theirs) <= 1e-5
    for name in filter(registry.installed, registry.BACKENDS):
        engines = registry.get(name)
        engine = engines.InferenceEngine(config, tensors.items(), cpu(engines))
        assert relative(engine.forward(some_tokens()), theirs) <= 1e-5


@pytest.mark.parametrize("variant", ["as it is", "compiled", "padded", "bfloat16", "no windows"])
def test_the_logits_are_nanochats(tmp_path, variant):
    import torch

    state = state_dict(rows=128 if variant == "padded" else 70)
    if variant == "bfloat16":
        state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    prefix = "_orig_mod." if variant == "compiled" else ""
    options = OPTIONS | ({"window_pattern": "L"} if variant == "no windows" else {})
    saved(tmp_path, {prefix + name: tensor for name, tensor in state.items()}, model_config=options)
    assert detected(tmp_path) and detected(tmp_path / "model_000650.pt")
    assert_computes(tmp_path, forward(state, torch.from_numpy(some_tokens())))


def test_the_last_step_of_a_folder_is_taken(tmp_path):
    saved(saved(tmp_path, state_dict(1)), state_dict(2), "001000")
    for path, seed in ((tmp_path, 2), (tmp_path / "model_000650.pt", 1)):
        head = dict(opened(path).parameters())["lm_head.weight"]
        assert np.array_equal(head, state_dict(seed)["lm_head.weight"].numpy())


@pytest.mark.parametrize(
    "variant", [{}, {"final_logit_softcapping": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}]
)
def test_the_logits_are_those_of_transformers(tmp_path, variant):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no nanochat")
    import torch

    config = transformers.NanoChatConfig(
        vocab_size=70, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **variant},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.NanoChatForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert detected(tmp_path)
    with torch.no_grad():
        assert_computes(tmp_path, model(torch.from_numpy(some_tokens())).logits.numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act = 'silu' in .* is not read: only 'relu2' is"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": 3}, "must be objects"),
        ({"rope_scaling": "linear"}, "must be objects"),
        ({"num_hidden_layers": 10**6}, "n_layer must be at most 4096, and is 1000000"),
        ({"num_hidden_layers": None}, "n_layer must be of type int"),
        ({"vocab_size": "many"}, "vocab_size must be of type int"),
    ],
)
def test_another_config_of_the_family_is_refused(tmp_path, changes, message):
    from safetensors.numpy import save_file

    content = {
        "model_type": "nanochat", "max_position_embeddings": 32, "vocab_size": 70, "num_hidden_layers": 3,
        "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 96,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


NEWER = {
    "resid_lambdas": (3,), "x0_lambdas": (3,), "value_embeds.0.weight": (70, 16), "smear_gate.weight": (1, 24),
    "backout_lambda": (1,),
}  # fmt: skip


@pytest.mark.parametrize("name", NEWER)
def test_what_newer_models_have_is_refused_by_name(tmp_path, name):
    import torch

    saved(tmp_path, state_dict() | {name: torch.ones(NEWER[name])})
    with pytest.raises(UserError, match=f"has a tensor {name}, for which this model has no place"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": {**OPTIONS, "window_pattern": "SSSL"}}, "window_pattern 'SSSL' in .* are not read"),
        ({"model_config": {**OPTIONS, "n_experts": 2}}, "Unknown option of nanochat in .* 'n_experts'"),
        ({"model_config": {**OPTIONS, "n_layer": 4}}, r"transformer.h.3.attn.c_q.weight is missing"),
        ({"model_config": {**OPTIONS, "n_layer": 10**6}}, "n_layer must be at most 4096, and is 1000000"),
        ({"model_config": {**OPTIONS, "vocab_size": 71}}, "has shape"),
        ({"model_config": {"n_layer": 3}}, "has no sequence_len"),
        ({"model_config": None}, "has no model_config"),
    ],
)
def test_another_model_is_refused(tmp_path, changes, message):
    saved(tmp_path, state_dict(), **changes)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_other_folders_are_not_nanochats(tmp_path):
    for name in ("model_1.pt", "model_x.pt", "ckpt.pt", "config.json"):
        (tmp_path / name).write_text("{")
    assert not detected(tmp_path) and not detected(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"meta_1\.json is missing"):
        opened(tmp_path)


def test_its_tokenizer_is_taken_where_it_is_no_pickle(tmp_path):
    saved(tmp_path, state_dict())
    (tmp_path / "tokenizer.pkl").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(UserError, match="has no tokenizer: the model can be converted"):
        opened(tmp_path).tokenizer()
    for name, text in files(ByteTokenizer(), 32).items():
        (tmp_path / name).write_text(text, "utf-8")
    first, second = opened(tmp_path).tokenizer(), opened(tmp_path / "model_000650.pt").tokenizer()
    assert first.digest == second.digest


def test_it_becomes_a_run_that_generates(tmp_path, gpt):
    (tmp_path / "theirs").mkdir()
    options = OPTIONS | {"vocab_size": 257}
    saved(tmp_path / "theirs", state_dict(rows=320), model_config=options)  # 257, padded
    for name, text in files(ByteTokenizer(), 32).items():
        (tmp_path / "theirs" / name).write_text(text, "utf-8")
    code, out, err = gpt("convert", tmp_path / "theirs", tmp_path / "run", "--json")
    assert code == 0, err
    assert (json.loads(out)["source_format"], json.loads(out)["family"]) == ("nanochat", "nanochat")
    arguments = ("--prompt", "ab", "-m", "4", "--temp", "0", "--backend", "torch", "--json")
    code, out, err = gpt("generate", tmp_path / "run", *arguments)
    assert code == 0, err
