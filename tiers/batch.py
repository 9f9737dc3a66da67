"""Batches: what one write adds to the log, and how it is recognised again.

A batch is a head, which says what is in it, and the images of its values, each a page header
(format.py) and the payload as stored. Small images are copied behind the head, so that they and it
are one piece; large ones are pieces of their own and are written from where they are. All sizes are
known before anything is written, so space can be taken for a whole batch.

A segment is written again and again, so it is full of old batches, and a payload may hold anything,
a copy of a batch included. So a head names the nonce of its segment, drawn anew at each reuse, and
its own offset, and is sealed.

Recovery must not serve what was buried. A lost value is only forgotten, but a lost note would bring
back an older value: so the head of a batch with notes is written twice, at both ends of the head,
and one flipped bit loses none. Wider damage is noticed: each head says which batches were
acknowledged when it was written, and which batch of its segment was the last that had notes, or a
value that stands in for one because it replaces an older value of its key (recovery.py).
"""

import struct
from typing import NamedTuple

from respkv.tiers.device import Write
from respkv.tiers.format import (
    HEADER_BYTES,
    Header,
    hash64,
    read_header,
    write_header,
)
from respkv.tiers.meta import (
    BEHIND_BYTES_MAX,
    KEY_BYTES_MAX,
    META,
    MORE_BYTES_MAX,
    is_content_addressed,
    meta_bytes,
    pack_meta,
)
from respkv.tiers.record import Level, Meta
from respkv.tiers.sizes import round_up

NONCE_BYTES = 8
ITEMS_MAX = 4096  # values and notes of one batch
HEAD_BYTES_MAX = 1 << 20  # of a head, its twin included
PIECE_BYTES_MIN = 64 << 10  # without O_DIRECT: stored payloads from here on are not copied
MAGIC = b"RKVbat1\n"
TWIN_MAGIC = b"RKVtwn1\n"
RAW = 0

# magic, nonce, seal, then what it seals: offset, sequence, acked, noted, total bytes, bytes up to
# the end of the items, number of items
PREFIX = struct.Struct("<8s8sQQQQQQII")
_SEAL = struct.Struct("<Q")
SEALED_FROM = 24
HEAD_PREFIX_BYTES = PREFIX.size
VALUE = struct.Struct("<BBQQ")  # 0 or 3, codec, offset, stored bytes
BURY = struct.Struct("<BHQ")  # 1, key bytes, generation
IS_VALUE, IS_BURY, IS_CHANGE, IS_COPY = range(4)
_ITEM_BYTES_MAX = VALUE.size + META.size + BEHIND_BYTES_MAX


class Bury(NamedTuple):
    """No record of ``key`` with this generation or an older one is valid any more."""

    key: bytes
    generation: int


class Change(NamedTuple):
    """The value with exactly this generation is described by ``meta`` now."""

    meta: Meta


class ValueItem(NamedTuple):
    """A value of a batch.

    offset:  of its page header, from the start of the batch.
    is_copy: reclaim has copied it here, so an earlier batch may have a newer value of its key.
    """

    meta: Meta
    offset: int
    stored_bytes: int
    codec: int
    is_copy: bool = False


Note = Bury | Change
Item = ValueItem | Bury | Change


class Place(NamedTuple):
    """Where a value was put: the offset of its page header in the segment's file."""

    offset: int
    stored_bytes: int
    codec: int


class Encoded(NamedTuple):
    """What is to be written, and where each value of the batch will be, in the order of adding."""

    pieces: list[Write]
    places: list[Place]


class Head(NamedTuple):
    """What the head of a batch says.

    acked: all batches up to this sequence were acknowledged when this one was written, or more.
    noted: the last batch before this one in its segment that had notes; 0 for none.
    """

    offset: int
    sequence: int
    acked: int
    noted: int
    total_bytes: int
    head_bytes: int
    items: tuple[Item, ...]


class _Image(NamedTuple):
    meta: Meta
    payload: memoryview
    codec: int
    image: memoryview | None
    checksum: int | None
    is_copy: bool

    @property
    def stored_bytes(self) -> int:
        return HEADER_BYTES + self.payload.nbytes


