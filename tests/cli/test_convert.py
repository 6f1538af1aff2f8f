"""gpt convert: any format that is read to any that is written, and back to the same bits."""

import dataclasses
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import links, needs, open_checkpoint, write_prose
from twingpt.backends import registry
from twingpt.core import reference
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.checkpoint.quantize import Quantization
from twingpt.core.checkpoint.safetensors_file import finite
from twingpt.core.checkpoint.schema import save_model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.locks import lock_file
from twingpt.core.parameters import initialise, parameter_table
from twingpt.core.paths import new_folder
from twingpt.core.presets import SHAPES
from twingpt.core.tokenizer import ByteTokenizer, CharTokenizer
from twingpt.data.tokenizers import find
from twingpt.evaluation.held_out import HeldOut
from twingpt.weights import huggingface, torch_state
from twingpt.weights.dtypes import round_to
from twingpt.weights.formats import HUB_FILES, open_model
from twingpt.weights.generation import end_ids
from twingpt.weights.quantize import apply

SMALL = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64, "init_std": 0.1}


@pytest.fixture
def source(tmp_path):
    def make(**switches):
        config = GPTConfig.from_dict({**SMALL, **switches})
        save_model(tmp_path / "source", config, ByteTokenizer(), initialise(config, 1))
        return tmp_path / "source"

    return make


