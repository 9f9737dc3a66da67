"""The file tiers of a running server: recovered at the start, drained and closed at the end."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio

from respkv.engine.actor import Actor
from respkv.engine.cache import Cache
from respkv.engine.mover import Mover
from respkv.engine.placement import MoveSettings
from respkv.engine.restore import Restore
from respkv.engine.supervisor import supervise
from respkv.engine.tier import Tier
from respkv.engine.tier_actor import TierActor
from respkv.errors import CacheError

logger = logging.getLogger(__name__)

LEAVE_S = 1.0  # for writes that are on their way when the time is up
CLOSE_S, CLOSE_S_MIN = 10.0, 2.0  # for what has been written to be synced, and a last checkpoint


@asynccontextmanager
async def open_files(
    cache: Cache,
    tiers: Sequence[Tier],
    settings: MoveSettings,
    started: Callable[[Mover], Awaitable[None]] | None = None,
    stale: Container[int] = (),
) -> AsyncIterator[Mover]:
    """Recover what file tiers hold and move values to and from them while the block runs.

    tiers:   fastest first, not started; the same process starts none of them twice.
    started: called when all have been read, before entries are told their namespaces.
    stale:   numbers of tiers whose logs were not told all that has ended since.
    Raises TierError when a tier cannot be opened; those opened before are closed again.

    When the block is left, what is in memory alone is written and every tier is closed, within
    ``shutdown_timeout_s``. When it is left by a crash nothing is: what was written before it counts.
    """
    actors: list[Actor] = [TierActor(tier) for tier in tiers]
    mover = Mover(cache, tiers, actors, settings)
    try:
        await _start(cache, mover, started, stale)
    except BaseException:
        for actor in actors:
            actor.abandon()
        raise
    async with anyio.create_task_group() as tasks:
        for number, actor in enumerate(actors):
            tasks.start_soon(supervise, actor, partial(mover.forget, number))
        tasks.start_soon(mover.run)
        try:
            yield mover
        except Exception:
            tasks.cancel_scope.cancel()
            raise
        finally:
            if not tasks.cancel_scope.cancel_called:
                give_up = anyio.current_time() + settings.shutdown_timeout_s
                with anyio.CancelScope(shield=True):
                    await mover.drain(settings.shutdown_timeout_s)
                    with anyio.move_on_after(LEAVE_S):
                        await mover.stop()
                    left_s = max(CLOSE_S_MIN, give_up - anyio.current_time())
                    await _stop(mover.tiers, left_s)
                tasks.cancel_scope.cancel()


async def _start(
    cache: Cache,
    mover: Mover,
    started: Callable[[Mover], Awaitable[None]] | None,
    stale: Container[int],
) -> None:
    opened: list[Tier] = []
    restore = Restore(cache, mover.tiers, stale)
    cache.copies.use(mover.tiers)
    cache.has_files = cache.copies.is_on
    mover.hook()
    try:
        for number, tier in enumerate(mover.tiers):
            await tier.start(partial(restore.found, number))
            opened.append(tier)
            cache.slabs.skip_generations(tier.next_generation)
        cache.copies.use(mover.tiers)  # what they take is known only now
        if started is not None:
            await started(mover)
        restore.finish()
        restore.bury()
        restore.tell()
        cache.accounts.enforce()
    except BaseException:
        with anyio.CancelScope(shield=True):
            await _stop(opened)
        raise


async def _stop(tiers: Sequence[Tier], seconds: float = CLOSE_S) -> None:
    for tier in tiers:
        try:
            await tier.stop(seconds)
        except CacheError as error:
            logger.error("%s: not closed cleanly: %s", tier.name, error)
