"""What actors of the engine are asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from respkv.engine.actor import Ask
from respkv.tiers.record import Level, Record, Value


@dataclass(frozen=True, slots=True)
class Sweep(Ask[None]):
    """Remove the entries whose TTL has ended."""


@dataclass(frozen=True, slots=True)
class Check(Ask[None]):
    """Assert that slots, index and leases agree. A failure is a bug and crashes the janitor."""


@dataclass(frozen=True, slots=True)
class ReadRecord(Ask[int]):
    """Fill ``into`` with a record's payload, or ``image`` with header and payload at once.

    Answered with the checksum of what is there now: of a lossy codec it is not the record's.
    """

    record: Record
    key: bytes
    into: memoryview
    image: memoryview | None


@dataclass(frozen=True, slots=True)
class ReadStored(Ask[tuple[int, bytes]]):
    """Read a record as it is stored, without decoding; answered with its codec and the bytes."""

    record: Record
    key: bytes


@dataclass(frozen=True, slots=True)
class WriteValues(Ask[None]):
    """Write values at a level.

    is_wanted: whether the value of this number still is: what was buried while the message waited
        must not come behind its burial.
    attach: told the records, None for what was not written, in the turn in which the tier returned
    them: an answer may be lost, so nothing is owned by one.
    """

    values: Sequence[Value]
    level: Level
    is_wanted: Callable[[int], bool]
    attach: Callable[[list[Record | None]], None]


@dataclass(frozen=True, slots=True)
class SettleNotes(Ask[list[str]]):
    """Wait until the notes of these tickets hold at a level, or will not.

    Answered with why each will not; empty for those that hold.
    """

    tickets: Sequence[int]
    level: Level


@dataclass(frozen=True, slots=True)
class ClearTier(Ask[None]):
    """Forget all values, durably."""
