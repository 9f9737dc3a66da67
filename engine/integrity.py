"""Whether every slot in use is accounted for: by the index, a lease, a landing or a reader."""

from collections import Counter
from collections.abc import Iterable, Mapping

from respkv.engine.entry import Entry
from respkv.engine.landing import Landing
from respkv.engine.leases import LeaseTable
from respkv.tiers.slab import SlabAllocator, Slot


def check_holders(
    slabs: SlabAllocator,
    entries: Iterable[Entry],
    leases: LeaseTable,
    landings: Iterable[Landing],
    borrowed: Mapping[Slot, int],
) -> None:
    """Assert that each slot is held exactly as often as somebody holds it, and each value backed."""
    holders: Counter[Slot] = Counter(leases.holders())
    holders.update(borrowed)
    for landing in landings:
        assert landing.is_open
        holders[landing.slot] += 1
    for entry in entries:
        if entry.slot is None:
            assert entry.value is not None
            assert len(entry.value) == entry.nbytes
        else:
            assert entry.slot.owner is entry
            assert entry.slot.payload_bytes == entry.nbytes
            holders[entry.slot] += 1
    for slot in slabs.used():
        assert slot.holders == holders.pop(slot, 0), f"slot at {slot.offset} is not accounted for"
    assert not holders, "a slot that somebody holds is not one of the arena's"
