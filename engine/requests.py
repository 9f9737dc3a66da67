"""Requests: which pages were used together, and which request goes on where another ended.

A page on its own says little about when it is used again; the request it belongs to says much. So a
match makes a record, the ``Request``, that all of its pages then share, and the pages stored behind
it join. A request that starts where another ended is the next turn of that conversation; one that
branches off in the middle begins a new one. What became of each, continued or not, and after how
long, is what ``Survival`` learns from.

Pages hold their request, and nothing here holds a page but ``Request.last`` and ``Session.tails``,
which follow the pages that go. A request whose last page went is found again by the name of that
page when it is stored anew. That is all that is kept of what is no longer there: for CENSOR_S at
most, and of one request for PAGES_A_RECORD pages at most.

A page that came without a parent belongs to no request until another is stored behind it, or until
it is matched. So a client that names its pages but not their chains pays for none of this.
"""

from collections import deque
from collections.abc import Sequence
from itertools import count
from sys import getsizeof
from weakref import WeakValueDictionary

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.history import Reason
from respkv.engine.request import (
    Request,
    Session,
    chain_of,
    hand_over,
    is_continued,
    is_partial,
    is_same,
    leave,
    requests_of,
)
from respkv.engine.survival import (
    CENSOR_S,
    FIRST_BIN_S,
    LEFT,
    TAIL,
    TURN_MAX,
    Survival,
    kind_of,
)
from respkv.engine.watch import Watcher
from respkv.page import namespace_of

PAGES_A_RECORD = 6
RECORDS_MIN = 16
RECORD_BYTES = 264  # of a request, its numbers and its place in line; measured with tracemalloc
NAME_BYTES = 36
LAPSE = 2.0  # an expected session that did not come in so many times the time named is as any other


