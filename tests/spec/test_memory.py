"""The estimate of memory against what is measured, and what is made of it: a plan that fits, and advice."""

import dataclasses
import json
import subprocess
import sys

import pytest

from tests.conftest import BOTH, ONE
from twingpt.backends import registry
from twingpt.core.backend import Device
from twingpt.core.config import TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.presets import shaped
from twingpt.runs.events import read_events
from twingpt.training import recipes
from twingpt.training.memory import CHANGES, advice, estimate, needed, plan

GB = 10**9
CPU = Device("cpu", "cpu", "a chip", ("float32", "bfloat16", "float16"), ("float32",), "float32", 32 * GB)
GPU = dataclasses.replace(CPU, name="cuda:0", kind="cuda", fast_dtypes=("float32", "float16", "bfloat16"))
MODEL = shaped("qwen3", vocab_size=50304, n_layer=12, n_head=12, n_embd=768, block_size=1024)
TRAIN = TrainConfig(batch_size=16)

# At most, in a step: activations, the optimizer's arrays, the loss's, a block's with gradient checkpointing, scores.
MEASURED = [
    ("gpt2", {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 300}, {"batch_size": 8}),
    (
        "qwen3",
        {"n_layer": 2, "n_head": 8, "n_embd": 384, "block_size": 32, "vocab_size": 1024},
        {"optimizer": "muon", "batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    ("nano", {"n_layer": 1, "n_head": 4, "n_embd": 64, "block_size": 128, "vocab_size": 12000}, {"batch_size": 4}),
    (
        "llama",
        {"n_layer": 6, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 300},
        {"batch_size": 8, "gradient_checkpointing": True},
    ),
    (
        "llama",
        {
            "n_layer": 3, "n_head": 8, "n_embd": 64, "block_size": 512, "vocab_size": 300, "attn_softcap": 30.0,
            "sliding_window": 64, "full_attention_layers": (1,),
        },
        {"batch_size": 2},
    ),
]  # fmt: skip

MEASURE = """
import json, sys
from twingpt.backends import registry
from twingpt.checks.bench import Worker
worker = Worker()
worker.engines = registry.get(sys.argv[1])
worker.device = registry.find_device(worker.engines, "cpu")
for config, train in json.loads(sys.argv[2]):
    print("arrays", worker.arrays(config, train, compile=False))
"""


@pytest.mark.parametrize("backend", ONE)
def test_the_estimate_is_what_is_measured(backend):
    runs = [(shaped(shape, **size), TrainConfig(**settings)) for shape, size, settings in MEASURED]
    told = json.dumps([[config.to_dict(), train.to_dict()] for config, train in runs])
    ran = subprocess.run([sys.executable, "-c", MEASURE, backend, told], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    measured = [int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("arrays")]
    estimated = [estimate(config, train, backend, "cpu").peak for config, train in runs]
    assert min(measured) > 2 * 10**7 and estimated == pytest.approx(measured, rel=0.15)


def test_what_fits_is_left_alone():
    assert plan(MODEL, TRAIN, "torch", GPU, 80 * GB, ()) == (TRAIN, [])
    assert plan(MODEL, TRAIN, "torch", GPU, 80 * GB, CHANGES) == (TRAIN, [])


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_plan_takes_the_largest_micro_batch_that_fits(backend, device):
    def need(size: int) -> int:
        train = dataclasses.replace(TRAIN, batch_size=size, gradient_accumulation_steps=16 // size)
        return needed(MODEL, train, backend, device.kind)

    for size, larger in ((8, 16), (4, 8), (2, 4)):
        assert need(size) < need(larger)
        free = int((need(size) + need(larger)) / 2 / 0.9)
        fitting, (note,) = plan(MODEL, TRAIN, backend, device, free, ())
        assert (fitting.batch_size, fitting.gradient_accumulation_steps) == (size, 16 // size)
        assert not fitting.gradient_checkpointing
        assert f"a step is {16 // size} micro-batches of {size} windows, not 1 of 16" in note


def test_a_plan_changes_only_what_was_not_chosen():
    least = dataclasses.replace(TRAIN, batch_size=1, gradient_accumulation_steps=16)
    again = dataclasses.replace(least, gradient_checkpointing=True)
    free = int((needed(MODEL, least, "torch", "cuda") + needed(MODEL, again, "torch", "cuda")) / 2 / 0.9)
    fitting, (note,) = plan(MODEL, TRAIN, "torch", GPU, free, ())
    assert fitting.gradient_checkpointing and fitting.batch_size * fitting.gradient_accumulation_steps == 16
    assert "the backward pass computes activations again" in note
    fitting, _ = plan(MODEL, TRAIN, "torch", GPU, 10 * GB, {"batch_size"})
    assert (fitting.batch_size, fitting.gradient_checkpointing) == (16, True)
    fitting, _ = plan(MODEL, TRAIN, "torch", GPU, 10 * GB, {"gradient_checkpointing"})
    assert fitting.batch_size < 16 and not fitting.gradient_checkpointing
    same, (note,) = plan(MODEL, TRAIN, "torch", GPU, 6 * GB, CHANGES)
    assert same == TRAIN and "and cuda:0 has 6.0 GB free. Less is needed with --batch-size" in note


def test_a_run_that_can_not_fit_is_refused():
    small = dataclasses.replace(GPU, memory_bytes=1 * GB)
    with pytest.raises(
        UserError, match=r"^Training this takes about \S+ GB of memory, and cuda:0 has 1.0 GB\. Less is"
    ):
        plan(MODEL, TRAIN, "torch", small, 1 * GB, ())
    unknown = dataclasses.replace(small, memory_bytes=None)
    assert plan(MODEL, TRAIN, "torch", unknown, 1 * GB, ())[1]  # no device says that it never can


def test_advice_names_what_needs_less():
    assert advice(MODEL, TRAIN, "torch", CPU, None) == (
        "Less is needed with --batch-size 8 --gradient-accumulation-steps 2, or with --gradient-checkpointing."
    )
    four = dataclasses.replace(TRAIN, batch_size=4, gradient_accumulation_steps=4)
    assert advice(MODEL, TRAIN, "torch", GPU, int(needed(MODEL, four, "torch", "cuda") / 0.9) + 1) == (
        "Less is needed with --batch-size 4 --gradient-accumulation-steps 4, or with --gradient-checkpointing, "
        "or with --dtype float16, or with --dtype bfloat16."
    )
    least = dataclasses.replace(TRAIN, batch_size=1, gradient_checkpointing=True)
    assert advice(MODEL, least, "mlx", CPU, None) == (
        "Less is needed with a smaller model, or with a shorter --block-size."
    )


def test_more_of_anything_is_estimated_as_more():
    for backend in ("torch", "mlx"):
        base = estimate(MODEL, TRAIN, backend, "cpu").peak
        for change in (
            {"n_layer": 13},
            {"vocab_size": 60000},
            {"dropout": 0.1},
            {"norm_placement": "both"},
        ):
            assert estimate(dataclasses.replace(MODEL, **change), TRAIN, backend, "cpu").peak > base
        half = dataclasses.replace(TRAIN, dtype="bfloat16")
        again = dataclasses.replace(TRAIN, gradient_checkpointing=True)
        assert max(estimate(MODEL, other, backend, "cpu").peak for other in (half, again)) < base


def test_scores_are_estimated_where_they_are_kept():
    def activations(backend: str, kind: str, **change) -> int:
        return estimate(dataclasses.replace(MODEL, **change), TRAIN, backend, kind).activations

    least, softcapped = activations("mlx", "metal"), {"attn_softcap": 30.0}
    assert activations("mlx", "cuda") == activations("mlx", "metal", sliding_window=64) == least
    assert activations("mlx", "metal", **softcapped) == least and activations("torch", "cpu", **softcapped) == (
        activations("torch", "cpu")
    )
    one_block = {"block_size": 256, "head_dim": 40}  # which is not computed again, and whose width has no kernel
    assert activations("mlx", "metal", **one_block) > activations("mlx", "cuda", **one_block)
    kept = [activations("mlx", "cpu", **change) for change in (softcapped, {}, {"sliding_window": 64})]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3


@pytest.fixture
def free(monkeypatch):
    """Pretend that so many bytes are free."""

    def pretend(engines, count: int) -> None:
        monkeypatch.setattr(engines, "free_memory", lambda device: count)

    return pretend


SMALL = [
    "--tokenizer", "byte", "--n-layer", 2, "--n-head", 4, "--n-embd", 32, "--block-size", 32, "--max-iters", 4,
    "--sample-interval", 0, "--eval-iters", 1,
]  # fmt: skip


@pytest.mark.parametrize("backend", BOTH)
def test_a_new_run_is_made_to_fit_and_goes_on_as_it_was(gpt, prose, tmp_path, backend, free):
    run, engines = tmp_path / "run", registry.get(backend)
    options = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32}
    config, train = recipes.resolve(options, registry.find_device(engines, "cpu"), 257)
    sizes = {
        size: needed(config, dataclasses.replace(train, batch_size=size), backend, "cpu")
        for size in (4, train.batch_size)
    }
    free(engines, int(sum(sizes.values()) / 2 / 0.9))
    common = ["--backend", backend, "--device", "cpu"]
    code, out, err = gpt("train", "--data", prose, "--out", run, *SMALL, *common, "--stop-after", 2)
    assert code == 0, err
    told = [event for event in read_events(run / "metrics.jsonl") if event["event"] == "memory_planned"]
    assert len(told) == 1 and told[0]["message"] in out and "micro-batches of" in out
    described = json.loads((run / "run.json").read_text("utf-8"))["train"]
    assert 4 <= described["batch_size"] < 16
    assert described["batch_size"] * described["gradient_accumulation_steps"] == 16
    free(engines, 2**40)
    code, out, err = gpt("train", "--resume", run, *common)
    assert code == 0 and "micro-batches" not in out, err
    assert json.loads((run / "run.json").read_text("utf-8"))["train"] == described
    free(engines, 1000)  # and nothing changes unasked where it does not fit any more
    code, out, err = gpt("train", "--resume", run, *common, "--max-iters", 5)
    assert code == 0 and "free. Less is needed with" in out, err
    assert json.loads((run / "run.json").read_text("utf-8"))["train"] == {**described, "max_iters": 5}


def test_a_run_goes_on_in_other_micro_batches_of_the_same_steps(gpt, prose, tmp_path):
    run = tmp_path / "run"
    code, _, err = gpt("train", "--data", prose, "--out", run, *SMALL, "--batch-size", 8, "--stop-after", 2)
    assert code == 0, err
    code, _, err = gpt("train", "--resume", run, "--batch-size", 4)
    assert code == 2 and "A step of the run has 8 windows, and would have 4: give --batch-size and" in err
    code, _, err = gpt("train", "--resume", run, "--batch-size", 4, "--gradient-accumulation-steps", 2)
    assert code == 0, err
    train = json.loads((run / "run.json").read_text("utf-8"))["train"]
    assert (train["batch_size"], train["gradient_accumulation_steps"]) == (4, 2)


@pytest.mark.parametrize("fast", [("float32",), ("float32", "bfloat16")])
@pytest.mark.parametrize("backend", BOTH)
def test_out_of_memory_is_answered_with_what_to_change(gpt, prose, tmp_path, backend, fast, monkeypatch):
    def fails(*_):
        raise MemoryError

    engines = registry.get(backend)
    monkeypatch.setattr(engines.TrainEngine, "forward_backward", fails)
    device = dataclasses.replace(registry.find_device(engines, "cpu"), fast_dtypes=fast)  # whatever this one has
    monkeypatch.setattr(engines, "devices", lambda: [device])
    code, _, err = gpt(
        "train", "--data", prose, "--out", tmp_path / "run", *SMALL, "--backend", backend, "--device", "cpu",
        "--dtype", "float32",
    )  # fmt: skip
    assert code == 2 and "cpu ran out of memory after 0 steps; nothing was saved. Less is needed with" in err
    advice = "--batch-size 8 --gradient-accumulation-steps 2, or with --gradient-checkpointing"
    advice += ", or with --dtype bfloat16." if "bfloat16" in fast else "."
    assert advice in " ".join(err.split())
