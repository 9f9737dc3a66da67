"""Events of pages as messages: what becomes of a namespace's pages goes to ``kv:events:<namespace>``.

The messages are written behind the command that caused them, some hundred at a time with a turn for
others in between. A message is one line of JSON; docs/events.md says what is in it.
"""

from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING

import anyio.lowlevel

from respkv.engine.events import Event, Listener
from respkv.engine.supervisor import contain

if TYPE_CHECKING:
    from respkv.server.state import Server

PREFIX = b"kv:events:"
EVENTS_PER_STEP = 250  # about a millisecond
PATTERNS_FREE = 64  # with more, each of which is held against each message, steps are shorter


class EventChannels:
    """Turns events into messages of pub/sub, for namespaces that somebody listens to."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._names: dict[bytes, None] = {}  # namespaces whose channels have listeners
        self._patterns: dict[bytes, None] = {}  # that may cover such channels
        self._is_sending = False
        self.listener = Listener(self._wants, lambda: self._names, self._wake)
        server.pubsub.on_change = self._changed
        server.events.add(self.listener)

    def _wants(self, namespace: bytes) -> bool:
        return self._server.pubsub.is_heard(PREFIX + namespace)

    def _changed(self, name: bytes, is_pattern: bool) -> None:
        """Note that a channel or pattern has its first listener, or none any more."""
        pubsub = self._server.pubsub
        if is_pattern:
            _keep(self._patterns, name, pubsub.has_pattern(name) and _may_cover(name))
        elif name.startswith(PREFIX):
            _keep(self._names, name[len(PREFIX) :], pubsub.num_listeners(name) > 0)
        else:
            return
        self.listener.is_on = bool(self._names or self._patterns)
        self._server.events.changed()

    def _wake(self) -> None:
        if not self._is_sending:
            self._is_sending = True
            self._server.spawn(contain, self._send_all, self._crashed)

    async def _send_all(self) -> None:
        """Send what waits, until nothing does."""
        pubsub = self._server.pubsub
        while self.listener.queue:
            count = EVENTS_PER_STEP // (1 + pubsub.num_patterns // PATTERNS_FREE)
            for event in self.listener.take(max(1, count)):
                pubsub.publish(PREFIX + event.namespace, message_of(event))
            await anyio.lowlevel.checkpoint()
        self._is_sending = False

    def _crashed(self) -> None:
        """A bug: what waited is missed, which its numbers say."""
        self.listener.queue.clear()
        self._is_sending = False


def _keep(names: dict[bytes, None], name: bytes, is_wanted: bool) -> None:
    if is_wanted:
        names[name] = None
    else:
        names.pop(name, None)


def _may_cover(pattern: bytes) -> bool:
    """Whether a pattern may cover the channel of a namespace: its plain beginning allows it."""
    plain = pattern
    for special in b"*?[\\":
        plain = plain.partition(bytes([special]))[0]
    common = min(len(plain), len(PREFIX))
    return plain[:common] == PREFIX[:common] and (plain != pattern or plain.startswith(PREFIX))


def message_of(event: Event) -> bytes:
    """Write an event as one line of JSON."""
    if event.kind == "cleared":
        return b'{"event":"cleared","seq":%d}' % event.sequence
    parent = _text(event.parent) if event.parent else "null"
    line = (
        f'{{"event":"{event.kind}","seq":{event.sequence},"key":{_text(event.key)},'
        f'"part":{quoted(event.part)},"tokens":{event.tokens},"depth":{event.depth},'
        f'"parent":{parent},"tier":"{event.tier}","reason":"{event.reason}",'
        f'"bytes":{event.nbytes}}}'
    )
    return line.encode("ascii")


def _text(key: bytes) -> str:
    """Write a key as a JSON string; a byte that is not UTF-8 becomes a lone surrogate, U+DCxx."""
    return quoted(key.decode("utf-8", "surrogateescape"))
