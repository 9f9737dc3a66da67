"""Values that wait to be written, are being written, or have ended: what is kept of each."""

from dataclasses import dataclass, field
from typing import NamedTuple

from respkv.engine.entry import Entry
from respkv.engine.notes import Note
from respkv.tiers.record import Level


class Dirt(NamedTuple):
    """What a dirty entry holds in memory, and when it had been used as it became dirty."""

    nbytes: int
    is_small: bool
    touched: float


@dataclass(eq=False, slots=True)
class Writing:
    """A value on its way to a tier. ``is_void``: it is not the entry's any more."""

    entry: Entry
    tier: int
    level: Level
    generation: int
    dirt: Dirt | None
    notes: list[Note]
    is_void: bool = False
    changes: list[Note] = field(default_factory=list[Note])


class Move(NamedTuple):
    """A copy on its way to another tier."""

    tier: int
    generation: int
    level: Level


class End(NamedTuple):
    """A value that has ended: the tiers whose logs know it, up to which generation and level."""

    tiers: set[int]
    generation: int
    level: Level
