"""Writing and reading tokenizer.json and tokenizer_config.json, the two files of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twingpt.core.errors import UserError
from twingpt.core.reading import inside, read_json, read_text
from twingpt.core.tokenizer.base import END_OF_TEXT, Tokenizer
from twingpt.core.tokenizer.bpe import TIKTOKEN_PATTERNS, BPETokenizer, bpe_model, unprintable
from twingpt.core.tokenizer.char_and_byte import ByteTokenizer, CharTokenizer
from twingpt.core.tokenizer.huggingface import MODEL_CLASSES, ONLY_CLASSES, HuggingFaceTokenizer, check, unreachable

LEARNED = ("bpe", "char")
TOKENIZERS = (*LEARNED, "byte", *TIKTOKEN_PATTERNS)
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
GIVE_ONE = "gpt convert --tokenizer gives it one"  # of a model without
MAX_FILE = 2**26  # bytes: twice the largest that a known model has


def files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """File name -> content of tokenizer.json and tokenizer_config.json."""
    own = tokenizer.settings()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **own,
        "clean_up_tokenization_spaces": own.get("clean_up_tokenization_spaces", False),
        "model_max_length": block_size,
        "twingpt": {"kind": tokenizer.kind},
    }
    content = tokenizer.to_json()
    if tokenizer.kind == "char" and "▁" not in content["model"]["vocab"]:
        # mlx-lm knows this decoder. With another it encodes "a ,b" as it loads, which not every alphabet can.
        steps = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}
        content["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    return {FILE: json.dumps(content, ensure_ascii=False), SETTINGS: json.dumps(settings, indent=2)}


def load(folder: Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """Read the tokenizer.json of `folder` and what is beside it, but for its config.json where `config` is given.

    Raises UserError where it is missing or broken, or where twingpt wrote it and it has been altered since.
    """
    if not (folder / FILE).exists():
        raise UserError(f"{folder} has no {FILE}, so its tokens have no text until {GIVE_ONE}.")
    for name in (FILE, SETTINGS, "special_tokens_map.json"):
        if (folder / name).exists():
            inside(folder, name)
    return load_file(folder / FILE, config)


def load_file(path: Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
    """`load` for a tokenizer.json under any name."""
    content = check(read_json(path, MAX_FILE), str(path))
    settings = settings_beside(path.parent, content, config_beside(path.parent) if config is None else config)
    written = settings.get("twingpt")
    kind = written.get("kind") if isinstance(written, dict) else None
    if kind not in TOKENIZERS:
        return HuggingFaceTokenizer(content, settings, str(path))
    try:
        return _own(content, kind)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"The tokenizer {path} has been altered since twingpt wrote it.") from None


def config_beside(folder: Path) -> dict[str, Any]:
    """The config.json beside a tokenizer; nothing for one that isn't a model's, without which a tokenizer is whole."""
    try:
        return _json_object(folder / "config.json")
    except UserError:
        return {}


def settings_beside(folder: Path, content: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `folder` says of its tokenizer, as transformers resolves it (docs/resolution.md)."""
    settings = _json_object(folder / SETTINGS)
    if "added_tokens_decoder" not in settings:  # older files, which special_tokens_map.json goes before
        named = _json_object(folder / "special_tokens_map.json")
        settings |= {key: value for key, value in named.items() if key.endswith("_token")}
    places = [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    texts = {path.stem: read_text(inside(path.parent, path.name)) for path in places if path.exists()}
    if texts:
        default = texts.pop("chat_template", None)
        several = [{"name": name, "template": text} for name, text in {"default": default, **texts}.items() if text]
        settings["chat_template"] = several if texts else default
    model, declared = str(config.get("model_type")), settings.get("tokenizer_class") or config.get("tokenizer_class")
    if '"ByteLevel"' in json.dumps(content.get("decoder")) and str(declared).startswith("LlamaTokenizer"):
        declared = "TokenizersBackend"  # as the class can't compute it
    settings["tokenizer_class"] = ONLY_CLASSES.get(model) or declared or MODEL_CLASSES.get(model)
    return settings


def _json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file, empty where there is none; UserError for anything else."""
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content


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
