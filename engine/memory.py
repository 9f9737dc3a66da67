"""Slots in use beside the index: values on their way in, and bytes that somebody is reading.

Slots are counted: the index holds one count, and so does each reader, so an overwritten, deleted or
evicted value stays where it is until its last reader is done.
"""

import ctypes
from collections.abc import Callable

from respkv.engine.entry import Entry
from respkv.engine.landing import Landing
from respkv.tiers.format import HEADER_BYTES
from respkv.tiers.slab import SlabAllocator, Slot

IMAGE_ALIGNMENT = 4096


class Memory:
    """The arena, and who reads or fills it.

    arena:   the memory of the CPU tier; ``slabs`` says what is where in it.
    on_room: called when bytes that were in use come free, for those who wait for room.
    """

    def __init__(self, arena: memoryview, slabs: SlabAllocator) -> None:
        self.arena = arena
        self.slabs = slabs
        self.on_room: Callable[[], None] = lambda: None
        self._is_aligned = not ctypes.addressof(ctypes.c_char.from_buffer(arena)) % IMAGE_ALIGNMENT
        self._landings: set[Landing] = set()
        self._borrowed: dict[Slot, int] = {}

    def payload(self, slot: Slot) -> memoryview:
        """Return the memory of a slot's value. It stays the value's while the slot is held."""
        start = slot.offset + HEADER_BYTES
        return self.arena[start : start + slot.payload_bytes]

    def header(self, slot: Slot) -> memoryview:
        """Return the memory of a slot's header."""
        return self.arena[slot.offset : slot.offset + HEADER_BYTES]

    def image(self, slot: Slot) -> memoryview | None:
        """Return header, payload and what follows up to a multiple of 4096 bytes.

        None for a slot that does not begin at such an address, or does not reach so far.
        """
        nbytes = -(-(HEADER_BYTES + slot.payload_bytes) // IMAGE_ALIGNMENT) * IMAGE_ALIGNMENT
        if not self._is_aligned or slot.offset % IMAGE_ALIGNMENT or nbytes > slot.slab.slot_bytes:
            return None
        return self.arena[slot.offset : slot.offset + nbytes]

    def copy(self, entry: Entry) -> bytes:
        """Return a copy of a value that is in memory."""
        if entry.slot is None:
            assert entry.value is not None
            return entry.value
        return bytes(self.payload(entry.slot))

    def borrow(self, slot: Slot) -> None:
        """Hold a slot while its bytes are read; ``restore`` ends that."""
        self.slabs.hold(slot)
        self._borrowed[slot] = self._borrowed.get(slot, 0) + 1

    def restore(self, slot: Slot) -> None:
        """Let go of a borrowed slot."""
        count = self._borrowed[slot] - 1
        if count:
            self._borrowed[slot] = count
        else:
            del self._borrowed[slot]
        self._give_back(slot)

    def adopt(self, slot: Slot) -> Landing:
        """Take over a slot that is being filled in place; publish it or ``abandon`` it."""
        landing = Landing(slot, self.arena, slot.payload_bytes)
        self._landings.add(landing)
        return landing

    def abandon(self, landing: Landing) -> None:
        """Give a landing's slot back unless it was committed; harmless when repeated."""
        if landing.is_open:
            self._close(landing)
            self._give_back(landing.slot)

    def in_flight(self) -> tuple[int, int]:
        """Count the landings, and the slots that are being read."""
        return len(self._landings), len(self._borrowed)

    def _close(self, landing: Landing) -> None:
        assert landing.is_open
        landing.is_open = False
        landing.memory = landing.memory[:0]
        self._landings.discard(landing)

    def _give_back(self, slot: Slot) -> None:
        self.slabs.give_back(slot)
        if not slot.holders:
            self.on_room()
