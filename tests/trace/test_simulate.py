"""Cells over traces: a generated one, and a real one against figures measured elsewhere."""

import gc
from collections.abc import Iterator

import pytest

from respkv.errors import ConfigError
from respkv.trace.flops import Model
from respkv.trace.format import Request, Trace
from respkv.trace.generate import Plan, generate
from respkv.trace.read import find_trace, read_trace
from respkv.trace.simulate import BELADY, NAMES, Cell, cells_of, simulate, simulate_all


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate(Plan(seed=1, sessions=150, seconds=900.0))


def test_no_policy_beats_the_ceiling(trace: Trace) -> None:
    ceiling = simulate(Cell(BELADY, 150), trace).hit_rate
    for name in NAMES:
        outcome = simulate(Cell(name, 150), trace)
        assert 0.0 < outcome.hit_rate <= ceiling
        assert 0.0 < outcome.flops_saved < 1.0
        assert outcome.num_tokens == trace.num_tokens


class Watched(tuple[Request, ...]):
    """Requests that see, while they are served, whether Python collects when it likes."""

    __slots__ = ()
    seen: set[bool] = set()  # noqa: RUF012 (of the only one there is)

    def __iter__(self) -> Iterator[Request]:
        for request in super().__iter__():
            self.seen.add(gc.isenabled())
            yield request


def test_the_collector_waits_while_decisions_are_timed(trace: Trace) -> None:
    requests = Watched(trace.requests)
    assert gc.isenabled()
    simulate(Cell("lru", 50), Trace("watched", trace.block_tokens, requests))
    assert requests.seen == {False}
    assert gc.isenabled(), "it was not switched on again"


def test_with_room_for_all_every_policy_hits_what_can_be_hit(trace: Trace) -> None:
    blocks_max = len({block for request in trace.requests for block in request.blocks})
    rates = {simulate(Cell(name, blocks_max), trace).hit_rate for name in NAMES}
    assert len(rates) == 1


def test_cells_in_processes_say_the_same_in_the_order_asked(trace: Trace) -> None:
    cells = cells_of("lru,belady", (50, 200))
    told: list[Cell] = []
    outcomes = simulate_all(
        cells, trace, num_processes=2, progress=lambda outcome: told.append(outcome.cell)
    )
    assert told == cells == [outcome.cell for outcome in outcomes]
    alone = simulate_all(cells, trace, num_processes=1)
    assert [each.hit_rate for each in outcomes] == [each.hit_rate for each in alone]


def test_files_behind_memory_hit_more_and_admission_writes_less(trace: Trace) -> None:
    cells = cells_of("lru,belady", (50,), files_max=200, admissions="all,second,tinylfu")
    assert [cell.label for cell in cells] == [
        "lru + files, all",
        "lru + files, second",
        "lru + files, tinylfu",
        "belady + files, all",
    ]
    memory = simulate(Cell("lru", 50), trace)
    every, second, tinylfu, ceiling = (simulate(cell, trace) for cell in cells)
    for outcome in (every, second, tinylfu):
        assert memory.hit_rate < outcome.hit_rate <= ceiling.hit_rate
        assert 0 < outcome.num_raised < outcome.num_hits
    assert second.num_written < every.num_written
    assert tinylfu.num_written < every.num_written
    with pytest.raises(ConfigError, match="admission 'third' is none of all, second, tinylfu"):
        cells_of("lru", (50,), files_max=200, admissions="third")


def test_tokens_bytes_and_operations_are_counted() -> None:
    requests = (Request(0.0, 20, (1, 2)), Request(1.0, 25, (1, 2, 3)))
    model = Model("tiny", num_params=1.0, layers=0)
    outcome = simulate(Cell("lru", 10), Trace("t", 10, requests), model)
    assert (outcome.num_tokens, outcome.hit_tokens) == (45, 20)
    assert (outcome.num_written, outcome.num_hits) == (3, 2)
    assert outcome.written_per_hit == 1.5
    assert outcome.flops_saved == pytest.approx(20 / 45)


def test_a_prompt_that_ends_inside_a_block_hits_no_more_than_its_tokens() -> None:
    requests = (Request(0.0, 15, (1, 2)), Request(1.0, 15, (1, 2)))
    assert simulate(Cell("lru", 10), Trace("t", 10, requests)).hit_tokens == 15


def test_deep_tokens_cost_more_to_compute_than_those_in_front() -> None:
    model = Model()
    assert model.flops(4096, 8192) > model.flops(0, 4096)
    assert model.flops(0, 8192) == pytest.approx(model.flops(0, 4096) + model.flops(4096, 8192))


def test_an_empty_trace_hits_nothing() -> None:
    outcome = simulate(Cell("lru", 10), Trace("t", 10, ()))
    assert (outcome.hit_rate, outcome.flops_saved, outcome.written_per_hit) == (0.0, 0.0, 0.0)


def test_cells_are_named_or_all_of_them_and_hints_are_for_those_that_listen() -> None:
    assert [cell.policy for cell in cells_of("all", (1,))] == list(NAMES)
    hinted = cells_of("lru, survival", (1, 2), has_end_hints=True)
    assert [cell.label for cell in hinted] == ["lru"] * 2 + ["survival + end hints"] * 2
    with pytest.raises(ConfigError, match=r"policy 'best' is none of lru, .*, or all"):
        cells_of("lru,best", (1,))


@pytest.mark.parametrize(
    ("name", "is_chained", "hit_rate"),
    # Measured before with simulators of their own, whose blocks knew nothing of each other. For
    # fifo that matters: leaves first keeps a chain as long as it grows, so it does as well as lru.
    [
        ("lru", True, 0.1420),
        ("fifo", False, 0.1303),
        ("sieve", False, 0.0999),
        ("s3fifo", False, 0.1582),
        ("arc", False, 0.1502),
        (BELADY, True, 0.3621),
    ],
)
def test_hit_rates_of_a_real_trace_are_those_of_other_simulators(
    name: str, is_chained: bool, hit_rate: float
) -> None:
    path = find_trace()
    if path is None:
        pytest.skip("no trace: set RESPKV_TRACE to Mooncake's conversation_trace.jsonl")
    outcome = simulate(Cell(name, 6000, is_chained=is_chained), read_trace(path))
    assert outcome.hit_rate == pytest.approx(hit_rate, abs=0.01)
