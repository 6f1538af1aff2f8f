"""report.html: a run on one page that needs nothing else, drawn from metrics.jsonl and run.json.

What the page holds is computed here, as plain data; how it looks is in templates/, for Jinja2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twingpt.core.errors import UserError
from twingpt.core.paths import write_atomically
from twingpt.core.reading import read_json
from twingpt.runs.events import Event, RunEnded, Saved, last_baseline, points, read_events, tokens_per_step
from twingpt.runs.inventory import starts
from twingpt.runs.units import human_bytes, human_count, human_share, human_time

if TYPE_CHECKING:
    from jinja2 import Template

Points = Sequence[tuple[float, float]]
Events = Sequence[dict[str, Any]]

MOST_POINTS = 400  # of a curve: more can't be told apart at its width
TABLES = {"Model": "config", "Training": "train", "Data": "data"}  # of run.json
NOTHING = {"val_loss": None, "val_bpb": None}
SOURCE_COLOURS = 5  # in the style sheet: from the sixth source on they come again


class HTMLReporter:
    """Writes report.html at every checkpoint and when the run ends."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def report(self, event: Event) -> None:
        """Write the page where the event asks for it."""
        if isinstance(event, (Saved, RunEnded)):
            write_report(self.run)


def write_report(run: Path) -> None:
    """Write report.html of a run from its metrics.jsonl and run.json; what they lack is left out."""
    try:
        described = read_json(run / "run.json")
    except UserError:
        described = {}
    described = described if isinstance(described, dict) else {}
    page = render(run.resolve().name, described, list(read_events(run / "metrics.jsonl")))
    write_atomically(run / "report.html", page.encode("utf-8", "replace"))  # a name may hold any byte


def render(name: str, described: Mapping[str, Any], events: Events) -> str:
    """The page for a run called `name`, of its run.json and its events."""
    return _template().render(content=content(name, described, events))


@cache
def _template() -> Template:
    from jinja2 import Environment, FunctionLoader, StrictUndefined  # not before a page is written: it takes a while

    folder = resources.files("twingpt.runs") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja")


@dataclass(frozen=True)
class Content:
    """What the page of a run shows; what is empty or None is left out of it."""

    name: str
    state: str
    facts: list[str]
    figures: list[tuple[str, str, str]]  # label, value, and a note below it
    loss: Chart | None
    rates: list[Chart]  # of the learning rate, the gradient norm and the speed
    source_losses: Chart | None
    sources: list[list[str]]
    samples: list[tuple[int, str]]  # step and text, the newest first
    tables: dict[str, dict[str, str | None]]
    starts: list[dict[str, str]]


def content(name: str, described: Mapping[str, Any], events: Events) -> Content:
    """Compute what the page shows of a run called `name`, from its run.json and its events."""
    ended = _of(events, "run_ended")
    curves, rows = _sources(events)
    # Of a sample that a resumed run repeated, the last.
    samples = {event["step"]: str(event.get("text", "")) for event in _of(events, "sampled")}
    return Content(
        name=name,
        state=str(ended[-1].get("reason")) if ended and events[-1] is ended[-1] else "under way",
        facts=_facts(described, events),
        figures=_figures(events),
        loss=_chart("Loss, nats per token", _losses(events), 960, 340, "{:.4g}".format),
        rates=_rates(events),
        source_losses=_chart("Held-out loss, nats per token", curves, 960, 260, "{:.4g}".format),
        sources=rows,
        samples=sorted(samples.items(), reverse=True),
        tables=_tables(described),
        starts=starts(described),
    )


def _of(events: Events, kind: str) -> Events:
    return [event for event in events if event["event"] == kind]


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> str:
    return human_count(value) if isinstance(value, (int, float)) else str(value)


def _facts(described: Mapping[str, Any], events: Events) -> list[str]:
    """The line below the name: size, data and place of the last start, and the day of the first."""
    started = _of(events, "run_started")
    last = started[-1] if started else {}
    facts = [f"{_count(last['parameters'])} parameters"] if "parameters" in last else []
    facts += [f"{last[key]}" for key in ("data", "backend", "device", "dtype") if key in last]
    facts += [row["when"][:10] for row in starts(described)[:1]]
    return [fact for fact in facts if fact]


