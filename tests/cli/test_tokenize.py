"""gpt tokenize: learn, show, compare; and gpt train with a tokenizer that is there already."""

import json
import os

import pytest

from tests.conftest import needs, open_checkpoint
from tests.foreign import BYTE_LEVEL, OTHERS
from twingpt.core.tokenizer import CHAT, END_OF_TEXT, PATTERNS, ByteTokenizer
from twingpt.data.tokenizers import find

SMALL = ["--n-layer", 1, "--n-head", 2, "--n-kv-head", 1, "--n-embd", 16, "--block-size", 16, "--batch-size", 2,
         "--max-iters", 2, "--eval-iters", 1, "--sample-interval", 0, "--device", "cpu"]  # fmt: skip


def result(gpt, *arguments):
    code, out, err = gpt("tokenize", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def mistake(gpt, *arguments):
    code, out, err = gpt(*arguments)
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("gpt: "), err
    return err


@pytest.fixture
def learned(gpt, prose, tmp_path):
    folder = tmp_path / "bpe"
    return folder, result(gpt, "train", prose, "--vocab-size", 300, "--pattern", "qwen2", "--chat", "--out", folder)


def test_train(learned, prose):
    folder, said = learned
    tokenizer = find(str(folder))
    assert tokenizer.pattern == PATTERNS["qwen2"] and list(tokenizer.specials) == [END_OF_TEXT, *CHAT]
    size = prose.stat().st_size
    assert said["vocab_size"] == tokenizer.vocab_size == 300 and said["bytes"] == size and said["documents"] == 1
    assert said["path"] == str(folder) and said["pattern"] == "qwen2" and said["seconds"] > 0


def test_train_says_when_the_text_has_no_more(gpt, prose, tmp_path):
    code, out, _ = gpt("tokenize", "train", prose, prose, "--vocab-size", 9000, "--out", tmp_path / "bpe")
    assert code == 0 and "no more pairs to join" in out and "309 ids from 16 kB in " in out


def test_a_text_that_is_empty(gpt, tmp_path):
    empty, out = tmp_path / "empty.txt", tmp_path / "out"
    empty.write_text("")
    assert f"{empty} is empty" in mistake(gpt, "tokenize", "compare", empty, "-t", "byte")
    assert f"{empty} is empty" in mistake(gpt, "tokenize", "train", empty, "-o", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", 257, "--chat"], "need 259"),
        (["--vocab-size", 2_000_000], "too large"),
        (["--pattern", "llama"], "Unknown pattern 'llama': did you mean 'llama3'"),
        (["--out", "."], "exists already"),
        (["--out", "/proc/none/bpe"], "can't be written to /proc/none/bpe"),
    ],
)
def test_train_refuses(gpt, prose, tmp_path, arguments, message):
    assert message in mistake(gpt, "tokenize", "train", prose, "--out", tmp_path / "bpe", *arguments)


def test_show(gpt, learned):
    folder, _ = learned
    rows = result(gpt, "show", "the cat\né<|im_end|>", "--tokenizer", folder)["tokens"]
    assert bytes.fromhex("".join(row["bytes"] for row in rows)) == "the cat\né<|im_end|>".encode()
    assert not any(row["special"] for row in rows)
    *_, last = result(gpt, "show", "the cat\né<|im_end|>", "-t", folder, "--special")["tokens"]
    assert last == {"id": 299, "text": "<|im_end|>", "bytes": "", "special": True}
    code, out, _ = gpt("tokenize", "show", "[bold]a\x1b[0m\n東", "-t", "byte")
    assert code == 0 and "\\x1b" in out and "\x1b" not in out and "\\xe6" in out and "e6" in out


def test_show_colours_each_token(learned):
    from io import StringIO

    from rich.console import Console

    from twingpt.commands.show_tokens import print_tokens
    from twingpt.data.tokenizers import describe_tokens

    console = Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=80)
    print_tokens(console, describe_tokens(find(str(learned[0])), "the cat\n<|im_end|>", special=True))
    text = console.file.getvalue()
    assert "\x1b[37;44m" in text and "\\n" in text and "tokens" in text


def test_show_reads_stdin(gpt, stdin):
    stdin("né".encode())
    assert [row["id"] for row in result(gpt, "show", "-", "-t", "byte")["tokens"]] == [110, 195, 169]
    stdin(b"a\xff")
    assert "The text on stdin is not UTF-8 text: byte 1" in mistake(gpt, "tokenize", "show", "-", "-t", "byte")


