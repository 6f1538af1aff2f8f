"""Tokenizers by kind or by place, and the two files that each is kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twingpt.core import runs
from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import expand
from twingpt.core.reading import inside, read_json
from twingpt.core.tokenizer.base import END_OF_TEXT, Tokenizer
from twingpt.core.tokenizer.bpe import (
    TIKTOKEN_PATTERNS,
    BPETokenizer,
    bpe_model,
    tiktoken_named,
    train_bpe,
    unprintable,
)
from twingpt.core.tokenizer.foreign import ForeignTokenizer, check, unreachable
from twingpt.core.tokenizer.plain import ByteTokenizer, CharTokenizer

LEARNED = ("bpe", "char")
TOKENIZERS = (*LEARNED, "byte", *TIKTOKEN_PATTERNS)
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
MAX_FILE = 2**26  # bytes: twice the largest that a known model has


def make(kind: str, texts: Iterable[str], all_texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer called `kind` in TOKENIZERS, learned from the training `texts` where it learns, or that `find`s.

    A character tokenizer takes its alphabet from `all_texts`, or held-out text could not be read.
    """
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    if kind == "char":
        return CharTokenizer(set().union(*map(set, all_texts)))
    return find(kind)


def find(name: str) -> Tokenizer:
    """A tokenizer that is there: of a kind that learns nothing, a tokenizer.json, its folder, or a run or checkpoint.

    Raises UserError where there is none, or its files are broken.
    """
    if name == "byte":
        return ByteTokenizer()
    if name in TIKTOKEN_PATTERNS:
        return tiktoken_named(name)
    if name in LEARNED:
        raise UserError(f"The tokenizer {name} is learned from a text: give a tokenizer.json, its folder, or a run.")
    path = expand(name)
    if path.is_file():
        return load_file(path)
    if (path / FILE).is_file():
        return load(path)
    try:
        checkpoint = runs.resolve(name)
    except UserError:
        if path.is_dir():
            raise UserError(
                f"{name} has no {FILE}: transformers writes one for what it reads, by "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            ) from None
        if path.suffix or os.sep in name or "@" in name:
            raise UserError(f"There is no tokenizer {name}: give a tokenizer.json, its folder, or a run.") from None
        raise unknown_choice("tokenizer", name, TOKENIZERS) from None
    return load(checkpoint)


def files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """The text of tokenizer.json and tokenizer_config.json, by file name."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.settings(),
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        "twingpt": {"kind": tokenizer.kind},
    }
    return {FILE: json.dumps(tokenizer.to_json(), ensure_ascii=False), SETTINGS: json.dumps(settings, indent=2)}


def load(folder: Path) -> Tokenizer:
    """The tokenizer whose tokenizer.json is in `folder`, with the tokenizer_config.json beside it if there is one.

    Raises UserError where it is missing or broken, or where twingpt wrote it and it has been altered.
    """
    if not (folder / FILE).exists():
        raise UserError(f"{folder} has no {FILE}, so its tokens have no text.")
    for name in (FILE, SETTINGS):
        if (folder / name).exists():
            inside(folder, name)
    return load_file(folder / FILE)


def load_file(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json of any name; see `load`."""
    content, beside = check(read_json(path, MAX_FILE), str(path)), path.with_name(SETTINGS)
    settings = read_json(beside) if beside.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{beside} is not a tokenizer_config.json.")
    template = path.with_name("chat_template.jinja")
    if template.is_file() and "chat_template" not in settings:
        settings["chat_template"] = template.read_text("utf-8", errors="replace")
    written = settings.get("twingpt")
    kind = written.get("kind") if isinstance(written, dict) else None
    if kind not in TOKENIZERS:
        return ForeignTokenizer(content, settings, str(path))
    try:
        return _own(content, kind)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"The tokenizer {path} has been altered since twingpt wrote it.") from None


def _own(content: Any, kind: str) -> Tokenizer:
    """A tokenizer of ours, whose ids mean what they meant; ValueError and the like where the file was altered."""
    specials = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = {piece: token for piece, token in content["model"]["vocab"].items() if piece not in specials}
    if END_OF_TEXT not in specials:
        raise ValueError
    if kind not in ("char", "byte"):
        return _own_bpe(content, kind, vocab, specials)
    tokenizer = CharTokenizer(vocab) if kind == "char" else ByteTokenizer()
    if tokenizer.to_json()["model"] != content["model"]:
        raise ValueError
    return tokenizer


def _own_bpe(content: Any, kind: str, vocab: dict[str, int], specials: dict[str, int]) -> Tokenizer:
    """A byte-level BPE of ours; its merges are checked, since working them out again takes far longer."""
    model, ranked = content["model"], sorted(vocab, key=vocab.__getitem__)
    pairs = [(left, right) for left, right in model["merges"]]
    if {**model, "vocab": {}, "merges": []} != bpe_model([], []) or [*map(vocab.get, ranked)] != [*range(len(ranked))]:
        raise ValueError
    if [piece for piece in ranked if len(piece) > 1] != [left + right for left, right in pairs]:
        raise ValueError
    if not vocab.keys() >= {part for pair in pairs for part in pair} or unreachable(vocab, pairs):
        raise ValueError
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    merge_list = [(unprintable(left), unprintable(right)) for left, right in pairs]
    return BPETokenizer([*map(unprintable, ranked)], pattern, kind, specials, merge_list)
