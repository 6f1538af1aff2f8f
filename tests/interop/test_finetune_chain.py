"""From transformers and back: a GPT-2 is fine-tuned on torch, goes on on MLX, and opens in transformers."""

import itertools
import json

import numpy as np
import pytest

from tests import foreign
from tests.conftest import cpu, decoded, open_checkpoint
from twingpt.core import reference

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHORT = ["--max-iters", 8, "--eval-interval", 4, "--eval-iters", 2, "--sample-interval", 0, "--batch-size", 4]


@pytest.fixture
def gpt2(tmp_path):
    """A tiny random model of transformers' with a byte-level tokenizer, as save_pretrained writes them."""
    transformers.set_seed(3)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=foreign.gpt2(), eos_token="<|endoftext|>")
    sizes = {"vocab_size": len(tokenizer), "n_positions": 48, "n_layer": 2, "n_head": 2, "n_embd": 32}
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(**sizes, initializer_range=0.2, bos_token_id=end, eos_token_id=end)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_fine_tuned_on_torch_and_mlx_and_back_to_transformers(gpt, twins, gpt2, prose, tmp_path):
    def ran(*arguments):
        code, out, err = gpt(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    run = tmp_path / "run"
    start = ["--init-from", gpt2, "--data", prose, "--out", run, "--learning-rate", 0.01]
    ran("train", *start, *SHORT, "--stop-after", 4, "--backend", "torch")
    first = open_checkpoint(f"{run}@0")
    model, tokenizer = theirs(gpt2)
    assert first.tokenizer().encode("The cat sat").tolist() == tokenizer.encode("The cat sat")
    weights = [dict(first.parameters()), dict(open_checkpoint(run).parameters())]
    assert np.array_equal(weights[0]["model.embed_tokens.weight"], model.transformer.wte.weight.numpy())
    assert ran("train", "--resume", run, "--backend", "mlx")["step"] == 8
    trained = open_checkpoint(run)
    weights.append(dict(trained.parameters()))
    for a, b in itertools.pairwise(weights):  # each backend trained all of it
        assert all(np.abs(a[name] - b[name]).max() > 1e-4 for name in a)
    assert ran("convert", run, tmp_path / "hf", "--to", "hf")["family"] == "gpt2"

    model, tokenizer = theirs(tmp_path / "hf")
    prompt = tokenizer("The bird", return_tensors="pt")["input_ids"]
    text = model.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    logits, tokens = model(text).logits.numpy(), text.numpy()
    expected = reference.forward(weights[-1], tokens, trained.config)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    n = prompt.shape[1]
    assert tokens.shape == (1, n + 20) and expected[0, n - 1 : -1].argmax(-1).tolist() == tokens[0, n:].tolist()
    for engines in twins:
        engine = engines.InferenceEngine(trained.config, trained.stored(), cpu(engines))
        assert np.abs(engine.forward(tokens) - logits).max() <= 1e-5 * np.abs(logits).max()
        assert decoded(engine, tokens[0, :n], 20) == tokens[0, n:].tolist()


def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    return model, transformers.AutoTokenizer.from_pretrained(folder)
