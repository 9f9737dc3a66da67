"""A cache with file tiers, for the tests of the engine."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.files import open_files
from respkv.engine.mover import Mover
from respkv.engine.placement import MoveSettings
from respkv.tiers.record import Level
from tests.engine.fake_tier import FakeTier

PAGE = Put("kvpage")
WRITTEN = Put(level=Level.WRITTEN)
DURABLE = Put(level=Level.DURABLE)
# Longer than any machine stands still: what takes so long does not come at all.
GIVE_UP_S = 60.0


@asynccontextmanager
async def opened(
    cache: Cache, *tiers: FakeTier, settings: MoveSettings | None = None
) -> AsyncIterator[Mover]:
    """Open file tiers for a cache; check both when they are closed."""
    settings = settings or MoveSettings(reserve_timeout_s=GIVE_UP_S, shutdown_timeout_s=GIVE_UP_S)
    async with open_files(cache, list(tiers), settings) as mover:
        yield mover
        cache.check()
        for tier in tiers:
            tier.check()
    cache.check()


async def until(is_so: Callable[[], bool]) -> None:
    """Let others run until something is so; a test that waits for ever is ended by the clock."""
    with anyio.fail_after(GIVE_UP_S):
        while not is_so():  # noqa: ASYNC110 (many things end a wait; none of them says so)
            await anyio.sleep(0.001)


async def settled(cache: Cache, mover: Mover, since: int = 0) -> None:
    """Wait for all that was noted after ``since``."""
    await mover.settle(cache.copies.ticket, since)


async def clean(cache: Cache, mover: Mover) -> None:
    """Write everything that is dirty."""
    await mover.drain(GIVE_UP_S)
    assert not cache.copies.num_dirty


async def make_cold(cache: Cache, mover: Mover) -> None:
    """Write everything, then drop it from memory."""
    await clean(cache, mover)
    for entry in list(cache.entries.values()):
        if not entry.is_cold:
            cache.demote(entry)
    assert cache.num_cold == len(cache.entries)


async def load(mover: Mover, entry: Entry) -> None:
    """Load an entry and let it go at once."""
    found = mover.start_load(entry)
    try:
        await found.wait()
    finally:
        mover.release(found)


async def get(cache: Cache, mover: Mover, key: bytes) -> bytes | None:
    """Do as GET does."""
    entry = cache.find(key)
    if entry is None:
        return None
    found = mover.start_load(entry)
    try:
        await found.wait()
        if found.error is not None:
            raise found.error
        entry = cache.find(key)
        if entry is None or entry.is_cold:
            return None
        return cache.copy(entry)
    finally:
        mover.release(found)
