"""Stopping a tier, in bounded time, so that the next start need not read the log."""

import logging

import anyio

from respkv.tiers.caretaker import Caretaker
from respkv.tiers.health import why
from respkv.tiers.parts import Parts

logger = logging.getLogger(__name__)


async def finish(parts: Parts) -> None:
    """Write what was asked, and see that the last checkpoint will have room."""
    await parts.writer.drain()
    try:
        await parts.checkpointer.make_room()
    except OSError as error:
        logger.error("tier %s: no room for a checkpoint: %s", parts.log.name, why(error))


async def leave_clean(parts: Parts, caretaker: Caretaker) -> None:
    """Say all in a last checkpoint. When that fails, the tier is left like after a crash."""
    if not parts.log.health.can_write:
        return
    try:
        await parts.checkpointer.write(is_clean=True)
        await caretaker.write_superblock(is_clean=True)
    except OSError as error:
        logger.error("tier %s could not be left clean: %s", parts.log.name, why(error))


async def close_after(parts: Parts, seconds: float, patience_s: float) -> None:
    """Close a device that does not answer: everything that waits for it ends then."""
    await anyio.sleep(seconds)
    logger.error("tier %s does not stop: its device is closed", parts.log.name)
    await parts.log.device.close(patience_s)
