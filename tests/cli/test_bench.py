"""gpt bench: speed and memory of both backends, each measured in its own process."""

import json
import os
import statistics
import subprocess
import sys

import psutil
import pytest

from tests.cli.test_commands import mistake
from tests.conftest import ONE, dose, needs
from twingpt.backends import host, registry
from twingpt.checks import bench
from twingpt.core.config import GPTConfig
from twingpt.core.errors import UserError
from twingpt.core.parameters import parameter_count
from twingpt.training.flops import Peak, flops_per_token

SMALL = [
    "--n-layer", 2, "--n-head", 4, "--n-embd", 32, "--block-size", 32, "--vocab-size", 300, "--batch-size", 4,
    "--repeats", 3, "--steps", 2, "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize("mode", dose("train", "forward"))
def test_both_backends_side_by_side(gpt, twins, mode):
    code, out, err = gpt("bench", mode, "--json", *SMALL)
    assert code == 0, err
    result = json.loads(out)
    assert result["mode"] == mode and result["skipped"] == []
    assert [row["backend"] for row in result["rows"]] == ["mlx", "torch"]
    for row in result["rows"]:
        assert row["device"] == "cpu" and row["dtype"] == "float32" and row["compile"] is False
        assert (row["repeats"], row["steps"], row["batch_size"]) == (3, 2, 4) and row["spread"] >= 0
        assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["seconds_per_step"])
        config = GPTConfig.from_dict(row["config"])
        assert config.n_embd == 32 and config.vocab_size == 300 and row["parameters"] == parameter_count(config)
        per_token = flops_per_token(config) * (1 if mode == "train" else 1 / 3)
        share = row["tokens_per_second"] * per_token / row["peak_flops"]
        assert row["mfu"] == (pytest.approx(share) if share <= 1 else None)  # on a machine that was busy meanwhile
        assert row["peak_source"] == "measured" and row["peak_memory_bytes"] > 0
        assert (row["optimizer"] == "muon") == (mode == "train")
        if mode == "train":
            assert row["array_memory_bytes"] > 2**20 and row["estimated_memory_bytes"] > 2**20
        else:
            assert row["array_memory_bytes"] is row["estimated_memory_bytes"] is None


@pytest.mark.parametrize("backend", ONE)
def test_the_table(gpt, backend):
    options = ["--dtype", "bfloat16", "--optimizer", "adamw", "--gradient-accumulation-steps", 2]
    code, out, err = gpt("bench", "train", "--backend", backend, *SMALL, *options)
    assert code == 0, err
    assert backend in out and "bfloat16" in out and "peak memory" in out and "FLOP/s in matrix products" in out
    assert "4 x 2 windows of 32 tokens a step, adamw; medians of 3 times 2 steps" in " ".join(out.split())


@pytest.mark.parametrize("backend", ONE)
def test_what_can_not_be_measured_is_said(backend):
    options = {"n_layer": 1, "n_embd": 32, "block_size": 32, "batch_size": 2}
    result = bench.measure("train", [backend, "jax"], options, repeats=1, steps=1)
    assert [row["backend"] for row in result["rows"]] == [backend]
    assert result["skipped"] == [{"backend": "jax", "reason": result["skipped"][0]["reason"]}]
    assert "Unknown backend 'jax'" in result["skipped"][0]["reason"]


class Stub:
    """A process that takes as long as it was told, without running any."""

    order: list[str] = []

    def __init__(self, backend):
        self.backend, self.seconds, self.ended = backend, iter({"mlx": [4, 2, 3], "torch": [1, 1, 3]}[backend]), False

    def ask(self, name, **arguments):
        if name == "open":
            kind = {"mlx": "metal", "torch": "mps"}[self.backend]
            return {
                "device": kind, "kind": kind, "description": "", "dtype": "bfloat16",
                "peak": {"flops_per_second": 1e12, "source": "measured"} if kind == "mps" else None,
            }  # fmt: skip
        if name == "run":
            self.order.append(self.backend)
            return next(self.seconds) * arguments["steps"]
        return {"build": None, "memory": 10**6, "arrays": 10**6}[name]

    def end(self):
        self.ended = True


def test_repeats_take_turns_and_rows_are_medians(monkeypatch):
    monkeypatch.setattr(bench, "Process", Stub)
    monkeypatch.setattr(Stub, "order", [])
    result = bench.measure("train", ["mlx", "torch"], {}, repeats=3, steps=7)
    assert Stub.order == ["mlx", "torch"] * 3
    mlx, torch = result["rows"]
    assert (mlx["seconds_per_step"], mlx["spread"]) == (statistics.median([4, 2, 3]), 2 / 3)
    assert (torch["seconds_per_step"], torch["spread"]) == (1, 2)
    assert mlx["mfu"] is None and mlx["peak_flops"] is None and torch["mfu"] > 0
    assert mlx["compile"] is True and mlx["config"]["n_embd"] == 384  # the recipe of a GPU


def test_one_model_for_all_where_one_device_is_a_cpu():
    assert bench.configuration(["cpu", "cuda"], {})[0].n_embd == bench.configuration(["cpu"], {})[0].n_embd == 192


