"""In which order the pages of one account go when its quota is full.

The policies of room.py choose who leaves memory; here a page goes for good, wherever it is, because
its owner has no right to more bytes. The order is: pages of sessions that ended, then by priority,
then by when they were last used; a page only after those behind it.

A hit writes ``touched`` and calls nobody, so a page's rank is read again when it comes to the front
of a heap: one that was used since goes back in. Pages with others behind them are parked until the
last of those has gone; pinned and promised ones wait for their deadline. Others that may not go are
few as a rule and are looked at again each time; where they are many they rest, the longer the more
they are, so that looking never takes all the time there is. One plan passes over HELD_MAX of them and
then says that nobody may go; the next goes on behind them.
"""

import heapq
from collections.abc import Callable, Container, Iterable, Iterator

from respkv.engine.entry import Entry
from respkv.page import Part

SLACK = 1024  # void places in a heap that do not matter
HELD_FEW = 64
HELD_MAX = 4096  # some 20 ms
HELD_REST_S = 0.1
HELD_REST_EACH_S = 5e-5  # some ten times what a look takes

Rank = tuple[bool, int, float, int]  # is its session alive, priority, last use, minus its ticket
IsHeld = Callable[[Entry], bool]


class Coldest:
    """The pages of one account, those that go first in front."""

    def __init__(self) -> None:
        self._tickets: dict[Entry, int] = {}
        self._next = 0
        self._heap: list[tuple[Rank, Entry]] = []
        self._waiting: list[tuple[float, int, Entry]] = []
        self._parked: set[Entry] = set()
        self._passed: list[Entry] = []  # held ones met while a plan was made
        self._wakes_left = HELD_MAX  # in this plan; more only when nobody else is left

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._tickets

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._tickets)

    def add(self, entry: Entry) -> None:
        """Queue a page, or look at its rank anew: its pin, priority or children changed."""
        self._parked.discard(entry)
        if entry.pinned_until:
            self._renew(entry)
            self._rest(entry, entry.pinned_until)
            self._sweep()
        else:
            self._push(entry)

    def remove(self, entry: Entry) -> None:
        """Forget a page; one that it was behind may be a leaf now."""
        self._tickets.pop(entry, None)
        self._parked.discard(entry)
        self._sweep()

    def unpark(self, entry: Entry) -> None:
        """Look again at a page that had others behind it."""
        if entry in self._parked:
            self._parked.discard(entry)
            self._push(entry)

    def first(self, doomed: Container[Entry], is_held: IsHeld, now: float) -> Entry | None:
        """Return the page that goes next, without taking it; None when none may.

        doomed: pages that will go before it, and are behind nothing any more.
        """
        self._wake(now, self._wakes_left)
        self._wakes_left = 0
        while len(self._passed) < HELD_MAX and (self._heap or self._wake(now, HELD_FEW)):
            if not self._heap:  # all that woke were void: look further
                continue
            rank, entry = self._heap[0]
            if entry in doomed or not self._is_current(rank, entry) or goes_along(entry):
                heapq.heappop(self._heap)
            elif entry.children and any(child not in doomed for child in entry.children):
                heapq.heappop(self._heap)
                self._parked.add(entry)
            elif entry.pinned_until > now:
                heapq.heappop(self._heap)
                self._rest(entry, entry.pinned_until)
            elif is_held(entry):
                heapq.heappop(self._heap)
                self._passed.append(entry)
            elif (new := rank_of(entry, -rank[3])) > rank:
                heapq.heapreplace(self._heap, (new, entry))
            else:
                return entry
        return None

    def end_plan(self, spared: Iterable[Entry], now: float) -> None:
        """Take back those that were passed over, and those ``spared`` that did not have to go."""
        self._wakes_left = HELD_MAX
        held: list[Entry] = []
        for entry in self._passed:
            if entry in self._tickets:
                if entry.held_until > now:
                    self._rest(entry, entry.held_until)
                else:
                    held.append(entry)
        self._passed.clear()
        if len(held) <= HELD_FEW:
            spared = (*held, *spared)
        else:
            # Where not all were met it is long enough for meeting the others before these again.
            number = len(held) if len(held) < HELD_MAX else len(self._tickets)
            rest_s = max(HELD_REST_S, number * HELD_REST_EACH_S)
            for entry in held:
                self._rest(entry, now + rest_s)
        for entry in spared:
            if entry in self._tickets:
                self._push(entry)

    def _wake(self, now: float, count_max: int) -> bool:
        """Look again at those that have rested, at so many at most; whether there were any."""
        for count in range(count_max):
            if not self._waiting or self._waiting[0][0] > now:
                return count > 0
            _, ticket, entry = heapq.heappop(self._waiting)
            if self._tickets.get(entry) == ticket:
                self._push(entry)
        return count_max > 0

    def _push(self, entry: Entry) -> None:
        self._renew(entry)
        heapq.heappush(self._heap, (rank_of(entry, self._next), entry))
        self._sweep()

    def _renew(self, entry: Entry) -> None:
        self._next += 1  # what stands for it in a heap already is void
        self._tickets[entry] = self._next

    def _rest(self, entry: Entry, until: float) -> None:
        heapq.heappush(self._waiting, (until, self._tickets[entry], entry))

    def _sweep(self) -> None:
        """Drop what is void, when it is more than the rest."""
        most = 2 * len(self._tickets) + SLACK
        if len(self._heap) > most:
            self._heap = [each for each in self._heap if self._is_current(*each)]
            heapq.heapify(self._heap)
        if len(self._waiting) > most:
            self._waiting = [
                each for each in self._waiting if self._tickets.get(each[2]) == each[1]
            ]
            heapq.heapify(self._waiting)

    def _is_current(self, rank: Rank, entry: Entry) -> bool:
        return self._tickets.get(entry) == -rank[3]


def goes_along(entry: Entry) -> bool:
    """Whether an entry goes with its page only. A bound part may come before its page, or lose it."""
    return entry.part is Part.BOUND and entry.parent is not None


def rank_of(entry: Entry, ticket: int) -> Rank:
    """Return what decides when a page goes; of equal ones the last that came goes first."""
    request = entry.request
    is_alive = request is None or not request.is_ended
    return is_alive, entry.priority, entry.touched, -ticket
