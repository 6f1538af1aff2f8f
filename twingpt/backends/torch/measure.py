"""What `training/flops.py` and `checks/` run to measure or compare: the twin of `backends/mlx/measure.py`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twingpt.backends.torch import model
from twingpt.backends.torch.device import DTYPES, memory, to_numpy
from twingpt.core.backend import Device
from twingpt.core.config import GPTConfig


def arrays_peak(device: Device, run: Callable[[], Any]) -> int:
    """Peak bytes of the tensors that `run` makes; on a CPU by torch's profiler, since the process holds more."""
    if device.kind == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as traced:
            run()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            traced.export_chrome_trace(str(path))
            events = json.loads(path.read_text("utf-8"))["traceEvents"]
        changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
        return int(max(accumulate((size for _, size in changes), initial=0)))
    before = memory(device).now
    if device.kind in ("cuda", "xpu"):
        getattr(torch, device.kind).reset_peak_memory_stats(device.name)
    run()
    return memory(device).peak - before


def matmul(device: Device, dtype: str, n: int) -> Callable[[], None]:
    """A function that multiplies two n x n matrices of `dtype` on the device and waits, to be timed."""
    a, b = (torch.rand(n, n, device=device.name).to(DTYPES[dtype]) for _ in range(2))
    product = torch.empty_like(a)

    def run() -> None:
        torch.matmul(a, b, out=product)
        if device.kind != "cpu":
            torch.accelerator.synchronize(torch.device(device.name))

    return run


def loss_memory(config: GPTConfig, device: Device, dtype: str, tokens: int, *, chunked: bool) -> tuple[int, float]:
    """(peak bytes beside the inputs, seconds) of the loss of `tokens` positions and its gradients."""
    V, D = config.vocab_size, config.n_embd
    x = torch.randn(1, tokens, D, dtype=DTYPES[dtype], device=device.name).requires_grad_()
    p = {"model.embed_tokens.weight": torch.randn(V, D, dtype=DTYPES[dtype], device=device.name).requires_grad_()}
    targets = torch.randint(0, V, (1, tokens), device=device.name)
    before, start = memory(device).now, time.perf_counter()
    if chunked:
        loss = model.chunked_cross_entropy(x, p, targets, config)
    else:
        loss = model.cross_entropy(model.logits(x, p, config), targets)
    (loss / tokens).backward()
    loss.item()
    return memory(device).peak - before, time.perf_counter() - start


def module_logits(module: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """(B, T) ids -> (B, T, V) float32 logits of a transformers model, run in float32 on the CPU."""
    with torch.inference_mode():
        return to_numpy(module.to("cpu", torch.float32)(torch.from_numpy(tokens.astype(np.int64))).logits)
