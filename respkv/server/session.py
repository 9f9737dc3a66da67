"""One connection's conversation: bytes in, replies out, in order. It knows no socket.

The transport lends memory with ``window``, says ``received``, sends what ``take_output`` returns
and says ``sent`` or ``drained`` once its last byte has left. Most commands are answered inside
``received``. Three things make a session stop taking commands, and because it then also stops
reading (``wants_input``), backpressure reaches the client through its socket:

* output that has not left yet: no more than ``OUTPUT_BYTES_SOFT`` and one reply pile up;
* a reply that is streamed (an iterator from the handler), continued as the output drains;
* a command that must wait (an awaitable from the handler), or a value that waits for a slot.

What was parsed meanwhile waits in ``_backlog``. Slots whose bytes are being sent are borrowed until
they have left; a connection that breaks gives back everything in ``lost``.
"""

from collections import deque
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias

from respkv.engine.landing import Landing
from respkv.engine.supervisor import contain
from respkv.errors import CacheError, CommandError, ProtocolError
from respkv.server.intake import Intake
from respkv.server.registry import HANDLERS, UNAUTHENTICATED_HANDLERS, Later, resolve
from respkv.tiers.slab import Slot
from respkv.wire import reply
from respkv.wire.parser import UNAUTHENTICATED, Args, Limits

if TYPE_CHECKING:
    from respkv.server.state import Server

OUTPUT_BYTES_SOFT = 1 << 20
UNAUTHENTICATED_OUTPUT_MAX = 64 * 1024  # of answers in one turn (CVE-2025-21605)
COPY_BYTES_MAX = 16 * 1024  # up to here a copy into the reply is cheaper than a gathered write

Buffers: TypeAlias = list[bytes | memoryview]


class Wire(Protocol):
    """What a session asks of its transport."""

    def wake(self) -> None:
        """Look at the session again: it has output or wants input, outside ``received``."""

    def abort(self) -> None:
        """Close at once; ``lost`` follows."""

    def unsent_bytes(self) -> int:
        """Return how much output has not left yet."""
        ...


