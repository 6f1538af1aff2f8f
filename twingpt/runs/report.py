"""report.html: a run on one page that needs nothing else, drawn from metrics.jsonl and run.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from twingpt.core.errors import UserError
from twingpt.core.paths import write_atomically
from twingpt.core.reading import read_json
from twingpt.core.units import human_bytes, human_count, human_share, human_time
from twingpt.runs.events import Event, RunEnded, Saved, last_baseline, points, read_events, tokens_per_step
from twingpt.runs.inventory import starts

Points = Sequence[tuple[float, float]]
Events = Sequence[dict[str, Any]]

MOST_POINTS = 400  # of a curve: more can't be told apart at its width
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
    sections = [
        _head(name, described, events),
        _tiles(events),
        _charts(events),
        _sources(events),
        _samples(events),
        _section("Configuration", _configuration(described)),
        _section("Starts", _starts(described)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} – TwinGPT</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _of(events: Events, kind: str) -> Events:
    return [event for event in events if event["event"] == kind]


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# Head and figures -------------------------------------------------------------------------------------------


def _head(name: str, described: Mapping[str, Any], events: Events) -> str:
    started, ended = _of(events, "run_started"), _of(events, "run_ended")
    state = str(ended[-1].get("reason")) if ended and events[-1] is ended[-1] else "under way"
    first = started[-1] if started else {}
    parts = [f"{_count(first['parameters'])} parameters"] if "parameters" in first else []
    parts += [f"{first[key]}" for key in ("data", "backend", "device", "dtype") if key in first]
    parts += [row["when"][:10] for row in starts(described)[:1]]
    line = " · ".join(escape(part) for part in parts if part)
    return f'<header><h1>{escape(name)} <span class="state">{escape(state)}</span></h1><p>{line}</p></header>'


def _count(value: object) -> str:
    return human_count(value) if isinstance(value, (int, float)) else str(value)


def _tiles(events: Events) -> str:
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
        figures.append(("Memory", human_bytes(max(peaks)), "at its peak"))
    times = [value for kind in ("trained", "evaluated", "run_ended") for _, value in points(events, kind, "seconds")]
    if times:
        figures.append(("Time", human_time(max(times)), "over all starts"))
    cells = [f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in figures]
    return f'<dl class="tiles">{"".join(cells)}</dl>' if cells else "<p>No step has been reported yet.</p>"


# Curves -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A line of a chart; `kind` is its class in the style sheet, and `dots` marks each point."""

    label: str
    kind: str
    points: Points
    dots: bool = False


def _charts(events: Events) -> str:
    losses = [
        Curve("training", "train", points(events, "trained", "loss")),
        Curve("held out", "val", points(events, "evaluated", "val_loss"), dots=True),
    ]
    if (known := last_baseline(events)) and (reported := [x for curve in losses for x, _ in curve.points]):
        level = [(0.0, known.val_loss), (max(reported), known.val_loss)]
        losses.append(Curve(f"{known.n}-gram baseline, {known.val_loss:.3f}", "base", level))
    charts = [_chart("Loss, nats per token", losses, 960, 340, "{:.4g}".format)]
    for title, field, show in (
        ("Learning rate", "learning_rate", "{:.3g}".format),
        ("Gradient norm", "grad_norm", "{:.3g}".format),
        ("Tokens per second", "tokens_per_second", human_count),
    ):
        charts.append(_chart(title, [Curve("", "train", points(events, "trained", field))], 310, 200, show))
    if not any(charts):
        return ""
    return f'<section><h2>Curves</h2>{charts[0]}<div class="row">{"".join(charts[1:])}</div></section>'


def _sources(events: Events) -> str:
    """Of a mixture: the held-out loss of each source over the steps, and a row each of what is known last."""
    started = [_dict(event.get("sources")) for event in _of(events, "run_started")]
    if not started or not started[-1]:
        return ""
    curves, rows = [], []
    for i, (name, facts) in enumerate(started[-1].items()):
        own = [{**event, **_dict(_dict(event.get("sources")).get(name, NOTHING))} for event in _of(events, "evaluated")]
        losses, bits = points(own, "evaluated", "val_loss"), points(own, "evaluated", "val_bpb")
        trained = [{**event, "epoch": _dict(event.get("epochs")).get(name)} for event in _of(events, "trained")]
        cells = [
            human_share(_dict(facts).get("share")),
            _count(_dict(facts).get("train_tokens")),
            *(
                _last(curve, digits)
                for curve, digits in ((points(trained, "trained", "epoch"), 2), (losses, 4), (bits, 3))
            ),
        ]
        curves.append(Curve(name, f"source{i % SOURCE_COLOURS}", losses, dots=True))
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = ("Source", "Share", "Tokens", "Epochs", "Held-out loss", "Bits per byte")
    head = "".join(f"<th>{name}</th>" for name in names)
    chart = _chart("Held-out loss, nats per token", curves, 960, 260, "{:.4g}".format)
    return _section("Sources", f'{chart}<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>')


def _last(curve: Points, digits: int) -> str:
    return f"{curve[-1][1]:.{digits}f}" if curve else "–"


