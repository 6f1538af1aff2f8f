"""Tokenizers: characters, bytes, byte-level BPE, and any tokenizer.json of Hugging Face's `tokenizers`."""

from twingpt.core.tokenizer.base import END_OF_TEXT, Tokenizer
from twingpt.core.tokenizer.bpe import CHAT, LONGEST_TOKEN, PATTERNS, BPETokenizer, merges, split_runs, tiktoken_named
from twingpt.core.tokenizer.char_and_byte import ByteTokenizer, CharTokenizer
from twingpt.core.tokenizer.huggingface import HuggingFaceTokenizer
from twingpt.core.tokenizer.tokenizer_json import GIVE_ONE, LEARNED, TOKENIZERS, files, load

__all__ = [
    "CHAT",
    "END_OF_TEXT",
    "GIVE_ONE",
    "LEARNED",
    "LONGEST_TOKEN",
    "PATTERNS",
    "TOKENIZERS",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "files",
    "load",
    "merges",
    "split_runs",
    "tiktoken_named",
]
