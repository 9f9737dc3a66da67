"""RESP2 and RESP3 replies, bytes in and values out. No sockets, no clocks.

A page is megabytes and must not pass through a buffer. So the parser owns the memory that the
socket reads into: ``get_buffer`` is where the next bytes belong, ``received`` says how many came.
Between values that is a small buffer; inside a bulk of ``LARGE_BYTES`` or more it is the rest of
the bulk's final place, at any depth of nesting. Only what arrived together with the bulk's header,
one small read at most, is copied twice. hiredis was left: it buffers a bulk whole before it gives
it out, and taking over in the middle of a nested reply means working out where it stopped.

Values: bytes for simple and bulk strings, memoryview for large ones, int, float, bool, None, list
(also for sets), dict, ServerError for errors wherever they stand. Attributes are read and dropped.
Push messages are set aside in ``pushes``. Source: the RESP3 specification,
https://github.com/redis/redis-specifications/blob/master/protocol/RESP3.md (streamed types are not
sent by any server and are refused).
"""

import mmap
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from enum import Enum, auto
from typing import Final, Literal, TypeAlias, Union

from respkv.errors import ProtocolError, ServerError

Reply: TypeAlias = Union[
    bytes, memoryview, int, float, bool, ServerError, "list[Reply]", "dict[Hashable, Reply]", None
]

LARGE_BYTES = 64 * 1024
BULK_BYTES_MAX = 4 << 30
LINE_BYTES_MAX = 64 * 1024
DEPTH_MAX = 64
PUSHES_MAX = 1024  # the oldest are forgotten first
READ_BYTES = 16 * 1024
# Whatever is not landed, a small bulk or a line, fits whole and leaves room for one more read.
BUFFER_BYTES = max(LARGE_BYTES, LINE_BYTES_MAX) + 2 * READ_BYTES
# The C library gives blocks from here on back to the system, so each would be faulted in afresh
# 4 KiB at a time; huge pages make that cheap. Smaller ones it recycles.
HUGE_BYTES = 32 << 20


class Signal(Enum):
    NEED_DATA = auto()
    PENDING = auto()


NEED_DATA: Final = Signal.NEED_DATA
_PENDING: Final = Signal.PENDING
_NeedData: TypeAlias = Literal[Signal.NEED_DATA]
_Pending: TypeAlias = Literal[Signal.PENDING]

_ARRAY, _SET, _MAP, _ATTRIBUTE, _PUSH = b"*~%|>"
_BULK, _VERBATIM, _BULK_ERROR = b"$=!"


class _Aggregate:
    """An array, set, map, attribute or push that still lacks elements."""

    __slots__ = ("count", "items", "kind")

    def __init__(self, kind: int, count: int) -> None:
        self.kind = kind
        self.count = count
        self.items: list[Reply] = []


