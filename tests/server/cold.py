"""A server with a file tier, without sockets and files: what is cold, and what waits for it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import hiredis

import respkv.server.commands  # noqa: F401  (registers the handlers)
from respkv.config import Config
from respkv.engine.clock import Clock
from respkv.engine.files import open_files
from respkv.server.state import Server, moves_of
from tests.fakes import FakeWire, make_server
from tests.server.gated_tier import GatedTier

MIB = 1 << 20


class Cold:
    """The server, its tier, and how to make values cold."""

    def __init__(self, server: Server, tier: GatedTier) -> None:
        self.server = server
        self.cache = server.cache
        self.tier = tier

    async def put(self, values: dict[bytes, bytes]) -> None:
        """Store values that are in the tier alone afterwards."""
        wire = FakeWire(self.server)
        for key, value in values.items():
            self.cache.put(key, value)
        wire.lose()
        await self.chill(*values)

    async def chill(self, *keys: bytes) -> None:
        """Have keys in the tier alone, all when none is named."""
        assert self.server.mover is not None
        await self.server.mover.drain(60)
        for key in keys or list(self.cache.entries):
            entry = self.cache.entries[key]
            if not entry.is_cold:
                self.cache.demote(entry)

    def is_cold(self, key: bytes) -> bool:
        return self.cache.entries[key].is_cold

    async def check(self) -> None:
        """Assert that nobody holds anything any more."""
        mover = self.server.mover
        assert mover is not None
        with anyio.fail_after(60):
            for _ in iter(lambda: len(mover.loader) + len(self.cache.copies.writing), 0):
                await anyio.sleep(0.005)
        assert self.server.budget.used == 0
        self.cache.check()
        assert self.cache.in_flight() == (0, 0)


@asynccontextmanager
async def cold_server(*, clock: Clock | None = None, **settings: Any) -> AsyncIterator[Cold]:
    """Yield a server with 4 MiB of memory above a tier that takes everything."""
    values = {
        "maxmemory": 5 * MIB,
        "small_value_memory": MIB,
        "nvme_path": "/nowhere",
        "nvme_bytes": 1 << 40,
        "promote": "never",
        "shutdown_timeout": 1,
        **settings,
    }
    config = Config(**values)
    tier = GatedTier()
    with make_server(config, clock or Clock()) as server:
        async with open_files(server.cache, [tier], moves_of(config)) as mover:
            async with anyio.create_task_group() as tasks:
                server.mover = mover
                server.run_in(tasks)
                cold = Cold(server, tier)
                yield cold
                tier.reads.open()
                tier.writes.open()
                tier.notes.open()
                for session in list(server.sessions.values()):
                    session.lost()
                await cold.check()
                tasks.cancel_scope.cancel()


def parsed(data: bytes | bytearray) -> list[Any]:
    """Return the replies; errors are among them."""
    reader = hiredis.Reader(notEnoughData=...)
    reader.feed(bytes(data))
    return list(iter(reader.gets, ...))


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


async def replies(wire: FakeWire, count: int) -> list[Any]:
    """Wait for so many replies, and assert that there are no more."""
    data = bytearray()
    with anyio.fail_after(60):
        while len(parsed(data)) < count:
            await anyio.sleep(0.002)
            data += wire.drain()
    await settle()
    data += wire.drain()
    found = parsed(data)
    assert len(found) == count, found
    return found
