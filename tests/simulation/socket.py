"""A socket that a seeded scheduler moves: how much arrives, how much leaves, and when it breaks.

It keeps asyncio's contract towards the real ``Connection``: what the kernel does not take at once
is reported by ``pause_writing``, the last byte of it by ``resume_writing``, and ``connection_lost``
comes later than the ``abort`` or ``close`` that asked for it. Bytes are copied when the kernel
takes them and not before, so a slot that changes while it waits to be sent shows up as wrong bytes.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from respkv.server.state import Server
from respkv.server.transport import Connection

Buffer = bytes | bytearray | memoryview


class _Family:
    """What the connection asks of the socket itself."""

    family = socket.AF_INET


class SimulatedSocket(asyncio.Transport):
    """The server's end. ``inbox`` is what the client has sent and the server has not read.

    defer:    runs a function later, as the event loop's ``call_soon`` does.
    arrived:  bytes that the client can read.
    room:     bytes that the kernel still takes before the client reads.
    """

    def __init__(
        self, server: Server, number: int, defer: Callable[[Callable[[], None]], None]
    ) -> None:
        super().__init__()
        self.inbox = bytearray()
        self.arrived = bytearray()
        self.room = 1 << 18
        self.is_lost = False
        self._number = number
        self._defer = defer
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._is_reading = True
        self._is_closing = False
        self._is_draining = False  # pause_writing was called
        self.connection = Connection(server)
        self.connection.connection_made(self)

    # -- what asyncio.Transport promises --------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "socket":
            return _Family
        return ("127.0.0.1", self._number) if name == "peername" else ("127.0.0.1", 7379)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def write(self, data: Buffer) -> None:
        self.writelines([data])

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        assert not self.is_lost
        if self._is_closing:
            return
        for data in list_of_data:
            view = memoryview(data)
            if len(view):
                self._unsent.append(view)
                self._unsent_bytes += len(view)
        self._push()
        if self._unsent_bytes and not self._is_draining:
            self._is_draining = True
            self.connection.pause_writing()

    def pause_reading(self) -> None:
        assert self._is_reading
        self._is_reading = False

    def resume_reading(self) -> None:
        assert not self._is_reading
        self._is_reading = True

    def is_closing(self) -> bool:
        return self._is_closing

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            if not self._unsent:
                self._defer(self.lose)

    def abort(self) -> None:
        self._is_closing = True
        self._forget()
        self._defer(self.lose)

    # -- what the scheduler does ------------------------------------------------------------------

    @property
    def can_read(self) -> bool:
        """Whether the server would read now."""
        return self._is_reading and not self._is_closing and bool(self.inbox)

    def deliver(self, nbytes: int) -> None:
        """Let the server read up to ``nbytes`` once."""
        window = self.connection.get_buffer(-1)
        assert len(window), "an empty window would look like the end of the stream"
        count = min(len(window), nbytes, len(self.inbox))
        window[:count] = self.inbox[:count]
        del self.inbox[:count]
        self.connection.buffer_updated(count)

    def drain(self, nbytes: int) -> None:
        """Let the kernel take ``nbytes`` more."""
        self.room = nbytes
        self._push()
        if self._unsent or self.is_lost:
            return
        if self._is_draining:
            self._is_draining = False
            self.connection.resume_writing()
        if self._is_closing:
            self._defer(self.lose)

    def lose(self) -> None:
        """Break the connection now."""
        if not self.is_lost:
            self.is_lost = self._is_closing = True
            self._forget()
            self.connection.connection_lost(None)

    def _forget(self) -> None:
        self._unsent.clear()
        self._unsent_bytes = 0

    def _push(self) -> None:
        while self._unsent and self.room > 0:
            part = self._unsent.popleft()
            taken = part[: self.room]
            self.arrived += taken
            self.room -= len(taken)
            self._unsent_bytes -= len(taken)
            if len(taken) < len(part):
                self._unsent.appendleft(part[len(taken) :])
