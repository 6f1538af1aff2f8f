"""GGUF files: every tensor comes back bit for bit, and llama.cpp computes the same."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from tests import foreign
from twingpt.core import reference
from twingpt.core.checkpoint.directory import ModelDirectory
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.tokenizer import END_OF_TEXT, PATTERNS, ByteTokenizer, CharTokenizer
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.data.sources import load
from twingpt.data.tokenizers import train_bpe
from twingpt.weights import gguf as ours
from twingpt.weights.formats import open_model
from twingpt.weights.gguf import GGUF
from twingpt.weights.gguf.vocabulary import split_name

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

# 600 ids of the tokenizer, and 8 more rows, as for a padded vocabulary.
SMALL = {"vocab_size": 608, "block_size": 128, "n_layer": 2, "n_head": 4, "n_embd": 64, "init_std": 0.15}
LLAMA = {"qk_norm": False}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_block_size": 32}
QWEN2 = {**LLAMA, "qkv_bias": True}
GEMMA = {
    "norm_offset": True, "norm_placement": "both", "mlp": "geglu_tanh", "embed_scale": 8.0, "n_kv_head": 2,
    "sliding_window": 6, "local_rope_theta": 1000.0, "rope_theta": 1e6,
}  # fmt: skip
OLMO2 = {"qk_norm_whole": True, "norm_placement": "post", "tie_embeddings": False, "norm_eps": 1e-5}
NEOX = {
    **LLAMA, "norm": "layernorm", "norm_bias": True, "mlp_bias": True, "qkv_bias": True, "attn_out_bias": True,
    "mlp": "gelu", "rope_fraction": 0.25, "parallel_residual": True, "tie_embeddings": False, "norm_eps": 1e-5,
}  # fmt: skip
GRANITE = {
    **LLAMA, "embed_scale": 12.0, "residual_scale": 0.22, "attn_scale": 0.0625, "logit_divisor": 8.0, "n_kv_head": 2,
}  # fmt: skip
SMOLLM3 = {**LLAMA, "n_layer": 4, "no_rope_layers": (3,), "n_kv_head": 2}

SUPPORTED = {
    "qwen3": {"n_kv_head": 2},
    "untied": {"tie_embeddings": False},
    "explicit head_dim": {"head_dim": 32},
    "linear": {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_block_size": 16}},
    "llama": {**LLAMA, "n_kv_head": 2},
    "llama with biases": {**LLAMA, "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
    "llama3": {**LLAMA, "rope_scaling": LLAMA3},
    "attention factor": {
        **LLAMA,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_block_size": 16, "attention_factor": 1.3},
    },
    "qwen2": {**QWEN2, "n_kv_head": 2},
    "qwen2 yarn": {**QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_block_size": 16}},
    "gemma3": {**GEMMA, "n_layer": 3, "full_attention_layers": (2,)},
    "gemma3 stretched": {
        **GEMMA,
        "n_layer": 3,
        "full_attention_layers": (1,),
        "rope_scaling": {"type": "linear", "factor": 8.0},
    },
    "gemma3 soft cap": {**GEMMA, "sliding_window": 0, "local_rope_theta": 0.0, "logit_softcap": 5.0},
    "gemma3 untied": {**GEMMA, "head_dim": 32, "tie_embeddings": False},
    "olmo2": OLMO2,
    "olmo2 grouped": {**OLMO2, "n_kv_head": 2, "tie_embeddings": True},
    "granite": GRANITE,
    "granite with biases": {**GRANITE, "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
    "granite llama3": {**GRANITE, "tie_embeddings": False, "rope_scaling": LLAMA3},
    "smollm3": SMOLLM3,
    "pythia": NEOX,
    "pythia one after the other": {**NEOX, "parallel_residual": False, "rope_fraction": 1.0, "mlp": "gelu_tanh"},
    "pythia tied": {**NEOX, "tie_embeddings": True, "mlp": "gelu_tanh"},
    "gpt2": SHAPES["gpt2"],
    "gpt2 untied": {**SHAPES["gpt2"], "tie_embeddings": False},
}


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(load("python-docs").documents, 600)


def parameters(config):
    """Random, vectors too."""
    chance = np.random.default_rng(3)
    for name, array in initialise(config, 5):
        noise = 0.2 * chance.standard_normal(array.shape) if array.ndim == 1 else 0
        yield name, (array + noise).astype(np.float32)


def opened(path):
    return GGUF().open(ModelDirectory(path))


def by_others(path, architecture, metadata, tensors, kind=None, alignment=32):
    """A file as the gguf package writes it: what is uint8 is of the type `kind`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        ours._add(writer, key, value)
    for name, array in tensors:
        writer.add_tensor(name, array, raw_dtype=kind if array.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kinds_of(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("switches", SUPPORTED.values(), ids=SUPPORTED)
def test_there_and_back_bit_for_bit(tmp_path, bpe, switches):
    config = GPTConfig.from_dict({**SMALL, **switches})
    ours.write(tmp_path / "x.gguf", config, parameters(config), bpe, "x")
    model = opened(tmp_path / "x.gguf")
    found = dict(model.parameters())
    # What training alone has is not in the file, nor that a head that is there was tied; and what 1 was added to lost
    # a bit of its precision.
    written = dataclasses.replace(config, init_std=0.02, tie_embeddings=model.config.tie_embeddings)
    assert model.config == written and config.tie_embeddings >= model.config.tie_embeddings
    for name, array in parameters(config):
        close = np.allclose(found[name], array, rtol=0, atol=1e-7) if config.norm_offset else False
        assert np.array_equal(found[name], array) or close, name
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_half_precision_is_of_matrices_alone(tmp_path, bpe):
    config = GPTConfig.from_dict({**SMALL, **SHAPES["gpt2"]})
    ours.write(tmp_path / "x.gguf", config, parameters(config), bpe, "x", "float16")
    found, kinds = dict(opened(tmp_path / "x.gguf").parameters()), kinds_of(tmp_path / "x.gguf")
    assert kinds["position_embd.weight"] == kinds["blk.0.attn_qkv.bias"] == "F32"
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_qkv.weight"] == "F16"
    for name, array in parameters(config):
        wide = array.ndim == 1 or name == "model.embed_positions.weight"
        assert np.array_equal(found[name], array if wide else array.astype(np.float16)), name


def test_the_tokenizer_is_in_it(tmp_path, bpe):
    config = GPTConfig(**SMALL)
    ours.write(tmp_path / "x.gguf", config, parameters(config), bpe, "a name")
    found = fields(tmp_path / "x.gguf")
    tokens, content = found["tokenizer.ggml.tokens"], bpe.to_json()["model"]
    assert len(tokens) == 608 and tokens[bpe.end_of_text] == END_OF_TEXT and tokens[600] == "[PAD600]"
    assert all(tokens[i] == piece for piece, i in content["vocab"].items())
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["merges"]]
    kinds = found["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[599], kinds[600]) == (1, 3, 5)  # ordinary, control, unused
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.bos_token_id"] == bpe.end_of_text
    assert found["tokenizer.ggml.add_bos_token"] is False and found["general.name"] == "a name"


@pytest.mark.parametrize("scheme", ["llama3", "qwen2"])
def test_the_tokenizers_of_imported_models(tmp_path, scheme):
    """BOS where the scheme puts it; tokens that are special, and those that are not."""
    foreign.BYTE_LEVEL[scheme]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    config = GPTConfig.from_dict({**SMALL, **LLAMA})
    ours.write(tmp_path / "x.gguf", config, parameters(config), tokenizer, "x")
    found = fields(tmp_path / "x.gguf")
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert found["tokenizer.ggml.add_bos_token"] is (scheme == "llama3")
    if scheme == "llama3":
        assert found["tokenizer.ggml.bos_token_id"] == tokenizer.specials["<|begin_of_text|>"]
        assert kinds["<|eot_id|>"] == gguf.TokenType.CONTROL
    else:
        assert kinds["<|im_end|>"] == gguf.TokenType.CONTROL
        assert kinds["<tool_call>"] == gguf.TokenType.USER_DEFINED


def test_the_chat_template_is_in_it(tmp_path):
    chat = train_bpe(["a text, and a text"], 600, chat=True)
    config = GPTConfig(**SMALL)
    ours.write(tmp_path / "x.gguf", config, parameters(config), chat, "x")
    found = fields(tmp_path / "x.gguf")
    assert found["tokenizer.chat_template"] == chat.settings()["chat_template"]
    assert found["tokenizer.ggml.eos_token_id"] == chat.roles["eos"]


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}, "gpt-2"),
        ({"type": "ByteLevel", "use_regex": True, "add_prefix_space": True}, None),
        ({"type": "Sequence", "pretokenizers": []}, None),
        ({"type": "Split", "pattern": {"Regex": "a"}}, None),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
                ],
            },
            "smollm",
        ),
        (None, None),
    ],
)
def test_splits_are_known_by_name(step, name):
    assert split_name(step) == name


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_known_by_name(name):
    level = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}
    steps = [{"type": "Split", "pattern": {"Regex": PATTERNS[name]}}, level]
    wanted = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen2": "qwen2"}[name]
    assert split_name({"type": "Sequence", "pretokenizers": steps}) == wanted
    steps[0]["pattern"] = {"Regex": PATTERNS[name] + "|x"}
    assert split_name({"type": "Sequence", "pretokenizers": steps}) is None


