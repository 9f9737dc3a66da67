"""MGET and KV.MGET: values in order, each sent when the one before it has room.

When all are in memory, they are held from the start. When some are in files, they are sent in order
while later ones are loaded: only what fits into a window of bytes is held: what is being loaded, and what waits in memory for its
turn. The window moves on as values leave, and stands while the reader takes nothing, so a client may
ask for more than memory holds. What a key has when it enters the window, or when its load has
ended, is what is sent.
"""

from collections import deque
from collections.abc import Callable, Iterator
from math import inf
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import anyio

from respkv.engine.entry import Entry
from respkv.errors import CommandError
from respkv.server.loads import is_cold
from respkv.tiers.slab import Slot
from respkv.wire import reply

if TYPE_CHECKING:
    from respkv.engine.loads import Load
    from respkv.engine.mover import Mover
    from respkv.server.registry import Later
    from respkv.server.session import Session

TURNS_MAX = 1024

# The first byte of a value to send, and where to stop; None: at its end.
Span: TypeAlias = tuple[int, int | None]


def whole(entry: Entry) -> Span:
    """Return that all of an entry is wanted."""
    return 0, None


def stream_values(
    session: "Session",
    keys: list[bytes],
    *,
    span_of: Callable[[Entry], Span] = whole,
    are_pages: bool = False,
    seconds: float | None = None,
) -> "Later":
    """Answer with the value of each key.

    span_of:   says which bytes of an entry are wanted; raises CommandError when it has none such.
    are_pages: count hits and misses of pages, too.
    seconds:   what is not in memory after so long is absent; None: all is waited for.
    """
    found = [session.cache.find(key) for key in keys]
    spans = [(0, None) if entry is None else span_of(entry) for entry in found]
    if any(entry is not None and is_cold(entry) for entry in found):
        return Stream(session, keys, span_of, are_pages).run(seconds)
    return _resident(session, keys, spans, are_pages)


def _resident(
    session: "Session", keys: list[bytes], spans: list[Span], are_pages: bool
) -> Iterator[None]:
    """Answer with values in memory, one step a key.

    All are looked up first and held, so that what the client gets is of one moment even when it
    reads slowly and others write or evict meanwhile.
    """
    cache = session.cache
    found = [cache.use(key) for key in keys]
    if are_pages:
        num_found = sum(entry is not None for entry in found)
        cache.stats.page_hits += num_found
        cache.stats.page_misses += len(keys) - num_found
    held = [None if entry is None else entry.slot for entry in found]
    values = [None if entry is None else entry.value for entry in found]
    for slot in held:
        if slot is not None:
            cache.borrow(slot)

    def steps() -> Iterator[None]:
        position = 0
        try:
            session.out.append(reply.array_header(len(keys)))
            for value, slot, span in zip(values, held, spans, strict=True):
                if slot is not None:
                    session.send_slot(slot, *span)
                    cache.restore(slot)
                elif value is not None:
                    session.send_value(value)
                else:
                    session.send_nil()
                position += 1
                yield
        finally:
            for slot in held[position:]:
                if slot is not None:
                    cache.restore(slot)

    return steps()


class Turn(NamedTuple):
    """A key in the window: its value's slot or bytes, or the load that brings it; or nothing.

    share: of the budget; the first in the window needs none.
    """

    key: bytes
    share: int = 0
    slot: Slot | None = None
    value: bytes | None = None
    span: Span = (0, None)
    load: "Load | None" = None


