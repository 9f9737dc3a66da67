"""Runs of free units, and the cheapest run that clearing its neighbours would make."""

import math
from collections.abc import Iterator, Sequence


class FreeRuns:
    """The free units of an arena as maximal runs: two neighbours are always one run.

    Taking looks at every run. There are at most as many as slabs, and slabs are cut rarely.
    """

    def __init__(self, num_units: int) -> None:
        self._length = {0: num_units}  # first unit of a run: its length
        self._first = {num_units: 0}  # unit behind a run: its first unit

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (first unit, length) of every run, in no order."""
        return iter(self._length.items())

    def longest(self) -> int:
        """Return the length of the longest run, 0 when nothing is free."""
        return max(self._length.values(), default=0)

    def take(self, units: int) -> int | None:
        """Take units from the shortest run that has them, the first one among equals.

        Returns: the first unit, or None when no run is long enough.
        """
        fit = min(
            ((length, first) for first, length in self._length.items() if length >= units),
            default=None,
        )
        if fit is None:
            return None
        length, first = fit
        self._remove(first)
        if length > units:
            self._add(first + units, length - units)
        return first

    def give_back(self, first: int, units: int) -> None:
        """Free units again and join them with the runs beside them."""
        before = self._first.get(first)
        if before is not None:
            units += self._remove(before)
            first = before
        if first + units in self._length:
            units += self._remove(first + units)
        self._add(first, units)

    def _add(self, first: int, units: int) -> None:
        self._length[first] = units
        self._first[first + units] = first

    def _remove(self, first: int) -> int:
        units = self._length.pop(first)
        del self._first[first + units]
        return units


def cheapest_window(
    spans: Sequence[tuple[int, int]],
    costs: Sequence[float],
    used_bytes: Sequence[int],
    *,
    stop_unit: int,
    units: int,
    bytes_needed: int,
) -> tuple[float, range]:
    """Choose neighbours whose clearing makes a free run of ``units`` and frees ``bytes_needed``.

    spans:      [first, stop) units of what is taken, by address; between and around them is free
    space, up to ``stop_unit``, and a window has the gaps at its two ends.
    costs:      of clearing each, >= 0; inf where it is not allowed.
    used_bytes: what clearing each frees.
    Returns: the cost of the cheapest window and its indices; (inf, an empty range) without one.
    """
    best, best_cost = range(0), math.inf
    start, cost, freed = 0, 0.0, 0
    edges = [0, *(stop for _, stop in spans)]  # edges[i]: where the gap before span i starts
    starts = [*(first for first, _ in spans), stop_unit]
    for end in range(len(spans)):
        if costs[end] == math.inf:
            start, cost, freed = end + 1, 0.0, 0
            continue
        cost += costs[end]
        freed += used_bytes[end]
        # Costs are never negative, so of the windows that end here the shortest is the cheapest.
        while (
            start < end
            and starts[end + 1] - edges[start + 1] >= units
            and freed - used_bytes[start] >= bytes_needed
        ):
            cost -= costs[start]
            freed -= used_bytes[start]
            start += 1
        enough = starts[end + 1] - edges[start] >= units and freed >= bytes_needed
        if enough and cost < best_cost:
            best, best_cost = range(start, end + 1), cost
    return best_cost, best
