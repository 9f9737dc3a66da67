"""What becomes of pages, told to whoever listens.

The cache tells its watchers in the turn in which something happens; here that is written down, with
a number, in the queue of each listener, and the listener reads it when it has its turn. So a command
that evicts ten thousand pages pays for ten thousand short tuples and not for as many messages.

Each namespace has numbers of its own, from 1 on and without a gap, so that a listener knows when it
has missed something: a queue that is full loses its oldest, and while nobody listens to a namespace
nothing is counted, but one number is left out before the next. While nobody listens at all, an event
costs one look at a flag.

What file tiers hold when the server starts is not told here: a listener that wants it looks at the
cache when it begins.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

from respkv.chain import BRANCH_BYTES
from respkv.engine.entry import Entry
from respkv.engine.history import Reason
from respkv.engine.namespaces import TAG_BYTES
from respkv.engine.watch import Watcher
from respkv.page import PAGE_ID_BYTES, namespace_of, part_of

if TYPE_CHECKING:
    from respkv.engine.cache import Cache

Kind = Literal["stored", "removed", "demoted", "promoted", "cleared"]

MEMORY_TIER = "cpu"
QUEUE_MAX = 100_000
NAMESPACES_MAX = 65_536  # that have numbers; with one more all begin anew
_PLAIN_BYTES = TAG_BYTES + BRANCH_BYTES
_ID_DIGITS = 2 * PAGE_ID_BYTES
_HEX = frozenset(b"0123456789abcdef")


class Event(NamedTuple):
    """One thing that became of one page; ``cleared`` is about all pages of its namespace.

    sequence: its number in its namespace.
    tokens:   of the page itself; page_tokens: of a full page of its namespace, 0 without a schema.
    depth:    tokens in front of it, as far as that is known.
    parent:   key of the page it stands behind, or empty.
    tier:     where it is now; where it was last, when it is removed.
    reason:   why it was removed; of a page that is stored, "new" or "replaced".
    """

    kind: Kind
    namespace: bytes
    sequence: int
    key: bytes = b""
    tokens: int = 0
    page_tokens: int = 0
    depth: int = 0
    parent: bytes = b""
    tier: str = ""
    reason: str = ""
    nbytes: int = 0
    token_ids: bytes = (
        b""  # of a page that they name: not where a salt, a tenant or a LoRA does, too
    )

    @property
    def part(self) -> str:
        """Which part of a prompt's cache it is: page, tail, or what hangs on a page by its name."""
        is_tail = 0 < self.tokens < self.page_tokens  # 0: nobody said how many
        return suffix_of(self.key) or ("tail" if is_tail else "page")


class Listener:
    """Somebody who wants events, and those it has not taken yet, oldest first.

    is_on:   whether it wants any at all.
    wants:   whether it wants those of a namespace.
    named:   the namespaces that it asked for by their names.
    wake:    called when there is an event after there was none.
    dropped: how many were lost because the queue was full.
    """

    def __init__(
        self,
        wants: Callable[[bytes], bool],
        named: Callable[[], Iterable[bytes]],
        wake: Callable[[], None],
        *,
        count_max: int = QUEUE_MAX,
    ) -> None:
        self.is_on = False
        self.wants = wants
        self.named = named
        self.wake = wake
        self.queue: deque[Event] = deque()
        self.dropped = 0
        self._count_max = count_max

    def add(self, event: Event) -> None:
        """Keep an event to be taken; the oldest goes for it when there are too many."""
        queue = self.queue
        if len(queue) >= self._count_max:
            queue.popleft()
            self.dropped += 1
        queue.append(event)
        if len(queue) == 1:
            self.wake()

    def take(self, count_max: int) -> list[Event]:
        """Return the oldest events and forget them."""
        queue = self.queue
        return [queue.popleft() for _ in range(min(count_max, len(queue)))]


