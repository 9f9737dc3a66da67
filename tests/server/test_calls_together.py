"""Calls of one command are answered together exactly as they are one by one.

Two servers get the same pipelines. One of them never learns what reads look like, so it runs each
command by itself; what both answer, store and count has to be the same.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import respkv.server.commands  # noqa: F401  (registers the handlers)
from respkv.config import Config
from respkv.server.state import Server
from respkv.wire.calls import Calls, Framings
from tests.fakes import FakeWire, ManualClock, make_server
from tests.server.cold import cold_server, replies, settle
from tests.server.raw import Word, pipeline

anyio_only = pytest.mark.anyio

Call = tuple[Word, ...]
KEYS = [b"k%d" % number for number in range(6)]
SMALL, LARGE = 448, 20_000


class Forgetful(Framings):
    """Knows no read."""

    def take(self, data: bytes | bytearray, nbytes: int) -> Calls | None:
        """Know nothing."""
        return None


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[Server, ManualClock]]:
    clock = ManualClock()
    values = {"maxmemory": 4 << 20, "small_value_memory": 64 << 10, "shm": "off", **settings}
    with make_server(Config(**values), clock) as server:
        yield server, clock
        for session in list(server.sessions.values()):
            session.lost()
        server.cache.check()


def state(server: Server) -> dict[str, Any]:
    """Return what a server holds and has counted."""
    entries = {
        key: (entry.value, entry.nbytes, entry.hits, entry.touched, entry.expires_ms)
        for key, entry in server.cache.entries.items()
    }
    counted = server.num_commands, server.num_errors, server.input_bytes, server.clock.now
    return {"entries": entries, "counted": counted, **server.cache.stats.snapshot()}


def ask(wire: FakeWire, calls: list[Call]) -> bytes:
    """Send a pipeline in one read; return what is answered."""
    data = pipeline(calls)
    assert wire.feed(data) == len(data)
    return wire.drain()


def learn(server: Server, *shapes: list[Call]) -> None:
    """Let a server meet reads often enough that it knows them."""
    wire = FakeWire(server)
    for calls in shapes:
        for _ in range(2):
            ask(wire, calls)
    wire.lose()


KEY = st.sampled_from(KEYS)
VALUE = st.sampled_from([b"a" * 8, b"b" * 8, b"c" * SMALL, b"d" * (SMALL + 1), b"e" * LARGE, b""])
GETS = st.lists(st.tuples(st.just(b"GET"), KEY), min_size=1, max_size=6)
SETS = VALUE.flatmap(
    lambda value: st.lists(st.tuples(st.just(b"SET"), KEY, st.just(value)), min_size=1, max_size=6)
)
OTHERS = st.lists(
    st.sampled_from(
        [
            (b"PING",),
            (b"SET", b"k1", b"12345678", b"PX", b"1000"),
            (b"SET", b"k2", b"12345678", b"GET"),
            (b"EXPIRE", b"k3", b"1"),
            (b"DEL", b"k0", b"k4"),
            (b"GET",),
            (b"GET", b"k1", b"k2"),
            (b"SET", b"k1"),
            (b"get", b"k2"),
            (b"KV.PUT", b"k5", b"page"),
            (b"CLIENT", b"REPLY", b"OFF"),
            (b"CLIENT", b"REPLY", b"ON"),
            (b"CLIENT", b"REPLY", b"SKIP"),
            (b"HELLO", b"3"),
            (b"HELLO", b"2"),
            (b"RESET",),
            (b"NONSENSE", b"k1"),
        ]
    ),
    min_size=1,
    max_size=3,
)
# The same read several times over: from the third time on its framing is known.
STEP = st.tuples(st.one_of(GETS, SETS, GETS, SETS, OTHERS), st.integers(1, 4), st.booleans())


@given(st.lists(STEP, min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_a_pipeline_in_runs_is_the_same_commands_one_at_a_time(
    steps: list[tuple[list[Call], int, bool]],
) -> None:
    with serving() as (server, clock), serving() as (plain, plain_clock):
        plain.tokenizer.framings = Forgetful()
        wire, plain_wire = FakeWire(server), FakeWire(plain)
        for calls, times, is_late in steps:
            for _ in range(times):
                answered, expected = ask(wire, calls), ask(plain_wire, calls)
                # HELLO answers with the number of the connection, which is the same in both.
                assert answered == expected
                assert state(server) == state(plain)
                assert wire.session.last_command == plain_wire.session.last_command
            for each in (clock, plain_clock):
                each.advance(2.0 if is_late else 0.1)


def test_a_known_read_is_answered_by_one_write_and_others_are_not_told_apart() -> None:
    gets: list[Call] = [("GET", key) for key in KEYS]
    with serving() as (server, _):
        learn(server, [("SET", key, b"v" * 8) for key in KEYS], gets)
        wire = FakeWire(server)
        writes: list[bytes] = []
        wire.write = writes.append  # type: ignore[method-assign, assignment]
        ask(wire, gets)
        assert writes == [b"$8\r\nvvvvvvvv\r\n" * len(KEYS)]


@pytest.mark.parametrize("at", range(len(KEYS)))
def test_what_fails_amid_calls_fails_alone(at: int) -> None:
    gets: list[Call] = [("GET", key) for key in KEYS]
    sets: list[Call] = [("SET", key, b"w" * 8) for key in KEYS]
    with serving(maxmemory=3 << 20, small_value_memory=64 << 10) as (server, clock):
        learn(server, sets, gets)
        wire = FakeWire(server)
        ask(wire, [("SET", KEYS[at], b"x" * 8, "PX", 1000)])
        clock.advance(2.0)  # it has ended, which is noticed when it is asked for
        expected = [b"$8\r\nwwwwwwww\r\n"] * len(KEYS)
        expected[at] = b"$-1\r\n"
        assert ask(wire, gets) == b"".join(expected)
        assert KEYS[at] not in server.cache.entries
        assert ask(wire, sets) == b"+OK\r\n" * len(KEYS)
        assert ask(wire, [("SET", KEYS[at], b"L" * LARGE)]) == b"+OK\r\n"
        expected[at] = b"$%d\r\n%b\r\n" % (LARGE, b"L" * LARGE)
        assert ask(wire, gets) == b"".join(expected)
        assert ask(wire, sets) == b"+OK\r\n" * len(KEYS)
        assert server.cache.entries[KEYS[at]].value == b"w" * 8


def test_small_values_that_need_others_to_go_or_find_no_room_are_stored_one_by_one() -> None:
    sets: list[Call] = [("SET", b"n%03d" % number, b"v" * SMALL) for number in range(200)]
    too_large: list[Call] = [("SET", b"%03d" % number + b"k" * 20_000, b"v") for number in range(3)]
    with serving(small_value_memory=16 << 10) as (server, _):
        with serving(small_value_memory=16 << 10) as (plain, _):
            plain.tokenizer.framings = Forgetful()
            wire, plain_wire = FakeWire(server), FakeWire(plain)
            for part in (*[sets[:10]] * 4, sets[5:15], *[sets[:50]] * 3, *[too_large] * 3):
                answered = ask(wire, part)
                assert answered == ask(plain_wire, part)
                assert state(server) == state(plain)
            assert server.cache.stats.evicted > 0
            assert ask(wire, too_large).count(b"-OOM") == 3


def test_an_answer_that_the_kernel_does_not_take_stops_the_reading() -> None:
    gets: list[Call] = [("GET", key) for key in KEYS]
    with serving() as (server, _):
        learn(server, [("SET", key, b"v" * 8) for key in KEYS], gets)
        wire = FakeWire(server, room=10)
        data = pipeline(gets)
        assert wire.feed(data) == len(data)
        assert wire.feed(data) == 0
        assert wire.session.is_draining
        answer = b"$8\r\nvvvvvvvv\r\n" * len(KEYS)
        assert wire.drain() == answer
        assert wire.session.wants_input
        assert wire.feed(data) == len(data)
        assert wire.drain() == answer


@asynccontextmanager
async def two_with_files() -> AsyncIterator[tuple[Any, Any]]:
    """Yield two servers with file tiers, of which the second knows no read."""
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(cold_server()) for _ in range(2)]
        both[1].server.tokenizer.framings = Forgetful()
        yield both[0], both[1]


@anyio_only
async def test_with_file_tiers_values_that_are_in_no_memory_are_waited_for() -> None:
    async with two_with_files() as (cold, plain):
        names = [b"n%d" % number for number in range(5)]
        gets: list[Call] = [("GET", name) for name in names]
        sets: list[Call] = [("SET", name, name * 100) for name in names]
        for each in (cold, plain):
            wire = FakeWire(each.server)
            for _ in range(3):
                wire.feed(pipeline(sets))
                assert await replies(wire, 5) == [b"OK"] * 5
                wire.feed(pipeline(gets))
                assert await replies(wire, 5) == [name * 100 for name in names]
            await settle()
            while each.cache.copies.dirty_small or each.cache.copies.writing:
                await settle()
            for name in names[1:4]:
                each.cache.demote(each.cache.entries[name])
            wire.feed(pipeline([*gets]))
            assert await replies(wire, 5) == [name * 100 for name in names]
        assert cold.server.num_commands == plain.server.num_commands
        assert cold.cache.stats.hits == plain.cache.stats.hits
        assert cold.cache.stats.loads == plain.cache.stats.loads > 0


@anyio_only
async def test_calls_that_have_to_be_carried_out_one_by_one_wait_for_their_own_values() -> None:
    async with two_with_files() as (cold, plain):
        names = [b"n%d" % number for number in range(8)]
        gets: list[Call] = [("KV.GET", name) for name in names]
        for each in (cold, plain):
            await each.put({name: name * 5000 for name in names})
            wire = FakeWire(each.server)
            for _ in range(4):
                wire.feed(pipeline(gets))
                assert await replies(wire, 8) == [name * 5000 for name in names]
                await each.chill(*names)
            wire.lose()
            await each.check()
        assert cold.cache.stats.loads == plain.cache.stats.loads >= 32


@anyio_only
async def test_calls_behind_a_promise_wait_for_it_as_others_do() -> None:
    async with cold_server() as cold:
        gets: list[Call] = [("GET", key) for key in KEYS]
        learn(cold.server, gets)
        wire = FakeWire(cold.server)
        cold.tier.writes.shut()
        wire.feed(pipeline([("KV.PUT", "k", "page", "DURABLE")]))
        await settle()
        wire.feed(pipeline(gets))
        await settle()
        assert wire.drain() == b""
        cold.tier.writes.open()
        assert await replies(wire, 7) == [b"OK"] + [None] * 6


@anyio_only
async def test_a_client_that_listens_is_refused_known_calls_as_well() -> None:
    async with cold_server() as cold:
        gets: list[Call] = [("GET", key) for key in KEYS]
        learn(cold.server, gets)
        wire = FakeWire(cold.server)
        wire.feed(pipeline([("SUBSCRIBE", "news")]))
        assert await replies(wire, 1) == [[b"subscribe", b"news", 1]]
        wire.feed(pipeline(gets))
        assert all("Can't execute 'get'" in str(each) for each in await replies(wire, 6))


@pytest.mark.parametrize("word", ["OFF", "SKIP"])
def test_known_calls_of_a_client_that_wants_no_replies_are_as_silent_as_others(word: str) -> None:
    gets: list[Call] = [("GET", key) for key in KEYS]
    with serving() as (server, _):
        learn(server, [("SET", key, b"v" * 8) for key in KEYS], gets)
        wire = FakeWire(server)
        assert ask(wire, [("CLIENT", "REPLY", word)]) == b""
        silenced = len(KEYS) if word == "OFF" else 1
        assert ask(wire, gets) == b"$8\r\nvvvvvvvv\r\n" * (len(KEYS) - silenced)
        assert server.cache.stats.hits == len(KEYS) * 3
