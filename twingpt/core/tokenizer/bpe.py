"""Byte-level BPE: trained by `tokenizers`, encoded by tiktoken, written as a tokenizer.json with the same ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.tokenizer.base import END_OF_TEXT, Array, Tokenizer, build_json

if TYPE_CHECKING:
    import tiktoken

# Pre-tokenization: the patterns that split text before BPE, in syntax that tiktoken and `tokenizers` both read.
# llama.cpp and others recognise the first three by their text: they must stay as they are.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2_PATTERN, "llama3": LLAMA3_PATTERN, "qwen2": LLAMA3_PATTERN.replace("{1,3}", "")}

# tiktoken's cl100k_base without its possessive quantifiers: {1,3}+ means something else to `tokenizers`, and the
# others are for speed. It takes spaces at the end of the text as one word.
CL100K_PATTERN = LLAMA3_PATTERN.replace(r"|\s*[\r\n]+", r"|\s+\z|\s*[\r\n]+")
_MARK, _SMALL, _LARGE = r"[^\r\n\p{L}\p{N}]?", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"{_MARK}{_LARGE}*{_SMALL}+{_SHORT}|{_MARK}{_LARGE}+{_SMALL}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN_PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k_base": CL100K_PATTERN, "o200k_base": O200K_PATTERN}

CHAT = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class BPETokenizer(Tokenizer):
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), encoded by tiktoken.

    A token's id is its rank, the order in which its merge was learned. `specials` (END_OF_TEXT alone by default) come
    after all ranks. `merge_list` is derived from `pieces` where it is not given, which is slow.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        pattern: str = GPT2_PATTERN,
        kind: str = "bpe",
        specials: Mapping[str, int] | None = None,
        merge_list: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        self.kind, self.pattern, self.ranked = kind, pattern, list(pieces)
        self.specials = dict(specials or {END_OF_TEXT: len(self.ranked)})
        self.end_of_text = self.specials[END_OF_TEXT]
        self.roles = dict.fromkeys(("bos", "eos", "pad"), self.end_of_text)
        if merge_list is not None:
            self.merges = merge_list
        self._encoding = encoding(self.ranked, pattern)

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pair that each token of two or more bytes merges, by rank."""
        return merges(self.ranked)

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every id; empty for a special token and for an unused id."""
        size = max(len(self.ranked), *(token + 1 for token in self.specials.values()))
        return self.ranked + [b""] * (size - len(self.ranked))

    def _encode(self, text: str) -> Array:
        return encode_ordinary(self._encoding, text)

    def to_json(self) -> dict[str, Any]:
        """A byte-level BPE. `tokenizers` numbers added tokens on from the vocabulary: other specials go into it."""
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        model = bpe_model(self.ranked, self.merges)
        if sorted(self.specials.values()) != list(range(len(self.ranked), self.vocab_size)):
            model["vocab"] |= self.specials
        return build_json(model, {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}, BYTE_LEVEL, self.specials)

    def settings(self) -> dict[str, Any]:
        """The roles, and the chat template where the tokenizer has the CHAT tokens."""
        chat = {"chat_template": CHAT_TEMPLATE} if set(CHAT) <= set(self.specials) else {}
        return super().settings() | chat


def encoding(ranked: Sequence[bytes], pattern: str) -> tiktoken.Encoding:
    """A tiktoken encoding whose ids are the indices in `ranked`, the tokens in the order of their merges."""
    import tiktoken

    ranks = {piece: i for i, piece in enumerate(ranked)}
    return tiktoken.Encoding(
        "twingpt", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def encode_ordinary(encoding: tiktoken.Encoding, text: str) -> Array:
    """The ranks of `text`, (n,) int32, special tokens spelled out as data; runs that would crash tiktoken are cut."""
    runs = split_runs(text, LONG_RUN_TO_ENCODE)
    parts = [encoding.encode_to_numpy(run, disallowed_special=()).view(np.int32) for run in runs]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# tiktoken's regex engine overflows its stack on a run of a million spaces, and training BPE on one word of 100,000
# letters takes minutes. No text that people wrote has such runs.
LONG_RUN_TO_ENCODE, LONG_RUN_TO_LEARN = 100_000, 1_000
LONGEST_TOKEN, LARGEST_VOCABULARY = 64, 1_000_000

_RUN = re.compile(r"\s+|\S+")


def split_runs(text: str, length: int) -> list[str]:
    """The text in parts, cut only within runs of at least `length` spaces or non-spaces; none of 2 `length` is left.

    A run of twice the length covers a whole block from a multiple of `length` to the next: these blocks are parts.
    """
    cuts = [0]
    for start in range(0, len(text) - length + 1, length):
        run = _RUN.match(text, start, start + length)
        if run and run.end() == start + length:
            cuts += [start, start + length]
    return [text[start:end] for start, end in pairwise([*cuts, len(text)]) if start < end] or [text]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's `bytes_to_unicode`: the printable character that tokenizer.json has for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTE_TO_CHARACTER = _bytes_to_unicode()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


_CHARACTER_TO_LATIN = dict.fromkeys(range(256), 65535) | {ord(c): byte for c, byte in CHARACTER_TO_BYTE.items()}


def printable(piece: bytes) -> str:
    """A token's bytes as tokenizer.json spells them, by `bytes_to_unicode`."""
    return piece.decode("latin-1").translate(BYTE_TO_CHARACTER)


def unprintable(piece: str) -> bytes:
    """The inverse of `printable`; ValueError for another spelling."""
    return piece.translate(_CHARACTER_TO_LATIN).encode("latin-1")


def bpe_model(pieces: Sequence[bytes], merge_list: Sequence[tuple[bytes, bytes]]) -> dict[str, Any]:
    """The `model` of a tokenizer.json."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {printable(piece): i for i, piece in enumerate(pieces)},
        "merges": [[printable(left), printable(right)] for left, right in merge_list],
    }


def merges(pieces: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of two or more bytes merges: what BPE by the lower ranks alone leaves of it."""
    ranks = {piece: i for i, piece in enumerate(pieces)}
    pairs = []
    for piece in pieces:
        if len(piece) < 2:
            continue
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            i = min(range(len(joined)), key=joined.__getitem__)
            if joined[i] >= ranks[piece]:
                raise UserError(f"The token {piece!r} can't be reached by merges of lower-ranked tokens.")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def tiktoken_named(name: str) -> BPETokenizer:
    """OpenAI's encoding `name` (a key of TIKTOKEN_PATTERNS), from tiktoken's cache or the network; else UserError."""
    import tiktoken

    try:
        theirs = tiktoken.get_encoding(name)
    except Exception as error:  # requests' and tiktoken's own, of any kind
        raise UserError(
            f"tiktoken could not fetch its {name} vocabulary: connect once, or set TIKTOKEN_CACHE_DIR to a "
            f"folder that has it ({type(error).__name__})."
        ) from error
    specials = {spelling: theirs.encode_single_token(spelling) for spelling in theirs.special_tokens_set}
    pieces = [theirs.decode_single_token_bytes(i) for i in range(len(theirs.token_byte_values()))]
    by_id = dict(sorted(specials.items(), key=lambda item: item[1]))
    return BPETokenizer(pieces, TIKTOKEN_PATTERNS[name], name, by_id)
