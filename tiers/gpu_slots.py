"""Places for pages in the gpu tier's memory: the arena's allocator, at a device's alignment.

A slot of the slab allocator begins with room for a header, which a device has no use for. Here a
place is the whole slot, header included, and every size has a class of its own whose slots are
a multiple of 256 bytes, as kernels that load whole vectors, and the caching allocator itself, have
it. Sizes are few: one for each schema and form.
"""

from collections.abc import Callable

from respkv.tiers.format import HEADER_BYTES
from respkv.tiers.slab import UNIT_BYTES, Slab, SlabAllocator, Slot

ALIGN_BYTES = 256


class GpuSlots:
    """The slots of ``capacity_bytes``; they are counted as those of the arena are."""

    def __init__(self, capacity_bytes: int, *, unit_bytes: int = UNIT_BYTES) -> None:
        self._slabs = SlabAllocator(capacity_bytes, unit_bytes=unit_bytes)
        self._sizes: dict[int, int] = {}  # by the bytes asked for: what the allocator is asked for
        self.hold, self.give_back = self._slabs.hold, self._slabs.give_back
        self.used, self.check = self._slabs.used, self._slabs.check

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all slots there can be."""
        return self._slabs.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots in use."""
        return self._slabs.used_bytes

    @property
    def nbytes_max(self) -> int:
        """The largest page that fits."""
        return self._slabs.payload_bytes_max + HEADER_BYTES

    def take(self, nbytes: int) -> Slot | None:
        """Take a place for ``nbytes``, held once; None when there is none."""
        return None if nbytes > self.nbytes_max else self._slabs.take(self._size(nbytes))

    def is_alike(self, slot: Slot, nbytes: int) -> bool:
        """Whether a slot in use would do for ``nbytes``, without waste."""
        return slot.payload_max == self._slabs.class_of(self._size(nbytes))

    def slabs_to_clear(self, nbytes: int, cost: Callable[[Slab], float]) -> list[Slab] | None:
        """Choose the slabs whose emptying makes room; as ``SlabAllocator`` does."""
        if nbytes > self.nbytes_max:
            return None
        return self._slabs.slabs_to_clear(self._size(nbytes), cost)

    def _size(self, nbytes: int) -> int:
        size = self._sizes.get(nbytes)
        if size is None:
            size = -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES - HEADER_BYTES
            self._slabs.add_class(size)
            self._sizes[nbytes] = size
        return size