class Session:
    """The state of one connection.

    out:        parts of replies that are to be sent; handlers append to it.
    out_bytes:  of the larger ones among them.
    is_closing: close once the output has left.
    """

    def __init__(self, server: "Server", number: int, address: str, local: str, wire: Wire) -> None:
        self.server = server
        self.cache = server.cache
        self.number = number
        self.address = address
        self.local = local
        self.wire = wire
        self.name = b""
        self.library = (b"", b"")
        self.protocol = 2
        self.created = self.last_active = server.clock.now
        self.last_command = ""
        self.out: Buffers = []
        self.out_bytes = 0
        self.is_closing = False
        self.is_lost = False
        self.is_draining = False
        self.is_authenticated = True
        self._handlers = HANDLERS
        self._intake = Intake(server, server.limits, self._resume, wire.abort)
        self._backlog: deque[Args] = deque()
        self._stream: Iterator[None] | None = None
        self._is_waiting = False
        self._kept: int | None = None  # CLIENT REPLY OFF: only so many parts of out are sent
        self._skips = 0  # CLIENT REPLY SKIP: 2 for itself, 1 for the command it silences
        self._skip_from = 0
        self._unsent = (0, 0.0)  # bytes, and since when it is so many
        self._sending: list[Slot] = []
        if server.config.requirepass:
            self.demand_password(True)

    # -- called by the transport --------------------------------------------------------------

    @property
    def wants_input(self) -> bool:
        """Whether more bytes should be read now."""
        return not (
            self.is_draining
            or self._is_waiting
            or self._intake.is_waiting
            or self._backlog
            or self._stream is not None
            or self.is_closing
        )

    @property
    def is_busy(self) -> bool:
        """Whether there is something that the client is still to be told."""
        return bool(self.out) or (not self.is_closing and not self.wants_input) or self.is_draining

    @property
    def holds_slot_for_body(self) -> bool:
        """Whether a slot is waiting for this connection's bytes."""
        return self._intake.holds_slot

    @property
    def held_bytes(self) -> int:
        """Bytes of unfinished input on the heap."""
        return self._intake.held_bytes

    def stalled_s(self, now: float) -> float:
        """Return for how many seconds no byte of the waiting output has left."""
        unsent = self.wire.unsent_bytes() if self.is_draining else 0
        if not unsent or unsent != self._unsent[0]:
            self._unsent = (unsent, now)
        return now - self._unsent[1]

    def window(self) -> memoryview:
        """Return memory for the next bytes."""
        return self._intake.window()

    def received(self, nbytes: int) -> bool:
        """Take the ``nbytes`` that were written to the start of the last window.

        Returns whether that did anything: most reads of a large value only fill its slot.
        """
        server = self.server
        server.input_bytes += nbytes
        intake = self._intake
        commands = intake.received(nbytes)
        if not commands and intake.is_filling:
            self.last_active = server.clock.now
            return False
        server.clock.refresh()
        self.last_active = server.clock.now
        self._serve(commands)
        return True

    def take_output(self) -> Buffers:
        """Return what is to be sent now, in order."""
        out, self.out = self.out, []
        self.out_bytes = self._skip_from = 0
        if self._kept is not None:
            del out[self._kept :]
            self._kept = 0
        return out

    def draining(self) -> None:
        """Note that not all output has left at once; ``drained`` follows when it has."""
        self.is_draining = True
        self._unsent = (0, self.server.clock.now)

    def sent(self) -> None:
        """Note that all output has left: its slots are given back, and stopped work goes on."""
        if self._sending:
            self._restore_sent()
        intake = self._intake
        if self._backlog or self._stream is not None or intake.has_more or intake.error is not None:
            self._serve(())

    def drained(self) -> None:
        """Note that the output that could not leave at once has left now."""
        self.is_draining = False
        self.server.clock.refresh()
        self.sent()

    def lost(self, *, by_server: bool = False) -> None:
        """Give back everything the connection held. Nothing may be called afterwards.

        by_server: we closed it, so its process may not know yet and still write what it reserved.
        """
        self.is_lost = self.is_closing = True
        self._restore_sent()
        self._drop_unused(self._backlog)
        self._backlog.clear()
        self._intake.lost()
        self._stream = None  # closing it gives back what it had not sent
        self.out.clear()
        self.cache.drop_owner(self.number, may_write=by_server)

    # -- called by command handlers -----------------------------------------------------------

    def demand_password(self, is_needed: bool) -> None:
        """Go back behind the password, with small limits, or come out from behind it."""
        self.is_authenticated = not is_needed
        self._intake.use_limits(UNAUTHENTICATED if is_needed else self.server.limits)
        self._handlers = UNAUTHENTICATED_HANDLERS if is_needed else HANDLERS

    def use_limits(self, limits: Limits) -> None:
        """Put changed limits in force, unless the small ones before authentication are."""
        if self.is_authenticated:
            self._intake.use_limits(limits)

    def reset(self) -> None:
        """Be as a new connection is."""
        self.protocol = 2
        self.name = b""
        self._kept = None
        self._skips = 0
        self.demand_password(bool(self.server.config.requirepass))

    def mute(self, word: bytes) -> None:
        """Carry out CLIENT REPLY: ON answers OK, OFF and SKIP are silent."""
        if word == b"SKIP":
            self._skips = 2
        elif word == b"OFF":
            self._kept = len(self.out) if self._kept is None else self._kept
        else:
            if self._kept is not None:
                del self.out[self._kept :]
            self._kept = None
            self.out.append(reply.OK)

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

    def _serve(self, commands: Sequence[Args]) -> None:
        """Run commands until they end or one has to wait, then look at what the input met."""
        if self._stream is not None and not self.is_draining:
            self._pump()
        while True:
            if self._backlog:
                commands = [*self._backlog, *commands]
                self._backlog.clear()
            if commands:
                try:
                    self._run(commands)
                except BaseException:  # a bug; the values of the commands behind it do not leak
                    self._drop_unused(commands)
                    raise
            if not self.is_authenticated:
                self._limit_output()
            if self._must_stop():
                return
            if not self._intake.has_more:
                break
            commands = self._intake.go_on()
        if self._intake.error is not None:
            self._fail(self._intake.error)

    def _limit_output(self) -> None:
        """Close on a stranger who collects answers: a NOAUTH for each of many commands, or an echo."""
        if len(self.out) > 64:  # joined, or measuring them after each command would be quadratic
            self.out = [b"".join(self.out)]
        if sum(map(len, self.out)) > UNAUTHENTICATED_OUTPUT_MAX:
            self.server.num_slow_readers += 1
            self.is_closing = True

    def _must_stop(self) -> bool:
        return (
            self._is_waiting
            or self._intake.is_waiting
            or self.is_draining
            or self.is_closing
            or self._stream is not None
            or self.out_bytes > OUTPUT_BYTES_SOFT
        )

    def _run(self, commands: Sequence[Args]) -> None:
        """Run commands until one makes the session stop; the rest goes to the backlog."""
        todo = iter(commands)
        if self._must_stop():
            self._backlog.extend(todo)
            return
        handlers, found = self._handlers, None
        for args in todo:
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
            if self._skips and not self._is_waiting:
                self._skip()
            may_stop = later is not None or self.out_bytes > OUTPUT_BYTES_SOFT or self.is_closing
            if may_stop and self._must_stop():
                self._backlog.extend(todo)
                break
            handlers = self._handlers
        num_run = len(commands) - len(self._backlog)
        self.server.num_commands += num_run
        self.last_command = "" if found is None else found.command.name
        if self._intake.has_landed:
            self._drop_unused(commands[:num_run])

    def _skip(self) -> None:
        """Drop the answer of the command after CLIENT REPLY SKIP."""
        self._skips -= 1
        if self._skips:
            self._skip_from = len(self.out)
        else:
            self._stream = None
            # Not nothing: what it would have sent is let go of once the output has left.
            self.out[self._skip_from :] = [b""]

    def _answer_error(self, error: CacheError) -> None:
        self.server.num_errors += 1
        word = error.word if isinstance(error, CommandError) else error.code
        self.out.append(reply.error(f"{word} {error}"))

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
            self.server.spawn(contain, partial(self._finish, later), self.wire.abort)

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
        if self._skips:
            self._skip()
        self._resume()

    def _resume(self) -> None:
        if self.is_lost:
            self.out.clear()
            self._restore_sent()
            return
        self.server.clock.refresh()
        self._serve(self._intake.finished())
        self.wire.wake()

    def _drop_unused(self, commands: Iterable[Args]) -> None:
        """Give back the slots of values that their commands did not keep."""
        for args in commands:
            for value in args:
                if isinstance(value, Landing):
                    self.cache.abandon(value)
        self._intake.has_landed = bool(self._backlog)

    def _restore_sent(self) -> None:
        sending, self._sending = self._sending, []
        for slot in sending:
            self.cache.restore(slot)
