"""Others' tokenizer.json as an enemy or a bad disk would leave them: read, or refused in one sentence."""

import json
import os

import pytest

from tests import foreign
from tests.conftest import dose, pipes
from tests.mutate import Judge, mutations, overwrite, whole
from twingpt.core.errors import UserError
from twingpt.data.tokenizers import find

# Each kind, and how many of a hundred mutations: a byte-level one is tried on a page of text when it is opened.
SHARES = {"llama2": 26, "unigram": 24, "wordpiece": 24, "word_level": 24, "qwen2": 1, "gpt2": 1}


def small(content):
    """A tokenizer.json cut down to a few tokens; one of bytes keeps all of them."""
    model, added = content["model"], [token["content"] for token in content["added_tokens"]]
    if model["type"] == "BPE":
        model["merges"] = model["merges"][:6]
        kept = {*added, *("".join(pair) for pair in model["merges"])}
        bytes_too = "ByteLevel" in json.dumps(content["decoder"])
        letters = set(model["vocab"]) if bytes_too else {part for pair in model["merges"] for part in pair}
        kept |= {letter for letter in letters if len(letter) == 1}
        names = sorted(kept & model["vocab"].keys(), key=model["vocab"].get)
        model["vocab"] = {name: i for i, name in enumerate(names)}
    elif model["type"] == "Unigram":
        model["vocab"] = model["vocab"][:12]
        names = [piece for piece, _ in model["vocab"]]
    else:
        names = sorted(model["vocab"], key=model["vocab"].get)[:15]
        model["vocab"] = {name: i for i, name in enumerate(names)}
    names += [spelling for spelling in added if spelling not in names]
    for token in content["added_tokens"]:
        token["id"] = names.index(token["content"])
    return content


@pytest.mark.parametrize("n", dose(500, 10_000))
def test_mutated_files(tmp_path, monkeypatch, n, soak):
    monkeypatch.setenv("RUST_BACKTRACE", "0")  # of a panic in `tokenizers`; to name its places takes 50 MB
    path, judge = tmp_path / "tokenizer.json", Judge(2, soak=soak)

    def read():
        tokenizer = find(str(path))
        ids = tokenizer.encode("the words of 12 naïve 東京")
        tokenizer.encode("<s>the", special=True)
        assert isinstance(tokenizer.decode(ids), str) and len(tokenizer.byte_lengths) == tokenizer.vocab_size

    for name, share in SHARES.items():
        if name in foreign.BYTE_LEVEL:  # tried on 720 texts, whose words `tokenizers` keeps
            judge.room, judge.resident = 2**20, 2**23
        content = small(json.loads({**foreign.OTHERS, **foreign.BYTE_LEVEL}[name]().to_str()))
        text = json.dumps(content).encode()
        path.write_bytes(text)
        read()
        for mutated in mutations(text, 2, n * share // 100, whole):
            overwrite(path, mutated)
            judge(read, len(mutated))
    assert judge.judged == n and 0.1 * n < judge.read < 0.6 * n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"(.*)*(.*)*(.*)*x\z"}),
         "retry-limit-in-match"),
        (lambda content: content["model"].update(continuing_subword_prefix="é"), "have not the prefix"),
    ],
)  # fmt: skip
def test_what_tokenizers_panics_on_is_refused(tmp_path, change, message):
    content = json.loads(foreign.qwen2().to_str())
    content["normalizer"] = None
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        find(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pipes
def test_links_out_and_what_never_ends_are_not_read(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(foreign.gpt2().to_str(), "utf-8")
    (tmp_path / "outside").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=f"{name} is a link to .*outside, out of its directory"):
        find(str(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=name):
        find(str(folder))
