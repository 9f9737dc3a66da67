"""The segments of one log: which there are, what is taken of them, what of that is still wanted.

Space is taken in order and only given back a whole segment at a time, so a device sees long
sequential writes and no file ever has to be punched. What this costs is cleaning: a segment with
few live bytes is chosen, they are written again elsewhere, and it is free. The choice weighs what
is gained against the copying, and prefers old segments, whose values change no more (Rosenblum and
Ousterhout, The Design and Implementation of a Log-Structured File System, 1992, section 3.5).

No bytes are touched here. The files count from the moment their creation starts, so the cap holds
at every time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from respkv.tiers.batch import HEAD_PREFIX_BYTES, NONCE_BYTES
from respkv.tiers.format import HEADER_BYTES
from respkv.tiers.meta import BEHIND_BYTES_MAX, META
from respkv.tiers.record import Record
from respkv.tiers.segment_head import SEGMENT_HEAD_BYTES
from respkv.tiers.sizes import round_up

_NO_NONCE = bytes(NONCE_BYTES)

State = Literal["creating", "free", "open", "sealed", "fenced"]
STATES: tuple[State, ...] = ("free", "open", "sealed", "fenced")  # by their number in a row


class SegmentRow(NamedTuple):
    """A segment as the checkpoint has it. state: its index in STATES."""

    id: int
    nonce: bytes
    state: int
    sequence: int
    offset: int
    settled: int
    live_bytes: int
    max_sequence: int
    noted: int


class Tail(NamedTuple):
    """Where the last batch of a filled segment is that may supersede an older value.

    nonce: of that use of the segment; sequence: of the batch, 0 when there is none.
    """

    segment: "Segment"
    nonce: bytes
    sequence: int
    offset: int


@dataclass(eq=False, slots=True)
class Segment:
    """One segment.

    offset:       where the next batch goes.
    settled:      all below is in batches that were acknowledged.
    live_bytes:   of the images of the records that are wanted; live_records: how many.
    written_s:    when a batch was last written, by the caller's clock.
    max_sequence: of its last batch; noted: of its last one that may supersede an older value, and
                  noted_at: where that one is.
    tail:         what the head of the segment tells of: the end of the one before it.
    readers, writers: reads and batches in flight; while there are any it is not used again.
    stream:       of ``allocate``, while it is open.
    """

    id: int
    state: State
    nonce: bytes = _NO_NONCE
    sequence: int = 0
    offset: int = SEGMENT_HEAD_BYTES
    settled: int = SEGMENT_HEAD_BYTES
    live_bytes: int = 0
    live_records: int = 0
    written_s: float = 0.0
    max_sequence: int = 0
    noted: int = 0
    noted_at: int = 0
    tail: Tail | None = None
    readers: int = 0
    writers: int = 0
    stream: int = 0


def _any(_: Segment) -> bool:
    return True


class SegmentTable:
    """All segments of one log, each of ``segment_bytes``.

    capacity_bytes: of all files of the directory together.
    reserve_bytes:  of that, what files other than segments may take.
    """

    def __init__(self, *, segment_bytes: int, capacity_bytes: int, reserve_bytes: int) -> None:
        assert segment_bytes % 4096 == 0
        assert segment_bytes > SEGMENT_HEAD_BYTES
        self.segment_bytes = segment_bytes
        self.capacity_bytes = capacity_bytes
        self.reserve_bytes = reserve_bytes
        self.segments: dict[int, Segment] = {}
        self.live_bytes = 0
        self.live_records = 0
        self._open: dict[int, Segment] = {}  # by stream
        self.filled: dict[int, Segment] = {}  # the one that a stream had open last

    @property
    def file_bytes(self) -> int:
        """Bytes of all segment files, those in creation included."""
        return len(self.segments) * self.segment_bytes

    @property
    def excess_bytes(self) -> int:
        """Bytes above the cap: after a start with a smaller one, or when the reserve grew."""
        return max(0, self.file_bytes + self.reserve_bytes - self.capacity_bytes)

    def payload_bytes_max(self, alignment: int) -> int:
        """Return the largest stored payload that fits into an empty segment, whatever its key."""
        head_bytes = HEAD_PREFIX_BYTES + META.size + BEHIND_BYTES_MAX + 64
        room = self.segment_bytes - SEGMENT_HEAD_BYTES - round_up(head_bytes, alignment)
        return max(0, room // alignment * alignment - HEADER_BYTES)

    # -- files --------------------------------------------------------------------------------

    def begin_create(self) -> int | None:
        """Count one more file and return the id of its segment. None: the cap has no room."""
        if self.file_bytes + self.segment_bytes + self.reserve_bytes > self.capacity_bytes:
            return None
        segment_id = 0
        while segment_id in self.segments:
            segment_id += 1
        self.segments[segment_id] = Segment(segment_id, "creating")
        return segment_id

    def end_create(self, segment_id: int) -> Segment:
        """The file is there: the segment is free."""
        segment = self.segments[segment_id]
        assert segment.state == "creating"
        segment.state = "free"
        return segment

    def abandon_create(self, segment_id: int) -> None:
        """The file could not be made, and is not there."""
        assert self.segments[segment_id].state == "creating"
        del self.segments[segment_id]

    def adopt(self, segment: Segment) -> None:
        """Take over a segment whose file was found; it has no live record yet."""
        assert segment.id not in self.segments
        assert not segment.live_bytes
        assert not segment.live_records
        self.segments[segment.id] = segment
        if segment.state == "open":
            assert segment.stream not in self._open
            self._open[segment.stream] = segment

    def remove(self, segment: Segment) -> None:
        """Forget a segment whose file was deleted: a free or fenced one that nothing points into."""
        assert segment.state in ("free", "fenced")
        assert self.segments.get(segment.id) is segment, "it is gone already"
        self._check_unused(segment)
        del self.segments[segment.id]

    # -- use ----------------------------------------------------------------------------------

    def find_free(self) -> Segment | None:
        """Return a free segment, or None."""
        return next((found for found in self.segments.values() if found.state == "free"), None)

    def open(
        self, segment: Segment, *, nonce: bytes, sequence: int, now: float, stream: int = 0
    ) -> None:
        """Begin a use of a free segment. Its head must be there before a batch is acknowledged."""
        assert segment.state == "free"
        assert stream not in self._open
        assert len(nonce) == NONCE_BYTES
        self._check_unused(segment)
        segment.state = "open"
        segment.nonce = nonce
        segment.sequence = sequence
        segment.offset = segment.settled = SEGMENT_HEAD_BYTES
        segment.max_sequence = segment.noted = segment.noted_at = 0
        segment.tail = None
        segment.written_s = now
        segment.stream = stream
        self._open[stream] = segment

    def reopen(self, segment: Segment, *, stream: int) -> None:
        """Go on behind the last batch of a sealed segment of which nothing is on its way."""
        assert segment.state == "sealed"
        assert segment.settled == segment.offset
        assert not segment.writers
        assert stream not in self._open
        segment.state = "open"
        segment.stream = stream
        self._open[stream] = segment

    def allocate(self, nbytes: int, *, stream: int = 0) -> tuple[Segment, int] | None:
        """Take space for a batch in the open segment of a stream.

        Returns: the segment and the offset. None when none is open, or when the batch does not fit:
        then that one is sealed, and another is to be opened.
        """
        assert 0 < nbytes <= self.segment_bytes - SEGMENT_HEAD_BYTES
        segment = self._open.get(stream)
        if segment is None:
            return None
        offset = segment.offset
        if offset + nbytes > self.segment_bytes:
            self.seal(segment)
            return None
        segment.offset = offset + nbytes
        return segment, offset

    def begin_write(self, segment: Segment, *, sequence: int, is_noted: bool, now: float) -> None:
        """A batch with this sequence is on its way into a segment."""
        assert segment.state in ("open", "sealed")
        assert sequence > segment.max_sequence
        segment.writers += 1
        segment.max_sequence = sequence
        segment.written_s = now
        if is_noted:
            segment.noted = sequence

    def end_write(self, segment: Segment, settled: int) -> None:
        """A batch has ended; what is below ``settled`` is acknowledged now."""
        assert segment.writers > 0
        assert segment.settled <= settled <= segment.offset
        segment.writers -= 1
        segment.settled = settled

    def pin(self, segment_id: int) -> None:
        """A read of a segment starts: it will not be used again before ``unpin``."""
        self.segments[segment_id].readers += 1

    def unpin(self, segment_id: int) -> None:
        """A read of a segment has ended."""
        segment = self.segments[segment_id]
        assert segment.readers > 0
        segment.readers -= 1

    def seal(self, segment: Segment) -> None:
        """Take no more batches into an open segment."""
        assert segment.state == "open"
        del self._open[segment.stream]
        if segment.max_sequence:  # else its head failed, and the one before is still the last
            self.filled[segment.stream] = segment
        segment.state = "sealed"

    def fence(self, segment: Segment) -> None:
        """Never write into a segment again: its file failed. Harmless when repeated."""
        assert segment.state != "creating"
        if segment.state == "open":
            self.seal(segment)
        segment.state = "fenced"

    def release(self, segment: Segment) -> None:
        """Make a sealed segment free, when nothing points into it any more."""
        assert segment.state == "sealed"
        self._check_unused(segment)
        segment.state = "free"

    # -- records ------------------------------------------------------------------------------

    def add(self, record: Record) -> None:
        """Count a record as live where it is."""
        segment = self.segments[record.segment]
        assert segment.state in ("open", "sealed", "fenced")
        segment.live_bytes += record.stored_bytes
        segment.live_records += 1
        self.live_bytes += record.stored_bytes
        self.live_records += 1

    def add_all(self, records: Iterable[Record]) -> None:
        """Count many records as live; a restart waits for this."""
        counts: dict[int, list[int]] = {}
        for record in records:
            counts.setdefault(record.segment, []).append(record.stored_bytes)
        for segment_id, sizes in counts.items():
            segment = self.segments[segment_id]
            assert segment.state in ("open", "sealed", "fenced")
            segment.live_bytes += sum(sizes)
            segment.live_records += len(sizes)
            self.live_bytes += sum(sizes)
            self.live_records += len(sizes)

    def discard(self, record: Record) -> None:
        """Count a live record as dead."""
        segment = self.segments[record.segment]
        segment.live_bytes -= record.stored_bytes
        segment.live_records -= 1
        self.live_bytes -= record.stored_bytes
        self.live_records -= 1
        assert segment.live_bytes >= 0
        assert segment.live_records >= 0

    def move(self, record: Record, *, segment: int, offset: int, sequence: int) -> None:
        """A live record was written again elsewhere: it points there now."""
        self.discard(record)
        record.segment, record.offset, record.sequence = segment, offset, sequence
        self.add(record)

    def choose_victim(self, now: float, *, may: Callable[[Segment], bool] = _any) -> Segment | None:
        """Choose the segment to clear: empty ones, then fenced ones, then by benefit and cost.

        Never one that is open or has batches in flight. There may be reads in flight, which are
        waited for before it is used again. ``may`` can forbid more.
        """
        best, best_rank = None, (-1, 0.0)
        for segment in self.segments.values():
            if segment.writers or segment.state not in ("sealed", "fenced"):
                continue
            rank = self._rank(segment, now)
            if rank > best_rank and may(segment):
                best, best_rank = segment, rank
        return best

    def rows(self) -> list[SegmentRow]:
        """Describe all segments whose file is there, for the checkpoint."""
        return [
            SegmentRow(
                id=segment.id,
                nonce=segment.nonce,
                state=STATES.index(segment.state),
                sequence=segment.sequence,
                offset=segment.offset,
                settled=segment.settled,
                live_bytes=segment.live_bytes,
                max_sequence=segment.max_sequence,
                noted=segment.noted,
            )
            for segment in self.segments.values()
            if segment.state != "creating"
        ]

    def check(self, records: Iterable[Record] | None = None) -> None:
        """Assert what must hold between two calls; ``records``: all live ones, to be compared."""
        for segment in self.segments.values():
            assert SEGMENT_HEAD_BYTES <= segment.settled <= segment.offset <= self.segment_bytes
            assert min(segment.live_bytes, segment.live_records) >= 0
            assert segment.live_bytes <= segment.offset - SEGMENT_HEAD_BYTES
            assert min(segment.readers, segment.writers) >= 0
            assert segment.noted <= segment.max_sequence
            assert (segment.state == "open") == (self._open.get(segment.stream) is segment)
            if segment.state in ("free", "creating"):
                self._check_unused(segment)
        assert self.live_bytes == sum(segment.live_bytes for segment in self.segments.values())
        assert self.live_records == sum(segment.live_records for segment in self.segments.values())
        if records is not None:
            self._check_records(records)

    def _check_records(self, records: Iterable[Record]) -> None:
        found = dict.fromkeys(self.segments, 0)
        ends: dict[int, int] = {}
        for record in sorted(records, key=lambda record: (record.segment, record.offset)):
            found[record.segment] += record.stored_bytes
            assert record.offset >= ends.get(record.segment, SEGMENT_HEAD_BYTES), "two overlap"
            ends[record.segment] = record.offset + record.stored_bytes
            assert ends[record.segment] <= self.segments[record.segment].offset
        assert found == {id_: segment.live_bytes for id_, segment in self.segments.items()}

    def _rank(self, segment: Segment, now: float) -> tuple[int, float]:
        if not segment.live_records:
            return 3 if segment.state == "sealed" else 2, 0.0
        if segment.state == "fenced":
            return 1, 0.0
        used = segment.live_bytes / self.segment_bytes
        age = max(0.0, now - segment.written_s) + 1.0
        return 0, (1 - used) * age / (1 + used)

    def _check_unused(self, segment: Segment) -> None:
        assert not segment.live_records, "records point into it"
        assert not segment.live_bytes
        assert not segment.readers
        assert not segment.writers
