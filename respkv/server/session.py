"""One connection's conversation: bytes in, replies out, in order. It knows no socket.

The transport lends memory with ``window``, says ``received``, sends what ``take_output`` returns
and says ``sent`` or ``drained`` once its last byte has left. Most commands are answered inside
``received``. Three things make a session stop taking commands, and because it then also stops
reading (``wants_input``), backpressure reaches the client through its socket:

* output that has not left yet: no more than ``OUTPUT_BYTES_SOFT`` and one reply pile up;
* a reply that is streamed (an iterator from the handler), continued as the output drains;
* a command that must wait (an awaitable from the handler, or values that have to come from files,
  loads.py), or a value that waits for a slot.

What was parsed meanwhile waits in ``_backlog``. Slots whose bytes are being sent are borrowed until
they have left; a connection that breaks gives back everything in ``lost``. What is answered, and
when it may leave, is in answers.py.
"""

from collections import deque
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio

from respkv.engine.landing import Landing
from respkv.engine.supervisor import contain
from respkv.errors import CacheError, ProtocolError
from respkv.server.answers import OUTPUT_BYTES_SOFT, Answers, Wire
from respkv.server.intake import Intake
from respkv.server.loads import Delay, Loads
from respkv.server.registry import HANDLERS, Later, handlers_for, resolve
from respkv.wire import reply
from respkv.wire.calls import Calls
from respkv.wire.parser import UNAUTHENTICATED, Args, Limits

if TYPE_CHECKING:
    from respkv.server.pubsub import Subscriptions
    from respkv.server.state import Server

UNAUTHENTICATED_OUTPUT_MAX = 64 * 1024  # of answers in one turn (CVE-2025-21605)


