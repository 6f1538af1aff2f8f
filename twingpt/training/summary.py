"""What a run says of itself when it starts, and the summary that `fit` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from twingpt.backends import host
from twingpt.backends.fused import head_note
from twingpt.core.parameters import parameter_count
from twingpt.data.mixture import Mixture, parts
from twingpt.runs.events import (
    Baseline,
    DataNoted,
    DeviceNoted,
    Event,
    MachineNoted,
    MemoryPlanned,
    MixedSource,
    RunStarted,
    SetAside,
    SettingReplaced,
)
from twingpt.runs.folder import checkpoint_folder
from twingpt.runs.units import human_bytes
from twingpt.training.flops import mfu
from twingpt.training.meter import Meter
from twingpt.training.state import RunState, finite


def start_events(state: RunState) -> Iterator[Event]:
    """The events that a start of a run begins with: RunStarted, what is not as it was, and a known baseline."""
    step, manifest = state.progress.step, state.data.manifest
    yield RunStarted(
        step=step,
        max_iters=state.train.max_iters,
        run=str(state.folder),
        backend=state.backend.NAME,
        device=state.device.name,
        dtype=state.train.dtype,
        parameters=parameter_count(state.config),
        tokens_per_step=state.tokens_per_step,
        data=manifest["name"],
        train_tokens=manifest["splits"]["train"]["tokens"],
        val_tokens=manifest["splits"]["val"]["tokens"],
        vocab_size=state.config.vocab_size,
        sources=_mixed_sources(state),
        dtype_why=host.dtype_reason(state.device) if state.train.dtype == state.device.default_dtype else "",
    )
    for part in parts(state.data) if step == 0 else ():
        yield from (DataNoted(step, f"{part.name}: {note}") for note in part.data.manifest.get("notes", ()))
    if step == 0 and (note := head_note(state.config, state.device)):
        yield DeviceNoted(step, note)
    for message in state.replaced:
        yield SettingReplaced(step, message)
    if state.set_aside:
        yield SetAside(step, str(state.set_aside))
    for note in state.notes:
        yield MemoryPlanned(step, note)
    if state.wired_bytes:
        wired = f"Up to {human_bytes(state.wired_bytes)} stay wired until the run ends"
        yield MachineNoted(step, f"{wired}: if macOS panics, leave out --wired-limit.")
    if state.baseline:
        yield dataclasses.replace(state.baseline, step=step)


def summarise(state: RunState, meter: Meter, baseline: Baseline | None, reason: str, seconds: float) -> dict[str, Any]:
    """A run that ended for `reason` after `seconds` of this start, as plain JSON values: what --json prints."""
    progress, speed = meter.progress, meter.tokens_per_second
    return {
        "run": str(state.folder),
        "checkpoint": str(checkpoint_folder(state.folder, progress.step)),
        "backend": state.backend.NAME,
        "device": state.device.name,
        "dtype": state.train.dtype,
        "step": progress.step,
        "max_iters": state.train.max_iters,
        "reason": reason,
        "train_loss": finite(progress.train_loss),
        "val_loss": finite(progress.val_loss),
        "val_bpb": finite(progress.val_bpb),
        "best_val_loss": finite(progress.best_val_loss),
        "baseline": baseline and {key: getattr(baseline, key) for key in ("n", "val_loss", "bits_per_byte")},
        "tokens_per_second": speed,
        "mfu": mfu(speed, state.config, state.peak) if speed else None,
        "peak_memory_bytes": state.engine.memory().peak,
        "peak_cached_memory_bytes": meter.peak_cached,
        "skipped": progress.skipped,
        "epoch": state.epoch(progress.step),
        "sources": _source_summaries(state, meter),
        "seconds": seconds,
    }


def _mixed_sources(state: RunState) -> dict[str, MixedSource]:
    """Share and tokens of each source of a mixture, by name; empty for one data set."""
    if not isinstance(state.data, Mixture):
        return {}
    found = {}
    for part in state.data.parts:
        splits = part.data.manifest["splits"]
        found[part.name] = MixedSource(part.share, splits["train"]["tokens"], splits["val"]["tokens"])
    return found


def _source_summaries(state: RunState, meter: Meter) -> dict[str, dict[str, float]]:
    """Share, epochs and held-out loss of each source of a mixture, by name."""
    epochs, losses = state.source_epochs(meter.progress.step), meter.progress.sources
    return {
        name: {"share": source.share, "epoch": epochs[name], **losses.get(name, {})}
        for name, source in _mixed_sources(state).items()
    }
