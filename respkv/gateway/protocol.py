"""One connection: uvicorn's, with limits of time on what it leaves to the client.

uvicorn waits for ever for a request's head and for a reader. A client that sends a head byte by byte,
or takes no answer, would keep its connection, and with enough of them nobody else gets one. So:

    head      from a connection's first byte, or from the first byte of a next head, to the head's
              end: head_timeout_s; also the rest of a body whose request is answered already
    answer    from when 64 KiB wait for the client until it has taken most of them: read_timeout_s
    number    requests on connections beyond max_connections are refused; beyond twice as many,
              connections are dropped

Bodies are limited by guard.py, idle connections by uvicorn's keep-alive, and what is left in the
kernel of an answer that nobody takes by TCP_USER_TIMEOUT, which serve.py sets.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from respkv.gateway.failures import Refused, unavailable
from respkv.gateway.settings import GatewaySettings


def protocol_of(limits: GatewaySettings) -> type[H11Protocol]:
    """Return the class of connections with these limits, as uvicorn wants it."""

    class Limited(Connection):
        settings = limits

    return Limited


class _Deadline:
    """Does something unless it is ended in time; begun again while it runs, it goes on as it was."""

    def __init__(self) -> None:
        self._timer: Any = None  # of the event loop's

    def begin(self, loop: Any, wait_s: float, late: Callable[[], None]) -> None:
        if self._timer is None:
            self._timer = loop.call_later(wait_s, late)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Connection(H11Protocol):
    """A client's connection; see the module."""

    settings: ClassVar[GatewaySettings]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = _Deadline()
        self._answer = _Deadline()

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        most = self.settings.max_connections
        if len(self.connections) > 2 * most:
            transport.abort()
            return
        if len(self.connections) > most:
            self.app = self._refuse
        self._head.begin(self.loop, self.settings.head_timeout_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; a head that has begun has to end in time."""
        super().data_received(data)
        is_in_head = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        is_left_over = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if not (is_in_head or is_left_over):
            self._head.end()
        else:
            self._head.begin(self.loop, self.settings.head_timeout_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer is under way or out; then there is no more to say."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        failure = Refused(400, "invalid_http", "this is not HTTP as the gateway understands it")
        answer = failure.response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def pause_writing(self) -> None:
        """Wait for the client to take what there is for it, but not for ever."""
        super().pause_writing()
        self._answer.begin(self.loop, self.settings.read_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it has taken enough."""
        super().resume_writing()
        self._answer.end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._head.end()
        self._answer.end()
        super().connection_lost(exc)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"there are {self.settings.max_connections} connections already"
        failure = unavailable("busy", message, self.settings.retry_after_s)
        failure.headers["connection"] = "close"
        await failure.response()(scope, receive, send)