def _chart(title: str, curves: Sequence[Curve], width: int, height: int, show: Callable[[float], str]) -> str:
    """An SVG line chart over steps, coloured by the page's style; empty without points."""
    curves = [Curve(curve.label, curve.kind, _thin(curve.points), curve.dots) for curve in curves if curve.points]
    everything = [point for curve in curves for point in curve.points]
    if not everything:
        return ""
    left, right, top, bottom = 52, 18, 12, 26
    xs, ys = _axis([x for x, _ in everything], width // 90), _axis([y for _, y in everything], height // 55)
    low, high = min(0.0, min(x for x, _ in everything)), max(x for x, _ in everything) or 1.0

    def across(x: float) -> float:
        return left + (x - low) / ((high - low) or 1.0) * (width - left - right)

    def up(y: float) -> float:
        return height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - top - bottom)

    parts = []
    for y in ys:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text class="y" x="{left - 7}" y="{up(y) + 4:.1f}">{escape(show(y))}</text>')
    for x in xs:
        if low <= x <= high:
            parts.append(f'<text class="x" x="{across(x):.1f}" y="{height - 7}">{escape(human_count(x))}</text>')
    for curve in curves:
        line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve.points)
        parts.append(f'<polyline class="{curve.kind}" points="{line}"/>')
        if curve.dots or len(curve.points) == 1:
            parts += [
                f'<circle class="{curve.kind}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5">'
                f"<title>step {x:,.0f}: {escape(f'{y:.4f}')}</title></circle>"
                for x, y in curve.points
            ]
    keys = "".join(f'<span class="key {curve.kind}">{escape(curve.label)}</span>' for curve in curves if curve.label)
    return (
        f'<figure><figcaption>{escape(title)}{keys}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)} over steps">{"".join(parts)}</svg></figure>'
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


# Samples, configuration, starts -----------------------------------------------------------------------------


def _samples(events: Events) -> str:
    """Every sample, the newest first and open; of one that a resumed run repeated, the last."""
    texts = {event["step"]: str(event.get("text", "")) for event in _of(events, "sampled")}
    parts: list[str] = []
    for step, text in sorted(texts.items(), reverse=True):
        opened = "" if parts else " open"
        parts.append(f"<details{opened}><summary>After {step:,} steps</summary><pre>{escape(text)}</pre></details>")
    return _section("Samples", "".join(parts))


def _configuration(described: Mapping[str, Any]) -> str:
    tables = (("Model", "config"), ("Training", "train"), ("Data", "data"))
    found = [_table(title, _dict(described.get(key))) for title, key in tables if _dict(described.get(key))]
    return f'<div class="columns">{"".join(found)}</div>' if found else ""


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{_value(value)}</td></tr>" for key, value in values.items())
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return escape(text) if text not in ("null", "[]") else '<span class="none">none</span>'


def _starts(described: Mapping[str, Any]) -> str:
    """A row for each start: when and where it ran."""
    rows = [[escape(cell) for cell in row.values()] for row in starts(described)]
    titles = "".join(
        f"<th>{title}</th>" for title in ("When (UTC)", "Step", "Backend", "Device", "Versions", "Platform")
    )
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{titles}</tr>{body}</table></div>' if rows else ""


STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1d2126; --soft: #646b74; --line: #e3e5e8;
  --train: #3b76af; --val: #cf4a4c; --base: #7a828c;
  --source0: #3b76af; --source1: #c2701c; --source2: #2f8f5b; --source3: #8a5bb5; --source4: #b3475f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --card: #1d2127; --text: #e4e7eb; --soft: #98a1ac; --line: #30363e;
    --train: #74aee6; --val: #f28482; --base: #98a1ac;
    --source0: #74aee6; --source1: #f0a35e; --source2: #6cc797; --source3: #bd97e3; --source4: #ee8fa4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem;
  background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .8rem; }
header p { margin: .3rem 0 1.5rem; color: var(--soft); }
.state {
  font-size: .8rem; font-weight: 500; color: var(--soft); border: 1px solid var(--line);
  border-radius: 1rem; padding: .15rem .6rem; vertical-align: middle; white-space: nowrap;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .7rem; margin: 0; }
.tiles div, figure, details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tiles div { padding: .7rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
dd small {
  display: block; color: var(--soft); font-size: .72rem; font-weight: 400; line-height: 1.3; white-space: normal;
}
figure { margin: 0 0 .7rem; padding: .7rem .8rem .3rem; overflow-x: auto; }
section > figure svg { min-width: 36rem; }
figcaption { font-size: .85rem; font-weight: 600; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .7rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
text.y { text-anchor: end; }
text.x { text-anchor: middle; }
.grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
polyline.train { stroke: var(--train); }
polyline.val { stroke: var(--val); }
polyline.base { stroke: var(--base); stroke-dasharray: 6 5; }
circle.train { fill: var(--train); }
circle.val { fill: var(--val); }
.key { margin-left: 1rem; font-weight: 400; color: var(--soft); }
.key::before {
  content: ""; display: inline-block; width: .9rem; height: 3px; border-radius: 2px;
  margin-right: .35rem; vertical-align: middle;
}
.key.train::before { background: var(--train); }
.key.val::before { background: var(--val); }
.source0 { --own: var(--source0); }
.source1 { --own: var(--source1); }
.source2 { --own: var(--source2); }
.source3 { --own: var(--source3); }
.source4 { --own: var(--source4); }
polyline[class^="source"] { stroke: var(--own); }
circle[class^="source"] { fill: var(--own); }
.key[class*="source"]::before { background: var(--own); }
.key.base::before { background: repeating-linear-gradient(90deg, var(--base) 0 4px, transparent 4px 7px); }
details { margin-bottom: .5rem; padding: .5rem .8rem; }
summary { cursor: pointer; font-size: .85rem; font-weight: 600; }
pre {
  margin: .6rem 0 .2rem; font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
}
table { border-collapse: collapse; width: 100%; font-size: .82rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-top: 1px solid var(--line); vertical-align: top; }
th { font-weight: 400; color: var(--soft); }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.columns {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.5rem; align-items: start;
}
.wide { overflow-x: auto; }
.none { color: var(--soft); }
"""
