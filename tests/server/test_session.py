"""Sessions without sockets: order, backpressure, silence, and that nothing is left behind."""

import logging
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import hiredis
import pytest

import respkv.server.commands  # noqa: F401  (registers the handlers)
from respkv.config import Config
from respkv.engine.clock import Clock
from respkv.server.answers import COPY_BYTES_MAX, OUTPUT_BYTES_SOFT
from respkv.server.registry import HANDLERS, Handler
from respkv.server.session import Session
from respkv.server.state import Server
from respkv.wire.commands import COMMANDS
from tests.fakes import FakeWire, make_server
from tests.server.raw import pipeline, request

pytestmark = pytest.mark.anyio

LARGE = 300_000
KEY = b"ns:" + b"ab" * 32


@contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """Yield a server that has no loop: for sessions in which nothing waits."""
    values = {"maxmemory": 4 << 20, "small_value_memory": 64 << 10, "shm": "rw", **settings}
    with make_server(Config(**values), Clock()) as server:
        yield server
        for session in list(server.sessions.values()):
            session.lost()
        server.cache.check()
        assert not len(server.cache.leases)
        assert server.cache.in_flight() == (0, 0)


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Server]:
    """Yield a server that can let commands wait."""
    with serving(**settings) as server:
        async with anyio.create_task_group() as tasks:
            server.run_in(tasks)
            yield server
            tasks.cancel_scope.cancel()


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


async def answered(wire: FakeWire) -> None:
    """Wait until a session has answered everything it was sent."""
    with anyio.fail_after(60):
        for _ in iter(lambda: wire.session.wants_input, True):
            await anyio.sleep(0.005)


async def feed(wire: FakeWire, data: bytes) -> None:
    """Deliver bytes whenever the session reads."""
    taken = wire.feed(data)
    while taken < len(data):
        await answered(wire)
        taken += wire.feed(data[taken:])
    await answered(wire)


def parsed(data: bytes | bytearray) -> list[Any]:
    reader = hiredis.Reader(notEnoughData=...)
    reader.feed(bytes(data))
    return list(iter(reader.gets, ...))


def ask(wire: FakeWire, *words: str | bytes | int) -> Any:
    """Send a command that is answered at once."""
    data = request(*words)
    assert wire.feed(data) == len(data)
    wire.wake()
    (answer,) = parsed(wire.drain())
    return answer


@contextmanager
def crashing() -> Iterator[None]:
    """Have a command whose handler has a bug."""

    def crash(session: Session, args: list[Any]) -> None:
        raise ZeroDivisionError

    HANDLERS[b"CRASH"] = Handler(crash, 1, 9, COMMANDS["ping"])
    try:
        yield
    finally:
        del HANDLERS[b"CRASH"]


# -- order ------------------------------------------------------------------------------------------


def test_any_cut_of_a_pipeline_gives_the_same_answers() -> None:
    rng = random.Random(1)
    large = rng.randbytes(LARGE)
    commands: list[tuple[str | bytes, ...]] = [
        ("SET", "empty", b""),
        ("SET", "large", large),
        ("MSET", "a", b"1", "large2", large, "a", b"2", "empty2", b""),
        ("MGET", "large", "a", "a", "empty", "absent", "large"),
        ("SETNX", "large", large),
        ("NOSUCH", "x"),
        ("SET", "k", large, "NOSUCH"),
        ("KV.PUT", KEY, large),
        ("KV.PUT", KEY, large),
        ("KV.MGET", "2", KEY, KEY),
        ("GET", "large2"),
        ("STRLEN", "empty2"),
        ("GETDEL", "empty"),
        ("EXISTS", "empty", "large", "large"),
    ]
    data = pipeline(commands)
    answers = []
    for seed in (None, *range(25)):
        with serving() as server:
            wire = FakeWire(server)
            cuts = None if seed is None else random.Random(seed)
            assert wire.feed(data, cuts=cuts) == len(data)
            answers.append(wire.drain())
            assert not server.cache.in_flight()[0]
    assert answers.count(answers[0]) == len(answers)
    found = parsed(answers[0])
    assert len(found) == len(commands)
    assert found[3] == [large, b"2", b"2", b"", None, large]
    assert found[9] == [large, large]
    assert found[10] == large


