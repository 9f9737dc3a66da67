"""Leases: who holds what until when, and that a late writer never gets a slot back too early."""

import random
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from respkv.engine.leases import LEASES_MAX, Lease, LeaseTable, Mode
from respkv.errors import Busy, LeaseGone
from respkv.tiers.slab import SlabAllocator, Slot

_allocator = SlabAllocator(1 << 20)


def new_slot() -> Slot:
    slot = _allocator.take(100)
    assert slot is not None
    return slot


def make_table() -> tuple[LeaseTable, list[Slot]]:
    given_back: list[Slot] = []
    return LeaseTable(given_back.append, quarantine_s=60.0), given_back


def test_a_lease_ends_once_and_gives_back_each_slot_once() -> None:
    table, given_back = make_table()
    slots = [new_slot(), new_slot()]
    lease = table.begin(1, Mode.READ, slots, 10.0)
    assert table.get(1, lease.number) is lease
    assert table.end(1, lease.number)
    assert not table.end(1, lease.number)
    assert given_back == slots
    table.check()


def test_a_lease_belongs_to_its_owner() -> None:
    table, given_back = make_table()
    lease = table.begin(1, Mode.READ, [new_slot()], 10.0)
    with pytest.raises(LeaseGone, match=f"lease {lease.number} has lapsed or was never given"):
        table.get(2, lease.number)
    assert not table.end(2, lease.number)
    assert given_back == []


def test_a_lease_on_nothing_is_a_lease() -> None:
    table, given_back = make_table()
    lease = table.begin(1, Mode.READ, [], 10.0)
    assert table.end(1, lease.number)
    assert given_back == []


def test_a_reader_that_overstays_loses_its_slots_and_is_told() -> None:
    table, given_back = make_table()
    slot = new_slot()
    lease = table.begin(1, Mode.READ, [slot], 10.0)
    assert table.lapse(9.9) == []
    assert given_back == []
    assert table.lapse(10.0) == []
    assert given_back == [slot]
    assert not table.end(1, lease.number)


def test_the_slot_of_a_writer_that_overstays_waits_until_it_cannot_be_written_any_more() -> None:
    table, given_back = make_table()
    slot = new_slot()
    lease = table.begin(1, Mode.WRITE, [slot], 10.0)
    assert table.lapse(10.0) == [1]
    assert table.lapse(11.0) == []  # its owner is named once
    with pytest.raises(LeaseGone):
        table.get(1, lease.number)
    assert table.lapse(500.0) == []
    assert given_back == []  # its owner has not gone yet
    table.drop_owner(1, 500.0)
    assert table.quarantined == 1
    assert table.holders() == {slot: 1}
    table.lapse(559.9)
    assert given_back == []
    table.lapse(560.0)
    assert given_back == [slot]
    assert (table.quarantined, len(table)) == (0, 0)


def test_an_overdue_writer_that_gives_up_is_told_that_it_was_late() -> None:
    table, given_back = make_table()
    lease = table.begin(1, Mode.WRITE, [new_slot()], 10.0)
    table.lapse(10.0)
    assert not table.end(1, lease.number)
    assert len(given_back) == 1


def test_a_connection_that_leaves_gives_back_readings_and_writings_at_once() -> None:
    table, given_back = make_table()
    table.begin(1, Mode.READ, [new_slot(), new_slot()], 10.0)
    table.begin(1, Mode.WRITE, [new_slot()], 10.0)
    kept = table.begin(2, Mode.READ, [new_slot()], 10.0)
    table.drop_owner(1, 5.0)
    table.drop_owner(3, 5.0)
    assert len(given_back) == 3
    assert len(table) == 1
    assert table.get(2, kept.number) is kept
    table.check()


def test_a_writing_connection_that_was_closed_on_may_write_until_after_its_deadline() -> None:
    table, given_back = make_table()
    table.begin(1, Mode.READ, [new_slot()], 10.0)
    slot = new_slot()
    table.begin(1, Mode.WRITE, [slot], 10.0)
    table.drop_owner(1, 5.0, may_write=True)
    assert len(given_back) == 1
    table.lapse(69.9)
    assert len(given_back) == 1
    table.lapse(70.0)
    assert given_back[1:] == [slot]


def test_a_slot_that_was_taken_over_is_not_given_back() -> None:
    table, given_back = make_table()
    slot = new_slot()
    lease = table.begin(1, Mode.WRITE, [slot], 10.0)
    assert table.take_over(lease) is slot
    table.drop_owner(1, 5.0)
    table.lapse(100.0)
    assert given_back == []
    table.check()


