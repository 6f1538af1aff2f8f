"""Training progress on the terminal: a line an event, and a bar with loss, speed, memory and ETA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from twingpt.runs.events import (
    Baseline,
    DataNoted,
    DeviceNoted,
    Evaluated,
    Event,
    MachineNoted,
    MemoryPlanned,
    ReporterFailed,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    SaveFailed,
    SetAside,
    SettingReplaced,
    Trained,
)
from twingpt.runs.units import beginning, human_bytes, human_count, human_share, human_time

# What is told as a sentence.
Noted = DataNoted | DeviceNoted | MemoryPlanned | SettingReplaced | SetAside | SaveFailed | ReporterFailed

SAMPLE_LINES = 12  # of a sample on a terminal, blank ones left out; metrics.jsonl has all of it


LEFT_OUT = ("mfu", "memory", "epoch", "speed", "bar", "val", "loss", "step")  # of a line that is too long, in order
BAR = 6  # columns that the bar has at least


class _ProgressLine(ProgressColumn):
    """The line of progress, as wide as the terminal: what it has no room for is left out, but never the ETA.

    The ETA is the steps left over the run's own speed, which is steadier than the bar's.
    """

    def render(self, task: Task) -> RenderableType:
        fields, speed = task.fields, task.fields["steps_per_second"]
        left = human_time((task.total - task.completed) / speed) if speed and task.total else "–"
        parts = {
            "step": f"[bold]{task.completed:,.0f}[/]/{task.total or 0:,.0f}",
            "epoch": f"epoch {fields['epoch']}",
            "bar": " " * BAR,
            "loss": f"loss [bold green]{fields['loss']}[/]",
            "val": f"val [bold magenta]{fields['val']}[/]",
            "speed": f"{fields['speed']} tok/s",
            "mfu": f"MFU {fields['mfu']}",
            "memory": fields["memory"],
            "eta": f"[cyan]ETA {left}[/]",
        }
        return _FittedLine({name: Text.from_markup(part) for name, part in parts.items()}, task)


class _FittedLine:
    """Parts of a line in as many columns as there are, the bar in what the others leave."""

    def __init__(self, parts: Mapping[str, Text], task: Task) -> None:
        self.parts, self.task = parts, task

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = dict(self.parts)
        for name in LEFT_OUT:
            if sum(part.cell_len + 2 for part in parts.values()) - 2 > options.max_width:
                del parts[name]
        if "bar" in parts:
            others = sum(part.cell_len + 2 for name, part in parts.items() if name != "bar")
            parts["bar"] = self._bar(options.max_width - others, options)
        yield Text("  ").join(parts.values())

    def _bar(self, width: int, options: ConsoleOptions) -> Text:
        done = int(width * min(1.0, self.task.completed / (self.task.total or 1)))
        full, empty = "#-" if options.ascii_only else "━─"
        return Text.assemble((full * done, "bar.complete"), (empty * (width - done), "bar.back"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(options.max_width, options.max_width)


class ConsoleReporter:
    """Prints a run's events; on a terminal with a live bar below them, elsewhere as plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tokens_per_step = 1
        self.closed = False
        self.skipped = 0
        self.baseline = ""
        self.progress = Progress(_ProgressLine(), console=console, expand=True)
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
            self._sampled(event)
        elif isinstance(event, Saved):
            self.console.print(f"[dim]step {event.step:,}: saved {escape(event.checkpoint)}[/]", soft_wrap=True)
        elif isinstance(event, MachineNoted):
            self.console.print(f"[dim]{escape(event.message)}[/]", soft_wrap=True)
        elif isinstance(event, Noted):
            self.console.print(f"[yellow]{escape(_warning(event))}[/]", soft_wrap=True)
        elif isinstance(event, RunEnded):
            self.console.print(f"{event.reason} after {event.step:,} steps in {human_time(event.seconds)}")

    def _sampled(self, event: Sampled) -> None:
        title = f"a sample after {event.step:,} steps"
        if self.console.is_terminal:
            self.console.print(Panel(escape(beginning(event.text, SAMPLE_LINES)), title=title, border_style="dim"))
        else:
            text = beginning(event.text, len(event.text))
            self.console.print(f"{title}:\n{text}", markup=False, soft_wrap=True)

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
        why = f" ({event.dtype_why})" if event.dtype_why else ""
        verb = f"goes on after step {event.step:,}" if event.step else "starts"
        self.console.print(
            f"[bold]{escape(event.run)}[/] {verb}: {human_count(event.parameters)} parameters on "
            f"{event.backend} {event.device} in {event.dtype}{why}",
            soft_wrap=True,
        )
        trained = event.max_iters * event.tokens_per_step
        epochs = trained / max(1, event.train_tokens)
        self.console.print(
            f"{escape(event.data)}: {human_count(event.train_tokens)} tokens to train on, "
            f"{human_count(event.val_tokens)} held out, vocabulary {event.vocab_size:,}; "
            f"{event.max_iters:,} steps of {event.tokens_per_step:,} tokens, {epochs:.1f} epochs",
            soft_wrap=True,
        )
        for name, source in event.sources.items():
            self.console.print(
                f"  {escape(name)}: {human_share(source.share)} of the windows, "
                f"{human_count(source.train_tokens)} tokens to train on, {human_count(source.val_tokens)} held out, "
                f"{trained * source.share / max(1, source.train_tokens):.1f} epochs",
                soft_wrap=True,
            )
        if self.console.is_terminal:
            self.progress.start()

    def _trained(self, event: Trained) -> None:
        speed, memory = human_count(event.tokens_per_second), human_bytes(event.memory_bytes)
        if event.cached_memory_bytes is not None:
            memory += f" + {human_bytes(event.cached_memory_bytes)} cache"
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


def _warning(event: Noted) -> str:
    if isinstance(event, SetAside):
        return f"What lay after step {event.step:,} is set aside as a run of its own: {event.folder}"
    if isinstance(event, ReporterFailed):
        return f"{event.reporter} failed and reports no more of this run, which goes on: {event.error}"
    return f"step {event.step:,}: {event.message}" if isinstance(event, SaveFailed) else event.message