def test_the_same_key_twice_in_one_mset_keeps_the_last_value_and_no_slot_of_the_first() -> None:
    with serving() as server:
        wire = FakeWire(server)
        words = ("MSET", "k", b"a" * LARGE, "k", b"b" * LARGE)
        assert ask(wire, *words) == b"OK"
        assert ask(wire, "GET", "k") == b"b" * LARGE
        used = server.cache.slabs.payload_bytes
        assert used == LARGE


async def test_answers_keep_their_order_behind_one_that_waits() -> None:
    async with running() as server:
        wire = FakeWire(server)
        data = pipeline([("KEYS", "*"), ("SET", "k", "v"), ("KV.RESERVE", "r", "10"), ("GET", "k")])
        assert wire.feed(data) == len(data)
        assert not wire.session.wants_input
        assert wire.session.is_busy
        await settle()
        assert [type(each) for each in parsed(wire.drain())] == [list, bytes, list, bytes]
        assert wire.session.wants_input
        wire.lose()


# -- backpressure -----------------------------------------------------------------------------------


def test_a_slow_reader_is_served_as_much_as_it_takes_and_then_not_read_any_more() -> None:
    with serving() as server:
        wire = FakeWire(server)
        ask(wire, "SET", "k", b"v" * LARGE)
        wire.drain(room=0)
        data = pipeline([("GET", "k")] * 100 + [("PING",)])
        assert wire.feed(data) == len(data)
        unsent = wire.unsent_bytes()
        assert unsent < OUTPUT_BYTES_SOFT + 2 * LARGE
        assert wire.feed(b"more") == 0, "the session reads on"
        assert server.cache.in_flight() == (0, 1)
        received = bytearray()
        while wire.session.is_draining:
            received += wire.drain(room=100_000)
            assert wire.unsent_bytes() < OUTPUT_BYTES_SOFT + 2 * LARGE
        assert parsed(bytes(received)) == [b"v" * LARGE] * 100 + [b"PONG"]
        assert wire.session.wants_input


def test_what_is_being_sent_stays_as_it_was_whatever_happens_to_its_key() -> None:
    with serving() as server:
        reader, writer = FakeWire(server, room=10), FakeWire(server)
        ask(writer, "MSET", "a", b"a" * LARGE, "b", b"b" * LARGE)
        reader.feed(pipeline([("MGET", "a", "b", "a"), ("GET", "b")]))
        ask(writer, "DEL", "a")
        ask(writer, "SET", "b", b"c" * LARGE)
        ask(writer, "FLUSHALL")
        for number in range(8):
            ask(writer, "SET", b"other%d" % number, b"x" * LARGE)
        first, second = parsed(reader.sent + reader.drain())
        assert first == [b"a" * LARGE, b"b" * LARGE, b"a" * LARGE]
        assert second is None or second == b"b" * LARGE
        assert server.cache.in_flight() == (0, 0)


def test_a_stream_that_is_left_in_the_middle_gives_everything_back() -> None:
    with serving() as server:
        wire = FakeWire(server)
        keys = [b"k%d" % number for number in range(8)]
        for key in keys:
            ask(wire, "SET", key, b"v" * LARGE)
        wire.drain(room=100)
        wire.feed(pipeline([("MGET", *keys), ("GET", "k1"), ("SET", "k1", b"w")]))
        assert server.cache.in_flight() == (0, 8)
        wire.lose()
        server.cache.check()
        assert server.cache.in_flight() == (0, 0)


