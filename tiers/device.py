"""What a file tier asks of a directory: whole files, read and written at offsets.

There are three of them: io_uring (ring.py), a bounded pool of threads (pool.py) and aiofiles
(aio.py). All fail with the OSError that the system gave. A read or write is whole or fails: what the
system did in part is continued here, and an end of file inside a read is EIO.

Memory outlives askers: an operation that was started still reads or writes its memory after its
asker was cancelled. So every operation is shielded: it returns, or raises, when the system is done
with the memory, and a cancellation is delivered after that.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

CLOSE_S = 10.0  # how long a device that does not answer is waited for


class Write(NamedTuple):
    """One piece of a write: ``data`` goes to ``offset`` of the file."""

    offset: int
    data: memoryview


class Device(Protocol):
    """The files of one directory, by name.

    engine:    what carries out the work, for INFO.
    is_direct: whether the page cache is bypassed.
    alignment: offsets, lengths and addresses must be multiples of it; 1: anything goes.
    fallback_reason: why this is not the engine that was wanted first, for INFO; empty if it is.
    """

    engine: Literal["io_uring", "threads", "aiofiles"]
    is_direct: bool
    alignment: int
    fallback_reason: str

    def register(self, memory: memoryview) -> None:
        """Say that reads and writes will often use parts of this memory. Harmless if impossible."""
        ...

    async def names(self) -> list[str]:
        """Return the names of the files that are there."""
        ...

    async def create(self, name: str, nbytes: int) -> None:
        """Make a file, or take an existing one, with ``nbytes`` allocated, and open it.

        Raises OSError, ENOSPC among them; no file with that name is left then.
        """
        ...

    async def open(self, name: str) -> int:
        """Open an existing file for reading and writing; return its size."""
        ...

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill ``into`` from an open file."""
        ...

    async def write(self, name: str, pieces: Sequence[Write]) -> None:
        """Write all pieces to an open file, in any order, submitted together."""
        ...

    async def sync(self, name: str) -> None:
        """Make what was written to an open file, and its size, survive a power cut."""
        ...

    async def remove(self, name: str) -> None:
        """Close and delete a file. One that is not there is no error."""
        ...

    async def load(self, name: str) -> bytes | None:
        """Return a small file whole, or None when there is none."""
        ...

    async def replace(self, name: str, data: bytes) -> None:
        """Make ``data`` the whole content of a file, atomically and durably.

        After a crash the file is the old one or the new one. Raises OSError; the old one stays.
        """
        ...

    async def close(self, seconds: float = CLOSE_S) -> None:
        """Wait for what is in flight, for so long, and close every file.

        What has not ended then fails with ETIMEDOUT.
        """
        ...