class Session(Answers):
    """The state of one connection."""

    __slots__ = (
        "_backlog",
        "_handlers",
        "_intake",
        "_loads",
        "_scope",
        "address",
        "created",
        "is_authenticated",
        "last_active",
        "last_command",
        "library",
        "local",
        "name",
        "number",
        "subscriptions",
        "window",
    )

    def __init__(self, server: "Server", number: int, address: str, local: str, wire: Wire) -> None:
        super().__init__(server, wire)
        self.number = number
        self.address = address
        self.local = local
        self.name = b""
        self.library = (b"", b"")
        self.created = self.last_active = server.clock.now
        self.last_command = ""
        self.is_authenticated = True
        self.subscriptions: Subscriptions | None = None  # while it listens to channels
        self._handlers = HANDLERS
        self._intake = Intake(server, server.limits, self._resume, wire.abort)
        self.window = self._intake.window  # returns memory for the next bytes
        self._backlog: deque[Args] = deque()
        self._loads: Loads | None = None  # without file tiers
        if server.mover is not None:
            self._loads = Loads(server.mover, server.budget)
        self._scope: anyio.CancelScope | None = None
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
            or (self.promises and self._is_choked())
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
    def is_filling(self) -> bool:
        """Whether the next window is a part of a value's slot."""
        return self._intake.is_filling

    @property
    def held_bytes(self) -> int:
        """Bytes of unfinished input on the heap."""
        return self._intake.held_bytes

    def received(self, nbytes: int) -> bool:
        """Take the ``nbytes`` that were written to the start of the last window.

        Returns whether that did anything: most reads of a large value only fill its slot.
        """
        server, intake = self.server, self._intake
        server.input_bytes += nbytes
        commands = intake.received(nbytes)
        if type(commands) is not Calls and not commands and intake.is_filling:
            self.last_active = server.clock.now
            return False
        server.clock.refresh()
        self.last_active = server.clock.now
        if type(commands) is Calls and self._is_quiet() and not self._backlog:
            commands = self._run_together(commands)
            if not commands:
                return self.is_draining
        self._serve(commands)
        return True

    def sent(self) -> None:
        """Note that all output has left: its slots are given back, and stopped work goes on."""
        if self._sending:
            self._restore_sent()
        if self._has_sent is not None:
            self._has_sent.set()
        intake = self._intake
        if self._backlog or self._stream is not None or intake.has_more or intake.error is not None:
            self._serve(())
        if self.push_bytes:
            self.count_pushes()
            self._put_pushes()

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
        self.promises.clear()
        self.out.clear()
        self.server.pubsub.leave(self)
        if self._loads is not None:
            self._loads.drop()
        if self._scope is not None:
            self._scope.cancel()
        self.cache.drop_owner(self.number, may_write=by_server)

    # -- called by command handlers -----------------------------------------------------------

    def demand_password(self, is_needed: bool) -> None:
        """Go back behind the password, with small limits, or come out from behind it."""
        self.is_authenticated = not is_needed
        self._intake.use_limits(UNAUTHENTICATED if is_needed else self.server.limits)
        self.choose_handlers()

    def choose_handlers(self) -> None:
        """Take the commands that may be called as the connection is now."""
        is_listening = self.subscriptions is not None and self.protocol == 2
        self._handlers = handlers_for(self.is_authenticated, is_listening)

    def use_limits(self, limits: Limits) -> None:
        """Put changed limits in force, unless the small ones before authentication are."""
        if self.is_authenticated:
            self._intake.use_limits(limits)

    def reset(self) -> None:
        """Be as a new connection is."""
        self.protocol = 2
        self.name = b""
        if self._kept is not None:
            self._cut(self._kept)
        self._kept = None
        self._skips = 0
        self.put_pushes()
        self.server.pubsub.leave(self)
        self.demand_password(bool(self.server.config.requirepass))

    @contextmanager
    def until_lost(self) -> Iterator[None]:
        """Leave the block when the connection is lost. For the one command that waits."""
        with anyio.CancelScope() as self._scope:
            if self.is_lost:
                self._scope.cancel()
            try:
                yield
            finally:
                self._scope = None

    def stop_reading_ahead(self) -> None:
        """Give back what was loaded for commands that a slow reader keeps from running."""
        if self._loads is not None and not self._is_waiting:
            self._loads.drop()

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
        # Joined, or measuring them after each command would be quadratic.
        if len(self.out) > 64 and not self.promises:
            self.out = [b"".join(self.out)]
        if sum(map(len, self.out)) > UNAUTHENTICATED_OUTPUT_MAX:
            self.server.num_slow_readers += 1
            self.is_closing = True

    def _run_together(self, calls: Calls) -> Sequence[Args]:
        """Answer calls of one command at once, as far as that is possible; return the others."""
        found = self._handlers.get(calls.name)
        if found is None or not found.least <= calls.width + 1 <= found.most:
            return calls
        count = 0 if found.together is None else found.together(self, calls)
        if not count:
            return calls
        if self._loads is not None:
            self._loads.advance(count)
        self.server.num_commands += count
        self.last_command = found.command.name
        if count < calls.number:
            return calls[count:]
        self.wire.write(self.out.pop())
        return ()

    def _must_stop(self) -> bool:
        return (
            self._is_waiting
            or self._intake.is_waiting
            or self.is_draining
            or self.is_closing
            or self._stream is not None
            or self.out_bytes > OUTPUT_BYTES_SOFT
            or (bool(self.promises) and self._is_choked())
        )

    def _run(self, commands: Sequence[Args]) -> None:
        """Run commands until one makes the session stop; the rest goes to the backlog."""
        todo = iter(commands)
        if self._must_stop():
            self._backlog.extend(todo)
            return
        handlers, found, loads = self._handlers, None, self._loads
        if loads is not None:
            loads.begin_turn(todo, len(commands))
        for args in todo:
            found = handlers.get(args[0])
            try:
                if found is None or not found.least <= len(args) <= found.most:
                    found = resolve(handlers, args)
                if loads is None:
                    later = found.handle(self, args)
                else:
                    later = loads.handle(self, found, args)
            except CacheError as error:
                self._answer_error(error)
                later = None
            if later is not None:
                self._wait_for(later)
                if isinstance(later, Delay):  # the command is still to be run
                    self._backlog.append(args)
            if self._skips and not self._is_waiting:
                self._skip()
            may_stop = later is not None or self.out_bytes > OUTPUT_BYTES_SOFT or self.is_closing
            if may_stop and self._must_stop():
                self._backlog.extend(todo)
                break
            handlers = self._handlers
        num_run = len(commands) - len(self._backlog)
        if loads is not None:
            self._move_on(loads, num_run)
        self.server.num_commands += num_run
        self.last_command = "" if found is None else found.command.name
        if self._intake.has_landed:
            self._drop_unused(commands[:num_run])

    def _move_on(self, loads: Loads, num_run: int) -> None:
        loads.advance(num_run)
        if self._backlog and self.cache.copies.num_cold and not self.is_closing:
            loads.look_ahead(self.cache, self._handlers, self._backlog)

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
            if isinstance(later, Delay):
                work = partial(self._delay, later)
            else:
                work = partial(self._finish, later)
            self.server.spawn(contain, work, self.wire.abort)

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

    async def _delay(self, delay: Delay) -> None:
        """Wait for what a command needs, then go on with it."""
        try:
            await delay.wait()
        finally:
            self._is_waiting = False
        self._resume()

    def _resume(self) -> None:
        if self.is_lost:
            self.out.clear()
            self._restore_sent()
            return
        self.server.clock.refresh()
        if self._has_sent is not None:
            self._has_sent.set()  # to look again: the promises may have been kept
        self._serve(self._intake.finished())
        self._put_pushes()
        self.wire.wake()

    def _drop_unused(self, commands: Iterable[Args]) -> None:
        """Give back the slots of values that their commands did not keep."""
        for args in commands:
            for value in args:
                if isinstance(value, Landing):
                    self.cache.abandon(value)
        self._intake.has_landed = bool(self._backlog)
