"""The rules by which MLX chooses Metal kernels: a call -> the names of all that it may take.

They follow MLX's sources, read at commit 846d1762 (0.32.2: the files and lines named below, under mlx/backend/metal);
attention and its backward pass at 3ae665ab, since they changed in between. For 0.32.4 itself there is its wheel: every
name is looked up in its table, and in the machine code of its libmlx.dylib (macOS 15) the conditions were read by which
`ScaledDotProductAttention::use_fallback`, its VJP, their caller, `qmv` and `dispatch_qmv` decide. Beside what a call
says, a choice depends on the GPU, and on strides that no call shows: a rule gives the names for every GPU of GPUS and
for every layout.

Not all kernels were compiled beforehand. In a wheel, which is built without MLX_METAL_JIT (nojit_kernels.cpp), all were
but gathers and scatters, whose source is made from a template when they first run (indexing.cpp:57-577), and what
`mx.compile` fuses (compiled.cpp:263). For the former a rule gives the template's header. The latter is recorded as it
is uncompiled: element-wise operations, each of which is to have a kernel of its own.

Not covered: the kernels for M5's neural accelerators, which only the wheel for macOS 26 has (0.32.4 chooses among them
by later rules than those that were read), and those for arrays beyond 2**31 elements, with `large` in their names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

FLOATS = ("float32", "float16", "bfloat16")
# `get_type_string` of mlx/backend/metal/utils.h, which some names have instead of `type_to_name`.
TYPE_STRINGS = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}


@dataclass(frozen=True)
class Array:
    """An array of a call: its dtype, as Metal's kernels name it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Call:
    """A call of an MLX function, `training` where it is traced for a gradient; options are by keyword."""

    name: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    training: bool = False

    def option(self, name: str) -> Any:
        """The value of an option; None where the call has none of this name."""
        return dict(self.options).get(name)

    def __str__(self) -> str:
        given = [*map(str, self.arguments), *(f"{name}={value}" for name, value in self.options)]
        return f"{self.name}({', '.join(given)}){' in training' if self.training else ''}"


class NoKernelError(Exception):
    """MLX raises an error on Metal for a call."""


class Gpu(NamedTuple):
    """What the choices see of a GPU, by its architecture's name: the last letter and the generation.

    The letter is g for an M and a Pro, s for a Max, d for an Ultra, p for a phone; generation 13 is M1, 15 M3, 17 M5.
    """

    letter: str
    generation: int


GPUS = [Gpu(letter, generation) for letter in "gsd" for generation in (13, 15, 17)]
LAYOUTS = [(a, b) for a in (False, True) for b in (False, True)]  # whether each factor of a product is transposed


def names(call: Call) -> set[str]:
    """The kernels that a call may take, with its backward pass in training; NoKernelError where MLX raises an error."""
    return set(RULES[call.name](call))


def promoted(*arrays: Any) -> str:
    """The dtype that a call of floating-point arrays computes in; NoKernelError for others, which MLX refuses."""
    dtypes = {array.dtype for array in arrays if isinstance(array, Array)}
    if other := sorted(dtypes - {*FLOATS}):
        raise NoKernelError(f"{other[0]} has no kernel on Metal, which computes in {', '.join(FLOATS)}")
    return dtypes.pop() if len(dtypes) == 1 else "float32"


# ---------------------------------------------------------------------------------------------------- attention


