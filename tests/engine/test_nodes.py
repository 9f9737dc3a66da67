"""Pages and their parts: they go together, whatever makes room, and nothing reachable is left over."""

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio.lowlevel
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.eviction import POLICIES, Verdict
from respkv.engine.nodes import descendants, page_of, right_behind, with_descendants
from respkv.engine.spaces import Limits
from respkv.errors import OutOfMemory, QuotaExceeded
from respkv.page import Part, part_of
from tests.engine.fake_tier import FakeTier
from tests.engine.files import clean, get, make_cold, opened, until
from tests.fakes import make_cache

NUM_PAGES = 16
PAGE_BYTES, PART_BYTES, STATE_BYTES = 30_000, 9_000, 120_000  # each in a class of its own


def page_name(number: int) -> bytes:
    return b"ns:%064x" % number


def put_page(cache: Cache, number: int, parent: int | None = None, **how: Any) -> Entry:
    behind = b"" if parent is None else page_name(parent)
    return cache.put(page_name(number), bytes(PAGE_BYTES), Put("kvpage", parent=behind, **how))


def put_part(cache: Cache, number: int, suffix: bytes, nbytes: int = PART_BYTES) -> Entry:
    key = page_name(number)
    return cache.put(key + suffix, bytes(nbytes), Put("kvpage", parent=key))


def pin_more(cache: Cache) -> None:
    """Put pages that cannot go, until there is no room for one more."""
    for number in range(100):
        cache.pin(cache.put(b"x%d" % number, bytes(60_000), Put("kvpage")), cache.clock.now + 1)


@pytest.mark.parametrize(
    ("suffix", "part"),
    [
        (b"", None),
        (b".g.local", Part.BOUND),
        (b".s.mamba", Part.FREE),
        (b".logits", Part.FREE),
        (b".hidden", Part.FREE),
        (b".g", None),
        (b".logits.x", None),
        (b".other", None),
        (b"logits", None),
    ],
)
def test_a_part_is_known_by_its_key(suffix: bytes, part: Part | None) -> None:
    cache, _ = make_cache()
    put_page(cache, 1)
    entry = cache.put(page_name(1) + suffix, bytes(100), Put("kvpage"))
    assert entry.part is part is part_of(entry.key)
    assert part_of(b"ns:" + b"a" * 63 + b".logits") is None
    assert part_of(b"x" * 10) is part_of(b"a.b:" + b"0" * 64) is None


def test_parts_hang_on_their_page_and_are_not_behind_it() -> None:
    cache, _ = make_cache()
    page, child = put_page(cache, 1), put_page(cache, 2, 1)
    bound, free = put_part(cache, 1, b".g.local"), put_part(cache, 1, b".logits")
    assert page.children == {child}
    assert page.parts == {bound, free}
    assert [page_of(each) for each in (page, bound, free, child)] == [page, page, free, child]
    assert set(right_behind(page)) == set(descendants(page)) == {child, bound, free}
    assert with_descendants(page)[0] is page
    cache.check()


def test_a_part_that_comes_before_its_page_waits_for_it() -> None:
    cache, _ = make_cache()
    bound = put_part(cache, 1, b".g.local")
    assert page_of(bound) is bound
    page = put_page(cache, 1)
    assert page.parts == {bound}
    assert page_of(bound) is page
    cache.check()


@pytest.mark.parametrize("how", ["delete", "expire", "overwrite"])
def test_a_page_takes_its_parts_along(how: str) -> None:
    cache, clock = make_cache()
    page = put_page(cache, 1)
    parts = [put_part(cache, 1, suffix) for suffix in (b".g.local", b".s.mamba", b".logits")]
    if how == "delete":
        cache.delete(page)
    elif how == "expire":
        cache.expire_at(page, clock.wall_ms + 1)
        clock.advance(1)
        assert cache.expire_due(10) == 1
    else:
        cache.put(page.key, b"a string")
    assert all(part.position < 0 and part.key not in cache.entries for part in parts)
    cache.check()