class LeaseMachine(RuleBasedStateMachine):
    """Leases in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = (new_slot() for _ in count())
        self.given_back: list[Slot] = []
        self.table = LeaseTable(self.given_back.append, quarantine_s=10.0)
        self.leases: list[Lease] = []
        self.taken_over: list[Slot] = []
        self.waiting: list[tuple[float, Slot]] = []
        self.expected: list[Slot] = []
        self.now = 0.0

    @rule(
        owner=st.integers(1, 3),
        is_writing=st.booleans(),
        span=st.floats(0, 20),
        num=st.integers(0, 3),
    )
    def begin(self, owner: int, is_writing: bool, span: float, num: int) -> None:
        slots = [next(self.slots) for _ in range(1 if is_writing else num)]
        mode = Mode.WRITE if is_writing else Mode.READ
        self.leases.append(self.table.begin(owner, mode, slots, self.now + span))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        assert not self.table.end(lease.owner + 1, lease.number)
        assert self.table.end(lease.owner, lease.number) == (not lease.is_overdue)
        self.leases.remove(lease)
        self.expected += lease.slots

    @precondition(lambda self: any(each.mode is Mode.WRITE for each in self.leases))
    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from([e for e in self.leases if e.mode is Mode.WRITE]))
        if not lease.is_overdue:
            assert self.table.get(lease.owner, lease.number) is lease
            self.taken_over.append(self.table.take_over(lease))
            self.leases.remove(lease)

    @rule(owner=st.integers(1, 3))
    def drop(self, owner: int) -> None:
        self.table.drop_owner(owner, self.now)
        for lease in [each for each in self.leases if each.owner == owner]:
            self.leases.remove(lease)
            if lease.is_overdue:
                self.waiting.append((self.now + 10.0, lease.slots[0]))
            else:
                self.expected += lease.slots

    @rule(span=st.floats(0, 15))
    def pass_time(self, span: float) -> None:
        self.now += span
        due = [each for each in self.leases if each.deadline <= self.now and not each.is_overdue]
        late = [each for each in due if each.mode is Mode.WRITE]
        assert sorted(self.table.lapse(self.now)) == sorted(each.owner for each in late)
        assert all(each.is_overdue for each in late)
        for lease in due:
            if lease.mode is Mode.READ:
                self.leases.remove(lease)
                self.expected += lease.slots
        over = [each for each in self.waiting if each[0] <= self.now]
        self.waiting = [each for each in self.waiting if each[0] > self.now]
        self.expected += [slot for _, slot in over]

    @invariant()
    def agrees(self) -> None:
        self.table.check()
        assert len(self.table) == len(self.leases)
        assert self.table.quarantined == len(self.waiting)
        # Everything that was ever held is held still or was given back, once.
        assert sorted(map(id, self.given_back)) == sorted(map(id, self.expected))
        held = {slot for lease in self.leases for slot in lease.slots}
        assert self.table.holders().keys() == held | {slot for _, slot in self.waiting}
        assert not held.intersection(self.given_back, self.taken_over)


def test_the_table_agrees_with_a_plain_list() -> None:
    run_state_machine_as_test(
        LeaseMachine, settings=settings(max_examples=80, stateful_step_count=40, deadline=None)
    )


def test_leases_that_come_and_go_leave_no_deadlines_behind() -> None:
    table, _ = make_table()
    slot = new_slot()
    for _ in range(5000):
        table.end(1, table.begin(1, Mode.READ, [slot], 10.0).number)
    assert len(table._deadlines) < 1100


def test_one_connection_has_a_bounded_number_of_leases() -> None:
    table, _ = make_table()
    for _ in range(LEASES_MAX):
        table.check_may_begin(1)
        table.begin(1, Mode.READ, [], 10.0)
    with pytest.raises(Busy, match="release some first"):
        table.check_may_begin(1)
    table.check_may_begin(2)


def test_leases_lapse_in_order_after_old_deadlines_were_swept() -> None:
    rng = random.Random(1)
    table, _ = make_table()
    slot = new_slot()
    begun = [table.begin(1, Mode.READ, [slot], rng.uniform(0, 100)) for _ in range(6000)]
    for lease in rng.sample(begun, k=5500):
        table.end(1, lease.number)
        begun.remove(lease)
    for now in range(0, 101, 5):
        table.lapse(now)
        assert len(table) == sum(lease.deadline > now for lease in begun)
