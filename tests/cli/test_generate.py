"""gpt generate and twingpt.load: the same text on both backends, whole characters, a clean end."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import numpy as np
import pytest

import twingpt
from tests.cli.test_train import SMALL
from tests.conftest import BOTH, open_checkpoint
from twingpt.core.backend import Sampled
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.config import GPTConfig
from twingpt.core.kv_cache import KVCache
from twingpt.core.parameters import initialise
from twingpt.core.sampler import Sampling
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.inference.generator import LanguageModel, generate_tokens

both = pytest.mark.parametrize("backend", BOTH)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has learned something, or sampling would be tested on near-uniform distributions only."""
    from twingpt.training.launch import new_run
    from twingpt.training.trainer import Trainer

    options = {
        "data": "python-docs", "vocab_size": 512, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64,
        "block_size": 48, "batch_size": 16, "max_iters": 60, "learning_rate": 3e-3, "eval_interval": 0,
        "sample_interval": 0, "checkpoint_interval": 0, "eval_iters": 2,
    }  # fmt: skip
    run = tmp_path_factory.mktemp("trained") / "run"
    summary = Trainer(new_run(options, run, "auto", "cpu")).fit()
    assert summary["val_loss"] < 5
    return run


PROMPTS = [
    "The", "A class", "import", "If the", "def f(x):", "\n\n", "   ", "return", "Note that", "é", "An object",
    "for x in", "The with statement", "1", "(", "**", "See also", "Python", "the value of the", "🙂",
]  # fmt: skip


@pytest.fixture
def decided(tmp_path):
    """A model that is as far from uniform as a trained one, and of the same weights on every processor.

    In none of the choices below are two logits nearer than 4e-5, or u nearer than 2e-5 to a token's bounds. A
    trained model differs from one processor to the next, and on one in ten it has a tie that rounding decides.
    """
    config = GPTConfig(vocab_size=257, block_size=48, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, init_std=0.3)
    checkpoint.save_model(tmp_path / "decided", config, ByteTokenizer(), initialise(config, 29))
    return tmp_path / "decided"


def test_the_same_seed_gives_the_same_tokens_on_both_backends(decided, twins):
    assert len(PROMPTS) == 20
    models = [twingpt.load(decided, backend=engines.NAME, device="cpu") for engines in twins]
    for seed, prompt in enumerate(PROMPTS):
        texts = []
        for model in models:
            completion = model.complete(prompt, 64, seed=seed, temp=0.9, top_k=100)
            texts.append(("".join(completion), completion.tokens))
        assert texts[0] == texts[1]
        assert len(texts[0][1]) == 64 or completion.finish_reason == "stop"
    greedy = [model.generate("The", 64, temp=0) for model in models]
    assert greedy[0] == greedy[1]


def test_another_seed_gives_another_text(trained):
    model = twingpt.load(trained)
    assert model.generate("The", 40, seed=1) == model.generate("The", 40, seed=1) != model.generate("The", 40, seed=2)


@both
def test_json(gpt, trained, backend):
    code, out, err = gpt("generate", trained, "-p", "The value", "-m", 20, "--seed", 3, "--backend", backend, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert set(result) >= {"text", "tokens", "prompt_tokens", "finish_reason", "tokens_per_second"}
    tokenizer = open_checkpoint(trained).tokenizer()
    assert tokenizer.decode(result["tokens"]) == result["text"]
    assert tokenizer.decode(result["prompt_tokens"]) == "The value"
    assert result["finish_reason"] == "length" and len(result["tokens"]) == 20 and result["tokens_per_second"] > 0
    again = json.loads(gpt("generate", trained, "-p", "The value", "-m", 20, "--seed", 3, "--json")[1])
    assert again["tokens"] == result["tokens"]


def test_text_on_stdout_and_prompt_from_stdin(gpt, trained, stdin):
    stdin(b"The value")
    code, out, _ = gpt("generate", trained, "-p", "-", "-m", 10)
    assert code == 0 and out.startswith("The value") and len(out) > 12


class ScriptedCache(KVCache):
    def copy(self, source, row):
        raise NotImplementedError


class Scripted:
    """An inference engine that plays back tokens, and counts what is asked of it."""

    def __init__(self, tokens, block_size=16):
        self.config = GPTConfig(vocab_size=257, block_size=block_size, n_embd=32)
        self.tokens, self.steps, self.prefills = tokens, 0, []

    def new_cache(self, rows, capacity):
        return ScriptedCache(rows, self.config.block_size)

    def prefill(self, cache, row, tokens):
        self.prefills.append(tokens.tolist())
        cache.advance(slice(row, row + 1), len(tokens))

    def step(self, cache, sampling, u):
        cache.check_room(slice(0, 1), 1)
        cache.advance(slice(0, 1), 1)
        self.steps += 1
        return self.tokens[self.steps - 1]

    def read(self, handle):
        return Sampled(np.array([handle]), np.array([-1.0]))


def test_it_stops_at_end_of_text():
    text = [*b"done", 256, *b"more"]
    completion = LanguageModel(Scripted(text).config, ByteTokenizer(), Scripted(text)).complete("x", 9)
    assert "".join(completion) == "done"
    assert completion.finish_reason == "stop" and completion.tokens == [*b"done"]


def test_characters_come_whole():
    text = [*"é東🙂!".encode()]
    pieces = list(LanguageModel(Scripted(text).config, ByteTokenizer(), Scripted(text)).complete("x", len(text)))
    assert pieces == ["é", "東", "🙂", "!"]


def test_a_full_context_goes_on_from_its_last_half():
    engine = Scripted(list(range(100, 160)), block_size=16)
    tokens = list(generate_tokens(engine, np.arange(10), Sampling(), 40, seed=0))
    assert tokens == list(range(100, 140))
    whole = [*range(10), *range(100, 140)]
    assert engine.prefills[0] == whole[:10]
    assert engine.prefills[1] == whole[8:16] and engine.prefills[2] == whole[16:24]


def test_a_prompt_longer_than_the_context_keeps_its_end():
    engine = Scripted(list(range(100, 160)), block_size=16)
    assert list(generate_tokens(engine, np.arange(50), Sampling(), 5, seed=0)) == list(range(100, 105))
    assert engine.prefills[0] == list(range(34, 50))


@both
def test_completions_of_one_model_advance_side_by_side(trained, backend):
    model = twingpt.load(trained, backend=backend)
    prompts = {"The": {"temp": 0.9, "seed": 1}, "import os\nprint": {"temp": 0.0}, "a": {"repetition_penalty": 1.3}}

    def start(prompt):
        return model.complete(prompt, 40, **prompts[prompt])

    alone = ["".join(start(prompt)) for prompt in prompts]
    turns = zip_longest(*map(start, prompts), fillvalue="")
    assert ["".join(pieces) for pieces in zip(*turns, strict=True)] == alone
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda prompt: "".join(start(prompt)), prompts)) == alone
    completion = start("The")
    begun = next(pieces := iter(completion))  # begun in one thread, gone on with in another
    with ThreadPoolExecutor(1) as pool:
        assert begun + pool.submit(lambda: "".join(pieces)).result() == alone[0]


