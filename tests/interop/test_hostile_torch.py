"""Files of torch.save as an enemy or a bad disk would leave them: read, or refused, and nothing in them run."""

import io
import pickle
import random
import zipfile

import numpy as np
import pytest

from tests.conftest import needs
from tests.mutate import Judge, bytes_changed, pickle_changed
from twingpt import UserError
from twingpt.weights import nanogpt, pickles
from twingpt.weights.formats import open_model

pytestmark = needs("torch")

ARGUMENTS = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 4, "vocab_size": 3, "bias": False}
SHAPES = {
    "wte": (3, 2), "wpe": (4, 2), "h.0.ln_1": (2,), "h.0.attn.c_attn": (6, 2), "h.0.attn.c_proj": (2, 2),
    "h.0.ln_2": (2,), "h.0.mlp.c_fc": (8, 2), "h.0.mlp.c_proj": (2, 8), "ln_f": (2,),
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """A checkpoint of nanoGPT of 4 KB, the records of its zip file, and its pickle."""
    import torch

    state = {f"transformer.{name}.weight": torch.ones(shape) for name, shape in SHAPES.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": ARGUMENTS, "iter_num": 3, "config": {"dataset": "x"}}, path)
    with zipfile.ZipFile(path) as archive:
        return path, {name: archive.read(name) for name in archive.namelist()}


def zipped(records, content):
    """The zip file with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, content if name.endswith("data.pkl") else record)
    return file.getvalue()


@pytest.mark.slow
def test_ten_thousand_mutated_files(tiny, monkeypatch):
    (path, records), judge, chance = tiny, Judge(), random.Random(5)
    whole, content = path.read_bytes(), records["ckpt/data.pkl"]
    monkeypatch.setattr("os.system", lambda command: pytest.fail(f"{command} was run"))

    def read():
        _, state = nanogpt._open(path)
        assert all(array.dtype == np.float32 for array in (stored.read() for stored in state.values()))

    for i in range(10_000):
        if i % 4 == 0:
            mutated = bytes_changed(whole, chance)
        elif i % 4 == 1:  # the directory of the zip file
            mutated = whole[:-1400] + bytes_changed(whole[-1400:], chance)
        else:
            mutated = zipped(records, pickle_changed(content, chance))
        path.write_bytes(mutated)
        judge(read, len(mutated))
    assert judge.read + judge.refused == 10_000 and 100 < judge.read < 6000


DEEP = b"N" + b"\x85" * 100_000  # a tuple in a tuple in a tuple…
BRANCHED = b"N\x85q\x01" + b"".join(bytes([0x68, i, 0x68, i, 0x86, 0x71, i + 1]) for i in range(1, 60))  # 2^60 of them


@pytest.mark.parametrize("key", [DEEP, BRANCHED], ids=["deep", "branched"])
def test_keys_that_take_for_ever_to_hash(tiny, tmp_path, key):
    path, records = tiny
    content = b"\x80\x02}" + key + b"Ns."
    path.write_bytes(zipped(records, content))
    with pytest.raises(UserError, match="has more objects, or deeper ones, than the tensors of a model need"):
        open_model(path)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match="more than plain values"):
        pickles.read_plain_pickle(tmp_path / "meta.pkl")


def test_more_objects_than_a_model_needs(tiny, tmp_path):
    path, records = tiny
    content, judge = pickle.dumps([None] * 400_000, 2), Judge()
    path.write_bytes(zipped(records, content))
    with pytest.raises(UserError, match="has more objects"):
        open_model(path)
    assert not judge(lambda: open_model(path), len(content))
    (tmp_path / "meta.pkl").write_bytes(content)
    assert not judge(lambda: pickles.read_plain_pickle(tmp_path / "meta.pkl"), len(content))


def test_a_deep_value_where_a_plain_one_belongs(tiny):
    import torch

    path, _ = tiny
    deep = []
    for _ in range(300):
        deep = [deep, deep]
    torch.save({"model": {}, "model_args": ARGUMENTS | {"bias": deep}}, path)
    with pytest.raises(UserError, match=r"bias in the model_args of .* must be true or false, and is "):
        open_model(path)