REFUSED = {
    "llama.cpp computes models of the families llama, qwen3, .* and this model is of none": {"mlp": "relu2"},
    "gpt2 models without the activation of gelu": {**SHAPES["gpt2"], "mlp": "gelu"},
    "qwen3 models without biases in attention": {"qkv_bias": True, "attn_out_bias": True},
    "qwen3 models without rope_scaling of type llama3": {"rope_scaling": LLAMA3},
    "llama models without sliding windows": {**LLAMA, "sliding_window": 16},
    "qwen3 models without sliding windows": {"sliding_window": 16, "full_attention_layers": (0,)},
    "qwen2 models without a width of heads apart": {**QWEN2, "head_dim": 32},
    "gemma3 models without such an order of windows": {**GEMMA, "n_layer": 3, "full_attention_layers": (0,)},
    "gemma3 models without such a scale": {**GEMMA, "attn_scale": 0.125},
    "gemma3 models without biases in attention": {**GEMMA, "qkv_bias": True, "attn_out_bias": True},
    "olmo2 models without biases in attention": {**OLMO2, "qkv_bias": True, "attn_out_bias": True},
    "gptneox models without leaving out": {**NEOX, "qkv_bias": False, "attn_out_bias": False},
    "smollm3 models without other layers without RoPE": {**LLAMA, "no_rope_layers": (0,)},
    "llama models without yarn of other beta_fast and": {
        **LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_block_size": 16, "beta_slow": 2.0},
    },
}  # fmt: skip