def attention_path(call: Call) -> str:
    """Which fused kernels attention takes, "full" or "vector", or "unfused"; NoKernelError where MLX raises an error.

    scaled_dot_product_attention.cpp at 3ae665ab, has_fused_kernel and use_fallback; fast.cpp:826: in training the
    logsumexp is asked for, which the backward pass takes.
    """
    q, k, v = call.arguments
    heads, n_query, width = q.shape[1:]
    n_key, group, mask = k.shape[2], heads // k.shape[1], call.option("mask")
    dtype = promoted(q, k, v)
    assert not call.option("force_fused"), f"no rule for {call}"
    if isinstance(mask, Array) and call.training:
        return "unfused"
    if n_query > 8:
        if width not in (64, 72, 80, 96, 128, 192, 256) or width != v.shape[-1]:
            return "unfused"
        if mask == "causal" and n_query > n_key:
            return "unfused"
        long = dtype != "float32" and mask == "causal" and n_query == n_key >= 2048
        return "full" if call.training or width < 192 or (width == 256 and long) else "unfused"
    if width not in (64, 96, 128, 192, 256) or width != v.shape[-1] or n_query > n_key or n_query * group > 32:
        return "unfused"
    if call.training:
        raise NoKernelError(
            f"training attention of {n_query} queries with heads of {width} raises an error when MLX computes it: "
            "the kernels for up to 8 queries give no logsumexp"
        )
    return "unfused" if width == 192 else "vector"


def attention(call: Call) -> Iterator[str]:
    path, (q, k, v) = attention_path(call), call.arguments
    dtype, width, mask = promoted(q, k, v), q.shape[-1], call.option("mask")
    if path == "unfused":
        yield from unfused_attention(call)
    elif path == "vector":
        # sdpa_vector, sdpa_vector_2pass; the latter on Max and Ultra from 1,024 keys on, with groups from 4,096
        yield f"sdpa_vector_{TYPE_STRINGS[dtype]}_{width}_{width}"
        yield f"sdpa_vector_2pass_1_{TYPE_STRINGS[dtype]}_{width}_{width}"
        yield f"sdpa_vector_2pass_2_{TYPE_STRINGS[dtype]}_{width}"
        group = q.shape[1] // k.shape[1]
        if mask is None and k.shape[2] >= 8192 and (group, width) in {(8, 64), (8, 128), (12, 128), (16, 128)}:
            yield f"sdpa_vector_2pass_1_gqa_{group}_{TYPE_STRINGS[dtype]}_{width}_{width}"
    else:
        # sdpa_full_self_attention_metal; a block of keys is larger on an Ultra for the widest heads
        blocks = {32 if width < 128 else 16} | ({32} if width == 256 and dtype != "float32" else set())
        mask_dtype = mask.dtype if isinstance(mask, Array) else dtype
        for bk in blocks:
            wn = 2 if width == 256 else 1
            yield f"steel_attention_{dtype}_bq32_bk{bk}_bd{width}_bv{width}_wm4_wn{wn}_mask{mask_dtype}"
        if call.training:
            yield from attention_vjp(call)


def attention_vjp(call: Call) -> Iterator[str]:
    """ScaledDotProductAttentionVJP::eval_gpu and sdpa_vjp_blocked: tiles of 1,024 queries by 1,024 keys."""
    q, k, _ = call.arguments
    batch, n_query, width = math.prod(q.shape[:2]), q.shape[2], q.shape[3]
    dtype = promoted(q)
    string = TYPE_STRINGS[dtype]
    yield from (f"sdpa_vjp_odo_{string}_{width}", f"sdpa_vjp_ds_{string}")
    yield from (f"sdpa_vjp_reduce_{how}_{string}" for how in ("add", "set"))
    for queries, keys in itertools.product(tile_sizes(n_query), tile_sizes(k.shape[2])):
        for M, N, K in ((queries, keys, width), (queries, width, keys), (keys, width, queries)):
            yield from steel_gemm(dtype, M, N, K, batch)


def tile_sizes(n: int) -> set[int]:
    return {min(n, 1024), n % 1024 or min(n, 1024)}


