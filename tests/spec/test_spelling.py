"""Texts that a tokenizer can't spell: counted, told and refused; sizes are the text's."""

import json
import math

import numpy as np
import pytest

from twingpt.core.errors import UserError
from twingpt.core.tokenizer.tokenizer_json import load_file
from twingpt.data import library
from twingpt.data.learning import compare
from twingpt.data.prepare import prepare
from twingpt.data.spelling import Spelling
from twingpt.evaluation import baseline


@pytest.fixture(autouse=True)
def fresh_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TWINGPT_HOME", str(tmp_path / "home"))


def saved(path, model, pre_tokenizer=None, **parts):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.Whitespace()
    for name, part in parts.items():
        setattr(made, name, part)
    made.save(str(path))
    return str(path)


@pytest.fixture
def words(tmp_path):
    """Knows two words, and [UNK]."""
    from tokenizers.models import WordLevel

    return saved(tmp_path / "words.json", WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))


def test_unknown_ids_are_counted_and_told(tmp_path, words):
    path = tmp_path / "a.txt"
    path.write_text("the cat the cat bird " * 200)
    data = prepare(str(path), words, 0)
    [note] = data.manifest["notes"]
    assert note.startswith("The tokenizer can't spell 20% of the text: 200 of 1,000 ids stand for what is unknown")
    facts = data.manifest["splits"]
    assert facts["train"]["bytes"] + facts["val"]["bytes"] == 4200  # of the text, and not of its tokens
    assert library.summarize(data).bytes == 4200 and library.verify(data)["ok"]
    val = np.asarray(data.splits["val"])
    assert data.text_bytes("val", val) == pytest.approx(facts["val"]["bytes"])
    [row], _ = baseline.measure(data, [1])
    bytes_per_token = facts["val"]["bytes"] / facts["val"]["tokens"]
    assert row.bits_per_byte == pytest.approx(row.val_loss / math.log(2) / bytes_per_token)
    [byte, mine] = compare(["byte", words], str(path))["rows"]
    assert byte["unspelled"] == 0 and mine["unspelled"] > 0.19


def test_above_a_third_it_is_refused(tmp_path, words):
    path = tmp_path / "a.txt"
    path.write_text("the bird flew over the hill " * 100)
    with pytest.raises(UserError, match=r"The tokenizer can't spell \d\d% of .*a\.txt: learn one from it"):
        prepare(str(path), words, 0)


def test_characters_that_leave_no_id(tmp_path):
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE, Unigram

    vocab = {character: i for i, character in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    spaced = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    silent = saved(tmp_path / "silent.json", BPE(vocab=vocab, merges=[]), **spaced)
    fused = BPE(vocab={**vocab, "<unk>": 27}, merges=[], unk_token="<unk>", fuse_unk=True)
    one = saved(tmp_path / "one.json", fused, **spaced)
    unigram = Unigram([("<unk>", 0.0), *((character, -3.0) for character in vocab)], unk_id=0, byte_fallback=False)
    third = saved(tmp_path / "unigram.json", unigram, **spaced)
    path = tmp_path / "a.txt"
    for name in (silent, one, third):
        tokenizer = load_file(tmp_path / name)
        spelling = Spelling.of(tokenizer)
        for text, lost in (("the cat", 0), ("東京 b", 2), ("naïve\n\te\u0301", 1)):
            assert spelling.count(text, tokenizer.encode(text)).lost == lost
        path.write_text("the cat 東京 sat on it " * 50, "utf-8")
        assert "can't spell" in prepare(str(path), name, 0).manifest["notes"][0]
        path.write_text("東京は a " * 50, "utf-8")
        with pytest.raises(UserError, match="can't spell"):
            prepare(str(path), name, 0)


def test_bytes_spell_everything(tmp_path):
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    name = saved(tmp_path / "bytes.json", model, level, decoder=decoders.ByteLevel())
    assert Spelling.of(load_file(tmp_path / "bytes.json")) is None
    (tmp_path / "a.txt").write_text("東京は a " * 50, "utf-8")
    manifest = prepare(str(tmp_path / "a.txt"), name, 0).manifest
    assert manifest["notes"] == [] and "token_bytes" not in json.dumps(manifest)
