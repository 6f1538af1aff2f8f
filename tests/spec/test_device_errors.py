"""What is said of a device that fails: Metal's errors in the words that MLX's sources have for them, and the ways out.

The sources are those of commit 846d176 (0.32); what stands in parentheses behind a command buffer's error is Metal's
own text, as the issues have it. Nothing here was run on Metal.
"""

import numpy as np
import pytest

from tests.cli.test_train import SMALL
from tests.conftest import cpu, needs
from twingpt.backends import registry
from twingpt.backends.errors import DeviceError, OutOfMemoryError
from twingpt.backends.mlx.errors import explain
from twingpt.core.config import GPTConfig
from twingpt.core.parameters import initialise

FAILED = "[METAL] Command buffer execution failed: {}."  # mlx/backend/metal/device.cpp:540
WATCHDOG = FAILED.format("Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)")
METALLIB = "Failed to load the default metallib. This library is using language version 4.0 which is not supported "

MESSAGES = {  # message: what is said of it, and the way out
    # mlx/backend/metal/allocator.cpp:143
    "[metal::malloc] Resource limit (499000) exceeded.": ("limit on how many buffers", "--no-compile"),
    # mlx/backend/metal/allocator.cpp:116
    "[metal::malloc] Attempting to allocate 30000000000 bytes which is greater than the maximum allowed buffer size of "
    "8589934592 bytes.": ("ran out of memory", "a smaller model"),
    # mlx/backend/metal/allocator.cpp:156 and mlx/backend/cuda/allocator.cpp:213
    "[malloc] Unable to allocate 4096 bytes.": ("ran out of memory", "a smaller model"),
    FAILED.format("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"): (
        "ran out of memory", "quantized weights",
    ),
    WATCHDOG: ("watchdog", "a smaller micro-batch"),  # mlx#3267
    FAILED.format("Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"): (
        "longer than macOS allows", "a smaller micro-batch",
    ),
    FAILED.format("Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)"): (
        "longer than macOS allows", "a smaller micro-batch",
    ),
    FAILED.format("Innocent Victim (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)"): (
        "gave up on a piece of work", "--resume",
    ),
    # mlx/backend/metal/device.cpp:240, and what macOS 15 says of the wheel for macOS 26
    f"{METALLIB}on this OS library not found library not found ": ("doesn't fit this macOS", "pip install --upgrade"),
    # mlx/backend/metal/device.cpp:750, :725
    "[metal::Device] Unable to load kernel v_copyint32float32\n": ("doesn't fit this macOS", "gpt doctor"),
    "[metal::Device] Unable to load function steel_gemm_fused_nax\nNo such function.\n": ("or this mlx", "gpt doctor"),
    # dyld, where mlx-metal is missing
    "dlopen(core.cpython-312-darwin.so, 0x0002): Library not loaded: @rpath/libmlx.dylib": ("or this mlx", "mlx-metal"),
    # mlx/backend/metal/device.cpp:927, mlx/backend/cpu/encoder.cpp:18
    "There is no Stream(gpu, 1) in current thread.": ("a thread's own", "in one thread"),
    "There is no Stream(cpu, 0) in current thread.": ("a thread's own", "in one thread"),
    # mlx/backend/metal/device.cpp:97
    "[metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, or virtualized "
    "macOS sessions where the GPU is not accessible.": ("no GPU for this session", "--backend torch"),
}  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:60].strip())
def test_an_error_of_metal_is_told_apart_with_its_way_out(message):
    told = explain(RuntimeError(message))
    meaning, way_out = MESSAGES[message]
    assert meaning in str(told) and way_out in str(told)
    assert message.splitlines()[0].strip().rstrip(".") in str(told) and "\n" not in str(told)
    assert isinstance(told, OutOfMemoryError) == ("memory" in meaning)


def test_what_is_not_of_a_device_stays_as_it_is():
    message = "[matmul] Last dimension of first input with shape (2,3) must match second to last dimension"
    assert explain(ValueError(message)) is None
    assert isinstance(explain(MemoryError()), OutOfMemoryError)


def fails(message):
    def raises(*_, **__):
        raise RuntimeError(message)

    return raises


@needs("mlx")
def test_training_says_after_which_step_the_device_failed(gpt, prose, tmp_path, monkeypatch):
    from twingpt.backends.mlx import training

    steps, step = [], training.TrainEngine.optimizer_step

    def third_fails(self, hyper):
        steps.append(hyper)
        self.compiled_step = self.compiled_step if len(steps) < 7 else fails(WATCHDOG)
        return step(self, hyper)

    monkeypatch.setattr(training.TrainEngine, "optimizer_step", third_fails)
    run = tmp_path / "run"
    code, _, err = gpt("train", "--data", prose, "--out", run, "--backend", "mlx", *SMALL)
    assert (
        code == 2 and "cpu failed after 6 steps; the last checkpoint is good. The GPU watchdog of macOS stopped" in err
    )
    assert "Impacting Interactivity" in err and "Traceback" not in err and len(err.splitlines()) == 1
    code, _, err = gpt("train", "--resume", run, "--batch-size", 2, "--gradient-accumulation-steps", 2)
    assert code == 2 and "cpu failed after 4 steps" in err  # from the checkpoint, in smaller micro-batches


def test_inference_says_so_too(engines, monkeypatch):
    config = GPTConfig(vocab_size=97, block_size=16, n_layer=1, n_embd=32)
    engine = engines.InferenceEngine(config, initialise(config, 0), cpu(engines))
    message = "[malloc] Unable to allocate 4096 bytes." if engines.NAME == "mlx" else "CUDA out of memory."
    module = f"twingpt.backends.{engines.NAME}.inference.model.hidden_states"
    monkeypatch.setattr(module, fails(message))
    cache = engine.new_cache(1, 16)
    for call in (lambda: engine.forward(np.array([[1]])), lambda: engine.prefill(cache, 0, np.array([1]))):
        with pytest.raises(OutOfMemoryError, match=r"ran out of memory.*: a smaller model"):
            call()


@needs("mlx")
def test_a_metallib_that_does_not_fit_is_told_by_every_way_to_a_device(gpt, prose, tmp_path, monkeypatch):
    import mlx.core as mx

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", fails(f"{METALLIB}on this OS library not found "))
    with pytest.raises(DeviceError, match="doesn't fit this macOS"):
        registry.find_device(registry.get("mlx"), None)
    code, _, err = gpt("train", "--data", prose, "--out", tmp_path / "run", "--backend", "mlx", *SMALL)
    assert code == 2 and "--force-reinstall" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_import_that_fails_for_the_metallib_is_told(monkeypatch):
    monkeypatch.setattr(registry, "choose", lambda name: ("mlx", "asked for"))
    monkeypatch.setattr(registry.importlib, "import_module", fails(f"{METALLIB}on this OS "))
    with pytest.raises(DeviceError, match="doesn't fit this macOS"):
        registry.get("mlx")