def test_a_protocol_error_behind_a_large_answer_is_told_once_that_has_left() -> None:
    with serving() as server:
        wire = FakeWire(server)
        ask(wire, "SET", "k", b"v" * 2_000_000)
        wire.drain(room=10)
        wire.feed(request("GET", "k") + b"*1\r\n$x\r\n" + request("SET", "k", "wrong"))
        assert not wire.is_closed
        value, error = parsed(wire.sent + wire.drain())
        assert value == b"v" * 2_000_000
        assert str(error) == "ERR Protocol error: invalid bulk length"
        assert wire.is_closed
        assert server.cache.entries[b"k"].nbytes == 2_000_000


def test_quit_is_the_last_command_that_is_served() -> None:
    with serving() as server:
        wire = FakeWire(server)
        wire.feed(pipeline([("SET", "k", "v"), ("QUIT",), ("DEL", "k")]))
        assert parsed(wire.drain()) == [b"OK", b"OK"]
        assert wire.is_closed
        assert b"k" in server.cache.entries


def test_a_reader_is_stalled_since_the_last_byte_it_took() -> None:
    with serving() as server:
        wire = FakeWire(server)
        ask(wire, "SET", "k", b"v" * LARGE)
        wire.drain(room=10)
        wire.feed(request("GET", "k"))
        assert wire.session.stalled_s(100.0) == 0.0
        assert wire.session.stalled_s(105.0) == 5.0
        wire.drain(room=10)
        assert wire.session.stalled_s(107.0) == 0.0
        wire.drain()
        assert wire.session.stalled_s(200.0) == 0.0


# -- waiting for room -------------------------------------------------------------------------------


async def fill_by_slow_reader(server: Server) -> FakeWire:
    """Have every slot borrowed by a reader that takes nothing."""
    reader = FakeWire(server)
    for number in range(12):
        ask(reader, "SET", b"k%d" % number, b"v" * LARGE)
    reader.drain(room=0)
    reader.feed(request("MGET", *sorted(server.cache.entries)))
    return reader


async def test_a_value_waits_for_room_and_is_stored_when_there_is_some() -> None:
    async with running() as server:
        reader = await fill_by_slow_reader(server)
        writer = FakeWire(server)
        data = pipeline([("SET", "new", b"n" * LARGE), ("GET", "new")])
        taken = writer.feed(data)
        assert taken < len(data), "it read on though there was no room"
        assert not writer.session.wants_input
        reader.drain()
        await feed(writer, data[taken:])
        assert parsed(writer.drain()) == [b"OK", b"n" * LARGE]


async def test_a_value_that_found_no_room_in_time_is_dropped_and_the_next_command_served() -> None:
    async with running(reserve_timeout=30) as server:
        reader = await fill_by_slow_reader(server)
        writer = FakeWire(server)
        data = pipeline([("SET", "new", b"n" * LARGE), ("SET", "small", "v"), ("PING",)])
        await feed(writer, data)
        error, *rest = parsed(writer.drain())
        assert str(error).startswith("OOM ")
        assert rest == [b"OK", b"PONG"]
        reader.lose()


async def test_a_connection_that_is_lost_while_it_waits_for_room_leaves_nothing() -> None:
    async with running() as server:
        reader = await fill_by_slow_reader(server)
        writer = FakeWire(server)
        writer.feed(request("SET", "new", b"n" * LARGE))
        await settle()
        writer.lose()
        reader.lose()
        with anyio.fail_after(60):  # who waits looks now and then whether its connection is there
            while server.cache.in_flight() != (0, 0):  # noqa: ASYNC110
                await anyio.sleep(0.005)
        server.cache.check()


async def test_a_waiting_server_that_is_cancelled_leaves_nothing() -> None:
    async with running() as server:
        reader = await fill_by_slow_reader(server)
        writers = [FakeWire(server) for _ in range(3)]
        for writer in writers:
            writer.feed(request("SET", "new", b"n" * LARGE))
        await settle()
        reserving = FakeWire(server)
        reserving.feed(request("KV.RESERVE", "k", LARGE))
        await settle()
        reader.drain()
        FakeWire(server).feed(request("KV.RESERVE", "k", LARGE))  # it is cancelled before it began


