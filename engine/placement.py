"""Where a value's copies belong: the decisions of the mover, as functions of values.

* A value is written to the fastest tier that is healthy and takes its size.
* Cleaning begins when so much of the memory holds values without a copy in a file that evicting
  would soon lose some, and goes on until there is room to spare again.
* A value that was read from a file stays in memory when it is read for the second time since it
  left, so that one pass over many values does not push out what is in use; while a quarter of the
  arena is free there is nothing to push out.
* A page is copied to the gpu tier as well when it is read often enough while it is in memory.
* When a segment is reclaimed, a copy goes on living if its value is in use now, or was used more
  recently than most of its tier's that were looked at.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from respkv.engine.entry import Entry
from respkv.engine.tier import Tier

GpuPromote = Literal["second", "first", "never"]

BATCH_BYTES_MAX = 8 << 20
FREE_SHARE_TO_PROMOTE = 4  # of the arena, one in so many bytes is free
AGE_WEIGHT = 1 / 256  # of one record in the running mean of idle times
LEVEL_WEIGHT = 2.0  # what a client asked to survive stays for so many times as long


@dataclass(frozen=True, slots=True)
class MoveSettings:
    """How values move.

    promote: on which touch a loaded value stays in memory.
    dirty_high, dirty_low: percent of the arena (and of the budget of small values) at which
        cleaning begins and ends.
    move_bytes_max: on their way at one time, to files and from files each.
    """

    promote: Literal["second", "first", "never"] = "second"
    dirty_high: int = 50
    dirty_low: int = 40
    move_bytes_max: int = 64 << 20
    reserve_timeout_s: float = 5.0
    shutdown_timeout_s: float = 10.0


def choose_tier(tiers: Sequence[Tier], nbytes: int, first: int = 0) -> int | None:
    """Return the first tier from ``first`` on that takes a value of this size now, or None."""
    for number in range(first, len(tiers)):
        tier = tiers[number]
        if tier.health.state == "ok" and nbytes <= tier.payload_bytes_max:
            return number
    return None


def is_promoted(promote: str, touches: int, free_bytes: int, arena_bytes: int) -> bool:
    """Whether a value that was read ``touches`` times since it left stays in memory."""
    if promote == "never":
        return False
    if promote == "first" or free_bytes * FREE_SHARE_TO_PROMOTE >= arena_bytes:
        return True
    return touches >= 2


def is_lifted(promote: GpuPromote, reads: int) -> bool:
    """Whether a page that was read so often since it has its value is copied to the gpu tier.

    Unlike memory, which a load passes through anyway, that is a copy of its own: room that is free
    is no reason to make it.
    """
    if promote == "never":
        return False
    return reads >= (1 if promote == "first" else 2)


@dataclass(slots=True)
class Watermarks:
    """Whether values are to be cleaned now: from ``high`` bytes on, until ``low`` are left."""

    high: int = 0
    low: int = 0
    is_on: bool = False

    def set(self, budget: int, high: int, low: int) -> None:
        """Take both as percent of a budget."""
        self.high, self.low = budget * high // 100, budget * low // 100

    def excess(self, dirty_bytes: int) -> int:
        """Return how many of these bytes are to be cleaned now."""
        if dirty_bytes > self.high:
            self.is_on = True
        elif dirty_bytes <= self.low:
            self.is_on = False
        return dirty_bytes - self.low if self.is_on else 0


@dataclass(slots=True)
class Ages:
    """The running mean of how long the values of a tier that were looked at have been idle."""

    mean_s: float = 0.0

    def is_worth_keeping(self, idle_s: float, *, has_level: bool) -> bool:
        """Whether a value is used more recently than most; remember that it was looked at."""
        limit = self.mean_s * (LEVEL_WEIGHT if has_level else 1.0) / 2
        self.mean_s += (idle_s - self.mean_s) * AGE_WEIGHT
        return idle_s < limit


def idle_s(entry: Entry, now: float) -> float:
    """Return for how long neither a page nor the pages right behind it were used."""
    touched = max([entry.touched, *(child.touched for child in entry.children or ())])
    return max(0.0, now - touched)


def drain_order(dirty: Iterable[Entry], now: float) -> list[Entry]:
    """Order what is written when the server stops: what would be missed most comes first.

    Pinned before others, then the most recently used; but a page never before the page it stands
    behind, because without that one nobody would find it.
    """
    wanted = sorted(dirty, key=lambda entry: (entry.pinned_until <= now, -entry.touched))
    waiting = dict.fromkeys(wanted)
    order: list[Entry] = []
    for entry in wanted:
        path: list[Entry] = []
        each: Entry | None = entry
        while each is not None and each in waiting:
            path.append(each)
            del waiting[each]
            each = each.parent
        order += reversed(path)
    return order
