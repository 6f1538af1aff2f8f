"""Tokenizers as other tools write them: small ones of every structure that is met."""

from __future__ import annotations

import json
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from twingpt.core.tokenizer import PATTERNS

TEXT = [
    "The cat's 12 hats — naïve café, 東京 🙂\n\n    def f(x):\n\treturn x + 1234567\n",
    "It's the words of a text that teach a tokenizer: the more of them, the better.\n",
    "Größe, être, señor, Пример, пример, παράδειγμα, 日本語の文章、中文文本。 3.14 and 42\r\n",
] * 4


def byte_level(pattern=None, size=420, special=("<|endoftext|>",), first=None, regex=False, **model):
    """A trained byte-level BPE; `first` is a step before ByteLevel, whose own split `regex` turns on."""
    tokenizer = Tokenizer(models.BPE(**model))
    steps = [first or pre_tokenizers.Split(Regex(pattern), "isolated")] if first or pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def gpt2():
    """As GPT-2's: ByteLevel splits by itself; the special token comes last and has no merges beside it."""
    tokenizer = byte_level(special=[], regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def gpt_neox():
    """As GPT-NeoX's: special tokens first, NFC, and runs of spaces as tokens of their own at the end."""
    tokenizer = byte_level(special=["<|endoftext|>", "<|padding|>"], regex=True)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=False) for n in (4, 3, 2)])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def llama3():
    """As Llama 3's: all splits of a token are merges, whole words first, and a post-processor that adds BOS."""
    content = json.loads(byte_level(PATTERNS["llama3"], special=[]).to_str())
    vocab = content["model"]["vocab"]
    splits = [
        [piece[:i], piece[i:]]
        for piece in sorted(vocab, key=vocab.get)
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    content["model"] |= {"ignore_merges": True, "merges": splits}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def qwen2():
    """As Qwen 2.5's: NFC, its own split, chat tokens, and added tokens that are not special."""
    tokenizer = byte_level(PATTERNS["qwen2"], special=[])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return tokenizer


def smollm():
    """As SmolLM's: each digit apart, then ByteLevel's own split."""
    return byte_level(first=pre_tokenizers.Digits(individual_digits=True), regex=True)


def roberta():
    """As RoBERTa's: ids in another order than the merges."""
    content = json.loads(gpt2().to_str())
    names = sorted(content["model"]["vocab"])
    random.Random(0).shuffle(names)
    content["model"]["vocab"] = {name: i + 3 for i, name in enumerate(names)} | {"<s>": 0, "<pad>": 1, "</s>": 2}
    content["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>"])
    return tokenizer


def prefix_space():
    """Byte-level, with a space before the text."""
    tokenizer = gpt2()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def lower_case():
    """Byte-level, of small letters only."""
    tokenizer = gpt2()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def llama2():
    """As Llama 2's: BPE as SentencePiece has it, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False, limit_alphabet=60)
    tokenizer.train_from_iterator(TEXT, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram():
    """As T5's: a unigram model over words that begin with ▁, with special tokens in its vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.normalizer = normalizers.NFKC()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def wordpiece():
    """As BERT's: small letters, parts of words marked by ##."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    return tokenizer


def word_level():
    """Words by spaces, without any special token but the unknown one."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return tokenizer


BYTE_LEVEL = {make.__name__: make for make in (gpt2, gpt_neox, llama3, qwen2, smollm, roberta)}
OTHERS = {make.__name__: make for make in (prefix_space, lower_case, llama2, unigram, wordpiece, word_level)}

ALPHABETS = [
    (0x20, 0x7E), (0x09, 0x0D), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x900, 0x97F),
    (0x3040, 0x30FF), (0x4E00, 0x4EFF), (0x2000, 0x206F), (0x1F300, 0x1F6FF), (0x300, 0x36F), (0xE000, 0xE0FF),
]  # fmt: skip


def fuzzed(count: int, seed: int) -> list[str]:
    """Strings of many scripts, spaces and digits, whole Unicode now and then."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        ranges = [*rng.sample(ALPHABETS, rng.randint(1, 4)), (0x20, 0x20), (0x30, 0x39)]
        text = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 40)))
        if rng.random() < 0.2:
            text += "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(5))
        texts.append(text)
    return texts