def converted(gpt, *arguments):
    code, out, err = gpt("convert", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(gpt, *arguments) -> str:
    code, _, err = gpt("convert", *arguments)
    assert code == 2 and err.count("\n") == 1, err
    return err


def same(a, b) -> bool:
    a, b = dict(a.parameters()), dict(b.parameters())
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


THERE = [("hf", {"n_kv_head": 2}), ("hf", SHAPES["gpt2"]), ("hf", {"qk_norm": False, "tie_embeddings": False})]
THERE += [("mlx", {"n_kv_head": 2}), ("twingpt", {"mlp": "relu2", "smear": True})]
THERE += [pytest.param("torch", {"mlp": "relu2"}, marks=needs("torch"))]


@pytest.mark.parametrize(("to", "switches"), THERE)
def test_there_and_back_is_bit_identical(gpt, source, tmp_path, to, switches):
    folder = source(**switches)
    result = converted(gpt, folder, tmp_path / "there", "--to", to)
    assert result["source_format"] == "twingpt" and result["target_format"] == to and result["unquantized"] == {}
    assert result["parameters"] == sum(row.size for row in parameter_table(open_checkpoint(folder).config).values())
    assert result["bytes"] > 4 * result["parameters"]
    back = converted(gpt, tmp_path / "there", tmp_path / "back", "--to", "twingpt")
    assert back["source_format"] == {"hf": "huggingface", "mlx": "huggingface"}.get(to, to)
    first, last = open_checkpoint(folder), open_checkpoint(tmp_path / "back")
    assert dataclasses.replace(last.config, init_std=0.1) == first.config and same(first, last)
    assert last.tokenizer().kind == "byte" and last.tokenizer().digest == first.tokenizer().digest


def test_a_model_of_ours_becomes_a_hugging_face_directory_unless_told_otherwise(gpt, source, tmp_path):
    assert converted(gpt, source(), tmp_path / "hf")["target_format"] == "hf"
    assert converted(gpt, tmp_path / "hf", tmp_path / "ours")["target_format"] == "twingpt"


def test_a_gguf_file_is_known_by_its_name(gpt, source, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    converted(gpt, source(), tmp_path / "hf")
    assert converted(gpt, tmp_path / "hf", tmp_path / "x.gguf")["target_format"] == "gguf"
    assert (tmp_path / "x.gguf").read_bytes()[:4] == b"GGUF"
    assert "--q-bits is for --to" in refused(gpt, tmp_path / "hf", tmp_path / "y.gguf", "--q-bits", 4)


DTYPES = [(to, dtype) for to in ("hf", "mlx", "torch") for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize(
    ("to", "dtype"), [pytest.param(*pair, marks=needs("torch")) if "torch" in pair else pair for pair in DTYPES]
)
def test_a_dtype_rounds_every_parameter(gpt, source, tmp_path, to, dtype):
    torch = pytest.importorskip("torch")
    folder = source()
    result = converted(gpt, folder, tmp_path / "there", "--to", to, "--dtype", dtype)
    assert result["dtype"] == dtype and 2 * result["parameters"] < result["bytes"] < 4 * result["parameters"]
    found = open_model(tmp_path / "there").model
    assert json.loads((tmp_path / "there/config.json").read_text("utf-8"))["dtype"] == dtype
    assert set(found.dtypes()) == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    for (name, array), (_, first) in zip(found.parameters(), open_checkpoint(folder).parameters(), strict=True):
        wanted = torch.from_numpy(first).to(getattr(torch, dtype)).to(torch.float32).numpy()
        assert np.array_equal(array, wanted), name


def test_a_gguf_file_has_its_matrices_in_the_dtype(gpt, source, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    converted(gpt, source(), tmp_path / "x.gguf", "--dtype", "bfloat16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "BF16"
    assert kinds["output_norm.weight"] == "F32"  # as llama.cpp wants it


def test_a_dtype_makes_a_quantized_model_whole(gpt, source, tmp_path):
    converted(gpt, source(n_embd=64), tmp_path / "4bit", "--to", "twingpt", "--q-bits", 4)
    assert converted(gpt, tmp_path / "4bit", tmp_path / "mlx", "--to", "mlx")["quantization"] is not None
    result = converted(gpt, tmp_path / "4bit", tmp_path / "whole", "--to", "twingpt", "--dtype", "float32")
    assert result["quantization"] is None
    assert same(open_model(tmp_path / "4bit").model, open_checkpoint(tmp_path / "whole"))


def test_numbers_that_a_dtype_has_not():
    third = np.array([1 / 3, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 2.0**-140], np.float32)  # two are exactly between
    assert round_to("bfloat16", third, "x").tolist() == [0x3EAB, 0x8000, 0x3F80, 0x3F82, 0x0000]
    for dtype, number in (("float16", 65520.0), ("bfloat16", float(np.finfo(np.float32).max))):
        with pytest.raises(UserError, match=f"The tensor a.weight has numbers up to .*, more than {dtype} holds"):
            round_to(dtype, np.array([-number, 1], np.float32), "a.weight")


@pytest.mark.parametrize("to", ["twingpt", "mlx"])
def test_quantized_directories_are_read_back_to_the_bit(gpt, source, tmp_path, to):
    folder = source(n_kv_head=2, n_inner=200)
    result = converted(gpt, folder, tmp_path / "q", "--to", to, "--q-bits", 4, "--q-group-size", 32)
    assert result["bytes"] < 4 * result["parameters"] / 2
    assert set(result["unquantized"]) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert "width 200 is not a multiple of 32" in next(iter(result["unquantized"].values()))
    _, out, _ = gpt("convert", folder, tmp_path / "q", "--force", "--to", to, "--q-bits", 4, "--q-group-size", 32)
    why = "Not quantized, as its width 200 is not a multiple of 32: model.layers.*.mlp.down_proj.weight\n"
    assert "parameters in 4 bits, " in out and why in out
    config = open_checkpoint(folder).config
    wanted = dict(apply(Quantization(4, 32), initialise(config, 1), config))
    opened = open_model(tmp_path / "q")
    assert opened.format == {"twingpt": "twingpt", "mlx": "mlx-lm"}[to]
    assert opened.model.quantization == Quantization(4, 32)
    stored = dict(opened.model.stored())
    assert stored.keys() == wanted.keys() and all(np.array_equal(stored[name], wanted[name]) for name in wanted)
    again = converted(gpt, tmp_path / "q", tmp_path / "again", "--to", "twingpt")  # the very words, not new ones
    kept = dict(open_checkpoint(tmp_path / "again").stored())
    assert all(np.array_equal(kept[name], wanted[name]) for name in wanted) and again["unquantized"]


NEOX = {
    "norm": "layernorm", "norm_bias": True, "mlp": "gelu_tanh", "mlp_bias": True, "qk_norm": False, "qkv_bias": True,
    "attn_out_bias": True, "parallel_residual": True, "tie_embeddings": False, "rope_fraction": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("shape", [{"n_kv_head": 2, "n_inner": 200}, NEOX])
def test_a_quantized_model_stays_as_it_is(gpt, source, tmp_path, shape):
    """Without --q-bits, or with its own, the words pass as they are; also where a family makes one tensor of three."""
    wanted = converted(gpt, source(**shape), tmp_path / "q", "--q-bits", 4, "--q-group-size", 32)
    assert wanted["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    first = open_checkpoint(tmp_path / "q")
    for name, options in ("again", []), ("mlx", ["--to", "mlx"]), ("same", ["--q-bits", 4, "--q-group-size", 32]):
        result = converted(gpt, tmp_path / "q", tmp_path / name, "--to", "twingpt", *options)
        assert result["quantization"] == wanted["quantization"]
        assert len(result["unquantized"]) == len(wanted["unquantized"])
        assert result["bytes"] < 2 * result["parameters"]
        assert same(open_model(tmp_path / name).model, first)  # as dequantized
    stored = dict(first.stored())
    for name in ("again", "same"):
        kept = dict(open_checkpoint(tmp_path / name).stored())
        assert all(np.array_equal(kept[tensor], stored[tensor]) for tensor in stored)
    assert converted(gpt, tmp_path / "q", tmp_path / "8", "--to", "twingpt", "--q-bits", 8)["quantization"]["bits"] == 8
    assert converted(gpt, tmp_path / "q", tmp_path / "hf", "--to", "hf")["quantization"] is None


@needs("torch")
def test_what_quantization_costs_is_measured(gpt, source, tmp_path):
    data = write_prose(tmp_path)
    options = ("--q-bits", 4, "--data", data, "--backend", "torch")
    result = converted(gpt, source(), tmp_path / "q", *options)
    assert result["val_loss"] > 1 and 0 < abs(result["val_loss"] - result["val_loss_quantized"]) < 0.2
    code, out, _ = gpt("convert", tmp_path / "source", tmp_path / "q", "--force", *options)
    assert code == 0 and "Held-out loss: " in out
    assert "give --q-bits too" in refused(gpt, tmp_path / "source", tmp_path / "r", "--data", data)
    options = ("--q-bits", 4, "--data", tmp_path / "nowhere.txt", "--backend", "torch")
    assert "nowhere.txt" in refused(gpt, tmp_path / "source", tmp_path / "r", *options)
    assert not (tmp_path / "r").exists()  # it is asked for before the work


@needs("torch")
def test_a_context_of_a_million_tokens_is_measured_in_windows(gpt, source, tmp_path):
    source(block_size=2**20)
    model, text = open_model(tmp_path / "source").model, write_prose(tmp_path)
    held_out = HeldOut.of(model, str(text), "torch", "cpu")
    tracemalloc.start()
    try:
        assert held_out.loss(model) > 1
        assert tracemalloc.get_traced_memory()[1] < 30e6  # of its tables alone would be 400
    finally:
        tracemalloc.stop()


@needs("mlx")
def test_mlx_lm_reads_and_writes_what_we_do(gpt, source, tmp_path):
    registry.get("mlx")  # opens a fast BLAS before mlx_lm imports mlx

    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    folder = source(n_kv_head=2)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 20))
    converted(gpt, folder, tmp_path / "q", "--to", "mlx", "--q-bits", 4)
    model, _ = mlx_lm.load(str(tmp_path / "q"))
    opened = open_model(tmp_path / "q").model
    expected = reference.forward(dict(opened.parameters()), tokens, opened.config)
    assert np.abs(np.array(model(mx.array(tokens))) - expected).max() <= 1e-4 * np.abs(expected).max()

    converted(gpt, folder, tmp_path / "hf", "--to", "hf")
    mlx_lm.convert(str(tmp_path / "hf"), str(tmp_path / "theirs"), quantize=True, q_bits=8, q_group_size=32)
    found = open_model(tmp_path / "theirs")
    assert found.format == "mlx-lm" and found.model.quantization == Quantization(8, 32)
    model, _ = mlx_lm.load(str(tmp_path / "theirs"))
    expected = reference.forward(dict(found.model.parameters()), tokens, found.model.config)
    assert np.abs(np.array(model(mx.array(tokens))) - expected).max() <= 1e-4 * np.abs(expected).max()


@needs("mlx")
def test_mlx_lm_directories_keep_gpt2_as_its_models_have_it(gpt, source, tmp_path):
    registry.get("mlx")

    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    folder = source(**SHAPES["gpt2"])
    converted(gpt, folder, tmp_path / "hf", "--to", "hf")
    mlx_lm.convert(str(tmp_path / "hf"), str(tmp_path / "theirs"))
    found = open_model(tmp_path / "theirs")
    assert found.format == "mlx-lm" and same(found.model, open_checkpoint(folder))
    assert "mlx-lm transposes" in refused(gpt, folder, tmp_path / "q", "--to", "mlx", "--q-bits", 4)
    assert not (tmp_path / "q").exists()


def test_inspect(gpt, source):
    folder = source(n_kv_head=2)
    described = converted(gpt, folder, "--inspect")
    assert described["source_format"] == "twingpt" and described["family"] == "qwen3"
    assert described["dtypes"] == {"F32": len(described["tensors"])} and described["tokenizer"] == "byte, 257 ids"
    assert described["tensors"]["model.embed_tokens.weight"] == [257, 64]
    code, out, _ = gpt("convert", folder, "--inspect")
    assert code == 0 and "2 layers, 4 heads (2 for keys and values) of 16" in out and "257 × 64" in out
    assert "… and so for layer 1\n" in out


def test_the_card_says_what_the_model_is(gpt, source, tmp_path):
    converted(gpt, source(), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "2 layers, 64 wide" in card
    converted(gpt, tmp_path / "source", tmp_path / "q", "--q-bits", 8)
    assert "8 bits in groups of 64" in (tmp_path / "q" / "README.md").read_text("utf-8")
    open_checkpoint(tmp_path / "q")  # the card is in its manifest


EXAMPLES = [("hf", True), ("twingpt", True), ("torch", True), ("mlx", True), ("hf", False), ("twingpt", False)]


@needs("torch")
@pytest.mark.parametrize(("to", "tokenizer"), EXAMPLES)
def test_the_cards_example_runs_and_its_title_is_the_runs_name(gpt, tmp_path, monkeypatch, capsys, to, tokenizer):
    pytest.importorskip({"hf": "transformers", "mlx": "mlx_lm"}.get(to, "twingpt"))
    config = GPTConfig.from_dict({**SMALL, "n_kv_head": 2, "vocab_size": 15})
    folder = tmp_path / "novel" / "checkpoints" / "step-00000003"
    text = CharTokenizer("abc, defghijkl") if tokenizer else None
    save_model(folder, config, text, initialise(config, 1))
    converted(gpt, folder, tmp_path / "out", "--to", to)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "\n# novel\n" in card
    monkeypatch.chdir(tmp_path / "out")
    exec(card.partition("```python\n")[2].partition("```")[0], {})
    assert capsys.readouterr().out.strip()


def test_generation_settings_go_along(gpt, source, tmp_path):
    converted(gpt, source(), tmp_path / "hf")
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 256}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(settings))
    converted(gpt, tmp_path / "hf", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text("utf-8")) == settings


@pytest.mark.parametrize("to", ["hf", "mlx", "twingpt", pytest.param("torch", marks=needs("torch"))])
def test_the_ends_of_a_chat_model_go_along(gpt, source, tmp_path, to):
    """Those of generation_config.json, and of config.json where that is all there is."""
    converted(gpt, source(), tmp_path / "hf")
    there, content = (
        tmp_path / "hf" / "generation_config.json",
        json.loads((tmp_path / "hf/config.json").read_text("utf-8")),
    )
    there.write_text(json.dumps({"temperature": 0.6, "eos_token_id": [7, 8], "bos_token_id": 3}))
    converted(gpt, tmp_path / "hf", tmp_path / "a", "--to", to)
    there.unlink()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content | {"eos_token_id": [5, 6], "bos_token_id": None}))
    converted(gpt, tmp_path / "hf", tmp_path / "b", "--to", to)
    for name, ids in ("a", (3, [7, 8])), ("b", (None, [5, 6])):
        for file in ("generation_config.json", *(["config.json"] if to in ("hf", "mlx") else [])):
            written = json.loads((tmp_path / name / file).read_text("utf-8"))
            assert (written["bos_token_id"], written["eos_token_id"]) == ids
        assert end_ids(open_model(tmp_path / name).model) == ids[1]
        assert (tmp_path / name / "README.md").is_file()


def test_settings_for_generation_that_are_none(gpt, source, tmp_path):
    converted(gpt, source(), tmp_path / "hf")
    for text, message in ("{", "can't be read as JSON"), ("[]", "is not a JSON object"):
        (tmp_path / "hf" / "generation_config.json").write_text(text)
        assert message in refused(gpt, tmp_path / "hf", tmp_path / "new")


def test_nothing_is_overwritten_without_being_told(gpt, source, tmp_path):
    folder = source()
    converted(gpt, folder, tmp_path / "hf")
    assert "replace it with --force" in refused(gpt, folder, tmp_path / "hf")
    converted(gpt, folder, tmp_path / "hf", "--force")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for force in ([], ["--force"]):
        assert "exists and is no model" in refused(gpt, folder, tmp_path / "mine", *force)
        assert "holds the model that is to be converted" in refused(gpt, folder, folder, *force)
        assert "holds the model that is to be converted" in refused(gpt, folder, tmp_path, *force)
    (tmp_path / "mine" / "config.json").write_text("{}")  # as any project may have
    assert "exists and is no model" in refused(gpt, folder, tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "thesis.txt").read_text("utf-8") == "years"
    assert "is within the checkpoint that is to be converted" in refused(gpt, folder, folder / "hf")
    open_checkpoint(folder)


@links
def test_the_model_behind_a_link_is_replaced(gpt, source, tmp_path):
    folder = source()
    converted(gpt, folder, tmp_path / "disk")
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "nowhere").symlink_to("gone")
    assert "replace it with --force" in refused(gpt, folder, tmp_path / "link")
    converted(gpt, folder, tmp_path / "link", "--force", "--to", "twingpt")
    assert (tmp_path / "link").is_symlink() and open_model(tmp_path / "disk").format == "twingpt"
    assert "exists and is no model" in refused(gpt, folder, tmp_path / "nowhere", "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "nowhere", "source"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("novel.gguf", "is not a GGUF file: it does not begin as one"),
        ("model.safetensors", "give the folder that has it and its config.json"),
        ("notes.txt", "is no model that is known"),
        ("notes", "it has no config.json, and isn't a run"),
    ],
)
def test_what_is_no_model(gpt, tmp_path, name, message):
    (tmp_path / name).write_text("x") if "." in name else (tmp_path / name).mkdir()
    error = refused(gpt, tmp_path / name, tmp_path / "new")
    assert message in error and str(tmp_path / name) in error


