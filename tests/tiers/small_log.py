"""A log of a few small segments in memory, written a batch at a time as the runtime would."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import anyio

from respkv.tiers.batch import Batch, Bury, Note
from respkv.tiers.checkpoint import CHECKPOINT_NAMES, CheckpointHead, Found, encode_checkpoint
from respkv.tiers.format import hash64
from respkv.tiers.record import Level, Meta, Record
from respkv.tiers.recovery import Recovered, recover
from respkv.tiers.segment_head import SegmentHead, encode_segment_head, segment_name
from respkv.tiers.segments import Segment, SegmentTable
from respkv.tiers.superblock import SUPERBLOCK_NAME, Superblock, encode_superblock
from tests.tiers.memory_device import MemoryDevice

BOOT = "6c1b4d2e-0000-4000-8000-000000000001"
PAGE_KEY = b"llama:" + b"0f" * 32


def page_key(number: int) -> bytes:
    """Return a key that names its content."""
    return b"llama:%064x" % number


def string(key: bytes, payload: bytes, generation: int, level: Level = Level.DURABLE) -> "Given":
    """Describe the value of an ordinary key."""
    return Given(Meta(key, "string", len(payload), hash64(payload), generation, level), payload)


def page(number: int, payload: bytes, generation: int) -> "Given":
    """Describe a page."""
    key = page_key(number)
    return Given(Meta(key, "kvpage", len(payload), hash64(payload), generation), payload)


@dataclass(frozen=True)
class Given:
    """A value to be written, or copied. stored: its payload as stored, where that is another."""

    meta: Meta
    payload: bytes
    codec: int = 0
    stored: bytes | None = None
    is_copy: bool = False


@dataclass
class SmallLog:
    """The files, and what a runtime would know about them.

    live: what was written and not buried, by key.
    checkpoints: their sequences, by name.
    """

    tier: str = "nvme"
    alignment: int = 4096
    segment_bytes: int = 65536
    acked_all: bool = True
    files: dict[str, bytearray] = field(default_factory=dict[str, bytearray])
    live: dict[bytes, tuple[Meta, Record]] = field(default_factory=dict[bytes, tuple[Meta, Record]])
    checkpoints: dict[str, int] = field(default_factory=dict[str, int])
    sequence: int = 1
    void_below: int = 0
    now: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(7)
        self.table = SegmentTable(
            segment_bytes=self.segment_bytes, capacity_bytes=1 << 40, reserve_bytes=0
        )
        self.superblock(is_clean=False)

    def open_segment(self, segment: Segment | None = None) -> Segment:
        """Open a segment, a new one unless one is given; what was open is sealed."""
        for each in self.table.segments.values():
            if each.state == "open":
                self.table.seal(each)
        if segment is None:
            segment_id = self.table.begin_create()
            assert segment_id is not None
            segment = self.table.end_create(segment_id)
            self.files[segment_name(segment.id)] = bytearray(self.segment_bytes)
        nonce = self.random.randbytes(8)
        filled = self.table.filled.get(0)
        before = (0, bytes(8), 0)
        if filled is not None and filled is not segment:
            before = (filled.id, filled.nonce, filled.noted)
        self.table.open(segment, nonce=nonce, sequence=self.sequence, now=self.now)
        head = SegmentHead(segment.id, nonce, self.sequence, *before)
        data = encode_segment_head(head, alignment=self.alignment)
        self.files[segment_name(segment.id)][: len(data)] = data
        return segment

    def batch(self, values: Sequence[Given] = (), notes: Iterable[Note] = ()) -> int:
        """Write one batch; return its sequence."""
        batch = Batch(self.alignment)
        for value in values:
            stored = value.payload if value.stored is None else value.stored
            batch.add_value(
                value.meta, memoryview(stored), codec=value.codec, is_copy=value.is_copy
            )
        notes = list(notes)
        for note in notes:
            batch.add_note(note)
        segment, offset = self._place(batch.total_bytes)
        sequence, self.sequence = self.sequence, self.sequence + 1
        encoded = batch.encode(
            memoryview(bytearray(batch.staging_bytes)),
            offset=offset,
            nonce=segment.nonce,
            sequence=sequence,
            acked=sequence - 1 if self.acked_all else 0,
            noted=segment.noted,
        )
        self.table.begin_write(
            segment, sequence=sequence, is_noted=batch.may_supersede, now=self.now
        )
        file = self.files[segment_name(segment.id)]
        for piece in encoded.pieces:
            file[piece.offset : piece.offset + piece.data.nbytes] = piece.data
        self.table.end_write(segment, segment.offset)
        for value, place in zip(values, encoded.places, strict=True):
            self._keep(value.meta, Record(
                segment.id, *place[:2], value.meta.payload_bytes, place.codec,
                value.meta.generation, value.meta.checksum, sequence, value.meta.level, None,
            ))  # fmt: skip
        for note in notes:
            self._note(note)
        self.table.check([record for _, record in self.live.values()])
        return sequence

    def checkpoint(self, name: str = CHECKPOINT_NAMES[0], *, is_clean: bool = False) -> None:
        """Write a checkpoint of all that is there."""
        head = CheckpointHead(
            sequence=self.sequence - 1,
            next_generation=1 + max([0, *(m.generation for m, _ in self.live.values())]),
            next_sequence=self.sequence,
            void_below=self.void_below,
            written_ms=1_700_000_000_000,
            is_clean=is_clean,
        )
        blocks = encode_checkpoint(
            head, self.table.rows(), self.live.values(), nonce=self.random.randbytes(8)
        )
        self.files[name] = bytearray(b"".join(blocks))
        self.checkpoints[name] = head.sequence

    def superblock(self, *, is_clean: bool) -> None:
        """Write the superblock."""
        self.files[SUPERBLOCK_NAME] = bytearray(
            encode_superblock(
                Superblock(
                    self.tier,
                    self.alignment,
                    self.segment_bytes,
                    is_clean,
                    BOOT,
                    self.void_below,
                    self.sequence,
                )
            )
        )

    def stop(self) -> None:
        """End as a clean stop does."""
        self.checkpoint(is_clean=True)
        self.superblock(is_clean=True)

    def recover(self, *, boot_id: str = BOOT, files: dict[str, bytes] | None = None) -> Recovered:
        """Recover from the files as they are, or from others."""
        if files is None:
            files = {name: bytes(data) for name, data in self.files.items()}
        return anyio.run(
            recover_files, MemoryDevice(files, alignment=self.alignment), self, boot_id
        )

    def read(self, record: Record) -> bytes:
        """Return the payload of a record as it is stored."""
        start = record.offset + 64
        return bytes(
            self.files[segment_name(record.segment)][start : record.offset + record.stored_bytes]
        )

    def _place(self, nbytes: int) -> tuple[Segment, int]:
        place = self.table.allocate(nbytes)
        if place is None:
            self.open_segment()
            place = self.table.allocate(nbytes)
        assert place is not None
        return place

    def _keep(self, meta: Meta, record: Record) -> None:
        if meta.key in self.live:
            self.table.discard(self.live[meta.key][1])
        self.live[meta.key] = meta, record
        self.table.add(record)

    def _note(self, note: Note) -> None:
        key = note.key if isinstance(note, Bury) else note.meta.key
        if key not in self.live:
            return
        meta, record = self.live[key]
        if isinstance(note, Bury):
            if meta.generation <= note.generation:
                self.table.discard(record)
                del self.live[key]
        elif meta.generation == note.meta.generation:
            record.level = note.meta.level
            self.live[key] = note.meta, record


async def recover_files(device: MemoryDevice, log: SmallLog, boot_id: str) -> Recovered:
    """Recover with the settings of a log."""
    return await recover(
        device,
        tier=log.tier,
        alignment=log.alignment,
        segment_bytes=log.segment_bytes,
        capacity_bytes=1 << 40,
        reserve_bytes=0,
        boot_id=boot_id,
        now=log.now,
    )


def metas(found: Iterable[Found]) -> dict[bytes, Meta]:
    """Return what was found by key."""
    return {meta.key: meta for meta, _ in found}
