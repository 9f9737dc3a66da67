"""The figures of inference as a table for people and as JSON for programs."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal

HEADINGS: Final = (
    "part",
    "work",
    "without",
    "with respkv",
    "figure",
    "goal",
    "",
    "what without means, and notes",
)
Unit = Literal["x", "%", "ms"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    plain, cached: without the cache and with it, as they are shown; "" where there is no such thing.
    figure:        what the goal is about: so many times, a share of 1, or seconds; None: not measured.
    goal:          what it should be: at least, or at most where ``is_at_most``; None: it is only shown.
    note:          what it was compared with, and what else is to be known.
    plain_samples, cached_samples: seconds of each round.
    """

    part: str
    work: str
    plain: str = ""
    cached: str = ""
    figure: float | None = None
    unit: Unit = "x"
    goal: float | None = None
    is_at_most: bool = False
    note: str = ""
    plain_samples: list[float] = field(default_factory=list[float])
    cached_samples: list[float] = field(default_factory=list[float])

    @property
    def is_met(self) -> bool | None:
        """Whether the goal was reached; None when there is none, or nothing was measured."""
        if self.goal is None or self.figure is None:
            return None
        return self.figure <= self.goal if self.is_at_most else self.figure >= self.goal


def markdown(rows: Iterable[Row], machine: dict[str, str]) -> str:
    """Return a table with one line for each row, and under it what it was measured on."""
    lines = [HEADINGS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [_line(line, widths) for line in lines]
    text.insert(1, _line(["-" * width for width in widths], widths))
    facts = [f"{name} {value}" for name, value in machine.items()]
    return "\n".join([*text, "", "; ".join(facts) + "."]) + "\n"


def write(path: Path, rows: list[Row], machine: dict[str, str]) -> None:
    """Write the rows to ``path`` as JSON, and beside it the table as ``.md``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dicts = [asdict(row) | {"met": row.is_met} for row in rows]
    path.write_text(json.dumps({"machine": machine, "rows": dicts}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(rows, machine))


def show(figure: float, unit: Unit, *, is_at_most: bool) -> str:
    """Show a figure, rounded against us, so that a goal that was missed never looks reached."""
    scale, digits = {"x": (1.0, 2), "%": (100.0, 1), "ms": (1e3, 2)}[unit]
    rounding = math.ceil if is_at_most else math.floor
    # The product of a goal like 0.973 and its scale is a hair off, and is not to be cut by that.
    number = rounding(round(figure * scale * 10**digits, 6)) / 10**digits
    return f"{number:,.{digits}f} {unit}"


def _cells(row: Row) -> tuple[str, ...]:
    figure, goal, met = "", "", ""
    if row.figure is not None:
        figure = show(row.figure, row.unit, is_at_most=row.is_at_most)
    if row.goal is not None:
        # The goal itself is rounded the other way: it never looks easier than it is.
        shown = show(row.goal, row.unit, is_at_most=not row.is_at_most)
        goal = f"{'<=' if row.is_at_most else '>='} {shown}"
        met = {True: "met", False: "MISSED", None: "not measured"}[row.is_met]
    return (row.part, row.work, row.plain, row.cached, figure, goal, met, row.note)


def _line(cells: Iterable[str], widths: list[int]) -> str:
    return "| " + " | ".join(map(str.ljust, cells, widths)) + " |"
