"""gpt train --wizard: questions asked again, an estimate from a dry run, a file that trains, and leaving."""

import builtins
import dataclasses
import io
import math
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import needs, posix
from twingpt.backends import registry
from twingpt.commands import wizard
from twingpt.commands.wizard import parse_span, plan
from twingpt.core.config import TrainConfig
from twingpt.core.errors import UserError
from twingpt.core.presets import preset
from twingpt.data.prepare import prepare
from twingpt.training import estimate, memory, recipes
from twingpt.training.estimate import Place, Plan, Speed
from twingpt.training.settings import read


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talk(monkeypatch, tmp_path):
    """Run the wizard with some answers, then the end of input: what it returned, and what it showed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(estimate, "MEASURED_SECONDS", 0.05)

    def run(*answers: object):
        left = list(answers)

        def answer(prompt=""):
            if not left:
                raise EOFError
            given = left.pop(0)
            if given is KeyboardInterrupt:
                raise given
            return str(given)

        monkeypatch.setattr(builtins, "input", answer)
        out = io.StringIO()
        result = wizard.run(Console(file=out, force_terminal=True, width=120, color_system=None))
        assert left == []
        return result, plain(out.getvalue())

    return run


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)


@pytest.fixture
def one_device(monkeypatch):
    """Torch on the CPU and nothing else, so that no device is asked for."""
    place = Place(registry.get("torch"), registry.find_device(registry.get("torch"), "cpu"))
    monkeypatch.setattr(wizard, "places", lambda: [place])
    return place


@needs("torch")
def test_wrong_answers_are_asked_again_and_a_file_is_written(talk, one_device, prose, tmp_path, gpt):
    (tmp_path / "old.toml").write_text("seed = 1")
    answers = ["nothing.txt", f"'{prose}'", "mikro", "0", "small", "1", "soon", "0", "4", "y"]
    result, shown = talk(*answers, "no/where.toml", tmp_path, "old.toml", "n", "new.toml", "n")
    assert result == (Path("new.toml"), False)
    for part in (
        "There is no file or folder nothing.txt", "tokens to train on", "Unknown size 'mikro': did you mean 'micro'?",
        "depth must be from 1 to 48, and is 0", "fewer than one block of 512", "Answer with a time such as 90s",
        "In full, depth 1:", "tokens/s", "4 of 2,048 tokens", "There is no folder no", "is a folder",
        "old.toml exists: replace it?", "Choose another name", "gpt train --config new.toml",
    ):  # fmt: skip
        assert part in shown, part
    assert (tmp_path / "old.toml").read_text("utf-8") == "seed = 1"
    written = read(Path("new.toml"))
    assert written.pop("eval_iters") in (0, 1, 2)  # by how fast this machine is
    assert written == {
        "depth": 1, "data": str(prose), "max_iters": 4, "eval_interval": 1, "sample_interval": 2,
        "checkpoint_interval": 1, "backend": "torch", "device": "cpu",
    }  # fmt: skip
    code, _, err = gpt("train", "--config", "new.toml", "--set", "sample_interval=0", "--out", "run", "--stop-after", 1)
    assert code == 0, err


@needs("torch")
def test_size_and_time_can_be_chosen_again_and_a_file_replaced(talk, one_device, prose, tmp_path):
    (tmp_path / "train.toml").write_text("seed = 1")
    result, shown = talk(prose, "1", "1h", "n", "2", "3", "y", "", "y", "")
    assert result == (Path("train.toml"), True) and shown.count("Estimate") == 2
    assert read(result[0])["depth"] == 2 and read(result[0])["max_iters"] == 3


@needs("torch")
@pytest.mark.parametrize(
    "answers",
    [[], [KeyboardInterrupt], ["1", "4"], ["1", "4", "y"], ["1", "4", "y", "old.toml"],
     ["1", "4", "y", "old.toml", KeyboardInterrupt]],
)  # fmt: skip
def test_leaving_writes_no_file(talk, one_device, prose, tmp_path, answers):
    (tmp_path / "old.toml").write_text("seed = 1")
    before = {path: path.read_text("utf-8") for path in tmp_path.iterdir()}
    result, shown = talk(prose, *answers)
    assert result is None and shown.endswith("No file was written.\n")
    assert {path: path.read_text("utf-8") for path in tmp_path.iterdir()} == before


@needs("torch")
def test_a_size_that_does_not_train_is_asked_again(talk, one_device, prose, monkeypatch):
    measured, errors = estimate.measure, [RuntimeError("CUDA out of memory.\nTried to allocate"), MemoryError()]
    errors.append(UserError("it needs about 9.0 GB of memory, and torch cpu has 8.0 GB."))

    def fails(*arguments):
        if errors:
            raise errors.pop(0)
        return measured(*arguments)

    monkeypatch.setattr(wizard, "measure", fails)
    result, shown = talk(prose, *["1", "1h"] * 4, "y", "", "n")
    assert result == (Path("train.toml"), False)
    for reason in ("CUDA out of memory.", "out of memory", "it needs about 9.0 GB of memory"):
        assert f"does not train on torch cpu: {reason}" in shown


def test_the_device_is_chosen_among_those_found(talk, prose, twins):
    result, shown = talk(9, "two", 2, prose, "1", "4", "y", "", "n")
    assert result == (Path("train.toml"), False) and shown.count("Answer with a number from 1 to ") == 2
    found = estimate.places()
    assert {place.engines.NAME for place in found} == {"mlx", "torch"}
    assert registry.choose()[0] == found[0].engines.NAME
    chosen = read(result[0])
    assert (chosen["backend"], chosen["device"]) == (found[1].engines.NAME, found[1].device.name)


@needs("torch")
def test_a_slow_step_is_measured_by_its_windows(one_device, prose, monkeypatch):
    data = prepare(str(prose), "byte", 2048)
    config, train = recipes.resolve({"depth": 1, "batch_size": 8}, one_device.device, 257)
    took: list[int] = []

    class Slow(estimate._DryRun):
        def seconds(self, rows, micro_batches=1, updates=1):
            took.append(rows)
            super().seconds(rows, micro_batches, updates)
            return 5.0 + 3.0 * rows  # five to update

        def evaluation(self, rows):
            return 0.5 * rows

    monkeypatch.setattr(estimate, "_DryRun", Slow)
    speed = estimate.measure(config, train, data, one_device)
    windows = 8 * train.gradient_accumulation_steps
    assert took == [1, 2] and train.gradient_accumulation_steps > 1
    assert speed == Speed(step=5 + 3 * windows, evaluation_batch=4.0)


@needs("torch")
def test_a_size_larger_than_the_memory_is_not_tried(talk, one_device, prose, monkeypatch):
    small = dataclasses.replace(one_device.device, memory_bytes=10**6)
    monkeypatch.setattr(wizard, "places", lambda: [Place(one_device.engines, small)])
    monkeypatch.setattr(one_device.engines, "free_memory", lambda device: 10**6)
    monkeypatch.setattr(wizard, "measure", None)
    result, shown = talk(prose, "1", "1h", KeyboardInterrupt)
    assert result is None and "This size does not train on torch cpu: Training this takes about" in shown


def test_a_span_is_a_time_or_a_number_of_steps():
    assert [parse_span(text) for text in ("90s", "5m", "1h30m", "1.5h", "2 min", "1d")] == [
        90.0, 300.0, 5400.0, 5400.0, 120.0, 86400.0,
    ]  # fmt: skip
    assert parse_span("400") == 400 and isinstance(parse_span("400"), int)
    for text in ("", "0", "0m", "-5", "5 weeks", "h", "1h30", "five", "1e3"):
        with pytest.raises(UserError, match="Answer with a time"):
            parse_span(text)


@needs("torch")
def test_a_plan_fills_the_time_evaluations_included(prose):
    data = prepare(str(prose), "byte", 2048)
    config = preset("micro", 257)
    batches = math.ceil((len(data.splits["val"]) - 1) / config.block_size / 4)
    train, speed = TrainConfig(batch_size=4), Speed(0.5, 0.01, start=10.0)
    assert plan(config, train, data, speed, 40) == Plan(40, 30 + 11 * batches * 0.01, 4, 0)
    hour = plan(config, train, data, speed, 3600.0)
    assert hour.steps == int((3590 - 11 * batches * 0.01) / 0.5) and 3599 <= hour.seconds <= 3600
    assert plan(config, train, data, speed, 1.0) == Plan(1, 10.5 + 2 * 0.01, 1, 1)  # at least a step, and a batch
    slow = plan(config, train, data, Speed(0.5, 30.0), 3600.0)
    assert slow.eval_iters == 1 and slow.seconds <= 3600 and slow.steps > 6000


def test_a_checkpoint_is_as_large_as_said(saved):
    from tests.conftest import open_checkpoint

    config = open_checkpoint(saved).config
    size = sum((saved / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    assert memory.checkpoint_bytes(config, TrainConfig()) == pytest.approx(size, rel=0.1)


def test_without_a_terminal_it_is_one_sentence():
    with pytest.raises(UserError, match="it needs a terminal: give flags, or a file with --config"):
        wizard.run(Console(file=io.StringIO()))


class Child:
    """A command on a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        import pty  # which Windows has not

        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.environ |= {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
            os.execv(sys.executable, [sys.executable, "-m", "twingpt", *arguments])
        self.text = ""

    def wait_for(self, part: str, seconds: float = 200.0) -> None:
        deadline = time.monotonic() + seconds
        while part not in plain(self.text):
            if time.monotonic() > deadline:
                raise TimeoutError(plain(self.text))
            if select.select([self.master], [], [], 1.0)[0]:
                self.text += os.read(self.master, 4096).decode(errors="replace")

    def answer(self, part: str, text: str) -> None:
        self.wait_for(part)
        self.text = ""
        os.write(self.master, text.encode())

    def interrupt(self, part: str) -> None:
        """Press Ctrl-C as a person does, again if nothing came of it, and wait for `part`.

        CPython loses one that comes after it looked for signals and before `input()` reads: no test can rule that out.
        """
        for seconds in (10.0, 20.0, 200.0):
            time.sleep(0.5)  # the question is on the screen a little before the answer is waited for
            os.write(self.master, b"\x03")
            try:
                return self.wait_for(part, seconds)
            except TimeoutError:
                continue
        raise AssertionError(plain(self.text))

    def exit_code(self) -> int:
        try:
            while os.read(self.master, 4096):
                pass
        except OSError:  # Linux says so at the end
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@posix("Windows has no such terminals")
@pytest.mark.soak
@needs("torch")
def test_on_a_real_terminal(prose, tmp_path):
    child = Child(tmp_path, "train", "--wizard")
    if len(estimate.places()) > 1:
        child.answer("Which device?", "\n")
    child.answer("Which data?", "prose.txt\n")
    child.answer("Which size?", "1\n")
    child.answer("How long?", "3\n")
    child.answer("Go on with this?", "\n")
    child.answer("Write to which file?", "\n")
    child.answer("Start now?", "\n")
    child.wait_for("Try it:")
    assert child.exit_code() == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert read(tmp_path / "train.toml")["max_iters"] == read(run / "config.toml")["max_iters"] == 3
    assert (run / "checkpoints" / "step-00000003").is_dir()


@posix("Windows has no such terminals")
@needs("torch")
def test_ctrl_c_on_a_real_terminal(prose, tmp_path):
    child = Child(tmp_path, "train", "--wizard")
    child.wait_for("Which d")
    child.interrupt("No file was written.")
    assert child.exit_code() == 128 + signal.SIGINT
    assert list(tmp_path.iterdir()) == [prose]