class Stream:
    """One array of values, some of which have to be loaded. See ``stream_values``."""

    def __init__(
        self,
        session: "Session",
        keys: list[bytes],
        span_of: Callable[[Entry], Span],
        are_pages: bool,
    ) -> None:
        mover = session.server.mover
        assert mover is not None
        self._session = session
        self._cache = session.cache
        self._mover: Mover = mover
        self._keys = keys
        self._span_of = span_of
        self._are_pages = are_pages
        self._window: deque[Turn] = deque()
        self._budget = session.server.budget
        self._share = 0  # of the budget
        self._next = 0  # of the keys, the first that has not entered the window
        self._has_ended = False
        self._fill()

    async def run(self, seconds: float | None) -> None:
        """Answer.

        Cancelled: nothing is held, the answer is cut off.
        """
        session = self._session
        if session.is_muted:
            self._give_back()
            return
        deadline = inf if seconds is None else anyio.current_time() + seconds
        try:
            with session.until_lost():
                session.out.append(reply.array_header(len(self._keys)))
                while self._window:
                    await self._wait(self._window[0].load, deadline)
                    self._send()
                    self._fill()
                    await session.make_room()
        finally:
            self._give_back()

    def _fill(self) -> None:
        """Let keys into the window as long as there is room in it, or nothing else."""
        while self._next < len(self._keys) and len(self._window) < TURNS_MAX:
            key = self._keys[self._next]
            entry = self._cache.find(key)
            share = 0 if entry is None or not self._window else entry.nbytes
            if self._share + share > self._budget.each_max or not self._budget.take(share):
                return
            self._share += share
            self._window.append(Turn(key) if entry is None else self._enter(entry, share))
            self._next += 1

    def _enter(self, entry: Entry, share: int) -> Turn:
        if is_cold(entry):
            # After the deadline nothing is waited for, so nothing is begun.
            load = None if self._has_ended else self._mover.start_load(entry)
            return Turn(entry.key, share, load=load)
        try:
            span = self._span_of(entry)
        except CommandError:  # it has changed since it was asked for
            return Turn(entry.key, share)
        entry.touched = self._cache.clock.now
        entry.hits += 1
        if entry.slot is not None:
            self._cache.borrow(entry.slot)
        return Turn(entry.key, share, entry.slot, entry.value, span)

    async def _wait(self, load: "Load | None", deadline: float) -> None:
        if load is None or load.is_done:
            return
        if not self._has_ended:
            self._session.wire.wake()  # what is there may leave meanwhile
            with anyio.move_on_at(deadline):
                await load.wait()
            self._session.server.clock.refresh()
            self._has_ended = not load.is_done
        if self._has_ended:
            self._leave_to_others()

    def _leave_to_others(self) -> None:
        """Have what is on its way stay in memory for whoever asks next."""
        late = [self._cache.find(turn.key) for turn in self._window if turn.load is not None]
        self._mover.advise_prefetch([entry for entry in late if entry and is_cold(entry)])

    def _send(self) -> None:
        """Answer for the first key in the window, in the turn in which its load has ended."""
        turn = self._window.popleft()
        self._give_back_share(turn)
        if turn.load is None:
            self._answer(turn)
            return
        try:
            entry = self._cache.find(turn.key)
            is_there = entry is not None and not is_cold(entry)
            loaded = self._enter(entry, 0) if entry is not None and is_there else Turn(turn.key)
            self._answer(loaded)
        finally:
            self._mover.release(turn.load)

    def _answer(self, turn: Turn) -> None:
        session, stats = self._session, self._cache.stats
        is_hit = turn.slot is not None or turn.value is not None
        stats.hits += is_hit
        stats.misses += not is_hit
        if self._are_pages:
            stats.page_hits += is_hit
            stats.page_misses += not is_hit
        if turn.slot is not None:
            session.send_slot(turn.slot, *turn.span)
            self._cache.restore(turn.slot)
        elif turn.value is not None:
            session.send_value(turn.value)
        else:
            session.send_nil()

    def _give_back(self) -> None:
        for turn in self._window:
            self._give_back_share(turn)
            if turn.load is not None:
                self._mover.release(turn.load)
            if turn.slot is not None:
                self._cache.restore(turn.slot)
        self._window.clear()

    def _give_back_share(self, turn: Turn) -> None:
        self._share -= turn.share
        self._budget.give_back(turn.share)
