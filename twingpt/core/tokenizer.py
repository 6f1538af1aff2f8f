"""Text to token ids and back: characters, bytes, byte-level BPE. Kept as a tokenizer.json that others read."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError

Array = np.ndarray

END_OF_TEXT = "<|endoftext|>"
TOKENIZERS = ("bpe", "char", "byte", "gpt2")

# GPT-2's split into words before BPE; llama.cpp and others know it by its text.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer(ABC):
    """Token ids for text. The last id is END_OF_TEXT, which no text encodes to: its spelling is data."""

    kind: str

    @property
    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The bytes of every ordinary token, by id."""

    @abstractmethod
    def encode(self, text: str) -> Array:
        """The ids of `text`, (n,) int32."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The tokenizer.json of Hugging Face's `tokenizers`."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, END_OF_TEXT included."""
        return len(self.pieces) + 1

    @property
    def end_of_text(self) -> int:
        """The id that ends a document."""
        return self.vocab_size - 1

    @cached_property
    def byte_lengths(self) -> Array:
        """How many bytes of text each id stands for, (vocab_size,); none for END_OF_TEXT."""
        return np.array([*map(len, self.pieces), 0], np.int64)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; none for END_OF_TEXT."""
        if not 0 <= token < self.vocab_size:
            raise UserError(f"Token id {token} is outside the vocabulary, 0 to {self.vocab_size - 1}.")
        return self.pieces[token] if token < self.end_of_text else b""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` as they come, in whole UTF-8 characters; empty while one is incomplete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            yield decoder.decode(self.token_bytes(int(token)))
        yield decoder.decode(b"", final=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the tokenizer does."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def _json(self, model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
        special = {
            "id": self.end_of_text,
            "content": END_OF_TEXT,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [special],
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": decoder,
            "model": model,
        }


class CharTokenizer(Tokenizer):
    """One id for each character of an alphabet, in code point order."""

    kind = "char"

    def __init__(self, alphabet: Iterable[str]) -> None:
        self.alphabet = sorted(set(alphabet))
        self._ids = {character: i for i, character in enumerate(self.alphabet)}

    @cached_property
    def pieces(self) -> list[bytes]:
        """The UTF-8 bytes of every character, by id."""
        return [character.encode() for character in self.alphabet]

    def encode(self, text: str) -> Array:
        """The ids of `text`, (n,) int32; a character that the alphabet lacks is a UserError."""
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
        return self._json(
            {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"},
            {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
            {"type": "Fuse"},
        )


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8."""

    kind = "byte"

    @cached_property
    def pieces(self) -> list[bytes]:
        """Each byte, by its value."""
        return [bytes([i]) for i in range(256)]

    def encode(self, text: str) -> Array:
        """The bytes of `text`, (n,) int32."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def to_json(self) -> dict[str, Any]:
        """A byte-level BPE without merges."""
        return self._json(_bpe_model(self.pieces, []), BYTE_LEVEL, {**BYTE_LEVEL})


class BPETokenizer(Tokenizer):
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), encoded by tiktoken.

    A token's id is its rank: the order in which its merge was learned.
    """

    def __init__(self, pieces: Sequence[bytes], pattern: str = GPT2_PATTERN, kind: str = "bpe") -> None:
        import tiktoken

        self.kind, self.pattern, self._pieces = kind, pattern, list(pieces)
        ranks = {piece: i for i, piece in enumerate(pieces)}
        self._encoding = tiktoken.Encoding(
            name="twingpt", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of every token, by id."""
        return self._pieces

    def encode(self, text: str) -> Array:
        """The ids of `text`, (n,) int32; the spelling of END_OF_TEXT is ordinary text."""
        runs = split_runs(text, LONG_RUN_TO_ENCODE)
        parts = [self._encoding.encode_to_numpy(run, disallowed_special=()).view(np.int32) for run in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def to_json(self) -> dict[str, Any]:
        """A byte-level BPE whose merges are read off the ranks."""
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
        return self._json(_bpe_model(self._pieces, merges(self._pieces)), pre_tokenizer, {**BYTE_LEVEL})


# The pattern's engine overflows its stack on a run of a million spaces, and learning merges over one
# word of 100,000 letters takes minutes. No text that people wrote has such runs.
LONG_RUN_TO_ENCODE, LONG_RUN_TO_LEARN = 100_000, 1_000
LONGEST_TOKEN, LARGEST_VOCABULARY = 64, 1_000_000


def split_runs(text: str, length: int) -> list[str]:
    """The text in parts, cut only within runs of `length` and more spaces or non-spaces."""
    return [part for part in re.split(rf"(\s{{{length}}}|\S{{{length}}})", text) if part] or [text]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte, which tokenizer.json is written in."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def _printable(piece: bytes) -> str:
    return "".join(BYTE_TO_CHARACTER[b] for b in piece)


def _bpe_model(pieces: Sequence[bytes], merge_list: Sequence[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {_printable(piece): i for i, piece in enumerate(pieces)},
        "merges": [[_printable(left), _printable(right)] for left, right in merge_list],
    }


def merges(pieces: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each multi-byte token joins: what BPE with only the lower ranks splits it into."""
    ranks = {piece: i for i, piece in enumerate(pieces)}
    pairs = []
    for piece in pieces:
        if len(piece) < 2:
            continue
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            i = min(range(len(joined)), key=joined.__getitem__)
            if joined[i] >= ranks[piece]:
                raise UserError(f"The token {piece!r} can't be reached by merges of lower-ranked tokens.")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn a byte-level BPE of at most `vocab_size` ids, END_OF_TEXT included, with GPT-2's split."""
    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small for BPE: 256 bytes and {END_OF_TEXT} need 257.")
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size} is too large: at most {LARGEST_VOCABULARY} ids are learned.")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainee

    trainee = Trainee(models.BPE())
    trainee.decoder = decoders.ByteLevel()
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        show_progress=False,
        initial_alphabet=sorted(CHARACTER_TO_BYTE),
        max_token_length=LONGEST_TOKEN,
    )
    trainee.train_from_iterator((part for text in texts for part in split_runs(text, LONG_RUN_TO_LEARN)), trainer)
    by_id = sorted(trainee.get_vocab().items(), key=lambda item: item[1])
    return BPETokenizer([bytes(CHARACTER_TO_BYTE[c] for c in piece) for piece, _ in by_id])


