"""Tokenizers as GGUF has them: tokens, their types and merges or scores by id, and the name of a way to split text.

llama.cpp has two that are read and written here. "gpt2" is byte-level BPE, for which it splits text into words by code
that it knows by name. "llama" is SentencePiece's BPE: of all neighbours whose text together is a token it merges those
with the highest score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from twingpt.core.errors import UserError
from twingpt.core.reading import short
from twingpt.core.tokenizer import PATTERNS, HuggingFaceTokenizer, Tokenizer
from twingpt.core.tokenizer.huggingface import check, unreachable

Json = Mapping[str, Any]
Pair = tuple[str, str]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, by the format's numbers
NO_MERGE = "À À"  # of two bytes that UTF-8 has not: llama.cpp wants merges, and a tokenizer of bytes has none
SPACE = "▁"  # SentencePiece's
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # ours -> those of a file's keys
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# How text is split -> llama.cpp's names for it, of which the first is written; DIGITS is GPT-2's, each digit apart.
GPT2, LLAMA3, QWEN2, DIGITS = PATTERNS["gpt2"], PATTERNS["llama3"], PATTERNS["qwen2"], "digits"
SPLITS = {
    GPT2: ("gpt-2", "olmo", "phi-2", "jina-es", "jina-de", "mpt", "jais", "trillion", "granite-docling"),
    LLAMA3: ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "pixtral"),
    QWEN2: ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"),
    DIGITS: ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")  # a word that is a token is not merged
WITHOUT_WHOLE_WORDS = {"llama-bpe": "dbrx"}


class UnknownTokenizerError(UserError):
    """A tokenizer that is in a file, and that none here computes: its model is read without it."""


def vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """A tokenizer as a file's metadata, for a model of `size` ids.

    Raises UserError for one that llama.cpp has not, or with more ids than the model.
    """
    content = tokenizer.to_json()
    model, beside = content["model"], {entry["id"]: entry for entry in content["added_tokens"]}
    found = _byte_level(content) or _sentencepiece(content)
    if found is None:
        raise UserError(
            f"GGUF has no form for a tokenizer of kind {tokenizer.kind}: llama.cpp knows byte-level BPE, split as by "
            "GPT-2, Llama 3, Qwen 2 or SmolLM, and SentencePiece's BPE with bytes for what it doesn't know."
        )
    tokens: dict[int, str] = {token: piece for piece, token in model["vocab"].items()}
    needed = [*tokenizer.roles.values(), tokenizer.end_of_text, *(tokens.keys() - beside.keys())]
    if max(needed) >= size:  # but for special tokens of no role, such as an image's in Gemma 3's models of text
        raise UserError(f"The tokenizer has more ids than the model, whose vocabulary is of {size}.")
    spelled = [beside[i]["content"] if i in beside else tokens.get(i, f"[PAD{i}]") for i in range(size)]
    types = [_token_type(i, spelled[i], tokens, beside, model.get("unk_token")) for i in range(size)]
    if "scores" in found:
        found["scores"] = [float(found["scores"].get(piece, -len(spelled))) for piece in spelled]
    found |= {"tokens": spelled, "token_type": types, "add_bos_token": tokenizer.roles.get("bos") in tokenizer.opening}
    roles = {"bos": tokenizer.end_of_text, "eos": tokenizer.end_of_text, **tokenizer.roles}
    found |= {f"{ROLES[role]}_token_id": token for role, token in roles.items()}
    if template := tokenizer.settings().get("chat_template"):
        found["chat_template"] = template
    return {f"tokenizer.{key if key == 'chat_template' else f'ggml.{key}'}": value for key, value in found.items()}


def _token_type(
    token: int, spelled: str, tokens: Mapping[int, str], beside: Mapping[int, Json], unknown: str | None
) -> int:
    if token in beside and spelled != unknown:  # those that are not special are taken from any text
        return CONTROL if beside[token].get("special") else USER_DEFINED
    if token not in tokens and token not in beside:
        return UNUSED
    if spelled == unknown:
        return UNKNOWN
    return BYTE if unknown is not None and spelled in BYTES else NORMAL


def _pairs(model: Json) -> list[Pair]:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", [])]


def _byte_level(content: Json) -> dict[str, Any] | None:
    """Merges and the name of the split of a byte-level BPE; None for any other tokenizer."""
    model, split = content["model"], split_name(content["pre_tokenizer"])
    normalizer = content.get("normalizer") or {"type": "NFC"}  # which llama.cpp leaves to whoever wrote the text
    pairs = _pairs(model)
    if (
        model.get("type") != "BPE"
        or split is None
        or normalizer.get("type") != "NFC"
        or any(len(p) != 2 for p in pairs)
    ):
        return None
    if any(token.get(key) for token in content["added_tokens"] for key in ("single_word", "lstrip", "rstrip")):
        return None
    whole_words = bool(model.get("ignore_merges"))
    if whole_words != (split in WHOLE_WORDS) and unreachable(model["vocab"], pairs):
        split = None if whole_words else WITHOUT_WHOLE_WORDS[split]
    if split is None:
        return None
    merges = [f"{left} {right}" for left, right in pairs] or [NO_MERGE]
    return {"model": "gpt2", "pre": split, "merges": merges}


def split_name(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text into words, or None where it has none."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own = steps[-1].get("use_regex", True)
    if len(steps) == 1:  # GPT-2's own, or single bytes, for which all splits are the same
        return SPLITS[GPT2][0]
    if len(steps) > 2:
        return None
    if steps[0].get("type") == "Digits" and steps[0].get("individual_digits") and own:
        return SPLITS[DIGITS][0]
    pattern = steps[0].get("pattern")
    known = SPLITS.get(pattern.get("Regex", "")) if isinstance(pattern, dict) and not own else None
    return known[0] if known else None


def _sentencepiece(content: Json) -> dict[str, Any] | None:
    """The scores of a SentencePiece BPE, by token, and whether a space comes first; None for any other tokenizer."""
    model, prefix = content["model"], _space_first(content)
    if model.get("type") != "BPE" or prefix is None or not model.get("byte_fallback") or model.get("ignore_merges"):
        return None
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        return None
    vocab, pairs = model["vocab"], _pairs(model)
    added = {entry["content"] for entry in content["added_tokens"]}
    if not set(BYTES) <= vocab.keys() or {pair for pair in _splits(vocab) if "".join(pair) not in added} - set(pairs):
        return None  # llama.cpp would merge where no merge is
    order = list(dict.fromkeys(left + right for left, right in pairs))
    # What is added is found before anything is merged, and what is left of it (Gemma's runs of spaces) ends as one
    # token by whichever merges.
    joined = [left + right for left, right in pairs if left + right not in added]
    if sum(a != b for a, b in pairwise(joined)) + bool(joined) != len(set(joined)):
        return None  # merges into one token have not one rank
    return {"model": "llama", "pre": "default", "scores": {piece: -i for i, piece in enumerate(order)},
            "add_space_prefix": prefix}  # fmt: skip


def _splits(vocab: Iterable[str]) -> set[Pair]:
    """All pairs of tokens whose text together is a token."""
    known = set(vocab)
    cuts = ((piece[:i], piece[i:]) for piece in known for i in range(1, len(piece)))
    return {(left, right) for left, right in cuts if left in known and right in known}


def _space_first(content: Json) -> bool | None:
    """Whether text gets a space at its beginning, where spaces become SPACE and nothing else happens to it; or None."""
    normalizer, before = content.get("normalizer"), content.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if before and before.get("type") == "Split" and before.get("pattern") == {"String": " "} and steps == [replaces]:
        before = None  # there are no spaces any more
    if before and before.get("type") == "Metaspace" and not steps and not before.get("split", True):
        scheme = before.get("prepend_scheme", "always")
        return scheme != "never" if before.get("replacement") == SPACE else None
    if before is not None or not steps or steps[-1] != replaces:
        return None
    return (
        {0: False, 1: True}.get(len(steps) - 1) if steps[:-1] in ([], [{"type": "Prepend", "prepend": SPACE}]) else None
    )


def tokenizer_from(metadata: Json, name: str) -> HuggingFaceTokenizer:
    """The tokenizer in a file's metadata; `name` is the file's. UserError, saying why, where there is none like it.

    It encodes as llama.cpp does: where a text was in NFC for the model that the file was made from, no file says so.
    """
    found = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in metadata.items()
             if key.startswith("tokenizer.")}  # fmt: skip
    kind, pre, tokens = (found.get(key) for key in ("model", "pre", "tokens"))
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{name} has no tokenizer: the model can be converted, but takes no text.")
    types = found.get("token_type")
    types = np.full(len(tokens), NORMAL) if types is None else types
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise UnknownTokenizerError(f"The tokenizer in {name} has not a type for each of its {len(tokens)} tokens.")
    vocab = {token: i for i, (token, type) in enumerate(zip(tokens, types.tolist(), strict=True)) if type != UNUSED}
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": bool(types[i] != USER_DEFINED)}
        for i in np.flatnonzero(np.isin(types, (CONTROL, USER_DEFINED, UNKNOWN))).tolist()
    ]  # fmt: skip
    makers = {"gpt2": _from_byte_level, "llama": _from_sentencepiece}
    if not isinstance(kind, str) or kind not in makers:
        raise UnknownTokenizerError(
            f"The tokenizer in {name} is of the kind {short(kind)}: only {' and '.join(makers)} are read."
        )
    content = {"version": "1.0", "added_tokens": added, **makers[kind](found, vocab, name)}
    settings = _roles(found, tokens, name)
    usual = kind == "llama" or (
        isinstance(pre, str) and pre in WHOLE_WORDS
    )  # as llama.cpp has it where the file doesn't say
    if found.get("add_bos_token", usual) is True and settings["bos_token"] is not None:
        content["post_processor"] = _beginning(settings["bos_token"], vocab)
    return HuggingFaceTokenizer(check(content, name), settings, name)


def _roles(found: Json, tokens: list[str], name: str) -> dict[str, Any]:
    """What a tokenizer_config.json would say: the spellings of special tokens, and the chat template."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizer"}
    for role, key in ROLES.items():
        token = found.get(f"{key}_token_id")
        if token is not None and (type(token) is not int or not 0 <= token < len(tokens)):
            raise UnknownTokenizerError(
                f"The tokenizer in {name} has {key}_token_id {short(token)}, which is none of its tokens."
            )
        settings[f"{role}_token"] = None if token is None else tokens[token]
    if isinstance(found.get("chat_template"), str):
        settings["chat_template"] = found["chat_template"]
    return settings


