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
from collections.abc import Iterator, Sequence
from itertools import count
from weakref import WeakValueDictionary

from respkv.engine.clock import Clock
from respkv.engine.entry import Entry
from respkv.engine.history import Reason
from respkv.engine.survival import (
    CENSOR_S,
    FIRST_BIN_S,
    LEFT,
    TAIL,
    TICK_S,
    TURN_MAX,
    Survival,
    kind_of,
)
from respkv.engine.watch import Watcher

PAGES_A_RECORD = 4
RECORDS_MIN = 64
LAPSE = 2.0  # an expected session that did not come in so many times the time named is as any other


class Session:
    """A conversation that a client named, and what it said of it.

    expected_at: when it comes back, seconds of the monotonic clock; 0.0: nobody said.
    lapses_at:   when that is no longer believed.
    tails:       the last present page of each of its chains.
    """

    __slots__ = (
        "__weakref__",
        "expected_at",
        "is_ended",
        "lapses_at",
        "name",
        "namespace",
        "tails",
    )

    def __init__(self, namespace: bytes, name: bytes) -> None:
        self.namespace = namespace
        self.name = name
        self.is_ended = False
        self.expected_at = 0.0
        self.lapses_at = 0.0
        self.tails: set[Entry] = set()


class Request:
    """One prompt that was matched or stored, as far as it matters for those that follow.

    turn:       how many requests it continues, at most TURN_MAX.
    num_tokens: of its prompt.
    touched:    when it last stored or matched anything, seconds of the monotonic clock.
    last:       its last full page, if that is present and nobody went on behind it.
    is_owner:   whether it stored ``last`` itself, and did not only match it.
    has_tail:   whether it stored a partial page behind that.
    is_open:    whether it is waited for; if not, it is lost sight of.
    kind:       its kind in the model. Once it was continued, that of what it left behind.
    """

    __slots__ = (
        "_is_ended",
        "has_tail",
        "is_open",
        "is_owner",
        "kind",
        "last",
        "name",
        "num_tokens",
        "number",
        "session",
        "ticket",
        "touched",
        "turn",
    )

    def __init__(self, number: int, turn: int, num_tokens: int, now: float) -> None:
        self.number = number
        self.turn = turn
        self.num_tokens = num_tokens
        self.kind = kind_of(turn, num_tokens)
        self.touched = now
        self.session: Session | None = None
        self.last: Entry | None = None
        self.name = 0  # of its last page, once that went
        self.is_owner = False
        self.is_open = True
        self.has_tail = False
        self.ticket = 0  # of the model, while it is waited for
        self._is_ended = False

    @property
    def is_ended(self) -> bool:
        """Whether a client said that it will not be continued."""
        return self._is_ended or (self.session is not None and self.session.is_ended)

    @property
    def expected_at(self) -> float:
        """When a client said that it will be continued; 0.0: nobody did."""
        return 0.0 if self.session is None else self.session.expected_at

    def end(self) -> None:
        """Take a client's word that it will not be continued."""
        self._is_ended = True


