"""Commands that need several cold values at once: they stand in line for memory, or are refused."""

from typing import Any

import anyio
import pytest

from respkv.server.budget import Budget, Place
from respkv.tiers.record import Level
from tests.fakes import FakeWire
from tests.server.cold import Cold, cold_server, parsed, replies, settle
from tests.server.raw import error_of, pipeline, request

pytestmark = pytest.mark.anyio

NBYTES = 200_000
KEYS = [b"k%02d" % number for number in range(12)]
VALUES = {key: key * (NBYTES // len(key)) for key in KEYS}


def lease(*keys: bytes) -> bytes:
    return request("KV.LEASE", str(len(keys)), *keys)


async def ask(cold: Cold, *commands: tuple[Any, ...]) -> list[FakeWire]:
    """Send each from a connection of its own, and let what can begin do so."""
    wires = [FakeWire(cold.server) for _ in commands]
    for wire, command in zip(wires, commands, strict=True):
        wire.feed(request(*command))
    await anyio.sleep(0.05)
    await settle()
    return wires


@pytest.mark.parametrize("command", ["GET", "MGET", "KV.GET", "KV.MGET", "KV.LEASE", "GETDEL"])
async def test_a_command_without_arguments_behind_one_that_waits_is_answered(command: str) -> None:
    async with cold_server(shm="ro") as cold:
        await cold.put({b"a": b"A"})
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("GET", "a"), (command,), ("PING",)]))
        value, error, pong = await replies(wire, 3)
        assert (value, pong) == (b"A", b"PONG")
        assert error_of(error).startswith("ERR wrong number of arguments")


async def test_readers_of_several_values_begin_one_after_the_other_and_all_get_theirs() -> None:
    async with cold_server() as cold:
        await cold.put(VALUES)
        cold.tier.reads.shut()
        pairs = [KEYS[number : number + 2] for number in range(0, 12, 2)]
        wires = await ask(cold, *(("MGET", *pair) for pair in pairs))
        assert sorted(cold.tier.reads.waiting) == KEYS[:4]  # a quarter of 4 MiB
        cold.tier.reads.open()
        for wire, pair in zip(wires, pairs, strict=True):
            assert await replies(wire, 1) == [[VALUES[key] for key in pair]]
        assert cold.server.budget.held == 0


async def test_one_value_does_not_stand_behind_those_who_need_several() -> None:
    async with cold_server() as cold:
        await cold.put(VALUES)
        cold.tier.reads.shut()
        *_, last = await ask(
            cold, ("MGET", *KEYS[:2]), ("MGET", *KEYS[2:4]), ("MGET", *KEYS[4:6]), ("GET", "k11")
        )
        cold.tier.reads.let(b"k11")
        assert await replies(last, 1) == [VALUES[b"k11"]]
        cold.tier.reads.open()


async def test_a_lease_of_most_of_memory_waits_for_others_and_others_for_it() -> None:
    async with cold_server(shm="ro") as cold:
        await cold.put(VALUES)
        cold.tier.reads.shut()
        first, large, last = await ask(
            cold, ("MGET", *KEYS[:2]), ("KV.LEASE", "10", *KEYS[:10]), ("MGET", *KEYS[10:])
        )
        assert sorted(cold.tier.reads.waiting) == KEYS[:2]
        cold.tier.reads.let(KEYS[0])
        cold.tier.reads.let(KEYS[1])
        assert len((await replies(first, 1))[0]) == 2
        await settle()
        assert not {b"k10", b"k11"} & set(cold.tier.reads.waiting)
        cold.tier.reads.open()
        number, *places = (await replies(large, 1))[0]
        assert number > 0
        assert None not in places
        assert await replies(last, 1) == [[VALUES[b"k10"], VALUES[b"k11"]]]
        large.lose()


async def test_who_leaves_the_line_lets_the_next_in() -> None:
    async with cold_server(shm="ro") as cold:
        await cold.put(VALUES)
        cold.tier.reads.shut()
        first, large, last = await ask(
            cold, ("MGET", *KEYS[:2]), ("KV.LEASE", "10", *KEYS[:10]), ("MGET", *KEYS[10:])
        )
        large.lose()
        await anyio.sleep(0.05)
        await settle()
        assert sorted(cold.tier.reads.waiting) == [*KEYS[:2], *KEYS[10:]]
        first.lose()
        cold.tier.reads.open()
        assert len((await replies(last, 1))[0]) == 2


