"""Leases and reservations: reading and writing pages in the server's memory, without a copy.

A lease belongs to a connection: when that ends, however it ends, the server lets go. So each keeps
one connection of the pool from begin to end, and ending needs no certainty: release if it can be
said, else close. The price is that what was read is known to be good only once the server has
confirmed, on release, that the lease still stood.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from struct import Struct
from typing import Any, Unpack

from respkv.client.arena import ADVICE, Arena
from respkv.client.commands import Key, PutOptions, put_options
from respkv.client.connection import Connection
from respkv.client.core import Core
from respkv.client.effects import Operation
from respkv.client.replies import Reply
from respkv.client.requests import Arg, request
from respkv.errors import (
    ConfigError,
    ConnectionLost,
    LeaseGone,
    ProtocolError,
    ServerError,
    TimedOut,
)

RESERVE_MS = 5000
_PLACE = Struct("<qq")  # offset and bytes of a page
_ABSENT = (-1, -1)


class LeaseHold:
    """A lease from begin to end.

    places: of each key's page its offset in the arena and its bytes, None where it is not cached.
    """

    def __init__(self, core: Core[Any], keys: Iterable[Key], ms: int | None) -> None:
        self.places: list[tuple[int, int] | None] = []
        self._arena: Arena | None = None
        self._pages: list[memoryview | None] | None = None
        self._whole: memoryview | None = None
        self._core = core
        self._keys = list(keys)
        self._ms = ms
        self._conn: Connection | None = None
        self._id: Reply = None

    @property
    def pages(self) -> list[memoryview | None]:
        """A read-only view of each key's page in the arena, None where it is not cached.

        They are released at the end; one that is still exported, say as an array, stays mapped, but
        its bytes may be another page's by then.
        """
        if self._pages is None:
            arena, places = self._arena, self.places
            self._pages = [
                None if arena is None or place is None else arena.view_to_read(*place)
                for place in places
            ]
        return self._pages

    @property
    def memory(self) -> memoryview:
        """A read-only view of the whole arena, which ``places`` are in, until the end."""
        assert self._arena is not None, "a lease is entered first"
        if self._whole is None:
            self._whole = self._arena.view_to_read(0, len(self._arena))
        return self._whole

    def begin(self) -> Operation[None]:
        """Take the lease.

        Raises ServerError, ConfigError, ConnectionLost, TimedOut; nothing is held then.
        Cancelled: nothing is held.
        """
        assert self._conn is None, "a lease begins once"
        args: list[Arg] = ["KV.LEASE", len(self._keys), *self._keys]
        if self._ms is not None:
            args += ("MS", self._ms)

        def talk(conn: Connection, deadline: float) -> Operation[None]:
            arena = yield from _attach(self._core, conn, deadline)
            words = [*args, "PACKED"] if conn.packs else args
            reply = yield from ask(conn, words, deadline)
            with undone_on_error(conn):
                self._id, *places = array_of(reply)
                self.places = _unpacked(places) if conn.packs else [*map(_place, places)]
                if len(self.places) != len(self._keys):
                    raise ProtocolError(f"{len(self._keys)} keys, {len(self.places)} places")
                _check_within(arena, self.places)
                self._arena = arena

        self._conn, _ = yield from self._core.converse(talk, repeatable=True)

    def end(self, *, failed: bool) -> Operation[None]:
        """Give the lease back.

        failed: the reader's own error is on its way and must not be hidden.
        Raises  LeaseGone when the lease did not stand to the end: what was read is void.
        Cancelled: the connection is closed, which ends the lease.
        """
        conn, self._conn = self._conn, None
        assert conn is not None, "a lease ends once"
        for page in self._pages or ():
            _release(page)
        _release(self._whole)
        self.places, self._pages = [], self._pages or []
        self._whole = self._arena = None
        try:
            still = yield from _ask_within(self._core, conn, ["KV.RELEASE", _arg(self._id)])
        except (ConnectionLost, TimedOut) as error:
            if not failed:
                raise LeaseGone("the connection that held the lease broke") from error
            return
        finally:
            self._core.pool.give_back(conn)
        if not still and not failed:
            raise LeaseGone("the lease lapsed before it was released; what was read is void")


class ReserveHold:
    """A reserved slot of the arena from begin to end."""

    def __init__(self, core: Core[Any], key: Key, nbytes: int, ms: int | None) -> None:
        self._core = core
        self._key = key
        self._nbytes = nbytes
        self._ms = RESERVE_MS if ms is None else ms
        self._conn: Connection | None = None
        self._id: Reply = None
        self._view: memoryview | None = None
        self._lapses = 0.0
        self._open = False

    @property
    def view(self) -> memoryview:
        """Return the slot, writable, ``nbytes`` long, until commit or the end."""
        assert self._view is not None, "a reservation is entered first"
        return self._view

    def begin(self) -> Operation[None]:
        """Take the slot. Raises and Cancelled: as for a lease."""
        assert self._conn is None, "a reservation begins once"

        def talk(conn: Connection, deadline: float) -> Operation[None]:
            arena = yield from _attach(self._core, conn, deadline)
            if not arena.writable:
                raise ConfigError("the server's memory is read-only; start it with --shm rw")
            # Counted from before the server can have begun, so this clock lapses first.
            self._lapses = time.monotonic() + self._ms / 1000
            args: list[Arg] = ["KV.RESERVE", self._key, self._nbytes, "MS", self._ms]
            reply = yield from ask(conn, args, deadline)
            with undone_on_error(conn):
                self._id, offset = array_of(reply, 2)
                self._view = arena.view(*_numbers(offset, self._nbytes))

        self._conn, _ = yield from self._core.converse(talk, repeatable=True)
        self._open = True

    def commit(self, **options: Unpack[PutOptions]) -> Operation[bool]:
        """Publish what was written; the view is not to be written from here on.

        Returns: False when ``nx`` was given and the key is there.
        Raises:  LeaseGone when the time for writing is over; ServerError as for put.
        Cancelled: the page may have been published or not.
        """
        assert self._conn is not None, "a reservation is entered first"
        if not self._open:
            raise LeaseGone("the reservation was committed before")
        if time.monotonic() >= self._lapses:
            raise LeaseGone(f"the {self._ms} ms for writing are over; nothing was published")
        args: list[Arg] = ["KV.COMMIT", _arg(self._id)]
        put_options(args, options)
        _release(self._view)
        try:
            reply = yield from _ask_within(self._core, self._conn, args)
        except ServerError as error:
            if error.word == LeaseGone.code:
                self._open = False
                raise LeaseGone(error.message) from error
            raise
        self._open = False
        return reply is not None

    def end(self) -> Operation[None]:
        """Give the slot back, unless it was committed.

        Cancelled: the connection is closed, which does the same.
        """
        conn, self._conn = self._conn, None
        assert conn is not None, "a reservation ends once"
        _release(self._view)
        try:
            if self._open and conn.in_step:
                with suppress(ConnectionLost, TimedOut, ServerError):
                    yield from _ask_within(self._core, conn, ["KV.ABORT", _arg(self._id)])
        finally:
            self._core.pool.give_back(conn)


def _attach(core: Core[Any], conn: Connection, deadline: float) -> Operation[Arena]:
    if conn.arena is None:
        try:
            answer = yield from ask(conn, ["KV.ATTACH"], deadline)
        except ServerError as error:
            if "unknown command" in error.message or "--shm" in error.message:
                raise
            raise ServerError(error.word, f"{error.message} ({ADVICE})") from error
        conn.arena = core.arenas.find(answer)
        conn.packs = isinstance(answer, list) and b"packed" in answer[5:]
    return conn.arena


def _ask_within(core: Core[Any], conn: Connection, args: Sequence[Arg]) -> Operation[Reply]:
    if not conn.in_step:
        raise ConnectionLost("the connection was closed by a failed call or a fork")
    return (yield from ask(conn, args, time.monotonic() + core.settings.timeout_s))


def ask(conn: Connection, args: Sequence[Arg], deadline: float) -> Operation[Reply]:
    """Send a command and return its reply. Raises ServerError."""
    (reply,) = yield from conn.exchange(request([args]), deadline)
    if isinstance(reply, ServerError):
        raise reply
    return reply


@contextmanager
def undone_on_error(conn: Connection) -> Iterator[None]:
    """Close a connection if the block raises: what it holds by then has no owner, and so ends."""
    try:
        yield
    except BaseException:
        conn.close()
        raise


def _place(place: Reply) -> tuple[int, int] | None:
    """Read where a page is, as a plain lease says it. Raises ProtocolError."""
    return None if place is None else _numbers(*array_of(place, 2))


def _numbers(offset: Reply, nbytes: Reply) -> tuple[int, int]:
    if not isinstance(offset, int) or not isinstance(nbytes, int):
        raise ProtocolError(f"{[offset, nbytes]!r} is not a place in the arena")
    return offset, nbytes


def _unpacked(places: list[Reply]) -> list[tuple[int, int] | None]:
    """Read where pages are, as a packed lease says it. Raises ProtocolError."""
    packed = places[0] if len(places) == 1 else None
    if not isinstance(packed, bytes | memoryview) or len(packed) % _PLACE.size:
        raise ProtocolError("a packed lease was answered with something else")
    return [None if place == _ABSENT else place for place in _PLACE.iter_unpack(packed)]


def _check_within(arena: Arena, places: list[tuple[int, int] | None]) -> None:
    """Raise ProtocolError unless all pages are within the arena."""
    size = len(arena)
    for place in places:
        if place is not None and not 0 <= place[0] <= place[0] + place[1] <= size:
            raise ProtocolError(f"{place[1]} bytes at {place[0]} are not within the arena")


def array_of(reply: Reply, count: int | None = None) -> list[Reply]:
    """Return a reply that is an array, of so many values. Raises ProtocolError."""
    if not isinstance(reply, list) or not reply or (count is not None and len(reply) != count):
        raise ProtocolError(f"a lease was answered with {type(reply).__name__}")
    return reply


def _arg(lease_id: Reply) -> Arg:
    if not isinstance(lease_id, int | bytes):
        raise ProtocolError(f"{lease_id!r} is not a lease id")
    return lease_id


def _release(view: memoryview | None) -> None:
    if view is not None:
        with suppress(BufferError):  # an array made of it is still alive
            view.release()
