"""Our tokenizers as transformers and mlx-lm open them: the same ids on 20,000 strings and on a megabyte."""

import argparse
import os
import random
import typing
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests import foreign
from tests.conftest import dose, needs
from tests.foreign import fuzzed
from twingpt.backends import registry
from twingpt.core.tokenizer import (
    CHAT,
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    files,
    tiktoken_named,
)
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.data.sources import load
from twingpt.data.tokenizers import train_bpe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DOCUMENTS = load("python-docs").documents
MEGABYTE = (
    "\n".join(DOCUMENTS) * 2 + Path(argparse.__file__).read_text("utf-8") + Path(typing.__file__).read_text("utf-8")
)[:1_000_000]
AWKWARD = ["\n  ", "a\n \n", "x  ", "'ſ don'T", "\r\n\r\n  a"]
FUZZED = fuzzed(20_000, seed=1)


def ids_of(theirs, texts):
    """transformers' ids without what its own call makes beside them, which takes as long again."""
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    return [it.ids for it in theirs.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def keep(tokenizer, folder):
    folder.mkdir()
    for name, text in files(tokenizer, 1024).items():
        (folder / name).write_text(text, "utf-8")
    return folder


@cache
def bpe(pattern, chat=False):
    return train_bpe([text[:3000] for text in DOCUMENTS], 600, pattern, chat=chat)


def like_tiktokens(name):
    """The encoding's pattern and special tokens, gaps in their ids included, over tokens learned here."""

    def make(monkeypatch):
        import tiktoken
        from tiktoken_ext import openai_public

        monkeypatch.setattr(
            "twingpt.core.tokenizer.huggingface.MOST_GAPS", 1000
        )  # of the 100,000 tokens that it has, 600 are here
        ranks = {piece: i for i, piece in enumerate(bpe("gpt2").ranked)}
        monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        monkeypatch.setattr(
            tiktoken, "get_encoding", lambda name: tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]())
        )
        tokenizer = tiktoken_named(name)
        theirs = tiktoken.get_encoding(name)
        for text in FUZZED[::5] + FUZZED[-5:]:
            assert tokenizer.encode(text).tolist() == theirs.encode_ordinary(text), repr(text)
        assert tokenizer.specials == theirs._special_tokens
        return tokenizer

    return make


def gpt2(monkeypatch):
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("../shared/tiktoken is not here")
    return tiktoken_named("gpt2")


KINDS = {
    "byte": lambda _: ByteTokenizer(),
    "gpt2 pattern": lambda _: bpe("gpt2"),
    "llama3 pattern": lambda _: bpe("llama3"),
    "qwen2 pattern": lambda _: bpe("qwen2", chat=True),
    "gpt2": gpt2,
    "cl100k_base": like_tiktokens("cl100k_base"),
    "o200k_base": like_tiktokens("o200k_base"),
}


@pytest.mark.parametrize("n", dose(2000, 20_000))
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_on_fuzzed_strings_and_a_long_text(tmp_path, monkeypatch, kind, n):
    tokenizer, fuzzed, long = KINDS[kind](monkeypatch), [*AWKWARD, *FUZZED[:n]], MEGABYTE[: 50 * n]
    folder = keep(tokenizer, tmp_path / "kept")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*fuzzed, long]
    for text, ids in zip(texts, ids_of(theirs, texts), strict=True):
        assert tokenizer.encode(text).tolist() == ids, repr(text[:200])
    for text in [*fuzzed[::4], long]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert theirs.decode(ids[:5000]) == tokenizer.decode(ids[:5000])
    assert theirs(fuzzed[:500])["input_ids"] == [tokenizer.encode(text).tolist() for text in fuzzed[:500]]
    again = load_tokenizer(folder)
    assert again.digest == tokenizer.digest and np.array_equal(again.encode(long), ids)
    for spelling, token in tokenizer.specials.items():
        assert theirs(f"a {spelling} b")["input_ids"] == tokenizer.encode(f"a {spelling} b", special=True).tolist()
        assert token in theirs(f"a {spelling} b")["input_ids"] and token not in tokenizer.encode(f"a {spelling} b")
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == tokenizer.end_of_text
    assert theirs.decode([*tokenizer.encode("a b"), tokenizer.end_of_text], skip_special_tokens=True) == "a b"


