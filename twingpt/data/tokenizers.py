"""Tokenizers: find one by name or path, learn one from texts, show what one does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import expand
from twingpt.core.tokenizer.base import END_OF_TEXT, Tokenizer
from twingpt.core.tokenizer.bpe import (
    CHARACTER_TO_BYTE,
    CHAT,
    LARGEST_VOCABULARY,
    LONG_RUN_TO_LEARN,
    LONGEST_TOKEN,
    PATTERNS,
    TIKTOKEN_PATTERNS,
    BPETokenizer,
    split_runs,
    tiktoken_named,
    unprintable,
)
from twingpt.core.tokenizer.char_and_byte import ByteTokenizer, CharTokenizer
from twingpt.core.tokenizer.tokenizer_json import FILE, LEARNED, TOKENIZERS, load, load_file
from twingpt.runs import folder as runs
from twingpt.tokenizers.vocab_and_merges import has_vocab_and_merges, read_vocab_and_merges


def find(name: str) -> Tokenizer:
    """A tokenizer that is there: of a kind that learns nothing, a tokenizer.json, its folder, or a run or checkpoint.

    In a folder it may also be in vocab.json and merges.txt.

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
    if has_vocab_and_merges(path):
        return read_vocab_and_merges(path)
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


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = "gpt2", *, chat: bool = False) -> BPETokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids on `texts`; `pattern` is a key of PATTERNS.

    END_OF_TEXT, and with `chat` the CHAT tokens, are the last ids. Raises UserError for an unknown pattern, or a
    vocabulary too small for the 256 bytes or above LARGEST_VOCABULARY.
    """
    if pattern not in PATTERNS:
        raise unknown_choice("pattern", pattern, PATTERNS)
    names = [END_OF_TEXT, *CHAT] if chat else [END_OF_TEXT]
    least = 256 + len(names)
    if vocab_size < least:
        raise UserError(
            f"vocab_size {vocab_size} is too small for BPE: 256 bytes and {' and '.join(names)} need {least}."
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size} is too large: at most {LARGEST_VOCABULARY} ids are learned.")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainee

    trainee = Trainee(models.BPE())
    trainee.decoder = decoders.ByteLevel()
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(names),
        show_progress=False,
        initial_alphabet=sorted(CHARACTER_TO_BYTE),
        max_token_length=LONGEST_TOKEN,
    )
    trainee.train_from_iterator((part for text in texts for part in split_runs(text, LONG_RUN_TO_LEARN)), trainer)
    by_id = sorted(trainee.get_vocab().items(), key=lambda item: item[1])
    pieces = [unprintable(piece) for piece, _ in by_id]
    return BPETokenizer(pieces, PATTERNS[pattern], "bpe", {name: len(pieces) + i for i, name in enumerate(names)})


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
