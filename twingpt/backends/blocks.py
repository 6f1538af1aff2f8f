"""Attention by blocks of queries, where no KV cache is in play: on which devices, and which keys a block sees.

The queries of a block see the keys from the first one's window up to the last one's own position, so that work and
memory follow the window and the causal triangle.
"""

from __future__ import annotations

from collections.abc import Iterator

# Queries in a block, by backend and kind of device; docs/experiments.md has what CPUs gave. A GPU launches kernels for
# each block, and fills itself with more queries than a CPU's cache holds scores of: its size is a choice, unmeasured.
BLOCK_SIZES = {("mlx", "cpu"): 128, ("torch", "cpu"): 64}
GPU_BLOCK_SIZE = 256
LONGEST_HALF = 512  # positions up to which blocks beat torch's own kernel on a CPU in half precision

# Widths of heads whose fused attention has a backward pass on Metal, but under a window's mask: the kernels sdpa_vjp_*,
# which MLX has from 0.32.4 on (tests/metal).
METAL_WIDTHS = {64, 72, 80, 96, 128, 192, 256}
UNFUSED = {("mlx", "cpu"), ("torch", "mps")}  # no fused attention there has a backward pass
FEW_QUERIES = 8  # or fewer go to other kernels on Metal, where MLX raises an error in training


def keeps_scores(backend: str, kind: str, length: int, window: int, head_dim: int) -> bool:
    """Whether the framework's own attention keeps scores for the backward pass: where that is not fused."""
    if (backend, kind) == ("mlx", "metal"):
        return head_dim not in METAL_WIDTHS or 0 < window < length
    return (backend, kind) in UNFUSED


def block_size(
    backend: str, kind: str, length: int, window: int, head_dim: int, *, half: bool, softcapped: bool
) -> int:
    """Queries in a block of attention over `length` positions; 0 for the framework's own attention.

    `half` is a compute dtype of 2 bytes. Fused kernels with a backward pass keep no scores, and blocks of plain
    operations would write theirs to memory: on CUDA and MPS those stay, also for a window, whose mask costs them the
    work of all keys, in registers. No kernel of any framework has a softcap.
    """
    size = BLOCK_SIZES.get((backend, kind), GPU_BLOCK_SIZE)
    if (backend, kind) == (
        "torch",
        "cpu",
    ):  # its fused backward pass is slow in half precision at first, and knows no window
        return size if (half and length <= LONGEST_HALF) or softcapped or 0 < window < length else 0
    scores = softcapped or keeps_scores(backend, kind, length, window, head_dim)
    return size if length > size and scores else 0


def query_blocks(length: int, size: int, window: int) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and the keys that they see; a window of 0 is all.

    The last block has up to FEW_QUERIES more than others, and not so few.
    """
    start = 0
    while start < length:
        stop = length if length - start <= size + FEW_QUERIES else start + size
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)
        start = stop
