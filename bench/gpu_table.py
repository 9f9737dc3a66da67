"""The figures of a GPU as a table for people and as JSON for programs."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from bench.gpu_clock import Work
from bench.result import duration

HEADINGS: Final = ("part", "work", "time", "GB/s", "against", "ratio", "goal", "", "note")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    gb_s:     what it moved, 10^9 bytes a second; None: nothing that is counted.
    against:  what the ratio is to. ratio: how many times as fast as that, or as many bytes a second,
              or, where ``is_time``, how many times as long it takes. None: there was nothing to compare with.
    goal:     what the ratio should be: at least, or at most where ``is_time``; None: it is only shown.
    note:     what else is to be known; of a goal that was missed, what the kernel is bound by.
    samples, against_samples: seconds of a call, the median of each round.
    """

    part: str
    work: str
    seconds: float | None = None
    gb_s: float | None = None
    against: str = ""
    ratio: float | None = None
    goal: float | None = None
    is_time: bool = False
    note: str = ""
    samples: list[float] = field(default_factory=list[float])
    against_samples: list[float] = field(default_factory=list[float])

    @property
    def is_met(self) -> bool | None:
        """Whether the goal was reached; None when there is none, or nothing was measured."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio <= self.goal if self.is_time else self.ratio >= self.goal


def share_of_copy(
    part: str, work: Work, copy: Work, *, goal: float | None = None, note: str = ""
) -> Row:
    """Return the row of work whose bytes a second are compared with those of a copy."""
    return Row(
        part,
        work.name,
        work.seconds,
        work.bytes_per_s / 1e9,
        "device copy",
        work.bytes_per_s / copy.bytes_per_s,
        goal,
        note=note,
        samples=work.samples,
        against_samples=copy.samples,
    )


def times_as_fast(
    part: str, work: Work, peer: Work, *, goal: float | None = None, note: str = ""
) -> Row:
    """Return the row of work that is compared with other work to the same end."""
    return Row(
        part,
        work.name,
        work.seconds,
        work.bytes_per_s / 1e9 if work.nbytes else None,
        peer.name,
        peer.seconds / work.seconds,
        goal,
        note=note,
        samples=work.samples,
        against_samples=peer.samples,
    )


def times_as_long(part: str, work: Work, peer: Work, *, goal: float) -> Row:
    """Return the row of work that should take at most ``goal`` of the time of other work."""
    return Row(
        part,
        work.name,
        work.seconds,
        work.bytes_per_s / 1e9,
        f"time of {peer.name}",
        work.seconds / peer.seconds,
        goal,
        is_time=True,
        samples=work.samples,
        against_samples=peer.samples,
    )


def markdown(rows: Iterable[Row], machine: dict[str, str]) -> str:
    """Return a table with one line for each row, and under it what it was measured on."""
    cells = [HEADINGS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(row, widths) for row in cells]
    lines.insert(1, _line(["-" * width for width in widths], widths))
    facts = "; ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join([*lines, "", f"{facts}."]) + "\n"


def write(path: Path, rows: list[Row], machine: dict[str, str]) -> None:
    """Write the rows to ``path`` as JSON, and beside it the table as ``.md``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = [asdict(row) | {"met": row.is_met} for row in rows]
    path.write_text(json.dumps({"machine": machine, "rows": body}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(rows, machine))


def _cells(row: Row) -> tuple[str, ...]:
    goal, met = "", ""
    if row.goal is not None:
        goal = f"{'<=' if row.is_time else '>='} {row.goal:.2f}"
        met = {True: "met", False: "MISSED", None: "not measured"}[row.is_met]
    ratio = ""
    if row.ratio is not None:
        # Rounded against us, so that a goal that was missed never looks reached.
        rounding = math.ceil if row.is_time else math.floor
        ratio = f"{rounding(row.ratio * 100) / 100:.2f}"
    return (
        row.part,
        row.work,
        "" if row.seconds is None else duration(row.seconds),
        "" if row.gb_s is None else f"{row.gb_s:,.1f}",
        row.against,
        ratio,
        goal,
        met,
        row.note,
    )


def _line(cells: Iterable[str], widths: list[int]) -> str:
    return "| " + " | ".join(map(str.ljust, cells, widths)) + " |"