@pytest.mark.parametrize(("message", "switches"), REFUSED.items(), ids=REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path, bpe, message, switches):
    config = GPTConfig.from_dict({**SMALL, **switches})
    with pytest.raises(UserError, match=message):
        ours.write(tmp_path / "x.gguf", config, parameters(config), bpe, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_characters_is_refused(tmp_path):
    config = GPTConfig(**SMALL)
    with pytest.raises(UserError, match="no form for a tokenizer of kind char"):
        ours.write(tmp_path / "x.gguf", config, parameters(config), CharTokenizer("abc"), "x")


def test_a_tokenizer_beyond_the_model_is_refused(tmp_path, bpe):
    config = GPTConfig(**{**SMALL, "vocab_size": 599})
    with pytest.raises(UserError, match="more ids than the model, whose vocabulary is of 599"):
        ours.write(tmp_path / "x.gguf", config, parameters(config), bpe, "x")


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path, bpe):
    (tmp_path / "file").write_text("")
    config = GPTConfig(**SMALL)
    with pytest.raises(UserError, match=r"x\.gguf can't be written: "):
        ours.write(tmp_path / "file" / "x.gguf", config, parameters(config), bpe, "x")


def test_an_interrupted_file_leaves_the_old_one(tmp_path, bpe):
    (tmp_path / "x.gguf").write_text("old")
    config = GPTConfig(**SMALL)

    def broken():
        yield from list(parameters(config))[:3]
        raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match="Input/output error"):
        ours.write(tmp_path / "x.gguf", config, broken(), bpe, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"] and (tmp_path / "x.gguf").read_text(
        "utf-8"
    ) == "old"


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not here: pip install xllamacpp"
)


