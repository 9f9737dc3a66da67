"""Commands on values that are in files alone: they wait, keep their order, and hold nothing."""

import random
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.fakes import FakeWire, ManualClock
from tests.server.cold import MIB, Cold, cold_server, parsed, replies, settle
from tests.server.raw import pipeline, request

pytestmark = pytest.mark.anyio

LARGE = 300_000
VALUES = {b"k%d" % number: bytes([number]) * LARGE for number in range(8)}


async def test_pipelined_gets_overlap_on_the_device_and_keep_their_order() -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A", b"b": b"B" * 1000, b"c": b"C" * 20_000})
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        commands = [("GET", "a"), ("PING",), ("GET", "b"), ("SET", "x", "1"), ("GET", "c")]
        wire.feed(pipeline([*commands, ("GET", "none"), ("EXISTS", "a", "b", "x")]))
        await settle()
        assert sorted(cold.tier.reads.waiting) == [b"a", b"b", b"c"]
        cold.tier.reads.let(b"c")
        cold.tier.reads.let(b"b")
        await settle()
        assert wire.drain() == b""
        assert not wire.session.wants_input
        cold.tier.reads.let(b"a")
        found = await replies(wire, 7)
        assert found == [b"A", b"PONG", b"B" * 1000, b"OK", b"C" * 20_000, None, 3]
        assert sorted(cold.tier.reads.passed) == [b"a", b"b", b"c"]
        await cold.check()
        assert cold.is_cold(b"a")


async def test_others_are_served_while_one_waits() -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A"})
        cold.tier.reads.shut()
        waiting, other = FakeWire(cold.server), FakeWire(cold.server)
        waiting.feed(request("GET", "a"))
        other.feed(pipeline([("SET", "b", "B"), ("GET", "b"), ("STRLEN", "a"), ("TYPE", "a")]))
        assert parsed(other.drain()) == [b"OK", b"B", 1, b"string"]
        cold.tier.reads.open()
        assert await replies(waiting, 1) == [b"A"]


async def test_two_who_want_the_same_value_share_one_read() -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A" * LARGE})
        cold.tier.reads.shut()
        wires = [FakeWire(cold.server) for _ in range(3)]
        for wire in wires:
            wire.feed(request("GET", "a"))
        await settle()
        assert cold.tier.reads.waiting == [b"a"]
        cold.tier.reads.open()
        for wire in wires:
            assert await replies(wire, 1) == [b"A" * LARGE]


@pytest.mark.parametrize("nbytes", [5, 2000, LARGE])
@pytest.mark.parametrize(
    ("command", "answer", "left"),
    [
        (lambda new: ("GETSET", "k", new), "old", "new"),
        (lambda new: ("SET", "k", new, "GET"), "old", "new"),
        (lambda new: ("SET", "k", new, "XX", "get"), "old", "new"),
        (lambda new: ("SET", "k", new, "NX", "GET"), "old", "old"),
        (lambda new: ("GETDEL", "k"), "old", None),
        (lambda new: ("GETEX", "k", "PERSIST"), "old", "old"),
        (lambda new: ("GETEX", "k", "EX", "100"), "old", "old"),
        (lambda new: ("MGET", "k"), ["old"], "old"),
        (lambda new: ("KV.GET", "k"), "old", "old"),
        (lambda new: ("KV.MGET", "2", "k", "no"), ["old", None], "old"),
        (lambda new: ("SET", "k", new), b"OK", "new"),
        (lambda new: ("KV.PUT", "k", new), b"OK", "new"),
    ],
)
async def test_a_command_does_to_a_cold_value_what_it_does_to_any(
    command: Callable[[bytes], tuple[str | bytes, ...]], answer: Any, left: str | None, nbytes: int
) -> None:
    values: dict[Any, Any] = {"old": b"o" * nbytes, "new": b"n" * nbytes, None: None}
    async with cold_server() as cold:
        await cold.put({b"k": values["old"]})
        wire = FakeWire(cold.server)
        wire.feed(pipeline([command(values["new"]), ("GET", "k"), ("GETDEL", "k"), ("GET", "k")]))
        expected = [values.get(each, each) for each in answer] if isinstance(answer, list) else None
        found = await replies(wire, 4)
        assert found[0] == (expected or values.get(answer, answer))
        assert found[1:] == [values[left], values[left], None]


async def test_a_value_that_was_overwritten_or_deleted_while_it_was_read_is_not_served() -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"old" * 1000, b"b": b"old" * 1000, b"c": b"old"})
        cold.tier.reads.shut()
        reader, writer = FakeWire(cold.server), FakeWire(cold.server)
        reader.feed(pipeline([("GET", "a"), ("GET", "b"), ("GET", "c")]))
        await settle()
        writer.feed(pipeline([("SET", "a", "new"), ("DEL", "b"), ("SET", "c", b"n" * 2000)]))
        cold.tier.reads.open()
        assert await replies(reader, 3) == [b"new", None, b"n" * 2000]


