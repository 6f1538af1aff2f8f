"""What mlx-lm quantizes, in each of its ways: the same logits here, or a refusal that names the file and the reason."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from tests.conftest import BOTH, cpu, needs
from tests.interop.test_families import TOKENS, build, relative
from tests.interop.test_resolution import put
from twingpt.backends import registry
from twingpt.core import reference
from twingpt.core.checkpoint.quantize import dequantize
from twingpt.core.errors import UserError
from twingpt.weights.convert import convert
from twingpt.weights.formats import open_model

there = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")  # a BLAS is opened before it
pytestmark = [needs("mlx"), needs("torch"), there]

MODES = [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)] + [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_a_matrix_is_dequantized_as_mlx_does(mode, bits, group_size):
    import mlx.core as mx

    import twingpt.backends.mlx  # noqa: F401

    matrix = mx.array(np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32))
    parts = mx.quantize(matrix, group_size=group_size, bits=bits, mode=mode)
    theirs = mx.dequantize(*parts, group_size=group_size, bits=bits, mode=mode).astype(mx.float32)
    ours = dequantize(128, *map(np.array, parts))
    assert np.abs(ours - np.array(theirs)).max() <= 3e-7


def quantized(path, family, recipe=None, **options):
    """A model that mlx-lm quantized, and its logits."""
    import mlx.core as mx
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    import twingpt.backends.mlx  # noqa: F401

    neox = {"hidden_act": "gelu_new", "intermediate_size": 256}
    build(family, **(neox if family == "gpt_neox" else {"intermediate_size": 128})).save_pretrained(path / "hf")
    content = json.loads((path / "hf" / "config.json").read_text("utf-8"))
    rope = content["rope_parameters"]
    put(path / "hf", "config.json", content | {
        "rope_theta": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor"),
        "rotary_emb_base": rope["rope_theta"],
    })  # fmt: skip
    model, config = load_model(path / "hf")
    predicate = mixed_quant_predicate_builder(recipe, model, 32) if recipe else None
    options = {"group_size": 32, "bits": 4, **options}
    model, config = quantize_model(model, config, quant_predicate=predicate, **options)
    save_model(path / "q", model)
    save_config(config, path / "q" / "config.json")
    return open_model(path / "q"), np.array(model(mx.array(TOKENS)).tolist())


KINDS = {
    "3 bits": ("llama", {"bits": 3}), "6 bits": ("qwen3", {"bits": 6}), "5 bits, tied": ("smollm3", {"bits": 5}),
    "mixed 2 and 6": ("llama", {"recipe": "mixed_2_6"}), "granite's own mixture": ("granite", {}),
    "GPT-NeoX": ("gpt_neox", {"bits": 8}), "mxfp4": ("llama", {"mode": "mxfp4"}),
    "nvfp4, granite": ("granite", {"mode": "nvfp4", "group_size": 16}),
    "mxfp8": ("qwen3", {"mode": "mxfp8", "bits": 8}),
}  # fmt: skip


def mlx_lm_logits(folder):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    return np.array(load_model(folder)[0](mx.array(TOKENS)).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same_and_is_kept(tmp_path, kind):
    """In our own checkpoint and in mlx-lm's directory: bit for bit, and mlx-lm computes the same from it."""
    family, options = KINDS[kind]
    opened, theirs = quantized(tmp_path, family, **options)
    assert opened.format == "mlx-lm" and opened.model.quantization is not None
    model, stored = opened.model, dict(opened.model.stored())
    ours = reference.forward(dict(model.parameters()), TOKENS, model.config)
    assert relative(ours, theirs) <= (1e-4 if not options.get("mode") else 2e-2)  # MLX dequantizes to bfloat16
    for to in ("mlx", "twingpt"):
        result = convert(opened, tmp_path / to, to)
        again = open_model(tmp_path / to).model
        assert result["quantization"] and again.quantization == model.quantization
        kept = dict(again.stored())
        assert kept.keys() == stored.keys() and all(np.array_equal(kept[name], stored[name]) for name in stored)
    assert relative(mlx_lm_logits(tmp_path / "mlx"), theirs) <= 1e-5
    back = convert(tmp_path / "twingpt", tmp_path / "back", "mlx")
    assert back["quantization"] == result["quantization"]
    assert relative(mlx_lm_logits(tmp_path / "back"), theirs) <= 1e-5