def test_a_part_has_no_time_but_that_of_its_page() -> None:
    cache, clock = make_cache()
    page = put_page(cache, 1, expires_ms=clock.wall_ms + 1000)
    ends = clock.wall_ms + 1
    part = cache.put(
        page.key + b".g.local", bytes(99), Put("kvpage", parent=page.key, expires_ms=ends)
    )
    assert part.expires_ms == 0
    alone = cache.put(page_name(9) + b".logits", bytes(99), Put("kvpage", expires_ms=ends))
    assert alone.expires_ms == ends


def test_a_bound_part_is_not_lost_while_its_page_has_pages_behind_it() -> None:
    cache, _ = make_cache()
    page, child = put_page(cache, 1), put_page(cache, 2, 1)
    part, free = put_part(cache, 1, b".g.local"), put_part(cache, 1, b".logits")
    verdict = cache.room.verdict
    assert [verdict(each) for each in (page, part)] == [Verdict.PARENT, Verdict.PARENT]
    assert [verdict(each) for each in (child, free)] == [Verdict.EVICT, Verdict.EVICT]
    cache.delete(child)
    assert [verdict(each) for each in (page, part)] == [Verdict.EVICT, Verdict.EVICT]
    cache.room.evict(part)
    assert not cache.entries
    cache.check()


def test_whoever_holds_a_part_holds_its_page_and_all_its_parts() -> None:
    cache, clock = make_cache()
    page = put_page(cache, 1)
    bound, state = put_part(cache, 1, b".g.local"), put_part(cache, 1, b".s.mamba")
    verdict = cache.room.verdict
    for held in (page, bound, state):
        cache.pin(held, clock.now + 1)
        assert verdict(page) is verdict(bound) is Verdict.HELD
        assert verdict(state) is (Verdict.HELD if held is state else Verdict.EVICT)
        cache.pin(held, 0)
        slot = held.slot
        assert slot is not None
        cache.borrow(slot)
        assert verdict(page) is verdict(bound) is Verdict.HELD
        cache.restore(slot)
        cache.promise(held, clock.now + 1)
        assert verdict(page) is verdict(bound) is Verdict.HELD
        held.held_until = 0.0
    assert verdict(page) is Verdict.EVICT


def test_a_parked_part_comes_back_when_its_page_becomes_a_leaf() -> None:
    cache, _ = make_cache(1 << 20)
    put_page(cache, 1)
    for number in range(2, 12):
        put_page(cache, number, 1)
    part = put_part(cache, 1, b".g.local", 60_000)
    for each in list(cache.entries.values()):
        cache.pin(each, cache.clock.now + 1)
    cache.pin(part, 0.0)
    with pytest.raises(OutOfMemory):  # the only one that is not held is parked
        cache.reserve(1_000_000)
    with pytest.raises(OutOfMemory):
        pin_more(cache)
    assert part.position >= 0
    cache.check()
    for held in cache.entries.values():
        held.pinned_until = 0.0
    for number in range(2, 12):
        cache.delete(cache.entries[page_name(number)])
    cache.check()
    assert cache.room.verdict(part) is Verdict.EVICT


def test_parts_are_used_when_their_page_is_matched() -> None:
    cache, clock = make_cache()
    page = put_page(cache, 1)
    bound, state = put_part(cache, 1, b".g.local"), put_part(cache, 1, b".s.mamba")
    then = clock.now
    clock.advance(5)
    cache.match([page.key], clock.now + 1)
    assert page.touched == bound.touched == clock.now
    assert state.touched == then  # only the one at the end of a match is used


