"""Tables and JSON of what was simulated and replayed."""

import json
from pathlib import Path

import pytest

from respkv.errors import ConfigError
from respkv.trace.format import Trace
from respkv.trace.replay import Plan, Report
from respkv.trace.report import (
    gap_closed,
    replay_summary,
    replay_table,
    simulate_summary,
    simulate_table,
    write_json,
)
from respkv.trace.simulate import Cell, Outcome

TRACE = Trace("made-up", 512, ())


def outcome(policy: str, hit: int, *, hints: bool = False) -> Outcome:
    return Outcome(Cell(policy, 100, hints), 100, hit, 1e9, 1e7 * hit, num_hits=hit, num_written=20)


OUTCOMES = [
    outcome("lru", 10),
    outcome("survival", 30, hints=True),
    outcome("survival", 20),
    outcome("belady", 50),
]


def test_the_gap_is_that_from_lru_to_the_ceiling() -> None:
    assert [gap_closed(each, OUTCOMES) for each in OUTCOMES] == pytest.approx([0.0, 0.5, 0.25, 1.0])
    assert gap_closed(OUTCOMES[0], OUTCOMES[:2]) is None


def test_the_table_has_a_row_for_each_policy_and_for_each_cell() -> None:
    table = simulate_table(TRACE, OUTCOMES, 1 << 20)
    rates = [line.split() for line in table.splitlines() if line.startswith("survival")]
    assert rates[:2] == [["survival", "+", "end", "hints", "0.3000"], ["survival", "0.2000"]]
    assert rates[3] == ["survival", "100", "25.0%", "0.2000", "1.00", "0.00", "0.0", "20MiB"]
    assert "100MiB" in table


def test_a_long_name_moves_all_columns() -> None:
    cell = Cell("survival", 100, has_end_hints=True, files_max=7, admission="tinylfu")
    long = Outcome(cell, 100, 50, 1e9, 5e8, num_hits=50, num_written=20)
    [_, _, *table] = simulate_table(TRACE, [OUTCOMES[0], long], None).splitlines()
    assert len({len(line) for line in table[:3]}) == 1
    assert len({len(line) for line in table[4:]}) == 1


def test_all_figures_are_in_the_summary(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, simulate_summary(TRACE, OUTCOMES, None))
    found = json.loads(path.read_text())
    assert [cell["hit_rate"] for cell in found["cells"]] == [0.1, 0.3, 0.2, 0.5]
    assert found["cells"][1]["end_hints"]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_json(tmp_path / "absent" / "out.json", {})


def test_a_replay_says_what_was_hit_what_was_wrong_and_how_long_it_took() -> None:
    report = Report(
        num_requests=2, num_tokens=100, hit_tokens=25, num_flops=8.0, hit_flops=2.0, num_wrong=3
    )
    report.tiers.update("ccn")
    report.latencies["match"].extend([0.001, 0.003])
    plan = Plan(url="respkv://nowhere", speed=2.0)
    table = replay_table(TRACE, plan, report)
    assert "token hit rate  0.2500 of 100 tokens" in table
    assert "c 2, n 1 matched" in table
    assert "3 pages of other bytes" in table
    assert "late" in table
    found = json.loads(json.dumps(replay_summary(TRACE, plan, report)))
    assert found["flops_saved"] == 0.25
    assert found["latency_us"]["match"] == {
        "p50": 3000,
        "p90": 3000,
        "p99": 3000,
        "max": 3000,
        "calls": 2,
    }
    assert found["latency_us"]["put"]["calls"] == 0
