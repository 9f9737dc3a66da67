"""Where the next batch goes: which segment a stream continues in when its own is full.

There are two streams. What askers write goes into the first; what reclaim copies goes into the
second, so that values which stay do not end up beside values which just came. The last segment that
can be had is reclaim's: without it a full log could not be cleaned.

A file system may be full before the cap is reached. Then the cap is taken to be what there is, and
tried again some seconds later.
"""

import errno
import mmap
import os

import anyio

from respkv.tiers.device import Write
from respkv.tiers.health import NO_SPACE
from respkv.tiers.log import Log
from respkv.tiers.segment_head import (
    SEGMENT_HEAD_BYTES,
    SegmentHead,
    encode_segment_head,
    segment_name,
)
from respkv.tiers.segments import Segment, Tail
from respkv.tiers.syncer import Syncer

ASKED, RELOCATED = STREAMS = (0, 1)
GROW_AFTER_S = 5.0
_LOOK_S = 1.0
_LEVELS = 16  # of all segments, one in so many is kept ready
_READY_MAX = 8
_HEAD_TRIES = 2


class Space:
    """Free segments and files, and those who wait for one.

    wanted: set when somebody cannot go on without reclaim.
    short: free segments found at the start, whose files may not have their full size.
    is_used_up: the last attempt to reclaim found nothing that could ever be reclaimed.
    """

    def __init__(self, log: Log, syncer: Syncer) -> None:
        self._log = log
        self._syncer = syncer
        self._capacity_bytes = log.table.capacity_bytes
        self._full_s = -GROW_AFTER_S
        self._heads = {
            stream: memoryview(mmap.mmap(-1, 2 * SEGMENT_HEAD_BYTES)) for stream in STREAMS
        }
        self._more = anyio.Event()
        self._refusals = 0
        self.wanted = anyio.Event()
        self.short: set[int] = set()
        self.is_used_up = False

    @property
    def cap_bytes(self) -> int:
        """What was given to all files together, however much of it the file system has."""
        return self._capacity_bytes

    @property
    def num_ready(self) -> int:
        """How many segments can be opened without reclaim."""
        table = self._log.table
        self._grow()
        room = table.capacity_bytes - table.reserve_bytes - table.file_bytes
        free = sum(segment.state == "free" for segment in table.segments.values())
        return free + max(0, room // table.segment_bytes)

    @property
    def is_low(self) -> bool:
        table = self._log.table
        total = (table.capacity_bytes - table.reserve_bytes) // table.segment_bytes
        return self.num_ready < max(2, min(total // _LEVELS, _READY_MAX))

    async def open_next(self, stream: int) -> None:
        """Open another segment for a stream, as soon as there is one.

        Raises OSError: its head could not be written, no file could be made and nothing can be
        reclaimed, or the tier gave up meanwhile. Reclaim's own stream never waits, because it would
        wait for itself.
        """
        refusals = self._refusals
        while (segment := await self._find(stream)) is None:
            if stream == RELOCATED:
                raise _no_space()
            self.wanted.set()
            with anyio.move_on_after(_LOOK_S):
                await self._more.wait()
            if self._refusals != refusals or (self.is_used_up and not self.num_ready):
                raise _no_space()
        await self._open(segment, stream)
        if self.is_low:
            self.wanted.set()

    def has_room(self, stream: int, nbytes: int) -> bool:
        """Say whether a stream could go on for so many bytes, less than a segment."""
        table = self._log.table
        return self.num_ready > 0 or any(
            segment.state == "open"
            and segment.stream == stream
            and segment.offset + nbytes <= table.segment_bytes
            for segment in table.segments.values()
        )

    def woke(self, *, is_used_up: bool) -> None:
        """Reclaim has done what it could; those who wait look again."""
        self.is_used_up = is_used_up
        self._more.set()
        self._more = anyio.Event()

    def refuse(self) -> None:
        """Turn away all who wait for space: the tier does not write any more."""
        self._refusals += 1
        self._more.set()
        self._more = anyio.Event()

    def met_the_end(self) -> None:
        """The file system is full: what there is now is all that can be had for a while."""
        table = self._log.table
        table.capacity_bytes = min(table.capacity_bytes, table.file_bytes + table.reserve_bytes)
        self._full_s = self._log.clock()

    def give_up(self, nbytes: int) -> bool:
        """Ask reclaim to delete segments for ``nbytes`` of other files; False: there are none."""
        table = self._log.table
        self.met_the_end()
        table.capacity_bytes -= -(-nbytes // table.segment_bytes) * table.segment_bytes
        self.wanted.set()
        return len(table.segments) > 1

    def try_again(self) -> None:
        """Take the cap for what can be had again."""
        self._full_s = -GROW_AFTER_S
        self._grow()

    async def remove(self, segment: Segment) -> None:
        """Delete the file of a free or fenced segment that nothing points into.

        Raises OSError.
        """
        table = self._log.table
        assert table.segments.get(segment.id) is segment, "it is gone already"
        table.fence(segment)
        segment.writers += 1  # so that nobody else takes it for a victim
        try:
            await self._log.device.remove(segment_name(segment.id))
        finally:
            segment.writers -= 1
        self._syncer.forget(segment.id)
        self._log.doomed.discard(segment.id)
        self._log.notes.pop(segment.id, None)  # of what was forgotten while it was on its way
        self.short.discard(segment.id)
        table.remove(segment)

    async def _find(self, stream: int) -> Segment | None:
        """Return a free segment, made now if need be; None when this stream must wait."""
        table = self._log.table
        # The last one is reclaim's, unless there are so few that nothing would go on.
        left = 1 if stream == ASKED and len(table.segments) > 2 else 0
        while self.num_ready > left:
            free = table.find_free()
            if free is not None and free.id not in self.short:
                return free
            if free is None and (segment_id := table.begin_create()) is not None:
                await self._create(segment_id)
            elif free is not None:
                await self._complete(free)
            else:
                return None
        return None

    async def _create(self, segment_id: int) -> None:
        table = self._log.table
        try:
            with anyio.CancelScope(shield=True):
                await self._log.device.create(segment_name(segment_id), table.segment_bytes)
        except OSError as error:
            table.abandon_create(segment_id)
            if error.errno not in NO_SPACE:
                raise
            self.met_the_end()
        else:
            table.end_create(segment_id)

    async def _complete(self, segment: Segment) -> None:
        """Give a file that was found its full size; when that fails, it is deleted."""
        self.short.discard(segment.id)
        await self.remove(segment)
        segment_id = self._log.table.begin_create()
        if segment_id is not None:
            await self._create(segment_id)

    async def _open(self, segment: Segment, stream: int) -> None:
        log = self._log
        head = SegmentHead(segment.id, os.urandom(8), log.next_sequence)
        filled, tail = log.table.filled.get(stream), None
        if filled is not None and filled is not segment:
            tail = Tail(filled, filled.nonce, filled.noted, filled.noted_at)
            head = head._replace(
                before=filled.id, before_nonce=tail.nonce, before_noted=tail.sequence
            )
        log.table.open(
            segment, nonce=head.nonce, sequence=head.sequence, now=log.clock(), stream=stream
        )
        segment.tail = tail
        segment.writers += 1
        try:
            with anyio.CancelScope(shield=True):
                await self._write_head(head, self._heads[stream])
        except OSError:
            log.table.fence(segment)
            self.wanted.set()
            raise
        finally:
            segment.writers -= 1

    async def _write_head(self, head: SegmentHead, memory: memoryview) -> None:
        """Write a segment's head, and see that it is there.

        A disk may acknowledge a write and lose it. Of a batch that tells the next one; without its
        head nothing of a segment would be found after a crash, nor anything be missed.
        """
        log, name = self._log, segment_name(head.id)
        written, there = memory[:SEGMENT_HEAD_BYTES], memory[SEGMENT_HEAD_BYTES:]
        written[:] = encode_segment_head(head, alignment=log.alignment)
        for _ in range(_HEAD_TRIES):
            await log.device.write(name, [Write(0, written)])
            log.stats.written_bytes += SEGMENT_HEAD_BYTES
            await log.device.read(name, 0, there)
            if there == written:
                return
        raise OSError(errno.EIO, f"{name} has not the head that was written twice")

    def _grow(self) -> None:
        if self._log.clock() - self._full_s >= GROW_AFTER_S:
            self._log.table.capacity_bytes = self._capacity_bytes


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
