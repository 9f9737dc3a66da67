"""Bets on pages: the budget holds, the books add up, and a source that does not pay is left alone."""

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respkv.engine.entry import Entry
from respkv.engine.prefetch import (
    EVIDENCE,
    FAN_OUT_MAX,
    REST_S,
    REST_S_MAX,
    SUCCESSORS_MAX,
    TRIAL,
    Book,
    Gate,
    Limits,
    Source,
    State,
    chain_of,
    successors,
)

PAGE = 1000


def make_page(number: int, nbytes: int = PAGE) -> Entry:
    """Return a page that is in no memory."""
    page = Entry(b"ns:%d" % number, "kvpage", nbytes, 0.0)
    page.position = number
    return page


def link(pages: list[Entry]) -> None:
    for front, behind in pairwise(pages):
        behind.parent = front
        front.children = {*(front.children or ()), behind}


def settle(gate: Gate, won: int, lost: int, *, is_trial: bool = False, now: float = 0.0) -> None:
    for is_won in [True] * won + [False] * lost:
        if is_trial:
            assert gate.tried()
        gate.settle(is_won=is_won, is_trial=is_trial, now=now)


def test_a_source_that_pays_stays_on() -> None:
    gate = Gate(is_trusted=True)
    for _ in range(200):
        settle(gate, 2, 2)
    assert gate.state is State.ON
    assert gate.num_switched == 0


def test_a_source_that_does_not_pay_rests_longer_each_time() -> None:
    gate = Gate(is_trusted=True)
    settle(gate, 0, EVIDENCE)
    now, rests = 0.0, []
    for _ in range(12):
        start = now
        while gate.look(now) is State.OFF:
            now += 1.0
        rests.append(now - start)
        settle(gate, 0, TRIAL, is_trial=True, now=now)
    assert rests[:4] == [REST_S, 2 * REST_S, 4 * REST_S, 8 * REST_S]
    assert rests[-1] == REST_S_MAX


def test_a_trial_that_pays_turns_it_on_again_and_success_shortens_the_next_rest() -> None:
    gate = Gate(is_trusted=True)
    settle(gate, 0, EVIDENCE)
    assert gate.look(REST_S / 2) is State.OFF
    assert gate.look(REST_S) is State.TRIAL
    settle(gate, TRIAL // 2 + 1, TRIAL // 2 - 1, is_trial=True, now=REST_S)
    assert gate.look(REST_S) is State.ON
    assert gate.rest_s == 2 * REST_S
    settle(gate, 64, 0)
    assert gate.rest_s == REST_S


def test_between_the_two_shares_nothing_changes() -> None:
    """What pays a little goes on if it is on, and stays off if it is off: no flapping."""
    gate = Gate(is_trusted=True)
    rng = random.Random(1)
    for _ in range(2000):
        settle(gate, *((1, 0) if rng.random() < 0.45 else (0, 1)))
    assert gate.num_switched == 0
    settle(gate, 0, 64)
    assert gate.look(REST_S) is State.TRIAL
    settle(gate, TRIAL * 2 // 5, TRIAL - TRIAL * 2 // 5, is_trial=True, now=REST_S)
    assert gate.look(REST_S) is State.OFF


def test_a_bet_of_before_the_change_says_nothing_about_after() -> None:
    gate = Gate(is_trusted=True)
    settle(gate, 0, EVIDENCE)
    gate.look(REST_S)
    for _ in range(100):
        gate.settle(is_won=False, is_trial=False, now=REST_S)
    assert gate.state is State.TRIAL


def test_a_page_that_was_used_is_won_and_one_that_leaves_before_is_lost() -> None:
    book = Book(Limits("auto", 10 * PAGE))
    used, unused = make_page(0), make_page(1)
    assert book.begin(used, Source.MATCH, 0.0)
    assert book.begin(unused, Source.MATCH, 0.0)
    used.hits += 1
    book.left(used, 1.0)
    book.left(unused, 1.0)
    tally = book.tallies[Source.MATCH]
    assert (tally.num_won, tally.num_lost, tally.wasted_bytes) == (1, 1, PAGE)
    assert book.nbytes == 0


def test_a_page_that_nobody_uses_for_long_is_lost() -> None:
    book = Book(Limits("auto", 10 * PAGE))
    page = make_page(0)
    assert book.begin(page, Source.HINT, 0.0, wait_s=100.0)
    book.sweep(100.0 + Source.HINT.horizon_s - 1)
    assert page in book
    book.sweep(100.0 + Source.HINT.horizon_s)
    assert page not in book
    assert book.tallies[Source.HINT].num_lost == 1


def test_a_trial_costs_no_budget_and_outlives_the_page_in_memory() -> None:
    book = Book(Limits("auto", 0))
    page = make_page(0)
    bet = book.begin(page, Source.CHAIN, 0.0)
    assert bet is not None
    assert bet.is_trial
    assert book.nbytes == 0
    book.left(page, 1.0)
    assert page in book
    page.hits += 1
    book.used([page], 2.0)
    assert page not in book
    assert book.tallies[Source.CHAIN].num_raised == 0


def test_a_flush_does_not_leave_a_trial_waiting_for_ever() -> None:
    book = Book(Limits("auto", 0))
    for round_ in range(3):
        pages = [make_page(round_ * 100 + number) for number in range(TRIAL)]
        begun = [page for page in pages if book.begin(page, Source.CHAIN, 0.0)]
        assert len(begun) == TRIAL
        book.clear()
        book.check()


def test_the_sooner_a_page_is_expected_the_hotter_may_be_what_goes_for_it() -> None:
    book = Book(Limits("auto", PAGE))
    sure, unsure = book.idle_s(Source.HINT, 1.0), book.idle_s(Source.HINT, 0.25)
    later = book.idle_s(Source.HINT, 1.0, wait_s=60.0)
    assert sure <= unsure < later
    assert later >= 60.0


@pytest.mark.parametrize(
    ("hits", "expected"),
    [([10, 10, 10], [1, 2]), ([10, 1, 1], []), ([10, 9, 1], [1]), ([0, 0, 0], [1, 2])],
)
def test_successors_are_those_that_most_went_on_to(hits: list[int], expected: list[int]) -> None:
    pages = [make_page(number) for number in range(3)]
    link(pages)
    for page, count in zip(pages, hits, strict=True):
        page.hits = count
    assert [each.entry.position for each in successors(pages[0])] == expected


def test_successors_are_bounded_and_so_are_the_branches_looked_at() -> None:
    pages = [make_page(number) for number in range(100)]
    link(pages)
    for page in pages:
        page.hits = 1000
    found = list(successors(pages[0]))
    assert len(found) == SUCCESSORS_MAX
    assert [each.chance for each in found] == sorted((each.chance for each in found), reverse=True)
    crowd = [make_page(1000 + number) for number in range(FAN_OUT_MAX + 1)]
    pages[0].children = set(crowd)
    assert list(successors(pages[0])) == []


def test_a_chain_is_cut_at_its_front() -> None:
    pages = [make_page(number) for number in range(5)]
    link(pages)
    assert chain_of(pages[-1], 10) == pages
    assert chain_of(pages[-1], 2) == pages[-2:]
    assert chain_of(None, 2) == []


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "use", "left", "gone", "cancel", "sweep", "limits", "clear"]),
        st.integers(0, 19),
        st.sampled_from(list(Source)),
        st.floats(0, 30),
    ),
    max_size=120,
)


