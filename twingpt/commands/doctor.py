"""gpt doctor: what this machine has, and a test of it."""

from typing import TYPE_CHECKING, Any

import typer

from twingpt.commands.help import App
from twingpt.commands.options import Backend, Device, Json
from twingpt.commands.output import make_console, print_json

if TYPE_CHECKING:
    from rich.console import Console

app = App()

HIDDEN = ("installed", "working_set_bytes", "limits")  # of a backend's facts: what is shown elsewhere


@app.command(epilog="[bold]Examples[/]\n\ngpt doctor\n\ngpt doctor --json | jq .choice\n")
def doctor(backend: Backend = "auto", device: Device = None, json_: Json = False) -> None:
    """Show what this machine has, what will be chosen and why, and test it; exit 1 if the test fails."""
    from twingpt.checks.doctor import examine

    report = examine(backend, device)
    if json_:
        print_json(report)
    else:
        _print_doctor(make_console(), report)
    if not report["self_test"]["ok"]:
        raise typer.Exit(1)


def _print_doctor(console: "Console", report: dict[str, Any]) -> None:
    console.print(f"[bold]{report['platform']}[/], Python {report['python']}")
    versions = [f"{name} {version}" for name, version in report["libraries"].items() if version]
    console.print(", ".join(versions) + "\n")
    if report["mac"]:
        _print_mac(console, report["mac"])
    for name, facts in report["backends"].items():
        if "version" not in facts:
            console.print(f"{name}: {facts.get('broken') or 'not installed: ' + facts['install']}", markup=False)
            continue
        shown = {key: value for key, value in facts.items() if key not in HIDDEN and value is not None}
        console.print(f"[bold]{name}[/]: {', '.join(f'{key} {value}' for key, value in shown.items())}")
        if "limits" in facts:
            _print_limits(console, facts)
        for device in (device for device in report["devices"] if device["backend"] == name):
            _print_device(console, device)
    choice, test = report["choice"], report["self_test"]
    chosen = (
        f"{choice['backend']} on {choice['device']} in {choice['dtype']}, because" if choice["backend"] else "none:"
    )
    console.print(f"\nChoice: [bold]{chosen}[/] {choice['why']}.")
    if choice["dtype_why"]:
        console.print(f"In {choice['dtype']}, because {choice['dtype_why']}.")
    verdict = "[green]passed[/]" if test["ok"] else "[bold red]failed[/]"
    worst = f", at worst {test['max_rel_diff']:.1e}" if test["max_rel_diff"] is not None else ""
    limit = f"{test['tolerance']:.0e}"
    console.print(f"Self-test: {verdict}. The largest difference may be {limit} of the largest logit{worst}.")
    for entry in test["left_out"]:
        console.print(f"Left out: {entry['backend']} ({entry['device']}): {entry['reason']}", markup=False)
    for failure in test["failed"]:
        console.print(f"Failed: {failure}.", markup=False)


def _print_mac(console: "Console", mac: dict[str, Any]) -> None:
    mlx, metal = mac["mlx"] or "not installed", mac["mlx_metal"] or "not installed"
    wheel = f" ({mac['wheel']}, kernels for macOS {mac['built_for'] or 'unknown'})" if mac["wheel"] else ""
    console.print(f"[bold]macOS {mac['macos']}[/] on {mac['chip']}: mlx {mlx}, mlx-metal {metal}{wheel}")
    for note in mac["notes"]:
        console.print(f"  [yellow]{note}[/]", soft_wrap=True)
    console.print()


def _print_limits(console: "Console", facts: dict[str, Any]) -> None:
    from twingpt.runs.units import human_bytes

    limits = ", ".join(f"{name} {human_bytes(count)}" for name, count in facts["limits"].items())
    console.print(
        f"  working set {human_bytes(facts['working_set_bytes'])}; limits: {limits}. "
        "gpt train holds the cache to what a step frees, and wires what --wired-limit says."
    )


def _print_device(console: "Console", device: dict[str, Any]) -> None:
    from twingpt.runs.units import human_bytes, human_flops

    memory = human_bytes(device["memory_bytes"]) if device["memory_bytes"] else "memory unknown"
    free = human_bytes(device["free_memory_bytes"])
    console.print(f"  [bold]{device['name']}[/]: {device['description']}, {memory}, {free} free")
    for dtype in device["dtypes"]:
        fast = "fast" if dtype in device["fast_dtypes"] else "slow"
        measured, published = device["measured_flops"][dtype], device["documented_flops"][dtype]
        speed = f"{human_flops(measured)} measured" if measured else "can't be measured"
        beside = f", {human_flops(published)} published" if published else ""
        console.print(f"    {dtype:8}  {fast}  matrix products: {speed}{beside}")
