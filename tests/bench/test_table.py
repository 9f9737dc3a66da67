"""The table that people read."""

import pytest

from bench.result import Result
from bench.table import markdown


@pytest.mark.parametrize(
    ("ratio", "target", "at_least", "shown"),
    [
        (0.8999, 0.9, True, "| 0.89  | 0.90..0.90 | >= 0.90 | MISSED |"),
        (0.9, 0.9, True, "| 0.90  | 0.90..0.90 | >= 0.90 | met |"),
        (1.1751, 1.175, False, "| 1.18  | 1.18..1.18 | <= 1.18 | MISSED |"),
        (240.71, 100.0, True, "| 240.7 | 240.7..240.7 | >= 100.0 | met |"),
    ],
)
def test_a_ratio_is_rounded_against_us(
    ratio: float, target: float, at_least: bool, shown: str
) -> None:
    result = Result(5, "work", "9/s", "8/s", ratio, [ratio], target, at_least, "s", [1.0], [1.0])
    line = markdown([result], {}).splitlines()[2]
    assert " ".join(line.split()).endswith(" ".join(shown.split()))


def test_what_has_no_target_is_only_shown() -> None:
    result = Result(11, "work", "9/s", "8/s", 12.34, [12.34], None, True, "s", [1.0], [12.34])
    line = markdown([result], {}).splitlines()[2]
    assert " ".join(line.split()).endswith("| 12.3 | 12.3..12.3 | | |")


def test_the_machine_is_named_under_the_table() -> None:
    text = markdown([], {"cpu": "some CPU", "cores": "2"})
    assert text.splitlines()[-1] == "cpu some CPU; cores 2."