INSTEAD = {
    "adapters": (
        {"adapters.safetensors": "", "adapter_config.json": "{}"},
        "adapters to another model",
    ),
    "peft's adapters": ({"adapter_model.safetensors": ""}, "merge them into that one"),
    "GGUF": ({"novel-Q4_K_M.gguf": ""}, "novel-Q4_K_M.gguf is GGUF; give that file itself"),
    "a pickle": ({"pytorch_model.bin": ""}, "pytorch_model.bin is a pickle, which could run code"),
    "Meta's": ({"consolidated.00.pth": ""}, "fetch the files that transformers reads"),
    "another name": ({"weights.safetensors": ""}, "weights.safetensors has not the name that transformers reads"),
    "the hub's cache": ({"snapshots/abc/config.json": "{}"}, "of the hub's cache; give the folder of snapshots"),
    "a folder above": ({"final/config.json": "{}"}, "a model is inside; give the folder of final"),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_is_there_instead_of_a_model(gpt, source, tmp_path, name):
    """In a folder alone, and beside a model's config.json."""
    files, message = INSTEAD[name]
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).write_text(files[file])
    assert message in refused(gpt, tmp_path / "x", "--inspect")
    converted(gpt, source(), tmp_path / "hf", "--to", "hf")
    (tmp_path / "hf" / "config.json").rename(tmp_path / "x" / "config.json")
    assert message in refused(gpt, tmp_path / "x", "--inspect")