class Events(Watcher):
    """Numbers what becomes of pages and gives it to the listeners.

    file_tiers: the names of the file tiers, as their records count them.
    """

    def __init__(self, cache: "Cache") -> None:
        self.file_tiers: tuple[str, ...] = ()
        self._cache = cache
        self._listeners: tuple[Listener, ...] = ()
        self._is_on = False
        # Who listens to a namespace, worked out when it is first met after that has changed.
        self._routes: dict[bytes, tuple[Listener, ...]] = {}
        self._numbers: dict[bytes, int] = {}

    def add(self, listener: Listener) -> None:
        """Give a listener what it wants from now on."""
        self._listeners = (*self._listeners, listener)
        self.changed()

    def changed(self) -> None:
        """Note that a listener wants something else than before."""
        self._routes.clear()
        was_on, self._is_on = self._is_on, any(each.is_on for each in self._listeners)
        if self._is_on and not was_on:
            # Nobody looked meanwhile, so something may have been missed anywhere.
            self._numbers = {namespace: last + 1 for namespace, last in self._numbers.items()}

    def number_of(self, namespace: bytes) -> int:
        """Return the number of the last event of a namespace, 0 before the first."""
        return self._numbers.get(namespace, 0)

    # -- what the cache tells -----------------------------------------------------------------

    def stored(self, entry: Entry, *, is_new: bool) -> None:
        """Tell that a page can be fetched."""
        if self._is_on:
            # One that has only got its tokens now may be in a file.
            self._tell("stored", entry, self.tier_of(entry), "new" if is_new else "replaced")

    def demoted(self, entry: Entry) -> None:
        """Tell that a page has left memory for a file."""
        if self._is_on:
            self._tell("demoted", entry, self.tier_of(entry), "")

    def raised(self, entry: Entry) -> None:
        """Tell that a page has come back into memory."""
        if self._is_on:
            self._tell("promoted", entry, MEMORY_TIER, "")

    def removed(self, entry: Entry, reason: Reason) -> None:
        """Tell that a page has gone."""
        if self._is_on:
            self._tell("removed", entry, self.tier_of(entry), reason)

    def cleared(self) -> None:
        """Tell those who listen to a namespace that all of its pages have gone."""
        if not self._is_on:
            return
        namespaces = dict.fromkeys(self._numbers)
        namespaces.update(dict.fromkeys(self._cache.namespaces.names()))
        for listener in self._listeners:
            namespaces.update(dict.fromkeys(listener.named()))
        for namespace in namespaces:
            route = self._routes.get(namespace)
            if route is None:
                route = self._find_route(namespace)
            if route:
                event = Event("cleared", namespace, self._count(namespace))
                for listener in route:
                    listener.add(event)

    # -- inside -------------------------------------------------------------------------------

    def tier_of(self, entry: Entry) -> str:
        """Return the name of the fastest tier, the gpu's aside, that has a page."""
        if not entry.is_cold:
            return MEMORY_TIER
        number = entry.records[0].tier if entry.records else self._cache.copies.lost_from
        return self.file_tiers[number] if number < len(self.file_tiers) else ""

    def describe(self, kind: Kind, entry: Entry, tier: str, reason: str, number: int) -> Event:
        """Write down what became of a page."""
        key = entry.key
        namespace = namespace_of(key)
        schema = self._cache.namespaces.find(namespace)
        page_tokens = 0 if schema is None else schema.geometry.tokens
        return Event(
            kind,
            namespace,
            number,
            key,
            entry.tokens,
            page_tokens,
            entry.depth,
            entry.parent_key,
            tier,
            reason,
            entry.nbytes,
            b"" if entry.branch[_PLAIN_BYTES:] else entry.token_ids,
        )

    def _tell(self, kind: Kind, entry: Entry, tier: str, reason: str) -> None:
        namespace = namespace_of(entry.key)
        route = self._routes.get(namespace)
        if route is None:
            route = self._find_route(namespace)
        if route:
            event = self.describe(kind, entry, tier, reason, self._count(namespace))
            for listener in route:
                listener.add(event)

    def _count(self, namespace: bytes) -> int:
        number = self._numbers[namespace] = self._numbers.get(namespace, 0) + 1
        return number

    def _find_route(self, namespace: bytes) -> tuple[Listener, ...]:
        if len(self._routes) >= NAMESPACES_MAX:
            self._routes.clear()
        if len(self._numbers) >= NAMESPACES_MAX:
            self._numbers.clear()
        route = tuple(each for each in self._listeners if each.is_on and each.wants(namespace))
        self._routes[namespace] = route
        if not route and namespace in self._numbers:
            self._numbers[namespace] += 1  # this one is missed, and it is the first
        return route


def suffix_of(key: bytes) -> str:
    """Return how the key of a part goes on behind its page's id; empty for a page itself."""
    if part_of(key) is None:
        return ""
    return key[key.rfind(b":") + _ID_DIGITS + 2 :].decode("utf-8", "backslashreplace")


def page_id_of(key: bytes) -> bytes | None:
    """Return the 32-byte id that a page's key ends with; None for parts and other keys."""
    digits = key[key.rfind(b":") + 1 :]
    if len(digits) != _ID_DIGITS or not _HEX.issuperset(digits):
        return None
    return bytes.fromhex(digits.decode())
