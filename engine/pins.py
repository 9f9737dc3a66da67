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

SLACK = 1024  # void places in the heap that do not matter

End = tuple[float, int, Entry]


class Pins(Watcher):
    """What has a pin, each with the bytes it was counted with."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counted: dict[Entry, tuple[int, int]] = {}  # its bytes, and the ticket of its end
        self._nbytes = 0
        self._ends: list[End] = []
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
        return self.nbytes - sum(self._counted.get(entry, (0, 0))[0] for entry in entries if entry)

    def note(self, entry: Entry) -> None:
        """Count a page as its pin says: it was set, moved or taken away."""
        self._forget(entry)
        if entry.position >= 0 and entry.pinned_until > self._clock.now:
            self._next += 1
            self._counted[entry] = entry.nbytes, self._next
            self._nbytes += entry.nbytes
            heapq.heappush(self._ends, (entry.pinned_until, self._next, entry))
            if len(self._ends) > 2 * len(self._counted) + SLACK:  # a pin may be renewed for ever
                self._ends = [end for end in self._ends if self._is_current(end)]
                heapq.heapify(self._ends)

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
        self._forget(entry)

    def cleared(self) -> None:
        """Count nothing."""
        self._counted.clear()
        self._ends.clear()
        self._nbytes = 0

    def _sweep(self) -> None:
        ends, now = self._ends, self._clock.now
        while ends and (ends[0][0] <= now or not self._is_current(ends[0])):
            end = heapq.heappop(ends)
            if self._is_current(end):
                self._forget(end[2])

    def _forget(self, entry: Entry) -> None:
        self._nbytes -= self._counted.pop(entry, (0, 0))[0]

    def _is_current(self, end: End) -> bool:
        return self._counted.get(end[2], (0, 0))[1] == end[1]
