"""A call: a connection from the pool, an exchange, and another try where that is safe.

What breaks before anything was sent is tried again; after that, only what reads. A command that
changes something and whose answer was lost may have been carried out, which only the caller can
judge: that is ConnectionLost. Pauses between tries grow and are drawn at random, so that the
clients of a server that comes back do not all come at once.
"""

import random
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Generic, TypeVar

from respkv.client.arena import Arenas
from respkv.client.commands import Command
from respkv.client.connection import Connection, open_connection
from respkv.client.effects import Operation, Seat, Sleep
from respkv.client.gpu import GpuMemories
from respkv.client.pool import Pool, S
from respkv.client.replies import Reply
from respkv.client.requests import Arg, Request, request
from respkv.client.url import Settings
from respkv.errors import ConnectionLost, ServerError, TimedOut

T = TypeVar("T")
Talk = Callable[[Connection, float], Operation[T]]

PAUSE_S = 0.05
PAUSE_MAX_S = 1.0


class Core(Generic[S]):
    """What both faces are made of: operations, for a face to drive.

    arenas, gpus: how the server's memory is found; by mapping it when they are not given.
    """

    def __init__(
        self,
        settings: Settings,
        make_seats: Callable[[int], S],
        arenas: Arenas | None = None,
        gpus: GpuMemories | None = None,
    ) -> None:
        self.settings = settings
        self.pool = Pool(lambda: make_seats(settings.pool_max))
        self.arenas = arenas or Arenas()
        self.gpus = gpus or GpuMemories()
        self.shapes: dict[Any, Any] = {}  # of the pages of namespaces, see sequences.py
        self.unknown: set[str] = set()  # options that the server has refused: it is an older one

    def within(self, seconds: float) -> "Core[S]":
        """Return these connections for calls that take at most so long. Raises ConfigError."""
        found = copy(self)
        found.settings = replace(self.settings, timeout_s=min(seconds, self.settings.timeout_s))
        return found

    def call(self, command: Command[T]) -> Operation[T]:
        """Carry out one command.

        Raises ServerError, ConnectionLost, TimedOut, ProtocolError.
        Cancelled: the connection is closed; the command may have been carried out.
        """
        (reply,) = yield from self._exchange(request([command.args], command.targets))
        if isinstance(reply, ServerError):
            raise reply
        return command.decode(reply)

    def call_apart(self, command: Command[T]) -> Operation[T]:
        """Carry out one command over a connection of its own, for who holds a seat of the pool.

        Waiting for a second seat, all who have one could wait for each other. Raises and Cancelled:
        as ``call``.
        """
        if self.pool.closed:
            raise ConnectionLost("the client is closed")
        deadline = time.monotonic() + self.settings.timeout_s
        conn = yield from open_connection(self.settings, 0, deadline)
        try:
            asked = request([command.args], command.targets)
            (reply,) = yield from conn.exchange(asked, deadline)
        finally:
            conn.close()
        if isinstance(reply, ServerError):
            raise reply
        return command.decode(reply)

    def call_all(
        self, commands: Sequence[Sequence[Arg]], *, raise_on_error: bool
    ) -> Operation[list[Reply]]:
        """Send commands together and return their replies in order.

        Raises the first ServerError among them, or leaves all of them in the list.
        Cancelled: the connection is closed; any of the commands may have been carried out.
        """
        if not commands:
            return []
        replies = yield from self._exchange(request(commands))
        if raise_on_error:
            for reply in replies:
                if isinstance(reply, ServerError):
                    raise reply
        return replies

    def converse(self, talk: Talk[T], *, repeatable: bool) -> Operation[tuple[Connection, T]]:
        """Talk over a connection of the pool, which then is the caller's to give back.

        Raises what ``talk`` raises, ConnectionLost or TimedOut; nothing is kept then.
        Cancelled: the connection is closed.
        """
        deadline = time.monotonic() + self.settings.timeout_s
        attempt = 0
        while True:
            conn: Connection | None = None
            try:
                conn = yield from self._take(deadline)
                return conn, (yield from talk(conn, deadline))
            except ConnectionLost as error:
                failure = error
            except BaseException:
                self._give_back(conn)
                raise
            sent, used = (False, False) if conn is None else (conn.sent, conn.used)
            self._give_back(conn)
            if sent and not repeatable:
                raise ConnectionLost(
                    f"{failure}; the command may have been carried out"
                ) from failure
            pause = 0.0 if used else random.uniform(0, min(PAUSE_MAX_S, PAUSE_S * 2**attempt))
            if (
                attempt == self.settings.reconnect_max
                or self.pool.closed
                or time.monotonic() + pause >= deadline
            ):
                raise failure
            attempt += 1
            if pause:
                yield Sleep(pause, deadline)

    def _exchange(self, request: Request) -> Operation[list[Reply]]:
        def talk(conn: Connection, deadline: float) -> Operation[list[Reply]]:
            return conn.exchange(request, deadline)

        conn, replies = yield from self.converse(talk, repeatable=request.repeatable)
        self.pool.give_back(conn)
        return replies

    def _give_back(self, conn: Connection | None) -> None:
        if conn is not None:
            self.pool.give_back(conn)

    def _take(self, deadline: float) -> Operation[Connection]:
        pool = self.pool
        if pool.closed:
            raise ConnectionLost("the client is closed")
        if not (yield Seat(deadline)):
            raise TimedOut(f"all {self.settings.pool_max} connections stayed in use")
        seats, generation = pool.seats, pool.generation
        try:
            conn = pool.take_idle()
            if conn is None:
                conn = yield from open_connection(self.settings, generation, deadline)
                pool.add(conn)
            return conn
        except BaseException:
            seats.release()
            raise
