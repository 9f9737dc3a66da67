"""Sockets: the one place with raw asyncio, because it is the hot path.

An ``asyncio.BufferedProtocol`` under uvloop answered 72,000 to 113,000 unpipelined commands a second
where an anyio stream loop answered 43,000 (DESIGN.md). It lends the session's memory to the event
loop, so a page goes from the socket into its slot, and hands the slot's memory to one gathered
write, so it goes from the slot to the socket; nothing is copied in between.

With a high-water mark of 0 the transport reports every byte that the kernel did not take at once
(``pause_writing``) and when the last one has left (``resume_writing``); between the two the session
neither reads nor answers, and the slots that are being sent stay held.
"""

import asyncio
import contextlib
import contextvars
import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from respkv.engine.supervisor import guard
from respkv.server.answers import Buffers
from respkv.server.session import Session
from respkv.wire import reply

if TYPE_CHECKING:
    from respkv.server.state import Server

# Measured: GET of 1 and 4 MiB gains 10 % at 512 KiB and nothing beyond.
UNIX_SEND_BYTES = 512 * 1024
LINGER_S = 1.0

logger = logging.getLogger(__name__)

PROTECTED = (
    "DENIED respkv is running in protected mode because protected mode is enabled and no password "
    "is set. In this mode connections are only accepted from the loopback interface. Set a "
    "password with requirepass, or start the server with protected-mode no if it is reachable "
    "only by those you trust."
)


class Connection(asyncio.BufferedProtocol):
    """One client's socket."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._transport: asyncio.Transport
        self._session: Session | None = None
        self._is_paused = False
        self._is_closed = False  # by us
        self._lingering: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the client or tell it why not."""
        server = self._server
        self._transport = cast(asyncio.Transport, transport)
        server.clock.refresh()
        server.num_connections += 1
        refusal = self._refusal()
        if refusal is not None:
            server.num_rejected += 1
            self._transport.write(reply.error(refusal))
            self._transport.close()
            return
        self._transport.set_write_buffer_limits(high=0)
        self._widen()
        number = server.next_number
        server.next_number += 1
        peer, local = self._name("peername"), self._name("sockname")
        self._session = Session(server, number, peer, local, self)
        server.sessions[number] = self._session

    def _widen(self) -> None:
        """Let a page leave in few steps: the default buffer of a Unix socket holds 208 KiB."""
        raw = self._transport.get_extra_info("socket")
        if raw.family == socket.AF_UNIX:
            # Without a descriptor to spare the client is served all the same, a little slower.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(raw.fileno())) as wide:
                wide.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BYTES)

    def _refusal(self) -> str | None:
        server = self._server
        if len(server.sessions) >= server.config.maxclients:
            return "ERR max number of clients reached"
        if server.config.protected_mode and not server.config.requirepass:
            peer = self._transport.get_extra_info("peername")
            if isinstance(peer, tuple) and not _is_loopback(str(peer[0])):
                return PROTECTED
        return None

    def _name(self, which: str) -> str:
        address = self._transport.get_extra_info(which)
        if isinstance(address, tuple):
            host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
            return f"{host}:{address[1]}"
        return f"{self._server.config.unixsocket}:0"

    def get_buffer(self, sizehint: int) -> memoryview:
        """Lend memory for the next read."""
        if self._session is None or self._lingering is not None:
            return self._server.scratch
        return self._session.window()

    def buffer_updated(self, nbytes: int) -> None:
        """Let the session answer what came."""
        session = self._session
        if session is not None and self._lingering is None and session.received(nbytes):
            self._flush(session)

    def pause_writing(self) -> None:
        """Note that output is left."""
        if self._session is not None:
            self._session.draining()

    def resume_writing(self) -> None:
        """Go on once all output has left."""
        # The loop closes a connection whose reading crashes, but not one whose writing does.
        guard(self._go_on, self.abort)

    def _go_on(self) -> None:
        if self._session is not None:
            self._session.drained()
            self._flush(self._session)

    def eof_received(self) -> bool:
        """Close: a client that has stopped sending waits for nothing that is still to come."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back everything the client held."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._server.parting.discard(self)
        self._let_go()

    def write(self, data: bytes | memoryview) -> None:
        """Send an answer that stands alone."""
        self._server.output_bytes += len(data)
        self._transport.write(data)

    def wake(self) -> None:
        """Look at the session again: it has output or wants input."""
        if self._session is not None and self._lingering is None:
            self._flush(self._session)

    def abort(self) -> None:
        """Close at once."""
        self._is_closed = True
        self._transport.abort()

    def unsent_bytes(self) -> int:
        """Return how much output has not left yet."""
        return self._transport.get_write_buffer_size()

    def _flush(self, session: Session) -> None:
        """Send what the session has, as long as the kernel takes it, then match the reading."""
        while session.out and not session.promises:
            self._send(session.take_output())
            if session.is_draining:
                break
            session.sent()
        if session.wants_input:
            if self._is_paused:
                self._is_paused = False
                self._transport.resume_reading()
        elif session.may_close:
            self._linger()
        elif not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def _linger(self) -> None:
        """Say that nothing follows, and drop what still comes until the client has closed too.

        A socket that is closed while input lies in it unread is reset, and then the client may
        lose answers that had left before, the one that says why it is closed among them.
        """
        self._is_closed = True
        if self._transport.can_write_eof():
            # Soon and not now: the session may be in the middle of what called this.
            self._lingering = asyncio.get_running_loop().call_soon(self._part)
        else:
            self._transport.close()

    def _part(self) -> None:
        """Give back what the client held, and only then let it see the end."""
        self._let_go()
        try:
            self._transport.write_eof()
        except OSError:  # the client has gone already
            self._transport.abort()
            return
        self._server.parting.add(self)
        self._lingering = asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()

    def _let_go(self) -> None:
        session = self._session
        if session is not None:
            self._session = None
            self._server.sessions.pop(session.number, None)
            self._server.clock.refresh()
            session.lost(by_server=self._is_closed)

    def _send(self, parts: Buffers) -> None:
        if memoryview in map(type, parts):
            self._server.output_bytes += sum(map(len, parts))
            self._transport.writelines(_gathered(parts))
        else:
            data = b"".join(parts)
            self._server.output_bytes += len(data)
            self._transport.write(data)


def _gathered(parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """Join neighbouring small parts, so that the write has few; pages go as they are."""
    gathered: list[bytes | memoryview] = []
    small: list[bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            small.append(part)
            continue
        gathered += (b"".join(small), part)
        small.clear()
    return [*gathered, b"".join(small)]


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


async def accept(server: "Server", listener: socket.socket, backlog: int) -> Callable[[], None]:
    """Serve every client of a listening socket; return what stops that."""
    loop = asyncio.get_running_loop()
    listen = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
    accepting = await listen(lambda: Connection(server), sock=listener, backlog=backlog)
    return accepting.close


def calling_from_threads() -> Callable[[Callable[[], None]], None]:
    """Return what has any thread call a function in this event loop, soon.

    It raises RuntimeError once the loop is closed.
    """
    loop = asyncio.get_running_loop()
    here = contextvars.copy_context()  # that of a thread does not say that there is a loop

    def call(work: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(work, context=here)

    return call
