"""One connection's conversation: bytes in, replies out, in order. It knows no socket.

The transport lends memory with ``window``, says ``received``, sends what ``take_output`` returns
and says ``drained`` once its last byte has left. Most commands are answered inside ``received``.
Three things make a session stop taking commands, and because it then also stops reading
(``wants_input``), backpressure reaches the client through its socket:

* output that has not left yet: no more than ``OUTPUT_BYTES_SOFT`` and one reply pile up;
* a reply that is streamed (an iterator from the handler), continued as the output drains;
* a command that must wait (an awaitable from the handler), or a value that waits for a slot.

What was parsed meanwhile waits in ``_backlog``. Slots whose bytes are being sent are borrowed until
``drained``; a connection that breaks gives back everything in ``lost``.
"""

from collections import deque
from collections.abc import Awaitable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeAlias

from respkv.engine.landing import Landing
from respkv.errors import CacheError, OutOfMemory, ProtocolError
from respkv.server.body import LAND_MIN, ArenaSink, DropSink, HeapSink, Sink
from respkv.server.registry import HANDLERS, UNAUTHENTICATED_HANDLERS, Later, resolve
from respkv.tiers.slab import Slot
from respkv.wire import reply
from respkv.wire.commands import look_up
from respkv.wire.parser import UNAUTHENTICATED, Args, Limits, RequestParser

if TYPE_CHECKING:
    from respkv.server.state import Server


class Wire(Protocol):
    """What a session asks of its transport."""

    def wake(self) -> None:
        """Look at the session again: it has output or wants input, outside ``received``."""

    def abort(self) -> None:
        """Close at once; ``lost`` follows."""

    def unsent_bytes(self) -> int:
        """Return how much output has not left yet."""


OUTPUT_BYTES_SOFT = 1 << 20
COPY_BYTES_MAX = 16 * 1024  # up to here a copy into the reply is cheaper than a gathered write

Buffers: TypeAlias = list[bytes | memoryview]


