"""The first bytes of a segment, and the names of the files."""

import struct
from typing import NamedTuple

from respkv.errors import PageCorrupt
from respkv.tiers.format import Buffer, hash64

SEGMENT_HEAD_BYTES = 4096  # the first batch starts behind it
MAGIC = b"RKVseg1\n"
# magic, version, alignment, segment, nonce, sequence, the segment before, its nonce and noted, seal
_HEAD = struct.Struct("<8sIIQ8sQQ8sQQ")
_SEALED_BYTES = _HEAD.size - 8
_TWIN_AT = SEGMENT_HEAD_BYTES // 2
_VERSION = 1
_PREFIX = "segment-"
_DIGITS = 8


class SegmentHead(NamedTuple):
    """What the first bytes of a segment say.

    nonce:    drawn anew at each use; batches with another one belong to an earlier use.
    sequence: of the next batch of the log when this use began.
    before, before_nonce, before_noted: the segment that its stream had filled last, and the last
        batch there that may supersede an older value: nothing behind it in that segment says so.
        0 noted: none.
    """

    id: int
    nonce: bytes
    sequence: int
    before: int = 0
    before_nonce: bytes = bytes(8)
    before_noted: int = 0


def segment_name(segment_id: int) -> str:
    """Return the name of a segment's file."""
    return f"{_PREFIX}{segment_id:0{_DIGITS}d}"


def segment_id_of(name: str) -> int | None:
    """Return the segment of a file's name, or None when it is no segment's."""
    digits = name.removeprefix(_PREFIX)
    is_ours = name.startswith(_PREFIX) and digits.isascii() and digits.isdigit()
    return int(digits) if is_ours and segment_name(int(digits)) == name else None


def encode_segment_head(head: SegmentHead, *, alignment: int) -> bytes:
    """Return the first SEGMENT_HEAD_BYTES of a segment; what they say is there twice."""
    data = bytearray(_HEAD.pack(MAGIC, _VERSION, alignment, *head, 0))
    data[_SEALED_BYTES:] = hash64(memoryview(data)[:_SEALED_BYTES]).to_bytes(8, "little")
    return bytes(data.ljust(_TWIN_AT, b"\0") * 2)


def decode_segment_head(buffer: Buffer, *, alignment: int) -> SegmentHead:
    """Read the head of a segment; of two different ones, which a torn write leaves, the newer.

    Raises PageCorrupt when neither copy is whole, or it is of another alignment.
    """
    view = memoryview(buffer)
    heads: list[SegmentHead] = []
    for at in (0, _TWIN_AT):
        if view.nbytes < at + _HEAD.size:
            break
        magic, version, aligned, *fields, seal = _HEAD.unpack_from(view, at)
        is_whole = seal == hash64(view[at : at + _SEALED_BYTES])
        if is_whole and (magic, version, aligned) == (MAGIC, _VERSION, alignment):
            heads.append(SegmentHead(*fields))
    if not heads:
        raise PageCorrupt("the head of a segment is damaged")
    return max(heads, key=lambda head: head.sequence)