def unfused_attention(call: Call) -> Iterator[str]:
    """The fallback of fast.cpp:718-790: two products, the softmax in float32, and element-wise ones (PRIMITIVES)."""
    q, k, v = call.arguments
    batch, heads, n_query, width = q.shape
    dtype, n_key, kv_heads = promoted(q, k, v), k.shape[2], k.shape[1]
    yield from product(dtype, n_query, n_key, width, batch * heads, training=call.training)
    yield from product(dtype, n_query, v.shape[-1], n_key, batch * heads, training=call.training)
    if kv_heads == 1:  # the keys may be taken for all queries of a group at once
        yield from product(dtype, n_query * heads, n_key, width, batch, training=call.training)
    yield from softmax_names(dtype, n_key, precise=True)


# ----------------------------------------------------------------------------------------------------- products


def matmul(call: Call) -> Iterator[str]:
    """Matmul::eval_gpu, matmul.cpp:1451; ops.cpp:3464 flattens the batch where the second factor has none."""
    yield from any_product(call, *call.arguments[:2], axpby=False)


def addmm(call: Call) -> Iterator[str]:
    """AddMM::eval_gpu, matmul.cpp:1593."""
    yield from any_product(call, *call.arguments[1:3], axpby=True)


def any_product(call: Call, a: Array, b: Array, *, axpby: bool) -> Iterator[str]:
    (*batch, M, K), N = a.shape, b.shape[-1]
    dtype, n = promoted(*call.arguments), math.prod(batch)
    yield from product(dtype, M, N, K, n, axpby=axpby, training=call.training)
    if len(b.shape) == 2 and n > 1:
        yield from product(dtype, M * n, N, K, 1, axpby=axpby, training=call.training)


def product(
    dtype: str, M: int, N: int, K: int, batch: int, *, axpby: bool = False, training: bool = False
) -> Iterator[str]:
    """(M, K) by (K, N), `batch` of them, and in training the products of the gradients by either factor."""
    for gpu in GPUS:
        yield from product_on(gpu, dtype, M, N, K, batch, axpby=axpby)
        if training:
            yield from product_on(gpu, dtype, M, K, N, batch)
            yield from product_on(gpu, dtype, K, N, M, batch)


def product_on(gpu: Gpu, dtype: str, M: int, N: int, K: int, batch: int, *, axpby: bool = False) -> Iterator[str]:
    """matmul.cpp:1505-1590: a dot product, a wide GEMV for few rows, a GEMV for one, else a GEMM."""
    if M == N == batch == 1:
        yield f"dot_product_{dtype}_it32_tg512_sg16"
    passes = math.ceil(M / 5)  # gemv_wide_config, matmul.cpp:1299
    if gpu.generation >= 15 and dtype != "float32" and min(M, N) > 1 and K % 4 == 0 and passes <= 3:
        yield f"gemv_wide_{dtype}_nv{math.ceil(M / passes)}_kl{32 if passes == 1 or N <= 64 else 16}"
    if min(M, N) == 1:
        yield from gemv(dtype, M, N, K, axpby=axpby)
    else:
        yield from steel_gemm_on(gpu, dtype, M, N, K, batch, axpby=axpby)


def gemv(dtype: str, M: int, N: int, K: int, *, axpby: bool) -> Iterator[str]:
    """gemv_axbpy, matmul.cpp:1093."""
    n_out = N if N != 1 else M
    bn = 16 if n_out >= 2048 else 4 if n_out >= 512 else 2
    sm, sn = (4, 8) if K >= 8192 and n_out >= 2048 else (8, 4)
    transposed = f"gemv_t_{dtype}_bm1_bn{bn}_sm{sm}_sn{sn}_tm4_tn{1 if n_out < 4 else 4}"
    bm, bn, sm, sn = 8 if n_out >= 4096 else 4, 1, 1, 32
    if K <= 64:
        bm, sm, sn = 1, 8, 4
    elif n_out * 16 <= K:
        bm, bn = 1, 8
    plain = f"gemv_{dtype}_bm{bm}_bn{bn}_sm{sm}_sn{sn}_tm{1 if n_out < 4 else 4}_tn4"
    for name, batched in itertools.product((transposed, plain), (0, 1)):
        yield f"{name}_nc{batched}_axpby{int(axpby)}"


