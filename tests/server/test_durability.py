"""Replies that promise more than memory can keep: they leave when it is true, or say that it is not."""

from typing import Any

import anyio
import pytest

from tests.fakes import FakeWire, ManualClock
from tests.server.cold import cold_server, parsed, replies, settle
from tests.server.raw import pipeline, request

pytestmark = pytest.mark.anyio

LARGE = 300_000
ID = b"ns:" + b"ab" * 32


async def test_a_durable_put_is_answered_when_it_is_written_and_all_before_it_with_it() -> None:
    async with cold_server() as cold:
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("SET", "a", "1"), ("KV.PUT", "k", "page", "DURABLE"), ("GET", "k")]))
        await settle()
        assert wire.drain() == b""
        assert cold.tier.writes.waiting == [b"k"]
        cold.tier.writes.open()
        assert await replies(wire, 3) == [b"OK", b"OK", b"page"]


async def test_the_puts_of_a_pipeline_share_a_commit_and_reads_among_them_run_on() -> None:
    async with cold_server() as cold:
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        puts = [("KV.PUT", b"k%d" % number, b"v" * 3000, "WRITTEN") for number in range(200)]
        wire.feed(pipeline([puts[0]]))
        await settle()
        wire.feed(pipeline([*puts[1:], ("GET", "k7"), ("DBSIZE",)]))
        await settle()
        assert wire.session.wants_input
        assert len(cold.cache.entries) == 200
        cold.tier.writes.open()
        assert await replies(wire, 202) == [b"OK"] * 200 + [b"v" * 3000, 200]
        assert len(cold.tier.batches) <= 4


async def test_a_read_behind_a_promise_says_what_was_so_when_it_ran() -> None:
    clock = ManualClock()
    async with cold_server(clock=clock) as cold:
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        commands = [("SET", "t", "1", "PX", "1000"), ("KV.PUT", "k", "page", "DURABLE")]
        wire.feed(pipeline([*commands, ("GET", "t")]))
        await settle()
        clock.advance(2.0)
        wire.feed(pipeline([("GET", "t")]))
        cold.tier.writes.open()
        assert await replies(wire, 4) == [b"OK", b"OK", b"1", None]


async def test_only_the_reply_of_the_put_that_failed_becomes_an_error() -> None:
    async with cold_server() as cold:
        cold.tier.writes.errors[b"bad"] = "EIO"
        wire, other = FakeWire(cold.server), FakeWire(cold.server)
        commands = [
            ("SET", "a", "1"),
            ("KV.PUT", "good", "x", "DURABLE"),
            ("GET", "a"),
            ("KV.PUT", "bad", "x", "DURABLE"),
            ("KV.PUT", "good2", "x", "WRITTEN"),
            ("MGET", "a", "bad"),
        ]
        wire.feed(pipeline(commands))
        other.feed(request("KV.PUT", "other", "x", "DURABLE"))
        found = await replies(wire, 6)
        assert found[:3] == [b"OK", b"OK", b"1"]
        assert str(found[3]).startswith("KVTIER ")
        assert found[4:] == [b"OK", [b"1", b"x"]]
        assert await replies(other, 1) == [b"OK"]
        assert cold.server.num_errors == 1


async def test_the_answer_of_a_large_value_is_replaced_whole() -> None:
    async with cold_server() as cold:
        wire = FakeWire(cold.server)
        cold.cache.default_level = cold.cache.default_level.__class__.DURABLE
        wire.feed(request("SET", "k", b"v" * LARGE))
        assert await replies(wire, 1) == [b"OK"]
        cold.tier.writes.errors[b"k"] = "EIO"
        wire.feed(pipeline([("PING",), ("GETSET", "k", b"w" * LARGE), ("STRLEN", "k")]))
        pong, error, length = await replies(wire, 3)
        assert (pong, length) == (b"PONG", LARGE)
        assert str(error).startswith("KVTIER ")


async def test_others_are_served_while_a_put_waits() -> None:
    async with cold_server() as cold:
        cold.tier.writes.shut()
        wire, other = FakeWire(cold.server), FakeWire(cold.server)
        wire.feed(request("KV.PUT", "k", "x", "DURABLE"))
        other.feed(pipeline([("SET", "a", "1"), ("GET", "k")]))
        assert parsed(other.drain()) == [b"OK", b"x"]


