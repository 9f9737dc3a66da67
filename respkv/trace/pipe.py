"""Sockets that a proxy reads and writes itself, with nothing collected in between.

A stream of anyio on asyncio has a queue in front of its reader, and an accepted one reads into it from the
start, as fast as a client sends. A proxy whose server is slow would then hold all that the client has.
Here the kernel's buffers are the only ones: what is not asked for is not read.
"""

import errno
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from respkv.client.url import Settings
from respkv.errors import ConfigError

BACKLOG = 1024
_IN_PROGRESS = (errno.EINPROGRESS, errno.EWOULDBLOCK)


class Pipe:
    """One connection. All its sockets are non-blocking; it is closed by ``close`` alone."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock

    async def receive(self, nbytes: int) -> bytes:
        """Return what has come, up to ``nbytes``; nothing once the peer has ended or gone.

        Cancelled: nothing was read.
        """
        while True:
            try:
                data = self._sock.recv(nbytes)
            except BlockingIOError:
                await anyio.wait_readable(self._sock)
            except OSError:
                return b""
            else:
                await anyio.lowlevel.checkpoint_if_cancelled()
                return data

    async def send(self, data: bytes) -> bool:
        """Send all of it; False when the peer has gone.

        Cancelled: some of it may have been sent.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._sock)
            except OSError:
                return False
        return True

    def end(self) -> None:
        """Say that nothing more will be sent."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the peer has gone

    def close(self) -> None:
        """Close it. Nobody may be waiting for it then."""
        self._sock.close()


async def connect(target: Settings) -> Pipe:
    """Open a connection to a server. Raises OSError."""
    if target.path:
        return await _connect(socket.AF_UNIX, target.path)
    found = await anyio.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    failure = OSError(f"{target.host} has no address")
    for family, _, _, _, address in found:
        try:
            return await _connect(family, address)
        except OSError as error:
            failure = error
    raise failure


async def _connect(family: int, address: object) -> Pipe:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        pipe = Pipe(sock)
        code = sock.connect_ex(address)  # type: ignore[arg-type]
        if code in _IN_PROGRESS and family != socket.AF_UNIX:
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, errno.errorcode.get(code, "cannot connect"))
    except BaseException:
        sock.close()
        raise
    return pipe


@asynccontextmanager
async def listen(at: Settings) -> AsyncGenerator[tuple[socket.socket, str]]:
    """Listen for clients; yields the socket and where it is. Port 0 takes any free one.

    Raises ConfigError when nobody can listen there.
    """
    where = at.address if at.path else f"respkv://{at.address}"
    try:
        if at.path:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(at.path)
            listener.listen(BACKLOG)
        else:
            found = await anyio.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)
            family, address = found[0][0], found[0][4]
            listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {where}: {error}") from error
    with listener:
        listener.setblocking(False)
        if at.path:
            try:
                yield listener, where
            finally:
                _forget(at.path)
        else:
            yield listener, f"respkv://{at.host}:{listener.getsockname()[1]}"


async def accept(
    listener: socket.socket, serve: Callable[[Pipe], Coroutine[Any, Any, None]]
) -> None:
    """Serve each client in a task of its own until cancelled."""
    async with anyio.create_task_group() as group:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(listener)
            except OSError:
                await anyio.sleep(0.1)  # it has gone again, or there are too many
            else:
                group.start_soon(serve, Pipe(sock))


def _forget(path: str) -> None:
    Path(path).unlink(missing_ok=True)