def test_inspect_looks_at_the_files(gpt, source, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    converted(gpt, source(**SHAPES["gpt2"]), tmp_path / "hf", "--to", "hf")
    described = converted(gpt, tmp_path / "hf", "--inspect")
    assert described["tensors"]["h.0.attn.c_attn.weight"] == [64, 192]  # as the file has it
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    assert converted(gpt, tmp_path / "hf", "--inspect") == described  # as mlx-lm reads shards
    shard = max((tmp_path / "hf").glob("model-*.safetensors"))
    shard.unlink()
    assert f"{shard.name} is missing" in refused(gpt, tmp_path / "hf", "--inspect")


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("to", ["twingpt", "hf"])
def test_a_tokenizer_that_is_given_goes_before_one_that_cannot_be_read(gpt, tmp_path, file, to):
    config = GPTConfig.from_dict(SMALL)
    huggingface.write(tmp_path / "hf", config, initialise(config, 1), {"eos_token_id": None})
    for name in {file, "merges.txt"}:
        (tmp_path / "hf" / name).write_text("[broken")
    assert file in refused(gpt, tmp_path / "hf", tmp_path / "a", "--to", to)
    assert converted(gpt, tmp_path / "hf", tmp_path / "a", "--to", to, "--tokenizer", "byte")["tokenizer"].startswith(
        "byte"
    )
    content = json.loads((tmp_path / "a" / "config.json").read_text("utf-8"))
    assert content["eos_token_id"] == 256 and open_model(tmp_path / "a").model.tokenizer().kind == "byte"
    assert "a tokenizer of its own: leave out --tokenizer" in refused(
        gpt, tmp_path / "a", tmp_path / "b", "--tokenizer", "byte"
    )


NO_OBJECTS = {"a list": b"[]", "null": b"null", "empty": b"", "broken": b"{", "UTF-16": "{}".encode("utf-16")}


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_a_tokenizer_is_whole_beside_a_config_that_is_none(gpt, source, tmp_path, content):
    folder = source()
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_bytes(content)
    assert find(str(folder)).kind == find(str(folder / "tokenizer.json")).kind == "byte"
    assert f"{folder / 'config.json'} " in refused(gpt, folder, "--inspect")


def test_a_model_gets_its_tokenizer(gpt, tmp_path):
    config = GPTConfig.from_dict(SMALL)
    save_model(tmp_path / "bare", config, None, initialise(config, 1))
    code, _, err = gpt("convert", tmp_path / "bare", tmp_path / "a", "--to", "twingpt")
    assert code == 0 and "has no tokenizer: the result takes no text; give it one by --tokenizer" in err
    assert "This model has no tokenizer, so it takes ids and no text" in gpt("generate", tmp_path / "a")[2]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}}))
    for name, kind in ("byte", "byte"), ("b", "byte"), ("b/tokenizer.json", "byte"), ("meta.pkl", "char"):
        place = name if name == "byte" else tmp_path / name
        to = [tmp_path / "b", "--to", "twingpt", "--force"]
        described = converted(gpt, tmp_path / "bare", *to, "--tokenizer", place)
        assert described["tokenizer"].startswith(kind), name
        assert open_model(tmp_path / "b").model.tokenizer().kind == kind
    content = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    assert content["eos_token_id"] == 2  # of the characters' end of text
    assert "There is no tokenizer nowhere.json" in refused(gpt, tmp_path / "bare", "c", "--tokenizer", "nowhere.json")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(map(chr, range(300))))}))
    error = refused(gpt, tmp_path / "bare", tmp_path / "c", "--tokenizer", tmp_path / "meta.pkl")
    assert "The tokenizer has 301 ids and the model knows only 257" in error


