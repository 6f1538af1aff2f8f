"""Files of torch.save as an enemy or a bad disk would leave them: read, or refused, and nothing in them run."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import dose, needs
from tests.mutate import Judge, SavedByTorch, header_at, mutations, overwrite, whole
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.tokenizer import CharTokenizer
from twingpt.weights import nanochat, nanogpt, pickles, torch_state
from twingpt.weights.formats import open_model

pytestmark = needs("torch")

ARGUMENTS = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 4, "vocab_size": 3, "bias": False}
SHAPES = {
    "wte": (3, 2), "wpe": (4, 2), "h.0.ln_1": (2,), "h.0.attn.c_attn": (6, 2), "h.0.attn.c_proj": (2, 2),
    "h.0.ln_2": (2,), "h.0.mlp.c_fc": (8, 2), "h.0.mlp.c_proj": (2, 8), "ln_f": (2,),
}  # fmt: skip


NANOCHAT = {
    "transformer.wte.weight": (3, 2), "transformer.h.0.attn.c_q.weight": (2, 2),
    "transformer.h.0.attn.c_k.weight": (2, 2), "transformer.h.0.attn.c_v.weight": (2, 2),
    "transformer.h.0.attn.c_proj.weight": (2, 2), "transformer.h.0.mlp.c_fc.weight": (8, 2),
    "transformer.h.0.mlp.c_proj.weight": (2, 8), "lm_head.weight": (3, 2),
}  # fmt: skip
IN_TRANSFORMERS = {
    "model.embed_tokens.weight": (3, 2), "model.layers.0.self_attn.q_proj.weight": (2, 2),
    "model.layers.0.self_attn.k_proj.weight": (2, 2), "model.layers.0.self_attn.v_proj.weight": (2, 2),
    "model.layers.0.self_attn.o_proj.weight": (2, 2), "model.layers.0.mlp.fc1.weight": (8, 2),
    "model.layers.0.mlp.fc2.weight": (2, 8), "lm_head.weight": (3, 2),
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """A checkpoint of nanoGPT of 4 KB."""
    import torch

    state = {f"transformer.{name}.weight": torch.ones(shape) for name, shape in SHAPES.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": ARGUMENTS, "iter_num": 3, "config": {"dataset": "x"}}, path)
    return path


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail where a pickle calls what OPERATIONS put into it."""
    monkeypatch.setattr("os.system", lambda command: pytest.fail(f"{command} was run"))


@pytest.mark.parametrize("n", dose(500, 10_000))
def test_mutated_checkpoints_of_nanogpt(tiny, nothing_runs, n, soak):
    judge = Judge(5, soak=soak)

    def read():
        model = nanogpt.NanoGPT().open(ModelDirectory(tiny))
        assert all(array.dtype == np.float32 for _, array in model.parameters())

    for mutated in SavedByTorch(tiny).mutations(5, n):
        overwrite(tiny, mutated)
        judge(read, len(mutated))
    assert judge.judged == n and 0.01 * n < judge.read < 0.6 * n


def judged(judge, format, folder, name, mutated_files):
    """Read the folder in a format with each of the files in the place of the one called `name`, which is put back."""
    good = (folder / name).read_bytes()

    def read():
        model = format.open(ModelDirectory(folder))
        assert all(array.dtype == np.float32 for _, array in model.parameters())

    for mutated in mutated_files:
        overwrite(folder / name, mutated)
        judge(read, len(mutated))
    overwrite(folder / name, good)


