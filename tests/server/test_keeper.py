"""The keeper: who is disconnected, when, and who is not. Time is virtual."""

from collections.abc import Awaitable, Callable

import anyio
import pytest

import respkv.server.commands  # noqa: F401  (registers the handlers)
from respkv.config import Config
from respkv.engine.janitor import make_janitor
from respkv.engine.supervisor import supervise
from respkv.server.keeper import STALL_OVER_LIMIT_S, keep
from respkv.server.state import Server
from tests.fakes import FakeWire, ManualClock, make_server
from tests.server.raw import pipeline, request
from tests.simulation.virtual import Jump, run

LARGE = 300_000
TIMEOUT_S = 10


async def no_recovery() -> None:
    raise AssertionError("the janitor crashed")


def play(backend: str, part: Callable[[Server], Awaitable[None]], **settings: int) -> None:
    """Run a part of a test beside the keeper."""

    async def work(_: Jump) -> None:
        values = {"maxmemory": 4 << 20, "output_timeout": TIMEOUT_S, **settings}
        config = Config(shm="rw", **values)  # type: ignore[arg-type]
        with make_server(config, ManualClock(anyio.current_time)) as server:
            async with anyio.create_task_group() as tasks:
                server.run_in(tasks)
                janitor = make_janitor(server.cache)
                tasks.start_soon(supervise, janitor, no_recovery)
                tasks.start_soon(keep, server, janitor)
                await part(server)
                tasks.cancel_scope.cancel()

    run(work, backend=backend, seed=1)


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99999])
def test_a_client_that_stops_inside_a_command_does_not_keep_its_slots(
    backend: str, share: float
) -> None:
    async def part(server: Server) -> None:
        wire = FakeWire(server)
        data = request("MSET", "a", b"x" * LARGE, "b", b"y" * LARGE, "c", "v")
        wire.feed(data[: int(share * len(data))])
        await anyio.sleep(TIMEOUT_S - 1)
        assert not wire.is_aborted
        await anyio.sleep(2)
        assert wire.is_aborted
        assert server.num_idle_closed

    play(backend, part)


def test_a_client_that_goes_on_slowly_is_left_alone(backend: str) -> None:
    async def part(server: Server) -> None:
        wire = FakeWire(server)
        data = request("SET", "a", b"x" * LARGE)
        for start in range(0, len(data), LARGE // 8):
            wire.feed(data[start : start + LARGE // 8])
            await anyio.sleep(TIMEOUT_S - 1)
        assert not wire.is_aborted
        assert wire.drain() == b"+OK\r\n"

    play(backend, part)


def test_a_client_that_waits_for_room_is_not_blamed_for_it(backend: str) -> None:
    async def part(server: Server) -> None:
        wire = FakeWire(server)
        reader = FakeWire(server, room=0)
        FakeWire(server).feed(pipeline([("SET", b"%d" % n, b"v" * LARGE) for n in range(12)]))
        reader.feed(request("MGET", *server.cache.entries))
        wire.feed(request("SET", "new", b"x" * LARGE))
        assert not wire.session.wants_input
        for _ in range(3 * TIMEOUT_S):
            reader.drain(room=1)  # it takes a byte a second, so it is not stalled either
            await anyio.sleep(1)
        assert not wire.is_aborted
        assert not reader.is_aborted

    play(backend, part, reserve_timeout=600_000)


def test_a_reader_that_takes_nothing_is_disconnected(backend: str) -> None:
    async def part(server: Server) -> None:
        wire = FakeWire(server)
        wire.feed(request("SET", "a", b"x" * LARGE))
        wire.drain(room=100)
        wire.feed(request("GET", "a"))
        await anyio.sleep(TIMEOUT_S - 1)
        wire.drain(room=100)
        await anyio.sleep(TIMEOUT_S - 1)
        assert not wire.is_aborted
        await anyio.sleep(2)
        assert wire.is_aborted
        assert server.num_slow_readers

    play(backend, part)


def test_a_reader_with_too_much_unsent_is_disconnected_soon_after_it_stops(backend: str) -> None:
    async def part(server: Server) -> None:
        wire = FakeWire(server)
        wire.feed(request("SET", "a", b"x" * LARGE))
        wire.drain(room=100)
        wire.feed(request("GET", "a"))
        for _ in range(5):
            wire.drain(room=100)
            await anyio.sleep(STALL_OVER_LIMIT_S / 2)
        assert not wire.is_aborted
        await anyio.sleep(STALL_OVER_LIMIT_S)
        assert wire.is_aborted

    play(backend, part, client_output_buffer_limit=LARGE // 2)


def test_an_idle_client_is_disconnected_only_when_that_is_asked_for(backend: str) -> None:
    async def part(server: Server) -> None:
        idle, busy = FakeWire(server), FakeWire(server)
        for _ in range(12):
            busy.feed(request("PING"))
            await anyio.sleep(1)
        assert idle.is_aborted == bool(server.config.timeout)
        assert not busy.is_aborted

    play(backend, part, timeout=5)
    play(backend, part)


def test_a_writer_that_overstays_is_disconnected_and_its_slot_waits(backend: str) -> None:
    async def part(server: Server) -> None:
        server.cache.leases.quarantine_s = 5.0
        wire = FakeWire(server)
        wire.feed(request("KV.RESERVE", "k", LARGE, "MS", 1000))
        await anyio.sleep(0.9)
        assert not wire.is_aborted
        await anyio.sleep(0.3)
        assert wire.is_aborted
        assert server.num_overdue_writers == 1
        wire.lose()
        assert server.cache.leases.quarantined == 1
        await anyio.sleep(6)
        assert server.cache.slabs.used_bytes == 0

    play(backend, part)


def test_an_idle_server_checks_itself_and_forgets_what_has_expired(backend: str) -> None:
    async def part(server: Server) -> None:
        FakeWire(server).feed(request("SET", "k", "v", "PX", 100))
        await anyio.sleep(0.3)
        assert not server.cache.entries
        await anyio.sleep(5)
        assert server.cache.stats.checks >= 2

    play(backend, part, check_interval=2)
