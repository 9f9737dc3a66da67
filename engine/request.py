"""A request and a session: the records that pages share, and how one hands pages to the next."""

from collections.abc import Iterator, Sequence

from respkv.engine.entry import Entry
from respkv.engine.survival import FIRST_BIN_S, kind_of


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
    parted_at:  tokens after which it left those before it, if it begins a conversation.
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
        "parted_at",
        "session",
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
        self.parted_at = -1
        self.is_owner = False
        self.is_open = True
        self.has_tail = False
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


def is_same(before: Request, num_tokens: int, now: float) -> bool:
    """Whether this is the match of a moment ago once more, by another worker or a retry."""
    return before.num_tokens == num_tokens and now - before.touched < FIRST_BIN_S


def is_continued(before: Request, last: Entry) -> bool:
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
    if before.parted_at == last.depth + last.tokens:
        return False
    return last.children is None or len(last.children) <= 1


def is_partial(entry: Entry) -> bool:
    """Whether a page is the tail of a prompt: only the first page of a chain cannot be told."""
    return entry.parent is not None and entry.tokens < entry.parent.tokens


def hand_over(run: Sequence[Entry], request: Request) -> None:
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
            leave(session, request)


def leave(session: Session, request: Request) -> None:
    """Forget the tails of a session that are pages of a request of another."""
    session.tails -= {tail for tail in session.tails if tail.request is request}


def requests_of(session: Session) -> Iterator[Request]:
    """Yield the requests that hold pages of a session; one may come more than once."""
    seen: set[Entry] = set()
    for tail in session.tails:
        previous: Request | None = None
        for page in chain_of(tail, session, seen):
            if page.request is not previous:
                previous = page.request
                yield page.request


def chain_of(tail: Entry, session: Session, seen: set[Entry]) -> Iterator[Entry]:
    """Yield a page of a session and those in front of it, up to one that was seen; add them to those."""
    page: Entry | None = tail
    while page is not None and page.request is not None and page.request.session is session:
        if page in seen:
            return
        seen.add(page)
        yield page
        page = page.parent
