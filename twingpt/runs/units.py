"""Formatting for people: bytes, counts, rates, percentages and durations; text made safe for a terminal."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Bytes in decimal units: 512 MB, 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit != "GB" else f"{count:.1f} GB"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """A count with k, M, B: 950, 12.3k, 10.7M."""
    for unit in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}B"


def counted(count: int, what: str) -> str:
    """A count of things: 1 document, 12,345 documents."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def human_documents(count: int) -> str:
    """A count of documents: 1 document, 12,345 documents."""
    return counted(count, "document")


def visible(text: str) -> str:
    """The text with control and other unprintable characters escaped, newlines too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def beginning(text: str, lines: int) -> str:
    """The first `lines` lines of a text that are not blank, through `visible`."""
    kept = [line.expandtabs(4) for line in text.splitlines() if line.strip()][:lines]
    return "\n".join(map(visible, kept))


def human_flops(flops_per_second: float) -> str:
    """FLOP/s with G, T, P: 4.57 GFLOP/s, 174 GFLOP/s, 312 TFLOP/s."""
    unit, scale = next(((u, s) for u, s in (("P", 1e15), ("T", 1e12)) if flops_per_second >= s), ("G", 1e9))
    return f"{flops_per_second / scale:.3g} {unit}FLOP/s"


def human_share(share: float | None) -> str:
    """A share of 1 in percent: 41%, 3.2%, n/a."""
    if share is None:
        return "n/a"
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def human_time(seconds: float) -> str:
    """A duration: 42s, 3:05, 2:10:00."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
