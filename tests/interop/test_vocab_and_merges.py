"""Tokenizers in vocab.json and merges.txt: the ids that transformers finds, and damaged files in one sentence."""

import json
import random

import numpy as np
import pytest

from tests import foreign
from tests.conftest import dose, needs
from twingpt.core.checkpoint.schema import save_model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.tokenizers.vocab_and_merges import read_vocab_and_merges
from twingpt.weights import convert as conversion
from twingpt.weights import huggingface
from twingpt.weights.formats import describe, open_model

CLASSES = {"gpt2": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer", "qwen2": "Qwen2Tokenizer"}
STYLES = ("added_tokens_decoder", "added_tokens.json", "none", "bos")


def two_files(folder, name, style="added_tokens_decoder", **settings):
    """A folder as older transformers wrote it: vocab.json, merges.txt, and what is said of added tokens."""
    content = json.loads(getattr(foreign, name)().to_str())
    vocab, added = content["model"]["vocab"], content["added_tokens"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in content["model"]["merges"]), ""]
    settings = {"tokenizer_class": CLASSES[name], **settings}
    if style in ("added_tokens_decoder", "bos"):
        settings["added_tokens_decoder"] = {entry.pop("id"): entry for entry in added}
    if style == "bos":
        settings["add_bos_token"] = True
    files = {
        "vocab.json": json.dumps(vocab),
        "merges.txt": "\n".join(lines),
        "tokenizer_config.json": json.dumps(settings),
        "config.json": json.dumps({"model_type": name}),
    }
    if style == "added_tokens.json":
        files["added_tokens.json"] = json.dumps({entry["content"]: entry["id"] for entry in added})
    for file, text in files.items():
        (folder / file).write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CLASSES)
def test_the_ids_are_those_of_transformers(tmp_path, name, style):
    transformers = pytest.importorskip("transformers")
    settings = {"bos_token": "<|endoftext|>"} if style == "bos" else {}
    theirs = transformers.AutoTokenizer.from_pretrained(two_files(tmp_path, name, style, **settings))
    ours = read_vocab_and_merges(tmp_path)
    for text in [*foreign.TEXT, *foreign.fuzzed(100, 3), "a<|endoftext|>b    c<tool_call>d<|im_end|>"]:
        assert ours.encode(text, special=True).tolist() == theirs.encode(text, add_special_tokens=False), text
    assert list(ours.opening) == (theirs.encode("a")[:1] if style == "bos" else [])
    for role in ("bos", "eos", "pad", "unk"):
        assert ours.roles.get(role) == getattr(theirs, f"{role}_token_id")


def test_a_model_is_converted_with_it(tmp_path):
    (tmp_path / "in").mkdir()
    tokenizer = read_vocab_and_merges(two_files(tmp_path / "in", "gpt_neox"))
    config = GPTConfig(tokenizer.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8, n_inner=8)
    huggingface.write(tmp_path / "hf", config, initialise(config, 1))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_bytes((tmp_path / "in" / name).read_bytes())
    opened = open_model(tmp_path / "hf")
    assert describe(opened)["tokenizer"] == f"huggingface, {tokenizer.vocab_size} ids"
    conversion.convert(opened, tmp_path / "ours")
    again = open_model(tmp_path / "ours").model.tokenizer()
    assert again.digest == tokenizer.digest and np.array_equal(again.encode("a    b"), tokenizer.encode("a    b"))


def test_it_is_given_to_a_model_without_one(gpt, tmp_path):
    config = GPTConfig(600, block_size=8, n_layer=1, n_head=1, n_embd=8, n_inner=8)
    save_model(tmp_path / "bare", config, None, initialise(config, 1))
    (tmp_path / "in").mkdir()
    code, out, err = gpt("convert", tmp_path / "bare", tmp_path / "hf", "--to", "hf", "--json",
                         "--tokenizer", two_files(tmp_path / "in", "qwen2"))  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["tokenizer"].startswith("huggingface, ") and (tmp_path / "hf/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "BartTokenizer"}',
            "tokenizer_class 'BartTokenizer' is not known",
        ),
        ("vocab.json", "[]", "its model has no vocabulary"),
        ("vocab.json", '{"a": -1}', "-1 is no token id"),
        ("merges.txt", "#version: 0.2\na b\nabc\n", "Line 3 of .*merges.txt is not a pair of tokens: 'abc'"),
        ("merges.txt", "qqq www\n", "merges.txt are not a tokenizer that can be read: Token `qqq` out of vocabulary"),
        ("added_tokens.json", '{"<x>": 12}', "leaves no room for the added token '<x>' at 12"),
        ("added_tokens.json", '{"<x>": "y"}', "The added tokens in .* are not tokens and their ids"),
    ],
)
def test_what_is_refused(tmp_path, file, text, message):
    two_files(tmp_path, "gpt2", "none")
    (tmp_path / file).write_text(text, "utf-8")
    if file == "tokenizer_config.json":
        (tmp_path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    with pytest.raises(UserError, match=message):
        read_vocab_and_merges(tmp_path)


@pytest.mark.parametrize("count", dose(30, 2000))
def test_damaged_files_are_refused_or_read(tmp_path, count):
    chance = random.Random(1)
    two_files(tmp_path, "gpt_neox")
    whole = {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    for _ in range(count):
        name = chance.choice(list(whole))
        content = bytearray(whole[name])
        for _ in range(chance.choice([1, 5])):
            at = chance.randrange(len(content))
            put = chance.choice([b"", b"\xff", b'"', b"9", b"{}", b"null", b"\n"])
            content[at : at + chance.choice([0, 1, 100])] = put
        (tmp_path / name).write_bytes(content)
        try:
            read_vocab_and_merges(tmp_path).encode("a text")
        except UserError as error:
            assert str(error).endswith(".")
        (tmp_path / name).write_bytes(whole[name])


@needs("torch")
def test_every_command_finds_it(gpt, prose, tmp_path):
    (tmp_path / "in").mkdir()
    folder = two_files(tmp_path / "in", "gpt2")
    small = ("--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--block-size", 8, "--batch-size", 2, "--max-iters", 1)
    for command in [
        ("tokenize", "show", "the text", "--tokenizer", folder),
        ("data", "prepare", prose, "--tokenizer", folder, "--name", "two-files"),
        ("train", "--data", prose, "--tokenizer", folder, "--out", tmp_path / "run", *small),
    ]:
        code, _, err = gpt(*command)
        assert code == 0, err
    kept = open_model(tmp_path / "run").model.tokenizer()
    assert kept.digest == read_vocab_and_merges(folder).digest