def _beginning(bos: str, vocab: Mapping[str, int]) -> dict[str, Any]:
    """The post-processor that puts BOS before a text."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
    }


def _from_byte_level(found: Json, vocab: Mapping[str, int], name: str) -> dict[str, Any]:
    pre, merges = found.get("pre"), found.get("merges")
    pattern = next((pattern for pattern, names in SPLITS.items() if isinstance(pre, str) and pre in names), None)
    if pattern is None:
        known = ", ".join(names[0] for names in SPLITS.values())
        raise UnknownTokenizerError(
            f"The tokenizer in {name} splits text as {short(pre)}, which is not known: only {known} are."
        )
    if not isinstance(merges, list) or not all(isinstance(pair, str) and pair.count(" ") == 1 for pair in merges):
        raise UnknownTokenizerError(f"The tokenizer in {name} has merges that are not pairs of tokens.")
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": pattern in (GPT2, DIGITS),
    }
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    first = {GPT2: [], DIGITS: [{"type": "Digits", "individual_digits": True}]}.get(pattern, [split])
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": [pair.split(" ") for pair in merges if pair != NO_MERGE],
        "ignore_merges": pre in WHOLE_WORDS,
    }
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, level]} if first else level,
        "decoder": {**level, "use_regex": True},
        "model": model,
    }


def _from_sentencepiece(found: Json, vocab: Mapping[str, int], name: str) -> dict[str, Any]:
    scores, prefix = found.get("scores"), found.get("add_space_prefix", True) is True
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(found["tokens"]):
        raise UnknownTokenizerError(f"The tokenizer in {name} has not a score for each of its tokens.")
    unknown = found.get("unknown_token_id", 0)
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replaces] if prefix else [replaces]
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    ranked = sorted(
        _splits(vocab), key=lambda pair: (-scores[vocab["".join(pair)]], vocab["".join(pair)], *map(vocab.get, pair))
    )
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": [*back, *strip]},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [list(pair) for pair in ranked],
            "unk_token": found["tokens"][unknown] if type(unknown) is int and 0 <= unknown < len(vocab) else None,
            "fuse_unk": True,
            "byte_fallback": set(BYTES) <= vocab.keys(),
        },
    }
