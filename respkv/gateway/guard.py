"""The layer of ASGI around all routes: who may ask, how much is read, what is logged and counted.

A body is read here, whole and within limits of size and time, before any route sees the request: so
memory is bounded by one number for all connections (``bodies_bytes``), and a client that sends a
byte now and then holds a connection and nothing else. Tokens, prompts and answers are never logged.
"""

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from respkv.gateway.failures import Refused, unavailable
from respkv.gateway.origins import Origins
from respkv.gateway.state import Gateway
from respkv.gateway.streaming import CLIENT_GONE

OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # a probe has no token
WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_METHODS = WITH_BODY | {"GET", "HEAD", "DELETE", "OPTIONS"}
REQUEST_ID = b"x-request-id"
# A body that is too long is read for so long, so that its sender sees the answer, not a reset.
LINGER_S = 1.0

logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """The connection was lost before the request was there."""


class Guard:
    """Wraps the routes of a gateway."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway
        self._room = _Room(gateway.settings.bodies_bytes)
        self._origins = Origins(gateway.settings)
        token = gateway.settings.token
        self._digest = None if token is None else _digest(token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, start = self._gateway.metrics, time.perf_counter()
        number = secrets.token_hex(8)
        state = {"request_id": number, "started": start, "wall": time.time()}
        scope["state"] = {**scope.get("state", {}), **state}
        if scope["method"] == "HEAD":  # the server leaves out the body
            scope = {**scope, "method": "GET"}
        status = CLIENT_GONE

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(REQUEST_ID, number.encode()), *self._origins.headers(scope)]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        metrics.in_flight.inc()
        try:
            await self._serve(scope, receive, send_noted)
        finally:
            metrics.in_flight.dec()
            took = time.perf_counter() - start
            route = getattr(scope.get("route"), "path_format", "none")
            metrics.answered(_method(scope), route, status, took)
            level = logging.DEBUG if route in OPEN_PATHS else logging.INFO
            logger.log(
                level, "%s %s %s %.1f ms %s", _method(scope), route, status, took * 1e3, number
            )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        share = _Share(self._room)
        scope["state"]["let_go"] = share.let_go
        try:
            try:
                if self._origins.is_preflight(scope):
                    await Response(status_code=204)(scope, receive, send)
                    return
                if scope["path"] not in OPEN_PATHS:
                    self._origins.check(scope)
                    self._check_token(scope)
                if scope["method"] in WITH_BODY:
                    receive = _replay(await self._read(scope, receive, share), receive)
            except Refused as failure:
                await failure.response()(scope, receive, send)
                return
            except ClientGone:
                return
            await self._app(scope, receive, send)
        finally:
            share.let_go()

    def _check_token(self, scope: Scope) -> None:
        """Raise Refused without the right token. How long it takes tells nothing of the token."""
        if self._digest is None:
            return
        given = _header(scope, b"authorization") or b""
        scheme, _, token = given.partition(b" ")
        # Digests have one length, so the comparison takes the same time for every token.
        is_right = hmac.compare_digest(_digest(token.strip()), self._digest)
        if scheme.lower() != b"bearer" or not is_right:
            raise Refused(
                401,
                "unauthorized",
                "a valid token is needed: Authorization: Bearer TOKEN",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive, share: "_Share") -> bytes:
        """Read the body; its bytes are counted in the share.

        Raises Refused when it is too long, too slow or too much beside the others; ClientGone.
        """
        settings = self._gateway.settings
        length = _length(scope)
        if length is not None and length > settings.max_body_bytes:
            if _header(scope, b"expect") is None:
                await _linger(receive)
            raise self._too_long()
        body = bytearray()  # not a list: a client may send it byte by byte
        with anyio.move_on_after(settings.body_timeout_s):
            async for chunk in _chunks(receive):
                if not share.take(len(chunk)):
                    raise self._no_room()
                body += chunk
                if len(body) > settings.max_body_bytes:
                    share.let_go()
                    body.clear()
                    await _linger(receive)
                    raise self._too_long()
            return bytes(body)
        message = f"the body did not come within {settings.body_timeout_s:g} s"
        raise Refused(408, "too_slow", message, headers={"connection": "close"})

    def _no_room(self) -> Refused:
        message = "other requests take all the memory that there is for them; try again"
        failure = unavailable("busy", message, self._gateway.settings.retry_after_s)
        failure.headers["connection"] = "close"
        return failure

    def _too_long(self) -> Refused:
        most = self._gateway.settings.max_body_bytes
        message = f"the body is longer than the {most} bytes allowed"
        return Refused(413, "body_too_long", message, headers={"connection": "close"})


@dataclass(slots=True)
class _Room:
    """The memory for the bodies of all requests."""

    limit: int
    used: int = 0


class _Share:
    """What one request has of it, from its body's first byte until nothing of the body is left."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._taken = 0

    def take(self, num_bytes: int) -> bool:
        """Take so much more, if there is as much."""
        if self._room.used + num_bytes > self._room.limit:
            return False
        self._room.used += num_bytes
        self._taken += num_bytes
        return True

    def let_go(self) -> None:
        """Give all of it back; idempotent."""
        self._room.used -= self._taken
        self._taken = 0


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    """Yield a body as it comes. Raises ClientGone."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]


async def _linger(receive: Receive) -> None:
    """Take in what still comes of a body, for a moment, and drop it."""
    with anyio.move_on_after(LINGER_S):
        async for _ in _chunks(receive):
            pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that tells the body, and then whatever the connection tells."""
    left = [body]  # who is told it is then the only one to have it

    async def replayed() -> Message:
        if not left:
            return await receive()
        return {"type": "http.request", "body": left.pop(), "more_body": False}

    return replayed


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _length(scope: Scope) -> int | None:
    text = _header(scope, b"content-length")
    return int(text) if text is not None and text.isdigit() else None


def _method(scope: Scope) -> str:
    """Return the method as a label of metrics: a client may send any word."""
    method = str(scope["method"])
    return method if method in _METHODS else "OTHER"


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