def _figures(events: Events) -> list[tuple[str, str, str]]:
    """The headline figures, each that the events can give."""
    figures: list[tuple[str, str, str]] = []
    held_out = points(events, "evaluated", "val_loss")
    if held_out:
        step, loss = min(held_out, key=lambda point: point[1])
        figures.append(("Held-out loss", f"{loss:.4f}", f"nats per token, best at step {step:,}"))
    if bits := [value for _, value in points(events, "evaluated", "val_bpb")]:
        known = last_baseline(events)
        beside = f"best; a {known.n}-gram {known.bits_per_byte:.3f}" if known else "of held-out text, best"
        figures.append(("Bits per byte", f"{min(bits):.3f}", beside))
    if events:
        total = next((event.get("max_iters") for event in reversed(_of(events, "run_started"))), None)
        last = max(event["step"] for event in events)
        figures.append(("Steps", f"{last:,}", f"of {total:,}" if isinstance(total, int) else ""))
        if each := tokens_per_step(events):
            passes = points(events, "trained", "epoch")
            epochs = f", {passes[-1][1]:.2f} epochs" if passes else ""
            figures.append(("Tokens", human_count(last * each), f"{each:,} a step{epochs}"))
    if speeds := sorted(value for _, value in points(events, "trained", "tokens_per_second")):
        figures.append(("Speed", human_count(speeds[len(speeds) // 2]), "tokens a second, median"))
    if peaks := [value for _, value in points(events, "trained", "peak_memory_bytes")]:
        caches = [value for _, value in points(events, "trained", "cached_memory_bytes")]
        beside = f", and up to {human_bytes(max(caches))} of cache" if caches else ""
        figures.append(("Memory", human_bytes(max(peaks)), f"at its peak{beside}"))
    times = [value for kind in ("trained", "evaluated", "run_ended") for _, value in points(events, kind, "seconds")]
    if times:
        figures.append(("Time", human_time(max(times)), "over all starts"))
    return figures


def _tables(described: Mapping[str, Any]) -> dict[str, dict[str, str | None]]:
    """The configuration as text by table and key; None for what is not set."""
    found = {title: _dict(described.get(key)) for title, key in TABLES.items()}
    return {title: {str(key): _value(value) for key, value in rows.items()} for title, rows in found.items() if rows}


def _value(value: object) -> str | None:
    text = value if isinstance(value, str) else json.dumps(value)
    return None if text in ("null", "[]") else text


# Curves -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Values over steps; `kind` is their class in the style sheet, and `dots` marks each point."""

    label: str
    kind: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Line:
    """A curve in its chart's coordinates: an SVG polyline's `points`, and x, y and title of each dot."""

    label: str
    kind: str
    points: str
    dots: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """A line chart in the coordinates of its SVG, whose units are pixels at its full width."""

    title: str
    width: int
    height: int
    left: int  # of the plotted area
    right: int
    rows: list[tuple[float, str]]  # y and label of each horizontal line
    columns: list[tuple[float, str]]  # x and label
    lines: list[Line]


def _losses(events: Events) -> list[Curve]:
    losses = [
        Curve("training", "train", points(events, "trained", "loss")),
        Curve("held out", "val", points(events, "evaluated", "val_loss"), dots=True),
    ]
    if (known := last_baseline(events)) and (reported := [x for curve in losses for x, _ in curve.points]):
        level = [(0.0, known.val_loss), (max(reported), known.val_loss)]
        losses.append(Curve(f"{known.n}-gram baseline, {known.val_loss:.3f}", "base", level))
    return losses


def _rates(events: Events) -> list[Chart]:
    charts = [
        _chart(title, [Curve("", "train", points(events, "trained", field))], 310, 200, show)
        for title, field, show in (
            ("Learning rate", "learning_rate", "{:.3g}".format),
            ("Gradient norm", "grad_norm", "{:.3g}".format),
            ("Tokens per second", "tokens_per_second", human_count),
        )
    ]
    return [chart for chart in charts if chart]


def _sources(events: Events) -> tuple[list[Curve], list[list[str]]]:
    """Of a mixture: the held-out loss of each source over the steps, and a row each of what is known last."""
    started = [_dict(event.get("sources")) for event in _of(events, "run_started")]
    curves, rows = [], []
    for i, (name, facts) in enumerate(started[-1].items() if started else ()):
        own = [{**event, **_dict(_dict(event.get("sources")).get(name, NOTHING))} for event in _of(events, "evaluated")]
        losses, bits = points(own, "evaluated", "val_loss"), points(own, "evaluated", "val_bpb")
        trained = [{**event, "epoch": _dict(event.get("epochs")).get(name)} for event in _of(events, "trained")]
        epochs = points(trained, "trained", "epoch")
        curves.append(Curve(name, f"source{i % SOURCE_COLOURS}", losses, dots=True))
        known = [human_share(_dict(facts).get("share")), _count(_dict(facts).get("train_tokens"))]
        rows.append([name, *known, _last(epochs, 2), _last(losses, 4), _last(bits, 3)])
    return curves, rows


def _last(curve: Points, digits: int) -> str:
    return f"{curve[-1][1]:.{digits}f}" if curve else "–"


def _chart(title: str, curves: Sequence[Curve], width: int, height: int, show: Callable[[float], str]) -> Chart | None:
    """Lay out curves over steps in a chart of this size, its values written by `show`; None without points."""
    curves = [Curve(curve.label, curve.kind, _thin(curve.points), curve.dots) for curve in curves if curve.points]
    everything = [point for curve in curves for point in curve.points]
    if not everything:
        return None
    left, right, top, bottom = 52, 18, 12, 26
    xs, ys = _axis([x for x, _ in everything], width // 90), _axis([y for _, y in everything], height // 55)
    low, high = min(0.0, min(x for x, _ in everything)), max(x for x, _ in everything) or 1.0

    def across(x: float) -> float:
        return round(left + (x - low) / ((high - low) or 1.0) * (width - left - right), 1)

    def up(y: float) -> float:
        return round(height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - top - bottom), 1)

    def line(curve: Curve) -> Line:
        dotted = curve.points if curve.dots or len(curve.points) == 1 else ()
        dots = [(across(x), up(y), f"step {x:,.0f}: {y:.4f}") for x, y in dotted]
        return Line(curve.label, curve.kind, " ".join(f"{across(x)},{up(y)}" for x, y in curve.points), dots)

    return Chart(
        title,
        width,
        height,
        left,
        width - right,
        rows=[(up(y), show(y)) for y in ys],
        columns=[(across(x), human_count(x)) for x in xs if low <= x <= high],
        lines=[line(curve) for curve in curves],
    )


def _thin(values: Points) -> Points:
    """At most MOST_POINTS points, each the mean of as many neighbours."""
    size = math.ceil(len(values) / MOST_POINTS)
    if size <= 1:
        return values
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _axis(values: Sequence[float], count: int) -> list[float]:
    """About `count` round numbers, evenly spaced, from below the least value to above the largest."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    rough = span / max(1, count)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
