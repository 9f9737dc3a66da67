"""What files take of what is in memory, and what is lost because they do not."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respkv.engine.admission import Admission, Mode
from respkv.engine.cache import Cache
from respkv.engine.entry import Entry, Put
from respkv.engine.mover import Mover
from respkv.errors import OutOfMemory
from respkv.tiers.record import Level
from tests.engine.fake_tier import FakeLog, FakeTier
from tests.engine.files import DURABLE, PAGE, make_cold, opened, settled, until
from tests.fakes import ManualClock, make_cache

pytestmark = pytest.mark.anyio
VALUE = bytes(5000)
MODES: list[Mode] = ["second", "tinylfu"]


def written(tier: FakeTier) -> set[bytes]:
    """Return the keys that were written."""
    return {key for keys in tier.writes for key in keys}


async def decide(cache: Cache, mover: Mover) -> None:
    """Let everything dirty be written or left out, as when nothing else is to be done."""
    copies = cache.copies
    mover._cleaner.idle_bytes = 1 << 40
    mover.poke()
    await until(lambda: not copies.num_dirty and not mover._cleaner.num_writes)


async def test_what_was_used_since_it_was_put_is_written_and_the_rest_is_not() -> None:
    cache, _ = make_cache()
    cache.copies.admission.mode = "second"
    async with opened(cache, tier := FakeTier()) as mover:
        for number in range(6):
            cache.put(b"k%d" % number, VALUE)
        for number in (1, 4):
            cache.use(b"k%d" % number)
        await decide(cache, mover)
        assert written(tier) == {b"k1", b"k4"}
        admission = cache.copies.admission
        assert (admission.num_admitted, admission.num_refused) == (2, 4)
        cache.check()


async def test_all_is_written_by_default() -> None:
    cache, _ = make_cache()
    async with opened(cache, tier := FakeTier()) as mover:
        for number in range(6):
            cache.put(b"k%d" % number, VALUE)
        await decide(cache, mover)
        assert len(written(tier)) == 6
        assert cache.copies.admission.num_refused == 0


async def test_what_is_used_after_it_was_left_out_is_written_before_it_is_evicted() -> None:
    cache, clock = make_cache(256 << 10)
    cache.copies.admission.mode = "second"
    async with opened(cache, tier := FakeTier()) as mover:
        first = [cache.put(b"k%d" % number, VALUE) for number in range(3)]
        await decide(cache, mover)
        assert not written(tier)
        clock.advance(1)
        cache.use(b"k1")
        for number in range(100):
            clock.advance(1)
            cache.put(b"n%d" % number, VALUE)
            await decide(cache, mover)
        assert written(tier) == {b"k1"}
        assert [each.position >= 0 for each in first] == [False, True, False]
        assert first[1].is_cold
        assert cache.copies.admission.num_lost > 50
        assert cache.stats.evicted_dirty == 0
        cache.check()


async def test_what_is_put_again_is_known_though_it_was_lost() -> None:
    cache, _ = make_cache()
    cache.copies.admission.mode = "second"
    async with opened(cache, tier := FakeTier()) as mover:
        entry = cache.put(b"k", VALUE, PAGE)
        await decide(cache, mover)
        cache.room.evict(entry)
        assert cache.find(b"k") is None
        cache.put(b"k", VALUE, PAGE)
        await decide(cache, mover)
        assert written(tier) == {b"k"}


@pytest.mark.parametrize("mode", MODES)
async def test_what_a_client_wants_to_survive_is_written(mode: Mode) -> None:
    cache, clock = make_cache()
    admission = cache.copies.admission
    admission.mode, admission.threshold = mode, 10.0
    async with opened(cache, tier := FakeTier()) as mover:
        cache.put(b"plain", VALUE)
        cache.put(b"pinned", VALUE)
        cache.pin(cache.entries[b"pinned"], clock.now + 60)
        cache.put(b"durable", VALUE, DURABLE)
        await settled(cache, mover)
        await decide(cache, mover)
        assert written(tier) == {b"pinned", b"durable"}


@pytest.mark.parametrize("mode", MODES)
async def test_a_chain_has_no_holes_in_files(mode: Mode) -> None:
    """A page is written when one behind it is, whichever had its turn first."""
    cache, clock = make_cache()
    admission = cache.copies.admission
    admission.mode, admission.threshold = mode, 10.0
    async with opened(cache, tier := FakeTier()) as mover:
        cache.put(b"a", VALUE, PAGE)
        cache.put(b"b", VALUE, Put("kvpage", parent=b"a"))
        await decide(cache, mover)
        assert not written(tier)
        cache.put(b"c", VALUE, Put("kvpage", parent=b"b", level=Level.WRITTEN))
        await settled(cache, mover)
        await decide(cache, mover)
        assert written(tier) == {b"a", b"b", b"c"}
        await make_cold(cache, mover)
        assert len(cache.match([b"a", b"b", b"c"], clock.now)) == 3


async def test_a_stop_writes_what_was_left_out_as_well() -> None:
    log = FakeLog()
    cache, _ = make_cache()
    cache.copies.admission.mode = "second"
    async with opened(cache, FakeTier(log)) as mover:
        cache.put(b"k", VALUE)
        await decide(cache, mover)
        assert cache.copies.admission.left_out
    again, _ = make_cache()
    async with opened(again, FakeTier(log)):
        assert again.find(b"k") is not None


async def test_what_a_client_wants_in_files_goes_there() -> None:
    cache, _ = make_cache()
    cache.copies.admission.mode = "second"
    async with opened(cache, tier := FakeTier()) as mover:
        entry = cache.put(b"k", VALUE, PAGE)
        await decide(cache, mover)
        mover.demotions.ask([entry])
        await until(lambda: entry.is_cold)
        assert written(tier) == {b"k"}


async def test_the_mode_may_change_at_any_time() -> None:
    cache, clock = make_cache(256 << 10)
    cache.copies.admission.mode = "second"
    async with opened(cache, tier := FakeTier()) as mover:
        cache.put(b"k", VALUE)
        await decide(cache, mover)
        assert not written(tier)
        cache.copies.admission.mode = "all"
        for number in range(100):
            clock.advance(1)
            cache.put(b"n%d" % number, VALUE)
            await decide(cache, mover)
        assert b"k" in written(tier)
        assert cache.stats.evicted == 0


def test_tinylfu_takes_all_while_files_drop_nothing_and_then_what_is_used_more() -> None:
    admission = Admission(ManualClock())
    admission.mode = "tinylfu"
    once = Entry(b"once", "kvpage", 1, 0.0)
    admission.put(once)
    assert admission.admits(once)
    for number in range(200):
        other = Entry(b"o%d" % number, "kvpage", 1, 0.0)
        admission.put(other)
        admission.dropped(other)
    assert 0.9 < admission.threshold <= 1.0
    assert not admission.admits(once)
    once.hits += 1
    assert admission.admits(once)


def test_a_value_that_was_used_and_lost_is_remembered_by_its_uses() -> None:
    admission = Admission(ManualClock())
    admission.mode, admission.threshold = "tinylfu", 3.0
    entry = Entry(b"k", "kvpage", 1, 0.0)
    admission.put(entry)
    entry.hits = 4
    admission.lost(entry)
    again = Entry(b"k", "kvpage", 1, 0.0)
    admission.put(again)
    assert admission.admits(again)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from(["all", "second", "tinylfu"]))
async def test_random_trees_keep_their_books_and_have_no_holes(seed: int, mode: Mode) -> None:
    rng = random.Random(seed)
    cache, clock = make_cache(512 << 10)
    cache.copies.admission.mode = mode
    async with opened(cache, FakeTier()) as mover:
        for number in range(60):
            clock.advance(rng.random())
            parent = rng.choice([b"", *cache.entries])
            if parent:
                cache.promise(cache.entries[parent], clock.now + 1)
            level = rng.choice([None, None, None, Level.WRITTEN])
            how = Put("kvpage", parent=parent or None, level=level)
            since = cache.copies.ticket
            try:
                cache.put(b"p%d" % number, VALUE, how)
            except OutOfMemory:  # all that could go is promised, or has still to be written
                await decide(cache, mover)
                continue
            await settled(cache, mover, since)
            if cache.entries and rng.random() < 0.4:
                cache.use(rng.choice(list(cache.entries)))
            if rng.random() < 0.3:
                await decide(cache, mover)
            for entry in cache.entries.values():
                assert not entry.parent_key or entry.parent is not None
        await decide(cache, mover)
        cache.check()
        await make_cold(cache, mover)
        assert all(entry.records for entry in cache.entries.values())
