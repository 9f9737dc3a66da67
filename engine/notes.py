"""What a reply may have to wait for: something that must stand in a log first.

A note has one or more parts: the value that is written, or a burial in each tier that knew the key.
It is known under the tickets that were given out for it. A session remembers the last ticket before
and after its command and waits for those in between, so that one client's failed write is no other
client's error. What failed is remembered for a while, because the one who waits may come late.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from respkv.tiers.record import Level

FAILURES_MAX = 65536


class Note:
    """Something that holds once all of its parts do, or has failed.

    todo:    parts that are still missing.
    error:   why it failed, empty while it has not.
    waiters: called once when nothing is missing any more.
    """

    __slots__ = ("error", "tickets", "todo", "waiters")

    def __init__(self, todo: int = 1) -> None:
        self.todo = todo
        self.error = ""
        self.tickets: list[int] = []
        self.waiters: list[Callable[[], None]] = []

    def end(self, error: str = "") -> None:
        """Note that one part holds, or why it never will."""
        assert self.todo > 0
        self.todo -= 1
        self.error = self.error or error
        if not self.todo:
            waiters, self.waiters = self.waiters, []
            for waiter in waiters:
                waiter()


class Settle(NamedTuple):
    """Up to which ticket of a tier its notes must hold for one part of ``note``."""

    tier: int
    ticket: int
    level: Level
    note: Note


class Notes:
    """The notes by ticket. ``ticket`` is the last one given out."""

    def __init__(self) -> None:
        self.ticket = 0
        self._open: dict[int, Note] = {}
        self._failed: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, note: Note) -> None:
        """Give out a ticket for a note."""
        self.ticket += 1
        if not note.todo:
            self._close(self.ticket, note.error)
            return
        if not note.tickets:
            note.waiters.insert(0, lambda: self._over(note))
        note.tickets.append(self.ticket)
        self._open[self.ticket] = note

    def find(self, ticket: int) -> Note | None:
        """Return the note of a ticket while it is open."""
        return self._open.get(ticket)

    def failure(self, ticket: int) -> str:
        """Return why the note of a ticket failed; empty if it holds."""
        return self._failed.get(ticket, "")

    def _over(self, note: Note) -> None:
        for ticket in note.tickets:
            del self._open[ticket]
            self._close(ticket, note.error)

    def _close(self, ticket: int, error: str) -> None:
        if error:
            self._failed[ticket] = error
            if len(self._failed) > FAILURES_MAX:
                self._failed.popitem(last=False)
