"""Making room: one segment at a time is emptied and becomes free.

What is worth keeping is copied to another segment; the rest is shown to the engine, which may move
it to the next tier, and is then dropped. At most half a segment is copied of each, the most used
records first, so every segment that is emptied yields at least the other half, even if the engine
wants to keep all.

A segment is free only when all that was copied from it is as safe as it was there: notes and
DURABLE values are synced, others written. Until then a crash finds the old copies, after that the
new ones, which have a greater sequence and are therefore read by every replay that needs them.
"""

import mmap
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import NamedTuple

import anyio
from anyio.lowlevel import checkpoint

from respkv.errors import PageCorrupt, TierError
from respkv.tiers.batch import Bury, Change
from respkv.tiers.checkpoint import CHECKPOINT_NAMES
from respkv.tiers.checkpointer import Checkpointer
from respkv.tiers.format import HEADER_BYTES
from respkv.tiers.health import why
from respkv.tiers.log import Log, Logged, logger
from respkv.tiers.pending import Pending
from respkv.tiers.reader import RAW, check_stored
from respkv.tiers.record import Level, Record, Value
from respkv.tiers.segment_head import segment_name
from respkv.tiers.segments import Segment
from respkv.tiers.sizes import round_up
from respkv.tiers.space import RELOCATED, Space
from respkv.tiers.syncer import Syncer
from respkv.tiers.writer import Writer

SPAN_BYTES_MAX = 4 << 20  # read at once, unless one record is larger
GAP_BYTES_MAX = 64 << 10  # of dead bytes, read over rather than around
_LOOK_S = 1.0
_BUSY_S = 0.005
_REST_S = 0.5
_STEP = 256  # records or notes at a time, before others have their turn
_NOTE_BYTES = 1024  # more than a note with usual keys takes


class Span(NamedTuple):
    """Neighbouring records that are read at once."""

    start: int
    stop: int
    records: list[Record]


