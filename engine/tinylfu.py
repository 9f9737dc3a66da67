"""W-TinyLFU: a small lru for newcomers before a main cache that they have to earn.

Newcomers wait in a window of a hundredth of the entries. Who would leave it is compared with the one
that the main part would give: the one whose key was used more often of late stays, and a tie is the
main part's. The main part is a segmented lru: on probation until a use, then protected, four fifths
of it at most, and on probation again when others are used later.

Uses reach the sketch when an entry changes its place, not when they happen; a comparison counts those
still owed. They are lost of an entry that is deleted.

Room is made before the newcomer comes, so each victim is one of two that are compared, however few wait
in the window: pages that others stand behind are set aside from there, and a window that was filled up
at the main part's cost meanwhile would let in whole prompts that nobody has compared.

Source: Einziger, Friedman and Manes, TinyLFU: A Highly Efficient Cache Admission Policy, ACM
Transactions on Storage 2017, arXiv:1512.00727, section 4.
"""

from collections.abc import Iterator

from respkv.engine.entry import Entry
from respkv.engine.line import Line
from respkv.engine.queues import LOOKS_MAX, Lru, Queue, Shared

WINDOW_SHARE = 100  # the window holds one in so many
PROTECTED_SHARE = 0.8  # of the main part
LOOKS_AHEAD = 16  # entries on probation that are asked for each victim whether they were used
SPILLS_MAX = 2


class WTinyLfu(Queue):
    """Window and protected as lru, probation as a line. ``mark``: hits that the sketch knows."""

    _WINDOW, _PROBATION, _PROTECTED = 0.0, 1.0, 2.0  # places

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._window = Lru(shared)
        self._probation = Line()
        self._protected = Lru(shared)

    def __len__(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._window
        yield from self._probation
        yield from self._protected

    def add(self, entry: Entry) -> None:
        sketch = self.shared.sketch
        sketch.grow(self.shared.num_resident)
        sketch.add(hash(entry.key), 1)
        entry.mark = entry.hits
        self._window.add(entry)
        for _ in range(SPILLS_MAX):
            if len(self._window) <= self._window_max():
                break
            spilt = self._window.candidate(0.0)
            assert spilt is not None
            self._admit(spilt)

    def candidate(self, now: float) -> Entry | None:
        for entry in self._probation.take_used(LOOKS_AHEAD):
            self._protect(entry)
        self._demote(now)
        first = self._first(now)
        leaving = self._window.candidate(now)
        if leaving is None or first is None:
            return leaving or first
        if self._frequency(leaving) <= self._frequency(first):
            return leaving
        self._admit(leaving)
        return first

    def withdraw(self, entry: Entry) -> float:
        if entry in self._probation:
            self._probation.remove(entry)
            return self._PROBATION
        if entry in self._window:
            self._window.withdraw(entry)
            return self._WINDOW
        self._protected.withdraw(entry)
        return self._PROTECTED

    def restore(self, entry: Entry, place: float) -> None:
        if place == self._PROBATION:
            self._probation.prepend(entry)
        elif place == self._WINDOW:
            self._window.add(entry)
        else:
            self._protected.add(entry)

    def note_evicted(self, entry: Entry, place: float) -> None:
        self._count(entry)

    def check(self) -> None:
        self._window.check()
        self._probation.check()
        self._protected.check()

    def _window_max(self) -> int:
        return max(1, self.shared.num_resident // WINDOW_SHARE)

    def _admit(self, entry: Entry) -> None:
        """Move an entry from the window into the main part."""
        self._window.withdraw(entry)
        self._count(entry)
        self._probation.append(entry)

    def _protect(self, entry: Entry) -> None:
        self._count(entry)
        self._protected.add(entry)

    def _first(self, now: float) -> Entry | None:
        """Return the one that the main part would give."""
        for _ in range(LOOKS_MAX):
            first = self._probation.first()
            if first is None:
                return self._protected.candidate(now)
            if first.hits == first.mark:
                return first
            self._probation.remove(first)
            self._protect(first)
        return self._probation.first()

    def _demote(self, now: float) -> None:
        """Put those protected that were used longest ago on probation, when there are too many."""
        main = len(self._probation) + len(self._protected)
        excess = len(self._protected) - int(main * PROTECTED_SHARE)
        for _ in range(min(excess, LOOKS_MAX)):
            entry = self._protected.candidate(now)
            assert entry is not None
            self._protected.withdraw(entry)
            self._count(entry)
            self._probation.append(entry)

    def _count(self, entry: Entry) -> None:
        """Tell the sketch of the uses of an entry that it does not know."""
        owed = int(entry.hits - entry.mark)
        if owed > 0:
            self.shared.sketch.add(hash(entry.key), owed)
            entry.mark = entry.hits

    def _frequency(self, entry: Entry) -> int:
        owed = int(entry.hits - entry.mark)
        return self.shared.sketch.count(hash(entry.key)) + max(owed, 0)
