"""Listening to channels: a connection of its own, over which messages come one by one.

It is no connection of the pool, as it is out of step for good, and it speaks RESP2, in which every
message is an array like any other. When it breaks, that is told (ConnectionLost) and not mended:
messages may have been missed, and what that means only the caller knows.

Written once, as operations; ``run`` is how a face drives one, so ``Listening`` here serves the
blocking face and ``AsyncListening`` the asynchronous one.
"""

import json
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, NamedTuple, Self, TypeVar

from respkv.client.commands import Key, unexpected
from respkv.client.connection import Connection, open_connection
from respkv.client.effects import Operation
from respkv.client.replies import Reply
from respkv.client.requests import Arg, request
from respkv.client.url import Settings
from respkv.errors import ProtocolError, ServerError, TimedOut

T = TypeVar("T")

EVENTS = "kv:events:"
_CONFIRMATIONS = (b"subscribe", b"psubscribe")


class Message(NamedTuple):
    """What somebody sent to a channel. pattern: through which it was heard, or None."""

    channel: bytes
    data: bytes
    pattern: bytes | None


class PageEvent(NamedTuple):
    """What became of a page: see docs/events.md.

    kind:      stored, removed, demoted, promoted; cleared is about all pages of the namespace.
    sequence:  its number in its namespace.
    missed:    events of the namespace may have been missed before this one.
    key:       of the page; part: page, tail, or by which name it hangs on a page.
    tokens, depth: that the page holds, and that are in front of it. parent: key of the page there.
    tier:      where it is, or was last; reason: why it was stored or removed.
    """

    namespace: bytes
    kind: str
    sequence: int
    missed: bool
    key: bytes = b""
    part: str = ""
    tokens: int = 0
    depth: int = 0
    parent: bytes | None = None
    tier: str = ""
    reason: str = ""
    nbytes: int = 0


