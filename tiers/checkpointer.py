"""Writing checkpoints, now and then, while the log goes on.

Segments are synced before its end, so that what a checkpoint says is there after a power cut as
well. The two files are written in turn and in place: the one that is being written counts for
nothing until it is whole.
"""

import errno
import logging
import mmap
import os
import time
from collections.abc import Callable, Collection, Iterator

import anyio
from anyio.lowlevel import checkpoint

from respkv.tiers.batch import HEAD_PREFIX_BYTES
from respkv.tiers.batch_reader import peek
from respkv.tiers.checkpoint import (
    BLOCK_BYTES,
    CHECKPOINT_NAMES,
    CheckpointHead,
    checkpoint_bytes_max,
    encode_checkpoint,
)
from respkv.tiers.device import Write
from respkv.tiers.health import NO_SPACE, why
from respkv.tiers.log import Log
from respkv.tiers.record import Meta, Record
from respkv.tiers.segment_head import segment_name
from respkv.tiers.segments import Tail
from respkv.tiers.sizes import round_up
from respkv.tiers.space import Space
from respkv.tiers.staging import Staging
from respkv.tiers.syncer import Syncer

WRITTEN_BYTES_MIN = 256 << 20
WRITTEN_SHARE = 8  # times the size of the last one
NOTES_MAX = 50_000  # since the last one, or as many as there are records
REFUSALS_MAX = 3
STEP_BYTES = 4 * BLOCK_BYTES
SMALL_FILES_BYTES = 64 << 10  # superblock twice, lock, probe, and the blocks that they end in
_UNIT_BYTES = 4096
_TICK_S = 1.0
_ROOM_S = 30.0

logger = logging.getLogger(__name__)


