"""Sizes of classes, slots and slabs, and the classes that are in use.

Classes stand 16 to each doubling, powers of two exactly among them, so at most 1/16 of a payload is
lost to rounding. They are never closer than 64 bytes, because slots are aligned to 64 bytes and a
finer class would have the same slots.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

from respkv.errors import OutOfMemory
from respkv.tiers.format import HEADER_BYTES

SlabT = TypeVar("SlabT")  # slab.py's Slab: it stands on this module, not the other way round

PAYLOAD_BYTES_MIN = 448
SLAB_BYTES_MAX = 16 << 20
SLABS_MAX = 4096  # aimed at: every walk over all slabs stays within a few milliseconds
_PAGE_ALIGNED_FROM = 64 << 10
_SIZES_MAX = 4096  # sizes remembered by SizeClasses.by_size


def round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def class_bytes(payload_bytes: int) -> int:
    """Return the payload size of the smallest geometric class that takes this payload."""
    if payload_bytes <= PAYLOAD_BYTES_MIN:
        return PAYLOAD_BYTES_MIN
    # Between 2**(b-1) and 2**b there are 16 steps of 2**(b-5).
    return round_up(payload_bytes, max(64, 1 << ((payload_bytes - 1).bit_length() - 5)))


def slot_bytes(payload_bytes: int) -> int:
    """Return the bytes of a slot for this payload, header included.

    Large slots start at multiples of 4 KiB, which O_DIRECT asks for.
    """
    nbytes = HEADER_BYTES + payload_bytes
    return round_up(nbytes, 4096 if nbytes >= _PAGE_ALIGNED_FROM else 64)


def slab_shape(slot_bytes: int, *, unit_bytes: int, num_units: int) -> tuple[int, int]:
    """Choose the units and the slots of a slab in an arena of ``num_units``.

    The smallest that loses at most 1/64 at its tail, is at most 16 MiB or 1/16 of the arena, and
    not so small that the arena would hold more than SLABS_MAX; else the one that loses least.
    A slot above those limits has a slab of its own.
    Returns: (units, slots).
    """
    arena_bytes = num_units * unit_bytes
    slab_bytes_max = min(SLAB_BYTES_MAX, arena_bytes // 16)
    slots = max(1, min(arena_bytes // SLABS_MAX, slab_bytes_max) // slot_bytes)
    best = (-(-slot_bytes * slots // unit_bytes), slots)
    best_loss = 1.0
    while True:
        units = -(-slot_bytes * slots // unit_bytes)
        if units * unit_bytes > slab_bytes_max:
            return best
        loss = 1 - slots * slot_bytes / (units * unit_bytes)
        if loss < best_loss:
            best, best_loss = (units, slots), loss
        if loss <= 1 / 64:
            return best
        slots += 1


class SizeClass(Generic[SlabT]):
    """The slabs of one slot size.

    slab_units and slab_slots: the shape of a slab where there is a run for it.
    open:    the slabs with a free slot; ``current`` is one of them, None when there is none.
    spare:   an empty slab that was kept; any class may have it at once.
    """

    __slots__ = (
        "current",
        "open",
        "payload_bytes",
        "slab_slots",
        "slab_units",
        "slabs",
        "slot_bytes",
        "spare",
    )

    def __init__(self, payload_bytes: int, slot_bytes: int, slab_units: int, slots: int) -> None:
        self.payload_bytes = payload_bytes
        self.slot_bytes = slot_bytes
        self.slab_units = slab_units
        self.slab_slots = slots
        self.slabs: set[SlabT] = set()
        self.open: dict[SlabT, None] = {}
        self.current: SlabT | None = None
        self.spare: SlabT | None = None


class SizeClasses(Generic[SlabT]):
    """The size classes of one arena, made when a payload first asks for them.

    by_size: the class of payload sizes that were asked for lately, so that ``take`` finds it with
    one look. It is cleared in place when it is full and when a class is added.
    """

    def __init__(self, *, unit_bytes: int, num_units: int) -> None:
        self.payload_bytes_max = unit_bytes * num_units - HEADER_BYTES
        self.by_size: dict[int, SizeClass[SlabT]] = {}
        self._unit_bytes = unit_bytes
        self._num_units = num_units
        self._classes: dict[int, SizeClass[SlabT]] = {}
        self._exact: list[int] = []

    def __iter__(self) -> Iterator[SizeClass[SlabT]]:
        """Yield the classes that were ever used, by size."""
        return iter([size_class for _, size_class in sorted(self._classes.items())])

    def add(self, payload_bytes: int) -> None:
        """Add a class of exactly this size, unless it would have the slots of one that exists."""
        if slot_bytes(self.class_of(payload_bytes)) > slot_bytes(payload_bytes):
            insort(self._exact, payload_bytes)
            self.by_size.clear()

    def class_of(self, payload_bytes: int) -> int:
        """Return the size of the smallest class that takes this payload.

        Raises OutOfMemory when it cannot fit into the arena.
        """
        if not 0 <= payload_bytes <= self.payload_bytes_max:
            raise OutOfMemory(
                f"a value of {payload_bytes} bytes never fits: the cache takes values up to "
                f"{self.payload_bytes_max} bytes"
            )
        size = min(class_bytes(payload_bytes), self.payload_bytes_max)
        index = bisect_left(self._exact, payload_bytes)
        return min(size, self._exact[index]) if index < len(self._exact) else size

    def find(self, payload_bytes: int) -> SizeClass[SlabT]:
        """Return the class that takes this payload. Raises OutOfMemory as ``class_of`` does."""
        size = self.class_of(payload_bytes)
        size_class = self._classes.get(size)
        if size_class is None:
            nbytes = slot_bytes(size)
            units, slots = slab_shape(
                nbytes, unit_bytes=self._unit_bytes, num_units=self._num_units
            )
            size_class = self._classes[size] = SizeClass(size, nbytes, units, slots)
        if len(self.by_size) >= _SIZES_MAX:
            self.by_size.clear()
        self.by_size[payload_bytes] = size_class
        return size_class
