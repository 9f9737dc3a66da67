"""Checkpoints: all that a log holds, so that a restart need not read the log.

A checkpoint is complete up to a sequence P: it says what is left of all batches up to it, and
recovery replays those behind it. It is written while the log goes on: rows and the list of records
are of one moment, but each record is described when its turn comes. What was written or moved
meanwhile has a greater sequence and is left out, because the replay finds it; what was freed is
either left out or buried by the replay.

There are two files, written in turn, so one of them is whole at every time. Each block names the
checkpoint it belongs to, so that a half-written one over an old one is not taken for either.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from respkv.errors import PageCorrupt
from respkv.tiers.batch import NONCE_BYTES
from respkv.tiers.format import Buffer, hash64
from respkv.tiers.meta import (
    BEHIND_BYTES_MAX,
    HAS_MORE,
    KINDS,
    LEVELS,
    META,
    META_FIELDS,
    MORE,
    behind,
    behind_bytes,
    meta_numbers,
)
from respkv.tiers.record import Meta, Record
from respkv.tiers.segments import SegmentRow
from respkv.tiers.sizes import round_up

CHECKPOINT_NAMES = ("checkpoint.a", "checkpoint.b")
BLOCK_BYTES = 64 << 10
MAGIC = b"RKVchk1\n"
_UNIT_BYTES = 4096  # the last block ends at a multiple of it
# magic, seal, then what it seals: nonce, index, used bytes, rows, records, all records so far, last
_BLOCK = struct.Struct("<8sQ8sIIIIQQ")
_SEAL = struct.Struct("<Q")
_SEALED_FROM = 16
# sequence, next generation, next sequence, void below, written at, clean
_HEAD = struct.Struct("<QQQQQQ")
# id, nonce, state, sequence, offset, settled, live bytes, max sequence, noted
_ROW = struct.Struct("<Q8sIQQQQQQ")
# of a record behind its description: index of its row, offset, stored bytes, sequence, codec
_RECORD = struct.Struct("<" + META_FIELDS + "IQQQB")
_new_meta = tuple.__new__  # as Meta._make does, without its call

Found = tuple[Meta, Record]


class CheckpointHead(NamedTuple):
    """What a checkpoint says about the log.

    sequence:   P: all batches up to it are in the checkpoint.
    is_clean:   nothing was written behind it: the tier was stopped.
    void_below: as in the superblock.
    written_ms: wall-clock milliseconds.
    """

    sequence: int
    next_generation: int
    next_sequence: int
    void_below: int
    written_ms: int
    is_clean: bool


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint that was read whole. found: its records belong to nobody yet."""

    head: CheckpointHead
    rows: list[SegmentRow]
    found: list[Found]


def checkpoint_bytes_max(records: int, key_bytes: int, segments: int) -> int:
    """Return at most how large a checkpoint is. key_bytes: of all that stands behind the fields."""
    nbytes = _HEAD.size + segments * _ROW.size + records * _RECORD.size + key_bytes
    # A block ends where the next record does not fit, and no record is larger than half of one
    # plus its fields; usual ones lose next to nothing.
    return round_up(2 * nbytes, BLOCK_BYTES) + BLOCK_BYTES if nbytes > 1024 else _UNIT_BYTES


def encode_checkpoint(
    head: CheckpointHead, rows: Sequence[SegmentRow], found: Iterable[Found], *, nonce: bytes
) -> Iterator[bytes]:
    """Yield the blocks of a checkpoint: each has BLOCK_BYTES, the last one a multiple of 4096.

    found: is read as the blocks are asked for, at most some 800 for each. Records that are newer
           than the checkpoint, or in a segment that has no row, are left out.
    nonce: 8 random bytes.
    """
    assert len(nonce) == NONCE_BYTES
    writer = _Writer(nonce)
    writer.front.append(
        _HEAD.pack(
            head.sequence,
            head.next_generation,
            head.next_sequence,
            head.void_below,
            head.written_ms,
            head.is_clean,
        )
    )
    writer.used_bytes += _HEAD.size
    for row in rows:
        if writer.is_full(_ROW.size):
            yield writer.end_block(is_last=False)
        writer.front.append(_ROW.pack(*row))
        writer.num_rows += 1
        writer.used_bytes += _ROW.size
    row_of = {row.id: index for index, row in enumerate(rows)}
    for meta, record in found:
        index = row_of.get(record.segment)
        if index is None or record.sequence > head.sequence:
            continue
        nbytes = _RECORD.size + behind_bytes(meta)
        if writer.is_full(nbytes):
            yield writer.end_block(is_last=False)
        writer.add_record(meta, record, index, nbytes)
    yield writer.end_block(is_last=True)


