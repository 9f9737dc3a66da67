"""The janitor: work on the whole cache that nobody waits for, in small steps.

Expired entries that nobody asks for still take memory, so they are removed in the background, a few
hundred at a time with others served in between. When the server is idle the janitor also checks the
integrity of the whole state; a failed check is a bug, and the supervisor then empties the cache
(it may forget, it may not lie).
"""

from typing import Any, assert_never

import anyio.lowlevel

from respkv.engine.actor import Actor
from respkv.engine.cache import Cache
from respkv.engine.messages import Check, Sweep

SWEEP_STEP = 200


def make_janitor(cache: Cache) -> Actor:
    """Return the janitor of a cache, to be run by the supervisor."""

    async def handle(message: Any) -> None:
        match message:
            case Sweep():
                await _sweep(cache)
            case Check():
                cache.check()
            case _:
                assert_never(message)

    return Actor("janitor", handle, mailbox_max=4, jobs_max=1)


async def _sweep(cache: Cache) -> None:
    cache.clock.refresh()
    while cache.expire_due(SWEEP_STEP) == SWEEP_STEP:
        await anyio.lowlevel.checkpoint()
        cache.clock.refresh()
