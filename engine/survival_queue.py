"""The survival policy: who is least likely to be used again goes first.

Pages wait in the buckets of their requests, and requests in a line for each kind, the one idle
longest at its head. All of a kind have the same odds at the same age, and odds fall with age, so
only the heads need to be compared: the victim is the last page of the one with the longest wait,
which is W divided by the number of continuations expected in the next W. W is the mean time for
which what was evicted of late had been idle: how long a place in this cache is worth. What a client
said is on the same scale: an ended session waits for ever, an expected one until it is due.

Entries without a request wait in an lru of their own, whose head is compared like the others.

A request is chosen once and then gives its pages one by one, until another second has passed.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from math import inf

from respkv.engine.entry import Entry
from respkv.engine.queues import HEAP_SLACK, LOOKS_MAX, Lru, Queue, Shared
from respkv.engine.request import Request, is_partial
from respkv.engine.survival import FIRST_BIN_S, SINGLE, TAIL, Survival

CHOICE_S = 1.0
ENDED, EXPECTED = -1, -2  # lines beside those of the kinds
_EXPECTED_SHARE = 0.43  # of W: the wait of what comes in it with a chance of 0.9
_FRESH, _SINGLE = 0.0, -1.0  # marks of entries in no bucket
_HAZARD_MIN = 1e-12


class Bucket:
    """The pages of one request that one queue holds, by depth.

    stamp: the number of the item of a line that stands for it.
    """

    __slots__ = ("key", "line", "pages", "request", "stamp")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pages: OrderedDict[Entry, None] = OrderedDict()
        self.line = 0
        self.stamp = 0
        self.key = 0.0


Item = tuple[float, int, Bucket]


class Singles(Lru):
    """Entries that belong to no request. Their uses teach the model when their turn comes."""

    def __init__(self, shared: Shared, survival: Survival) -> None:
        super().__init__(shared)
        self._survival = survival

    def _is_stale(self, entry: Entry, rank: float) -> bool:
        if entry.touched == rank:
            return False
        self._survival.continued(SINGLE, max(entry.touched - rank, 0.0), entry.touched)
        return True


class SurvivalQueue(Queue):
    """Buckets in lines, and who of their heads waits longest.

    _fresh: entries that came since the last choice. Their request is known a moment after that.
    """

    def __init__(self, shared: Shared, survival: Survival) -> None:
        super().__init__(shared)
        self._survival = survival
        self._fresh: OrderedDict[Entry, None] = OrderedDict()
        self._singles = Singles(shared, survival)
        self._buckets: dict[float, Bucket] = {}
        self._lines: dict[int, list[Item]] = {}
        self._lapses: list[Item] = []
        self._tails: list[tuple[float, int, Entry]] = []
        self._num_items = 0
        self._num_entries = 0
        self._noticed = survival.num_notices
        self._chosen: Bucket | Singles | Entry | None = None
        self._waits: dict[int, float] = {}  # of each line; infinite where it has to be found out
        self._waits_until = -inf
        self._looks_left = 0
        self._coldest: Entry | None = None

    def __len__(self) -> int:
        return self._num_entries

    def __iter__(self) -> Iterator[Entry]:
        yield from self._fresh
        yield from self._singles
        for bucket in self._buckets.values():
            yield from bucket.pages

    def add(self, entry: Entry) -> None:
        entry.mark = _FRESH
        self._fresh[entry] = None
        self._num_entries += 1

    def restore(self, entry: Entry, place: float) -> None:
        self._num_entries += 1
        self._place(entry)

    def withdraw(self, entry: Entry) -> float:
        place = entry.mark
        self._num_entries -= 1
        if place == _FRESH:
            del self._fresh[entry]
        elif place == _SINGLE:
            self._singles.withdraw(entry)
        else:
            bucket = self._buckets[place]
            del bucket.pages[entry]
            if not bucket.pages:
                self._drop(bucket)
        return place

    def candidate(self, now: float) -> Entry | None:
        self._looks_left = LOOKS_MAX
        self._coldest = None
        if self._noticed != self._survival.num_notices:
            self._hear()
        if self._fresh:
            self._place_fresh()
        chosen = self._chosen
        if chosen is None or now >= self._waits_until or not self._is_good(chosen):
            chosen = self._chosen = self._choose(now)
        if isinstance(chosen, Bucket):
            return next(reversed(chosen.pages))
        if isinstance(chosen, Entry):
            return chosen
        found = None if chosen is None else chosen.candidate(now)
        if found is None and self._fresh:
            found = next(iter(self._fresh))
        return found or self._coldest

    def note_evicted(self, entry: Entry, place: float) -> None:
        shared = self.shared
        idle = shared.now - entry.touched
        if idle < 0.0:
            idle = 0.0
        if place == _SINGLE:
            self._survival.lost(SINGLE, idle, shared.now)
        request = entry.request
        if request is None or not request.is_ended:
            shared.note_residence(idle)

    def cold_since(self, entry: Entry) -> float:
        request: Request | None = entry.request
        return -inf if request is not None and request.is_ended else entry.touched

    def check(self) -> None:
        self._singles.check()
        num_paged = sum(len(bucket.pages) for bucket in self._buckets.values())
        assert self._num_entries == len(self._fresh) + len(self._singles) + num_paged
        items: dict[tuple[int, int], list[Bucket]] = {}
        for line, heap in self._lines.items():
            for _, stamp, bucket in heap:
                items.setdefault((line, stamp), []).append(bucket)
        for number, bucket in self._buckets.items():
            assert bucket.request.number == number
            assert bucket.pages
            assert all(entry.mark == number for entry in bucket.pages)
            assert items.get((bucket.line, bucket.stamp)) == [bucket]
        assert self._num_items == sum(map(len, self._lines.values()))
        assert self._num_items + len(self._lapses) <= 4 * len(self._buckets) + 2 * HEAP_SLACK

    # -- placing ------------------------------------------------------------------------------

    def _place_fresh(self) -> None:
        """Put entries that came since the last choice where they belong.

        Looks of their own: with none left for a choice, nobody would be chosen of all that wait.
        """
        fresh = self._fresh
        if len(fresh) > LOOKS_MAX:
            for _ in range(LOOKS_MAX):
                self._place(fresh.popitem(last=False)[0])
            return
        for entry in fresh:
            self._place(entry)
        fresh.clear()

    def _place(self, entry: Entry) -> None:
        request: Request | None = entry.request
        if request is None:
            entry.mark = _SINGLE
            self._singles.add(entry)
            self._waits.setdefault(SINGLE, inf)
            return
        number = entry.mark = request.number
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = Bucket(request)
            self._rank(bucket)
            bucket.pages[entry] = None
        else:
            pages = bucket.pages
            is_before = next(reversed(pages)).depth > entry.depth
            pages[entry] = None
            if is_before:
                pages.move_to_end(entry, last=False)
        if is_partial(entry):
            heapq.heappush(self._tails, (entry.touched, next(self.shared.numbers), entry))
            if len(self._tails) > 2 * self._num_entries + HEAP_SLACK:
                self._tails = [item for item in self._tails if self._is_waiting(item)]
                heapq.heapify(self._tails)
            self._waits.setdefault(TAIL, inf)

    def _rank(self, bucket: Bucket) -> None:
        """Put a bucket into its line; where it was, its item is void."""
        line, key = _line_of(bucket.request)
        bucket.line, bucket.key = line, key
        bucket.stamp = next(self.shared.numbers)
        self._waits.setdefault(line, inf)
        item = key, bucket.stamp, bucket
        heapq.heappush(self._lines.setdefault(line, []), item)
        self._num_items += 1
        if line == EXPECTED:
            session = bucket.request.session
            assert session is not None
            heapq.heappush(self._lapses, (session.lapses_at, bucket.stamp, bucket))
        if self._num_items + len(self._lapses) > 4 * len(self._buckets) + HEAP_SLACK:
            self._sweep()

    def _drop(self, bucket: Bucket) -> None:
        """Forget a bucket without pages; its item is void."""
        bucket.stamp = 0
        del self._buckets[bucket.request.number]

    def _sweep(self) -> None:
        for heap in (*self._lines.values(), self._lapses):
            heap[:] = [item for item in heap if item[2].stamp == item[1]]
            heapq.heapify(heap)
        self._num_items = sum(map(len, self._lines.values()))

    def _hear(self) -> None:
        """Put requests of which something was said into the lines where they belong now."""
        survival = self._survival
        num_new = min(survival.num_notices - self._noticed, len(survival.notices))
        self._noticed = survival.num_notices
        for at in range(-num_new, 0):
            bucket = self._buckets.get(survival.notices[at].number)
            if bucket is not None:
                self._rank(bucket)
                self._waits[bucket.line] = inf
        self._chosen = None

    # -- choosing -----------------------------------------------------------------------------

    def _choose(self, now: float) -> Bucket | Singles | Entry | None:
        """Choose who waits longest. Lines are compared by what their heads waited a moment ago.

        Only the winner is looked at again, until it has won with what it waits now.
        """
        waits = self._waits
        if now >= self._waits_until:
            self._lapse(now)
            self._waits_until = now + CHOICE_S
            waits.update(dict.fromkeys((*self._lines, SINGLE, TAIL), inf))
        window = max(self.shared.residence_s, FIRST_BIN_S)
        chosen: Bucket | Singles | Entry | None = None
        for _ in range(2 * len(waits)):
            if not waits:
                break
            line = max(waits, key=waits.__getitem__)
            before, found = waits[line], self._first(line, now)
            if self._looks_left <= 0:
                self._waits_until = -inf  # it goes on from here the next time
                break
            if found is None:
                del waits[line]
                continue
            chosen = found
            wait = waits[line] = self._wait(line, now, window, found)
            if wait >= before or wait >= max(waits.values()):
                break
        return chosen

    def _first(self, line: int, now: float) -> Bucket | Singles | Entry | None:
        if line == SINGLE:
            return self._singles if self._singles.candidate(now) is not None else None
        return self._tail() if line == TAIL else self._head(line)

    def _tail(self) -> Entry | None:
        """Return the partial page idle longest of those that are here."""
        while self._tails:
            if self._is_waiting(self._tails[0]):
                return self._tails[0][2]
            heapq.heappop(self._tails)
        return None

    def _is_waiting(self, item: tuple[float, int, Entry]) -> bool:
        """Whether a partial page is here still, and was not used since."""
        touched, _, entry = item
        bucket = self._buckets.get(entry.mark)
        return bucket is not None and entry in bucket.pages and entry.touched == touched

    def _wait(self, line: int, now: float, window: float, first: Bucket | Singles | Entry) -> float:
        if line == ENDED:
            return inf
        if isinstance(first, Bucket):
            touched = first.request.touched
            if line == EXPECTED:
                return max(first.request.expected_at - now, window * _EXPECTED_SHARE)
        else:
            single = first if isinstance(first, Entry) else first.candidate(now)
            assert single is not None
            touched = single.touched
        hazard = self._survival.hazard(line, max(now - touched, 0.0), window)
        return window / max(hazard, _HAZARD_MIN)

    def _head(self, line: int) -> Bucket | None:
        """Return the first bucket of a line whose last page is really its request's."""
        heap = self._lines[line]
        while heap:
            key, stamp, bucket = heap[0]
            if bucket.stamp != stamp:
                heapq.heappop(heap)
                self._num_items -= 1
            elif (line, key) != _line_of(bucket.request):
                heapq.heappop(heap)
                self._num_items -= 1
                self._rank(bucket)
            elif self._is_good(bucket):
                return bucket
            elif self._looks_left <= 0:
                return None
        return None

    def _is_good(self, chosen: Bucket | Singles | Entry) -> bool:
        """Whether the last page of a bucket belongs there; if not, it is put where it does."""
        if isinstance(chosen, Bucket):
            pages, request = chosen.pages, chosen.request
            if not chosen.stamp:
                return False
            entry = next(reversed(pages))
            if entry.request is request and entry.touched <= request.touched:
                return True
            self._settle(chosen)
            return False
        if isinstance(chosen, Entry):
            bucket = self._buckets.get(chosen.mark)
            return bucket is not None and chosen in bucket.pages
        return len(chosen) > 0

    def _settle(self, bucket: Bucket) -> None:
        """Put the last pages of a bucket that are not its request's any more where they belong."""
        pages, request = bucket.pages, bucket.request
        while pages and self._looks_left > 0:
            entry = next(reversed(pages))
            if entry.request is not request:
                del pages[entry]
                self._place(entry)
            elif entry.touched > request.touched:
                self._note_read(request, entry.touched)
            else:
                break
            self._looks_left -= 1
            if self._coldest is None or entry.touched < self._coldest.touched:
                self._coldest = entry
        if not pages:
            self._drop(bucket)

    def _note_read(self, request: Request, touched: float) -> None:
        """Learn that a page of a request was read without a match."""
        age = touched - request.touched
        if age >= FIRST_BIN_S:
            self._survival.continued(request.kind, age, touched)
        if request.is_open:
            self._survival.moved(request.kind, request.touched, touched)
        request.touched = touched

    def _lapse(self, now: float) -> None:
        lapses = self._lapses
        while lapses and lapses[0][0] <= now:
            _, stamp, bucket = heapq.heappop(lapses)
            session = bucket.request.session
            if bucket.stamp == stamp and session is not None and session.lapses_at <= now:
                session.expected_at = 0.0
                self._rank(bucket)


def _line_of(request: Request) -> tuple[int, float]:
    if request.is_ended:
        return ENDED, request.touched
    if request.expected_at:
        return EXPECTED, -request.expected_at
    return request.kind, request.touched