def test_a_mixture_has_its_ways_in_config_json(tmp_path):
    opened, _ = quantized(tmp_path, "llama", "mixed_2_6")
    ways = {(way.bits, way.group_size) for way in opened.model.quantization.packings(opened.model.config).values()}
    assert ways == {(2, 32), (6, 32)}
    convert(opened, tmp_path / "mlx", "mlx")
    described, was = (
        json.loads((tmp_path / name / "config.json").read_text("utf-8"))["quantization"] for name in ("mlx", "q")
    )
    usual = {key: described[key] for key in ("bits", "group_size", "mode")}
    named = {name: way for name, way in was.items() if isinstance(way, dict)}
    assert all({"mode": "affine", **way} == described.get(name, usual) for name, way in named.items())


@pytest.mark.parametrize("kind", ["mixed 2 and 6", "GPT-NeoX", "mxfp4", "nvfp4, granite", "mxfp8", "5 bits, tied"])
@pytest.mark.parametrize("backend", BOTH)
def test_it_runs_as_it_is_stored(tmp_path, backend, kind):
    """On MLX by its kernels; torch holds affine ones in 4 or 8 bits, and others in float32."""
    family, options = KINDS[kind]
    opened, _ = quantized(tmp_path, family, **options)
    engines, model = registry.get(backend), opened.model
    engine = engines.InferenceEngine(model.config, model.stored(), cpu(engines))
    expected = reference.forward(dict(model.parameters()), TOKENS, model.config)
    assert relative(engine.forward(TOKENS), expected) <= 1e-5
    packed = any(name.endswith(".scales") for name in engine.params)
    assert packed == (backend == "mlx" or kind not in ("mxfp4", "mxfp8"))  # granite's has affine ones too


def test_matrices_that_config_json_does_not_name_are_as_their_tensors_say(tmp_path):
    """As in mlx-lm 0.32, whatever the top level says."""
    _, theirs = quantized(tmp_path, "llama")
    content = json.loads((tmp_path / "q" / "config.json").read_text("utf-8"))
    for changes in ({"bits": 8}, {"mode": "mxfp4", "group_size": 32}):
        put(tmp_path / "q", "config.json", content | {"quantization": content["quantization"] | changes})
        model = open_model(tmp_path / "q").model
        assert relative(reference.forward(dict(model.parameters()), TOKENS, model.config), theirs) <= 1e-4


def test_what_is_not_read_is_refused_by_name(tmp_path):
    quantized(tmp_path, "llama")
    content = json.loads((tmp_path / "q" / "config.json").read_text("utf-8"))
    head = "lm_head"
    for changes, message in [
        ({"mode": "gptq"}, "config.json has a quantization .*gptq.*, which is not read: only affine ones of 2, 3, 4"),
        ({"bits": 7}, "which is not read"),
        ({"mode": "mxfp4", "group_size": 64}, "which is not read"),
        ({head: {"bits": "4"}}, "which is not read"),
        ({head: {"bits": 8, "group_size": 32}}, r"lm_head.weight in .*safetensors has shape .*not fit 8 bits"),
        ({head: {"bits": 4, "group_size": 64}}, r"lm_head.scales in .*safetensors does not fit the matrix .* of 64"),
        ({head: {"mode": "mxfp4"}}, "does not fit the matrix that it belongs to, of 4 bits in groups of 32 .mxfp4."),
    ]:
        put(tmp_path / "q", "config.json", content | {"quantization": content["quantization"] | changes})
        with pytest.raises(UserError, match=message) as refused:
            open_model(tmp_path / "q").model.parameters()
        assert "\n" not in str(refused.value)
