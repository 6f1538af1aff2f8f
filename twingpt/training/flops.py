"""FLOPs of training a model, peak FLOP/s of devices, and MFU: the share of the peak that a run reaches."""

from __future__ import annotations

import math
import re
import statistics
import time
from dataclasses import dataclass

from twingpt.core.backend import Backend, Device
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import EMBEDDING, parameter_table

# Dense matrix products in TFLOP/s as their makers publish them, by the whole name that a driver reports.
# bfloat16 and float16 are those of the tensor or matrix cores with float32 sums, which a figure "with
# sparsity" is twice of; float32 is without TF32. What isn't here is measured.
PEAKS: dict[str, dict[str, float]] = {
    # NVIDIA V100 datasheet, 2020 (volta-v100-datasheet-update-us-1165301-r5.pdf)
    r"(Tesla )?V100-SXM2-(16|32)GB": {"float16": 125, "float32": 15.7},
    r"(Tesla )?V100-PCIE-(16|32)GB": {"float16": 112, "float32": 14},
    r"(Tesla )?V100S-PCIE-32GB": {"float16": 130, "float32": 16.4},
    # NVIDIA T4 datasheet (t4-tensor-core-datasheet-951643.pdf)
    r"(Tesla )?T4": {"float16": 65, "float32": 8.1},
    # NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf)
    r"A100-(SXM4|SXM|PCIE)-(40|80)GB|A100 80GB PCIe": {"bfloat16": 312, "float16": 312, "float32": 19.5},
    # NVIDIA A10, A30 and A40 datasheets (nvidia.com/en-us/data-center/products/a10-gpu, a30-gpu, a40)
    r"A10": {"bfloat16": 125, "float16": 125, "float32": 31.2},
    r"A30": {"bfloat16": 165, "float16": 165, "float32": 10.3},
    r"A40": {"bfloat16": 149.7, "float16": 149.7, "float32": 37.4},
    # NVIDIA H100 datasheet (resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet)
    r"H100 80GB HBM3": {"bfloat16": 989.4, "float16": 989.4, "float32": 67},
    r"H100 PCIe": {"bfloat16": 756.5, "float16": 756.5, "float32": 51},
    r"H100 NVL": {"bfloat16": 835.5, "float16": 835.5, "float32": 60},
    # NVIDIA H200 datasheet (nvidia.com/en-us/data-center/h200)
    r"H200": {"bfloat16": 989.4, "float16": 989.4, "float32": 67},
    r"H200 NVL": {"bfloat16": 835.5, "float16": 835.5, "float32": 60},
    # NVIDIA Blackwell datasheet (nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703)
    r"B200": {"bfloat16": 2250, "float16": 2250},
    # NVIDIA L4, L40 and L40S datasheets (nvidia.com/en-us/data-center/l4, l40, l40s)
    r"L4": {"bfloat16": 121, "float16": 121, "float32": 30.3},
    r"L40": {"bfloat16": 181.05, "float16": 181.05, "float32": 90.5},
    r"L40S": {"bfloat16": 362.05, "float16": 362.05, "float32": 91.6},
    # NVIDIA Ampere GA102 whitepaper v2, table of the RTX 3090 (nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf)
    r"GeForce RTX 3090": {"bfloat16": 71, "float16": 71, "float32": 35.6},
    # NVIDIA Ada whitepaper, table of the RTX 4090 (nvidia-ada-gpu-architecture.pdf)
    r"GeForce RTX 4090": {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6},
    # NVIDIA RTX Blackwell whitepaper, table of the RTX 5090 (nvidia-rtx-blackwell-gpu-architecture.pdf)
    r"GeForce RTX 5090": {"bfloat16": 209.5, "float16": 209.5, "float32": 104.8},
    # AMD's pages of the MI250, MI250X, MI300X and MI325X (amd.com/en/products/accelerators/instinct). The
    # cards of the MI200 series are two devices, of half the published figures each.
    r"AMD Instinct MI250": {"bfloat16": 181.05, "float16": 181.05, "float32": 45.25},
    r"AMD Instinct MI250X": {"bfloat16": 191.5, "float16": 191.5, "float32": 47.85},
    r"AMD Instinct MI3(00|25)X": {"bfloat16": 1307.4, "float16": 1307.4, "float32": 163.4},
}

SMALLEST, LARGEST = 256, 8192  # sides of the matrices that a peak is measured with
REPEATS = 3  # of the largest, at least
SECONDS = 0.25  # for a measurement: little against the start of a run


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of a device in matrix products of one dtype; `source` is documented or measured."""

    flops_per_second: float
    source: str


def documented_peak(device: Device, dtype: str) -> Peak | None:
    """The peak that the device's maker publishes for `dtype`; None for a device that PEAKS doesn't have."""
    if device.kind == "cpu":
        return None
    for name, peaks in PEAKS.items():
        if dtype in peaks and re.fullmatch(f"(NVIDIA )?({name})", device.description):
            return Peak(peaks[dtype] * 1e12, "documented")
    return None


def measured_peak(backend: Backend, device: Device, dtype: str) -> Peak | None:
    """The peak by timing products of two square matrices: the median of REPEATS or more, the fastest of all sizes.

    None where the product alone fails, as for want of memory.
    """
    try:
        return Peak(_fastest_product(backend, device, dtype), "measured")
    except (RuntimeError, MemoryError):
        return None


def _fastest_product(backend: Backend, device: Device, dtype: str) -> float:
    deadline, n, best = time.perf_counter() + SECONDS, SMALLEST, 0.0
    while True:
        product = backend.matmul(device, dtype, n)
        product()  # starts threads, loads kernels
        times: list[float] = []
        last = False
        while len(times) < REPEATS or (last and time.perf_counter() < deadline):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
            # The next size takes 8 times as long, and once more to warm up.
            last = n == LARGEST or 8 * times[-1] * (REPEATS + 1) > deadline - time.perf_counter()
        best = max(best, 2 * n**3 / statistics.median(times))
        if last:
            return best
        n *= 2


def peak(backend: Backend, device: Device, dtype: str) -> Peak | None:
    """The documented peak, else the measured one, else None."""
    return documented_peak(device, dtype) or measured_peak(backend, device, dtype)


def flops_per_token(config: GPTConfig) -> float:
    """FLOPs per token of training, forward and backward: 6 N + 12 L H Q T (PaLM, appendix B).

    N leaves out the embedding tables, which are looked up, and counts the head, tied or not. T is the
    context, or the window where it is shorter. What is computed again to save memory doesn't count.
    """
    table = parameter_table(config)
    weights = sum(row.size for row in table.values() if row.group != EMBEDDING)
    if config.tie_embeddings:
        weights += config.vocab_size * config.n_embd
    spans = sum(min(config.block_size, config.window(i) or config.block_size) for i in range(config.n_layer))
    return 6.0 * weights + 12.0 * config.n_head * config.head_dim * spans


def mfu(tokens_per_second: float, config: GPTConfig, peak: Peak | None) -> float | None:
    """Model FLOPs utilization in (0, 1]: training's FLOP/s over the device's peak; None where no peak is known.

    Nor is it known where training is faster: then the machine was busy with something else when it was measured.
    """
    share = tokens_per_second * flops_per_token(config) / peak.flops_per_second if peak else math.inf
    return share if share <= 1 else None
