"""What comes in on a connection: commands, and the large arguments that land elsewhere.

The parser stops at a large argument; the intake finds a place for it (body.py) and lends that to
the socket. A value gets its slot once a first part of it has come, and if there is none now, the
intake waits for one, which stops the reading of the socket.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from respkv.engine.landing import Landing
from respkv.engine.supervisor import contain
from respkv.errors import OutOfMemory, ProtocolError
from respkv.page import namespace_of
from respkv.server.body import LAND_MIN, ArenaSink, DropSink, HeapSink, Sink
from respkv.wire.calls import Calls
from respkv.wire.commands import look_up
from respkv.wire.parser import Args, Body, Limits, RequestParser

if TYPE_CHECKING:
    from respkv.server.state import Server


READ_BYTES = 64 * 1024  # of the shared buffer
_QUOTED = (b"KV.PUT", b"KV.SEQ.PUT")  # whose values count for a quota
_DIGITS_MAX = 9
SHORT_READ = LAND_MIN + 1024  # a head and just enough of a value to take a slot for it


class Intake:
    """The input of one connection.

    resume: called when a wait for a slot is over.
    abort:  called when what follows a wait crashes.
    """

    def __init__(
        self,
        server: "Server",
        limits: Limits,
        resume: Callable[[], None],
        abort: Callable[[], None],
    ) -> None:
        self.is_waiting = False
        self.has_landed = False  # a whole command may have a landing among its arguments
        self._server = server
        self._cache = server.cache
        self._resume = resume
        self._abort = abort
        self._parser = RequestParser(server.tokenizer, limits)
        self._sink: Sink | None = None
        self._window = memoryview(b"")
        self._read_buffer, self._scratch = server.read_buffer, server.scratch
        self._is_lost = False
        self._expects_value = False
        self._is_in_doubt: bool | None = None  # this command, for a quota; None: nobody asked yet
        self._staged = 0  # of the value that lands now, the bytes that were copied into its slot

    def use_limits(self, limits: Limits) -> None:
        """Change what may be sent from the next command on."""
        self._parser.limits = limits

    @property
    def error(self) -> ProtocolError | None:
        """Why the input cannot be followed any further, or None."""
        return self._parser.error

    @property
    def has_more(self) -> bool:
        """Whether ``go_on`` has something to do."""
        return self._parser.has_rest or (self._parser.body is not None and self._sink is None)

    @property
    def is_filling(self) -> bool:
        """Whether bytes go straight into a slot, and nothing else has to be done now."""
        return isinstance(self._sink, ArenaSink) and self._sink.missing > 0

    @property
    def holds_slot(self) -> bool:
        """Whether a slot waits for this connection's bytes, or for the rest of its command."""
        return isinstance(self._sink, ArenaSink) or (
            self.has_landed and any(isinstance(arg, Landing) for arg in self._parser.open_args)
        )

    @property
    def held_bytes(self) -> int:
        """Bytes of unfinished input on the heap."""
        collected = self._sink.arrived if isinstance(self._sink, HeapSink) else 0
        return self._parser.held_bytes + collected

    def window(self) -> memoryview:
        """Return memory for the next bytes."""
        if self._sink is None:
            # Where one large value came another may follow: a short read then leaves most of it to
            # be written straight into its slot.
            return self._scratch[:SHORT_READ] if self._expects_value else self._scratch
        self._window = self._sink.window(self._scratch)
        return self._window

    def received(self, nbytes: int) -> Sequence[Args]:
        """Take what was written to the start of the last window; return the whole commands."""
        if self._sink is None:
            commands = self._parser.feed(self._read_buffer, nbytes)
            if type(commands) is not Calls:  # of which none was open before
                commands = self._whole(commands)
            if self._expects_value and commands and not self.has_landed:
                self._expects_value = self._parser.body is not None
            return commands
        sink = self._sink
        sink.advance(self._window[:nbytes])
        if isinstance(sink, HeapSink):
            self._land_if_due()
        return () if sink.missing else self.finished()

    def go_on(self) -> Sequence[Args]:
        """Go on where the parser stopped: at a large argument, for which a place is found, or after
        a command that may have changed the limits. Returns the commands that are whole then.
        """
        body = self._parser.body
        if body is None:
            return self._whole(self._parser.go_on())
        is_value = _is_value(body)
        if not is_value and not self._may_collect(body.nbytes):
            # It could only be collected on the heap, and dropping it would leave a hole in a command.
            self._parser.error = ProtocolError("Protocol error: too big request")
            self._parser.body = None
            return ()
        early, body.early = body.early, memoryview(b"")
        if is_value and self._is_there(body):
            self._sink = DropSink(body.nbytes, arrived=len(early))
        else:
            self._sink = HeapSink(body.nbytes, early)
            self._land_if_due()
        return self.finished()

    def lost(self) -> None:
        """Give back the slot that was being filled, and what the open command had landed before."""
        self._is_lost = True
        self._resume = _nothing  # or the session and its intake would wait for the collector
        if isinstance(self._sink, ArenaSink):
            self._cache.abandon(self._sink.landing)
        self._sink = None
        for value in self._parser.open_args:
            if isinstance(value, Landing):
                self._cache.abandon(value)

    def finished(self) -> Sequence[Args]:
        """Hand a complete argument to the parser; return the commands that are whole then."""
        sink = self._sink
        if sink is None or sink.missing or self.is_waiting:
            return ()
        self._sink = None
        if isinstance(sink, ArenaSink):
            self._cache.stats.bytes_landed += sink.landing.nbytes - self._staged
            self.has_landed = self._expects_value = True
        return self._whole(self._parser.end_body(sink.value()))

    def _whole(self, commands: Sequence[Args]) -> Sequence[Args]:
        """Pass on commands that became whole; what comes next belongs to another one."""
        if commands:
            self._is_in_doubt = None
        return commands

    def _land_if_due(self) -> None:
        sink, body = self._sink, self._parser.body
        assert body is not None
        if not isinstance(sink, HeapSink) or not _is_value(body):
            return
        if sink.arrived < min(LAND_MIN, body.nbytes):
            return
        if self._is_held_back(body):
            return
        try:
            landing = self._server.find_room(body.nbytes)
        except OutOfMemory as error:
            self._drop(sink, body, error)
            return
        if landing is not None:
            self._land(sink, landing)
            return
        self.is_waiting = True
        waiting = partial(self._wait_for_room, sink, body)
        self._server.spawn(contain, waiting, self._abort)

    def _is_held_back(self, body: Body) -> bool:
        """Whether a value stays on the heap as long as others would have to make room for it.

        So it is when it may be refused for a quota: only the end of a command says whose it is.
        """
        cache, name, number = self._cache, body.head[0].upper(), 1
        if self._is_in_doubt is False or name not in _QUOTED:
            return False
        if (slot := cache.slabs.take(body.nbytes)) is not None:
            cache.slabs.give_back(slot)
            return False
        if self._is_in_doubt is None:
            namespace = namespace_of(body.head[1])
            if name == b"KV.SEQ.PUT":
                namespace, number = body.head[1], _number(body.head[3])
            total = body.nbytes * number
            has_space = self._may_collect(total)
            self._is_in_doubt = has_space and cache.accounts.is_in_doubt(namespace, total)
        # More may come than was said.
        return self._is_in_doubt and self._may_collect(body.nbytes)

    def _may_collect(self, nbytes: int) -> bool:
        """Whether so many bytes more of the open command may be on the heap."""
        return self._parser.collected_bytes + nbytes <= self._parser.limits.held_max

    def _land(self, sink: HeapSink, landing: Landing) -> None:
        for part in sink.parts():
            landing.write(part)
        self._staged = sink.arrived
        self._cache.stats.bytes_staged += sink.arrived
        self._sink = ArenaSink(landing)

    def _drop(self, sink: HeapSink, body: Body, error: OutOfMemory) -> None:
        self._cache.stats.oom += 1
        self._sink = DropSink(body.nbytes, error, arrived=sink.arrived)

    async def _wait_for_room(self, sink: HeapSink, body: Body) -> None:
        """Wait until a slot can be had; give up and drop the value after reserve-timeout."""
        try:
            landing = await self._server.wait_for_room(body.nbytes, lambda: self._is_lost)
        finally:
            self.is_waiting = False
        if landing is None:
            error = OutOfMemory(
                f"no room for {body.nbytes} bytes was found within reserve-timeout: all that could "
                "hold them is pinned, leased or in flight"
            )
            self._drop(sink, body, error)
        elif self._is_lost:
            self._cache.abandon(landing)
        else:
            self._land(sink, landing)
        if not self._is_lost:
            self._resume()

    def _is_there(self, body: Body) -> bool:
        """Whether this is the payload of a page that is stored; it stays while its copy is read."""
        is_put = len(body.head) == 2 and body.head[0].upper() == b"KV.PUT"
        page = self._cache.has_page(body.head[1], body.nbytes) if is_put else None
        if page is not None:
            self._cache.promise(page, self._cache.clock.now + self._server.config.output_timeout)
        return page is not None


def _nothing() -> None:
    pass


def _number(word: Any) -> int:
    """Return how many payloads a prompt says it has; a word that is no number is refused later."""
    return int(word) if len(word) <= _DIGITS_MAX and word.isdigit() else 1


def _is_value(body: Body) -> bool:
    row = look_up(body.head[0]) if body.head else None
    return row is not None and row.is_payload(len(body.head))
