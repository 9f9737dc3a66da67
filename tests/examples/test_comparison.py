"""What the demos' figures mean, and when a demo has failed."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from examples.comparison import Comparison, Generation, Pair, columns, milliseconds, save


def generation(
    reused: int, first_token_s: float, total_s: float, tokens: list[int] | None = None
) -> Generation:
    return Generation(100, reused, first_token_s, total_s, tokens or [1, 2])


def pair(reused: int, *, is_first: bool = False, tokens: list[int] | None = None) -> Pair:
    cached = generation(reused, 0.010, 0.110, tokens)
    return Pair(f"{reused} reused", generation(0, 0.1, 0.2), cached, is_first=is_first)


COMPARISON = Comparison("A & B", [pair(0, is_first=True), pair(90), pair(80)], store_s=0.27)


def test_the_first_prompt_counts_for_hits_and_not_for_speed() -> None:
    assert COMPARISON.hit_rate == pytest.approx(2 / 3)
    assert COMPARISON.tokens_reused == 170
    assert COMPARISON.reused == pytest.approx(170 / 300)
    assert COMPARISON.first_token_speed_up == pytest.approx(10)
    assert COMPARISON.answer_speed_up == pytest.approx(0.2 / 0.11)


def test_everything_is_compared_with_the_stores_that_were_waited_for() -> None:
    assert COMPARISON.whole_speed_up == pytest.approx(0.6 / (0.33 + 0.27))


def test_one_token_that_differs_is_a_failure() -> None:
    comparison = Comparison("it", [pair(90), pair(80, tokens=[1, 3])])
    assert comparison.failure() == "tokens differ with the cache: 80 reused"
    assert "DIFFERS" in comparison.report()


def test_a_cache_that_never_had_anything_is_a_failure() -> None:
    assert Comparison("it", [pair(0), pair(0)]).failure() == "nothing was found in the cache"
    assert COMPARISON.failure() is None


def test_the_report_says_what_it_compares_with() -> None:
    report = COMPARISON.report()
    assert "170, 56.7% of all prompt tokens" in report
    assert "100 ms without, 10.0 ms with the cache: 10.0 x" in report
    assert "computed from its first token" in report


def test_the_plot_is_a_drawing_with_two_bars_for_each_prompt(tmp_path: Path) -> None:
    path = save(COMPARISON, tmp_path / "new", "it")
    root = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(each.attrib["width"]) for each in root.findall(f"{space}rect")[1:]]
    assert widths == pytest.approx([420, 42] * 3)
    assert (root.findtext(f"{space}text") or "").startswith("A & B")


def test_of_many_prompts_the_first_and_the_last_are_shown() -> None:
    report = Comparison("it", [pair(number) for number in range(1, 41)]).report()
    assert "(28 between them are not shown)" in report
    assert "\n6 reused" in report
    assert "\n7 reused" not in report
    assert "35 reused" in report


def test_cells_stand_in_columns() -> None:
    assert columns([["", "n"], ["long", "1"]]) == "      n\nlong  1"


@pytest.mark.parametrize(("seconds", "words"), [(0.0123, "12.3 ms"), (1.5, "1500 ms")])
def test_short_times_have_a_digit_more(seconds: float, words: str) -> None:
    assert milliseconds(seconds) == words
