"""Attention by blocks of queries, where no KV cache is in play: on which devices, and which keys a block sees.

The queries of a block see the keys from the first one's window up to the last one's own position, so that work and
memory follow the window and the causal triangle.
"""

from __future__ import annotations

from collections.abc import Iterator

# Queries in a block, by backend and kind of device; docs/experiments.md has what CPUs gave. A GPU launches kernels for
# each block, and fills itself with more queries than a CPU's cache holds scores of: its size is a choice, unmeasured.
BLOCK_SIZES = {("mlx", "cpu"): 128, ("torch", "cpu"): 128}
GPU_BLOCK_SIZE = 256

# Where the framework's own attention keeps scores for the backward pass: its fused kernels have none, if there are any.
UNFUSED = {("mlx", "cpu"), ("mlx", "metal")}


def block_size(backend: str, kind: str, length: int, window: int, *, half: bool, softcapped: bool) -> int:
    """Queries in a block of attention over `length` positions; 0 for the framework's own attention.

    `half` is a compute dtype of 2 bytes. Fused kernels with a backward pass keep no scores, and blocks of plain
    operations would write theirs to memory: on CUDA and MPS those stay, also for a window, whose mask costs them the
    work of all keys, in registers. No kernel of any framework has a softcap.
    """
    size = BLOCK_SIZES.get((backend, kind), GPU_BLOCK_SIZE)
    if (backend, kind) == ("torch", "cpu"):  # its fused backward pass is slow in half precision, and knows no window
        return size if half or softcapped or 0 < window < length else 0
    return size if length > size and (softcapped or (backend, kind) in UNFUSED) else 0


def query_blocks(length: int, size: int, window: int) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and the keys that they see; a window of 0 is all."""
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)