def tiktoken_gpt2() -> BPETokenizer:
    """OpenAI's `gpt2` encoding, from tiktoken's cache or the network."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' and tiktoken's own, whatever the network did
        raise UserError(
            "tiktoken could not fetch its gpt2 vocabulary: connect once, or set TIKTOKEN_CACHE_DIR to a "
            f"folder that has it ({type(error).__name__})."
        ) from error
    pieces = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    return BPETokenizer(pieces, kind="gpt2")


def make(kind: str, texts: Iterable[str], all_texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer called `kind` in TOKENIZERS, learned from the training `texts` where it learns.

    A character tokenizer takes its alphabet from `all_texts`, or held-out text could not be read.
    """
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    if kind == "char":
        return CharTokenizer(set().union(*map(set, all_texts)))
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return tiktoken_gpt2()
    raise unknown_choice("tokenizer", kind, TOKENIZERS)


def files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """The text of tokenizer.json and tokenizer_config.json, by file name."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        "twingpt": {"kind": tokenizer.kind},
    }
    return {
        "tokenizer.json": json.dumps(tokenizer.to_json(), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


def load(folder: Path) -> Tokenizer:
    """The tokenizer whose tokenizer.json and tokenizer_config.json are in `folder`.

    Raises UserError where they are missing, broken, or of a kind that this project does not write.
    """
    try:
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        kind = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["twingpt"]["kind"]
        tokenizer = _from_json(content, kind)
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {Path(error.filename).name}, so its tokens have no text.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The tokenizer in {folder} is not one that twingpt wrote: {error!r}.") from None
    if tokenizer.to_json()["model"] != content["model"]:
        raise UserError(f"The tokenizer.json in {folder} has been altered: its ids would not mean the same.")
    return tokenizer


def _from_json(content: Mapping[str, Any], kind: str) -> Tokenizer:
    if kind not in TOKENIZERS:
        raise ValueError(f"kind {kind!r}")
    vocab: dict[str, int] = content["model"]["vocab"]
    if kind == "char":
        return CharTokenizer(character for character in vocab if character != END_OF_TEXT)
    if kind == "byte":
        return ByteTokenizer()
    pieces = [bytes(CHARACTER_TO_BYTE[c] for c in piece) for piece in sorted(vocab, key=vocab.__getitem__)]
    return BPETokenizer(pieces, content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"], kind)
