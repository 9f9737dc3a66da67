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

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from respkv.gateway.failures import Refused, unavailable
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
        self._bodies_bytes = 0
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
        status = CLIENT_GONE

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (REQUEST_ID, number.encode())]
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
        body = b""
        try:
            try:
                self._check_token(scope)
                if scope["method"] in WITH_BODY:
                    body = await self._read(scope, receive)
            except Refused as failure:
                await failure.response()(scope, receive, send)
                return
            except ClientGone:
                return
            await self._app(scope, _replay(body, receive), send)
        finally:
            self._bodies_bytes -= len(body)

    def _check_token(self, scope: Scope) -> None:
        """Raise Refused without the right token. How long it takes tells nothing of the token."""
        if self._digest is None or scope["path"] in OPEN_PATHS:
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

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body; its bytes are counted until the caller counts them off.

        Raises Refused when it is too long, too slow or too much beside the others; ClientGone.
        """
        settings = self._gateway.settings
        length = _length(scope)
        if length is not None and length > settings.max_body_bytes:
            if _header(scope, b"expect") is None:
                await _linger(receive)
            raise self._too_long()
        chunks: list[bytes] = []
        num_bytes = 0
        is_whole = False
        try:
            with anyio.move_on_after(settings.body_timeout_s):
                async for chunk in _chunks(receive):
                    self._check_room(len(chunk))
                    self._bodies_bytes += len(chunk)
                    num_bytes += len(chunk)
                    chunks.append(chunk)
                    if num_bytes > settings.max_body_bytes:
                        await _linger(receive)
                        raise self._too_long()
                is_whole = True
            if not is_whole:
                message = f"the body did not come within {settings.body_timeout_s:g} s"
                raise Refused(408, "too_slow", message, headers={"connection": "close"})
        finally:
            if not is_whole:
                self._bodies_bytes -= num_bytes
        return b"".join(chunks)

    def _check_room(self, num_bytes: int) -> None:
        settings = self._gateway.settings
        if self._bodies_bytes + num_bytes > settings.bodies_bytes:
            message = "other requests take all the memory that there is for them; try again"
            failure = unavailable("busy", message, settings.retry_after_s)
            failure.headers["connection"] = "close"
            raise failure

    def _too_long(self) -> Refused:
        most = self._gateway.settings.max_body_bytes
        message = f"the body is longer than the {most} bytes allowed"
        return Refused(413, "body_too_long", message, headers={"connection": "close"})


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
    is_told = False

    async def replayed() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

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
