"""Room: who goes for whom, when slabs move, and what is refused without losing anything."""

import random
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest

from respkv.engine.cache import Cache
from respkv.engine.entry import ENTRY_BYTES, Entry, Put
from respkv.engine.eviction import POLICIES, Verdict
from respkv.engine.nodes import with_descendants
from respkv.engine.room import ASK_AGAIN_S, small_cost
from respkv.errors import OutOfMemory
from tests.fakes import ManualClock, make_cache

PAGE = Put("kvpage")


def fill(cache: Cache, clock: ManualClock, name: bytes, nbytes: int) -> list[Entry]:
    """Put values of one size until one is evicted."""
    entries: list[Entry] = []
    evicted = cache.stats.evicted
    while cache.stats.evicted == evicted:
        entries.append(cache.put(b"%b%d" % (name, len(entries)), b"v" * nbytes))
        clock.advance(0.001)
    return entries


def chain(cache: Cache, clock: ManualClock, num: int, nbytes: int) -> list[Entry]:
    entries: list[Entry] = []
    for number in range(num):
        parent = entries[-1].key if entries else b""
        how = Put("kvpage", parent=parent)
        entries.append(cache.put(b"p%d" % number, b"v" * nbytes, how))
        clock.advance(0.001)
    return entries


def num_of(cache: Cache, name: bytes) -> int:
    return sum(key.startswith(name) for key in cache.entries)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_new_size_takes_slabs_from_one_that_nobody_uses_any_more(policy: str) -> None:
    cache, clock = make_cache(policy=policy)
    fill(cache, clock, b"old", 3000)
    for number in range(300):
        cache.put(b"new%d" % number, b"v" * 20_000)
        clock.advance(1)
        if number % 20 == 0:
            cache.check()
    assert num_of(cache, b"new") >= 80, "the new size is stuck in a corner"
    assert cache.room.slabs_cleared > 5


def test_one_large_value_just_put_does_not_go_for_many_small_cold_ones() -> None:
    cache, clock = make_cache()
    fill(cache, clock, b"old", 3000)
    for number in range(16):
        cache.put(b"new%d" % number, b"v" * 100_000)
        clock.advance(1)
    assert num_of(cache, b"new") >= 8


def test_sizes_that_are_used_alike_leave_each_others_slabs_alone() -> None:
    cache, clock = make_cache()
    rng = random.Random(1)
    for number in range(3000):
        cache.put(b"%d" % number, b"v" * rng.choice((600, 900, 1500, 3000)))
        clock.advance(0.001)
    cleared = cache.room.slabs_cleared
    for number in range(3000):
        cache.put(b"more%d" % number, b"v" * rng.choice((600, 900, 1500, 3000)))
        clock.advance(0.001)
    assert cache.room.slabs_cleared - cleared < 10


def test_a_slab_with_something_held_in_it_is_not_cleared() -> None:
    cache, clock = make_cache(1 << 20)
    entries = fill(cache, clock, b"old", 3000)
    present = [entry for entry in entries if entry.slot is not None]
    kept = {entry.slot.slab: entry for entry in present if entry.slot is not None}
    for entry in kept.values():
        entry.pinned_until = clock.now + 100
    with pytest.raises(OutOfMemory):
        cache.reserve(500_000)
    first = next(iter(kept.values()))
    first.pinned_until = 0.0
    clock.advance(1)
    landing = cache.reserve(40_000)
    assert all(entry.key in cache.entries for entry in kept.values() if entry is not first)
    cache.abandon(landing)
    cache.check()


def test_a_page_that_is_cleared_takes_the_pages_behind_it_along() -> None:
    cache, clock = make_cache(1 << 20)
    entries = chain(cache, clock, 8, 100_000)  # each in a slab of its own
    assert with_descendants(entries[3])[1:] == entries[4:]
    cache.put(b"large", b"v" * 500_000)
    present = [entry.key in cache.entries for entry in entries]
    assert present == sorted(present, reverse=True)
    cache.check()


def test_what_is_held_behind_a_page_keeps_the_page() -> None:
    cache, clock = make_cache(1 << 20)
    entries = chain(cache, clock, 8, 100_000)
    entries[-1].pinned_until = clock.now + 100
    with pytest.raises(OutOfMemory):
        cache.reserve(500_000)
    assert len(cache.entries) == 8


