"""Whether all that the MLX backend asks for has a kernel on Metal, found out on any system, without a Mac.

`recorder.py` records training, evaluation and decoding of each preset in MLX's CPU build, `rules.py` says which kernels
a call would take on Metal, and `kernels.py` has the names of those that a release has.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import cpu, needs
from tests.metal import kernels, rules
from tests.metal.rules import Array, Call, NoKernelError
from twingpt.backends import registry
from twingpt.core.checkpoint.quantize import GROUP_SIZES, Packing, Quantization, stored_shapes
from twingpt.core.config import RopeScaling
from twingpt.core.parameters import parameter_table
from twingpt.core.presets import PRESETS, SHAPES, preset
from twingpt.core.sampler import Sampling, SamplingRows
from twingpt.core.schedule import Hyper

VOCABULARIES = {"micro": 2048, "tiny": 4096, "small": 8192, "medium": 32_768, "gpt2": 50_257, "large": 50_257}
DTYPES = ("float32", "float16", "bfloat16")
SAMPLINGS = [Sampling(), Sampling(temp=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1)]
TABLES = [pytest.param(kernels.read(path), id=kernels.version(path)) for path in kernels.tables()]


def test_the_newest_table_is_of_a_release_that_we_ask_for():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (lowest,) = set(re.findall(r'"mlx(?:\[\w+\])?>=([\d.]+)', pyproject))
    newest = kernels.version(kernels.tables()[-1])
    assert kernels.numbers(newest) >= kernels.numbers(lowest), f"make a table of a newer release: {kernels.COMMAND}"


@needs("mlx")
def test_the_installed_release_has_a_table():
    installed = importlib.metadata.version("mlx")
    if installed not in map(kernels.version, kernels.tables()):
        pytest.skip(f"there is no table of MLX {installed}'s kernels yet; to make it: {kernels.COMMAND}")


def test_names_come_from_a_metal_library(tmp_path):
    def tag(name, content):
        return name + len(content).to_bytes(2, "little") + content

    entries = b""
    for name in (b"rmsfloat32\0", b"g1_copybool_bool_\0"):
        entry = tag(b"NAME", name) + tag(b"TYPE", b"\2") + tag(b"HASH", b"ENDT" * 8) + b"ENDT"
        entries += (len(entry) + 4).to_bytes(4, "little") + entry
    header = b"MTLB".ljust(24, b"\0") + (32).to_bytes(8, "little")
    library = header + (2).to_bytes(4, "little") + entries + b"the kernels"
    assert list(kernels.function_names(library)) == ["rmsfloat32", "g1_copybool_bool_"]
    with pytest.raises(ValueError, match="MTLB"):
        next(kernels.function_names(b"PK" + library))


@functools.cache
def recorded(name, dtype, work, shape=None, optimizer="muon", checkpointing=False, overrides=(), kv_bits=None):
    """What a preset of two layers asks of MLX, with its own widths, vocabulary and block size; nothing is computed."""
    engines = registry.get("mlx")
    import mlx.core as mx

    from tests.metal.recorder import record

    config = preset(name, VOCABULARIES.get(name, 4096), shape, n_layer=2, **dict(overrides))
    device = gpu(engines)
    with record() as recording:
        zeros = {name: mx.zeros(row.shape) for name, row in parameter_table(config).items()}
        if work == "training":
            settings = {"optimizer": optimizer, "dtype": dtype, "gradient_checkpointing": checkpointing}
            train(engines.TrainEngine(config, device, **settings), zeros)
        else:
            if isinstance(work, Packing):
                shapes, dtypes = stored_shapes(config, Quantization(work.bits, work.group_size))
                kinds = {"U32": mx.uint32, "F32": mx.float32, None: mx.float32}
                zeros = {name: mx.zeros(shape, kinds[dtypes.get(name)]) for name, shape in shapes.items()}
            infer(engines.InferenceEngine(config, zeros.items(), device, dtype=dtype), kv_bits)
    return recording


def gpu(engines):
    """A device that says it is a Mac's GPU."""
    return dataclasses.replace(cpu(engines), name="gpu", kind="metal")


def train(engine, parameters):
    """A step of two micro-batches, of full windows."""
    engine.load(parameters.items())
    tokens = np.zeros((2, engine.config.block_size), np.int32)
    for _ in range(2):
        engine.forward_backward(tokens, tokens, np.arange(2))
    engine.optimizer_step(Hyper(*[1.0] * len(Hyper._fields)))