def steel_gemm(dtype: str, M: int, N: int, K: int, batch: int) -> Iterator[str]:
    """steel_matmul, on any GPU."""
    for gpu in GPUS:
        yield from steel_gemm_on(gpu, dtype, M, N, K, batch)


def steel_gemm_on(gpu: Gpu, dtype: str, M: int, N: int, K: int, batch: int, *, axpby: bool = False) -> Iterator[str]:
    """steel_matmul_axpby, matmul.cpp:844: split along K where that is long, else one pass."""
    few = math.ceil(M / 16) * math.ceil(N / 16) <= (2048 if gpu.letter in "sd" else 1024)
    if batch == 1 and few and K // 16 >= 8 and max(M, N) <= K:
        yield from steel_split_k(dtype, M, N, K, axpby=axpby)
        return
    for a, b in LAYOUTS:
        yield f"steel_gemm_fused_{'nt'[a]}{'nt'[b]}_{dtype}_{dtype}_{gemm_tile(gpu, dtype, M, N, K, batch, a, b)}"


def steel_split_k(dtype: str, M: int, N: int, K: int, *, axpby: bool) -> Iterator[str]:
    """steel_gemm_splitk_axpby, matmul.cpp:503; sums in float32."""
    bm, bn = (16 if n < 40 else 32 for n in (M, N))
    aligned = f"MN_{'nt'[M % bm == 0 and N % bn == 0]}aligned_K_{'nt'[K % 16 == 0]}aligned"
    for a, b in LAYOUTS:
        yield f"steel_gemm_splitk_{'nt'[a]}{'nt'[b]}_{dtype}_float32_bm{bm}_bn{bn}_bk16_wm2_wn2_{aligned}"
    yield f"steel_gemm_splitk_accum_{dtype}_float32{'_axbpy' if axpby else ''}"


def gemm_tile(gpu: Gpu, dtype: str, M: int, N: int, K: int, batch: int, a: bool, b: bool) -> str:
    """GEMM_TPARAM_MACRO, matmul.cpp:88; a and b are whether a factor is transposed."""
    half, nt = dtype != "float32", b and not a
    middle, tall, wide = "bm64_bn64_bk16_wm1_wn2", "bm64_bn32_bk32_wm2_wn2", "bm32_bn64_bk16_wm1_wn2"
    default = "bm64_bn64_bk16_wm2_wn2"
    if gpu.letter in "gp":
        return tall if nt else middle if half else default
    if gpu.letter != "d":
        return default
    if batch * M * N >= 1 << 20:
        if not half:
            return default
        return middle if 2 * max(M, N) > K else tall if nt else wide
    if half:
        return tall if nt else middle
    return wide if nt else tall


def quantized_matmul(call: Call) -> Iterator[str]:
    """QuantizedMatmul::eval_gpu, quantized.cpp:1782, for x W^T in inference."""
    x, w, scales, biases = call.arguments
    assert call.option("transpose") in (None, True) and not call.training, f"no rule for {call}"
    group, bits = call.option("group_size"), call.option("bits")
    K, N = x.shape[-1], w.shape[0]
    M, kind = math.prod(x.shape[:-1]), f"{TYPE_STRINGS[promoted(x, scales, biases)]}_gs_{group}_b_{bits}"
    for gpu in GPUS:
        if qmv_limit(gpu, K, N) > M:
            yield from quantized_vectors(gpu, M, N, K, bits, kind)
        else:  # qmm_splitk, quantized.cpp:1120, or what it falls back to; sums what it splits
            aligned = f"alN_{'true' if N % 32 == 0 else 'false'}"
            yield from (f"affine_qmm_t_splitk_{kind}_{aligned}", f"affine_qmm_t_{kind}_{aligned}_batch_0")
            yield from reductions("sum", promoted(x, scales, biases))


