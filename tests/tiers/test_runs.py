"""Free runs against a set of units, and windows against trying all of them."""

import math

from hypothesis import given
from hypothesis import strategies as st

from respkv.tiers.runs import FreeRuns, cheapest_window

NUM_UNITS = 40


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=40))
def test_runs_are_maximal_and_taken_by_best_fit(steps: list[tuple[bool, int]]) -> None:
    runs = FreeRuns(NUM_UNITS)
    free = set(range(NUM_UNITS))
    taken: list[tuple[int, int]] = []
    for take, number in steps:
        gaps = maximal_runs(free)
        if take:
            fits = sorted((length, first) for first, length in gaps.items() if length >= number)
            first = runs.take(number)
            assert first == (fits[0][1] if fits else None)
            if first is not None:
                taken.append((first, number))
                free -= set(range(first, first + number))
        elif taken:
            first, number = taken.pop(number % len(taken))
            runs.give_back(first, number)
            free |= set(range(first, first + number))
        assert dict(runs) == maximal_runs(free)
        assert runs.longest() == max(maximal_runs(free).values(), default=0)


def maximal_runs(free: set[int]) -> dict[int, int]:
    runs = {}
    for unit in sorted(free):
        if unit - 1 not in free:
            runs[unit] = 1
            while unit + runs[unit] in free:
                runs[unit] += 1
    return runs


pieces = st.lists(
    st.tuples(
        st.integers(0, 3),  # gap before
        st.integers(1, 6),  # units
        st.one_of(st.integers(0, 9), st.just(math.inf)),  # cost
        st.integers(0, 9),  # used bytes
    ),
    max_size=9,
)


@given(pieces, st.integers(0, 3), st.integers(0, 20), st.integers(-5, 30))
def test_the_window_is_the_cheapest_of_all(
    pieces: list[tuple[int, int, float, int]], last_gap: int, units: int, bytes_needed: int
) -> None:
    spans, unit = [], 0
    for gap, length, _, _ in pieces:
        spans.append((unit + gap, unit + gap + length))
        unit += gap + length
    costs = [cost for _, _, cost, _ in pieces]
    used = [nbytes for _, _, _, nbytes in pieces]
    stop_unit = unit + last_gap
    candidates = [math.inf]
    for start in range(len(spans)):
        for stop in range(start + 1, len(spans) + 1):
            first = spans[start - 1][1] if start else 0
            last = spans[stop][0] if stop < len(spans) else stop_unit
            if last - first >= units and sum(used[start:stop]) >= bytes_needed:
                candidates.append(sum(costs[start:stop]))
    cost, window = cheapest_window(
        spans, costs, used, stop_unit=stop_unit, units=units, bytes_needed=bytes_needed
    )
    assert cost == min(candidates)
    assert (len(window) == 0) == (cost == math.inf)
    assert sum(costs[index] for index in window) == (cost if window else 0)
