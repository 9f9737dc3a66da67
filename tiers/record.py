"""What a file tier keeps about a value: its description, and where its bytes are.

``Meta`` is all that has to survive a restart beside the bytes themselves; the engine makes it, the
log stores it. ``Record`` is one copy of a value in one file tier; the engine hangs it on the entry
it belongs to, the tier moves it when its segment is reclaimed, so whoever holds a record always
knows where it is now.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

NOWHERE = -1  # no segment has this id


class Level(IntEnum):
    """What an acknowledged put survives."""

    MEMORY = 0  # nothing for sure: written when it is demoted and when the server stops
    WRITTEN = 1  # a crash of the process: written before the reply
    DURABLE = 2  # a power cut: written and synced before the reply


class Meta(NamedTuple):
    """A value but for its bytes.

    payload_bytes, checksum: of the payload as a client sent it; ``hash64``.
    generation: of the put, never used twice; of two values of one key the greater is the newer.
    expires_ms, pinned_ms, touched_ms: wall-clock milliseconds, 0 for none.
    parent:     key of the page it stands behind, or empty.
    more:       of a page: what else the engine knows of it; opaque here.
    """

    key: bytes
    kind: Literal["string", "kvpage"]
    payload_bytes: int
    checksum: int
    generation: int
    level: Level = Level.MEMORY
    expires_ms: int = 0
    pinned_ms: int = 0
    touched_ms: int = 0
    priority: int = 0
    tokens: int = 0
    hits: int = 0
    parent: bytes = b""
    more: bytes = b""


class Value(NamedTuple):
    """A value that a tier is asked to write.

    payload: its bytes; they must not change until the write has ended.
    image:   its 64-byte header, the payload and what follows up to a multiple of 4096 bytes, when
             that is one piece of 4096-aligned memory; it is then written without a copy. Else None.
    owner:   hung onto the record.
    """

    meta: Meta
    payload: memoryview
    image: memoryview | None
    owner: Any


@dataclass(eq=False, slots=True)
class Record:
    """One copy of a value in one file tier.

    segment, offset: where it is now: the id of the segment, and the byte at which its 64-byte page
        header starts. Written by the tier alone. No segment: see ``is_gone``.
    stored_bytes:    header and payload as they are stored, padding excluded.
    codec:           how the payload is stored, as in the page header.
    sequence:        of the batch that wrote it; grows with every batch of one log.
    touches:         how often this copy was read.
    tier:            which of the engine's file tiers it is in; written by the engine alone.
    """

    segment: int
    offset: int
    stored_bytes: int
    payload_bytes: int
    codec: int
    generation: int
    checksum: int
    sequence: int
    level: Level
    owner: Any
    touches: int = 0
    tier: int = 0

    @property
    def is_gone(self) -> bool:
        """Whether it was written, as it was asked to be, and evicted before its asker had it."""
        return self.segment == NOWHERE