def test_compare(gpt, learned, prose):
    compared = result(gpt, "compare", prose, "-t", "byte", "-t", learned[0], "-t", "char")
    size = prose.stat().st_size
    assert compared["bytes"] == size and [row["tokenizer"] for row in compared["rows"]] == [
        "byte",
        str(learned[0]),
        "char",
    ]
    byte, bpe, char = compared["rows"]
    assert byte["tokens"] == char["tokens"] == size and byte["bytes_per_token"] == 1 and byte["vocab_size"] == 257
    assert bpe["bytes_per_token"] == pytest.approx(size / bpe["tokens"]) and bpe["tokens"] < size / 2
    code, out, _ = gpt("tokenize", "compare", prose, "-t", learned[0], "-t", "byte")
    assert code == 0 and "bytes per token" in out and f"{size:,}" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bpe", "is learned from a text"),
        ("gtp2", "did you mean 'gpt2'"),
        ("none/tokenizer.json", "There is no tokenizer none/tokenizer.json"),
        ("latest@3", "There is no tokenizer latest@3"),
        (".", "has no tokenizer.json: transformers writes one"),
    ],
)
def test_a_tokenizer_that_is_not_there(gpt, prose, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(gpt, "tokenize", "show", "a", "-t", name)
    assert message in mistake(gpt, "tokenize", "compare", prose, "-t", name)


@pytest.mark.parametrize("kind", ["cl100k_base", "o200k_base"])
def test_a_vocabulary_that_can_not_be_fetched(gpt, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    message = mistake(gpt, "tokenize", "show", "a", "-t", kind)
    assert f"tiktoken could not fetch its {kind} vocabulary" in message and "TIKTOKEN_CACHE_DIR" in message


def test_the_tokenizer_of_a_checkpoint(gpt, saved):
    rows = result(gpt, "show", "é", "--tokenizer", saved)["tokens"]
    assert [row["id"] for row in rows] == ByteTokenizer().encode("é").tolist()


@needs("torch")
@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_train_with_a_foreign_tokenizer(gpt, prose, tmp_path, name):
    theirs = {**BYTE_LEVEL, **OTHERS}[name]()
    theirs.save(str(tmp_path / "tokenizer.json"))
    run = tmp_path / "run"
    arguments = ["--data", prose, *SMALL, "--backend", "torch"]
    code, _, err = gpt("train", *arguments, "--tokenizer", tmp_path / "tokenizer.json", "--out", run)
    assert code == 0, err
    checkpoint = open_checkpoint(run)
    ours, text = checkpoint.tokenizer(), "The cat sat on the mat </s> é"
    assert checkpoint.config.vocab_size == ours.vocab_size == theirs.get_vocab_size()
    assert json.loads((checkpoint.folder / "tokenizer.json").read_text("utf-8")) == json.loads(theirs.to_str())
    theirs.encode_special_tokens = True
    assert ours.encode("the cat").tolist() == theirs.encode("the cat", add_special_tokens=False).ids
    code, out, err = gpt("generate", run, "-p", "The cat", "-m", 3, "--backend", "torch", "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["prompt_tokens"] == theirs.encode("The cat").ids, err  # its BOS first
    code, _, err = gpt("train", "--resume", run, "--max-iters", 3)
    assert code == 0, err
    code, _, err = gpt("train", *arguments, "--tokenizer", run, "--out", tmp_path / "again")
    assert code == 0, err
    assert open_checkpoint(tmp_path / "again").tokenizer().digest == ours.digest
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    opened = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    for line in (text, prose.read_text("utf-8")[:2000], "東京 naïve\n\n 12"):
        ids = opened(line, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode(line).tolist()


@needs("torch")
def test_another_tokenizer_json_of_that_name_is_other_data(gpt, prose, tmp_path):
    path = tmp_path / "tokenizer.json"
    for name in ("gpt2", "qwen2"):
        theirs = BYTE_LEVEL[name]()
        theirs.save(str(path))
        run = tmp_path / name
        code, _, err = gpt("train", "--data", prose, *SMALL, "--backend", "torch", "--tokenizer", path, "--out", run)
        assert code == 0, err
        assert open_checkpoint(run).config.vocab_size == theirs.get_vocab_size()


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="../shared/tiktoken is not here")
def test_gpt2s_special_token(gpt):
    rows = result(gpt, "show", "a<|endoftext|>", "-t", "gpt2", "--special")["tokens"]
    assert [row["id"] for row in rows] == [64, 50256]


def test_train_and_compare_take_what_prepare_takes(gpt, tmp_path, monkeypatch, stdin):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))
    dump, latin = tmp_path / "dump.json", tmp_path / "latin.txt"
    records = [{"body": {"en": f"record {i}"}} for i in range(40)]
    dump.write_text("".join(json.dumps(record) + "\n" for record in records) + "{}\n")
    latin.write_bytes(b"caf\xe9 " * 20)
    how = ["--field", "body.en", "--errors", "replace", "--skip-bad-lines", 1]
    said = result(gpt, "train", dump, latin, *how, "-o", tmp_path / "bpe")
    assert said["documents"] == 41 and said["bytes"] == sum(len(f"record {i}") for i in range(40)) + 20 * 7
    assert said["notes"][0].startswith("1 bad record left out, the first: ")
    assert result(gpt, "compare", dump, "-t", "char", *how)["documents"] == 40
    stdin(dump.read_bytes())
    assert result(gpt, "compare", "-", "-t", "byte", *how)["bytes"] == said["bytes"] - 140
    assert "no field 'text'" in mistake(gpt, "tokenize", "compare", dump, "-t", "byte")
    assert "is not UTF-8 text" in mistake(gpt, "tokenize", "train", latin, "-o", tmp_path / "x")
    code, _, err = gpt("data", "prepare", dump, *how, "--tokenizer", "byte", "--name", "docs", "--json")
    assert code == 0, err
    compared = result(gpt, "compare", "docs", "-t", "byte", "-t", tmp_path / "bpe")
    assert compared["bytes"] == said["bytes"] - 140 and compared["rows"][0]["bytes_per_token"] == 1
    assert result(gpt, "train", "docs", dump, *how, "-o", tmp_path / "both")["bytes"] == 2 * compared["bytes"]
    assert "--field body has no use" in mistake(gpt, "tokenize", "compare", "docs", "-t", "byte", "--field", "body")


def test_compare_shows_what_can_not_be_spelled(gpt, tmp_path):
    models = pytest.importorskip("tokenizers").models
    from tokenizers import Tokenizer

    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text("b")
    code, out, _ = gpt("tokenize", "compare", tmp_path / "text.txt", "-t", tmp_path / "words.json", "-t", "byte")
    assert code == 0 and "can't spell" in out and "100%" in out
