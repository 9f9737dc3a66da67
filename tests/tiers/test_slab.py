"""The allocator against a plain model, and each promise of it once."""

import math
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from respkv.errors import OutOfMemory
from respkv.tiers import sizes
from respkv.tiers.slab import Slab, SlabAllocator, Slot

UNIT = 4096
ARENA = 128 * UNIT
MIB = 1 << 20
payloads = st.one_of(
    st.sampled_from([0, 448, 512, 4000, 4032, 65536, 100_000, ARENA - 64]),
    st.integers(0, 9_000),
    st.integers(0, ARENA + UNIT),
)


class AllocatorMachine(RuleBasedStateMachine):
    """``held`` is the model: one element per hold that is not yet given back."""

    slots = Bundle("slots")

    @initialize()
    def start(self) -> None:
        self.slab_allocator = SlabAllocator(ARENA + 100, unit_bytes=UNIT)
        self.held: list[Slot] = []
        self.asked: dict[Slot, int] = {}
        self.generation = 0

    @rule(target=slots, payload=payloads)
    def take(self, payload: int) -> object:
        slot = self.slab_allocator.take(payload)
        if slot is None:
            self.expect_no_room(payload)
            return multiple()
        return self.expect_fresh(slot, payload)

    @rule(target=slots, slot=consumes(slots))
    def hold(self, slot: Slot) -> object:
        if slot not in self.asked:
            return multiple()  # a slab was cleared since
        self.slab_allocator.hold(slot)
        self.held.append(slot)
        return multiple(slot, slot)

    @rule(slot=consumes(slots))
    def give_back(self, slot: Slot) -> None:
        if slot in self.asked:
            self.drop(slot)

    @rule(payload=st.integers(0, ARENA - 64))
    def add_class(self, payload: int) -> None:
        self.slab_allocator.add_class(payload)
        assert sizes.slot_bytes(self.slab_allocator.class_of(payload)) == sizes.slot_bytes(payload)

    @rule(budget=st.one_of(st.just(ARENA), st.integers(0, ARENA)))
    def set_budget(self, budget: int) -> None:
        self.slab_allocator.budget_bytes = budget

    @rule(target=slots, payload=payloads, seed=st.integers(0, 7), pinned=st.integers(0, 3))
    def clear_and_take(self, payload: int, seed: int, pinned: int) -> object:
        used = sorted({slot.slab for slot in self.held}, key=lambda slab: slab.offset)
        choice = random.Random(seed)
        kept = set(choice.sample(used, min(pinned, len(used))))
        costs = {slab: choice.randrange(9) for slab in used}

        def cost(slab: Slab) -> float:
            return math.inf if slab in kept else costs[slab]

        slabs = self.slab_allocator.slabs_to_clear(payload, cost)
        if slabs is None:
            self.expect_no_room(payload, kept)
            return multiple()
        assert not kept & set(slabs)
        if slabs:
            assert self.slab_allocator.take(payload) is None, "clearing was not needed"
        for victim in [slot for slab in slabs for slot in slab.used]:
            for _ in range(victim.holders):
                self.drop(victim)
        slot = self.slab_allocator.take(payload)
        assert slot is not None, "clearing was not enough"
        return self.expect_fresh(slot, payload)

    def drop(self, slot: Slot) -> None:
        self.slab_allocator.give_back(slot)
        self.held.remove(slot)
        if slot not in self.held:
            del self.asked[slot]
            assert slot.owner is None

    def expect_fresh(self, slot: Slot, payload: int) -> Slot:
        assert slot not in self.asked
        assert slot.owner is None
        assert slot.payload_bytes == payload <= slot.payload_max
        assert slot.generation > self.generation
        self.generation = slot.generation
        slot.owner = object()
        self.held.append(slot)
        self.asked[slot] = payload
        return slot

    def expect_no_room(self, payload: int, kept: set[Slab] | None = None) -> None:
        # Whether there is room even if all slabs but ``kept`` (None: all in use) are cleared.
        if payload > self.slab_allocator.payload_bytes_max:
            return
        size = self.slab_allocator.class_of(payload)
        slot_bytes = sizes.slot_bytes(size)
        used = {slot.slab for slot in self.held}
        stay = used if kept is None else kept
        stay_bytes = sum(slot.slab.slot_bytes for slot in self.asked if slot.slab in stay)
        if kept is None:
            if stay_bytes + slot_bytes > self.slab_allocator.budget_bytes:
                return
        else:
            # Clearing takes neighbours, so with a low budget a kept slab may be in the way.
            if slot_bytes > self.slab_allocator.budget_bytes:
                return
            if kept and self.slab_allocator.budget_bytes < ARENA:
                return
        for slab in used:
            assert slab.class_bytes != size or (slab in stay and slab.num_used == slab.num_slots)
        spans = sorted((slab.offset, slab.offset + slab.num_units * UNIT) for slab in stay)
        edges = [0, *(edge for span in spans for edge in span), ARENA]
        room = -(-slot_bytes // UNIT) * UNIT
        assert all(stop - start < room for start, stop in zip(edges[::2], edges[1::2], strict=True))

    @invariant()
    def agrees_with_the_model(self) -> None:
        allocator = self.slab_allocator
        allocator.check()
        assert allocator.used_bytes == sum(slot.slab.slot_bytes for slot in self.asked)
        assert allocator.payload_bytes == sum(self.asked.values())
        assert allocator.free_bytes == ARENA - allocator.used_bytes
        assert all(slot.holders == self.held.count(slot) for slot in self.asked)
        stats = allocator.classes()
        assert sum(row.slots_used for row in stats) == len(self.asked)
        stop = 0
        for slot in sorted(self.asked, key=lambda slot: slot.offset):
            assert slot.offset >= stop, "slots overlap"
            stop = slot.offset + 64 + slot.payload_max
        assert stop <= ARENA


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def take(allocator: SlabAllocator, payload: int) -> Slot:
    slot = allocator.take(payload)
    assert slot is not None
    return slot


def fill(allocator: SlabAllocator, payload: int) -> list[Slot]:
    slots = []
    while (slot := allocator.take(payload)) is not None:
        slots.append(slot)
    return slots


def test_a_slot_stays_taken_until_its_last_holder_gives_it_back() -> None:
    allocator = SlabAllocator(ARENA, unit_bytes=UNIT)
    slot = take(allocator, allocator.payload_bytes_max)
    allocator.hold(slot)
    allocator.give_back(slot)
    assert allocator.take(1) is None
    allocator.give_back(slot)
    assert allocator.take(1) is not None


def test_misuse_of_a_free_slot_is_a_bug() -> None:
    allocator = SlabAllocator(ARENA, unit_bytes=UNIT)
    slot = take(allocator, 1)
    allocator.give_back(slot)
    with pytest.raises(AssertionError, match="more often"):
        allocator.give_back(slot)
    with pytest.raises(AssertionError, match="cannot be held"):
        allocator.hold(slot)


def test_a_generation_is_never_used_twice_at_one_place() -> None:
    allocator = SlabAllocator(ARENA, unit_bytes=UNIT)
    seen = set()
    for payload in [100, 5000, 100, ARENA // 2, 100] * 3:
        slot = take(allocator, payload)
        seen.add(slot.generation)
        allocator.give_back(slot)
    assert len(seen) == 15


def test_an_empty_slab_of_one_class_is_room_for_any_other() -> None:
    allocator = SlabAllocator(ARENA, unit_bytes=UNIT)
    for payload in (500, 3000, 20_000, 60_000):
        for slot in fill(allocator, payload):
            allocator.give_back(slot)
        allocator.check()
    whole = take(allocator, allocator.payload_bytes_max)
    assert whole.offset == 0


def test_a_full_arena_of_pages_wastes_at_most_two_percent() -> None:
    allocator = SlabAllocator(1 << 30)
    slots = fill(allocator, MIB)
    assert allocator.payload_bytes == len(slots) * MIB
    assert allocator.payload_bytes >= 0.98 * (1 << 30)
    allocator.check()


def test_an_exact_class_takes_pages_without_rounding() -> None:
    page = 33 * MIB
    allocator = SlabAllocator(1 << 30)
    assert allocator.class_of(page) == 34 * MIB
    allocator.add_class(page)
    assert allocator.class_of(page) == page
    assert allocator.class_of(page + 1) == 34 * MIB
    assert allocator.class_of(33 * MIB - 1) == page
    assert take(allocator, page).slab.class_bytes == page


def test_slabs_move_to_a_class_that_needs_room() -> None:
    allocator = SlabAllocator(64 * MIB)
    small = fill(allocator, 4000)
    assert allocator.take(4 * MIB) is None
    hot = {small[0].slab}
    slabs = allocator.slabs_to_clear(
        4 * MIB, lambda slab: math.inf if slab in hot else slab.num_used
    )
    assert slabs
    assert not hot & set(slabs)
    assert sum(slab.num_units for slab in slabs) * 65536 < 5 * MIB
    for slot in [slot for slab in slabs for slot in slab.used]:
        allocator.give_back(slot)
    assert take(allocator, 4 * MIB).payload_max == 4 * MIB
    allocator.check()


def test_a_small_slab_of_the_right_class_is_cleared_when_it_is_the_cheapest() -> None:
    allocator = SlabAllocator((16 * 65 + 17) * 65536)
    first, *_, last = dict.fromkeys(slot.slab for slot in fill(allocator, MIB))
    assert (first.num_slots, last.num_slots) == (4, 1)
    slabs = allocator.slabs_to_clear(MIB, lambda slab: 1 if slab is last else slab.num_units)
    assert slabs == [last]


def test_nothing_is_cleared_when_everything_is_pinned() -> None:
    allocator = SlabAllocator(ARENA, unit_bytes=UNIT)
    fill(allocator, 4000)
    assert allocator.slabs_to_clear(1, lambda slab: math.inf) is None
    assert allocator.slabs_to_clear(ARENA, lambda slab: 0) is None


def test_a_lower_budget_refuses_until_enough_was_given_back() -> None:
    allocator = SlabAllocator(64 * MIB)
    slots = [take(allocator, MIB) for _ in range(30)]
    allocator.budget_bytes = 20 * MIB
    assert allocator.take(1) is None
    while allocator.used_bytes > 19 * MIB:
        allocator.give_back(slots.pop())
    assert allocator.take(MIB) is not None
    assert allocator.take(MIB) is None
    assert allocator.used_bytes <= 20 * MIB
    slabs = allocator.slabs_to_clear(2 * MIB, lambda slab: slab.num_used)
    assert slabs
    assert sum(slab.num_used for slab in slabs) >= 2
    assert allocator.slabs_to_clear(21 * MIB, lambda slab: slab.num_used) is None


def test_a_value_larger_than_the_arena_is_refused_by_name() -> None:
    allocator = SlabAllocator(ARENA, unit_bytes=UNIT)
    assert allocator.take(allocator.payload_bytes_max + 1) is None
    with pytest.raises(OutOfMemory, match=f"up to {ARENA - 64} bytes"):
        allocator.class_of(ARENA)
    with pytest.raises(OutOfMemory, match="never fits"):
        allocator.add_class(ARENA)


def test_slots_of_large_arenas_are_made_only_when_they_are_taken() -> None:
    allocator = SlabAllocator(1 << 40)
    slot = take(allocator, 512)
    assert slot.slab.num_slots > 10_000
    assert len(slot.slab.slots) == 1


@pytest.mark.parametrize(("arena_bytes", "unit_bytes"), [(65535, 65536), (65536, 1000)])
def test_impossible_sizes_are_refused(arena_bytes: int, unit_bytes: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        SlabAllocator(arena_bytes, unit_bytes=unit_bytes)
