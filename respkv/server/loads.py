"""Values that are only in files, on their way into memory for the commands of one connection.

A command that needs bytes which are not in memory stays where it is until they are, and then runs
in one turn, as any other. Meanwhile the reads for the commands behind it have begun, so pipelined
gets overlap on the device and are answered in their order. Bounds of what is read ahead: for each
connection ``AHEAD_MAX`` commands and so many bytes, and so many bytes for all of them together,
because what is read ahead fills memory that the command in front may need. A command that needs
more than one value gets in line for their memory first (budget.py).

Every load keeps its value in memory until it is released, which is once its command has run, has
not run because the connection is lost, or stands behind a client that takes nothing.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from operator import length_hint
from typing import TYPE_CHECKING

import anyio

from respkv.engine.entry import Entry
from respkv.errors import CacheError, OutOfMemory, TierError
from respkv.server.body import LAND_MIN
from respkv.server.budget import Budget, Place
from respkv.server.registry import one_key
from respkv.wire.parser import Args

if TYPE_CHECKING:
    from respkv.engine.cache import Cache
    from respkv.engine.loads import Load
    from respkv.engine.mover import Mover
    from respkv.server.registry import Handler, Later
    from respkv.server.session import Session
    from respkv.server.state import Server

AHEAD_MAX = 64


def is_cold(entry: Entry) -> bool:
    """Whether an entry's bytes are in no memory."""
    return entry.slot is None and entry.value is None


def cold_entries(cache: "Cache", keys: Iterable[bytes]) -> list[Entry]:
    """Return the entries among the keys' that have to be loaded."""
    found = map(cache.find, keys)
    return [entry for entry in found if entry is not None and is_cold(entry)]


class Delay(ABC):
    """What a command has to wait for before it can run."""

    @abstractmethod
    async def wait(self) -> None:
        """Wait; the command is tried again afterwards."""


class Pause(Delay):
    """A wait for values to be written, before one more is added to those that are not."""

    def __init__(self, server: "Server") -> None:
        self._server = server

    async def wait(self) -> None:
        """Wait until there are few enough of them, for a second at most."""
        await self._server.wait_for_writes()


class Loading(Delay):
    """The loads for one command.

    share:   of the budget, taken when they were begun ahead of their turn.
    place:   in line for the memory; nothing begins before it is let in.
    seconds: for how long to wait; None: until they have ended.
    is_over: they were waited for; what is cold still could not be loaded, or not in time.
    """

    def __init__(self, mover: "Mover", share: int = 0, place: Place | None = None) -> None:
        self.share = share
        self._place = place
        self._mover = mover
        self._wanted: list[Entry] = []  # to be begun once it is let in
        self._loads: dict[Entry, Load] = {}
        self._scope: anyio.CancelScope | None = None
        self._is_dropped = False
        self.seconds: float | None = None
        self.is_over = False

    def add(self, entries: Iterable[Entry]) -> None:
        """Begin what has not begun, or note it, while it stands in line."""
        if self._place is not None and not self._place.is_in:
            self._wanted += entries
            return
        for entry in entries:
            if entry not in self._loads:
                self._loads[entry] = self._mover.start_load(entry)

    async def wait(self) -> None:
        """Wait until all have ended, or the time is over; those on their way then go on.

        Cancelled: nothing has changed; whoever began it still has to drop it.
        """
        with anyio.move_on_after(self.seconds) as self._scope:
            if self._place is not None:
                await self._place.wait()
            self._begin_wanted()
            for load in list(self._loads.values()):
                await load.wait()
        self.is_over = True
        if self._scope.cancelled_caught and not self._is_dropped:
            self.leave_to_others()

    def _begin_wanted(self) -> None:
        wanted, self._wanted = self._wanted, []
        if not self._is_dropped:
            self.add(wanted)

    def leave_to_others(self) -> None:
        """Have what is still on its way stay in memory for whoever asks next."""
        self._mover.advise_prefetch([entry for entry in self._loads if is_cold(entry)])

    def check(self) -> None:
        """Raise the reason why an entry is still cold, if there is one."""
        for entry, load in self._loads.items():
            if load.error is not None and is_cold(entry):
                raise load.error

    def errors(self) -> list[CacheError]:
        """Return why entries are still cold."""
        loads = self._loads.items()
        return [load.error for entry, load in loads if load.error is not None and is_cold(entry)]

    def drop(self) -> None:
        """Release all; a wait ends."""
        self._is_dropped = True
        loads, self._loads = self._loads, {}
        for load in loads.values():
            self._mover.release(load)
        if self._place is not None:
            self._place.leave()
        if self._scope is not None:
            self._scope.cancel()


