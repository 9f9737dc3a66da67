"""One connection: requests out, replies in, and the handshake.

``in_step`` is the invariant: true only when every reply asked for has been read to its last byte.
It goes false when an exchange starts and true when it has ended, so whatever ends an exchange
early (an error, a timeout, a cancellation) leaves a connection that the pool will close, and no
call can ever be given the answer to another.
"""

import time
from collections.abc import Sequence

from respkv import __version__
from respkv.client.arena import Arena
from respkv.client.effects import Event, Operation
from respkv.client.replies import NEED_DATA, Reply, ReplyParser
from respkv.client.requests import Chunk, Request, request
from respkv.client.stream import IOV_MAX, Stream, open_stream
from respkv.client.url import Settings
from respkv.errors import ConnectionLost, ProtocolError, ServerError, TimedOut

SEND_BYTES = 1 << 20


class Connection:
    """A stream with a parser.

    sent:  bytes of the current exchange have left, so the server may have acted on it.
    used:  it has served a call before this one.
    arena: the server's shared memory, once it was asked for.
    packs: leases can be answered packed.
    """

    def __init__(self, stream: Stream, settings: Settings, generation: int) -> None:
        self.in_step = True
        self.sent = False
        self.used = False
        self.generation = generation
        self.arena: Arena | None = None
        self.packs = False
        self._stream = stream
        self._settings = settings
        self._parser = ReplyParser()
        self._whole: list[Reply] | None = None  # of the reply that is taken item by item

    def is_alive(self) -> bool:
        """Say, without a round trip, whether an idle connection may be used."""
        return self.in_step and self._stream.is_quiet()

    def close(self) -> None:
        """Close the socket."""
        self.in_step = False
        self._stream.close()

    def exchange(self, request: Request, deadline: float) -> Operation[list[Reply]]:
        """Send a request and return its replies, server errors among them.

        Raises ConnectionLost, TimedOut or ProtocolError.
        Cancelled: ``in_step`` is false and stays so.
        """
        assert self.in_step, "an exchange on a connection that is out of step"
        self.in_step = self.sent = False
        self._parser.expect(request.targets)
        replies: list[Reply] = []
        try:
            yield from self._send(request, replies, deadline)
            while not self._take(replies, request.count):
                count = self._stream.receive(self._parser.get_buffer())
                if isinstance(count, Event):
                    yield from self._wait(count, deadline)
                else:
                    self._received(count)
        except OSError as error:
            raise ConnectionLost(f"{self._settings.address}: {error}") from error
        self.in_step = self._parser.is_idle and not request.parting
        return replies

    def begin(self, request: Request, deadline: float) -> Operation[None]:
        """Send one command whose reply is an array, to be taken item by item.

        Raises ConnectionLost or TimedOut. ``in_step`` is false until the last item has come.
        """
        assert self.in_step, "an exchange on a connection that is out of step"
        assert request.count == 1
        self.in_step = self.sent = False
        self._whole = None
        self._parser.expect(request.targets)
        try:
            yield from self._send(request, [], deadline)
        except OSError as error:
            raise ConnectionLost(f"{self._settings.address}: {error}") from error

    def take_item(self, number: int, deadline: float) -> Operation[Reply]:
        """Return an item of the reply that ``begin`` asked for; once, the connection forgets it.

        Raises ServerError when the reply is one, ConnectionLost, TimedOut, ProtocolError.
        """
        items = yield from self._items_until(number, deadline)
        item, items[number] = items[number], None
        return item

    def num_items(self) -> int:
        """Return how many items the reply has, once the first of them has come."""
        open_array = self._parser.open_array
        if self._whole is not None:
            return len(self._whole)
        return 0 if open_array is None else open_array[1]

    def _items_until(self, number: int, deadline: float) -> Operation[list[Reply]]:
        while self._whole is None:
            reply = self._parser.next_reply()
            if reply is not NEED_DATA:
                self.in_step = self._parser.is_idle
                if isinstance(reply, ServerError):
                    raise reply
                if not isinstance(reply, list):
                    raise ProtocolError(f"{self._settings.address} answered with no array")
                self._whole = reply
                break
            open_array = self._parser.open_array
            if open_array is not None and len(open_array[0]) > number:
                return open_array[0]
            try:
                count = self._stream.receive(self._parser.get_buffer())
            except OSError as error:
                raise ConnectionLost(f"{self._settings.address}: {error}") from error
            if isinstance(count, Event):
                yield from self._wait(count, deadline)
            else:
                self._received(count)
        return self._whole

    def say(self, request: Request, deadline: float) -> Operation[None]:
        """Send one command whose answers ``hear`` brings; no call can use the connection any more.

        Raises ConnectionLost or TimedOut.
        """
        assert request.count == 1
        self.in_step = False
        try:
            yield from self._send(request, [], deadline)
        except OSError as error:
            raise ConnectionLost(f"{self._settings.address}: {error}") from error

    def hear(self, deadline: float) -> Operation[Reply]:
        """Return what the server says next, be it an error.

        Raises TimedOut, after which it can be called again, ConnectionLost or ProtocolError.
        Cancelled: nothing is lost.
        """
        while (reply := self._parser.next_reply()) is NEED_DATA:
            try:
                count = self._stream.receive(self._parser.get_buffer())
            except OSError as error:
                raise ConnectionLost(f"{self._settings.address}: {error}") from error
            if isinstance(count, Event):
                yield from self._wait(count, deadline)
            else:
                self._received(count)
        return reply

    def _send(self, request: Request, replies: list[Reply], deadline: float) -> Operation[None]:
        chunks = list(request.chunks)
        first = 0
        while first < len(chunks):
            try:
                sent = self._stream.send(_some(chunks, first))
            except OSError:
                if request.count == 1:
                    self._last_words()
                raise
            if not isinstance(sent, Event):
                self.sent = True
                first = _advance(chunks, first, sent)
            elif request.count == 1:
                # The server answers nothing before it has the whole command.
                yield from self._wait(sent, deadline)
            else:
                # It may be waiting for us to read its replies before it reads on.
                count = self._stream.receive(self._parser.get_buffer())
                if isinstance(count, Event):
                    yield from self._wait(sent | count, deadline)
                else:
                    self._received(count)
                    self._take(replies, request.count)

    def _take(self, replies: list[Reply], count: int) -> bool:
        # Move whole replies out of the parser; true when all are there.
        while len(replies) < count:
            reply = self._parser.next_reply()
            if reply is NEED_DATA:
                return False
            replies.append(reply)
        # What else came with them can only be pushes.
        if not self._parser.is_idle and self._parser.next_reply() is not NEED_DATA:
            raise ProtocolError(f"{self._settings.address} sent a reply that nobody asked for")
        return True

    def _received(self, count: int) -> None:
        if count == 0:
            raise ConnectionLost(f"{self._settings.address} closed the connection")
        self._parser.received(count)

    def _last_words(self) -> None:
        # A server that refuses a request says why before it hangs up, and that is worth more than
        # the broken pipe. Best effort: a reset may have thrown the words away.
        try:
            while not isinstance(count := self._stream.receive(self._parser.get_buffer()), Event):
                if count == 0:
                    return
                self._received(count)
                reply = self._parser.next_reply()
                if isinstance(reply, ServerError):
                    raise reply
        except (OSError, ProtocolError):
            return

    def _wait(self, events: Event, deadline: float) -> Operation[None]:
        if not (yield self._stream.wait_for(events, deadline)):
            raise TimedOut(f"{self._settings.address} did not answer in time")


