"""Which entry goes next: the rules that hold for every eviction policy.

A policy here is a queue for each priority (queues.py says in which order each offers its entries)
and what is the same for all of them:

* Lower priorities go first.
* Leaves go before the pages they stand behind. A page that is found to have pages behind it is
  parked until the engine inserts it again, which it does when the last of them has gone.
* What has no copy in a file yet, while a file tier could take it, is set aside until it has one;
  it goes only when nothing else can.
* What is pinned, leased or in use is set aside. Nobody says when that ends, and asking all of them
  at each eviction would make evictions quadratic, so each asks a few again, in turn. The order is
  exact while no more than RECHECKS are set aside; beyond that the end of a hold is noticed late, by
  at most as many evictions as there are entries aside, over RECHECKS. Before a policy says that
  nothing can go, it asks all of them; but one call asks no more than ASKS_MAX, so that nobody waits
  long where all is held. It says then that nothing can go, and the next call goes on behind them.

Alternative left aside: a call from the engine at each use and each end of a hold. It would make
this file simpler and every hit slower.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum, auto
from math import inf
from typing import Protocol

from respkv.engine.arc import Arc
from respkv.engine.entry import Entry
from respkv.engine.gdsf import Gdsf
from respkv.engine.nodes import page_of
from respkv.engine.queues import Fifo, Lfu, Lru, Queue, S3Fifo, Shared, Sieve
from respkv.engine.survival import Survival
from respkv.engine.survival_queue import SurvivalQueue
from respkv.engine.tinylfu import WTinyLfu

RECHECKS = 8
ASKS_MAX = 4096


class Verdict(Enum):
    """The engine's answer for one entry that a policy proposes."""

    EVICT = auto()  # may go
    HELD = auto()  # pinned, leased or in use now; ask again later
    UNWRITTEN = auto()  # would be lost, and a tier can still take it; it will be inserted again
    PARENT = auto()  # has pages behind it; it will be inserted again when the last has gone


# A member of an enum takes ten times as long to look up as a name, and each decision looks at ten.
EVICT, HELD = Verdict.EVICT, Verdict.HELD
UNWRITTEN, PARENT = Verdict.UNWRITTEN, Verdict.PARENT


class Policy(Protocol):
    """Chooses who goes. Entries belong to at most one policy; ``mark`` and ``queue`` are its."""

    name: str

    def __len__(self) -> int:
        """Return how many entries are tracked, also those that cannot go now."""
        ...

    def insert(self, entry: Entry) -> None:
        """Track a newly resident entry, one whose priority changed, or a parent become a leaf.

        Harmless for an entry that is tracked already: it keeps its place unless its priority
        changed.
        """
        ...

    def remove(self, entry: Entry) -> None:
        """Forget a tracked entry. One that ``victim`` returned last counts as evicted."""
        ...

    def victim(self, verdict: Callable[[Entry], Verdict], now: float) -> Entry | None:
        """Choose an entry that may go, or None when none may. It stays tracked until removed.

        verdict: must not change its answer, nor call the policy, during the call.
        """
        ...

    def last_resort(self, verdict: Callable[[Entry], Verdict]) -> Entry | None:
        """Choose, of those that were set aside as UNWRITTEN, the first that may go after all."""
        ...

    def release(self) -> None:
        """Put those set aside as UNWRITTEN back in line: nobody will write them."""
        ...

    def age(self, now: float) -> tuple[float, float]:
        """Say how cold the next candidate is; of two policies the greater should evict first.

        Returns: minus its priority, and seconds since its last use (fifo: since it was stored);
        twice minus infinity when there is no candidate. It may turn out to be held.
        """
        ...

    @property
    def ghost_bytes(self) -> int:
        """Bytes kept of entries that are not tracked any more."""
        ...

    def check(self, entries: Sequence[Entry]) -> None:
        """Assert that exactly these entries are tracked, each once, and parked only as parents."""
        ...


class _Aside(Enum):
    PARKED = auto()
    HELD = auto()
    UNWRITTEN = auto()


_PARKED, _HELD, _UNWRITTEN = _Aside.PARKED, _Aside.HELD, _Aside.UNWRITTEN