@needs("torch")
@pytest.mark.parametrize("write", [save_model, torch_state.write, huggingface.write])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(gpt, tmp_path, write, bad):
    config = GPTConfig.from_dict(SMALL)
    tensors = dict(initialise(config, 1))
    tensors["model.norm.weight"][3] = bad
    if write is save_model:
        write(tmp_path / "x", config, ByteTokenizer(), tensors.items())
    else:
        write(tmp_path / "x", config, tensors.items())
    arguments = {"convert": [tmp_path / "y"], "parity": []}
    if write is save_model:
        arguments["generate"] = ["-p", "a"]
    for command, more in arguments.items():
        code, _, err = gpt(command, tmp_path / "x", *more)
        assert code == 2 and "The tensor model.norm.weight in" in err and "not finite" in err, err


def test_numbers_whose_sum_is_too_large_are_finite():
    array = np.full(4, 3e38, np.float32)
    assert finite(array, "x", Path("x")) is array


def test_a_file_of_a_model(gpt, source, tmp_path):
    error = refused(gpt, source() / "model.safetensors", tmp_path / "new")
    assert "is a part of a model: give the folder that it is in" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Where should the result go?"),
        (["new", "--to", "onnx"], "Unknown format 'onnx'"),
        (["new", "--to", "hf", "--q-bits", 4], "--q-bits is for --to twingpt or mlx"),
        (["new", "--q-bits", 7], "bits 7 is not known: choose 2, 3, 4, 5, 6 or 8"),
        (["new", "--q-bits", 4, "--q-group-size", 48], "group_size 48 is not known: choose 32, 64 or 128"),
        (["new", "--to", "twingpt", "--dtype", "bfloat16"], "is in float32, from which training goes on: --dtype"),
        (["new", "--dtype", "int8"], "Unknown dtype 'int8': "),
        (["new", "--to", "mlx", "--dtype", "float16", "--q-bits", 4], "--dtype is for matrices that aren't quantized"),
        (["new", "--q-bits", 4, "--q-group-size", 128], "no width is a multiple of --q-group-size 128"),
    ],
)
def test_mistakes(gpt, source, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(gpt, source(), *arguments)
    assert not (tmp_path / "new").exists()


def test_a_model_that_no_family_computes(gpt, source, tmp_path):
    folder = source(smear=True)
    for to in ("hf", "mlx"):
        assert "No transformers family computes this model" in refused(gpt, folder, tmp_path / "new", "--to", to)
    assert not (tmp_path / "new").exists()


def test_the_hub_is_not_reached_without_a_network(gpt, tmp_path):
    pytest.importorskip("huggingface_hub")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    message = refused(gpt, "someone/some-model", tmp_path / "new")
    assert "There is no folder someone/some-model, and the Hugging Face hub did not give it" in message


def test_what_is_fetched_of_a_repository():
    """No second copy of the weights in another layout, and nothing of other frameworks."""
    utils = pytest.importorskip("huggingface_hub.utils")
    wanted = [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
        "added_tokens.json", "chat_template.jinja", "model_000650.pt", "meta_000650.json",
    ]  # fmt: skip
    others = ["consolidated.safetensors", "onnx/model.onnx", "onnx/config.json", "original/model.safetensors"]
    others += ["pytorch_model.bin", "model.gguf", "README.md", "adapter_model.safetensors"]
    assert list(utils.filter_repo_objects([*wanted, *others], allow_patterns=HUB_FILES)) == wanted


def test_a_disk_that_is_full_leaves_nothing(gpt, source, tmp_path, monkeypatch):
    folder = source()

    def write(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", write)
    for to in ("hf", "twingpt"):
        assert "No space left on device" in refused(gpt, folder, tmp_path / "new", "--to", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@needs("torch")
def test_a_state_dict_that_torch_cannot_finish(gpt, source, tmp_path, monkeypatch):
    import torch

    def save(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    assert "is the disk full?" in refused(gpt, source(), tmp_path / "new", "--to", "torch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_a_killed_conversion_left_is_removed(gpt, source, tmp_path):
    folder = source()
    for name in (".new.abc.tmp", ".other.abc.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    with new_folder(tmp_path / "new") as alive:  # another process's, which goes on
        (alive / "config.json").write_text("{}")
        converted(gpt, folder, tmp_path / "new")
        kept = {"new", "source", ".other.abc.tmp", alive.name, lock_file(alive).name}
        assert {path.name for path in tmp_path.iterdir()} == kept
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "backend", [pytest.param("torch", marks=needs("torch")), pytest.param("mlx", marks=needs("mlx"))]
)
def test_others_models_and_quantized_ones_generate(gpt, source, tmp_path, backend):
    folder = source(n_kv_head=2)
    converted(gpt, folder, tmp_path / "hf")
    converted(gpt, folder, tmp_path / "q", "--q-bits", 8)
    texts = []
    for model in (folder, tmp_path / "hf", tmp_path / "q"):
        code, out, err = gpt("generate", model, "-p", "a", "-m", 12, "--temp", 0, "--backend", backend, "--json")
        assert code == 0, err
        texts.append(json.loads(out)["tokens"])
    assert texts[0] == texts[1] and len(texts[2]) == len(texts[0])
