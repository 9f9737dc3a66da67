"""What every device does alike: the directory, its lock, and files that come and go.

All that may block goes to threads. A file that is removed or closed while it is read or written
keeps its descriptor until that has ended: a descriptor closed early is soon another file's.
"""

import contextlib
import errno
import fcntl
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar, TypeVarTuple

import anyio

from respkv.tiers.claim import LOCK, TEMPORARY, Opened
from respkv.tiers.device import CLOSE_S, Write

Engine = Literal["io_uring", "threads", "aiofiles"]
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_FILE_THREADS = 4

_logger = logging.getLogger(__name__)


class File:
    """An open file. num_users: reads, writes and syncs in flight. slot: the ring's name for it."""

    __slots__ = ("fd", "idle", "is_lost", "num_users", "slot")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.slot = -1
        self.num_users = 0
        self.is_lost = False  # somebody may use the descriptor for ever: it is never closed
        self.idle: anyio.Event | None = None


class Directory(ABC):
    """The part of a Device that does not read or write; device.py says what each method does."""

    engine: Engine
    alignment: int

    def __init__(self, opened: Opened) -> None:
        self.path = opened.path
        self.is_direct = opened.is_direct
        self.fallback_reason = ""  # why this is not the engine that was asked for first
        self._lock_fd = opened.lock_fd
        self._files: dict[str, File] = {}
        self._unclosed: set[File] = set()  # those, and files that are being removed
        self._itself = File(-1)  # in use while files come and go
        self._is_closing = False
        self._threads = anyio.CapacityLimiter(_FILE_THREADS)
        self._unlimited = anyio.CapacityLimiter(math.inf)
        self._stuck: set[anyio.CancelScope] = set()

    @abstractmethod
    def register(self, memory: memoryview) -> None: ...

    @abstractmethod
    async def read(self, name: str, offset: int, into: memoryview) -> None: ...

    @abstractmethod
    async def write(self, name: str, pieces: Sequence[Write]) -> None: ...

    @abstractmethod
    async def sync(self, name: str) -> None: ...

    async def names(self) -> list[str]:
        return await self._in_thread(_names, self.path)

    async def create(self, name: str, nbytes: int) -> None:
        try:
            fd = await self._in_thread(_create, self.path / name, nbytes, self._flags())
        except OSError:
            if name in self._files:
                await self.remove(name)
            raise
        self._add(name, fd)

    async def open(self, name: str) -> int:
        fd, nbytes = await self._in_thread(_open, self.path / name, os.O_RDWR | self._flags())
        self._add(name, fd)
        return nbytes

    async def remove(self, name: str) -> None:
        file = self._files.pop(name, None)
        with self._in_use(self._itself), anyio.CancelScope(shield=True):
            if file is not None:
                await self._idle(file)
                self._detach(file)
            await self._blocking(_remove, self.path / name, file)

    async def load(self, name: str) -> bytes | None:
        return await self._in_thread(_load, self.path / name)

    async def replace(self, name: str, data: bytes) -> None:
        await self._in_thread(_replace, self.path / name, data)

    async def close(self, seconds: float = CLOSE_S) -> None:
        """Wait for what is in flight, but not for ever, and close every file; give the lock back.

        What the system did not finish in ``seconds`` fails with ETIMEDOUT. The memory of such a
        read may still change: give it to nobody.
        """
        if self._is_closing:
            return
        self._is_closing = True
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(seconds) as waiting:
                await self._all_idle()
            if waiting.cancelled_caught:
                _logger.error("%s: closed while the device did not answer", self.path)
                self._abandon()
                await self._all_idle()
            fds = [file.fd for file in self._unclosed if not file.is_lost]
            if not waiting.cancelled_caught:  # else our writes may still reach the files
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)  # a forked child has it open, too
                fds.append(self._lock_fd)
            self._files.clear()
            self._unclosed.clear()
            self._end()
            await self._blocking(_close, fds)

    # For those who read and write

    @contextlib.contextmanager
    def _using(self, name: str) -> Iterator[File]:
        """Keep a file open while it is used. Raises OSError when it is not."""
        file = self._files.get(name)
        if file is None:
            raise OSError(errno.EBADF, f"{name} is not open", str(self.path / name))
        with self._in_use(file):
            yield file

    @contextlib.contextmanager
    def _in_use(self, file: File) -> Iterator[None]:
        if self._is_closing:
            raise OSError(errno.EBADF, "the device is closed", str(self.path))
        file.num_users += 1
        try:
            yield
        finally:
            file.num_users -= 1
            if not file.num_users and file.idle is not None:
                file.idle.set()

    async def _in_thread(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Do what may block in a thread, shielded once it has started."""
        with self._in_use(self._itself):
            return await self._blocking(work, *arguments)

    async def _blocking(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        async with self._threads:
            return await self._shielded(work, *arguments)

    async def _shielded(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        # The scope is for _abandon alone: a thread that never ends must not keep its asker.
        with anyio.CancelScope(shield=True) as scope:
            self._stuck.add(scope)
            try:
                return await self._call(work, *arguments)
            finally:
                self._stuck.discard(scope)
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    async def _call(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        # Unlimited, as the caller has counted, and only _abandon cancels.
        return await anyio.to_thread.run_sync(
            work, *arguments, abandon_on_cancel=True, limiter=self._unlimited
        )

    def _attach(self, file: File) -> None:
        """Take a file that was opened."""
        self._unclosed.add(file)

    def _detach(self, file: File) -> None:
        """Forget a file that is about to be closed."""
        self._unclosed.discard(file)

    def _end(self) -> None:  # noqa: B027
        """Give back what the engine holds; nothing is in flight."""

    def _abandon(self) -> None:
        """Let go of everyone who still waits."""
        for scope in list(self._stuck):
            scope.cancel()
        for file in self._unclosed:
            file.is_lost = file.num_users > 0

    # Files

    def _flags(self) -> int:
        return os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if self.is_direct else 0)

    def _add(self, name: str, fd: int) -> None:
        if name in self._files or self._is_closing:  # it is open already
            os.close(fd)
            return
        file = File(fd)
        self._attach(file)
        self._files[name] = file

    async def _idle(self, file: File) -> None:
        while file.num_users:
            file.idle = file.idle or anyio.Event()
            await file.idle.wait()
            file.idle = None

    async def _all_idle(self) -> None:
        for file in [*self._unclosed, self._itself]:
            await self._idle(file)


def _names(path: Path) -> list[str]:
    return sorted(
        name for name in os.listdir(path) if name != LOCK and not name.endswith(TEMPORARY)
    )


def _create(path: Path, nbytes: int, flags: int) -> int:
    # Allocated without O_DIRECT: where the file system cannot, the C library writes single bytes.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            if os.fstat(fd).st_size > nbytes:
                os.ftruncate(fd, nbytes)
            if nbytes:
                os.posix_fallocate(fd, 0, nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        _sync_directory(path.parent)
        return os.open(path, os.O_RDWR | flags)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _open(path: Path, flags: int) -> tuple[int, int]:
    fd = os.open(path, flags)
    try:
        return fd, os.fstat(fd).st_size
    except OSError:
        os.close(fd)
        raise


def _remove(path: Path, file: File | None) -> None:
    path.unlink(missing_ok=True)
    if file is not None and not file.is_lost:
        os.close(file.fd)  # here its blocks are given back, which can take a while


def _load(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + TEMPORARY)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, 0o600)
    try:
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
