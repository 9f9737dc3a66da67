"""A connected stream that never blocks: what can be sent or received now, and what to wait for if not.

``send`` and ``receive`` return a count, or the Event without which they cannot go on. A refused or
broken connection is an OSError, that of the socket; EOF is a count of 0.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from respkv.client.effects import Effect, Event, Operation, Resolve, Wait
from respkv.client.requests import Chunk
from respkv.client.url import Settings
from respkv.errors import ConnectionLost, TimedOut

IOV_MAX = 1024


class Stream(ABC):
    """What a connection sends and receives by."""

    @abstractmethod
    def send(self, chunks: Sequence[Chunk]) -> int | Event:
        """Send the first of these bytes, gathered from where they are."""

    @abstractmethod
    def receive(self, into: memoryview) -> int | Event:
        """Receive at least one byte into ``into``."""

    @abstractmethod
    def wait_for(self, events: Event, deadline: float) -> Effect:
        """Return what to wait for until any of the events may have come."""

    @abstractmethod
    def is_quiet(self) -> bool:
        """Say whether nothing waits to be received: on an idle connection that would be its end."""

    @abstractmethod
    def close(self) -> None:
        """Close it here; in a forked child the parent's stays open."""


class SocketStream(Stream):
    """A plain socket, TCP or Unix."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, chunks: Sequence[Chunk]) -> int | Event:
        """Send the first of these bytes, gathered from where they are."""
        try:
            return self.sock.sendmsg(chunks)
        except BlockingIOError:
            return Event.WRITE

    def receive(self, into: memoryview) -> int | Event:
        """Receive at least one byte into ``into``."""
        try:
            return self.sock.recv_into(into)
        except BlockingIOError:
            return Event.READ

    def wait_for(self, events: Event, deadline: float) -> Effect:
        """Return that the socket is waited for."""
        return Wait(self.sock, events, deadline)

    def is_quiet(self) -> bool:
        """Say whether nothing waits to be received: on an idle connection that would be its end."""
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return not poller.poll(0)

    def close(self) -> None:
        """Close the socket here; in a forked child the parent's stays open."""
        self.sock.close()


def open_stream(settings: Settings, deadline: float) -> Operation[Stream]:
    """Connect to the first of the server's addresses that answers.

    Raises ConnectionLost or TimedOut.
    Cancelled: nothing stays open.
    """
    if settings.dial is not None:
        return settings.dial()
    addresses: list[tuple[int, Any]] = [(socket.AF_UNIX, settings.path)]
    if not settings.path:
        try:
            found = yield Resolve(settings.host, settings.port, deadline)
        except OSError as error:
            raise ConnectionLost(f"cannot find {settings.host}: {error}") from error
        if found is None:
            raise TimedOut(f"the address of {settings.host} was not found in time")
        addresses = [(info[0], info[4]) for info in found]
    failure: OSError | None = None
    for index, (family, address) in enumerate(addresses):
        # An address that swallows packets must leave time for those after it.
        now = time.monotonic()
        limit = now + (deadline - now) / (len(addresses) - index)
        try:
            sock = yield from _connect(family, address, limit)
        except OSError as error:
            failure = error
            continue
        return (yield from _wrap(sock, settings, deadline))
    if isinstance(failure, TimeoutError):
        raise TimedOut(f"{settings.address} did not accept a connection in time")
    advice = ""
    if isinstance(failure, ConnectionRefusedError | FileNotFoundError):
        advice = "; no server listens there: start one with `respkv serve`, or name another URL"
    raise ConnectionLost(f"cannot connect to {settings.address}: {failure}{advice}") from failure


def _connect(family: int, address: Any, deadline: float) -> Operation[socket.socket]:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            if not (yield Wait(sock, Event.WRITE, deadline)):
                raise TimeoutError(errno.ETIMEDOUT, "no answer")
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _wrap(sock: socket.socket, settings: Settings, deadline: float) -> Operation[Stream]:
    if settings.tls is None:
        return SocketStream(sock)
    from respkv.client.tls import wrap  # imports ssl

    return (yield from wrap(sock, settings, settings.tls, deadline))
