"""Tokenizers of two files: the vocab.json and merges.txt that GPT-2 brought and tokenizer.json replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twingpt.core.errors import UserError
from twingpt.core.reading import inside, read_json, read_text, short
from twingpt.core.tokenizer import PATTERNS, HuggingFaceTokenizer
from twingpt.core.tokenizer.huggingface import CLASS_ROLES, check, refuse
from twingpt.core.tokenizer.tokenizer_json import MAX_FILE, config_beside, settings_beside

VOCAB, MERGES, ADDED, SETTINGS = "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"

# The files don't say how text is split, for which transformers has a class: its normalizer and its pattern, which is
# GPT-2's where there is none.
CLASSES: Mapping[str, tuple[str | None, str | None]] = {
    "GPT2Tokenizer": (None, None),
    "GPTNeoXTokenizer": ("NFC", None),
    "Qwen2Tokenizer": ("NFC", PATTERNS["qwen2"]),
}
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def has_vocab_and_merges(folder: Path) -> bool:
    """Whether both files are in a model's folder."""
    return (folder / VOCAB).is_file() and (folder / MERGES).is_file()


def read_vocab_and_merges(folder: Path) -> HuggingFaceTokenizer:
    """The tokenizer that transformers makes of the files in a folder, as one of a tokenizer.json.

    UserError where they are damaged, or for a class of which it isn't known how it splits text.
    """
    name = str(folder / VOCAB)
    settings = settings_beside(folder, {"decoder": {"type": "ByteLevel"}}, config_beside(folder))
    settings["tokenizer_class"] = _class(folder, settings)
    vocab = read_json(inside(folder, VOCAB), MAX_FILE)
    model = {"type": "BPE", "vocab": vocab, "merges": list(_merges(folder)), "continuing_subword_prefix": ""}
    check({"model": model}, name)
    normalizer, pattern = CLASSES[settings["tokenizer_class"]]
    level = {"type": "ByteLevel", "add_prefix_space": settings.get("add_prefix_space") is True, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [split, {**level, "use_regex": False}] if pattern else [{**level, "use_regex": True}]
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if pattern else steps[0],
        "decoder": {**level, "use_regex": True},
        "model": model,
    }
    content = _with_added_tokens(content, _added_tokens(folder, settings), name)
    if settings.get("add_bos_token") is True:
        content["post_processor"] = _beginning(content["added_tokens"], settings)
    return HuggingFaceTokenizer(check(content, name), settings, name)


def _class(folder: Path, settings: Mapping[str, Any]) -> str:
    """The class of transformers that knows the split: that of the model, or the one that its own file names."""
    named = [settings["tokenizer_class"], _object(folder / SETTINGS).get("tokenizer_class")]
    names = [str(name).removesuffix("Fast") for name in named if name]
    known = next((name for name in names if name in CLASSES), None)
    if known is None:
        what = f"tokenizer_class {short(names[-1])} is not known" if names else "no tokenizer_class is named"
        raise UserError(
            f"{folder} has {VOCAB} and {MERGES}, which don't say how text is split, and {what}: only "
            f"{', '.join(CLASSES)} are. transformers writes a tokenizer.json, by "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    return known


def _object(path: Path) -> dict[str, Any]:
    content = read_json(inside(path.parent, path.name)) if path.exists() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content


def _merges(folder: Path) -> Iterator[list[str]]:
    """The pairs of merges.txt, one a line, after a line with its version."""
    for number, line in enumerate(read_text(inside(folder, MERGES), MAX_FILE).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"Line {number} of {folder / MERGES} is not a pair of tokens: {short(line)}.")
        yield pair


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield added tokens, each with the id that a file gives it: listed ones by id, then special ones that are named.

    They are listed in tokenizer_config.json, or in the older added_tokens.json, which has their ids alone.
    """
    roles = {f"{role}_token": spelling for role, spelling in CLASS_ROLES[settings["tokenizer_class"]].items()}
    named = [value for key, value in {**roles, **settings}.items() if key in NAMED and value]
    extra = [value for key in EXTRA if isinstance(settings.get(key), list) for value in settings[key]]
    special = [_token(value, special=True) for value in [*named, *extra]]
    spellings = {token["content"] for token in special}
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        described = [(int(key) if str(key).isdecimal() else -1, value) for key, value in listed.items()]
    else:
        described = [(token, spelling) for spelling, token in _object(folder / ADDED).items()]
    if any(type(token) is not int or not isinstance(value, (str, dict)) for token, value in described):
        raise UserError(f"The added tokens in {folder} are not tokens and their ids.")
    for token, value in sorted(described, key=lambda item: item[0]):
        yield token, _token(value, special=_token(value, special=False)["content"] in spellings)
    yield from ((None, token) for token in special)


def _token(value: Any, *, special: bool) -> dict[str, Any]:
    """An added token as `tokenizers` describes one, of a spelling or such a description."""
    own = value if isinstance(value, dict) else {"normalized": not special}
    content = own.get("content") if isinstance(value, dict) else value
    flags = {key: own.get(key) is True for key in FLAGS}
    return {"content": str(content), **flags, "special": special or own.get("special") is True}


def _beginning(added: list[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The post-processor that puts BOS before a text; None where there is no BOS."""
    usual = CLASS_ROLES[settings["tokenizer_class"]].get("bos")
    bos = _token(settings.get("bos_token", usual), special=True)["content"]
    token = next((entry["id"] for entry in added if entry["content"] == bos), None)
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB"))
    if token is None:
        return None
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
    }


def _with_added_tokens(
    content: Mapping[str, Any], added: Iterator[tuple[int | None, dict[str, Any]]], name: str
) -> dict[str, Any]:
    """A tokenizer.json with added tokens, which have their ids in the vocabulary, or the next after it."""
    import tokenizers

    with refuse(f"{name} and {MERGES} are not a tokenizer that can be read"):
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
        for wanted, token in added:
            known = library.get_added_tokens_decoder().values()
            if token["content"] not in {entry.content for entry in known}:
                library.add_tokens([tokenizers.AddedToken(**token)])
            if wanted not in (None, library.token_to_id(token["content"])):
                raise UserError(f"{name} leaves no room for the added token {short(token['content'])} at {wanted}.")
        return dict(json.loads(library.to_str()))
