"""What a tokenizer can't spell: ids of its unknown token, and characters that leave nothing in any id."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from twingpt.core.tokenizer import HuggingFaceTokenizer, Tokenizer

Array = np.ndarray

MOST = 1 / 3  # a larger share of a text that can't be spelled is an error


@dataclass(frozen=True)
class Unspelled:
    """Of a text, the ids that are the unknown token, of all, and the characters that are lost, of all."""

    unknown: int = 0
    ids: int = 0
    lost: int = 0
    characters: int = 0

    def __add__(self, other: Unspelled) -> Unspelled:
        return Unspelled(
            self.unknown + other.unknown,
            self.ids + other.ids,
            self.lost + other.lost,
            self.characters + other.characters,
        )

    @property
    def share(self) -> float:
        """The share of ids or of characters, whichever is larger: one unknown id may stand for many characters."""
        return max(self.unknown / max(1, self.ids), self.lost / max(1, self.characters))


@dataclass(frozen=True)
class Spelling:
    """Counts what a tokenizer that is not of bytes can't spell; `unknown` is the id that it has for that."""

    tokenizer: HuggingFaceTokenizer
    unknown: int | None
    by_character: bool  # whether a text is spelled by its characters, as by BPE and Unigram, and not by words
    _lost: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Spelling | None:
        """That of a tokenizer; None where it spells everything, or raises for what it can't."""
        if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.byte_level:
            return None
        content = tokenizer.to_json()
        model, added = content["model"], content.get("added_tokens") or []
        if isinstance(model["vocab"], list):  # Unigram
            return cls(tokenizer, model.get("unk_id"), by_character=True)
        ids = {**{token["content"]: token["id"] for token in added}, **model["vocab"]}
        return cls(tokenizer, ids.get(model.get("unk_token")), by_character="merges" in model)

    def count(self, text: str, ids: Array) -> Unspelled:
        """What is not spelled of a text with these ids."""
        characters = Counter(text if self.by_character else "")
        lost = sum(count for character, count in characters.items() if self._is_lost(character))
        return Unspelled(int((ids == self.unknown).sum()) if self.unknown is not None else 0, len(ids), lost, len(text))

    def _is_lost(self, character: str) -> bool:
        """Whether a character leaves nothing; spaces, marks and control characters are a normalizer's to drop."""
        if character not in self._lost:
            drops = unicodedata.category(character)[0] in "ZCM"
            pieces = self.tokenizer.pieces
            ids = () if drops else self.tokenizer.encode(character)
            spelled = b"".join(pieces[token] for token in ids if token != self.unknown)
            self._lost[character] = not drops and not spelled.strip()
        return self._lost[character]