class Batch:
    """One batch as it is put together; ``encode`` makes bytes of it.

    alignment: of the log: 4096 where O_DIRECT may be used, else 64.
    """

    def __init__(self, alignment: int) -> None:
        assert alignment in (64, 4096)
        self.alignment = alignment
        self.num_items = 0
        self.has_notes = False
        self.may_supersede = False  # its loss might let an older value of a key come back
        self._used_bytes = HEAD_PREFIX_BYTES
        self._staged_bytes = 0  # of images behind the head
        self._pieces_bytes = 0  # of images that are pieces of their own
        self._num_apart = 0  # of those, how many have their header in the staging memory
        self._images: list[_Image] = []
        self._notes: list[Note] = []

    @property
    def head_bytes(self) -> int:
        """Bytes of the head, its twin included."""
        return round_up(self._used_bytes, 64) * (2 if self.has_notes else 1)

    @property
    def total_bytes(self) -> int:
        """Bytes of the log that the batch takes."""
        return self._front_bytes + self._pieces_bytes

    @property
    def staging_bytes(self) -> int:
        """Bytes of memory that ``encode`` needs."""
        return self._front_bytes + round_up(self._num_apart * HEADER_BYTES, self.alignment)

    @property
    def _front_bytes(self) -> int:
        return round_up(self.head_bytes + self._staged_bytes, self.alignment)

    def has_room(self) -> bool:
        """Say whether one more item fits, whatever its key."""
        used_bytes = self._used_bytes + _ITEM_BYTES_MAX
        return self.num_items < ITEMS_MAX and 2 * round_up(used_bytes, 64) <= HEAD_BYTES_MAX

    def bytes_with(self, meta: Meta, stored_payload_bytes: int, *, has_image: bool) -> int:
        """Return at most how large the batch is with one more value."""
        item_bytes = 2 * (VALUE.size + meta_bytes(meta) + 64)
        unit = self.alignment if has_image else 64
        image_bytes = round_up(HEADER_BYTES + stored_payload_bytes, unit)
        return self.total_bytes + round_up(item_bytes + image_bytes, self.alignment)

    def add_value(
        self,
        meta: Meta,
        payload: memoryview,
        *,
        codec: int = RAW,
        image: memoryview | None = None,
        checksum: int | None = None,
        is_copy: bool = False,
    ) -> None:
        """Add a value.

        payload:  as it is stored; it must not change until the write has ended.
        image:    header, payload and padding up to 4096 bytes in one 4096-aligned piece, only of a
                  raw value; its header says already what ``meta`` says.
        checksum: of the payload as stored, where it is known and not raw; else ``encode`` takes it.
        is_copy:  see ``ValueItem``.
        """
        self._count(VALUE.size + meta_bytes(meta), meta)
        assert codec != RAW or payload.nbytes == meta.payload_bytes
        image = None if image is None else image[: self._padded(payload)]
        value = _Image(meta, payload, codec, image, checksum, is_copy)
        if image is not None:
            assert codec == RAW
            assert image.nbytes == self._padded(payload), "an image is cut short"
        if self._is_staged(value):
            self._staged_bytes += round_up(value.stored_bytes, 64)
        else:
            self._pieces_bytes += self._padded(payload)
            self._num_apart += image is None
        self._images.append(value)
        if meta.level >= Level.WRITTEN and not is_content_addressed(meta.key, meta.kind):
            self.may_supersede = True

    def add_note(self, note: Note) -> None:
        """Add a note. It holds for what any earlier batch says, and for the values of this one."""
        if isinstance(note, Bury):
            assert len(note.key) <= KEY_BYTES_MAX
            self._count(BURY.size + len(note.key), None)
        else:
            self._count(1 + meta_bytes(note.meta), note.meta)
        self._notes.append(note)
        self.has_notes = self.may_supersede = True

    def encode(
        self, into: memoryview, *, offset: int, nonce: bytes, sequence: int, acked: int, noted: int
    ) -> Encoded:
        """Write head and small images into ``into``, and say what is to be written where.

        into:   at least ``staging_bytes``, aligned as the device asks, until the writes have ended.
        offset: of the batch in its segment, whose nonce this is; acked, noted: see ``Head``.
        """
        assert offset % self.alignment == 0
        assert len(nonce) == NONCE_BYTES
        assert into.nbytes >= self.staging_bytes
        assert acked < sequence > noted
        offsets = self._offsets()
        items = self._encode_items(offsets)
        used_bytes = HEAD_PREFIX_BYTES + len(items)
        assert used_bytes == self._used_bytes
        numbers = (offset, sequence, acked, noted, self.total_bytes, used_bytes, self.num_items)
        head = bytearray(PREFIX.pack(MAGIC, nonce, 0, *numbers) + items)
        _SEAL.pack_into(head, 16, hash64(memoryview(head)[SEALED_FROM:]))
        half = round_up(used_bytes, 64)
        into[: self.head_bytes] = bytes(self.head_bytes)
        into[:used_bytes] = head
        if self.has_notes:
            into[half : half + used_bytes] = TWIN_MAGIC + head[8:]
        pieces = self._lay(into, offset, offsets)
        places = [
            Place(offset + at, image.stored_bytes, image.codec)
            for image, at in zip(self._images, offsets, strict=True)
        ]
        return Encoded(pieces, places)

    def _count(self, nbytes: int, meta: Meta | None) -> None:
        assert self.has_room()
        assert meta is None or max(len(meta.key), len(meta.parent)) <= KEY_BYTES_MAX
        assert meta is None or len(meta.more) <= MORE_BYTES_MAX
        self.num_items += 1
        self._used_bytes += nbytes

    def _padded(self, payload: memoryview) -> int:
        return round_up(HEADER_BYTES + payload.nbytes, self.alignment)

    def _is_staged(self, value: _Image) -> bool:
        # Under O_DIRECT memory that is not aligned has to be copied, whatever its size.
        is_small = self.alignment == 4096 or value.payload.nbytes < PIECE_BYTES_MIN
        return value.image is None and is_small

    def _offsets(self) -> list[int]:
        staged, apart = self.head_bytes, self._front_bytes
        offsets: list[int] = []
        for value in self._images:
            if self._is_staged(value):
                offsets.append(staged)
                staged += round_up(value.stored_bytes, 64)
            else:
                offsets.append(apart)
                apart += self._padded(value.payload)
        assert apart == self.total_bytes
        return offsets

    def _encode_items(self, offsets: list[int]) -> bytes:
        parts: list[bytes] = []
        for value, at in zip(self._images, offsets, strict=True):
            kind = IS_COPY if value.is_copy else IS_VALUE
            parts.append(VALUE.pack(kind, value.codec, at, value.stored_bytes))
            parts.append(pack_meta(value.meta))
        for note in self._notes:
            if isinstance(note, Bury):
                parts += (BURY.pack(IS_BURY, len(note.key), note.generation), note.key)
            else:
                parts += (bytes([IS_CHANGE]), pack_meta(note.meta))
        return b"".join(parts)

    def _lay(self, into: memoryview, offset: int, offsets: list[int]) -> list[Write]:
        pieces = [Write(offset, into[: self._front_bytes])]
        end, header_at = self.head_bytes, self._front_bytes
        for value, at in zip(self._images, offsets, strict=True):
            if self._is_staged(value):
                end = at + round_up(value.stored_bytes, 64)
                stop = at + value.stored_bytes
                write_header(into[at : at + HEADER_BYTES], _header_of(value))
                into[at + HEADER_BYTES : stop] = value.payload.cast("B")
                into[stop:end] = bytes(end - stop)
            elif value.image is not None:
                assert _says(value.image, value.meta), "the header in memory is another value's"
                pieces.append(Write(offset + at, value.image))
            else:
                header = into[header_at : header_at + HEADER_BYTES]
                write_header(header, _header_of(value))
                pieces.append(Write(offset + at, header))
                pieces.append(Write(offset + at + HEADER_BYTES, value.payload))
                header_at += HEADER_BYTES
        into[end : self._front_bytes] = bytes(self._front_bytes - end)
        return pieces


def _header_of(value: _Image) -> Header:
    checksum = value.meta.checksum if value.codec == RAW else value.checksum
    return Header(
        codec=value.codec,
        flags=0,
        namespace=0,
        key_hash=hash64(value.meta.key),
        generation=value.meta.generation,
        payload_bytes=value.payload.nbytes,
        checksum=hash64(value.payload) if checksum is None else checksum,
    )


def _says(image: memoryview, meta: Meta) -> bool:
    header = read_header(image)
    there = (header.codec, header.generation, header.payload_bytes, header.checksum)
    return there == (RAW, meta.generation, meta.payload_bytes, meta.checksum)