async def test_a_lease_of_more_than_memory_is_refused_at_once() -> None:
    async with cold_server(shm="ro") as cold:
        values = {b"v%02d" % number: b"v" * NBYTES for number in range(30)}
        await cold.put(dict(list(values.items())[:15]))
        await cold.put(dict(list(values.items())[15:]))
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(lease(*values))
        (error,) = parsed(wire.drain())
        assert error_of(error).startswith("OOM 30 values of 6000000 bytes together never fit")
        assert cold.tier.reads.waiting == []
        wire.feed(lease(*[b"v00"] * 30))  # one page
        cold.tier.reads.open()
        assert None not in (await replies(wire, 1))[0]
        wire.lose()


async def test_a_lease_that_finds_no_room_is_an_error_and_null_means_absent() -> None:
    async with cold_server(shm="ro", reserve_timeout=20) as cold:
        await cold.put({b"a": VALUES[b"k00"], b"b": VALUES[b"k01"]})
        taken = [cold.cache.reserve(300_000) for _ in range(12)]
        wire = FakeWire(cold.server)
        wire.feed(lease(b"a", b"none", b"b"))
        (error,) = await replies(wire, 1)
        assert error_of(error).startswith("OOM ")
        for landing in taken:
            cold.cache.abandon(landing)
        wire.feed(lease(b"a", b"none", b"b"))
        _, *places = (await replies(wire, 1))[0]
        assert [place is None for place in places] == [False, True, False]
        wire.lose()


async def test_a_lease_of_a_page_that_cannot_be_read_is_an_error() -> None:
    async with cold_server(shm="ro") as cold:
        await cold.put({b"a": VALUES[b"k00"], b"b": VALUES[b"k01"]})
        cold.tier.reads.errors[b"a"] = "EIO"
        wire = FakeWire(cold.server)
        wire.feed(lease(b"a", b"b"))
        (error,) = await replies(wire, 1)
        assert error_of(error).startswith("KVTIER ")


async def test_a_namespace_is_gone_when_files_know_it_for_good() -> None:
    key = b"ns:" + b"0" * 64
    async with cold_server() as cold:
        wire = FakeWire(cold.server)
        shape = ("LAYERS", 1, "HEADS", 1, "DIM", 2, "TOKENS", 1, "DTYPE", "int8")
        wire.feed(pipeline([("KV.SCHEMA", "SET", "ns", *shape), ("KV.PUT", key, b"page")]))
        assert await replies(wire, 2) == [b"OK", b"OK"]
        await cold.chill()
        cold.tier.notes.shut()
        wire.feed(request("KV.SCHEMA", "DEL", "ns"))
        await anyio.sleep(0.05)
        assert wire.drain() == b""
        assert cold.cache.namespaces.find(b"ns") is not None
        cold.tier.notes.open()
        assert await replies(wire, 1) == [1]
        assert Level.DURABLE in cold.tier.settled  # the schema is gone for good, too


async def test_settings_of_the_tiers_change_while_the_server_runs() -> None:
    async with cold_server() as cold:
        mover, wire = cold.server.mover, FakeWire(cold.server)
        assert mover is not None
        settings = ("durability", "written", "promote", "first", "dirty-high", "30", "dirty-low")
        wire.feed(request("CONFIG", "SET", *settings, "20"))
        assert await replies(wire, 1) == [b"OK"]
        assert cold.cache.default_level.name == "WRITTEN"
        found = mover.settings
        assert (found.promote, found.dirty_high, found.dirty_low) == ("first", 30, 20)
        wire.feed(request("CONFIG", "SET", "dirty-low", "31"))
        assert error_of((await replies(wire, 1))[0]).startswith("ERR CONFIG SET failed")
        cold.tier.writes.shut()
        wire.feed(request("SET", "a", "A"))
        await settle()
        assert wire.drain() == b""
        cold.tier.writes.open()
        assert await replies(wire, 1) == [b"OK"]
        wire.feed(request("CONFIG", "SET", "maxmemory", "3mb"))
        assert await replies(wire, 1) == [b"OK"]
        assert cold.server.budget.total_max == 1 << 19


def test_the_line_is_first_come_first_served_and_the_first_may_always() -> None:
    budget = Budget(1 << 30, 400)
    places = [budget.line_up(nbytes) for nbytes in (60, 40, 900, 10, 20)]

    def who() -> list[int]:
        return [number for number, place in enumerate(places) if place.is_in]

    assert who() == [0, 1]
    places[0].leave()
    assert who() == [1]
    places[1].leave()
    assert who() == [2]
    places[3].leave()
    places[2].leave()
    places[2].leave()
    assert who() == [4]
    places[4].leave()
    assert budget.held == 0
    assert isinstance(places[0], Place)