class _Writer:
    """The block that is being filled."""

    def __init__(self, nonce: bytes) -> None:
        self.nonce = nonce
        self.index = 0
        self.num_rows = 0
        self.total_records = 0
        self.used_bytes = _BLOCK.size
        self.front: list[bytes] = []  # head and rows
        self.records: list[bytes] = []
        self.keys: list[bytes] = []

    def is_full(self, nbytes: int) -> bool:
        return self.used_bytes + nbytes > BLOCK_BYTES

    def add_record(self, meta: Meta, record: Record, row: int, nbytes: int) -> None:
        where = (row, record.offset, record.stored_bytes, record.sequence, record.codec)
        self.records.append(_RECORD.pack(*meta_numbers(meta), *where))
        self.keys += behind(meta)
        self.used_bytes += nbytes

    def end_block(self, *, is_last: bool) -> bytes:
        self.total_records += len(self.records)
        numbers = (self.index, self.used_bytes, self.num_rows, len(self.records))
        prefix = _BLOCK.pack(MAGIC, 0, self.nonce, *numbers, self.total_records, is_last)
        block = bytearray(b"".join([prefix, *self.front, *self.records, *self.keys]))
        assert len(block) == self.used_bytes <= BLOCK_BYTES
        _SEAL.pack_into(block, 8, hash64(memoryview(block)[_SEALED_FROM:]))
        self.index += 1
        self.num_rows = 0
        self.used_bytes = _BLOCK.size
        self.front, self.records, self.keys = [], [], []
        return bytes(
            block.ljust(round_up(len(block), _UNIT_BYTES) if is_last else BLOCK_BYTES, b"\0")
        )


class CheckpointReader:
    """Reads a checkpoint block by block.

    is_done: the last block was read, and ``checkpoint`` may be called.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._head: CheckpointHead | None = None
        self._nonce = b""
        self._index = 0
        self._rows: list[SegmentRow] = []
        self._found: list[Found] = []

    def feed(self, block: memoryview) -> None:
        """Read the next block; what follows it in ``block`` is not looked at.

        Raises PageCorrupt unless it is the next one, and whole.
        """
        if block.nbytes < _BLOCK.size:
            raise PageCorrupt("the checkpoint is cut short")
        magic, seal, nonce, index, used_bytes, num_rows, num_records, total, is_last = (
            _BLOCK.unpack_from(block)
        )
        if magic != MAGIC or not _BLOCK.size <= used_bytes <= min(BLOCK_BYTES, block.nbytes):
            raise PageCorrupt(f"block {self._index} of the checkpoint is none")
        block = block[:used_bytes]
        if seal != hash64(block[_SEALED_FROM:]):
            raise PageCorrupt(f"the seal of block {self._index} of the checkpoint does not match")
        if index != self._index or (index and nonce != self._nonce):
            raise PageCorrupt(f"block {self._index} is of another checkpoint")
        at = _BLOCK.size
        if not index:
            self._nonce = nonce
            *numbers, is_clean = _HEAD.unpack_from(block, at)
            self._head = CheckpointHead._make((*numbers, bool(is_clean)))
            at += _HEAD.size
        end = at + num_rows * _ROW.size
        self._rows += map(SegmentRow._make, _ROW.iter_unpack(block[at:end]))
        keys_at = end + num_records * _RECORD.size
        if keys_at > used_bytes:
            raise PageCorrupt("a block of the checkpoint has more records than bytes")
        self._decode_records(block[end:keys_at], bytes(block[keys_at:]))
        if len(self._found) != total:
            raise PageCorrupt(f"the checkpoint has {len(self._found)} records, not {total}")
        self._index += 1
        self.is_done = bool(is_last)

    @property
    def head(self) -> CheckpointHead:
        """What the first block said."""
        assert self._head is not None, "nothing was read yet"
        return self._head

    def checkpoint(self) -> Checkpoint:
        """Return the whole checkpoint."""
        assert self.is_done
        return Checkpoint(self.head, self._rows, self._found)

    def _decode_records(self, fields: memoryview, keys: bytes) -> None:
        # A restart waits for this loop: locals, and no call that is not needed.
        ids = [row.id for row in self._rows]
        append, unpack_more = self._found.append, MORE.unpack_from
        at = 0
        try:
            for (
                kind, level, key_bytes, parent_bytes, payload_bytes, checksum, generation,
                expires_ms, pinned_ms, touched_ms, priority, tokens, hits,
                row, offset, stored_bytes, sequence, codec,
            ) in _RECORD.iter_unpack(fields):  # fmt: skip
                middle = at + key_bytes
                end = behind = middle + parent_bytes
                more = b""
                if kind == HAS_MORE:
                    end += MORE.size
                    more = keys[end : end + unpack_more(keys, behind)[0]]
                    end += len(more)
                meta = _new_meta(
                    Meta,
                    (
                        keys[at:middle], KINDS[kind], payload_bytes, checksum, generation,
                        LEVELS[level], expires_ms, pinned_ms, touched_ms, priority, tokens, hits,
                        keys[middle:behind], more,
                    ),
                )  # fmt: skip
                at = end
                record = Record(
                    ids[row], offset, stored_bytes, payload_bytes, codec, generation, checksum,
                    sequence, meta.level, None,
                )  # fmt: skip
                append((meta, record))
        except (IndexError, struct.error) as error:
            raise PageCorrupt("a record of the checkpoint has a number that is none") from error
        if at != len(keys):
            raise PageCorrupt("the keys of a block of the checkpoint have other lengths")


def decode_checkpoint(data: Buffer) -> Checkpoint:
    """Read a checkpoint that is in memory whole. Raises PageCorrupt."""
    reader = CheckpointReader()
    view = memoryview(data)
    while not reader.is_done:
        reader.feed(view[:BLOCK_BYTES])
        view = view[BLOCK_BYTES:]
    return reader.checkpoint()


assert _RECORD.size == META.size + 29
assert _BLOCK.size + _RECORD.size + BEHIND_BYTES_MAX <= BLOCK_BYTES
