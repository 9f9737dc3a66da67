"""The plot, and what is said where it cannot be drawn."""

import sys
from pathlib import Path

import pytest

from respkv.errors import ConfigError
from respkv.trace.generate import Plan, generate
from respkv.trace.plot import check_can_draw, draw
from respkv.trace.simulate import Outcome, cells_of, simulate_all


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    trace = generate(Plan(sessions=30))
    return simulate_all(cells_of("lru,belady", (20, 100)), trace, num_processes=1)


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_a_plot_has_a_line_for_each_policy_and_the_same_bytes_each_time(
    tmp_path: Path, outcomes: list[Outcome]
) -> None:
    pytest.importorskip("matplotlib")
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    draw(outcomes, one, "a trace")
    draw(outcomes, other, "a trace")
    text = one.read_text()
    assert text == other.read_text()
    for word in ("lru", "belady", "a trace", "capacity, blocks"):
        assert word in text


def test_a_place_or_a_format_that_cannot_be_is_named(
    tmp_path: Path, outcomes: list[Outcome]
) -> None:
    pytest.importorskip("matplotlib")
    for name in ("absent/plot.svg", "plot.nonsense"):
        with pytest.raises(ConfigError, match="the plot cannot be written to"):
            draw(outcomes, tmp_path / name, "a trace")


def test_without_matplotlib_the_extra_is_named(without_matplotlib: None) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'respkv\[plot\]'"):
        check_can_draw()