class Checkpointer:
    """Write the checkpoints of one log.

    covered:     by file: the sequence up to which it is complete; 0: it is not whole, or not there.
    saved:       the bytes of small files that others keep in the directory, by name.
    generation:  tells the next generation that nobody has used.
    """

    def __init__(
        self,
        log: Log,
        space: Space,
        syncer: Syncer,
        staging: Staging,
        generation: Callable[[], int],
        *,
        interval_s: float,
    ) -> None:
        self._log = log
        self._space = space
        self._syncer = syncer
        self._staging = staging
        self._generation = generation
        self._interval_s = interval_s
        self._turn = anyio.Lock()
        self.covered: dict[str, int] = dict.fromkeys(CHECKPOINT_NAMES, 0)
        self.file_bytes: dict[str, int] = dict.fromkeys(CHECKPOINT_NAMES, 0)
        self.saved: dict[str, int] = {}
        self._last_s = log.clock()
        self._last_bytes = 0
        self._last_written = 0
        self._last_noted = 0
        self._refusals = 0  # by a full file system, in a row, when reclaim had no other way
        self._is_capped = False  # a start may find more than the cap, and has to say what goes
        self._last_state = (-1, -1, -1)

    @property
    def bytes_max(self) -> int:
        """At most how large a checkpoint would be now."""
        log = self._log
        segments = len(log.table.segments)
        return checkpoint_bytes_max(log.table.live_records, log.key_bytes, segments)

    @property
    def other_bytes(self) -> int:
        """Bytes of all files but segments, old ones that are being replaced counted as well."""
        return SMALL_FILES_BYTES + 2 * sum(self.saved.values()) + sum(self.file_bytes.values())

    def reserve(self) -> None:
        """Keep room for two checkpoints under the cap; reclaim deletes files when there is none."""
        # More than would be asked for now: when a checkpoint has grown into what segments have
        # taken meanwhile, reclaim may need one to give any of them back.
        needed = max(self.bytes_max * 5 // 4, self._planned_bytes() + BLOCK_BYTES)
        each = max(needed, *self.file_bytes.values())
        self._log.table.reserve_bytes = SMALL_FILES_BYTES + 2 * sum(self.saved.values()) + 2 * each
        if self._log.table.excess_bytes:
            self._space.wanted.set()

    async def run(self) -> None:
        """Write one whenever it is time, until cancelled."""
        self._is_capped = True
        while True:
            await anyio.sleep(min(_TICK_S, self._interval_s))
            self.reserve()
            if self._is_due() and self._log.health.can_write:
                await self.try_write()

    async def try_write(self, *, without: Collection[Record] | None = None) -> bool:
        """Write one; what fails is counted and told, and tried again later. See ``write``."""
        log = self._log
        try:
            await self.write(without=without)
        except OSError as error:
            log.stats.checkpoint_errors += 1
            logger.error("tier %s: no checkpoint could be written: %s", log.name, why(error))
            if error.errno not in NO_SPACE:
                log.health.write_failed(error)
            elif without is not None and error.errno == errno.ENOSPC:
                # Reclaim's last resort: what the file system has is not enough even for this.
                self._refusals += 1
                if self._refusals >= REFUSALS_MAX:
                    log.health.worsen("read-only", f"there is no space: {why(error)}")
            return False
        self._refusals = 0
        return True

    async def cover(self, tail: Tail | None) -> bool:
        """See that the end of a segment is there, or else that a checkpoint has what was in it.

        For the segment whose head tells of it is to be used again; then nothing would miss a write
        that the disk never carried out. Returns False when neither is so.
        """
        log = self._log
        if tail is None or tail.sequence <= max(self.covered.values()):
            return True
        segment = tail.segment
        if log.table.segments.get(segment.id) is not segment or segment.nonce != tail.nonce:
            return True  # it was used again itself
        skip = tail.offset % _UNIT_BYTES
        memory = memoryview(mmap.mmap(-1, round_up(skip + HEAD_PREFIX_BYTES, _UNIT_BYTES)))
        segment.readers += 1
        try:
            with anyio.CancelScope(shield=True):
                await log.device.read(segment_name(segment.id), tail.offset - skip, memory)
        except OSError:
            log.stats.read_errors += 1
        finally:
            segment.readers -= 1
        is_there = peek(memory[skip:]) == (tail.nonce, tail.sequence)
        return is_there or await self.try_write(without=())

    async def write(
        self, *, is_clean: bool = False, without: Collection[Record] | None = None
    ) -> None:
        """Write a checkpoint over the older one.

        is_clean: nothing is written to the log any more.
        without:  records to leave out; then nobody is asked for room: it is reclaim who writes, or
                  there is no reclaim yet.
        Raises OSError; the other one stays.
        """
        if without is None and not is_clean:
            await self.make_room()
            try:
                return await self._write(is_clean, ())
            except OSError as error:
                is_full = error.errno in NO_SPACE
                if not (is_full and self._space.give_up(self._planned_bytes())):
                    raise
            await self.make_room()
        await self._write(is_clean, without or ())

    async def _write(self, is_clean: bool, without: Collection[Record]) -> None:
        """Write one where there is room. Nothing here waits for reclaim, which may want a turn."""
        async with self._turn:
            self._last_s = self._log.clock()
            name = min(CHECKPOINT_NAMES, key=lambda each: self.covered[each])
            blocks, sequence, state = self._encode(is_clean, without)
            self.covered[name] = 0
            nbytes = await self._write_blocks(name, blocks)
            with anyio.CancelScope(shield=True):
                await self._log.device.sync(name)
            self.covered[name] = sequence
            self._last_bytes, self._last_state = nbytes, state
            self._last_written = self._log.stats.written_bytes
            self._last_noted = self._log.num_noted
            self._log.stats.checkpoints += 1
            for _ in self._log.forget_notes(min(self.covered.values())):
                await checkpoint()

    async def make_room(self) -> None:
        """Wait until two checkpoints have room under the cap. Raises TimeoutError."""
        self.reserve()
        with anyio.fail_after(_ROOM_S):
            while self._log.table.excess_bytes and self._log.health.can_write:
                self._space.wanted.set()
                await anyio.sleep(0.01)

    async def remove(self, name: str) -> None:
        """Delete a checkpoint that must not be used any more. Raises OSError."""
        self.covered[name] = 0
        await self._log.device.remove(name)
        self.file_bytes[name] = 0

    def _is_due(self) -> bool:
        log = self._log
        written = log.stats.written_bytes - self._last_written
        if written > max(WRITTEN_BYTES_MIN, WRITTEN_SHARE * self._last_bytes):
            return True
        if log.num_noted - self._last_noted > max(NOTES_MAX, log.table.live_records):
            return True  # they are all kept in memory until two checkpoints cover them
        return log.clock() - self._last_s >= self._interval_s and self._last_state != self._state()

    def _state(self) -> tuple[int, int, int]:
        log = self._log
        return log.acked, log.table.live_records, log.table.live_bytes

    def _encode(
        self, is_clean: bool, without: Collection[Record]
    ) -> tuple[Iterator[bytes], int, tuple[int, int, int]]:
        log = self._log
        if log.acked == log.next_sequence - 1:
            # A number of its own, so that of two checkpoints the newer one has the greater.
            log.acked = log.next_sequence
            log.next_sequence += 1
        head = CheckpointHead(
            sequence=log.acked,
            next_generation=max(self._generation(), log.next_generation),
            next_sequence=log.next_sequence,
            void_below=log.void_below,
            written_ms=int(time.time() * 1000),
            is_clean=is_clean,
        )
        rows = log.table.rows()
        found = self._found(list(log.records()), without)
        blocks = encode_checkpoint(head, rows, found, nonce=os.urandom(8))
        return blocks, head.sequence, self._state()

    def _found(
        self, records: list[Record], without: Collection[Record]
    ) -> Iterator[tuple[Meta, Record]]:
        for record in records:
            if record not in without and self._log.is_live(record):
                yield self._log.describe(record), record

    def _planned_bytes(self) -> int:
        # What the encoder leaves free at the ends of blocks is little when keys are short.
        return round_up(self.bytes_max * 5 // 8, BLOCK_BYTES) + BLOCK_BYTES

    async def _write_blocks(self, name: str, blocks: Iterator[bytes]) -> int:
        await self._create(name, self._planned_bytes())
        memory = await self._staging.take(STEP_BYTES)
        try:
            at = used = 0
            last = next(blocks)
            for block in blocks:
                memory[used : used + len(last)] = last
                used += len(last)
                if used + 2 * BLOCK_BYTES > STEP_BYTES:
                    at, used = await self._put(name, at, memory[:used]), 0
                await checkpoint()
                last = block
            # Records that were copied before their turn are left out, for the replay to find: so
            # the copies must be durable before this checkpoint is whole, which its last block makes
            # it. What is copied from now on is in it, at the place that stays until the copy is.
            await self._syncer.sync_all()
            memory[used : used + len(last)] = last
            return await self._put(name, at, memory[: used + len(last)])
        finally:
            self._staging.give_back(memory)

    async def _put(self, name: str, at: int, data: memoryview) -> int:
        end = at + data.nbytes
        if end > self.file_bytes[name]:
            await self._create(name, end + STEP_BYTES)
        with anyio.CancelScope(shield=True):
            await self._log.device.write(name, [Write(at, data)])
        self._log.stats.written_bytes += data.nbytes
        return end

    async def _create(self, name: str, nbytes: int) -> None:
        """Make a file this large, if the cap has room for it now. Raises OSError."""
        table = self._log.table
        before = self.file_bytes[name]
        self.file_bytes[name] = max(before, nbytes)
        self.reserve()  # from here on no segment can take this room
        if self._is_capped and table.file_bytes + self.other_bytes > self._space.cap_bytes:
            self.file_bytes[name] = before
            raise OSError(errno.EDQUOT, "the cap has no room for a checkpoint")
        try:
            with anyio.CancelScope(shield=True):
                await self._log.device.create(name, nbytes)
        except OSError:
            await self.remove(name)
            raise
        self.file_bytes[name] = nbytes