# -- leases -----------------------------------------------------------------------------------------


async def test_a_reservation_whose_connection_is_lost_before_it_began_takes_no_slot() -> None:
    async with running() as server:
        wire = FakeWire(server)
        wire.feed(request("KV.RESERVE", "k", LARGE))
        wire.lose()
        await settle()
        assert not len(server.cache.leases)
        assert server.cache.slabs.used_bytes == 0


async def test_a_commit_whose_connection_is_lost_before_it_began_publishes_nothing() -> None:
    async with running() as server:
        wire = FakeWire(server)
        wire.feed(request("KV.RESERVE", "k", LARGE))
        await settle()
        wire.feed(request("KV.COMMIT", 1))
        wire.lose()
        await settle()
        assert server.cache.slabs.used_bytes == 0
        assert b"k" not in server.cache.entries


@pytest.mark.parametrize("nbytes", [1000, 2_000_000])
async def test_a_reservation_is_held_against_the_schema_of_the_moment_it_is_committed(
    nbytes: int,
) -> None:
    async with running() as server:
        wire = FakeWire(server)
        wire.feed(request("KV.RESERVE", "ns:k", nbytes))
        await settle()
        shape = ("LAYERS", 1, "HEADS", 1, "DIM", 8, "TOKENS", 4, "DTYPE", "int8")
        wire.feed(pipeline([("KV.COMMIT", 1), ("KV.SCHEMA", "SET", "ns", *shape)]))
        if nbytes > 1 << 20:  # its checksum is made in a thread; the schema comes meanwhile
            FakeWire(server).feed(request("KV.SCHEMA", "SET", "ns", *shape))
        await answered(wire)
        answers = parsed(wire.drain())
        if nbytes > 1 << 20:
            assert str(answers[1]).startswith("KVSCHEMA")
            assert server.cache.slabs.used_bytes == 0
        else:
            assert answers[1:] == [b"OK", b"OK"]


@pytest.mark.parametrize("turns", range(6))
async def test_a_commit_that_is_cancelled_at_any_moment_published_its_page_or_gave_it_back(
    turns: int,
) -> None:
    async with running() as server:
        wire = FakeWire(server)
        wire.feed(request("KV.RESERVE", "k", 2_000_000))
        await settle()
        wire.feed(request("KV.COMMIT", 1))
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
    assert server.cache.slabs.payload_bytes == 2_000_000 * len(server.cache.entries)


async def test_a_page_that_was_put_meanwhile_makes_a_commit_nx_answer_null() -> None:
    async with running() as server:
        wire = FakeWire(server)
        wire.feed(request("KV.RESERVE", "k", 2_000_000))
        await settle()
        wire.feed(request("KV.COMMIT", 1, "NX"))
        FakeWire(server).feed(request("KV.PUT", "k", "first"))
        await answered(wire)
        assert parsed(wire.drain())[1] is None
        assert server.cache.copy(server.cache.entries[b"k"]) == b"first"
        assert not len(server.cache.leases)


# -- CLIENT REPLY -------------------------------------------------------------------------------------


def test_skip_drops_one_answer_however_large_and_lets_go_of_its_slot() -> None:
    with serving() as server:
        wire = FakeWire(server)
        ask(wire, "SET", "k", b"v" * 800_000)
        for _ in range(5):
            wire.feed(pipeline([("CLIENT", "REPLY", "SKIP"), ("GET", "k")]))
            assert server.cache.in_flight() == (0, 0)
            assert wire.session.wants_input
        assert wire.drain() == b""
        assert ask(wire, "PING") == b"PONG"


