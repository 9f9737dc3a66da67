"""Heads of batches and of images, read back; batch.py says what they are."""

import struct

from respkv.errors import PageCorrupt
from respkv.tiers.batch import (
    BURY,
    HEAD_BYTES_MAX,
    HEAD_PREFIX_BYTES,
    IS_BURY,
    IS_CHANGE,
    IS_COPY,
    IS_VALUE,
    MAGIC,
    PREFIX,
    RAW,
    SEALED_FROM,
    TWIN_MAGIC,
    VALUE,
    Bury,
    Change,
    Head,
    Item,
    ValueItem,
)
from respkv.tiers.format import HEADER_BYTES, Buffer, Header, hash64, read_header
from respkv.tiers.meta import unpack_meta
from respkv.tiers.sizes import round_up

_USED = struct.Struct("<I")
_USED_AT = 64


def head_used_bytes(buffer: Buffer, nonce: bytes) -> int:
    """Return how much of a head must be there for ``decode_head``; 0 when none starts here."""
    if len(buffer) < HEAD_PREFIX_BYTES or buffer[:16] not in (MAGIC + nonce, TWIN_MAGIC + nonce):
        return 0
    used_bytes: int = _USED.unpack_from(buffer, _USED_AT)[0]
    return used_bytes if HEAD_PREFIX_BYTES <= used_bytes <= HEAD_BYTES_MAX else 0


def peek(buffer: Buffer) -> tuple[bytes, int] | None:
    """Return the nonce and the sequence of the batch that seems to start here, whole or not."""
    if len(buffer) < HEAD_PREFIX_BYTES or buffer[:8] != MAGIC:
        return None
    _, nonce, _, _, sequence, *_ = PREFIX.unpack_from(buffer)
    return nonce, sequence


def decode_head(buffer: Buffer, *, offset: int | None, nonce: bytes) -> Head:
    """Read the head, or the twin of one, at the start of a buffer.

    offset: of the batch in its segment; None takes what the head says, for a twin.
    Raises PageCorrupt unless it is a head of this segment, at this offset, and whole.
    """
    view = memoryview(buffer)
    used_bytes = head_used_bytes(view, nonce)
    if not used_bytes or used_bytes > view.nbytes:
        raise PageCorrupt("no batch of this segment starts here, or its head is cut short")
    view = view[:used_bytes]
    _, _, seal, at, sequence, acked, noted, total_bytes, _, num_items = PREFIX.unpack_from(view)
    if seal != hash64(view[SEALED_FROM:]):
        raise PageCorrupt("the seal of a batch does not match: its head was changed or torn")
    if offset is not None and at != offset:
        raise PageCorrupt(f"a batch was written for offset {at}, not {offset}")
    items = _decode_items(bytes(view), num_items)
    has_notes = any(not isinstance(item, ValueItem) for item in items)
    head_bytes = round_up(used_bytes, 64) * (2 if has_notes else 1)
    if head_bytes > total_bytes:
        raise PageCorrupt("a batch is shorter than its head")
    return Head(at, sequence, acked, noted, total_bytes, head_bytes, items)


def _decode_items(head: bytes, num_items: int) -> tuple[Item, ...]:
    items: list[Item] = []
    at = HEAD_PREFIX_BYTES
    try:
        for _ in range(num_items):
            item, at = _decode_item(head, at)
            items.append(item)
    except (struct.error, IndexError) as error:
        raise PageCorrupt(f"the items of a batch cannot be read: {error}") from error
    if at != len(head):
        raise PageCorrupt("the items of a batch end elsewhere than its head says")
    return tuple(items)


def _decode_item(head: bytes, at: int) -> tuple[Item, int]:
    kind = head[at]
    if kind in (IS_VALUE, IS_COPY):
        _, codec, offset, stored_bytes = VALUE.unpack_from(head, at)
        meta, end = unpack_meta(head, at + VALUE.size)
        return ValueItem(meta, offset, stored_bytes, codec, kind == IS_COPY), end
    if kind == IS_BURY:
        _, key_bytes, generation = BURY.unpack_from(head, at)
        at += BURY.size
        return Bury(head[at : at + key_bytes], generation), at + key_bytes
    if kind == IS_CHANGE:
        meta, end = unpack_meta(head, at + 1)
        return Change(meta), end
    raise PageCorrupt(f"a batch has an item of the unknown kind {kind}")


def check_image(header: Buffer, item: ValueItem) -> Header:
    """Check the 64 bytes in front of a value against what its batch says.

    Returns: the header; the payload, which follows it, must have its checksum.
    Raises PageCorrupt.
    """
    found = read_header(header)
    meta = item.meta
    there = (found.codec, found.key_hash, found.generation, found.payload_bytes)
    if there != (item.codec, hash64(meta.key), meta.generation, item.stored_bytes - HEADER_BYTES):
        raise PageCorrupt("the place of a value holds another one")
    if item.codec == RAW and found.checksum != meta.checksum:
        raise PageCorrupt("a value has another checksum than its batch says")
    return found
