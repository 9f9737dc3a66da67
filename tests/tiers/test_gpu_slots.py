"""Slots at a device's alignment: the arena's allocator, asked in another way."""

import random
from itertools import pairwise

import pytest

from respkv.tiers.gpu_slots import ALIGN_BYTES, GpuSlots
from respkv.tiers.slab import Slot

MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [1, 255, 256, 257, 448, 1000, 65_535, 65_536, 100_000, MIB])
def test_a_slot_is_aligned_and_large_enough(nbytes: int) -> None:
    slots = GpuSlots(4 * MIB)
    found: list[Slot] = []
    while (slot := slots.take(nbytes)) is not None:
        assert slot.offset % ALIGN_BYTES == 0
        assert slots.is_alike(slot, nbytes)
        found.append(slot)
    places = sorted(slot.offset for slot in found)
    assert all(b - a >= nbytes for a, b in pairwise(places))
    assert places[-1] + nbytes <= slots.capacity_bytes
    assert slots.used_bytes <= slots.capacity_bytes
    slots.check()


def test_slots_of_many_sizes_never_overlap() -> None:
    rng = random.Random(3)
    slots = GpuSlots(2 * MIB)
    held: dict[Slot, int] = {}
    for _ in range(3000):
        if held and rng.random() < 0.5:
            slot = rng.choice(list(held))
            del held[slot]
            slots.give_back(slot)
            continue
        nbytes = rng.choice([100, 700, 5000, 5001, 70_000, 300_000])
        taken = slots.take(nbytes)
        if taken is not None:
            held[taken] = nbytes
            spans = sorted((slot.offset, slot.offset + size) for slot, size in held.items())
            assert all(a[1] <= b[0] for a, b in pairwise(spans))
            assert all(start % ALIGN_BYTES == 0 for start, _ in spans)
    slots.check()


def test_what_never_fits_is_refused() -> None:
    slots = GpuSlots(MIB)
    assert slots.nbytes_max == MIB
    assert slots.take(MIB + 1) is None
    assert slots.slabs_to_clear(MIB + 1, lambda slab: 0.0) is None
    assert slots.take(MIB) is not None
    assert slots.take(1) is None


def test_a_size_is_alike_only_to_its_own_class() -> None:
    slots = GpuSlots(MIB)
    slot = slots.take(5000)
    assert slot is not None
    assert slots.is_alike(slot, 5000)
    assert slots.is_alike(slot, 5119)
    assert not slots.is_alike(slot, 4000)
    assert not slots.is_alike(slot, 9000)


def test_slabs_to_clear_make_room() -> None:
    slots = GpuSlots(MIB)
    small = []
    while (slot := slots.take(5000)) is not None:
        small.append(slot)
    for slab in slots.slabs_to_clear(300_000, lambda slab: float(slab.num_used)) or ():
        for slot in list(slab.used):
            slots.give_back(slot)
    assert slots.take(300_000) is not None
    slots.check()
