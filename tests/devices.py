"""A table of what passed on which device, in Markdown, from a report that `pytest --junitxml=FILE` wrote.

python tests/devices.py FILE >> "$GITHUB_STEP_SUMMARY"
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter

# The ids that tests/conftest.py gives to devices; twins-cpu is both backends on the CPU.
PLACE = re.compile(r"[\[-](twins-cpu|(?:mlx|torch)-(?:cpu|gpu|mps|cuda|xpu)(?::\d+)?)(?=[\]-])")
OUTCOMES = ("passed", "failed", "skipped")


def counts(root: ElementTree.Element) -> tuple[dict[str, Counter[str]], dict[str, set[str]]]:
    """How many tests passed, failed and were skipped on each device, and why those were."""
    found: dict[str, Counter[str]] = {}
    reasons: dict[str, set[str]] = {}
    for case in root.iter("testcase"):
        place = PLACE.search(case.get("name", ""))
        where = place[1] if place else "no device of its own"
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        found.setdefault(where, Counter())["failed" if failed else "passed" if skipped is None else "skipped"] += 1
        if skipped is not None and place:
            reasons.setdefault(where, set()).add(skipped.get("message", ""))
    return found, reasons


def table(root: ElementTree.Element) -> str:
    """The Markdown."""
    found, reasons = counts(root)
    lines = [f"| device | {' | '.join(OUTCOMES)} |", "| --- | --: | --: | --: |"]
    for where, counted in sorted(found.items()):
        lines.append(f"| {where} | {' | '.join(str(counted[outcome]) for outcome in OUTCOMES)} |")
    lines += [f"\n{where} skipped: {'; '.join(sorted(why))}" for where, why in sorted(reasons.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(ElementTree.parse(sys.argv[1]).getroot()) + "\n")
