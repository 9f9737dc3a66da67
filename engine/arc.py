"""ARC: what was used once and what was used more often, and a border between them that learns.

T1 holds entries used once since they came, T2 those used again; the ghosts B1 and B2 know what was
evicted from either. A newcomer that B1 knows says that T1 is too small, one that B2 knows that T2
is. The newcomer is known only after room was made for it, so what it says holds from the next
victim on, and the paper's tie rule for it (T1 gives when it is of the target's size and the newcomer
is in B2) has nobody to ask.

The number of entries plays the cache's size, because the engine has bytes to fill, not places.

Source: Megiddo and Modha, ARC: A Self-Tuning, Low Overhead Replacement Cache, FAST 2003.
"""

from collections.abc import Iterator

from respkv.engine.entry import Entry
from respkv.engine.line import Line
from respkv.engine.queues import LOOKS_MAX, Lru, Queue, Shared

LOOKS_AHEAD = 16  # entries of T1 that are asked for each victim whether they were used


class Arc(Queue):
    """T1 as a line, T2 as an lru. What was found used in T1 is ranked in T2 by when that was.

    Ghosts and target are those of all priorities: ``ghost_once`` is B1, ``ghost_again`` B2.
    """

    _ONCE, _AGAIN = 0.0, 1.0  # places

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._once = Line()
        self._again = Lru(shared)

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._once
        yield from self._again

    def add(self, entry: Entry) -> None:
        shared = self.shared
        name = hash(entry.key)
        once, again = shared.ghost_once, shared.ghost_again
        if name in once:
            step = max(1.0, len(again) / len(once))
            shared.target = min(shared.target + step, float(shared.num_resident))
            del once[name]
            self._again.add(entry)
        elif name in again:
            step = max(1.0, len(once) / len(again))
            shared.target = max(shared.target - step, 0.0)
            del again[name]
            self._again.add(entry)
        else:
            self._forget()
            self._once.append(entry)

    def candidate(self, now: float) -> Entry | None:
        for entry in self._once.take_used(LOOKS_AHEAD):
            self._again.add(entry)
        looks = 0
        while self._once and looks < LOOKS_MAX:
            if len(self._again) and len(self._once) <= self.shared.target:
                break
            first = self._once.first()
            assert first is not None
            if first.hits == first.mark:
                return first
            looks += 1
            self._once.remove(first)
            self._again.add(first)
        return self._again.candidate(now)

    def withdraw(self, entry: Entry) -> float:
        if entry in self._once:
            self._once.remove(entry)
            return self._ONCE
        self._again.withdraw(entry)
        return self._AGAIN

    def restore(self, entry: Entry, place: float) -> None:
        if place == self._ONCE:
            self._once.prepend(entry)
        else:
            self._again.add(entry)

    def note_evicted(self, entry: Entry, place: float) -> None:
        shared = self.shared
        ghost = shared.ghost_once if place == self._ONCE else shared.ghost_again
        ghost[hash(entry.key)] = None

    def check(self) -> None:
        self._once.check()
        self._again.check()

    def _forget(self) -> None:
        """Make room for a newcomer that no ghost knows, as the paper's case IV does.

        T1 and B1 hold at most as many as the cache, and the ghosts as well.
        """
        shared = self.shared
        once, again = shared.ghost_once, shared.ghost_again
        size = shared.num_resident  # the newcomer is counted
        while once and len(self._once) + len(once) >= size:
            once.popitem(last=False)
        while again and len(once) + len(again) > size:
            again.popitem(last=False)
