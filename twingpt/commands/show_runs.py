"""Runs on the terminal: `gpt runs` and `gpt runs show`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape

from twingpt.runs.inventory import Run, SavedStep, starts
from twingpt.runs.units import human_bytes


def print_runs(console: Console, found: Iterable[Run]) -> None:
    """A line a run, below it one for each of its checkpoints and, in red, what is wrong with it."""
    for run in found:
        of = f"/{run.max_iters:,}" if run.max_iters else ""
        where = ", no checkpoint" if run.step is None else f" at {run.step:,}{of}"
        state = f"[green]{run.state}[/]" if run.state == "running" else run.state
        facts = [f"{state}{where}", _losses(run), escape(run.backend or ""), human_bytes(run.size_bytes)]
        line = "  ".join(filter(None, [*facts, _local(run.date)]))
        console.print(f"[bold]{escape(run.name)}[/]  {line}", soft_wrap=True)
        for one in run.checkpoints:
            facts = [f"{f'@{one.step}':>10}", f"{_losses(one):21}", f"{human_bytes(one.size_bytes):>7}"]
            marks = [name for name, true in (("latest", one.latest), ("best", one.best)) if true]
            line = "  ".join([*facts, _local(one.date), *marks])
            console.print(f"[dim]{line}[/]" + ("  [red]damaged[/]" if one.error else ""), soft_wrap=True)
        if run.error:
            console.print(f"         [red]{escape(run.error)}[/]", soft_wrap=True)


def _losses(row: Run | SavedStep) -> str:
    if row.val_loss is None:
        return ""
    return f"val {row.val_loss:.4f}" + (f"  {row.val_bpb:.3f} bpb" if row.val_bpb is not None else "")


def _local(date: str) -> str:
    return date[:16].replace("T", " ")


def print_run(console: Console, run: Run, described: dict[str, Any]) -> None:
    """A run's row and checkpoints, its starts, and its configuration, from run.json."""
    print_runs(console, [run])
    console.print()
    for folder in described["set_aside"]:
        console.print(f"[bold]set aside[/] {escape(folder)}", soft_wrap=True)
    for row in starts(described):
        text = f"{row['when']} UTC at step {row['step']}: {row['backend']} on {row['device']}; {row['versions']}"
        console.print(f"[bold]start[/] {escape(text)}")
    for title, key in (("model", "config"), ("training", "train"), ("data", "data")):
        text = ", ".join(f"{name} {json.dumps(value)}" for name, value in described[key].items())
        console.print(f"\n[bold]{title}[/] {escape(text)}", soft_wrap=key == "data" or None)
