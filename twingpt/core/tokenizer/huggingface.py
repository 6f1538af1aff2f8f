"""Any tokenizer.json of Hugging Face's `tokenizers`, encoded by tiktoken where that gives the same ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.tokenizer.base import END_OF_TEXT, ROLES, Array, Tokenizer, alternatives, special_token
from twingpt.core.tokenizer.bpe import (
    CHARACTER_TO_BYTE,
    GPT2_PATTERN,
    LARGEST_VOCABULARY,
    encode_ordinary,
    encoding,
    unprintable,
)

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

Json = Mapping[str, Any]

# How a document's end is spelled, among added special tokens. It is not always EOS: chat models end a turn with that.
DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "[SEP]")
# A role that no file names has the spelling that transformers' class for the tokenizer gives it (docs/resolution.md).
CLASS_ROLES: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos", "eos", "unk"), END_OF_TEXT),
    "GPTNeoXTokenizer": {**dict.fromkeys(("bos", "eos", "unk"), END_OF_TEXT), "pad": "<|padding|>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos", "pad", "unk"), END_OF_TEXT),
    "GemmaTokenizer": {role: f"<{role}>" for role in ROLES},
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "TokenizersBackend": {}, "PreTrainedTokenizer": {},
}  # fmt: skip
# By model_type: where tokenizer_config.json names none, and whatever it names.
MODEL_CLASSES = {
    "gpt2": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer", "qwen3": "Qwen2Tokenizer", "gemma3_text": "GemmaTokenizer",
    "llama": "TokenizersBackend", "smollm3": "TokenizersBackend",
}  # fmt: skip
ONLY_CLASSES = {"qwen2": "Qwen2Tokenizer", **dict.fromkeys(("granite", "mistral", "olmo2"), "TokenizersBackend")}
# For any other class, and a tokenizer.json alone: spellings to look for among added special tokens.
SPELLINGS = {
    "bos": ("<|begin_of_text|>", "<bos>", "<s>", "[CLS]", END_OF_TEXT),
    "eos": DOCUMENT_ENDS,
    "pad": ("<pad>", "[PAD]", "<|padding|>", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "[UNK]"),
}
# What is written of a tokenizer_config.json as it was read, beside the roles.
CARRIED = (
    "chat_template", "add_prefix_space", "additional_special_tokens", "extra_special_tokens", "sep_token", "cls_token",
    "mask_token", "add_bos_token", "add_eos_token", "padding_side", "truncation_side", "split_special_tokens",
    "clean_up_tokenization_spaces", "spaces_between_special_tokens", "chat_template_type", "tool_parser_type",
)  # fmt: skip
CONTEXT = 8  # tokens of a prompt that are decoded with a continuation: a character is of at most 4 bytes, each a token
MOST_GAPS = 4  # ids per token: tables have a row for every id, and must not be far larger than the file


def check(content: Any, name: str) -> Json:
    """`content`, or UserError unless it has the parts of a tokenizer.json, of the right types and sizes."""

    def fail(what: str) -> UserError:
        return UserError(f"{name} is not a tokenizer.json that can be read: {what}.")

    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise fail("it has no model")
    vocab, added = model.get("vocab"), content.get("added_tokens") or []
    if isinstance(vocab, list):  # Unigram: pairs of a piece and its score
        if not all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in vocab):
            raise fail("an entry of its vocabulary is not a piece and its score")
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
    if not isinstance(vocab, dict) or not vocab:
        raise fail("its model has no vocabulary")
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in added
    ):
        raise fail("its added tokens are not a list of tokens")
    if wrong := _wrong_ids([*vocab.values(), *(token.get("id") for token in added)]):
        raise fail(wrong)
    if len(set(vocab.values())) < len(vocab):
        raise fail("two tokens have the same id")
    if (prefix := model.get("continuing_subword_prefix")) and not _merges_have_prefix(model.get("merges"), prefix):
        raise fail("its merges have not the prefix that it names")  # `tokenizers` would cut letters in two
    return dict(content)


def _wrong_ids(ids: list[Any]) -> str | None:
    """What is wrong with the ids of the tokens, for a message; None where nothing is."""
    if wrong := [repr(i)[:40] for i in ids if type(i) is not int or not 0 <= i < LARGEST_VOCABULARY]:
        return f"{wrong[0]} is no token id, which is a whole number from 0 to {LARGEST_VOCABULARY - 1}"
    if max(ids) > MOST_GAPS * len(ids) + 1000:
        return f"it has {len(ids)} tokens, and one with the id {max(ids)}: a table of all ids would be mostly empty"
    return None


def _merges_have_prefix(merges: Any, prefix: Any) -> bool:
    """Whether the right part of every merge begins with the `continuing_subword_prefix`."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges or []]
    return all(isinstance(pair[-1], str) and pair[-1].startswith(str(prefix)) for pair in pairs)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json that twingpt did not write: `tokenizers`' ids, with `add_special_tokens=False`.

    `settings` is the tokenizer_config.json beside it, which names the roles of its special tokens. A tokenizer without
    an end-of-text token gets END_OF_TEXT as its last id.
    """

    kind = "huggingface"

    def __init__(self, content: Json, settings: Json, name: str) -> None:
        self._content = content
        self._library = load_library(self._content, name)
        added = self._library.get_added_tokens_decoder()
        self.specials = {added[token].content: token for token in sorted(added) if added[token].special}
        self.roles = self._roles(settings)
        eos = self.roles.get("eos")
        ends = [token for spelling in DOCUMENT_ENDS if (token := self.specials.get(spelling)) is not None]
        if eos is None and not ends:
            self._content, eos = add_end_of_text(self._content, self._library)
            self._library = load_library(self._content, name)
            if "eos_token" not in settings:
                self.roles["eos"] = eos
        named = eos is not None and self._library.id_to_token(eos) in DOCUMENT_ENDS
        self.end_of_text = eos if eos is not None and (named or not ends) else ends[0]
        control = (self.end_of_text, *self.roles.values())
        self.specials |= {self._library.id_to_token(token) or "": token for token in control}
        self._carried = {key: settings[key] for key in CARRIED if key in settings}
        with refuse(f"{name} is not a tokenizer.json that can be read"):
            self._tiktoken = tiktoken_encoder(self._content, self._library, self.specials)
        # Some models, such as Unigram, find a special token's spelling in their vocabulary.
        self._control = np.array([token for token in self.specials.values() if token != self.roles.get("unk")])

    def _roles(self, settings: Json) -> dict[str, int]:
        """The id of each role: of the spelling in `settings`, where null is none, or of the one usual in its class."""
        roles, usual = {}, CLASS_ROLES.get(str(settings.get("tokenizer_class")).removesuffix("Fast"))
        for role in ROLES:
            if (key := f"{role}_token") in settings:
                token = self._library.token_to_id(_spelling(settings[key]))
            elif usual is not None:
                token = self._library.token_to_id(usual.get(role, ""))
            else:
                token = next((self.specials[guess] for guess in SPELLINGS[role] if guess in self.specials), None)
            if token is not None:
                roles[role] = token
        return roles

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        library = load_library(self._content, "")
        library.encode_special_tokens = False
        return library

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The ids that the post-processor puts before a text."""
        with refuse("The tokenizer has no ids for any text"):
            plain, whole = (self._library.encode("a", add_special_tokens=around).ids for around in (False, True))
        starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        return tuple(whole[: starts[0]]) if plain and starts else ()

    @property
    def uses_tiktoken(self) -> bool:
        """Whether tiktoken encodes, and not the slower `tokenizers`."""
        return self._tiktoken is not None

    def _encode(self, text: str) -> Array:
        if self._tiktoken is not None:
            return self._tiktoken.encode(text)
        ids = library_ids(self._library, text)
        if not np.isin(ids, self._control).any():
            return ids
        halves = [half for part in self._spellings.split(text) for half in (part[:1], part[1:]) if half]
        return np.concatenate([library_ids(self._library, half) for half in halves])

    def _encode_special(self, text: str) -> Array:
        return library_ids(self._with_specials, text)

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens are spelled by `bytes_to_unicode`, so that the bytes of ids are their pieces joined."""
        return '"type": "ByteLevel"' in json.dumps(self._content.get("decoder"))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every id; empty for a special token and for an unused id."""
        added = {token.content for token in self._library.get_added_tokens_decoder().values()}
        vocab = self._library.get_vocab()
        pieces = [b""] * (max(vocab.values()) + 1)
        for spelling, token in vocab.items():
            if spelling not in self.specials:
                pieces[token] = spelling.encode() if spelling in added else self._bytes(spelling)
        return pieces

    def _bytes(self, spelling: str) -> bytes:
        """The bytes that a token of the model adds to a text, other than as its first."""
        if self.byte_level:
            with suppress(ValueError):
                return unprintable(spelling)
        if fallback := re.fullmatch("<0x([0-9A-Fa-f]{2})>", spelling):
            return bytes.fromhex(fallback[1])
        decoder = self._library.decoder
        with refuse("The tokenizer has no text for its tokens"):
            return (decoder.decode(["a", spelling])[1:] if decoder else f" {spelling}").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD."""
        if self.byte_level:
            return super().decode(ids)
        with refuse("The tokenizer has no text for these ids"):
            return str(self._library.decode([self._check_id(int(token)) for token in ids]))

    def stream(self, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """As of any tokenizer: a token's text depends on the tokens before it, and the first loses a leading space."""
        if self.byte_level:
            yield from super().stream(ids, before)
            return
        seen = list(before)
        start, shown = max(0, len(seen) - CONTEXT), len(seen)  # what was shown is decoded again from `start` on
        for token in ids:
            seen.append(int(token))
            old, now = self.decode(seen[start:shown]), self.decode(seen[start:])
            whole = len(now) > len(old) and not now.endswith("\ufffd")
            yield now[len(old) :] if whole else ""
            if whole:
                start, shown = shown, len(seen)
        yield self.decode(seen[start:])[len(self.decode(seen[start:shown])) :]

    def to_json(self) -> dict[str, Any]:
        """The content of the tokenizer.json as it was read, with END_OF_TEXT where that was added."""
        return dict(self._content)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer.json and of the id that ends a document, which tokenizer_config.json may decide."""
        return hashlib.sha256(f"{super().digest}/{self.end_of_text}".encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """The roles, null where there is none, and the entries of the original tokenizer_config.json that are kept."""
        return {f"{role}_token": None for role in ROLES} | super().settings() | self._carried


def _spelling(value: Any) -> str:
    """The spelling of a special token in tokenizer_config.json, which is a string or an object with one."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