@both
def test_generation_past_the_context(trained, backend):
    model = twingpt.load(trained, backend=backend)
    completion = model.complete("The", 120)
    text = "".join(completion)
    assert len(completion.tokens) == 120 or completion.finish_reason == "stop"
    assert text == completion.text


@both
def test_the_smallest_context(tmp_path, backend):
    config = GPTConfig(vocab_size=257, block_size=2, n_layer=1, n_embd=32, n_head=2)
    checkpoint.save(tmp_path / "small", config, ByteTokenizer(), dict(initialise(config, 0)))
    completion = twingpt.load(tmp_path / "small", backend).complete("abc", 5)
    list(completion)
    assert len(completion.tokens) == 5 or completion.finish_reason == "stop"


@both
def test_an_empty_prompt_begins_a_document(trained, backend):
    model = twingpt.load(trained, backend=backend)
    assert model.complete("", 5).prompt_tokens == []
    assert model.generate("", 20)


@both
def test_logits(trained, backend):
    from twingpt.core import reference

    model = twingpt.load(trained, backend=backend, device="cpu")
    opened = open_checkpoint(trained)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 33))
    logits, expected = model.logits(tokens), reference.forward(dict(opened.parameters()), tokens, opened.config)
    assert logits.shape == (2, 33, opened.config.vocab_size) and logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(twingpt.UserError, match="outside the vocabulary"):
        model.logits(np.array([[opened.config.vocab_size]]))
    with pytest.raises(twingpt.UserError, match="rows of one length"):
        model.logits([[1, 2], [3]])
    with pytest.raises(twingpt.UserError, match="more than the model's block_size"):
        model.logits(np.zeros((1, 49), int))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--temp", -1], "temp must be 0 (greedy) or from 0.001 to 1000"), (["--top-p", 0], "top_p must be in (0, 1]"),
     (["-m", 0], "max_tokens must be at least 1"), (["--device", "cuda:7"], "Unknown"),
     (["--dtype", "float8"], "Unknown dtype"), (["--backend", "jax"], "Unknown backend 'jax'")],
)  # fmt: skip
def test_mistakes(gpt, trained, arguments, message):
    code, _, err = gpt("generate", trained, "-p", "x", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_character_the_model_never_saw(gpt, prose, tmp_path):
    gpt("train", "--data", prose, "--out", tmp_path / "run", *SMALL, "--tokenizer", "char", "--max-iters", 1)
    code, _, err = gpt("generate", tmp_path / "run", "-p", "a€b")
    assert code == 2 and "'€' is not among" in err


def test_no_such_model(gpt, tmp_path):
    code, _, err = gpt("generate", tmp_path / "nothing", "-p", "x")
    assert code == 2 and "There is no run" in err


def test_a_prompt_that_is_not_text(gpt, trained, stdin):
    code, _, err = gpt("generate", trained, "-p", "a\udcff")
    assert code == 2 and "not valid UTF-8" in err
    stdin(b"a\xff")
    code, _, err = gpt("generate", trained, "-p", "-")
    assert code == 2 and "byte 1" in err
    stdin(None)
    code, _, err = gpt("generate", trained, "-p", "-")
    assert code == 2 and "no stdin" in err