@pytest.mark.parametrize("nbytes", [5, 2000, LARGE])
@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (("GET", "k"), None),
        (("KV.GET", "k"), None),
        (("GETDEL", "k"), None),
        (("GETEX", "k", "PERSIST"), None),
        (("GETSET", "k", "new"), None),
        (("MGET", "k", "k"), [None, None]),
        (("KV.MGET", 2, "k", "k"), [None, None]),
    ],
    ids=lambda case: case[0] if isinstance(case, tuple) else "",
)
async def test_a_value_whose_time_ended_while_it_was_read_is_not_served(
    command: tuple[Any, ...], answer: Any, nbytes: int
) -> None:
    clock = ManualClock()
    async with cold_server(clock=clock) as cold:
        await cold.put({b"k": b"A" * nbytes})
        cold.cache.expire_at(cold.cache.entries[b"k"], clock.wall_ms + 1000)
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(request(*command))
        await settle()
        assert cold.tier.reads.waiting == [b"k"]
        clock.advance(1.0)
        cold.tier.reads.open()
        assert await replies(wire, 1) == [answer]


async def test_a_flush_while_values_are_read_leaves_nothing_to_serve() -> None:
    async with cold_server() as cold:
        await cold.put(VALUES)
        cold.tier.reads.shut()
        reader, writer = FakeWire(cold.server), FakeWire(cold.server)
        reader.feed(pipeline([("GET", key) for key in VALUES]))
        await settle()
        writer.feed(request("FLUSHALL"))
        assert await replies(writer, 1) == [b"OK"]
        assert cold.tier.num_clears == 1
        cold.tier.reads.open()
        assert await replies(reader, 8) == [None] * 8


# -- failures ---------------------------------------------------------------------------------------


async def test_a_corrupt_copy_is_gone_for_everybody() -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A", b"b": b"B"})
        cold.tier.corrupt |= {b"a", b"b"}
        wire = FakeWire(cold.server)
        commands = [("GET", "a"), ("EXISTS", "a"), ("GETSET", "b", "new"), ("GET", "b")]
        wire.feed(pipeline([*commands, ("KV.EXPLAIN", "a")]))
        *found, explained = await replies(wire, 5)
        assert found == [None, 0, None, b"new"]
        assert explained[0] == b"corrupt"


async def test_a_copy_that_cannot_be_read_now_is_a_miss_and_no_change_is_made_without_it() -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A", b"b": b"B"})
        cold.tier.reads.errors[b"a"] = "EIO"
        wire = FakeWire(cold.server)
        commands = [("GET", "a"), ("GET", "b"), ("GETSET", "a", "new"), ("SET", "a", "x", "GET")]
        wire.feed(pipeline([*commands, ("GETDEL", "a"), ("MGET", "b", "a"), ("STRLEN", "a")]))
        found = await replies(wire, 7)
        assert found[:2] == [None, b"B"]
        assert [str(each)[:7] for each in found[2:5]] == ["KVTIER "] * 3
        assert found[5:] == [[b"B", None], 1]
        del cold.tier.reads.errors[b"a"]
        wire.feed(request("GETSET", "a", "new"))
        assert await replies(wire, 1) == [b"A"]


async def test_without_room_readers_see_a_miss_and_writers_an_error_and_the_value_stays() -> None:
    async with cold_server(reserve_timeout=20) as cold:
        await cold.put({b"a": b"A" * LARGE})
        taken = [cold.cache.reserve(LARGE) for _ in range(12)]
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("GET", "a"), ("GETSET", "a", "new"), ("MGET", "a"), ("STRLEN", "a")]))
        missed, refused, listed, length = await replies(wire, 4)
        assert (missed, listed, length) == (None, [None], LARGE)
        assert str(refused).startswith("OOM ")
        for landing in taken:
            cold.cache.abandon(landing)
        wire.feed(request("GET", "a"))
        assert await replies(wire, 1) == [b"A" * LARGE]


# -- deadlines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ms", ["0", "20"])
@pytest.mark.parametrize("command", [("KV.GET", "a"), ("KV.MGET", "1", "a")])
async def test_what_is_late_is_null_and_there_for_the_next(
    command: tuple[str, ...], ms: str
) -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A" * LARGE})
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(pipeline([(*command, "DEADLINE", ms), ("PING",)]))
        late, pong = await replies(wire, 2)
        assert (late, pong) in ((None, b"PONG"), ([None], b"PONG"))
        cold.tier.reads.open()
        await settle()
        await cold.check()
        assert not cold.is_cold(b"a")
        wire.feed(request(*command, "DEADLINE", "0"))
        assert parsed(wire.drain()) in ([b"A" * LARGE], [[b"A" * LARGE]])
        assert cold.tier.reads.passed == [b"a"]


