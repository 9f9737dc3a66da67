"""Descriptions as bytes: the fields of a ``Meta``, the same in a batch and in a checkpoint.

The fields have one size, the key and the parent's key stand behind them: so many descriptions are
read in one call of ``iter_unpack``, which is what makes a restart with many pages quick.

Since format 2 a page may have more: its place in its prompt, which the engine packs (lineage.py).
That stands behind the parent's key, its length in front of it, and the kind of such a page is
another number. So what format 1 wrote is read as it always was.
"""

import struct
from typing import Literal

from respkv.errors import PageCorrupt
from respkv.page import KEY_BYTES_MAX as PAGE_KEY_BYTES_MAX
from respkv.page import PAGE_ID_BYTES, part_of
from respkv.tiers.format import Buffer
from respkv.tiers.record import Level, Meta

KEY_BYTES_MAX = 16384  # of a key and of a parent: two, and more, fit into a block of the checkpoint
# kind, level, key bytes, parent bytes, payload bytes, checksum, generation, expires, pinned,
# touched, priority, tokens, hits
META_FIELDS = "BBHHQQQQQQqQQ"
META = struct.Struct("<" + META_FIELDS)

MORE_BYTES_MAX = 20480
MORE = struct.Struct("<H")  # bytes that follow
# Only pages have more, and their keys are short.
BEHIND_BYTES_MAX = max(2 * KEY_BYTES_MAX, 2 * PAGE_KEY_BYTES_MAX + MORE.size + MORE_BYTES_MAX)
HAS_MORE = 2  # the kind of a page that has more

KINDS: tuple[Literal["string"], Literal["kvpage"], Literal["kvpage"]]
KINDS = ("string", "kvpage", "kvpage")
LEVELS = tuple(Level)
_KIND_NUMBERS = {"string": 0, "kvpage": 1}
_DIGITS = 2 * PAGE_ID_BYTES  # of a page's id, at the end of its key
_HEX = frozenset(b"0123456789abcdef")

MetaNumbers = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int]


def is_content_addressed(key: bytes, kind: str) -> bool:
    """Say whether a key names its content, so that every value it ever had is the same.

    That of a page does, and that of what hangs on one.
    """
    if kind != "kvpage":
        return False
    if len(key) > _DIGITS and key[-_DIGITS - 1] == 0x3A and _HEX.issuperset(key[-_DIGITS:]):
        return True
    return part_of(key) is not None


def behind_bytes(meta: Meta) -> int:
    """Return the bytes behind the fields of a description: its keys, and what more it has."""
    return len(meta.key) + len(meta.parent) + (MORE.size + len(meta.more) if meta.more else 0)


def can_be_kept(meta: Meta) -> bool:
    """Return whether a description is small enough for a file."""
    is_short = max(len(meta.key), len(meta.parent)) <= KEY_BYTES_MAX
    return is_short and behind_bytes(meta) <= BEHIND_BYTES_MAX


def behind(meta: Meta) -> tuple[bytes, ...]:
    """Return what stands behind the fields of a description."""
    if not meta.more:
        return meta.key, meta.parent
    return meta.key, meta.parent, MORE.pack(len(meta.more)), meta.more


def meta_bytes(meta: Meta) -> int:
    """Return the bytes of a description."""
    return META.size + behind_bytes(meta)


def meta_numbers(meta: Meta) -> MetaNumbers:
    """Return the fields in the order of META_FIELDS."""
    assert meta.kind == "kvpage" or not meta.more, "only a page has more"
    return (
        HAS_MORE if meta.more else _KIND_NUMBERS[meta.kind],
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
    return b"".join((META.pack(*meta_numbers(meta)), *behind(meta)))


def unpack_meta(buffer: Buffer, at: int) -> tuple[Meta, int]:
    """Read the description at ``at``; return it and where it ends.

    Raises PageCorrupt when there is none.
    """
    try:
        fields = META.unpack_from(buffer, at)
        kind, level, key_bytes, parent_bytes, payload_bytes, checksum, generation, *rest = fields
        expires_ms, pinned_ms, touched_ms, priority, tokens, hits = rest
        middle = at + META.size + key_bytes
        end = more_at = middle + parent_bytes
        if kind == HAS_MORE:
            more_at = end + MORE.size
            end = more_at + MORE.unpack_from(buffer, end)[0]
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
            bytes(buffer[middle : middle + parent_bytes]),
            bytes(buffer[more_at:end]),
        )
    except (struct.error, IndexError) as error:
        raise PageCorrupt(f"not a description: {error}") from error
    return meta, end
