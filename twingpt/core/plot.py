"""loss.svg: a run's training and held-out loss over its steps."""

from __future__ import annotations

import io
from pathlib import Path

from twingpt.core.events import Event, RunEnded, read_events
from twingpt.core.paths import write_atomically


class PlotReporter:
    """Draws loss.svg from metrics.jsonl when the run ends, so that a resumed run's whole curve is there."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def report(self, event: Event) -> None:
        """Draw when the run ends."""
        if isinstance(event, RunEnded):
            plot_loss(self.run / "metrics.jsonl", self.run / "loss.svg", self.run.name)


def plot_loss(metrics: Path, path: Path, title: str) -> None:
    """Plot the events of `metrics` into an SVG or PNG at `path`."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    events = list(read_events(metrics))
    trained = [event for event in events if event["event"] == "trained"]
    evaluated = [event for event in events if event["event"] == "evaluated"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([e["step"] for e in trained], [e["loss"] for e in trained], color="#4c78a8", lw=1, label="training")
    best = min(evaluated, key=lambda event: event["val_loss"], default=None)
    label = f"held out, best {best['val_loss']:.3f} ({best['val_bpb']:.3f} bits per byte)" if best else None
    steps, losses = [e["step"] for e in evaluated], [e["val_loss"] for e in evaluated]
    axes.plot(steps, losses, color="#e45756", marker="o", ms=4, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.set_title(title, parse_math=False)  # a name may hold a $
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."))
    write_atomically(path, content.getvalue())
