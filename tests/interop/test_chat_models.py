"""Models as they are published for chat: several ends, a BOS, a vocabulary of another size than the tokenizer's."""

import json
from dataclasses import dataclass

import pytest

import twingpt
from tests import foreign
from tests.conftest import BOTH, needs, write_prose
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise
from twingpt.core.presets import SHAPES
from twingpt.core.tokenizer import load as load_tokenizer
from twingpt.weights.huggingface import write

GENERATION = "generation_config.json"
SAMPLED = {"temp": 1.5, "top_p": 1.0, "seed": 5}
both = pytest.mark.parametrize("backend", BOTH)


@pytest.fixture
def published(tmp_path):
    """A directory with random weights and one of the tokenizers of `foreign`; `more` ids than that has."""

    def make(scheme=foreign.qwen2, more=0, settings=None, roles=None, **config):
        tokenizer = scheme()
        size = tokenizer.get_vocab_size() + more
        model = GPTConfig(size, block_size=64, n_layer=1, n_embd=16, init_std=0.2, **SHAPES["llama"])
        folder = tmp_path / "published"
        write(folder, model, initialise(model, 2))
        content = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(content | config), "utf-8")
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(roles or {}), "utf-8")
        if settings is not None:
            (folder / GENERATION).write_text(json.dumps(settings), "utf-8")
        return folder

    return make


@dataclass
class Generated:
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: str


def generated(folder, backend="auto", prompt="The cat", count=12):
    """The text, and its ids without an end."""
    model = twingpt.load(folder, backend, "cpu")
    responses = list(model.stream(prompt, count, **SAMPLED))
    tokens = [response.token for response in responses if response.token not in model.ends]
    text = "".join(response.text for response in responses)
    return text, Generated(tokens, model.encode(prompt), responses[-1].finish_reason)


@both
def test_it_stops_at_every_end_that_the_settings_name(published, backend):
    _, free = generated(published(settings={}), backend)
    assert free.finish_reason == "length" and len(set(free.tokens[:8])) > 6
    fourth, eighth = free.tokens[3], free.tokens[7]
    for end, count in ([eighth, 0], 7), ([eighth, fourth], 3), (fourth, 3), ([], 12):
        _, stopped = generated(published(settings={"eos_token_id": end}), backend)
        assert stopped.tokens == free.tokens[:count]
        assert stopped.finish_reason == ("stop" if count < 12 else "length")
    assert generated(published(eos_token_id=fourth), backend)[1].tokens == free.tokens[:3]  # in config.json alone
    settings = {"eos_token_id": eighth}  # which go before config.json
    assert generated(published(settings=settings, eos_token_id=fourth), backend)[1].tokens == free.tokens[:7]


def test_it_stops_at_the_tokenizers_eos(published):
    model = twingpt.load(published(roles={"eos_token": "<|im_end|>"}))
    assert model.ends == {model.tokenizer.specials[name] for name in ("<|endoftext|>", "<|im_end|>")}


@pytest.mark.parametrize("end", ["</s>", [1, "2"], 1.5, True, {"a": 1}])
def test_ends_that_are_none(published, end):
    with pytest.raises(UserError, match=r"eos_token_id in .* must be a token's id or a list of them, and is"):
        twingpt.load(published(settings={"eos_token_id": end}))


@both
def test_a_prompt_begins_as_the_models_texts_did(published, backend):
    folder = published(foreign.llama3)
    tokenizer = load_tokenizer(folder)
    begin = tokenizer.specials["<|begin_of_text|>"]
    assert tokenizer.opening == (begin,) and begin not in tokenizer.encode("The cat")
    for prompt in ("The cat", ""):
        _, completion = generated(folder, backend, prompt)
        assert completion.prompt_tokens == [begin, *tokenizer.encode(prompt)]
    # A rendered chat prompt: its special tokens where that is asked for, and no second BOS.
    model, rendered = twingpt.load(folder, backend, "cpu"), "<|begin_of_text|>The cat<|eot_id|>"
    parsed = [begin, *tokenizer.encode("The cat"), tokenizer.specials["<|eot_id|>"]]
    assert model.encode(rendered, special=True) == parsed == model.encode(parsed)
    assert model.encode(rendered) == [begin, *tokenizer.encode(rendered)]
    assert model.generate(rendered, 5, special=True, **SAMPLED) == model.generate(parsed, 5, **SAMPLED)


def test_what_stands_before_a_text_by_scheme(tmp_path):
    openings = {}
    for name, make in {**foreign.BYTE_LEVEL, **foreign.OTHERS}.items():
        make().save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        spelled = {token: spelling for spelling, token in tokenizer.specials.items()}
        openings[name] = " ".join(spelled[token] for token in tokenizer.opening)
    with_one = {"llama3": "<|begin_of_text|>", "llama2": "<s>", "wordpiece": "[CLS]"}
    assert openings == dict.fromkeys(openings, "") | with_one


@both
def test_ids_that_pad_the_vocabulary_have_no_text(published, backend):
    folder = published(more=2000)
    known = load_tokenizer(folder)
    text, completion = generated(folder, backend, count=20)
    assert len(completion.tokens) == 20 and max(completion.tokens) >= known.vocab_size
    assert text == known.decode(token for token in completion.tokens if token < known.vocab_size)


@needs("torch")
def test_a_run_that_begins_with_a_padded_vocabulary_shows_samples(gpt, published, tmp_path):
    options = ["--max-iters", 2, "--sample-interval", 1, "--batch-size", 2, "--eval-iters", 1, "--backend", "torch"]
    source = ["--init-from", published(more=2000), "--data", write_prose(tmp_path)]
    code, _, err = gpt("train", *source, *options, "--out", tmp_path / "run")
    assert code == 0, err


def test_special_tokens_beyond_the_vocabulary_are_never_said(published):
    """As the image token of Gemma 3's tokenizer, in models for text alone."""
    folder = published(foreign.llama3, more=-2)
    model = twingpt.load(folder)
    assert model.tokenizer.vocab_size == model.config.vocab_size + 2 and len(generated(folder)[1].tokens)
    with pytest.raises(UserError, match=r"The tokenizer has \d+ ids and the model knows only \d+"):
        twingpt.load(published(foreign.llama3, more=-9))
