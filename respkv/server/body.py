"""Where the bytes of a large argument go while they arrive.

A page lands in its slot: the socket writes there and nothing is copied. A large argument that is
not a value collects on the heap, growing with what really came. One that will not be kept is read
and dropped, so that the connection stays in step and the commands behind it are still served.
"""

from typing import Protocol

from respkv.engine.landing import Landing
from respkv.errors import CacheError

# No step on the event loop hashes or copies more than this.
WINDOW_BYTES_MAX = 1 << 20
# A slot is taken once this much has come: a header that only claims a length takes nothing.
LAND_MIN = 4 * 1024


class Refused:
    """Stands for an argument whose bytes were dropped, with the reason why."""

    __slots__ = ("error", "nbytes")

    def __init__(self, nbytes: int, error: CacheError | None = None) -> None:
        self.nbytes = nbytes
        self.error = error


class Sink(Protocol):
    """Takes ``nbytes`` bytes, then stands for them as a command's argument."""

    missing: int

    def window(self, scratch: memoryview) -> memoryview:
        """Return memory, not empty, for the next bytes."""
        ...

    def advance(self, window: memoryview) -> None:
        """Take note of bytes that were written to the start of the last window."""

    def value(self) -> object:
        """Return the argument, once nothing is missing."""
        ...


class ArenaSink:
    """A value that lands in its slot."""

    def __init__(self, landing: Landing) -> None:
        self.landing = landing
        self.missing = landing.nbytes - landing.filled

    def window(self, scratch: memoryview) -> memoryview:
        """Return the next part of the slot."""
        filled = self.landing.filled
        return self.landing.memory[filled : filled + WINDOW_BYTES_MAX]

    def advance(self, window: memoryview) -> None:
        """Hash what has landed."""
        self.landing.advance(window)
        self.missing -= len(window)

    def value(self) -> Landing:
        """Return the full landing."""
        return self.landing


class HeapSink:
    """An argument that is no value, or the start of one that has no slot yet.

    early: the first of its bytes. They are not copied unless more have to be collected here.
    """

    def __init__(self, nbytes: int, early: memoryview) -> None:
        self.missing = nbytes - len(early)
        self._early = early
        self._more = bytearray()

    def window(self, scratch: memoryview) -> memoryview:
        """Return scratch memory."""
        return scratch[: self.missing]

    def advance(self, window: memoryview) -> None:
        """Append what came."""
        self._more += window
        self.missing -= len(window)

    @property
    def arrived(self) -> int:
        """Bytes collected so far."""
        return len(self._early) + len(self._more)

    def parts(self) -> tuple[memoryview, memoryview]:
        """Return what was collected so far."""
        return self._early, memoryview(self._more)

    def value(self) -> bytes:
        """Return the argument."""
        return b"".join(self.parts())


class DropSink:
    """An argument that is not kept."""

    def __init__(self, nbytes: int, error: CacheError | None = None, *, arrived: int = 0) -> None:
        self.missing = nbytes - arrived
        self._refused = Refused(nbytes, error)

    def window(self, scratch: memoryview) -> memoryview:
        """Return scratch memory."""
        return scratch[: self.missing]

    def advance(self, window: memoryview) -> None:
        """Count what came."""
        self.missing -= len(window)

    def value(self) -> Refused:
        """Return what stands for the dropped bytes."""
        return self._refused
