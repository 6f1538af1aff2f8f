"""Character and byte tokenizers: one id for each."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.tokenizer.base import END_OF_TEXT, Array, Tokenizer, build_json
from twingpt.core.tokenizer.bpe import BYTE_LEVEL, bpe_model


class _Alphabet(Tokenizer):
    """One id for each of a fixed list of pieces, and END_OF_TEXT as the last."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = [*pieces, b""]
        self.end_of_text = len(self._pieces) - 1
        self.specials = {END_OF_TEXT: self.end_of_text}
        self.roles = dict.fromkeys(("bos", "eos", "pad"), self.end_of_text)

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of every id; empty for END_OF_TEXT."""
        return self._pieces


class CharTokenizer(_Alphabet):
    """One id for each character of an alphabet, in code point order; UserError for any other character."""

    kind = "char"

    def __init__(self, alphabet: Iterable[str]) -> None:
        self.alphabet = sorted(set(alphabet))
        self._ids = {character: i for i, character in enumerate(self.alphabet)}
        super().__init__(character.encode() for character in self.alphabet)

    def _encode(self, text: str) -> Array:
        try:
            return np.fromiter((self._ids[c] for c in text), np.int32, len(text))
        except KeyError as error:
            raise UserError(
                f"The character {error.args[0]!r} is not among the {len(self.alphabet)} that this tokenizer "
                "knows: leave it out, or train with --tokenizer bpe or byte."
            ) from None

    def to_json(self) -> dict[str, Any]:
        """A WordLevel model over single characters."""
        vocab = {**self._ids, END_OF_TEXT: self.end_of_text}
        return build_json(
            {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"},
            {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
            {"type": "Fuse"},
            self.specials,
        )


class ByteTokenizer(_Alphabet):
    """One id for each byte of UTF-8."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__(bytes([i]) for i in range(256))

    def _encode(self, text: str) -> Array:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    @cached_property
    def _json(self) -> dict[str, Any]:
        return build_json(bpe_model(self.pieces[:256], []), BYTE_LEVEL, BYTE_LEVEL, self.specials)

    def to_json(self) -> dict[str, Any]:
        """A byte-level BPE without merges."""
        return self._json
