"""The Tokenizer base class: encode, decode, stream, special tokens, and what is written of a tokenizer."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from twingpt.core.errors import UserError

Array = np.ndarray

END_OF_TEXT = "<|endoftext|>"
ROLES = ("bos", "eos", "pad", "unk")  # of special tokens, as tokenizer_config.json has them


class Tokenizer(ABC):
    """Text to ids and back. The spelling of a special token in a text is data, unless `special` is asked for."""

    kind: str
    specials: Mapping[str, int]  # spelling -> id
    roles: Mapping[str, int]  # those of ROLES that the tokenizer has -> id
    end_of_text: int  # the id that ends a document

    @property
    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The bytes of every id; empty for a special token and for an unused id."""

    @abstractmethod
    def _encode(self, text: str) -> Array:
        """The ids of `text` without special tokens, (n,) int32."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The content of a tokenizer.json, as Hugging Face's `tokenizers` reads it."""

    def encode(self, text: str, *, special: bool = False) -> Array:
        """The ids of `text`, (n,) int32; with `special`, the spelling of a special token becomes that token.

        Raises UserError for a text that the tokenizer can't encode, or that is no valid Unicode.
        """
        try:
            return self._encode_special(text) if special else self._encode(text)
        except UnicodeEncodeError as error:
            raise UserError(
                f"The text is not valid Unicode: character {error.start} is half a surrogate pair, "
                "which stands for no character."
            ) from None

    def _encode_special(self, text: str) -> Array:
        parts = self._spellings.split(text)
        ids = [np.array([self.specials[p]], np.int32) if p in self.specials else self._encode(p) for p in parts if p]
        return np.concatenate([np.empty(0, np.int32), *ids])

    @cached_property
    def _spellings(self) -> re.Pattern[str]:
        return alternatives(self.specials)

    @property
    def opening(self) -> tuple[int, ...]:
        """The ids, such as BOS, that the tokenizer puts before a prompt; training data has none."""
        return ()

    @property
    def vocab_size(self) -> int:
        """The number of ids, special and unused ones included."""
        return len(self.pieces)

    @cached_property
    def byte_lengths(self) -> Array:
        """The bytes of text of each id, (vocab_size,) int64; 0 for a special token."""
        return np.fromiter(map(len, self.pieces), np.int64, self.vocab_size)

    def _check_id(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise UserError(f"Token id {token} is outside the vocabulary, 0 to {self.vocab_size - 1}.")
        return token

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id, empty for a special token; UserError outside the vocabulary."""
        return self.pieces[self._check_id(token)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """Streaming decode: a text for each id, empty while a UTF-8 character is incomplete; at last the rest.

        The ids `before` them, of a prompt, have no text here, but may decide on a space at the beginning.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            yield decoder.decode(self.token_bytes(int(token)))
        yield decoder.decode(b"", final=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer.json: the same ids for the same text."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """The entries of tokenizer_config.json that differ between tokenizers."""
        spelled = {token: spelling for spelling, token in self.specials.items()}
        return {f"{role}_token": spelled[token] for role, token in self.roles.items()}


def alternatives(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of `spellings`, the longest first, in one group, for `split`; without any, nothing."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def special_token(spelling: str, token: int) -> dict[str, Any]:
    """A special token among the `added_tokens` of a tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": spelling, **flags}


def build_json(
    model: Mapping[str, Any], pre_tokenizer: Mapping[str, Any], decoder: Mapping[str, Any], specials: Mapping[str, int]
) -> dict[str, Any]:
    """The content of a tokenizer.json without normalizer and post-processor."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(spelling, token) for spelling, token in specials.items()],
        "normalizer": None,
        "pre_tokenizer": dict(pre_tokenizer),
        "post_processor": None,
        "decoder": dict(decoder),
        "model": dict(model),
    }