def quantized_vectors(gpu: Gpu, M: int, N: int, K: int, bits: int, kind: str) -> Iterator[str]:
    """dispatch_qmv, quantized.cpp:1739, and qmv; in 0.32.4 the latter has a fast kernel for any number of outputs."""
    fast = K % (32 // bits * 2 * 32) == 0
    partial_rows = int(fast and N % 8 > 0)
    if K in (64, 128):
        yield f"affine_qmv_quad_{kind}_d_{K}_batch_0"
    elif M >= 2 and gpu.generation >= 15:
        yield f"affine_qmv_wide_{kind}_nv_{math.ceil(M / math.ceil(M / 5))}_kl_8_batch_0"
    else:
        yield f"affine_qmv_{'fast_' if fast else ''}{kind}_batch_0_pr_{partial_rows}_hgs_0_r_4"


def qmv_limit(gpu: Gpu, K: int, N: int) -> int:
    """get_qmv_batch_limit, quantized.cpp:85: the rows from which on it is a matrix product."""
    size = 0 if max(K, N) <= 2048 else 1 if max(K, N) <= 4096 else 2
    if gpu.letter == "d":
        return (32, 18, 12)[size]
    return (
        (33, 25, 13)[size]
        if gpu.generation >= 17
        else (13, 15, 13)[size]
        if gpu.generation >= 15
        else (14, 10, 6)[size]
    )


def quantize(call: Call) -> Iterator[str]:
    """fast::Quantize::eval_gpu, quantized.cpp:231, both ways."""
    x, *scales_and_biases = call.arguments
    string = TYPE_STRINGS[promoted(*(scales_and_biases or [x]))]
    yield f"affine_{call.name}_{string}_gs_{call.option('group_size')}_b_{call.option('bits')}"


# ---------------------------------------------------------------------------------- norms, RoPE and along an axis


def norm(call: Call) -> Iterator[str]:
    """RMSNorm and LayerNorm with their backward passes, normalization.cpp:17-436; in the promoted dtype."""
    name, limit = {"rms_norm": ("rms", 4096), "layer_norm": ("layer_norm", 6656)}[call.name]
    dtype, width = promoted(*call.arguments), call.arguments[0].shape[-1]
    kind = f"{name}{'_looped' if width > limit else ''}{dtype}"
    yield kind
    if call.training:
        yield f"vjp_{kind}"
        yield from reductions("sum", dtype)


def rope(call: Call) -> Iterator[str]:
    """RoPE::eval_gpu, rope.cpp:14; its backward pass is the same kernel. A single position of all rows has its own."""
    kind = f"freqs_{promoted(call.arguments[0])}" if call.option("freqs") else promoted(call.arguments[0])
    yield f"rope_{kind}"
    if call.arguments[0].shape[-2] == 1:
        yield f"rope_single_{kind}"


def softmax(call: Call) -> Iterator[str]:
    yield from softmax_names(promoted(call.arguments[0]), last_axis(call), precise=bool(call.option("precise")))


def softmax_names(dtype: str, size: int, *, precise: bool) -> Iterator[str]:
    """Softmax::eval_gpu, softmax.cpp:15."""
    how = "precise_" if precise and dtype != "float32" else ""
    yield f"{'looped' if size > 4096 else 'block'}_softmax_{how}{dtype}"


def logsumexp(call: Call) -> Iterator[str]:
    """LogSumExp::eval_gpu, logsumexp.cpp:14; its gradient is a softmax."""
    dtype, size = promoted(call.arguments[0]), last_axis(call)
    yield f"{'looped' if size > 4096 else 'block'}_logsumexp_{dtype}"
    if call.training:
        yield from softmax_names(dtype, size, precise=False)


def argmax(call: Call) -> Iterator[str]:
    """ArgReduce::eval_gpu, primitives.cpp:62."""
    yield f"argmax_{call.arguments[0].dtype}"


def argsort(call: Call) -> Iterator[str]:
    """gpu_merge_sort, sort.cpp:274: up to 2,048 in one block, else in several that are merged."""
    dtype, size = call.arguments[0].dtype, last_axis(call)
    bn = min(512, max(32, 1 << math.ceil(math.log2(size / 4))))
    if size > bn * 4:
        yield from (f"{step}_mbsort_{dtype}_uint32_bn{bn}_tn4" for step in ("sort", "partition", "merge"))
    else:
        yield from (f"{layout}arg_block_sort_{dtype}_uint32_bn{bn}_tn4" for layout in ("c", "nc"))


def cumsum(call: Call) -> Iterator[str]:
    """Scan::eval_gpu, scan.cpp:116."""
    dtype = call.arguments[0].dtype
    yield from (f"{layout}_scan_inclusive_sum_{dtype}_{dtype}" for layout in ("contig", "strided"))


def last_axis(call: Call) -> int:
    """The length of the last axis, along which a call is to go."""
    shape, axis = call.arguments[0].shape, call.option("axis")
    assert axis in (-1, len(shape) - 1), f"no rule for {call}: it goes along another axis than the last"
    return int(shape[-1])


RULES: dict[str, Callable[[Call], Iterator[str]]] = {
    "scaled_dot_product_attention": attention,
    "rope": rope,
    "rms_norm": norm,
    "layer_norm": norm,
    "matmul": matmul,
    "addmm": addmm,
    "quantized_matmul": quantized_matmul,
    "quantize": quantize,
    "dequantize": quantize,
    "softmax": softmax,
    "logsumexp": logsumexp,
    "argmax": argmax,
    "argsort": argsort,
    "cumsum": cumsum,
}


# --------------------------------------------------------------------------------------- the primitives of a graph

# What a graph has beside the calls above is known by its name alone: it is to have kernels for every dtype that the
# backend may give it. The compute dtype is added to FLOAT, which gradients, logits and the optimizer are in.
FLOAT, INDEX, BOOL = ("float32",), ("int32", "uint32"), ("bool_",)


def unary(op: str, dtypes: tuple[str, ...]) -> Iterator[str]:
    """unary_op_gpu_inplace, unary.cpp:16."""
    for layout, dtype in itertools.product(("v", "vn", "gn1"), dtypes):
        yield f"{layout}_{op}{dtype}{dtype}"


def binary(op: str, dtypes: tuple[str, ...]) -> Iterator[str]:
    """get_kernel_name, binary.cpp:21."""
    layouts = ("ss", "sv", "svn", "vs", "vsn", "vv", "vvn", "g1", "g2", "g3", "gn2")
    return (f"{layout}_{op}{dtype}" for layout, dtype in itertools.product(layouts, dtypes))


def ternary(op: str, dtypes: tuple[str, ...]) -> Iterator[str]:
    """ternary_op_gpu_inplace, ternary.cpp:11."""
    layouts = ("v", "vn", "sv", "svn", "vs", "vsn", "g1", "g2", "g3", "gn2")
    return (f"{layout}_{op}{dtype}" for layout, dtype in itertools.product(layouts, dtypes))


def copies(op: str, dtypes: tuple[str, ...]) -> Iterator[str]:
    """copy_gpu_inplace, copy.cpp:26: a scalar, a whole array, or by strides, from one dtype to another."""
    for layout, source, target in itertools.product(("s", "sn", "v", "vn", "g1", "g2", "g3", "gn2"), dtypes, dtypes):
        yield f"{layout}_copy{source}{target}"
    for layout, dtype in itertools.product(("gg1", "gg2", "gg3", "ggn2"), dtypes):
        yield f"{layout}_copy{dtype}{dtype}"


def reductions(op: str, *dtypes: str) -> Iterator[str]:
    """reduce.cpp:304-940, of any axes: by rows, by columns, of all; a sum of booleans is one of int8 (:245)."""
    for dtype in ("int8" if dtype == "bool_" else dtype for dtype in dtypes):
        yield f"init_reduce_{op}{'int32' if dtype == 'int8' else dtype}"
        yield from (f"{name}_{op}{dtype}" for name in ("all_reduce", "row_reduce_simple"))
        for axes in (1, 2, 5):
            for name in ("row_reduce_small", "row_reduce_looped", "col_reduce_small", "col_reduce_longcolumn"):
                yield f"{name}_{axes}_reduce_{op}{dtype}"
            yield from (f"col_reduce_{name}_{axes}_32_32_reduce_{op}{dtype}" for name in ("looped", "2pass"))


def template(header: str) -> Callable[[str, tuple[str, ...]], Iterator[str]]:
    """A kernel that is made at run time, from this header."""
    return lambda op, dtypes: iter([header])


def arange(op: str, dtypes: tuple[str, ...]) -> Iterator[str]:
    """Arange::eval_gpu, primitives.cpp:29."""
    return (f"arange{dtype}" for dtype in dtypes)


def nothing(op: str, dtypes: tuple[str, ...]) -> Iterator[str]:
    """A view of the same memory, a mark in the graph, or a call that was recorded."""
    return iter(())


PRIMITIVES: dict[str, tuple[Callable[[str, tuple[str, ...]], Iterator[str]], tuple[str, ...]]] = {
    **dict.fromkeys(("Exp", "Erf", "Tanh", "Sigmoid", "Sqrt", "Rsqrt", "Sin", "Cos", "Cosh"), (unary, FLOAT)),
    **dict.fromkeys(("Square", "Negative", "Abs"), (unary, FLOAT)),
    "LogicalNot": (unary, BOOL),
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Maximum", "Minimum"), (binary, FLOAT + INDEX)),
    **dict.fromkeys(("Divide", "Power"), (binary, FLOAT)),
    **dict.fromkeys(("Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual"), (binary, FLOAT + INDEX)),
    "LogicalAnd": (binary, BOOL),
    "LogicalOr": (binary, BOOL),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor"), (binary, ("uint32", "bool_"))),
    **dict.fromkeys(("RightShift", "LeftShift"), (binary, ("uint32",))),
    "Select": (ternary, FLOAT + INDEX),
    **dict.fromkeys(("AsType", "Copy", "Contiguous", "Concatenate", "Full", "Pad"), (copies, FLOAT + INDEX + BOOL)),
    **dict.fromkeys(("Reshape", "SliceUpdate"), (copies, FLOAT + INDEX + BOOL)),
    "Sum": (lambda op, dtypes: reductions("sum", *dtypes), FLOAT + BOOL),
    "Max": (lambda op, dtypes: reductions("max", *dtypes), FLOAT),
    "Arange": (arange, INDEX),
    "Gather": (template("indexing/gather.h"), ()),
    "GatherAxis": (template("indexing/gather_axis.h"), ()),
    "Scatter": (template("indexing/scatter.h"), ()),
    "ScatterAxis": (template("indexing/scatter_axis.h"), ()),
    **dict.fromkeys(("Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Transpose"), (nothing, ())),
    **dict.fromkeys(("Flatten", "Unflatten", "Slice", "Split", "View"), (nothing, ())),
    **dict.fromkeys(("CustomTransforms", "Depends", "StopGradient"), (nothing, ())),
    **dict.fromkeys(("Matmul", "AddMM", "QuantizedMatmul", "Quantize", "Softmax", "LogSumExp"), (nothing, ())),
    **dict.fromkeys(("ArgReduce", "ArgMax", "ArgSort", "CumSum"), (nothing, ())),
}


def primitive_names(primitive: str, dtype: str) -> set[str]:
    """The kernels of a primitive where the backend computes in `dtype`, or the header of their template."""
    rule, dtypes = PRIMITIVES[primitive]
    return set(rule(primitive, (*dtypes, dtype) if "float32" in dtypes else dtypes))
