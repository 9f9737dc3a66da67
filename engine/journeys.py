"""Values that wait to be written, are being written, or have ended: what is kept of each."""

from dataclasses import dataclass, field
from typing import NamedTuple

from respkv.engine.entry import Entry
from respkv.engine.notes import Note
from respkv.tiers.record import Level, Record


class Dirt(NamedTuple):
    """What a dirty entry holds in memory, and when it had been used as it became dirty."""

    nbytes: int
    is_small: bool
    touched: float


@dataclass(eq=False, slots=True)
class Writing:
    """A value on its way to a tier.

    is_void: it is not the entry's any more.
    ghost:   whose it is then, if it may not be forgotten yet.
    changes: notes of what has changed since, which the log is told when it has the value.
    is_again: it is tried for the second time with the same tier.
    """

    entry: Entry
    tier: int
    level: Level
    generation: int
    dirt: Dirt | None
    notes: list[Note]
    is_void: bool = False
    ghost: Entry | None = None
    changes: list[Note] = field(default_factory=list[Note])
    is_again: bool = False


@dataclass(eq=False, slots=True)
class Move:
    """A copy on its way to another tier, described as its value was when it was read.

    changes: notes of what has changed since, which that tier's log is told when it has the copy.
    """

    tier: int
    generation: int
    level: Level
    changes: list[Note] = field(default_factory=list[Note])


class End(NamedTuple):
    """A value that has ended: the tiers whose logs know it, up to which generation and level.

    A log may use the place of a copy again when it is freed, and what it held was also what kept
    older values away: so copies of what a client wants to survive are freed in the same turn in
    which the burial is asked for. Until then they belong to ghosts.

    ghosts:  entries of no key, which describe the copies that are kept so.
    records: its copies, if they are nobody's yet.
    writing: the one that was on its way.
    """

    tiers: set[int]
    generation: int
    level: Level
    ghosts: tuple[Entry, ...] = ()
    records: tuple[Record, ...] = ()
    writing: Writing | None = None


def ghost_of(entry: Entry, records: tuple[Record, ...]) -> Entry:
    """Return an entry of no key that describes the copies of a value which is being replaced."""
    ghost = Entry(entry.key, entry.kind, entry.nbytes, entry.born)
    ghost.generation, ghost.level, ghost.expires_ms = (
        entry.generation,
        entry.level,
        entry.expires_ms,
    )
    ghost.touched, ghost.hits, ghost.pinned_until = entry.touched, entry.hits, entry.pinned_until
    ghost.priority, ghost.tokens, ghost.parent_key = entry.priority, entry.tokens, entry.parent_key
    ghost.records = records
    for record in records:
        record.owner = ghost
    return ghost
