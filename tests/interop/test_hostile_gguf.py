"""GGUF files as an enemy or a bad disk would leave them."""

import json
import struct

import numpy as np
import pytest

from tests.conftest import dose
from tests.mutate import Judge, overwrite
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.weights import gguf as ours
from twingpt.weights.formats import describe, open_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

TINY = {"vocab_size": 257, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 4, "n_inner": 4}
MODELS = {
    "llama": {"qk_norm": False, "rope_scaling": {"type": "llama3", "factor": 8.0, "original_block_size": 4}},
    "gemma": {
        "norm_offset": True, "norm_placement": "both", "mlp": "geglu_tanh", "embed_scale": 2.0, "sliding_window": 2,
        "local_rope_theta": 1000.0,
    },
    "granite": {"qk_norm": False, "embed_scale": 3.0, "logit_divisor": 2.0, "qkv_bias": True, "attn_out_bias": True},
}  # fmt: skip
TYPED = struct.Struct("<I")


def write(path, family):
    config = GPTConfig.from_dict({**TINY, **MODELS[family]})
    ours.write(path, config, initialise(config, 0), ByteTokenizer(), "x")
    return path.read_bytes()


def mutations(content, chance, count, end):
    """Bytes of the header altered, lengths and types above all, cut, or put twice."""
    counts = [at for at in range(0, end - 8) if content[at + 2 : at + 8] == bytes(6) and content[at]]
    for _ in range(count):
        altered = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 5])):
            kind, at = chance.integers(5), int(chance.integers(4, end))
            if kind == 0:
                altered[at] = chance.integers(256)
            elif kind == 1:
                at = int(chance.choice(counts))
                value = int(chance.choice([0, 1, 2, 9, 255, 2**16, 2**31, 2**32, 2**40, 2**63 - 1], 1)[0])
                altered[at : at + 8] = value.to_bytes(8, "little")
            elif kind == 2:
                altered[at : at + 4] = TYPED.pack(int(chance.integers(14)))
            elif kind == 3:
                del altered[at : at + int(chance.integers(1, 40))]
            else:
                altered[at:at] = altered[at : at + int(chance.integers(1, 40))]
        yield bytes(altered)


@pytest.mark.parametrize("n", dose(450, 12_000))
def test_mutated_files(tmp_path, n, soak):
    judge, chance = Judge(3, soak=soak), np.random.default_rng(3)
    for family in MODELS:
        path = tmp_path / f"{family}.gguf"
        content = write(path, family)
        end = min(tensor.offset for tensor in ours.GGUFFile(path).tensors.values())
        for mutated in mutations(content, chance, n // len(MODELS), end):
            overwrite(path, mutated)
            judge(lambda path=path: list(open_model(path).model.parameters()), len(mutated))
    assert judge.judged == n and 0.01 * n < judge.read < 0.7 * n


@pytest.mark.parametrize("n", dose(150, 5000))
@pytest.mark.parametrize("name", ["gpt_neox", "llama2"])
def test_mutated_tokenizers(tmp_path, n, name):
    """Metadata whose values are of any type and size: the tokenizer is read, or refused in one sentence."""
    from tests.interop.test_gguf import TOKENIZERS

    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZERS[name]()), "utf-8")
    good = ours.vocabulary(load_tokenizer(tmp_path), 600) | {"tokenizer.ggml.add_eos_token": False}
    good = {key: np.array(value) if key.endswith(("type", "scores")) else value for key, value in good.items()}
    chance, read = np.random.default_rng(5), 0
    others = [0, -1, 2**40, 1.5, True, "", "x", [], ["a"] * 3, np.arange(600.0), np.zeros(600, np.int32), None]
    for _ in range(n):
        altered = dict(good)
        for key in chance.choice(sorted(good), int(chance.integers(1, 3))):
            value = altered[key]
            if isinstance(value, list) and value and chance.random() < 0.7:
                value = list(value)
                value[int(chance.integers(len(value)))] = str(chance.choice(["", "a", " ", "a b", "<x>", *value[:1]]))
            elif isinstance(value, np.ndarray) and len(value) and chance.random() < 0.7:
                value = value.copy()
                value[int(chance.integers(len(value)))] = chance.choice([0, 1, 2, 3, 4, 5, 6, 99])
            else:
                value = others[int(chance.integers(len(others)))]
            altered[key] = value
        try:
            ours.tokenizer_from(altered, "x.gguf").encode("a text")
            read += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
    assert 0.1 * n < read < 0.9 * n


