"""Writing and reading tokenizer.json and tokenizer_config.json, the two files of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twingpt.core.errors import UserError
from twingpt.core.reading import inside, read_json
from twingpt.core.tokenizer.base import END_OF_TEXT, Tokenizer
from twingpt.core.tokenizer.bpe import (
    TIKTOKEN_PATTERNS,
    BPETokenizer,
    bpe_model,
    unprintable,
)
from twingpt.core.tokenizer.char_and_byte import ByteTokenizer, CharTokenizer
from twingpt.core.tokenizer.huggingface import HuggingFaceTokenizer, check, unreachable

LEARNED = ("bpe", "char")
TOKENIZERS = (*LEARNED, "byte", *TIKTOKEN_PATTERNS)
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
MAX_FILE = 2**26  # bytes: twice the largest that a known model has


def files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """File name -> content of tokenizer.json and tokenizer_config.json."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.settings(),
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        "twingpt": {"kind": tokenizer.kind},
    }
    return {FILE: json.dumps(tokenizer.to_json(), ensure_ascii=False), SETTINGS: json.dumps(settings, indent=2)}


def load(folder: Path) -> Tokenizer:
    """Read the tokenizer.json of `folder`, and the tokenizer_config.json beside it where there is one.

    Raises UserError where it is missing or broken, or where twingpt wrote it and it has been altered since.
    """
    if not (folder / FILE).exists():
        raise UserError(f"{folder} has no {FILE}, so its tokens have no text.")
    for name in (FILE, SETTINGS):
        if (folder / name).exists():
            inside(folder, name)
    return load_file(folder / FILE)


def load_file(path: Path) -> Tokenizer:
    """`load` for a tokenizer.json under any name."""
    content, beside = check(read_json(path, MAX_FILE), str(path)), path.with_name(SETTINGS)
    settings = read_json(beside) if beside.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{beside} is not a tokenizer_config.json.")
    template = path.with_name("chat_template.jinja")
    if template.is_file() and "chat_template" not in settings:
        settings["chat_template"] = template.read_text("utf-8-sig", errors="replace")
    written = settings.get("twingpt")
    kind = written.get("kind") if isinstance(written, dict) else None
    if kind not in TOKENIZERS:
        return HuggingFaceTokenizer(content, settings, str(path))
    try:
        return _own(content, kind)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"The tokenizer {path} has been altered since twingpt wrote it.") from None


def _own(content: Any, kind: str) -> Tokenizer:
    """A tokenizer that twingpt wrote; ValueError, KeyError and the like where the file was altered."""
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
    """A byte-level BPE that twingpt wrote; its merges are checked, which is far quicker than deriving them."""
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