class Requests(Watcher):
    """The requests of one cache.

    survival: what was learned from them.
    """

    def __init__(self, clock: Clock, survival: Survival | None = None) -> None:
        self.survival = Survival() if survival is None else survival
        self._clock = clock
        self._numbers = count(1)
        self._num_pages = 0
        self._open: deque[Request] = deque()  # those waited for, and closed ones among them
        self._gone: dict[int, Request] = {}  # open ones by the name of their last page, which went
        self._sessions: WeakValueDictionary[tuple[bytes, bytes], Session] = WeakValueDictionary()

    def matched(
        self, run: Sequence[Entry], num_tokens: int, now: float, session: bytes = b""
    ) -> Request | None:
        """Record that a prompt of ``num_tokens`` was found to start with a run of pages.

        run:     from the first page of the prompt on; only the last may be a partial one.
        session: the conversation that the client says it belongs to.
        Returns: its request, which is that of all of these pages now; None if there are none.
        """
        if not run:
            return None
        last = run[-1]
        before: Request | None = last.request
        if before is not None and is_same(before, num_tokens, now):
            request = before
            self._touch(request, now)
        else:
            is_next = before is not None and is_continued(before, last)
            turn = before.turn + 1 if before is not None and is_next else 0
            request = self._begin(turn, num_tokens, now)
            if not is_next:
                request.parted_at = last.depth + last.tokens
            if before is not None and is_next:
                request.session = before.session
                self._continue(before, now, is_tail_used=is_partial(last))
            hand_over(run, request)
            request.last = last.parent if is_partial(last) else last
        if session:
            self._join(request, last, session)
        elif request.session is not None:
            self._renew(request.session, last)
        return request

    def stored(self, entry: Entry, *, is_new: bool) -> None:
        parent = entry.parent
        if is_new:
            self._num_pages += 1
            entry.request = None
        if entry.request is not None or (parent is None and not entry.branch):
            return
        if entry.part is not None:
            entry.request = None if parent is None else parent.request
            return
        now = self._clock.now
        request: Request | None = None if parent is None else parent.request
        if request is None:
            request = self._begin(0, entry.depth + entry.tokens, now)
            if parent is not None:
                parent.request = request
        elif request.last is not parent:
            request = self._begin(0, entry.depth + entry.tokens, now)
        entry.request = request
        if request.touched != now:
            self._touch(request, now)
        num_tokens = entry.depth + entry.tokens
        if num_tokens > request.num_tokens:
            self._describe(request, request.turn, num_tokens)
        if is_partial(entry):
            request.has_tail = True
        else:
            request.last = entry
            request.is_owner = True
        if self._gone:
            self._found_again(request, entry, now)
        if request.session is not None:
            self._renew(request.session, entry)

    def belongs(self, entry: Entry, session: bytes) -> None:
        """Learn from a put which conversation the request of a page belongs to."""
        if entry.request is None:
            entry.request = self._begin(0, entry.depth + entry.tokens, self._clock.now)
            if not is_partial(entry):
                entry.request.last = entry
        self._join(entry.request, entry, session)

    def restored(self, entry: Entry) -> None:
        self._num_pages += 1

    def removed(self, entry: Entry, reason: Reason) -> None:
        self._num_pages -= 1
        request: Request | None = entry.request
        if request is None:
            return
        if request.last is entry:
            request.last = None
            if request.is_open:
                request.name = hash(entry.key)
                self._gone[request.name] = request
        session = request.session
        if session is not None and entry in session.tails:
            session.tails.remove(entry)
            parent = entry.parent
            before: Request | None = None if parent is None else parent.request
            if parent is not None and before is not None and before.session is session:
                session.tails.add(parent)

    def cleared(self) -> None:
        self._num_pages = 0
        for request in self._open:
            request.last = None
            if request.is_open:
                request.is_open = False
                self.survival.forget(request.kind, request.touched)
        self._open.clear()
        self._gone.clear()
        self._sessions.clear()

    @property
    def num_records(self) -> int:
        """How many requests are remembered for what may become of them."""
        return len(self._open)

    @property
    def num_open(self) -> int:
        """How many of them are waited for."""
        return sum(request.is_open for request in self._open)

    @property
    def ghost_bytes(self) -> int:
        """Bytes of the records of all requests, also of those that have pages still."""
        records = len(self._open) * RECORD_BYTES
        return records + getsizeof(self._gone) + len(self._gone) * NAME_BYTES

    # -- hints --------------------------------------------------------------------------------

    def sessions(self) -> list[Session]:
        """Return all sessions of which a request is remembered."""
        return list(self._sessions.values())

    def find(self, namespace: bytes, session: bytes) -> Session | None:
        """Return a session of which a request is remembered."""
        return self._sessions.get((namespace, session))

    def end(self, session: bytes, namespace: bytes) -> bool:
        """Take a client's word that a session will not go on; False if there is no such session."""
        found = self.find(namespace, session)
        if found is None:
            return False
        found.is_ended, found.expected_at = True, 0.0
        for request in requests_of(found):
            self._resolve(request)
        return True

    def expect(self, session: bytes, namespace: bytes, at: float) -> bool:
        """Take a client's word that a session goes on at a time of the monotonic clock.

        Returns: False if there is no such session.
        """
        found = self.find(namespace, session)
        if found is None:
            return False
        now = self._clock.now
        found.is_ended = False
        found.expected_at = at
        found.lapses_at = at + (LAPSE - 1.0) * max(at - now, FIRST_BIN_S)
        for request in requests_of(found):
            self._resolve(request)
        return True

    def end_request(self, request: Request) -> None:
        """Take a client's word that a request will not be continued."""
        request.end()
        self._resolve(request)

    def entries_of(self, session: bytes, namespace: bytes) -> list[Entry]:
        """Return the pages that a session used last, each before the page it stands behind."""
        found = self.find(namespace, session)
        if found is None:
            return []
        # A page of two chains comes with the first of them, and the chains come last to first; so it
        # comes behind both, and no page is passed twice, however many chains there are.
        seen: set[Entry] = set()
        tails = sorted(found.tails, key=_depth, reverse=True)
        chains = [list(chain_of(tail, found, seen)) for tail in tails]
        return [page for chain in reversed(chains) for page in chain]

    def chance(self, request: Request, now: float, within_s: float) -> float:
        """Return the probability that a request is continued in the next ``within_s``."""
        if request.is_ended or not request.is_open:
            return 0.0
        return self.survival.chance(request.kind, now - request.touched, within_s)

    def returns_by(self, request: Request, now: float, share: float) -> float:
        """Return when ``share`` of the requests like it that will come back have done so.

        Returns: a time of the monotonic clock; infinity if none do.
        """
        age = self.survival.age_by(request.kind, now - request.touched, share)
        return request.touched + age

    # -- inside -------------------------------------------------------------------------------

    def _begin(self, turn: int, num_tokens: int, now: float) -> Request:
        self._lose_sight(now)
        request = Request(next(self._numbers), min(turn, TURN_MAX), num_tokens, now)
        self._open.append(request)
        self.survival.begin(request.kind, now)
        return request

    def _touch(self, request: Request, now: float) -> None:
        if request.is_open:
            self.survival.moved(request.kind, request.touched, now)
        request.touched = now

    def _resolve(self, request: Request) -> None:
        """Wait no more for a request whose end or return was announced: it is none of chance."""
        if request.is_open:
            self._close(request)
            self.survival.forget(request.kind, request.touched)
        self.survival.notice(request)

    def _continue(self, before: Request, now: float, *, is_tail_used: bool) -> None:
        """Learn that a request was continued; what it leaves behind is waited for from now on."""
        survival = self.survival
        if before.is_open:
            survival.forget(before.kind, before.touched)
            survival.continued(before.kind, now - before.touched, now)
            if before.has_tail:
                learn = survival.continued if is_tail_used else survival.lost
                learn(TAIL, now - before.touched, now)
            survival.begin(LEFT, now)
        before.kind, before.touched = LEFT, now
        before.has_tail = False
        survival.notice(before)

    def _describe(self, request: Request, turn: int, num_tokens: int) -> None:
        """Correct what a request was taken for when it began."""
        request.turn, request.num_tokens = turn, num_tokens
        kind = kind_of(turn, num_tokens)
        if kind != request.kind != LEFT:
            if request.is_open:
                self.survival.forget(request.kind, request.touched)
                self.survival.begin(kind, request.touched)
            request.kind = kind

    def _close(self, request: Request) -> None:
        request.is_open = False
        if request.name:
            if self._gone.get(request.name) is request:
                del self._gone[request.name]
            request.name = 0

    def _found_again(self, request: Request, entry: Entry, now: float) -> None:
        before = self._gone.get(hash(entry.key))
        if before is None:
            return
        if before is not request:
            turn = max(request.turn, min(before.turn + 1, TURN_MAX))
            self._describe(request, turn, request.num_tokens)
            request.session = request.session or before.session
            self._continue(before, now, is_tail_used=False)
        else:
            del self._gone[request.name]
            request.name = 0

    def _lose_sight(self, now: float) -> None:
        """Close what is idle for too long, and the oldest when there are too many."""
        opened = self._open
        records_max = RECORDS_MIN + self._num_pages // PAGES_A_RECORD
        while opened:
            request = opened[0]
            is_waited_for = request.is_open and now - request.touched < CENSOR_S
            if is_waited_for and len(opened) <= records_max:
                if len(opened) > 1 and request.touched > opened[1].touched:
                    opened.rotate(-1)  # it was touched after those behind it: let them come first
                break
            opened.popleft()
            if request.is_open:
                self._close(request)
                self.survival.forget(request.kind, request.touched)
                self.survival.lost(request.kind, now - request.touched, now)
                if request.has_tail:
                    self.survival.lost(TAIL, now - request.touched, now)

    def _join(self, request: Request, last: Entry, name: bytes) -> None:
        key = (namespace_of(last.key), name)  # an entry has one only where there is a schema
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(*key)
        if request.session is not None and request.session is not session:
            leave(request.session, request)
        request.session = session
        self._renew(session, last)

    def _renew(self, session: Session, last: Entry) -> None:
        """A session went on up to a page: what was said of it has come to pass, or was wrong."""
        session.is_ended, session.expected_at = False, 0.0
        if last.parent is not None:
            session.tails.discard(last.parent)
        session.tails.add(last)


def _depth(entry: Entry) -> int:
    return entry.depth
