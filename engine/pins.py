"""What is pinned, and how many bytes that is: pins lapse by themselves, so somebody has to count.

Whoever may pin everything can stop a cache, so pins have limits: how long one holds, and how much
of the arena all of them hold together. Ordinary values can be pinned as well, and watchers are not
told of those, so the cache says itself what becomes of pinned ones.
"""

import heapq

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.history import Reason
from respkv.engine.watch import Watcher


class Pins(Watcher):
    """What has a pin, each with the bytes it was counted with."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counted: dict[Entry, int] = {}
        self._nbytes = 0
        self._ends: list[tuple[float, int, Entry]] = []
        self._next = 0

    def __len__(self) -> int:
        self._sweep()
        return len(self._counted)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that are pinned now."""
        self._sweep()
        return self._nbytes

    def nbytes_but(self, *entries: Entry | None) -> int:
        """Bytes of the pages that are pinned now, without those of some."""
        return self.nbytes - sum(self._counted.get(entry, 0) for entry in entries if entry)

    def note(self, entry: Entry) -> None:
        """Count a page as its pin says: it was set, moved or taken away."""
        self._nbytes -= self._counted.pop(entry, 0)
        if entry.position >= 0 and entry.pinned_until > self._clock.now:
            self._counted[entry] = entry.nbytes
            self._nbytes += entry.nbytes
            self._next += 1
            heapq.heappush(self._ends, (entry.pinned_until, self._next, entry))

    def stored(self, entry: Entry, *, is_new: bool) -> None:
        """Count the bytes that a pinned page has now."""
        if entry.pinned_until:
            self.note(entry)

    def restored(self, entry: Entry) -> None:
        """Count a pin that a file knows."""
        if entry.pinned_until:
            self.note(entry)

    def removed(self, entry: Entry, reason: Reason) -> None:
        """Count a page no more."""
        self._nbytes -= self._counted.pop(entry, 0)

    def cleared(self) -> None:
        """Count nothing."""
        self._counted.clear()
        self._ends.clear()
        self._nbytes = 0

    def _sweep(self) -> None:
        ends, now = self._ends, self._clock.now
        while ends and (ends[0][0] <= now or ends[0][2] not in self._counted):
            entry = heapq.heappop(ends)[2]
            if entry.pinned_until <= now:
                self._nbytes -= self._counted.pop(entry, 0)
