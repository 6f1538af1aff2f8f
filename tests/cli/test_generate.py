"""gpt generate and twingpt.load: the same text on both backends, whole characters, a clean end."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import numpy as np
import pytest

import twingpt
from tests.cli.test_train import SMALL
from tests.conftest import BOTH, ONE, decoded, dose, open_checkpoint
from twingpt.core import reference
from twingpt.core.backend import Device, Sampled
from twingpt.core.checkpoint import schema as checkpoint
from twingpt.core.checkpoint.quantize import dequantize
from twingpt.core.checkpoint.safetensors_file import TensorFile, write_safetensors
from twingpt.core.config import GPTConfig
from twingpt.core.kv_cache import KVCache
from twingpt.core.parameters import initialise
from twingpt.core.sampler import Sampling
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.inference.decoding import Row, decode
from twingpt.inference.language_model import LanguageModel
from twingpt.inference.load import stored_dtype
from twingpt.inference.prompt_cache import PromptCache
from twingpt.weights.quantize import quantize

both, one = pytest.mark.parametrize("backend", BOTH), pytest.mark.parametrize("backend", ONE)


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
            responses = list(model.stream(prompt, 64, seed=seed, temp=0.9, top_k=100))
            texts.append([(response.text, response.token) for response in responses])
        assert texts[0] == texts[1]
        assert len(texts[0]) == 64 or responses[-1].finish_reason == "stop"
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
    def copy(self, *args):
        raise NotImplementedError

    read_row = write_row = copy


class Scripted:
    """An inference engine that plays back tokens, and counts what is asked of it."""

    def __init__(self, tokens, block_size=16):
        self.config = GPTConfig(vocab_size=257, block_size=block_size, n_embd=32)
        self.tokens, self.steps, self.prefills, self.n_prompt = tokens, 0, [], []

    def new_cache(self, rows, capacity, *, kv_bits=None):
        return ScriptedCache(rows, self.config.block_size)

    def prefill(self, cache, row, tokens):
        self.prefills.append(tokens.tolist())
        cache.advance(slice(row, row + 1), len(tokens))

    def step(self, cache, sampling, u, *, log_probs=0):
        self.n_prompt += sampling.n_prompt.tolist()
        cache.check_room(slice(0, 1), 1)
        cache.advance(slice(0, 1), 1)
        self.steps += 1
        return self.tokens[min(self.steps, len(self.tokens)) - 1]  # it is a step ahead

    def read(self, handle):
        return Sampled(np.array([handle]), np.array([-1.0]))


def test_it_stops_at_end_of_text():
    text = [*b"done", 256, *b"more"]
    responses = list(LanguageModel(Scripted(text).config, ByteTokenizer(), Scripted(text)).stream("x", 9))
    assert [(r.text, r.token, r.finish_reason) for r in responses] == [
        *((chr(byte), byte, None) for byte in b"done"), ("", 256, "stop")
    ]  # fmt: skip
    assert [r.generation_tokens for r in responses] == [1, 2, 3, 4, 5]
    assert {(r.index, r.prompt_tokens, r.log_prob) for r in responses} == {(0, 1, -1.0)}
    assert all(r.prompt_tps > 0 for r in responses) and responses[0].generation_tps == 0 < responses[1].generation_tps


@pytest.mark.parametrize(
    ("stop", "text", "n"),
    [("\n\n", "one\ntwo ", 10), (["two", "one"], "", 3), ("o t", "one\ntwo \n\nthree", 16),
     ("e\ntwx", "one\ntwo \n\nthree", 16),
     (["thre", "three "], "one\ntwo \n\n", 14), ("ee", "one\ntwo \n\nthr", 15)],
)  # fmt: skip
def test_it_stops_before_a_stop_string(stop, text, n):
    written = [*b"one\ntwo \n\nthree", 256]
    engine = Scripted(written, block_size=64)
    responses = list(LanguageModel(engine.config, ByteTokenizer(), engine).stream("x", 30, stop=stop))
    assert "".join(r.text for r in responses) == text and len(responses) == n
    assert [r.finish_reason for r in responses] == [None] * (n - 1) + ["stop"]


def test_what_may_become_a_stop_string_is_held_back_and_given_in_the_end():
    engine = Scripted([*b"a--b--"], block_size=64)
    responses = list(LanguageModel(engine.config, ByteTokenizer(), engine).stream("x", 6, stop="--c"))
    assert [r.text for r in responses] == ["a", "", "", "--b", "", "--"]
    assert responses[-1].finish_reason == "length"
    with pytest.raises(twingpt.UserError, match="A stop string must be a text that isn't empty"):
        LanguageModel(engine.config, ByteTokenizer(), engine).stream("x", stop=["a", ""])


def test_characters_come_whole():
    text = [*"é東🙂!".encode()]
    model = LanguageModel(Scripted(text).config, ByteTokenizer(), Scripted(text))
    assert [r.text for r in model.stream("x", len(text))] == ["", "é", "", "", "東", "", "", "", "🙂", "!"]
    assert LanguageModel(model.config, ByteTokenizer(), Scripted(text)).generate("x", 4) == "é東"[:1] + "\ufffd"


def test_a_full_context_goes_on_from_its_last_half():
    engine = Scripted(list(range(100, 160)), block_size=16)
    tokens = decoded(engine, range(10), 40)
    assert tokens == list(range(100, 140))
    whole = [*range(10), *range(100, 140)]
    assert engine.prefills[0] == whole[:10]
    assert engine.prefills[1] == whole[8:16] and engine.prefills[2] == whole[16:24]
    assert engine.n_prompt == [10] * 6 + [2] * 8 + [0] * 26  # of what it holds


def test_a_prompt_longer_than_the_context_keeps_its_end():
    engine = Scripted(list(range(100, 160)), block_size=16)
    assert decoded(engine, range(50), 5) == list(range(100, 105))
    assert engine.prefills == [list(range(35, 50)), [*range(43, 50), 100]]
    assert engine.n_prompt == [15] + [7] * 4


@both
def test_completions_of_one_model_advance_side_by_side(trained, backend):
    model = twingpt.load(trained, backend=backend)
    prompts = {"The": {"temp": 0.9, "seed": 1}, "import os\nprint": {"temp": 0.0}, "a": {"repetition_penalty": 1.3}}

    def start(prompt):
        return (response.text for response in model.stream(prompt, 40, **prompts[prompt]))

    alone = ["".join(start(prompt)) for prompt in prompts]
    turns = zip_longest(*map(start, prompts), fillvalue="")
    assert ["".join(pieces) for pieces in zip(*turns, strict=True)] == alone
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(lambda prompt: "".join(start(prompt)), prompts)) == alone
    begun = next(pieces := start("The"))  # begun in one thread, gone on with in another
    with ThreadPoolExecutor(1) as pool:
        assert begun + pool.submit(lambda: "".join(pieces)).result() == alone[0]


@both
def test_generation_past_the_context(trained, backend):
    model = twingpt.load(trained, backend=backend)
    prompts = ["The", "A list is", "", "x = [1, 2"]
    settings = {"temp": 0.9, "seed": 3}
    alone = [list(model.stream(prompt, 120, **settings)) for prompt in prompts]
    for responses in alone:
        assert len(responses) == 120 or responses[-1].finish_reason == "stop"
    # Side by side, each with the same text: rows that fill their context or end at different times.
    beside = [[] for _ in prompts]
    for response in model.stream(prompts, 120, **settings):
        beside[response.index].append(response)
    assert [[r.token for r in row] for row in beside] == [[r.token for r in row] for row in alone]
    texts = ["".join(r.text for r in row) for row in alone]
    assert model.generate(prompts, 120, **settings) == texts
    ids = [model.encode(prompt) for prompt in prompts]
    assert model.generate(ids, 120, **settings) == texts
    assert model.generate(np.array(ids[0]), 120, **settings) == model.generate("The", 120, **settings) == texts[0]
    np.testing.assert_allclose(
        [r.log_prob for row in beside for r in row], [r.log_prob for row in alone for r in row], atol=1e-4
    )


@one
def test_one_prompt_has_several_texts_by_several_seeds(trained, backend):
    model = twingpt.load(trained, backend=backend)
    texts = model.generate(["The"] * 3, 20, seed=[1, 2, 1])
    assert texts[0] == texts[2] == model.generate("The", 20, seed=1) != texts[1] == model.generate("The", 20, seed=2)
    with pytest.raises(twingpt.UserError, match="There are 2 prompts and 3 seeds"):
        model.generate(["a", "b"], 2, seed=[1, 2, 3])


@one
def test_several_samples_of_a_prompt_share_its_prefill(trained, backend, monkeypatch):
    model = twingpt.load(trained, backend=backend)
    prefills, prefill = [], model.engine.prefill
    monkeypatch.setattr(model.engine, "prefill", lambda *args: prefills.append(args[1]) or prefill(*args))
    settings = {"seed": 4, "presence_penalty": 0.5, "repetition_penalty": 1.1}
    texts = model.generate("The", 20, num_samples=20, **settings)
    assert len(set(texts)) > 15 and prefills == [0, *prefills[1:]] and 1 < len(prefills) <= 5  # 16 begin as one
    assert texts[0] == model.generate("The", 20, **settings)
    many = model.generate(["a", "The", "b"], 20, num_samples=2, **settings)
    assert many == [model.generate(prompt, 20, num_samples=2, **settings) for prompt in ("a", "The", "b")]
    assert many[1] == texts[:2] and model.generate("The", 20, num_samples=1, **settings) == texts[:1]
    found = {(r.index, r.choice) for r in model.stream(["a", "b"], 3, num_samples=2)}
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1)}


@one
def test_penalties_and_biases_change_a_text(trained, backend):
    model = twingpt.load(trained, backend=backend)
    plain = list(model.stream("The", 30, temp=0, top_log_probs=3))
    for response in plain:
        assert len(response.top) == 3 and response.top[0] == (response.token, response.log_prob)
    tokens = [r.token for r in plain]
    never = model.stream("The", 30, temp=0, logit_bias={tokens[0]: -100})
    assert tokens[0] not in [r.token for r in never]
    assert {r.token for r in model.stream("The", 9, logit_bias={7: 100})} == {7}
    varied = [r.token for r in model.stream("The", 30, temp=0, frequency_penalty=2, presence_penalty=2)]
    assert len(set(varied)) > len(set(tokens))
    for settings, message in [
        ({"logit_bias": {512: 1}}, "logit_bias has the id 512, which is outside the vocabulary, 0 to 511"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
        ({"top_log_probs": 513}, "top_log_probs must be from 0 to 512"), ({"top_log_probs": -1}, "of at least 0"),
        ({"num_samples": True}, "num_samples must be a whole number"), ({"seed": None}, "A seed must be a whole"),
        ({"seed": [True]}, "A seed must be a whole number, and is True"), ({"seed": 1.5}, "seed must be a whole"),
    ]:  # fmt: skip
        with pytest.raises(twingpt.UserError, match=message):
            model.stream("The", 3, **settings)


@one
def test_settings_may_be_numbers_of_numpy(trained, backend):
    model = twingpt.load(trained, backend=backend)
    settings = {"temp": 0.5, "top_k": 40, "logit_bias": {7: 2}, "num_samples": 2, "top_log_probs": 2}
    kinds = {"temp": np.float32, "top_k": np.int64, "num_samples": np.int32, "top_log_probs": np.uint8}
    numpy = {name: kinds[name](value) if name in kinds else value for name, value in settings.items()}
    numpy["logit_bias"] = {np.int64(7): np.float32(2)}
    for seed, plain in ((np.int64(5), 5), (np.arange(3, 5), [3, 4])):
        prompt = ["The", "A"] if np.ndim(seed) else "The"
        pairs = zip(
            model.stream(prompt, np.int64(6), seed=seed, **numpy),
            model.stream(prompt, 6, seed=plain, **settings),
            strict=True,
        )
        assert all((a.token, a.log_prob, a.top, a.index) == (b.token, b.log_prob, b.top, b.index) for a, b in pairs)
    assert model.log_probs([[1, 2, 3]], top_k=np.int64(2)).top_ids.shape == (1, 2, 2)


@one
def test_samples_and_log_probabilities_in_json(gpt, trained, backend):
    options = ("generate", trained, "-p", "The", "-m", 9, "--backend", backend, "--seed", 2)
    several = ("--num-samples", 3, "--presence-penalty", 0.5, "--frequency-penalty", 0.1, "--logit-bias", "5=-100")
    code, out, err = gpt(*options, *several, "--logprobs", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    first, *rest = found["samples"]
    assert len(rest) == 2 and {key: found[key] for key in first} == first and found["text"] != rest[0]["text"]
    for sample in found["samples"]:
        assert len(sample["log_probs"]) == len(sample["tokens"]) and 5 not in sample["tokens"]
        for entry in sample["log_probs"]:
            assert [set(likely) for likely in entry["top"]] == [{"token", "log_prob"}] * 2
            assert entry["log_prob"] <= entry["top"][0]["log_prob"] <= 0
    out = gpt(*options, *several)[1]
    assert out == "\n".join(["The" + first["text"], *("\nThe" + sample["text"] for sample in rest)]) + "\n"
    found = json.loads(gpt(*options, "--logprobs", 0, "--json")[1])
    assert "samples" not in found and all(entry["top"] == [] for entry in found["log_probs"])


@one
def test_more_prompts_than_rows_wait_their_turn(trained, backend):
    model = twingpt.load(trained, backend=backend)
    rows = [Row(model.encode(prompt), Sampling(temp=0.9), 5 + n, n) for n, prompt in enumerate(["The", "a", "b"] * 3)]
    texts = {row: [] for row in rows}
    for row, token in decode(model.engine, rows, max_rows=2):
        texts[row].append(token.id)
        row.done = row.done or len(texts[row]) == 3 * (row.seed % 2 + 1)
    for row, tokens in texts.items():
        assert len(tokens) == min(row.max_tokens, 3 * (row.seed % 2 + 1))
        assert tokens == decoded(model.engine, row.tokens[: row.n_prompt], len(tokens), row.sampling, seed=row.seed)
    assert list(decode(model.engine, [])) == []


@one
def test_a_response_has_the_log_probability_of_the_raw_model(trained, backend):
    model = twingpt.load(trained, backend=backend)
    prompt = model.encode("The value")
    responses = list(model.stream(prompt, 12, temp=1.3, top_k=3, repetition_penalty=1.5))
    text = [*prompt, *(r.token for r in responses)]
    expected = model.log_probs([text]).targets[0, len(prompt) - 1 :]
    np.testing.assert_allclose([r.log_prob for r in responses], expected, atol=1e-4)


@one
def test_log_probs(trained, backend):
    model = twingpt.load(trained, backend=backend)
    tokens = np.arange(24).reshape(2, 12)
    logits = model.logits(tokens).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = model.log_probs(tokens, top_k=3)
    expected = np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.targets, expected, atol=1e-5)
    np.testing.assert_allclose(found.top, -np.sort(-log_p[:, :-1], axis=-1)[..., :3], atol=1e-5)
    assert not model.log_probs(tokens, np.full((2, 12), -1)).targets.any()
    for arguments, message in [
        ((tokens, tokens[:, 1:]), r"Targets must be integers of shape \(2, 12\)"),
        ((tokens, np.full((2, 12), 10**6)), "Target 1000000 is outside the vocabulary"),
        (([[1, 2], [3]],), "rows of one length"),
        (([[1]],), "shape"),
    ]:
        with pytest.raises(twingpt.UserError, match=message):
            model.log_probs(*arguments)
    with pytest.raises(twingpt.UserError, match="top_k must be from 0 to"):
        model.log_probs(tokens, top_k=10**6)


@one
def test_prompts_that_are_none(trained, backend):
    model = twingpt.load(trained, backend=backend)
    for prompt, message in [
        (None, "must be a text or a list of ids"), (5, "must be a text"), ({"a": 1}, "must be a text"),
        (iter("ab"), "must be a text"),
        ([10**6], "id outside the vocabulary"), ([-1], "id outside"), ([[1], 2], "must be a text or a list of ids"),
        ([0.5], "must be a text or a list of ids"), (["a", None], "must be a text or a list of ids"),
        ("a\udcff", "UTF-8"),
    ]:  # fmt: skip
        with pytest.raises(twingpt.UserError, match=message):
            model.generate(prompt, 2)
    assert model.generate(["a"], 3) == [model.generate("a", 3)]
    for settings in ({"stop": [5]}, {"stop": [b"a"]}, {"max_tokens": 3.5}, {"max_tokens": None}, {"temp": None},
                     {"top_k": 2.5}):  # fmt: skip
        with pytest.raises(twingpt.UserError, match="must be a"):
            model.generate("a", **settings)
    assert model.generate("a", 3, stop=None) == model.generate("a", 3)


@one
def test_a_model_without_a_tokenizer_takes_ids(trained, tmp_path, backend):
    opened = open_checkpoint(trained)
    checkpoint.save_model(tmp_path / "bare", opened.config, None, opened.parameters())
    bare, whole = twingpt.load(tmp_path / "bare", backend=backend), twingpt.load(trained, backend=backend)
    ids = whole.encode("The value")
    assert bare.tokenizer is None and np.array_equal(bare.logits([ids]), whole.logits([ids]))
    found, expected = list(bare.stream(ids, 9, seed=4)), list(whole.stream(ids, 9, seed=4))
    assert [r.token for r in found][: len(expected)] == [r.token for r in expected]
    assert not any(r.text for r in found)
    for call in (lambda: bare.generate("a"), lambda: bare.encode("a"), lambda: bare.generate(ids)):
        with pytest.raises(twingpt.UserError, match="has no tokenizer"):
            call()
    with pytest.raises(twingpt.UserError, match="no end of text to begin a document after"):
        bare.stream([])


@pytest.mark.parametrize("stored", ["F32", "BF16", "F16", "mixed"])
def test_the_precision_is_that_of_the_stored_weights_where_the_device_is_fast_at_it(stored):
    class Stored:
        def dtypes(self):
            return {"U32": 9, "BF16": 5, "F32": 2} if stored == "mixed" else {stored: 3}

    both, slow = (Device("d", "cpu", "", ("float32", "bfloat16", "float16"), fast, "float32", None)
                  for fast in (("float32", "bfloat16", "float16"), ("float32",)))  # fmt: skip
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "mixed": "bfloat16"}
    assert stored_dtype(Stored(), both) == names[stored] and stored_dtype(Stored(), slow) == "float32"


@one
def test_it_says_where_and_in_what_precision_it_runs(gpt, trained, backend):
    code, _, err = gpt("generate", trained, "-p", "a", "-m", 2, "--backend", backend, "--device", "cpu")
    assert code == 0 and f"{backend} on cpu, in float32" in err
    code, out, _ = gpt(
        "generate", trained, "-p", "a", "-m", 9, "--backend", backend, "--dtype", "bfloat16", "--json", "--stop", "e"
    )
    found = json.loads(out)
    assert code == 0 and found["dtype"] == "bfloat16" and found["backend"] == backend and "e" not in found["text"]


@both
def test_the_smallest_context(tmp_path, backend):
    config = GPTConfig(vocab_size=257, block_size=2, n_layer=1, n_embd=32, n_head=2)
    checkpoint.save(tmp_path / "small", config, ByteTokenizer(), dict(initialise(config, 0)))
    responses = list(twingpt.load(tmp_path / "small", backend).stream("abc", 5))
    assert len(responses) == 5 or responses[-1].finish_reason == "stop"


@both
def test_an_empty_prompt_begins_a_document(trained, backend):
    model = twingpt.load(trained, backend=backend)
    assert next(model.stream("", 5)).prompt_tokens == 0
    assert model.generate("", 20) == model.generate([], 20) != ""


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
     (["-m", 0], "max_tokens must be a whole number of at least 1"), (["--device", "cuda:7"], "Unknown"),
     (["--presence-penalty", 3], "presence_penalty must be from -2 to 2"),
     (["--logit-bias", "5"], "--logit-bias must be ID=NUMBER, as in 50=-100, and is '5'"),
     (["--logit-bias", "5=1e9"], "logit_bias must be numbers from -100 to 100 by token id"),
     (["--logit-bias", "512=1"], "outside the vocabulary, 0 to 511"),
     (["--logprobs", 2], "--logprobs shows nothing without --json"),
     (["--num-samples", 0], "num_samples must be a whole number of at least 1"),
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


@pytest.mark.parametrize("settings", [(), ("--temp", 0), ("--json",)])
@pytest.mark.parametrize("backend", BOTH)
def test_an_overflow_in_half_precision_is_one_sentence(gpt, tmp_path, backend, settings):
    config = GPTConfig(257, block_size=16, n_layer=1, n_head=2, n_embd=32, init_std=0.2)
    tensors = {name: array * 3000 if "mlp" in name else array for name, array in initialise(config, 1)}
    checkpoint.save_model(tmp_path / "large", config, ByteTokenizer(), tensors.items())
    common = ("generate", tmp_path / "large", "-p", "a", "-m", 3, "--backend", backend, "--device", "cpu", *settings)
    code, out, err = gpt(*common, "--dtype", "float16")
    assert code == 2 and err.endswith("gpt: The model's logits are not finite: compute in float32, or look at its "
                                      "weights.\n"), (out, err)  # fmt: skip
    assert gpt(*common, "--dtype", "float32")[0] == 0


@pytest.mark.parametrize("max_iters", dose(60, 400))
def test_a_quantized_kv_cache_costs_little_held_out_loss(tmp_path, max_iters):
    """By the reference, which the twins equal (test_quantized.py): at most 0.1 % in 8 bits."""
    from twingpt.training.launch import new_run
    from twingpt.training.trainer import Trainer

    options = {
        "data": "python-docs", "vocab_size": 512, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 128,
        "block_size": 64, "batch_size": 16, "max_iters": max_iters, "eval_interval": 0, "sample_interval": 0,
        "checkpoint_interval": 0, "eval_iters": 2,
    }  # fmt: skip
    trainer = Trainer(new_run(options, tmp_path / "run", "auto", "cpu"))
    trainer.fit()
    opened = open_checkpoint(tmp_path / "run")
    params = dict(opened.parameters())
    tokens, targets = next(iter(trainer.state.data.validation(32, 64, 1)))

    def loss(kv_bits):
        def kv_store(layer, *exact):
            return [dequantize(64, *quantize(x, kv_bits, 64)) for x in exact]

        logits = reference.forward(params, tokens, opened.config, kv_store if kv_bits else None)
        return reference.cross_entropy(logits, targets).sum() / (targets >= 0).sum()

    exact = loss(None)
    assert exact < 5
    costs = {bits: abs(loss(bits) / exact - 1) for bits in (8, 4)}
    assert 0 < costs[8] < 1e-3 and costs[8] < costs[4] < 0.05


@one
def test_kv_bits(gpt, tmp_path, decided, backend):
    config = GPTConfig(vocab_size=257, block_size=48, n_layer=2, n_head=1, n_embd=64, init_std=0.3)
    checkpoint.save_model(tmp_path / "wide", config, ByteTokenizer(), initialise(config, 29))
    model = twingpt.load(tmp_path / "wide", backend=backend)
    texts = {}
    for bits in (None, 8, 4):
        option = [] if bits is None else ["--kv-bits", bits]
        code, out, err = gpt("generate", tmp_path / "wide", "-p", "The", "-m", 60, "--backend", backend, *option)
        assert code == 0, err
        texts[bits] = out.removeprefix("The").removesuffix("\n")
        assert texts[bits] == model.generate("The", 60, kv_bits=bits)
    assert texts[4] != texts[None]
    assert model.generate(["The", "A class"], 60, kv_bits=8)[0] == texts[8]
    for folder, bits, message in (
        (decided, 8, "the model's heads are 16 wide: leave out kv_bits."),
        (tmp_path / "wide", 5, "kv_bits must be 8 or 4, and is 5."),
    ):
        code, out, err = gpt("generate", folder, "-p", "The", "--kv-bits", bits, "--backend", backend)
        assert code == 2 and message in " ".join(err.split())


def wide(folder, seed=29, **switches):
    """A model whose heads can be quantized, with a window, learned positions and smear."""
    config = GPTConfig(
        vocab_size=257, block_size=48, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, head_dim=32, init_std=0.3,
        sliding_window=20, position="learned", smear=True, **switches,
    )  # fmt: skip
    checkpoint.save_model(folder, config, ByteTokenizer(), initialise(config, seed))
    return folder


class Counted:
    """How many positions an engine prefills."""

    def __init__(self, engine, monkeypatch):
        self.n, prefill = 0, engine.prefill

        def counted(cache, row, tokens):
            self.n += len(tokens)
            return prefill(cache, row, tokens)

        monkeypatch.setattr(engine, "prefill", counted)


@pytest.mark.parametrize("kv_bits", [None, 8])
@both
def test_a_prompt_that_begins_alike_is_prefilled_from_there(tmp_path, backend, kv_bits, monkeypatch):
    model = twingpt.load(wide(tmp_path / "wide"), backend=backend)
    begin = "A prompt that is long, "
    prompts = [begin + "or", begin + "not so long", begin, begin + "or", "Another", "A", begin + "or not"]
    new = [25, 11, 1, 1, 6, 1, 4]  # the last id is run each time, to have logits
    # A key between two codes may get the other one where it is computed in another chunk: a longer text may tell.
    n_tokens = 5 if kv_bits else 40  # past the context

    def tokens(prompt, **settings):
        responses = model.stream(prompt, n_tokens, seed=3, kv_bits=kv_bits, **settings)
        return sorted((response.index, response.generation_tokens, response.token) for response in responses)

    alone = [tokens(prompt) for prompt in prompts]
    cache, counted = PromptCache(model.engine, kv_bits=kv_bits), Counted(model.engine, monkeypatch)
    for prompt, expected, n in zip(prompts, alone, new, strict=True):
        before, reused = counted.n, cache.reused
        next(model.stream(prompt, 1, seed=3, kv_bits=kv_bits, prompt_cache=cache))
        assert (counted.n - before, cache.reused - reused) == (n, len(prompt) - n)
        assert tokens(prompt, prompt_cache=cache) == expected
    assert len(cache.rows) == 3  # one that another begins with is not kept beside it
    beside = [(index, *rest) for index, row in enumerate(alone) for _, *rest in row]
    assert tokens(prompts, prompt_cache=cache) == beside  # rows of one batch
    several = {"num_samples": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.5}  # of ids that were restored too
    assert tokens(prompts[1], prompt_cache=cache, **several) == tokens(prompts[1], **several)
    long = "x" * 60  # its last 47 are the prompt
    assert tokens(long, prompt_cache=cache) == tokens(long)
    assert len(cache.rows[0][0]) == 47
    for other in (PromptCache(model.engine, kv_bits=4), PromptCache(twingpt.load(tmp_path / "wide").engine)):
        with pytest.raises(twingpt.UserError, match="that of another engine, or of other kv_bits"):
            model.stream("A", kv_bits=kv_bits, prompt_cache=other)


@one
def test_a_prompt_cache_keeps_to_its_bytes(tmp_path, backend):
    """Of two layers, keys and values of 32 float32, and an id, a position has 516 bytes; active rows count."""
    model = twingpt.load(wide(tmp_path / "wide"), backend=backend)
    cache = PromptCache(model.engine, max_bytes=516 * 31 + 500)

    def lengths(prompt, max_tokens):
        model.generate(prompt, max_tokens, prompt_cache=cache)
        return [len(ids) for ids, _ in cache.rows]

    assert lengths("a" * 10, 1) == [10]  # beside 11 that are decoded
    assert lengths("b" * 5, 5) == [5, 10]
    assert lengths("a" * 10, 1) == [10, 5]
    assert lengths("c" * 6, 6) == [6, 10]  # 12 are decoded: 19 are left, and the one used longest ago goes
    assert lengths("d" * 6, 30) == [] and cache.refused == 1
    assert lengths("e" * 15, 1) == [15]
    assert lengths("f" * 16, 1) == [] and cache.refused == 2
    assert lengths(["g" * 5, "h" * 5], 3) == [5, 5]
    model.generate("g" * 5, 3, num_samples=3, prompt_cache=cache)  # 24 are decoded
    assert [bytes(ids.tolist()) for ids, _ in cache.rows] == [b"ggggg"]
    model.generate([chr(n) + "x" for n in range(100)], 1, prompt_cache=(many := PromptCache(model.engine)))
    assert len(many.rows) == 64 and bytes(many.rows[0][0].tolist()) == b"cx"


@pytest.mark.parametrize("options", [[], ["--kv-bits", 4], ["--dtype", "bfloat16"]], ids=["full", "4", "bfloat16"])
def test_a_prompt_cache_in_a_file_serves_both_backends(gpt, tmp_path, twins, options):
    model, file = wide(tmp_path / "wide"), tmp_path / "a" / "prompt.safetensors"

    def run(prompt, backend, *more):
        return gpt("generate", model, "-p", prompt, "-m", 20, "--backend", backend, "--temp", 0, *options, *more)

    kept = ["--prompt-cache-file", file]
    assert run("The value of", "mlx", *kept)[::2] == (
        2, f"gpt: There is no folder {file.parent} for the prompt cache: make it, or give another file.\n"
    )  # fmt: skip
    file.parent.mkdir()
    for prompt, backend, n in (("The value of", "mlx", 0), ("The value", "torch", 8), ("The value is", "torch", 10)):
        code, out, err = run(prompt, backend, *kept)
        assert code == 0 and f"\n{n} of the prompt's tokens were in {file}\n" in err
        assert options or out == run(prompt, backend)[1]  # rounded, one backend's keys are not quite the other's
    before = file.read_bytes()
    assert run("The value of", "torch", *kept)[0] == 0 and file.read_bytes() == before  # nothing new
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    code, _, err = run("Something else", "mlx", *kept, "--prompt-cache-bytes", 100)
    assert code == 0 and "too long to be kept in --prompt-cache-bytes" in err


@one
def test_a_prompt_cache_of_another_model_or_damaged_is_refused(gpt, tmp_path, backend):
    model, file = wide(tmp_path / "wide"), tmp_path / "prompt.safetensors"

    def refusal(folder, *options):
        command = ("generate", folder, "-p", "The", "-m", 2, "--backend", backend, "--prompt-cache-file", file)
        code, _, err = gpt(*command, *options)
        assert code == 2, err
        return err

    assert gpt("generate", model, "-p", "The", "-m", 2, "--backend", backend, "--prompt-cache-file", file)[0] == 0
    for other in (wide(tmp_path / "seed", 30), wide(tmp_path / "config", attn_softcap=5.0)):
        assert "is the prompt cache of another model: give each model a file of its own." in refusal(other)
    assert "was made with kv_bits 'none', and this is 8: give the same" in refusal(model, "--kv-bits", 8)
    assert "was made with dtype 'float32', and this is bfloat16" in refusal(model, "--dtype", "bfloat16")
    whole, tensors = TensorFile(file), {}
    for name in whole.entries:
        tensors[name] = whole.read(name)

    def write(changed, metadata=whole.metadata):
        dtypes = {name: "I32" if array.dtype == np.int32 else "F32" for name, array in changed.items()}
        shapes = {name: array.shape for name, array in changed.items()}
        write_safetensors(file, shapes, changed.items(), dtypes, metadata)

    first = "0.layers.0.keys"
    for changed, message in (
        ({name: array for name, array in tensors.items() if name != first}, f"its tensor {first} is not one of"),
        (tensors | {first: tensors[first][:, :2]}, f"its tensor {first} is not one of this model's cache."),
        (tensors | {"x": tensors[first]}, "its tensor x is not one of this model's cache"),
        (tensors | {"64.tokens": tensors["0.tokens"]}, "its tensor 64.tokens is not one of this model's cache"),
        (tensors | {"0.tokens": np.array([5, 6, 257], np.int32)}, "has ids, or more of them, than this model can take"),
        (tensors | {"0.tokens": np.array([5, 6, -1], np.int32)}, "has ids, or more of them"),
    ):
        write(changed)
        assert message in refusal(model)
    write(tensors, {"format": "pt"})
    assert f"{file} is not a prompt cache: give another file." in refusal(model)
    file.write_bytes(file.read_bytes()[:-1])
    assert "is not a readable safetensors file" in refusal(model)
    file.unlink()
    file.mkdir()
    assert str(file) in refusal(model)
