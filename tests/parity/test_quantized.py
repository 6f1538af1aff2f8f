"""One quantized file: MLX's kernel, torch and the reference compute the same from it, and mlx-lm opens it."""

import itertools
import json

import numpy as np
import pytest

from tests.conftest import cpu, needs, open_checkpoint
from twingpt.backends import registry
from twingpt.backends.kv_layout import row_table
from twingpt.checks.tolerances import QUANTIZED_TOLERANCE
from twingpt.core import reference
from twingpt.core.checkpoint import safetensors_file
from twingpt.core.checkpoint.quantize import (
    BITS,
    GROUP_SIZES,
    Packing,
    Quantization,
    dequantize,
    dequantized,
    from_config,
)  # fmt: skip
from twingpt.core.checkpoint.schema import save_model
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import initialise, parameter_table
from twingpt.core.presets import SHAPES
from twingpt.core.sampler import Sampling, SamplingRows
from twingpt.core.tokenizer import ByteTokenizer
from twingpt.weights.convert import convert
from twingpt.weights.quantize import apply, quantize, unquantized

SMALL = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 128, "init_std": 0.1}
MODELS = {
    "qwen3": {"n_kv_head": 2},
    "gpt2": SHAPES["gpt2"],
    "untied, with biases": {"tie_embeddings": False, "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
    "some widths odd": {"n_inner": 200, "n_head": 3, "head_dim": 40},
}


def quantized(tmp_path, switches, bits=4, group_size=64):
    config = GPTConfig.from_dict({**SMALL, **switches})
    quantization = Quantization(bits, group_size)
    tensors = apply(quantization, initialise(config, 1), config)
    save_model(tmp_path / "q", config, ByteTokenizer(), tensors, quantization)
    return open_checkpoint(tmp_path / "q")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_group_keeps_its_farther_end_and_is_close_elsewhere(bits, group_size):
    w = np.random.default_rng(bits).normal(size=(3, 5, 256)).astype(np.float32)
    parts = quantize(w, bits, group_size)
    assert [part.shape for part in parts] == [(3, 5, 256 * bits // 32), *[(3, 5, 256 // group_size)] * 2]
    back = dequantize(256, *parts)
    groups, error = w.reshape(3, 5, -1, group_size), np.abs(back - w).reshape(3, 5, -1, group_size)
    ends = np.take_along_axis(error, np.abs(groups).argmax(-1)[..., None], -1)
    assert ends.max() < 1e-6
    step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    assert (error.max(-1) <= 1.5 * step).all()  # the grid moves by up to half a step, so that 0 is on it


def test_groups_without_a_range():
    w = np.stack([np.zeros(64), np.full(64, 3.5), np.full(64, -1e-3)]).astype(np.float32)
    assert np.abs(dequantize(64, *quantize(w, 4, 32)) - w).max() < 1e-6


@needs("mlx")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_bits_are_mlx_own(bits, group_size):
    registry.get("mlx")  # opens a fast BLAS before mlx is imported

    mx = pytest.importorskip("mlx.core")
    w = np.random.default_rng(bits).normal(size=(64, 256)).astype(np.float32)
    w[0] = 0
    with mx.stream(mx.cpu):  # which rounds as NumPy does
        theirs = mx.quantize(mx.array(w), group_size=group_size, bits=bits)
        back = np.array(mx.dequantize(*theirs, group_size=group_size, bits=bits))
    ours = quantize(w, bits, group_size)
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a, np.array(b))
    assert np.array_equal(dequantize(256, *ours), back)


@pytest.mark.parametrize("switches", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32)])
def test_the_twins_agree_with_the_reference(tmp_path, twins, switches, bits, group_size):
    opened = quantized(tmp_path, switches, bits, group_size)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 20))
    stored = dict(opened.stored())
    assert any(array.dtype == np.uint32 for array in stored.values())
    expected = reference.forward(dict(opened.parameters()), tokens, opened.config)
    for engines in twins:
        engine = engines.InferenceEngine(opened.config, stored.items(), engines.device)
        logits = engine.forward(tokens)
        limit = 1e-5 if engines.device.kind == "cpu" else engines.within(QUANTIZED_TOLERANCE)
        assert np.abs(logits - expected).max() <= limit * np.abs(expected).max()
        cache = engine.new_cache(2, 16)
        for row in range(2):
            engine.prefill(cache, row, tokens[row, : 12 - row])
        for _ in range(3):  # also token by token
            handle = engine.step(cache, SamplingRows([Sampling(temp=0)] * 2), np.zeros(2))
        assert engine.logits(handle).shape == (2, 257)


