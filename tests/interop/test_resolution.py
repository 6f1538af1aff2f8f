"""docs/resolution.md row by row: what of a directory's files wins, here and in transformers and mlx-lm."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

import twingpt
from tests import foreign
from tests.conftest import needs
from tests.interop.test_families import TOKENS, build, relative, their_logits
from twingpt.core import reference
from twingpt.core.checkpoint.safetensors_file import TensorFile, write_safetensors
from twingpt.core.checkpoint.schema import save_model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.tokenizer import ByteTokenizer, CharTokenizer
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.core.tokenizer.base import ROLES
from twingpt.data.tokenizers import train_bpe
from twingpt.weights.convert import convert
from twingpt.weights.families import FAMILIES
from twingpt.weights.formats import open_model
from twingpt.weights.generation import end_ids

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

USUAL = ("<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<|padding|>", "<|im_end|>")
# By the classes that tokenizer_config.json names.
CLASSES = (
    None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2TokenizerFast", "GPTNeoXTokenizer",
    "GemmaTokenizer",
)  # fmt: skip


def put(folder, name, content):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(json.dumps(content), "utf-8")


def tokenizer_folder(folder, *, model_type="llama", tokenizer=None, settings=None, more=None):
    tokenizer = tokenizer or foreign.byte_level(special=USUAL, size=300)
    put(folder, "config.json", {"model_type": model_type})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config.json": settings, **(more or {})}.items():
        if content is not None:
            put(folder, name, content)
    return folder


def roles(folder):
    """Those of transformers, and ours."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    named = {role: getattr(theirs, f"{role}_token_id") for role in ROLES}
    return {role: token for role, token in named.items() if token is not None}, load_tokenizer(folder).roles


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_role_that_no_file_names_is_that_of_the_tokenizers_class(tmp_path, model_type):
    tokenizer = foreign.byte_level(special=USUAL, size=300)
    for name in CLASSES:
        settings = {"tokenizer_class": name} if name else {}
        theirs, ours = roles(tokenizer_folder(tmp_path, model_type=model_type, tokenizer=tokenizer, settings=settings))
        assert ours == theirs, name


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMED = {
    "nothing": ({}, {}),
    "by spelling": ({"eos_token": "<s>", "bos_token": "<bos>"}, {}),
    "as an object": ({"eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}, {}),
    "null": ({"tokenizer_class": "Qwen2Tokenizer", "eos_token": None, "pad_token": None, "unk_token": None}, {}),
    "special_tokens_map.json goes before": ({"eos_token": "<s>"}, {"special_tokens_map.json": {"eos_token": "</s>"}}),
    "with objects": ({}, {"special_tokens_map.json": {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}}),
    "with null": ({"eos_token": "<s>"}, {"special_tokens_map.json": {"eos_token": None}}),
    "which newer files have not": (
        {"eos_token": "<s>", "added_tokens_decoder": {}}, {"special_tokens_map.json": {"eos_token": "</s>"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", NAMED)
def test_roles_are_named_by_the_files(tmp_path, row):
    settings, more = NAMED[row]
    theirs, ours = roles(tokenizer_folder(tmp_path, settings=GENERIC | settings, more=more))
    assert ours == theirs


def test_the_end_of_text_is_the_eos_where_that_ends_documents(tmp_path):
    named = {role: f"<{role}>" for role in ROLES}
    gemma = {f"{role}_token": spelling for role, spelling in named.items()}
    special = (*named.values(), "<s>", "</s>")  # which are HTML tags
    tokenizer = foreign.byte_level(special=special, size=300)
    folder = tokenizer_folder(tmp_path / "gemma", tokenizer=tokenizer, settings=GENERIC | gemma)
    assert load_tokenizer(folder).end_of_text == tokenizer.token_to_id("<eos>")
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").unlink()
    assert load_tokenizer(folder).roles == {role: tokenizer.token_to_id(spelling) for role, spelling in named.items()}
    chat = tokenizer_folder(tmp_path / "chat", settings=GENERIC | {"eos_token": "<|im_end|>"})
    assert load_tokenizer(chat).end_of_text == 0  # an EOS that ends turns ends no document


def test_a_spelling_is_guessed_among_special_tokens_alone(tmp_path):
    """Qwen's vocabulary has <s> and <unk> as text has them."""
    tokenizer = foreign.byte_level(special=["<|im_end|>"], size=300)
    tokenizer.add_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.specials.keys() == {"<|im_end|>", "<|endoftext|>"} and ours.roles == {"eos": ours.end_of_text}
    assert ours.decode(ours.encode("a <s> b </s>")) == "a <s> b </s>"


ONE, TWO, X = "{{ bos_token }}one", "two", "additional_chat_templates/x.jinja"
SEVERAL = [{"name": "default", "template": ONE}, {"name": "tool_use", "template": TWO}]
TEMPLATES = {
    "none": ({}, {}),
    "in tokenizer_config.json": ({"chat_template": ONE}, {}),
    "several there": ({"chat_template": SEVERAL}, {}),
    "a file goes before": ({"chat_template": ONE}, {"chat_template.jinja": TWO}),
    "and further files": (
        {"chat_template": ONE},
        {"chat_template.jinja": TWO, X: ONE},
    ),
    "or those alone": ({"chat_template": ONE}, {X: TWO}),
    "chat_template.json is for processors": ({}, {"chat_template.json": ONE}),
}


@pytest.mark.parametrize("row", TEMPLATES)
def test_chat_templates(tmp_path, row):
    settings, files = TEMPLATES[row]
    folder = tokenizer_folder(tmp_path / "a", settings=GENERIC | settings)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    written = load_tokenizer(folder).settings()
    again = tokenizer_folder(tmp_path / "b", settings=GENERIC | written)
    assert transformers.AutoTokenizer.from_pretrained(again).chat_template == theirs


def llama(folder, scheme=foreign.llama3, **settings):
    """A directory of transformers' with a tokenizer of `foreign`."""
    tokenizer = scheme()
    build("llama", vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    put(folder, "tokenizer_config.json", GENERIC | settings)
    return folder


CONFIGS = [{}, {"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token_id": [5, 6], "bos_token_id": 3}]
SETTINGS = [None, {}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": 0}, {"eos_token_id": [7, 8]}]


@needs("torch")
@pytest.mark.parametrize("ids", CONFIGS, ids=str)
def test_ends_of_generation(tmp_path, ids):
    """As transformers has them, and for a directory of mlx-lm's as that."""
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    folder = llama(tmp_path / "x")
    content = {k: v for k, v in json.loads((folder / "config.json").read_text("utf-8")).items() if "token_id" not in k}
    put(folder, "config.json", content | ids)
    arrays = TensorFile(folder / "model.safetensors")
    for settings in SETTINGS:
        (folder / "generation_config.json").unlink(missing_ok=True)
        if settings is not None:
            put(folder, "generation_config.json", settings)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        assert end_ids(open_model(folder).model) == listed(theirs), settings
        mark(folder, arrays)
        assert open_model(folder).format == "mlx-lm"
        assert end_ids(open_model(folder).model) == listed(utils.load_config(folder).get("eos_token_id")), settings
        mark(folder, arrays, "pt")


def listed(ids):
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def mark(folder, file, by="mlx"):
    """Write the tensors again, as transformers or MLX marks them."""
    arrays = {name: file.read(name) for name in file.entries}
    write_safetensors(folder / "new", {name: array.shape for name, array in arrays.items()}, arrays.items())
    content = (folder / "new").read_bytes().replace(b'{"format":"pt"}', b'{"format":"%s"}' % by.ljust(2).encode(), 1)
    size = int.from_bytes(content[:8], "little") + len(by.ljust(2)) - 2
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + content[8:])
    (folder / "new").unlink()


@pytest.mark.parametrize("to", ["twingpt", "hf", "mlx"])
def test_a_bos_is_no_end_of_text(tmp_path, to):
    folder = llama(tmp_path / "a", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    ids = {role: load_tokenizer(folder).roles[role] for role in ("bos", "eos")}
    put(folder, "config.json", {**json.loads((folder / "config.json").read_text("utf-8")), "eos_token_id": ids["eos"]})
    (folder / "generation_config.json").unlink()
    content = json.loads((folder / "config.json").read_text("utf-8"))
    del content["bos_token_id"]
    put(folder, "config.json", content)
    convert(open_model(folder), tmp_path / "b", to)
    written = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    assert (written["bos_token_id"], written["eos_token_id"]) == (ids["bos"], ids["eos"])


def heads(embedding, head):
    """Row -> what of an embedding and a head a file has, and what config.json says of tying them."""
    other = head + 1
    return {
        "tied, without a head": (True, embedding, None),
        "tied, with the same head": (True, embedding, embedding),
        "tied, with another head": (True, embedding, other),
        "tied, with the head alone": (True, None, embedding),
        "untied": (False, embedding, other),
        "usual, without a head": (None, embedding, None),
        "usual, with another head": (None, embedding, other),
    }


@needs("torch")
@pytest.mark.parametrize("family", FAMILIES)
def test_heads(tmp_path, family):
    model = build(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "a")
    file = TensorFile(tmp_path / "a" / "model.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text("utf-8"))
    arrays = {name: file.read(name) for name in file.entries}
    names = {part: next(n for n in arrays if n.endswith(ends)) for part, ends in ENDS.items()}
    for row, (tied, embedding, head) in heads(arrays[names["embedding"]], arrays[names["head"]]).items():
        given = {names["embedding"]: embedding, names["head"]: head}
        there = {name: array for name, array in {**arrays, **given}.items() if array is not None}
        shapes = {name: array.shape for name, array in there.items()}
        write_safetensors(tmp_path / "a" / "model.safetensors", shapes, there.items())
        content = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
        put(tmp_path / "a", "config.json", content if tied is None else content | {"tie_word_embeddings": tied})
        usual = tied if tied is not None else FAMILIES[family].defaults["tie_word_embeddings"]
        if not usual and head is None:  # transformers would make one of random numbers
            with pytest.raises(UserError, match="is missing from"):
                open_model(tmp_path / "a").model.parameters()
            continue
        theirs = their_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a"), TOKENS)
        ours = open_model(tmp_path / "a").model
        assert relative(reference.forward(dict(ours.parameters()), TOKENS, ours.config), theirs) <= 1e-5, row


ENDS = {
    "embedding": ("embed_tokens.weight", "wte.weight", "embed_in.weight"),
    "head": ("lm_head.weight", "embed_out.weight"),
}


@needs("torch")
@needs("mlx")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "granite", "olmo2", "gemma3_text"])
def test_heads_as_mlx_lm_takes_them(tmp_path, family):
    """Where config.json doesn't say, and for Gemma always, which goes by the file."""
    import twingpt.backends.mlx  # noqa: F401

    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    import mlx.core as mx

    changes = {"sliding_window": None} if family == "mistral" else {}  # it has no windows there
    build(family, tie_word_embeddings=family != "gemma3_text", **changes).save_pretrained(tmp_path)
    mark(tmp_path, TensorFile(tmp_path / "model.safetensors"))
    content = json.loads((tmp_path / "config.json").read_text("utf-8"))
    rope = content["rope_parameters"].get("full_attention", content["rope_parameters"])
    content |= {"rope_theta": rope["rope_theta"], "sliding_window_pattern": 3}
    content.pop("tie_word_embeddings")
    put(tmp_path, "config.json", content if family != "gemma3_text" else content | {"tie_word_embeddings": True})
    model, _ = utils.load_model(tmp_path)
    theirs = np.array(model(mx.array(TOKENS)).tolist())
    ours = open_model(tmp_path)
    assert ours.format == "mlx-lm" and ours.model.config.tie_embeddings == (family != "gemma3_text")
    computed = reference.forward(dict(ours.model.parameters()), TOKENS, ours.model.config)
    assert relative(computed, theirs) <= (2e-3 if family == "gemma3_text" else 1e-5)  # which rounds a factor


@needs("torch")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(tmp_path, dtype):
    """The numbers of the file, in float32, whatever config.json calls them."""
    import torch

    model = build("qwen3").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    theirs = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    read = dict(open_model(tmp_path).model.parameters())
    assert all(np.array_equal(array, theirs[name]) for name, array in read.items())


CARRIED = {
    "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": None, "unk_token": None,
    "chat_template": ONE, "padding_side": "left", "clean_up_tokenization_spaces": True,
    "additional_special_tokens": ["<|start_header_id|>"],
}  # fmt: skip
SAMPLING = {"temperature": 0.6, "do_sample": True, "eos_token_id": [3, 4], "bos_token_id": None, "pad_token_id": 4}


@pytest.mark.parametrize("to", ["twingpt", "hf", "mlx"])
def test_what_a_conversion_carries_over(tmp_path, to):
    """There, and back to a Hugging Face directory."""
    folder = llama(tmp_path / "a", **CARRIED)
    put(folder, "generation_config.json", SAMPLING)
    content = json.loads((folder / "config.json").read_text("utf-8"))
    put(folder, "config.json", content | {"bos_token_id": 7, "pad_token_id": 4})
    convert(open_model(folder), tmp_path / "b", to)
    convert(open_model(tmp_path / "b"), tmp_path / "c", "hf")
    first = transformers.AutoTokenizer.from_pretrained(folder)
    for name in "bc":
        there = tmp_path / name
        assert json.loads((there / "generation_config.json").read_text("utf-8")) == SAMPLING
        assert json.loads((there / "config.json").read_text("utf-8"))["pad_token_id"] == 4
        second = transformers.AutoTokenizer.from_pretrained(there)
        for role in ROLES:
            assert getattr(second, f"{role}_token") == getattr(first, f"{role}_token")
        for key in ("chat_template", "padding_side", "clean_up_tokenization_spaces", "all_special_ids"):
            assert getattr(second, key) == getattr(first, key), key
        assert second("a <s> b").input_ids == first("a <s> b").input_ids


OWN = {
    "byte": ByteTokenizer, "char": lambda: CharTokenizer("abc the\n"), "bpe": lambda: train_bpe(["the cat"] * 9, 300),
    "chat": lambda: train_bpe(["the cat"] * 9, 300, chat=True),
}  # fmt: skip


def ours(folder, tokenizer, **switches):
    config = GPTConfig(tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=32, init_std=0.2, **switches)
    save_model(folder, config, tokenizer, initialise(config, 3))
    return folder


def same_text(a, b):
    first, second = (twingpt.load(folder, device="cpu").generate("the", 5, temp=0) for folder in (a, b))
    return first == second


@needs("torch")
@pytest.mark.parametrize("kind", OWN)
def test_what_transformers_saved_from_ours_opens(tmp_path, kind):
    tokenizer = OWN[kind]()
    folder, saved = ours(tmp_path / "a", tokenizer), tmp_path / "b"
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(saved)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    assert open_model(saved).format == "huggingface" and same_text(folder, saved)
    assert open_model(saved).model.tokenizer().digest == tokenizer.digest


@needs("mlx")
@pytest.mark.parametrize("quantized", [False, True])
def test_what_mlx_lm_saved_from_ours_opens(tmp_path, quantized):
    import twingpt.backends.mlx  # noqa: F401

    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    folder = ours(tmp_path / "a", ByteTokenizer())
    mlx_lm.convert(str(folder), str(tmp_path / "b"), quantize=quantized, q_bits=8, q_group_size=32)
    assert open_model(tmp_path / "b").format == "mlx-lm"
    assert same_text(folder, tmp_path / "b")


@pytest.mark.parametrize("shape", [{}, {"mlp": "relu2"}], ids=["portable", "ours alone"])
def test_a_download_has_no_manifest(tmp_path, shape):
    folder = ours(tmp_path / "a", ByteTokenizer(), **shape)
    shutil.copytree(folder, tmp_path / "b", ignore=shutil.ignore_patterns("manifest.json", "README.md"))
    assert same_text(folder, tmp_path / "b")
    content = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    put(tmp_path / "b", "config.json", content | {"max_position_embeddings": 16})  # which goes before our section
    assert open_model(tmp_path / "b").model.config.block_size == 16


def test_what_git_and_people_put_beside_a_model_is_no_damage(tmp_path):
    folder = ours(tmp_path / "a", ByteTokenizer())
    (folder / ".git").mkdir()
    for name in ("README.md", ".gitattributes", "LICENSE", "LICENSE.txt", ".gitignore"):
        (folder / name).write_text("new")
    assert open_model(folder).format == "twingpt"


def test_weights_that_differ_from_the_manifest_are_refused_with_the_way_out(tmp_path, gpt):
    folder = ours(tmp_path / "a", ByteTokenizer())
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 64  # of the last number's exponent
    path.write_bytes(content)
    (tmp_path / "data.txt").write_text("the cat sat on the mat. " * 200)
    tuned = ("train", "--init-from", folder, "--data", tmp_path / "data.txt", "--max-iters", 1, "--out", tmp_path / "t")
    commands = [("convert", folder, tmp_path / "c"), ("generate", folder, "-m", 1), ("parity", folder), tuned]
    for command in commands:
        code, _, err = gpt(*command)
        assert code == 2 and "the file is damaged; if another tool saved it, remove manifest.json, or give a" in err
    with pytest.raises(UserError, match=r"if another tool saved it, remove manifest.json, or give a copy"):
        twingpt.load(folder)
    code, _, err = gpt("convert", folder, tmp_path / "b", "--ignore-manifest")
    assert code == 0, err
    (folder / "manifest.json").unlink()
    assert same_text(folder, tmp_path / "b")
    for command in commands:
        code, _, err = gpt(*command)
        assert code == 0, err


def test_a_continuation_is_decoded_with_what_stands_before_it(tmp_path):
    """As the rest of the whole text, but for what a decoder makes of a text's beginning."""
    for name in ("llama2", "unigram", "wordpiece", "gpt2"):
        ({**foreign.BYTE_LEVEL, **foreign.OTHERS}[name]()).save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(Path(tmp_path))
        ids = tokenizer.encode("the words of a text that teach a tokenizer, 東京 it's better.").tolist()
        for cut in range(1, len(ids)):
            before, rest = ids[:cut], ids[cut:]
            whole = tokenizer.decode(ids)
            streamed = tokenizer.decode(before) + "".join(tokenizer.stream(rest, before))
            if not tokenizer.decode(before).endswith("\ufffd"):  # in the midst of a character
                assert streamed == whole, (name, cut)
