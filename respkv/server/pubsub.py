"""Channels and who listens to them.

A message is written once for each protocol and put into the queue of every listener; a task of its
own lets the queues leave, all that one turn of the loop has brought with one write. So who publishes
never waits for a socket. A listener whose queue grows over ``pubsub-output-limit`` is disconnected
and counted: to drop messages in silence would be a lie, and to wait would slow all others down.
Without listeners there is nothing: no task, and one look-up for a message.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from respkv.engine.supervisor import contain, guard
from respkv.errors import Busy
from respkv.wire import reply
from respkv.wire.glob import Glob, compile_glob

if TYPE_CHECKING:
    from respkv.server.session import Session
    from respkv.server.state import Server

logger = logging.getLogger(__name__)

SUBSCRIPTIONS_MAX = 1 << 20  # of all connections together
SUBSCRIPTION_BYTES_MAX = 256 << 20  # of their names, as _cost counts them
SESSIONS_PER_STEP = 64  # are written to before others have a turn


class Subscriptions:
    """What one connection listens to, in the order in which it said so."""

    __slots__ = ("channels", "patterns")

    def __init__(self) -> None:
        self.channels: dict[bytes, None] = {}
        self.patterns: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self.channels) + len(self.patterns)


class Pattern:
    """A pattern and who listens to the channels that it covers."""

    __slots__ = ("glob", "listeners")

    def __init__(self, pattern: bytes) -> None:
        self.glob: Glob = compile_glob(pattern)
        self.listeners: dict[Session, None] = {}


class PubSub:
    """The channels of a server.

    on_change: called when a channel or a pattern got its first listener or lost its last one, with
               it and whether it is a pattern.
    """

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._channels: dict[bytes, dict[Session, None]] = {}
        self._patterns: dict[bytes, Pattern] = {}
        self._num = self._nbytes = 0  # of all subscriptions
        self._waiting: dict[Session, None] = {}  # have pushes that nobody has looked at
        self._news: anyio.Event | None = None
        self._is_running = False
        self.on_change: Callable[[bytes, bool], None] = lambda name, is_pattern: None

    @property
    def num_channels(self) -> int:
        """How many channels have a listener of their own."""
        return len(self._channels)

    @property
    def num_patterns(self) -> int:
        """How many different patterns are listened to."""
        return len(self._patterns)

    def channels(self) -> Iterator[bytes]:
        """Yield the channels that have a listener of their own."""
        return iter(self._channels)

    def num_listeners(self, channel: bytes) -> int:
        """Return how many connections listen to just this channel, patterns aside."""
        return len(self._channels.get(channel, ()))

    def has_pattern(self, pattern: bytes) -> bool:
        """Whether anybody listens to a pattern."""
        return pattern in self._patterns

    def is_heard(self, channel: bytes) -> bool:
        """Whether anybody would get a message of this channel."""
        if channel in self._channels:
            return True
        return any(each.glob.match(channel) for each in self._patterns.values())

    # -- who listens --------------------------------------------------------------------------

    def subscribe(self, session: "Session", channel: bytes) -> None:
        """Let a connection listen to a channel. Raises Busy when there are too many listeners."""
        own = session.subscriptions
        if own is not None and channel in own.channels:
            return
        self._count(_cost(channel))
        _subscriptions(session).channels[channel] = None
        listeners = self._channels.get(channel)
        if listeners is None:
            self._channels[channel] = {session: None}
            self.on_change(channel, False)
        else:
            listeners[session] = None

    def subscribe_pattern(self, session: "Session", pattern: bytes) -> None:
        """Let a connection listen to all channels of a pattern. Raises Busy, CommandError."""
        own = session.subscriptions
        if own is not None and pattern in own.patterns:
            return
        known = self._patterns.get(pattern) or Pattern(pattern)
        self._count(_cost(pattern, is_pattern=True))
        _subscriptions(session).patterns[pattern] = None
        known.listeners[session] = None
        if pattern not in self._patterns:
            self._patterns[pattern] = known
            self.on_change(pattern, True)

    def unsubscribe(self, session: "Session", channel: bytes) -> None:
        """Let a connection listen to a channel no more, if it did."""
        own = session.subscriptions
        if own is None or channel not in own.channels:
            return
        del own.channels[channel]
        self._num -= 1
        self._nbytes -= _cost(channel)
        listeners = self._channels[channel]
        del listeners[session]
        if not listeners:
            del self._channels[channel]
            self.on_change(channel, False)
        _settle(session)

    def unsubscribe_pattern(self, session: "Session", pattern: bytes) -> None:
        """Let a connection listen to a pattern no more, if it did."""
        own = session.subscriptions
        if own is None or pattern not in own.patterns:
            return
        del own.patterns[pattern]
        self._num -= 1
        self._nbytes -= _cost(pattern, is_pattern=True)
        known = self._patterns[pattern]
        del known.listeners[session]
        if not known.listeners:
            del self._patterns[pattern]
            self.on_change(pattern, True)
        _settle(session)

    def leave(self, session: "Session") -> None:
        """Let a connection listen to nothing more, and forget what it was to be told."""
        own = session.subscriptions
        if own is not None:
            for channel in list(own.channels):
                self.unsubscribe(session, channel)
            for pattern in list(own.patterns):
                self.unsubscribe_pattern(session, pattern)
        session.drop_pushes()
        self._waiting.pop(session, None)

    def _count(self, nbytes: int) -> None:
        if self._num >= SUBSCRIPTIONS_MAX or self._nbytes + nbytes > SUBSCRIPTION_BYTES_MAX:
            raise Busy(
                f"all connections together listen to {self._num} channels and patterns, whose"
                f" names take {self._nbytes} bytes, and this one would be more than the most;"
                " unsubscribe from some"
            )
        self._num += 1
        self._nbytes += nbytes
        if not self._is_running:
            self._is_running = True
            self._server.spawn(contain, self._run, self._crashed)

    # -- messages -----------------------------------------------------------------------------

    def publish(self, channel: bytes, message: bytes) -> int:
        """Tell all who listen to a channel; return how many times it was told."""
        count = 0
        listeners = self._channels.get(channel)
        if listeners is not None:
            count = self._tell(listeners, (b"message", channel, message))
        for pattern, known in self._patterns.items():
            if known.glob.match(channel):
                count += self._tell(known.listeners, (b"pmessage", pattern, channel, message))
        return count

    def _tell(self, listeners: dict["Session", None], words: Sequence[bytes]) -> int:
        """Queue one message for each listener; those whose queue is too long are cut off."""
        written: dict[int, bytes] = {}
        limit = self._server.config.pubsub_output_limit
        for session in listeners:
            data = written.get(session.protocol)
            if data is None:
                data = written[session.protocol] = push_of(words, session.protocol)
            if session.is_overrun:
                continue
            if session.push(data):
                self._wait(session)
            if session.push_bytes > limit:
                self._cut_off(session)
        return len(listeners)

    def _wait(self, session: "Session") -> None:
        self._waiting[session] = None
        if self._news is not None:
            self._news.set()

    def _cut_off(self, session: "Session") -> None:
        self._server.num_slow_subscribers += 1
        logger.info(
            "closing client %d: its messages wait, over pubsub-output-limit", session.number
        )
        session.is_overrun = True  # its end is told later, and it is in what is gone through now
        session.drop_pushes()
        session.wire.abort()

    async def _run(self) -> None:
        """Let what waits leave, until cancelled."""
        while True:
            self._news = anyio.Event()
            if not self._waiting:
                await self._news.wait()
            waiting, self._waiting = self._waiting, {}
            for number, session in enumerate(waiting, start=1):
                guard(session.deliver, session.wire.abort)
                if number % SESSIONS_PER_STEP == 0:
                    await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()

    def _crashed(self) -> None:
        """A bug: those who listen shall not believe that all is quiet."""
        self._is_running = False
        for session in list(self._server.sessions.values()):
            if session.subscriptions is not None:
                session.wire.abort()


def push_of(words: Sequence[bytes], protocol: int) -> bytes:
    """Write a push of bulk strings."""
    return reply.push_header(len(words), protocol) + b"".join(map(reply.bulk, words))


def _cost(name: bytes, *, is_pattern: bool = False) -> int:
    """Return what a subscription takes on the heap at most, a compiled pattern many times its length."""
    return 200 + len(name) * (40 if is_pattern else 1)


def _subscriptions(session: "Session") -> Subscriptions:
    if session.subscriptions is None:
        session.subscriptions = Subscriptions()
        session.choose_handlers()
    return session.subscriptions


def _settle(session: "Session") -> None:
    """Note that a connection that listens to nothing more is one like all others."""
    if not session.subscriptions:
        session.subscriptions = None
        session.choose_handlers()
