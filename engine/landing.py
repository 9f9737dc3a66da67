"""A value on its way into a slot: visible to nobody until it is committed."""

from respkv.tiers.format import HEADER_BYTES, Checksum
from respkv.tiers.slab import Slot


class Landing:
    """A slot that is being filled, front to back, by a socket or a copy.

    Each part is hashed as it arrives, while it is still in the processor's cache, so that no
    single step is long and the checksum is ready with the last byte.
    """

    __slots__ = ("_checksum", "filled", "is_open", "memory", "nbytes", "slot")

    def __init__(self, slot: Slot, arena: memoryview, nbytes: int) -> None:
        start = slot.offset + HEADER_BYTES
        self.slot = slot
        self.nbytes = nbytes
        self.memory = arena[start : start + nbytes]
        self.filled = 0
        self.is_open = True
        self._checksum = Checksum()

    def advance(self, part: memoryview) -> None:
        """Note that the next bytes of ``memory``, which are ``part``, have been written."""
        self._checksum.update(part)
        self.filled += len(part)

    def write(self, data: bytes | memoryview) -> None:
        """Copy the next bytes in."""
        part = self.memory[self.filled : self.filled + len(data)]
        part[:] = data
        self.advance(part)

    @property
    def is_full(self) -> bool:
        """Whether every byte is there."""
        return self.filled == self.nbytes

    def checksum(self) -> int:
        """Return the xxh3_64 of the whole value."""
        assert self.is_full
        return self._checksum.digest()
