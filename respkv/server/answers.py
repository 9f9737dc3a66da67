"""What one connection is to be told: replies, in order, as parts that a gathered write takes.

Slots whose bytes are among the parts are borrowed until all parts have left.

A reply may promise more than memory can: that a value is in a file, or synced there. Such a promise
is noted with the parts it stands in, and while there is one nothing is taken for sending, so that
the commands behind it run on and share one group commit. A promise that cannot be kept becomes an
error in the place of its reply; the replies around it stay.

A push is what a client is told without having asked: messages of channels it listens to (pubsub.py).
Pushes wait apart from the replies and go behind them when no reply stands there half.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import anyio

from respkv.engine.supervisor import contain
from respkv.errors import CacheError, CommandError
from respkv.tiers.slab import Slot
from respkv.wire import reply

if TYPE_CHECKING:
    from respkv.server.state import Server

OUTPUT_BYTES_SOFT = 1 << 20
PARTS_HELD_BACK_MAX = 1 << 14  # of small replies, which are not among the bytes
PUSH_BYTES = 48  # what a push costs beyond its bytes, which other connections may share
COPY_BYTES_MAX = 16 * 1024  # up to here a copy into the reply is cheaper than a gathered write

Buffers: TypeAlias = list[bytes | memoryview]


@dataclass(slots=True)
class Promise:
    """What was noted in (since, ticket] must hold before the parts from start to stop may leave."""

    since: int
    ticket: int
    start: int
    stop: int

    def cut(self, length: int) -> None:
        """Note that only the first parts are still there."""
        self.start, self.stop = min(self.start, length), min(self.stop, length)


class Wire(Protocol):
    """What a session asks of its transport."""

    def write(self, data: bytes | memoryview) -> None:
        """Send an answer that stands alone: there is none before it, and no slot's bytes in it."""

    def wake(self) -> None:
        """Look at the session again: it has output or wants input, outside ``received``."""

    def abort(self) -> None:
        """Close at once; ``lost`` follows."""

    def unsent_bytes(self) -> int:
        """Return how much output has not left yet."""
        ...