class Session:
    """The state of one connection."""

    def __init__(self, server: "Server", number: int, address: str, local: str, wire: Wire) -> None:
        self.server = server
        self.cache = server.cache
        self.number = number
        self.address = address
        self.local = local
        self.name = b""
        self.library = (b"", b"")
        self.protocol = 2
        self.created = self.last_active = server.clock.now
        self.last_command = ""
        self.out: Buffers = []
        self.out_bytes = 0
        self.is_closing = False  # close once the output has left
        self._kept: int | None = None  # CLIENT REPLY OFF: only so many parts of out are sent
        self._skips = 0  # CLIENT REPLY SKIP: 2 while it runs, 1 for the command to be skipped
        self.wire = wire
        self._parser = RequestParser(server.tokenizer, server.limits)
        self._handlers = HANDLERS
        self._backlog: deque[Args] = deque()
        self._sink: Sink | None = None
        self._window = memoryview(b"")
        self._stream: Iterator[None] | None = None
        self._is_waiting = False
        self._is_lost = False
        self._is_draining = False
        self._unsent = (0, 0.0)  # bytes, and since when it is so many
        self._sending: list[Slot] = []
        self.is_authenticated = True
        self.demand_password(bool(server.config.requirepass))

    # -- called by the transport --------------------------------------------------------------

    @property
    def wants_input(self) -> bool:
        """Whether more bytes should be read now."""
        return (
            not (self._is_draining or self._is_waiting or self._stream or self._backlog)
            and not self.is_closing
        )

    def window(self) -> memoryview:
        """Return memory for the next bytes."""
        if self._sink is None:
            return self.server.scratch
        self._window = self._sink.window(self.server.scratch)
        return self._window

    def received(self, nbytes: int) -> None:
        """Take the ``nbytes`` that were written to the start of the last window."""
        server = self.server
        server.clock.refresh()
        server.input_bytes += nbytes
        self.last_active = server.clock.now
        if self._sink is None:
            self._serve(self._parser.feed(server.read_buffer, nbytes))
            return
        self._sink.advance(self._window[:nbytes])
        if isinstance(self._sink, ArenaSink):
            self.cache.stats.bytes_landed += nbytes
        self._continue_body()

    def take_output(self) -> Buffers:
        """Return what is to be sent now, in order."""
        out, self.out = self.out, []
        self.out_bytes = 0
        if self._kept is not None:
            del out[self._kept :]
            self._kept = 0
        return out

    def draining(self) -> None:
        """Note that not all output has left at once; ``drained`` follows when it has."""
        self._is_draining = True
        self._unsent = (0, self.server.clock.now)

    def sent(self) -> None:
        """Note that all output has left: its slots are given back, and stopped work goes on."""
        self._restore_sent()
        if self._stream or self._backlog or self._parser.body is not None:
            self._serve(())

    def drained(self) -> None:
        """Note that the output that could not leave at once has left now."""
        self._is_draining = False
        self.server.clock.refresh()
        self.sent()

    def lost(self) -> None:
        """Give back everything the connection held. Nothing may be called afterwards."""
        self._is_lost = True
        self.is_closing = True
        self._restore_sent()
        for args in [
            *self._backlog,
            *([] if self._parser.body is None else [self._parser.body.head]),
        ]:
            self._abandon(args)
        self._backlog.clear()
        if isinstance(self._sink, ArenaSink):
            self.cache.abandon(self._sink.landing)
        self._sink = None
        self._stream = None  # closing it gives back what it had not sent
        self.out.clear()
        self.cache.drop_owner(self.number)

    @property
    def is_lost(self) -> bool:
        """Whether the connection has gone; what is still done for it is done for nobody."""
        return self._is_lost

    @property
    def holds_slot_for_body(self) -> bool:
        """Whether a slot is waiting for this connection's bytes."""
        return isinstance(self._sink, ArenaSink)

    @property
    def is_draining(self) -> bool:
        """Whether output waits for the client to read."""
        return self._is_draining

    @property
    def is_busy(self) -> bool:
        """Whether there is something that the client is still to be told."""
        return bool(
            self.out or self._is_draining or self._is_waiting or self._stream or self._backlog
        )

    def stalled_s(self, now: float) -> float:
        """Return for how many seconds no byte of the waiting output has left."""
        unsent = self.wire.unsent_bytes() if self._is_draining else 0
        if not unsent or unsent != self._unsent[0]:
            self._unsent = (unsent, now)
        return now - self._unsent[1]

    @property
    def held_bytes(self) -> int:
        """Bytes of unfinished input on the heap."""
        return self._parser.held_bytes + (
            self._sink.arrived if isinstance(self._sink, HeapSink) else 0
        )

    # -- called by command handlers -----------------------------------------------------------

    def demand_password(self, is_needed: bool) -> None:
        """Begin unauthenticated, with small limits, when the server has a password."""
        self.is_authenticated = not is_needed
        self._parser.limits = UNAUTHENTICATED if is_needed else self.server.limits
        self._handlers = UNAUTHENTICATED_HANDLERS if is_needed else HANDLERS

    def use_limits(self, limits: Limits) -> None:
        """Put changed limits in force, unless the small ones before authentication are."""
        if self.is_authenticated:
            self._parser.limits = limits

    def reset(self) -> None:
        """Be as a new connection is."""
        self.protocol = 2
        self.name = b""
        self._kept = None
        self._skips = 0
        self.demand_password(bool(self.server.config.requirepass))

    def mute(self, word: bytes) -> None:
        """Carry out CLIENT REPLY: ON answers OK, OFF and SKIP are silent."""
        if word == b"ON":
            if self._kept is not None:
                del self.out[self._kept :]
            self._kept = None
            self.out.append(reply.OK)
        elif word == b"OFF":
            self._kept = len(self.out) if self._kept is None else self._kept
        else:
            self._skips = 2

    def send(self, value: reply.Reply) -> None:
        """Answer with any nested value."""
        data = reply.encode(value, self.protocol)
        self.out_bytes += len(data)
        self.out.append(data)

    def send_nil(self) -> None:
        """Answer with the absent value."""
        self.out.append(reply.NIL[self.protocol])

    def send_value(self, value: bytes) -> None:
        """Answer with a bulk string."""
        self.out_bytes += len(value)
        self.out += (reply.bulk_prefix(len(value)), value, reply.CRLF)

    def send_slot(self, slot: Slot, start: int = 0, stop: int | None = None) -> None:
        """Answer with a slot's bytes, or a range of them, straight from its memory."""
        payload = self.cache.payload(slot)[start:stop]
        nbytes = len(payload)
        self.cache.stats.bytes_out += nbytes
        if nbytes <= COPY_BYTES_MAX:
            self.send_value(bytes(payload))
            return
        self.cache.borrow(slot)
        self._sending.append(slot)
        self.cache.stats.bytes_sent_in_place += nbytes
        self.out_bytes += nbytes
        self.out += (reply.bulk_prefix(nbytes), payload, reply.CRLF)

    # -- inside -------------------------------------------------------------------------------

    def _serve(self, commands: Iterable[Args]) -> None:
        """Run commands until they end or one has to wait, then look at what the parser met."""
        if self._stream is not None and not self._is_draining:
            self._pump()
        while True:
            if self._backlog:
                commands = [*self._backlog, *commands]
                self._backlog.clear()
            self._run(commands)
            if self._must_stop():
                return
            if self._parser.body is None or self._sink is not None:
                break
            self._open_body()
            if self._sink is None or self._sink.missing or self._is_waiting:
                return
            commands = self._close_body()
        if self._parser.error is not None:
            self._fail(self._parser.error)

    def _must_stop(self) -> bool:
        return (
            self._is_waiting
            or self._is_draining
            or self.is_closing
            or self._stream is not None
            or self.out_bytes > OUTPUT_BYTES_SOFT
        )

    def _run(self, commands: Iterable[Args]) -> None:
        """Run commands until one makes the session stop; the rest goes to the backlog."""
        todo = iter(commands)
        if self._must_stop():
            self._backlog.extend(todo)
            return
        handlers = self._handlers
        for args in todo:
            self.server.num_commands += 1
            parts = len(self.out)
            found = handlers.get(args[0])
            try:
                if found is None or not found.least <= len(args) <= found.most:
                    found = resolve(handlers, args)
                later = found.handle(self, args)
            except CacheError as error:
                self._answer_error(error)
                later = None
            if later is not None:
                self._wait_for(later)
            elif found is None or found.takes_payload:
                self._abandon(args)
            if self._skips:
                self._skip(parts)
            if self._must_stop():
                self._backlog.extend(todo)
                return
            handlers = self._handlers

    def _skip(self, parts: int) -> None:
        """Drop the answer of the command after CLIENT REPLY SKIP."""
        self._skips -= 1
        if not self._skips:
            del self.out[parts:]

    def _answer_error(self, error: CacheError) -> None:
        self.server.num_errors += 1
        word = getattr(error, "word", error.code)
        self.out.append(reply.error(f"{word} {error}" if word else str(error)))

    def _fail(self, error: ProtocolError) -> None:
        self.server.num_protocol_errors += 1
        self.out.append(reply.error(f"ERR {error}"))
        self.is_closing = True

    def _wait_for(self, later: Later) -> None:
        if isinstance(later, Iterator):
            self._stream = later
            self._pump()
        else:
            self._is_waiting = True
            self.server.spawn(self._finish, later)

    def _pump(self) -> None:
        """Continue a streamed reply until it ends or enough output waits."""
        assert self._stream is not None
        while next(self._stream, self) is not self:
            if self.out_bytes > OUTPUT_BYTES_SOFT:
                return
        self._stream = None

    async def _finish(self, later: Awaitable[None]) -> None:
        """Await a command that could not be answered at once, then go on with the next."""
        try:
            await later
        except CacheError as error:
            self._answer_error(error)
        finally:
            self._is_waiting = False
        self._resume()

    def _resume(self) -> None:
        if self._is_lost:
            self.out.clear()
            return
        self.server.clock.refresh()
        self._serve(())
        self.wire.wake()

    # -- bodies -------------------------------------------------------------------------------

    def _open_body(self) -> None:
        body = self._parser.body
        assert body is not None
        is_value = self._is_value(body.head)
        if not is_value and body.nbytes > self._parser.limits.held_max:
            error = CacheError(f"an argument of {body.nbytes} bytes is no value and too long")
            self._sink = DropSink(body.nbytes, error)
        elif is_value and self._is_there(body.head, body.nbytes):
            self._sink = DropSink(body.nbytes)
        else:
            self._sink = HeapSink(body.nbytes)
        self._sink.advance(memoryview(body.early))
        body.early = b""
        self._land_if_due()

    def _continue_body(self) -> None:
        assert self._sink is not None
        self._land_if_due()
        if not self._sink.missing and not self._is_waiting:
            self._serve(self._close_body())

    def _close_body(self) -> Iterable[Args]:
        assert self._sink is not None
        value = self._sink.value()
        self._sink = None
        return self._parser.end_body(value)

    def _land_if_due(self) -> None:
        """Take a slot for a value once enough of it has come, or wait for one."""
        sink, body = self._sink, self._parser.body
        assert body is not None
        if not isinstance(sink, HeapSink) or not self._is_value(body.head):
            return
        if sink.arrived < min(LAND_MIN, body.nbytes):
            return
        try:
            landing = self.cache.reserve(body.nbytes)
        except OutOfMemory as error:
            if self.cache.is_waiting_useful() and body.nbytes <= self.cache.slabs.payload_bytes_max:
                self._is_waiting = True
                self.server.spawn(self._wait_for_room, error)
            else:
                self._drop(sink, error)
            return
        self._land(sink, landing)

    def _land(self, sink: HeapSink, landing: Landing) -> None:
        landing.write(sink.data())
        self.cache.stats.bytes_staged += sink.arrived
        self._sink = ArenaSink(landing)
        self._sink.missing -= landing.filled

    def _drop(self, sink: HeapSink, error: CacheError) -> None:
        assert self._parser.body is not None
        dropping = DropSink(self._parser.body.nbytes, error)
        dropping.missing = sink.missing
        self._sink = dropping

    async def _wait_for_room(self, error: OutOfMemory) -> None:
        """Wait until a slot can be had; give up and drop the value after reserve-timeout."""
        body = self._parser.body
        assert body is not None
        try:
            landing = await self.server.wait_for_room(body.nbytes, lambda: self._is_lost)
        finally:
            self._is_waiting = False
        if self._is_lost:
            if landing is not None:
                self.cache.abandon(landing)
            return
        sink = self._sink
        assert isinstance(sink, HeapSink)
        if landing is None:
            self._drop(sink, error)
        else:
            self._land(sink, landing)
        assert self._sink is not None
        if not self._sink.missing:
            self._serve(self._close_body())
        self.wire.wake()

    def _is_value(self, head: Args) -> bool:
        row = look_up(head[0]) if head else None
        return row is not None and row.is_payload(len(head))

    def _is_there(self, head: Args, nbytes: int) -> bool:
        """Whether this is the payload of a page that is already stored."""
        is_put = head[0].upper() == b"KV.PUT" and len(head) == 2
        return is_put and self.cache.has_page(head[1], nbytes) is not None

    def _abandon(self, args: Args) -> None:
        for value in args:
            if isinstance(value, Landing):
                self.cache.abandon(value)

    def _restore_sent(self) -> None:
        sending, self._sending = self._sending, []
        for slot in sending:
            self.cache.restore(slot)
