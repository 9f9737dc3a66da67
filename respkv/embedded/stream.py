"""A connection without a socket: the caller's end is a client's stream, the other end a session's wire.

What is sent waits in the caller's memory until the session wants it, and is copied from there into
the session's window, which for a page is its slot. What is answered stays where it is, for a page
in its slot, until the caller copies it into memory of its own. So a page is copied once on either
way, and backpressure is that of a socket that holds nothing: the session reads on when it can, and
answers on when what it has answered was taken.

The session lives in the event loop's thread and the caller may be another one. What they share are
two queues and a few flags, each changed by one of them; a lock guards one thing: no byte of the
caller's memory is read once ``close`` has returned, or a call that was broken off could store half
of what its memory holds later. The loop's answers are read without one: who takes bytes out of a
slot looks afterwards whether the session still held it.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from respkv.client.effects import Effect, Event, Heed
from respkv.client.requests import Chunk
from respkv.client.stream import Stream
from respkv.embedded.bells import Bell
from respkv.embedded.copying import copy
from respkv.engine.supervisor import guard
from respkv.server.body import LAND_MIN
from respkv.server.session import Session
from respkv.tiers.slab import Slot

if TYPE_CHECKING:
    from respkv.server.state import Server

AHEAD_BYTES = 4 << 20  # of answers count as sent before they were taken
TURN_BYTES = 4 << 20  # are copied before others have a turn
ADDRESS = "embedded"


class EngineStream(Stream):
    """One connection to the engine of this process.

    post:       calls a function in the engine's event loop, now or soon.
    own_thread: of the engine; whoever calls there would wait for himself.
    """

    def __init__(
        self,
        server: "Server",
        bell: Bell,
        post: Callable[[Callable[[], None]], None],
        own_thread: int | None = None,
    ) -> None:
        self._server = server
        self._bell = bell
        self._post = post
        self._own_thread = own_thread
        self._pid = os.getpid()
        self._session: Session | None = None
        self._inbox: deque[memoryview] = deque()
        self._num_fed = 0  # bytes of the first of them that the session has
        self._is_posted = False  # the session will look into the inbox
        self._parts: deque[bytes | memoryview] = deque()
        self._num_taken = 0  # bytes of the first of them that the caller has
        self._put_bytes = self._got_bytes = 0
        # Slots of what was put, and put_bytes when all of theirs had been.
        self._held: deque[tuple[int, list[Slot]]] = deque()
        self._is_told = False  # the session will look what was taken
        self._moved_bytes = 0  # by the caller, since it waited last
        self._is_over = False  # nothing more comes
        self._is_void = False  # nor is what was not taken by then to be trusted
        self._is_closed = False  # by the caller
        self._lending = threading.RLock()

    # -- the caller's end ---------------------------------------------------------------------

    def send(self, chunks: Sequence[Chunk]) -> int | Event:
        """Let the session have all of these bytes, which it takes from where they are."""
        if self._is_over or self._is_closed or os.getpid() != self._pid:
            raise BrokenPipeError("the engine has closed the connection")
        if threading.get_ident() == self._own_thread:
            raise BrokenPipeError("a call in the engine's own thread, as of a finalizer")
        if self._has_moved_much():
            return Event.WRITE
        nbytes = 0
        for chunk in chunks:
            if chunk:
                nbytes += len(chunk)
                self._inbox.append(memoryview(chunk))
        if not self._is_posted:
            self._is_posted = True
            self._ask(self._look)
        self._moved_bytes += nbytes
        return nbytes

    def receive(self, into: memoryview) -> int | Event:
        """Take what is answered. A part that does not fit is begun only at the start of ``into``.

        So what stands in front of a page comes alone, and the page then lands where it belongs.
        """
        parts, count, room = self._parts, 0, min(len(into), TURN_BYTES)
        if self._has_moved_much():
            return Event.READ
        if not parts:
            # In this order: the last part comes before the end.
            return (0 if not parts else self.receive(into)) if self._is_over else Event.READ
        while parts and count < room:
            part, taken = parts[0], self._num_taken
            left = len(part) - taken
            if left > room - count:
                if count:
                    break
                copy(into, part, taken, room)
                self._num_taken += room
                count = room
                break
            copy(into[count : count + left], part, taken, left)
            count += left
            self._num_taken = 0
            parts.popleft()
        self._got_bytes += count
        if self._is_void:
            raise ConnectionResetError("the engine has closed the connection")
        session = self._session
        if session is not None and not self._is_told:
            wants_more = session.is_draining and self.unsent_bytes() <= AHEAD_BYTES // 2
            if wants_more or (self._held and not parts):
                self._is_told = True
                self._ask(self._go_on)
        self._moved_bytes += count
        return count

    def wait_for(self, events: Event, deadline: float) -> Effect:
        """Return that the bell is waited for."""
        return Heed(self._bell, deadline)

    def is_quiet(self) -> bool:
        """Say whether nothing waits to be taken, and more may come."""
        return not self._parts and not self._is_over and os.getpid() == self._pid

    def close(self) -> None:
        """Send no more. From here on no byte is read from, or written to, the caller's memory."""
        if self._is_closed or self._is_over or os.getpid() != self._pid:
            return
        with self._lending:
            self._is_closed = True
        self._ask(self._leave)

    def give_up(self) -> None:
        """Note that the engine has ended, so that nobody waits for it."""
        self._is_over = self._is_void = True
        self._bell.ring()

    def _has_moved_much(self) -> bool:
        """Whether others should have a turn; then the bell rings at once."""
        if self._moved_bytes < TURN_BYTES:
            return False
        self._moved_bytes = 0
        self._bell.ring()
        return True

    def _ask(self, work: Callable[[], None]) -> None:
        try:
            self._post(work)
        except RuntimeError:  # its loop has ended
            self.give_up()

    # -- the engine's end ---------------------------------------------------------------------

    def write(self, data: bytes | memoryview) -> None:
        """Let the caller have an answer that stands alone."""
        assert self._session is not None
        self._session.out.append(data)
        self._flush(self._session)

    def wake(self) -> None:
        """Let the caller have what is answered; let the session have what it wants now."""
        session = self._session
        if session is not None:
            self._flush(session)
            if self._inbox and session.wants_input:
                self._server.spawn(self._look_later)

    def abort(self) -> None:
        """Close at once, as far as the caller is concerned; the session is told soon."""
        self._is_over = self._is_void = True
        self._server.spawn(self._end_later)

    def unsent_bytes(self) -> int:
        """Return how much the caller has not taken."""
        return self._put_bytes - self._got_bytes

    async def _look_later(self) -> None:
        self._look()

    async def _end_later(self) -> None:
        self._end(by_server=True)

    def _look(self) -> None:
        """Let the session have what was sent, as far as it wants it."""
        self._is_posted = False
        guard(self._feed, self.abort)

    def _go_on(self) -> None:
        """Note that answers were taken."""
        self._is_told = False
        guard(self._take_note, self.abort)

    def _take_note(self) -> None:
        held, session = self._held, self._session
        while held and held[0][0] <= self._got_bytes:
            self._restore(held.popleft()[1])
        if session is None:
            return
        if session.is_draining and self.unsent_bytes() <= AHEAD_BYTES // 2:
            session.drained()
        self._flush(session)
        self._feed()

    def _restore(self, slots: list[Slot]) -> None:
        for slot in slots:
            self._server.cache.restore(slot)

    def _leave(self) -> None:
        """Note that the caller has gone."""
        self._is_over = self._is_void = True
        if self._session is not None:
            guard(self._end, self.abort)

    def _end(self, *, by_server: bool = False) -> None:
        """Give back what the session held, once."""
        session, self._session = self._session, None
        if session is not None:
            self._server.sessions.pop(session.number, None)
            self._server.clock.refresh()
            session.lost(by_server=by_server)
        while self._held:
            self._restore(self._held.popleft()[1])
        self._inbox.clear()
        self._bell.ring()

    def _begin(self) -> Session:
        server = self._server
        server.clock.refresh()
        server.num_connections += 1
        number = server.next_number
        server.next_number += 1
        session = server.sessions[number] = Session(server, number, ADDRESS, ADDRESS, self)
        return session

    def _feed(self) -> None:
        if self._is_over:
            return
        session = self._session
        if session is None:
            session = self._session = self._begin()
        num_fed = 0
        while self._inbox and session.wants_input and not self._is_over:
            if num_fed >= TURN_BYTES:
                self._server.spawn(self._look_later)
                return
            with self._lending:
                if self._is_closed:
                    return
                nbytes = self._fill(session.window(), is_slot=session.is_filling)
            num_fed += nbytes
            if session.received(nbytes):
                self._flush(session)

    def _fill(self, window: memoryview, *, is_slot: bool) -> int:
        """Copy what was sent into a window; return how much.

        Of a large chunk no more than is needed for taking a slot goes where there is none yet.
        """
        inbox, count, room = self._inbox, 0, len(window)
        while inbox and count < room:
            chunk, fed = inbox[0], self._num_fed
            left = len(chunk) - fed
            if left > LAND_MIN and fed == 0 and not is_slot:
                if count:
                    break
                left = LAND_MIN
            nbytes = min(left, room - count)
            copy(window[count : count + nbytes], chunk, fed, nbytes)
            count += nbytes
            if fed + nbytes < len(chunk):
                self._num_fed = fed + nbytes
                if not is_slot:
                    break
            else:
                self._num_fed = 0
                inbox.popleft()
        return count

    def _flush(self, session: Session) -> None:
        """Let the caller have the answers.

        A few MiB ahead of what was taken they count as sent, as they do when a socket has them; then
        the session goes on answering while the caller copies. Their slots are given back here.
        """
        while session.out and not session.promises and not session.is_draining:
            parts = [part for part in session.take_output() if part]
            nbytes = sum(map(len, parts))
            self._server.output_bytes += nbytes
            self._put_bytes += nbytes
            slots = session.hand_over()
            if slots:
                self._held.append((self._put_bytes, slots))
            if self.unsent_bytes() > AHEAD_BYTES:
                session.draining()  # first: the caller may be quicker than the next line
            self._parts.extend(parts)
            self._bell.ring()
            if not session.is_draining:
                session.sent()
        self._bell.ring()
        if session.may_close and not self._held:
            self._is_over = True
            self._server.spawn(self._end_later)