def test_what_stays_in_float32_is_named_with_its_reason():
    config = GPTConfig.from_dict({**SMALL, **MODELS["some widths odd"]})
    kept = unquantized(Quantization(4, 64), config)
    assert kept["model.layers.1.mlp.down_proj.weight"] == "its width 200 is not a multiple of 64"
    assert kept["model.layers.0.self_attn.o_proj.weight"] == "its width 120 is not a multiple of 64"
    assert len(kept) == 4
    config = GPTConfig.from_dict({**SMALL, **SHAPES["gpt2"]})
    assert unquantized(Quantization(4, 64), config) == {
        "model.embed_positions.weight": "it is only looked up and added"
    }


def test_dequantized_gives_every_parameter_in_order():
    config = GPTConfig.from_dict({**SMALL, "tie_embeddings": False})
    stored = apply(Quantization(8, 32), initialise(config, 0), config)
    back = dict(dequantized(stored, config))
    assert list(back) == list(parameter_table(config))
    for name, array in initialise(config, 0):
        assert back[name].shape == array.shape and np.abs(back[name] - array).max() < 0.005
    assert all(a is b for a, (_, b) in zip(back.values(), dequantized(back.items(), config), strict=True))


MIXED = {
    "model.embed_tokens": Packing(6, 64), "model.layers.0.self_attn.q_proj": Packing(2, 32),
    "model.layers.0.self_attn.v_proj": None, "model.layers.1.self_attn.o_proj": Packing(5, 32),
    "model.layers.1.mlp.down_proj": Packing(8, 128), "model.layers.1.mlp.up_proj": Packing(4, 64),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_matrix_may_be_in_a_way_of_its_own(tmp_path, twins, dtype):
    """MLX multiplies by all of them packed; torch holds 2 and 3 bits in 4, 5 and 6 in 8."""
    config = GPTConfig.from_dict({**SMALL, "n_embd": 128, "n_inner": 256})
    quantization = Quantization(3, 64, modules=MIXED)
    tensors = apply(quantization, initialise(config, 1), config)
    save_model(tmp_path / "q", config, ByteTokenizer(), tensors, quantization)
    opened = open_checkpoint(tmp_path / "q")
    assert opened.quantization == quantization
    assert unquantized(quantization, config) == {"model.layers.0.self_attn.v_proj.weight": "the model has it so"}
    tokens, stored = np.random.default_rng(0).integers(0, 257, (2, 20)), dict(opened.stored())
    expected = reference.forward(dict(opened.parameters()), tokens, config)
    for engines in twins:
        engine = engines.InferenceEngine(config, stored.items(), cpu(engines), dtype=dtype)
        difference = np.abs(engine.forward(tokens) - expected).max() / np.abs(expected).max()
        assert difference <= (1e-5 if dtype == "float32" else 0.1)  # scales are rounded
        for base in ("model.embed_tokens", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.o_proj"):
            assert f"{base}.scales" in engine.params


def test_a_way_that_does_not_fit_a_matrix_is_refused_by_name():
    config = GPTConfig.from_dict({**SMALL, "n_inner": 96})
    quantization = Quantization(4, 32, modules={"model.layers.1.mlp.down_proj": Packing(4, 64)})
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj can't be in groups of 64, as its width is 96"):
        quantization.packings(config)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("model.layers.1.mlp.donw_proj", "did you mean 'model.layers.1.mlp.down_proj'"),
        ("model.layers.1.mlp.down_proj.weight", "did you mean 'model.layers.1.mlp.down_proj'"),
        ("model.norm", "did you mean "),
        ("lm_head", "the nearest of 15 is "),  # the embeddings are tied
    ],
)
def test_a_way_of_no_matrix_is_refused_by_name(tmp_path, name, near):
    config = GPTConfig.from_dict(SMALL)
    save_model(tmp_path / "m", config, ByteTokenizer(), initialise(config, 1))
    for way in (Packing(8, 64), None):
        with pytest.raises(UserError, match=rf"Unknown matrix to quantize '{name}': {near}"):
            convert(tmp_path / "m", tmp_path / "q", "mlx", Quantization(4, 64, modules={name: way}))
    assert not (tmp_path / "q").exists()