@pytest.mark.parametrize("n", dose(2000, 20_000))
def test_characters(tmp_path, n):
    tokenizer = CharTokenizer(MEGABYTE)
    theirs = transformers.AutoTokenizer.from_pretrained(keep(tokenizer, tmp_path / "kept"))
    rng = random.Random(0)
    texts = ["".join(rng.choices(tokenizer.alphabet, k=rng.randrange(40))) for _ in range(n)]
    for text, ids in zip([*texts, MEGABYTE], ids_of(theirs, [*texts, MEGABYTE]), strict=True):
        assert tokenizer.encode(text).tolist() == ids, repr(text[:200])
    assert tokenizer.decode(ids) == MEGABYTE and theirs.decode(ids[:500]) == MEGABYTE[:500]
    with pytest.raises(Exception, match="UNK"):  # as here: no character is taken for another
        theirs("東")


@pytest.mark.parametrize("name", [*foreign.BYTE_LEVEL, *foreign.OTHERS])
def test_a_foreign_tokenizer_comes_out_as_it_went_in(tmp_path, name):
    theirs = {**foreign.BYTE_LEVEL, **foreign.OTHERS}[name]()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(keep(ours, tmp_path / "kept"))
    texts = FUZZED[:500]
    for text, ids in zip(texts, ids_of(opened, texts), strict=True):
        assert ours.encode(text).tolist() == ids, repr(text)
    assert opened.eos_token_id in ours.specials.values()
    assert load_tokenizer(tmp_path / "kept").digest == ours.digest


def test_chat(tmp_path):
    tokenizer = bpe("gpt2", chat=True)
    theirs = transformers.AutoTokenizer.from_pretrained(keep(tokenizer, tmp_path / "kept"))
    messages = [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "A mark."}]
    text = theirs.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>assistant\nA mark.<|im_end|>\n<|im_start|>assistant\n"
    start, end = (tokenizer.specials[spelling] for spelling in CHAT)
    ids = tokenizer.encode(text, special=True).tolist()
    assert ids == theirs.apply_chat_template(messages[1:], add_generation_prompt=True)["input_ids"]
    assert ids.count(start) == 2 and ids.count(end) == 1
    assert not {start, end} & set(tokenizer.encode(messages[0]["content"]).tolist())
    assert list(tokenizer.specials) == [END_OF_TEXT, *CHAT] and tokenizer.vocab_size <= 600


@needs("mlx")
@pytest.mark.parametrize("alphabet", ["xyz", "0123456789+=\n", "ab, ", " é日本語\ufffd"])
def test_mlx_lm_opens_characters_of_any_alphabet(tmp_path, alphabet):
    """Its other detokenizers encode "a ,b" as they begin."""
    registry.get("mlx")

    utils = pytest.importorskip("mlx_lm.tokenizer_utils", reason="mlx-lm is not installed")
    tokenizer = CharTokenizer(alphabet)
    theirs = utils.load(keep(tokenizer, tmp_path / "kept"))
    text = alphabet + " ".join(alphabet) * (" " in alphabet) + alphabet[::-1]
    ids = tokenizer.encode(text).tolist()
    assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text
    detokenizer = theirs.detokenizer
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text
    assert load_tokenizer(tmp_path / "kept").decode(ids) == text


def test_a_character_that_sentencepiece_means_as_a_space_stays(tmp_path):
    tokenizer = CharTokenizer("a ▁")
    theirs = transformers.AutoTokenizer.from_pretrained(keep(tokenizer, tmp_path / "kept"))
    assert theirs.decode(tokenizer.encode("a ▁ a")) == "a ▁ a"


@needs("mlx")
@pytest.mark.parametrize("name", ["own", "llama2", "qwen2"])
def test_mlx_lm_reads_the_same(tmp_path, name):
    registry.get("mlx")

    utils = pytest.importorskip("mlx_lm.tokenizer_utils", reason="mlx-lm is not installed")
    if name == "own":
        tokenizer = bpe("llama3")
    else:
        {**foreign.BYTE_LEVEL, **foreign.OTHERS}[name]().save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
    theirs = utils.load(keep(tokenizer, tmp_path / "kept"))
    texts = [*FUZZED, MEGABYTE] if name == "own" else FUZZED[:2000]
    for text, ids in zip(texts, ids_of(theirs._tokenizer, texts), strict=True):
        assert tokenizer.encode(text).tolist() == ids, repr(text[:200])
    for text in FUZZED[:200]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
    detokenizer = theirs.detokenizer
    for token in tokenizer.encode("naïve 東京 x"):
        detokenizer.add_token(int(token))
    detokenizer.finalize()
    assert detokenizer.text == tokenizer.decode(tokenizer.encode("naïve 東京 x"))