def test_skip_drops_the_whole_of_a_streamed_answer() -> None:
    with serving() as server:
        wire = FakeWire(server)
        ask(wire, "SET", "k", b"v" * 800_000)
        skipped = [("CLIENT", "REPLY", "SKIP"), ("MGET", *["k"] * 5), ("PING",)]
        wire.feed(pipeline(skipped))
        assert parsed(wire.drain()) == [b"PONG"]
        assert server.cache.in_flight() == (0, 0)


async def test_skip_drops_the_answer_of_a_command_that_waits() -> None:
    async with running() as server:
        wire = FakeWire(server)
        words = [("CLIENT", "REPLY", "SKIP"), ("KV.RESERVE", "k", "100"), ("KEYS", "*"), ("PING",)]
        wire.feed(pipeline(words))
        await settle()
        assert parsed(wire.drain()) == [[], b"PONG"]
        assert len(server.cache.leases) == 1


def test_skip_drops_an_error_too() -> None:
    with serving() as server:
        wire = FakeWire(server)
        wire.feed(pipeline([("CLIENT", "REPLY", "SKIP"), ("NOSUCH",), ("PING",)]))
        assert parsed(wire.drain()) == [b"PONG"]


def test_off_is_silent_for_answers_of_any_size_until_on() -> None:
    with serving() as server:
        wire = FakeWire(server)
        ask(wire, "SET", "k", b"v" * 800_000)
        off = [("PING",), ("CLIENT", "REPLY", "OFF"), ("GET", "k"), ("MGET", *["k"] * 5), ("PING",)]
        wire.feed(pipeline(off))
        wire.feed(pipeline([("GET", "k"), ("NOSUCH",)]))
        assert parsed(wire.drain()) == [b"PONG"]
        assert server.cache.in_flight() == (0, 0)
        wire.feed(pipeline([("GET", "k"), ("CLIENT", "REPLY", "ON"), ("PING",)]))
        assert parsed(wire.drain()) == [b"OK", b"PONG"]


def test_reset_ends_the_silence() -> None:
    with serving() as server:
        wire = FakeWire(server)
        wire.feed(pipeline([("CLIENT", "REPLY", "OFF"), ("PING",), ("RESET",), ("PING",)]))
        assert parsed(wire.drain()) == [b"RESET", b"PONG"]


# -- bugs and limits ----------------------------------------------------------------------------------


def test_a_command_that_crashes_leaks_no_slot_of_the_commands_around_it() -> None:
    with serving() as server, crashing():
        wire = FakeWire(server)
        ask(wire, "SET", "k", b"v" * LARGE)
        data = request("SETNX", "k", b"w" * LARGE)
        wire.feed(data[:-2])
        with pytest.raises(ZeroDivisionError):
            wire.feed(data[-2:] + request("CRASH"))
        wire.lose()
        assert server.cache.in_flight() == (0, 0)
        server.cache.check()


async def test_a_command_that_crashes_behind_a_wait_closes_its_connection_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running() as server:
        with crashing(), caplog.at_level(logging.ERROR):
            wire, other = FakeWire(server), FakeWire(server)
            wire.feed(pipeline([("KEYS", "*"), ("CRASH",)]))
            await settle()
        assert wire.is_aborted
        assert "a command crashed" in caplog.text
        wire.lose()
        assert ask(other, "PING") == b"PONG"


def test_before_the_password_only_small_and_few_things_are_taken() -> None:
    with serving(requirepass="secret") as server:
        wire = FakeWire(server)
        assert str(ask(wire, "GET", "k")).startswith("NOAUTH")
        assert str(ask(wire, "AUTH", "wrong")).startswith("WRONGPASS")
        wire.feed(b"*2\r\n$4\r\nAUTH\r\n$70000\r\n")
        assert "unauthenticated bulk length" in str(parsed(wire.drain())[0])
        assert wire.is_closed
        wire = FakeWire(server)
        assert ask(wire, "AUTH", "secret") == b"OK"
        assert ask(wire, "SET", "k", b"v" * LARGE) == b"OK"
        assert ask(wire, "RESET") == b"RESET"
        assert str(ask(wire, "GET", "k")).startswith("NOAUTH")