class PriorityPolicy:
    """A queue for each priority, and what cannot go now.

    While an entry is tracked its ``queue`` is the priority of the queue it is in, or says where it
    is aside. It never refers to the queue itself: that would be a cycle for the garbage collector.
    """

    def __init__(self, name: str, make_queue: Callable[[Shared], Queue]) -> None:
        self.name = name
        self._make_queue = make_queue
        self._shared = Shared()
        self._queues: dict[int, Queue] = {}
        self._priorities: list[int] = []  # of the queues, lowest first
        self._parked: dict[Entry, float] = {}  # entry: its place in the queue it came from
        self._held: OrderedDict[Entry, float] = OrderedDict()
        self._unwritten: OrderedDict[Entry, float] = OrderedDict()
        self._chosen: Entry | None = None

    def __len__(self) -> int:
        return self._shared.num_resident

    @property
    def ghost_bytes(self) -> int:
        return self._shared.ghost_bytes

    def insert(self, entry: Entry) -> None:
        queue = entry.queue
        if queue is None:
            self._shared.num_resident += 1
            self._queue_of(entry).add(entry)
        elif queue is _PARKED:
            place = self._parked.pop(entry)
            self._queue_of(entry).restore(entry, place)
        elif queue is _UNWRITTEN:
            place = self._unwritten.pop(entry)
            self._queue_of(entry).restore(entry, place)
        elif queue is not _HELD and queue != entry.priority:
            self._requeue(entry)

    def remove(self, entry: Entry) -> None:
        shared = self._shared
        shared.num_resident -= 1
        aside = entry.queue
        if aside is _PARKED:
            del self._parked[entry]
        elif aside is _HELD:
            del self._held[entry]
        elif aside is _UNWRITTEN:
            del self._unwritten[entry]
        else:
            queue = self._queues[entry.queue]
            place = queue.withdraw(entry)
            if not queue:
                # Not only when its turn comes: a client may use a priority once and never again.
                del self._queues[entry.queue]
                del self._priorities[bisect_left(self._priorities, entry.queue)]
            if entry is self._chosen:
                queue.note_evicted(entry, place)
        if entry is self._chosen:
            self._chosen = None
        if shared.ghost:
            shared.trim_ghost()
        entry.queue, entry.mark = None, 0.0

    def victim(self, verdict: Callable[[Entry], Verdict], now: float) -> Entry | None:
        self._chosen = None
        self._shared.now = now
        if self._held:
            self._recheck(verdict, RECHECKS)
        num_held = 0
        while num_held < ASKS_MAX:
            entry = self._candidate(now)
            if entry is None:
                if self._recheck(verdict, ASKS_MAX):
                    continue
                return None
            answer = verdict(entry)
            if answer is EVICT:
                self._chosen = entry
                return entry
            num_held += answer is HELD
            self._set_aside(entry, self._queues[entry.queue].withdraw(entry), answer)
        return None

    def last_resort(self, verdict: Callable[[Entry], Verdict]) -> Entry | None:
        for _ in range(min(ASKS_MAX, len(self._unwritten))):
            entry, place = next(iter(self._unwritten.items()))
            answer = verdict(entry)
            if answer is EVICT:
                return entry
            del self._unwritten[entry]
            self._set_aside(entry, place, answer)
        return None

    def release(self) -> None:
        while self._unwritten:
            entry, place = self._unwritten.popitem()
            self._queue_of(entry).restore(entry, place)

    def age(self, now: float) -> tuple[float, float]:
        entry = self._candidate(now)
        if entry is None:
            return -inf, -inf
        return -entry.priority, now - self._queues[entry.queue].cold_since(entry)

    def check(self, entries: Sequence[Entry]) -> None:
        assert len(self) == len(entries) == len(set(entries))
        assert len(self._shared.ghost) <= len(entries)
        assert self._priorities == sorted(self._queues)
        waiting = 0
        for priority, queue in self._queues.items():
            queue.check()
            waiting += len(queue)
            assert all(entry.queue == priority for entry in queue)
        for entry in self._parked:
            assert entry.queue is _PARKED
            is_parent = bool(page_of(entry).children)
            assert is_parent, "a parked entry lost its last child and was not inserted again"
        for entry in (*self._parked, *self._unwritten):
            assert not entry.records, "an entry that became clean was not inserted again"
        assert all(entry.queue is _UNWRITTEN for entry in self._unwritten)
        assert all(entry.queue is _HELD for entry in self._held)
        num_aside = len(self._parked) + len(self._held) + len(self._unwritten)
        assert waiting + num_aside == len(entries)
        tracked = {entry for queue in self._queues.values() for entry in queue}
        assert tracked.union(self._parked, self._held, self._unwritten) == set(entries)
        assert self._chosen is None or self._chosen.queue is not None

    def _candidate(self, now: float) -> Entry | None:
        while self._priorities:
            priority = self._priorities[0]
            entry = self._queues[priority].candidate(now)
            if entry is None:
                assert not self._queues[priority], "a queue that offers nobody is empty"
                del self._queues[priority], self._priorities[0]
            elif entry.priority == priority:
                return entry
            else:
                self._requeue(entry)
        return None

    def _queue_of(self, entry: Entry) -> Queue:
        entry.queue = entry.priority
        queue = self._queues.get(entry.priority)
        if queue is None:
            queue = self._queues[entry.priority] = self._make_queue(self._shared)
            insort(self._priorities, entry.priority)
        return queue

    def _requeue(self, entry: Entry) -> None:
        self._queues[entry.queue].withdraw(entry)
        self._queue_of(entry).add(entry)

    def _set_aside(self, entry: Entry, place: float, answer: Verdict) -> None:
        if answer is PARENT:
            entry.queue = _PARKED
            self._parked[entry] = place
        elif answer is UNWRITTEN:
            entry.queue = _UNWRITTEN
            self._unwritten[entry] = place
        else:
            entry.queue = _HELD
            self._held[entry] = place

    def _recheck(self, verdict: Callable[[Entry], Verdict], count_max: int) -> bool:
        """Ask again about the held entries set aside first; whether one may go now."""
        is_any_back = False
        for _ in range(min(count_max, len(self._held))):
            entry, place = self._held.popitem(last=False)
            answer = verdict(entry)
            if answer is EVICT:
                self._queue_of(entry).restore(entry, place)
                is_any_back = True
            else:
                self._set_aside(entry, place, answer)
        return is_any_back


_QUEUES: dict[str, Callable[[Shared], Queue]] = {
    "lru": Lru,
    "lfu": Lfu,
    "fifo": Fifo,
    "sieve": Sieve,
    "s3fifo": S3Fifo,
    "arc": Arc,
    "wtinylfu": WTinyLfu,
    "gdsf": Gdsf,
}
POLICIES = (*_QUEUES, "survival")


def make_policy(name: str, survival: Survival | None = None) -> Policy:
    """Make an empty policy. Raises KeyError unless the name is one of POLICIES.

    survival: what is known of requests, the same for all policies of a cache; None: nothing yet.
    """
    if name == "survival":
        model = Survival() if survival is None else survival
        return PriorityPolicy(name, lambda shared: SurvivalQueue(shared, model))
    return PriorityPolicy(name, _QUEUES[name])
