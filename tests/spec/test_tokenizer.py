"""Tokenizers: what goes in comes out, and what is kept comes back."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SHARED
from twingpt.core import tokenizer as tokenizers
from twingpt.core.errors import UserError
from twingpt.core.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer
from twingpt.data.tokenizers import learn_or_find, train_bpe

TEXT = "The cat's 12 hats — naïve café, 東京 🙂\n\n    def f(x):\n\treturn x\n" * 20
BPE = train_bpe([TEXT], 300)
SOME = [BPE, ByteTokenizer(), CharTokenizer(TEXT)]
SOME_IDS = [tokenizer.kind for tokenizer in SOME]

needs_gpt2 = pytest.mark.skipif(not (SHARED / "tiktoken").is_dir(), reason="../shared/tiktoken is not here")


@pytest.fixture(params=SOME, ids=SOME_IDS)
def tokenizer(request):
    return request.param


def test_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.max() < tokenizer.end_of_text
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.byte_lengths[ids].sum() == len(TEXT.encode())


@given(st.text())
def test_byte_level_tokenizers_take_any_text(text):
    for tokenizer in (BPE, ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_is_the_last_id_and_its_spelling_is_data(tokenizer):
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes(tokenizer.end_of_text) == b""
    if tokenizer.kind != "char":
        ids = tokenizer.encode(END_OF_TEXT)
        assert tokenizer.end_of_text not in ids and tokenizer.decode(ids) == END_OF_TEXT


def test_kept_and_loaded(tokenizer, tmp_path):
    for name, text in tokenizers.files(tokenizer, 64).items():
        (tmp_path / name).write_text(text, "utf-8")
    loaded = tokenizers.load(tmp_path)
    assert loaded.digest == tokenizer.digest and loaded.kind == tokenizer.kind
    assert np.array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))


def test_streaming_gives_whole_characters(tokenizer):
    pieces = list(tokenizer.stream(tokenizer.encode("é東🙂 x")))
    assert "".join(pieces) == "é東🙂 x"
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_ends_a_broken_character_with_a_mark():
    tokenizer = ByteTokenizer()
    assert list(tokenizer.stream([0xE6, 0x9D])) == ["", "", "\ufffd"]


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(UserError, match="The character '€' is not among the"):
        CharTokenizer("abc").encode("a€")


@pytest.mark.parametrize("token", [-1, 257, 10**9])
def test_an_id_outside_the_vocabulary(token):
    with pytest.raises(UserError, match="outside the vocabulary, 0 to 256"):
        ByteTokenizer().decode([token])


def test_bpe_learns_at_most_the_size_asked_for():
    assert BPE.vocab_size == 300
    assert train_bpe(["aaaa"], 5000).vocab_size < 300  # no more merges to learn
    with pytest.raises(UserError, match="need 257"):
        train_bpe([TEXT], 100)


@pytest.mark.parametrize("run", ["\0" * 50_000, "-" * 50_000, "a" * 300_000, " " * 1_500_000, "\n" * 200_000])
def test_long_runs_are_learned_and_encoded_in_seconds(run):
    text = f"before {run} after"
    tokenizer = train_bpe([text, TEXT], 300)
    assert max(map(len, tokenizer.pieces)) <= tokenizers.LONGEST_TOKEN
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_training_is_deterministic():
    assert train_bpe([TEXT], 300).digest == BPE.digest


def test_merges_rebuild_every_token():
    ranks = {piece: i for i, piece in enumerate(BPE.ranked)}
    for piece, (left, right) in zip(BPE.ranked[256:], BPE.merges, strict=True):
        assert left + right == piece and ranks[left] < ranks[piece] > ranks[right]


def test_unreachable_token():
    pieces = [bytes([i]) for i in range(256)] + [b"abc"]
    with pytest.raises(UserError, match="can't be reached"):
        tokenizers.merges(pieces)


@needs_gpt2
def test_gpt2_is_tiktokens():
    import tiktoken

    gpt2 = tokenizers.tiktoken_named("gpt2")
    assert gpt2.vocab_size == 50257
    assert gpt2.encode(TEXT).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(TEXT)
    assert gpt2.decode([15496, 995]) == "Hello world"


def test_gpt2_without_a_network(monkeypatch):
    import tiktoken

    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR"):
        tokenizers.tiktoken_named("gpt2")


def test_unknown_kind():
    with pytest.raises(UserError, match="did you mean 'byte'"):
        learn_or_find("bytes", [], [], 0)


@pytest.mark.parametrize("damage", ["missing", "not json", "foreign", "settings"])
def test_a_damaged_tokenizer_is_refused(tmp_path, damage):
    for name, text in tokenizers.files(BPE, 64).items():
        (tmp_path / name).write_text(text, "utf-8")
    path = tmp_path / ("tokenizer_config.json" if damage == "settings" else "tokenizer.json")
    if damage == "missing":
        path.unlink()
    else:
        path.write_text({"not json": "{", "foreign": '{"model": {}}', "settings": "[]"}[damage])
    with pytest.raises(UserError, match="tokenizer"):
        tokenizers.load(tmp_path)


def split_otherwise(model):
    """The same token of other parts, of which one is never there when they would be joined."""
    vocab = model["vocab"]
    for i, (left, right) in enumerate(model["merges"]):
        joined = left + right
        for cut in range(1, len(joined)):
            if cut != len(left) and joined[:cut] in vocab and joined[cut:] in vocab:
                model["merges"][i] = [joined[:cut], joined[cut:]]
                return
    raise AssertionError


@pytest.mark.parametrize(
    "alter",
    [
        lambda model: model["merges"].reverse(),
        lambda model: model["merges"].pop(),
        lambda model: model.update(merges=[["a"]]),
        lambda model: model.update(ignore_merges=False),
        lambda model: model["vocab"].pop("a"),
        lambda model: model["vocab"].update({" ": 298}),
        split_otherwise,
    ],
)
def test_an_altered_tokenizer_is_refused(tmp_path, alter):
    for name, text in tokenizers.files(BPE, 64).items():
        (tmp_path / name).write_text(text, "utf-8")
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    alter(content["model"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=r"has been altered|no token id|same id"):
        tokenizers.load(tmp_path)


def test_pattern_is_kept():
    other = BPETokenizer(BPE.ranked, pattern=r"\s+|\S+")
    assert other.digest != BPE.digest