def test_a_value_is_copied_up_to_a_size_and_sent_in_place_beyond() -> None:
    with serving() as server:
        wire = FakeWire(server, room=0)
        for nbytes, num_held in ((COPY_BYTES_MAX, 0), (COPY_BYTES_MAX + 1, 1)):
            FakeWire(server).feed(request("SET", "k", b"v" * nbytes))
            wire.feed(request("GET", "k"))
            assert server.cache.in_flight() == (0, num_held)
            assert parsed(wire.drain()) == [b"v" * nbytes]
            wire.room = 0


def test_what_a_lost_connection_held_is_given_back_at_any_moment() -> None:
    rng = random.Random(3)
    data = pipeline(
        [
            ("SET", "a", b"a" * LARGE),
            ("MSET", "b", b"b" * LARGE, "c", b"c" * LARGE, "d", "e"),
            ("KV.LEASE", "2", "a", "b"),
            ("MGET", "a", "b", "c"),
            ("KV.PUT", KEY, b"p" * LARGE, "PARENT", "x"),
            ("GETSET", "a", b"A" * LARGE),
            ("SETNX", "a", b"N" * LARGE),
        ]
    )
    for _ in range(150):
        with serving() as server:
            wire = FakeWire(server, room=rng.choice((0, 1000, 1 << 20, 1 << 60)))
            position, stop = 0, rng.randrange(len(data))
            while position < stop:
                taken = wire.feed(data[position:stop], cuts=rng)
                position += taken
                if not taken:
                    if rng.random() < 0.3:
                        break
                    wire.drain(room=rng.choice((1000, 1 << 20)))
            wire.lose()
            server.cache.check()
            assert server.cache.in_flight() == (0, 0)
            assert not len(server.cache.leases)


def test_the_answer_to_an_unknown_subcommand_or_arity_is_an_error_and_drops_the_value() -> None:
    with serving() as server:
        wire = FakeWire(server)
        assert "wrong number" in str(ask(wire, "SET", "k"))
        assert "wrong number" in str(ask(wire, "SETNX", "k", b"v" * LARGE, "more"))
        assert "unknown" in str(ask(wire, "CLIENT", "NOSUCH")).lower()
        assert server.cache.slabs.used_bytes == 0


def test_maxmemory_may_go_down_and_up_again_while_values_are_read() -> None:
    with serving(maxmemory=8 << 20) as server:
        wire, reader = FakeWire(server), FakeWire(server, room=0)
        for number in range(24):
            ask(wire, "SET", b"k%d" % number, b"v" * LARGE)
        reader.feed(request("MGET", "k0", "k1"))
        assert ask(wire, "CONFIG", "SET", "maxmemory", 2 << 20) == b"OK"
        assert server.cache.slabs.used_bytes <= 2 << 20
        server.cache.check()
        assert parsed(reader.drain()) == [[b"v" * LARGE] * 2]
        assert ask(wire, "SET", "new", b"v" * LARGE) == b"OK"
        assert server.cache.slabs.used_bytes <= 2 << 20
        assert ask(wire, "CONFIG", "SET", "maxmemory", 8 << 20) == b"OK"
        for number in range(24):
            ask(wire, "SET", b"k%d" % number, b"v" * LARGE)
        assert server.cache.slabs.used_bytes > 6 << 20
        error = str(ask(wire, "CONFIG", "SET", "maxmemory", 9 << 20))
        assert "more than the arena was made for" in error


def test_settings_change_whatever_the_arena_is_a_multiple_of() -> None:
    with serving(maxmemory=4 << 20, small_value_memory=8 << 10) as server:
        wire = FakeWire(server)
        assert ask(wire, "CONFIG", "SET", "maxmemory-policy", "sieve") == b"OK"
        assert ask(wire, "CONFIG", "SET", "maxmemory", 4 << 20) == b"OK"
        assert server.cache.room.policy == "sieve"
