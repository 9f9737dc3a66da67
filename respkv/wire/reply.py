"""Replies as bytes, in RESP2 and RESP3, byte for byte as Redis 7.0 writes them.

One function per kind of reply for the hot path, and ``encode`` for whole nested values, so that a
command handler returns plain Python and need not know the protocol. RESP3 kinds that RESP2 lacks
are written as Redis writes them there: a map is a flat array, a set or push an array, a double or
verbatim string a bulk string, a boolean an integer.

Bytes of a client must never end a line of ours (RESP injection), therefore a CR or LF inside a
simple string or an error becomes a space. A page is not joined to its header: the server sends
``bulk_prefix(n)``, the slot's memory and ``CRLF`` in one gathered write.

Spec: https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

CRLF = b"\r\n"
OK = b"+OK\r\n"
PONG = b"+PONG\r\n"
QUEUED = b"+QUEUED\r\n"
RESET = b"+RESET\r\n"
EMPTY_BULK = b"$0\r\n\r\n"
EMPTY_ARRAY = b"*0\r\n"

# The absent value and the absent array, by protocol.
NIL: Mapping[int, bytes] = {2: b"$-1\r\n", 3: b"_\r\n"}
NIL_ARRAY: Mapping[int, bytes] = {2: b"*-1\r\n", 3: b"_\r\n"}

BULK_PREFIX: tuple[bytes, ...] = tuple(b"$%d\r\n" % length for length in range(4096))
# As lines, which are joined with CRLF in between.
BULK_LINE: tuple[bytes, ...] = tuple(prefix[:-2] for prefix in BULK_PREFIX)
NIL_LINE: Mapping[int, bytes] = {protocol: nil[:-2] for protocol, nil in NIL.items()}
_INTEGERS: tuple[bytes, ...] = tuple(b":%d\r\n" % number for number in range(1024))
_BOOLEANS: Mapping[int, tuple[bytes, bytes]] = {
    2: (b":0\r\n", b":1\r\n"),
    3: (b"#f\r\n", b"#t\r\n"),
}
_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")

# Union, because some members are written as strings.
Buffer: TypeAlias = Union[bytes, bytearray, "memoryview[Any]"]


@dataclass(frozen=True, slots=True)
class Simple:
    """A simple string, such as ``+OK``."""

    text: str | bytes


@dataclass(frozen=True, slots=True)
class Error:
    """An error inside a larger reply: its code word, a space, its text."""

    text: str | bytes


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Text with a three-letter format, ``txt`` or ``mkd``."""

    text: str | bytes
    format: str = "txt"


@dataclass(frozen=True, slots=True)
class ReplySet:
    """A set whose members keep their order and need not be hashable."""

    members: tuple["Reply", ...]


@dataclass(frozen=True, slots=True)
class Push:
    """An out-of-band message; its first item names its kind."""

    items: tuple["Reply", ...]


@dataclass(frozen=True, slots=True)
class NilArray:
    """The absent array, which RESP2 tells apart from the absent value."""


Reply: TypeAlias = Union[
    bool,
    int,
    float,
    str,
    Buffer,
    Simple,
    Error,
    Verbatim,
    ReplySet,
    Push,
    NilArray,
    "Sequence[Reply]",
    "Mapping[str, Reply]",
    "Mapping[bytes, Reply]",
    "Mapping[int, Reply]",
    "Set[str]",
    "Set[bytes]",
    None,
]


def integer(number: int) -> bytes:
    """Write an integer."""
    if 0 <= number < 1024:
        return _INTEGERS[number]
    return b":%d\r\n" % number


def simple(text: str | bytes) -> bytes:
    """Write a simple string."""
    return b"+%b\r\n" % _data(text).translate(_LINE_ENDS)


def error(code_and_text: str | bytes) -> bytes:
    """Write an error: its code word, a space, its text, whose last line ends go."""
    return b"-%b\r\n" % _data(code_and_text).rstrip(CRLF).translate(_LINE_ENDS)


