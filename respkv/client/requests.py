"""Requests: arguments in, buffers to send out, and what may be done to them when a link breaks.

Small arguments are joined; one of ``GATHER_BYTES`` or more stays where the caller has it and is
sent from there by a gathered write.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

GATHER_BYTES = 4 * 1024


class HasBuffer(Protocol):
    """Anything with the buffer interface: bytes, bytearray, memoryview, mmap."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class HasArray(Protocol):
    """An array of numpy. It has the buffer interface too, but says so only from Python 3.12 on."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Gathered:
    """One argument that lies in several places: bytes, to be sent one behind the other."""

    views: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(map(len, self.views))


Buffer: TypeAlias = HasBuffer | HasArray
Arg: TypeAlias = str | int | float | Buffer | Gathered
Chunk: TypeAlias = bytes | bytearray | memoryview

# Sent twice, these give what they would have given once. KV.LEASE and KV.RESERVE are here because
# what they hold ends with the connection that broke.
REPEATABLE = frozenset(
    b"DBSIZE ECHO EXISTS EXPIRETIME GET GETRANGE INFO KEYS MGET PEXPIRETIME PING PTTL RANDOMKEY "
    b"SCAN STRLEN TIME TOUCH TTL TYPE KV.ATTACH KV.EXPLAIN KV.GET KV.INFO KV.LEASE KV.MATCH "
    b"KV.MGET KV.PREFETCH KV.RESERVE KV.SEQ.GET KV.SEQ.MATCH KV.STATS KV.TIERS KV.TOUCH".split()
)
# They leave their mark on the connection, so no other call may have it afterwards.
LEAVES_STATE = frozenset(b"ASKING AUTH CLIENT HELLO QUIT READONLY RESET SELECT WATCH".split())
# They change what a connection answers; a pool that gives each call a connection has no use for it.
NOT_OFFERED = frozenset(b"MONITOR PSUBSCRIBE PSYNC SSUBSCRIBE SUBSCRIBE SYNC".split())


@dataclass(slots=True)
class Request:
    """One or more commands that are sent together.

    chunks:     what to send; payloads among them belong to the caller until the call ends.
    count:      how many replies will come.
    targets:    see ``ReplyParser.expect``; for a single command.
    repeatable: may be sent again when it is not known whether it was carried out.
    parting:    the connection must not be used again.
    """

    chunks: list[Chunk]
    count: int
    targets: Sequence[memoryview] = ()
    repeatable: bool = False
    parting: bool = False


def request(commands: Sequence[Sequence[Arg]], targets: Sequence[memoryview] = ()) -> Request:
    """Encode commands.

    Raises TypeError or ValueError naming the argument that cannot be sent.
    """
    small = bytearray()
    chunks: list[Chunk] = []
    for args in commands:
        if not args:
            raise ValueError("a command needs a name")
        small += b"*%d\r\n" % len(args)
        for arg in args:
            if isinstance(arg, Gathered):
                small = _gather(arg, small, chunks)
                continue
            data = _chunk(arg)
            small += b"$%d\r\n" % len(data)
            if len(data) < GATHER_BYTES:
                small += data
                small += b"\r\n"
            else:
                chunks += (small, data)
                small = bytearray(b"\r\n")
    chunks.append(small)
    names = [_name(args) for args in commands]
    return Request(
        chunks,
        len(commands),
        targets,
        repeatable=all(map(_is_repeatable, names, commands)),
        parting=_is_parting(names),
    )


def _gather(arg: Gathered, small: bytearray, chunks: list[Chunk]) -> bytearray:
    """Append an argument behind what waits in ``small``; return what waits then."""
    small += b"$%d\r\n" % arg.nbytes
    for view in arg.views:
        if len(view) < GATHER_BYTES:
            small += view
            continue
        if small:
            chunks.append(small)
            small = bytearray()
        chunks.append(view)
    small += b"\r\n"
    return small


def view_of(buffer: Buffer) -> memoryview:
    """Return a view of a buffer. Raises TypeError or ValueError when it is none."""
    return memoryview(cast(HasBuffer, buffer))


def writable_bytes(buffer: Buffer) -> memoryview:
    """Return a buffer as writable bytes. Raises ValueError when it cannot be written in place."""
    view = view_of(buffer)
    if view.readonly or not view.c_contiguous:
        raise ValueError("into must be writable and contiguous")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def check_offered(args: Sequence[Arg]) -> None:
    """Raise ValueError for a command that takes a connection over, such as SUBSCRIBE."""
    if args and _name(args) in NOT_OFFERED:
        raise ValueError(f"{args[0]!r} takes over a connection; a pooled client cannot send it")


def _chunk(arg: Arg) -> Chunk:
    assert not isinstance(arg, Gathered), "a gathered argument is no word"
    if isinstance(arg, bytes):
        return arg
    if isinstance(arg, str):
        return arg.encode()
    if isinstance(arg, bool):
        raise TypeError("a command argument cannot be a bool; say what the server shall read")
    if isinstance(arg, int):
        return b"%d" % arg
    if isinstance(arg, float):
        return float.__repr__(arg).encode()  # numpy's floats, which are floats, print otherwise
    try:
        view = view_of(arg)
    except (TypeError, ValueError):  # numpy refuses its bfloat16 with the latter
        raise TypeError(
            f"a command argument cannot be a {type(arg).__name__}; arrays and tensors without a"
            " buffer go through as_bytes"
        ) from None
    if view.ndim == 0:
        raise TypeError(f"a command argument cannot be a {type(arg).__name__}; make it an int")
    if not view.c_contiguous:
        raise ValueError("a payload must be contiguous in memory")
    return view.cast("B") if view.nbytes else b""


def _name(args: Sequence[Arg]) -> bytes:
    return bytes(_chunk(args[0])).upper()


def _is_repeatable(name: bytes, args: Sequence[Arg]) -> bool:
    if name == b"KV.SCHEMA" and len(args) > 1:
        return _name(args[1:]) in (b"GET", b"LIST")
    return name in REPEATABLE


def _is_parting(names: Sequence[bytes]) -> bool:
    # MULTI is fine when the same pipeline also ends it.
    ends = [name for name in names if name in (b"MULTI", b"EXEC", b"DISCARD")]
    return not LEAVES_STATE.isdisjoint(names) or (bool(ends) and ends[-1] == b"MULTI")
