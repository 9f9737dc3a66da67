"""A few hundred random histories, each decided by its seed, with the engine checked all along.

``python -m tests.simulation --histories 10000 --seed 1`` plays more of them.
"""

from collections.abc import Callable

import pytest

from tests.simulation.record import Kind, Operation, Record, State, WrongAnswer
from tests.simulation.values import Value, value_of_write
from tests.simulation.world import play_history

HISTORIES = 10  # a test


@pytest.mark.parametrize("first", range(1, 201, HISTORIES))
def test_no_history_shows_a_wrong_byte_or_leaves_anything_behind(first: int) -> None:
    for seed in range(first, first + HISTORIES):
        play_history(seed)


@pytest.mark.parametrize("first", range(10_001, 10_041, HISTORIES))
def test_no_history_on_trio_shows_a_wrong_byte_or_leaves_anything_behind(first: int) -> None:
    for seed in range(first, first + HISTORIES):
        play_history(seed, backend="trio")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_seed_decides_everything(backend: str) -> None:
    results = [play_history(7, backend=backend) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0].answers > 100


def test_a_history_that_fails_says_how_to_play_it_again() -> None:
    with pytest.raises(LookupError) as found:
        play_history(7, backend="no such loop")
    assert "--seed 7 " in found.value.__notes__[0]


# -- the record: what it must notice --------------------------------------------------------------

KEY = b"k"
OLD, NEW = value_of_write(KEY, 1, 100), value_of_write(KEY, 2, 100)

Play = Callable[[Kind, int, int, int, Value | None], Operation]


def player(record: Record) -> tuple[Play, Callable[[int, int, Value | None], None]]:
    """Return what adds an operation that has ended, and what reads; each at (client, from, to)."""
    place = iter(range(1000))

    def play(kind: Kind, client: int, began: int, ended: int, value: Value | None) -> Operation:
        done = Operation(kind, KEY, client, next(place), began, float(began), value)
        done.end(State.DONE, ended, float(ended))
        return record.add(done)

    def read(client: int, step: int, seen: Value | None) -> None:
        done = play(Kind.READ, client, step, step, None)
        record.see(done, None if seen is None else seen.bytes())

    return play, read


@pytest.mark.parametrize("last", [OLD, NEW])
def test_a_read_may_see_any_write_that_is_not_certainly_over(last: Value) -> None:
    record = Record()
    play, read = player(record)
    play(Kind.WRITE, 1, 0, 5, OLD)
    play(Kind.WRITE, 2, 3, 8, NEW)  # the two overlap, so either may have been the last
    read(3, 9, last)
    read(4, 10, last)
    with pytest.raises(WrongAnswer, match="that write was over"):
        read(3, 11, NEW if last is OLD else OLD)


def test_a_connection_sees_its_own_writes_in_order() -> None:
    record = Record()
    play, read = player(record)
    play(Kind.WRITE, 1, 0, 90, OLD)
    play(Kind.WRITE, 1, 0, 90, NEW)  # pipelined: nothing was answered before it was sent
    with pytest.raises(WrongAnswer, match="that write was over"):
        read(1, 91, OLD)


def test_what_was_forgotten_does_not_come_back() -> None:
    record = Record()
    play, read = player(record)
    play(Kind.WRITE, 1, 0, 1, OLD)
    read(1, 2, OLD)
    read(2, 3, None)
    with pytest.raises(WrongAnswer, match="that write was over"):
        read(1, 4, OLD)


def test_bytes_that_nobody_wrote_or_whose_write_failed_are_wrong() -> None:
    record = Record()
    play, read = player(record)
    play(Kind.WRITE, 1, 0, 1, OLD).state = State.FAILED
    with pytest.raises(WrongAnswer, match="had failed"):
        read(1, 2, OLD)
    with pytest.raises(WrongAnswer, match="nobody wrote"):
        read(1, 3, NEW)


def test_a_write_without_an_answer_may_have_happened_until_its_connection_broke() -> None:
    record = Record()
    play, read = player(record)
    play(Kind.WRITE, 1, 0, 5, NEW).state = State.LOST
    play(Kind.WRITE, 2, 0, 5, OLD)
    read(3, 6, NEW)
    play(Kind.WRITE, 2, 7, 8, OLD)
    with pytest.raises(WrongAnswer, match="that write was over"):
        read(3, 9, NEW)


def test_a_value_is_not_read_after_its_ttl() -> None:
    record = Record()
    play, read = player(record)
    play(Kind.WRITE, 1, 0, 1, OLD)
    play(Kind.TTL, 1, 2, 3, None).ttl_s = 10.0
    read(1, 12, OLD)
    with pytest.raises(WrongAnswer, match="TTL had ended"):
        read(1, 14, OLD)


def test_a_part_of_a_value_is_held_against_that_part() -> None:
    record = Record()
    play, _ = player(record)
    play(Kind.WRITE, 1, 0, 1, OLD)
    read = play(Kind.READ, 1, 2, 3, None)
    record.see(read, OLD.bytes()[10:20], (10, 20))
    with pytest.raises(WrongAnswer, match="nobody wrote"):
        record.see(read, OLD.bytes()[10:20], (11, 21))