class Requests(Watcher):
    """The requests of one cache.

    survival: what was learned from them.
    """

    def __init__(self, clock: Clock, survival: Survival | None = None) -> None:
        self.survival = Survival() if survival is None else survival
        self._clock = clock
        self._numbers = count(1)
        self._num_pages = 0
        self._open: deque[tuple[float, Request]] = deque()  # due to be lost sight of, in order
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
        if before is not None and _is_same(before, num_tokens, now):
            request = before
            self._touch(request, now)
        else:
            is_next = before is not None and _is_continued(before, last)
            turn = before.turn + 1 if before is not None and is_next else 0
            request = self._begin(turn, num_tokens, now)
            if before is not None and is_next:
                request.session = before.session
                self._continue(before, now, is_tail_used=is_partial(last))
            _hand_over(run, request)
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
            session = request.session
            request = self._begin(0, entry.depth + entry.tokens, now)
            request.session = session
        entry.request = request
        self._touch(request, now)
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
            if parent is not None and parent.request is not None:
                if parent.request.session is session:
                    session.tails.add(parent)

    def cleared(self) -> None:
        self._num_pages = 0
        for _, request in self._open:
            if request.is_open:
                request.is_open = False
                self.survival.forget(request.kind, request.ticket)
        self._open.clear()
        self._gone.clear()
        self._sessions.clear()

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
        for request in _requests_of(found):
            self.survival.notice(request)
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
        for request in _requests_of(found):
            self.survival.notice(request)
        return True

    def end_request(self, request: Request) -> None:
        """Take a client's word that a request will not be continued."""
        request.end()
        if request.is_open:
            self._close(request)
            self.survival.forget(request.kind, request.ticket)
        self.survival.notice(request)

    def entries_of(self, session: bytes, namespace: bytes) -> list[Entry]:
        """Return the pages that a session used last, each before the page it stands behind."""
        found = self.find(namespace, session)
        if found is None:
            return []
        pages: dict[Entry, None] = {}
        for tail in sorted(found.tails, key=_depth):
            chain = dict.fromkeys(_chain_of(tail, found))
            # A page of two chains comes behind both.
            pages = {page: None for page in pages if page not in chain} | chain
        return list(pages)

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
        self._open.append((now + CENSOR_S, request))
        request.ticket = self.survival.begin(request.kind, now)
        return request

    def _touch(self, request: Request, now: float) -> None:
        if request.is_open and now - request.touched > TICK_S:
            self.survival.forget(request.kind, request.ticket)
            request.ticket = self.survival.begin(request.kind, now)
        request.touched = now

    def _continue(self, before: Request, now: float, *, is_tail_used: bool) -> None:
        """Learn that a request was continued; what it leaves behind is waited for from now on."""
        survival = self.survival
        if before.is_open:
            survival.forget(before.kind, before.ticket)
            survival.continued(before.kind, now - before.touched, now)
            if before.has_tail:
                learn = survival.continued if is_tail_used else survival.lost
                learn(TAIL, now - before.touched, now)
            before.ticket = survival.begin(LEFT, now)
        before.kind, before.touched = LEFT, now
        before.has_tail = False
        survival.notice(before)

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
            request.turn = max(request.turn, min(before.turn + 1, TURN_MAX))
            if request.is_open and request.kind != LEFT:
                self.survival.forget(request.kind, request.ticket)
                request.kind = kind_of(request.turn, request.num_tokens)
                request.ticket = self.survival.begin(request.kind, now)
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
            due, request = opened[0]
            if request.is_open and len(opened) <= records_max:
                if due > now:
                    break
                if request.touched + CENSOR_S > now:
                    opened.popleft()
                    opened.append((request.touched + CENSOR_S, request))
                    continue
            opened.popleft()
            if request.is_open:
                self._close(request)
                self.survival.forget(request.kind, request.ticket)
                self.survival.lost(request.kind, now - request.touched, now)
                if request.has_tail:
                    self.survival.lost(TAIL, now - request.touched, now)

    def _join(self, request: Request, last: Entry, name: bytes) -> None:
        key = (last.namespace, name)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(*key)
        request.session = session
        self._renew(session, last)

    def _renew(self, session: Session, last: Entry) -> None:
        """A session went on up to a page: what was said of it has come to pass, or was wrong."""
        session.is_ended, session.expected_at = False, 0.0
        if last.parent is not None:
            session.tails.discard(last.parent)
        session.tails.add(last)


def _is_same(before: Request, num_tokens: int, now: float) -> bool:
    """Whether this is the match of a moment ago once more, by another worker or a retry."""
    return before.num_tokens == num_tokens and now - before.touched < FIRST_BIN_S


def _is_continued(before: Request, last: Entry) -> bool:
    """Whether a prompt that starts with ``last`` goes on where ``before`` ended.

    A first turn that only matched its last full page shares it with whoever stored it: the
    two are alike, and neither continues the other. A prompt that leaves ``before`` in the middle
    goes on as well, with its end rewritten, unless others stand there: then that is where prompts
    with the same beginning part.
    """
    if is_partial(last):
        return True
    if before.last is last:
        return before.is_owner or before.turn > 0
    return last.children is None or len(last.children) <= 1


def is_partial(entry: Entry) -> bool:
    """Whether a page is the tail of a prompt: only the first page of a chain cannot be told."""
    return entry.parent is not None and entry.tokens < entry.parent.tokens


def _hand_over(run: Sequence[Entry], request: Request) -> None:
    """Make pages those of a request, and let go of them where they were."""
    previous: Request | None = None
    before: list[Request] = []
    for entry in run:
        if entry.request is not previous:
            previous = entry.request
            if previous is not None:
                before.append(previous)
        entry.request = request
    for each in before:
        if each.last is not None and each.last.request is request:
            each.last = None
        session = each.session
        if session is not None and session is not request.session:
            session.tails -= {tail for tail in session.tails if tail.request is request}


def _requests_of(session: Session) -> Iterator[Request]:
    """Yield the requests that hold pages of a session, each once in a chain."""
    for tail in session.tails:
        previous: Request | None = None
        for page in _chain_of(tail, session):
            if page.request is not previous:
                previous = page.request
                yield page.request


def _chain_of(tail: Entry, session: Session) -> Iterator[Entry]:
    page: Entry | None = tail
    while page is not None and page.request is not None and page.request.session is session:
        yield page
        page = page.parent


def _depth(entry: Entry) -> int:
    return entry.depth