def infer(engine, kv_bits):
    """Evaluation, and decoding: a short and a long prompt, one row, several of one length and of different ones."""
    tokens = np.zeros((2, engine.config.block_size), np.int32)
    engine.log_probs(tokens, tokens)
    engine.log_probs(tokens[:, :5], tokens[:, :5], top_k=5)
    for lengths in ([5], [engine.config.block_size - 1], [20] * 4, [3, engine.config.block_size - 2], [7] * 16):
        cache = engine.new_cache(len(lengths), 64, kv_bits=kv_bits)
        for row, length in enumerate(lengths):
            if length in lengths[:row]:
                cache.copy(lengths.index(length), row)
            else:
                engine.prefill(cache, row, np.zeros(length, np.int32))
        for sampling in ([SAMPLINGS[0]], [SAMPLINGS[1]], [Sampling(temp=0)]):
            if (cache.lengths < engine.config.block_size).all():
                engine.step(cache, SamplingRows(sampling * len(lengths)), np.zeros(len(lengths), np.float32))


def missing(recording, dtype, table):
    """A line for each call or primitive without a kernel in a table: what it is, and what is missing."""
    found = []
    for call in recording.calls:
        try:
            absent = lacking(rules.names(call), table)
        except NoKernelError as error:
            found.append(f"{call}: {error}")
        else:
            found += [f"{call}: MLX {table.version} has no kernel {name}" for name in absent]
    for primitive in sorted(recording.primitives()):
        if primitive not in rules.PRIMITIVES:
            found.append(f"{primitive}: there is no rule for this primitive in tests/metal/rules.py")
        else:
            absent = lacking(rules.primitive_names(primitive, dtype), table)
            found += [f"{primitive}: MLX {table.version} has no kernel {name}" for name in absent]
    return found


def has_kernels(recording, dtype, table):
    lines = missing(recording, dtype, table)
    assert not lines, "\n".join(lines)


def lacking(names, table):
    return sorted(names - table.everywhere - table.headers)


@needs("mlx")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("work", ["training", "inference"])
def test_a_preset_has_kernels(name, dtype, work, table):
    recording = recorded(name, dtype, work)
    assert {"matmul", "scaled_dot_product_attention"} <= {call.name for call in recording.calls}
    has_kernels(recording, dtype, table)


@needs("mlx")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_kernels(shape, dtype, table):
    for work in ("training", "inference"):
        has_kernels(recorded("tiny", dtype, work, shape, "adamw"), dtype, table)


# What families of other people's checkpoints have, and no preset.
FAMILIES = {
    "gemma": {
        "norm_offset": True,
        "mlp": "geglu_tanh",
        "attn_softcap": 50.0,
        "logit_softcap": 30.0,
        "embed_scale": 20.0,
    },
    "gemma3": {"norm_offset": True, "mlp": "geglu_tanh", "sliding_window": 64, "local_rope_theta": 1e4},
    "neox": {"norm": "layernorm", "norm_bias": True, "parallel_residual": True, "rope_fraction": 0.25, "mlp": "gelu"},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_block_size=64)},
    "dropout": {"dropout": 0.1},
}


@needs("mlx")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_kernels(family, dtype, table):
    for work in ("training", "inference"):
        recording = recorded("tiny", dtype, work, overrides=tuple(FAMILIES[family].items()))
        has_kernels(recording, dtype, table)


@needs("mlx")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_windows_of_any_length_have_kernels(checkpointing, table):
    """Of four positions more than any power of two that attention may go by, too."""
    overrides = (("block_size", 1028),)
    recording = recorded("small", "bfloat16", "training", checkpointing=checkpointing, overrides=overrides)
    has_kernels(recording, "bfloat16", table)


@needs("mlx")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 4, 8])  # what was read of the choice holds for these
def test_quantized_decoding_has_kernels(bits, group_size, table):
    for name, dtype in itertools.product(("tiny", "gpt2", "large"), ("float32", "bfloat16")):
        recording = recorded(name, dtype, Packing(bits, group_size))
        assert {"quantized_matmul", "dequantize"} <= {call.name for call in recording.calls}
        has_kernels(recording, dtype, table)


@needs("mlx")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("kv_bits", "head_dim"), [(8, 64), (4, 32)])  # in groups of as many
def test_a_quantized_kv_cache_has_kernels(kv_bits, head_dim, table):
    for dtype in ("float32", "bfloat16"):
        recording = recorded("tiny", dtype, "inference", overrides=(("head_dim", head_dim),), kv_bits=kv_bits)
        assert {"quantize", "dequantize"} <= {call.name for call in recording.calls}
        has_kernels(recording, dtype, table)


def attentions(recording):
    return [call for call in recording.calls if call.name == "scaled_dot_product_attention"]


@needs("mlx")
def test_only_the_smallest_preset_has_heads_without_fused_attention():
    paths = {
        name: {rules.attention_path(call) for call in attentions(recorded(name, "bfloat16", "inference"))}
        for name in PRESETS
    }
    assert {name for name, taken in paths.items() if "unfused" in taken} <= {"micro"}
    assert all({"full", "vector"} <= taken for name, taken in paths.items() if name != "micro")


