"""What a comparison came to, and how it is shown."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table.

    row:          of the table of targets.
    peer, ours:   the median figures, as they are shown.
    ratio:        how much better ours is; ratios has that of each round.
    target:       what the ratio should be: ``at_least`` or, for memory, at most; None: it is only shown.
    peer_samples, ours_samples: a figure for each round, in ``unit``.
    """

    row: int
    work: str
    peer: str
    ours: str
    ratio: float
    ratios: list[float]
    target: float | None
    at_least: bool
    unit: str
    peer_samples: list[float]
    ours_samples: list[float]

    @property
    def is_met(self) -> bool:
        """Whether the target was reached, if there is one."""
        if self.target is None:
            return True
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


@dataclass(frozen=True, slots=True)
class Line:
    """Two measurements to compare.

    peer, ours: do the work for a while and return the seconds that one piece of it took.
    show:       a time as a figure with its unit.
    """

    row: int
    work: str
    target: float | None
    show: Callable[[float], str]
    peer: Callable[[], float]
    ours: Callable[[], float]


def compare(line: Line, rounds: int, progress: Callable[[str], None]) -> Result:
    """Measure the two in turns, so that what disturbs the machine for a while disturbs both.

    The figures are medians of the rounds, after one that does not count, and the ratio is theirs.
    """
    peer, ours = [], []
    line.peer()
    line.ours()
    for number in range(rounds):
        progress(f"row {line.row}: {line.work}, round {number + 1} of {rounds}")
        peer.append(line.peer())
        ours.append(line.ours())
    return Result(
        row=line.row,
        work=line.work,
        peer=line.show(median(peer)),
        ours=line.show(median(ours)),
        ratio=median(peer) / median(ours),
        ratios=[p / o for p, o in zip(peer, ours, strict=True)],
        target=line.target,
        at_least=True,
        unit="s",
        peer_samples=peer,
        ours_samples=ours,
    )


def throughput(nbytes: int) -> Callable[[float], str]:
    """Show times as GB/s, for work on so many bytes."""
    return lambda seconds: f"{nbytes / seconds / 1e9:.2f} GB/s"


def rate(seconds: float) -> str:
    """Show a time as so many a second."""
    return f"{1 / seconds:,.0f}/s"


def duration(seconds: float) -> str:
    """Show a time with three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(nbytes: int) -> str:
    """Show a number of bytes in the largest unit that divides it."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if nbytes >= scale and nbytes % scale == 0:
            return f"{nbytes // scale} {unit}"
    return f"{nbytes} B"
