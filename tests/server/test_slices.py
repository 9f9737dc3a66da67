"""A put of very many pages: others are served in between, and whatever they do, a prefix is stored."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import numpy
import pytest

import respkv.server.commands  # noqa: F401  (registers the handlers)
from respkv.config import Config
from respkv.engine.clock import Clock
from respkv.server import slices
from respkv.server.puts import KEPT_S_MIN
from respkv.server.state import Server
from tests.fakes import FakeWire, make_server
from tests.server.cold import cold_server, parsed, replies, settle
from tests.server.raw import Word, error_of, request

pytestmark = pytest.mark.anyio

SLICE = 32  # fewer than a server's, which are as good as any
TOKENS = 2
SHAPE = ("LAYERS", 1, "HEADS", 2, "DIM", 2, "TOKENS", TOKENS, "DTYPE", "uint8")
PAGE_BYTES = 16
NUM_PAGES = 6 * SLICE
WHOLE: list[Word] = []
HEADS: list[Word] = ["HEADS", 0, 2]
PORTIONS = pytest.mark.parametrize("portion", [WHOLE, HEADS], ids=["whole", "rectangles"])


def tokens(num_pages: int, seed: int = 1) -> bytes:
    random = numpy.random.default_rng(seed)
    return random.integers(0, 1000, num_pages * TOKENS, dtype="<i4").tobytes()


def put(prompt: bytes, *options: Word, page_bytes: int = PAGE_BYTES, first: int = 0) -> bytes:
    """Return a put of all pages of a prompt from one on; each holds its number."""
    numbers = range(first, len(prompt) // (4 * TOKENS))
    pages = [number.to_bytes(4, "little") * (page_bytes // 4) for number in numbers]
    front: list[Word] = ["FROM", first * TOKENS] if first else []
    return request("KV.SEQ.PUT", "s", prompt, len(pages), *pages, *front, *options)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_PAGES", SLICE)


@asynccontextmanager
async def serving(*shape: Word, **settings: Any) -> AsyncIterator[Server]:
    """Yield a server without sockets, whose namespace s has tiny pages."""
    values = {"maxmemory": 64 << 20, "shm": "off", **settings}
    with make_server(Config(**values), Clock()) as server:
        async with anyio.create_task_group() as tasks:
            server.run_in(tasks)
            assert ask(FakeWire(server), "KV.SCHEMA", "SET", "s", *(shape or SHAPE)) == b"OK"
            yield server
            for session in list(server.sessions.values()):
                session.lost()
            await settle()
            server.cache.check()
            server.sequences.check()
            server.assemblies.check()
            assert server.cache.in_flight() == (len(server.assemblies), 0)
            tasks.cancel_scope.cancel()


def ask(wire: FakeWire, *words: Word) -> Any:
    """Send a command that is answered in one turn; return its answer."""
    wire.feed(request(*words))
    (answer,) = parsed(wire.drain())
    return answer


async def step(wire: FakeWire, count: int = 1) -> None:
    """Let a long command get on by so many slices."""
    for _ in range(count):
        assert wire.drain() == b""
        await anyio.lowlevel.checkpoint()


async def ended(wire: FakeWire) -> Any:
    """Return the answer of a long command."""
    (answer,) = await replies(wire, 1)
    return answer


@PORTIONS
async def test_others_are_answered_while_many_pages_are_put(portion: list[Word]) -> None:
    prompt = tokens(NUM_PAGES)
    async with serving() as server:
        wire, other = FakeWire(server), FakeWire(server)
        for expected in ([NUM_PAGES, 0], [0, NUM_PAGES]):
            wire.feed(put(prompt, *portion))
            found, count = [0], 0
            while not (answer := wire.drain()):
                assert ask(other, "PING") == b"PONG"
                found.append(ask(other, "KV.SEQ.MATCH", "s", prompt)[1])
                count += 1
                await anyio.lowlevel.checkpoint()
            assert parsed(answer) == [expected]
            assert count >= 2
            assert found == sorted(found), "what is there is a prefix that grows"
            if expected[0]:
                steps = [after - before for before, after in pairwise(found)]
                # A scheduler may let the put go first in one round and last in the one before.
                assert 0 < max(steps) <= 2 * SLICE
        got = ask(other, "KV.SEQ.GET", "s", prompt)
        numbers = numpy.arange(NUM_PAGES, dtype="<u4").repeat(2)  # of a page, half are keys
        assert (got[0], got[1]) == (NUM_PAGES * TOKENS, 2 * numbers.tobytes())


async def test_commands_behind_a_long_put_are_answered_in_order() -> None:
    prompt = tokens(NUM_PAGES)
    async with serving() as server:
        wire = FakeWire(server)
        data = put(prompt) + request("KV.SEQ.MATCH", "s", prompt) + request("PING")
        sent = wire.feed(data)
        out = b""
        with anyio.fail_after(20):
            while len(parsed(out)) < 3:
                await anyio.lowlevel.checkpoint()
                sent += wire.feed(data[sent:])
                out += wire.drain()
        stored, found, pong = parsed(out)
        assert (stored, found[1], pong) == ([NUM_PAGES, 0], NUM_PAGES, b"PONG")


@PORTIONS
async def test_two_that_put_the_same_pages_at_once_store_them_once(portion: list[Word]) -> None:
    prompt = tokens(NUM_PAGES)
    async with serving() as server:
        wires = [FakeWire(server) for _ in range(3)]
        for wire, options in zip(wires, (portion, WHOLE, HEADS), strict=True):
            wire.feed(put(prompt, *options))
        answers = [await ended(wire) for wire in wires]
        assert sum(stored for stored, _ in answers) == NUM_PAGES
        assert ask(wires[0], "KV.SEQ.MATCH", "s", prompt)[1] == NUM_PAGES
        assert ask(wires[0], "DBSIZE") == NUM_PAGES


@PORTIONS
async def test_what_came_whole_is_stored_when_its_client_has_left(portion: list[Word]) -> None:
    prompt = tokens(NUM_PAGES)
    async with serving() as server:
        wire, other = FakeWire(server), FakeWire(server)
        wire.feed(put(prompt, *portion, "LOGITS", b"l" * 10_000))
        await step(wire)
        wire.lose()
        with anyio.fail_after(20):
            while ask(other, "DBSIZE") < NUM_PAGES + 1:
                await anyio.lowlevel.checkpoint()
        found = ask(other, "KV.SEQ.MATCH", "s", prompt, "LOGITS")
        assert (found[1], found[4:]) == (NUM_PAGES, [1, b"l" * 10_000])


@pytest.mark.parametrize(
    ("words", "errors"),
    [
        (("FLUSHALL",), "KVGAP only 0 of "),
        # Pages go first, some at a time, and then the schema.
        (("KV.SCHEMA", "DEL", "s"), ("KVGAP ", "KVSCHEMA the schema of namespace 's' was deleted")),
    ],
    ids=["flushed", "deleted"],
)
async def test_who_puts_is_told_what_others_took_away(
    words: tuple[Word, ...], errors: str | tuple[str, ...]
) -> None:
    prompt = tokens(NUM_PAGES)
    async with serving() as server:
        wire, other = FakeWire(server), FakeWire(server)
        wire.feed(put(prompt))
        while not ask(other, "DBSIZE"):
            await step(wire)
        other.feed(request(*words))
        await replies(other, 1)
        assert error_of(await ended(wire)).startswith(errors)
        ask(other, "KV.SCHEMA", "SET", "s", *SHAPE)
        assert ask(other, "KV.SEQ.MATCH", "s", prompt)[0] == 0
        wire.feed(put(prompt))
        assert sum(await ended(wire)) == NUM_PAGES


async def test_nothing_is_found_of_rectangles_that_were_flushed_in_between() -> None:
    prompt = tokens(NUM_PAGES)
    async with serving() as server:
        wire, other = FakeWire(server), FakeWire(server)
        wire.feed(put(prompt, *HEADS))
        while not ask(other, "DBSIZE"):
            await step(wire)
        ask(other, "FLUSHALL")
        await ended(wire)
        assert ask(other, "KV.SEQ.MATCH", "s", prompt)[0] == 0
        wire.feed(put(prompt, *HEADS))
        await ended(wire)
        assert ask(other, "KV.SEQ.MATCH", "s", prompt)[1] == NUM_PAGES


async def test_a_long_put_that_finds_no_room_keeps_what_came_before() -> None:
    shape = ("LAYERS", 1, "HEADS", 1, "DIM", 8192, "TOKENS", TOKENS, "DTYPE", "uint8")
    prompt, page_bytes = tokens(4 * SLICE), 32768
    async with serving(*shape, maxmemory=4 << 20, small_value_memory=1 << 20) as server:
        wire = FakeWire(server)
        wire.feed(put(prompt, page_bytes=page_bytes))
        assert error_of(await ended(wire)).startswith("OOM")
        num_tokens, num_pages, *_ = ask(wire, "KV.SEQ.MATCH", "s", prompt)
        assert SLICE < num_pages < 4 * SLICE
        assert num_tokens == num_pages * TOKENS
        assert ask(wire, "DBSIZE") == num_pages


@pytest.mark.parametrize(
    ("limit", "options", "error"),
    [
        (("KV.QUOTA", "s", "MAXBYTES", 4 * SLICE * 1024), (), "KVQUOTA"),
        (("CONFIG", "SET", "pinned-share-max", 1), ("PIN", 60_000), "KVPIN"),
    ],
    ids=["quota", "pins"],
)
async def test_a_long_put_that_passes_a_limit_is_refused_as_a_whole(
    limit: tuple[Word, ...], options: tuple[Word, ...], error: str
) -> None:
    shape = ("LAYERS", 1, "HEADS", 1, "DIM", 256, "TOKENS", TOKENS, "DTYPE", "uint8")
    prompt = tokens(NUM_PAGES)
    async with serving(*shape, maxmemory=12 << 20) as server:
        wire = FakeWire(server)
        assert ask(wire, *limit)
        wire.feed(put(prompt, *options, page_bytes=1024))
        assert error_of(await ended(wire)).startswith(error)
        assert ask(wire, "DBSIZE") == 0
        half = prompt[: len(prompt) // 2]
        wire.feed(put(half, *options, page_bytes=1024))
        assert await ended(wire) == [NUM_PAGES // 2, 0]
        wire.feed(put(half, *options, page_bytes=1024))
        assert await ended(wire) == [0, NUM_PAGES // 2], "what is there counts once"


@PORTIONS
async def test_a_long_put_that_must_be_written_waits_for_all_of_it(portion: list[Word]) -> None:
    prompt = tokens(2 * SLICE)
    async with cold_server(maxmemory=16 << 20) as cold:
        wire, other = FakeWire(cold.server), FakeWire(cold.server)
        ask(wire, "KV.SCHEMA", "SET", "s", *SHAPE)
        cold.tier.writes.shut()
        wire.feed(put(prompt, *portion, "WRITTEN"))
        while ask(other, "KV.SEQ.MATCH", "s", prompt)[1] < 2 * SLICE:
            await step(wire)
        assert await replies(wire, 0) == []
        cold.tier.writes.open()
        assert await replies(wire, 1) == [[2 * SLICE, 0]]
        for each in (wire, other):
            each.lose()


async def test_a_long_put_gets_no_room_from_the_page_in_front_of_it() -> None:
    shape = ("LAYERS", 1, "HEADS", 1, "DIM", 256, "TOKENS", TOKENS, "DTYPE", "uint8")
    prompt, front = tokens(NUM_PAGES), 2
    async with serving(*shape, maxmemory=12 << 20) as server:
        wire = FakeWire(server)
        assert ask(wire, "KV.QUOTA", "s", "MAXBYTES", NUM_PAGES * 1024)
        for others in (prompt[: front * 4 * TOKENS], tokens(10, seed=2)):
            wire.feed(put(others, page_bytes=1024))
            assert await ended(wire) == [len(others) // (4 * TOKENS), 0]
        wire.feed(put(prompt, page_bytes=1024, first=front + 1))
        assert error_of(await ended(wire)).startswith("KVGAP only 4 of the 6 tokens")
        assert ask(wire, "DBSIZE") == front + 10, "nobody has gone for a put that has a gap"
        wire.feed(put(prompt, page_bytes=1024, first=front))
        assert await ended(wire) == [NUM_PAGES - front, 0]
        assert ask(wire, "KV.SEQ.MATCH", "s", prompt)[1] == ask(wire, "DBSIZE") == NUM_PAGES


@PORTIONS
async def test_a_long_put_holds_nothing_of_its_own_once_it_has_ended(portion: list[Word]) -> None:
    shape = ("LAYERS", 1, "HEADS", 2, "DIM", 128, "TOKENS", TOKENS, "DTYPE", "uint8")
    async with serving(*shape, maxmemory=12 << 20) as server:
        wire = FakeWire(server)
        assert ask(wire, "KV.QUOTA", "s", "MAXBYTES", NUM_PAGES * 1024)
        for seed in range(3):
            wire.feed(put(tokens(NUM_PAGES, seed), *portion, page_bytes=1024))
            assert await ended(wire) == [NUM_PAGES, 0]
            if portion:  # whose slices are more than one turn each
                await anyio.sleep(2 * KEPT_S_MIN)


@PORTIONS
async def test_a_long_put_whose_writes_fail_ends_quietly_when_its_client_has_left(
    portion: list[Word], caplog: pytest.LogCaptureFixture
) -> None:
    prompt = tokens(2 * SLICE)
    async with cold_server(maxmemory=16 << 20) as cold:
        wire, other = FakeWire(cold.server), FakeWire(cold.server)
        ask(wire, "KV.SCHEMA", "SET", "s", *SHAPE)
        cold.tier.writes.shut()
        wire.feed(put(prompt, *portion, "WRITTEN"))
        wire.lose()
        with anyio.fail_after(60):
            while ask(other, "DBSIZE") < 2 * SLICE:
                await anyio.lowlevel.checkpoint()
        await settle()
        assert not wire.session.promises
        cold.tier.writes.errors.update(dict.fromkeys(cold.cache.entries, "the disk is full"))
        cold.tier.writes.open()
        other.lose()
        await cold.check()
    assert "crashed" not in caplog.text


async def test_two_that_complete_other_pages_at_once_are_each_told_of_their_own() -> None:
    prompts = [tokens(NUM_PAGES, seed) for seed in (1, 2)]
    async with serving() as server:
        wires = [FakeWire(server) for _ in prompts]
        for wire, prompt in zip(wires, prompts, strict=True):
            wire.feed(put(prompt, *HEADS))
        assert [await ended(wire) for wire in wires] == [[NUM_PAGES, 0], [NUM_PAGES, 0]]
