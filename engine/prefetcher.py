"""The prefetcher: raises pages before somebody asks, while the tiers have nothing else to do.

What to raise is decided in prefetch.py; here it is carried out, beside the commands as the mover
does. Wishes wait here until they are due, and go one by one to the loader, which begins them only
while it reads nothing that was asked for, and gives them only room that is free or that nobody has
used for long. So a wish never delays a load and never pushes out what is hotter; one that finds no
room, or no time in PATIENCE_S, is dropped.

A match raises at once: its get may be in the same packet. A client's hint raises so long before the
time it named as the reading takes, also what leaves memory only after the hint. Sessions are looked
at every LOOK_S.
"""

from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from heapq import heapify, heappop, heappush
from itertools import count, islice
from typing import NamedTuple

import anyio

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.history import Reason
from respkv.engine.loads import Load
from respkv.engine.mover import Mover
from respkv.engine.prefetch import AHEAD_S, CHANCE_MIN, Book, Limits, Source, chain_of, successors
from respkv.engine.request import Request
from respkv.engine.request import Session as Conversation
from respkv.engine.watch import Watcher
from respkv.page import Part

LOOK_S = 0.5
BUSY_S = 0.005  # after which it is looked whether the tiers have time now
PATIENCE_S = 5.0
LEAD, LEAD_S_MIN = 2.0, 0.1  # a hint's pages are raised so many times their reading time ahead
WISHES_MAX = 16_384
PAGES_MAX = 1024  # of one session, the last ones
AWAY_MAX, AWAY_STEP = 4096, 256  # requests that left memory, and how many are looked at in a turn
_AT_ONCE = (Source.MATCH, Source.CHAIN)
OBSERVED_MIN = 50  # requests, before what was learned of them is believed


class Wish(NamedTuple):
    """A page that is to be raised, and when.

    wait_s: from then until it is expected.
    """

    due: float
    number: int
    entry: Entry
    source: Source
    chance: float
    wait_s: float


