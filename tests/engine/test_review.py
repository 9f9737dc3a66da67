"""What a review found: work and memory that one client could make grow without an end."""

import time

from respkv.engine.entry import Entry
from respkv.engine.eviction import ASKS_MAX, PriorityPolicy, Verdict, make_policy
from respkv.engine.history import History
from respkv.engine.leases import LeaseTable, Mode
from respkv.wire.stride import take_run


def test_a_run_that_ends_early_costs_no_look_at_all_that_follows() -> None:
    data = bytearray((b"$1\r\na\r\n" * 4 + b"$2\r\nab\r\n") * 50_000)
    before = time.thread_time()
    for _ in range(1000):
        assert take_run(data, 0, 1 << 20) == ([b"a"] * 4, 28)
    assert time.thread_time() - before < 0.2


def test_a_priority_that_nothing_has_any_more_leaves_no_queue() -> None:
    policy = make_policy("lru")
    assert isinstance(policy, PriorityPolicy)
    for priority in range(1000):
        entry = Entry(b"key", "kvpage", 1, 0.0)
        entry.priority = priority
        policy.insert(entry)
        policy.remove(entry)
    assert not policy._queues
    assert not policy._priorities


def test_where_all_is_held_one_call_asks_only_so_many() -> None:
    policy = make_policy("lru")
    entries = [Entry(b"%d" % number, "kvpage", 1, 0.0) for number in range(3 * ASKS_MAX)]
    for entry in entries:
        policy.insert(entry)
    asked = []
    free = entries[-1]

    def verdict(entry: Entry) -> Verdict:
        asked.append(entry)
        return Verdict.EVICT if entry is free else Verdict.HELD

    victims: list[Entry | None] = []
    while not victims or victims[-1] is None:
        asked.clear()
        victims.append(policy.victim(verdict, 1.0))
        assert len(asked) <= 2 * ASKS_MAX + 100
    assert victims[-1] is free
    assert len(victims) <= 4


def test_the_oldest_reason_is_forgotten_at_once_however_many_there_were() -> None:
    history = History(count_max=50_000)
    for number in range(50_000):
        history.note(b"%d" % number, "evicted")
    before = time.thread_time()
    for number in range(50_000, 70_000):
        history.note(b"%d" % number, "deleted")
    assert time.thread_time() - before < 0.1
    assert history.find(b"19999") is None
    assert history.find(b"20000") == "evicted"


def test_leases_that_ended_leave_no_tickets_behind() -> None:
    table = LeaseTable(lambda slot: None)
    for _ in range(10_000):
        lease = table.begin(1, Mode.READ, [], 1000.0)
        assert table.end(1, lease.number)
    assert len(table._deadlines) <= 2000
    table.check()
