"""Queues: the order in which entries of one priority are offered for eviction.

The hot path writes ``touched`` and ``hits`` and calls nobody, so every queue here is lazy: it looks
at those two only when an entry's turn comes. Work is therefore paid by uses that happened: an entry
is ranked anew, or passed over, at most once for each time it was used. After a long time without
evictions that may be all of them, a million entries or more, and nobody should wait for that; so
one answer looks at LOOKS_MAX used entries at most and is then the coldest of those. (Redis's lru
looks at 5 by default.)

lru, fifo and lfu rank entries by a number and keep them in a heap; an entry that left leaves its
item behind, which is recognised when it surfaces and swept when such items are the majority. sieve
and s3fifo need no ranks, only places in line, so they are ordered dicts, whose removal is exact.

An ordered dict moved at every hit would be a simpler lru, but it puts a call and a dict's two
changes on the hot path, at which this engine loses more than at eviction.
"""

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from sys import getsizeof

from respkv.engine.entry import Entry
from respkv.engine.sketch import Sketch

HEAP_SLACK = 64
LOOKS_MAX = 512
RESIDENCE_COUNT = 1000  # evictions over which the mean of their idle times runs
_NAME_BYTES = 36  # of an int that is the hash of a key
_FREQUENCY_MAX = 3
_SMALL_SHARE = 10  # the small queue of s3fifo is meant to hold one in so many

Item = tuple[float, float, int, Entry]  # rank, what decides among equals, number, entry


@dataclass(slots=True)
class Shared:
    """What the queues of all priorities of one policy have in common.

    num_resident: entries that the policy tracks, in a queue or aside.
    inflation:    lfu: the rank of the last victim.
    ghost:        s3fifo: hashes of the keys that left the small queue unused, oldest first.
    ghost_once, ghost_again, target: arc: what went after one use, after more; the size of T1.
    sketch:       wtinylfu: how often keys were used.
    now:          when a victim was asked for last, seconds of the monotonic clock.
    residence_s:  running mean of how long victims had been idle.
    """

    numbers: Iterator[int] = field(default_factory=lambda: count(1))
    num_resident: int = 0
    inflation: float = 0.0
    ghost: OrderedDict[int, None] = field(default_factory=OrderedDict)
    ghost_once: OrderedDict[int, None] = field(default_factory=OrderedDict)
    ghost_again: OrderedDict[int, None] = field(default_factory=OrderedDict)
    target: float = 0.0
    sketch: Sketch = field(default_factory=Sketch)
    now: float = 0.0
    residence_s: float = 0.0
    num_evicted: int = 0

    @property
    def ghost_bytes(self) -> int:
        """Bytes that are kept of keys which are not here."""
        ghosts = (self.ghost, self.ghost_once, self.ghost_again)
        kept = sum(getsizeof(ghost) + _NAME_BYTES * len(ghost) for ghost in ghosts if ghost)
        return kept + self.sketch.nbytes

    def note_residence(self, idle_s: float) -> None:
        """Count how long an entry had been idle when it was evicted."""
        if self.num_evicted < RESIDENCE_COUNT:
            self.num_evicted += 1
        self.residence_s += (idle_s - self.residence_s) / self.num_evicted

    def trim_ghost(self) -> None:
        """Forget the oldest ghosts, so that there are at most as many as entries."""
        while len(self.ghost) > self.num_resident:
            self.ghost.popitem(last=False)


