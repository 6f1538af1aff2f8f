"""Tokenizers that others wrote: the same ids as theirs, special tokens apart, and one sentence for a bad file."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders

from tests.foreign import BYTE_LEVEL, OTHERS, fuzzed, llama2, llama3, qwen2, roberta, unigram, word_level, wordpiece
from tests.foreign import gpt2 as gpt2_like
from twingpt.core import tokenizer as tokenizers
from twingpt.core.errors import UserError
from twingpt.core.tokenizer import END_OF_TEXT, HuggingFaceTokenizer
from twingpt.core.tokenizer.huggingface import check
from twingpt.data.tokenizers import find

FUZZED = fuzzed(2000, seed=3)


def opened(theirs, settings=None):
    content = json.loads(theirs if isinstance(theirs, str) else theirs.to_str())
    return HuggingFaceTokenizer(check(content, "theirs.json"), settings or {}, "theirs.json")


def changed(theirs, change):
    content = json.loads(theirs.to_str())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *OTHERS])
def test_the_same_ids_as_tokenizers(name):
    theirs = {**BYTE_LEVEL, **OTHERS}[name]()
    ours = opened(theirs)
    assert ours.uses_tiktoken == (name in BYTE_LEVEL)
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = True
    for text, expected in zip(FUZZED, theirs.encode_batch_fast(FUZZED, add_special_tokens=False), strict=True):
        ids = ours.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == expected.ids, repr(text)
        if name in BYTE_LEVEL and theirs.normalizer is None:
            assert ours.decode(ids) == text
    for text in FUZZED[:200]:
        ids = ours.encode(text)
        assert "".join(ours.stream(ids)) == ours.decode(ids)
        if name not in ("wordpiece", "word_level"):
            assert ours.decode(ids) == theirs.decode(ids.tolist())
    assert len(ours.pieces) == ours.vocab_size == len(ours.byte_lengths) > ids.max()


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *OTHERS])
def test_a_special_tokens_spelling_is_data_unless_asked(name):
    ours = opened({**BYTE_LEVEL, **OTHERS}[name]())
    for spelling, token in ours.specials.items():
        text = f"the words{spelling} and text {spelling}"
        if token != ours.roles.get("unk"):
            assert token not in ours.encode(text)
        assert token in ours.encode(text, special=True)
        assert ours.token_bytes(token) == b""
    assert ours.end_of_text in ours.specials.values() and ours.byte_lengths[ours.end_of_text] == 0


@pytest.mark.parametrize("name", ["llama2", "gpt_neox", "prefix_space", "llama3"])
def test_bytes_of_tokens_add_up(name):
    theirs = {**BYTE_LEVEL, **OTHERS}[name]()
    theirs.normalizer = theirs.normalizer if name == "llama2" else None
    ours = opened(theirs)
    text = "the words of a text, 東京 naïve"
    space = name in ("llama2", "prefix_space")  # before the first word
    assert ours.byte_lengths[ours.encode(text)].sum() == len(text.encode()) + space
    assert b"".join(ours.token_bytes(t) for t in ours.encode(text)) == b" " * space + text.encode()


def test_bytes_of_word_pieces():
    ours = opened(wordpiece())
    pieces = {ours.token_bytes(token) for token in ours.encode("the words of teaching")}
    assert {b" the", b" words"} & pieces and not any(piece.startswith(b"##") for piece in pieces)


def test_roles_are_those_that_the_settings_name():
    names = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "unk_token": "?!"}
    ours = opened(qwen2(), names)
    assert ours.roles["eos"] == ours.specials["<|im_end|>"] and ours.roles["pad"] == ours.specials["<|endoftext|>"]
    assert ours.end_of_text == ours.specials["<|endoftext|>"]  # a document's end, not a turn's
    assert "unk" not in ours.roles
    assert {"<|im_start|>", "<|im_end|>"} <= set(ours.specials)


def test_a_tokenizer_without_an_end_of_text_is_given_one(tmp_path):
    theirs = word_level()
    ours = opened(theirs)
    assert ours.end_of_text == ours.vocab_size - 1 == theirs.get_vocab_size()
    assert ours.encode("the words").tolist() == theirs.encode("the words").ids
    assert ours.encode(f"the {END_OF_TEXT}", special=True)[-1] == ours.end_of_text != ours.encode(END_OF_TEXT)[-1]
    for name, text in tokenizers.files(ours, 64).items():
        (tmp_path / name).write_text(text, "utf-8")
    assert tokenizers.load(tmp_path).digest == ours.digest


def test_the_chat_template_is_kept(tmp_path):
    llama3().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert find(str(tmp_path)).settings()["chat_template"] == "{{ messages }}"


def test_a_choice_of_words_is_not_random():
    text = changed(gpt2_like(), lambda content: content["model"].update(dropout=0.5))
    ours = opened(text)
    assert ours.encode("the words of a text").tolist() == opened(gpt2_like()).encode("the words of a text").tolist()
    assert ours.to_json()["model"]["dropout"] == 0.5


def merge_that_the_vocabulary_hides(content):
    """A token without a merge of its own, which tiktoken would join and `tokenizers` would not."""
    content["model"]["merges"].remove(
        next(m for m in content["model"]["merges"] if m == ["h", "e"] or m == ["t", "he"])
    )


@pytest.mark.parametrize(
    "change",
    [
        merge_that_the_vocabulary_hides,
        lambda content: content["model"]["merges"].reverse(),
        lambda content: content["model"].update(end_of_word_suffix="</w>"),
        lambda content: content.update(normalizer={"type": "Replace", "pattern": {"String": "e"}, "content": "a"}),
        lambda content: content.update(pre_tokenizer=None),
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"),
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{N}{1,3}+|[a-z]+"}),
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"(?~ab)|\X"}),
        lambda content: content["added_tokens"][-1].update(lstrip=True),
        lambda content: vocab(zq=content["model"]["vocab"].pop("ÿ"))(content),
    ],
    ids=["merge", "order", "suffix", "normalizer", "no split", "behavior", "pattern", "engine", "lstrip", "byte"],
)
def test_what_tiktoken_would_do_otherwise_is_left_to_tokenizers(change):
    theirs = qwen2()
    if "lstrip" not in str(change):
        theirs.normalizer = None
    text = changed(theirs, change)
    ours, library = opened(text), Tokenizer.from_str(text)
    library.encode_special_tokens = True
    for text in FUZZED[:300]:
        assert ours.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids, repr(text)


def test_splits_are_those_of_the_merges():
    """A word that is a token without merges: taken whole by both, or by none."""
    for ignore_merges, taken in ((True, True), (False, False)):
        theirs = Tokenizer.from_str(changed(gpt2_like(), vocab_alone("Ġzqx", ignore_merges)))
        ours = opened(theirs)
        assert ours.uses_tiktoken and (420 in ours.encode("a zqx")) == taken
        assert ours.encode("a zqx zqxx").tolist() == theirs.encode("a zqx zqxx").ids
    theirs = Tokenizer.from_str(changed(gpt2_like(), vocab_alone("ĠtheĠthe", True)))
    assert not opened(theirs).uses_tiktoken  # tiktoken would join its two halves


def nested(depth):
    return '{"model": ' + "[" * depth + "]" * depth + "}"


def vocab(**entries):
    return lambda content: content["model"]["vocab"].update(entries)


def vocab_alone(piece, ignore_merges):
    """One more token in the vocabulary, without added tokens, and whether it is looked for whole."""

    def change(content):
        content["added_tokens"] = []
        content["model"]["vocab"][piece] = len(content["model"]["vocab"])
        content["model"]["ignore_merges"] = ignore_merges

    return change


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "can't be read as JSON"),
        ("{", "can't be read as JSON"),
        (b"\xff\xfe", "can't be read as JSON"),
        (nested(200_000), "nested too deeply"),
        (nested(500), "has no model"),
        ("[]", "has no model"),
        ('{"model": {}}', "has no vocabulary"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has no vocabulary"),
        ('{"model": {"type": "BPE", "vocab": 3, "merges": []}}', "has no vocabulary"),
        ('{"model": {"type": "Unigram", "vocab": [["a"]]}}', "not a piece and its score"),
        ('{"model": {"type": "Unknown", "vocab": {"a": 0}}}', "can be read: "),
        (vocab(the="1"), "'1' is no token id"),
        (vocab(the=1.5), "1.5 is no token id"),
        (vocab(the=True), "True is no token id"),
        (vocab(the=None), "None is no token id"),
        (vocab(the=-1), "-1 is no token id"),
        (vocab(the=2**63), "9223372036854775808 is no token id"),
        (vocab(the=2_000_000), "2000000 is no token id"),
        (vocab(the=999_999), r"has \d+ tokens, and one with the id 999999: a table of all ids would be mostly empty"),
        (vocab(the=7), "two tokens have the same id"),
        (lambda content: content["added_tokens"][0].update(id=2000), "the id 2000, and .tokenizers. reads it as 420"),
        (lambda content: content["added_tokens"][0].pop("id"), "None is no token id"),
        (lambda content: content.update(added_tokens={"a": 1}), "added tokens are not a list"),
        (lambda content: content.update(added_tokens=["a"]), "added tokens are not a list"),
        (lambda content: content["model"]["merges"].append(["new", "word"]), "can be read: "),
        (lambda content: content["model"].update(merges=7), "can be read: "),
        (lambda content: content["model"].update(continuing_subword_prefix="xx"), "have not the prefix"),
        (lambda content: content.update(pre_tokenizer={"type": "Magic"}), "can be read: "),
        (lambda content: content.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}), "can be read: "),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if callable(content):
        content = changed(gpt2_like(), content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        find(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_ids_with_gaps_stand_for_nothing():
    def change(content):
        content["added_tokens"] = []
        content["model"]["vocab"]["zqx"] = 900

    ours = opened(changed(gpt2_like(), change))
    assert ours.token_bytes(700) == b"" and ours.decode([700]) == "" and ours.token_bytes(900) == b"zqx"
    assert ours.end_of_text == 901 == ours.vocab_size - 1
    assert ours.encode(f"a{END_OF_TEXT}", special=True).tolist() == [*ours.encode("a"), 901]


@pytest.mark.parametrize("make", [llama2, unigram, roberta])
def test_an_id_outside_the_vocabulary(make):
    ours = opened(make())
    with pytest.raises(UserError, match="outside the vocabulary"):
        ours.decode([10_000])


def test_text_that_the_scheme_has_no_ids_for():
    ours = opened(changed(word_level(), lambda content: content["model"].update(unk_token="[none]")))
    with pytest.raises(UserError, match="no ids for this text"):
        ours.encode("unheard-of")


@pytest.mark.parametrize("make", [gpt2_like, llama2])
def test_half_a_surrogate_pair(make):
    with pytest.raises(UserError, match="character 1 is half a surrogate pair"):
        opened(make()).encode("a\ud800")


def test_a_broken_character_in_a_stream_ends_with_a_mark():
    ours = opened(llama2())
    ids = [ours.encode("the")[0], *(ours._library.token_to_id(f"<0x{b:02X}>") for b in "東".encode())]
    assert [piece for piece in ours.stream(ids) if piece] == [ours.decode(ids[:1]), "東"]
    assert "".join(ours.stream(ids[:-1])) == ours.decode(ids[:-1])


def test_a_decoder_is_not_needed():
    theirs = gpt2_like()
    theirs.decoder = decoders.Fuse()
    ours = opened(theirs)
    assert ours.encode("the words").tolist() == opened(gpt2_like()).encode("the words").tolist()


def test_added_tokens_of_all_flags():
    theirs = qwen2()
    theirs.add_tokens([AddedToken("words", normalized=True, single_word=True)])
    ours = opened(theirs)
    assert not ours.uses_tiktoken
    assert ours.encode("the words").tolist() == theirs.encode("the words").ids
