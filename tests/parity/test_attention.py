"""Attention by blocks of queries against plain attention that autograd differentiates, and against the reference."""

from functools import partial
from importlib import import_module

import numpy as np
import pytest

from tests.conftest import cpu
from tests.parity.test_twins import batch, config_of, gradients
from twingpt.backends import blocks
from twingpt.core import reference
from twingpt.core.parameters import initialise

SIZE, WIDTH = 8, 16
WINDOWS = {"no window": 0, "one key": 1, "less than a block": 5, "a block": SIZE, "more": 13, "two": 16, "all": 40}
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (3, 1)}


def grads_of(name, function, arrays, dy):
    """function(*arrays) and the gradients of its product with dy by the arrays, as NumPy arrays."""
    if name == "mlx":
        import mlx.core as mx

        with mx.stream(mx.cpu):
            q, k, v, dy = map(mx.array, (*arrays, dy))
            (y,), grads = mx.vjp(lambda *inputs: function(*inputs), [q, k, v], [dy])
            return [np.array(x) for x in (y, *grads)]
    import torch

    inputs = [torch.from_numpy(x).requires_grad_() for x in arrays]
    y = function(*inputs)
    y.backward(torch.from_numpy(dy))
    return [y.detach().numpy(), *(x.grad.numpy() for x in inputs)]


def spec(q, k, v, window, config):
    """Attention as core/reference.py has it, in float64, (B, T, H, d)."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    k, v = (x.repeat(config.n_head // config.n_kv_head, axis=1) for x in (k, v))
    scores = reference.softcap(q @ k.swapaxes(-1, -2) * config.score_scale, config.attn_softcap)
    scores = np.where(reference.attention_mask(q.shape[2], q.shape[2], window), scores, -np.inf)
    return (reference.softmax(scores) @ v).swapaxes(1, 2)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_give_what_plain_attention_gives_and_its_gradients(engines, window, heads, softcap):
    attention = import_module(f"twingpt.backends.{engines.NAME}.attention")
    to_device = import_module(f"twingpt.backends.{engines.NAME}.device").to_device
    (n_head, n_kv_head), window = HEADS[heads], WINDOWS[window]
    config = config_of({"n_head": n_head, "n_kv_head": n_kv_head, "n_embd": n_head * WIDTH, "attn_softcap": softcap})
    rng = np.random.default_rng(0)
    for length in (1, 7, SIZE, 9, 2 * SIZE, 37):
        q, k, v = (2 * rng.standard_normal((2, n, length, WIDTH), np.float32) for n in (n_head, n_kv_head, n_kv_head))
        dy = rng.standard_normal((2, length, n_head, WIDTH), np.float32)
        mask = to_device(reference.attention_mask(length, length, window), *[cpu(engines)][engines.NAME == "mlx" :])

        def plain(q, k, v, mask=mask):
            return attention.unfused_attention(q, k, v, mask, config).swapaxes(1, 2)  # whatever the cap

        expected = grads_of(engines.NAME, plain, (q, k, v), dy)
        differentiable = [attention.attention_by_blocks]
        if engines.NAME == "mlx":  # torch's forward pass writes into its result
            differentiable.append(attention.forward_by_blocks)
        for function in differentiable:
            blocks = partial(function, window=window, size=SIZE, config=config)
            found = grads_of(engines.NAME, blocks, (q, k, v), dy)
            np.testing.assert_allclose(found[0], spec(q, k, v, window, config), atol=2e-6 * np.abs(v).max())
            for ours, theirs in zip(found, expected, strict=True):
                assert np.abs(ours - theirs).max() <= 2e-6 * np.abs(theirs).max(), length


@pytest.mark.parametrize("size", [1, 8, 100])
@pytest.mark.parametrize("window", [0, 1, 5, 8, 13, 40])
@pytest.mark.parametrize("length", [1, 8, 37])
def test_a_block_sees_just_the_keys_that_its_queries_do(length, window, size):
    mask, seen = reference.attention_mask(length, length, window), np.zeros((length, length), bool)
    for queries, keys in blocks.query_blocks(length, size, window):
        n = queries.stop - queries.start
        assert 0 < n <= size + blocks.FEW_QUERIES and (n > blocks.FEW_QUERIES or n in (size, length))
        assert mask[queries, keys].any(0).all(), "a key that no query sees"
        seen[queries, keys] = True
    assert (seen | ~mask).all()


MODELS = {
    "qwen3": {},
    "window": {"sliding_window": 5, "n_kv_head": 2, "full_attention_layers": (1,)},
    "softcap": {"attn_softcap": 4.0},
    "learned positions": {"position": "learned"},
}


@pytest.mark.parametrize("switches", MODELS)
def test_a_models_gradients_by_blocks_are_the_plain_ones(engines, monkeypatch, switches):
    attention = import_module(f"twingpt.backends.{engines.NAME}.attention")
    config = config_of({"n_layer": 2, **MODELS[switches]})
    params, (tokens, targets) = dict(initialise(config, 1)), batch(config, 2, 20)
    found = []
    for size in (0, 6):
        monkeypatch.setattr(attention, "block_size", lambda *_, size=size, **__: size)
        found.append(gradients(engines, config, params, tokens, targets))
    for name, g in found[0].items():
        assert np.abs(found[1][name] - g).max() <= 4e-6 * np.abs(g).max(), name


def test_blocks_are_where_no_kernel_is_better():
    def size(backend, kind, length, window=0, head_dim=64, *, half=False, softcapped=False):
        return blocks.block_size(backend, kind, length, window, head_dim, half=half, softcapped=softcapped)

    assert [size("mlx", kind, 1024) for kind in ("cpu", "metal", "cuda")] == [128, 0, 0]
    assert [size("mlx", "metal", 1024, 256), size("mlx", "metal", 1024, head_dim=48)] == [256, 256]
    assert [size("torch", kind, 1024) for kind in ("cpu", "mps", "cuda")] == [0, 256, 0]
    assert [size("torch", "cpu", 64, half=True), size("torch", "cpu", 1024, 64), size("torch", "cpu", 64, 64)] == [
        64, 64, 0,
    ]  # fmt: skip
    assert [size("torch", "cpu", length, half=True) for length in (512, 513)] == [64, 0]
    assert [size(name, "cuda", 1024, softcapped=True) for name in ("mlx", "torch")] == [256, 256]
    assert [size("mlx", "metal", length, head_dim=48) for length in (256, 257)] == [0, 256]
