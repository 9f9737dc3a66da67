"""A Device in memory that remembers every operation, so that a test can crash it anywhere.

Operations have a start and an end, and both are events, counted from 0. ``after_crash(event, ...)``
rebuilds what a directory holds when the machine or the process stops just before that event:

- kill: the process died. All that ended is there. Of what was in flight each piece is absent, whole
  or cut.
- power: the machine died. What a sync that ended covers is there (it covers the writes that had
  ended when it started), and so are files made and replaced; every other piece is, one by one,
  absent, whole or cut at either side. A removal comes undone unless a file was made or replaced
  after it.

Every choice is made by ``choose(n)``, a number below n: ``random.Random(seed).randrange``, or
``lambda n: data.draw(st.integers(0, n - 1))``.
"""

import errno
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import anyio
import numpy as np
from anyio.lowlevel import checkpoint

from respkv.tiers.device import CLOSE_S, Write

Files = dict[str, bytes]
Choose = Callable[[int], int]
Kind = Literal["create", "read", "write", "sync", "remove", "replace"]
Crash = Literal["kill", "power"]


@dataclass(eq=False)
class Operation:
    """What was asked of a file. started, ended: events; ``ended`` is None while it is in flight.

    nbytes: of a create. pieces: of a write, copied when it started. data: of a replace.
    """

    kind: Kind
    name: str
    started: int
    ended: int | None = None
    nbytes: int = 0
    pieces: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    data: bytes = b""

    def has_ended(self, event: int) -> bool:
        return self.ended is not None and self.ended < event


