"""nanoGPT's checkpoints: the same logits as a forward pass of its own, and nothing run that hides in the file."""

import math
import os
import pickle
import random
import sys
import zipfile

import numpy as np
import pytest

from tests.conftest import cpu, needs
from tests.mutate import bytes_changed
from twingpt.backends import registry
from twingpt.core import reference
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_table
from twingpt.core.tokenizer import tiktoken_named
from twingpt.weights import nanogpt, pickles

pytestmark = needs("torch")

ARGUMENTS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 65, "dropout": 0.1}


def state_dict(bias=True, seed=0, vocab_size=65):
    """Random weights under nanoGPT's names; the head is the embedding."""
    import torch

    torch.manual_seed(seed)
    D = ARGUMENTS["n_embd"]

    def norm(name):
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(D)
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(D)

    def linear(name, n_out, n_in):
        state[f"{name}.weight"] = 0.3 * torch.randn(n_out, n_in)
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(n_out)

    state = {"transformer.wte.weight": torch.randn(vocab_size, D), "transformer.wpe.weight": torch.randn(24, D)}
    for i in range(ARGUMENTS["n_layer"]):
        norm(f"transformer.h.{i}.ln_1")
        linear(f"transformer.h.{i}.attn.c_attn", 3 * D, D)
        linear(f"transformer.h.{i}.attn.c_proj", D, D)
        norm(f"transformer.h.{i}.ln_2")
        linear(f"transformer.h.{i}.mlp.c_fc", 4 * D, D)
        linear(f"transformer.h.{i}.mlp.c_proj", D, 4 * D)
    norm("transformer.ln_f")
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def forward(p, tokens):
    """nanoGPT's model.py in a page of torch, in float64."""
    import torch
    import torch.nn.functional as F

    p = {name: tensor.double() for name, tensor in p.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p.get(f"{name}.bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    B, T = tokens.shape
    x = p["transformer.wte.weight"][tokens] + p["transformer.wpe.weight"][:T]
    for i in range(ARGUMENTS["n_layer"]):
        name = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").split(x.shape[-1], -1)
        q, k, v = (part.view(B, T, ARGUMENTS["n_head"], -1).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, f"{name}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
    return (norm(x, "transformer.ln_f") @ p["lm_head.weight"].T).numpy()


def saved(path, state, **changes):
    import torch

    content = {
        "model": state,
        "model_args": ARGUMENTS | {"bias": True},
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.0),
    }
    content |= {"optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}}, "config": {}}
    torch.save(content | changes, path)
    return path


def detected(path):
    return nanogpt.NanoGPT().detect(ModelDirectory(path))


def opened(path):
    return nanogpt.NanoGPT().open(ModelDirectory(path))


def read(path):
    """The configuration and the parameters."""
    model = opened(path)
    return model.config, dict(model.parameters())


def some_tokens(vocab_size=65):
    return np.random.default_rng(0).integers(0, vocab_size, (2, 24))


def relative(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


VARIANTS = {
    "with biases": {},
    "without biases": {"bias": False},
    "compiled": {"prefix": "_orig_mod."},
    "with the masks of old versions": {"masks": True},
    "padded vocabulary": {"vocab_size": 128},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_logits_are_nanogpts(tmp_path, variant):
    import torch

    bias, size = variant.get("bias", True), variant.get("vocab_size", 65)
    state = state_dict(bias, vocab_size=size)
    stored = {variant.get("prefix", "") + name: tensor for name, tensor in state.items()}
    if "masks" in variant:
        stored |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    saved(tmp_path / "ckpt.pt", stored, model_args=ARGUMENTS | {"bias": bias, "vocab_size": size})
    assert detected(tmp_path) and detected(tmp_path / "ckpt.pt")
    config, tensors = read(tmp_path)
    assert list(tensors) == list(parameter_table(config)) and config.vocab_size == size and config.tie_embeddings
    theirs = forward(state, torch.from_numpy(some_tokens()))
    assert relative(reference.forward(tensors, some_tokens(), config), theirs) <= 1e-5
    for name in filter(registry.installed, registry.BACKENDS):
        engines = registry.get(name)
        engine = engines.InferenceEngine(config, tensors.items(), cpu(engines))
        assert relative(engine.forward(some_tokens()), theirs) <= 1e-5


def test_a_head_of_its_own_is_kept(tmp_path):
    state = state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    config, tensors = read(saved(tmp_path / "ckpt.pt", state))
    assert not config.tie_embeddings
    assert np.array_equal(tensors["lm_head.weight"], state["lm_head.weight"].numpy())


def test_an_equal_copy_of_the_embedding_is_tied(tmp_path):
    state = state_dict()
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    assert opened(saved(tmp_path / "ckpt.pt", state)).config.tie_embeddings


def test_half_precision_is_widened(tmp_path):
    import torch

    state = {name: tensor.to(torch.bfloat16) for name, tensor in state_dict().items()}
    found = read(saved(tmp_path / "ckpt.pt", state))[1]["model.norm.weight"]
    assert found.dtype == np.float32 and np.array_equal(found, state["transformer.ln_f.weight"].float().numpy())


ALPHABET = [chr(c) for c in range(32, 97)]


def meta(path, characters):
    table = {"itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"vocab_size": len(characters), **table}))
    return path


def test_the_characters_are_found(tmp_path):
    path = tmp_path / "out" / "ckpt.pt"
    path.parent.mkdir()
    saved(path, state_dict(), config={"dataset": "prose"})
    with pytest.raises(UserError, match=r"ckpt\.pt has no tokenizer: the model can be converted"):
        opened(path).tokenizer()
    meta(tmp_path / "data" / "prose" / "meta.pkl", ALPHABET)
    assert opened(path.parent).tokenizer().encode(" !`").tolist() == [0, 1, 64]
    meta(path.with_name("meta.pkl"), ALPHABET[:-1])  # of something else
    assert opened(path).tokenizer().encode("`").tolist() == [64]


@pytest.mark.parametrize("size", [50257, 50304])
def test_gpt2s_vocabulary_is_known_by_its_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(nanogpt, "tiktoken_named", lambda name: f"{name}'s")
    path = saved(tmp_path / "ckpt.pt", state_dict(vocab_size=size), model_args=ARGUMENTS | {"vocab_size": size})
    assert opened(path).tokenizer() == "gpt2's"


class Bomb:
    """A pickle of it makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    saved(tmp_path / "ckpt.pt", state_dict(), config=Bomb(tmp_path / "ran"))
    for call in (detected, opened):
        with pytest.raises(UserError, match=r"ckpt.pt names (posix|nt).mkdir, which would run code: .* nothing ran"):
            call(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_table_of_characters_is_not_run(tmp_path):
    path = saved(tmp_path / "ckpt.pt", state_dict())
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Bomb(tmp_path / "ran")}))
    with pytest.raises(UserError, match="more than plain values"):
        opened(path).tokenizer()
    assert not (tmp_path / "ran").exists()


def test_a_table_that_would_fill_the_memory_is_not_read(tmp_path):
    table = tmp_path / "meta.pkl"
    table.write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")  # None, remembered as number 2^32 - 1
    with pytest.raises(UserError, match="not a sound pickle"):
        pickles.read_plain_pickle(table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {**ARGUMENTS, "rotary": True}}, "Unknown option of nanoGPT in .* 'rotary'"),
        ({"model_args": {**ARGUMENTS, "n_layer": 10**6}}, "n_layer must be at most 4096, and is 1000000"),
        ({"model_args": {**ARGUMENTS, "n_layer": 3}}, "transformer.h.2.ln_1.weight is missing"),
        ({"model_args": {**ARGUMENTS, "n_layer": 1}}, "has a tensor transformer.h.1.ln_1.weight, for which"),
        ({"model_args": {**ARGUMENTS, "n_embd": 2**62}}, "has shape .* and the model needs"),
        ({"model_args": {**ARGUMENTS, "n_embd": 2**63}}, "n_embd is 9223372036854775808, which is too large"),
        ({"model_args": {**ARGUMENTS, "n_head": "2"}}, "n_head must be of type int"),
        ({"model_args": {**ARGUMENTS, "bias": 1}}, "bias in the model_args of .* must be true or false"),
        ({"model_args": {"n_layer": 2}}, "have no n_head"),
        ({"model_args": None}, "is not a checkpoint of nanoGPT"),
        ({"model": [1]}, "is not a state dict"),
        ({"model": {"a": 1}}, "a of the model in .* is not a tensor of floating-point numbers"),
    ],
)
def test_what_is_not_nanogpts_model_is_refused(tmp_path, changes, message):
    path = saved(tmp_path / "ckpt.pt", state_dict(), **changes)
    with pytest.raises(UserError, match=message):
        opened(path)


def test_more_numbers_than_the_file_has_are_refused(tmp_path):
    import torch

    state = state_dict() | {"transformer.wte.weight": torch.zeros(1, 1).expand(65, 16)}
    with pytest.raises(UserError, match="claims more numbers than are stored"):
        opened(saved(tmp_path / "ckpt.pt", state))


def test_two_of_one_name_are_refused(tmp_path):
    state = state_dict() | {"_orig_mod.transformer.wte.weight": state_dict()["transformer.wte.weight"]}
    with pytest.raises(UserError, match="has a tensor twice"):
        opened(saved(tmp_path / "ckpt.pt", state))


def test_another_folder_is_not_nanogpts(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"not a zip file")
    (tmp_path / "other").mkdir()
    for path in (tmp_path, tmp_path / "other", tmp_path / "nowhere"):
        assert not detected(path)
    assert not detected(saved(tmp_path / "model.pt", state_dict(), model_args=3))


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 10**7)
    with pytest.raises(UserError, match="its records are compressed"):
        opened(tmp_path)


def test_without_pytorch_one_sentence_says_so(tmp_path, monkeypatch):
    path = saved(tmp_path / "ckpt.pt", state_dict())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="is a file of PyTorch, which is not installed: pip install"):
        detected(path)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_read_or_refused(tmp_path, seed):
    chance = random.Random(seed)
    path = saved(tmp_path / "ckpt.pt", state_dict())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("ckpt/data.pkl").header_offset
    for i in range(60):
        at = [0, start, len(content) - 1500][i % 3]  # the first header, the pickle, the directory
        path.write_bytes(content[:at] + bytes_changed(content[at : at + 4000], chance) + content[at + 4000 :])
        try:
            assert all(array.dtype == np.float32 for _, array in opened(path).parameters())
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="../shared/tiktoken is not here")
def test_gpt2s_tokenizer(tmp_path):
    path = saved(tmp_path / "ckpt.pt", state_dict(vocab_size=50304), model_args=ARGUMENTS | {"vocab_size": 50304})
    assert opened(path).tokenizer().digest == tiktoken_named("gpt2").digest


def test_a_model_of_characters_becomes_a_run_that_generates_and_learns(tmp_path, gpt):
    """nanoGPT has no end of text: generating never says it, and fine-tuning gives it a row."""
    saved(tmp_path / "ckpt.pt", state_dict())
    meta(tmp_path / "meta.pkl", ALPHABET)
    code, out, err = gpt("convert", tmp_path, tmp_path / "run")
    assert code == 0, err
    settings = ("-m", "20", "--backend", "torch", "--seed", "1")
    code, out, err = gpt("generate", tmp_path / "run", "--prompt", "HELLO", *settings)
    assert code == 0 and out.startswith("HELLO"), err
    code, _, err = gpt("generate", tmp_path / "run", "--prompt", "", *settings)
    assert code == 2 and "knows no end of text" in err
    text = tmp_path / "text.txt"
    text.write_text("HELLO WORLD, SAID THE CAT. " * 300)
    options = ("--data", text, "--max-iters", "2", "--eval-iters", "1", "--sample-interval", "0", "--backend", "torch")
    code, _, err = gpt("train", "--init-from", tmp_path / "run", "--out", tmp_path / "tuned", *options)
    assert code == 0, err
    code, out, err = gpt("generate", tmp_path / "tuned", "--prompt", "", *settings)
    assert code == 0, err


def test_it_is_inspected(tmp_path, gpt):
    saved(tmp_path / "ckpt.pt", state_dict())
    code, out, err = gpt("convert", tmp_path, "--inspect", "--json")
    assert code == 0 and '"F32"' in out, err
