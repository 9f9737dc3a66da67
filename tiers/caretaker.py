"""Taking a tier out of use when its device fails, and back into use when that is over.

A probe does what failed: it makes a file in the directory, opens a segment if it must and writes a
batch. So a tier that is ok again can do its work; anything less would let it change every second.

A tier that is off has lost its records, and one whose files are gone lost them with the files. Both
come back empty, with a superblock that says that all before is void: files that appear again later
must not bring back what was overwritten meanwhile.
"""

import logging

import anyio

from respkv.errors import TierError
from respkv.tiers.batch import Bury
from respkv.tiers.checkpoint import CHECKPOINT_NAMES
from respkv.tiers.health import PROBE_S, why
from respkv.tiers.log import Logged
from respkv.tiers.parts import Parts, TierConfig
from respkv.tiers.pending import Pending
from respkv.tiers.record import Level
from respkv.tiers.segment_head import segment_name
from respkv.tiers.segments import Segment
from respkv.tiers.superblock import SUPERBLOCK_NAME, Superblock, encode_superblock

PROBE_NAME = "probe"
_PROBE_BYTES = 4096
_PROBE_MAX_S = 2.0
_BUSY_S = 0.005

logger = logging.getLogger(__name__)


class Caretaker:
    """Look after the health of one tier. is_running: while there is somebody who writes."""

    def __init__(self, config: TierConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self._turn = anyio.Lock()

    async def write_superblock(self, *, is_clean: bool) -> None:
        """Say, durably, how the directory is left and what is void. Raises OSError.

        One at a time: the last to be written is the one that knows most.
        """
        log = self._parts.log
        async with self._turn:
            superblock = Superblock(
                tier=self._config.name,
                alignment=self._config.alignment,
                segment_bytes=log.table.segment_bytes,
                is_clean=is_clean,
                boot_id=self._config.boot_id,
                void_below=log.void_below,
                next_sequence=log.next_sequence,
                next_generation=log.next_generation,
            )
            with anyio.CancelScope(shield=True):
                await log.device.replace(SUPERBLOCK_NAME, encode_superblock(superblock))

    async def void(self) -> None:
        """Say, durably, that all which was written is void. Raises OSError.

        Nobody should be told that a record is gone before: a key may then be put again at MEMORY.
        """
        log = self._parts.log
        log.void_below = log.next_sequence
        await self.write_superblock(is_clean=False)
        log.is_void = True

    async def empty(self) -> None:
        """Forget everything, and delete it. Raises OSError."""
        parts = self._parts
        await self.void()
        parts.log.forget(why="lost")
        for name in CHECKPOINT_NAMES:
            await parts.checkpointer.remove(name)
        for segment in list(parts.log.table.segments.values()):
            await self._is_unused(segment)
            if parts.log.table.segments.get(segment.id) is segment:
                await parts.space.remove(segment)

    async def _is_unused(self, segment: Segment) -> None:
        while True:
            if not (segment.readers or segment.writers or segment.state == "creating"):
                return
            await anyio.sleep(_BUSY_S)

    async def run(self) -> None:
        """Watch until cancelled."""
        health = self._parts.log.health
        while True:
            if health.state == "ok":
                await health.change()
            self._refuse()
            if health.state == "off":
                await self._give_up()
            await anyio.sleep(PROBE_S)
            await self._probe()

    def _refuse(self) -> None:
        parts, health = self._parts, self._parts.log.health
        reason = f"tier {health.name} is {health.state}: {health.reason}"
        parts.space.refuse()
        parts.writer.refuse(reason)
        parts.copier.refuse(reason)

    async def _give_up(self) -> None:
        log = self._parts.log
        if not any(True for _ in log.records()):
            return
        try:
            await self.void()
        except OSError as error:
            logger.error("tier %s could not be voided: %s", log.name, why(error))
        log.forget(why="lost")

    async def _probe(self) -> None:
        parts = self._parts
        health = parts.log.health
        parts.reclaimer.is_probing = True
        try:
            if health.state == "off" or await self._is_gone():
                await self.empty()
            await self._try()
            health.recover()
        except (OSError, TierError) as error:
            logger.debug("tier %s is still %s: %s", health.name, health.state, error)
        finally:
            parts.reclaimer.is_probing = False

    async def _is_gone(self) -> bool:
        """Say whether files were deleted, or the whole directory was. Raises OSError."""
        log = self._parts.log
        names = set(await log.device.names())
        ours = {
            segment_name(each.id)
            for each in log.table.segments.values()
            if each.state != "creating"
        }
        return not names >= ours | {SUPERBLOCK_NAME}

    async def _try(self) -> None:
        parts = self._parts
        parts.space.try_again()
        with anyio.CancelScope(shield=True):
            await parts.log.device.replace(PROBE_NAME, bytes(_PROBE_BYTES))
            await parts.log.device.remove(PROBE_NAME)
        pending = Pending(Level.DURABLE, parts.log.epoch, logged=Logged(Bury(b"", 0)))
        parts.writer.submit([pending])
        with anyio.move_on_after(_PROBE_MAX_S):
            await pending.done.wait()
        self._refuse_probe(pending)
        if pending.done.exception is not None:
            raise pending.done.exception

    def _refuse_probe(self, pending: Pending) -> None:
        if pending.done.status.name == "PENDING":
            pending.is_void = True
            self._refuse()
            pending.fail("a probe took too long")