def open_connection(settings: Settings, generation: int, deadline: float) -> Operation[Connection]:
    """Connect and shake hands, in one round trip where the server speaks RESP3.

    Raises ConnectionLost, TimedOut, or ServerError when the server refuses the login.
    Cancelled: nothing stays open.
    """
    deadline = min(deadline, time.monotonic() + settings.connect_timeout_s)
    stream = yield from open_stream(settings, deadline)
    conn = Connection(stream, settings, generation)
    try:
        yield from _greet(conn, settings, deadline)
    except BaseException:
        conn.close()
        raise
    return conn


def _greet(conn: Connection, settings: Settings, deadline: float) -> Operation[None]:
    optional: list[list[str | int]] = [
        ["CLIENT", "SETINFO", "LIB-NAME", "respkv"],
        ["CLIENT", "SETINFO", "LIB-VER", __version__],
    ]
    select: list[list[str | int]] = [["SELECT", settings.database]] if settings.database else []
    if settings.protocol == 3:
        hello: list[str | int] = ["HELLO", "3"]
        if settings.password is not None:
            hello += ["AUTH", settings.username or "default", settings.password]
        if settings.name is not None:
            hello += ["SETNAME", settings.name]
        replies = yield from _talk(conn, [hello, *select, *optional], deadline)
        if not (isinstance(replies[0], ServerError) and _has_no_hello(replies[0])):
            return _check(replies[: 1 + len(select)])
    login: list[list[str | int]] = [*select]
    if settings.name is not None:
        login.insert(0, ["CLIENT", "SETNAME", settings.name])
    if settings.password is not None:
        user = [settings.username] if settings.username is not None else []
        login.insert(0, ["AUTH", *user, settings.password])
    replies = yield from _talk(conn, [*login, *optional], deadline)
    return _check(replies[: len(login)])


def _talk(
    conn: Connection, commands: Sequence[Sequence[str | int]], deadline: float
) -> Operation[list[Reply]]:
    greeting = request(commands)
    greeting.parting = False  # the state that it leaves is the one that every call shall find
    return (yield from conn.exchange(greeting, deadline))


def _has_no_hello(error: ServerError) -> bool:
    return error.word == "NOPROTO" or "unknown command" in error.message.lower()


def _check(replies: Sequence[Reply]) -> None:
    for reply in replies:
        if isinstance(reply, ServerError):
            raise reply


def _some(chunks: Sequence[Chunk], first: int) -> Sequence[Chunk]:
    # As many chunks as a socket may take at once: thousands of them cost more than the system call.
    nbytes, most = 0, min(first + IOV_MAX, len(chunks))
    for stop in range(first, most):
        nbytes += len(chunks[stop])
        if nbytes >= SEND_BYTES:
            return chunks[first : stop + 1]
    return chunks[first:most]


def _advance(chunks: list[Chunk], first: int, sent: int) -> int:
    # Note that ``sent`` bytes from ``first`` on have left; return the first chunk with bytes left.
    while sent:
        left = len(chunks[first])
        if sent < left:
            chunks[first] = memoryview(chunks[first])[sent:]
            return first
        sent -= left
        first += 1
    return first