def llama_cpp_logprobs(path, prompt, size):
    """The log-probability of each id after a text or ids, by llama.cpp."""
    command = [sys.executable, str(Path(__file__).with_name("run_llama_cpp.py")), str(path), str(size)]
    ended = subprocess.run(command, input=json.dumps(prompt), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return {int(token): logprob for token, logprob in json.loads(ended.stdout.splitlines()[-1]).items()}


TEXT = "The value of the expression is evaluated once, when 12 functions are called: naïve café"


def a_prompt(tensors, config, tokenizer):
    """Ids after which the likeliest token is text by itself: llama.cpp reports no part of a character."""
    ids = tokenizer.encode(TEXT)
    ends = [n for n in range(len(ids), 10, -1) if _logits(tensors, config, ids[:n]).argmax() in _words(tokenizer)]
    return ids[: ends[0]]


def _words(tokenizer):
    return {i for i in range(tokenizer.end_of_text) if tokenizer.token_bytes(i).isascii()}


def _logits(tensors, config, ids):
    return reference.forward(tensors, np.array([ids]), config)[0, -1]


@needs_llama_cpp
@pytest.mark.parametrize("name", SUPPORTED)
def test_llama_cpp_computes_the_same(tmp_path, bpe, name):
    config = GPTConfig.from_dict({**SMALL, **SUPPORTED[name]})
    tensors = dict(parameters(config))
    ours.write(tmp_path / "x.gguf", config, tensors.items(), bpe, "x")
    ids = a_prompt(tensors, config, bpe)
    wanted = -reference.cross_entropy(_logits(tensors, config, ids)[None].repeat(608, 0), np.arange(608))
    found = llama_cpp_logprobs(tmp_path / "x.gguf", ids.tolist(), 608)
    # On CPUs its GELU is looked up in a table of half precision.
    tolerance = 5e-3 if name.startswith(("gpt2", "pythia", "gemma3")) else 2e-5
    assert len(found) == 608 and max(abs(found[i] - wanted[i]) for i in found) <= tolerance


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_llama_cpp_tokenizes_the_same(tmp_path, bpe, kind):
    config, tokenizer = GPTConfig(**SMALL), bpe if kind == "bpe" else ByteTokenizer()
    tensors = dict(parameters(config))
    ours.write(tmp_path / "x.gguf", config, tensors.items(), tokenizer, "x")
    text = tokenizer.decode(a_prompt(tensors, config, tokenizer))
    wanted = -reference.cross_entropy(
        _logits(tensors, config, tokenizer.encode(text))[None].repeat(608, 0), np.arange(608)
    )
    found = llama_cpp_logprobs(tmp_path / "x.gguf", text, 608)
    assert max(abs(found[i] - wanted[i]) for i in found) <= 2e-5


def sentencepiece(*, space_first):
    """As Llama 2's or Gemma's: of all neighbours that are a token, those that were learned first are merged first."""
    content = json.loads(foreign.llama2().to_str())
    vocab = content["model"]["vocab"]
    splits = [(piece[:i], piece[i:]) for piece in sorted(vocab, key=vocab.get) for i in range(1, len(piece))]
    content["model"]["merges"] = [list(pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    if not space_first:
        content["normalizer"] = content["normalizer"]["normalizers"][-1]
        pattern = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        content["pre_tokenizer"] = pattern
        content["decoder"]["decoders"].pop()
        runs = ["▁" * n for n in range(2, 6)]
        for run in runs:
            vocab.setdefault(run, len(vocab))
        others = [pair for pair in content["model"]["merges"] if "".join(pair) not in runs]
        merges = [[run[:i], run[i:]] for i in range(1, 5) for run in runs if i < len(run)]  # of one score, as Gemma's
        content["model"]["merges"] = merges + others
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        content["added_tokens"] += [{"id": vocab[run], "content": run, **plain} for run in runs]
        content["added_tokens"].append({"id": len(vocab), "content": "<image>", **plain, "special": True})
    return content


TOKENIZERS = {name: lambda make=make: json.loads(make().to_str()) for name, make in foreign.BYTE_LEVEL.items()}
TOKENIZERS |= {"llama2": lambda: sentencepiece(space_first=True), "gemma": lambda: sentencepiece(space_first=False)}


@pytest.fixture
def with_tokenizer(tmp_path):
    def make(name):
        """A small model with a tokenizer, as a GGUF file, which likes to say "e"."""
        (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZERS[name]()), "utf-8")
        tokenizer = load_tokenizer(tmp_path)
        size = tokenizer.specials.get("<image>", tokenizer.vocab_size + 1)  # an image is none of the model's
        switches = {**SMALL, **SHAPES["gpt2"], "tie_embeddings": False, "vocab_size": size}
        config = GPTConfig.from_dict(switches)
        tensors = dict(parameters(config))
        tensors["model.norm.bias"] = tensors["model.norm.bias"] + np.float32(1)
        tensors["lm_head.weight"][tokenizer.encode("ee")[-1]] = 1
        ours.write(tmp_path / "x.gguf", config, tensors.items(), tokenizer, "x")
        return tmp_path / "x.gguf", tokenizer

    return make


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_comes_back(with_tokenizer, name):
    path, tokenizer = with_tokenizer(name)
    back = opened(path).tokenizer()
    assert (back.roles, back.opening, back.end_of_text) == (tokenizer.roles, tokenizer.opening, tokenizer.end_of_text)
    specials = {spelling: token for spelling, token in tokenizer.specials.items() if spelling != "<image>"}
    assert back.specials == specials and back.pieces == [*tokenizer.pieces][: back.vocab_size]
    for text in [*foreign.TEXT, *(unicodedata.normalize("NFC", text) for text in foreign.fuzzed(60, 5))]:
        ids = tokenizer.encode(text)
        assert np.array_equal(back.encode(text), ids) and back.decode(ids) == tokenizer.decode(ids)
    for special in specials:
        assert np.array_equal(back.encode(f"a{special}b", special=True), tokenizer.encode(f"a{special}b", special=True))


@needs_llama_cpp
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_has_the_same_ids(with_tokenizer, name):
    path, tokenizer = with_tokenizer(name)
    text = "The cat's 12 hats — naïve café, 東京\n\n    def f(x):\n\treturn x + 1234567"
    ids = [*tokenizer.opening, *tokenizer.encode(text).tolist()]
    size = tokenizer.specials.get("<image>", tokenizer.vocab_size)
    by_text, by_ids = llama_cpp_logprobs(path, text, size), llama_cpp_logprobs(path, ids, size)
    other = llama_cpp_logprobs(path, [*ids[:5], ids[6], *ids[6:]], size)
    assert by_text == by_ids != other


def test_a_tokenizer_that_is_not_known_is_no_reason_to_refuse_a_model(gpt, tmp_path, bpe):
    config = GPTConfig(**SMALL)
    ours.write(tmp_path / "x.gguf", config, parameters(config), bpe, "x")
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content.replace(b"gpt-2", b"gpt-9"))
    with pytest.raises(UserError, match="splits text as 'gpt-9', which is not known: only gpt-2, llama-bpe, "):
        opened(tmp_path / "x.gguf").tokenizer()
    code, _, err = gpt("convert", tmp_path / "x.gguf", tmp_path / "ours")
    assert code == 0 and "splits text as 'gpt-9'" in err
    assert not (tmp_path / "ours" / "tokenizer.json").exists()


@pytest.mark.parametrize("type", [kind.name for kind in gguf.GGMLQuantizationType])
def test_every_type_that_is_dequantized_is_read(tmp_path, bpe, type):
    """Matrices of bits that need not make sense, with whichever scales those are; others are refused by name."""
    kind = gguf.GGMLQuantizationType[type]
    numbers, width = gguf.GGML_QUANT_SIZES[kind]
    config = GPTConfig(**{**SMALL, "n_layer": 1, "n_embd": 256, "n_inner": 256})
    layout = ours.ARCHITECTURES["qwen3"].layout(config)
    chance, tensors, wanted = np.random.default_rng(1), {}, {}
    for name, shape in ours._shapes(config, layout).items():
        tensors[name] = np.ones(shape, np.float32)
        if len(shape) > 1:
            tensors[name] = chance.integers(0, 60, (shape[0], shape[1] // numbers * width), np.uint8)
            wanted[layout[name][0]] = tensors[name]
    metadata = ours.ARCHITECTURES["qwen3"].metadata(config)
    model = opened(by_others(tmp_path / "x.gguf", "qwen3", metadata, tensors.items(), kind))
    assert set(model.dtypes()) == {"F32", type}
    try:
        expected = {name: gguf.quants.dequantize(data, kind) for name, data in wanted.items()}
    except NotImplementedError:
        if type != "F64":
            with pytest.raises(UserError, match=rf"is {type}, which the gguf package can't dequantize"):
                list(model.parameters())
            return
        expected = {name: data.view("<f8").astype(np.float32) for name, data in wanted.items()}
    for name, array in model.parameters():
        if name in expected:
            assert np.array_equal(array, expected[name]), name


def test_a_file_by_others_is_read(tmp_path, gpt):
    """With less than we write: no rope.dimension_count, no key_length, an array of other numbers, another alignment."""
    config = GPTConfig.from_dict({**SMALL, **LLAMA, "n_kv_head": 2, "n_layer": 1})
    architecture = ours.ARCHITECTURES["llama"]
    metadata = {
        key: value
        for key, value in architecture.metadata(config).items()
        if not key.endswith(("rope.dimension_count", "_length", "vocab_size")) or key.count(".") == 1
    }
    metadata |= {"general.tags": ["text-generation"], "general.numbers": [1.5, 2.5]}
    tensors = ours._stored_tensors(config, architecture, parameters(config))
    by_others(tmp_path / "x.gguf", "llama", metadata, tensors, alignment=64)
    found = dict(open_model(tmp_path / "x.gguf").model.parameters())
    assert all(np.array_equal(found[name], array) for name, array in parameters(config))
    code, out, err = gpt("convert", tmp_path / "x.gguf", "--inspect", "--json")
    shown = json.loads(out)
    assert code == 0 and (shown["source_format"], shown["family"], shown["tokenizer"]) == ("gguf", "llama", None), err
    assert shown["dtypes"] == {"F32": len(found)} and shown["tensors"]["blk.0.attn_q.weight"] == [64, 64]
    ours.write(tmp_path / "two.gguf", GPTConfig(**SMALL), parameters(GPTConfig(**SMALL)), ByteTokenizer(), "x")
    _, out, _ = gpt("convert", tmp_path / "two.gguf", "--inspect")
    assert "blk.0.attn_q.weight" in out and "blk.1." not in out and "and so for layer 1" in out


def rewritten(tmp_path, bpe, key, value, switches=MappingProxyType({})):
    """A file that says something else of its model."""
    config = GPTConfig.from_dict({**SMALL, **switches, "n_layer": 1})
    architecture = ours.architecture_for(config)
    metadata = architecture.metadata(config) | {f"{architecture.name}.{key}": value}
    metadata = {name: fact for name, fact in metadata.items() if fact is not None}
    tensors = ours._stored_tensors(config, architecture, parameters(config))
    return by_others(tmp_path / "x.gguf", architecture.name, metadata, tensors)


@pytest.mark.parametrize(
    ("key", "value", "message", "switches"),
    [
        ("block_count", None, "qwen3.block_count is missing", {}),
        ("block_count", 4000, "has 4000 layers, and has", {}),
        ("embedding_length", 128, "token_embd.weight in .* has shape .608, 64., and must have .608, 128.", {}),
        ("attention.head_count", 0, "must be positive", {}),
        ("attention.head_count", "four", "attention.head_count must be .*, and is 'four'", {}),
        ("attention.value_length", 8, "values of another width than keys", {}),
        ("expert_count", 8, "mixtures of experts", {}),
        ("rope.dimension_count", 8, "rope.dimension_count 8, a part of each head, is not supported", {}),
        ("rope.scaling.type", "longrope", "rope_type 'longrope' is not supported", {}),
        ("attention.sliding_window_pattern", [1, 2], "sliding_window_pattern must be .*, and is array", GEMMA),
        ("attention.head_count_kv", 2, "attention.head_count_kv other than attention.head_count", NEOX),
    ],
)
def test_what_a_file_may_not_say(tmp_path, bpe, key, value, message, switches):
    with pytest.raises(UserError, match=message) as raised:
        list(opened(rewritten(tmp_path, bpe, key, value, switches)).parameters())
    assert "x.gguf" in str(raised.value)


def test_factors_that_are_not_llama_3s_are_refused(tmp_path, bpe):
    config = GPTConfig.from_dict({**SMALL, **LLAMA, "rope_scaling": LLAMA3})
    ours.write(tmp_path / "x.gguf", config, parameters(config), bpe, "x")
    path = tmp_path / "x.gguf"
    at = opened(path).file.tensors["rope_freqs.weight"].offset
    content = bytearray(path.read_bytes())
    content[at : at + 4] = np.float32(3).tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3's scaling of RoPE"):
        opened(path)


@pytest.mark.parametrize("name", ["Llama 3.1", "Llama 3.2"])
def test_the_scaling_of_the_published_models_is_found(name):
    scaling = {"type": "llama3", "factor": 8.0 if name == "Llama 3.1" else 32.0, "original_block_size": 8192}
    head = 128 if name == "Llama 3.1" else 64
    config = GPTConfig.from_dict(
        {"vocab_size": 8, "qk_norm": False, "head_dim": head, "rope_theta": 5e5, "rope_scaling": scaling}
    )
    found = ours.architectures._llama3(ours.rope_factors(config), 5e5, {})
    assert found["factor"] == scaling["factor"] and found["original_max_position_embeddings"] == 8192


def test_other_files_are_told_apart(tmp_path, bpe):
    config = GPTConfig(**SMALL)
    ours.write(tmp_path / "x.gguf", config, parameters(config), bpe, "x")
    content = (tmp_path / "x.gguf").read_bytes()
    for altered, message in (
        (content.replace(b"qwen3", b"mamba", 1), "is of the architecture 'mamba': only llama, qwen3,"),
        (b"GGUF\1\0\0\0" + content[8:], "it is of version 1, and versions 2 and 3 are read"),
        (b"GGUF\0\0\0\3" + content[8:], "it is for computers of the other byte order"),
        (content[: len(content) // 2], "its tensors end at byte .*, and the file at"),
        (content[:1000], "its header goes on to byte"),
    ):
        (tmp_path / "x.gguf").write_bytes(altered)
        with pytest.raises(UserError, match=message):
            open_model(tmp_path / "x.gguf")