class Loads:
    """The loads of one connection. Commands are known by their number: the how-manyth they are."""

    def __init__(self, mover: "Mover", budget: Budget) -> None:
        self._mover = mover
        self._budget = budget
        self._share = 0  # of the budget
        self._begun: dict[int, Loading] = {}
        self._looked = 0  # number of the first command that was not looked at
        self._todo: Iterator[Args] = iter(())
        self._num_todo = 0
        self._paused = -1  # number of the last command that had a pause
        self.next_number = 0  # of the next command to run

    def begin_turn(self, todo: Iterator[Args], count: int) -> None:
        """Note that the next ``count`` commands are taken from ``todo``."""
        self._todo, self._num_todo = todo, count

    def handle(self, session: "Session", found: "Handler", args: Args) -> "Later | None":
        """Run the command last taken in this turn, or say what it has to wait for first."""
        cache = session.cache
        copies = cache.copies
        delay: Delay | None = None
        if copies.num_cold and len(args) >= found.reads_from:
            if found.reads is not one_key:
                delay = self._missing(cache, found, args)
            else:  # as GET, which is to be quick
                entry = cache.entries.get(args[1])
                if entry is not None and entry.value is None and entry.slot is None:
                    delay = self._missing(cache, found, args)
        if delay is None and found.payload_at:
            value = args[found.payload_at]
            if type(value) is bytes and len(value) >= LAND_MIN and copies.is_behind:
                delay = self._pause(session.server)
        if delay is not None:
            return delay
        since, start = copies.ticket, len(session.out)
        try:
            return found.handle(session, args)
        finally:
            if copies.ticket != since:
                session.promise(since, start)

    @property
    def _number(self) -> int:
        """Of the command last taken in this turn."""
        return self.next_number + self._num_todo - length_hint(self._todo) - 1

    def _missing(self, cache: "Cache", found: "Handler", args: Args) -> Loading | None:
        """Return what the command last taken has to wait for.

        None: it may run; what is cold then it will not get. Raises the reason if it would change
        what it cannot read.
        """
        assert found.reads is not None
        cold = cold_entries(cache, found.reads(args)) if found.streams != "always" else []
        if not cold or (found.streams == "large" and _nbytes(cold) > self._budget.each_max):
            return None
        if found.is_strict:
            _check_fits(cache, found.reads(args))
        number = self._number
        loading = self._begun.get(number)
        if loading is None or not loading.is_over:
            loading = self._begin(number, cold)
            loading.seconds = None if found.within is None else found.within(args)
            if loading.seconds != 0:
                return loading
            loading.leave_to_others()
        if found.is_strict:
            loading.check()
            raise TierError("the value could not be read in time; try again")
        return None

    def _pause(self, server: "Server") -> Pause | None:
        """Return a pause for the command last taken; None: it has had one."""
        number = self._number
        if self._paused == number:
            return None
        self._paused = number
        return Pause(server)

    def _begin(self, number: int, cold: list[Entry]) -> Loading:
        """Begin what a command needs; return all of it."""
        loading = self._begun.get(number)
        if loading is None:
            place = self._budget.line_up(_nbytes(cold)) if len(cold) > 1 else None
            loading = self._begun[number] = Loading(self._mover, place=place)
        loading.add(cold)
        return loading

    def advance(self, num_run: int) -> None:
        """Note that commands have run: what they needed may go."""
        self.next_number += num_run
        if self._begun:
            for number in [number for number in self._begun if number < self.next_number]:
                self._end(self._begun.pop(number))

    def look_ahead(
        self, cache: "Cache", handlers: "Mapping[bytes, Handler]", backlog: deque[Args]
    ) -> None:
        """Begin to load what the next commands will need."""
        first = max(self._looked, self.next_number)
        stop = self.next_number + AHEAD_MAX
        ahead = islice(backlog, first - self.next_number, AHEAD_MAX)
        for number, cold in _cold_ahead(cache, handlers, ahead, first):
            if number in self._begun:  # the one in front
                continue
            nbytes = _nbytes(cold)
            if self._share + nbytes > self._budget.each_max or not self._budget.take(nbytes):
                stop = number
                break
            self._share += nbytes
            loading = self._begun[number] = Loading(self._mover, nbytes)
            loading.add(cold)
        self._looked = min(stop, self.next_number + len(backlog))

    def drop(self) -> None:
        """Release all, and look again when there is a reason."""
        begun, self._begun = self._begun, {}
        self._looked = 0
        for loading in begun.values():
            self._end(loading)

    def _end(self, loading: Loading) -> None:
        self._share -= loading.share
        self._budget.give_back(loading.share)
        loading.drop()


def _nbytes(entries: Iterable[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _check_fits(cache: "Cache", keys: Iterable[bytes]) -> None:
    """Raise OutOfMemory when memory never holds the values of all keys at once."""
    found = {entry for entry in map(cache.find, keys) if entry is not None}
    nbytes, most = _nbytes(found), cache.slabs.budget_bytes
    if nbytes > most:
        raise OutOfMemory(
            f"{len(found)} values of {nbytes} bytes together never fit memory, which takes {most}:"
            " ask for fewer at once, or raise maxmemory"
        )


def _cold_ahead(
    cache: "Cache", handlers: "Mapping[bytes, Handler]", commands: Iterator[Args], number: int
) -> Iterator[tuple[int, list[Entry]]]:
    for args in commands:
        found = handlers.get(args[0])
        if found is not None and found.reads is not None and found.takes(len(args)):
            cold = cold_entries(cache, found.reads(args))
            if cold:
                yield number, cold
        number += 1
