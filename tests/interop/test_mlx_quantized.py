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
from twingpt.core.errors import UserError
from twingpt.weights.convert import convert
from twingpt.weights.formats import open_model
from twingpt.weights.mlx_quantized import Packing

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
    ours = Packing(bits, group_size, mode).dequantize(*map(np.array, parts))
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


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same(tmp_path, kind):
    """In float32, as no other way is run as it is stored."""
    family, options = KINDS[kind]
    opened, theirs = quantized(tmp_path, family, **options)
    assert opened.format == "mlx-lm" and opened.model.quantization is None and "U32" in opened.model.dtypes()
    model = opened.model
    ours = reference.forward(dict(model.parameters()), TOKENS, model.config)
    assert relative(ours, theirs) <= (1e-4 if not options.get("mode") else 2e-2)  # MLX dequantizes to bfloat16
    result = convert(opened, tmp_path / "back", "mlx")
    assert result["quantization"] is None  # what can't be kept becomes float32
    again = open_model(tmp_path / "back").model
    assert relative(reference.forward(dict(again.parameters()), TOKENS, again.config), ours) <= 1e-6


@pytest.mark.parametrize("backend", BOTH)
def test_it_runs(tmp_path, backend):
    opened, theirs = quantized(tmp_path, "granite")
    engines = registry.get(backend)
    engine = engines.InferenceEngine(opened.model.config, opened.model.stored(), cpu(engines))
    assert relative(engine.forward(TOKENS), theirs) <= 1e-4


def test_what_is_not_read_is_refused_by_name(tmp_path):
    quantized(tmp_path, "llama")
    content = json.loads((tmp_path / "q" / "config.json").read_text("utf-8"))
    for changes, message in [
        ({"mode": "gptq"}, "config.json has a quantization .*gptq.*, which is not read: only affine ones of 2, 3, 4"),
        ({"bits": 7}, "which is not read"),
        ({"mode": "mxfp4", "group_size": 64}, "which is not read"),
        ({"lm_head": {"bits": "4"}}, "which is not read"),
        ({"bits": 8}, r"scales in .*model.safetensors does not fit the matrix that it belongs to, of 8 bits"),
        ({"mode": "mxfp4"}, "does not fit the matrix that it belongs to, of 4 bits in groups of 32 .mxfp4."),
    ]:
        put(tmp_path / "q", "config.json", content | {"quantization": content["quantization"] | changes})
        with pytest.raises(UserError, match=message) as refused:
            open_model(tmp_path / "q").model.parameters()
        assert "\n" not in str(refused.value)
