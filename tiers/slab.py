"""Places for payloads in an arena: size classes, slabs and slots; no bytes are touched here.

The arena is cut into units. A slab is a run of units that belongs to one size class and is cut into
equal slots; a slot is a 64-byte header and room for one payload. Taking and giving back a slot is a
pop and an append, so a steady load costs well under a microsecond and never moves a byte.

What slabs alone do badly is a load that changes: memory that belongs to one class is of no use to
another. So a slab goes back to the free runs with its last slot, and ``slabs_to_clear`` names the
cheapest neighbouring slabs to empty when a class needs room. A buddy allocator was left aside
because it wastes up to half of a page that is a little larger than a power of two, and a
best-fit heap because it fragments and answers in a time that depends on its history.

Classes are geometric (sizes.py), so at most 1/16 is lost to rounding; schemas register the exact
size of their pages and lose none.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from respkv.tiers.format import HEADER_BYTES
from respkv.tiers.runs import FreeRuns, cheapest_window
from respkv.tiers.sizes import SizeClass, SizeClasses

UNIT_BYTES = 64 << 10


class Slot:
    """A place for one payload.

    offset:     of its header from the start of the arena; the payload is HEADER_BYTES further on.
    holders:    counts of ``take`` and ``hold`` not yet given back; 0 while it is free.
    generation: set at each take and never used twice by one allocator.
    owner:      whatever the taker hangs here; cleared when the slot is free.
    """

    __slots__ = ("generation", "holders", "offset", "owner", "payload_bytes", "payload_max", "slab")

    def __init__(self, slab: "Slab", offset: int) -> None:
        self.slab = slab
        self.offset = offset
        self.payload_max = slab.class_bytes
        self.payload_bytes = 0
        self.holders = 0
        self.generation = 0
        self.owner: Any | None = None


class Slab:
    """A run of units cut into equal slots. Slots are made when they are first taken."""

    __slots__ = (
        "class_bytes",
        "first_unit",
        "free",
        "num_slots",
        "num_units",
        "num_used",
        "offset",
        "size_class",
        "slot_bytes",
        "slots",
    )

    def __init__(
        self,
        size_class: "SizeClass[Slab]",
        first_unit: int,
        num_units: int,
        num_slots: int,
        offset: int,
    ) -> None:
        self.size_class = size_class
        self.class_bytes = size_class.payload_bytes
        self.slot_bytes = size_class.slot_bytes
        self.first_unit = first_unit
        self.num_units = num_units
        self.num_slots = num_slots
        self.num_used = 0
        self.offset = offset
        self.slots: list[Slot] = []
        self.free: list[Slot] = []

    @property
    def used(self) -> Iterator[Slot]:
        """Yield the slots in use. Make a list of them before giving any back."""
        return (slot for slot in self.slots if slot.holders)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots in use, headers included."""
        return self.num_used * self.slot_bytes

    @property
    def stop_unit(self) -> int:
        return self.first_unit + self.num_units

    def add_slot(self) -> Slot:
        """Make the next slot of this slab that was never taken."""
        assert len(self.slots) < self.num_slots
        slot = Slot(self, self.offset + len(self.slots) * self.slot_bytes)
        self.slots.append(slot)
        return slot


class ClassStats(NamedTuple):
    """One size class: the payload it takes, what a slot costs, and its slabs and slots."""

    payload_bytes: int
    slot_bytes: int
    slabs: int
    slab_bytes: int
    slots: int
    slots_used: int


