"""Loss curves by Matplotlib: loss.svg in a run's folder, and several runs' curves over one another."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twingpt.core.config import unknown_choice
from twingpt.core.errors import UserError
from twingpt.core.paths import write_atomically
from twingpt.core.reading import read_json
from twingpt.runs.events import Event, RunEnded, last_baseline, points, read_events
from twingpt.runs.folder import owner

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"step": "step", "tokens": "tokens", "time": "seconds of training"}
# What --y may be: the field of an evaluation, that of a baseline, and the axis.
LOSSES = {
    "loss": ("val_loss", "val_loss", "loss, nats per token"),
    "bpb": ("val_bpb", "bits_per_byte", "bits per byte"),
}
SUFFIXES = (".svg", ".png", ".pdf")
LINES = ("-", "--", ":", "-.")  # when the ten colours are used up


class PlotReporter:
    """Draws loss.svg from metrics.jsonl when the run ends, so that a resumed run's whole curve is there."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def report(self, event: Event) -> None:
        """Draw when the run ends."""
        if isinstance(event, RunEnded):
            plot_loss(self.run / "metrics.jsonl", self.run / "loss.svg", self.run.name)


def plot_loss(metrics: Path, path: Path, title: str) -> None:
    """Plot training and held-out loss of a metrics.jsonl to `path`, in the format of its ending."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    events = list(read_events(metrics))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    training = points(events, "trained", "loss")
    axes.plot(*_columns(training), color="#4c78a8", lw=1, marker=_marker(training, 1), ms=4, label="training")
    held_out = points(events, "evaluated", "val_loss")
    bits = points(events, "evaluated", "val_bpb")
    label = None
    if held_out and bits:
        best, bpb = (min(value for _, value in curve) for curve in (held_out, bits))
        label = f"held out, best {best:.3f} ({bpb:.3f} bits per byte)"
    axes.plot(*_columns(held_out), color="#e45756", marker="o", ms=4, label=label)
    if known := last_baseline(events):
        label = f"{known.n}-gram, {known.val_loss:.3f} ({known.bits_per_byte:.3f} bits per byte)"
        axes.axhline(known.val_loss, color="#777777", ls="--", lw=1, label=label)
    _whole_ticks(axes)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.set_title(title, parse_math=False)  # a name may hold a $
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, path)


def _marker(curve: Sequence[object], most: int) -> str | None:
    """A dot for each point of a curve of at most so many; a single point has no line to be seen by."""
    return "o" if len(curve) <= most else None


def _whole_ticks(axes: Axes) -> None:
    """Label no fractions of a step, token or second."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _columns(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


@dataclass(frozen=True)
class Curves:
    """Runs' curves over `x`, a key of AXES, in `y`, of LOSSES; `converted` where that was chosen for its tokenizers.

    Each run has its label, folder, and curves "train" and "val", each {"x": […], "y": […]}; in bits per byte training
    has none, since its bytes are not counted. "baseline" has the n of the best n-gram on its data and its val_loss or
    bits_per_byte, or is None.
    """

    x: str
    y: str
    converted: bool
    runs: list[dict[str, Any]]


def read_curves(names: Sequence[str], x: str = "step", y: str | None = None) -> Curves:
    """The curves of runs; without `y` in nats per token, or in bits per byte where their tokenizers differ.

    Runs given twice count once, and runs of one name are labelled with their paths. A run without losses has empty
    curves; UserError where none has any.
    """
    if x not in AXES:
        raise unknown_choice("--x", x, AXES)
    if y is not None and y not in LOSSES:
        raise unknown_choice("--y", y, LOSSES)
    folders = {folder.resolve(): folder for folder in map(owner, names)}
    converted = y is None and len(set(map(_tokenizer, folders)) - {None}) > 1
    y = y or ("bpb" if converted else "loss")
    count = Counter(resolved.name for resolved in folders)
    runs = []
    for resolved, folder in folders.items():
        events = list(read_events(folder / "metrics.jsonl"))
        run: dict[str, Any] = {"label": resolved.name if count[resolved.name] == 1 else str(folder), "run": str(folder)}
        trained = points(events, "trained", "loss", x) if y == "loss" else []
        run["train"] = dict(zip("xy", _columns(trained), strict=True))
        run["val"] = dict(zip("xy", _columns(points(events, "evaluated", LOSSES[y][0], x)), strict=True))
        known = last_baseline(events)
        run["baseline"] = known and {key: getattr(known, key) for key in ("n", LOSSES[y][1])}
        runs.append(run)
    if not any(run["train"]["x"] or run["val"]["x"] for run in runs):
        what = "has no losses" if len(runs) == 1 else "have no losses"
        over = "" if x == "step" else f" over {x}: try --x step"
        held_out = " in bits per byte: try --y loss" if y == "bpb" and not over else ""
        raise UserError(f"{', '.join(run['run'] for run in runs)} {what} to plot yet{over}{held_out}.")
    return Curves(x, y, converted, runs)


