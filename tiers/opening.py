"""Opening a directory: what recovery found becomes a running log.

Recovery decides what may be kept, by rules that look at how the tier was left. They must not decide
twice: what was dropped because the machine went down must not come back after the next crash, when
it did not. So after anything but a clean stop there is a new checkpoint, and no older one, before
the superblock says that the tier is in use.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from anyio.lowlevel import checkpoint

from respkv.errors import TierError
from respkv.tiers.batch import Change
from respkv.tiers.caretaker import Caretaker
from respkv.tiers.checkpoint import CHECKPOINT_NAMES
from respkv.tiers.checkpointer import SMALL_FILES_BYTES
from respkv.tiers.device import Device
from respkv.tiers.health import NO_SPACE
from respkv.tiers.log import Logged
from respkv.tiers.parts import SEGMENTS_MIN, Parts, TierConfig
from respkv.tiers.record import Meta, Record
from respkv.tiers.recovery import Recovered, RecoveryCounts, recover
from respkv.tiers.segments import Segment, SegmentTable
from respkv.tiers.space import RELOCATED

_OFFERED_AT_ONCE = 1024
_SAVED = "schemas.json"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Recovery:
    """What a start found. records: that were offered and wanted."""

    is_new: bool
    records: int
    next_generation: int
    counts: RecoveryCounts
    messages: list[str] = field(default_factory=list[str])


class Opened:
    """A log on its way to be used."""

    def __init__(self, parts: Parts, recovered: Recovered) -> None:
        self.parts = parts
        self.recovery = Recovery(
            recovered.is_new,
            0,
            recovered.next_generation,
            recovered.counts,
            recovered.messages,
        )
        self._recovered = recovered
        self._surplus: list[Segment] = []
        self._adopt()
        for message in recovered.messages:
            logger.warning("tier %s: %s", parts.log.name, message)

    @property
    def _was_left_clean(self) -> bool:
        superblock = self._recovered.superblock
        return (
            superblock is not None
            and superblock.is_clean
            and self._recovered.next_sequence == superblock.next_sequence
        )

    def _adopt(self) -> None:
        recovered, log = self._recovered, self.parts.log
        log.next_sequence = recovered.next_sequence
        log.acked = recovered.next_sequence - 1
        log.void_below = recovered.void_below
        log.next_generation = recovered.next_generation
        for meta, record in recovered.found:
            log.adopt(record, meta)
        for segment_id, sequence, note in sorted(recovered.notes, key=lambda each: each[1]):
            logged = Logged(note, sequence, segment_id)
            log.notes.setdefault(segment_id, []).append(logged)
            if isinstance(note, Change):
                log.changes[note.meta.generation] = logged
        for segment in log.table.segments.values():
            if segment.state == "free":
                self.parts.space.short.add(segment.id)
        if recovered.checkpoint is not None:
            self.parts.checkpointer.covered[recovered.checkpoint] = recovered.checkpoint_sequence

    async def measure(self) -> None:
        """Find out how large the files beside the segments are, and what is above the cap."""
        log, checkpointer = self.parts.log, self.parts.checkpointer
        names = await log.device.names()
        for name in CHECKPOINT_NAMES:
            if name in names:
                checkpointer.file_bytes[name] = await log.device.open(name)
        if _SAVED in names:
            checkpointer.saved[_SAVED] = len(await log.device.load(_SAVED) or b"")
        checkpointer.reserve()
        self._choose_surplus()
        self._check_size()
        self._make_way()

    async def offer(self, found: Callable[[Meta, Record], bool]) -> None:
        """Show everybody what is there; what is not wanted is freed."""
        log = self.parts.log
        for number, (meta, record) in enumerate(self._recovered.found):
            if log.is_live(record):
                if found(meta, record):
                    self.recovery.records += 1
                else:
                    log.discard(record)
            if number % _OFFERED_AT_ONCE == 0:
                await checkpoint()
        log.stats.recovered = self.recovery.records
        log.stats.skipped_damaged = self._recovered.counts.damaged

    async def secure(self, caretaker: Caretaker) -> None:
        """Make what was decided durable. Raises OSError, TierError."""
        parts, recovered = self.parts, self._recovered
        if not recovered.is_new and (self._surplus or not self._was_left_clean):
            for segment in parts.log.table.segments.values():
                if segment.state in ("sealed", "open") and segment.max_sequence:
                    parts.syncer.wrote(segment.id, segment.max_sequence)
            await self._write_checkpoint()
            for name, sequence in list(parts.checkpointer.covered.items()):
                if sequence < parts.log.acked or not sequence:
                    await parts.checkpointer.remove(name)
        for segment in self._surplus:
            await parts.space.remove(segment)
        await caretaker.write_superblock(is_clean=False)

    async def _write_checkpoint(self) -> None:
        """Write one, if need be at the expense of segments: a full disk must not end the tier.

        A power cut may bring back files that had been deleted, so there can be more than before.
        """
        while True:
            try:
                return await self.parts.checkpointer.write(without=())
            except OSError as error:
                if error.errno not in NO_SPACE or not await self._delete_one():
                    raise

    async def _delete_one(self) -> bool:
        """Delete the segment that is missed least; what is in it will be in no checkpoint."""
        log = self.parts.log
        for segment in list(log.table.segments.values()):
            if segment.state == "open":
                log.table.seal(segment)
        found = self._surplus.pop() if self._surplus else log.table.find_free()
        found = found or log.table.choose_victim(log.clock())
        if found is None:
            return False
        for record in list(log.live.get(found.id, ())):
            log.drop(record, "evicted", is_buried=True)
        await self.parts.space.remove(found)
        return True

    def _choose_surplus(self) -> None:
        """Choose segments to delete when the cap was lowered, and forget what is in them."""
        log = self.parts.log
        table = log.table
        while table.excess_bytes > len(self._surplus) * table.segment_bytes:
            for segment in list(table.segments.values()):
                if segment.state == "open":
                    table.seal(segment)
            found = table.find_free() or table.choose_victim(
                log.clock(), may=lambda each: each not in self._surplus
            )
            if found is None:
                break
            for record in list(log.live.get(found.id, ())):
                log.discard(record)
            table.fence(found)
            self._surplus.append(found)

    def _make_way(self) -> None:
        """Where crashes have left no segment free, let reclaim go on at the end of one.

        What was open is sealed by a crash, however little was in it, because writes may have been
        on their way. So short lives use up all segments, and with no place for what is to be kept
        reclaim would have to drop it. The checkpoint to come tells the next start where to read on.
        """
        table = self.parts.log.table
        sealed = [
            each
            for each in table.segments.values()
            if each.state == "sealed" and each not in self._surplus
        ]
        if sealed and not self._was_left_clean and not self.parts.space.num_ready:
            table.reopen(min(sealed, key=lambda each: each.offset), stream=RELOCATED)

    def _check_size(self) -> None:
        table = self.parts.log.table
        count = (table.capacity_bytes - table.reserve_bytes) // table.segment_bytes
        if count < SEGMENTS_MIN:
            raise TierError(
                f"tier {self.parts.log.name}: {table.capacity_bytes} bytes have room for {count} "
                f"segments of {table.segment_bytes} bytes, {SEGMENTS_MIN} are needed: give it more "
                "bytes, or make segment-bytes smaller and start with an empty directory"
            )


async def open_log(
    config: TierConfig,
    device: Device,
    assemble: Callable[[Device, SegmentTable], Parts],
    clock: Callable[[], float],
) -> Opened:
    """Recover what a directory holds. Nothing is written. Raises OSError, TierError."""
    recovered = await recover(
        device,
        tier=config.name,
        alignment=config.alignment,
        segment_bytes=config.new_segment_bytes(),
        capacity_bytes=config.capacity_bytes,
        reserve_bytes=SMALL_FILES_BYTES,
        boot_id=config.boot_id,
        now=clock(),
    )
    opened = Opened(assemble(device, recovered.segments), recovered)
    await opened.measure()
    return opened
