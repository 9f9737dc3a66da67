"""TLS over a non-blocking socket. Imported only when a connection uses TLS: ``ssl`` is slow to load.

There is no gathered write, so chunks go one by one; and either direction may have to wait for the
other, as TLS has messages of its own.
"""

import socket
import ssl
from collections.abc import Sequence

from respkv.client.effects import Event, Operation, Wait
from respkv.client.requests import Chunk
from respkv.client.stream import SocketStream, Stream
from respkv.client.url import Settings
from respkv.errors import ConfigError, ConnectionLost, TimedOut


class TlsStream(SocketStream):
    """A socket wrapped in TLS."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._tls = sock

    def send(self, chunks: Sequence[Chunk]) -> int | Event:
        """Send from the first chunk. After an Event the same chunk must come again."""
        try:
            return self._tls.send(chunks[0])
        except ssl.SSLWantWriteError:
            return Event.WRITE
        except ssl.SSLWantReadError:
            return Event.READ

    def receive(self, into: memoryview) -> int | Event:
        """Receive at least one byte into ``into``."""
        try:
            return self._tls.recv_into(into)
        except ssl.SSLWantReadError:
            return Event.READ
        except ssl.SSLWantWriteError:
            return Event.WRITE

    def is_quiet(self) -> bool:
        """Say whether nothing waits to be received, decrypted or not."""
        return not self._tls.pending() and super().is_quiet()


def wrap(
    sock: socket.socket, settings: Settings, context: ssl.SSLContext, deadline: float
) -> Operation[Stream]:
    """Shake hands over a connected socket, which is closed if that fails.

    Raises ConfigError when the server's certificate is not trusted, ConnectionLost or TimedOut.
    """
    tls = sock
    try:
        tls = context.wrap_socket(
            sock, server_hostname=settings.host or None, do_handshake_on_connect=False
        )
        while (event := _shake(tls)) is not None:
            if not (yield Wait(tls, event, deadline)):
                raise TimedOut(f"no TLS with {settings.address} in time")
    except ssl.SSLCertVerificationError as error:
        tls.close()
        raise ConfigError(f"{settings.address} is not trusted: {error.verify_message}") from error
    except (OSError, ValueError) as error:
        tls.close()
        raise ConnectionLost(f"no TLS with {settings.address}: {error}") from error
    except BaseException:
        tls.close()
        raise
    return TlsStream(tls)


def _shake(tls: ssl.SSLSocket) -> Event | None:
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return Event.READ
    except ssl.SSLWantWriteError:
        return Event.WRITE
    return None