async def test_the_levels_of_a_namespace_and_of_the_server_make_puts_wait() -> None:
    async with cold_server() as cold:
        level = cold.cache.default_level.__class__
        wire = FakeWire(cold.server)
        shape = ("LAYERS", 1, "HEADS", 1, "DIM", 1, "TOKENS", 1, "DTYPE", "int8")
        wire.feed(request("KV.SCHEMA", "SET", "ns", *shape, "DURABILITY", "written"))
        assert await replies(wire, 1) == [b"OK"]
        cold.tier.writes.shut()
        wire.feed(request("KV.PUT", ID, b"xx"))
        await settle()
        assert cold.tier.writes.waiting == [ID]
        cold.tier.writes.open()
        assert await replies(wire, 1) == [b"OK"]
        cold.cache.default_level = level.DURABLE
        cold.tier.writes.shut()
        wire.feed(request("SET", "plain", "x"))
        await settle()
        assert cold.tier.writes.waiting == [b"plain"]
        cold.tier.writes.open()
        assert await replies(wire, 1) == [b"OK"]


async def test_a_page_that_is_there_is_written_when_a_put_asks_for_more() -> None:
    async with cold_server() as cold:
        wire = FakeWire(cold.server)
        wire.feed(request("KV.PUT", ID, b"page"))
        assert await replies(wire, 1) == [b"OK"]
        cold.tier.writes.shut()
        wire.feed(request("KV.PUT", ID, b"page", "DURABLE"))
        await settle()
        assert wire.drain() == b""
        cold.tier.writes.open()
        assert await replies(wire, 1) == [b"OK"]


async def test_deleting_what_a_file_would_bring_back_waits_for_the_file_to_know() -> None:
    async with cold_server() as cold:
        wire = FakeWire(cold.server)
        wire.feed(request("KV.PUT", "k", "x", "DURABLE"))
        assert await replies(wire, 1) == [b"OK"]
        cold.tier.notes.shut()
        wire.feed(pipeline([("PING",), ("DEL", "k"), ("GET", "k")]))
        await settle()
        assert wire.drain() == b""
        cold.tier.notes.open()
        assert await replies(wire, 3) == [b"PONG", 1, None]


async def test_a_ttl_on_a_durable_value_waits_too() -> None:
    async with cold_server() as cold:
        wire = FakeWire(cold.server)
        wire.feed(request("KV.PUT", "k", "x", "DURABLE"))
        assert await replies(wire, 1) == [b"OK"]
        for command in (("EXPIRE", "k", "100"), ("PERSIST", "k"), ("KV.PIN", "k", "1000")):
            cold.tier.notes.shut()
            wire.feed(request(*command))
            await settle()
            assert wire.drain() == b"", command
            cold.tier.notes.open()
            assert await replies(wire, 1) == [1]


@pytest.mark.parametrize("nbytes", [3000, 2_000_000])
async def test_a_durable_commit_is_answered_when_it_is_written(nbytes: int) -> None:
    async with cold_server(shm="rw") as cold:
        wire = FakeWire(cold.server)
        wire.feed(request("KV.RESERVE", "k", nbytes))
        ((lease, _),) = await replies(wire, 1)
        cold.tier.writes.shut()
        wire.feed(pipeline([("KV.COMMIT", lease, "DURABLE"), ("STRLEN", "k")]))
        await cold.tier.writes.has_waiting(1)
        await anyio.sleep(0.05)
        assert wire.drain() == b""
        assert cold.tier.writes.waiting == [b"k"]
        cold.tier.writes.open()
        assert await replies(wire, 2) == [b"OK", nbytes]


# -- silence, leaving, backpressure -------------------------------------------------------------------


async def test_a_failed_put_that_was_silenced_spoils_no_other_answer() -> None:
    async with cold_server() as cold:
        cold.tier.writes.errors |= {b"x": "EIO", b"y": "EIO", b"z": "EIO"}
        skip, off, on = (("CLIENT", "REPLY", word) for word in ("SKIP", "OFF", "ON"))

        def put(key: str) -> tuple[str, ...]:
            return ("KV.PUT", key, "page", "DURABLE")

        wire = FakeWire(cold.server)
        wire.feed(
            pipeline(
                [("PING",), skip, put("x"), ("ECHO", "1"), off, put("y"), ("PING",), on, put("z")]
            )
        )
        *found, error = await replies(wire, 4)
        assert found == [b"PONG", b"1", b"OK"]
        assert str(error).startswith("KVTIER ")