class Prefetcher(Watcher):
    """What is raised ahead in one cache."""

    def __init__(self, cache: Cache, mover: Mover, limits: Limits) -> None:
        self.book = Book(limits)
        self._cache = cache
        self._mover = mover
        self._raise = mover.loader.raise_gently
        self._wishes: list[Wish] = []  # a heap
        self._wanted: dict[Entry, Wish] = {}  # those of the heap that still count
        self._numbers = count()
        self._away: OrderedDict[Request, float] = OrderedDict()  # when last wished for; 0: not yet
        self._left: set[Conversation] = set()  # they are expected, and pages of theirs left memory
        self._wake = anyio.Event()
        self._next_look = 0.0
        self._is_running = False

    @property
    def limits(self) -> Limits:
        """How much is raised ahead; may be replaced at any time."""
        return self.book.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self.book.limits = limits
        if limits.mode == "off":
            self._wishes.clear()
            self._wanted.clear()
            self._left.clear()
        self._wake.set()

    # -- told by the cache --------------------------------------------------------------------

    def matched(self, run: Sequence[Entry]) -> None:
        """Raise what a client that was told of these pages will ask for.

        run: pages from the start of a prompt, used in this turn.
        """
        if not run or not self._is_running or self.limits.mode == "off":
            return
        now = self._cache.clock.now
        self.book.used(run, now)
        if self.book.is_on(Source.MATCH, now):
            chance = self.book.chance(Source.MATCH)
            for entry in run:
                self._wish(entry, Source.MATCH, now, chance)
        if self.book.is_on(Source.CHAIN, now):
            for page, chance in successors(run[-1]):
                for entry in _with_parts([page]):
                    self._wish(entry, Source.CHAIN, now, chance)
        if self._wanted:
            self._begin()

    def expect(self, entries: Iterable[Entry], at: float) -> int:
        """Raise pages shortly before a time that a client named, monotonic seconds.

        Returns: how many will be; those in memory need not. What was planned for them is replaced.
        """
        clock = self._cache.clock
        if not self._is_running or not self.book.is_on(Source.HINT, clock.now):
            return 0
        pages = sorted(entries, key=_depth)
        cold = [entry for entry in _with_parts(pages) if entry.is_cold][:PAGES_MAX]
        lead = max(LEAD_S_MIN, LEAD * self._mover.load_us(cold) / 1e6)
        due, chance = max(clock.now, at - lead), self.book.chance(Source.HINT)
        self.forget(cold)
        for entry in cold:
            self._wish(entry, Source.HINT, due, chance, at - due)
        self._wake.set()
        return sum(entry in self._wanted for entry in cold)

    def forget(self, entries: Iterable[Entry]) -> None:
        """Drop what is planned for pages."""
        for entry in entries:
            self._wanted.pop(entry, None)

    def demoted(self, entry: Entry) -> None:
        now = self._cache.clock.now
        bet = self.book.find(entry)
        was_raised = bet is not None and not bet.is_trial
        self.book.left(entry, now)
        request: Request | None = entry.request
        # What was raised for a hint and had to go again is not raised for it once more.
        if not was_raised and request is not None and request.expected_at > now:
            assert request.session is not None
            self._left.add(request.session)
        if request is not None and request.is_open and request not in self._away:
            self._away[request] = 0.0
            if len(self._away) > AWAY_MAX:
                self._away.popitem(last=False)

    def removed(self, entry: Entry, reason: Reason) -> None:
        self._wanted.pop(entry, None)
        bet = self.book.find(entry)
        if bet is not None:
            self.book.settle(bet, self._cache.clock.now)

    def cleared(self) -> None:
        self._wishes.clear()
        self._wanted.clear()
        self._away.clear()
        self._left.clear()
        self.book.clear()

    # -- work ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Raise until cancelled; what is on its way then is raised all the same."""
        self._is_running = True
        try:
            while True:
                self._wake = anyio.Event()
                self._cache.clock.refresh()
                self.look()
                with anyio.move_on_after(self._pause_s()):
                    await self._wake.wait()
        finally:
            self._is_running = False

    def look(self) -> None:
        """Do what is due now."""
        now = self._cache.clock.now
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self.book.sweep(now)
            self._look_at_expected(now)
            self._look_at_sessions(now)
        self._begin()

    def check(self) -> None:
        """Assert that what is kept here agrees."""
        self.book.check()
        assert all(self._wanted[entry].entry is entry for entry in self._wanted)

    def info_fields(self) -> dict[str, object]:
        """Return what INFO says of it, without the prefix that all its fields have."""
        book = self.book
        fields: dict[str, object] = {
            "mode": book.limits.mode,
            "bytes_max": book.limits.bytes_max,
            "pending": sum(not bet.is_trial for bet in book.bets),
            "pending_bytes": book.nbytes,
            "planned": len(self._wanted),
        }
        for source in Source:
            gate, tally = book.gates[source], book.tallies[source]
            fields |= {
                f"{source.value}_state": gate.state.name.lower(),
                f"{source.value}_raised": tally.num_raised,
                f"{source.value}_raised_bytes": tally.raised_bytes,
                f"{source.value}_used": tally.num_won,
                f"{source.value}_wasted": tally.num_lost,
                f"{source.value}_wasted_bytes": tally.wasted_bytes,
                f"{source.value}_missed": tally.num_missed,
                f"{source.value}_switched": gate.num_switched,
            }
        return fields

    # -- inside -------------------------------------------------------------------------------

    def _wish(
        self, entry: Entry, source: Source, due: float, chance: float, wait_s: float = 0.0
    ) -> None:
        if not entry.is_cold or entry in self._wanted or entry in self.book:
            return
        # What is due at some time leaves half of the room to what is due at once.
        if len(self._wanted) >= (WISHES_MAX if source in _AT_ONCE else WISHES_MAX // 2):
            return
        if len(self._wishes) >= 2 * WISHES_MAX:  # most of them were dropped or replaced
            self._wishes = [each for each in self._wishes if self._wanted.get(each.entry) is each]
            heapify(self._wishes)
        wish = Wish(due, next(self._numbers), entry, source, chance, wait_s)
        self._wanted[entry] = wish
        heappush(self._wishes, wish)

    def _pause_s(self) -> float:
        if not self._wishes:
            return LOOK_S
        return min(LOOK_S, max(BUSY_S, self._wishes[0].due - self._cache.clock.now))

    def _begin(self) -> None:
        """Make the bets that are due, as long as the tiers have time and the budget room."""
        now = self._cache.clock.now
        while self._is_running and self._wishes and self._wishes[0].due <= now:
            wish = self._wishes[0]
            entry = wish.entry
            is_void = self._wanted.get(entry) is not wish or not entry.is_cold
            if not is_void and now - wish.due <= PATIENCE_S and not self._bet(wish, now):
                return
            heappop(self._wishes)
            if self._wanted.get(entry) is wish:
                del self._wanted[entry]

    def _bet(self, wish: Wish, now: float) -> bool:
        """Make one bet; False: not yet, because the tier is busy."""
        entry, book = wish.entry, self.book
        if entry in book:
            return True
        bet = book.begin(entry, wish.source, now, wait_s=wish.wait_s)
        if bet is None or bet.is_trial:
            return True

        def ended(load: Load) -> None:
            if entry.is_cold and book.find(entry) is bet:
                book.cancel(bet)
            self._wake.set()

        idle_s = book.idle_s(wish.source, wish.chance, wish.wait_s)
        if not self._raise(entry, idle_s, ended):
            book.put_off(bet)
            return False
        return True

    def _look_at_expected(self, now: float) -> None:
        """Wish for the pages that left memory since a client said when they are used again."""
        while self._left:
            session = self._left.pop()
            if session.expected_at > now:
                pages = self._cache.requests.entries_of(session.name, session.namespace)
                self.expect(pages, session.expected_at)

    def _look_at_sessions(self, now: float) -> None:
        """Wish for the pages of requests that are likely to be continued soon."""
        requests = self._cache.requests
        if requests.survival.num_observed < OBSERVED_MIN:
            return
        if self.limits.mode == "off" or not self.book.is_on(Source.SESSION, now):
            return
        for request in list(islice(self._away, AWAY_STEP)):
            if not request.is_open or request.is_ended or request.last is None:
                del self._away[request]
                continue
            self._away.move_to_end(request)
            if request.touched <= self._away[request]:
                continue  # it was wished for since it was last used
            chance = requests.chance(request, now, AHEAD_S)
            if chance >= CHANCE_MIN:
                self._away[request] = now
                for entry in _with_parts(chain_of(request.last, PAGES_MAX)):
                    self._wish(entry, Source.SESSION, now, chance, AHEAD_S / 2)


@asynccontextmanager
async def prefetching(cache: Cache, mover: Mover, limits: Limits) -> AsyncIterator[Prefetcher]:
    """Raise pages of a cache ahead while the block runs."""
    prefetcher = Prefetcher(cache, mover, limits)
    cache.watchers.add(prefetcher)
    cache.on_match = prefetcher.matched
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(prefetcher.run)
        yield prefetcher
        tasks.cancel_scope.cancel()


def _with_parts(pages: Iterable[Entry]) -> Iterator[Entry]:
    """Yield pages, and after each the parts without which it is of no use."""
    for page in pages:
        yield page
        for part in page.parts or ():
            if part.part is Part.BOUND:
                yield part


def _depth(entry: Entry) -> int:
    return entry.depth
