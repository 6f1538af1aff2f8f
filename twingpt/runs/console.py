"""Runs on the terminal: one in training, as lines and a bar with loss, speed, memory and time left; or a list."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from twingpt.core.events import (
    Baseline,
    Evaluated,
    Event,
    MemoryPlanned,
    ReporterFailed,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    SaveFailed,
    Trained,
)
from twingpt.core.inventory import Run, SavedStep, starts

SAMPLE_LINES = 12  # of a sample, blank ones left out; metrics.jsonl has all of it


def human_bytes(count: float) -> str:
    """A count of bytes to read: 512 MB, 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit != "GB" else f"{count:.1f} GB"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """A count to read: 950, 12.3k, 10.7M."""
    for unit in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}B"


def human_documents(count: int) -> str:
    """So many documents: 1 document, 12,345 documents."""
    return f"{count:,} document{'s' * (count != 1)}"


def visible(text: str) -> str:
    """The text with what a terminal would not show, or would obey, written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def beginning(text: str, lines: int) -> str:
    """The first so many lines of a text that are not blank, as `visible` has them."""
    kept = [line.expandtabs(4) for line in text.splitlines() if line.strip()][:lines]
    return "\n".join(map(visible, kept))


def human_flops(flops_per_second: float) -> str:
    """A speed of arithmetic to read: 4.57 GFLOP/s, 174 GFLOP/s, 312 TFLOP/s."""
    unit, scale = next(((u, s) for u, s in (("P", 1e15), ("T", 1e12)) if flops_per_second >= s), ("G", 1e9))
    return f"{flops_per_second / scale:.3g} {unit}FLOP/s"


def human_share(share: float | None) -> str:
    """A share to read: 41%, 3.2%, n/a."""
    if share is None:
        return "n/a"
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def human_time(seconds: float) -> str:
    """A span to read: 42s, 3:05, 2:10:00."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class _TimeLeft(ProgressColumn):
    """Steps left over the run's own speed, which is steadier than the bar's."""

    def render(self, task: Task) -> Text:
        speed = task.fields["steps_per_second"]
        left = human_time((task.total - task.completed) / speed) if speed and task.total else "–"
        return Text(f"ETA {left}", style="cyan")


