"""The gpu tier of a server: made from its settings, and leases of the pages in it.

A lease on the device pins copies there until it is released, lapses or its connection ends, and
says how another process on the same device maps them: offsets into one allocation, and its CUDA
IPC handle. Pages that have no copy yet get one first.
"""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.to_thread

from respkv.config.kinds import size_text
from respkv.engine.entry import Entry
from respkv.engine.gpu_actor import open_gpu
from respkv.engine.gpu_copies import GpuCopy
from respkv.engine.placement import GpuPromote
from respkv.errors import CacheError, CommandError, LeaseGone, TierError
from respkv.server.loads import is_cold

if TYPE_CHECKING:
    from respkv.engine.leases import Lease
    from respkv.server.session import Session
    from respkv.server.state import Server
    from respkv.tiers.gpu import GpuTier

logger = logging.getLogger(__name__)

NOTICE = 20
BRINGERS_MAX = 8  # pages of one command that are brought to the device at a time


@asynccontextmanager
async def having_gpu(server: "Server") -> AsyncIterator["GpuTier | None"]:
    """Take the device's memory and pin the arena while the block runs; None without the tier.

    Raises TierError when there is no torch, no such device, or not so much memory on it.
    """
    config = server.config
    if not config.gpu_bytes:
        yield None
        return
    tier = await anyio.to_thread.run_sync(
        _open, config.gpu_device, config.gpu_bytes, server.arena.view
    )
    logger.log(
        NOTICE,
        "tier gpu on %s, %s%s",
        config.gpu_device,
        size_text(tier.capacity_bytes),
        "" if tier.pinned is None else ", arena pinned",
    )
    try:
        yield tier
    finally:
        tier.close()


@asynccontextmanager
async def using_gpu(server: "Server", tier: "GpuTier | None") -> AsyncIterator[None]:
    """Keep copies of pages in the tier while the block runs, if there is one."""
    if tier is None:
        yield
        return
    promote = cast(GpuPromote, server.config.gpu_promote)
    async with open_gpu(server.cache, tier, promote) as actor:
        server.gpu, server.gpu_tier = actor, tier
        if server.mover is not None:
            server.mover.loader.gpu = actor
        try:
            yield
        finally:
            server.gpu = server.gpu_tier = None
            if server.mover is not None:
                server.mover.loader.gpu = None


def _open(device: str, nbytes: int, arena: memoryview) -> "GpuTier":
    try:
        from respkv.tiers.gpu import GpuTier
    except ImportError as error:
        raise TierError(
            f"gpu-bytes {nbytes}: the gpu tier needs torch ({error}); install respkv[torch],"
            " or leave it at 0"
        ) from error
    return GpuTier.open(device, nbytes, arena)


def check_gpu(session: "Session") -> None:
    """Raise CommandError unless there is a gpu tier."""
    if session.server.gpu is None:
        raise CommandError("this server has no gpu tier; start it with --gpu-bytes")


async def lease_on_gpu(session: "Session", keys: list[bytes], deadline: float) -> None:
    """Pin pages on the device; answer with the lease, where each is, the device and its handle.

    Raises TierError when the memory cannot be shared, or a page not be brought; LeaseGone when
    bringing them took longer than the lease.
    Cancelled: nothing is held.
    """
    check_gpu(session)
    cache = session.cache
    gpu = cache.gpu
    device, handle, base = ("", b"", 0) if session.server.is_embedded else gpu.tier.handle()
    if session.is_lost:  # before this task began: nobody would ever end the lease
        raise LeaseGone("the connection has gone")
    found = [cache.use(key) for key in keys]
    lease = gpu.begin_lease(session.number, deadline)
    try:
        copies = await _Gathering(session, lease).gather(found)
        gpu.leases.get(session.number, lease.number)
    except BaseException:
        gpu.leases.end(session.number, lease.number)
        raise
    there = [None if entry is None else copies.get(entry) for entry in found]
    places: list[Any] = [
        None if copy is None else [base + copy.slot.offset, copy.form.nbytes, copy.form.name]
        for copy in there
    ]
    cache.stats.bytes_out += sum(copy.form.nbytes for copy in copies.values())
    cache.stats.bytes_sent_in_place += sum(copy.form.nbytes for copy in copies.values())
    session.send([lease.number, places, device, handle])


class _Gathering:
    """The copies that one lease is to hold, some of which have to be made."""

    def __init__(self, session: "Session", lease: "Lease") -> None:
        self._server = session.server
        self._gpu = session.cache.gpu
        self._lease = lease
        self._copies: dict[Entry, GpuCopy] = {}
        self._error: CacheError | None = None

    async def gather(self, found: list[Entry | None]) -> dict[Entry, GpuCopy]:
        """Have the lease hold a copy of every entry that can have one."""
        entries = dict.fromkeys(entry for entry in found if entry is not None)
        for entry in entries:
            self._hold(entry)
        missing = iter([entry for entry in entries if entry not in self._copies])
        async with anyio.create_task_group() as tasks:
            for _ in range(min(BRINGERS_MAX, len(entries) - len(self._copies))):
                tasks.start_soon(self._bring_all, missing)
        if self._error is not None:
            raise self._error
        return self._copies

    def _hold(self, entry: Entry) -> None:
        if entry not in self._copies:
            copy = self._gpu.add_to_lease(self._lease, entry)
            if copy is not None:
                self._copies[entry] = copy

    async def _bring_all(self, missing: Iterator[Entry]) -> None:
        for entry in missing:
            try:
                await self._bring(entry)
            except CacheError as error:
                self._error = self._error or error
            if self._error is not None:
                return

    async def _bring(self, entry: Entry) -> None:
        """Copy a page to the device, from a file if it is in no memory."""
        actor, mover = self._server.gpu, self._server.mover
        if actor is None or self._gpu.form_of(entry) is None:
            return
        if not is_cold(entry) or mover is None:
            await actor.bring(entry, lambda: self._hold(entry))
            return
        load = mover.start_load(entry)
        try:
            await load.wait()
            if load.error is not None and is_cold(entry):
                raise load.error
            await actor.bring(entry, lambda: self._hold(entry))
        finally:
            mover.release(load)
