"""Opening, converting and loading a model reads each JSON file, each header and each pickle of its folder once."""

import builtins
import io
import json
import pickle
from collections import Counter
from pathlib import Path

import pytest

import twingpt
from tests.conftest import needs
from tests.interop.test_nanochat import OPTIONS as NANOCHAT
from tests.interop.test_nanochat import saved as save_nanochat
from tests.interop.test_nanochat import state_dict as nanochat_state
from tests.interop.test_nanogpt import ALPHABET, meta
from tests.interop.test_nanogpt import saved as save_nanogpt
from tests.interop.test_nanogpt import state_dict as nanogpt_state
from twingpt.core.checkpoint import schema
from twingpt.core.checkpoint.quantize import Quantization
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.tokenizer import ByteTokenizer, files
from twingpt.weights.convert import convert
from twingpt.weights.formats import open_model

pytestmark = needs("torch")

BESIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def ours(folder):
    config = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
    schema.save_model(folder, config, ByteTokenizer(), initialise(config, 1))
    return folder, [*BESIDE, "manifest.json", "model.safetensors"]


def hugging_face(folder):
    convert(open_model(ours(folder.with_name("ours"))[0]), folder, "hf")
    return folder, [*BESIDE, "model.safetensors"]


def hugging_face_in_shards(folder, monkeypatch):
    opened = open_model(ours(folder.with_name("ours"))[0])
    monkeypatch.setattr(schema, "SHARD_BYTES", 4 * 30_000)
    convert(opened, folder, "hf")
    shards = [path.name for path in folder.glob("model-*.safetensors")]
    assert len(shards) > 2
    return folder, [*BESIDE, "model.safetensors.index.json", *shards]


def mlx_lm(folder):
    convert(open_model(ours(folder.with_name("ours"))[0]), folder, "mlx", Quantization(4, 32))
    return folder, [*BESIDE, "model.safetensors"]


def torch_state(folder):
    convert(open_model(ours(folder.with_name("ours"))[0]), folder, "torch")
    return folder, [*BESIDE, "model.pt"]


def nanogpt(folder):
    folder.mkdir()
    meta(folder / "meta.pkl", ALPHABET)
    return save_nanogpt(folder / "ckpt.pt", nanogpt_state()), ["ckpt.pt", "meta.pkl"]


def nanochat(folder):
    folder.mkdir()
    save_nanochat(folder, nanochat_state(rows=257), model_config=NANOCHAT | {"vocab_size": 257})
    for name, text in files(ByteTokenizer(), 32).items():
        (folder / name).write_text(text, "utf-8")
    return folder, ["meta_000650.json", "model_000650.pt", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(params=[ours, hugging_face, hugging_face_in_shards, mlx_lm, torch_state, nanogpt, nanochat])
def model(request, tmp_path, monkeypatch):
    """A model, and the names of the files that what it is lies in."""
    with monkeypatch.context() as patch:
        arguments = (tmp_path / "source", patch) if request.param is hugging_face_in_shards else (tmp_path / "source",)
        return request.param(*arguments)


class HeaderReads(io.BufferedReader):
    """A file that notes where its first eight bytes, the length of a safetensors header, are read."""

    def __init__(self, path, reads):
        super().__init__(io.FileIO(path))
        self.reads = reads

    def read(self, size=-1):
        if size == 8 and self.tell() == 0:
            self.reads[Path(self.raw.name).name] += 1
        return super().read(size)


@pytest.fixture
def reads(model, monkeypatch):
    """How often each file in the model's folder is read: JSON as text, a header, and pickles as objects."""
    import torch

    folder = model[0] if model[0].is_dir() else model[0].parent
    reads, real, load, loads = Counter(), io.open, torch.load, pickle.loads

    def opened(file, mode="r", *arguments, **options):
        path = Path(file) if isinstance(file, (str, Path)) else Path()
        if path.parent == folder and path.suffix == ".json" and mode == "r":  # "rb" is to hash it
            reads[path.name] += 1
        if path.parent == folder and path.suffix == ".safetensors" and mode == "rb":
            return HeaderReads(path, reads)
        return real(file, mode, *arguments, **options)

    def loaded(path, *arguments, **options):
        reads[path.name] += 1
        return load(path, *arguments, **options)

    def unpickled(content):
        reads["meta.pkl"] += 1
        return loads(content)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(torch, "load", loaded)
    monkeypatch.setattr(pickle, "loads", unpickled)
    return reads


def test_converting(gpt, model, reads, tmp_path):
    source, names = model
    code, out, err = gpt("convert", source, tmp_path / "new", "--to", "twingpt", "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] > 0 and reads == dict.fromkeys(names, 1)


def test_inspecting(gpt, model, reads):
    source, names = model
    code, out, err = gpt("convert", source, "--inspect", "--json")
    assert code == 0, err
    assert json.loads(out)["tokenizer"] and reads == dict.fromkeys(set(names) - {"generation_config.json"}, 1)


def test_loading(model, reads):
    source, names = model
    assert twingpt.load(source, "torch", "cpu").config.vocab_size in (65, 257)
    assert reads == dict.fromkeys(names, 1)


def test_a_file_that_changes_after_it_was_opened(model):
    """A trainer writes its checkpoint anew: what was read of the old one would find other bytes in the new one."""
    source, names = model
    opened = open_model(source)
    opened.model.dtypes()  # for which every format has read its headers
    if opened.format == "twingpt":
        pytest.skip("a checkpoint of ours is never written twice, and its manifest vouches for it")
    path = next(
        path for path in (source, source / names[-1], source / names[1]) if path.suffix in (".safetensors", ".pt")
    )
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"longer")
    with pytest.raises(UserError, match="was changed after it was opened: run the command again"):
        list(opened.model.parameters())