def header(*parts):
    return b"GGUF" + struct.pack("<I", 3) + b"".join(parts)


def text(value):
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(struct.pack("<QQ", 2**62, 0)), "it has 4611686018427387904 tensors, and at most"),
        (header(struct.pack("<QQ", 0, 2**62)), "it has 4611686018427387904 keys, and at most"),
        (header(struct.pack("<QQ", 0, 1), struct.pack("<Q", 2**40)), "bytes in a text, and at most"),
        (header(struct.pack("<QQ", 0, 1), text(b"k"), struct.pack("<IIQ", 9, 4, 2**50)), "values in k, and at most"),
        (header(struct.pack("<QQ", 0, 1), text(b"k"), struct.pack("<IIQ", 9, 4, 2**20)), "its header goes on to byte"),
        (header(struct.pack("<QQ", 0, 1), text(b"k"), struct.pack("<IIQ", 9, 9, 1)), "of a type 9, which is not known"),
        (header(struct.pack("<QQ", 0, 1), text(b"\xff")), "invalid start byte"),
        (header(struct.pack("<QQ", 0, 1), text(b"a\nb")), "a name is too long, or can't be printed"),
        (header(struct.pack("<QQ", 0, 2), *[text(b"k"), struct.pack("<IB", 7, 1)] * 2), "has the name k twice"),
        (header(struct.pack("<QQ", 1, 0), text(b"t"), struct.pack("<I", 2**31)), "has 2147483648 dimensions"),
        (
            header(struct.pack("<QQ", 1, 0), text(b"t"), struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
            "a shape that F32",
        ),
        (
            header(struct.pack("<QQ", 1, 0), text(b"t"), struct.pack("<IQIQ", 1, 33, 2, 0)),
            "a shape that Q4_0 can't be in",
        ),
        (
            header(struct.pack("<QQ", 1, 0), text(b"t"), struct.pack("<IQIQ", 1, 8, 4, 0)),
            "is of a type 4, which the gguf",
        ),
        (
            header(struct.pack("<QQ", 1, 0), text(b"t"), struct.pack("<IQIQ", 1, 8, 0, 32)),
            "begins at byte 96, where 64",
        ),
        (header(struct.pack("<QQ", 1, 0), text(b"t"), struct.pack("<IQIQ", 1, 8, 0, 0)), "its tensors end at byte 96"),
        (
            header(struct.pack("<QQ", 0, 1), text(b"general.alignment"), struct.pack("<II", 4, 0)),
            "general.alignment is 0",
        ),
    ],
)
def test_headers_that_lie(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / "x.gguf")


def test_numbers_that_are_none_are_refused(tmp_path):
    content = bytearray(write(tmp_path / "x.gguf", "granite"))
    at = ours.GGUFFile(tmp_path / "x.gguf").tensors["blk.0.ffn_up.weight"].offset
    content[at : at + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"The tensor blk\.0\.ffn_up\.weight in .* has numbers that are not finite"):
        list(open_model(tmp_path / "x.gguf").model.parameters())


def test_a_file_that_is_altered_after_it_was_opened_is_refused(tmp_path):
    content = write(tmp_path / "x.gguf", "llama")
    model = ours.GGUF().open(ModelDirectory(tmp_path / "x.gguf"))
    (tmp_path / "x.gguf").write_bytes(content[:-4])
    with pytest.raises(UserError, match="was changed after it was opened"):
        list(model.parameters())


def test_a_broken_tokenizer_is_told_of(tmp_path):
    content = write(tmp_path / "x.gguf", "llama")
    (tmp_path / "x.gguf").write_bytes(content.replace(b"ggml.merges", b"ggml.mergez"))
    assert describe(open_model(tmp_path / "x.gguf"))["tokenizer"].startswith("broken: The tokenizer in ")