def bulk_prefix(length: int) -> bytes:
    """Return what goes before the ``length`` bytes of a bulk string; CRLF goes after them."""
    if length < 4096:
        return BULK_PREFIX[length]
    return b"$%d\r\n" % length


def bulk(data: Buffer) -> bytes:
    """Write a bulk string, copying ``data``, which must be contiguous."""
    nbytes = data.nbytes if isinstance(data, memoryview) else len(data)
    return b"".join((bulk_prefix(nbytes), data, CRLF))


def array_header(count: int) -> bytes:
    """Begin an array of ``count`` items."""
    return b"*%d\r\n" % count


def map_header(count: int, protocol: int) -> bytes:
    """Begin a map of ``count`` pairs, key then value."""
    return b"%%%d\r\n" % count if protocol == 3 else b"*%d\r\n" % (2 * count)


def set_header(count: int, protocol: int) -> bytes:
    """Begin a set of ``count`` members."""
    return b"~%d\r\n" % count if protocol == 3 else b"*%d\r\n" % count


def push_header(count: int, protocol: int) -> bytes:
    """Begin a push message of ``count`` items."""
    return b">%d\r\n" % count if protocol == 3 else b"*%d\r\n" % count


def double(number: float, protocol: int) -> bytes:
    """Write a float with 17 digits, as Redis 7.0 does."""
    digits = b"%.17g" % number
    return b",%b\r\n" % digits if protocol == 3 else bulk(digits)


def boolean(truth: bool, protocol: int) -> bytes:
    """Write a boolean; RESP2 has 0 and 1."""
    return _BOOLEANS[protocol][truth]


def verbatim(text: str | bytes, protocol: int, format: str = "txt") -> bytes:  # noqa: A002
    """Write text for people, as INFO does. format: three letters."""
    assert len(format) == 3, format
    data = _data(text)
    if protocol != 3:
        return bulk(data)
    return b"=%d\r\n%b:%b\r\n" % (len(data) + 4, format.encode(), data)


def encode(value: Reply, protocol: int) -> bytes:
    """Write any nested value: str and buffers as bulk strings, None as the absent value.

    Raises TypeError for a value that RESP has no form for.
    """
    parts: list[bytes] = []
    _append(parts, value, protocol)
    return b"".join(parts)


def _append(parts: list[bytes], value: Reply, protocol: int) -> None:
    match value:
        case bytes() | bytearray() | memoryview():
            parts.append(bulk(value))
        case str():
            parts.append(bulk(_data(value)))
        case bool():
            parts.append(boolean(value, protocol))
        case int():
            parts.append(integer(value))
        case None:
            parts.append(NIL[protocol])
        case float():
            parts.append(double(value, protocol))
        case list() | tuple():
            _append_all(parts, array_header(len(value)), value, protocol)
        case Mapping():
            parts.append(map_header(len(value), protocol))
            for key, item in value.items():
                _append(parts, key, protocol)
                _append(parts, item, protocol)
        case Set():
            _append_all(parts, set_header(len(value), protocol), tuple(value), protocol)
        case Sequence():
            _append_all(parts, array_header(len(value)), value, protocol)
        case _:
            _append_marked(parts, value, protocol)


def _append_marked(
    parts: list[bytes],
    value: Simple | Error | Verbatim | ReplySet | Push | NilArray,
    protocol: int,
) -> None:
    match value:
        case Simple(text):
            parts.append(simple(text))
        case Error(text):
            parts.append(error(text))
        case Verbatim(text, form):
            parts.append(verbatim(text, protocol, form))
        case ReplySet(members):
            _append_all(parts, set_header(len(members), protocol), members, protocol)
        case Push(items):
            _append_all(parts, push_header(len(items), protocol), items, protocol)
        case NilArray():
            parts.append(NIL_ARRAY[protocol])
        case _:
            raise TypeError(f"RESP has no form for {type(value).__name__}")


def _append_all(parts: list[bytes], header: bytes, items: Sequence[Reply], protocol: int) -> None:
    parts.append(header)
    for item in items:
        _append(parts, item, protocol)


def _data(text: str | bytes) -> bytes:
    """Return the bytes of a text; those that came in undecodable leave as they came."""
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