class NodeMachine(RuleBasedStateMachine):
    """Pages with parts in a memory that is too small for them; nothing is ever torn apart."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.clock = make_cache(768 << 10)
        self.whole: dict[bytes, set[bytes]] = {}  # bound parts that each page was given
        self.borrowed: list[Any] = []
        self.pinned: dict[bytes, float] = {}
        for number in range(NUM_PAGES):  # as much as there is room for, and more
            self.put_page(number, number - 1 if number % 4 else -1, 0)
            self.put_bound(number, b"a")
            self.put_bound(number, b"b")
            self.put_free(number, b".logits")

    @rule(
        number=st.integers(0, NUM_PAGES - 1),
        behind=st.integers(-1, NUM_PAGES - 1),
        priority=st.sampled_from([0, 0, 1]),
    )
    def put_page(self, number: int, behind: int, priority: int) -> None:
        """A page stands behind one with a lower number that is there, or behind none."""
        self.clock.advance(0.5)
        parent = self.cache.entries.get(page_name(behind)) if behind < number else None
        if page_name(number) in self.cache.entries:
            return
        if parent is not None:
            self.cache.promise(parent, self.clock.now + 0.1)  # as a put of a sequence does
        try:
            put_page(self.cache, number, behind if parent else None, priority=priority)
        except (OutOfMemory, QuotaExceeded):
            return
        self.whole[page_name(number)] = set()

    @rule(number=st.integers(0, NUM_PAGES - 1), group=st.sampled_from([b"a", b"b"]))
    def put_bound(self, number: int, group: bytes) -> None:
        self.put_some_part(number, b".g." + group, PART_BYTES if group == b"a" else PAGE_BYTES)

    @rule(number=st.integers(0, NUM_PAGES - 1), suffix=st.sampled_from([b".s.m", b".logits"]))
    def put_free(self, number: int, suffix: bytes) -> None:
        self.put_some_part(number, suffix, STATE_BYTES if suffix == b".s.m" else 600)

    def put_some_part(self, number: int, suffix: bytes, nbytes: int) -> None:
        key = page_name(number)
        page = self.cache.entries.get(key)
        if page is None:
            return
        self.clock.advance(0.5)
        self.cache.promise(page, self.clock.now + 0.1)
        try:
            put_part(self.cache, number, suffix, nbytes)
        except (OutOfMemory, QuotaExceeded):
            return
        if part_of(key + suffix) is Part.BOUND:
            self.whole[key].add(key + suffix)

    @rule(nbytes=st.sampled_from([600, PART_BYTES, PAGE_BYTES, STATE_BYTES, 300_000]))
    def put_value(self, nbytes: int) -> None:
        self.clock.advance(0.5)
        try:
            self.cache.put(b"value-%d" % nbytes, bytes(nbytes))
        except OutOfMemory:
            return

    @rule(choice=st.integers(0, 99), seconds=st.sampled_from([0.0, 3.0, 9.0]))
    def pin(self, choice: int, seconds: float) -> None:
        if entry := self.chosen(choice):
            self.cache.pin(entry, self.clock.now + seconds if seconds else 0.0)
            self.pinned[entry.key] = entry.pinned_until

    @rule(choice=st.integers(0, 99))
    def borrow(self, choice: int) -> None:
        entry = self.chosen(choice)
        if entry is not None and entry.slot is not None:
            self.cache.borrow(entry.slot)
            self.borrowed.append(entry.slot)

    @rule()
    def restore(self) -> None:
        if self.borrowed:
            self.cache.restore(self.borrowed.pop())

    @rule(choice=st.integers(0, 99))
    def delete_page(self, choice: int) -> None:
        entry = self.chosen(choice)
        if entry is not None and entry.part is None and not entry.children:
            for each in with_descendants(entry):
                self.pinned.pop(each.key, None)
            self.cache.delete(entry)

    @rule(choice=st.integers(0, 99))
    def match(self, choice: int) -> None:
        if (entry := self.chosen(choice)) is not None and entry.part is None:
            self.cache.match([entry.key], self.clock.now + 1)

    @rule(name=st.sampled_from(POLICIES))
    def use_policy(self, name: str) -> None:
        self.cache.room.use_policy(name, iter(self.cache.entries.values()))

    @rule(share=st.sampled_from([0.4, 1.0]))
    def change_budget(self, share: float) -> None:
        self.cache.slabs.budget_bytes = int(share * self.cache.slabs.capacity_bytes)
        self.cache.room.shrink()

    @rule(nbytes=st.sampled_from([0, 200_000, 450_000]))
    def limit(self, nbytes: int) -> None:
        with suppress(QuotaExceeded):
            self.cache.accounts.set_limits(b"ns", Limits(nbytes))

    def chosen(self, choice: int) -> Entry | None:
        entries = list(self.cache.entries.values())
        return entries[choice % len(entries)] if entries else None

    @invariant()
    def is_whole(self) -> None:
        self.cache.check()
        check_whole(self.cache, self.whole)
        for key, ends in self.pinned.items():
            assert ends <= self.clock.now or key in self.cache.entries

    def teardown(self) -> None:
        for slot in self.borrowed:
            self.cache.restore(slot)
        self.cache.flush()
        self.cache.check()
        assert self.cache.slabs.used_bytes == 0


def check_whole(cache: Cache, whole: dict[bytes, set[bytes]]) -> None:
    """Assert that pages have the bound parts they were given, and that nothing hangs in the air."""
    for key, entry in cache.entries.items():
        if entry.kind == "kvpage":
            assert not entry.parent_key or entry.parent is not None, f"{key!r} is out of reach"
    for key, parts in whole.items():
        there = parts & cache.entries.keys()
        assert there == (parts if key in cache.entries else set())


def test_memory_that_is_short_never_tears_a_page_from_its_parts() -> None:
    run_state_machine_as_test(
        NodeMachine, settings=settings(max_examples=120, stateful_step_count=60, deadline=None)
    )


# -- with files -----------------------------------------------------------------------------------


def put_tree(cache: Cache) -> dict[bytes, set[bytes]]:
    """Put two chains of pages, each with two bound parts and some with a state."""
    whole: dict[bytes, set[bytes]] = {}
    for number in range(8):
        key = page_name(number)
        put_page(cache, number, number - 1 if number % 4 else None)
        whole[key] = {key + b".g.a", key + b".g.b"}
        for part in sorted(whole[key]):
            put_part(cache, number, part[len(key) :])
        if number % 2:
            put_part(cache, number, b".s.m", 600)
    return whole


@pytest.mark.anyio
async def test_what_is_in_a_file_is_demoted_alone_and_found() -> None:
    cache, _ = make_cache()
    async with opened(cache, FakeTier()) as mover:
        page, part = put_page(cache, 1), put_part(cache, 1, b".g.local")
        put_page(cache, 2, 1)
        await clean(cache, mover)
        assert cache.room.verdict(part) is Verdict.EVICT
        cache.room.evict(part)
        assert part.is_cold
        assert not page.is_cold
        assert await get(cache, mover, part.key) == bytes(PART_BYTES)


@pytest.mark.anyio
async def test_a_restart_finds_parts_on_their_pages() -> None:
    tier = FakeTier()
    cache, _ = make_cache()
    async with opened(cache, tier):
        put_tree(cache)
    cache, _ = make_cache()
    async with opened(cache, FakeTier(tier.log)):
        page = cache.entries[page_name(3)]
        assert page.parts is not None
        assert {part.key[67:] for part in page.parts} == {b".g.a", b".g.b", b".s.m"}
        assert {part.part for part in page.parts} == {Part.BOUND, Part.FREE}
        assert page.children is None


@pytest.mark.anyio
@pytest.mark.parametrize("place", [0, 3, 5])
async def test_the_last_copy_of_a_part_takes_the_page_along_and_all_behind_it(place: int) -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        whole = put_tree(cache)
        await make_cold(cache, mover)
        part = cache.entries[page_name(place) + b".g.b"]
        tier.drop(part.records[0], "evicted")
        await until(lambda: page_name(place) not in cache.entries)
        check_whole(cache, whole)
        assert (page_name(place - 1) in cache.entries) == bool(place % 4)


@pytest.mark.anyio
async def test_a_copy_that_somebody_was_told_of_is_kept_with_its_pages_and_their_parts() -> None:
    cache, clock = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        put_tree(cache)
        await make_cold(cache, mover)
        clock.advance(1000)
        needed = [page_name(4), page_name(6), page_name(6) + b".g.a", page_name(7) + b".g.b"]
        records = [cache.entries[key].records[0] for key in needed]
        assert not any(tier.keep(record) for record in records)
        cache.entries[page_name(7)].held_until = clock.now + 100
        assert all(tier.keep(record) for record in records)
        assert not tier.keep(cache.entries[page_name(3) + b".g.a"].records[0])


@pytest.mark.anyio
async def test_a_part_that_is_corrupt_goes_alone_because_it_may_come_again() -> None:
    cache, _ = make_cache()
    tier = FakeTier()
    async with opened(cache, tier) as mover:
        put_tree(cache)
        await make_cold(cache, mover)
        part = cache.entries[page_name(1) + b".g.b"]
        tier.drop(part.records[0], "corrupt")
        assert part.key not in cache.entries
        assert page_name(3) in cache.entries
        cache.check()
        put_part(cache, 1, b".g.b")
        assert cache.entries[part.key].parent is cache.entries[page_name(1)]


@pytest.mark.anyio
async def test_an_index_that_is_full_forgets_pages_with_their_parts() -> None:
    cache, clock = make_cache()
    async with opened(cache, FakeTier()) as mover:
        whole = put_tree(cache)
        await make_cold(cache, mover)
        state = cache.entries[page_name(3) + b".s.m"]
        while cache.entries:
            before = len(cache.entries)
            clock.advance(1)
            cache.forget_cold()
            assert len(cache.entries) < before
            check_whole(cache, whole)
            cache.check()
        assert state.position < 0


@pytest.mark.anyio
async def test_cold_parts_of_pages_in_memory_can_be_forgotten_with_them() -> None:
    cache, clock = make_cache()
    async with opened(cache, FakeTier()) as mover:
        page, part = put_page(cache, 1), put_part(cache, 1, b".g.a")
        await clean(cache, mover)
        cache.demote(part)
        cache.pin(page, clock.now + 1)
        cache.forget_cold()
        assert part.position >= 0
        cache.pin(page, 0)
        cache.forget_cold()
        assert not cache.entries


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(6))
async def test_files_that_are_short_never_tear_a_page_from_its_parts(seed: int) -> None:
    """Puts, matches, loads, full indexes and reclaims in any order, all at a small memory."""
    chance = random.Random(seed)
    cache, clock = make_cache(1 << 20)
    tier = FakeTier()
    whole: dict[bytes, set[bytes]] = {}

    def put(number: int) -> None:
        key, parent = page_name(number), number - 1 if number % 6 else None
        if key in cache.entries or (parent is not None and page_name(parent) not in cache.entries):
            return
        if parent is not None:
            cache.promise(cache.entries[page_name(parent)], clock.now + 0.1)
        page = put_page(cache, number, parent)
        whole[key] = set()
        cache.promise(page, clock.now + 0.1)
        for suffix, nbytes in ((b".g.a", PART_BYTES), (b".g.b", PAGE_BYTES), (b".s.m", 600)):
            put_part(cache, number, suffix, nbytes)
            if suffix != b".s.m":
                whole[key].add(key + suffix)

    def match(number: int) -> None:
        first = number - number % 6
        keys = [page_name(each) for each in range(first, number + 1)]
        cache.match(keys, clock.now + chance.choice([0.1, 3.0]))

    def reclaim() -> None:
        for record in chance.sample(list(tier.records), min(5, len(tier.records))):
            if record in tier.records and not tier.keep(record):
                tier.drop(record, "evicted")

    async with opened(cache, tier) as mover:
        for _ in range(400):
            clock.advance(chance.choice([0.2, 1.0]))
            number = chance.randrange(60)
            acts: list[Callable[[], None]] = [partial(put, number)] * 4
            acts += [partial(match, number), reclaim, cache.forget_cold]
            try:
                chance.choice(acts)()
            except OutOfMemory:
                await anyio.lowlevel.checkpoint()
            if chance.random() < 0.3:
                for _ in range(chance.randrange(20)):
                    await anyio.lowlevel.checkpoint()
            if chance.random() < 0.1 and (key := page_name(number)) in cache.entries:
                await get(cache, mover, key)
            cache.check()
            check_whole(cache, whole)
        assert len(whole) > 20
