"""What the process needs before PyTorch computes; MLX's, which is more, is `backends/mlx/prepare.py`."""

from __future__ import annotations

import torch


def prepare() -> None:
    """Have float32 products in float32: TF32 rounds to 10 bits, and some containers turn it on by an environment."""
    try:
        if torch.get_float32_matmul_precision() != "highest":
            torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # the process uses the newer of two ways, which exclude each other
        torch.backends.cuda.matmul.fp32_precision = "ieee"
