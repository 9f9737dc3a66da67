"""Large values wait while too much of the memory has no copy in a file, and only so long."""

import time

import anyio
import pytest

from respkv.server import state
from tests.fakes import FakeWire
from tests.server.cold import Cold, cold_server, parsed, replies, settle
from tests.server.raw import pipeline, request

pytestmark = pytest.mark.anyio

LARGE = 300_000


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have large values wait for as long as the writes take, on a slow machine, too."""
    monkeypatch.setattr(state, "PATIENCE_S_MAX", 60.0)


async def fill(cold: Cold) -> FakeWire:
    """Have more than half of the memory without a copy, and a tier that takes its time."""
    cold.tier.writes.shut()
    while not cold.cache.copies.is_behind:
        cold.cache.put(b"k%d" % len(cold.cache.entries), b"v" * LARGE)
    await settle()
    return FakeWire(cold.server)


async def test_a_large_value_waits_until_enough_is_written(patient: None) -> None:
    async with cold_server(reserve_timeout=120_000) as cold:
        wire = await fill(cold)
        data = pipeline([("SET", "new", b"n" * LARGE), ("STRLEN", "new")])
        taken = wire.feed(data)
        assert taken < len(data)
        await settle()
        assert not wire.session.wants_input
        cold.tier.writes.open()
        with anyio.fail_after(60):
            while taken < len(data):
                await anyio.sleep(0.005)
                taken += wire.feed(data[taken:])
        assert await replies(wire, 2) == [b"OK", LARGE]
        assert cold.cache.stats.evicted == 0


async def test_small_values_never_wait() -> None:
    async with cold_server() as cold:
        wire = await fill(cold)
        wire.feed(pipeline([("SET", "small", "x"), ("GET", "small"), ("SET", "mid", b"m" * 3000)]))
        assert parsed(wire.drain()) == [b"OK", b"x", b"OK"]


async def test_values_that_came_with_others_wait_as_well_and_keep_their_order(
    patient: None,
) -> None:
    async with cold_server(reserve_timeout=120_000) as cold:
        wire = await fill(cold)
        commands = [("PING",), ("SET", "a", b"a" * 5000), ("SET", "b", b"b" * 5000), ("GET", "a")]
        wire.feed(pipeline([*commands, ("MSET", "c", b"c" * 5000, "d", b"d" * 6000)]))
        await settle()
        assert parsed(wire.drain()) == [b"PONG"]
        assert b"a" not in cold.cache.entries
        cold.tier.writes.open()
        assert await replies(wire, 4) == [b"OK", b"OK", b"a" * 5000, b"OK"]


async def test_after_a_second_what_was_not_written_is_given_up() -> None:
    async with cold_server(dirty_high=90) as cold:
        cold.tier.writes.shut()
        for number in range(12):
            cold.cache.put(b"k%d" % number, b"v" * LARGE)
        before = cold.cache.stats.evicted
        wire = FakeWire(cold.server)
        data, taken = request("SET", "new", b"n" * LARGE), 0
        began = time.monotonic()
        with anyio.fail_after(60):
            while taken < len(data):
                taken += wire.feed(data[taken:])
                await anyio.sleep(0.01)
        assert await replies(wire, 1) == [b"OK"]
        assert time.monotonic() - began >= 0.9
        assert (before, cold.cache.stats.evicted) == (0, 1)


async def test_without_a_tier_that_takes_values_nobody_waits() -> None:
    async with cold_server() as cold:
        wire = await fill(cold)
        cold.tier.health.worsen("read-only", "it is full")
        wire.feed(pipeline([("SET", "new", b"n" * LARGE), ("GET", "new")]))
        assert await replies(wire, 2) == [b"OK", b"n" * LARGE]


async def test_a_reservation_waits_as_a_put_does(patient: None) -> None:
    async with cold_server(shm="rw", reserve_timeout=120_000) as cold:
        wire = await fill(cold)
        wire.feed(request("KV.RESERVE", "r", LARGE))
        await settle()
        assert wire.drain() == b""
        cold.tier.writes.open()
        ((lease, _),) = await replies(wire, 1)
        wire.feed(request("KV.ABORT", lease))
        assert await replies(wire, 1) == [1]


async def test_a_client_that_leaves_while_it_waits_leaves_nothing() -> None:
    async with cold_server() as cold:
        wire = await fill(cold)
        wire.feed(request("SET", "new", b"n" * LARGE))
        await settle()
        wire.lose()
        cold.tier.writes.open()
        await anyio.sleep(0.1)
        await cold.check()