class ReplyParser:
    """Parse one connection's replies."""

    def __init__(self) -> None:
        self.pushes: deque[list[Reply]] = deque(maxlen=PUSHES_MAX)
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._stack: list[_Aggregate] = []
        self._bulk_kind = _BULK
        self._bulk_bytes = -1  # of the bulk whose header has been read, or -1
        self._landing: memoryview | None = None
        self._landed = 0
        self._targets: Sequence[memoryview] = ()

    @property
    def is_idle(self) -> bool:
        """True when nothing is buffered or half read: the connection may be used for a call."""
        return self._start == self._end and not self._stack and self._bulk_bytes < 0

    @property
    def open_array(self) -> "tuple[list[Reply], int] | None":
        """The elements so far of the array that is the next reply, and how many it will have."""
        if not self._stack or self._stack[0].kind != _ARRAY:
            return None
        return self._stack[0].items, self._stack[0].count

    def expect(self, targets: Sequence[memoryview]) -> None:
        """Land the next reply's bulks in the caller's memory.

        targets: writable bytes, one for each element of an array, or one for a single bulk. One
                 that is too short is left alone and its bulk comes in memory of its own.
        """
        self._targets = targets

    def get_buffer(self) -> memoryview:
        """Return where the next received bytes belong; never empty. Valid until ``received``."""
        if self._landing is not None and self._landed < self._bulk_bytes:
            return self._landing[self._landed :]
        if self._start == self._end:
            self._start = self._end = 0
        elif BUFFER_BYTES - self._end < READ_BYTES or self._start + self._wanted() > BUFFER_BYTES:
            count = self._end - self._start
            self._buffer[:count] = self._buffer[self._start : self._end]
            self._start, self._end = 0, count
        stop = max(self._end + READ_BYTES, self._start + self._wanted())
        return self._view[self._end : min(stop, BUFFER_BYTES)]

    def received(self, count: int) -> None:
        """Note that ``count`` bytes were written to the start of the buffer."""
        if self._landing is not None and self._landed < self._bulk_bytes:
            self._landed += count
            assert self._landed <= self._bulk_bytes
        else:
            self._end += count
            assert self._end <= BUFFER_BYTES

    def next_reply(self) -> Reply | _NeedData:
        """Return the next whole reply, or NEED_DATA. Raises ProtocolError, after which stop."""
        while True:
            value = self._next_value()
            if value is NEED_DATA:
                return NEED_DATA
            if value is _PENDING:
                continue
            value = self._attach(value)
            if value is not _PENDING:
                self._targets = ()
                return value

    def _wanted(self) -> int:
        return self._bulk_bytes + 2 if self._landing is None else 0

    def _attach(self, value: Reply) -> Reply | _Pending:
        # Give a value to the aggregate it belongs to; one that this completes is a value in turn.
        while self._stack:
            top = self._stack[-1]
            top.items.append(value)
            if len(top.items) < top.count:
                return _PENDING
            self._stack.pop()
            closed = self._close(top)
            if closed is _PENDING:
                return _PENDING
            value = closed
        return value

    def _close(self, aggregate: _Aggregate) -> Reply | _Pending:
        items = aggregate.items
        if aggregate.kind == _ATTRIBUTE:
            return _PENDING  # the value that follows takes its place
        if aggregate.kind == _PUSH:
            self.pushes.append(items)
            return _PENDING
        if aggregate.kind == _MAP:
            pairs = zip(items[::2], items[1::2], strict=True)
            return {_hashable(key): value for key, value in pairs}
        return items

    def _next_value(self) -> Reply | Signal:
        if self._bulk_bytes >= 0:
            return self._read_bulk()
        start = self._start
        stop = self._buffer.find(b"\r\n", start, self._end)
        if stop < 0:
            if self._end - start > LINE_BYTES_MAX:
                raise ProtocolError(f"a line is longer than {LINE_BYTES_MAX} bytes")
            return NEED_DATA
        kind = self._buffer[start]
        line = self._view[start + 1 : stop].tobytes()
        self._start = stop + 2
        if kind in (_BULK, _VERBATIM, _BULK_ERROR):
            return self._open_bulk(kind, line)
        if (scalar := _SCALARS.get(kind)) is not None:
            return scalar(line)
        if kind in (_ARRAY, _SET, _MAP, _ATTRIBUTE, _PUSH):
            return self._open_aggregate(kind, line)
        raise ProtocolError(f"no reply starts with {bytes([kind])!r}")

    def _open_aggregate(self, kind: int, line: bytes) -> Reply | Signal:
        if line == b"-1" and kind == _ARRAY:
            return None
        count = _length(line)
        if kind == _PUSH and self._stack:
            raise ProtocolError("a push message stands inside a reply")
        if len(self._stack) == DEPTH_MAX:
            raise ProtocolError(f"a reply is nested more than {DEPTH_MAX} deep")
        aggregate = _Aggregate(kind, 2 * count if kind in (_MAP, _ATTRIBUTE) else count)
        if count == 0:
            return self._close(aggregate)
        self._stack.append(aggregate)
        return _PENDING

    def _open_bulk(self, kind: int, line: bytes) -> Reply | Signal:
        if line == b"-1" and kind == _BULK:
            return None
        nbytes = _length(line)
        if nbytes > BULK_BYTES_MAX:
            raise ProtocolError(f"a bulk of {nbytes} bytes is over {BULK_BYTES_MAX}")
        target = self._target() if kind == _BULK else None
        if target is not None and len(target) >= nbytes:
            self._landing = target[:nbytes]
        elif nbytes >= LARGE_BYTES:
            self._landing = _fresh(nbytes)
        self._bulk_kind, self._bulk_bytes, self._landed = kind, nbytes, 0
        return self._read_bulk()

    def _target(self) -> memoryview | None:
        # The caller's memory for the bulk that opens now: by its place in the reply.
        if not self._stack:
            index = 0
        elif len(self._stack) == 1 and self._stack[0].kind == _ARRAY:
            index = len(self._stack[0].items)
        else:
            return None
        return self._targets[index] if index < len(self._targets) else None

    def _read_bulk(self) -> Reply | Signal:
        data: bytes | memoryview
        if self._landing is None:
            if self._end - self._start < self._bulk_bytes + 2:
                return NEED_DATA
            data = self._view[self._start : self._start + self._bulk_bytes].tobytes()
            self._start += self._bulk_bytes
        else:
            self._land_buffered(self._landing)
            if self._landed < self._bulk_bytes or self._end - self._start < 2:
                return NEED_DATA
            data = self._landing
        if self._buffer[self._start : self._start + 2] != b"\r\n":
            raise ProtocolError("a bulk string must end in CRLF")
        self._start += 2
        self._landing, self._bulk_bytes = None, -1
        if self._bulk_kind == _BULK_ERROR:
            return _error(bytes(data))
        if self._bulk_kind == _VERBATIM:
            if bytes(data[3:4]) != b":":
                raise ProtocolError("a verbatim string must name its format")
            return data[4:]
        return data

    def _land_buffered(self, landing: memoryview) -> None:
        count = min(self._bulk_bytes - self._landed, self._end - self._start)
        if count:
            landing[self._landed : self._landed + count] = self._view[
                self._start : self._start + count
            ]
            self._landed += count
            self._start += count