class EventReader:
    """Reads messages of event channels, and notices what is missing between them."""

    def __init__(self) -> None:
        self._last: dict[bytes, int] = {}

    def read(self, message: Message) -> PageEvent:
        """Return the event of a message. Raises ProtocolError when it is none."""
        namespace = message.channel.removeprefix(EVENTS.encode())
        try:
            fields = json.loads(message.data)
            kind, number = fields["event"], int(fields["seq"])
            parent = fields.get("parent")
            missed = number != self._last.get(namespace, number - 1) + 1
            event = PageEvent(
                *(namespace, kind, number, missed),
                key=_key(fields.get("key", "")),
                part=fields.get("part", ""),
                tokens=fields.get("tokens", 0),
                depth=fields.get("depth", 0),
                parent=None if parent is None else _key(parent),
                tier=fields.get("tier", ""),
                reason=fields.get("reason", ""),
                nbytes=fields.get("bytes", 0),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProtocolError(f"{message.channel!r} brought what is no event") from error
        self._last[namespace] = number
        return event


class Ear(Generic[T]):
    """The operations of listening.

    read: makes what a caller gets of a message.
    """

    def __init__(
        self,
        settings: Settings,
        channels: Sequence[Key],
        patterns: Sequence[Key],
        read: Callable[[Message], T],
    ) -> None:
        if not channels and not patterns:
            raise ValueError("at least one channel or pattern is needed")
        self._settings = replace(settings, protocol=2)
        self._wanted: list[tuple[str, Sequence[Key]]] = [
            (word, names)
            for word, names in (("SUBSCRIBE", channels), ("PSUBSCRIBE", patterns))
            if names
        ]
        self._read = read
        self._early: deque[Message] = deque()
        self._conn: Connection | None = None

    def begin(self) -> Operation[None]:
        """Connect and subscribe; what is said from then on will be heard.

        Raises ServerError, ConnectionLost, TimedOut.
        Cancelled: nothing stays open.
        """
        assert self._conn is None, "listening begins once"
        deadline = time.monotonic() + self._settings.timeout_s
        conn = yield from open_connection(self._settings, 0, deadline)
        try:
            for word, names in self._wanted:
                args: list[Arg] = [word, *names]
                yield from conn.say(request([args]), deadline)
                for _ in names:
                    yield from self._confirm(conn, deadline)
        except BaseException:
            conn.close()
            raise
        self._conn = conn

    def _confirm(self, conn: Connection, deadline: float) -> Operation[None]:
        """Read a confirmation; a message may come before it, of what is listened to already."""
        while (message := _message(reply := (yield from conn.hear(deadline)))) is not None:
            self._early.append(message)
        if not isinstance(reply, list) or reply[0] not in _CONFIRMATIONS:
            raise unexpected("a confirmation", reply)

    def next(self, timeout_s: float | None) -> Operation[T | None]:
        """Return what comes next, or None when nothing has come in time.

        Raises ConnectionLost: what was said meanwhile is lost.
        Cancelled: nothing is lost.
        """
        assert self._conn is not None, "listening has not begun, or has ended"
        if self._early:
            return self._read(self._early.popleft())
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                reply = yield from self._conn.hear(deadline)
            except TimedOut:
                return None
            message = _message(reply)
            if message is not None:
                return self._read(message)

    def end(self) -> None:
        """Close the connection."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()

    def __del__(self) -> None:
        # For who listens without ``with`` and forgets it: an engine in this process has no socket
        # that the collector would close, and would keep what it has to tell for good.
        if getattr(self, "_conn", None) is not None:
            self.end()


class Listening(Generic[T]):
    """Messages as they come: ``with client.listen(...) as messages``, then iterate.

    Iterating waits for ever and raises ConnectionLost when the connection breaks.
    """

    def __init__(self, ear: Ear[T], run: Callable[[Operation[Any]], Any]) -> None:
        self._ear = ear
        self._run = run

    def next(self, timeout_s: float | None = None) -> T | None:
        """Return what comes next, or None when nothing has come within ``timeout_s``."""
        found: T | None = self._run(self._ear.next(timeout_s))
        return found

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        found = self.next()
        assert found is not None
        return found

    def __enter__(self) -> Self:
        self._run(self._ear.begin())
        return self

    def __exit__(self, *_: object) -> None:
        self._ear.end()


class AsyncListening(Generic[T]):
    """Messages as they come: ``async with client.listen(...) as messages``, then iterate.

    Cancelled: no message is lost; the next call goes on.
    """

    def __init__(self, ear: Ear[T], run: Callable[[Operation[Any]], Awaitable[Any]]) -> None:
        self._ear = ear
        self._run = run

    async def next(self, timeout_s: float | None = None) -> T | None:
        """Return what comes next, or None when nothing has come within ``timeout_s``."""
        found: T | None = await self._run(self._ear.next(timeout_s))
        return found

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        found = await self.next()
        assert found is not None
        return found

    async def __aenter__(self) -> Self:
        await self._run(self._ear.begin())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ear.end()


def listen_to(settings: Settings, channels: Sequence[Key], patterns: Sequence[Key]) -> Ear[Message]:
    """Return the ear for the messages of channels, and of all channels that patterns cover."""
    return Ear(settings, channels, patterns, lambda message: message)


def listen_to_events(settings: Settings, namespaces: Sequence[Key]) -> Ear[PageEvent]:
    """Return the ear for what becomes of the pages of namespaces; without one, of all of them."""
    names = [name.encode() if isinstance(name, str) else name for name in namespaces]
    channels = [EVENTS.encode() + name for name in names]
    return Ear(settings, channels, [] if names else [EVENTS + "*"], EventReader().read)


def _message(reply: Reply) -> Message | None:
    """Return a message, None for what else a subscriber is told."""
    match reply:
        case [b"message", channel, data]:
            return Message(_bytes(channel), _bytes(data), None)
        case [b"pmessage", pattern, channel, data]:
            return Message(_bytes(channel), _bytes(data), _bytes(pattern))
        case [bytes(), *_]:
            return None
        case ServerError():
            raise reply
        case _:
            raise unexpected("a message", reply)


def _bytes(reply: Reply) -> bytes:
    if not isinstance(reply, bytes | memoryview):
        raise unexpected("bytes", reply)
    return bytes(reply)


def _key(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
