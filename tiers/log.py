"""What the parts of one file tier share: which records live where, and what was acknowledged.

All of it is plain state, changed by short synchronous functions. The parts (writer, syncer, space,
reclaim, checkpoints, reader) wait for devices and change it between their waits.

A record is young from its write's end until ``FileTier.write`` has handed it to its asker. Nobody
but the tier knows a young record, so the engine's hooks are not called for it: it is kept, and
described as it was written. When it has to be evicted all the same, its asker gets it as one that
is gone: a tier that is merely full has not failed to write it.
"""

import logging
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from time import monotonic

from respkv.tiers.batch import Bury, Change, Note
from respkv.tiers.device import Device
from respkv.tiers.health import Health
from respkv.tiers.meta import behind_bytes
from respkv.tiers.record import NOWHERE, Level, Meta, Record
from respkv.tiers.segments import Segment, SegmentTable
from respkv.tiers.tier_stats import TierStats

_STEP = 2048  # notes at a time, before others have their turn

logger = logging.getLogger(__name__)


async def _let_go(records: list[Record]) -> None: ...


def _undescribed(record: Record) -> Meta:
    raise AssertionError("the tier was started without its hooks")


@dataclass(slots=True)
class Hooks:
    """What a tier asks of the engine; see FileTier."""

    describe: Callable[[Record], Meta] = _undescribed
    keep: Callable[[Record], bool] = lambda record: False
    leave: Callable[[list[Record]], Awaitable[None]] = _let_go
    release: Callable[[Record], bool] = lambda record: True
    dropped: Callable[[Record, str], None] = lambda record, why: None


@dataclass(eq=False, slots=True)
class Logged:
    """A note and its place in the log; ``sequence`` is 0 until it is acknowledged."""

    note: Note
    sequence: int = 0
    segment: int = -1