def test_what_config_json_says_of_quantization():
    usual = {"bits": 4, "group_size": 64}
    cases = {
        "usual": (usual, Quantization(4, 64)),
        "left out": ({}, Quantization(4, 64)),
        "mode": ({"mode": "nvfp4"}, Quantization(4, 16, "nvfp4")),
        "modules": (
            usual | {"lm_head": False, "a": {"bits": 6}, "b": {"mode": "mxfp8"}, "c": True},
            Quantization(4, 64, modules={"lm_head": None, "a": Packing(6, 64), "b": Packing(8, 32, "mxfp8")}),
        ),
    }
    for described, quantization in cases.values():
        assert from_config({"quantization": described}, "config.json") == quantization
        assert from_config({"quantization_config": quantization.to_json()}, "config.json") == quantization
    assert from_config({"quantization": None}, "config.json") is None


@pytest.mark.parametrize(
    "described",
    [
        {"bits": 7, "group_size": 64}, {"bits": True, "group_size": 64}, {"bits": 4, "group_size": 48},
        {"bits": 4, "group_size": 64, "mode": "mxfp4"}, {"mode": ["affine"]}, {"quant_method": "fp8"}, [4, 64],
        {"bits": 4, "lm_head": {"bits": "4"}}, {"bits": 4, "lm_head": None}, {"bits": 4, "lm_head": {"bits": [4]}},
    ],
)  # fmt: skip
def test_another_quantization_is_refused(described):
    with pytest.raises(UserError, match=r"^config.json has a quantization .*, which is not read") as refused:
        from_config({"quantization": described}, "config.json")
    assert "\n" not in str(refused.value)


