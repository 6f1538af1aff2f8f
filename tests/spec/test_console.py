"""What a run looks like on a terminal and in a log."""

import dataclasses
import io

import pytest
from rich.console import Console

from twingpt.runs.console import ConsoleReporter
from twingpt.runs.events import (
    Evaluated,
    MixedSource,
    ReporterFailed,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    SaveFailed,
    SourceLoss,
    Trained,
)
from twingpt.runs.units import human_bytes, human_count, human_flops, human_share, human_time

EVENTS = [
    RunStarted(0, 100, "runs/[x]", "torch", "cpu", "float32", 2_000_000, 2048, "prose", 50_000, 5_000, 512),
    Trained(10, 3.21, 1.0, 1e-3, 20480, 6400.0, 5 * 10**8, 6 * 10**8, 0, 3.2, 0.41),
    Evaluated(10, 3.5, 1.5, True, 3.5),
    Sampled(10, "text with [brackets]"),
    Saved(10, "runs/[x]/checkpoints/step-00000010"),
    ReporterFailed(10, "WandbReporter", "CommError: [no] network"),
    SaveFailed(10, "[no] space"),
    RunEnded(10, "stop-after", 75.0),
]
MIXED = [
    dataclasses.replace(
        EVENTS[0], sources={"[a]": MixedSource(0.7, 40_000, 4_000), "b": MixedSource(0.3, 10_000, 1_000)}
    ),
    dataclasses.replace(EVENTS[1], epoch=0.4096, epochs={"[a]": 0.36, "b": 0.6}),
    dataclasses.replace(EVENTS[2], sources={"[a]": SourceLoss(3.4, 1.4), "b": SourceLoss(3.7333, 1.7)}),
]


@pytest.mark.parametrize("terminal", [True, False])
def test_every_event_is_shown(terminal):
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, force_terminal=terminal, width=120, color_system=None))
    with reporter.live():
        for event in EVENTS:
            reporter.report(event)
    text = out.getvalue()
    for part in (
        "runs/[x] starts", "2.0M parameters on torch cpu", "val loss 3.5000, 1.500 bits per byte", "best so far",
        "[brackets]", "saved runs/[x]/checkpoints", "stop-after after 10 steps in 1:15", "6.4k tok/s",
        "MFU 41%", "500 MB",
        "ETA 29s", "WandbReporter failed and reports no more of this run, which goes on: CommError: [no] network",
        "step 10: [no] space",
    ):  # fmt: skip
        assert part in text, part


LONG = [
    dataclasses.replace(EVENTS[0], max_iters=1_000_000, run=f"runs/{'a-long-name-' * 12}"),
    dataclasses.replace(EVENTS[1], step=123_456, epoch=12.34),
    EVENTS[2],
]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
def test_the_progress_line_keeps_its_eta(width):
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, force_terminal=True, width=width, color_system=None))
    with reporter.live():
        for event in LONG:
            reporter.report(event)
        reporter.progress.refresh()
        line = next(line for line in reversed(out.getvalue().splitlines()) if "ETA" in line)
    assert ("123,456/1,000,000" in line and line.rstrip().endswith("ETA 77:54:54")) or width < 40, line
    assert "ETA 77:54:54" in line and "…" not in line
    for part, least in (("val 3.500", 60), ("tok/s", 80), ("MFU 41%", 200), ("epoch 12.34", 100)):
        assert (part in line) or width < least, (part, line)
    assert LONG[0].run in out.getvalue()  # whole, for other commands


def test_a_pipe_has_whole_lines_and_samples():
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, width=40, color_system=None))
    text = "\n".join(f"line {i} {'of words ' * 9}end" for i in range(30))
    for event in [*LONG, Sampled(10, text)]:
        reporter.report(event)
    assert LONG[0].run in out.getvalue() and text in out.getvalue() and "│" not in out.getvalue()


def test_text_that_would_command_the_terminal_is_written_out():
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, force_terminal=True, width=60, color_system=None))
    reporter.report(Sampled(1, "a\x1b[2Jb\x9b1m\x07\tc\r\n\n\x00d\x7f\n"))
    top, first, second, bottom = out.getvalue().splitlines()
    assert r"a\x1b[2Jb\x9b1m\x07  c " in first and r"\x00d\x7f " in second
    assert len(top) == len(first) == len(second) == len(bottom) == 60


def test_the_sources_of_a_mixture_are_shown():
    out = io.StringIO()
    reporter = ConsoleReporter(Console(file=out, width=120, color_system=None))
    for event in MIXED:
        reporter.report(event)
    for part in (
        "  [a]: 70% of the windows, 40.0k tokens to train on, 4.0k held out, 3.6 epochs\n",
        "  b: 30% of the windows, 10.0k tokens to train on, 1.0k held out, 6.1 epochs\n",
        "loss 3.2100, epoch 0.41, ", "  [a]: 3.4000, 1.400 bits per byte\n", "  b: 3.7333, 1.700 bits per byte\n",
    ):  # fmt: skip
        assert part in out.getvalue(), part


def test_numbers_to_read():
    assert [human_bytes(n) for n in (0, 999, 1500, 25e9, 3e12)] == ["0 B", "999 B", "2 kB", "25.0 GB", "3.0 TB"]
    assert [human_count(n) for n in (7, 12_345, 10.7e6, 2e9)] == ["7", "12.3k", "10.7M", "2.0B"]
    assert [human_flops(n) for n in (4.57e9, 173.6e9, 1.3074e15)] == ["4.57 GFLOP/s", "174 GFLOP/s", "1.31 PFLOP/s"]
    assert [human_share(n) for n in (None, 0.0312, 0.41)] == ["n/a", "3.1%", "41%"]
    assert [human_time(n) for n in (5.4, 185, 7800)] == ["5s", "3:05", "2:10:00"]