def _fresh(nbytes: int) -> memoryview:
    if nbytes < HUGE_BYTES:
        return memoryview(bytearray(nbytes))
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)


def _hashable(key: Reply) -> Hashable:
    if isinstance(key, list):
        return tuple(_hashable(item) for item in key)
    if isinstance(key, dict):
        return tuple((name, _hashable(value)) for name, value in key.items())
    return bytes(key) if isinstance(key, memoryview) else key


def _length(line: bytes) -> int:
    if not line.isdigit() or len(line) > 18:
        raise ProtocolError(f"expected a length, got {line[:32]!r}")
    return int(line)


def _integer(line: bytes) -> int:
    digits = line[1:] if line[:1] in (b"-", b"+") else line
    # The interpreter refuses longer ones, as their conversion takes quadratic time.
    if not digits.isdigit() or len(digits) > 4000:
        raise ProtocolError(f"expected an integer, got {line[:32]!r}")
    return int(line)


def _double(line: bytes) -> float:
    try:
        return float(line)
    except ValueError:
        raise ProtocolError(f"expected a double, got {line[:32]!r}") from None


def _boolean(line: bytes) -> bool:
    if line not in (b"t", b"f"):
        raise ProtocolError(f"expected a boolean, got {line[:32]!r}")
    return line == b"t"


def _null(line: bytes) -> None:
    if line:
        raise ProtocolError(f"expected a null, got {line[:32]!r}")


def _error(line: bytes) -> ServerError:
    word, _, message = line.decode(errors="replace").partition(" ")
    return ServerError(word, message)


_SCALARS: dict[int, Callable[[bytes], Reply]] = {
    ord("+"): bytes,
    ord("-"): _error,
    ord(":"): _integer,
    ord("("): _integer,
    ord(","): _double,
    ord("#"): _boolean,
    ord("_"): _null,
}
