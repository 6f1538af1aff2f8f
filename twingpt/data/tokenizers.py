"""Tokenizers of data sources: find one by name or path, learn one, show what one does, compare several."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import expand, new_folder
from twingpt.core.tokenizer.base import Tokenizer
from twingpt.core.tokenizer.bpe import TIKTOKEN_PATTERNS, tiktoken_named, train_bpe
from twingpt.core.tokenizer.char_and_byte import ByteTokenizer, CharTokenizer
from twingpt.core.tokenizer.tokenizer_json import FILE, LEARNED, TOKENIZERS, load, load_file
from twingpt.data import sources
from twingpt.data.documents import DocumentPiece
from twingpt.data.shards import write_tokenizer
from twingpt.runs import folder as runs


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
        if path.suffix or path.name != name or "@" in name:
            raise UserError(f"There is no tokenizer {name}: give a tokenizer.json, its folder, or a run.") from None
        raise unknown_choice("tokenizer", name, TOKENIZERS) from None
    return load(checkpoint)


def learn_or_find(kind: str, texts: Iterable[str], all_texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer called `kind`: learned from the training `texts` where it is one of LEARNED, else found.

    A character tokenizer takes its alphabet from `all_texts`, or it could not encode what is held out.
    """
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    if kind == "char":
        return CharTokenizer(set().union(*map(set, all_texts)))
    return find(kind)


def learn_to_folder(specs: Sequence[str], vocab_size: int, pattern: str, out: Path, *, chat: bool) -> dict[str, Any]:
    """Learn a byte-level BPE from data sources and write it to the new folder `out`; its facts, with the seconds taken.

    Raises UserError where `out` exists or can't be written, without text, or for what `train_bpe` refuses.
    """
    folder = expand(out)
    if folder.exists():
        raise UserError(f"{out} exists already: choose another folder, or remove it.")
    start, counts = time.perf_counter(), {"documents": 0, "bytes": 0}

    def texts() -> Iterator[str]:
        for text, begins in (part for spec in specs for part in _texts(sources.load(spec))):
            counts["documents"] += begins
            counts["bytes"] += len(text.encode())
            yield text

    tokenizer = train_bpe(texts(), vocab_size, pattern, chat=chat)
    if not counts["bytes"]:
        raise sources.empty(", ".join(specs))
    try:
        with new_folder(folder) as temporary:
            write_tokenizer(temporary, tokenizer)
    except OSError as error:
        raise UserError(f"The tokenizer can't be written to {out}: {error.strerror}.") from error
    seconds = time.perf_counter() - start
    return {"path": str(out), "vocab_size": tokenizer.vocab_size, "pattern": pattern, **counts, "seconds": seconds}


def describe_tokens(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[dict[str, Any]]:
    """A row for each token of `text`: its id, its text, its bytes in hexadecimal, and whether it is special.

    With `special`, special tokens are read where `text` spells them.
    """
    spelled = {token: spelling for spelling, token in tokenizer.specials.items()}
    rows = []
    for token in map(int, tokenizer.encode(text, special=special)):
        content = tokenizer.token_bytes(token)
        shown = spelled.get(token) or content.decode("utf-8", errors="backslashreplace")
        rows.append({"id": token, "text": shown, "bytes": content.hex(" "), "special": token in spelled})
    return rows


def compare(names: Sequence[str], spec: str) -> dict[str, Any]:
    """Tokenizers compared on a data source: a row for each with tokens, bytes per token, and MB encoded a second.

    `char` has the alphabet of the source itself. Raises UserError for a source without text.
    """
    source, rows = sources.load(spec), []
    for name in names:
        alphabet = (set(text) for text, _ in _texts(source))
        tokenizer = CharTokenizer(set().union(*alphabet)) if name == "char" else find(name)
        tokenizer.encode("")  # sets up what the first call would be timed for
        documents = size = count = 0
        seconds = 1e-9
        for text, begins in _texts(source):
            start = time.perf_counter()
            count += len(tokenizer.encode(text))
            seconds += time.perf_counter() - start
            documents, size = documents + begins, size + len(text.encode())
        if not size:
            raise sources.empty(spec)
        row = {"tokenizer": name, "vocab_size": tokenizer.vocab_size, "tokens": count}
        rows.append({**row, "bytes_per_token": size / max(1, count), "mb_per_second": size / 1e6 / seconds})
    return {"source": spec, "documents": documents, "bytes": size, "rows": rows}


def _texts(source: sources.Source) -> Iterator[tuple[str, bool]]:
    """The documents of a source, long ones in pieces, each with whether a document begins there."""
    for item in source.items():
        for text in item.documents():
            yield text, not isinstance(item, DocumentPiece) or item.begins