def test_a_quantized_file_with_other_tensors_is_refused(tmp_path):
    opened = quantized(tmp_path, {"n_kv_head": 2})
    config = json.loads((opened.folder / "config.json").read_text("utf-8"))
    config["quantization"]["bits"] = 8
    (opened.folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((opened.folder / "manifest.json").read_text("utf-8"))
    del manifest["files"]["config.json"]
    (opened.folder / "manifest.json").write_text(json.dumps(manifest))
    (opened.folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config.json is missing"):
        open_checkpoint(opened.folder)
    from twingpt.core.checkpoint.quantize import stored_shapes
    from twingpt.core.checkpoint.safetensors_file import TensorFile
    from twingpt.core.checkpoint.schema import read_tensors

    with pytest.raises(UserError, match=r"embed_tokens.weight in .* has shape \(257, 16\), and the model needs"):
        list(
            read_tensors(
                [TensorFile(opened.folder / "model.safetensors")], *stored_shapes(opened.config, Quantization(8, 64))
            )
        )


@needs("mlx")
def test_mlx_lm_opens_the_directory_as_it_stands(tmp_path):
    registry.get("mlx")

    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx

    opened = quantized(tmp_path, {"n_kv_head": 2})
    tokens = np.random.default_rng(0).integers(0, 257, (2, 20))
    model, _ = mlx_lm.load(str(opened.folder))
    expected = reference.forward(dict(opened.parameters()), tokens, opened.config)
    with mx.stream(mx.cpu):
        logits = np.array(model(mx.array(tokens)))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@needs("torch")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_product_in_pieces_is_the_whole_product(monkeypatch, bits, group_size):
    import torch

    from twingpt.backends.torch import quantized as torch_quantized

    random = np.random.default_rng(group_size)
    x, w = random.normal(size=(2, 3, 256)).astype(np.float32), random.normal(size=(70, 256)).astype(np.float32)
    words, scales, biases = quantize(w, bits, group_size)
    parts = torch.from_numpy(words.view(np.uint8)), torch.from_numpy(scales), torch.from_numpy(biases)
    expected = x @ dequantize(256, words, scales, biases).T
    for piece in (1, 256 * 16, 2**20):  # a row, 16 with 6 left over, all
        monkeypatch.setattr(torch_quantized, "CHUNK", piece)
        y = torch_quantized.dequantizing_matmul(torch.from_numpy(x), *parts).numpy()
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


@needs("torch")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("n_out", [64, 257])  # the kernel wants a multiple of 16
def test_torch_has_a_kernel_for_four_bits(monkeypatch, group_size, n_out):
    import torch

    from twingpt.backends.torch import quantized as torch_quantized

    if not torch_quantized.has_int4_kernel():
        pytest.skip("this torch has no 4-bit kernel for this CPU")
    random = np.random.default_rng(n_out)
    words, scales, biases = quantize(random.normal(size=(n_out, 256)).astype(np.float32), 4, group_size)
    x = torch.from_numpy(random.normal(size=(2, 3, 256)).astype(np.float32)).to(torch.bfloat16)
    scales, biases = (torch.from_numpy(part).to(torch.bfloat16).float() for part in (scales, biases))
    expected = x.float().numpy() @ dequantize(256, words, scales.numpy(), biases.numpy()).T
    w_q = torch.from_numpy(words.view(np.uint8))
    whole = torch_quantized.pack(w_q, scales, biases)
    monkeypatch.setattr(torch_quantized, "CHUNK", 1)  # packed in pieces
    for packed in (whole, torch_quantized.pack(w_q, scales, biases)):
        y = torch_quantized.packed_matmul(x, *packed)[..., :n_out].float().numpy()
        assert np.abs(y - expected).max() <= 2e-2 * np.abs(expected).max()


@needs("torch")
@pytest.mark.parametrize("switches", MODELS.values(), ids=MODELS)
def test_bfloat16_on_a_cpu_takes_the_kernel(tmp_path, monkeypatch, switches):
    from twingpt.backends.torch import quantized as torch_quantized

    engines, opened = registry.get("torch"), quantized(tmp_path, switches)
    stored, tokens = dict(opened.stored()), np.random.default_rng(0).integers(0, 257, (2, 20))
    expected = reference.forward(dict(opened.parameters()), tokens, opened.config)
    kernel = torch_quantized.has_int4_kernel()
    for packs in {kernel, False}:
        monkeypatch.setattr(torch_quantized, "has_int4_kernel", lambda packs=packs: packs)
        engine = engines.InferenceEngine(opened.config, stored.items(), cpu(engines), dtype="bfloat16")
        assert ("model.layers.0.self_attn.q_proj.packed" in engine.params) == packs
        assert ("model.layers.0.self_attn.q_proj.weight" in engine.params) != packs
        error = engine.forward(tokens) - expected
        assert np.square(error).mean() <= 0.03**2 * np.square(expected).mean()  # bfloat16 scales alone give 0.02


@needs("torch")
def test_a_torch_without_the_kernel_dequantizes(monkeypatch):
    from twingpt.backends.torch import quantized as torch_quantized

    has_int4_kernel = torch_quantized.has_int4_kernel.__wrapped__
    for wrong in (AttributeError, RuntimeError):

        def fail(*_, wrong=wrong):
            raise wrong

        monkeypatch.setattr(torch_quantized, "pack", fail)
        assert has_int4_kernel() is False


HEADS = {
    "of 64, in groups of 64": {"head_dim": 64, "n_kv_head": 2},
    "of 96, in groups of 32": {"head_dim": 96, "n_head": 2, "qk_norm": False, "qkv_bias": True},
    "of 32, a window and a softcap": {"head_dim": 32, "sliding_window": 9, "attn_softcap": 4.0, "n_kv_head": 1},
    "of 128, learned positions and smear": {"head_dim": 128, "n_head": 2, "position": "learned", "smear": True},
}


def held(cache, config, row):
    """A row's ids, and each layer's keys and values (K, n, d) as the cache holds them, by NumPy."""
    shapes, dtypes = row_table(config, "float32", cache.quantization, int(cache.lengths[row]))
    arrays = {
        name: array.view(safetensors_file.DTYPES[dtypes[name]]).reshape(shapes[name])
        for name, array in zip(shapes, cache.read_row(row), strict=True)
    }
    layers = [[f"layers.{layer}.{kind}" for kind in ("keys", "values")] for layer in range(config.n_layer)]
    parts = ("words", "scales", "biases")
    return arrays["tokens"], [
        [dequantize(config.head_dim, *(arrays[f"{name}.{part}"] for part in parts)) for name in pair] for pair in layers
    ]


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("switches", HEADS.values(), ids=HEADS)
def test_a_quantized_kv_cache_is_what_the_reference_quantizes(engines, switches, kv_bits):
    """By prompts in chunks and steps of rows of several lengths, over copies, trims and growing.

    A key that lies between two codes may get either, by its rounding in float32. So the reference sees the cache's own
    keys and values, and all but a few of them must be those that it would make itself.
    """
    config = GPTConfig.from_dict({**SMALL, "n_embd": 64, "block_size": 300, **switches})
    params = dict(initialise(config, 1))
    engine = engines.InferenceEngine(config, params.items(), cpu(engines))
    cache = engine.new_cache(4, 16, kv_bits=kv_bits)
    group_size = 32 if config.head_dim in (32, 96) else 64
    texts = np.random.default_rng(0).integers(0, 257, (3, 300))

    def agrees(row, logits):
        tokens, layers = held(cache, config, row)

        def kv_store(layer, *exact):
            for ours, x in zip(layers[layer], exact, strict=True):
                alike = dequantize(config.head_dim, *quantize(x[0], kv_bits, group_size))
                step = np.ptp(x) / (2**kv_bits - 1)
                assert np.abs(ours - alike).max() <= 1.01 * step
                assert (np.abs(ours - alike) > 1e-4 * step).mean() < 0.01
            return [ours[None] for ours in layers[layer]]

        expected = reference.forward(params, tokens[None], config, kv_store)[0, -1]
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
        return tokens

    for row, ends in enumerate(((5, 6, 40, 250), (250,), (1, 30))):
        for start, end in itertools.pairwise((0, *ends)):
            handle = engine.prefill(cache, row, texts[row, start:end])
        assert np.array_equal(agrees(row, engine.logits(handle)[0]), texts[row, : ends[-1]])
    cache.trim(0, 30)
    cache.copy(1, 3)
    assert all(np.array_equal(*copies) for copies in zip(cache.read_row(1), cache.read_row(3), strict=True))
    engine.prefill(cache, 0, texts[0, :3])
    for _ in range(8):
        handle = engine.step(cache, SamplingRows([Sampling(temp=0)] * 4), np.zeros(4))
    logits = engine.logits(handle)
    for row in range(4):
        agrees(row, logits[row])


@needs("torch")
@needs("mlx")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kv_bits", [8, 4])
def test_torch_quantizes_to_the_bits_of_mlx(twins, dtype, kv_bits):
    import mlx.core as mx
    import torch

    from twingpt.backends.torch.quantized import quantize as torch_quantize

    x = np.random.default_rng(kv_bits).normal(size=(2, 3, 50, 128)).astype(np.float32)
    x[0, 0, 0], x[0, 0, 1] = 0, 3.5
    ours = torch_quantize(torch.from_numpy(x).to(getattr(torch, dtype)), 64, kv_bits)
    with mx.stream(mx.cpu):
        theirs = mx.quantize(mx.array(x).astype(getattr(mx, dtype)), 64, kv_bits)
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a.view(torch.uint8).numpy(), np.array(b.view(mx.uint8)))


def test_heads_that_no_group_divides_and_other_bits_are_refused(engines):
    for switches, kv_bits, message in (
        ({"head_dim": 80}, 8, "quantized in groups of 64 or 32, and the model's heads are 80 wide: leave out kv_bits"),
        ({"head_dim": 16}, 4, "the model's heads are 16 wide"),
        ({}, 3, "kv_bits must be 8 or 4, and is 3."),
        ({}, 0, "kv_bits must be 8 or 4, and is 0."),
        ({}, True, "kv_bits must be 8 or 4, and is True."),
    ):
        config = GPTConfig.from_dict({**SMALL, **switches})
        engine = engines.InferenceEngine(config, initialise(config, 1), cpu(engines))
        with pytest.raises(UserError, match=message):
            engine.new_cache(1, 16, kv_bits=kv_bits)