@needs("mlx")
def test_what_is_recorded_is_restored():
    registry.get("mlx")
    import mlx.core as mx

    from tests.metal.recorder import GRADIENTS, RECORDED, record

    owners = [*RECORDED, *((mx, name) for name in (*GRADIENTS, "eval", "async_eval"))]
    before = [getattr(owner, name) for owner, name in owners]
    with pytest.raises(ZeroDivisionError), record() as recording:
        mx.value_and_grad(lambda x: (x @ x).sum())(mx.ones((2, 2)))
        mx.eval({"y": [mx.ones((2, 2)) @ mx.ones((2, 3))]})
        raise ZeroDivisionError
    assert [getattr(owner, name) for owner, name in owners] == before
    assert (mx.ones((2, 2)) @ mx.ones((2, 2))).tolist() == [[2, 2], [2, 2]]
    square, wide = Array("float32", (2, 2)), Array("float32", (2, 3))
    assert list(recording.calls) == [Call("matmul", (square, square), training=True), Call("matmul", (square, wide))]
    assert recording.primitives() == {"Matmul", "Full", "Broadcast"}


def fused(width, dtype="bfloat16", n_query=1, n_key=64, *, training=False, mask=None):
    q, k = (Array(dtype, (2, heads, n, width)) for heads, n in ((4, n_query), (2, n_key)))
    return Call("scaled_dot_product_attention", (q, k, k), (("mask", mask),), training)


@pytest.mark.parametrize("table", TABLES)
class TestWithoutKernels:
    """What has none is found."""

    @pytest.mark.parametrize("n_query", [1, 64])
    def test_head_width(self, n_query, table):
        assert rules.attention_path(fused(40, n_query=n_query)) == "unfused"
        assert rules.attention_path(fused(64, n_query=n_query)) != "unfused"
        assert {rules.attention_path(fused(width)) for width in (48, 72, 80, 112, 192, 320)} == {"unfused"}
        # Nor would the fused kernels be there: a rule that let the width through would be found out.
        for name in rules.names(fused(64, n_query=n_query)):
            assert not lacking({name}, table)
            assert lacking({name.replace("64", "40")}, table)

    @pytest.mark.parametrize("dtype", ["float64", "int8"])
    @pytest.mark.parametrize("name", ["matmul", "scaled_dot_product_attention", "rope", "rms_norm", "softmax"])
    def test_dtype(self, name, dtype, table):
        x = Array(dtype, (2, 4, 8, 64))
        with pytest.raises(NoKernelError, match=rf"{dtype} has no kernel on Metal, which computes in float32"):
            rules.names(Call(name, (x, x, x), (("axis", -1),)))

    def test_dtype_of_a_kernel_that_is_named_by_any(self, table):
        (absent,) = lacking(rules.names(Call("argmax", (Array("float64", (2, 8)),), (("axis", -1),))), table)
        assert absent == "argmax_float64"
        assert lacking(rules.primitive_names("Add", "float64"), table)
        assert not lacking(rules.primitive_names("Add", "float16"), table)

    @pytest.mark.parametrize(("bits", "group_size"), [(7, 64), (4, 256)])
    def test_quantization(self, bits, group_size, table):
        x, w = Array("float16", (1, 512)), Array("uint32", (1024, 64))
        scales = Array("float16", (1024, 512 // group_size))
        options = (("bits", bits), ("group_size", group_size))
        assert lacking(rules.names(Call("quantized_matmul", (x, w, scales, scales), options)), table)

    def test_few_queries_in_training(self, table):
        with pytest.raises(NoKernelError, match="training attention of 8 queries with heads of 64 raises an error"):
            rules.names(fused(64, n_query=8, training=True))
        assert not lacking(rules.names(fused(64, n_query=9, training=True)), table)
        assert not lacking(rules.names(fused(48, n_query=8, training=True)), table)

    def test_array_mask_in_training(self, table):
        mask = Array("bool_", (64, 64))
        assert rules.attention_path(fused(64, n_query=64, mask=mask)) == "full"
        assert rules.attention_path(fused(64, n_query=64, mask=mask, training=True)) == "unfused"


@needs("mlx")
@pytest.mark.parametrize("table", TABLES)
def test_what_is_missing_is_named(table):
    recording = recorded("tiny", "float16", "inference")
    poorer = kernels.Table(
        "9.9.9", table.everywhere - {"rmsfloat16", "v_Squarefloat32float32"}, frozenset(), frozenset()
    )
    lines = missing(recording, "float16", poorer)
    assert any(re.fullmatch(r"rms_norm\(float16\[.*\): MLX 9\.9\.9 has no kernel rmsfloat16", line) for line in lines)
    assert "Gather: MLX 9.9.9 has no kernel indexing/gather.h" in lines