class MemoryDevice:
    """Files in memory; see the module.

    files:          what is there at first.
    capacity_bytes: more than that in all files together is ENOSPC.
    pause:          awaited with kind and name in the middle of each operation; an OSError that it
                    raises fails the operation, which then did nothing.
    log:            operations that change something, in the order in which they started.
    num_events:     starts and ends so far: crash before any of 0 .. num_events.
    peak_bytes:     the most that all files together ever took, those being replaced twice.
    """

    engine: Literal["io_uring", "threads", "aiofiles"] = "threads"
    is_direct = True
    fallback_reason = ""

    def __init__(
        self,
        files: Files | None = None,
        *,
        alignment: int = 4096,
        capacity_bytes: int = 1 << 62,
        pause: Callable[[Kind, str], Awaitable[None]] | None = None,
    ) -> None:
        self.alignment = alignment
        self.capacity_bytes = capacity_bytes
        self.pause = pause
        self.files = {name: bytearray(data) for name, data in (files or {}).items()}
        self.log: list[Operation] = []
        self.num_events = 0
        self.peak_bytes = 0
        self.is_closed = False
        self._initial = dict(files or {})
        self._open: set[str] = set()
        self._in_flight = 0
        self._idle = anyio.Event()

    def register(self, memory: memoryview) -> None:
        assert memory.nbytes

    async def names(self) -> list[str]:
        return sorted(self.files)

    async def create(self, name: str, nbytes: int) -> None:
        if self._too_much(nbytes - len(self.files.get(name, b""))):
            await self.remove(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        operation = self._start(Operation("create", name, self.num_events, nbytes=nbytes))
        await self._wait(operation)
        _apply(operation, self.files)
        self._open.add(name)
        self._end(operation)

    async def open(self, name: str) -> int:
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self._open.add(name)
        return len(self.files[name])

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        self._check(name, offset, into)
        operation = Operation("read", name, self.num_events)
        self._in_flight += 1
        try:
            await self._wait(operation)
        finally:
            self._leave()
        data = self.files[name]
        if offset + into.nbytes > len(data):
            raise OSError(errno.EIO, "the file ends inside a read", name)
        into.cast("B")[:] = data[offset : offset + into.nbytes]

    async def write(self, name: str, pieces: Sequence[Write]) -> None:
        for piece in pieces:
            self._check(name, piece.offset, piece.data)
        copied = [(piece.offset, bytes(piece.data)) for piece in pieces]
        operation = self._start(Operation("write", name, self.num_events, pieces=copied))
        await self._wait(operation)
        for piece, (_, data) in zip(pieces, copied, strict=True):
            assert piece.data == data, f"{name}: memory changed while it was being written"
        _apply(operation, self.files)
        self._end(operation)

    async def sync(self, name: str) -> None:
        assert name in self._open, f"{name} is not open"
        operation = self._start(Operation("sync", name, self.num_events))
        await self._wait(operation)
        self._end(operation)

    async def remove(self, name: str) -> None:
        operation = self._start(Operation("remove", name, self.num_events))
        await self._wait(operation)
        _apply(operation, self.files)
        self._open.discard(name)
        self._end(operation)

    async def load(self, name: str) -> bytes | None:
        await checkpoint()
        return bytes(self.files[name]) if name in self.files else None

    async def replace(self, name: str, data: bytes) -> None:
        if self._too_much(len(data)):  # for a moment the old one and the new one are there
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        operation = self._start(Operation("replace", name, self.num_events, data=bytes(data)))
        await self._wait(operation)
        self._see(len(data))
        _apply(operation, self.files)
        self._end(operation)

    async def close(self, seconds: float = CLOSE_S) -> None:
        while self._in_flight:
            self._idle = anyio.Event()
            await self._idle.wait()
        self._open.clear()
        self.is_closed = True

    # Crashes

    def after_crash(
        self, event: int, crash: Crash, choose: Choose, *, sector_bytes: int = 512
    ) -> Files:
        """Return what the directory holds when all stops just before ``event``.

        sector_bytes: pieces are cut at multiples of it.
        """
        files = {name: bytearray(data) for name, data in self._initial.items()}
        for operation in self.log:
            if operation.started < event:
                self._replay(operation, files, event, crash, choose, sector_bytes)
        return {name: bytes(data) for name, data in files.items()}

    def crashes(
        self, crash: Crash, choose: Choose, *, variants: int = 1, sector_bytes: int = 512
    ) -> Iterator[tuple[int, Files]]:
        """Yield the event and the files of a crash before each event, ``variants`` times."""
        for event in range(self.num_events + 1):
            for _ in range(variants):
                yield event, self.after_crash(event, crash, choose, sector_bytes=sector_bytes)

    def _replay(
        self,
        operation: Operation,
        files: dict[str, bytearray],
        event: int,
        crash: Crash,
        choose: Choose,
        sector_bytes: int,
    ) -> None:
        if operation.kind == "write":
            if self._is_safe(operation, event, crash):
                _apply(operation, files)
            elif operation.name in files:
                for offset, data in operation.pieces:
                    start, stop = _cut(len(data), crash, choose, sector_bytes)
                    _put(files[operation.name], offset + start, data[start:stop])
        elif self._is_safe(operation, event, crash) or choose(2):
            _apply(operation, files)

    def _is_safe(self, operation: Operation, event: int, crash: Crash) -> bool:
        """Say whether an operation is there for sure, whole."""
        if not operation.has_ended(event) or operation.ended is None:
            return False
        if crash == "kill" or operation.kind in ("create", "replace", "sync"):
            return True
        after = [
            later
            for later in self.log
            if later.started > operation.ended and later.has_ended(event)
        ]
        if operation.kind == "remove":
            return any(later.kind in ("create", "replace") for later in after)
        return any(later.kind == "sync" and later.name == operation.name for later in after)

    # Keeping the log

    def _start(self, operation: Operation) -> Operation:
        assert not self.is_closed
        self.log.append(operation)
        self.num_events += 1
        self._in_flight += 1
        return operation

    async def _wait(self, operation: Operation) -> None:
        # Shielded, as device.py asks: what was started runs to its end.
        with anyio.CancelScope(shield=True):
            await checkpoint()
            if self.pause is not None:
                try:
                    await self.pause(operation.kind, operation.name)
                except OSError:
                    if operation in self.log:
                        self.log.remove(operation)
                        self._leave()
                    raise

    def _end(self, operation: Operation) -> None:
        operation.ended = self.num_events
        self.num_events += 1
        self._leave()
        self._see(0)

    def _leave(self) -> None:
        self._in_flight -= 1
        self._idle.set()

    def _see(self, nbytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self._file_bytes() + nbytes)

    def _file_bytes(self) -> int:
        return sum(len(data) for data in self.files.values())

    def _too_much(self, nbytes: int) -> bool:
        return self._file_bytes() + nbytes > self.capacity_bytes

    def _check(self, name: str, offset: int, memory: memoryview) -> None:
        assert name in self._open, f"{name} is not open"
        assert memory.nbytes, f"{name}: an empty piece at {offset}"
        address = np.frombuffer(memory, np.uint8).ctypes.data
        for number in (offset, memory.nbytes, address):
            assert number % self.alignment == 0, f"{name}: {number} is not a multiple"


def _apply(operation: Operation, files: dict[str, bytearray]) -> None:
    name = operation.name
    if operation.kind == "create":
        data = files.setdefault(name, bytearray())
        del data[operation.nbytes :]
        data.extend(bytes(operation.nbytes - len(data)))
    elif operation.kind == "write" and name in files:
        for offset, piece in operation.pieces:
            _put(files[name], offset, piece)
    elif operation.kind == "remove":
        files.pop(name, None)
    elif operation.kind == "replace":
        files[name] = bytearray(operation.data)


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    if piece:
        data.extend(bytes(max(0, offset - len(data))))
        data[offset : offset + len(piece)] = piece


def _cut(nbytes: int, crash: Crash, choose: Choose, sector_bytes: int) -> tuple[int, int]:
    """Choose the part of a piece that reached the disk: none, all, its start or (power) its end."""
    fate = choose(4 if crash == "power" else 3)
    if fate < 2:
        return 0, nbytes * fate
    at = choose(max(1, nbytes // sector_bytes)) * sector_bytes
    return (0, at) if fate == 2 else (at, nbytes)