@contextmanager
def refuse(what: str) -> Iterator[None]:
    """Turn whatever `tokenizers` raises into a UserError that begins with `what`; Rust's panics are BaseExceptions."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {' '.join(str(error).split())[:200].rstrip('.')}.") from None


def load_library(content: Json, name: str) -> tokenizers.Tokenizer:
    """The `tokenizers` object, set for data: no special tokens in a text, no truncation, padding or BPE dropout."""
    import tokenizers

    with refuse(f"{name} is not a tokenizer.json that can be read"):
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
    for token in content.get("added_tokens") or []:
        if (real := library.token_to_id(token["content"])) != token["id"]:
            raise UserError(
                f"{name} is not a tokenizer.json that can be read: it gives {token['content']!r} the id {token['id']}, "
                f"and `tokenizers` reads it as {real}, the next that is free."
            )
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    if isinstance(library.model, tokenizers.models.BPE):
        library.model.dropout = None
    return library


def add_end_of_text(content: Json, library: tokenizers.Tokenizer) -> tuple[Json, int]:
    """(content with END_OF_TEXT as the last id, that id)."""
    vocab = library.get_vocab()
    token = max(vocab.values()) + 1
    added = [*(content.get("added_tokens") or []), special_token(END_OF_TEXT, token)]
    content = {**content, "added_tokens": added}
    if token > len(vocab):  # `tokenizers` renumbers added tokens after a gap, but not the vocabulary
        content["model"] = {**content["model"], "vocab": {**content["model"]["vocab"], END_OF_TEXT: token}}
    return content, token


def library_ids(library: tokenizers.Tokenizer, text: str) -> Array:
    """`tokenizers`' ids of `text`, (n,) int32; UserError where there are none for a part of it."""
    text.encode()  # UnicodeEncodeError for half a surrogate pair, which is a TypeError in `tokenizers`
    with refuse("The tokenizer has no ids for this text"):
        return np.array(library.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)