async def test_a_deadline_of_many_answers_those_in_time_in_their_places() -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A", b"b": b"B", b"c": b"C"})
        cold.cache.put(b"hot", b"H")
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(request("KV.MGET", "5", "hot", "a", "b", "no", "c", "DEADLINE", "1000"))
        await settle()
        cold.tier.reads.let(b"c")
        cold.tier.reads.let(b"a")
        assert await replies(wire, 1) == [[b"H", b"A", None, None, b"C"]]


@pytest.mark.parametrize("words", [("DEADLINE",), ("DEADLINE", "x"), ("DEADLINE", "-1"), ("DEAD",)])
async def test_a_wrong_deadline_is_refused_at_once(words: tuple[str, ...]) -> None:
    async with cold_server() as cold:
        await cold.put({b"a": b"A"})
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("KV.GET", "a", *words), ("KV.MGET", "1", "a", *words)]))
        errors = parsed(wire.drain())
        assert [str(error)[:4] for error in errors] == ["ERR ", "ERR "]


# -- streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["MGET", "KV.MGET"])
async def test_more_than_memory_holds_is_streamed_through_a_window(command: str) -> None:
    values = {b"k%d" % number: bytes([number]) * LARGE for number in range(40)}
    async with cold_server(move_bytes_max=2 * MIB) as cold:
        for key, value in values.items():
            await cold.put({key: value})
        wire = FakeWire(cold.server, room=100)
        count = () if command == "MGET" else (len(values),)
        wire.feed(request(command, *count, *values))
        received = bytearray()
        with anyio.fail_after(60):
            while not parsed(received):
                await settle()
                held = cold.cache.slabs.payload_bytes
                # A window, what has left its window and not the socket, and one on its way there.
                assert held <= MIB // 2 + MIB + 3 * LARGE, held
                received += wire.drain(room=250_000)
        assert parsed(received) == [list(values.values())]


async def test_a_stream_that_nobody_reads_stands_and_is_given_back_when_its_reader_leaves() -> None:
    async with cold_server(move_bytes_max=2 * MIB) as cold:
        for key, value in VALUES.items():
            await cold.put({key: value})
        wire = FakeWire(cold.server, room=10)
        wire.feed(pipeline([("KV.MGET", 16, *VALUES, *VALUES), ("GET", "k1")]))
        with anyio.fail_after(60):
            while not wire.session.is_draining:  # noqa: ASYNC110
                await anyio.sleep(0.002)
        await anyio.sleep(0.05)
        await settle()
        num_reads = len(cold.tier.reads.passed)
        await anyio.sleep(0.05)
        assert len(cold.tier.reads.passed) == num_reads < 12
        wire.lose()
        await settle()
        await cold.check()
        assert cold.cache.slabs.payload_bytes == 0


@pytest.mark.parametrize("command", [("KV.MGET", 8, *VALUES), ("MGET", *VALUES), ("GET", "k0")])
async def test_a_reader_that_leaves_while_it_waits_for_the_device_leaves_nothing_behind(
    command: tuple[Any, ...],
) -> None:
    async with cold_server() as cold:
        await cold.put(VALUES)
        cold.tier.reads.shut()
        wire = FakeWire(cold.server)
        wire.feed(pipeline([command, *[("GET", key) for key in VALUES]]))
        await settle()
        assert cold.tier.reads.waiting
        wire.lose()
        await settle()
        assert cold.server.budget.used == 0
        cold.tier.reads.open()
        await settle()
        await cold.check()
        assert all(cold.is_cold(key) for key in VALUES)


async def test_pages_of_a_stream_that_change_meanwhile_are_sent_as_they_are_then() -> None:
    async with cold_server(move_bytes_max=2 * MIB) as cold:
        await cold.put(VALUES)
        cold.tier.reads.shut()
        reader, writer = FakeWire(cold.server), FakeWire(cold.server)
        reader.feed(request("KV.MGET", 8, *VALUES))
        await settle()
        writer.feed(pipeline([("SET", "k0", "new"), ("DEL", "k1", "k7"), ("SET", "k6", "new")]))
        cold.tier.reads.open()
        (found,) = await replies(reader, 1)
        expected = [b"new", None, *list(VALUES.values())[2:6], b"new", None]
        assert found == expected


# -- reading ahead ----------------------------------------------------------------------------------