@given(STEPS, st.sampled_from(["auto", "on", "off"]), st.integers(0, 6 * PAGE))
def test_whatever_happens_the_budget_holds_and_the_books_add_up(
    steps: list[Any], mode: Any, bytes_max: int
) -> None:
    book = Book(Limits(mode, bytes_max))
    pages = [make_page(number, PAGE + number) for number in range(20)]
    now = 0.0
    for what, number, source, seconds in steps:
        page = pages[number]
        now += seconds
        before = book.nbytes
        if what == "begin":
            state = book.gates[source].look(now)
            bet = book.begin(page, source, now, wait_s=seconds)
            assert book.nbytes <= max(bytes_max, before)
            if bet is not None:
                assert mode != "off"
                assert mode == "on" or state is not State.OFF
                assert bet.is_trial == (mode == "auto" and state is State.TRIAL)
        elif what == "use":
            page.hits += 1
            book.used([page], now)
            assert page not in book
        elif what == "left":
            book.left(page, now)
            assert (open_ := book.find(page)) is None or open_.is_trial
        elif what == "gone":
            page.position = -1
            book.left(page, now)
            assert page not in book
            page.position = number
        elif what == "cancel" and (open_ := book.find(page)) is not None and not open_.is_trial:
            book.cancel(open_)
            assert page not in book
        elif what == "sweep":
            book.sweep(now)
            assert all(bet.until > now and not bet.is_won for bet in book.bets)
        elif what == "limits":
            bytes_max = number * PAGE // 3
            book.limits = Limits(mode, bytes_max)
        elif what == "clear":
            book.clear()
            assert book.nbytes == len(book) == 0
        book.check()
        for gate in book.gates.values():
            assert REST_S <= gate.rest_s <= REST_S_MAX


@given(st.lists(st.booleans(), max_size=400))
def test_a_gate_is_never_stuck(outcomes: list[bool]) -> None:
    """However bets end, in bounded time one can be made again."""
    gate = Gate(is_trusted=False)
    now = 0.0
    for is_won in outcomes:
        if gate.look(now) is State.OFF:
            now += REST_S_MAX
            assert gate.look(now) is State.TRIAL
        is_trial = gate.state is State.TRIAL
        assert not is_trial or gate.tried()
        gate.settle(is_won=is_won, is_trial=is_trial, now=now)
        assert 0.0 < gate.share < 1.0