def lines_run(work: Callable[[], object]) -> int:
    """Return how many lines of Python a call runs: its cost, whatever else the machine does."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_long_chain_is_walked_once_for_one_value() -> None:
    lines = []
    for num in (250, 1000):
        cache, clock = make_cache(num * 5120)
        chain(cache, clock, num, 4000)
        while cache.slabs.take(4000) is not None:
            pass
        lines.append(lines_run(partial(cache.reserve, 200_000)))
    assert lines[1] < 8 * lines[0]  # quadratic would be 16 times as many


def test_a_small_value_is_charged_with_its_key_and_its_entry() -> None:
    cache, clock = make_cache(small_max=10_000)
    fill(cache, clock, b"k", 100)
    assert cache.room.small_bytes <= 10_000
    assert cache.room.small_bytes == sum(small_cost(key, 100) for key in cache.entries)
    num = 10_000 // (ENTRY_BYTES + 102)
    assert cache.entries.keys() == {b"k%d" % number for number in range(1, num + 1)}


def test_a_small_value_that_never_fits_evicts_nobody() -> None:
    cache, _ = make_cache(small_max=10_000)
    cache.put(b"k", b"v")
    with pytest.raises(OutOfMemory, match="never fits: small-value-memory is 10000"):
        cache.put(b"K" * 20_000, b"v")
    assert list(cache.entries) == [b"k"]


def test_small_values_that_are_all_pinned_are_named() -> None:
    cache, clock = make_cache(small_max=2000)
    for number in range(3):
        cache.put(b"%d" % number, b"v").pinned_until = clock.now + 1
    with pytest.raises(OutOfMemory, match="raise small-value-memory"):
        cache.put(b"new", b"v" * 400)
    assert cache.put(b"0", b"w").value == b"w"  # the same size takes no more room
    cache.check()


def test_making_room_for_a_value_may_evict_the_one_it_replaces() -> None:
    cache, _ = make_cache(small_max=1100)
    cache.put(b"k", b"v" * 10)
    cache.put(b"k", b"v" * 440)
    assert cache.entries[b"k"].value == b"v" * 440
    cache.check()


def test_a_lower_budget_passes_over_what_is_pinned_in_the_coldest_class() -> None:
    cache, clock = make_cache()
    for number in range(4):
        cache.put(b"cold%d" % number, b"v" * 100_000).pinned_until = clock.now + 100
    clock.advance(10)
    for number in range(20):
        cache.put(b"warm%d" % number, b"v" * 20_000)
    cache.slabs.budget_bytes = 500_000
    cache.room.shrink()
    assert cache.slabs.used_bytes <= 500_000
    assert num_of(cache, b"cold") == 4
    assert num_of(cache, b"warm") > 0
    cache.slabs.budget_bytes = 100_000
    cache.room.shrink()
    assert (num_of(cache, b"cold"), num_of(cache, b"warm")) == (4, 0)
    cache.check()


def test_a_lower_budget_holds_for_small_values_too() -> None:
    cache, _ = make_cache()
    for number in range(50):
        cache.put(b"%d" % number, b"v")
    cache.room.small_max = 5000
    cache.room.shrink()
    assert 4000 < cache.room.small_bytes <= 5000
    cache.check()


def test_a_budget_that_was_raised_again_is_used_again() -> None:
    cache, clock = make_cache()
    fill(cache, clock, b"k", 20_000)
    whole, num = cache.slabs.budget_bytes, len(cache.entries)
    cache.slabs.budget_bytes = whole // 2
    cache.room.shrink()
    assert len(cache.entries) < num
    fill(cache, clock, b"half", 20_000)
    assert cache.slabs.used_bytes <= whole // 2
    cache.slabs.budget_bytes = whole
    cache.flush()
    fill(cache, clock, b"again", 20_000)
    assert len(cache.entries) == num


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_may_change_while_entries_are_parked_held_and_ranked(policy: str) -> None:
    cache, clock = make_cache(1 << 20, policy="lru")
    entries = chain(cache, clock, 4, 100_000)
    entries[-1].pinned_until = clock.now + 5
    pinned = [cache.put(b"pinned%d" % n, b"v" * 100_000, PAGE) for n in range(2)]
    for entry in pinned:
        entry.pinned_until = clock.now + 5
    for number in range(20):  # so that some are parked and some set aside
        cache.put(b"q%d" % number, b"v" * 100_000, PAGE)
        clock.advance(0.01)
    cache.room.use_policy(policy, iter(cache.entries.values()))
    cache.check()
    assert all(entry.key in cache.entries for entry in (*entries, *pinned))
    clock.advance(10)
    for number in range(40):
        cache.put(b"r%d" % number, b"v" * 100_000, PAGE)
        clock.advance(0.01)
        cache.check()
    # wtinylfu keeps what is as good as the newcomers.
    assert policy == "wtinylfu" or not any(entry.key in cache.entries for entry in entries)


def test_a_class_whose_pages_were_all_held_is_asked_again() -> None:
    cache, clock = make_cache(1 << 20)
    held = [cache.put(b"held%d" % number, b"v" * 100_000) for number in range(8)]
    for entry in held:
        entry.pinned_until = clock.now + 5
    while cache.slabs.take(3000) is not None:
        pass  # what is left is in use for good
    for _ in range(3):
        with pytest.raises(OutOfMemory):
            cache.put(b"new", b"v" * 3000)
    clock.advance(5 + ASK_AGAIN_S)
    cache.put(b"new", b"v" * 3000)
    assert num_of(cache, b"held") < 8
    cache.check()


def test_the_verdict_is_parent_before_held_before_evict() -> None:
    cache, clock = make_cache()
    entries = chain(cache, clock, 2, 1000)
    for entry in entries:
        entry.pinned_until = clock.now + 5
    verdict = cache.room.verdict
    assert [verdict(entry) for entry in entries] == [Verdict.PARENT, Verdict.HELD]
    clock.advance(10)
    assert [verdict(entry) for entry in entries] == [Verdict.PARENT, Verdict.EVICT]
    cache.delete(entries[1])
    assert verdict(entries[0]) is Verdict.EVICT


def test_lower_priorities_go_first() -> None:
    cache, clock = make_cache(1 << 20)
    cache.put(b"dear", b"v" * 100_000, Put("kvpage", priority=1))
    clock.advance(10)
    for number in range(30):
        cache.put(b"cheap%d" % number, b"v" * 100_000, PAGE)
        clock.advance(1)
    assert b"dear" in cache.entries
