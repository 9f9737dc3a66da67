"""A device of threads: preadv and pwritev, at most ``depth`` at a time.

For machines whose kernel or container refuses io_uring. It costs two to ten times the processor.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, TypeVarTuple

import anyio

from respkv.tiers.claim import Opened
from respkv.tiers.device import Write
from respkv.tiers.directory import Directory, Engine
from respkv.tiers.transfers import advance, unfinished

_ALIGNMENT = 4096
_PIECES_MAX = 1024  # IOV_MAX of Linux
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class PoolDevice(Directory):
    """Files read and written in threads; ``Device`` says what each method does."""

    engine: Engine = "threads"
    alignment = _ALIGNMENT

    def __init__(self, opened: Opened, depth: int) -> None:
        super().__init__(opened)
        self._depth = anyio.CapacityLimiter(depth)

    def register(self, memory: memoryview) -> None:
        """Nothing comes of it here."""

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        with self._using(name) as file:
            await self._bounded(_read, file.fd, offset, into, self._step())

    async def write(self, name: str, pieces: Sequence[Write]) -> None:
        with self._using(name) as file:
            await self._bounded(_write, file.fd, list(pieces), self._step())

    async def sync(self, name: str) -> None:
        with self._using(name) as file:
            await self._bounded(os.fdatasync, file.fd)

    async def _bounded(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        async with self._depth:
            return await self._shielded(work, *arguments)

    def _step(self) -> int:
        return _ALIGNMENT if self.is_direct else 1


def _read(fd: int, offset: int, into: memoryview, alignment: int) -> None:
    done, nbytes = 0, into.nbytes
    while done < nbytes:
        before = done
        moved = os.preadv(fd, [into[done:]], offset + done)
        done = advance(done, moved, nbytes, alignment)
        if done == before:
            raise unfinished()


def _write(fd: int, pieces: list[Write], alignment: int) -> None:
    for offset, run in _runs(pieces):
        done, nbytes = 0, sum(part.nbytes for part in run)
        while done < nbytes:
            before = done
            moved = os.pwritev(fd, _from(run, done), offset + done)
            done = advance(done, moved, nbytes, alignment)
            if done == before:
                raise unfinished()


def _runs(pieces: list[Write]) -> Iterator[tuple[int, list[memoryview]]]:
    """Yield pieces that stand behind one another in the file as one run, at its offset."""
    start, end = 0, -1
    run: list[memoryview] = []
    for offset, data in pieces:
        if offset != end or len(run) == _PIECES_MAX:
            if run:
                yield start, run
            start, run = offset, []
        run.append(data)
        end = offset + data.nbytes
    if run:
        yield start, run


def _from(run: list[memoryview], done: int) -> list[memoryview]:
    left = []
    for part in run:
        if done < part.nbytes:
            left.append(part[done:])
        done = max(0, done - part.nbytes)
    return left