async def test_only_so_much_is_read_ahead() -> None:
    async with cold_server() as cold:
        for number in range(100):
            cold.cache.put(b"small%d" % number, b"v" * 100)
        await cold.put(VALUES)
        await cold.chill()
        cold.tier.reads.shut()
        large, small = FakeWire(cold.server), FakeWire(cold.server)
        large.feed(pipeline([("GET", key) for key in VALUES]))
        await cold.tier.reads.has_waiting(2)
        await anyio.sleep(0.05)
        assert sorted(cold.tier.reads.waiting) == [b"k0", b"k1"]  # in front, and an eighth of 4 MiB
        small.feed(pipeline([("GET", b"small%d" % number) for number in range(100)]))
        await cold.tier.reads.has_waiting(2 + 64)
        await anyio.sleep(0.05)
        assert len(cold.tier.reads.waiting) == 2 + 64
        cold.tier.reads.open()
        assert await replies(large, 8) == list(VALUES.values())
        assert await replies(small, 100) == [b"v" * 100] * 100


async def test_what_was_read_ahead_for_a_reader_that_stalls_is_given_back() -> None:
    async with cold_server() as cold:
        await cold.put(VALUES)
        wire = FakeWire(cold.server, room=10)
        wire.feed(pipeline([("GET", key) for key in VALUES]))
        with anyio.fail_after(60):
            while not wire.session.is_draining:  # noqa: ASYNC110
                await anyio.sleep(0.002)
        await anyio.sleep(0.05)
        assert cold.server.budget.used > 0
        wire.session.stop_reading_ahead()
        assert cold.server.budget.used == 0
        received = bytearray()
        with anyio.fail_after(60):
            while len(parsed(received)) < 8:
                received += wire.drain(room=200_000)
                await settle()
        assert parsed(received) == list(VALUES.values())


# -- silence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("GET", "k0"), ("KV.MGET", 8, *VALUES), ("MGET", *VALUES)])
async def test_skip_and_off_silence_commands_that_wait(command: tuple[Any, ...]) -> None:
    async with cold_server(move_bytes_max=2 * MIB) as cold:
        await cold.put(VALUES)
        wire = FakeWire(cold.server)
        skip, off, on = (("CLIENT", "REPLY", word) for word in ("SKIP", "OFF", "ON"))
        wire.feed(pipeline([skip, command, ("PING",), off, command, command, on, command]))
        *first, last = await replies(wire, 3)
        assert first == [b"PONG", b"OK"]
        assert last in (VALUES[b"k0"], list(VALUES.values()))


# -- as if there were no files ----------------------------------------------------------------------


def random_commands(rng: random.Random, keys: list[bytes], count: int) -> list[tuple[Any, ...]]:
    def key() -> bytes:
        return rng.choice(keys)

    def value() -> bytes:
        return rng.randbytes(rng.choice([0, 3, 400, 449, 5000, 70_000, 200_000]))

    makers: list[Callable[[], tuple[Any, ...]]] = [
        lambda: ("SET", key(), value()),
        lambda: ("GET", key()),
        lambda: ("GET", key()),
        lambda: ("MGET", *(key() for _ in range(rng.randint(1, 6)))),
        lambda: ("KV.MGET", 3, key(), key(), key()),
        lambda: ("GETSET", key(), value()),
        lambda: ("SET", key(), value(), "GET", rng.choice(["NX", "XX", "KEEPTTL"])),
        lambda: ("GETDEL", key()),
        lambda: ("GETEX", key(), "EX", 100),
        lambda: ("KV.GET", key()),
        lambda: ("STRLEN", key()),
        lambda: ("DEL", key()),
        lambda: ("EXISTS", key(), key()),
        lambda: ("CLIENT", "REPLY", "SKIP"),
        lambda: ("MSET", key(), value(), key(), value()),
    ]
    return [rng.choice(makers)() for _ in range(count)]


async def answers(cold: Cold, commands: list[tuple[Any, ...]], rng: random.Random | None) -> bytes:
    """Return what commands are answered; with a source of chance, after values were made cold."""
    wire = FakeWire(cold.server)
    received = bytearray()
    for start in range(0, len(commands), 8):
        if rng is not None:
            await cold.chill()
        # What a SKIP at the end of the group silences is the PING.
        data = pipeline([*commands[start : start + 8], ("PING",), ("ECHO", b"%d" % start)])
        position, end = 0, b"%d\r\n" % start
        with anyio.fail_after(60):
            while position < len(data) or not received.endswith(end):
                position += wire.feed(data[position : position + 300_000], cuts=rng)
                received += wire.drain(rng.randint(1, 500_000) if rng else 1 << 60)
                await settle()
    wire.lose()
    return bytes(received)


@pytest.mark.parametrize("seed", range(12))
async def test_a_pipeline_is_answered_as_if_all_were_in_memory(seed: int) -> None:
    rng = random.Random(seed)
    commands = random_commands(rng, [b"k%d" % number for number in range(8)], 200)
    async with cold_server() as cold:
        expected = await answers(cold, commands, None)
    async with cold_server() as cold:
        assert await answers(cold, commands, rng) == expected
        assert len(cold.tier.reads.passed) > 50