@pytest.mark.parametrize("mode", ["train", "forward"])
def test_no_peak_is_shown_as_not_available(gpt, monkeypatch, mode):
    monkeypatch.setattr(bench, "Process", Stub)
    code, out, err = gpt("bench", mode, "--backend", "mlx", "--repeats", 2)
    assert code == 0 and "n/a" in out and "MFU of" not in out, err


@pytest.fixture
def process():
    process = bench.Process("torch")
    yield process
    process.end()


def test_a_process_that_dies_says_so(process):
    process.process.kill()
    with pytest.raises(UserError, match="torch was ended from outside, most likely for want of memory"):
        process.ask("free")


def test_a_process_that_ends_itself_says_what_it_printed_last(process):
    process.pool.submit(os.write, 1, b"something\nout of luck\n")
    process.pool.submit(os._exit, 3)
    with pytest.raises(UserError, match=r"torch ended with code 3: out of luck"):
        process.ask("free")


def test_a_failure_in_a_process_is_a_sentence(process):
    with pytest.raises(UserError, match=r"^Unknown backend 'x'"):
        process.ask("open", backend="x", device=None, dtype=None)
    with pytest.raises(UserError, match=r"^The measurement of torch failed: AttributeError: .*no attribute 'dance'"):
        process.ask("dance")


@needs("torch")
def test_a_failure_of_a_framework_is_a_sentence(process):
    process.ask("open", backend="torch", device="cpu", dtype=None)
    sizes = {"vocab_size": 2**40, "n_embd": 2**10, "tokens": 2**10, "dtype": "float32"}
    with pytest.raises(UserError, match=r"The measurement of torch failed: RuntimeError: .*allocate"):
        process.ask("loss", **sizes, chunked=False)


ORPHAN = """
from twingpt.checks import bench
if __name__ == "__main__":
    process = bench.Process("torch")
    print(process.process.pid, process.pool.submit(print).result(), flush=True)
    input()
"""


def test_a_process_ends_with_its_parent():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], **pipes)
    child = psutil.Process(int(parent.stdout.readline().split()[0]))
    assert child.is_running()
    parent.kill()
    parent.communicate()
    child.wait(200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", 0], "--repeats must be at least 1, and is 0"),
        (["--steps", -1], "--steps must be at least 1"),
        (["--preset", "tinny"], "Unknown preset 'tinny': did you mean 'tiny'?"),
        (["--n-head", 5], "n_embd 192 is not divisible by n_head 5"),
        (["--optimizer", "sgd"], "Unknown optimizer 'sgd'"),
        (["--batch-size", 0], "batch_size must be at least 1"),
        (["--backend", "jax"], "Unknown backend 'jax'"),
    ],
)
def test_mistakes(gpt, monkeypatch, arguments, message):
    monkeypatch.setattr(bench, "Process", None)  # none is started
    assert message in mistake(gpt, "bench", "train", *arguments)


@pytest.mark.parametrize("backend", ONE)
def test_a_device_or_dtype_that_is_not_there(gpt, backend):
    assert "device 'tpu'" in mistake(gpt, "bench", "forward", "--backend", backend, "--device", "tpu")
    assert "Unknown dtype on cpu 'int4'" in mistake(
        gpt, "bench", "forward", "--backend", backend, "--device", "cpu", "--dtype", "int4"
    )


def test_the_share_of_a_forward_pass():
    config, train = bench.configuration(["cpu"], {})
    built = {"config": config.to_dict(), "train": train.to_dict(), "compile": False}
    facts = {"device": "cpu", "kind": "cpu", "description": "", "dtype": "float32", "built": built}
    process = Stub("torch")
    facts["peak"] = {"flops_per_second": 1e12, "source": "measured"}
    rows = [bench._row(mode, process, facts, config, train, [1.0], 1) for mode in ("train", "forward")]
    assert rows[0]["mfu"] == pytest.approx(3 * rows[1]["mfu"])
    assert rows[0]["mfu"] == pytest.approx(16 * 128 * flops_per_token(config) / Peak(1e12, "").flops_per_second)


@pytest.mark.soak
def test_the_chunked_loss_takes_a_fraction_of_the_memory(gpt):
    """In a soak, as on a CPU that is the memory of a process; that all logits never exist is tested by the array."""
    if host.free_memory() < 4 * 2**30:
        pytest.skip("less than 4 GB of memory are free")
    code, out, err = gpt("bench", "memory", "--tokens", 4096, "--vocab-size", 40960, "--n-embd", 64, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    names = [name for name in registry.BACKENDS if registry.installed(name)]
    assert [(row["backend"], row["way"]) for row in rows] == [(n, way) for n in names for way in ("plain", "chunked")]
    for row in rows:
        assert row["peak_memory_bytes"] > 0 and row["tokens_per_second"] > 0 and row["mfu"] is None
        assert row["ratio"] == 1 if row["way"] == "plain" else row["ratio"] > 1.5


@needs("torch")
def test_a_loss_too_large_for_the_machine_is_not_tried(gpt):
    code, out, err = gpt("bench", "memory", "--tokens", 10**9, "--backend", "torch")
    assert code in (0, 2) and ("give a smaller --tokens" in err + out)


def test_a_bad_size_of_the_loss(gpt):
    code, _, err = gpt("bench", "memory", "--tokens", 0)
    assert code == 2 and "--tokens must be at least 2" in err