@dataclass(frozen=True)
class TiktokenEncoder:
    """Byte-level BPE by tiktoken, between the added tokens, which are found in the text first."""

    encoding: tiktoken.Encoding
    ids: Array  # rank -> id
    added: Mapping[str, int]
    normalizer: tokenizers.normalizers.Normalizer | None

    @cached_property
    def _added(self) -> re.Pattern[str]:
        return alternatives(self.added)

    def encode(self, text: str) -> Array:
        """The ids of `text`, (n,) int32."""
        parts = self._added.split(text) if self.added else [text]
        return np.concatenate([self._part(part) for part in parts])

    def _part(self, text: str) -> Array:
        if text in self.added:
            return np.array([self.added[text]], np.int32)
        if self.normalizer is not None and not text.isascii():
            text = self.normalizer.normalize_str(text)
        ids: Array = self.ids[encode_ordinary(self.encoding, text)]
        return ids


def tiktoken_encoder(content: Json, library: tokenizers.Tokenizer, special: Iterable[str]) -> TiktokenEncoder | None:
    """An encoder with the same ids as `library`; None where its parts allow none, or `probes` show a difference."""
    model, pattern = content["model"], split_pattern(content.get("pre_tokenizer"))
    added = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    if pattern is None or type(library.model).__name__ != "BPE" or not _has_simple_parts(content, added):
        return None
    ranked = tiktoken_ranks(model, {*special, *(token["content"] for token in added)})
    if ranked is None:
        return None
    try:
        encoder = encoding([unprintable(piece) for piece in ranked], pattern)
    except ValueError:  # a pattern that its engine doesn't know
        return None
    ids = np.array([model["vocab"][piece] for piece in ranked], np.int32)
    result = TiktokenEncoder(encoder, ids, {token["content"]: token["id"] for token in added}, library.normalizer)
    same = all(np.array_equal(result.encode(text), library_ids(library, text)) for text in probes())
    return result if same else None