async def test_a_client_that_leaves_before_its_answer_leaves_nothing_behind() -> None:
    async with cold_server() as cold:
        cold.cache.put(b"large", b"v" * LARGE)
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("KV.PUT", "k", "x", "DURABLE"), ("GET", "large")]))
        await settle()
        wire.lose()
        cold.tier.writes.open()
        await settle()
        await cold.check()
        assert b"k" in cold.cache.entries


async def test_quit_closes_when_the_answers_before_it_have_left() -> None:
    async with cold_server() as cold:
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("KV.PUT", "k", "x", "DURABLE"), ("QUIT",)]))
        await settle()
        wire.wake()
        assert not wire.is_closed
        assert wire.session.is_busy
        cold.tier.writes.open()
        assert await replies(wire, 2) == [b"OK", b"OK"]
        assert wire.is_closed


async def test_a_client_that_sends_without_end_is_read_only_up_to_a_bound() -> None:
    async with cold_server() as cold:
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        wire.feed(request("KV.PUT", "k", "x", "DURABLE"))
        pings = pipeline([("PING",)] * 1000)
        count = 0
        while wire.session.wants_input:
            count += wire.feed(pings)
            assert len(wire.session.out) < 40_000
        cold.cache.put(b"large", b"v" * LARGE)
        cold.tier.writes.open()
        num_answers = 1 + count // len(pipeline([("PING",)]))
        assert (await replies(wire, num_answers))[0] == b"OK"
        assert wire.session.wants_input


async def test_large_answers_that_are_held_back_stop_the_commands_behind() -> None:
    async with cold_server() as cold:
        cold.cache.put(b"large", b"v" * LARGE)
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("KV.PUT", "k", "x", "DURABLE"), *[("GET", "large")] * 10]))
        await settle()
        assert len(wire.session.out) < 20
        assert not wire.session.wants_input
        cold.tier.writes.open()
        assert await replies(wire, 11) == [b"OK", *[b"v" * LARGE] * 10]


async def test_answers_leave_though_the_client_goes_on_asking_for_more() -> None:
    async with cold_server() as cold:
        wire = FakeWire(cold.server)
        cold.tier.writes.shut()
        wire.feed(request("KV.PUT", "a", "x", "DURABLE"))
        await settle()
        wire.feed(request("KV.PUT", "b", "x", "DURABLE"))
        cold.tier.writes.let(b"a")
        await settle()
        wire.feed(request("KV.PUT", "c", "x", "DURABLE"))  # behind the second round
        assert cold.tier.writes.waiting == [b"b"]
        cold.tier.writes.let(b"b")
        await settle()
        assert parsed(wire.drain()) == [b"OK", b"OK"]


async def test_a_stream_behind_a_put_that_waits_leaves_with_it() -> None:
    values = {b"k%d" % number: bytes([number]) * LARGE for number in range(8)}
    async with cold_server() as cold:
        await cold.put(values)
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        commands: list[tuple[Any, ...]] = [
            ("KV.PUT", "d", "x", "DURABLE"),
            ("GET", "k1"),
            ("KV.MGET", 8, *values),
            ("KV.PUT", "e", "x", "DURABLE"),
        ]
        wire.feed(pipeline(commands))
        await anyio.sleep(0.05)
        assert wire.drain() == b""
        cold.tier.writes.open()
        assert await replies(wire, 4) == [b"OK", values[b"k1"], list(values.values()), b"OK"]


async def test_a_flush_is_answered_when_the_files_know_it_or_refuse() -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A"})
        cold.tier.notes.shut()
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("SET", "b", "1"), ("FLUSHALL",), ("DBSIZE",)]))
        await settle()
        assert parsed(wire.drain()) == [b"OK"]
        cold.tier.notes.open()
        assert await replies(wire, 2) == [b"OK", 0]
        assert cold.tier.num_clears == 1
        assert not cold.tier.values
        cold.tier.notes.errors[b"clear"] = "EIO"
        wire.feed(pipeline([("SET", "b", "1"), ("FLUSHDB",), ("DBSIZE",)]))
        ok, error, size = await replies(wire, 3)
        assert (ok, size) == (b"OK", 0)
        assert str(error).startswith("KVTIER ")