class SlabAllocator:
    """Hand out the slots of an arena of ``arena_bytes``; a last part of a unit is not used.

    budget_bytes: ``take`` refuses what would bring ``used_bytes`` above it. Lowering it takes
    nothing away from anybody: the caller gives back slots until ``used_bytes`` fits.
    """

    def __init__(self, arena_bytes: int, *, unit_bytes: int = UNIT_BYTES) -> None:
        if unit_bytes < 4096 or unit_bytes % 4096:
            raise ValueError(f"unit_bytes must be a multiple of 4096, not {unit_bytes}")
        if arena_bytes < unit_bytes:
            raise ValueError(f"arena_bytes must be at least {unit_bytes}, not {arena_bytes}")
        self._unit_bytes = unit_bytes
        self._num_units = arena_bytes // unit_bytes
        self.capacity_bytes = self._num_units * unit_bytes
        self.budget_bytes = self.capacity_bytes
        self.used_bytes = 0
        self.payload_bytes = 0
        self._generation = 0
        self._slabs: list[Slab] = []  # by address
        self._runs = FreeRuns(self._num_units)
        self._classes: SizeClasses[Slab] = SizeClasses(
            unit_bytes=unit_bytes, num_units=self._num_units
        )
        self._by_size = self._classes.by_size

    @property
    def free_bytes(self) -> int:
        """Bytes not taken: free slots, free runs and what slabs lose at their tails."""
        return self.capacity_bytes - self.used_bytes

    @property
    def payload_bytes_max(self) -> int:
        """The largest payload that fits into an empty arena."""
        return self._classes.payload_bytes_max

    def add_class(self, payload_bytes: int) -> None:
        """Serve payloads of exactly this size without rounding. Slots in use stay as they are.

        Raises OutOfMemory when such a payload cannot fit into the arena.
        """
        self._classes.add(payload_bytes)

    def class_of(self, payload_bytes: int) -> int:
        """Return the size of the smallest class that takes this payload.

        Raises OutOfMemory when it cannot fit into the arena.
        """
        return self._classes.class_of(payload_bytes)

    def take(self, payload_bytes: int) -> Slot | None:
        """Take a slot for a payload, held once. None when there is no room or no budget for it."""
        size_class = self._by_size.get(payload_bytes)
        if size_class is None:
            if payload_bytes > self.payload_bytes_max:
                return None
            size_class = self._classes.find(payload_bytes)
        used_bytes = self.used_bytes + size_class.slot_bytes
        if used_bytes > self.budget_bytes:
            return None
        slab = size_class.current or self._carve(size_class)
        if slab is None:
            return None
        slot = slab.free.pop() if slab.free else slab.add_slot()
        slab.num_used = num_used = slab.num_used + 1
        if num_used == 1:
            size_class.spare = None  # only a spare is empty
        if num_used == slab.num_slots:
            del size_class.open[slab]
            size_class.current = next(iter(size_class.open), None)
        self.used_bytes = used_bytes
        self.payload_bytes += payload_bytes
        self._generation = slot.generation = self._generation + 1
        slot.payload_bytes = payload_bytes
        slot.holders = 1
        return slot

    def next_generation(self) -> int:
        """Return a generation for a value that has no slot; no slot ever gets the same."""
        self._generation += 1
        return self._generation

    def skip_generations(self, below: int) -> None:
        """Give out no generation below this one any more."""
        self._generation = max(self._generation, below - 1)

    def hold(self, slot: Slot) -> None:
        """Count one more holder of a slot that is in use."""
        assert slot.holders > 0, "a free slot cannot be held"
        slot.holders += 1

    def give_back(self, slot: Slot) -> None:
        """End one hold; with the last one the slot is free for the next ``take``."""
        assert slot.holders > 0, "a slot was given back more often than it was held"
        slot.holders -= 1
        if slot.holders:
            return
        slot.owner = None
        slab = slot.slab
        slab.free.append(slot)
        slab.num_used = num_used = slab.num_used - 1
        self.used_bytes -= slab.slot_bytes
        self.payload_bytes -= slot.payload_bytes
        if num_used + 1 == slab.num_slots:
            size_class = slab.size_class
            size_class.open[slab] = None
            if size_class.current is None:
                size_class.current = slab
        if not num_used:
            self._end_use(slab)

    def slabs_to_clear(
        self, payload_bytes: int, cost: Callable[[Slab], float]
    ) -> list[Slab] | None:
        """Choose the slabs whose emptying lets ``take(payload_bytes)`` succeed, cheapest together.

        They are neighbours, or one slab of the right class. A window for a slab of the usual shape
        is preferred to one for a single slot, which would waste more.

        cost:    of giving back every used slot of a slab, >= 0; inf when that cannot be done now.
        Returns: the slabs with used slots, by address; [] when ``take`` would succeed as it is;
        None when nothing that may be cleared is enough.
        """
        if payload_bytes > self.payload_bytes_max:
            return None
        size_class = self._classes.find(payload_bytes)
        if size_class.slot_bytes > self.budget_bytes:
            return None
        short = self.used_bytes + size_class.slot_bytes - self.budget_bytes
        costs = [cost(slab) if slab.num_used else 0.0 for slab in self._slabs]
        one_slot = -(-size_class.slot_bytes // self._unit_bytes)
        if size_class.current or self._is_free(one_slot):
            return self._cheapest(size_class, costs, 0, short) if short > 0 else []
        return self._cheapest(size_class, costs, size_class.slab_units, short) or (
            self._cheapest(size_class, costs, one_slot, short)
        )

    def classes(self) -> list[ClassStats]:
        """Describe every class that has a slab, by size."""
        return [
            ClassStats(
                payload_bytes=size_class.payload_bytes,
                slot_bytes=size_class.slot_bytes,
                slabs=len(size_class.slabs),
                slab_bytes=sum(slab.num_units for slab in size_class.slabs) * self._unit_bytes,
                slots=sum(slab.num_slots for slab in size_class.slabs),
                slots_used=sum(slab.num_used for slab in size_class.slabs),
            )
            for size_class in self._classes
            if size_class.slabs
        ]

    def used(self) -> Iterator[Slot]:
        """Yield every slot in use, by address."""
        for slab in self._slabs:
            yield from slab.used

    def check(self) -> None:
        """Assert what must hold between two calls; for tests and idle times."""
        unit = 0
        pieces = [(slab.first_unit, slab.num_units) for slab in self._slabs]
        for first, units in sorted([*pieces, *self._runs]):
            assert first == unit, f"unit {min(first, unit)} is covered twice or not at all"
            assert units > 0
            unit = first + units
        assert unit == self._num_units
        runs = sorted(self._runs)
        for (first, units), (following, _) in pairwise(runs):
            assert first + units < following, "neighbouring free runs were not joined"
        used = [slot for slab in self._slabs for slot in self._checked_slots(slab)]
        assert self.used_bytes == sum(slot.slab.slot_bytes for slot in used)
        assert self.payload_bytes == sum(slot.payload_bytes for slot in used)
        assert len({slot.generation for slot in used}) == len(used)
        num_slabs = sum(len(size_class.slabs) for size_class in self._classes)
        assert num_slabs == len(self._slabs)
        for size_class in self._classes:
            assert size_class.slabs.issuperset(size_class.open)
            assert (size_class.current is None) == (not size_class.open)
            assert size_class.current is None or size_class.current in size_class.open

    def _checked_slots(self, slab: Slab) -> list[Slot]:
        size_class = slab.size_class
        assert slab in size_class.slabs
        assert (slab in size_class.open) == (slab.num_used < slab.num_slots)
        assert (slab is size_class.spare) == (slab.num_used == 0)
        assert slab.num_slots * slab.slot_bytes <= slab.num_units * self._unit_bytes
        used = list(slab.used)
        assert len(used) == slab.num_used
        assert {*used, *slab.free} == {*slab.slots}
        assert len(used) + len(slab.free) == len(slab.slots) <= slab.num_slots
        for index, slot in enumerate(slab.slots):
            assert slot.slab is slab
            assert slot.offset == slab.first_unit * self._unit_bytes + index * slab.slot_bytes
            assert slot.offset % (4096 if slab.slot_bytes >= 65536 else 64) == 0
            assert slot.payload_bytes <= slot.payload_max <= slab.slot_bytes - HEADER_BYTES
            assert slot.holders > 0 or slot.owner is None
        return used

    def _carve(self, size_class: SizeClass[Slab]) -> Slab | None:
        units, slots = size_class.slab_units, size_class.slab_slots
        first = self._runs.take(units)
        if first is None:
            for other in self._classes:
                if other.spare:
                    self._release(other.spare)
            first = self._runs.take(units)
        if first is None:
            # No room for a slab of the usual shape: a smaller one beats evicting something.
            slots = self._runs.longest() * self._unit_bytes // size_class.slot_bytes
            units = -(-slots * size_class.slot_bytes // self._unit_bytes)
            first = self._runs.take(units) if slots else None
        if first is None:
            return None
        slab = Slab(size_class, first, units, slots, first * self._unit_bytes)
        insort(self._slabs, slab, key=_address)
        size_class.slabs.add(slab)
        size_class.open[slab] = None
        size_class.current = slab
        return slab

    def _end_use(self, slab: Slab) -> None:
        size_class = slab.size_class
        if size_class.spare:
            self._release(slab)
            return
        # One is kept, so that a class that swings around a full slab does not cut it again and
        # again. It goes to the end of the line: others fill first.
        size_class.spare = slab
        del size_class.open[slab]
        size_class.open[slab] = None
        size_class.current = next(iter(size_class.open))

    def _release(self, slab: Slab) -> None:
        size_class = slab.size_class
        size_class.slabs.remove(slab)
        del size_class.open[slab]
        if size_class.current is slab:
            size_class.current = next(iter(size_class.open), None)
        if size_class.spare is slab:
            size_class.spare = None
        del self._slabs[bisect_left(self._slabs, slab.first_unit, key=_address)]
        self._runs.give_back(slab.first_unit, slab.num_units)
        slab.slots.clear()  # slots and slabs point at each other: no work for the collector
        slab.free.clear()

    def _is_free(self, units: int) -> bool:
        # Spares count as free, so runs that touch one are longer than they look.
        stop = 0
        for slab in self._slabs:
            if slab.num_used:
                if slab.first_unit - stop >= units:
                    return True
                stop = slab.stop_unit
        return self._num_units - stop >= units

    def _cheapest(
        self, size_class: "SizeClass[Slab]", costs: list[float], units: int, bytes_needed: int
    ) -> list[Slab] | None:
        best_cost, window = cheapest_window(
            [(slab.first_unit, slab.stop_unit) for slab in self._slabs],
            costs,
            [slab.used_bytes for slab in self._slabs],
            stop_unit=self._num_units,
            units=units,
            bytes_needed=bytes_needed,
        )
        # One slab of the right class is enough whatever its size.
        for index, slab in enumerate(self._slabs):
            fits = slab.size_class is size_class and slab.used_bytes >= max(1, bytes_needed)
            if fits and (costs[index], 1) < (best_cost, len(window)):
                best_cost, window = costs[index], range(index, index + 1)
        return [self._slabs[index] for index in window if self._slabs[index].num_used] or None


def _address(slab: Slab) -> int:
    return slab.first_unit