def _has_simple_parts(content: Json, added: list[Json]) -> bool:
    """Whether model, added tokens and normalizer have nothing that TiktokenEncoder can't do."""
    model, normalizer = content["model"], content.get("normalizer")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")):
        return False
    if any(token.get(key) for token in added for key in ("single_word", "lstrip", "rstrip")):
        return False
    # added tokens are found before the normalizer, unless they say otherwise
    forms = isinstance(normalizer, dict) and normalizer.get("type") in ("NFC", "NFD", "NFKC", "NFKD")
    return normalizer is None or (forms and not any(token.get("normalized", True) for token in added))


def split_pattern(pre_tokenizer: Any) -> str | None:
    """The one pattern that splits text as a byte-level `pre_tokenizer` does; None where there is none."""
    if not isinstance(pre_tokenizer, dict):
        return None
    *steps, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    own = last.get("use_regex", True)
    if not steps:
        return GPT2_PATTERN if own else None
    first = steps[0]
    if len(steps) == 1 and first.get("type") == "Digits" and first.get("individual_digits") and own:
        # each digit is cut off first, so spaces before one are all spaces at an end
        return GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!", r"|\s+(?=\p{N})|\s+(?!")
    whole = (first.get("behavior"), first.get("invert")) in (("Isolated", False), ("Removed", True))
    if len(steps) == 1 and first.get("type") == "Split" and whole and not own:
        return first["pattern"].get("Regex") or None
    return None


def tiktoken_ranks(model: Json, excluded: set[str]) -> list[str] | None:
    """The tokens of a byte-level BPE in merge order (tiktoken's ranks); None where tiktoken would give other ids.

    tiktoken merges any two neighbours that make a token, `tokenizers` those that `merges` lists. Both give the same
    ids where each token is reached by its own merges: then no other pair of parts ever stands there.
    """
    vocab = {piece: token for piece, token in model["vocab"].items() if piece not in excluded}
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    joined = [left + right for left, right in pairs]
    order = list(dict.fromkeys(joined))
    changes = sum(a != b for a, b in pairwise(joined)) + bool(joined)
    if changes != len(order) or not vocab.keys() >= {*CHARACTER_TO_BYTE, *order}:
        return None
    unreached = [*unreachable(vocab, pairs), *(vocab.keys() - set(order) - CHARACTER_TO_BYTE.keys())]
    if not all(set(piece) <= CHARACTER_TO_BYTE.keys() for piece in unreached):
        return None
    known, listed = set(vocab), set(pairs)
    if not model.get("ignore_merges"):
        known -= set(unreached)
        unreached = []
    for piece in unreached:  # with ignore_merges a whole word can be such a token: merges must not reach it
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        if not all(pair in listed for pair in splits if pair[0] in known and pair[1] in known):
            return None
    return [piece for piece in dict.fromkeys([*sorted(CHARACTER_TO_BYTE), *order, *unreached]) if piece in known]


def unreachable(vocab: Mapping[str, int], pairs: list[tuple[str, str]]) -> list[str]:
    """The tokens of `pairs` that BPE of their own spelling does not end in."""
    from tokenizers.models import BPE

    model = BPE(vocab=dict(vocab), merges=pairs)
    return [piece for piece in {left + right for left, right in pairs} if len(model.tokenize(piece)) != 1]


def probes() -> list[str]:
    """Texts in all scripts, with spaces, digits and marks, on which two encoders are compared."""
    spaced = [
        "I'll can't WE'VE 'S 's x'\u017f don't''re", "1 22 333 4444 12345678901234 3.14 1,000 ½ ² Ⅳ ٣", "a  b   c\t\td",
        "\n\n \n  \n\r\n\r x\n ", "  leading", "trailing  ", "a \n", "\x0b\x0c\x1c\x85\xa0\u2003\u3000 x\u200b\ufeff",
        "!!! ...--- ==>{}[] $1 #x @y\n\n", "\0\x01\x7f", "e\u0301 A\u030a ﬁ Å 각 각 が", "🙂👩‍👩‍👧 🇩🇪✈️", "", " ", "\n",
    ]  # fmt: skip
    letters = [chr(i) for i in (*range(0x20, 0x3100, 3), *range(0x3100, 0xD800, 61), *range(0xE000, 0x20000, 97))]
    runs = ["".join(letters[i : i + 24]) for i in range(0, len(letters), 24)]
    return [*spaced, *runs, *(" ".join(run) for run in runs), *("1".join(run[:8]) + "'s" for run in runs)]