@dataclass(slots=True)
class Log:
    """The state of one log.

    next_sequence: of the next batch.
    acked:         all batches up to this one are acknowledged, and what they say is applied here.
    epoch:         counts the times that all was forgotten; what was asked in an earlier one is void.
    void_below:    records of batches before this sequence are void, and the superblock says so.
    live:          the live records of each segment, each with the bytes of its keys.
    notes:         the notes of each segment that a checkpoint may not cover yet.
    is_void:       the superblock says so of all that was there, and nothing came since.
    num_noted:     counts the notes that were acknowledged.
    doomed:        segments of whose files a sync failed: nothing in them counts any more.
    """

    name: str
    device: Device
    alignment: int
    table: SegmentTable
    health: Health
    stats: TierStats
    hooks: Hooks
    clock: Callable[[], float] = monotonic
    next_sequence: int = 1
    acked: int = 0
    epoch: int = 0
    void_below: int = 0
    is_void: bool = False
    next_generation: int = 1
    key_bytes: int = 0
    live: dict[int, dict[Record, int]] = field(default_factory=dict[int, dict[Record, int]])
    young: dict[Record, Meta] = field(default_factory=dict[Record, Meta])
    notes: dict[int, list[Logged]] = field(default_factory=dict[int, list[Logged]])
    changes: dict[int, Logged] = field(default_factory=dict[int, Logged])
    num_noted: int = 0
    doomed: set[int] = field(default_factory=set[int])
    bury: Callable[[bytes, int], object] = lambda key, generation: None  # set by Tickets
    unwritten: Callable[[], list[Bury]] = list["Bury"]  # the burials that wait, set by Tickets

    # Records

    def is_live(self, record: Record) -> bool:
        return record in self.live.get(record.segment, ())

    def add(self, record: Record, meta: Meta) -> None:
        """Count a record that is in the log now."""
        self.adopt(record, meta)
        self.table.add(record)
        self.is_void = False
        self.next_generation = max(self.next_generation, meta.generation + 1)

    def adopt(self, record: Record, meta: Meta) -> None:
        """Take over a record that recovery found and counted."""
        key_bytes = behind_bytes(meta)
        self.live.setdefault(record.segment, {})[record] = key_bytes
        self.key_bytes += key_bytes
        self.stats.contents.add(record)

    def discard(self, record: Record) -> bool:
        """Forget a record; return whether it was there."""
        key_bytes = self.live.get(record.segment, {}).pop(record, None)
        if key_bytes is None:
            return False
        self.key_bytes -= key_bytes
        self.stats.contents.discard(record)
        self.table.discard(record)
        return True

    def move(self, record: Record, segment: int, offset: int, sequence: int) -> None:
        """A live record has been copied: it is at its new place from now on."""
        key_bytes = self.live[record.segment].pop(record)
        self.table.move(record, segment=segment, offset=offset, sequence=sequence)
        self.live.setdefault(segment, {})[record] = key_bytes

    def records(self) -> Iterator[Record]:
        """Return all live records."""
        return chain.from_iterable(self.live.values())

    def describe(self, record: Record) -> Meta:
        """Return what a live record's value is like now."""
        meta = self.young.get(record) or self.hooks.describe(record)
        assert meta.generation == record.generation, "a record is described as another value"
        assert meta.checksum == record.checksum
        record.level = meta.level  # a change may have raised it
        return meta

    def keep(self, record: Record) -> bool:
        """Say whether a live record is worth copying."""
        return record in self.young or self.hooks.keep(record)

    def release(self, record: Record) -> bool:
        """Say whether a live record may be buried or dropped by reclaim, in this turn."""
        return record in self.young or self.hooks.release(record)

    def drop(self, record: Record, why: str, *, is_buried: bool = False) -> None:
        """Give up a live record and tell the engine.

        A value that a crash would bring back is buried, unless it was already: its key may be put
        again at level MEMORY, of which the log hears nothing.
        """
        if not self.is_live(record):
            return
        meta = self.describe(record)
        self.discard(record)
        if meta.level >= Level.WRITTEN and not is_buried:
            self.bury(meta.key, record.generation)
        self.tell(record, why)

    def tell(self, record: Record, why: str) -> None:
        """Say that a record is gone."""
        self._count(why)
        if self.young.pop(record, None) is None:
            self.hooks.dropped(record, why)
        elif why == "evicted":
            record.segment = NOWHERE

    def forget(self, *, why: str = "") -> None:
        """Forget everything that was ever asked; with a reason, tell the engine of each record."""
        self.epoch += 1
        self.void_below = self.next_sequence
        records = list(self.records()) if why else []
        self.live.clear()
        self.stats.contents.clear()
        self.key_bytes = self.table.live_bytes = self.table.live_records = 0
        for segment in self.table.segments.values():
            segment.live_bytes = segment.live_records = 0
        for record in records:
            self.tell(record, why)
        self.young.clear()
        self.notes.clear()
        self.changes.clear()
        for segment in list(self.table.segments.values()):
            if segment.state == "open":
                self.table.seal(segment)

    # Notes

    def note(self, logged: Logged, segment: int, sequence: int) -> None:
        """A note has been acknowledged."""
        logged.segment, logged.sequence = segment, sequence
        self.num_noted += 1
        self.notes.setdefault(segment, []).append(logged)

    def is_superseded(self, note: Note) -> bool:
        """Say whether a later change of the same value makes this note wrong."""
        if isinstance(note, Bury):
            return False
        latest = self.changes.get(note.meta.generation)
        return latest is not None and latest.note is not note

    def remember_change(self, logged: Logged) -> None:
        if isinstance(logged.note, Change):
            self.changes[logged.note.meta.generation] = logged

    def forget_notes(self, floor: int) -> Iterator[None]:
        """Forget the notes up to a sequence that every checkpoint covers, some in each step.

        Those of a segment are in the order of their sequences.
        """
        for segment in list(self.notes):
            while (notes := self.notes.get(segment)) and notes[0].sequence <= floor:
                part = notes[:_STEP]
                del notes[: bisect_right(part, floor, key=lambda each: each.sequence)]
                yield
            if not notes:
                self.notes.pop(segment, None)
        for number, generation in enumerate(list(self.changes)):
            logged = self.changes.get(generation)
            if logged is not None and 0 < logged.sequence <= floor:
                del self.changes[generation]
            if number % _STEP == 0:
                yield

    # Segments

    def lose(self, segment: Segment) -> None:
        """The file of a segment cannot be trusted: drop its records. Its notes are kept, so that
        reclaim logs them elsewhere before it deletes the file."""
        self.doomed.add(segment.id)
        self.table.fence(segment)
        records = list(self.live.get(segment.id, ()))
        if records:
            logger.error("tier %s: %d copies in a file are lost", self.name, len(records))
        for record in records:
            self.drop(record, "lost")

    def _count(self, why: str) -> None:
        setattr(self.stats, why, getattr(self.stats, why) + 1)