class Reclaimer:
    """Keep some segments free, and empty one when somebody needs it.

    is_probing: also while the tier is not ok.
    """

    def __init__(
        self,
        log: Log,
        space: Space,
        syncer: Syncer,
        writer: Writer,
        checkpointer: Checkpointer,
    ) -> None:
        self._log = log
        self._space = space
        self._syncer = syncer
        self._writer = writer
        self._checkpointer = checkpointer
        self._resting: dict[Segment, float] = {}  # until when what failed is not tried again
        self.is_probing = False

    async def run(self) -> None:
        """Reclaim in the background until cancelled."""
        while True:
            with anyio.move_on_after(_LOOK_S):
                await self._space.wanted.wait()
            self._space.wanted = anyio.Event()
            while self._has_work() and await self._advance():
                await checkpoint()
            self._space.woke(is_used_up=False)
            await anyio.sleep(_BUSY_S)

    def _has_work(self) -> bool:
        log = self._log
        if not (log.health.can_write or (self.is_probing and log.health.can_read)):
            return False
        # A segment that could not be written may still be read: it waits for its turn. One whose
        # sync failed has nothing but notes, which belong into a file that can be trusted.
        return bool(self._space.is_low or log.table.excess_bytes or log.doomed)

    async def _advance(self) -> bool:
        """Take one step towards room; return False when there is none to take."""
        table = self._log.table
        if table.excess_bytes and (free := table.find_free()) is not None:
            return await self._remove(free)
        now = self._log.clock()
        self._resting = {each: until for each, until in self._resting.items() if until > now}
        young = {record.segment for record in self._log.young}
        victim = table.choose_victim(
            now, may=lambda each: each.id not in young and self._may_clear(each)
        ) or table.choose_victim(now, may=self._may_clear)
        if victim is None:
            is_busy = any(each.state in ("sealed", "fenced") for each in table.segments.values())
            self._space.woke(is_used_up=not is_busy)
            await anyio.sleep(_BUSY_S)
            return is_busy
        if await self.clear(victim):
            return True
        self._resting[victim] = now + _REST_S
        return False

    def _may_clear(self, segment: Segment) -> bool:
        """Say whether a segment may be emptied now.

        What is to be durable there and is not yet, could only be told that it failed.
        """
        return segment not in self._resting and not self._syncer.is_awaited(segment.id)

    async def clear(self, segment: Segment) -> bool:
        """Empty a segment and make it free. Returns False when that did not succeed.

        The tier may be emptied during any wait, and the segment be gone, with another one of its
        number in its place.
        """
        kept, leaving = await self._choose(segment)
        if not self._has_room(segment, kept, leaving):
            kept, leaving = [], kept + leaving
        if not self._has_room(segment, kept, leaving):
            return await self._sacrifice(segment)
        await self._copy(segment, kept)
        if any(self._is_in(record, segment) for record in kept):
            return False  # they are safe where they are
        leaving = await self._show(segment, leaving)
        if not (await self._carry(segment) and await self._bury(segment, leaving)):
            return False
        if any(self._is_in(record, segment) for record in leaving):
            return False  # somebody wants them by now
        if not await self._checkpointer.cover(segment.tail):
            return False
        return await self._secure() and await self._free(segment)

    async def _secure(self) -> bool:
        """See that what was buried until now stays buried without the batches of a segment.

        A value keeps older ones of its key away, until its batch is gone. Whoever freed one of this
        segment has asked for its burial in the same step; so that is in the queue, or in the log.
        """
        burials = self._log.unwritten()
        for at in range(0, len(burials), _STEP):
            pendings = [self._burial(each) for each in burials[at : at + _STEP]]
            if not await self._carry_out(pendings):
                return False
        try:
            await self._syncer.cover_all()
        except TierError:
            return False
        return True

    async def _sacrifice(self, segment: Segment) -> bool:
        """Empty a segment without writing to the log, since nothing is left to write to.

        After two checkpoints without what is in it, no recovery looks for anything there.
        """
        log = self._log
        leaving = await self._show(segment, list(log.live.get(segment.id, ())))
        for _ in CHECKPOINT_NAMES:
            if not await self._checkpointer.try_write(without=set(leaving)):
                return False
        async for record in slowly(leaving):
            if self._is_in(record, segment):
                log.drop(record, "evicted", is_buried=True)
        return await self._free(segment)

    def _has_room(self, segment: Segment, kept: list[Record], leaving: list[Record]) -> bool:
        """Say whether all that ``clear`` would write has a place to go."""
        log = self._log
        nbytes = sum(round_up(each.stored_bytes, log.alignment) + _NOTE_BYTES for each in kept)
        num_buried = sum(each.level >= Level.WRITTEN for each in leaving)
        num_notes = len(log.notes.get(segment.id, ())) + len(log.unwritten())
        nbytes += _NOTE_BYTES * (num_buried + num_notes)
        return not nbytes or self._space.has_room(RELOCATED, nbytes)

    async def _show(self, segment: Segment, records: list[Record]) -> list[Record]:
        """Let the engine take what it wants of what is about to go; return what is still there."""
        if shown := [each for each in records if each not in self._log.young]:
            await self._log.hooks.leave(shown)
        return [record for record in records if self._is_in(record, segment)]

    async def _free(self, segment: Segment) -> bool:
        log = self._log
        await self._is_unused(segment)
        if not self._is_there(segment):
            return True
        log.notes.pop(segment.id, None)
        log.live.pop(segment.id, None)
        log.stats.reclaimed += 1
        self._syncer.forget(segment.id)
        if segment.state == "fenced":
            return await self._remove(segment)
        log.table.release(segment)
        self._space.woke(is_used_up=False)
        return True

    async def _is_unused(self, segment: Segment) -> None:
        while True:
            if not (segment.readers or segment.writers):
                return
            await anyio.sleep(_BUSY_S)

    async def _remove(self, segment: Segment) -> bool:
        if not self._is_there(segment):
            return True
        try:
            await self._space.remove(segment)
        except OSError as error:
            self._log.health.write_failed(error)
            return False
        self._space.woke(is_used_up=False)
        return True

    def _is_there(self, segment: Segment) -> bool:
        return self._log.table.segments.get(segment.id) is segment

    def _is_in(self, record: Record, segment: Segment) -> bool:
        is_here = record.segment == segment.id and self._is_there(segment)
        return is_here and self._log.is_live(record)

    async def _choose(self, segment: Segment) -> tuple[list[Record], list[Record]]:
        """Return what to copy, at most half a segment, and what is to leave."""
        log = self._log
        kept: list[Record] = []
        leaving: list[Record] = []
        async for record in slowly(list(log.live.get(segment.id, ()))):
            if self._is_in(record, segment):
                log.describe(record)  # its level may have been raised
                (kept if log.keep(record) else leaving).append(record)
        kept.sort(key=lambda record: (record.level, record.touches, record.sequence), reverse=True)
        room = log.table.segment_bytes // 2
        fitting = 0
        for record in kept:
            room -= round_up(record.stored_bytes, log.alignment)
            if room < 0:
                break
            fitting += 1
        return kept[:fitting], kept[fitting:] + leaving

    # Copying

    async def _copy(self, segment: Segment, records: list[Record]) -> None:
        alignment = max(self._log.alignment, self._log.device.alignment)
        for span in spans(records, alignment):
            memory = memoryview(mmap.mmap(-1, round_up(span.stop - span.start, mmap.PAGESIZE)))
            if await self._fetch(segment, span, memory):
                await self._write(segment, span, memory)
            elif len(span.records) > 1:
                for record in span.records:  # one bad place must not cost its neighbours
                    await self._copy(segment, [record])
            else:
                self._log.drop(span.records[0], "lost")

    async def _fetch(self, segment: Segment, span: Span, memory: memoryview) -> bool:
        try:
            with anyio.CancelScope(shield=True):
                await self._log.device.read(
                    segment_name(segment.id), span.start, memory[: span.stop - span.start]
                )
        except OSError as error:
            self._log.stats.read_errors += 1
            if len(span.records) == 1:
                logger.error("tier %s: a copy is lost: %s", self._log.name, why(error))
            return False
        return True

    async def _write(self, segment: Segment, span: Span, memory: memoryview) -> None:
        pendings: list[Pending] = []
        for record in span.records:
            if self._is_in(record, segment):
                pending = await self._pending(record, memory, record.offset - span.start)
                if pending is not None:
                    pendings.append(pending)
                    self._log.stats.relocated_bytes += record.stored_bytes
        await self._submit(pendings)

    async def _pending(self, record: Record, memory: memoryview, at: int) -> Pending | None:
        log = self._log
        stored = memory[at : at + record.stored_bytes]
        meta = log.describe(record)
        try:
            await check_stored(record, meta.key, stored)
        except PageCorrupt as error:
            logger.error("tier %s: a copy of %r is dropped: %s", log.name, meta.key[:80], error)
            log.drop(record, "corrupt")
            return None
        image = None
        if record.codec == RAW and record.offset % 4096 == 0 and log.alignment == 4096:
            image = memory[at : at + round_up(record.stored_bytes, 4096)]
        payload = stored[HEADER_BYTES:]
        return Pending(
            max(meta.level, Level.WRITTEN),
            log.epoch,
            value=Value(meta, payload, image, record.owner),
            source=record,
            payload=payload,
            image=image,
            codec=record.codec,
            is_encoded=True,
        )

    async def _carry(self, segment: Segment) -> bool:
        """Log again, durably, what the notes of a segment say."""
        notes = list(self._log.notes.get(segment.id, ()))
        for at in range(0, len(notes), _STEP):
            if not await self._carry_out(list(self.carried(notes[at : at + _STEP]))):
                return False
        return True

    async def _bury(self, segment: Segment, leaving: list[Record]) -> bool:
        """Log, durably, that some records are gone, and then drop them.

        Not those that are wanted again: a value that is written meanwhile has the generation of the
        copy that it is read from, and would be buried with it.
        """
        for at in range(0, len(leaving), _STEP):
            going = [each for each in leaving[at : at + _STEP] if self._may_go(each, segment)]
            if not await self._carry_out(list(self._burials(going))):
                return False
            for record in going:
                if self._may_go(record, segment):
                    self._log.drop(record, "evicted", is_buried=True)
            await checkpoint()
        return True

    def _may_go(self, record: Record, segment: Segment) -> bool:
        return self._is_in(record, segment) and self._log.release(record)

    async def _carry_out(self, pendings: list[Pending]) -> bool:
        await self._submit(pendings)
        errors = [each.done.exception for each in pendings if each.done.exception is not None]
        if errors and not self._writer.is_stopped:
            logger.error("tier %s: a segment is not emptied: %s", self._log.name, errors[0])
        return not errors

    def _burials(self, records: Iterable[Record]) -> Iterator[Pending]:
        for record in records:
            meta = self._log.describe(record)
            if meta.level >= Level.WRITTEN:
                yield self._burial(Bury(meta.key, record.generation))

    def _burial(self, note: Bury) -> Pending:
        return Pending(Level.DURABLE, self._log.epoch, logged=Logged(note))

    def carried(self, notes: Iterable[Logged]) -> Iterator[Pending]:
        """Make notes anew that are to be written once more."""
        log = self._log
        for old in notes:
            new = Logged(old.note)
            if isinstance(old.note, Change) and log.changes.get(old.note.meta.generation) is old:
                log.changes[old.note.meta.generation] = new
            yield Pending(Level.DURABLE, log.epoch, logged=new)

    async def _submit(self, pendings: list[Pending]) -> None:
        self._writer.submit(pendings)
        with anyio.CancelScope(shield=True):  # the memory is theirs until they are answered
            for pending in pendings:
                await pending.done.wait()


async def slowly(records: Iterable[Record]) -> AsyncIterator[Record]:
    """Go through very many records without holding up the event loop."""
    for number, record in enumerate(records):
        if number % _STEP == _STEP - 1:
            await checkpoint()
        yield record


def spans(records: Iterable[Record], alignment: int) -> Iterator[Span]:
    """Group records so that neighbours are read at once, each span aligned."""
    span: Span | None = None
    for record in sorted(records, key=lambda record: record.offset):
        start = record.offset // alignment * alignment
        stop = round_up(record.offset + record.stored_bytes, alignment)
        if (
            span is not None
            and start <= span.stop + GAP_BYTES_MAX
            and stop - span.start <= SPAN_BYTES_MAX
        ):
            span.records.append(record)
            span = span._replace(stop=max(span.stop, stop))
            continue
        if span is not None:
            yield span
        span = Span(start, stop, [record])
    if span is not None:
        yield span
