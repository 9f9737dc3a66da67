"""Hints: which are in force, which are cut and which are refused."""

import pytest

from respkv.engine.cache import Cache
from respkv.engine.entry import Put
from respkv.engine.namespaces import Schema
from respkv.engine.sessions import Hints
from respkv.page import Geometry
from tests.engine.fake_tier import FakeTier
from tests.engine.files import opened, until
from tests.fakes import ManualClock, make_cache

KEYS = [b"ns:" + bytes([letter]) * 64 for letter in b"abcdef"]


def talk(cache: Cache, session: bytes, first: int, count: int) -> None:
    """Put the pages of a session, one behind the other."""
    parent = b""
    for key in KEYS[first : first + count]:
        cache.put(key, b"x" * 1000, Put("kvpage", parent=parent, session=session))
        parent = key


def cache_with_schema() -> tuple[Cache, ManualClock]:
    cache, clock = make_cache()
    cache.namespaces.put(Schema(b"ns", Geometry(1, 1, 125, 2, "float16")))
    return cache, clock


def test_nobody_knows_a_session_that_never_came() -> None:
    cache, _ = cache_with_schema()
    hints = Hints(cache)
    answers = [
        hints.end(b"ns", b"s"),
        hints.expect(b"ns", b"s", 1000, 5000),
        hints.demote(b"ns", b"s", None),
    ]
    assert [answer.status for answer in answers] == ["rejected"] * 3
    assert all("SESSION 's'" in answer.reason for answer in answers)
    assert hints.counts == {"accepted": 0, "clipped": 0, "rejected": 3}


def test_the_end_of_a_session_names_its_own_pages() -> None:
    cache, clock = cache_with_schema()
    hints = Hints(cache)
    talk(cache, b"s", 0, 3)
    talk(cache, b"t", 3, 1)
    clock.advance(10)
    cache.match(KEYS[:1], clock.now, session=b"t")  # it is not s's alone any more
    answer = hints.end(b"ns", b"s")
    assert (answer.status, answer.value) == ("accepted", 2)
    assert [cache.entries[key].request.is_ended for key in KEYS[1:4]] == [True, True, False]


def test_a_return_that_is_too_far_away_is_cut() -> None:
    cache, clock = cache_with_schema()
    hints = Hints(cache)
    talk(cache, b"s", 0, 2)
    assert hints.expect(b"ns", b"s", 4000, 5000)[:2] == ("accepted", 4000)
    assert cache.entries[KEYS[1]].request.expected_at == clock.now + 4
    assert hints.expect(b"ns", b"s", 9000, 5000)[:2] == ("clipped", 5000)
    assert cache.entries[KEYS[1]].request.expected_at == clock.now + 5


@pytest.mark.anyio
async def test_a_session_is_demoted_where_there_are_files() -> None:
    cache, clock = cache_with_schema()
    hints = Hints(cache)
    talk(cache, b"s", 0, 3)
    assert hints.demote(b"ns", b"s", None)[:2] == ("rejected", 0)
    async with opened(cache, FakeTier()) as mover:
        for entry in list(cache.entries.values()):
            cache.copies.queue(entry)
        clock.advance(1)
        assert hints.demote(b"ns", b"s", mover.demotions)[:2] == ("accepted", 3)
        await until(lambda: all(entry.is_cold for entry in cache.entries.values()))


def test_the_pages_of_an_ended_session_are_evicted_first_for_memory_too() -> None:
    cache, clock = make_cache(arena_bytes=256 << 10, policy="survival")
    cache.namespaces.put(Schema(b"ns", Geometry(1, 1, 125, 2, "float16")))
    hints = Hints(cache)
    talk(cache, b"s", 0, 2)
    clock.advance(60)
    talk(cache, b"t", 2, 2)
    assert "does not look" not in hints.end(b"ns", b"t").reason
    number = 0
    while cache.entries.keys() >= set(KEYS[:4]):
        number += 1
        clock.advance(60)
        cache.put(b"ns:%064x" % number, b"x" * 1000, Put("kvpage"))
    assert KEYS[3] not in cache.entries
    assert set(KEYS[:2]) < cache.entries.keys()