class ConsoleReporter:
    """Prints a run's events; on a terminal with a live bar below them, elsewhere as plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tokens_per_step = 1
        self.closed = False
        self.skipped = 0
        self.baseline = ""
        self.progress = Progress(
            TextColumn("[bold]{task.completed:,.0f}[/]/{task.total:,.0f}  epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("loss [bold green]{task.fields[loss]}[/]  val [bold magenta]{task.fields[val]}[/]"),
            TextColumn("{task.fields[speed]} tok/s  MFU {task.fields[mfu]}  {task.fields[memory]}"),
            _TimeLeft(),
            console=console,
            expand=True,
        )
        self.task = self.progress.add_task(
            "train", total=1, epoch="–", loss="–", val="–", speed="–", mfu="–", memory="", steps_per_second=0.0
        )

    @contextmanager
    def live(self) -> Iterator[None]:
        """Keep the bar on the screen from the start of the run to the end of the block."""
        try:
            yield
        finally:
            if self.console.is_terminal:
                self.progress.stop()

    def report(self, event: Event) -> None:
        """Print an event, or move the bar; silent once nobody reads, as behind `| head`."""
        if not self.closed:
            try:
                self._show(event)
            except (OSError, SystemExit):  # Rich turns a broken pipe into an exit
                self.closed = True

    def _show(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._started(event)
        elif isinstance(event, Trained):
            self._trained(event)
        elif isinstance(event, Evaluated):
            self._evaluated(event)
        elif isinstance(event, Baseline):
            self._baseline(event)
        elif isinstance(event, Sampled):
            title = f"a sample after {event.step:,} steps"
            self.console.print(Panel(escape(beginning(event.text, SAMPLE_LINES)), title=title, border_style="dim"))
        elif isinstance(event, Saved):
            self.console.print(f"[dim]step {event.step:,}: saved {escape(event.checkpoint)}[/]", soft_wrap=True)
        elif isinstance(event, MemoryPlanned | SaveFailed | ReporterFailed):
            self.console.print(f"[yellow]{escape(_warning(event))}[/]", soft_wrap=True)
        elif isinstance(event, RunEnded):
            self.console.print(f"{event.reason} after {event.step:,} steps in {human_time(event.seconds)}")

    def _evaluated(self, event: Evaluated) -> None:
        self.progress.update(self.task, val=f"{event.val_loss:.3f}")
        best = "  [green]best so far[/]" if event.best else ""
        self.console.print(
            f"step {event.step:,}: val loss [bold]{event.val_loss:.4f}[/], {event.val_bpb:.3f} bits per byte"
            f"{self.baseline}{best}"
        )
        for name, losses in event.sources.items():
            self.console.print(f"  {escape(name)}: {losses.val_loss:.4f}, {losses.val_bpb:.3f} bits per byte")

    def _baseline(self, event: Baseline) -> None:
        self.baseline = f" [dim]({event.n}-gram {event.bits_per_byte:.3f})[/]"
        self.console.print(
            f"baseline: val loss {event.val_loss:.4f}, {event.bits_per_byte:.3f} bits per byte "
            f"by the best n-gram, n = {event.n}, which only counts"
        )

    def _started(self, event: RunStarted) -> None:
        self.tokens_per_step = event.tokens_per_step
        self.progress.update(self.task, total=event.max_iters, completed=event.step)
        verb = f"goes on after step {event.step:,}" if event.step else "starts"
        self.console.print(
            f"[bold]{escape(event.run)}[/] {verb}: {human_count(event.parameters)} parameters on "
            f"{event.backend} {event.device} in {event.dtype}"
        )
        trained = event.max_iters * event.tokens_per_step
        epochs = trained / max(1, event.train_tokens)
        self.console.print(
            f"{escape(event.data)}: {human_count(event.train_tokens)} tokens to train on, "
            f"{human_count(event.val_tokens)} held out, vocabulary {event.vocab_size:,}; "
            f"{event.max_iters:,} steps of {event.tokens_per_step:,} tokens, {epochs:.1f} epochs"
        )
        for name, source in event.sources.items():
            self.console.print(
                f"  {escape(name)}: {human_share(source.share)} of the windows, "
                f"{human_count(source.train_tokens)} tokens to train on, {human_count(source.val_tokens)} held out, "
                f"{trained * source.share / max(1, source.train_tokens):.1f} epochs"
            )
        if self.console.is_terminal:
            self.progress.start()

    def _trained(self, event: Trained) -> None:
        speed, memory = human_count(event.tokens_per_second), human_bytes(event.memory_bytes)
        share, epoch = human_share(event.mfu), "–" if event.epoch is None else f"{event.epoch:.2f}"
        steps_per_second = event.tokens_per_second / self.tokens_per_step
        self.progress.update(
            self.task,
            completed=event.step,
            epoch=epoch,
            loss=f"{event.loss:.3f}",
            speed=speed,
            mfu=share,
            memory=memory,
            steps_per_second=steps_per_second,
        )
        if event.skipped > self.skipped:
            self.skipped = event.skipped
            self.console.print(f"[yellow]step {event.step:,}: not finite and left out, {event.skipped} steps so far[/]")
        if not self.console.is_terminal:
            total = self.progress.tasks[0].total or event.step
            left = human_time((total - event.step) / steps_per_second) if steps_per_second else "–"
            self.console.print(
                f"step {event.step:,}: loss {event.loss:.4f}, epoch {epoch}, {speed} tok/s, MFU {share}, {memory}, "
                f"ETA {left}"
            )


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
    for row in starts(described):
        text = f"{row['when']} UTC at step {row['step']}: {row['backend']} on {row['device']}; {row['versions']}"
        console.print(f"[bold]start[/] {escape(text)}")
    for title, key in (("model", "config"), ("training", "train"), ("data", "data")):
        text = ", ".join(f"{name} {json.dumps(value)}" for name, value in described[key].items())
        console.print(f"\n[bold]{title}[/] {escape(text)}")


def print_sources(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    """Two lines a named source, from its row as named.describe() gives it."""
    for row in rows:
        files, here = row["files"], sum(file["downloaded"] for file in row["files"])
        shards = f"{row['default']} of {len(files)} shards, unless {row['name']}@SHARDS" if row["default"] else ""
        state = f"{here} of {len(files)} files here" if 0 < here < len(files) else "downloaded" if here else ""
        state = state if files else "comes with Python"
        size = human_bytes(row["size"]) if row["size"] else "–"
        facts = [f"[bold]{row['name']:11}[/]  {size:>7}  {row['licence']:16}", shards, state and f"[green]{state}[/]"]
        console.print("  ".join(filter(None, facts)), soft_wrap=True)
        pin = row["revision"] or f"SHA-256 {files[0]['sha256']}"
        console.print(f"{'':13}[dim]{row['address']}, {pin}[/]", soft_wrap=True)


def _warning(event: MemoryPlanned | SaveFailed | ReporterFailed) -> str:
    if isinstance(event, ReporterFailed):
        return f"{event.reporter} failed and reports no more of this run, which goes on: {event.error}"
    return f"step {event.step:,}: {event.message}" if isinstance(event, SaveFailed) else event.message
