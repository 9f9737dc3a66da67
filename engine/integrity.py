"""Whether every slot in use and every copy in a file is accounted for."""

from collections import Counter
from collections.abc import Iterable, Mapping

from respkv.engine.copies import Copies
from respkv.engine.entry import ENTRY_BYTES, Entry
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
        if entry.is_cold:
            continue  # the copies answer for those
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


def check_copies(copies: Copies, entries: Iterable[Entry]) -> None:
    """Assert that each entry has a copy or waits for one, and that the bytes add up."""
    entries = list(entries)
    present = set(entries)
    cold = [entry for entry in entries if entry.is_cold]
    assert copies.num_cold == len(cold)
    assert copies.cold_bytes == sum(ENTRY_BYTES + len(entry.key) for entry in cold)
    assert copies.num_records == sum(len(entry.records) for entry in entries)
    for entry in entries:
        assert entry.records or not entry.is_cold
        tiers = [record.tier for record in entry.records]
        assert tiers == sorted(set(tiers))
        assert all(record.owner is entry for record in entry.records)
        is_queued = (
            entry in copies.dirty_of(entry)
            or entry in copies.writing
            or entry in copies.given_up
            or entry in copies.admission.left_out
        )
        if copies.is_on and not entry.records:
            assert is_queued or entry.nbytes > copies.payload_bytes_max
        assert not (entry.records and entry in copies.dirty_of(entry))
    assert present.issuperset(copies.dirty_large)
    assert present.issuperset(copies.dirty_small)
    assert present.issuperset(copies.owed)
    assert present.issuperset(copies.given_up)
    assert not any(entry.records for entry in copies.given_up)
    assert present.issuperset(copies.admission.left_out)
    assert not any(entry.records for entry in copies.admission.left_out)
    assert present.issuperset(copies.admission.insisted)
    assert not set(copies.admission.left_out).intersection(copies.dirty_large, copies.given_up)
    assert present.issuperset(copies.urgent)
    assert present.issuperset(copies.kept)
    for entry, writing in copies.writing.items():
        assert entry in present
        assert not writing.is_void
    dirt = [*copies.dirty_large.values(), *copies.dirty_small.values()]
    assert all(not each.is_small for each in copies.dirty_large.values())
    assert copies.queued_bytes == sum(each.nbytes for each in dirt if not each.is_small)
    assert copies.queued_small_bytes == sum(each.nbytes for each in dirt if each.is_small)
    flying = [each.dirt.nbytes for each in copies.writing.values() if each.dirt is not None]
    assert copies.writing_bytes == sum(flying)