class Answers:
    """The output of one connection.

    out:       parts of replies that are to be sent; handlers append to it.
    out_bytes: of the larger ones among them.
    promises:  while there are any, nothing may leave.
    pushes:    what is to be said without having been asked for; push_bytes: of them, and of those
               that have gone behind the replies and may not have left. is_overrun: they were too many.
    is_closing: close once the output has left.
    """

    __slots__ = (
        "_has_sent",
        "_is_sealed",
        "_is_waiting",
        "_kept",
        "_sending",
        "_skip_from",
        "_skips",
        "_stream",
        "_unsent",
        "cache",
        "is_closing",
        "is_draining",
        "is_lost",
        "is_overrun",
        "out",
        "out_bytes",
        "promises",
        "protocol",
        "push_bytes",
        "pushes",
        "server",
        "wire",
    )

    def __init__(self, server: "Server", wire: Wire) -> None:
        self.server = server
        self.cache = server.cache
        self.wire = wire
        self.protocol = 2
        self.out: Buffers = []
        self.out_bytes = 0
        self.promises: deque[Promise] = deque()
        self.is_closing = self.is_lost = self.is_draining = False
        self._has_sent: anyio.Event | None = None
        self._is_sealed = False  # no more commands before all promises are kept
        self._kept: int | None = None  # CLIENT REPLY OFF: only so many parts of out are sent
        self._skips = 0  # CLIENT REPLY SKIP: 2 for itself, 1 for the command it silences
        self._skip_from = 0
        self._stream: Iterator[None] | None = None  # goes on with a reply that is there half
        self._is_waiting = False  # for the end of a command, or for its beginning
        self._sending: list[Slot] = []
        self._unsent = (0, 0.0)  # bytes, and since when it is so many
        self.pushes: list[bytes] = []
        self.push_bytes = 0
        self.is_overrun = False

    @property
    def may_close(self) -> bool:
        """Whether the last byte has left that the client is to be told."""
        return self.is_closing and not self.is_draining and not self.promises

    @property
    def is_muted(self) -> bool:
        """Whether the reply to the command that runs now will be dropped."""
        return self._kept is not None or self._skips == 1

    def take_output(self) -> Buffers:
        """Return what is to be sent now, in order."""
        assert not self.promises
        out, self.out = self.out, []
        self.out_bytes = self._skip_from = 0
        if self._kept is not None:
            del out[self._kept :]
            self._kept = 0
        return out

    def hand_over(self) -> list[Slot]:
        """Return the slots of what was taken; who takes them gives them back, by ``cache.restore``."""
        slots, self._sending = self._sending, []
        return slots

    def draining(self) -> None:
        """Note that not all output has left at once; ``drained`` follows when it has."""
        self.is_draining = True
        self._unsent = (0, self.server.clock.now)

    def stalled_s(self, now: float) -> float:
        """Return for how many seconds no byte of the waiting output has left."""
        unsent = self.wire.unsent_bytes() if self.is_draining else 0
        if not unsent or unsent != self._unsent[0]:
            self._unsent = (unsent, now)
        return now - self._unsent[1]

    # -- pushes -------------------------------------------------------------------------------

    def push(self, data: bytes) -> bool:
        """Keep a push for ``deliver``; return whether it is the first that waits."""
        self.pushes.append(data)
        self.push_bytes += len(data) + PUSH_BYTES
        return len(self.pushes) == 1

    def drop_pushes(self) -> None:
        """Forget the pushes that wait."""
        self.pushes, self.push_bytes = [], 0

    def deliver(self) -> None:
        """Let what waits to be said leave; what cannot now goes with the replies it waits for."""
        self._put_pushes()
        if self.out:
            self.wire.wake()

    def _put_pushes(self) -> None:
        """Put what waits to be said behind the replies, unless one of them is still to be ended."""
        is_amid = self._is_waiting or self._stream is not None
        if not (is_amid or self.is_draining or self.promises or self.is_closing):
            self.put_pushes()

    def count_pushes(self) -> None:
        """Note that all those have left that had gone behind the replies."""
        self.push_bytes = sum(map(len, self.pushes)) + PUSH_BYTES * len(self.pushes)

    def put_pushes(self) -> None:
        """Put the pushes that wait behind what was answered. No reply may stand there half."""
        if self.pushes:
            pushes, self.pushes = self.pushes, []
            self.send_push(b"".join(pushes))

    def send_push(self, data: bytes) -> None:
        """Answer with a push: it is said even to a client that wants no replies."""
        if self._kept is not None:
            self._cut(self._kept)
        elif self._skips == 1:
            self._cut(self._skip_from)
        self.out_bytes += len(data)
        self.out.append(data)
        if self._kept is not None:
            self._kept = len(self.out)
        if self._skips == 1:
            self._skip_from = len(self.out)

    # -- called by command handlers -----------------------------------------------------------

    def mute(self, word: bytes) -> None:
        """Carry out CLIENT REPLY: ON answers OK, OFF and SKIP are silent."""
        if word == b"SKIP":
            self._skips = 2
        elif word == b"OFF":
            self._kept = len(self.out) if self._kept is None else self._kept
        else:
            if self._kept is not None:
                self._cut(self._kept)
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

    def send_value(self, value: bytes | memoryview) -> None:
        """Answer with a bulk string, of memory that does not change any more."""
        self.out_bytes += len(value)
        self.out += (reply.bulk_prefix(len(value)), value, reply.CRLF)

    def send_slot(
        self, slot: Slot, start: int = 0, stop: int | None = None, *, head: bytes = b""
    ) -> None:
        """Answer with a slot's bytes, or a range of them, straight from its memory.

        head: stands in front of them, in the same bulk string.
        """
        payload = self.cache.payload(slot)[start:stop]
        nbytes = len(head) + len(payload)
        self.cache.stats.bytes_out += nbytes
        if nbytes <= COPY_BYTES_MAX:
            self.send_value(head + payload)
            return
        self.cache.borrow(slot)
        self._sending.append(slot)
        self.cache.stats.bytes_sent_in_place += nbytes
        self.out_bytes += nbytes
        self.out += (reply.bulk_prefix(nbytes) + head, payload, reply.CRLF)

    def keep_until_sent(self, slots: Iterable[Slot]) -> None:
        """Hold slots whose bytes are among the parts until all parts have left."""
        for slot in slots:
            self.cache.borrow(slot)
            self._sending.append(slot)

    def note_sent(self, nbytes: int, *, in_place: bool) -> None:
        """Count bytes that a handler appended to ``out`` itself."""
        self.out_bytes += nbytes
        self.cache.stats.bytes_out += nbytes
        if in_place:
            self.cache.stats.bytes_sent_in_place += nbytes

    @contextmanager
    def promising(self) -> Iterator[None]:
        """Hold back what is answered in the block until what is noted in it holds.

        There must be no await in the block: what others note meanwhile is no business of its reply.
        """
        copies = self.cache.copies
        since, start = copies.ticket, len(self.out)
        yield
        if copies.ticket != since:
            self.promise(since, start)

    async def make_room(self) -> None:
        """Wait until more may be answered. For the one command that waits."""
        if self.out_bytes > OUTPUT_BYTES_SOFT:
            self.wire.wake()
        while self.is_draining or self.out_bytes > OUTPUT_BYTES_SOFT:
            self._has_sent = anyio.Event()
            await self._has_sent.wait()
            self._has_sent = None

    # -- for the session ----------------------------------------------------------------------

    def _is_quiet(self) -> bool:
        """Whether nothing waits, so that an answer may leave as soon as it is there."""
        return not (
            self.out
            or self.promises
            or self._sending
            or self._is_waiting
            or self._stream is not None
            or self.is_draining
            or self.is_closing
            or self._skips
            or self._kept is not None
        )

    def _is_choked(self) -> bool:
        """Whether so much is held back that no more commands are taken."""
        return (
            self._is_sealed
            or self.out_bytes > OUTPUT_BYTES_SOFT
            or len(self.out) > PARTS_HELD_BACK_MAX
        )

    def promise(self, since: int, start: int, ticket: int | None = None) -> None:
        """Let the parts from ``start`` on wait for what was noted since then, up to ``ticket``."""
        if self.is_lost:  # a command that went on without its client; there is nobody to tell
            return
        ticket, stop = self.cache.copies.ticket if ticket is None else ticket, len(self.out)
        self.promises.append(Promise(since, ticket, start, stop))
        if len(self.promises) == 1:
            self.server.spawn(contain, self._keep_promises, self.wire.abort)

    async def _keep_promises(self) -> None:
        """Wait until all promises are kept, then let the answers leave.

        Commands go on meanwhile; those that promise more after the first have been kept wait for a
        second round, and no others, so that no answer waits for a client that sends without end.
        """
        mover, promises = self.server.mover, self.promises
        assert mover is not None
        while promises:
            for _ in range(len(promises)):
                first = promises[0]
                try:
                    await mover.settle(first.ticket, first.since)
                except CacheError as error:
                    if promises:
                        self._break(first, error)
                if not promises:
                    return  # the connection is lost
                promises.popleft()
            self._is_sealed = bool(promises)
        self.server.clock.refresh()
        self.wire.wake()
        self._resume()

    def _break(self, promise: Promise, error: CacheError) -> None:
        """Tell that a promise could not be kept, instead of its reply."""
        self.server.num_errors += 1
        parts = range(promise.start, promise.stop)
        for part in parts:  # their number stays, others are known by their place
            self.out[part] = b"" if part != parts.start else _error(error)

    def _answer_error(self, error: CacheError) -> None:
        self.server.num_errors += 1
        self.out.append(_error(error))

    def _skip(self) -> None:
        """Drop the answer of the command after CLIENT REPLY SKIP."""
        self._skips -= 1
        if self._skips:
            self._skip_from = len(self.out)
        else:
            self._stream = None
            self._cut(self._skip_from)
            # Not nothing: what it would have sent is let go of once the output has left.
            self.out.append(b"")

    def _resume(self) -> None:
        """Go on with what had to stop."""
        raise NotImplementedError

    def _cut(self, length: int) -> None:
        """Drop all but the first parts."""
        del self.out[length:]
        for promise in self.promises:
            promise.cut(length)

    def _restore_sent(self) -> None:
        sending, self._sending = self._sending, []
        for slot in sending:
            self.cache.restore(slot)


def _error(error: CacheError) -> bytes:
    word = error.word if isinstance(error, CommandError) else error.code
    return reply.error(f"{word} {error}")