@pytest.mark.parametrize("n", dose(400, 10_000))
def test_mutated_models_of_nanochat(tmp_path, nothing_runs, n, soak):
    """Both layouts: its own, of torch.save and a JSON file, and that of transformers."""
    import torch

    own, theirs, judge = tmp_path / "own", tmp_path / "theirs", Judge(7, soak=soak)
    options = {"sequence_len": 8, "vocab_size": 3, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 2}
    own.mkdir()
    torch.save({name: torch.ones(shape) for name, shape in NANOCHAT.items()}, own / "model_000003.pt")
    meta = {"step": 3, "model_config": options, "user_config": {"run": "x"}}
    (own / "meta_000003.json").write_text(json.dumps(meta))
    theirs.mkdir()
    content = {
        "model_type": "nanochat", "max_position_embeddings": 8, "vocab_size": 3, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 2, "intermediate_size": 8, "head_dim": 2,
        "hidden_act": "relu2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 15.0, "attention_bias": False, "tie_word_embeddings": False,
    }  # fmt: skip
    (theirs / "config.json").write_text(json.dumps(content))
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in IN_TRANSFORMERS.items()}, theirs / "model.safetensors"
    )
    saved = SavedByTorch(own / "model_000003.pt")
    overwrite(own / "model_000003.pt", saved.content)
    for folder, name, text, count in (
        (own, "meta_000003.json", whole, n * 20 // 100),
        (theirs, "config.json", whole, n * 20 // 100),
        (theirs, "model.safetensors", header_at, n * 15 // 100),
    ):
        judged(judge, nanochat.Nanochat(), folder, name, mutations((folder / name).read_bytes(), 7, count, text))
    judged(judge, nanochat.Nanochat(), own, "model_000003.pt", saved.mutations(7, n * 45 // 100))
    assert judge.judged == n and 0.05 * n < judge.read < 0.6 * n


@pytest.mark.parametrize("n", dose(500, 10_000))
def test_mutated_state_dicts(tmp_path, nothing_runs, n, soak):
    folder, judge = tmp_path / "x", Judge(9, soak=soak)
    sizes = {"vocab_size": 4, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 2, "n_inner": 2}
    config = GPTConfig.from_dict({**sizes, "qk_norm": False, "mlp": "gelu"})
    torch_state.write(folder, config, initialise(config, 0), CharTokenizer("abc"))
    saved = SavedByTorch(folder / "model.pt")
    overwrite(folder / "model.pt", saved.content)
    content = (folder / "config.json").read_bytes()
    judged(judge, torch_state.TorchState(), folder, "config.json", mutations(content, 9, n * 3 // 10, whole))
    judged(judge, torch_state.TorchState(), folder, "model.pt", saved.mutations(9, n * 7 // 10))
    assert judge.judged == n and 0.05 * n < judge.read < 0.6 * n


DEEP = b"N" + b"\x85" * 100_000  # a tuple in a tuple in a tuple…
BRANCHED = b"N\x85q\x01" + b"".join(bytes([0x68, i, 0x68, i, 0x86, 0x71, i + 1]) for i in range(1, 60))  # 2^60 of them


@pytest.mark.parametrize("key", [DEEP, BRANCHED], ids=["deep", "branched"])
def test_keys_that_take_for_ever_to_hash(tiny, tmp_path, key):
    content = b"\x80\x02}" + key + b"Ns."
    tiny.write_bytes(SavedByTorch(tiny).with_pickle(content))
    with pytest.raises(UserError, match="has more objects, or deeper ones, than the tensors of a model need"):
        open_model(tiny)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match="more than plain values"):
        pickles.read_plain_pickle(tmp_path / "meta.pkl")


def test_more_objects_than_a_model_needs(tiny, tmp_path):
    content, judge = pickle.dumps([None] * 400_000, 2), Judge()
    tiny.write_bytes(SavedByTorch(tiny).with_pickle(content))
    with pytest.raises(UserError, match="has more objects"):
        open_model(tiny)
    assert not judge(lambda: open_model(tiny), len(content))
    (tmp_path / "meta.pkl").write_bytes(content)
    assert not judge(lambda: pickles.read_plain_pickle(tmp_path / "meta.pkl"), len(content))


def test_a_deep_value_where_a_plain_one_belongs(tiny):
    import torch

    deep = []
    for _ in range(300):
        deep = [deep, deep]
    torch.save({"model": {}, "model_args": ARGUMENTS | {"bias": deep}}, tiny)
    with pytest.raises(UserError, match=r"bias in the model_args of .* must be true or false, and is "):
        open_model(tiny)
