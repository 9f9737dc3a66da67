"""How measurements become a result."""

from itertools import count

import pytest

from bench.result import Line, Result, compare, duration, rate, size, throughput


def test_rounds_alternate_and_the_first_does_not_count() -> None:
    order: list[str] = []
    peers, ours = iter([99.0, 4.0, 9.0, 6.0]), iter([99.0, 1.0, 3.0, 2.0])

    def peer() -> float:
        order.append("peer")
        return next(peers)

    def our() -> float:
        order.append("ours")
        return next(ours)

    result = compare(Line(1, "work", 3.0, duration, peer, our), 3, lambda text: None)
    assert order == ["peer", "ours"] * 4
    assert (result.peer, result.ours, result.ratio) == ("6 s", "2 s", 3.0)
    assert result.ratios == [4.0, 3.0, 3.0]
    assert result.peer_samples == [4.0, 9.0, 6.0]
    assert result.is_met


def test_progress_names_the_row_and_the_round() -> None:
    said: list[str] = []
    clock = count(1.0)
    line = Line(5, "work", 1.0, rate, lambda: next(clock), lambda: next(clock))
    compare(line, 2, said.append)
    assert said == ["row 5: work, round 1 of 2", "row 5: work, round 2 of 2"]


@pytest.mark.parametrize(
    ("ratio", "at_least", "is_met"),
    [(3.0, True, True), (2.9, True, False), (3.0, False, True), (3.1, False, False)],
)
def test_a_target_is_a_least_or_a_most(ratio: float, at_least: bool, is_met: bool) -> None:
    result = Result(7, "", "", "", ratio, [ratio], 3.0, at_least, "bytes", [1.0], [ratio])
    assert result.is_met is is_met


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (duration(1.5), "1.5 s"),
        (duration(0.0291), "29.1 ms"),
        (duration(0.000121), "121 us"),
        (rate(1e-5), "100,000/s"),
        (throughput(32 << 20)(0.01), "3.36 GB/s"),
        (size(32 << 20), "32 MiB"),
        (size(65536), "64 KiB"),
        (size(1000), "1000 B"),
    ],
)
def test_figures_are_shown_with_their_unit(shown: str, text: str) -> None:
    assert shown == text
