"""The connections of one client: at most ``pool_max``, the last one used is the next.

A seat is the right to have a connection open; whoever holds a connection holds a seat. Seats are
the only thing that waits, so they are the face's (a semaphore of threading or of anyio) and the
pool itself never blocks. Last in, first out keeps few connections warm and lets the rest idle out.

A forked child shares the parent's sockets, and a byte read or written by one is lost or garbled for
the other. So right after a fork, in the child, every pool drops all it has (closing a descriptor
does not hang up on the parent) and begins again with seats of its own.
"""

import os
import weakref
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

from respkv.client.connection import Connection


class Seats(Protocol):
    """A semaphore, of threading or of anyio."""

    def release(self) -> None: ...


S = TypeVar("S", bound=Seats)


class Pool(Generic[S]):
    """Idle connections and the seats of all. Thread-safe.

    make_seats: called once now, and once in each forked child.
    """

    def __init__(self, make_seats: Callable[[], S]) -> None:
        self._make_seats = make_seats
        self.closed = False
        self.generation = 0
        self.seats = make_seats()
        self._lock = Lock()
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        _pools.add(self)

    def take_idle(self) -> Connection | None:
        """Return the last used connection that is still good; those that are not are closed."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                conn = self._idle.pop()
            if conn.is_alive():
                return conn
            self._close(conn)

    def add(self, conn: Connection) -> None:
        """Note a connection that was opened by the holder of a seat."""
        with self._lock:
            self._open.add(conn)

    def give_back(self, conn: Connection) -> None:
        """Return a connection with its seat; one that is out of step is closed."""
        if conn.generation != self.generation:
            return  # it belonged to the parent process and is closed here
        conn.used = True
        with self._lock:
            keep = conn.in_step and not self.closed
            if keep:
                self._idle.append(conn)
        if not keep:
            self._close(conn)
        self.seats.release()

    def close(self) -> None:
        """Close idle connections now, and those in use when they are given back."""
        with self._lock:
            self.closed = True
            idle, self._idle = self._idle, []
        for conn in idle:
            self._close(conn)

    def after_fork(self) -> None:
        """Forget, in the child, what belongs to the parent."""
        left = self._open
        self.generation += 1
        self.seats, self._lock = self._make_seats(), Lock()
        self._idle, self._open = [], set()
        for conn in left:
            conn.close()

    def _close(self, conn: Connection) -> None:
        conn.close()
        with self._lock:
            self._open.discard(conn)


_pools: "weakref.WeakSet[Pool[Any]]" = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork)
