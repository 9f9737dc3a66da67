"""Descriptions as bytes: the fields of a ``Meta``, the same in a batch and in a checkpoint.

The fields have one size, the key and the parent's key stand behind them: so many descriptions are
read in one call of ``iter_unpack``, which is what makes a restart with many pages quick.
"""

import struct
from typing import Literal

from respkv.errors import PageCorrupt
from respkv.tiers.format import Buffer
from respkv.tiers.record import Level, Meta

KEY_BYTES_MAX = 16384  # of a key and of a parent: two fit into a block of the checkpoint
# kind, level, key bytes, parent bytes, payload bytes, checksum, generation, expires, pinned,
# touched, priority, tokens, hits
META_FIELDS = "BBHHQQQQQQqQQ"
META = struct.Struct("<" + META_FIELDS)

KINDS: tuple[Literal["string"], Literal["kvpage"]] = ("string", "kvpage")
LEVELS = tuple(Level)
_KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_DIGITS = 64  # of a page's id, at the end of its key
_HEX = frozenset(b"0123456789abcdef")

MetaNumbers = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int]


def is_content_addressed(key: bytes, kind: str) -> bool:
    """Say whether a key names its content, so that every value it ever had is the same."""
    digits = key[-_DIGITS:]
    return (
        kind == "kvpage"
        and len(key) > _DIGITS
        and key[-_DIGITS - 1] == 0x3A
        and _HEX.issuperset(digits)
    )


def meta_bytes(meta: Meta) -> int:
    """Return the bytes of a description: its fields, its key and its parent's key."""
    return META.size + len(meta.key) + len(meta.parent)


def meta_numbers(meta: Meta) -> MetaNumbers:
    """Return the fields in the order of META_FIELDS."""
    return (
        _KIND_NUMBERS[meta.kind],
        meta.level,
        len(meta.key),
        len(meta.parent),
        meta.payload_bytes,
        meta.checksum,
        meta.generation,
        meta.expires_ms,
        meta.pinned_ms,
        meta.touched_ms,
        meta.priority,
        meta.tokens,
        meta.hits,
    )


def pack_meta(meta: Meta) -> bytes:
    """Return a description as bytes."""
    return META.pack(*meta_numbers(meta)) + meta.key + meta.parent


def unpack_meta(buffer: Buffer, at: int) -> tuple[Meta, int]:
    """Read the description at ``at``; return it and where it ends.

    Raises PageCorrupt when there is none.
    """
    try:
        fields = META.unpack_from(buffer, at)
        kind, level, key_bytes, parent_bytes, payload_bytes, checksum, generation, *rest = fields
        expires_ms, pinned_ms, touched_ms, priority, tokens, hits = rest
        middle = at + META.size + key_bytes
        end = middle + parent_bytes
        if end > len(buffer):
            raise PageCorrupt("a description ends behind its block")
        meta = Meta(
            bytes(buffer[at + META.size : middle]),
            KINDS[kind],
            payload_bytes,
            checksum,
            generation,
            LEVELS[level],
            expires_ms,
            pinned_ms,
            touched_ms,
            priority,
            tokens,
            hits,
            bytes(buffer[middle:end]),
        )
    except (struct.error, IndexError) as error:
        raise PageCorrupt(f"not a description: {error}") from error
    return meta, end