def _tokenizer(run: Path) -> str | None:
    """What tells a run's tokenizer from others; None where nothing does.

    It is the digest in run.json, of an older version's run in its data, and where those are gone kind and size.
    """
    try:
        described = read_json(run / "run.json")
        data, train = described["data"], described["train"]
        if "tokenizer" in data:
            return str(data["tokenizer"])
        manifest = Path(data["folder"] if isinstance(data["folder"], str) else data["folder"][0]) / "manifest.json"
        if manifest.is_file():
            return str(read_json(manifest)["tokenizer"])
        return f"{train['tokenizer']} {train['vocab_size']}"
    except (UserError, KeyError, TypeError, IndexError, ValueError, OSError):
        return None


def check_picture(path: Path) -> None:
    """Raise UserError unless the path ends as one of SUFFIXES."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")


def plot_curves(curves: Curves, path: Path) -> None:
    """Plot training loss thin and pale, held-out loss over it, a colour a run; and dashed the runs' baselines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    drawn = [run for run in curves.runs if run["train"]["x"] or run["val"]["x"]]
    for i, run in enumerate(drawn):
        color, line = f"C{i % 10}", LINES[i // 10 % len(LINES)]
        training, held_out = run["train"], run["val"]
        pale: dict[str, Any] = {"color": color, "ls": line, "lw": 0.9, "alpha": 0.45}
        axes.plot(training["x"], training["y"], **pale, marker=_marker(training["x"], 1), ms=3.5)
        marker = _marker(held_out["x"], 50)
        axes.plot(held_out["x"], held_out["y"], color=color, ls=line, lw=1.8, marker=marker, ms=3.5)
        axes.plot([], [], color=color, ls=line, lw=1.8, label=_label(run))
    _draw_baselines(axes, drawn, curves.y)
    _whole_ticks(axes)
    axes.set(xlabel=AXES[curves.x], ylabel=LOSSES[curves.y][2])
    axes.set_title("held-out loss" + (", and training loss (thin)" if curves.y == "loss" else ""), fontsize=10)
    axes.grid(alpha=0.3)
    for text in axes.legend(fontsize=9, title="best held-out loss", title_fontsize=9).get_texts():
        text.set_parse_math(False)  # a name may hold a $
    _write(figure, path)


def _draw_baselines(axes: Axes, drawn: Sequence[dict[str, Any]], y: str) -> None:
    """A dashed line for each baseline: grey where all have the same, else in a run's colour, with the runs' names."""
    levels: dict[tuple[float, int], list[int]] = {}
    for i, run in enumerate(drawn):
        if known := run["baseline"]:
            levels.setdefault((known[LOSSES[y][1]], known["n"]), []).append(i)
    for (level, n), indices in sorted(levels.items()):
        alone = len(levels) == 1
        names = "" if alone else " of " + ", ".join(drawn[i]["label"] for i in indices)
        color = "#777777" if alone else f"C{indices[0] % 10}"
        axes.axhline(level, color=color, ls=(0, (6, 4)), lw=1, label=f"{level:.4f}  {n}-gram{names}")


def _label(run: dict[str, Any]) -> str:
    """Legend entry; the figure comes first: Matplotlib leaves a label that begins with _ out of the legend."""
    held_out = run["val"]["y"]
    return f"{f'{min(held_out):.4f}' if held_out else '–'}  {run['label']}"


def _write(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in a script that the font lacks
        figure.savefig(content, format=path.suffix.removeprefix(".").lower())
    write_atomically(path, content.getvalue())
