"""Segments: every byte is counted once, and never more files than the cap allows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from respkv.errors import PageCorrupt
from respkv.tiers.record import Level, Record
from respkv.tiers.segment_head import (
    SEGMENT_HEAD_BYTES,
    SegmentHead,
    decode_segment_head,
    encode_segment_head,
    segment_id_of,
    segment_name,
)
from respkv.tiers.segments import Segment, SegmentTable

SEGMENT_BYTES = 32768
NONCE = b"8 random"


def table(segments: int = 4, *, reserve_bytes: int = 1000) -> SegmentTable:
    return SegmentTable(
        segment_bytes=SEGMENT_BYTES,
        capacity_bytes=segments * SEGMENT_BYTES + reserve_bytes,
        reserve_bytes=reserve_bytes,
    )


def created(segments: SegmentTable) -> Segment:
    segment_id = segments.begin_create()
    assert segment_id is not None
    return segments.end_create(segment_id)


def opened(segments: SegmentTable, *, stream: int = 0, now: float = 0.0) -> Segment:
    segment = created(segments)
    segments.open(segment, nonce=NONCE, sequence=1, now=now, stream=stream)
    return segment


def record_at(segment: Segment, offset: int, stored_bytes: int) -> Record:
    return Record(
        segment.id, offset, stored_bytes, stored_bytes - 64, 0, 1, 2, 3, Level.MEMORY, None
    )


def filled(segments: SegmentTable, live_bytes: int, *, now: float = 0.0) -> Segment:
    """A sealed segment with one record."""
    segment = opened(segments, now=now)
    place = segments.allocate(max(4096, live_bytes))
    assert place is not None
    if live_bytes:
        segments.add(record_at(segment, place[1], live_bytes))
    segments.seal(segment)
    return segment


def test_the_cap_counts_files_that_are_being_made() -> None:
    segments = table(2)
    first, second = segments.begin_create(), segments.begin_create()
    assert (first, second, segments.begin_create()) == (0, 1, None)
    assert segments.file_bytes == 2 * SEGMENT_BYTES
    segments.abandon_create(0)
    assert segments.begin_create() == 0
    segments.reserve_bytes += 1
    assert segments.excess_bytes == 1


def test_space_is_taken_in_order_until_the_segment_is_full() -> None:
    segments = table()
    segment = opened(segments)
    offsets = [place[1] for _ in range(7) if (place := segments.allocate(4096)) is not None]
    assert offsets == list(range(SEGMENT_HEAD_BYTES, SEGMENT_BYTES, 4096))
    assert segments.allocate(4096) is None
    assert segment.state == "sealed"


def test_each_stream_has_a_segment_of_its_own() -> None:
    segments = table()
    first, second = opened(segments, stream=0), opened(segments, stream=1)
    assert segments.allocate(4096, stream=1) == (second, SEGMENT_HEAD_BYTES)
    assert segments.allocate(4096, stream=0) == (first, SEGMENT_HEAD_BYTES)
    assert segments.allocate(4096, stream=2) is None


def test_a_segment_in_use_is_not_freed() -> None:
    segments = table()
    segment = filled(segments, 0)
    segments.pin(segment.id)
    with pytest.raises(AssertionError):
        segments.release(segment)
    segments.unpin(segment.id)
    assert segments.choose_victim(1.0) is segment
    segments.release(segment)
    assert segments.find_free() is segment


VICTIMS = [
    # live bytes and time of the last write of each; the index that is chosen at 100 s
    ([(20000, 0.0), (1000, 0.0)], 1),
    ([(0, 99.0), (1000, 0.0)], 0),
    ([(10000, 99.0), (12000, 1.0)], 1),  # hardly emptier, much younger
    ([(2000, 50.0), (20000, 40.0)], 0),
]


@pytest.mark.parametrize(("cases", "chosen"), VICTIMS)
def test_the_victim_is_what_gains_most_for_its_cost(
    cases: list[tuple[int, float]], chosen: int
) -> None:
    segments = table()
    made = [filled(segments, live_bytes, now=now) for live_bytes, now in cases]
    assert segments.choose_victim(100.0) is made[chosen]
    others = [each for index, each in enumerate(made) if index != chosen]
    assert segments.choose_victim(100.0, may=lambda each: each in others) in others


def test_a_fenced_segment_goes_first_and_is_never_used_again() -> None:
    segments = table()
    bad, good = filled(segments, 20000), filled(segments, 100)
    segments.fence(bad)
    assert segments.choose_victim(9.0) is bad
    for record in [record_at(bad, SEGMENT_HEAD_BYTES, 20000)]:
        segments.discard(record)
    assert segments.choose_victim(9.0) is bad
    segments.remove(bad)
    assert bad.id not in segments.segments
    assert segments.choose_victim(9.0) is good


def test_rows_say_what_a_checkpoint_needs() -> None:
    segments = table()
    segment = opened(segments)
    place = segments.allocate(4096)
    assert place is not None
    segments.begin_write(segment, sequence=5, is_noted=True, now=1.0)
    segments.begin_create()
    (row,) = segments.rows()
    assert (row.state, row.offset, row.settled) == (1, 8192, 4096)
    assert (row.max_sequence, row.noted) == (5, 5)
    segments.end_write(segment, 8192)
    assert segments.rows()[0].settled == 8192


def test_a_segment_takes_the_largest_payload_it_promises() -> None:
    segments = SegmentTable(segment_bytes=1 << 20, capacity_bytes=1 << 30, reserve_bytes=0)
    for alignment in (64, 4096):
        nbytes = segments.payload_bytes_max(alignment)
        assert (1 << 20) - nbytes < 50_000
        assert nbytes > 0


NAMES = [
    ("segment-00000000", 0),
    ("segment-00012345", 12345),
    ("segment-123456789", 123456789),
    ("segment-0", None),
    ("segment-000000001", None),
    ("segment-0000000a", None),
    ("segment-00000000.tmp", None),
    ("superblock", None),
    ("segment-", None),
]


@pytest.mark.parametrize(("name", "segment_id"), NAMES)
def test_names_say_which_segment_it_is(name: str, segment_id: int | None) -> None:
    assert segment_id_of(name) == segment_id
    if segment_id is not None:
        assert segment_name(segment_id) == name


@given(st.integers(0, SEGMENT_HEAD_BYTES - 1), st.integers(0, 7))
def test_a_flipped_bit_in_the_head_of_a_segment_is_harmless(at: int, bit: int) -> None:
    head = SegmentHead(3, NONCE, 99)
    data = bytearray(encode_segment_head(head, alignment=64))
    data[at] ^= 1 << bit
    assert decode_segment_head(data, alignment=64) == head


@pytest.mark.parametrize("cut", range(0, 4097, 512))
def test_a_torn_head_is_the_old_one_or_the_new_one(cut: int) -> None:
    old, new = SegmentHead(3, NONCE, 99), SegmentHead(3, b"another!", 100)
    first, second = (encode_segment_head(head, alignment=64) for head in (old, new))
    assert decode_segment_head(second[:cut] + first[cut:], alignment=64) in (old, new)


@given(st.binary(max_size=5000))
def test_garbage_is_no_head(garbage: bytes) -> None:
    with pytest.raises(PageCorrupt):
        decode_segment_head(garbage, alignment=64)


def test_the_head_of_another_alignment_is_not_taken() -> None:
    data = encode_segment_head(SegmentHead(3, NONCE, 99), alignment=64)
    with pytest.raises(PageCorrupt):
        decode_segment_head(data, alignment=4096)


class Model(RuleBasedStateMachine):
    """A table beside plain sets of what it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.segments = table(5)
        self.creating: list[int] = []
        self.records: list[Record] = []
        self.reads: list[int] = []
        self.writes: list[Segment] = []
        self.sequence = 0
        self.now = 0.0

    @rule()
    def create(self) -> None:
        segment_id = self.segments.begin_create()
        if segment_id is None:
            assert len(self.segments.segments) == 5
        else:
            self.creating.append(segment_id)

    @precondition(lambda self: self.creating)
    @rule(fails=st.booleans())
    def end_create(self, fails: bool) -> None:
        segment_id = self.creating.pop()
        if fails:
            self.segments.abandon_create(segment_id)
        else:
            self.segments.end_create(segment_id)

    @rule(nbytes=st.sampled_from([64, 4096, 20000]), stream=st.integers(0, 1))
    def write(self, nbytes: int, stream: int) -> None:
        place = self.segments.allocate(nbytes, stream=stream)
        if place is None:
            free = self.segments.find_free()
            if free is None:
                return
            self.segments.open(
                free, nonce=NONCE, sequence=self.sequence + 1, now=self.now, stream=stream
            )
            place = self.segments.allocate(nbytes, stream=stream)
            assert place is not None
            assert place == (free, SEGMENT_HEAD_BYTES)
        self.sequence += 1
        self.now += 1
        segment, offset = place
        assert offset + nbytes <= SEGMENT_BYTES
        self.segments.begin_write(
            segment, sequence=self.sequence, is_noted=nbytes == 64, now=self.now
        )
        self.writes.append(segment)
        self.records.append(record_at(segment, offset, nbytes))
        self.segments.add(self.records[-1])

    @precondition(lambda self: self.writes)
    @rule()
    def end_write(self) -> None:
        segment = self.writes.pop()
        settled = segment.settled if segment in self.writes else segment.offset
        self.segments.end_write(segment, settled)

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.records) - 1))
        self.segments.discard(self.records.pop(index))

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(self.records))
        self.segments.pin(record.segment)
        self.reads.append(record.segment)

    @precondition(lambda self: self.reads)
    @rule()
    def end_read(self) -> None:
        self.segments.unpin(self.reads.pop())

    @rule()
    def reclaim(self) -> None:
        victim = self.segments.choose_victim(self.now)
        if victim is None:
            return
        assert victim not in self.writes
        for record in [each for each in self.records if each.segment == victim.id]:
            place = self.segments.allocate(record.stored_bytes, stream=1)
            if place is None:
                return
            self.sequence += 1
            segment, offset = place
            assert segment is not victim
            self.segments.move(record, segment=segment.id, offset=offset, sequence=self.sequence)
        if victim.id in self.reads:
            return  # it is free when they have ended
        if victim.state == "sealed":
            self.segments.release(victim)
        else:
            self.segments.remove(victim)

    @rule(data=st.data())
    def fence(self, data: st.DataObject) -> None:
        used = [each for each in self.segments.segments.values() if each.state == "sealed"]
        if used:
            self.segments.fence(data.draw(st.sampled_from(used)))

    @invariant()
    def adds_up(self) -> None:
        self.segments.check(self.records)
        assert self.segments.live_records == len(self.records)
        assert self.segments.excess_bytes == 0


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
