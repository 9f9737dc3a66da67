"""Leases: pins on slots that other processes read or write in place, with an owner and a deadline.

A lease belongs to a connection and dies with it. What a deadline means differs by side. A reader
that overstays loses the promise: its slots may be reused, and its KV.RELEASE is answered with 0 so
that it knows. A writer that overstays could write into a page that somebody else owns by then, so
its slot is never reused while it may still write: the lease is marked overdue, can no longer be
committed, and its owner is disconnected; the slot stays in quarantine for another ``quarantine_s``
after that. (Mooncake issues 850, 4239 and 4153 show what clock-based reuse leads to.)
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from respkv.errors import Busy, LeaseGone
from respkv.tiers.slab import Slot

LEASES_MAX = 65536  # of one connection: one of nothing takes memory too
_HEAP_SLACK = 1024


class Mode(Enum):
    READ = auto()
    WRITE = auto()


@dataclass(eq=False, slots=True)
class Lease:
    """Slots that ``owner`` may read, or one that it may write, until ``deadline`` (monotonic s)."""

    number: int
    owner: int
    mode: Mode
    slots: list[Slot]
    deadline: float
    key: bytes = b""
    is_overdue: bool = False


@dataclass(eq=False, slots=True)
class LeaseTable:
    """Every lease by number and by owner.

    give_back: called once for each slot when its lease is over.
    """

    give_back: Callable[[Slot], None]
    quarantine_s: float = 60.0
    _leases: dict[int, Lease] = field(default_factory=dict)
    _owned: dict[int, set[int]] = field(default_factory=dict)
    _deadlines: list[tuple[float, int]] = field(default_factory=list)
    _quarantine: list[tuple[float, int, Slot]] = field(default_factory=list)
    _next: int = 1

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def quarantined(self) -> int:
        """Slots of overdue writers that wait before they are used again."""
        return len(self._quarantine)

    def check_may_begin(self, owner: int) -> None:
        """Raise Busy when a connection has as many leases as one may have."""
        if len(self._owned.get(owner, ())) >= LEASES_MAX:
            raise Busy(f"this connection has {LEASES_MAX} leases; release some first")

    def begin(
        self, owner: int, mode: Mode, slots: list[Slot], deadline: float, key: bytes = b""
    ) -> Lease:
        """Record a lease on slots whose holders the caller has already counted."""
        lease = Lease(self._next, owner, mode, slots, deadline, key)
        self._next += 1
        self._leases[lease.number] = lease
        self._owned.setdefault(owner, set()).add(lease.number)
        heapq.heappush(self._deadlines, (deadline, lease.number))
        return lease

    def get(self, owner: int, number: int) -> Lease:
        """Return a lease that is in force. Raises LeaseGone, also for another owner's lease."""
        lease = self._leases.get(number)
        if lease is None or lease.owner != owner or lease.is_overdue:
            raise LeaseGone(f"lease {number} has lapsed or was never given to this connection")
        return lease

    def end(self, owner: int, number: int) -> bool:
        """End a lease and give its slots back. False when it was not in force any more."""
        lease = self._leases.get(number)
        if lease is None or lease.owner != owner:
            return False
        self._forget(lease)
        for slot in lease.slots:
            self.give_back(slot)
        return not lease.is_overdue

    def take_over(self, lease: Lease) -> Slot:
        """End a write lease and hand its slot, still held, to the caller."""
        assert lease.mode is Mode.WRITE
        self._forget(lease)
        return lease.slots[0]

    def drop_owner(self, owner: int, now: float, *, may_write: bool = False) -> None:
        """End all that a connection held.

        may_write: its process lives and was not asked, because the connection was closed on it: it
            may still be writing, so what it had reserved goes into quarantine, as for one overdue.
        """
        for number in list(self._owned.get(owner, ())):
            lease = self._leases[number]
            self._forget(lease)
            is_risky = lease.is_overdue or (may_write and lease.mode is Mode.WRITE)
            until = max(now, lease.deadline) + self.quarantine_s
            for slot in lease.slots:
                if is_risky:
                    heapq.heappush(self._quarantine, (until, number, slot))
                else:
                    self.give_back(slot)

    def lapse(self, now: float) -> list[int]:
        """End what is past its deadline; return the owners of overdue writers, to disconnect."""
        overdue = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            lease = self._leases.get(number)
            if lease is None:
                continue
            if lease.mode is Mode.READ:
                self.end(lease.owner, number)
            else:
                lease.is_overdue = True
                overdue.append(lease.owner)
        while self._quarantine and self._quarantine[0][0] <= now:
            self.give_back(heapq.heappop(self._quarantine)[2])
        return overdue

    def holders(self) -> dict[Slot, int]:
        """Count, for every slot, the leases and quarantines that hold it."""
        counts: dict[Slot, int] = {}
        for lease in self._leases.values():
            for slot in lease.slots:
                counts[slot] = counts.get(slot, 0) + 1
        for _, _, slot in self._quarantine:
            counts[slot] = counts.get(slot, 0) + 1
        return counts

    def check(self) -> None:
        """Assert that every lease has its owner and the other way round."""
        owned = {number for numbers in self._owned.values() for number in numbers}
        assert owned == set(self._leases)
        assert all(self._owned.values())
        waiting = {number for _, number in self._deadlines}
        for number, lease in self._leases.items():
            assert lease.number == number
            assert number in self._owned[lease.owner]
            assert lease.is_overdue or number in waiting
            assert all(slot.holders > 0 for slot in lease.slots)

    def _forget(self, lease: Lease) -> None:
        del self._leases[lease.number]
        if len(self._deadlines) > 2 * len(self._leases) + _HEAP_SLACK:
            self._deadlines = [each for each in self._deadlines if each[1] in self._leases]
            heapq.heapify(self._deadlines)
        numbers = self._owned[lease.owner]
        numbers.discard(lease.number)
        if not numbers:
            del self._owned[lease.owner]
