"""The results as a table for people and as JSON for programs."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from bench.result import Result

HEADINGS = ("row", "work", "peer", "respkv", "ratio", "min..max", "target", "")


def markdown(results: Iterable[Result], machine: dict[str, str]) -> str:
    """Return a table with one line for each result, and under it what it was measured on."""
    rows = [HEADINGS, *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, _line(["-" * width for width in widths], widths))
    facts = [f"{name} {value}" for name, value in machine.items()]
    return "\n".join([*lines, "", "; ".join(facts) + "."]) + "\n"


def write(path: Path, results: list[Result], machine: dict[str, str]) -> None:
    """Write the results to ``path`` as JSON, and beside it the table as ``.md``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        asdict(each) | {"met": None if each.target is None else each.is_met} for each in results
    ]
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(results, machine))


def _cells(result: Result) -> tuple[str, ...]:
    target = result.target
    digits = 1 if (result.ratio if target is None else target) >= 10 else 2
    # Rounded against us, so that a target that was missed never looks reached.
    rounding = math.floor if result.at_least else math.ceil
    ratio = rounding(result.ratio * 10**digits) / 10**digits
    return (
        str(result.row),
        result.work,
        result.peer,
        result.ours,
        f"{ratio:.{digits}f}",
        f"{min(result.ratios):.{digits}f}..{max(result.ratios):.{digits}f}",
        "" if target is None else f"{'>=' if result.at_least else '<='} {target:.{digits}f}",
        "" if target is None else "met" if result.is_met else "MISSED",
    )


def _line(cells: Iterable[str], widths: list[int]) -> str:
    return "| " + " | ".join(map(str.ljust, cells, widths)) + " |"
