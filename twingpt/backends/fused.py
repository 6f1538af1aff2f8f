"""Fused attention kernels: the head widths that devices have them for."""

from __future__ import annotations

from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig

# Of MLX 0.32's Metal kernels: for more than 8 queries, as in prefill and evaluation, and for up to 8, as in decoding,
# where the queries of a group, times the positions decoded at once, may be 32.
METAL_MANY_QUERIES = (64, 72, 80, 96, 128)
METAL_FEW_QUERIES, METAL_GROUP = (64, 96, 128, 256), 32
CUDA_MULTIPLE, CUDA_WIDEST = 8, 256


def head_note(config: GPTConfig, device: Device) -> str | None:
    """A sentence where the device's fused attention has no kernel for the model's heads; None where it has.

    Nothing is said of a CPU, nor of MPS and XPU, whose kernels have no published widths.
    """
    width, group = config.head_dim, config.n_head // config.n_kv_head
    without = []
    if device.kind == "metal":
        few = width in METAL_FEW_QUERIES and group <= METAL_GROUP
        without = [
            *(["evaluation and prompts"] if width not in METAL_MANY_QUERIES else []),
            *(["decoding"] if not few else []),
        ]
    elif device.kind == "cuda" and (width % CUDA_MULTIPLE or width > CUDA_WIDEST):
        without = ["training, evaluation and decoding"]
    if not without:
        return None
    heads = f"heads {width} wide" + (f", {group} to a key" if group > METAL_GROUP else "")
    fix = f"at most {METAL_GROUP} queries to a key" if group > METAL_GROUP else "widths of 64 and 128"
    return (
        f"{device.description} has no fused attention for {heads} in {' and '.join(without)}, which takes more time "
        f"and memory: it has kernels for {fix} (n_embd / n_head, or head_dim, is the width)."
    )