class Queue(ABC):
    """Entries of one priority, and whose turn it is."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Entry]: ...

    @abstractmethod
    def add(self, entry: Entry) -> None:
        """Queue an entry that is new to this queue."""

    @abstractmethod
    def candidate(self, now: float) -> Entry | None:
        """Return whose turn it is, or None when the queue is empty. It stays where it is.

        now: seconds of the monotonic clock, as in ``touched``.
        """

    @abstractmethod
    def withdraw(self, entry: Entry) -> float:
        """Take an entry out; return its place, which ``restore`` understands."""

    @abstractmethod
    def restore(self, entry: Entry, place: float) -> None:
        """Queue an entry where it stood, as far as that place still exists."""

    @abstractmethod
    def check(self) -> None:
        """Assert what the queue guarantees about itself."""

    def note_evicted(self, entry: Entry, place: float) -> None:  # noqa: B027 (most need no note)
        """Learn that an entry, withdrawn already, was evicted."""

    def cold_since(self, entry: Entry) -> float:
        """Return the monotonic time that says how cold a candidate is."""
        return entry.touched


class Ranked(Queue):
    """Entries by rank, lowest first; among equals the one used longest ago."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._heap: list[Item] = []
        self._items: dict[Entry, Item] = {}  # those in the heap that count

    @abstractmethod
    def _rank(self, entry: Entry) -> float: ...

    @abstractmethod
    def _is_stale(self, entry: Entry, rank: float) -> bool:
        """Whether the entry was used since it was ranked. Ranks never fall."""

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._items)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._items

    def add(self, entry: Entry) -> None:
        self.restore(entry, self._rank(entry))

    def restore(self, entry: Entry, place: float) -> None:
        heapq.heappush(self._heap, self._item(entry, place, next(self.shared.numbers)))
        self._sweep()

    def withdraw(self, entry: Entry) -> float:
        place = self._items.pop(entry)[0]
        self._sweep()
        return place

    def candidate(self, now: float) -> Entry | None:
        heap = self._heap
        coldest: Item | None = None
        looks = 0
        while heap and looks < LOOKS_MAX:
            item = heap[0]
            rank, _, number, entry = item
            if self._items.get(entry) is not item:
                heapq.heappop(heap)
            elif self._is_stale(entry, rank):
                looks += 1
                item = self._item(entry, self._rank(entry), number)
                heapq.heapreplace(heap, item)
                coldest = item if coldest is None else min(coldest, item)
            else:
                return entry
        return None if coldest is None else coldest[3]

    def check(self) -> None:
        heap = self._heap
        assert len(heap) <= 2 * len(self._items) + HEAP_SLACK
        assert all(heap[(place - 1) // 2] <= heap[place] for place in range(1, len(heap)))
        counted = [item[3] for item in heap if self._items.get(item[3]) is item]
        assert len(counted) == len(self._items) == len(set(counted))

    def _item(self, entry: Entry, rank: float, number: int) -> Item:
        item = self._items[entry] = (rank, entry.touched, number, entry)
        return item

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._items) + HEAP_SLACK:
            self._heap[:] = self._items.values()
            heapq.heapify(self._heap)


class Lru(Ranked):
    """Least recently used first; of pages used together, the one deepest in its chain."""

    def _item(self, entry: Entry, rank: float, number: int) -> Item:
        item = self._items[entry] = (rank, -entry.depth, number, entry)
        return item

    def _rank(self, entry: Entry) -> float:
        return entry.touched

    def _is_stale(self, entry: Entry, rank: float) -> bool:
        return entry.touched != rank


class Fifo(Ranked):
    """Oldest first. ``mark`` is the entry's number among all that came."""

    def _rank(self, entry: Entry) -> float:
        if not entry.mark:
            entry.mark = next(self.shared.numbers)
        return entry.mark

    def _is_stale(self, entry: Entry, rank: float) -> bool:
        return False

    def cold_since(self, entry: Entry) -> float:
        return entry.born


class Lfu(Ranked):
    """Least frequently used first, with dynamic ageing. ``mark``: hits when it was ranked.

    An entry's rank is its uses plus the rank of the last victim at that time. So what was popular
    once keeps its rank while that of newcomers rises, until it is the lowest.

    Source: Arlitt et al., Evaluating Content Management Techniques for Web Proxy Caches, 2000
    (LFU-DA).
    """

    def _rank(self, entry: Entry) -> float:
        entry.mark = entry.hits
        return self.shared.inflation + entry.hits + 1

    def _is_stale(self, entry: Entry, rank: float) -> bool:
        return entry.hits != entry.mark

    def note_evicted(self, entry: Entry, place: float) -> None:
        self.shared.inflation = max(self.shared.inflation, place)


class Sieve(Queue):
    """The first entry from the hand on that was not used since the hand last passed it.

    The line from oldest to newest is cut at the hand: ``_ahead`` is what it still has to visit,
    newcomers last, and ``_behind`` what it has passed. ``mark``: hits when it passed. What had been
    withdrawn comes back at the hand, because that is where it was found.

    Source: Zhang et al., SIEVE is Simpler than LRU, NSDI 2024.
    """

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._ahead: OrderedDict[Entry, None] = OrderedDict()
        self._behind: OrderedDict[Entry, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ahead) + len(self._behind)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._behind
        yield from self._ahead

    def add(self, entry: Entry) -> None:
        entry.mark = entry.hits
        self._ahead[entry] = None

    def candidate(self, now: float) -> Entry | None:
        coldest: Entry | None = None
        looks = 0
        while self and looks < LOOKS_MAX:
            entry = next(iter(self._ahead))
            if entry.hits == entry.mark:
                return entry
            looks += 1
            entry.mark = entry.hits
            self._behind[entry] = None
            self._leave_ahead(entry)
            coldest = _colder(coldest, entry)
        return coldest

    def withdraw(self, entry: Entry) -> float:
        if entry in self._behind:
            del self._behind[entry]
        else:
            self._leave_ahead(entry)
        return 0.0

    def restore(self, entry: Entry, place: float) -> None:
        self._ahead[entry] = None
        self._ahead.move_to_end(entry, last=False)

    def check(self) -> None:
        assert self._ahead.keys().isdisjoint(self._behind)
        assert self._ahead or not self._behind

    def _leave_ahead(self, entry: Entry) -> None:
        del self._ahead[entry]
        if not self._ahead:
            # The hand is past the newest: it starts over at the oldest, before anybody comes.
            self._ahead, self._behind = self._behind, self._ahead


class S3Fifo(Queue):
    """A small queue for newcomers, a main queue for what was used there, a ghost for what was not.

    Newcomers of which the ghost knows go to the main queue at once. ``mark``: hits at which the
    entry's frequency was 0, so that frequency, at most 3, is counted without the hot path.

    Source: Yang et al., FIFO Queues are All You Need for Cache Eviction, SOSP 2023, algorithm 1.
    """

    _SMALL, _MAIN = 0.0, 1.0  # places

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._small: OrderedDict[Entry, None] = OrderedDict()
        self._main: OrderedDict[Entry, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._small
        yield from self._main

    def add(self, entry: Entry) -> None:
        entry.mark = entry.hits
        name = hash(entry.key)
        if name in self.shared.ghost:
            del self.shared.ghost[name]
            self._main[entry] = None
        else:
            self._small[entry] = None

    def candidate(self, now: float) -> Entry | None:
        small, main = self._small, self._main
        coldest: Entry | None = None
        looks = 0
        while self and looks < LOOKS_MAX:
            looks += 1
            if small and (not main or len(small) * _SMALL_SHARE >= len(self)):
                entry = next(iter(small))
                if entry.hits - entry.mark <= 1:
                    return entry
                del small[entry]
                main[entry] = None
                entry.mark = entry.hits
            else:
                entry = next(iter(main))
                frequency = min(entry.hits - entry.mark, _FREQUENCY_MAX)
                if not frequency:
                    return entry
                main.move_to_end(entry)
                entry.mark = entry.hits - (frequency - 1)
            coldest = _colder(coldest, entry)
        return coldest

    def withdraw(self, entry: Entry) -> float:
        if entry in self._small:
            del self._small[entry]
            return self._SMALL
        del self._main[entry]
        return self._MAIN

    def restore(self, entry: Entry, place: float) -> None:
        queue = self._small if place == self._SMALL else self._main
        queue[entry] = None
        queue.move_to_end(entry, last=False)

    def note_evicted(self, entry: Entry, place: float) -> None:
        if place == self._SMALL:
            self.shared.ghost[hash(entry.key)] = None

    def check(self) -> None:
        assert self._small.keys().isdisjoint(self._main)


def _colder(one: Entry | None, other: Entry) -> Entry:
    return other if one is None or other.touched < one.touched else one
